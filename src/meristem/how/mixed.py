"""The mixed second derivative of the loss by the two sides of one new unit.

    M = d^2 L / (d W_in d W_out)      at W_in = 0, W_out = 0.

For a dense pair it is E[g h^T], for a pair of convolutions its exact form for every
stride, padding and dilation, and it exists for several consumers, pooling,
concatenation and residual joins alike. It is never formed: two differentiations of a
scalar, on a copy of the model widened by trial units, multiply it with all trial
vectors at once, and block subspace iteration finds its leading singular triplets
M = sum s_i u_i v_i^T.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from meristem.core.axis import Axis, Place, Slot
from meristem.lab.laboratory import Lab, Widened
from meristem.lab.neutral import flat_size, unflatten
from meristem.structure import products

Operator = Callable[[Tensor], Tensor]
Scalar = Callable[[Widened, Mapping[Place, Tensor], object], Tensor]
"""What is differentiated: a scalar of trial weights and a batch."""

OFFSET = 0.5
"""Pre-activation at which slopes are taken where the activation is flat at zero."""
# Below this ratio of the slopes at 0 and at the offset an activation counts as flat
# at zero.
_FLAT = 0.1
# Examples of a batch that are looked at, at least.
_FEWEST = 32
# Trial units that tell whether an activation is flat at zero.
_FEELERS = 4


def the_loss(widened: Widened, strips: Mapping[Place, Tensor], batch: object) -> Tensor:
    """The user's loss."""
    return widened.loss(strips, batch)


def cut_batches(lab: Lab, axis: Axis, count: int, batches: int, rows: int) -> list[Any]:
    """The first growth batches, cut to the examples that hold so many rows (examples x
    positions) per weight of a unit.
    """
    shapes, structure = lab.shapes(axis, count), lab.structure
    inward, outward = axis.places("fan_in"), axis.places("fan_out")
    weights = max(flat_size(shapes, inward), flat_size(shapes, outward))
    examples = float(_FEWEST)
    for slot in (*inward, *outward):
        size = math.prod(lab.values.shape(slot.name))
        positions = products(structure, slot.name) / size / structure.batch
        examples = max(examples, rows * weights / max(positions, 1.0))
    return [lab.cut(b, math.ceil(examples)) for b in lab.batches[:batches]]


