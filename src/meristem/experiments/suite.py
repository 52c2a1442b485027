"""Suites: tasks x methods x seeds and the baselines they call for, in one file;
resumable, safe to run several times at once.
"""

from __future__ import annotations

import copy
import json
import math
import multiprocessing
import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from meristem.core.errors import DataError, nearest
from meristem.experiments.config import (
    OPTIMIZERS,
    ConfigError,
    Experiment,
    checked,
    named,
    readable,
    toml,
)
from meristem.experiments.run import Interrupted, finished_before, run, sizes_after
from meristem.experiments.workers import end_with_parent

Baseline = Literal["small", "final", "equal", "best"]
TITLES: dict[str, str] = {
    "small": "small, fixed",
    "final": "final shape of {}, fixed",
    "equal": "final shape of {}, equal FLOPs",
    "best": "{size}, fixed, {budget:g} x the FLOPs of {}",
}
"""B1; B2 and B4 (the grown shape from scratch, on the full budget); B3 (the same,
stopped at the method's total FLOPs); the sweep that finds the best fixed size.
"""
TUNING_VALIDATION = 0.1
"""Share of the training data on which learning rates are chosen."""


class Suite(BaseModel):
    """What a suite file says: tasks x methods x seeds, and the baselines they call for."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True
    )

    seeds: list[int] = Field([0, 1, 2], min_length=1)
    """Every row is run with each."""
    reference: str
    """The row that all others are compared with."""
    score: Literal["accuracy", "loss"] = "accuracy"
    """What differences are in and what is plotted."""
    drawn: list[str] | None = None
    """The rows that are plotted; all where nothing is said."""
    baselines: list[Baseline] = ["small", "final", "equal"]
    """small: the first shape; final: the final shape in full; equal: at the method's cost; best."""
    best: dict[str, dict[str, Any]] = {}
    """Fixed sizes by name, as tables of `model` and `train`, for the baseline best."""
    budgets: list[float] = Field([0.7, 1.0, 1.4], min_length=2)
    """Of that sweep, as multiples of the cost of the first method that has baselines."""
    baselines_of: list[str] | None = None
    """The methods whose baselines are run; all where nothing is said."""
    final_of: list[str] | None = None
    """Where several methods end in one shape, the one whose final shape is trained."""
    learning_rates: list[float] = []
    """Tried for every tuned row, on a tenth of the training data that is held out."""
    tuned: list[str] | None = None
    """Rows whose rate is tuned; the others take that of the first tuned row of their kind."""
    rates: dict[str, float] = {}
    """Rates by row that were found elsewhere."""
    tasks: dict[str, dict[str, Any]] = Field(min_length=1)
    """Experiments by name, without what the methods say."""
    methods: dict[str, dict[str, Any]] = Field(min_length=1)
    """Tables by name, merged into a task's [grow] or [stages]; `model` and `train` into its own."""


@dataclass(frozen=True)
class Row:
    """One line of a task's table: a method, or a baseline of a method."""

    task: str
    title: str
    method: str | None
    baseline: Baseline | None = None
    size: str | None = None
    budget: float | None = None

    @property
    def follows(self) -> bool:
        """Whether its experiment hangs on the result of its method."""
        return self.baseline in ("final", "equal", "best")

    @property
    def stem(self) -> str:
        """The name of its results' files, without the seed."""
        return f"{slug(self.task)}_{slug(self.title)}"


@dataclass(frozen=True)
class Job:
    """One run: an experiment and the file name of its result."""

    row: Row
    experiment: Experiment
    name: str


