"""One tensor of a model takes another value; what it is stays the same object."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from meristem.core.change import TensorChange
from meristem.surgery.tensors import carry, laid_out_like

Undo = Callable[[], None]


@contextmanager
def let_go(model: nn.Module) -> Iterator[None]:
    """Recurrent layers hold their weights by weak references, too; torch exchanges
    nothing that is held so.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
    for layer in layers:
        layer._flat_weight_refs = []
    try:
        yield
    finally:
        for layer in layers:
            # The objects are the same, and know their new places in memory.
            layer._init_flat_weights()


def swap(old: Tensor, value: Tensor, change: TensorChange | None) -> Undo:
    """Let a tensor of the model hold another value, with its gradient; returns what
    undoes it.
    """
    value = value.detach().to(device=old.device, dtype=old.dtype)
    value = laid_out_like(old, value)
    new: Tensor = value
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(value, requires_grad=old.requires_grad)
    # Subclasses of Parameter keep their class.
    if type(old) is not type(new):
        new = new.as_subclass(type(old))
    # A gradient that waits for its step grows with its weight.
    if old.grad is not None and change is not None:
        new.grad = carry(old.grad, change.sources)
    elif old.grad is not None and old.shape == new.shape:
        new.grad = old.grad.clone()
    _exchange(old, new)
    return lambda: _exchange(old, new)


def _exchange(first: Tensor, second: Tensor) -> None:
    """Swap what two tensors hold; the first keeps its attributes and its hooks."""
    second.__dict__.update(first.__dict__)
    hooks = first._backward_hooks
    accumulated = getattr(first, "_post_accumulate_grad_hooks", None)
    # The object stays, so optimizers, hooks and loggers keep hold of it.
    torch.utils.swap_tensors(first, second)
    if hooks is not None and first.requires_grad:
        first._backward_hooks = hooks
    if accumulated is not None and first.requires_grad:
        first._post_accumulate_grad_hooks = accumulated
