"""What a finished comparison says: a table with spreads and paired differences, and the
plot of accuracy over FLOPs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev, stdev
from typing import Any

from meristem.core.errors import DataError
from meristem.experiments.frontier import (
    Multiplier,
    Sweep,
    frontier,
    minimum,
    multiplier,
)
from meristem.experiments.suite import Comparison, Row
from meristem.report.records import inactive as units_inactive

Result = Mapping[str, Any]

HEADER = (
    "net",
    "test accuracy",
    "test loss",
    "training TFLOP",
    "of it growth",
    "share of the full cost",
    "parameters",
    "inactive new, fwd / out",
    "inactive all, fwd / out",
    "minus its B3",
    "minus reference",
    "seconds",
)


def markdown(comparison: Comparison) -> str:
    """One table per task: mean ± standard deviation over seeds; differences are paired
    by seed, with 95 % intervals.
    """
    parts = [_task(comparison, task) for task in comparison.suite.tasks]
    return "\n\n".join([*parts, _note(comparison)]) + "\n"


def _task(comparison: Comparison, task: str) -> str:
    """The table of one task, and what its methods grew."""
    lines = [f"### {task}", "", _line(HEADER), "|" + "---|" * len(HEADER)]
    grown = []
    for row in comparison.rows(task):
        if not of(comparison, row) or row.baseline == "best":
            continue
        lines.append(_line(cells(comparison, row)))
        if row.baseline is None:
            grown.append(row)
    lines += ["", "Units added, by layer (mean over seeds; one figure per growth):", ""]
    for row in grown:
        added = allocation(list(of(comparison, row).values()))
        lines.append(f"- {row.title}: {added}")
    lines += _against_the_best(comparison, task)
    if "stages" in comparison.suite.tasks[task]:
        lines += [
            "",
            "Test accuracy after each stage, % (mean ± population standard deviation, "
            "as the paper has it):",
            "",
        ]
        for row in grown:
            accuracies = by_stage(list(of(comparison, row).values()))
            lines.append(f"- {row.title}: {accuracies}")
    return "\n".join(lines)


def _against_the_best(comparison: Comparison, task: str) -> list[str]:
    """What every method saves against the best fixed size, and the sweep behind it."""
    swept = sweep_of(comparison, task)
    if not swept:
        return []
    lines = [
        "",
        "**Against the best fixed size.** The compute multiplier is the cost of the best "
        "fixed size for the same loss, over the method's own (95 % over seeds).",
        "",
        "| net | training TFLOP | test loss | compute multiplier |",
        "|---|---|---|---|",
    ]
    for method in comparison.suite.methods:
        runs = of(comparison, Row(task, method, method))
        if not runs:
            continue
        cost, loss = mean_of(runs, "training_flops"), mean_of(runs, "loss")
        try:
            told = str(saved(swept, runs))
        except DataError as error:
            told = f"cannot be told ({error})"
        lines.append(_line([method, f"{cost / 1e12:.3g}", f"{loss:.4f}", told]))
    return lines + _sweep(swept)


def saved(swept: Sweep, runs: Mapping[int, Result]) -> Multiplier:
    """What the runs of a method, by seed, save against the best fixed size.

    Raises:
        DataError: As `frontier.multiplier`.
    """
    losses = {seed: result["loss"] for seed, result in runs.items()}
    return multiplier(swept, losses, mean_of(runs, "training_flops"))


def mean_of(runs: Mapping[int, Result], key: str) -> float:
    """The mean of a figure over seeds."""
    return fmean(result[key] for result in runs.values())


def _sweep(swept: Sweep) -> list[str]:
    """The mean loss of every fixed size at every budget, and the best size there."""
    budgets = sorted(swept)
    means = {}
    for budget in budgets:
        of_size = swept[budget].items()
        means[budget] = {size: fmean(losses.values()) for size, losses in of_size}
    lines = [
        "",
        _line(["fixed nets", *(f"{budget / 1e12:.3g} TFLOP" for budget in budgets)]),
        "|" + "---|" * (len(budgets) + 1),
    ]
    for size in sorted({size for found in means.values() for size in found}):
        cells = [f"{means[budget][size]:.4f}" for budget in budgets]
        lines.append(_line([f"{size:,.0f} parameters", *cells]))
    best = []
    for budget in budgets:
        try:
            size, loss = minimum(list(means[budget]), list(means[budget].values()))
            best.append(f"{loss:.4f} at {size:,.0f}")
        except DataError as error:
            best.append(str(error))
    return [*lines, _line(["best size, fitted", *best])]


def sweep_of(
    comparison: Comparison, task: str
) -> dict[float, dict[float, dict[int, float]]]:
    """The losses of the fixed nets by budget, parameters and seed; empty without any."""
    found: dict[float, dict[float, dict[int, float]]] = {}
    for row in comparison.rows(task):
        runs = of(comparison, row)
        method_runs = of(comparison, Row(task, str(row.method), row.method))
        if row.baseline != "best" or not runs or not method_runs:
            continue
        budget = mean_of(method_runs, "training_flops") * (row.budget or 1.0)
        size = next(iter(runs.values()))["parameters"]
        losses = {seed: result["loss"] for seed, result in runs.items()}
        found.setdefault(budget, {})[size] = losses
    return found


def _line(texts: Sequence[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def _note(comparison: Comparison) -> str:
    suite = comparison.suite
    unit = "points of accuracy (in loss for regression)"
    if suite.score == "loss":
        unit = "loss"
    note = (
        f"Seeds {suite.seeds}. Differences are in {unit}; reference: "
        f"{suite.reference}. The full cost is that of the final shape trained for the "
        "whole schedule."
    )
    for first in comparison.done.values():
        hardware, versions = first["hardware"], first["versions"]
        return (
            f"{note} {hardware['device']}, {hardware['name']}, torch "
            f"{versions['torch']}, meristem {versions['meristem']}."
        )
    return note


def of(comparison: Comparison, row: Row) -> dict[int, Result]:
    """The results of one row by seed."""
    return {
        seed: comparison.done[row, seed]
        for seed in comparison.suite.seeds
        if (row, seed) in comparison.done
    }


def cells(comparison: Comparison, row: Row) -> list[str]:
    """One line of the table."""
    runs = of(comparison, row)
    listed = list(runs.values())
    equal = next(
        (
            r
            for r in comparison.rows(row.task)
            if r.method == row.method and r.baseline == "equal"
        ),
        None,
    )
    reference = next(
        r for r in comparison.rows(row.task) if r.title == comparison.suite.reference
    )
    score = comparison.suite.score
    flops, growth = (
        fmean(r["training_flops"] for r in listed),
        fmean(r["growth_flops"] for r in listed),
    )
    accuracies = [result["accuracy"] for result in listed]
    losses = [result["loss"] for result in listed]
    accuracy = spread(accuracies, 4) if accuracies[0] is not None else "–"
    to_equal = to_reference = "–"
    if row.baseline is None and equal is not None:
        to_equal = difference(runs, of(comparison, equal), score)
    if row != reference:
        to_reference = difference(runs, of(comparison, reference), score)
    parameters = fmean(result["parameters"] for result in listed)
    seconds = fmean(result["seconds"] for result in listed)
    return [
        row.title,
        accuracy,
        spread(losses, 4),
        f"{flops / 1e12:.3g}",
        f"{100 * growth / flops:.0f} %",
        share(comparison, row, flops),
        f"{parameters:,.0f}",
        inactive(listed, "new"),
        inactive(listed, "all"),
        to_equal,
        to_reference,
        f"{seconds:.0f}",
    ]


def share(comparison: Comparison, row: Row, flops: float) -> str:
    """Training FLOPs as a share of those of the final shape trained in full: the
    method's own, or the only one there is.
    """
    finals = [
        r
        for r in comparison.rows(row.task)
        if r.baseline == "final" and of(comparison, r)
    ]
    own = [r for r in finals if r.method == row.method] or (
        finals if len(finals) == 1 else []
    )
    if not own:
        return "–"
    full = fmean(r["training_flops"] for r in of(comparison, own[0]).values())
    return f"{100 * flops / full:.0f} %"


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation."""
    return f"{fmean(values):.{digits}f}" + (
        f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    )


