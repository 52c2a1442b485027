"""Optimizer state grows with its parameter, by exact rules; state that no rule covers
raises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from meristem.core.change import TensorChange, index
from meristem.core.errors import OptimizerError
from meristem.surgery.tensors import (
    Edit,
    carry,
    laid_out_like,
    shared,
    sources_with_copies,
)

Rule = Literal[
    "first", "second", "update", "size", "weight", "rows", "columns", "fixed", "reset"
]
"""How a piece of an optimizer's state follows its parameter.

==========  ============================================================================
"first"     scales like a gradient; new entries start at zero
"second"    scales like its square; new entries start at zero, or warm at the mean
"update"    scales like a step of the weights; new entries start at zero
"size"      the size of such a step, always positive; new entries start at the mean
"weight"    weights of another time, or their mean; new entries are those of the weight
"rows"      "second", summed over the last dimension (which is 1, or missing)
"columns"   "second", summed over the last dimension but one
"fixed"     does not depend on the parameter's size
"reset"     the state of the parameter starts anew: a preconditioner
==========  ============================================================================
"""

_ADAM: dict[str, Rule] = {
    "exp_avg": "first",
    "exp_avg_sq": "second",
    "max_exp_avg_sq": "second",
}
_BY_NAME: dict[str, Rule] = _ADAM | {
    "momentum_buffer": "first",
    "momentum": "first",
    "exp_avg_var": "second",
    "exp_avg_slow": "first",
    "exp_avg_diff": "first",
    "previous_grad": "first",
    "exp_inf": "first",
    "square_avg": "second",
    "acc_delta": "size",
    "exp_avg_sq_row": "rows",
    "exp_avg_sq_col": "columns",
    "exp_avg_res_row": "rows",
    "exp_avg_res_col": "columns",
    "slow_buffer": "weight",
    "z": "weight",
    "p0": "weight",
    "x0": "weight",
    "s": "first",
    "Q": "reset",
    "GG": "reset",
}
"""What packages of optimizers mean by the names of their states."""

STATE_RULES: dict[type[Optimizer] | str, dict[str, Rule]] = {
    torch.optim.SGD: {"momentum_buffer": "first"},
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    torch.optim.SparseAdam: _ADAM,
    torch.optim.NAdam: _ADAM,
    torch.optim.RAdam: _ADAM,
    torch.optim.Adamax: {"exp_avg": "first", "exp_inf": "first"},
    torch.optim.Adagrad: {"sum": "second"},
    torch.optim.Adadelta: {"square_avg": "second", "acc_delta": "size"},
    torch.optim.RMSprop: {
        "square_avg": "second",
        "momentum_buffer": "update",
        "grad_avg": "first",
    },
    torch.optim.Rprop: {"prev": "first", "step_size": "size"},
    torch.optim.ASGD: {"ax": "weight"},
    torch.optim.Adafactor: {
        "row_var": "rows",
        "col_var": "columns",
        "variance": "second",
    },
    torch.optim.Muon: {"momentum_buffer": "first"},
    "bitsandbytes": {"state1": "first", "state2": "second"},
    "lion_pytorch": _BY_NAME,
    "prodigyopt": _BY_NAME,
    "pytorch_optimizer": _BY_NAME,
    "schedulefree": _BY_NAME,
    "transformers": _BY_NAME,
}
"""How the state of an optimizer grows: a `Rule` for every key of its state, by class, or
by the package that its class comes from.

