"""What a grower shows of itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meristem.core.growth import Growth
from meristem.report.records import Record, of_training

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Shown:
    """The looks of a `Grower`: in one line, as a figure, as a page."""

    def __repr__(self: Any) -> str:
        history: Sequence[Growth] = self.history
        sizes = {name: size for one in history for name, size in one.after.items()}
        grown = f", sizes {sizes}" if sizes else ""
        ended = f", done: {self.reason}" if self.done else ""
        return (
            f"Grower({type(self.model).__name__}, {_short(self.when)}, step "
            f"{self.clock.step}, growths {len(history)}{grown}{ended})"
        )

    def record(self: Any, name: str = "this run") -> Record:
        """The run so far, as reports show it: training loss, metric, sizes, growths."""
        return of_training(
            name,
            self.model,
            self.calendar.curve.points(),
            self.metrics,
            self.history,
            self.clock.growing,
        )

    def plot(self: Any) -> Figure:
        """The training loss and the sizes over the steps, as a matplotlib figure.

        Raises:
            ImportError: matplotlib is not installed.

        Examples:
            >>> grower.plot().savefig("growth.png")  # doctest: +SKIP
        """
        from meristem.report.figures import overview

        return overview(self.record())

    def report(
        self: Any, path: str | PathLike[str], title: str = "Meristem report"
    ) -> Path:
        """Write the run so far as one HTML file that needs nothing else.

        Args:
            path: The file.
            title: Its heading.

        Returns:
            The path.

        Raises:
            ImportError: matplotlib is not installed.

        Examples:
            >>> grower.report("run.html")  # doctest: +SKIP
        """
        from meristem.report import write

        return write([self.record()], Path(path), title)


def _short(part: object) -> str:
    """A dataclass as it is written: what differs from its defaults."""
    said = []
    for one in fields(part) if is_dataclass(part) else ():
        value = getattr(part, one.name)
        if value != one.default:
            said.append(f"{one.name}={value!r}")
    return f"{type(part).__name__}({', '.join(said)})"
