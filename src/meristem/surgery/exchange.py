"""The exchange: every tensor, state and attribute of a growth changes, or none does."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from meristem.core.change import Insertion, Plan
from meristem.core.errors import GrowthRefused, PendingBackward
from meristem.core.offer import Blocks
from meristem.structure.chains import CHAIN
from meristem.structure.insertion import insert, kin
from meristem.structure.twin import (
    named_tensors,
    opened,
    set_attribute,
    stored_tensors,
    submodule,
)
from meristem.surgery.lineage import Names, place_in_group, record
from meristem.surgery.optimizers import copied_state
from meristem.surgery.swap import let_go, swap

Undo = Callable[[], None]


@dataclass(frozen=True)
class OptimizerChange:
    """What happens to the optimizers of a growing model.

    Attributes:
        owners: The optimizers, whose groups new blocks join.
        states: The state of single parameters at their new sizes.
        reset: Whether they forget everything.
    """

    owners: Sequence[Optimizer] = ()
    states: Sequence[tuple[Optimizer, Tensor, dict[str, Any]]] = ()
    reset: bool = False


def _recurrent(model: nn.Module) -> set[int]:
    """The weights of recurrent layers, which `let_go` frees."""
    layers = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
    return {id(parameter) for layer in layers for parameter in layer.parameters(False)}


def held_weakly(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, str]:
    """Which of some tensors of a model a weak reference keeps, and what is said of them."""
    recurrent = _recurrent(model)
    held = {}
    for name, tensor in tensors.items():
        known = int(id(tensor) in recurrent)
        if len(weakref.getweakrefs(tensor)) > known:
            held[name] = (
                f"{name} is held by a weak reference, which would keep the old tensor. "
                "hint: let go of it while the model grows; a compiled optimizer.step() "
                "keeps one for good: compile the model, and not the step"
            )
    return held


def check_free(tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    """Raise where a graph, or a weak reference, still holds a tensor that would change."""
    for reason in held_weakly(tensors, model).values():
        raise GrowthRefused(reason)
    _let_go_of_computed(model)
    for name, tensor in tensors.items():
        references = tensor._use_count()  # type: ignore[attr-defined]
        # A parameter that has been trained is held by its gradient accumulator, too.
        allowed = 2 if tensor.requires_grad and tensor.is_leaf else 1
        if references > allowed:
            raise PendingBackward(
                f"{name} is still held by a graph that waits for its backward pass. "
                "hint: grow after optimizer.step(), when no loss is waiting for "
                "backward() and no retained graph or view of the weights is alive; detach() "
                "what you keep"
            )


def _let_go_of_computed(model: nn.Module) -> None:
    """Detach weights that a hook computes anew before every call (weight_norm, pruning):
    the last ones would keep the graph of the last call.
    """
    for module in model.modules():
        computed = {name.rpartition("_")[0] for name in module._parameters}
        for name in computed & set(vars(module)):
            value = vars(module)[name]
            if isinstance(value, Tensor) and not value.is_leaf:
                vars(module)[name] = value.detach()


def exchange(
    model: nn.Module,
    new: Mapping[str, Tensor],
    plan: Plan,
    blocks: Sequence[Blocks] = (),
    optimizers: OptimizerChange = OptimizerChange(),
    ones: Sequence[str] = (),
    confirm: Callable[[], Any] = lambda: None,
) -> None:
    """Swap in `new` values, grown gradients and states, put blocks into their places.

    Parameters of new blocks join the groups of those that they follow; the plan's
    attributes are set. Any error undoes all. Module and Parameter objects stay:
    `torch.utils.swap_tensors` exchanges what they hold.

    Args:
        model: The model.
        new: Tensors by name, at their planned shapes.
        plan: The plan.
        blocks: The new blocks of every insertion.
        optimizers: What happens to them.
        ones: Tensors whose new entries start at one, for the lineage.
        confirm: Called at the end; what it raises undoes all.
    """
    with opened(model), let_go(model):
        transaction = _Transaction(model)
        try:
            transaction.swap(new, plan)
            transaction.set_states(optimizers)
            transaction.edit(plan.attributes)
            for one in blocks:
                transaction.place(one, optimizers.owners)
            # After the blocks: their modules are named as they are then.
            transaction.edit(plan.counts)
            transaction.check(plan)
            confirm()
            record(model, plan, transaction.names(), ones)
        # An interrupt, too, must not leave half a growth.
        except BaseException:
            transaction.roll_back()
            raise


@dataclass
class _Transaction:
    """Changes of one model that can be undone."""

    model: nn.Module
    undo: list[Undo] = field(default_factory=list)
    followed: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tensors = named_tensors(self.model)
        # Names move when blocks come between: the lineage needs the old ones.
        self.before = stored_tensors(self.model)
        self.parameters = [name for name, _ in self.model.named_parameters()]

    def roll_back(self) -> None:
        # In the opposite order: a later step may stand on an earlier one.
        for step in reversed(self.undo):
            step()

    def swap(self, new: Mapping[str, Tensor], plan: Plan) -> None:
        changes = {change.name: change for change in plan.tensors}
        for name, value in new.items():
            self.undo.append(swap(self.tensors[name], value, changes.get(name)))

    def set_states(self, optimizers: OptimizerChange) -> None:
        for optimizer, parameter, state in optimizers.states:
            self.undo.append(_set_state(optimizer, parameter, state))
        if optimizers.reset:
            for optimizer in optimizers.owners:
                self.undo.append(_reset(optimizer))

    def edit(self, edits: Sequence[Any]) -> None:
        for edit in edits:
            # Each edit knows how to take itself back.
            done = set_attribute(self.model, edit.module, edit.attribute, edit.after)
            self.undo.append(done)

    def place(self, blocks: Blocks, owners: Sequence[Optimizer]) -> None:
        """Put new blocks in their places, or drop old ones, with groups and states."""
        model = self.model
        self.undo.append(_modules_of(model, blocks.insertion))
        # By identity: two zero tensors are equal, and not the same.
        before = {id(p) for p in model.parameters()}
        made = insert(model, blocks.insertion, blocks.values)
        order = {id(p): place for place, p in enumerate(model.parameters())}
        for parent, block in made.values():
            for _, tensor, followed in kin(parent, block):
                self.followed[id(tensor)] = id(followed)
                # Shared tensors are in a group already; buffers are in none.
                if id(tensor) in before or not isinstance(tensor, nn.Parameter):
                    continue
                for optimizer in owners:
                    self._join(optimizer, tensor, followed, order, blocks.inherits)
        # torch keeps names beside the parameters where it was given them.
        names = {id(p): name for name, p in model.named_parameters()}
        for optimizer in owners:
            for group in optimizer.param_groups:
                self._leave(optimizer, group, before - order.keys(), names)

    def _join(
        self,
        optimizer: Optimizer,
        new: Tensor,
        followed: Tensor,
        order: Mapping[int, int],
        inherits: bool,
    ) -> None:
        """A new parameter joins the group of the one it follows, in model order.

        So positional states fit a net that is built at its grown size. As a copy, it gets
        a copy of the other's state.
        """
        for group in optimizer.param_groups:
            held = group["params"]
            if not any(p is followed for p in held):
                continue
            self.undo.append(partial(_part, optimizer, held, new))
            held.insert(_place_in(held, new, followed, order), new)
            if followed not in optimizer.state:
                return
            if inherits:
                optimizer.state[new] = copied_state(optimizer, followed)
            elif type(optimizer) is SGD and group.get("fused"):
                # The fused kernel wants a buffer of all parameters, or of none.
                optimizer.state[new] = {"momentum_buffer": torch.zeros_like(new)}
            return

    def _leave(
        self,
        optimizer: Optimizer,
        group: dict[str, Any],
        dropped: set[int],
        names: Mapping[int, str],
    ) -> None:
        gone = [p for p in group["params"] if id(p) in dropped]
        if gone:
            self.undo.append(_leave(optimizer, group, gone))
        if "param_names" in group:
            old = group["param_names"]
            self.undo.append(partial(group.__setitem__, "param_names", old))
            group["param_names"] = [names.get(id(p), "") for p in group["params"]]

    def check(self, plan: Plan) -> None:
        for change in plan.tensors:
            if tuple(self.tensors[change.name].shape) != change.after:
                raise RuntimeError(f"{change.name} did not take its planned shape")

    def names(self) -> Names:
        return Names(self.before, self.parameters, self.followed)


def _modules_of(model: nn.Module, insertion: Insertion) -> Undo:
    """Undoes what an insertion will do to the container, and to what holds it."""
    outer = insertion.path.rpartition(".")[0]
    tables = []
    for holder in (submodule(model, insertion.path), submodule(model, outer)):
        tables.append((holder, dict(holder._modules), vars(holder).get(CHAIN)))

    def undo() -> None:
        for holder, table, chain in tables:
            holder._modules.clear()
            holder._modules.update(table)
            if chain is None:
                vars(holder).pop(CHAIN, None)

    return undo


def _place_in(
    held: Sequence[Tensor], new: Tensor, followed: Tensor, order: Mapping[int, int]
) -> int:
    """Where a new parameter stands in a group; `order` numbers those of the model."""
    places = [order.get(id(p), -1) for p in held]
    parent = next(i for i, p in enumerate(held) if p is followed)
    return place_in_group(places, order[id(new)], parent)


def _part(optimizer: Optimizer, group: list[Tensor], new: Tensor) -> None:
    group[:] = [p for p in group if p is not new]
    optimizer.state.pop(new, None)


def _leave(optimizer: Optimizer, group: dict[str, Any], gone: Sequence[Tensor]) -> Undo:
    held = list(group["params"])
    states = {p: optimizer.state.pop(p) for p in gone if p in optimizer.state}
    dropped = {id(p) for p in gone}
    group["params"][:] = [p for p in held if id(p) not in dropped]

    def undo() -> None:
        group["params"][:] = held
        optimizer.state.update(states)

    return undo


def _set_state(optimizer: Optimizer, parameter: Tensor, state: dict[str, Any]) -> Undo:
    old = dict(optimizer.state[parameter])

    def put(values: dict[str, Any]) -> None:
        optimizer.state[parameter].clear()
        optimizer.state[parameter].update(values)

    put(state)
    return partial(put, old)


def _reset(optimizer: Optimizer) -> Undo:
    old = {parameter: dict(state) for parameter, state in optimizer.state.items()}
    optimizer.state.clear()
    return lambda: optimizer.state.update(old)
