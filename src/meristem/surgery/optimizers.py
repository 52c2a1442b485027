"""Optimizer state grows with its parameter, by exact rules; a state tensor that no rule
covers raises.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from meristem.core.change import TensorChange, index
from meristem.core.errors import OptimizerError
from meristem.surgery.tensors import Edit, carry, shared, sources_with_copies

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
    """Raise unless every trainable parameter that changes belongs to an optimizer."""
    owned: set[int] = set()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            owned.update(id(parameter) for parameter in group["params"])
    missing = [name for name, p in trainable.items() if id(p) not in owned]
    if missing and optimizers:
        listed = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise OptimizerError(
            f"the optimizer does not hold {listed}, which would grow. hint: build the "
            "optimizer from the model's own parameters, or pass every optimizer in a list"
        )


def check_separable(optimizers: Sequence[Optimizer]) -> None:
    """Raise where an optimizer keeps state over all its parameters together.

    New ones cannot join that.
    """
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if not isinstance(value, Tensor) or not value.dim():
                    continue
                if value.shape != parameter.shape:
                    raise OptimizerError(
                        f"{type(optimizer).__name__} state {key!r} does not have its "
                        "parameter's shape; no rule says how it takes new blocks in. "
                        "hint: grow before the first step, or make a new optimizer "
                        "after the growth"
                    )


def grown_state(
    optimizer: Optimizer,
    parameter: Tensor,
    change: TensorChange,
    edits: Sequence[Edit],
    warm: bool,
) -> dict[str, Any]:
    """The state of one parameter at its new size.

    Args:
        optimizer: The optimizer that holds it.
        parameter: The parameter.
        change: What happens to it.
        edits: What every axis does to it.
        warm: Whether new second moments start at the mean of the old ones.
    """
    result: dict[str, Any] = {}
    for key, value in optimizer.state[parameter].items():
        # Steps and flags do not grow.
        if not isinstance(value, Tensor) or value.dim() == 0:
            result[key] = value
            continue
        moment = rule_for(optimizer, key)
        if tuple(value.shape) != change.before:
            raise OptimizerError(
                f"{type(optimizer).__name__} state {key!r} of {change.name} has shape "
                f"{tuple(value.shape)}, not the parameter's {change.before}; no rule "
                "covers it"
            )
        result[key] = _grown_moment(value, moment, change, edits, warm)
    return result


def rule_for(optimizer: Optimizer, key: str) -> Moment:
    """The rule for a state tensor, from the optimizer's class or the nearest base class
    that has a row.
    """
    # A subclass follows the rules of its base, unless it has its own.
    for kind in type(optimizer).__mro__:
        if kind in STATE_RULES and key in STATE_RULES[kind]:
            return STATE_RULES[kind][key]
    raise OptimizerError(
        f"no rule says how the state {key!r} of {type(optimizer).__name__} grows. "
        "hint: register one, for example "
        f"meristem.STATE_RULES[{type(optimizer).__name__}] = {{{key!r}: 'first'}}, or "
        "'second' if it scales like the square of a gradient"
    )


def _grown_moment(
    value: Tensor,
    moment: Moment,
    change: TensorChange,
    edits: Sequence[Edit],
    warm: bool,
) -> Tensor:
    """One state tensor at its new size.

    A copy's fan-in keeps (a m, a^2 v) for its share a, its fan-out (m, v).
    """
    grown = carry(value, sources_with_copies(change, edits))
    if warm and moment == "second":
        # The mean of the tensor: a zero would let Adam leap.
        level = value.mean().item()
        for edit in edits:
            fresh = edit.where
            if edit.copies is not None:
                fresh = fresh[edit.copies.fresh.numpy()]
            where = index(fresh.ravel()).to(grown.device)
            grown = grown.index_fill(edit.dim, where, level)
    for edit in edits:
        if edit.copies is not None and edit.slot.role != "fan_out":
            share = edit.copies.share
            if moment == "second":
                share = share.square()
            grown = shared(grown, edit, share)
    return grown
