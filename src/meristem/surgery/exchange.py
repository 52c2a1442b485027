"""The exchange: every tensor, state and attribute of a growth changes, or none does."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from meristem.core.change import Insertion, Plan, TensorChange
from meristem.core.errors import GrowthRefused, PendingBackward
from meristem.core.offer import Blocks
from meristem.structure.insertion import CHAIN, insert, kin
from meristem.structure.twin import get_attribute, named_tensors, set_attribute
from meristem.surgery.tensors import carry

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
    blocks: Sequence[Blocks] = (),
    optimizers: Sequence[Optimizer] = (),
) -> None:
    """Swap in `new` values, grown gradients and optimizer states, put new blocks in their places and their parameters into
    the groups of those that they follow, and set the plan's attributes; undo all on any error.

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
            undo.append(set_attribute(model, edit.module, edit.attribute, edit.after))
        for one in blocks:
            place_blocks(model, one, optimizers, undo)
        for edit in plan.counts:
            undo.append(set_attribute(model, edit.module, edit.attribute, edit.after))
        wrong = [c.name for c in plan.tensors if tuple(tensors[c.name].shape) != c.after]
        if wrong:
            raise RuntimeError(f"{wrong[0]} did not take its planned shape")
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    record(model, plan)


def place_blocks(
    model: nn.Module, blocks: Blocks, optimizers: Sequence[Optimizer], undo: list[Callable[[], None]]
) -> None:
    """Put new blocks in their places, or drop old ones, with the optimizers' groups and states."""
    undo.append(_modules_of(model, blocks.insertion))
    before = {id(p) for p in model.parameters()}
    made = insert(model, blocks.insertion, blocks.values)
    live = {id(p) for p in model.parameters()}
    for parent, block in made.values():
        block.train(parent.training)
        for _, tensor, followed in kin(parent, block):
            if id(tensor) in before or not isinstance(tensor, nn.Parameter):
                continue
            for optimizer in optimizers:
                undo += _join(optimizer, tensor, followed, blocks.inherits)
    names = {id(p): name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            gone = [p for p in group["params"] if id(p) in before - live]
            if gone:
                undo.append(_leave(optimizer, group, gone))
            if "param_names" in group:
                undo.append(partial(group.__setitem__, "param_names", group["param_names"]))
                group["param_names"] = [names.get(id(p), "") for p in group["params"]]


def _modules_of(model: nn.Module, insertion: Insertion) -> Callable[[], None]:
    """Undoes what an insertion will do to the container, and to the module that holds it."""
    holders = [model.get_submodule(insertion.path), model.get_submodule(insertion.path.rpartition(".")[0])]
    tables = [(holder, dict(holder._modules), vars(holder).get(CHAIN)) for holder in holders]

    def undo() -> None:
        for holder, table, chain in tables:
            holder._modules.clear()
            holder._modules.update(table)
            if chain is None:
                vars(holder).pop(CHAIN, None)

    return undo


def _join(optimizer: Optimizer, new: Tensor, followed: Tensor, inherits: bool) -> list[Callable[[], None]]:
    """A new parameter joins the group of the one it follows and, as a copy, gets a copy of its state."""
    for group in optimizer.param_groups:
        if any(p is followed for p in group["params"]):
            group["params"].append(new)
            if inherits and followed in optimizer.state:
                state = optimizer.state[followed]
                optimizer.state[new] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
            return [partial(_part, optimizer, group["params"], new)]
    return []


def _part(optimizer: Optimizer, group: list[Tensor], new: Tensor) -> None:
    group[:] = [p for p in group if p is not new]
    optimizer.state.pop(new, None)


def _leave(optimizer: Optimizer, group: dict[str, Any], gone: Sequence[Tensor]) -> Callable[[], None]:
    held = list(group["params"])
    states = {p: optimizer.state.pop(p) for p in gone if p in optimizer.state}
    group["params"][:] = [p for p in held if not any(p is one for one in gone)]

    def undo() -> None:
        group["params"][:] = held
        optimizer.state.update(states)

    return undo


def record(model: nn.Module, plan: Plan) -> None:
    """Append a growth to the model's lineage: sizes, shapes, attributes and blocks, enough to rebuild it without an example."""
    entry = {
        "before": dict(plan.before),
        "after": dict(plan.after),
        "shapes": {change.name: list(change.after) for change in plan.tensors},
        "attributes": [[e.module, e.attribute, e.after] for e in plan.attributes],
        "insertions": [dataclasses.asdict(insertion) for insertion in plan.insertions],
        "counts": [[e.module, e.attribute, e.after] for e in plan.counts],
    }
    model.__dict__.setdefault(LINEAGE, []).append(entry)


def replay(model: nn.Module, growths: Sequence[Any]) -> None:
    """Give a model the shapes, blocks and attributes of a grown one, in the order of its growths; values do not count."""
    for growth in growths:
        live = named_tensors(model)
        for name, shape in growth["shapes"].items():
            if tuple(live[name].shape) != tuple(shape):
                _swap(live[name], live[name].detach().new_zeros(shape), None)
        _set_all(model, growth["attributes"])
        for entry in growth["insertions"]:
            fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
            insert(model, Insertion(**fields))
        _set_all(model, growth["counts"])


def _set_all(model: nn.Module, attributes: Sequence[Any]) -> None:
    for module_name, attribute, value in attributes:
        old = get_attribute(model, module_name, attribute)
        set_attribute(model, module_name, attribute, type(old)(value) if isinstance(old, (tuple, list)) else value)


def rebuild(model: nn.Module, values: Mapping[str, Tensor], growths: Sequence[Any], lineage: Sequence[Any]) -> None:
    """Repeat `growths`, the end of `lineage`, on a model that has not had them yet, and give it the grown one's values."""
    replay(model, growths)
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            tensor.copy_(values[name])
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
