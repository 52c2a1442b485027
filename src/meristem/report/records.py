"""What a report shows: runs by name, from files of results or from a grower."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import nn

from meristem.core.errors import DataError
from meristem.core.growth import Growth

# What results of earlier versions do not say of a growth.
_UNTOLD: dict[str, Any] = {
    "step": None,
    "parameters": None,
    "max_change": None,
    "flops": 0,
    "votes": {},
    "notes": {},
    "health": {},
}
_SEED = re.compile(r"_seed(\d+)$")


@dataclass(frozen=True)
class Point:
    """Where a run stood.

    Attributes:
        step: Optimizer steps.
        flops: Floating-point operations so far; None where nobody counted them.
        loss, accuracy: What was measured then; None where it was not.
        sizes: Units or blocks by axis.
    """

    step: int
    flops: float | None = None
    loss: float | None = None
    accuracy: float | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """One run, or the mean of the runs of several seeds.

    Attributes:
        name: What it is called.
        points: The curve.
        growths: Every growth, as `Growth.json` gives it; those of the first seed.
        parameters: Of the final net.
        growth_flops: What all growths cost.
        seconds: The whole run.
        seeds: How many runs it is the mean of.
        notes: More to show of it, by title.
        score: What the points call accuracy.
    """

    name: str
    points: Sequence[Point]
    growths: Sequence[Mapping[str, Any]] = ()
    parameters: float | None = None
    growth_flops: float | None = None
    seconds: float | None = None
    seeds: int = 1
    notes: Mapping[str, str] = field(default_factory=dict)
    score: str = "accuracy"

    @property
    def last(self) -> Point:
        return self.points[-1]

    def measured(self, key: str) -> list[Point]:
        """The points at which a measure was taken."""
        return [point for point in self.points if getattr(point, key) is not None]

    def final(self, key: str) -> float | None:
        """The last value of a measure, where it was taken."""
        points = self.measured(key)
        return getattr(points[-1], key) if points else None

    def named(self, key: str) -> str:
        """What a measure is called."""
        return self.score if key == "accuracy" else key


def inactive(figures: Mapping[str, Any], key: str = "inactive_forward") -> float | None:
    """The share of inactive units in one look at their health, every unit counting alike."""
    axes = []
    for axis in figures.values():
        # An error stands in the place of a look that failed.
        if isinstance(axis, Mapping) and "inactive_forward" in axis:
            axes.append(axis)
    units = sum(axis["units"] for axis in axes)
    if not units:
        return None
    return float(sum(axis["units"] * axis.get(key, 0.0) for axis in axes) / units)


def of_training(
    name: str,
    model: nn.Module,
    losses: Sequence[tuple[int, float]],
    metrics: Sequence[tuple[int, float]],
    growths: Sequence[Growth],
    cost: float,
) -> Record:
    """The record of a user's own loop."""
    points = [Point(step, loss=loss) for step, loss in _smooth(losses, growths)]
    points += [Point(step, accuracy=metric) for step, metric in metrics]
    points.sort(key=lambda point: point.step)
    parameters = sum(p.numel() for p in model.parameters())
    listed = [growth.json() for growth in growths]
    return Record(name, points or [Point(0)], listed, parameters, cost, score="metric")


def _smooth(
    losses: Sequence[tuple[int, float]], growths: Sequence[Growth]
) -> list[tuple[int, float]]:
    """Means over a fiftieth of the run, none of which reaches across a growth."""
    width = max(len(losses) // 50, 1)
    moments = {growth.step for growth in growths}
    found: list[tuple[int, float]] = []
    some: list[float] = []
    for step, loss in losses:
        some.append(loss)
        if len(some) == width or step + 1 in moments:
            found.append((step, fmean(some)))
            some = []
    return found if not some else [*found, (losses[-1][0], fmean(some))]


def of_files(paths: Sequence[Path]) -> list[Record]:
    """The records of result files, and of all that lie in folders; seeds are averaged.

    Raises:
        DataError: There are none, or a file that was named is no result.
    """
    found: dict[tuple[Path, str, str], list[Mapping[str, Any]]] = {}
    for path in paths:
        if not path.exists():
            raise DataError(f"there is no {path}")
        for file in sorted(path.rglob("*.json")) if path.is_dir() else [path]:
            result = _read(file)
            if result is not None:
                stem = _SEED.sub("", file.stem)
                key = (file.parent, stem, _experiment(result))
                found.setdefault(key, []).append(result)
            elif file == path:
                raise DataError(f"{path} is not the result of a run")
    if not found:
        raise DataError(
            f"no results of runs in {', '.join(map(str, paths))}. hint: `meristem run` "
            "and `meristem compare` write them"
        )
    stems = [stem for _, stem, _ in found]
    records = []
    for (folder, stem, _), results in found.items():
        # The same name in two folders, or with two configurations, is two experiments.
        name = stem if stems.count(stem) == 1 else f"{folder.name}/{stem}"
        records.append(_averaged(name, results))
    return records


def _experiment(result: Mapping[str, Any]) -> str:
    """What the runs of several seeds have in common."""
    config = dict(result.get("config", {}))
    # A baseline takes its shape and its cost from the method's run of the same seed.
    for key in ("seed", "sizes"):
        config.pop(key, None)
    train = dict(config.get("train", {}))
    train.pop("flops", None)
    return json.dumps(config | {"train": train}, sort_keys=True)


def _read(file: Path) -> Mapping[str, Any] | None:
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError):
        return None
    needed = {"curve", "growths", "training_flops", "parameters", "seconds"}
    is_result = isinstance(result, dict) and needed <= result.keys()
    return result if is_result and result["curve"] else None


def of_result(name: str, result: Mapping[str, Any]) -> Record:
    """The record of one result, as the runner gives it."""
    return _averaged(name, [result])


def _averaged(name: str, results: Sequence[Mapping[str, Any]]) -> Record:
    first = results[0]
    length = min(len(result["curve"]) for result in results)
    points = []
    for place in range(length):
        at = [result["curve"][place] for result in results]
        means = {key: _mean(at, key) for key in ("flops", "loss", "accuracy")}
        points.append(Point(at[0]["step"], **means, sizes=at[0]["sizes"]))
    notes = {}
    for key in ("config", "versions", "hardware"):
        if key in first:
            notes[key] = json.dumps(first[key], indent=1)
    return Record(
        name,
        points,
        [_UNTOLD | growth for growth in first["growths"]],
        _mean(results, "parameters"),
        _mean(results, "growth_flops"),
        _mean(results, "seconds"),
        len(results),
        notes,
    )


def _mean(found: Sequence[Mapping[str, Any]], key: str) -> float | None:
    known = [one[key] for one in found if one.get(key) is not None]
    return fmean(known) if known else None
