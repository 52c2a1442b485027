"""The laboratory: all that a method may look at, measure with, and try weights on.

Nothing that it lends is the user's own: values are copies, the structure belongs to a
copy without data, and what is trained is a sandbox. Values come back; surgery alone
writes them.
"""

from __future__ import annotations

import contextlib
import copy
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from meristem.core.axis import Axes, Axis, Place, Slot
from meristem.core.change import NO_CHANGE, Insertion, Plan, Sources, by_unit, index
from meristem.core.errors import DataError, MeristemError
from meristem.core.offer import Blocks, Offer, Scaling
from meristem.core.ranks import ALONE, Ranks
from meristem.lab.batches import cut, length, one_pass
from meristem.lab.ledger import Meter, plain_attention
from meristem.lab.losses import Loss, evaluate
from meristem.structure import Structure, resolve
from meristem.structure.depth import Depth
from meristem.structure.insertion import Made, insert
from meristem.structure.layers import channel_of, contracts
from meristem.structure.twin import apply_edits, named_tensors, submodule, twin
from meristem.surgery.exchange import exchange
from meristem.surgery.probe import grown_twin, live_values, run
from meristem.surgery.tensors import grown_tensors, new_units
from meristem.surgery.verify import silent_units

Progress = Callable[[str, int, int | None], None]
"""Told what is being done, how many steps of it are done, and of how many, where known.
"""


