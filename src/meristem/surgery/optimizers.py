"""Optimizer state grows with its parameter, by exact rules; a state tensor that no rule
covers raises.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from meristem.core.axis import Axis
from meristem.core.change import Plan, TensorChange, index
from meristem.core.errors import OptimizerError
from meristem.core.offer import Offer
from meristem.surgery.tensors import (
    carry,
    copied_slots,
    new_units,
    shared,
    sources_with_copies,
)

Moment = Literal["first", "second"]

STATE_RULES: dict[type[Optimizer], dict[str, Moment]] = {
    torch.optim.SGD: {"momentum_buffer": "first"},
    torch.optim.Adam: {
        "exp_avg": "first",
        "exp_avg_sq": "second",
        "max_exp_avg_sq": "second",
    },
    torch.optim.AdamW: {
        "exp_avg": "first",
        "exp_avg_sq": "second",
        "max_exp_avg_sq": "second",
    },
}
"""Which state tensors follow their parameter, by optimizer class: "first" moments scale
like a gradient, "second" moments like its square. Add a row for an optimizer of your
own; scalars (`step`) need none.
"""


def check_ownership(
    optimizers: Sequence[Optimizer], trainable: Mapping[str, Tensor]
) -> None:
    """Raise unless every trainable parameter that changes belongs to one of the
    optimizers.
    """
    owned = {
        id(p)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }
    missing = [
        name for name, parameter in trainable.items() if id(parameter) not in owned
    ]
    if missing and optimizers:
        raise OptimizerError(
            "the optimizer does not hold "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}, which "
            "would grow. "
            "hint: build the optimizer from the model's own parameters, or pass every "
            "optimizer in a list"
        )


def check_separable(optimizers: Sequence[Optimizer]) -> None:
    """Raise where an optimizer keeps state over all its parameters together, which new
    ones cannot join.
    """
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            wrong = [
                k
                for k, v in state.items()
                if isinstance(v, Tensor) and v.dim() and v.shape != parameter.shape
            ]
            if wrong:
                raise OptimizerError(
                    f"{type(optimizer).__name__} state {wrong[0]!r} does not have its "
                    "parameter's shape; no rule says how it "
                    "takes new blocks in. hint: grow before the first step, or make a "
                    "new optimizer after the growth"
                )


def grown_state(
    optimizer: Optimizer,
    parameter: Tensor,
    change: TensorChange,
    plan: Plan,
    axes: Sequence[Axis],
    offers: Sequence[Offer],
    warm: bool,
) -> dict[str, Any]:
    """The state of one parameter at its new size; `warm` starts new second moments at
    the mean of the old ones.
    """
    result: dict[str, Any] = {}
    for key, value in optimizer.state[parameter].items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            result[key] = value
            continue
        moment = rule_for(optimizer, key)
        if tuple(value.shape) != change.before:
            raise OptimizerError(
                f"{type(optimizer).__name__} state {key!r} of {change.name} has shape "
                f"{tuple(value.shape)}, not the "
                f"parameter's {change.before}; no rule covers it"
            )
        result[key] = _grown_moment(value, moment, change, plan, axes, offers, warm)
    return result


def rule_for(optimizer: Optimizer, key: str) -> Moment:
    """The rule for a state tensor, from the optimizer's class or the nearest base class
    that has a row.
    """
    for kind in type(optimizer).__mro__:
        if kind in STATE_RULES and key in STATE_RULES[kind]:
            return STATE_RULES[kind][key]
    raise OptimizerError(
        f"no rule says how the state {key!r} of {type(optimizer).__name__} grows. "
        "hint: register one, for example "
        f"meristem.STATE_RULES[{type(optimizer).__name__}] = {{{key!r}: 'first'}}, or "
        "'second' if it scales like the square "
        "of a gradient"
    )


def _grown_moment(
    value: Tensor,
    moment: Moment,
    change: TensorChange,
    plan: Plan,
    axes: Sequence[Axis],
    offers: Sequence[Offer],
    warm: bool,
) -> Tensor:
    """One state tensor at its new size.

    A copy's fan-in keeps (a m, a^2 v) for its share a, its fan-out (m, v).
    """
    copied = copied_slots(axes, {offer.axis: offer for offer in offers}, change.name)
    grown = carry(value, sources_with_copies(plan, change, copied))
    if warm and moment == "second":
        grown = _warmed(
            grown,
            value.mean(),
            change,
            plan,
            axes,
            {axis.name for axis, _, _ in copied},
        )
    for axis, slot, copies in copied:
        if slot.role != "fan_out":
            grown = shared(
                grown,
                plan,
                axis,
                slot,
                copies.share if moment == "first" else copies.share.square(),
            )
    return grown


def _warmed(
    grown: Tensor,
    level: Tensor,
    change: TensorChange,
    plan: Plan,
    axes: Sequence[Axis],
    copied: set[str],
) -> Tensor:
    """`grown` with every new entry that is not a copy set to `level`."""
    for axis in axes:
        if axis.name in copied:
            continue
        for slot in axis.slots:
            if slot.name == change.name:
                where = index(new_units(plan, axis.name, slot.place).ravel()).to(
                    grown.device
                )
                grown = grown.index_fill(slot.dim, where, level.item())
    return grown
