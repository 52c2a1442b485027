"""What a finished comparison says: a table with spreads and paired differences, and the plot of accuracy over FLOPs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev, stdev
from typing import Any

from meristem.experiments.suite import Comparison, Row

Result = Mapping[str, Any]

HEADER = (
    "net", "test accuracy", "test loss", "training TFLOP", "of it growth", "parameters", "inactive new, fwd / out",
    "inactive all, fwd / out", "minus its B3", "minus reference", "seconds",
)  # fmt: skip


def markdown(comparison: Comparison) -> str:
    """One table per task: mean ± standard deviation over seeds; differences are paired by seed, with 95 % intervals."""
    parts = []
    for task in comparison.suite.tasks:
        rows = comparison.rows(task)
        lines = [f"### {task}", "", "| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
        lines += ["| " + " | ".join(cells(comparison, row)) + " |" for row in rows if of(comparison, row)]
        grown = [row for row in rows if row.baseline is None and of(comparison, row)]
        lines += ["", "Units added, by layer (mean over seeds; one figure per growth):", ""]
        lines += [f"- {row.title}: {allocation(list(of(comparison, row).values()))}" for row in grown]
        if "stages" in comparison.suite.tasks[task]:
            lines += [
                "",
                "Test accuracy after each stage, % (mean ± population standard deviation, as the paper has it):",
                "",
            ]
            lines += [f"- {row.title}: {by_stage(list(of(comparison, row).values()))}" for row in grown]
        parts.append("\n".join(lines))
    first = next(iter(comparison.done.values()), None)
    suite = comparison.suite
    note = f"Seeds {suite.seeds}. Differences are in points of accuracy (in loss for regression); reference: {suite.reference}."
    if first is not None:
        hardware, versions = first["hardware"], first["versions"]
        note += (
            f" {hardware['device']}, {hardware['name']}, torch {versions['torch']}, meristem {versions['meristem']}."
        )
    return "\n\n".join([*parts, note]) + "\n"


def of(comparison: Comparison, row: Row) -> dict[int, Result]:
    """The results of one row by seed."""
    return {seed: comparison.done[row, seed] for seed in comparison.suite.seeds if (row, seed) in comparison.done}


def cells(comparison: Comparison, row: Row) -> list[str]:
    """One line of the table."""
    runs = of(comparison, row)
    listed = list(runs.values())
    equal = next((r for r in comparison.rows(row.task) if r.method == row.method and r.baseline == "equal"), None)
    reference = next(r for r in comparison.rows(row.task) if r.title == comparison.suite.reference)
    flops, growth = fmean(r["training_flops"] for r in listed), fmean(r["growth_flops"] for r in listed)
    return [
        row.title,
        spread([r["accuracy"] for r in listed], 4) if listed[0]["accuracy"] is not None else "–",
        spread([r["loss"] for r in listed], 4),
        f"{flops / 1e12:.3g}",
        f"{100 * growth / flops:.0f} %",
        f"{fmean(r['parameters'] for r in listed):,.0f}",
        inactive(listed, "new"),
        inactive(listed, "all"),
        "–" if row.baseline is not None or equal is None else difference(runs, of(comparison, equal)),
        "–" if row == reference else difference(runs, of(comparison, reference)),
        f"{fmean(r['seconds'] for r in listed):.0f}",
    ]


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation."""
    return f"{fmean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def difference(ours: Mapping[int, Result], theirs: Mapping[int, Result]) -> str:
    """The mean paired difference with its 95 % confidence interval: points of accuracy, or loss where there is none."""
    from scipy import stats

    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        return "–"
    key, scale = ("accuracy", 100) if ours[seeds[0]]["accuracy"] is not None else ("loss", 1)
    gaps = [scale * (ours[seed][key] - theirs[seed][key]) for seed in seeds]
    if len(gaps) < 2:
        return f"{gaps[0]:+.2f}"
    half = stats.t.ppf(0.975, len(gaps) - 1) * stdev(gaps) / len(gaps) ** 0.5
    return f"{fmean(gaps):+.2f} [{fmean(gaps) - half:+.2f}, {fmean(gaps) + half:+.2f}]"