class Values(Mapping[str, Tensor]):
    """The present tensors of a model by name; every look is a copy."""

    def __init__(self, model: nn.Module) -> None:
        self._held = {name: t.detach() for name, t in named_tensors(model).items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._held[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def shape(self, name: str) -> torch.Size:
        """The shape of a tensor, without a copy."""
        return self._held[name].shape

    def untouched(self) -> list[int]:
        """Numbers that change when somebody writes into the tensors."""
        return [tensor._version for tensor in self._held.values()]


@dataclass
class Loan:
    """What the caller of a growth gave for measuring.

    Attributes:
        generator: The only source of randomness of a growth.
        loss, data: The user's loss and data; None where the caller gave none.
        batches: The growth batches; empty without data.
        progress: Told of every step of what trains on the side.
        allowance: Floating-point operations that a proposal may cost.
        ranks: The processes that grow alike.
    """

    generator: torch.Generator
    loss: Loss | None = None
    batches: Sequence[Any] = ()
    data: Iterable[Any] | None = None
    progress: Progress | None = None
    allowance: float = math.inf
    ranks: Ranks = ALONE


class Lab:
    """What is lent to a method.

    Attributes:
        structure: What can grow, of a copy of the model that holds no data.
        values: The present tensors by name, as copies.
        axes: The axes by name.
        generator, loss, batches, data, progress, allowance: See `Loan`.
    """

    def __init__(self, structure: Structure, loan: Loan) -> None:
        self._origin, self._loan = structure, loan
        self._model = structure.model  # a structure does not keep it alive
        # Copies are made when looked at: a method that needs two tensors copies two.
        self.values = Values(structure.model)
        self.generator = loan.generator
        self.loss, self.data = loan.loss, loan.data
        self.batches = loan.batches
        self.progress = loan.progress
        self.allowance = loan.allowance
        self.ranks = loan.ranks
        self._parts: bool | None = None

    @cached_property
    def structure(self) -> Structure:
        skeleton = twin(self._origin.model, _without_data)
        # Labels and plans are shared; only the model behind them is another one.
        structure = copy.copy(self._origin)
        structure._model = weakref.ref(skeleton)
        self._skeleton = skeleton  # a structure does not keep its model alive
        return structure

    @property
    def axes(self) -> Axes:
        return self._origin.axes

    @property
    def measures(self) -> bool:
        """Whether there is a loss, and a batch to take it on."""
        return self.loss is not None and len(self.batches) > 0

    def user_loss(self, method: str) -> Loss:
        """The user's loss.

        Raises:
            DataError: The caller of the growth gave no loss or no data.
        """
        if self.loss is None or not self.batches:
            raise DataError(f"{method} measures on data: pass loss= and data=")
        return self.loss

    def cut(self, batch: Any, examples: int) -> Any:
        """The first examples of a batch, for a measurement that needs no more.

        All of it where it cannot be cut, or where the loss does not take a part.
        """
        part = cut(batch, examples)
        if part is batch:
            return batch
        return part if self._takes_parts(part) else batch

    def _takes_parts(self, part: Any) -> bool:
        """Whether the loss takes a part of a batch; asked once."""
        if self._parts is None and self.loss is not None:
            held = live_values(self._origin)
            copied = grown_twin(self._origin, held, NO_CHANGE).eval()
            try:
                with torch.no_grad():
                    evaluate(self.loss, copied, part)
                self._parts = True
            except MeristemError:
                self._parts = False
        return bool(self._parts)

    def within(self, allowance: float) -> Lab:
        """The same, with another allowance."""
        lab = copy.copy(self)
        lab.allowance = allowance
        return lab

    def silent(self) -> Lab:
        """The same without a loss, so that nothing is measured."""
        lab = copy.copy(self)
        lab.loss = None
        return lab

    def of(self, structure: Structure) -> Lab:
        """A laboratory for another model, with everything else that was lent."""
        loan = copy.copy(self._loan)
        loan.loss, loan.allowance = self.loss, self.allowance
        return Lab(structure, loan)

    # -- the structure -----------------------------------------------------------------

    def depth(self, axis: Axis) -> Depth:
        """Where the blocks of a depth axis stand."""
        return self._origin.depths[axis.name]

    def owner(self, slot: Slot) -> nn.Module:
        """A copy, without data, of the module that holds a slot's tensor."""
        return submodule(self.structure.model, slot.name.rpartition(".")[0])

    def plan(self, axis: Axis, count: int) -> Plan:
        """The plan that adds `count` units to one axis."""
        return resolve(self._origin, {axis.name: count})

    def new_units(self, axis: Axis, count: int, place: Place) -> Sources:
        """Where `count` new units would lie: an array (units, entries per unit)."""
        return new_units(self.plan(axis, count), axis.name, place)

    def shapes(self, axis: Axis, count: int) -> dict[Slot, tuple[int, ...]]:
        """The shape of every slot's strip.

        Returns:
            (new units, entries per unit, *the other dimensions of the tensor) by slot.
        """
        shapes = {}
        for slot in axis.slots:
            where = self.new_units(axis, count, slot.place)
            old = self.values.shape(slot.name)
            rest = [size for d, size in enumerate(old) if d != slot.dim]
            shapes[slot] = (*where.shape, *rest)
        return shapes

    def block_shapes(
        self, insertion: Insertion
    ) -> dict[int, dict[str, tuple[int, ...]]]:
        """The shapes of the tensors of every new block, by its place and their names."""
        shapes = {}
        for place, (_, block) in insert(self.skeleton(), insertion).items():
            named = named_tensors(block).items()
            shapes[place] = {name: tuple(tensor.shape) for name, tensor in named}
        return shapes

    def units(self, slot: Slot, axis: Axis) -> Tensor:
        """The present entries of a slot, unit by unit.

        Returns:
            A tensor (units, entries per unit, *other dimensions).
        """
        layout = self._origin.layout(axis.name)[slot.place]
        return by_unit(self.values[slot.name], slot.dim, layout)

    # -- copies ------------------------------------------------------------------------

    def copied(self) -> nn.Module:
        """A copy of the model that may be written."""
        return twin(self._origin.model, lambda _, tensor: tensor.detach().clone())

    def skeleton(self) -> nn.Module:
        """A copy of the model without data, to put blocks into."""
        return twin(self.structure.model, lambda _, tensor: tensor)

    def outputs_with(
        self, plan: Plan, blocks: Blocks
    ) -> tuple[list[Tensor], list[Tensor], Plan]:
        """The outputs on the example, without and with new blocks, and the plan."""
        structure = self._origin
        held = live_values(structure)
        before = run(structure, held, structure.example)
        after = run(structure, held, structure.example, plan, [blocks])
        return before, after, plan

    def block_gradients(self, plan: Plan, blocks: Blocks) -> tuple[float, ...]:
        """For every new block the norm of its gradient on the first growth batch."""
        loss = self.user_loss("the gain of a block")
        # The copy shares the weights: it is only read, and inside this class.
        held = live_values(self._origin)
        copied = grown_twin(self._origin, held, NO_CHANGE).eval()
        made = insert(copied, blocks.insertion, blocks.values)
        apply_edits(copied, plan.counts)
        # Which ones learn is asked before all gradients are turned off.
        by_block = []
        for _, block in made.values():
            by_block.append([p for p in block.parameters() if p.requires_grad])
        copied.requires_grad_(False)
        for trained in by_block:
            for parameter in trained:
                parameter.requires_grad_()
        value = evaluate(loss, copied, self.batches[0])
        if not value.requires_grad:
            return (0.0,) * len(made)
        value.backward()
        norms = []
        for trained in by_block:
            gradients = [p.grad for p in trained if p.grad is not None]
            squares = [g.double().square().sum().item() for g in gradients]
            norms.append(math.sqrt(sum(squares)))
        return tuple(norms)

    def with_blocks(self, plan: Plan, blocks: Blocks) -> tuple[nn.Module, Made]:
        """A copy of the model with new blocks in their places, in eval mode.

        Returns:
            The copy, and for every place the block before it and itself.
        """
        copied = self.copied().eval()
        made = insert(copied, blocks.insertion, blocks.values)
        apply_edits(copied, plan.counts)
        return copied, made

    def widened(self, axis: Axis, count: int) -> Widened:
        """A copy of the model widened by `count` units of `axis`, to try weights on."""
        loss = self.user_loss("a widened copy")
        plan = self.plan(axis, count)
        held = live_values(self._origin)
        copied = grown_twin(self._origin, held, plan).eval()
        beside = _beside(self.axes, plan, [axis.name], held)
        return Widened(copied, loss, plan, axis, held, beside)

    def sandbox(self) -> Sandbox:
        """A copy of the model to grow and train."""
        return Sandbox(self)

    # -- randomness --------------------------------------------------------------------

    def normal(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Standard normal numbers, with the dtype and device of `like`."""
        drawn = torch.randn(tuple(shape), generator=self.generator, dtype=torch.float64)
        return drawn.to(like)

    def uniform(self, shape: Sequence[int], bound: float, like: Tensor) -> Tensor:
        """Numbers from U(-bound, bound), with the dtype and device of `like`."""
        drawn = torch.rand(tuple(shape), generator=self.generator, dtype=torch.float64)
        return ((2 * drawn - 1) * bound).to(like)

    # -- the guard ---------------------------------------------------------------------

    @contextlib.contextmanager
    def guarded(self, method: object) -> Iterator[None]:
        """Raise where somebody has written into the user's tensors in spite of all."""
        before = self.values.untouched()
        yield
        if self.values.untouched() != before:
            raise MeristemError(
                f"{type(method).__name__} wrote into the tensors of the model itself. "
                "hint: work on lab.values, lab.copied() or lab.sandbox()"
            )


def _without_data(name: str, tensor: Tensor) -> Tensor:
    """A tensor of the same shape, dtype and device that takes no memory."""
    one = torch.zeros((), dtype=tensor.dtype, device=tensor.device)
    return one.expand(tensor.shape)


def _beside(
    axes: Axes, plan: Plan, offered: Sequence[str], values: Mapping[str, Tensor]
) -> list[tuple[Axis, Offer]]:
    """The other axes of a plan, with new units that compute nothing."""
    found = []
    for name in plan.after:
        if name not in offered:
            axis = axes.named(name)
            found.append((axis, silent_units(plan, axis, values)))
    return found


def _joined(
    axes: Sequence[Axis], offers: Sequence[Offer], beside: Sequence[tuple[Axis, Offer]]
) -> tuple[list[Axis], list[Offer]]:
    """Axes and what is offered for them, those beside them included."""
    others, silent = [axis for axis, _ in beside], [offer for _, offer in beside]
    return [*axes, *others], [*offers, *silent]


@dataclass
class Widened:
    """A widened copy of the model: weights of the new units go in, losses come out.

    Strips are the trial weights: for each place, (units, entries per unit, *other
    dimensions).

    Attributes:
        model: The copy.
        plan: The plan that it was widened by.
        axis: The axis that is wider.
        beside: The axes that grow together with it, with new units that compute nothing.
    """

    model: nn.Module
    user_loss: Loss
    plan: Plan
    axis: Axis
    held: Mapping[str, Tensor] = field(repr=False)
    beside: Sequence[tuple[Axis, Offer]] = ()

    def loss(self, strips: Mapping[Place, Tensor], batch: Any) -> Tensor:
        """The loss on one batch, in eval mode, differentiable in the strips."""
        offer = Offer(self.axis.name, self.plan.added[self.axis.name], strips)
        axes, offers = _joined([self.axis], [offer], self.beside)
        grown = grown_tensors(self.held, self.plan, axes, offers, Scaling())
        with plain_attention():
            return evaluate(
                self.user_loss, self.model, batch, tensors={**self.held, **grown}
            )

    @contextlib.contextmanager
    def lifted(self, offset: float) -> Iterator[bool]:
        """Add a constant to the new units where the first producer makes them.

        Gives whether that was possible: no layer may be known to make them.
        """
        # Of several producers the first one is enough to move the units.
        slot = self.axis.places("fan_in")[0]
        producer = submodule(self.model, slot.name.rpartition(".")[0])
        if not offset or not contracts(producer):
            yield False
            return
        where = index(new_units(self.plan, self.axis.name, slot.place).ravel())

        def add_offset(module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            dim = channel_of(module, output)
            units = output.shape[dim]
            added = output.new_zeros(units)
            added = added.index_fill(0, where.to(output.device), offset)
            shape = [1] * output.dim()
            shape[dim] = units
            return output + added.reshape(shape)

        hook = producer.register_forward_hook(add_offset)
        try:
            yield True
        finally:
            hook.remove()


class Sandbox:
    """A copy of the model that a method may grow and train.

    It starts with gradients off and in the model's own train and eval modes. The same
    surgery grows it; what is computed here is counted.

    Attributes:
        model: The copy.
        trained: Names of the parameters that the user trains.
        meter: What has been computed here.
    """

    def __init__(self, lab: Lab) -> None:
        if lab.loss is None or lab.data is None:
            raise DataError(
                "training on the side needs a loss and data: pass loss= and data="
            )
        self._origin = lab
        self._loss, self._data = lab.loss, lab.data
        self._lab: Lab | None = None
        self.trained = set()
        for name, parameter in lab.structure.model.named_parameters():
            if parameter.requires_grad:
                self.trained.add(name)
        self.model = lab.copied()
        # A method turns on what it trains.
        self.model.requires_grad_(False)
        self.meter = Meter()

    @property
    def lab(self) -> Lab:
        """A laboratory for the copy as it stands."""
        if self._lab is None:
            # Not kept with the structures of user models: the copy changes at once.
            structure = Structure(self.model, self._origin.structure.example)
            structure.inherit(self._origin._origin)
            self._lab = self._origin.of(structure)
        return self._lab

    def insert(self, offers: Sequence[Offer]) -> tuple[Plan, list[Axis]]:
        """Grow the copy; returns the plan and the axes as they were before."""
        structure = self.lab._origin
        plan = resolve(structure, {offer.axis: offer.count for offer in offers})
        axes = [structure.axes.named(offer.axis) for offer in offers]
        held = live_values(structure)
        offered = [offer.axis for offer in offers]
        beside = _beside(structure.axes, plan, offered, held)
        new = grown_tensors(held, plan, *_joined(axes, offers, beside), Scaling())
        # The structure has changed: a new one is traced when somebody asks.
        self._lab = None
        exchange(self.model, new, plan)
        self.meter = self.meter.at_new_size()
        return plan, axes

    def epoch(self, phase: str) -> Iterator[Any]:
        """Every batch of the data once, in the loader's own order.

        Progress is told as `phase`.
        """
        total, report = length(self._data), self._origin.progress
        with closing(one_pass(self._data, self._origin.generator)) as passing:
            for number, batch in enumerate(passing):
                if report is not None:
                    report(phase, number, total)
                yield batch

    def loss(self, batch: Any, tensors: Mapping[str, Tensor]) -> Tensor:
        """The loss of the copy on one batch, with some of its tensors replaced."""
        return evaluate(
            self._loss,
            self.model,
            batch,
            tensors=tensors,
            training=self.model.training,
        )
