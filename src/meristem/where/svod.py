"""SVoD, the steepest voting distributor (Chatzis, Kordonis, Theodosis, Maragos,
"Shared-Weights Extender and Gradient Voting for Neural Network Expansion", 2025, arXiv
2509.18842).

On a throw-away copy every axis gets 2K small random candidates, the copy trains for one
epoch, and a second epoch without steps measures the gradient of a gate on each
candidate's pre-activation z:

    s = mean over batches of dL/dy,  z -> (1 + y) z,  y = 0;       for ReLU s = sum(a
    dL/da)

The K most negative scores of all axes together cast one vote each for their axis.

No hook is needed: scaling a pre-activation is scaling the weights and bias that produce
it, so s = sum w dL/dw over these. Where a unit has several producers, or a norm on its
way, that would count twice or not at all; there the gate is on what the next layers
read, s = sum u dL/du over the fan-out, which is sum(a dL/da) for every activation.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor

from meristem.core.axis import Axis, Slot
from meristem.core.change import Plan, by_unit
from meristem.core.errors import DataError, GrowthRefused
from meristem.core.offer import Offer, Share
from meristem.lab.laboratory import Lab, Sandbox
from meristem.methods import Choice
from meristem.statistics.health import dense_gradient
from meristem.structure.twin import named_tensors
from meristem.where.counts import rounded, taken

_LOG = logging.getLogger("meristem")
# Candidates start with weights from U(-.01, .01), going out too.
_BOUND = 0.01


@dataclass(frozen=True)
class SVoD:
    """The steepest of many candidates on a trained copy vote for their layer. Costs two
    epochs of the widened copy.

    Args:
        score: "signed" as published: most negative first; "absolute": largest first.
        normalised: Divide the scores of an axis by their mean absolute value there.
        per_flop: Divide scores by the floating-point operations that a unit adds.
        candidates: Candidates per axis, as a multiple of the units to give away.
        lr: Learning rate of the warm-up (RMSprop, alpha .9, momentum .1).

    Examples:
        >>> SVoD(score="absolute")
        SVoD(score='absolute', normalised=False, per_flop=False, candidates=2, lr=0.001)
    """

    score: Literal["signed", "absolute"] = "signed"
    normalised: bool = False
    per_flop: bool = False
    candidates: int = 2
    lr: float = 1e-3

    def __post_init__(self) -> None:
        if self.score not in ("signed", "absolute"):
            raise ValueError(
                f'SVoD(score=...) is "signed" or "absolute"; got {self.score!r}'
            )
        if not isinstance(self.candidates, int) or self.candidates < 1:
            raise ValueError(
                "SVoD(candidates=...) must be an int in [1, inf); got "
                f"{self.candidates!r}"
            )
        if not 0 < self.lr < math.inf:
            raise ValueError(f"SVoD(lr=...) must be a float in (0, inf); got {self.lr}")

    @property
    def reads_gains(self) -> bool:
        return False

    @property
    def weighs_kinds(self) -> bool:
        return False

    def share(self, choice: Choice) -> Share:
        """Counts by vote; with one axis there is nothing to vote on."""
        # Two epochs of training would decide nothing.
        if len(choice.axes) == 1:
            return rounded(
                choice.axes, {choice.axes[0].name: float(choice.total)}, choice.total
            )
        if any(not axis.slots for axis in choice.axes):
            raise GrowthRefused(
                "SVoD votes among widths. hint: share blocks out by where.Uniform() or "
                "name them in amount="
            )
        if choice.lab is None:
            raise DataError(
                "where.SVoD trains a copy on the data: pass loss= and data="
            )
        sandbox = choice.lab.sandbox()
        scores = self.scores(sandbox, choice)
        ranked = []
        for axis in choice.axes:
            unit = fmean(map(abs, scores[axis.name])) or 1.0 if self.normalised else 1.0
            unit *= choice.flops_per_unit[axis.name] if self.per_flop else 1.0
            ranked += [
                (abs(s) / unit if self.score == "absolute" else -s / unit, axis)
                for s in scores[axis.name]
            ]
        counts = taken(ranked, choice.total)
        votes = {
            name: {
                "votes": float(counts.get(name, 0)),
                "candidates": float(len(s)),
                "first": self._first(s),
                "mean": fmean(s),
            }
            for name, s in scores.items()
        }
        _LOG.info("SVoD gives %d units:\n%s", choice.total, _table(votes))
        return Share(counts, votes, sandbox.meter.total)

    def _first(self, scores: list[float]) -> float:
        """The score of an axis' candidate that would vote first."""
        return max(scores, key=abs) if self.score == "absolute" else min(scores)

    def scores(self, sandbox: Sandbox, choice: Choice) -> dict[str, list[float]]:
        """The gate gradients of every candidate, by axis, on a sandbox that is not used
        again.
        """
        lab = sandbox.lab
        offers = []
        for axis in choice.axes:
            steps = -(-self.candidates * choice.total // axis.multiple)
            offers.append(_candidates(lab, axis, steps * axis.multiple))
        plan, axes = sandbox.insert(offers)
        tensors = named_tensors(sandbox.model)
        sandbox.model.train()
        for name in sandbox.trained:
            tensors[name].requires_grad_()
        parameters = [tensors[name] for name in sandbox.trained]
        if parameters:
            # As published: RMSprop with alpha .9 and momentum .1.
            warming = torch.optim.RMSprop(
                parameters, lr=self.lr, alpha=0.9, momentum=0.1
            )
            for batch in sandbox.epoch("SVoD warms candidates up"):
                warming.zero_grad()
                sandbox.meter.run(batch, lambda: _backward(sandbox, batch))  # noqa: B023
                warming.step()
            warming.zero_grad()
        # Frozen weights have gates, too.
        gates = {axis.name: _gates(axis, plan) for axis in axes}
        for slot in (slot for slots in gates.values() for slot in slots):
            tensors[slot.name].requires_grad_()
        batches = 0
        for batch in sandbox.epoch("SVoD scores candidates"):
            sandbox.meter.run(batch, lambda: _backward(sandbox, batch))  # noqa: B023
            batches += 1
        return {
            axis.name: _gate_gradients(axis, gates[axis.name], plan, tensors, batches)
            for axis in axes
        }


def _backward(sandbox: Sandbox, batch: Any) -> None:
    loss = sandbox.loss(batch, {})
    if not loss.requires_grad:
        raise DataError(
            "the loss has no gradient: SVoD cannot score candidates; nothing was "
            "changed"
        )
    loss.backward()
    for parameter in sandbox.model.parameters():
        parameter.grad = dense_gradient(parameter)


def _candidates(lab: Lab, axis: Axis, count: int) -> Offer:
    """Small random units, whatever the rule of their axis; norms and statistics start
    by their fill.
    """
    drawn = [
        slot
        for slot in axis.slots
        if slot.role == "fan_out" or slot.fill in ("draw", "bias")
    ]
    shapes = lab.shapes(axis, count)
    strips = {
        slot.place: lab.uniform(shapes[slot], _BOUND, lab.values[slot.name])
        for slot in drawn
    }
    return Offer(axis.name, count, strips)


def _gates(axis: Axis, plan: Plan) -> list[Slot]:
    """The slots whose weights scale a unit: one layer and its bias where nothing else
    is on the way, else the fan-out.
    """
    inward, carried = axis.places("fan_in"), axis.places("carried")
    plain = (
        axis.norm is None
        and axis.grain == 1
        and all(slot.fill == "bias" for slot in carried)
    )
    if (
        plain
        and len(inward) == 1
        and len(carried) <= 1
        and plan.layout[axis.name][inward[0].place].shape[1] == 1
    ):
        return [*inward, *carried]
    return list(axis.places("fan_out"))


def _gate_gradients(
    axis: Axis,
    gates: list[Slot],
    plan: Plan,
    tensors: Mapping[str, Tensor],
    batches: int,
) -> list[float]:
    new = plan.added[axis.name] // axis.grain
    total = torch.zeros(new, dtype=torch.float64)
    for slot in gates:
        gradient = tensors[slot.name].grad
        if gradient is not None:
            product = by_unit(
                tensors[slot.name].detach().double() * gradient.double(),
                slot.dim,
                plan.layout[axis.name][slot.place],
            )
            total += product[-new:].flatten(1).sum(1).cpu()
    if not bool(torch.isfinite(total).all()):
        raise DataError(
            f"the candidates of {axis.name} diverged while warming up; nothing was "
            "grown. hint: SVoD(lr=...)"
        )
    listed: list[float] = (total / max(batches, 1)).tolist()
    return listed


def _table(votes: Mapping[str, Mapping[str, float]]) -> str:
    width = max(len(name) for name in votes)
    return "\n".join(
        f"  {name.ljust(width)}  {row['votes']:.0f} of {row['candidates']:.0f} "
        f"candidates, the first at {row['first']:.3g}"
        for name, row in votes.items()
    )
