"""Advice: the law is read off curves that follow it, and the probes say what a run will meet."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import meristem as ms
from meristem.experiments.advise import advise
from meristem.experiments.config import ConfigError, checked
from meristem.experiments.law import (
    DATA_EXPONENT,
    SIZE_EXPONENT,
    Law,
    Plan,
    examples_behind,
    expected,
    expected_size,
    laws,
)

PARAMETERS, SMALL = 2e5, 1e5


def law_of(best_tokens: float) -> Law:
    """The law by which the large net is best at so many examples per parameter."""
    size, examples = 6 * PARAMETERS, best_tokens * PARAMETERS
    ratio = DATA_EXPONENT / SIZE_EXPONENT
    return Law(ratio * size**SIZE_EXPONENT / examples**DATA_EXPONENT, 1.0, 1.0)


def curve(law: Law, size: float, until: float) -> list[tuple[float, float]]:
    points = np.linspace(until / 8, until, 8)
    return [(d, 1.3 + 40 * law.excess(size, d)) for d in points]


@pytest.mark.parametrize("tokens", [3.0, 25.0, 200.0])
def test_the_best_size_has_the_smallest_loss_at_its_cost(tokens: float) -> None:
    law = law_of(tokens)
    cost = 6 * PARAMETERS * tokens * PARAMETERS
    best = law.best_size(cost)
    assert best == pytest.approx(6 * PARAMETERS)
    least = law.excess(best, cost / best)
    for size in (0.5 * best, 0.9 * best, 1.1 * best, 2 * best):
        assert law.excess(size, cost / size) > least
    assert law.cost_of(least) == pytest.approx(cost)


@pytest.mark.parametrize("tokens", [4.0, 25.0, 150.0])
def test_the_worth_of_size_is_read_off_two_curves(tokens: float) -> None:
    law = law_of(tokens)
    read = 5 * PARAMETERS
    curves = [(6 * n, curve(law, 6 * n, read)) for n in (SMALL, PARAMETERS)]
    known = laws(curves, 6 * PARAMETERS, PARAMETERS, language=False)
    plan = Plan(6 * SMALL, 6 * PARAMETERS, 6 * PARAMETERS * tokens * PARAMETERS)
    assert 1 / 1.6 < expected_size(plan, known) / (6 * PARAMETERS) < 1.6


def test_what_is_known_of_texts_narrows_what_is_expected() -> None:
    law = law_of(25.0)
    curves = [(6 * n, curve(law, 6 * n, PARAMETERS)) for n in (SMALL, PARAMETERS)]
    plan = Plan(6 * SMALL, 6 * PARAMETERS, 6 * PARAMETERS * 25 * PARAMETERS)
    widths = []
    for language in (True, False):
        known = laws(curves, 6 * PARAMETERS, PARAMETERS, language)
        found = expected(plan, known, 0.5, 0.0)
        assert found.low <= found.value <= found.high
        widths.append(found.high / found.low)
    assert widths[0] < widths[1]


def test_growth_pays_where_the_grown_net_has_the_right_size_and_catches_up() -> None:
    law = law_of(25.0)

    def plan(tokens: float) -> Plan:
        return Plan(6 * SMALL, 6 * PARAMETERS, 6 * PARAMETERS * tokens * PARAMETERS)

    # At one cost the grown net reads a third more than the large one.
    assert plan(25).examples(0.5) == pytest.approx(25 * PARAMETERS / 0.75)
    right = plan(25).multiplier(law, 0.5, behind=0.0)
    assert 1.2 < right < 1 / 0.75
    # Much too large for its data, or much too small.
    assert plan(1).multiplier(law, 0.5, 0.0) < 1
    assert plan(2000).multiplier(law, 0.5, 0.0) < 1
    # All that was read before is lost: worse than never having been small.
    assert plan(25).multiplier(law, 0.5, behind=1.0) < 1
    later = [plan(25).multiplier(law, m, behind=0.3) for m in (0.2, 0.5, 0.9)]
    assert max(later) == later[1]


def test_a_grown_net_is_behind_by_what_the_large_one_read_in_between() -> None:
    law = law_of(25.0)
    large = curve(law, 6 * PARAMETERS, 8e6)
    assert examples_behind(large[4:], large) == pytest.approx(0, abs=1)
    shifted = [
        (d, 1.3 + 40 * law.excess(6 * PARAMETERS, d - 1e6)) for d, _ in large[4:]
    ]
    # Between points of the large curve the loss is taken as straight.
    assert examples_behind(shifted, large) == pytest.approx(1e6, rel=0.05)
    # One that is ahead is not behind.
    ahead = [(d, loss - 0.5) for d, loss in large[4:]]
    assert examples_behind(ahead, large) == 0


TABLE: dict[str, Any] = {
    "model": {"gpt": {"width": 8, "heads": 2, "hidden": 16, "depth": 1}},
    "data": {"shakespeare": {"test": 16, "examples": 512}},
    "train": {
        "steps": 300,
        "batch_size": 8,
        "optimizer": {"adamw": {"lr": 1e-2}},
        "schedule": {"wsd": {"warmup": 0.05, "decay": 0.3}},
    },
    "grow": {"when": {"at": 0.4}, "how": "stack", "axes": "depth", "amount": [1, 1]},
}


def test_two_probes_give_advice_and_are_not_run_again(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    advice = advise(checked(TABLE), tmp_path, 0.3, lambda *report: told.append(report))
    assert {name for name, _, _ in told} == {"grown", "large"}
    assert {steps for _, _, steps in told} == {32}
    assert advice.parameters[0] < advice.parameters[1]
    assert 0.2 <= advice.at <= 0.8
    assert advice.grow == (advice.multiplier.value > 1)
    for found in (advice.multiplier, advice.as_planned):
        assert found is not None
        assert found.low <= found.value <= found.high
    # 300 steps of 8 x 64 characters.
    tokens = 300 * 8 * 64 / advice.parameters[1]
    assert advice.tokens_per_parameter == pytest.approx(tokens)
    assert 0.1 < advice.share < 0.5
    for words in (
        "grow",
        "targets per parameter",
        f"{100 * advice.share:.0f} % of the run",
    ):
        assert words in str(advice)
    told.clear()
    assert advise(checked(TABLE), tmp_path, 0.3, lambda *r: told.append(r)) == advice
    assert not told


@pytest.mark.parametrize(
    ("change", "share", "words"),
    [
        ({"grow": None}, 0.2, r"without \[grow\]"),
        ({}, 1.5, "in \\(0, 1\\)"),
        ({}, 0.01, "too few for probes"),
        ({"grow": TABLE["grow"] | {"budget": {"units": 1}}}, 0.3, "has not grown"),
    ],
)
def test_what_cannot_be_advised_on_is_told(
    tmp_path: Path, change: dict[str, Any], share: float, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        advise(checked(TABLE | change), tmp_path, share)


def test_the_public_name_is_the_function() -> None:
    assert ms.advise is advise
    assert math.isfinite(law_of(25).excess(1e6, 1e6))
    with pytest.raises(AttributeError, match="no attribute 'advice'"):
        _ = ms.advice  # type: ignore[attr-defined]