@dataclass
class Comparison:
    """A suite and the folder of its results.

    Attributes:
        path: The suite's file; its stem names the folder under `out`.
        done: Results by row and seed.
    """

    path: Path
    suite: Suite
    out: Path
    done: dict[tuple[Row, int], dict[str, Any]] = field(default_factory=dict)

    def rows(self, task: str) -> list[Row]:
        """The rows of one task: methods first, then what they are compared with."""
        rows = [Row(task, method, method) for method in self.suite.methods]
        if "small" in self.suite.baselines:
            rows.append(Row(task, TITLES["small"], None, "small"))
        for baseline in self.suite.baselines:
            if baseline != "small":
                of = self.suite.baselines_of
                if baseline == "final" and self.suite.final_of is not None:
                    of = self.suite.final_of
                of = list(self.suite.methods) if of is None else of
                # One frontier for all of a task's methods.
                of = of[:1] if baseline == "best" else of
                for method in of:
                    rows += self._baseline(task, baseline, method)
        return rows

    def _baseline(self, task: str, baseline: Baseline, method: str) -> list[Row]:
        """The rows of one kind that a method is compared with."""
        title = TITLES[baseline]
        if baseline != "best":
            return [Row(task, title.format(method), method, baseline)]
        found = []
        for size in self.suite.best:
            for budget in self.suite.budgets:
                named = title.format(method, size=size, budget=budget)
                found.append(Row(task, named, method, baseline, size, budget))
        return found

    def experiment(self, row: Row, seed: int) -> Experiment:
        """The experiment of a row.

        A baseline that hangs on its method's result can be asked for once that is done.
        """
        table = copy.deepcopy(self.suite.tasks[row.task])
        if row.baseline is None:
            assert row.method is not None
            method = dict(self.suite.methods[row.method])
            table["model"] = method.pop("model", table["model"])
            table["train"] = table["train"] | method.pop("train", {})
            for key in ("grow", "stages"):
                if key in table:
                    table[key] = table[key] | method
            return checked(
                table | {"seed": seed}, f"{self.path}: {row.task}, {row.title}"
            )
        if "stages" in table and row.baseline != "equal":
            table["stages"] |= {"amount": []}
        table.pop("grow", None)
        if row.baseline == "best":
            asked = dict(self.suite.best[str(row.size)])
            table["model"] = asked.pop("model", table["model"])
            table["train"] = table["train"] | asked.pop("train", {})
            table |= asked
        elif row.baseline != "small":
            grown = self.done[_method(row), seed]
            table["sizes"] = sizes_after(table.get("sizes", {}), grown)
        if row.baseline in ("equal", "best"):
            table.pop("stages", None)
            cost = self.done[_method(row), seed]["training_flops"]
            train = table["train"]
            kept = {k: v for k, v in train.items() if k not in ("epochs", "steps")}
            table["train"] = kept | {"flops": float(cost) * (row.budget or 1.0)}
        return checked(table | {"seed": seed}, f"{self.path}: {row.task}, {row.title}")

    def waves(self) -> Iterator[list[Row]]:
        """Rows that can run side by side: methods first, then the baselines that need
        their results.
        """
        rows = [row for task in self.suite.tasks for row in self.rows(task)]
        yield [row for row in rows if not row.follows]
        yield [row for row in rows if row.follows]

    def runs(self) -> int:
        """How many runs the suite takes, tuning included."""
        rows = [row for task in self.suite.tasks for row in self.rows(task)]
        return len(rows) * len(self.suite.seeds) + len(self._to_tune(rows)) * len(
            self.suite.learning_rates
        )

    def _to_tune(self, rows: Sequence[Row]) -> list[Row]:
        return [
            row
            for row in rows
            if self.suite.tuned is None or row.title in self.suite.tuned
        ]

    def load(self) -> None:
        """Read what is finished, and run nothing.

        Raises:
            ConfigError: As `finished_before`.
        """
        for rows in self.waves():
            for row in rows:
                for seed in self.suite.seeds:
                    if row.follows and (_method(row), seed) not in self.done:
                        continue
                    asked = self.experiment(row, seed)
                    if row.title in self.suite.rates:
                        asked = _with_rate(asked, self.suite.rates[row.title])
                    path = finished_before(asked, self.out, row.stem)
                    if path is not None:
                        self.done[row, seed] = json.loads(path.read_text())

    def finish(self, workers: int, report: Callable[[int, str], None]) -> None:
        """Run all that is not done yet; `report(done, name)` after every run.

        Raises:
            Interrupted: The runs in progress were stopped; what they last saved is
                complete.
        """
        count = 0

        def told(job: Job) -> None:
            nonlocal count
            count += 1
            report(count, f"{job.name}, seed {job.experiment.seed}")

        for rows in self.waves():
            best = self._tuned(rows, workers, told) if self.suite.learning_rates else {}
            best |= {
                row: self.suite.rates[row.title]
                for row in rows
                if row.title in self.suite.rates
            }
            # One process per run: a crash costs one row.
            jobs = []
            for row in rows:
                for seed in self.suite.seeds:
                    experiment = self.experiment(row, seed)
                    if row in best:
                        experiment = _with_rate(experiment, best[row])
                    jobs.append(Job(row, experiment, row.stem))
            for job, path in _all(jobs, self.out, workers):
                assert path is not None
                self.done[job.row, job.experiment.seed] = json.loads(path.read_text())
                told(job)

    def _tuned(
        self, rows: Sequence[Row], workers: int, told: Callable[[Job], None]
    ) -> dict[Row, float]:
        """The learning rate of each row with the smallest held-out loss, with the first
        seed.
        """
        jobs = []
        for row in self._to_tune(rows):
            for rate in self.suite.learning_rates:
                experiment = _with_rate(
                    _held_out(self.experiment(row, self.suite.seeds[0])), rate
                )
                jobs.append(Job(row, experiment, f"{row.stem}_lr{rate:g}"))
        found: dict[Row, list[tuple[float, float]]] = {}
        for job, path in _all(jobs, self.out / "tuning", workers, tuning=True):
            loss = (
                json.loads(path.read_text())["validation"]
                if path is not None
                else math.inf
            )
            found.setdefault(job.row, []).append(
                (math.inf if math.isnan(loss) else loss, _rate(job.experiment))
            )
            told(job)
        return lent(rows, {row: min(pairs)[1] for row, pairs in found.items()})


