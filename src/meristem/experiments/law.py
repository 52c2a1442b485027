"""What a net over a text ends at, by its size and its data, and what growing it saves.

The form is that of Hoffmann et al., "Training Compute-Optimal Large Language Models",
2022, arXiv 2203.15556:

    L = E + A / N^a + B / D^b.

Of a run that is compared with the best fixed size at equal cost E and B drop out; what is
left is A over B, here told as the targets per parameter at which a net of a size is the
best one. Exponents and that number are of the sweeps in `benchmarks/best`, GPTs over bytes
of source code at a constant batch, and hold for what is like them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from meristem.experiments.frontier import Multiplier

SIZE_EXPONENT, DATA_EXPONENT = 0.44, 0.75
"""The sweep has .44 and 1.0; large language models .35 and .37 (Besiroglu et al., 2024,
arXiv 2404.10102), with the same share of the two, nearly.
"""
BEST_TOKENS, AT_PARAMETERS, FALL = 61.0, 1.28e5, 0.33
"""Targets per parameter of the best size of one cost, and the power with which they fall
with its parameters: 76 at 8e4, 50 at 1.9e5, about 20 at 5e6.
"""
SPREAD = 0.25
"""Standard deviation of their logarithm."""
WIDER = 2.0
"""How much wider, in logarithms, an interval is than these spreads make it: on a text that
nothing here was fitted to, 4 of 10 measured values were inside without, and 8 with it.
"""
BEHIND = (0.75, 1.25, 1.75)
"""How far stacked nets ended behind, as multiples of `Plan.unmixed`: low, middle, high."""
BEHIND_SHARED = (0.4, 0.7, 1.0)
"""The same of nets whose blocks share what they add with their copies."""
Curve = Sequence[tuple[float, float]]
"""Examples read and losses."""


@dataclass(frozen=True)
class Law:
    """worth / c^a + 1 / D^b, of training FLOPs per example c and examples D: what a loss is
    above E, in units of B.

    Sizes are told by what they cost, so that embeddings, which cost nothing, count as what
    they are.
    """

    worth: float
    weight: float = 1.0

    def excess(self, size: float, examples: float) -> float:
        """The loss above E, in units of B."""
        return float(self.worth / size**SIZE_EXPONENT + 1 / examples**DATA_EXPONENT)

    def best_size(self, cost: float) -> float:
        """The size of the smallest loss at a cost, N^(a + b) = (a A / b B) C^b."""
        ratio = SIZE_EXPONENT * self.worth / DATA_EXPONENT
        power = 1 / (SIZE_EXPONENT + DATA_EXPONENT)
        found: float = (ratio * cost**DATA_EXPONENT) ** power
        return found

    def cost_of(self, excess: float) -> float:
        """The cost at which the best fixed size has a loss."""
        part = self.worth * (1 + SIZE_EXPONENT / DATA_EXPONENT) / excess
        size = part ** (1 / SIZE_EXPONENT)
        ratio = SIZE_EXPONENT * self.worth / DATA_EXPONENT
        power = SIZE_EXPONENT + DATA_EXPONENT
        found: float = (size**power / ratio) ** (1 / DATA_EXPONENT)
        return found


def law_of(size: float, examples: float, weight: float = 1.0) -> Law:
    """The law by which a size is the best one for so many examples."""
    ratio = DATA_EXPONENT / SIZE_EXPONENT
    return Law(ratio * size**SIZE_EXPONENT / examples**DATA_EXPONENT, weight)


def laws(size: float, parameters: int, targets: int) -> list[Law]:
    """What is known of a net, as laws with their weights.

    Args:
        size: Training FLOPs per example.
        parameters: Of the same net.
        targets: Per example.
    """
    tokens = BEST_TOKENS * (parameters / AT_PARAMETERS) ** -FALL
    found = []
    for deviation in np.linspace(-2, 2, 9):
        examples = tokens * math.exp(SPREAD * deviation) * parameters / targets
        found.append(law_of(size, examples, math.exp(-(deviation**2) / 2)))
    return found


@dataclass(frozen=True)
class Plan:
    """A run with one growth.

    Attributes:
        before, after: Training FLOPs per example of both sizes.
        cost: Training FLOPs of the whole run.
    """

    before: float
    after: float
    cost: float

    def examples(self, moment: float) -> float:
        """Examples read at this cost, by the fraction of steps before the growth."""
        return self.cost / (moment * self.before + (1 - moment) * self.after)

    def unmixed(self, law: Law, moment: float) -> float:
        """By which share of the examples before the growth a net is behind one that was
        large all along, if it goes on along the other's curve from the loss that it has.
        """
        read = moment * self.examples(moment)
        excess = law.excess(self.before, read) - law.worth / self.after**SIZE_EXPONENT
        there: float = excess ** (-1 / DATA_EXPONENT)
        return 1 - there / read

    def multiplier(self, law: Law, moment: float, behind: float) -> float:
        """The cost of the best fixed size for the same loss, over the plan's.

        Args:
            law: What size and data are worth.
            moment: The fraction of steps before the growth.
            behind: By which share of the examples before the growth, in [0, 1], the net
                ends behind one that was large all along.
        """
        effective = self.examples(moment) * (1 - behind * moment)
        return law.cost_of(law.excess(self.after, effective)) / self.cost


def examples_behind(after: Curve, large: Curve) -> float:
    """How many examples a grown net is behind the large one at its end, or ahead of it.

    Args:
        after: Examples and losses of the grown net since its growth.
        large: The same of the net that was large all along.

    The last third of the grown net's points is compared, each with the moment at which the
    large one had its loss; what has a loss below all of the large one's counts as level.
    """
    x = np.asarray([examples for examples, _ in large])
    # A curve that falls, so that a loss has one moment.
    y = np.minimum.accumulate([loss for _, loss in large])
    found = []
    for examples, loss in after[-max(1, len(after) // 3) :]:
        found.append(examples - float(np.interp(-loss, -y, x)))
    return fmean(found)


def expected(
    plan: Plan,
    known: Sequence[Law],
    moment: float,
    behind: float,
    parts: Sequence[float] = BEHIND,
) -> Multiplier:
    """The multiplier at a moment: median, and the middle 80 %, over laws and over how far
    a run ends behind, widened.

    A net that mixes with the curve of the large one catches up; one that is disturbed by
    its growth falls further back. Never less is expected than what a trial has shown
    (`behind`), which is caught up exponentially, in time as counted by what was read
    before.
    """
    least = min(max(behind, 0.0), 1.0) ** ((1 - moment) / moment)
    values, weights = [], []
    for law in known:
        unmixed = plan.unmixed(law, moment)
        for part in parts:
            left = min(max(part * unmixed, least), 1.0)
            values.append(plan.multiplier(law, moment, left))
            weights.append(law.weight)
    low, middle, high = _quantiles(values, weights, (0.1, 0.5, 0.9))
    wide = [middle * (end / middle) ** WIDER for end in (low, high)]
    return Multiplier(middle, *wide)


def expected_size(plan: Plan, known: Sequence[Law]) -> float:
    """The best fixed size at the cost of a plan, in FLOPs per example."""
    sizes = [law.best_size(plan.cost) for law in known]
    return _quantiles(sizes, [law.weight for law in known], (0.5,))[0]


def _quantiles(
    values: Sequence[float], weights: Sequence[float], shares: Sequence[float]
) -> list[float]:
    order = np.argsort(values)
    passed = np.cumsum(np.asarray(weights)[order]) / np.sum(weights)
    return [float(values[order[int(np.searchsorted(passed, q))]]) for q in shares]
