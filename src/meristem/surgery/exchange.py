"""The exchange: every tensor, state and attribute of a growth changes, or none does."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from meristem.errors import GrowthRefused, PendingBackward
from meristem.surgery.tensors import carry
from meristem.values import AttributeChange, Plan, TensorChange

LINEAGE = "_meristem_lineage"
"""The attribute of a grown model that lists its growths, so that copies and checkpoints know their shape."""


def check_free(tensors: Mapping[str, Tensor]) -> None:
    """Raise where a graph, or a weak reference, still holds a tensor that would change."""
    for name, tensor in tensors.items():
        if weakref.getweakrefs(tensor):
            raise GrowthRefused(
                f"{name} is held by a weak reference (as nn.LSTM does), which would keep the old tensor"
            )
        references = tensor._use_count()  # type: ignore[attr-defined]
        if references > (2 if tensor.requires_grad and tensor.is_leaf else 1):
            raise PendingBackward(
                f"{name} is still held by a graph that waits for its backward pass. hint: grow after optimizer.step(), "
                "when no loss is waiting for backward() and no retained graph or view of the weights is alive"
            )


def exchange(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    states: Sequence[tuple[Optimizer, Tensor, dict[str, Any]]],
    plan: Plan,
    resets: Sequence[Optimizer] = (),
) -> None:
    """Swap in `new` values, grown gradients and optimizer states, and set the plan's attributes; undo all on any error.

    The module and Parameter objects stay: `torch.utils.swap_tensors` exchanges what they hold.
    """
    changes = {change.name: change for change in plan.tensors}
    undo: list[Callable[[], None]] = []
    try:
        for name, value in new.items():
            undo.append(_swap(tensors[name], value, changes.get(name)))
        for optimizer, parameter, state in states:
            undo.append(_set_state(optimizer, parameter, state))
        for optimizer in resets:
            undo.append(_reset(optimizer))
        for edit in plan.attributes:
            undo.append(_set_attribute(model, edit))
        wrong = [c.name for c in plan.tensors if tuple(tensors[c.name].shape) != c.after]
        if wrong:
            raise RuntimeError(f"{wrong[0]} did not take its planned shape")
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    record(model, plan)


def record(model: nn.Module, plan: Plan) -> None:
    """Append a growth to the model's lineage: sizes, shapes and attributes, enough to rebuild it without an example."""
    entry = {
        "before": dict(plan.before),
        "after": dict(plan.after),
        "shapes": {change.name: list(change.after) for change in plan.tensors},
        "attributes": [[e.module, e.attribute, e.after] for e in plan.attributes],
    }
    model.__dict__.setdefault(LINEAGE, []).append(entry)


def rebuild(model: nn.Module, tensors: Mapping[str, Tensor], values: Mapping[str, Tensor], lineage: list[Any]) -> None:
    """Give a freshly built model the shapes and values of a grown one, and every attribute that growth has changed."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if id(tensor) not in seen and tuple(tensor.shape) != tuple(values[name].shape):
            _swap(tensor, values[name], None)
        seen.add(id(tensor))
    with torch.no_grad():
        for name, value in values.items():
            tensors[name].copy_(value)
    for growth in lineage:
        for module_name, attribute, value in growth["attributes"]:
            module = model.get_submodule(module_name)
            old = getattr(module, attribute)
            setattr(module, attribute, type(old)(value) if isinstance(old, (tuple, list)) else value)
    model.__dict__[LINEAGE] = list(lineage)


def _swap(old: Tensor, value: Tensor, change: TensorChange | None) -> Callable[[], None]:
    value = value.detach().to(device=old.device, dtype=old.dtype)
    for rank, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if old.dim() == rank and not old.is_contiguous() and old.is_contiguous(memory_format=memory_format):
            value = value.contiguous(memory_format=memory_format)
    new: Tensor = nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
    if type(old) is not type(new):
        new = new.as_subclass(type(old))
    if old.grad is not None and change is not None:
        new.grad = carry(old.grad, change.sources)
    elif old.grad is not None and old.shape == new.shape:
        new.grad = old.grad.clone()
    _exchange(old, new)
    return lambda: _exchange(old, new)


def _exchange(first: Tensor, second: Tensor) -> None:
    """Swap what two tensors hold; the first keeps its attributes and its hooks with their handles."""
    second.__dict__.update(first.__dict__)
    hooks, accumulated = first._backward_hooks, getattr(first, "_post_accumulate_grad_hooks", None)
    torch.utils.swap_tensors(first, second)
    if hooks is not None and first.requires_grad:
        first._backward_hooks = hooks
    if accumulated is not None and first.requires_grad:
        first._post_accumulate_grad_hooks = accumulated


def _set_state(optimizer: Optimizer, parameter: Tensor, state: dict[str, Any]) -> Callable[[], None]:
    old = dict(optimizer.state[parameter])
    optimizer.state[parameter].clear()
    optimizer.state[parameter].update(state)

    def undo() -> None:
        optimizer.state[parameter].clear()
        optimizer.state[parameter].update(old)

    return undo


def _reset(optimizer: Optimizer) -> Callable[[], None]:
    old = {parameter: dict(state) for parameter, state in optimizer.state.items()}
    optimizer.state.clear()
    return lambda: optimizer.state.update(old)


def _set_attribute(model: nn.Module, edit: AttributeChange) -> Callable[[], None]:
    module = model.get_submodule(edit.module)
    old = getattr(module, edit.attribute)
    setattr(module, edit.attribute, edit.after)
    return lambda: setattr(module, edit.attribute, old)