Add a row for an optimizer of your own; numbers (`step`) need none.
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

    Neither new ones nor new entries can join that.
    """
    for optimizer in optimizers:
        whole = isinstance(optimizer, torch.optim.LBFGS)
        for parameter, state in optimizer.state.items():
            for value in state.values():
                if isinstance(value, Tensor) and value.dim() == 1:
                    whole = whole or value.numel() > parameter.numel()
        if whole:
            raise OptimizerError(
                f"{type(optimizer).__name__} keeps one vector over all its parameters: "
                "no rule can tell where new ones belong. hint: make a new optimizer "
                "after each growth"
            )


@dataclass(frozen=True)
class Followed:
    """A parameter whose state grows.

    Attributes:
        parameter: The parameter as it is.
        new: Its values at its new size.
        change: What happens to it.
        edits: What every axis does to it.
        warm: Whether new second moments start at the mean of the old ones.
        rescale: What the growth makes of present weights before their size changes.
    """

    parameter: Tensor
    new: Tensor
    change: TensorChange
    edits: Sequence[Edit]
    warm: bool
    rescale: Callable[[Tensor], Tensor]


def grown_state(optimizer: Optimizer, followed: Followed) -> dict[str, Any]:
    """The state of one parameter at its new size.

    Raises:
        OptimizerError: No rule covers a piece of it, or the rule does not fit.
    """
    result: dict[str, Any] = {}
    for key, value in optimizer.state[followed.parameter].items():
        if not _has_size(value):
            result[key] = value
            continue
        rule = rule_for(optimizer, key, value)
        if rule == "reset":
            # Half a state would be taken for a whole one.
            return {}
        result[key] = value if rule == "fixed" else _grown(value, rule, followed)
        if result[key] is None:
            raise OptimizerError(
                f"{type(optimizer).__name__} state {key!r} of {followed.change.name} is "
                f"{_described(value)}, which the rule {rule!r} does not fit: the "
                f"parameter has the shape {followed.change.before}. hint: 'reset' lets "
                "the state of a parameter that grows start anew"
            )
    return result


def rescaled_state(
    optimizer: Optimizer, parameter: Tensor, rescale: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    """The state of a parameter whose values are rescaled: weights in it are, too.

    Raises:
        OptimizerError: No rule tells whether a piece of it holds weights.
    """
    result: dict[str, Any] = {}
    for key, value in optimizer.state[parameter].items():
        rule = _known_rule(optimizer, key)
        if rule is None and _has_size(value):
            rule_for(optimizer, key, value)  # says which rule is missing
        result[key] = rescale(value) if rule == "weight" else value
    return result


def copied_state(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any]:
    """The state for a copy of a parameter; nothing is shared with the first."""
    result: dict[str, Any] = {}
    for key, value in optimizer.state[parameter].items():
        if not _has_size(value):
            result[key] = value.clone() if isinstance(value, Tensor) else value
            continue
        leaves = pytree.tree_leaves(value)
        # Tensors can be copied whatever they mean; an object may hold more.
        opaque = any(
            not isinstance(leaf, Tensor) and _has_size(leaf) for leaf in leaves
        )
        if opaque and rule_for(optimizer, key, value) == "reset":
            return {}
        result[key] = pytree.tree_map(
            lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value
        )
    return result


def _has_size(value: Any) -> bool:
    """Whether a piece of a state may depend on the size of its parameter."""
    if isinstance(value, Tensor):
        return value.dim() > 0
    return not isinstance(value, (int, float, complex, str, bytes, type(None)))


def rule_for(optimizer: Optimizer, key: str, value: Any) -> Rule:
    """The rule for a piece of a state, from the optimizer's class or the nearest base
    class that has a row, or whose package has one.
    """
    name = type(optimizer).__name__
    is_dense = isinstance(value, Tensor) and value.is_floating_point()
    rule = _known_rule(optimizer, key)
    if rule is not None:
        has_units = rule not in ("reset", "fixed")
        if isinstance(value, Tensor) and not is_dense and has_units:
            raise OptimizerError(
                f"the state {key!r} of {name} is held in {value.dtype}: quantised in "
                "blocks that run across units. hint: use the optimizer with 32-bit "
                "states, or make a new one after each growth"
            )
        return rule
    guess = _BY_NAME.get(key, "second" if "sq" in key or "var" in key else "first")
    if not is_dense:
        guess = "reset"
    raise OptimizerError(
        f"no rule says how the state {key!r} of {name} ({_described(value)}) grows. hint: "
        f"register one, for example meristem.STATE_RULES[{name}] = {{{key!r}: {guess!r}}}; "
        "'first' scales like a gradient, 'second' like its square, 'weight' holds "
        "weights, 'reset' starts anew"
    )


def _known_rule(optimizer: Optimizer, key: str) -> Rule | None:
    # A subclass follows the rules of its base, unless it has its own.
    for kind in type(optimizer).__mro__:
        for known_as in (kind, kind.__module__.partition(".")[0]):
            row = STATE_RULES.get(known_as, {})
            if key in row:
                return row[key]
    return None


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def _grown(value: Any, rule: Rule, followed: Followed) -> Tensor | None:
    """A piece of a state at its new size, or None where it does not fit the rule."""
    before = followed.change.before
    dims = list(range(len(before)))
    if rule in ("rows", "columns") and len(before) > 1:
        del dims[-1 if rule == "rows" else -2]
    kept = [before[d] for d in dims]
    if not isinstance(value, Tensor):
        return None
    # A dimension that is summed over has one entry, or is missing; some keep all in a row.
    squeezed = [size if d in dims else 1 for d, size in enumerate(before)]
    shape = list(value.shape)
    if shape not in (kept, squeezed, [math.prod(kept)]):
        return None
    grown = _along(value.reshape(kept), rule, followed, dims)
    if shape == kept:
        return laid_out_like(value, grown)
    if shape == squeezed:
        return grown.unsqueeze(-1 if rule == "rows" else -2)
    return grown.flatten()


def _along(value: Tensor, rule: Rule, followed: Followed, dims: list[int]) -> Tensor:
    """A state over some dimensions of its parameter at its new size.

    A copy's fan-in keeps (a m, a^2 v) for its share a, its fan-out (m, v); weights the
    other way round.
    """
    change = followed.change
    if rule == "weight":
        value = followed.rescale(value)
    edits = []
    for edit in followed.edits:
        if edit.dim in dims:
            moved = replace(edit.slot, dim=dims.index(edit.dim))
            edits.append(replace(edit, slot=moved))
    sources = sources_with_copies(change, followed.edits)
    sources = [sources[d] for d in dims]
    grown = carry(value, sources)
    is_square = rule in ("second", "rows", "columns")
    if rule == "size" or (followed.warm and is_square):
        # The mean of the tensor: a zero would let Adam leap.
        level = value.mean().item()
        for edit in edits:
            fresh = edit.where
            if edit.copies is not None:
                fresh = fresh[edit.copies.fresh.numpy()]
            where = index(fresh.ravel()).to(grown.device)
            grown = grown.index_fill(edit.dim, where, level)
    for edit in edits:
        if edit.copies is None or rule in ("update", "size"):
            continue
        is_shared = (edit.slot.role == "fan_out") == (rule == "weight")
        if is_shared:
            share = edit.copies.share
            grown = shared(grown, edit, share.square() if is_square else share)
    if rule == "weight":
        known = carry(torch.ones_like(value), sources).bool()
        grown = torch.where(known, grown, followed.new.to(grown))
    return grown
