"""One HTML file that shows runs: figures, growths and a table that can be sorted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from meristem.report import figures
from meristem.report.records import Record


def write(
    records: Sequence[Record], path: Path, title: str = "Meristem report"
) -> Path:
    """Write the report of some runs.

    The file is whole in itself: no network, no other file. Figures are SVG, lines are
    told apart without colour, and without scripts only the sorting is missing.

    Args:
        records: The runs, in the order in which they are shown.
        path: The file to write.
        title: Its heading.

    Raises:
        ImportError: matplotlib is not installed.
    """
    style = resources.files("meristem.report").joinpath("page.css").read_text("utf-8")
    script = resources.files("meristem.report").joinpath("page.js").read_text("utf-8")
    body = "\n".join(_sections(records))
    path.write_text(
        "<!doctype html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{style}</style></head>\n"
        f"<body><main><h1>{escape(title)}</h1>\n{body}\n</main>\n"
        f"<script>{script}</script></body></html>\n",
        encoding="utf-8",
    )
    return path


def _sections(records: Sequence[Record]) -> Iterator[str]:
    yield _section("Runs", _table(records))
    keys = []
    for key, smaller in (("loss", True), ("accuracy", False)):
        if any(record.final(key) is not None for record in records):
            keys.append((key, smaller))
    for key, _ in keys:
        title = f"{records[0].named(key).capitalize()} over the cost of training"
        told = "Solid lines grow; an upright mark stands before and after a growth."
        drawn = figures.svg(figures.curves(records, key), title)
        yield _section(title, f"<p>{told}</p>{drawn}")
    if keys and len(records) > 1 and all(one.last.flops is not None for one in records):
        key, smaller = keys[-1]
        title = f"{records[0].named(key).capitalize()} against size and cost"
        drawn = figures.svg(figures.pareto(records, key, smaller), title)
        yield _section(
            title,
            f"<p>The grey line joins the runs that no cheaper one beats.</p>{drawn}",
        )
    for record in records:
        if record.growths:
            one = f", the first of {record.seeds} seeds" if record.seeds > 1 else ""
            yield _section(f"How {record.name} grew{one}", _grown(record))
    for record in records:
        if record.notes:
            yield _section(record.name, _notes(record.notes))


def _section(title: str, inside: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{inside}\n</section>"


def _table(records: Sequence[Record]) -> str:
    """All runs; a click on a heading sorts by it. Columns without a figure are left out."""
    rows = [_figures(record) for record in records]
    kept = [name for name in rows[0] if any(row[name][0] is not None for row in rows)]
    head = "".join(
        f'<th scope="col"><button type="button">{escape(name)}</button></th>'
        for name in ("run", *kept)
    )
    lines = []
    for record, row in zip(records, rows, strict=True):
        seeds = f", mean of {record.seeds}" if record.seeds > 1 else ""
        cells = "".join(_cell(*row[name]) for name in kept)
        lines.append(
            f'<tr><th scope="row">{escape(record.name)}{seeds}</th>{cells}</tr>'
        )
    body = "\n".join(lines)
    return (
        '<div class="wide"><table class="sorted"><thead><tr>'
        f"{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>"
    )


def _figures(record: Record) -> dict[str, tuple[float | None, str]]:
    """The figures of one row by column, with the form in which they are shown."""
    flops, share = record.last.flops, None
    if record.growth_flops is not None and flops:
        share = 100 * record.growth_flops / flops
    return {
        record.score: (record.final("accuracy"), "{:.4f}"),
        "loss": (record.final("loss"), "{:.4f}"),
        "parameters": (record.parameters, "{:,.0f}"),
        "training FLOPs": (flops, "{:.3g}"),
        "of it growth": (share, "{:.1f} %"),
        "growths": (len(record.growths), "{}"),
        "seconds": (record.seconds, "{:.1f}"),
    }


def _cell(value: float | None, form: str) -> str:
    if value is None:
        return '<td data-value="">–</td>'
    return f'<td data-value="{value}">{form.format(value)}</td>'


def _grown(record: Record) -> str:
    parts = [
        figures.svg(figures.sizes(record), f"Sizes of {record.name} over the steps")
    ]
    drawn = figures.health(record)
    if drawn is not None:
        parts.append("<h3>Health of the new units</h3>")
        parts.append(figures.svg(drawn, f"Inactive new units of {record.name}"))
    rows = "\n".join(map(_growth, record.growths))
    parts.append(
        '<h3>Growths</h3><div class="wide"><table class="growths"><thead>'
        "<tr><th>step</th><th>what grew"
        "</th><th>parameters</th><th>outputs moved by</th><th>FLOPs</th><th>votes and "
        f"notes</th></tr></thead><tbody>\n{rows}\n</tbody></table></div>"
    )
    return "\n".join(parts)


def _growth(growth: Mapping[str, Any]) -> str:
    changed = []
    for name, after in growth["after"].items():
        changed.append(f"{name} {growth['before'][name]} → {after}")
    told = [f"{name}: {_votes(votes)}" for name, votes in growth["votes"].items()]
    told += [f"{name}: {note}" for name, note in growth["notes"].items()]
    sizes, change = growth["parameters"], growth["max_change"]
    cells = (
        "–" if growth["step"] is None else str(growth["step"]),
        _lines(changed),
        "–" if sizes is None else "{:,} → {:,}".format(*sizes),
        "–" if change is None else f"{change:.1e}",
        f"{growth['flops']:.2g}",
        _lines(told) or "–",
    )
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _lines(texts: Sequence[str]) -> str:
    """A list of texts; a long one is folded."""
    shown = "<br>".join(escape(text) for text in texts)
    if len(texts) <= 6:
        return shown
    return f"<details><summary>{len(texts)} axes</summary>{shown}</details>"


def _votes(votes: Any) -> str:
    if not isinstance(votes, Mapping):
        return str(votes)
    return ", ".join(f"{name} {value:.3g}" for name, value in votes.items())


def _notes(notes: Mapping[str, str]) -> str:
    return "\n".join(
        f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"
        for title, text in notes.items()
    )
