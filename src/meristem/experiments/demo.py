"""The demo: a GPT that gets half of its blocks half-way, beside six blocks from the start
and three that stay three.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty
from typing import Any

import torch

from meristem.core.errors import DataError
from meristem.experiments.config import Experiment, checked
from meristem.experiments.run import Progress, Run, result_of
from meristem.experiments.workers import end_with_parent
from meristem.report import Record
from meristem.report.records import of_result

GROWN, LARGE, SMALL = "three blocks, then six", "six blocks", "three blocks"
STEPS = 350
ROWS = 96
"""Rows of the held-out text that every evaluation reads."""
_TRAIN = {
    "steps": STEPS,
    "batch_size": 16,
    "clip": 1.0,
    "evaluate": 25,
    "optimizer": {"adamw": {"lr": 4e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}},
    "schedule": {"wsd": {"warmup": 0.05, "decay": 0.3}},
}
_GROW = {
    "when": {"at": 0.5},
    # Silent copies of the present blocks, each behind its own: no output moves.
    "how": {"interpose": {"zero": True}},
    "axes": "depth",
    "amount": [3],
}
Report = Callable[[str, int, float], None]
_told: Any = None


@dataclass(frozen=True)
class Outcome:
    """One finished run of the demo."""

    name: str
    result: dict[str, Any]

    @property
    def record(self) -> Record:
        return of_result(self.name, self.result)


def experiments(seed: int = 0) -> dict[str, Experiment]:
    """The three runs of the demo by name; the longest first."""

    def experiment(depth: int, **more: Any) -> Experiment:
        model = {"gpt": {"width": 48, "heads": 4, "hidden": 192, "depth": depth}}
        table = {"model": model, "data": "shakespeare", "seed": seed, "train": _TRAIN}
        return checked(table | more)

    return {
        LARGE: experiment(6),
        GROWN: experiment(3, grow=_GROW),
        SMALL: experiment(3),
    }


def demo(report: Report, seed: int = 0) -> list[Outcome]:
    """Run all three, two at a time with a thread each, so that nobody's number of cores
    changes what comes out; `report(name, step, loss)` is called meanwhile.
    """
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    pool = ProcessPoolExecutor(2, context, initializer=_listen, initargs=(told,))
    futures = {}
    try:
        for name, experiment in experiments(seed).items():
            futures[pool.submit(_trained, name, experiment)] = name
        while not all(future.done() for future in futures):
            with contextlib.suppress(Empty):
                report(*told.get(timeout=0.2))
        done = {name: future.result() for future, name in futures.items()}
    except BrokenProcessPool:
        raise DataError(
            "a run of the demo was killed; is there memory enough?"
        ) from None
    finally:
        # After Ctrl-C nobody waits for the end of a run.
        running = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in running:
            process.kill()
    return [Outcome(name, done[name]) for name in (SMALL, LARGE, GROWN)]


def _listen(told: Any) -> None:
    """Where the runs of a process tell how far they are."""
    global _told
    _told = told
    # The one who reads them ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    torch.set_num_threads(1)


def _trained(name: str, experiment: Experiment) -> dict[str, Any]:
    """The result of one run."""

    def report(progress: Progress) -> None:
        if progress.step % 10 == 0:
            _told.put((name, progress.step, float(progress.loss)))

    running = Run(experiment, report)
    data = running.data
    running.data = replace(data, x_test=data.x_test[:ROWS], y_test=data.y_test[:ROWS])
    with tempfile.TemporaryDirectory() as folder:
        running.train(Path(folder))
    # What units do is looked at on as many rows.
    few = replace(data, x_train=data.x_train[:ROWS], y_train=data.y_train[:ROWS])
    running.data = few
    return result_of(running)


def verdict(outcomes: list[Outcome]) -> str:
    """What came out, in a sentence of figures."""
    grown, large, small = (
        next(one.result for one in outcomes if one.name == name)
        for name in (GROWN, LARGE, SMALL)
    )
    share = grown["training_flops"] / large["training_flops"]
    step = grown["growths"][0]["step"]
    before, after = (
        next(point["loss"] for point in grown["curve"] if point["step"] >= moment)
        for moment in (step - _TRAIN["evaluate"], step)
    )
    return (
        f"Grown, it ends at a loss of {grown['loss']:.3f} for {100 * share:.0f} % of the "
        f"cost of six blocks from the start ({large['loss']:.3f}); three blocks end at "
        f"{small['loss']:.3f}. Around the growth the loss goes from {before:.3f} to "
        f"{after:.3f}: no jump. One seed, one learning rate for all."
    )
