"""Advice before a run: whether its growth pays, from two short probes and a scaling law.

Measured against the best fixed size at equal cost, as a comparison with the baseline
`best` would: the multiplier here is what that one is expected to say.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
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
from meristem.experiments.law import (
    Plan,
    examples_behind,
    expected,
    expected_size,
    laws,
)
from meristem.experiments.run import Run, run
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
        multiplier: Expected at that moment: the cost of the best fixed size for the same
            loss, over that of the run.
        low, high: The middle 80 % of what is expected.
        as_planned: The same multiplier at the moment that the experiment names; None
            where its trigger decides later.
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
    multiplier: float
    low: float
    high: float
    as_planned: float | None
    best_size: float
    parameters: tuple[int, int]
    tokens_per_parameter: float
    slope: float
    behind: float
    cost: float
    share: float

    def __str__(self) -> str:
        before, after = self.parameters
        interval = f"{self.multiplier:.2f} [{self.low:.2f}, {self.high:.2f}]"
        if self.grow:
            first = (
                f"grow: from {before:,} to {after:,} parameters at {100 * self.at:.0f} % of "
                f"training; expected compute multiplier {interval}"
            )
        else:
            first = (
                f"do not grow: train {self.best_size:,.0f} parameters; growing is expected "
                f"to have a compute multiplier of {interval} at best"
            )
        planned = (
            "" if self.as_planned is None else f", as planned {self.as_planned:.2f}"
        )
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
        >>> advice.grow, round(advice.multiplier, 2)  # doctest: +SKIP
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
    probes = _Probes(experiment, share, source.stem, folder, report)
    return _read_off(probes)


class _Probes:
    """The two probes of an experiment, run or read."""

    def __init__(
        self,
        experiment: Experiment,
        share: float,
        name: str,
        folder: Path,
        report: Report,
    ) -> None:
        self.experiment, self.name, self.folder = experiment, name, folder
        self.report = report
        planned = Run(experiment)
        self.steps = planned.progress.steps
        self.targets = max(planned.data.y_train[0].numel(), 1)
        self.language = planned.data.task == "language"
        self.parameters_before = sum(p.numel() for p in planned.model.parameters())
        self.flops_before = planned.flops_per_example
        self.moment = _moment(experiment, self.steps, len(planned.batches))
        length = self._length(planned, share)
        self.grown = self._run("grown", self._grown(length))
        after = {
            axis: size
            for growth in self.grown["growths"]
            for axis, size in growth["after"].items()
        }
        if not after:
            raise ConfigError(
                f"{name}: the trial has not grown; see axes, amount and budget of [grow]"
            )
        large = {k: v for k, v in self._table(length).items() if k != "grow"}
        self.large = self._run("large", checked(large | {"sizes": after}))

    @property
    def cost(self) -> float:
        """Training FLOPs of both probes."""
        spent: float = self.grown["training_flops"] + self.large["training_flops"]
        return spent

    def _length(self, planned: Run, share: float) -> int:
        """Steps of a probe, so that both cost a share of the run.

        The grown size is not known yet: it is taken to cost twice as much, and the probes
        say what they have cost.
        """
        length = int(share * self.steps * 1.5 / 3.5) // (2 * POINTS) * (2 * POINTS)
        if length < 2 * POINTS:
            raise ConfigError(
                f"{self.name}: {self.steps} steps are too few for probes of {share:g} of "
                f"them, {2 * POINTS} steps at least. hint: a larger share, or train: a run "
                "as short is its own probe"
            )
        return length

    def _table(self, length: int) -> dict[str, Any]:
        """The experiment at the length of a probe, at a constant rate."""
        table = self.experiment.model_dump(mode="json", exclude_unset=True)
        train = {
            k: v for k, v in table["train"].items() if k not in ("epochs", "flops")
        }
        # A rate that decays would end each probe on a curve of its own.
        train |= {"steps": length, "evaluate": length // POINTS}
        train["schedule"] = {"constant": {"warmup": 1 / POINTS}}
        return table | {"train": train}

    def _grown(self, length: int) -> Experiment:
        """The trial: all growths of the plan at once, half-way."""
        table = self._table(length)
        amount = self.experiment.grow.amount if self.experiment.grow else None
        count = len(amount) if isinstance(amount, list) else 1
        half = round(GROWTH * length)
        steps = [half + i for i in range(count)]
        table["grow"] = table["grow"] | {"when": {"at": {"steps": steps}}}
        return checked(table)

    def _run(self, kind: str, experiment: Experiment) -> dict[str, Any]:
        path = run(
            experiment,
            self.folder,
            f"{self.name}_{kind}",
            lambda progress: self.report(kind, progress.step, progress.steps),
        )
        found: dict[str, Any] = json.loads(path.read_text())
        return found


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


def _read_off(probes: _Probes) -> Advice:
    """The advice that two probes give."""
    # The first points are of the warm-up.
    start = 2 / POINTS
    small = _curve(probes.grown, start, GROWTH)
    large = _curve(probes.large, start, 1.0)
    after = _curve(probes.grown, GROWTH, 1.0)
    parameters = probes.parameters_before, int(probes.large["parameters"])
    batch = probes.experiment.train.batch_size
    flops_after = probes.large["training_flops"] / (probes.large["steps"] * batch)
    planned = probes.moment or GROWTH
    shares = planned * probes.flops_before + (1 - planned) * flops_after
    plan = Plan(probes.flops_before, flops_after, probes.steps * batch * shares)
    known = laws(
        [(plan.before, small), (plan.after, large)],
        size=plan.after,
        examples_per_parameter=parameters[1] / probes.targets,
        language=probes.language,
    )
    behind = examples_behind(after, large) / (GROWTH * large[-1][0])
    found = {moment: expected(plan, known, moment, behind) for moment in MOMENTS}
    at = max(found, key=lambda moment: found[moment][0])
    multiplier, low, high = found[at]
    best = expected_size(plan, known)
    # Between two nets the parameters grow with a power of the cost.
    power = math.log(parameters[1] / parameters[0]) / math.log(plan.after / plan.before)
    return Advice(
        grow=multiplier > 1,
        at=at,
        multiplier=multiplier,
        low=low,
        high=high,
        as_planned=probes.moment and expected(plan, known, planned, behind)[0],
        best_size=parameters[1] * (best / plan.after) ** power,
        parameters=parameters,
        tokens_per_parameter=probes.steps * batch * probes.targets / parameters[1],
        slope=_slope(large),
        behind=behind,
        cost=probes.cost,
        share=probes.cost / plan.cost,
    )
