"""Copies of a model to look at: data-free fakes, or real tensors of another kind; the model itself is never touched."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from meristem.errors import DiscoveryError


class Example(NamedTuple):
    """The arguments of one call of a model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Convert = Callable[[str, Tensor], Tensor]


def as_example(example: Any) -> Example:
    """The (args, kwargs) of a call, from a tensor, a tuple of arguments or a dict of keyword arguments."""
    if isinstance(example, Example):
        return example
    if isinstance(example, dict):
        return Example((), dict(example))
    if isinstance(example, tuple):
        return Example(example, {})
    if example is None:
        raise TypeError("an example input is needed: a tensor, a tuple of arguments or a dict of keyword arguments")
    return Example((example,), {})


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; a shared one under its first name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def twin(model: nn.Module, convert: Convert) -> nn.Module:
    """A deep copy of the module tree whose tensors are made by `convert(name, tensor)`; the user's hooks stay behind."""
    memo: dict[int, Any] = {}
    for name, tensor in named_tensors(model).items():
        new = convert(name, tensor)
        if isinstance(tensor, nn.Parameter) and not isinstance(new, nn.Parameter):
            new = nn.Parameter(new, requires_grad=tensor.requires_grad and new.is_floating_point())
        memo[id(tensor)] = new
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach()
    hooks = [(module, name, list(getattr(module, name).items())) for module, name in _hooked(model)]
    for _, _, own in hooks:
        for _, hook in own:
            if not _belongs_to_torch(hook):
                memo[id(hook)] = _silent
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise DiscoveryError(
            f"{type(model).__name__} cannot be deep-copied ({type(error).__name__}: {error}). Meristem looks at a copy, "
            "never at the model itself. hint: keep what cannot be copied (locks, files, generators) outside the module"
        ) from error
    for module, name in _hooked(copied):
        table = getattr(module, name)
        for key in [key for key, hook in table.items() if hook is _silent]:
            del table[key]
    return copied


def _hooked(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for module in model.modules():
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            if getattr(module, name):
                yield module, name


def _belongs_to_torch(hook: Any) -> bool:
    where: str = getattr(hook, "__module__", "") or ""
    return where.startswith("torch.nn.utils")


def _silent(*_: Any) -> None:
    """Stands in for a user's hook while a model is copied."""


def fake_mode(fake: bool) -> FakeTensorMode | None:
    return FakeTensorMode(allow_non_fake_inputs=True) if fake else None


@contextlib.contextmanager
def looking(mode: FakeTensorMode | None) -> Iterator[None]:
    """Run a twin without gradients, without fused attention kernels, under the fake mode if there is one."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    log = logging.getLogger("torch._subclasses.fake_tensor")  # tells of every shape that does not fit: we try those
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with torch.no_grad(), mode or contextlib.nullcontext():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        log.setLevel(level)


def map_tensors(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`tree` with every tensor replaced."""
    return pytree.tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)
