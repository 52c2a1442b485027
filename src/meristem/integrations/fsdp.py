"""Growth of models that torch's `fully_shard` has cut into shards (FSDP2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from meristem.checkpoint import regrow_
from meristem.surgery.lineage import lineage

_FULL = StateDictOptions(full_state_dict=True)
# Blocks that have not been trained have no state yet.
_NEWLY_GROWN = StateDictOptions(full_state_dict=True, strict=False)


def grow_sharded(
    model: nn.Module,
    optimizer: Optimizer,
    grow: Callable[[nn.Module, Optimizer], Any],
    *,
    build: Callable[[], nn.Module],
    shard: Callable[[nn.Module], Any],
    optimize: Callable[[Iterable[nn.Parameter]], Optimizer],
) -> tuple[nn.Module, Optimizer]:
    """Gather a sharded model, let its replicas grow alike, and shard it again.

    The growth is exact, and the optimizer's state comes along: what stood in the old
    shards stands in the new ones. While it grows, every rank holds the whole model and
    its optimizer's state. A collective call.

    Args:
        model: A model whose parameters `fully_shard` has sharded; use it no more.
        optimizer: Over `model.parameters()`; use it no more.
        grow: Does the growing, with a replica under DistributedDataParallel and an
            optimizer over it, by `meristem.grow_` or a `meristem.Grower`.
        build: Makes the model as it was first made, not sharded, on the ranks' device.
        shard: Calls `fully_shard` on the blocks of a plain model and on the model.
        optimize: Makes the optimizer from parameters.

    Returns:
        The grown model, sharded, and its optimizer. A learning-rate scheduler must be
        made anew over it; its `load_state_dict` takes the old one's state.

    Raises:
        GrowthRefused, RankFailed: As of the growth; the old model is as it was.

    Examples:
        >>> model, optimizer = grow_sharded(  # doctest: +SKIP
        ...     model, optimizer,
        ...     lambda net, adamw: ms.grow_(net, {"blocks.0.up": 64}, x, optimizer=adamw),
        ...     build=build, shard=shard, optimize=torch.optim.AdamW,
        ... )
    """
    whole = get_state_dict(model, optimizer, options=_FULL)
    replica = build()
    regrow_(replica, lineage(model))
    grown_by = optimize(replica.parameters())
    _load(replica, grown_by, whole)
    grow(DistributedDataParallel(replica), grown_by)

    whole = get_state_dict(replica, grown_by)
    shard(replica)
    sharded_by = optimize(replica.parameters())
    _load(replica, sharded_by, whole)
    return replica, sharded_by


def _load(model: nn.Module, optimizer: Optimizer, whole: tuple[Any, Any]) -> None:
    weights, state = whole
    set_model_state_dict(model, weights, options=_FULL)
    set_optimizer_state_dict(model, optimizer, state, options=_NEWLY_GROWN)
    # To load state, torch makes some for every parameter, as after one step.
    for name, parameter in model.named_parameters():
        if name not in state["state"]:
            optimizer.state.pop(parameter, None)