def difference(
    ours: Mapping[int, Result], theirs: Mapping[int, Result], score: str = "accuracy"
) -> str:
    """The mean paired difference with its 95 % confidence interval: points of accuracy,
    or loss where there is none.
    """
    from scipy import stats

    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        return "–"
    key, scale = (
        ("accuracy", 100)
        if score == "accuracy" and ours[seeds[0]]["accuracy"] is not None
        else ("loss", 1)
    )
    digits = 2 if scale == 100 else 3
    gaps = [scale * (ours[seed][key] - theirs[seed][key]) for seed in seeds]
    if len(gaps) < 2:
        return f"{gaps[0]:+.{digits}f}"
    half = stats.t.ppf(0.975, len(gaps) - 1) * stdev(gaps) / len(gaps) ** 0.5
    low, high = fmean(gaps) - half, fmean(gaps) + half
    return f"{fmean(gaps):+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def inactive(runs: Sequence[Result], which: str) -> str:
    """Shares of units, over all axes, that are inactive forward and going out; mean ±
    standard deviation over runs.
    """
    shares = [pair for run in runs if (pair := shares_of(run, which)) is not None]
    if not shares:
        return "–"
    both = [[100 * pair[i] for pair in shares] for i in (0, 1)]
    return " / ".join(
        f"{fmean(v):.1f} ± {stdev(v):.1f} %" if len(v) > 1 else f"{v[0]:.1f} %"
        for v in both
    )


