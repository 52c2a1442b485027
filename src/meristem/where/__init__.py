"""Where to grow: how many of the new units each axis gets."""

from __future__ import annotations

from dataclasses import dataclass

from meristem.core.offer import Share
from meristem.methods import Choice, Where, check_flag
from meristem.where.counts import rounded, taken
from meristem.where.senn import SENN
from meristem.where.svod import SVoD

__all__ = [
    "PLACES",
    "SENN",
    "ByGain",
    "Choice",
    "Proportional",
    "RoundRobin",
    "SVoD",
    "Uniform",
    "Where",
]


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

    @property
    def weighs_kinds(self) -> bool:
        return False

    def share(self, choice: Choice) -> Share:
        """Equal counts."""
        each = choice.total / len(choice.axes)
        return rounded(
            choice.axes, {axis.name: each for axis in choice.axes}, choice.total
        )


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

    @property
    def weighs_kinds(self) -> bool:
        return False

    def share(self, choice: Choice) -> Share:
        """Counts in proportion to the present sizes."""
        whole = sum(axis.size for axis in choice.axes)
        ideal = {axis.name: choice.total * axis.size / whole for axis in choice.axes}
        return rounded(choice.axes, ideal, choice.total)


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

    @property
    def weighs_kinds(self) -> bool:
        return False

    def share(self, choice: Choice) -> Share:
        """All units to one axis."""
        axis = choice.axes[choice.growths % len(choice.axes)]
        return rounded([axis], {axis.name: float(choice.total)}, choice.total)


@dataclass(frozen=True)
class ByGain:
    """The units with the largest predicted gain win, over all axes together.

    Args:
        per_flop: Compare gains per floating-point operation that a unit adds. Units and
            blocks then compete: depths take part too.

    Examples:
        >>> ByGain(per_flop=True)
        ByGain(per_flop=True)
    """

    per_flop: bool = False

    def __post_init__(self) -> None:
        check_flag("ByGain", per_flop=self.per_flop)

    @property
    def reads_gains(self) -> bool:
        return True

    @property
    def weighs_kinds(self) -> bool:
        return self.per_flop

    def share(self, choice: Choice) -> Share:
        """Counts by gain, taken greedily."""
        ranked = []
        for axis in choice.axes:
            offer = choice.offers[axis.name]
            if not offer.gains:
                raise ValueError(
                    "where.ByGain needs a method that predicts gains. hint: "
                    "how.GradMax does for widths, how.ZeroBlock for depths"
                )
            cost = choice.flops_per_unit[axis.name] if self.per_flop else 1.0
            ranked += [(gain / cost, axis) for gain in offer.gains]
        return Share(taken(ranked, choice.total))


PLACES = {
    "uniform": Uniform,
    "proportional": Proportional,
    "round_robin": RoundRobin,
    "by_gain": ByGain,
    "senn": SENN,
    "svod": SVoD,
}
"""Every choice by its name in a configuration file."""


def __dir__() -> list[str]:
    return __all__
