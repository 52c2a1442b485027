"""Is the advice right? Every growth of a suite, advised on and measured.

    MERISTEM_DATA=... python benchmarks/best/advise.py cpu
    MERISTEM_DATA=... python benchmarks/best/advise.py war_and_peace

The probes of a setting cost about 5 % of its run; what they have shown is kept, one file per setting,
under results/advise, and needs no data to be read again. Measured is the compute multiplier
against the frontier of the suite. The advice is right where it and the measurement lie on the
same side of 1, or where the measured interval holds 1.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from meristem.experiments import suite, tables
from meristem.experiments.advise import Advice, advice_of
from meristem.experiments.frontier import Multiplier
from meristem.experiments.probes import Probed, probed

HERE = Path(__file__).parent
OUT = HERE / "results" / "advise"


def settings(comparison: suite.Comparison) -> Iterator[suite.Row]:
    """The growths of a suite that are plans of their own, not a change of one."""
    for task in comparison.suite.tasks:
        for row in comparison.rows(task):
            if row.baseline is None and row.title.endswith(("TFLOP", ", shared")):
                yield row


def stored(comparison: suite.Comparison, row: suite.Row) -> Path:
    """Where the probes of a setting are kept."""
    return OUT / comparison.path.stem / f"{suite.slug(row.title)}.json"


def kept(path: Path) -> Advice:
    """The advice that stored probes give."""
    return advice_of(Probed(**json.loads(path.read_text())))


@dataclass(frozen=True)
class Verdict:
    """What was advised on a setting, and what its run has measured."""

    setting: str
    advice: Advice
    found: Multiplier

    @property
    def advised(self) -> Multiplier:
        """What the advice expects of the moment that the setting names."""
        assert self.advice.as_planned is not None
        return self.advice.as_planned

    @property
    def is_right(self) -> bool:
        same = (self.advised.value > 1) == (self.found.value > 1)
        return same or self.found.low <= 1 <= self.found.high

    @property
    def is_within(self) -> bool:
        return self.advised.low <= self.found.value <= self.advised.high


def verdicts(comparison: suite.Comparison) -> Iterator[Verdict]:
    """A verdict on every setting whose probes are kept."""
    sweeps = {
        task: tables.sweep_of(comparison, task) for task in comparison.suite.tasks
    }
    for row in settings(comparison):
        path = stored(comparison, row)
        if path.exists():
            found = tables.saved(sweeps[row.task], tables.of(comparison, row))
            yield Verdict(row.title, kept(path), found)


def probe(comparison: suite.Comparison) -> None:
    """Run the probes that are not kept yet."""
    for row in settings(comparison):
        path = stored(comparison, row)
        if path.exists():
            continue
        experiment = comparison.experiment(row, comparison.suite.seeds[0])
        name = suite.slug(row.title)
        path.parent.mkdir(parents=True, exist_ok=True)
        seen = probed(experiment, name, OUT / "probes", None, lambda *told: None)
        path.write_text(json.dumps(asdict(seen)) + "\n")
        print(path, file=sys.stderr)


def main() -> None:
    named = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    comparison = suite.read(HERE / f"{named}.toml")
    comparison.load()
    probe(comparison)
    print(
        "| setting | targets per parameter | advised, as planned | measured | right |"
    )
    print("|---|---|---|---|---|")
    for verdict in verdicts(comparison):
        right = "yes" if verdict.is_right else "no"
        print(
            f"| {verdict.setting} | {verdict.advice.tokens_per_parameter:.0f} | "
            f"{verdict.advised} | {verdict.found} | {right} |"
        )


if __name__ == "__main__":
    main()
