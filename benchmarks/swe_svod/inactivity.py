"""Are the new units alive? Tables over all suites of this folder, from their results.

python benchmarks/swe_svod/inactivity.py
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meristem.experiments.suite import read, slug
from meristem.experiments.tables import shares_of

HERE = Path(__file__).parent
SUITES = ("mlp", "conv", "cifar100_scaled")
MOMENTS = ("1", "10", "100", "1000")

Runs = dict[str, dict[str, list[dict[str, Any]]]]


def collected() -> Runs:
    """Results by task and row."""
    found: Runs = {}
    for suite in SUITES:
        comparison = read(HERE / f"{suite}.toml")
        for task in comparison.suite.tasks:
            for row in comparison.rows(task):
                name = f"{slug(task)}_{slug(row.title)}"
                runs = [
                    json.loads(path.read_text())
                    for path in sorted(comparison.out.glob(f"{name}_seed?.json"))
                ]
                if runs:
                    found.setdefault(task, {})[row.title] = runs
    return found


def spread(values: Sequence[float], digits: int = 1) -> str:
    if not values:
        return "–"
    error = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{error}"


def inactive(runs: list[dict[str, Any]], which: str) -> str:
    return spread(
        [100 * pair[0] for run in runs if (pair := shares_of(run, which)) is not None]
    )


def figures(runs: list[dict[str, Any]], key: str) -> list[float]:
    """One figure per run: the mean over growths and layers of a ratio of gradients, at each moment."""
    result = []
    for run in runs:
        values = [
            axis["gradient_ratio"]
            for growth in run["growths"]
            for axis in growth["health"].get(key, {}).values()
            if isinstance(axis, dict) and "gradient_ratio" in axis
        ]
        result += [statistics.mean(values)] if values else []
    return result


def main() -> None:
    found = collected()
    tasks = list(found)
    titles = list(dict.fromkeys(title for rows in found.values() for title in rows))
    print(
        "Units never above zero on the training data after joint training, %: mean ± standard deviation over seeds.\n"
    )
    print(
        "| net | "
        + " | ".join(f"{task}, new" for task in tasks)
        + " | "
        + " | ".join(f"{task}, all" for task in tasks)
        + " |"
    )
    print("|---" * (1 + 2 * len(tasks)) + "|")
    for title in titles:
        cells = [
            inactive(found[task].get(title, []), which)
            for which in ("new", "all")
            for task in tasks
        ]
        print(f"| {title} | " + " | ".join(cells) + " |")
    print(
        "\nGradient norm of new units over that of the old ones, by steps after the growth; loss spike and steps to recover.\n"
    )
    print("| net | task | " + " | ".join(MOMENTS) + " | spike | steps |")
    print("|---" * (4 + len(MOMENTS)) + "|")
    for task in tasks:
        for title, runs in found[task].items():
            if not any(figures(runs, moment) for moment in MOMENTS):
                continue
            losses = [
                growth["health"]["loss"]
                for run in runs
                for growth in run["growths"]
                if "loss" in growth["health"]
            ]
            spike = (
                f"{statistics.mean(x['spike'] for x in losses):+.3f}" if losses else "–"
            )
            steps = [x["steps_to_recover"] for x in losses]
            recovered = [s for s in steps if s is not None]
            told = f"{statistics.mean(recovered):.0f}" if recovered else "–"
            told += (
                f" ({len(steps) - len(recovered)} of {len(steps)} not within 200)"
                if len(recovered) < len(steps)
                else ""
            )
            print(
                f"| {title} | {task} | "
                + " | ".join(spread(figures(runs, m), 2) for m in MOMENTS)
                + f" | {spike} | {told} |"
            )


if __name__ == "__main__":
    main()
