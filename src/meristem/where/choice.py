"""What a rule of distribution is given, and how counts are taken from a ranking."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from meristem.core.axis import Axis
from meristem.core.offer import Proposal, Share
from meristem.view import View


@dataclass(frozen=True)
class Choice:
    """What there is to choose from: axes, `total` units to give away, how often the net has grown, and at how many checks in
    a row since then nothing was worth growing.

    `proposals` (one per axis, for as many units as it may get) are there for rules that `reads_gains`; `view` for rules
    that measure.
    """

    axes: Sequence[Axis]
    total: int
    growths: int = 0
    refusals: int = 0
    proposals: Mapping[str, Proposal] = field(default_factory=dict)
    flops_per_unit: Mapping[str, float] = field(default_factory=dict)
    parameters_per_unit: Mapping[str, float] = field(default_factory=dict)
    view: View | None = None


class Where(Protocol):
    """A rule that gives `total` units to the axes.

    `reads_gains` says that it looks at the proposals, `weighs_kinds` that it can weigh a unit of a width against a block of a
    depth; a rule that cannot gets axes of one sort.
    """

    @property
    def reads_gains(self) -> bool: ...

    @property
    def weighs_kinds(self) -> bool: ...

    def share(self, choice: Choice) -> Share: ...


def rounded(axes: Sequence[Axis], ideal: Mapping[str, float], total: int) -> Share:
    """Counts in whole multiples near `ideal`, summing to `total` as nearly as the multiples allow, never above it."""
    counts = {axis.name: int(ideal[axis.name] // axis.multiple) * axis.multiple for axis in axes}
    left = total - sum(counts.values())
    for axis in sorted(axes, key=lambda a: counts[a.name] - ideal[a.name]):
        if axis.multiple <= left:
            counts[axis.name] += axis.multiple
            left -= axis.multiple
    return Share({name: count for name, count in counts.items() if count})


def taken(ranked: Iterable[tuple[float, Axis]], total: int) -> dict[str, int]:
    """Counts of the largest values, each worth one step of its axis, as long as steps fit into `total`."""
    counts: dict[str, int] = {}
    for _, axis in sorted(ranked, key=lambda pair: -pair[0]):
        if axis.multiple <= total:
            counts[axis.name] = counts.get(axis.name, 0) + axis.multiple
            total -= axis.multiple
    return counts