def shares_of(run: Result, which: str) -> tuple[float, float] | None:
    """The inactive shares of one run, forward and going out, every unit counting alike."""
    figures = run["health"].get(which, {})
    forward = units_inactive(figures)
    outgoing = units_inactive(figures, "inactive_outgoing")
    if forward is None or outgoing is None:
        return None
    return forward, outgoing


def by_stage(runs: Sequence[Result]) -> str:
    """Test accuracy at the end of every stage."""
    stages = min(len(run["curve"]) for run in runs)
    scores = [
        [100 * run["curve"][i]["accuracy"] for run in runs] for i in range(stages)
    ]
    return ", ".join(f"{fmean(values):.2f} ± {pstdev(values):.2f}" for values in scores)


def allocation(runs: Sequence[Result]) -> str:
    """Units that each axis got at each growth."""
    events = min(len(run["growths"]) for run in runs)
    names = dict.fromkeys(
        name for run in runs for growth in run["growths"] for name in growth["added"]
    )
    parts = []
    for name in names:
        counts = [
            fmean(run["growths"][i]["added"].get(name, 0) for run in runs)
            for i in range(events)
        ]
        if any(counts):
            parts.append(f"{name} " + ", ".join(f"{count:.3g}" for count in counts))
    return "; ".join(parts) or "nothing"


def draw(comparison: Comparison, path: Path) -> None:
    """Per task: accuracy (or loss) over training FLOPs, mean over seeds, a dot where a
    run ends; where accuracy is compared, inactive units below.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    suite = comparison.suite
    tasks = list(suite.tasks)
    heights = [3, 2] if suite.score == "accuracy" else [1]
    figure, panels = plt.subplots(
        len(heights),
        len(tasks),
        figsize=(7 * len(tasks) + 4, 5 if len(heights) == 1 else 9),
        layout="constrained",
        squeeze=False,
        height_ratios=heights,
    )
    for column, task in enumerate(tasks):
        rows = [
            r
            for r in comparison.rows(task)
            if of(comparison, r)
            and r.baseline != "best"
            and (suite.drawn is None or r.title in suite.drawn)
        ]
        _draw_curves(panels[0][column], comparison, rows)
        _draw_frontier(panels[0][column], comparison, task)
        panels[0][column].set_title(task)
        if len(heights) == 2:
            _draw_inactive(panels[1][column], comparison, rows)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _colour(number: int) -> Any:
    from matplotlib import pyplot as plt

    return plt.get_cmap("tab20")(number % 20)


def _draw_curves(panel: Any, comparison: Comparison, rows: Sequence[Row]) -> None:
    ends = []
    for i, row in enumerate(rows):
        runs = list(of(comparison, row).values())
        key = comparison.suite.score if runs[0]["accuracy"] is not None else "loss"
        points = min(len(run["curve"]) for run in runs)
        x = [
            fmean(run["curve"][p]["flops"] for run in runs) / 1e12
            for p in range(points)
        ]
        y = [fmean(run["curve"][p][key] for run in runs) for p in range(points)]
        panel.plot(
            x,
            y,
            "-" if row.baseline is None else "--",
            label=row.title,
            linewidth=1.4,
            color=_colour(i),
        )
        panel.plot(x[-1:], y[-1:], "o", color=_colour(i), markersize=5)
        panel.set_ylabel(f"test {key}")
        ends += y[-1:]
    if comparison.suite.score == "loss" and ends:
        room = max(ends) - min(ends) or 0.1
        panel.set_ylim(min(ends) - 0.2 * room, max(ends) + room)
    panel.set_xlabel("training TFLOP, growth included")


def _draw_frontier(panel: Any, comparison: Comparison, task: str) -> None:
    """Where losses are compared: the best fixed size at every budget of the sweep."""
    swept = sweep_of(comparison, task)
    if comparison.suite.score != "loss" or not swept:
        return
    try:
        line = frontier(swept, comparison.suite.seeds)
    except DataError:  # the table says why
        return
    x = [budget / 1e12 for budget, _ in line]
    y = [loss for _, loss in line]
    panel.plot(x, y, "k.-", linewidth=1, label="best fixed size")


def _draw_inactive(panel: Any, comparison: Comparison, rows: Sequence[Row]) -> None:
    for i, row in enumerate(rows):
        runs = list(of(comparison, row).values())
        for which, offset in (("new", -0.2), ("all", 0.2)):
            shares = [
                100 * pair[0]
                for run in runs
                if (pair := shares_of(run, which)) is not None
            ]
            if shares:
                panel.bar(
                    i + offset,
                    fmean(shares),
                    0.4,
                    color=_colour(i),
                    alpha=1 if which == "new" else 0.4,
                )
    panel.set_ylabel("units never above zero, %\n(full: new units, pale: all)")
    panel.set_xticks(
        range(len(rows)),
        [row.title for row in rows],
        rotation=60,
        ha="right",
        fontsize=7,
    )