class Mixed:
    """The weights of one axis' new units as vectors, and M acting on them.

    Args:
        lab: The laboratory.
        axis: The axis.
        count: How many units are wanted.
        batches: How many growth batches M is averaged over.
        rows: Of a batch, so many rows (examples x positions) per weight of a unit are
            enough.
        scalar: What is differentiated.
    """

    def __init__(
        self,
        lab: Lab,
        axis: Axis,
        count: int,
        batches: int,
        rows: int,
        scalar: Scalar = the_loss,
    ) -> None:
        self.lab, self.axis, self.count, self.scalar = lab, axis, count, scalar
        self.units = count // axis.grain
        self.inward, self.outward = axis.places("fan_in"), axis.places("fan_out")
        shapes = lab.shapes(axis, count)
        self.width_in, self.width_out = (
            flat_size(shapes, self.inward),
            flat_size(shapes, self.outward),
        )
        self.rank = min(self.width_in, self.width_out)
        # A block that spans the whole space is exact after one pass; a smaller one
        # takes several.
        block = self.units + 32
        self.trials = self.rank if self.rank <= 4 * block else 2 * block
        self.like = lab.values[self.inward[0].name]
        self.batches = cut_batches(lab, axis, count, batches, rows)

    def strips(self, inward: Tensor, outward: Tensor) -> dict[Place, Tensor]:
        """Strips from one fan-in and one fan-out vector per unit; depthwise kernels are
        the mean of the present ones.
        """
        shapes = self.lab.shapes(self.axis, len(inward) * self.axis.grain)
        carried = {
            slot.place: self.kernel(slot, shapes[slot])
            for slot in self.axis.places("carried")
            if slot.fill == "draw"
        }
        return (
            carried
            | unflatten(inward, shapes, self.inward)
            | unflatten(outward, shapes, self.outward)
        )

    def kernel(self, slot: Slot, shape: tuple[int, ...]) -> Tensor:
        """What new units are carried by through a depthwise convolution on the axis: the
        mean of its present kernels, each turned so that its entries sum to more than
        zero.

        As they are, the mean of many is nearly nothing, or turns all units negative: a
        rectifier behind it would let none through, and M would vanish.
        """
        kernels = self.lab.units(slot, self.axis)
        sums = kernels.flatten(1).sum(1)
        turned = torch.where(sums < 0, -1.0, 1.0).to(kernels)
        turned = turned.reshape(-1, *[1] * (kernels.dim() - 1))
        return (turned * kernels).mean(0, keepdim=True).expand(shape).clone()

    def operators(
        self, offset: float, trials: int | None = None
    ) -> tuple[Operator, Operator]:
        """V -> M V and U -> M^T U for trial vectors in rows, at a pre-activation of
        `offset`.
        """
        trials = trials or self.trials
        widened = self.lab.widened(self.axis, trials * self.axis.grain)
        parts = []
        with widened.lifted(offset):
            for batch in self.batches:
                inward = self.like.new_zeros(trials, self.width_in).requires_grad_()
                outward = self.like.new_zeros(trials, self.width_out).requires_grad_()
                value = self.scalar(widened, self.strips(inward, outward), batch)
                to_in, to_out = torch.autograd.grad(
                    value, (inward, outward), create_graph=True
                )
                parts.append((inward, outward, to_in, to_out))

        def apply(vectors: Tensor, inwards: bool) -> Tensor:
            # Sums over batches in float64: singular values far below the first one
            # count.
            total = torch.zeros(1, dtype=torch.float64)
            for inward, outward, to_in, to_out in parts:
                source, target = (to_out, inward) if inwards else (to_in, outward)
                if not source.requires_grad:
                    return vectors.new_zeros(
                        trials, self.width_in if inwards else self.width_out
                    )
                product = (source * vectors.to(source)).sum()
                (part,) = torch.autograd.grad(
                    product, target, retain_graph=True, allow_unused=True
                )
                total = total + (
                    torch.zeros_like(target) if part is None else part
                ).detach().double().cpu() / len(parts)
            return total

        return (lambda v: apply(v, True)), (lambda u: apply(u, False))

    def flat(self) -> bool:
        """Whether the activation has no slope at zero, as ReLU.

        M vanishes there, and half a unit away it does not.
        """
        probes = self.probes(_FEELERS)
        at_zero = self.operators(0.0, _FEELERS)[0](probes).norm()
        lifted = self.operators(OFFSET, _FEELERS)[0](probes).norm()
        return bool(at_zero < _FLAT * lifted)

    def triplets(
        self,
        forward: Operator,
        adjoint: Operator,
        tolerance: float = 1e-3,
        iterations: int = 30,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Leading singular triplets of M, in rows: fan-in vectors, singular values,
        fan-out vectors; float64.
        """
        # Block subspace iteration, one side orthonormal at a time.
        outward = orthonormal_rows(self.probes())
        values = torch.zeros(self.trials, dtype=torch.float64)
        for _ in range(iterations):
            inward = orthonormal_rows(forward(outward))
            rotation, new_values, outward = torch.linalg.svd(
                adjoint(inward), full_matrices=False
            )
            inward = rotation.T @ inward
            # Only the units that will be used must have converged.
            energy, new_energy = (
                v[: self.units].square().sum() for v in (values, new_values)
            )
            values = new_values
            if self.trials == self.rank or bool(
                new_energy - energy <= tolerance * new_energy
            ):
                break
        return inward, values, outward

    def probes(self, trials: int | None = None) -> Tensor:
        like = torch.zeros(1, dtype=torch.float64)
        return self.lab.normal((trials or self.trials, self.width_out), like)


def orthonormal_rows(rows: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(rows.T)[0]
    return basis.T
