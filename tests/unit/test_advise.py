"""Advice: the law is read off curves that follow it, and the probes say what a run will meet."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import meristem as ms
from meristem.experiments import law as law_module
from meristem.experiments import probes
from meristem.experiments.advise import advice_of
from meristem.experiments.config import ConfigError, checked
from meristem.experiments.law import (
    Law,
    Plan,
    examples_behind,
    expected,
    expected_size,
    law_of,
    laws,
)
from meristem.experiments.probes import Probed, probed

PARAMETERS, SMALL = 200_000, 100_000


def known(best_tokens: float) -> Law:
    """The law by which the large net is best at so many examples per parameter."""
    return law_of(6.0 * PARAMETERS, best_tokens * PARAMETERS)


def curve(law: Law, size: float, until: float) -> list[tuple[float, float]]:
    points = np.linspace(until / 8, until, 8)
    return [(d, 1.3 + 40 * law.excess(size, d)) for d in points]


@pytest.mark.parametrize("tokens", [3.0, 25.0, 200.0])
def test_the_best_size_has_the_smallest_loss_at_its_cost(tokens: float) -> None:
    law = known(tokens)
    cost = 6 * PARAMETERS * tokens * PARAMETERS
    best = law.best_size(cost)
    assert best == pytest.approx(6 * PARAMETERS)
    least = law.excess(best, cost / best)
    for size in (0.5 * best, 0.9 * best, 1.1 * best, 2 * best):
        assert law.excess(size, cost / size) > least
    assert law.cost_of(least) == pytest.approx(cost)


def test_what_is_known_gives_the_best_sizes_of_the_sweeps() -> None:
    # FLOPs and best parameters of benchmarks/best/cpu.toml: 64 targets an example, and
    # about 6.4 FLOPs a parameter and target.
    for cost, best in ((3.0e12, 8.1e4), (6.0e12, 1.28e5), (1.2e13, 1.93e5)):
        size = 6.4 * 64 * best
        plan = Plan(size / 2, size, cost)
        found = expected_size(plan, laws(size, int(best), 64)) / (6.4 * 64)
        assert found == pytest.approx(best, rel=0.15)


def test_growth_pays_where_the_grown_net_has_the_right_size_and_catches_up() -> None:
    law = known(25.0)

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


@pytest.mark.parametrize(
    ("exponents", "saved"), [((0.3478, 0.3658), (0.02, 0.06)), (None, (0.05, 0.1))]
)
def test_one_jump_that_goes_on_along_the_large_curve_saves_a_little(
    monkeypatch: pytest.MonkeyPatch,
    exponents: tuple[float, float] | None,
    saved: tuple[float, float],
) -> None:
    """3 to 5 % after a fifth of the compute, as theory has it for large language models."""
    if exponents is not None:
        monkeypatch.setattr(law_module, "SIZE_EXPONENT", exponents[0])
        monkeypatch.setattr(law_module, "DATA_EXPONENT", exponents[1])
    law = known(25.0)
    plan = Plan(6 * SMALL, 6 * PARAMETERS, 6 * PARAMETERS * 25 * PARAMETERS)
    found = {}
    for percent in range(5, 100, 5):
        moment = percent / 100
        behind = plan.unmixed(law, moment)
        assert 0 < behind < 1
        found[moment] = plan.multiplier(law, moment, behind)
    at = max(found, key=lambda moment: found[moment])
    assert saved[0] < found[at] - 1 < saved[1]
    before = at * plan.before * plan.examples(at) / plan.cost
    assert 0.15 < before < 0.35


def test_a_grown_net_is_behind_by_what_the_large_one_read_in_between() -> None:
    law = known(25.0)
    large = curve(law, 6 * PARAMETERS, 8e6)
    assert examples_behind(large[4:], large) == pytest.approx(0, abs=1)
    shifted = [
        (d, 1.3 + 40 * law.excess(6 * PARAMETERS, d - 1e6)) for d, _ in large[4:]
    ]
    # Between points of the large curve the loss is taken as straight.
    assert examples_behind(shifted, large) == pytest.approx(1e6, rel=0.05)


def test_what_is_expected_stays_finite_however_far_a_trial_is_behind() -> None:
    law = known(25.0)
    plan = Plan(6 * SMALL, 6 * PARAMETERS, 6 * PARAMETERS * 25 * PARAMETERS)
    values = [expected(plan, [law], 0.2, behind).value for behind in (-0.5, 0, 0.4, 3)]
    assert values == sorted(values, reverse=True)
    assert 0 < values[-1] < values[0] < 1.34
    # The moment is within the run: neither growing at once nor at the end is best.
    moments = [expected(plan, [law], m / 10, 0.0).value for m in range(1, 10)]
    assert moments[0] < max(moments) > moments[-1]


def seen(law: Law, tokens: float, **changes: Any) -> Probed:
    """Probes of a run of so many targets per parameter, as the law has them."""
    read = 2 * PARAMETERS
    small, large = (curve(law, 6 * n, read) for n in (SMALL, PARAMETERS))
    given: dict[str, Any] = {
        "examples": tokens * PARAMETERS,
        "passes": 1.0,
        "targets": 1,
        "moments": (0.5,),
        "parameters": (int(SMALL), int(PARAMETERS)),
        "flops": (6 * SMALL, 6 * PARAMETERS),
        "growth_flops": 0.0,
        "copies": "whole",
        "small": small[:4],
        "grown": large[4:],
        "large": large,
        "cost": 1e10,
    }
    return Probed(**(given | changes))


def test_advice_follows_the_law_from_too_few_data_to_enough() -> None:
    law = known(52.0)
    few, enough = (advice_of(seen(law, tokens)) for tokens in (2.0, 52.0))
    assert not few.grow
    assert few.best_size < 0.6 * PARAMETERS
    assert str(few).startswith("do not grow: train ")
    assert enough.grow
    assert 1.01 < enough.multiplier.value < 1.06
    assert str(enough).startswith("grow: from 100,000 to 200,000 parameters at ")
    assert "was not behind a net" in str(enough)
    late = [(examples, loss + 0.1) for examples, loss in seen(law, 52.0).grown]
    behind = advice_of(seen(law, 52.0, grown=late))
    assert behind.behind > 0.1
    assert "% of its small steps behind" in str(behind)
    assert behind.multiplier.value < enough.multiplier.value
    # A growth that costs half of the run does not pay.
    dear = seen(law, 52.0, growth_flops=0.5 * 6 * PARAMETERS * 52 * PARAMETERS)
    assert advice_of(dear).multiplier.value < enough.multiplier.value
    # Blocks that share with their copies end less far behind.
    shared = advice_of(seen(law, 52.0, copies="shared"))
    assert shared.multiplier.value > enough.multiplier.value + 0.03
    assert enough.shared == shared.multiplier
    assert "better: how = { interpose = { share = true } }, " in str(enough)
    assert f"expected multiplier {shared.multiplier}" in str(enough)
    assert "better:" not in str(shared)
    assert advice_of(seen(law, 52.0, copies="none")).shared is None
    assert "read 9 times over" in str(advice_of(seen(law, 52.0, passes=9.0)))
    assert advice_of(seen(law, 52.0, moments=())).as_planned is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"large": [(1.0, 2.0), (2.0, math.nan)]}, "large net does not fall"),
        ({"small": [(1.0, 2.0), (2.0, 2.0)]}, "small net does not fall"),
        ({"flops": (1e6, 1e6)}, "adds nothing to the cost"),
    ],
)
def test_probes_that_say_nothing_are_refused(
    changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ms.DataError, match=words):
        advice_of(seen(known(25.0), 25.0, **changes))


TABLE: dict[str, Any] = {
    "model": {"gpt": {"width": 8, "heads": 2, "hidden": 16, "depth": 1}},
    "data": {"shakespeare": {"test": 16, "examples": 512}},
    "train": {
        "steps": 300,
        "batch_size": 8,
        "optimizer": {"adamw": {"lr": 1e-2}},
        "schedule": {"wsd": {"warmup": 0.05, "decay": 0.3}},
    },
    "grow": {"when": {"at": 0.4}, "how": "stack", "axes": "depth", "amount": [1]},
}

DIGITS = {
    "data": "digits",
    "model": {"mlp": {"hidden": [4]}},
    "grow": {"when": {"at": 0.4}, "amount": 4},
}


def test_two_probes_give_advice_and_are_not_run_again(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []

    def report(probe: str, step: int, steps: int) -> None:
        told.append((probe, step, steps))

    advice = ms.advise(checked(TABLE), tmp_path, 0.3, report)
    assert {name for name, _, _ in told} == {"grown", "large"}
    assert {steps for _, _, steps in told} == {32}
    assert advice.parameters[0] < advice.parameters[1]
    # 300 steps of 8 x 64 characters.
    tokens = 300 * 8 * 64 / advice.parameters[1]
    assert advice.tokens_per_parameter == pytest.approx(tokens)
    assert advice.passes == pytest.approx(300 / 64)
    assert 0.2 < advice.share < 0.4
    told.clear()
    assert ms.advise(checked(TABLE), tmp_path, 0.3, report) == advice
    assert not told
    # Another plan has probes of its own.
    other = TABLE | {"seed": 1}
    assert ms.advise(checked(other), tmp_path, 0.3) != advice


@pytest.mark.parametrize(
    ("steps", "share", "length"),
    [
        (10_000, None, 192),
        (3000, None, 64),
        (600, None, 64),
        (300, None, 32),
        (600, 0.2, 32),
    ],
)
def test_probes_cost_their_share_and_more_only_of_a_short_run(
    steps: int, share: float | None, length: int
) -> None:
    assert probes._length("plan", steps, share) == length


@pytest.mark.parametrize(
    ("grow", "moments"),
    [
        ({"when": {"at": 0.4}, "amount": [4]}, [0.4]),
        ({"when": {"at": [0.3, 0.6]}, "amount": 4}, [0.3, 0.6]),
        ({"when": {"every": "20 steps"}, "amount": [4, 4]}, [0.2, 0.4]),
        ({"when": {"every": {"epochs": 1, "start": 6}}, "amount": 2}, [0.96]),
        (
            {"when": {"every": "10 steps"}, "amount": 4, "budget": {"growths": 1}},
            [0.1],
        ),
        ({"when": {"plateau": {"patience": 1}}, "amount": 4}, []),
    ],
)
def test_a_trial_grows_as_often_as_the_plan(
    tmp_path: Path, grow: dict[str, Any], moments: list[float]
) -> None:
    # Examples in batches of 8: an epoch is 16 steps.
    table = TABLE | {
        "data": {"shakespeare": {"examples": 128, "test": 8}},
        "sizes": {"blocks.0.up": 24},
        "train": {"steps": 100, "batch_size": 8},
        "grow": grow | {"axes": ["token"], "how": "random"},
    }
    found = probed(checked(table), "plan", tmp_path, 0.95, lambda *told: None)
    assert found.moments == pytest.approx(moments)
    amount = grow["amount"]
    growths = max(1, len(moments))
    added = sum(amount) if isinstance(amount, list) else amount * growths

    def parameters(width: int) -> int:
        # Embedding, positions, head; norms; attention over 8; the MLP, whose size the
        # experiment says.
        outer = (63 + 64 + 63) * width + 6 * width
        attention = 3 * 8 * (width + 1) + (8 + 1) * width
        return outer + attention + 24 * (width + 1) + (24 + 1) * width

    assert found.parameters == (parameters(8), parameters(8 + added))
    assert found.flops[0] < found.flops[1]
    assert all(examples < 16 * 8 for examples, _ in found.small)


@pytest.mark.parametrize(
    ("change", "share", "words"),
    [
        ({"grow": None}, 0.2, r"without \[grow\]"),
        ({}, 1.5, "in \\(0, 1\\)"),
        ({}, 0.01, "too few for probes"),
        ({"train": TABLE["train"] | {"steps": 200}}, None, "of 0.3 of them"),
        ({"grow": TABLE["grow"] | {"budget": {"units": 1}}}, 0.3, "has not grown"),
        (DIGITS, 0.3, "one of texts"),
        (
            {"grow": TABLE["grow"] | {"when": {"at": "900 steps"}}},
            0.3,
            "never due before the end of 300 steps",
        ),
    ],
)
def test_what_cannot_be_advised_on_is_told(
    tmp_path: Path, change: dict[str, Any], share: float | None, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        ms.advise(checked(TABLE | change), tmp_path, share)
