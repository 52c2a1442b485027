"""The record of one growth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from meristem.core.change import TensorChange

LINEAGE = "_meristem_lineage"
"""The attribute in which a model keeps its growths."""


SHOWN = 4
"""Axes in the short form of a growth."""


@dataclass(repr=False)
class Growth:
    """What one growth did. Falsy when nothing grew.

    Attributes:
        added: Units added (or, for `narrow_`, removed: negative) by axis.
        before, after: Sizes by axis.
        parameters: Count over the whole model, before and after.
        max_change: Largest change of an output on the example, in eval mode, relative
            to the largest output.
        seconds: What the growth took.
        flops: What the growth cost, in floating-point operations: votes, proposals,
            adjustment, verification.
        health_flops: What later looks at the health of its units cost; diagnostics,
            like an evaluation.
        health: Figures of the new units by moment and axis (see `meristem.health`):
            "insertion", "adjust" where the method adjusts, "1", "10", "100" and "1000"
            steps later, "trained" at the end of a stage; `health["loss"]`, 200 steps
            later, holds the mean loss `before`, and as shares of it the `noise` of its
            running mean, its `spike` and how much it stayed above at `least`; and the
            `steps_to_recover`. Completed by the grower.
        votes: What `where` decided on, by axis, where it measured.
        notes: What the methods said, by axis.
        blocks: The places of new blocks, by depth axis, as they were right after the
            growth.
        rows: The new rows, by end: words of a vocabulary, classes.
        stale: Numbers beside the traced forward that hold the old size.
        fresh: The parameters that were not there before, by name: those of new blocks.
        resized: The parameters that have new entries beside old ones, by name; see
            `meristem.young`.
        replaced: Old parameter -> new one, where torch did not allow to keep the
            object. Empty as a rule.
        origin: The plan and the new weights, for `meristem.replay_`; not in `json`.
    """

    added: dict[str, int]
    before: dict[str, int]
    after: dict[str, int]
    parameters: tuple[int, int]
    max_change: float
    seconds: float
    flops: int = 0
    health_flops: int = 0
    step: int | None = None
    health: dict[str, Any] = field(default_factory=dict)
    votes: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    blocks: dict[str, list[int]] = field(default_factory=dict)
    rows: dict[str, list[int]] = field(default_factory=dict)
    stale: list[str] = field(default_factory=list)
    fresh: dict[str, nn.Parameter] = field(default_factory=dict)
    resized: dict[str, TensorChange] = field(default_factory=dict)
    replaced: dict[nn.Parameter, nn.Parameter] = field(default_factory=dict)
    origin: Any = field(default=None, compare=False)

    def __bool__(self) -> bool:
        return any(self.added.values())

    def __repr__(self) -> str:
        axes = [f"{n}: {self.before[n]} -> {self.after[n]}" for n in self.after]
        more = f" and {len(axes) - SHOWN} more" if len(axes) > SHOWN else ""
        changed = ", ".join(axes[:SHOWN]) + more
        step = "" if self.step is None else f" at step {self.step}"
        parameters = "{:,} -> {:,}".format(*self.parameters)
        return (
            f"Growth({changed}{step}; parameters {parameters}; outputs moved by "
            f"{self.max_change:.1e})"
        )

    def units(self) -> dict[str, Sequence[int]]:
        """The new units by axis: the last ones of a width, the new blocks of a depth."""
        return {
            name: self.blocks.get(name, range(self.before[name], self.after[name]))
            for name in self.added
        }

    def json(self) -> dict[str, Any]:
        """Everything but tensors and the origin, in plain types."""
        left_out = ("fresh", "resized", "replaced", "origin")
        return {key: value for key, value in vars(self).items() if key not in left_out}