def inactive(runs: Sequence[Result], which: str) -> str:
    """Shares of units, over all axes, that are inactive forward and going out; mean ± standard deviation over runs."""
    shares = [pair for run in runs if (pair := shares_of(run, which)) is not None]
    if not shares:
        return "–"
    both = [[100 * pair[i] for pair in shares] for i in (0, 1)]
    return " / ".join(f"{fmean(v):.1f} ± {stdev(v):.1f} %" if len(v) > 1 else f"{v[0]:.1f} %" for v in both)


def shares_of(run: Result, which: str) -> tuple[float, float] | None:
    """The inactive shares of one run, forward and going out, every unit counting alike."""
    axes = [figures for figures in run["health"].get(which, {}).values() if "inactive_forward" in figures]
    units = sum(figures["units"] for figures in axes)
    if not units:
        return None
    forward = sum(figures["units"] * figures["inactive_forward"] for figures in axes) / units
    outgoing = sum(figures["units"] * figures.get("inactive_outgoing", 0.0) for figures in axes) / units
    return forward, outgoing


def by_stage(runs: Sequence[Result]) -> str:
    """Test accuracy at the end of every stage."""
    stages = min(len(run["curve"]) for run in runs)
    scores = [[100 * run["curve"][i]["accuracy"] for run in runs] for i in range(stages)]
    return ", ".join(f"{fmean(values):.2f} ± {pstdev(values):.2f}" for values in scores)


def allocation(runs: Sequence[Result]) -> str:
    """Units that each axis got at each growth."""
    names = list(runs[0]["widths"])
    events = min(len(run["growths"]) for run in runs)
    parts = []
    for name in names:
        counts = [fmean(run["growths"][i]["added"].get(name, 0) for run in runs) for i in range(events)]
        if any(counts):
            parts.append(f"{name} " + ", ".join(f"{count:.3g}" for count in counts))
    return "; ".join(parts) or "nothing"


def draw(comparison: Comparison, path: Path) -> None:
    """Per task: accuracy (or loss) over training FLOPs, mean over seeds, a dot where a run ends; below, inactive units."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    tasks = list(comparison.suite.tasks)
    size = (7 * len(tasks) + 4, 9)
    figure, panels = plt.subplots(
        2, len(tasks), figsize=size, layout="constrained", squeeze=False, height_ratios=[3, 2]
    )
    colours = plt.get_cmap("tab20")
    for column, task in enumerate(tasks):
        top, bottom = panels[0][column], panels[1][column]
        rows = [row for row in comparison.rows(task) if of(comparison, row)]
        for i, row in enumerate(rows):
            runs = list(of(comparison, row).values())
            key = "accuracy" if runs[0]["accuracy"] is not None else "loss"
            points = min(len(run["curve"]) for run in runs)
            x = [fmean(run["curve"][p]["flops"] for run in runs) / 1e12 for p in range(points)]
            y = [fmean(run["curve"][p][key] for run in runs) for p in range(points)]
            line = "-" if i < 20 else "--"
            top.plot(x, y, line, label=row.title, linewidth=1.4, color=colours(i % 20))
            top.plot(x[-1:], y[-1:], "o", color=colours(i % 20), markersize=5)
            top.set_ylabel(f"test {key}")
            for which, offset in (("new", -0.2), ("all", 0.2)):
                shares = [100 * pair[0] for run in runs if (pair := shares_of(run, which)) is not None]
                if shares:
                    bottom.bar(
                        i + offset, fmean(shares), 0.4, color=colours(i % 20), alpha=1 if which == "new" else 0.4
                    )
        top.set_title(task)
        top.set_xlabel("training TFLOP, growth included")
        bottom.set_ylabel("units never above zero, %\n(full: new units, pale: all)")
        bottom.set_xticks(range(len(rows)), [row.title for row in rows], rotation=60, ha="right", fontsize=7)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)
