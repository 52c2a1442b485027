"""Wrappers around a model: the model inside is grown, and the wrapper made good again.

The names that a user has for a wrapper keep working: it stays the same object.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from meristem.core.errors import GrowthRefused
from meristem.core.growth import LINEAGE
from meristem.core.ranks import ALONE, Ranks, ranks_over

_LOG = logging.getLogger(__name__)
# Wrappers that can only be refused: what they keep of the weights, and what to do.
_REFUSED = {
    "FullyShardedDataParallel": (
        "which keeps one flat parameter of the old sizes",
        "grow the model before it is wrapped, or use torch's fully_shard",
    ),
    "ScriptModule": (
        "whose code was compiled for the old sizes",
        "grow the Python module and script it again",
    ),
    "DeepSpeedEngine": (
        "which keeps flat copies of the old parameters",
        "grow the inner module and initialise DeepSpeed again",
    ),
}
# Growths after which torch.compile runs the model without compiling it, by default.
_RECOMPILES = 8
# What nn.Module.__init__ would forget of a wrapper.
_OF_MODULES = (
    "training",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def inner(model: nn.Module) -> nn.Module:
    """The model inside of all wrappers, or the model itself.

    Raises:
        TypeError: It is no module.
        GrowthRefused: A wrapper keeps the old weights in a way of its own.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(_no_module(model))
    for wrapper in _wrappers(model):
        model = _held(wrapper)
    return model


def _no_module(given: object) -> str:
    if isinstance(given, type):
        name = given.__name__
        return (
            f"model must be a module; got the class {name}. hint: build it, {name}(...)"
        )
    return f"model must be a torch.nn.Module; got {type(given).__name__}"


def _wrappers(model: nn.Module) -> Iterator[nn.Module]:
    """The wrappers of a model, the outermost first."""
    while True:
        for kind in type(model).__mro__:
            if kind.__name__ in _REFUSED:
                keeps, remedy = _REFUSED[kind.__name__]
                raise GrowthRefused(
                    f"the model is wrapped in {kind.__name__}, {keeps}. hint: {remedy}"
                )
        held = _held(model)
        if held is model:
            return
        yield model
        model = held


def _held(model: nn.Module) -> nn.Module:
    averages = ("ModelEmaV2", "ModelEmaV3")  # timm's
    holds = isinstance(model, (DistributedDataParallel, DataParallel, AveragedModel))
    if holds or type(model).__name__ in averages:
        return model.get_submodule("module")
    if type(model).__name__ == "OptimizedModule":
        original: nn.Module = model._orig_mod  # type: ignore[assignment]
        return original
    return model


def plain(optimizer: Any) -> Any:
    """The torch optimizer inside of one that Accelerate or Lightning hands out."""
    while type(optimizer).__name__ in ("AcceleratedOptimizer", "LightningOptimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def ranks_of(model: nn.Module) -> Ranks:
    """The processes that a wrapper keeps alike; this one alone without one."""
    for wrapper in _around(model):
        return ranks_over(wrapper.process_group)
    return ALONE


def _around(model: nn.Module) -> list[DistributedDataParallel]:
    """The living wrappers whose reducers hold a model's weights: those that were named,
    else those around the model, which is what trainers hand out.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return []
    chain = _wrappers(model)
    found = [one for one in chain if isinstance(one, DistributedDataParallel)]
    if found:
        return found
    model = inner(model)
    for one in gc.get_objects():
        # Proxies answer isinstance for what they stand for.
        is_wrapper = issubclass(type(one), DistributedDataParallel)
        if is_wrapper and "module" in one._modules and inner(one) is model:
            found.append(one)
    return found


@contextmanager
def opened_host(model: nn.Module) -> Iterator[nn.Module]:
    """Within, nothing that wraps a model holds its weights; gives the model inside.

    Afterwards, also after an error, every wrapper fits what the model has become.
    """
    parallel = _around(model)
    for wrapper in parallel:
        _check_rebuilt(wrapper)
    for wrapper in parallel:
        _let_go(wrapper)
    grown = len(getattr(inner(model), LINEAGE, ()))
    try:
        yield inner(model)
    finally:
        for wrapper in reversed(parallel):
            _rebuild(wrapper)
    if any(type(one).__name__ == "OptimizedModule" for one in _wrappers(model)):
        _tell_of_recompiles(inner(model), grown)


def _check_rebuilt(wrapper: DistributedDataParallel) -> None:
    """Raise where a wrapper could not be made again as it is."""
    reason = ""
    if getattr(wrapper, "mixed_precision", None) is not None:
        reason = "has mixed_precision, whose hooks cannot be moved. hint: use autocast"
    if getattr(wrapper, "_delay_all_reduce_params", None):
        reason = "delays the reduction of named parameters. hint: wrap it without that"
    if not any(p.requires_grad for p in wrapper.module.parameters()):
        reason = "has nothing to train. hint: take the model out of it"
    if reason:
        raise GrowthRefused(f"the DistributedDataParallel around the model {reason}")


def _let_go(wrapper: DistributedDataParallel) -> None:
    """Drop the reducer, whose hooks hold every parameter."""
    del wrapper.reducer
    wrapper.logger = None


def _rebuild(wrapper: DistributedDataParallel) -> None:
    """Let a wrapper be made again, by its own constructor, around the same module."""
    kept = {key: vars(wrapper)[key] for key in _OF_MODULES if key in vars(wrapper)}
    hooks = list(wrapper._comm_hooks)
    cap = wrapper.bucket_bytes_cap / (1024 * 1024)
    # Newer versions of torch have another name for it.
    synced = "forward_sync_buffers"
    if not hasattr(wrapper, synced):
        synced = "broadcast_buffers"
    DistributedDataParallel.__init__(
        wrapper,
        wrapper.module,
        device_ids=wrapper.device_ids,
        output_device=wrapper.output_device,
        dim=wrapper.dim,
        process_group=wrapper.process_group,
        bucket_cap_mb=None if wrapper.bucket_bytes_cap_default else int(cap),
        find_unused_parameters=wrapper.find_unused_parameters,
        gradient_as_bucket_view=wrapper.gradient_as_bucket_view,
        static_graph=wrapper.static_graph,
        **{synced: getattr(wrapper, synced)},
    )
    vars(wrapper).update(kept)
    for hook, state in hooks:
        wrapper.register_comm_hook(state, hook)


def _tell_of_recompiles(model: nn.Module, before: int) -> None:
    grown = len(getattr(model, LINEAGE, ()))
    limit = getattr(torch._dynamo.config, "recompile_limit", _RECOMPILES)
    if before < grown == limit - 1:
        _LOG.warning(
            "the model has grown %d times; torch.compile compiles one code %d times at "
            "most and then runs it uncompiled. hint: raise "
            "torch._dynamo.config.recompile_limit",
            grown,
            limit,
        )


def check_optimizer(optimizer: Any) -> Optimizer:
    """A torch optimizer, out of its wrapper.

    Raises:
        TypeError: It is none.
    """
    found = plain(optimizer)
    if isinstance(optimizer, type):
        name = optimizer.__name__
        raise TypeError(
            f"optimizer must be an optimizer; got the class {name}. hint: build it, "
            f"{name}(model.parameters(), ...)"
        )
    if not isinstance(found, Optimizer):
        raise TypeError(
            "optimizer must be a torch.optim.Optimizer or a list of them; got "
            f"{type(optimizer).__name__}"
        )
    return found
