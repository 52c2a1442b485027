"""GradMax (Evci, van Merrienboer, Unterthiner, Vladymyrov, Pedregosa, "GradMax: Growing
Neural Networks using Gradient Information", ICLR 2022, arXiv 2201.05125).

New units start with one side zero, and the other side is chosen so that the gradient
that reaches the zero side is largest. Everything rests on one operator, the mixed
second derivative

    M = d^2 L / (d W_in d W_out)      at W_in = 0, W_out = 0, for one new unit,

which for a dense pair is B = E[g h^T] of the paper (see `how.mixed`).

Differences from the paper: the convolution is exact (the released auxiliary convolution
is not, with strides); a unit whose activation has no slope at zero (ReLU) would stay
dead for ever with zero fan-in, so its fan-in takes the first gradient step, at a length
of a few rounding errors, which opens the activation and preserves the function to
rounding; a norm on the axis turns the default to zero fan-out, whose preservation
outlives the first step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from meristem.core.axis import Axis, Kind
from meristem.core.errors import GrowthRefused
from meristem.core.offer import Offer
from meristem.how.mixed import OFFSET, Mixed, orthonormal_rows
from meristem.lab.laboratory import Lab
from meristem.lab.ledger import counting
from meristem.lab.neutral import mean_norm
from meristem.methods import check_counts, check_positive

# Length of the opening step of a flat activation, in rounding errors of the present
# fan-in norm.
_KICK = 4.0
# Steps that training is followed for, to see whether a unit stays open.
_FOLLOWED = 4


@dataclass(frozen=True)
class GradMax:
    """New units whose zero side receives the largest gradient that weights of their
    norm can give.

    Zero fan-in: W_out = a (u_1, ..., u_k), the leading singular vectors of M; then
    ||dL/dW_in||_F^2 = a^2 sum s_i^2, the largest possible for orthogonal columns of
    norm a = scale x the mean fan-out norm of the present units. The predicted
    first-order gain of unit i is a s_i. Zero fan-out: W_in starts at the v_i and climbs
    ||dL/dW_out||^2 by Adam, its norm kept at scale x the mean fan-in norm.

    Args:
        zero: The side that is zero; "auto" takes "fan_in", and "fan_out" where a norm
            sits on the axis or where the fan-in cannot reach the loss to first order
            (gated units), and in 16-bit floats.
        scale: Norm of the new weights over the mean norm of the present units'.
        steps: Steps of the climb, with zero fan-out.
        batches: Growth batches that M is averaged over.
        rows: Of a batch, so many rows (examples x positions) per weight of a unit are
            enough: one of images is cut to the examples that hold them, 32 at least.
        tolerance: Relative change of sum s_i^2, over the new units, at which the
            subspace iteration stops.
        iterations: Most passes of the subspace iteration.

    Examples:
        >>> import torch, meristem as ms
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> data = [(torch.randn(32, 4), torch.randn(32, 2))]
        >>> loss = lambda model, batch: torch.nn.functional.mse_loss(model(batch[0]), batch[1])
        >>> growth = ms.grow_(net, {"0": 2}, data[0][0], how=ms.how.GradMax(), loss=loss, data=data)
        >>> growth.after
        {'0': 10}
    """

    zero: Literal["auto", "fan_in", "fan_out"] = "auto"
    scale: float = 0.5
    steps: int = 5
    batches: int = 1
    rows: int = 16
    tolerance: float = 1e-3
    iterations: int = 30

    def __post_init__(self) -> None:
        if self.zero not in ("auto", "fan_in", "fan_out"):
            raise ValueError(
                f'GradMax(zero=...) is "auto", "fan_in" or "fan_out"; got {self.zero!r}'
            )
        check_positive("GradMax", scale=self.scale, tolerance=self.tolerance)
        check_counts("GradMax", batches=self.batches, rows=self.rows)
        check_counts("GradMax", iterations=self.iterations)
        check_counts("GradMax", 0, steps=self.steps)

    @classmethod
    def published(cls) -> GradMax:
        """The setting of the paper: zero fan-in, whatever the activation and the norms."""
        return cls(zero="fan_in")

    @property
    def kinds(self) -> Mapping[Kind, bool]:
        return {"width": self.preserves, "heads": self.preserves}

    @property
    def preserves(self) -> bool:
        return True

    def propose(self, lab: Lab, axis: Axis, count: int) -> Offer:
        """The `count` best units, the one with the largest predicted gain first."""
        lab.user_loss("GradMax")
        if axis.streamed or axis.end or not axis.places("fan_in"):
            raise GrowthRefused(
                f"GradMax has no zero side on axis {axis.name!r}. hint: how.Random "
                "grows it"
            )
        with counting() as counter:
            space = _Units(lab, axis, count, self)
            offer = (
                space.zero_fan_out()
                if self.zero == "fan_out"
                else self._fan_in_first(space)
            )
        return Offer(
            offer.axis,
            count,
            offer.strips,
            gains=offer.gains,
            flops=counter.get_total_flops(),
            note=offer.note,
        )

    def _fan_in_first(self, space: _Units) -> Offer:
        coarse = (
            torch.finfo(space.like.dtype).eps > 1e-5
        )  # an opening step of rounding size would show
        if self.zero == "auto" and (space.axis.norm is not None or coarse):
            return space.zero_fan_out()
        offer = space.zero_fan_in()
        if self.zero == "auto" and max(offer.gains, default=0.0) == 0.0:
            return space.zero_fan_out()
        return offer


class _Units(Mixed):
    """New units of GradMax, from the triplets of M."""

    def __init__(self, lab: Lab, axis: Axis, count: int, method: GradMax) -> None:
        super().__init__(lab, axis, count, method.batches, method.rows)
        self.method = method

    def frame(self) -> tuple[Tensor, Tensor, Tensor, bool]:
        """The k best triplets, random orthonormal directions beyond the rank, and
        whether the activation is flat at 0.
        """
        method = self.method
        flat = self.flat()
        inward, values, outward = self.triplets(
            *self.operators(OFFSET if flat else 0.0),
            method.tolerance,
            method.iterations,
        )
        # Below this share of the largest they are rounding.
        values = torch.where(values > 1e-10 * values.max(), values, 0.0)
        outward, inward = (
            _fill(self.lab, outward, values, self.units),
            _fill(self.lab, inward, values, self.units),
        )
        values = torch.nn.functional.pad(values, (0, max(0, self.units - len(values))))[
            : self.units
        ]
        # Signs of singular vectors are arbitrary; fixed ones make growth repeatable.
        largest = outward.gather(1, outward.abs().argmax(1, keepdim=True)).sign()
        return inward * largest, values, outward * largest, flat

    def zero_fan_in(self) -> Offer:
        """Fan-out along the singular vectors; fan-in zero, or opened by a step of
        rounding size under a flat activation.
        """
        inward, values, outward, flat = self.frame()
        length = self.method.scale * (mean_norm(self.lab, self.axis, "fan_out") or 1.0)
        fan_out, fan_in = length * outward, torch.zeros_like(inward)
        if flat:
            step = (
                _KICK
                * torch.finfo(self.like.dtype).eps
                * (mean_norm(self.lab, self.axis, "fan_in") or 1.0)
            )
            sign, fan_in = self.opened(-step * inward, fan_out)
            fan_out = sign * fan_out
        gains = tuple((length * values).tolist())
        note = (
            f"zero fan-in{', opened by a step of rounding size' if flat else ''}"
            + self.shortfall(values)
        )
        return self.offer(fan_in, fan_out, gains, note)

    def opened(self, inward: Tensor, outward: Tensor) -> tuple[Tensor, Tensor]:
        """Per unit the sign of the fan-out, and the tiny fan-in, that stay open.

        From either side of the hyperplane and with either sign, the gradients as the
        activation gates them are followed for a few steps, which is where training will
        take the unit; the way whose weakest gradient is largest wins.
        """
        ways = list(itertools.product((1.0, -1.0), repeat=2))
        # All ways at once: fan-in of rounding size, they do not feel each other.
        widened = self.lab.widened(self.axis, len(ways) * self.count)
        sides = torch.cat([side * inward for side, _ in ways]).to(self.like)
        signed = torch.cat([sign * outward for _, sign in ways]).to(self.like)
        length = sides.norm(dim=1, keepdim=True)
        trial, travelled = sides, torch.zeros_like(sides)
        norms, way = [], []
        for _ in range(_FOLLOWED):
            trial = trial.detach().requires_grad_()
            loss = widened.loss(self.strips(trial, signed), self.batches[0])
            gradient = torch.autograd.grad(loss, trial)[0]
            norm = gradient.norm(dim=1, keepdim=True)
            norms.append(norm)
            way.append(trial.detach())
            travelled = travelled - gradient
            least = torch.finfo(norm.dtype).tiny
            trial = (
                length
                * travelled
                / travelled.norm(dim=1, keepdim=True).clamp_min(least)
            )
        # The first gradient is that of the starting point, the same for all.
        weakest = torch.stack(norms[1:]).amin(0) + 1e-6 * norms[1]
        chosen = weakest.reshape(len(ways), -1).argmax(0)
        rows = chosen * len(inward) + torch.arange(len(inward), device=chosen.device)
        signs = torch.tensor([sign for _, sign in ways], dtype=torch.float64)
        return signs[chosen.cpu()][:, None], way[1][rows].double().cpu()

    def zero_fan_out(self) -> Offer:
        """Fan-in from the singular vectors, improved by projected ascent on the
        gradient of the zero fan-out.
        """
        start, values, _, _ = self.frame()
        length = self.method.scale * (mean_norm(self.lab, self.axis, "fan_in") or 1.0)
        widened = self.lab.widened(self.axis, self.count)
        outward = self.like.new_zeros(self.units, self.width_out).requires_grad_()

        def gradient(inward: Tensor, create_graph: bool) -> Tensor:
            strips = self.strips(inward, outward)
            loss = sum(widened.loss(strips, batch) for batch in self.batches)
            assert isinstance(loss, Tensor)
            return torch.autograd.grad(
                loss / len(self.batches), outward, create_graph=create_graph
            )[0]

        flipped = gradient(length * -start.to(self.like), False).norm(dim=1)
        kept = gradient(length * start.to(self.like), False).norm(dim=1)
        sign = torch.where(kept >= flipped, 1.0, -1.0)[:, None]
        inward = (length * sign * start.to(self.like)).requires_grad_()
        optimizer = torch.optim.Adam(
            [inward], lr=0.1 * length / math.sqrt(self.width_in)
        )
        best, best_norms = inward.detach().clone(), torch.maximum(kept, flipped)
        for _ in range(self.method.steps):
            objective = gradient(inward, True).square().sum()
            (inward.grad,) = torch.autograd.grad(-objective, inward)
            optimizer.step()
            with torch.no_grad():
                inward.mul_(length / inward.norm(dim=1, keepdim=True).clamp_min(1e-30))
        reached = gradient(inward, False).norm(dim=1)
        # The climb may end lower than it began; then the start is kept.
        better = (reached >= best_norms)[:, None]
        best = torch.where(better, inward.detach(), best)
        gains = torch.maximum(reached, best_norms)
        order = gains.argsort(descending=True)
        strips = {
            place: strip[order]
            for place, strip in self.strips(best, outward.detach()).items()
        }
        note = "zero fan-out" + self.shortfall(values)
        return Offer(
            self.axis.name,
            self.count,
            strips,
            gains=tuple(gains[order].tolist()),
            note=note,
        )

    def shortfall(self, values: Tensor) -> str:
        missing = int((values == 0).sum())
        return (
            f"; the gradient has rank {len(values) - missing}, {missing} units are "
            "random"
            if missing
            else ""
        )

    def offer(
        self, inward: Tensor, outward: Tensor, gains: tuple[float, ...], note: str
    ) -> Offer:
        strips = self.strips(inward.to(self.like), outward.to(self.like))
        return Offer(self.axis.name, self.count, strips, gains=gains, note=note)


def _fill(lab: Lab, rows: Tensor, values: Tensor, count: int) -> Tensor:
    """The first `count` rows; where their singular value is zero, or there are too few,
    random unit rows instead.

    These are orthogonal among themselves, not to the others: outside the range of M no
    gradient would reach them.
    """
    good = rows[: int((values[:count] > 0).sum())]
    missing = count - len(good)
    if not missing:
        return good
    extra = lab.normal((missing, rows.shape[1]), rows)
    if missing <= rows.shape[1]:
        return torch.cat([good, orthonormal_rows(extra)])
    return torch.cat([good, extra / extra.norm(dim=1, keepdim=True)])
