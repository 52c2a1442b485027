"""The figures of a report, as SVG: lines are told apart without colour."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from meristem.report.records import Point, Record, inactive

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Dark on white, and told apart by lines and markers as well.
_COLOURS = ("#1b6e53", "#2b4c8c", "#a0522d", "#6b3fa0", "#555555", "#9c7a00")
_LINES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_MOST = 10
"""Lines of a figure of sizes, the rest is left out; names inside a panel."""
_LETTERS, _ROW = 120, 0.18
"""Of a legend below a panel: letters across the figure, and inches of a row."""
EARLY = 0.15
"""Share of a run that is left out of sight where it is out of scale."""
Cost = Callable[[Point], float]
_MOMENTS = ("insertion", "1", "10", "100", "1000")


def figure(width: float = 8, height: float = 4.2) -> Figure:
    """An empty figure.

    Raises:
        ImportError: matplotlib is not installed; the message names the extra.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "a report needs matplotlib. hint: pip install 'meristem-torch[cli]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def svg(drawn: Figure, title: str) -> str:
    """A figure as an element of a page."""
    import matplotlib

    buffer = io.StringIO()
    # Letters as outlines: the same on every machine.
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": title}):
        drawn.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    start = text.index("<svg")
    label = escape(title, quote=True)
    return text[start:].replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def curves(records: Sequence[Record], key: str) -> Figure:
    """One measure over the cost of training: FLOPs where they are known, else steps.

    A mark stands where a net grew; a large one where a run ended.
    """
    drawn = figure()
    panel = drawn.subplots()
    counted = all(record.last.flops is not None for record in records)
    for number, record in enumerate(records):
        points = record.measured(key)
        if points:
            _curve(panel, number, record, points, key, _cost(counted))
    panel.set_xlabel("training FLOPs, growth included" if counted else "steps")
    panel.set_ylabel(records[0].named(key))
    _focus(panel, records, key, _cost(counted))
    _legend(drawn, panel)
    return drawn


def overview(record: Record) -> Figure:
    """The loss of one run over its steps, and below it what grew."""
    drawn = figure(height=6)
    top, bottom = drawn.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    points = record.measured("loss") or record.points
    _curve(top, 0, record, points, "loss", _cost(counted=False))
    top.set_ylabel("loss")
    _sizes(drawn, bottom, record)
    return drawn


def _cost(counted: bool) -> Cost:
    def cost(point: Point) -> float:
        return point.flops if counted and point.flops is not None else point.step

    return cost


