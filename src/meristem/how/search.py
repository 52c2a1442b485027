"""The search for new units: candidates climb the score of the layers that read them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from meristem.core.axis import Axis, Place
from meristem.core.offer import Offer
from meristem.how.candidates import Seen, Space, best, gains, next_layers
from meristem.lab.laboratory import Lab
from meristem.lab.ledger import batch_size
from meristem.lab.losses import Loss
from meristem.lab.neutral import neutral
from meristem.statistics.curvature import ENTRIES
from meristem.structure import products, sized

LOOKS = 8
"""Batches on which optimised candidates are held against their start."""
# Step size of the optimisation of candidates, in root mean squares of their first
# weights.
_RATE = 0.1
# Examples below which every part of them measures in turn.
_FEW = 1000
# Standard errors beyond chance at which one part of the examples decides alone.
_CLEAR = 5
# Below these a search is not worth its name.
_LEAST_BATCHES, _LEAST_STEPS = 12, 8
# The incoming weights turn to the mean gradient for this part of the steps.
_TURNING = 3

Parts = tuple[Sequence[Any], Sequence[Any]]
"""Growth batches to choose on, and those to measure on."""


@dataclass(frozen=True)
class Search:
    """How much is looked for.

    Attributes:
        candidates: So many candidates,
        steps: climbing so many steps,
        batches: on so many growth batches.
        damping: Share of its mean diagonal that is added to every factor.
        turns: Where the batches are few, so many parts of them measure in turn.
    """

    candidates: int
    steps: int
    batches: int
    damping: float
    turns: int = 3

    def trials(self, units: int) -> int:
        """Candidates for so many units."""
        return max(self.candidates, units)

    def within(self, lab: Lab, axis: Axis, count: int) -> Search:
        """As much of this search as the allowance of a lab pays for, by halving."""
        search = replace(self, batches=min(self.batches, len(lab.batches)))
        while search.cost(lab, axis, count) > lab.allowance and search != search.least:
            search = search.halved
        return search

    @property
    def halved(self) -> Search:
        """Half as many batches and steps, and one part of the examples that measures."""
        least = self.least
        return replace(
            least,
            batches=max(self.batches // 2, least.batches),
            steps=max(self.steps // 2, least.steps),
        )

    @property
    def least(self) -> Search:
        """The smallest search that is worth its name."""
        return replace(
            self,
            batches=min(self.batches, _LEAST_BATCHES),
            steps=min(self.steps, _LEAST_STEPS),
            turns=1,
        )

    def cost(self, lab: Lab, axis: Axis, count: int) -> float:
        """About the floating-point operations that it takes.

        These are the passes of a `Space`, and the products of what they see.
        """
        batch = lab.batches[0]
        each = _pass_costs(lab, axis, self.trials(count // axis.grain), batch)
        looking = each.forward + each.made
        total = 0.0
        for first, second in self.parts([batch] * self.batches):
            looks, measured = min(LOOKS, len(first)), 2 * len(second)
            # Looks before and after the search, the moments, and one pass per batch
            # seen.
            passes = 3 * looks + min(self.steps, len(first)) + measured
            total += passes * (3 * each.forward + each.present)
            total += self.steps * (each.forward + 3 * (each.made + each.mixed))
            total += 2 * looks * (looking + each.mixed)
            total += measured * (looking + each.new)
        return total * batch_size(batch)

    def parts(self, batches: Sequence[Any]) -> list[Parts]:
        """Two thirds of the growth batches to choose on, the others to measure on.

        Where these hold few examples, other thirds measure in turn. One batch or two are
        both.
        """
        batches = list(batches)[: self.batches]
        if len(batches) < 3:
            return [(batches, batches)]
        third = len(batches) // 3
        few = third * batch_size(batches[0]) < _FEW
        parts: list[Parts] = []
        for turn in range(self.turns if few else 1):
            turned = batches[turn * third :] + batches[: turn * third]
            parts.append((turned[third:], turned[:third]))
        return parts


@dataclass(frozen=True)
class _PassCosts:
    """Floating-point operations per example.

    Attributes:
        forward: Of a forward pass.
        made: Of making the candidates' units.
        present: Of the moments of what the next layers read.
        mixed: Of holding the candidates against the gradient, each alone.
        new: Of the moments of all candidates together.
    """

    forward: float
    made: float
    present: float
    mixed: float
    new: float


def _pass_costs(lab: Lab, axis: Axis, units: int, batch: Any) -> _PassCosts:
    trials = units * axis.grain
    structure = lab.structure
    now, wide = sized(structure, {axis.name: trials}).flops
    strips = {}
    for slot, shape in lab.shapes(axis, trials).items():
        if slot.role != "carried":
            strips[slot] = math.prod(shape)
    inward = sum(strips[slot] for slot in axis.places("fan_in"))
    share = inward / sum(strips.values())
    present = mixed = new = 0.0
    for slot in axis.places("fan_out"):
        shape = lab.values.shape(slot.name)
        outputs, weights = shape[0], shape.numel()
        reads, entries = weights / outputs, strips[slot] / outputs
        rows = products(structure, slot.name) / weights / structure.batch
        # A product of two matrices costs two operations per multiply-add.
        shown = 2 * min(rows, ENTRIES / (reads * batch_size(batch)))
        present += shown * (reads + outputs) ** 2
        mixed += shown * entries * (outputs + entries / trials)
        new += shown * entries * (entries + outputs + reads)
    forward = now / structure.batch
    made = share * (wide - now) / structure.batch
    return _PassCosts(forward, made, present, mixed, new)


def searched(lab: Lab, loss: Loss, axis: Axis, count: int, search: Search) -> Offer:
    """The best units that were found on the first part of the batches.

    Their gains are what such units add on the average over the parts; the others are left
    out where the first one leaves no doubt.
    """
    next_layers(lab, axis)
    search = search.within(lab, axis, count)
    offers: list[Offer] = []
    for parts in search.parts(lab.batches):
        offers.append(Climb(lab, loss, axis, count, search, parts).offer())
        if not is_doubtful(offers[0]):
            break
    each = zip(*(offer.gains for offer in offers), strict=True)
    return replace(
        offers[0],
        gains=tuple(sum(parts) / len(offers) for parts in each),
        error=offers[0].error / math.sqrt(len(offers)),
        flops=sum(offer.flops for offer in offers),
    )


class Climb:
    """One search on one part of the examples.

    Attributes:
        space: The candidates.
        first, second: Batches to choose on, and to measure on.
    """

    def __init__(
        self, lab: Lab, loss: Loss, axis: Axis, count: int, search: Search, parts: Parts
    ) -> None:
        self.lab, self.axis, self.count, self.search = lab, axis, count, search
        self.first, self.second = parts
        self.units = count // axis.grain
        trials = search.trials(self.units)
        self.space = Space(lab, loss, axis, trials, search.damping, self.first)
        self._kept: dict[int, Seen] = {}

    def offer(self) -> Offer:
        """The candidates, optimised on the first batches.

        The best of them are offered, by what each adds to those before it on the others.
        """
        space, trials = self.space, self.space.trials
        started = self.drawn()
        silent = {slot.place for slot in self.axis.places("fan_out")}
        moving = [place for place in started if place not in silent]
        strips = self.optimised(started, moving)
        choosing = space.together(strips, self.first[-len(self.second) :])
        # Chosen on other examples than those that measure: else luck would be gain.
        order = best(choosing, trials, self.units)
        joint = space.together(strips, self.second)
        free = {}
        for layer in space.layers:
            entries = space.new[layer].shape[1] * space.kernel(layer)
            free[layer] = space.free[layer] * entries
        if self.second is self.first:
            # The incoming weights were fitted to these examples, too.
            free[space.layers[0]] += sum(strips[place][0].numel() for place in moving)
        chance, errors = 0.0, []
        for layer in space.layers:
            chance += free[layer] / joint[layer].samples
            errors.append(sampling_error(free[layer], joint[layer].samples))
        chosen = torch.tensor(order)
        beyond = [gain - chance for gain in gains(joint, trials, order)]
        return Offer(
            self.axis.name,
            self.count,
            {place: strip[chosen] for place, strip in strips.items()},
            gains=tuple(beyond),
            error=math.hypot(*errors),
            freedom=sum(free.values()),
            flops=sum(meter.total for meter in space.meters.values()),
        )

    def drawn(self) -> dict[Place, Tensor]:
        """Random candidates, with learned activations of their own.

        These are drawn from U(-1, 1): the mean of the neighbours is the identity in a
        layer that has just been inserted.
        """
        count = self.space.trials * self.axis.grain
        strips = neutral(self.lab, self.axis, count, zero="fan_out")
        for slot, shape in self.lab.shapes(self.axis, count).items():
            if slot.role == "carried" and slot.fill == "mean" and not slot.buffer:
                like = self.lab.values[slot.name]
                strips[slot.place] = self.lab.uniform(shape, 1.0, like)
        return strips

    def optimised(
        self, started: Mapping[Place, Tensor], moving: Sequence[Place]
    ) -> dict[Place, Tensor]:
        """Every candidate after a search uphill, or as it started where that was better.

        On one batch C is mostly noise, and so is a step along its own square. Each
        candidate therefore climbs along a random direction u of the outputs of its own,
        <u, C>, whose mean over batches is the truth; that keeps candidates apart, too. The
        incoming weights first turn to the mean gradient of some batches, then take steps
        of Adam.
        """
        strips = {}
        for place, strip in started.items():
            moves = place in moving
            strips[place] = strip.detach().clone().requires_grad_(moves)
        along = []
        for moments in self.space.moments.values():
            slope = moments.gradient
            shape = (self.space.trials, 1, len(slope))
            along.append(F.normalize(self.lab.normal(shape, slope), dim=2))
        turning = self.search.steps // _TURNING
        for step in range(turning):
            self._uphill(strips, self._shown(step), along)
        if turning:
            self._turn(strips, started)
        groups = []
        for place in moving:
            # A step in proportion to the weights, whatever their scale; 1 where they
            # are all zero.
            size = started[place].square().mean().sqrt()
            groups.append({"params": [strips[place]], "lr": _RATE * float(size or 1.0)})
        optimizer = torch.optim.Adam(groups)
        for step in range(turning, self.search.steps):
            optimizer.zero_grad()
            self._uphill(strips, self._shown(step), along)
            optimizer.step()
        return self._better(started, strips)

    def _turn(
        self, strips: Mapping[Place, Tensor], started: Mapping[Place, Tensor]
    ) -> None:
        """Point the incoming weights along their gradient, at the length they had."""
        for slot in self.axis.places("fan_in"):
            gradient = strips[slot.place].grad
            if gradient is not None:
                length = started[slot.place].flatten(1).norm(dim=1)
                turned = -F.normalize(gradient.flatten(1)) * length[:, None]
                strips[slot.place].data.copy_(turned.reshape(gradient.shape))

    def _better(
        self, started: Mapping[Place, Tensor], reached: Mapping[Place, Tensor]
    ) -> dict[Place, Tensor]:
        """Candidate by candidate, whichever scores more."""
        shown = self.first[-LOOKS:]
        before = self.space.scores(started, shown)
        better = self.space.scores(reached, shown) > before
        result = {}
        for place, strip in reached.items():
            by_unit = better.reshape(-1, *[1] * (strip.dim() - 1)).to(strip.device)
            result[place] = torch.where(by_unit, strip.detach(), started[place])
        return result

    def _shown(self, step: int) -> Seen:
        """The batch of a step; where they are few they come again and are kept."""
        number = step % len(self.first)
        if number in self._kept:
            return self._kept[number]
        seen = self.space.seen(self.first[number])
        # A batch that comes twice or more is worth its memory.
        if len(self.first) <= self.search.steps // 2:
            self._kept[number] = seen
        return seen

    def _uphill(
        self, strips: Mapping[Place, Tensor], seen: Seen, along: Sequence[Tensor]
    ) -> None:
        """Add to the gradients of the strips that of minus <u, C>.

        It is summed over candidates and next layers.
        """

        def climb() -> None:
            with torch.enable_grad():
                height = torch.zeros((), dtype=torch.float64)
                found = self.space.whitened(strips, seen)
                for one, direction in zip(found, along, strict=True):
                    height = height + (one * direction).sum().cpu()
                (-height).backward()

        self.space.meters["climb"].run(seen.batch, climb)


def is_doubtful(offer: Offer) -> bool:
    """Whether units are worth something, and not surely so.

    By the best number of them, with the error of their sum.
    """
    totals = enumerate(itertools.accumulate(offer.gains), 1)
    largest = max(total / math.sqrt(number) for number, total in totals)
    return 0 < largest < _CLEAR * offer.error


def sampling_error(freedom: float, samples: int) -> float:
    """The standard error of a score that is zero.

    N eta is chi-squared, with one degree of freedom per weight that counts.
    """
    return math.sqrt(2 * freedom) / samples
