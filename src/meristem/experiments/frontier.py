"""The best fixed size at a cost, from a sweep, and what a grown run saves against it.

At every budget the loss of the fixed nets has its minimum at some size; a parabola in the
logarithm of the parameters through the best size and its neighbours finds it (Hoffmann et
al., "Training Compute-Optimal Large Language Models", 2022, arXiv 2203.15556, approach 2).
The minima of all budgets are the frontier. The compute multiplier of a grown run is the
cost at which the frontier has its loss, over its own cost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from meristem.core.errors import DataError

DRAWS = 1000
"""Resamplings of the seeds behind an interval."""

Sweep = Mapping[float, Mapping[float, Mapping[int, float]]]
"""By budget (FLOPs), by size (parameters), by seed: the loss."""


@dataclass(frozen=True)
class Multiplier:
    """What a grown run saves against the best fixed size.

    Attributes:
        value: Cost of the best fixed size for the same loss, over the cost of the run.
        low, high: What it is likely between: of measured runs the middle 95 % of
            resampled seeds.
        inside: Whether the loss lies between those of the frontier; else `value` goes on
            along its last piece.
    """

    value: float
    low: float
    high: float
    inside: bool = True

    def __str__(self) -> str:
        beyond = "" if self.inside else ", beyond the sweep"
        # One seed has no interval.
        interval = f" [{self.low:.2f}, {self.high:.2f}]" if self.low < self.high else ""
        return f"{self.value:.2f}{interval}{beyond}"


def minimum(sizes: Sequence[float], losses: Sequence[float]) -> tuple[float, float]:
    """The size with the smallest loss, and that loss.

    Raises:
        DataError: Fewer than three sizes, or the best is the first or the last of them.
    """
    if len(sizes) < 3:
        raise DataError(
            f"a best size is found among three at least; got {len(sizes)}. hint: name "
            "more under [best]"
        )
    order = np.argsort(sizes)
    x, y = np.log(np.asarray(sizes)[order]), np.asarray(losses)[order]
    best = int(np.argmin(y))
    if best in (0, len(y) - 1):
        side = "smaller" if best == 0 else "larger"
        raise DataError(
            f"the best of the fixed sizes is the {'smallest' if best == 0 else 'largest'}, "
            f"{math.exp(x[best]):,.0f} parameters: the minimum may lie beyond. hint: name a "
            f"{side} one under [best]"
        )
    near = slice(best - 1, best + 2)
    curve = np.polynomial.Polynomial.fit(x[near], y[near], 2)
    at = float(curve.deriv().roots()[0].real)
    return math.exp(at), float(curve(at))


def frontier(sweep: Sweep, seeds: Sequence[int]) -> list[tuple[float, float]]:
    """The cost and loss of the best fixed size at every budget, the mean over seeds.

    Raises:
        DataError: As `minimum`, or a seed is missing.
    """
    found = []
    for budget, by_size in sorted(sweep.items()):
        means = {}
        for size, by_seed in by_size.items():
            missing = set(seeds) - set(by_seed)
            if missing:
                raise DataError(
                    f"{size:,.0f} parameters at {budget:.3g} FLOPs lack seed "
                    f"{min(missing)}. hint: finish the suite"
                )
            means[size] = fmean(by_seed[s] for s in seeds)
        found.append((budget, minimum(list(means), list(means.values()))[1]))
    return found


def cost_of(loss: float, line: Sequence[tuple[float, float]]) -> tuple[float, bool]:
    """The cost at which a frontier has a loss, and whether that lies on it.

    Raises:
        DataError: A frontier of one budget, or one that does not fall.
    """
    if len(line) < 2:
        raise DataError("a frontier needs two budgets at least")
    x = np.log([budget for budget, _ in line])
    y = np.log([value for _, value in line])
    if not np.all(np.diff(y) < 0):
        raise DataError(
            "the best loss does not fall with the budget: the seeds differ by more than "
            "the budgets. hint: budgets further apart, or more seeds"
        )
    wanted = math.log(loss)
    # The piece that holds it, or the one next to it.
    piece = int(np.clip(np.searchsorted(-y, -wanted) - 1, 0, len(x) - 2))
    slope = (x[piece + 1] - x[piece]) / (y[piece + 1] - y[piece])
    at = x[piece] + slope * (wanted - y[piece])
    return math.exp(float(at)), bool(y[-1] <= wanted <= y[0])


def multiplier(
    sweep: Sweep, losses: Mapping[int, float], cost: float, draws: int = DRAWS
) -> Multiplier:
    """What a grown run saves against the best fixed size at equal loss.

    Args:
        sweep: The losses of the fixed nets.
        losses: Those of the grown run by seed.
        cost: Its training FLOPs, growth included.
        draws: Resamplings of the seeds, the same for both sides.

    Raises:
        DataError: The sizes or the budgets cannot be fitted.
    """
    seeds = sorted(losses)
    line = frontier(sweep, seeds)
    value, inside = cost_of(fmean(losses.values()), line)
    drawn = np.random.default_rng(0)
    found = []
    for _ in range(draws):
        some = [seeds[i] for i in drawn.integers(len(seeds), size=len(seeds))]
        try:
            there = cost_of(fmean(losses[s] for s in some), frontier(sweep, some))[0]
        except DataError:
            # Of seeds by which the minimum is at the edge; the mean of all has been fitted.
            continue
        found.append(there / cost)
    if len(found) < draws / 2:
        raise DataError(
            "most resamplings of the seeds cannot be fitted. hint: more seeds, or sizes "
            "further apart"
        )
    low, high = np.quantile(found, [0.025, 0.975])
    return Multiplier(value / cost, float(low), float(high), inside)