def _curve(
    panel: Axes,
    number: int,
    record: Record,
    points: Sequence[Point],
    key: str,
    cost: Cost,
) -> None:
    style = _style(number, grows=bool(record.growths))
    x = [cost(point) for point in points]
    y = [getattr(point, key) for point in points]
    # A mark of its own tells a line apart without colour.
    panel.plot(
        x,
        y,
        label=_plain(record.name),
        linewidth=1.8,
        marker=_marker(number),
        markevery=max(len(points) // 6, 1),
        markersize=4,
        **style,
    )
    panel.plot(
        x[-1:], y[-1:], marker=_marker(number), color=style["color"], markersize=8
    )
    for growth in record.growths:
        if growth.get("step") is None:
            continue
        before = [one for one in points if one.step < growth["step"]]
        after = [one for one in points if one.step >= growth["step"]]
        # The last figure before a growth and the first behind it.
        pair = before[-1:] + after[:1]
        panel.plot(
            [cost(one) for one in pair],
            [getattr(one, key) for one in pair],
            "|",
            color=style["color"],
            markersize=13,
            markeredgewidth=2,
        )


def _focus(panel: Axes, records: Sequence[Record], key: str, cost: Cost) -> None:
    """Leave the first steps out of sight, where they would flatten everything else."""
    shown: list[float] = []
    for record in records:
        begun = EARLY * cost(record.last)
        for point in record.measured(key):
            value = getattr(point, key)
            if cost(point) >= begun and math.isfinite(value):
                shown.append(value)
    if len(shown) > 1:
        room = 0.05 * (max(shown) - min(shown)) or 0.05
        panel.set_ylim(min(shown) - room, max(shown) + room)


def sizes(record: Record) -> Figure:
    """Widths and depths over the steps; axes that are always alike share a line."""
    drawn = figure(height=3.6)
    _sizes(drawn, drawn.subplots(), record)
    return drawn


def _sizes(drawn: Figure, panel: Axes, record: Record) -> None:
    paths = _paths(record)
    for number, (names, moments) in enumerate(paths[:_MOST]):
        first = _plain(names[0])
        label = first if len(names) == 1 else f"{first} and {len(names) - 1} alike"
        steps = [step for step, _ in moments]
        values = [size for _, size in moments]
        style = _style(number, grows=number == 0)
        panel.step(steps, values, where="post", label=label, linewidth=1.8, **style)
    panel.set_xlabel("steps")
    panel.set_ylabel("units or blocks")
    sizes_seen = [size for _, moments in paths for _, size in moments]
    if sizes_seen and max(sizes_seen) > 8 * min(sizes_seen):
        panel.set_yscale("log", base=2)
    else:
        panel.locator_params(axis="y", integer=True)
    panel.yaxis.set_major_formatter("{x:.0f}")
    _legend(drawn, panel)


def _paths(record: Record) -> list[tuple[list[str], tuple[tuple[int, int], ...]]]:
    """How axes grew, those that never did left out; the largest first."""
    found: dict[tuple[tuple[int, int], ...], list[str]] = {}
    for name in dict.fromkeys(n for growth in record.growths for n in growth["after"]):
        mine = [growth for growth in record.growths if name in growth["after"]]
        moments = [(0, mine[0]["before"][name])]
        moments += [(one["step"] or 0, one["after"][name]) for one in mine]
        moments.append((record.last.step, moments[-1][1]))
        found.setdefault(tuple(moments), []).append(name)
    paths = [(names, moments) for moments, names in found.items()]
    return sorted(paths, key=lambda path: -path[1][-1][1])


def pareto(records: Sequence[Record], key: str, smaller_is_better: bool) -> Figure:
    """One measure at the end against parameters and against the cost of training."""
    drawn = figure()
    panels = drawn.subplots(1, 2, sharey=True)
    costs: Mapping[str, Callable[[Record], float | None]] = {
        "parameters": lambda record: record.parameters,
        "training FLOPs": lambda record: record.last.flops,
    }
    for panel, (label, cost) in zip(panels, costs.items(), strict=True):
        known = []
        for number, record in enumerate(records):
            x, y = cost(record), record.final(key)
            if x is not None and y is not None:
                known.append((x, y))
                style = {"color": _COLOURS[number % len(_COLOURS)], "linestyle": ""}
                marker = _marker(number)
                panel.plot([x], [y], marker=marker, label=_plain(record.name), **style)
        front = _front(known, smaller_is_better)
        if front:
            best = zip(*front, strict=True)
            panel.step(*best, where="post", color="#999999", zorder=0)
        costs_known = [x for x, _ in known] or [1.0]
        if max(costs_known) > 10 * min(costs_known):
            panel.set_xscale("log")
        panel.set_xlabel(label)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(records[0].named(key))
    _legend(drawn, panels[0])
    return drawn


def _front(
    points: Sequence[tuple[float, float]], smaller_is_better: bool
) -> list[tuple[float, float]]:
    """The points that no cheaper one beats."""
    sign = -1 if smaller_is_better else 1
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or sign * y > sign * front[-1][1]:
            front.append((x, y))
    return front


def health(record: Record) -> Figure | None:
    """New units that are inactive, by steps since their growth; None where nobody looked."""
    lines: list[tuple[str, list[tuple[int, float]]]] = []
    for growth in record.growths:
        shares = []
        for place, moment in enumerate(_MOMENTS):
            share = inactive(growth["health"].get(moment, {}))
            if share is not None:
                shares.append((place, 100 * share))
        if shares:
            lines.append((f"grown at step {growth['step']}", shares))
    if not lines:
        return None
    drawn = figure(height=3.2)
    panel = drawn.subplots()
    for number, (label, shares) in enumerate(lines[:_MOST]):
        places, values = zip(*shares, strict=True)
        style = _style(number, grows=number % 2 == 0)
        panel.plot(places, values, label=label, marker=_marker(number), **style)
    panel.set_xticks(range(len(_MOMENTS)), _MOMENTS)
    panel.set_xlabel("steps since the growth")
    panel.set_ylabel("inactive new units, %")
    panel.set_ylim(0, max(5.0, panel.get_ylim()[1]))
    _legend(drawn, panel)
    return drawn


def _plain(name: str) -> str:
    """A name that is no formula."""
    return name.replace("$", r"\$")


def _style(number: int, grows: bool) -> dict[str, Any]:
    """Solid lines for what grows, broken ones for what does not."""
    line = "-" if grows else _LINES[1 + number % (len(_LINES) - 1)]
    return {"color": _COLOURS[number % len(_COLOURS)], "linestyle": line}


def _marker(number: int) -> str:
    return _MARKERS[number % len(_MARKERS)]


def _legend(drawn: Figure, panel: Axes) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="#dddddd", linewidth=0.6)
    lines, labels = panel.get_legend_handles_labels()
    if 0 < len(lines) <= _MOST:
        panel.legend(fontsize=8, frameon=False)
    elif lines:
        # More names than a panel has room for stand below it, on paper of their own.
        columns = max(1, _LETTERS // (max(map(len, labels)) + 8))
        rows = math.ceil(len(lines) / columns)
        drawn.set_figheight(drawn.get_figheight() + _ROW * rows)
        drawn.legend(
            lines,
            labels,
            loc="outside lower center",
            ncols=columns,
            fontsize=8,
            frameon=False,
        )
