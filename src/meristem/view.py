"""What a method may look at: the model's structure and values, growth batches, a widened copy to try weights on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from meristem.core.axis import Axis, Place, Slot
from meristem.core.change import Plan, by_unit
from meristem.core.offer import Proposal, Scaling
from meristem.statistics.losses import Loss, LossModule, measured
from meristem.structure import Structure, resolve
from meristem.structure.discover import apply_edits
from meristem.structure.twin import twin
from meristem.surgery.tensors import grown_tensors, new_units

Progress = Callable[[str, int, int | None], None]
"""Told what is being done, how many steps of it are done, and of how many, where that is known."""


@dataclass
class Widened:
    """A widened copy of the model; weights of the new units go in, losses come out. The model itself is not touched.

    `strips` are the trial weights: for each place, (units, entries per unit, *other dimensions).
    """

    module: LossModule
    plan: Plan
    axis: Axis
    values: Mapping[str, Tensor]

    def loss(self, strips: Mapping[Place, Tensor], batch: Any) -> Tensor:
        """The loss on one batch, in eval mode, differentiable in `strips`."""
        proposal = Proposal(self.axis.name, self.plan.added[self.axis.name], strips)
        grown = grown_tensors(self.values, self.plan, [self.axis], [proposal], Scaling())
        tensors = {f"model.{name}": value for name, value in {**self.values, **grown}.items()}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return measured(lambda: functional_call(self.module, tensors, (batch,)))

    def lift(self, offset: float) -> bool:
        """Add a constant to the new units where the first producer makes them; False where no layer can be told."""
        slot = self.axis.places("fan_in")[0]
        producer = self.module.model.get_submodule(slot.name.rpartition(".")[0])
        if isinstance(producer, nn.Linear):
            dim = -1
        elif isinstance(producer, nn.modules.conv._ConvNd):
            dim = 1
        else:
            return False
        where = torch.from_numpy(new_units(self.plan, self.axis.name, slot.place).ravel())

        def add_offset(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            shape = [1] * output.dim()
            shape[dim] = output.shape[dim]
            lifted = output.new_zeros(output.shape[dim]).index_fill(0, where.to(output.device), offset)
            return output + lifted.reshape(shape)

        self._hook = producer.register_forward_hook(add_offset)
        return True

    def lower(self) -> None:
        """Take the constant of `lift` away."""
        self._hook.remove()


@dataclass
class View:
    """A read-only look at the model for methods that propose new weights.

    Attributes:
        structure: The traced structure.
        generator: The only source of randomness of a growth.
        loss, batches: The user's loss and the growth batches; None and empty where the caller gave none.
        data: The data itself, for methods that train a sandbox on all of it.
        progress: Told of every step of such training.
        allowance: Floating-point operations that a proposal may cost.
    """

    structure: Structure
    generator: torch.Generator
    loss: Loss | None = None
    batches: Sequence[Any] = ()
    data: Iterable[Any] | None = None
    progress: Progress | None = None
    allowance: float = math.inf
    values: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        model = self.structure.model
        self.values = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self.values |= {name: buffer.detach().clone() for name, buffer in model.named_buffers()}

    def owner(self, slot: Slot) -> nn.Module:
        """The module that holds a slot's tensor."""
        return self.structure.model.get_submodule(slot.name.rpartition(".")[0])

    def plan(self, axis: Axis, count: int) -> Plan:
        """The plan that adds `count` units to one axis."""
        return resolve(self.structure, {axis.name: count})

    def shapes(self, axis: Axis, count: int) -> dict[Slot, tuple[int, ...]]:
        """The shape of every slot's strip: (new units, entries per unit, *the other dimensions of the tensor)."""
        plan = self.plan(axis, count)
        shapes = {}
        for slot in axis.slots:
            rest = [n for d, n in enumerate(self.values[slot.name].shape) if d != slot.dim]
            shapes[slot] = (*new_units(plan, axis.name, slot.place).shape, *rest)
        return shapes

    def units(self, slot: Slot, axis: Axis) -> Tensor:
        """The present entries of a slot, unit by unit: (units, entries per unit, *other dimensions)."""
        layout = self.structure.layout(axis.name)[slot.place]
        return by_unit(self.values[slot.name], slot.dim, layout)

    def copied(self) -> nn.Module:
        """A copy of the model that may be written."""
        return twin(self.structure.model, lambda name, _: self.values[name].clone())

    def widened(self, axis: Axis, count: int) -> Widened:
        """A copy of the model widened by `count` units of `axis`."""
        assert self.loss is not None
        plan = self.plan(axis, count)
        copied = twin(self.structure.model, lambda name, tensor: tensor.detach()).eval()
        apply_edits(copied, plan.attributes)
        return Widened(LossModule(copied, self.loss), plan, axis, self.values)

    def normal(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Standard normal numbers from the growth's generator, with the dtype and device of `like`."""
        return torch.randn(tuple(shape), generator=self.generator, dtype=torch.float64).to(like)

    def uniform(self, shape: Sequence[int], bound: float, like: Tensor) -> Tensor:
        """Numbers from U(-bound, bound)."""
        drawn = torch.rand(tuple(shape), generator=self.generator, dtype=torch.float64)
        return ((2 * drawn - 1) * bound).to(like)
