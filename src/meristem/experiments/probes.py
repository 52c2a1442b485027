"""Two short runs before a long one: the small net with a trial growth, and the grown net."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from meristem.experiments.config import (
    ConfigError,
    Experiment,
    built,
    checked,
    trigger,
)
from meristem.experiments.law import Curve
from meristem.experiments.run import Progress, Run, digest, run, sizes_after
from meristem.how import METHODS, Interpose, Stack
from meristem.methods import Clock
from meristem.when import At, Every

SHARE, STEPS, MOST = 0.05, 64, 0.3
"""What the probes cost, as a share of the planned run; and the steps of one that are worth
more, up to another share: of 24 settings one was misjudged by probes of 32 steps.
"""
POINTS = 16
"""Evaluations of a probe."""
GROWTH = 0.5
"""When a probe grows."""

Copies = Literal["shared", "whole", "none"]
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Probed:
    """What two probes of a planned run have shown.

    Attributes:
        examples: That the planned run reads.
        passes: The same in passes over its training data.
        targets: Per example: the characters of a text.
        moments: The planned growths as fractions of training; none where the trigger
            decides on the way.
        parameters: Of the net before and after the growth.
        flops: The same of training FLOPs per example.
        growth_flops: Of the growth itself.
        copies: Whether new blocks are copies of others: whole ones, or such as share what
            a block adds to the stream with it.
        small, grown, large: Examples read and losses: of the net before its trial growth,
            after it, and of the net that was large all along.
        cost: Training FLOPs of both probes.
    """

    examples: float
    passes: float
    targets: int
    moments: tuple[float, ...]
    parameters: tuple[int, int]
    flops: tuple[float, float]
    growth_flops: float
    copies: Copies
    small: Curve
    grown: Curve
    large: Curve
    cost: float


def probed(
    experiment: Experiment,
    name: str,
    folder: Path,
    share: float | None,
    report: Report,
) -> Probed:
    """Run both probes, or what is left of them.

    Raises:
        ConfigError: The data are no text, a probe would be too short, or its trial does
            not grow.
    """
    planned = Run(experiment)
    steps, data = planned.progress.steps, planned.data
    if data.task != "language":
        raise ConfigError(
            f"{name}: the law behind an advice is one of texts, and data = {data.name!r} is "
            "none. hint: meristem compare with the baseline best measures it"
        )
    # Batches of an epoch are of one size, and that is rarely the one asked for.
    batch = len(data.x_train) / len(planned.batches)
    moments = _moments(experiment, steps, len(planned.batches))
    length = _length(name, steps, share)

    def result(kind: str, probe: Experiment) -> dict[str, Any]:
        told = partial(_tell, report, kind)
        path = run(probe, folder, f"{name}_{kind}_{digest(probe)}", told)
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    trial = result("grown", _trial(experiment, length, max(1, len(moments))))
    if not trial["growths"]:
        raise ConfigError(
            f"{name}: the trial has not grown; see axes, amount and budget of [grow]"
        )
    sizes = sizes_after(experiment.sizes, trial)
    table = _table(experiment, length)
    table.pop("grow")
    whole = result("large", checked(table | {"sizes": sizes}))
    began, ended = (trial["growths"][place]["step"] for place in (0, -1))
    # The first points are of the warm-up; one at a growth is of the grown net.
    start = 2 * length // POINTS
    return Probed(
        examples=steps * batch,
        passes=steps / len(planned.batches),
        targets=data.y_train[0].numel(),
        moments=tuple(step / steps for step in moments),
        parameters=(
            sum(p.numel() for p in planned.model.parameters()),
            whole["parameters"],
        ),
        flops=(planned.flops_per_example, whole["training_flops"] / (length * batch)),
        growth_flops=trial["growth_flops"],
        copies=_copies(experiment),
        small=_curve(trial, batch, start, began - 1),
        grown=_curve(trial, batch, ended, length),
        large=_curve(whole, batch, start, length),
        cost=trial["training_flops"] + whole["training_flops"],
    )


def _tell(report: Report, kind: str, progress: Progress) -> None:
    report(kind, progress.step, progress.steps)


def _copies(experiment: Experiment) -> Copies:
    grow = experiment.grow
    assert grow is not None
    chosen = grow.how if isinstance(grow.how, list) else [grow.how]
    found: Copies = "none"
    for one in chosen:
        method = built(one, METHODS, "how")
        if isinstance(method, Interpose) and method.share:
            return "shared"
        silent = isinstance(method, Interpose) and method.zero
        if isinstance(method, (Interpose, Stack)) and not silent:
            found = "whole"
    return found


def _moments(experiment: Experiment, steps: int, epoch: int) -> list[int]:
    """The steps of the planned growths; none where the trigger decides on the way.

    Raises:
        ConfigError: A growth is never due.
    """
    grow = experiment.grow
    assert grow is not None
    when = trigger(grow.when, steps)
    if not isinstance(when, (At, Every)):
        return []
    limits = [steps]
    if isinstance(grow.amount, list):
        limits.append(len(grow.amount))
    if grow.budget.growths is not None:
        limits.append(grow.budget.growths)
    most = min(limits)
    found: list[int] = []
    for step in range(1, steps):
        clock = Clock(
            step=step,
            epoch=step // epoch,
            epoch_ended=step % epoch == 0,
            growths=len(found),
        )
        if len(found) < most and when.due(clock):
            found.append(step)
    if not found:
        raise ConfigError(
            f"[grow] is never due before the end of {steps} steps. hint: grow.when"
        )
    return found


def _length(name: str, steps: int, share: float | None) -> int:
    """Steps of a probe, so that both cost a share of the run.

    The grown size is not known yet: it is taken to cost twice as much, and the probes say
    what they have cost.
    """
    least = 2 * POINTS
    step = 3.5 / 1.5 / steps
    if share is None:
        share = min(max(SHARE, STEPS * step), MOST)
    # A whole number of steps is one in spite of rounding.
    length = int(share / step + 1e-6) // least * least
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


def _trial(experiment: Experiment, length: int, growths: int) -> Experiment:
    """All growths of the plan, one after the other, half-way."""
    table = _table(experiment, length)
    half = round(GROWTH * length)
    steps = [half + i for i in range(growths)]
    table["grow"] = table["grow"] | {"when": {"at": {"steps": steps}}}
    return checked(table)


def _curve(result: dict[str, Any], batch: float, since: int, until: int) -> Curve:
    """Examples and losses of a probe, behind one step and up to another."""
    points = []
    for point in result["curve"]:
        if since < point["step"] <= until:
            # What is held out, where something is.
            loss = point.get("validation", point["loss"])
            points.append((point["step"] * batch, loss))
    return points