def _validated(path: Path) -> Suite:
    """The suite in a file."""
    table = toml(path)
    if "train" in table and "methods" not in table:
        raise ConfigError(f"{path} is one experiment. hint: meristem run {path}")
    try:
        return Suite.model_validate(table)
    except ValidationError as error:
        told = readable(error, Suite)
        raise ConfigError("\n".join(f"{path}: {line}" for line in told)) from None


def _check_names(path: Path, suite: Suite, comparison: Comparison) -> None:
    """Raise where a suite names a method or a row that it does not have."""
    titles = {row.title for task in suite.tasks for row in comparison.rows(task)}
    for key in ("baselines_of", "final_of"):
        for method in getattr(suite, key) or []:
            if method not in suite.methods:
                raise ConfigError(
                    f"{path}: {key} names {method!r}.{nearest(method, suite.methods)}"
                )
    for key in ("tuned", "drawn", "rates"):
        for title in getattr(suite, key) or []:
            if title not in titles:
                raise ConfigError(
                    f"{path}: {key} names {title!r}, which is no row."
                    f"{nearest(title, titles)}"
                )
    if suite.reference not in titles:
        raise ConfigError(
            f"{path}: reference = {suite.reference!r} is no row."
            f"{nearest(suite.reference, titles)}"
        )


def _check_best(path: Path, suite: Suite) -> None:
    """Raise where a sweep could not be run or fitted."""
    if ("best" in suite.baselines) != bool(suite.best):
        raise ConfigError(
            f"{path}: the baseline best and the table [best] of its sizes go together"
        )
    if suite.best and len(suite.best) < 3:
        raise ConfigError(
            f"{path}: [best] names {len(suite.best)} sizes; a best one is found among "
            "three at least"
        )
    for task, table in suite.tasks.items():
        for size, asked in suite.best.items():
            train = table.get("train", {}) | asked.get("train", {})
            fixed = {k: v for k, v in table.items() if k not in ("grow", "stages")}
            checked(fixed | asked | {"train": train}, f"{path}: {task}, best.{size}")


