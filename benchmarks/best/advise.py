"""Is the advice right? Every growth of cpu.toml, advised on and measured.

    MERISTEM_DATA=... python benchmarks/best/advise.py

The probes of a setting cost 15 % of its run; what they have shown is kept, one file per setting,
under results/advise, and needs no data to be read again. Measured is the compute multiplier
against the frontier of the suite. The advice is right where it and the measurement lie on the
same side of 1, or where the measured interval holds 1.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from meristem.experiments import suite, tables
from meristem.experiments.advise import Advice, advice_of
from meristem.experiments.frontier import Multiplier
from meristem.experiments.probes import SHARE, Probed, probed

HERE = Path(__file__).parent
OUT = HERE / "results" / "advise"


def settings(comparison: suite.Comparison) -> Iterator[suite.Row]:
    """The growths of a suite that are plans of their own, not a change of one."""
    for task in comparison.suite.tasks:
        for row in comparison.rows(task):
            if row.baseline is None and row.title.endswith("TFLOP"):
                yield row


def kept(path: Path) -> Advice:
    """The advice that stored probes give."""
    return advice_of(Probed(**json.loads(path.read_text())))


def is_right(advised: Multiplier, found: Multiplier) -> bool:
    same = (advised.value > 1) == (found.value > 1)
    return same or found.low <= 1 <= found.high


def main() -> None:
    comparison = suite.read(HERE / "cpu.toml")
    comparison.load()
    OUT.mkdir(parents=True, exist_ok=True)
    print(
        "| setting | targets per parameter | advised, as planned | measured | right |"
    )
    print("|---|---|---|---|---|")
    for row in settings(comparison):
        name = suite.slug(row.title)
        path = OUT / f"{name}.json"
        if not path.exists():
            experiment = comparison.experiment(row, comparison.suite.seeds[0])
            seen = probed(experiment, name, OUT / "probes", SHARE, lambda *told: None)
            path.write_text(json.dumps(asdict(seen)) + "\n")
            print(path, file=sys.stderr)
        advice = kept(path)
        swept = tables.sweep_of(comparison, row.task)
        found = tables.saved(swept, tables.of(comparison, row))
        assert advice.as_planned is not None
        right = "yes" if is_right(advice.as_planned, found) else "no"
        print(
            f"| {row.title} | {advice.tokens_per_parameter:.0f} | {advice.as_planned} | "
            f"{found} | {right} |"
        )


if __name__ == "__main__":
    main()
