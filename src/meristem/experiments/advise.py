"""Advice before a run: whether its growth pays, from two short probes and a scaling law.

Measured against the best fixed size at equal cost, as a comparison with the baseline
`best` would: the multiplier here is what that one is expected to say.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from meristem.experiments.config import (
    ConfigError,
    Experiment,
    checked,
    read,
    trigger,
)
from meristem.experiments.frontier import Multiplier
from meristem.experiments.law import (
    Plan,
    examples_behind,
    expected,
    expected_size,
    laws,
)
from meristem.experiments.run import Progress, Run, run
from meristem.when import At, Every

SHARE = 0.15
"""What the probes cost, as a share of the planned run."""
POINTS = 16
"""Evaluations of a probe."""
GROWTH = 0.5
"""When a probe grows."""
MOMENTS = tuple(percent / 100 for percent in range(20, 85, 5))
"""Growth moments that are looked at, as fractions of training."""

Curve = list[tuple[float, float]]
"""Examples read and losses."""
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Advice:
    """What to do with a planned growth, and why.

    Attributes:
        grow: Whether growing is expected to beat the best fixed size at equal cost.
        at: The best moment, as a fraction of training.
        multiplier: Expected at that moment, with the middle 80 % of what is expected.
        as_planned: The same at the moment that the experiment names; None where its
            trigger decides on the way.
        best_size: Parameters of the best fixed size at the cost of the run.
        parameters: Of the net before and after the growth.
        tokens_per_parameter: Training targets of the planned run per parameter of the
            grown net.
        slope: By how much the loss of the large net falls as its data double, at the end
            of the probe.
        behind: How far the trial growth ended behind a net that was large all along, as
            a share of what was read before the growth; 0 is fully mixed.
        cost: FLOPs of the probes.
        share: The same as a share of the planned run.
    """

    grow: bool
    at: float
    multiplier: Multiplier
    as_planned: Multiplier | None
    best_size: float
    parameters: tuple[int, int]
    tokens_per_parameter: float
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
        planned = "" if self.as_planned is None else f", as planned {self.as_planned}"
        return (
            f"{first}{planned}\n"
            f"why: {self.tokens_per_parameter:.3g} targets per parameter of the grown net; "
            f"the best fixed size at this cost has {self.best_size:,.0f}; the loss falls by "
            f"{self.slope:.3f} as the data double; the trial growth ended "
            f"{100 * self.behind:.0f} % of its small steps behind a net that was large all "
            "along\n"
            f"cost of this advice: {self.cost:.3g} FLOPs, {100 * self.share:.0f} % of the run"
        )


def advise(
    experiment: Experiment | str | Path,
    out: str | Path | None = None,
    share: float = SHARE,
    report: Report = lambda name, step, steps: None,
) -> Advice:
    """Whether a planned growth pays, when, or which size to train instead.

    Two probes, much shorter than the run and at a constant learning rate: the small net
    that grows half-way, and the grown net from the start. What they say is read through
    the law of Hoffmann et al. (see `Law`): the curves weigh how much size is worth
    against data, beside what is known of other nets; the trial growth says how far a
    grown net is behind one that was large all along.

    Args:
        experiment: A planned run with [grow], or its TOML file.
        out: Folder of the probes' results, which are not run again; `results/advise`
            beside the file, or in the current folder, by default.
        share: What the probes cost, as a share of the planned run, growth not included.
        report: `report(probe, step, steps)`, called meanwhile.

    Raises:
        ConfigError: The experiment does not grow, or its probes would be too short.

    Examples:
        >>> advice = advise("experiment.toml")  # doctest: +SKIP
        >>> advice.grow, round(advice.multiplier.value, 2)  # doctest: +SKIP
        (True, 1.08)
    """
    source = Path("experiment")
    if not isinstance(experiment, Experiment):
        source = Path(experiment)
        experiment = read(source)
    folder = Path(out) if out is not None else source.parent / "results" / "advise"
    if experiment.grow is None:
        raise ConfigError(f"{source}: nothing to advise on without [grow]")
    if not 0 < share < 1:
        raise ConfigError(f"share = {share} is a fraction of the run, in (0, 1)")
    return advice_of(probed(experiment, source.stem, folder, share, report))


@dataclass(frozen=True)
class Probed:
    """What two probes of a planned run have shown.

    Attributes:
        steps: Of the planned run.
        batch: Examples per step.
        targets: Per example: the characters of a text, else 1.
        language: Whether it learns a text.
        moment: The fraction of training before the planned growth, the mean of several;
            None where the trigger decides on the way.
        parameters: Of the net before and after the growth.
        flops: The same of training FLOPs per example.
        small, grown, large: Examples read and losses: of the net before its trial growth,
            after it, and of the net that was large all along.
        cost: Training FLOPs of both probes.
    """

    steps: int
    batch: int
    targets: int
    language: bool
    moment: float | None
    parameters: tuple[int, int]
    flops: tuple[float, float]
    small: Curve
    grown: Curve
    large: Curve
    cost: float


def probed(
    experiment: Experiment, name: str, folder: Path, share: float, report: Report
) -> Probed:
    """Run both probes, or what is left of them."""
    planned = Run(experiment)
    steps, batch = planned.progress.steps, experiment.train.batch_size
    length = _length(name, steps, share)

    def result(kind: str, probe: Experiment) -> dict[str, Any]:
        told = partial(_tell, report, kind)
        path = run(probe, folder, f"{name}_{kind}", told)
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    trial = result("grown", _trial(experiment, length))
    after: dict[str, int] = {}
    for growth in trial["growths"]:
        after |= growth["after"]
    if not after:
        raise ConfigError(
            f"{name}: the trial has not grown; see axes, amount and budget of [grow]"
        )
    table = _table(experiment, length)
    table.pop("grow")
    whole = result("large", checked(table | {"sizes": after}))
    # The first points are of the warm-up.
    start = 2 / POINTS
    return Probed(
        steps=steps,
        batch=batch,
        targets=max(planned.data.y_train[0].numel(), 1),
        language=planned.data.task == "language",
        moment=_moment(experiment, steps, len(planned.batches)),
        parameters=(
            sum(p.numel() for p in planned.model.parameters()),
            whole["parameters"],
        ),
        flops=(
            planned.flops_per_example,
            whole["training_flops"] / (whole["steps"] * batch),
        ),
        small=_curve(trial, start, GROWTH),
        grown=_curve(trial, GROWTH, 1.0),
        large=_curve(whole, start, 1.0),
        cost=trial["training_flops"] + whole["training_flops"],
    )


def _tell(report: Report, kind: str, progress: Progress) -> None:
    report(kind, progress.step, progress.steps)


def _length(name: str, steps: int, share: float) -> int:
    """Steps of a probe, so that both cost a share of the run.

    The grown size is not known yet: it is taken to cost twice as much, and the probes say
    what they have cost.
    """
    least = 2 * POINTS
    length = int(share * steps * 1.5 / 3.5) // least * least
    if length < least:
        raise ConfigError(
            f"{name}: {steps} steps are too few for probes of {share:g} of them, {least} "
            "steps at least. hint: a larger share, or train: a run as short is its own "
            "probe"
        )
    return length


def _table(experiment: Experiment, length: int) -> dict[str, Any]:
    """The experiment at the length of a probe, at a constant rate."""
    table = experiment.model_dump(mode="json", exclude_unset=True)
    train = {k: v for k, v in table["train"].items() if k not in ("epochs", "flops")}
    # A rate that decays would end each probe on a curve of its own.
    train |= {"steps": length, "evaluate": length // POINTS}
    train["schedule"] = {"constant": {"warmup": 1 / POINTS}}
    return table | {"train": train}


def _trial(experiment: Experiment, length: int) -> Experiment:
    """All growths of the plan at once, half-way."""
    table = _table(experiment, length)
    amount = table["grow"].get("amount")
    count = len(amount) if isinstance(amount, list) else 1
    half = round(GROWTH * length)
    steps = [half + i for i in range(count)]
    table["grow"] = table["grow"] | {"when": {"at": {"steps": steps}}}
    return checked(table)


def _moment(experiment: Experiment, steps: int, epoch: int) -> float | None:
    """The fraction of training before the planned growth, the mean of several; None where
    the trigger decides on the way.
    """
    assert experiment.grow is not None
    when = trigger(experiment.grow.when, steps)
    moments: list[int] = []
    if isinstance(when, At):
        moments = [*when.steps, *(epoch * count for count in when.epochs)]
    if isinstance(when, Every):
        period = when.steps or epoch * (when.epochs or 1)
        moments = list(range(period, steps, period))[: when.growths]
    fractions = [one / steps for one in moments if one < steps]
    return fmean(fractions) if fractions else None


def _slope(curve: Curve) -> float:
    """By how much the loss of a curve falls over its second half."""
    examples = [point[0] for point in curve]
    losses = [point[1] for point in curve]
    return float(np.interp(examples[-1] / 2, examples, losses)) - losses[-1]


def _curve(result: dict[str, Any], since: float, until: float) -> Curve:
    """Examples and losses of a probe, within a part of it."""
    batch = result["config"]["train"]["batch_size"]
    points = []
    for point in result["curve"]:
        if since * result["steps"] < point["step"] <= until * result["steps"]:
            # What is held out, where something is.
            loss = point.get("validation", point["loss"])
            points.append((float(point["step"] * batch), loss))
    return points


def advice_of(seen: Probed) -> Advice:
    """The advice that two probes give."""
    before, after = seen.flops
    moment = seen.moment or GROWTH
    examples = seen.steps * seen.batch
    plan = Plan(before, after, examples * (moment * before + (1 - moment) * after))
    known = laws(
        [(before, seen.small), (after, seen.large)],
        size=after,
        examples_per_parameter=seen.parameters[1] / seen.targets,
        language=seen.language,
    )
    behind = examples_behind(seen.grown, seen.large) / (GROWTH * seen.large[-1][0])
    found = {moment: expected(plan, known, moment, behind) for moment in MOMENTS}
    at = max(found, key=lambda moment: found[moment].value)
    planned = None
    if seen.moment is not None:
        planned = expected(plan, known, seen.moment, behind)
    # Between two nets the parameters grow with a power of the cost.
    power = math.log(seen.parameters[1] / seen.parameters[0]) / math.log(after / before)
    best_size = seen.parameters[1] * (expected_size(plan, known) / after) ** power
    return Advice(
        grow=found[at].value > 1,
        at=at,
        multiplier=found[at],
        as_planned=planned,
        best_size=best_size,
        parameters=seen.parameters,
        tokens_per_parameter=examples * seen.targets / seen.parameters[1],
        slope=_slope(seen.large),
        behind=behind,
        cost=seen.cost,
        share=seen.cost / plan.cost,
    )
