"""What a method may look at: the model's structure and values, growth batches, a sandbox to compute on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from meristem.axis import Axis, Place, Slot
from meristem.errors import DataError, GrowthRefused
from meristem.structure import Structure, resolve
from meristem.structure.discover import apply_edits
from meristem.structure.twin import twin
from meristem.surgery.tensors import grown_tensors, new_units
from meristem.values import Plan, Proposal, Scaling

Loss = Callable[[nn.Module, Any], Tensor]


@runtime_checkable
class How(Protocol):
    """A method that offers weights for new units.

    `preserves` says whether the network computes the same function right after the growth; `batches` how many growth
    batches the method measures on, 0 where it needs neither `loss` nor `data`.
    """

    @property
    def preserves(self) -> bool: ...

    @property
    def batches(self) -> int: ...

    def propose(self, view: View, axis: Axis, count: int) -> Proposal: ...


class _LossModule(nn.Module):
    """`loss(model, batch)` as a module, so that torch can call it with other tensors in the model's place."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.model, batch)


def measured(call: Callable[[], Tensor]) -> Tensor:
    """The loss that `call` gives on a grown copy; raises our own errors where it fails or is not finite."""
    try:
        loss = call()
    except Exception as error:
        raise GrowthRefused(
            f"the loss fails on a grown copy of the model in eval mode ({type(error).__name__}: {error}); nothing was "
            "changed. hint: a weight that only the loss uses does not grow; let the model's forward use it"
        ) from error
    if not bool(torch.isfinite(loss)):
        raise DataError(f"the loss of a growth batch is {loss.item()}; nothing was grown")
    return loss


@dataclass
class Sandbox:
    """A widened copy of the model; weights of the new units go in, losses come out. The model itself is not touched.

    `strips` are the sandbox's trial weights: for each place, (units, entries per unit, *other dimensions).
    """

    module: _LossModule
    plan: Plan
    axis: Axis
    values: Mapping[str, Tensor]

    def loss(self, strips: Mapping[Place, Tensor], batch: Any) -> Tensor:
        """The loss on one batch, in eval mode, differentiable in `strips`."""
        proposal = Proposal(self.axis.name, self.plan.after[self.axis.name] - self.plan.before[self.axis.name], strips)
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
    """

    structure: Structure
    generator: torch.Generator
    loss: Loss | None = None
    batches: Sequence[Any] = ()
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
        value = self.values[slot.name].movedim(slot.dim, 0)
        return value[torch.from_numpy(layout.copy())]

    def sandbox(self, axis: Axis, count: int) -> Sandbox:
        """A copy of the model widened by `count` units of `axis`."""
        assert self.loss is not None
        plan = self.plan(axis, count)
        copied = twin(self.structure.model, lambda name, tensor: tensor.detach()).eval()
        apply_edits(copied, plan.attributes)
        return Sandbox(_LossModule(copied, self.loss), plan, axis, self.values)

    def normal(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Standard normal numbers from the growth's generator, with the dtype and device of `like`."""
        return torch.randn(tuple(shape), generator=self.generator, dtype=torch.float64).to(like)

    def uniform(self, shape: Sequence[int], bound: float, like: Tensor) -> Tensor:
        """Numbers from U(-bound, bound)."""
        drawn = torch.rand(tuple(shape), generator=self.generator, dtype=torch.float64)
        return ((2 * drawn - 1) * bound).to(like)
