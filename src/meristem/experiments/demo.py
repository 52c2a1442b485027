"""The demo: a small conv net grows on the bundled digits, beside the same net fixed
small and fixed large.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from meristem.experiments.config import Experiment, checked
from meristem.experiments.run import Progress, Run, result_of

_TRAIN = {
    "epochs": 20,
    "batch_size": 64,
    "optimizer": {
        "sgd": {"lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    },
    "schedule": {"wsd": {"decay": 0.3}},
}
_GROW = {
    "when": {"at": ["5 epochs", "10 epochs"]},
    "how": "gradmax",
    "where": "proportional",
    "amount": 1.0,
}
SMALL, LARGE = 4, 16
RUNS: dict[str, dict[str, Any]] = {
    f"fixed, width {SMALL}": {"model": {"convnet": {"width": SMALL}}},
    f"grown {SMALL} -> {LARGE}": {
        "model": {"convnet": {"width": SMALL}},
        "grow": _GROW,
    },
    f"fixed, width {LARGE}": {"model": {"convnet": {"width": LARGE}}},
}


@dataclass(frozen=True)
class Outcome:
    """One finished run of the demo."""

    name: str
    result: dict[str, Any]


def experiments(seed: int = 0) -> dict[str, Experiment]:
    """The three runs of the demo by name."""
    return {
        name: checked({"data": "digits", "seed": seed, "train": _TRAIN, **run})
        for name, run in RUNS.items()
    }


def demo(
    report: Callable[[str, Progress], None], folder: Path, seed: int = 0
) -> list[Outcome]:
    """Run all three; `report(name, progress)` is called after every step."""
    outcomes = []
    for number, (name, experiment) in enumerate(experiments(seed).items()):
        running = Run(experiment, partial(report, name))
        running.train(folder / str(number))
        outcomes.append(Outcome(name, result_of(running)))
    return outcomes


def draw(outcomes: list[Outcome], path: Path) -> None:
    """Widths of the grown net and accuracy of all nets over training steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8, 6), sharex=True, height_ratios=[3, 2], layout="constrained"
    )
    for outcome, colour in zip(
        outcomes, ("#9aa5b1", "#2f855a", "#2b6cb0"), strict=True
    ):
        curve = outcome.result["curve"]
        steps = [point["step"] for point in curve]
        top.plot(
            steps,
            [100 * point["accuracy"] for point in curve],
            color=colour,
            label=outcome.name,
            linewidth=2,
        )
        for growth in outcome.result["growths"]:
            top.axvline(growth["step"], color=colour, linestyle=":", linewidth=1)
    grown = next(outcome.result for outcome in outcomes if outcome.result["growths"])
    for name in grown["widths"]:
        steps = [0, *[point["step"] for point in grown["curve"]]]
        first = grown["growths"][0]["before"].get(name, grown["widths"][name])
        bottom.step(
            steps,
            [first, *[point["sizes"][name] for point in grown["curve"]]],
            where="post",
            label=name,
            linewidth=2,
        )
    top.set_ylabel("test accuracy, %")
    top.set_title("A conv net grows while it trains (digits; dotted: growths)")
    top.legend(loc="lower right")
    bottom.set_ylabel("channels")
    bottom.set_xlabel("training steps")
    bottom.set_yscale("log", base=2)
    bottom.yaxis.set_major_formatter("{x:.0f}")
    bottom.legend(loc="upper left")
    figure.savefig(path, dpi=120)
    plt.close(figure)
