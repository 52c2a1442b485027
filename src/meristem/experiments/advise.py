"""Advice before a run: whether its growth pays, from a scaling law and two short probes.

Measured against the best fixed size at equal cost, as a comparison with the baseline
`best` would: the multiplier here is what that one is expected to say.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np

from meristem.core.errors import DataError
from meristem.experiments.config import ConfigError, Experiment, read
from meristem.experiments.frontier import Multiplier
from meristem.experiments.law import (
    BEHIND,
    BEHIND_SHARED,
    Curve,
    Plan,
    examples_behind,
    expected,
    expected_size,
    laws,
)
from meristem.experiments.probes import GROWTH, Probed, Report, probed

MOMENTS = tuple(percent / 100 for percent in range(20, 85, 5))
"""Growth moments that are looked at, as fractions of training."""
PASSES = 4
"""Passes over the data behind which the law says little."""
PARTS = {"shared": BEHIND_SHARED, "whole": BEHIND, "none": BEHIND}
"""How far nets end behind, by what their new blocks are; only copies were measured."""


@dataclass(frozen=True)
class Advice:
    """What to do with a planned growth, and why.

    Attributes:
        grow: Whether growing is expected to beat the best fixed size at equal cost.
        at: The best moment, as a fraction of training.
        multiplier: Expected at that moment, with the middle 80 % of what is expected.
        as_planned: The same at the moment that the experiment names, the mean of several;
            None where its trigger decides on the way.
        shared: Expected at the best moment if the copies of blocks shared what these add;
            None where they do, or where nothing is copied.
        best_size: Parameters of the best fixed size at the cost of the run.
        parameters: Of the net before and after the growth.
        tokens_per_parameter: Training targets of the planned run per parameter of the
            grown net.
        passes: Over the training data.
        slope: By how much the loss of the large net falls as its data double, at the end
            of the probe.
        behind: How far the trial growth ended behind a net that was large all along, as
            a share of what was read before the growth; 0 is fully mixed, less is ahead.
        cost: FLOPs of the probes.
        share: The same as a share of the planned run.
    """

    grow: bool
    at: float
    multiplier: Multiplier
    as_planned: Multiplier | None
    shared: Multiplier | None
    best_size: float
    parameters: tuple[int, int]
    tokens_per_parameter: float
    passes: float
    slope: float
    behind: float
    cost: float
    share: float

    def __str__(self) -> str:
        before, after = self.parameters
        if self.grow:
            first = (
                f"grow: from {before:,} to {after:,} parameters at {100 * self.at:.0f} % of "
                f"training; expected compute multiplier {self.multiplier}"
            )
        else:
            first = (
                f"do not grow: train {self.best_size:,.0f} parameters; growing is expected "
                f"to have a compute multiplier of {self.multiplier} at best"
            )
        if self.as_planned is not None:
            first += f", as planned {self.as_planned}"
        lines = [
            first,
            f"why: {self.tokens_per_parameter:.3g} targets per parameter of the grown net; "
            f"the best fixed size at this cost has {self.best_size:,.0f}; the loss falls by "
            f"{self.slope:.3f} as the data double; {self._caught_up()}",
        ]
        if self.shared is not None and self.shared.value > self.multiplier.value:
            lines.append(
                "better: how = { interpose = { share = true } }, copies that share what "
                f"their blocks add, expected multiplier {self.shared}"
            )
        if self.passes > PASSES:
            lines.append(
                f"beware: the data are read {self.passes:.0f} times over, and the law is "
                "one of new data"
            )
        spent = f"{self.cost:.3g} FLOPs, {100 * self.share:.0f} % of the run"
        return "\n".join([*lines, f"cost of this advice: {spent}"])

    def _caught_up(self) -> str:
        if self.behind <= 0:
            return "the trial growth was not behind a net that was large all along"
        return (
            f"the trial growth ended {100 * self.behind:.0f} % of its small steps behind a "
            "net that was large all along"
        )


def advised(
    experiment: Experiment | str | Path,
    out: str | Path | None = None,
    share: float | None = None,
    report: Report | None = None,
) -> Advice:
    """`meristem.advise`."""
    source = Path("experiment")
    if not isinstance(experiment, Experiment):
        source = Path(experiment)
        experiment = read(source)
    folder = Path(out) if out is not None else source.parent / "results" / "advise"
    if experiment.grow is None:
        raise ConfigError(f"{source}: nothing to advise on without [grow]")
    if share is not None and not 0 < share < 1:
        raise ConfigError(f"share = {share} is a fraction of the run, in (0, 1)")
    told = report or _silent
    return advice_of(probed(experiment, source.stem, folder, share, told))


def _silent(probe: str, step: int, steps: int) -> None:
    """Nobody listens."""


def advice_of(seen: Probed) -> Advice:
    """The advice that two probes give.

    Raises:
        DataError: Their losses do not fall, or the growth costs nothing.
    """
    _check(seen)
    before, after = seen.flops
    moment = fmean(seen.moments or (GROWTH,))
    cost = seen.examples * (moment * before + (1 - moment) * after) + seen.growth_flops
    plan = Plan(before, after, cost)
    known = laws(after, seen.parameters[1], seen.targets)
    behind = examples_behind(seen.grown, seen.large) / seen.small[-1][0]
    expects = partial(expected, plan, known, behind=behind)
    planned = partial(expects, parts=PARTS[seen.copies])
    at, multiplier = _best(planned)
    shared = None
    if seen.copies == "whole":
        _, shared = _best(partial(expects, parts=PARTS["shared"]))
    # Between two nets the parameters grow with a power of the cost.
    power = math.log(seen.parameters[1] / seen.parameters[0]) / math.log(after / before)
    best_size = seen.parameters[1] * (expected_size(plan, known) / after) ** power
    return Advice(
        grow=multiplier.value > 1,
        at=at,
        multiplier=multiplier,
        as_planned=planned(moment) if seen.moments else None,
        shared=shared,
        best_size=best_size,
        parameters=seen.parameters,
        tokens_per_parameter=seen.examples * seen.targets / seen.parameters[1],
        passes=seen.passes,
        slope=_slope(seen.large),
        behind=behind,
        cost=seen.cost,
        share=seen.cost / plan.cost,
    )


def _best(expects: Callable[[float], Multiplier]) -> tuple[float, Multiplier]:
    """The moment of which the most is expected, and what."""
    found = {moment: expects(moment) for moment in MOMENTS}
    at = max(found, key=lambda moment: found[moment].value)
    return at, found[at]


def _check(seen: Probed) -> None:
    """Raise where nothing can be read off."""
    if seen.flops[1] <= seen.flops[0]:
        raise DataError(
            "the growth adds nothing to the cost of a step, so that no size can be weighed "
            "against it"
        )
    for name in ("small", "large"):
        losses = [loss for _, loss in getattr(seen, name)]
        falls = losses[0] > losses[-1]
        if not (np.isfinite(losses).all() and falls):
            raise DataError(
                f"the loss of the {name} net does not fall in its probe, from "
                f"{losses[0]:.3g} to {losses[-1]:.3g}. hint: a smaller learning rate, or a "
                "larger share"
            )


def _slope(curve: Curve) -> float:
    """By how much the loss of a curve falls over its second half."""
    examples = [point[0] for point in curve]
    losses = [point[1] for point in curve]
    return float(np.interp(examples[-1] / 2, examples, losses)) - losses[-1]
