"""How much to grow at once: amounts, and what a budget leaves of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from meristem.core.axis import Axis
from meristem.core.budget import Budget
from meristem.core.change import Plan
from meristem.structure import Structure, apart, resolve, sized

Amount = int | float | Sequence[int | float] | Mapping[str, int]
"""Units over all axes per growth, or a fraction of the present widths; a list has one
entry per growth; a mapping names the units of each axis.
"""
# Bisections of the share of a wish that a budget allows.
_HALVINGS = 24


def check_amount(amount: Amount) -> None:
    """Raise unless every part of an amount is positive."""
    if isinstance(amount, str) or not isinstance(amount, (Real, Sequence, Mapping)):
        raise TypeError(
            "amount is a number of units, a fraction of the present widths, a list of "
            f"either or a dict {{axis: units}}; got {amount!r}"
        )
    for one in _parts(amount):
        is_number = isinstance(one, (int, float)) and not isinstance(one, bool)
        if not is_number or one <= 0:
            raise ValueError(
                "amount must be positive: units, or a fraction of the present widths; "
                f"got {one!r}"
            )
        if isinstance(amount, Mapping) and not isinstance(one, int):
            raise ValueError(
                f"amount by axis is a number of units; got {dict(amount)!r}"
            )


def is_fraction(amount: Amount) -> bool:
    """Whether an amount is a fraction of the present widths, at every growth or one."""
    return not isinstance(amount, Mapping) and any(
        isinstance(one, float) for one in _parts(amount)
    )


def _parts(amount: Amount) -> list[Any]:
    if isinstance(amount, Mapping):
        return list(amount.values())
    return list(amount) if isinstance(amount, Sequence) else [amount]


def total_units(amount: Amount, axes: Sequence[Axis], growths: int) -> int | None:
    """Units to give away at this growth, or None where a list of amounts has ended.

    Where amounts are named by axis, there is nothing to give away.
    """
    if isinstance(amount, Mapping):
        return 0
    now: Any = amount
    if isinstance(amount, Sequence):
        if growths >= len(amount):
            return None
        now = amount[growths]
    # A fraction is of all the units there are, not of each axis.
    if isinstance(now, float):
        return round(now * sum(axis.size for axis in axes))
    return int(now)


def least_step(axis: Axis, round_to: int) -> int:
    """The fewest units by which an axis can grow."""
    # A step must respect the granularity of the axis and of the hardware.
    step = math.lcm(axis.multiple, round_to) if axis.slots else 1
    return step - axis.size % step


def allows(budget: Budget, structure: Structure, counts: Mapping[str, int]) -> bool:
    """Whether a budget has room for so many more units."""
    plan = sized(structure, counts)
    # With what grows together with a named axis.
    after = plan.after
    for name, largest in budget.sizes.items():
        if after.get(name, 0) > largest:
            return False
    units, _ = apart(list(structure.axes.values()))
    held = sum(after.get(axis.name, axis.size) for axis in units)
    limits = (
        (budget.parameters, plan.parameters[1]),
        (budget.flops, plan.flops[1] / structure.batch),
        (budget.units, held),
    )
    return all(limit is None or value <= limit for limit, value in limits)


def fitting_plan(
    budget: Budget,
    structure: Structure,
    axes: Mapping[str, Axis],
    counts: Mapping[str, int],
    round_to: int,
) -> Plan | None:
    """The plan for the largest share of some counts that a budget allows.

    None where not one unit fits.
    """

    def cut(fraction: float) -> dict[str, int]:
        result = {}
        for name, count in counts.items():
            kept = _cut(axes[name], int(count * fraction), budget, round_to)
            if kept > 0:
                result[name] = kept
        return result

    # Most growths fit whole; only the others are bisected.
    everything = cut(1.0)
    if everything and allows(budget, structure, everything):
        return resolve(structure, everything)
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        trial = cut(middle)
        if not trial or allows(budget, structure, trial):
            low = middle
        else:
            high = middle
    fitting = cut(low)
    return resolve(structure, fitting) if fitting else None


def _cut(axis: Axis, count: int, budget: Budget, round_to: int) -> int:
    """The part of a count that a largest size, rounding and multiples leave."""
    largest = budget.sizes.get(axis.name)
    if largest is not None:
        count = min(count, largest - axis.size)
    target = axis.size + count
    if axis.slots:
        # Rounded down: a budget is an upper limit.
        target -= target % round_to
    return (target - axis.size) // axis.multiple * axis.multiple
