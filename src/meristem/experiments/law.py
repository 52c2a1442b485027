"""What a net ends at, by its size and its data, and what growing it saves.

The law is that of Hoffmann et al., "Training Compute-Optimal Large Language Models", 2022,
arXiv 2203.15556,

    L = E + A / N^a + B / D^b,

with the exponents of the fit of Besiroglu et al., "Chinchilla Scaling: A Replication
Attempt", 2024, arXiv 2404.10102. What size is worth against data, A over B, differs from
data set to data set: it is weighed by short curves of two sizes, beside what is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meristem.experiments.frontier import Multiplier

SIZE_EXPONENT, DATA_EXPONENT = 0.3478, 0.3658
BEST_TOKENS = 25.0
"""Targets per parameter at which a net is the best fixed size for its cost: about 20 for
large language models, 20 to 30 for nets over bytes of source code.
"""
SPREAD, SPREAD_ELSEWHERE = 0.5, 3.0
"""Standard deviation of its logarithm for texts, and where nothing is known."""
ROUGHNESS = 0.02
"""Error of the law on a probe, as a share of the fall of its losses."""
WEIGHT = 6
"""Independent points that a probe's curves count as."""
GRID = 241
Curve = Sequence[tuple[float, float]]
"""Examples read and losses."""


@dataclass(frozen=True)
class Law:
    """worth / c^a + 1 / D^b, of training FLOPs per example c and examples D: what a loss is
    above E, in units of B.

    Sizes are told by what they cost, so that embeddings, which cost nothing, and
    convolutions, which cost more than their parameters, count as what they are.
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


def laws(
    curves: Sequence[tuple[float, Curve]],
    size: float,
    examples_per_parameter: float,
    language: bool,
) -> list[Law]:
    """Laws of every worth of size, weighed by two curves and by what is known.

    Args:
        curves: Training FLOPs per example of two sizes or more, and what they learnt.
        size: Training FLOPs per example of the large one.
        examples_per_parameter: Examples that have one target for every parameter of it.
        language: Whether it learns a text, for which more is known.
    """
    spread = SPREAD if language else SPREAD_ELSEWHERE
    points = [(c, *point) for c, curve in curves for point in curve]
    losses = np.asarray([loss for _, _, loss in points])
    error = ROUGHNESS * float(np.ptp(losses))
    found = []
    # By the targets per parameter at which the large net is the best size.
    centre = math.log(BEST_TOKENS)
    for log_tokens in np.linspace(centre - 4 * spread, centre + 4 * spread, GRID):
        best_examples = math.exp(log_tokens) * examples_per_parameter
        ratio = DATA_EXPONENT / SIZE_EXPONENT
        worth = ratio * size**SIZE_EXPONENT / best_examples**DATA_EXPONENT
        law = Law(worth)
        excess = [law.excess(c, examples) for c, examples, _ in points]
        misfit = _misfit(np.asarray(excess), losses)
        likelihood = -0.5 * WEIGHT * (misfit / error) ** 2
        prior = -0.5 * ((log_tokens - centre) / spread) ** 2
        found.append((worth, likelihood + prior))
    most = max(weight for _, weight in found)
    return [Law(worth, math.exp(weight - most)) for worth, weight in found]


def _misfit(excess: NDArray[Any], losses: NDArray[Any]) -> float:
    """The error that is left at the best E and B, the latter not below zero."""
    x = excess - excess.mean()
    y = losses - losses.mean()
    scale = max(float(x @ y) / float(x @ x), 0.0)
    return float(np.sqrt(np.mean((y - scale * x) ** 2)))


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
    large one had its loss.
    """
    x = np.asarray([examples for examples, _ in large])
    # A curve that falls, so that a loss has one moment.
    y = np.minimum.accumulate([loss for _, loss in large])
    found = []
    for examples, loss in after[-max(1, len(after) // 3) :]:
        found.append(examples - float(np.interp(-loss, -y, x)))
    return fmean(found)


def expected(
    plan: Plan, known: Sequence[Law], moment: float, behind: float
) -> Multiplier:
    """The multiplier at a moment: median, and the middle 80 %, over laws and over how far
    a run ends behind.

    A net that mixes with the curve of the large one catches up; one that is disturbed by
    its growth falls further back. Half, one and one and a half times the distance of a net
    that does neither are thought as likely, and never less than what the trial has shown,
    which is caught up exponentially, in time as counted by what was read before.
    """
    least = min(max(behind, 0.0), 1.0) ** ((1 - moment) / moment)
    values, weights = [], []
    for law in known:
        unmixed = plan.unmixed(law, moment)
        for part in (0.5, 1.0, 1.5):
            left = min(max(part * unmixed, least), 1.0)
            values.append(plan.multiplier(law, moment, left))
            weights.append(law.weight)
    low, middle, high = _quantiles(values, weights, (0.1, 0.5, 0.9))
    return Multiplier(middle, low, high)


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