def read(path: Path, out: Path | None = None) -> Comparison:
    """The comparison that a suite file describes, checked: every run of it that is
    known now.

    Raises:
        ConfigError: The file is missing, is no TOML, or says something unknown; the
            message names the key.
    """
    suite = _validated(path)
    if out is None:
        out = path.parent / "results" / path.stem
    comparison = Comparison(path, suite, out)
    _check_names(path, suite, comparison)
    _check_best(path, suite)
    for task, table in suite.tasks.items():
        if "grow" not in table and "stages" not in table:
            raise ConfigError(
                f"{path}: tasks.{task} says neither [grow] nor [stages]; there is "
                "nothing to compare"
            )
    files = [row.stem for task in suite.tasks for row in comparison.rows(task)]
    twice = [name for name in files if files.count(name) > 1]
    if twice:
        raise ConfigError(
            f"{path}: two rows would share the file name {twice[0]!r}. hint: rename a "
            "task or a method"
        )
    for row in next(comparison.waves()):
        comparison.experiment(row, suite.seeds[0])
    return comparison


def lent(rows: Sequence[Row], rates: dict[Row, float]) -> dict[Row, float]:
    """The rates with those of the rows that were not tuned: the rate of the first tuned
    row of their kind (grown, small, final, equal), else of the fixed nets of the grown
    shapes.
    """
    result = dict(rates)
    for row in rows:
        tuned = [other for other in rows if other in rates and other.task == row.task]
        alike = [other for other in tuned if other.baseline == row.baseline]
        shaped = [
            other
            for other in tuned
            if {other.baseline, row.baseline} == {"final", "equal"}
        ]
        if row not in rates and (alike or shaped):
            result[row] = rates[(alike or shaped)[0]]
    return result


def slug(text: str) -> str:
    """A name for files."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def _method(row: Row) -> Row:
    return Row(row.task, str(row.method), row.method)


def _rate(experiment: Experiment) -> float:
    rate: float = named(experiment.train.optimizer, OPTIMIZERS, "optimizer")[1]["lr"]
    return rate


def _with_rate(experiment: Experiment, rate: float) -> Experiment:
    name, settings = named(experiment.train.optimizer, OPTIMIZERS, "optimizer")
    train = experiment.train.model_copy(
        update={"optimizer": {name: settings | {"lr": rate}}}
    )
    return experiment.model_copy(update={"train": train})


def _held_out(experiment: Experiment) -> Experiment:
    """The same experiment with some of the training data held out, to choose on."""
    name, options = experiment.data_options
    if options.validation:
        return experiment
    chosen = options.model_dump(exclude_defaults=True) | {
        "validation": TUNING_VALIDATION
    }
    return experiment.model_copy(update={"data": {name: chosen}})


def _all(
    jobs: Sequence[Job], out: Path, workers: int, tuning: bool = False
) -> Iterator[tuple[Job, Path | None]]:
    """Every job with the path of its result, as they finish; `workers` at a time in
    processes of their own.

    A job that diverges while tuning has no result; elsewhere its error is raised.
    """
    if workers == 1:
        for job in jobs:
            yield job, finished(job, out, None, tuning)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_worker) as pool:
        futures = {pool.submit(finished, job, out, 1, tuning): job for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except (Interrupted, KeyboardInterrupt, BrokenProcessPool):
            pool.shutdown(cancel_futures=True)
            raise Interrupted(
                "the suite was stopped; what is finished stays finished"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _worker() -> None:
    """What a worker does about signals while it does not train: nothing is to be saved, and
    nothing to be said.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os._exit(128 + number))
    end_with_parent()


def finished(job: Job, out: Path, threads: int | None, tuning: bool) -> Path | None:
    """`run`, on some threads; the error of a job says which it was."""
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        return run(job.experiment, out, job.name)
    except DataError as error:
        if tuning:
            return None
        raise DataError(f"{job.name}_seed{job.experiment.seed}: {error}") from error
