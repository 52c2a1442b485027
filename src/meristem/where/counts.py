"""Whole counts near ideal ones, and the counts of the best."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from meristem.core.axis import Axis
from meristem.core.offer import Share


def rounded(axes: Sequence[Axis], ideal: Mapping[str, float], total: int) -> Share:
    """Counts in whole multiples near `ideal`, which sum to `total`.

    As nearly as the multiples allow, and never above it.
    """
    counts = {}
    for axis in axes:
        counts[axis.name] = int(ideal[axis.name] // axis.multiple) * axis.multiple
    left = total - sum(counts.values())
    for axis in sorted(axes, key=lambda a: counts[a.name] - ideal[a.name]):
        if axis.multiple <= left:
            counts[axis.name] += axis.multiple
            left -= axis.multiple
    return Share({name: count for name, count in counts.items() if count})


def taken(ranked: Iterable[tuple[float, Axis]], total: int) -> dict[str, int]:
    """Counts of the largest values, as long as steps fit into `total`.

    Each value is worth one step of its axis.
    """
    counts: dict[str, int] = {}
    for _, axis in sorted(ranked, key=lambda pair: -pair[0]):
        if axis.multiple <= total:
            counts[axis.name] = counts.get(axis.name, 0) + axis.multiple
            total -= axis.multiple
    return counts
