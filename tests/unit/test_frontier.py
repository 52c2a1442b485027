"""The best fixed size: found where theory puts it, and refused where it cannot be."""

from __future__ import annotations

import math

import numpy as np
import pytest

from meristem.core.errors import DataError
from meristem.experiments.frontier import cost_of, frontier, minimum, multiplier

SEEDS = (0, 1, 2)
SIZES = (1e5, 1.7e5, 3e5, 5e5, 9e5)
BUDGETS = (7e12, 1.4e13, 2.8e13)


def law(size: float, budget: float) -> float:
    """Hoffmann et al.: E + A / N^a + B / D^b with D = C / 6 N."""
    return 1.2 + 80 / size**0.45 + 400 / (budget / (6 * size)) ** 0.45


def sweep(noise: float = 0.0) -> dict[float, dict[float, dict[int, float]]]:
    drawn = np.random.default_rng(0)
    shift = dict(zip(SEEDS, drawn.normal(0, noise, len(SEEDS)), strict=True))
    return {
        budget: {
            size: {seed: law(size, budget) + shift[seed] for seed in SEEDS}
            for size in SIZES
        }
        for budget in BUDGETS
    }


def test_the_minimum_is_where_the_law_has_it() -> None:
    for budget in BUDGETS:
        size, loss = minimum(SIZES, [law(size, budget) for size in SIZES])
        grid = np.geomspace(1e5, 9e5, 2000)
        exact = grid[np.argmin([law(n, budget) for n in grid])]
        assert abs(math.log(size / exact)) < 0.1
        assert abs(loss - law(exact, budget)) < 2e-3


def test_a_run_on_the_frontier_saves_nothing_and_one_below_it_what_it_saves() -> None:
    line = frontier(sweep(), SEEDS)
    for budget, loss in line:
        same = multiplier(sweep(), dict.fromkeys(SEEDS, loss), budget)
        assert same.value == pytest.approx(1)
        assert same.inside
        half = multiplier(sweep(), dict.fromkeys(SEEDS, loss), budget / 1.2)
        assert half.value == pytest.approx(1.2)
        alone = multiplier(sweep(), {0: loss}, budget / 1.2)
        assert str(alone) == "1.20"


def test_the_interval_holds_the_value_and_narrows_with_paired_seeds() -> None:
    noisy = sweep(noise=0.02)
    best = dict(line for line in frontier(noisy, SEEDS))
    shift = {s: noisy[1.4e13][3e5][s] - law(3e5, 1.4e13) for s in SEEDS}
    mean = sum(shift.values()) / 3
    losses = {s: best[1.4e13] + shift[s] - mean for s in SEEDS}
    found = multiplier(noisy, losses, 1.4e13 / 1.1)
    assert found.low <= found.value <= found.high
    assert found.value == pytest.approx(1.1, rel=0.01)
    # The seed moves both sides alike.
    assert found.high - found.low < 0.05


def test_beyond_the_sweep_is_told() -> None:
    line = frontier(sweep(), SEEDS)
    assert not cost_of(line[-1][1] - 0.01, line)[1]
    told = str(multiplier(sweep(), dict.fromkeys(SEEDS, line[-1][1] - 0.01), 2.8e13))
    assert told.endswith("beyond the sweep")


@pytest.mark.parametrize(
    ("sizes", "losses", "words"),
    [
        ([1e5, 2e5], [1.0, 0.9], "three at least"),
        ([1e5, 2e5, 3e5], [1.0, 0.9, 0.8], "name a larger one"),
        ([1e5, 2e5, 3e5], [0.8, 0.9, 1.0], "name a smaller one"),
    ],
)
def test_sizes_that_cannot_be_fitted(
    sizes: list[float], losses: list[float], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        minimum(sizes, losses)


def test_budgets_that_cannot_be_fitted() -> None:
    with pytest.raises(DataError, match="two budgets"):
        cost_of(1.0, [(1e14, 1.0)])
    with pytest.raises(DataError, match="does not fall"):
        cost_of(1.0, [(1e14, 1.0), (2e14, 1.1)])
