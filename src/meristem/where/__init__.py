"""Where to grow: how many of the new units each axis gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from meristem.axis import Axis
from meristem.values import Proposal


@dataclass(frozen=True)
class Choice:
    """What there is to choose from: axes, `total` units to give away, how often the net has grown.

    `proposals` (one per axis, for as many units as it may get) and `flops_per_unit` are there for choices that
    `reads_gains`.
    """

    axes: Sequence[Axis]
    total: int
    growths: int = 0
    proposals: Mapping[str, Proposal] = field(default_factory=dict)
    flops_per_unit: Mapping[str, float] = field(default_factory=dict)


class Where(Protocol):
    """A rule that gives `total` units to the axes."""

    @property
    def reads_gains(self) -> bool: ...

    def share(self, choice: Choice) -> dict[str, int]: ...


def _rounded(axes: Sequence[Axis], ideal: Mapping[str, float], total: int) -> dict[str, int]:
    """Counts in whole multiples near `ideal`, summing to `total` as nearly as the multiples allow, never above it."""
    counts = {axis.name: int(ideal[axis.name] // axis.multiple) * axis.multiple for axis in axes}
    left = total - sum(counts.values())
    for axis in sorted(axes, key=lambda a: counts[a.name] - ideal[a.name]):
        if axis.multiple <= left:
            counts[axis.name] += axis.multiple
            left -= axis.multiple
    return {name: count for name, count in counts.items() if count}


@dataclass(frozen=True)
class Uniform:
    """Every axis gets the same number of units.

    Examples:
        >>> Uniform()
        Uniform()
    """

    @property
    def reads_gains(self) -> bool:
        return False

    def share(self, choice: Choice) -> dict[str, int]:
        """Equal counts."""
        each = choice.total / len(choice.axes)
        return _rounded(choice.axes, {axis.name: each for axis in choice.axes}, choice.total)


@dataclass(frozen=True)
class Proportional:
    """Every axis grows by the same fraction of its size.

    Examples:
        >>> Proportional()
        Proportional()
    """

    @property
    def reads_gains(self) -> bool:
        return False

    def share(self, choice: Choice) -> dict[str, int]:
        """Counts in proportion to the present sizes."""
        whole = sum(axis.size for axis in choice.axes)
        ideal = {axis.name: choice.total * axis.size / whole for axis in choice.axes}
        return _rounded(choice.axes, ideal, choice.total)


@dataclass(frozen=True)
class RoundRobin:
    """One axis per growth, each in turn.

    Examples:
        >>> RoundRobin()
        RoundRobin()
    """

    @property
    def reads_gains(self) -> bool:
        return False

    def share(self, choice: Choice) -> dict[str, int]:
        """All units to one axis."""
        axis = choice.axes[choice.growths % len(choice.axes)]
        return _rounded([axis], {axis.name: float(choice.total)}, choice.total)


@dataclass(frozen=True)
class ByGain:
    """The units with the largest predicted gain win, over all axes together.

    Args:
        per_flop: Compare gains per floating-point operation that a unit adds.

    Examples:
        >>> ByGain(per_flop=True)
        ByGain(per_flop=True)
    """

    per_flop: bool = False

    @property
    def reads_gains(self) -> bool:
        return True

    def share(self, choice: Choice) -> dict[str, int]:
        """Counts by gain, taken greedily."""
        ranked = []
        for axis in choice.axes:
            proposal = choice.proposals[axis.name]
            if not proposal.gains:
                raise ValueError("where.ByGain needs a method that predicts gains. hint: how.GradMax does")
            cost = choice.flops_per_unit[axis.name] if self.per_flop else 1.0
            ranked += [(gain / cost, axis) for gain in proposal.gains]
        counts: dict[str, int] = {}
        left = choice.total
        for _, axis in sorted(ranked, key=lambda pair: -pair[0]):
            if axis.multiple <= left:
                counts[axis.name] = counts.get(axis.name, 0) + axis.multiple
                left -= axis.multiple
        return counts


PLACES = {"uniform": Uniform, "proportional": Proportional, "round_robin": RoundRobin, "by_gain": ByGain}
"""Every choice by its name in a configuration file."""
