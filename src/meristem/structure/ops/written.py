"""Norms that a model writes out: x / sqrt(mean(x^2) + eps), x / ||x||, times a scale.

Most RMS norms are no class of torch's. They are known by what they do, one operation
after the other, whatever class holds them; each step leaves a trail on its output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from meristem.structure.labels import Label
from meristem.structure.ops.rules import reduced_over
from meristem.structure.tracer import Call, Norm, Tracer

Stage = Literal[
    "average", "centred", "square", "mean", "root", "normal", "shifted", "scaled"
]


@dataclass(frozen=True)
class Trail:
    """How far a norm has come on one tensor.

    Attributes:
        stage: "average", of x; "centred", x less that; "square", x^2; "mean", of the
            squares; "root", of the mean, or one over it; "normal", x over the root.
            Of a weight, "shifted": a number was added. "scaled": data times a weight,
            which a norm may follow.
        label: What the norm runs over.
        norm: The norm, from the mean on.
        inverse: Of a root: whether it is one over it.
        shift: Of a weight: the number.
        weight: Of what was scaled: the weight.
        centred: Of a square: whether the mean was taken off before.
    """

    stage: Stage
    label: Label | None = None
    norm: Norm | None = None
    inverse: bool = False
    shift: float = 0.0
    weight: str = ""
    centred: bool = False


# What changes neither the numbers nor their places.
_PASSES = [
    "_to_copy",
    "clone",
    "contiguous",
    "detach",
    "alias",
    "expand",
    "clamp_min",
    "lift_fresh",
]


def follow(tracer: Tracer, call: Call) -> None:
    """Carry the trails of a call's inputs on to its first output."""
    # In place it is the same step.
    name = call.name.removesuffix("_")
    step = _STEPS.get(name)
    if step is None and name in _PASSES:
        step = _passed
    if step is None or not call.inputs:
        return
    trail = step(tracer, call)
    if trail is not None:
        call.outputs[0]._trail = trail  # type: ignore[attr-defined]


def _trail(tensor: Tensor) -> Trail | None:
    found: Trail | None = getattr(tensor, "_trail", None)
    return found


def shift_of(scale: Tensor) -> float:
    """What was added to the parameter that a scale is."""
    trail = _trail(scale)
    return trail.shift if trail is not None and trail.stage == "shifted" else 0.0


def _last(tracer: Tracer, tensor: Tensor) -> Label | None:
    dims = tracer.dims(tensor)
    return dims[-1].label.root if dims else None


def _number(call: Call) -> float | None:
    """The number that stands beside the only tensor of a call."""
    value = call.arguments.get("other")
    alone = len(call.inputs) == 1 and isinstance(value, (int, float))
    return float(value) if alone and value is not None else None


def _over_last(call: Call) -> bool:
    """Whether a reduction names the last dimension, and no other."""
    over = call.arguments.get("dim")
    over = [over] if isinstance(over, int) else list(over or [])
    rank = call.inputs[0].dim()
    return [d % rank for d in over] == [rank - 1]


def _passed(tracer: Tracer, call: Call) -> Trail | None:
    return _trail(call.inputs[0])


def _powered(tracer: Tracer, call: Call) -> Trail | None:
    exponent, trail = call.arguments.get("exponent"), _trail(call.inputs[0])
    if not isinstance(exponent, (int, float)):
        return None
    if exponent == 2:
        return _squared(tracer, call.inputs[0])
    if trail is not None and trail.stage == "mean" and exponent in (0.5, -0.5):
        return _rooted(trail, inverse=exponent < 0)
    return None


def _squared(tracer: Tracer, data: Tensor) -> Trail:
    before = _trail(data)
    centred = before is not None and before.stage == "centred"
    return Trail("square", _last(tracer, data), centred=centred)


def _averaged(tracer: Tracer, call: Call) -> Trail | None:
    trail, source = _trail(call.inputs[0]), call.inputs[0]
    if not _over_last(call):
        return None
    if trail is None or trail.stage != "square" or trail.label is None:
        return Trail("average", _last(tracer, source))
    reason = reduced_over(tracer, call)
    kind: Literal["layer_norm", "rms_norm"] = "rms_norm"
    if trail.centred:
        kind = "layer_norm"
    norm = Norm(tracer.stack.innermost, kind, trail.label, reason, eps=0.0)
    return Trail("mean", trail.label, norm)


def _measured(tracer: Tracer, call: Call) -> Trail | None:
    """The length of a vector: no mean, so that a new entry of zero changes nothing."""
    source = call.inputs[0]
    label = _last(tracer, source)
    if not _over_last(call) or label is None or call.arguments.get("ord", 2) != 2:
        return None
    reason = reduced_over(tracer, call)
    norm = Norm(
        tracer.stack.innermost, "rms_norm", label, reason, eps=0.0, averages=False
    )
    return Trail("root", label, norm)


def _added(tracer: Tracer, call: Call) -> Trail | None:
    value = _number(call)
    if value is None or call.arguments.get("alpha", 1) != 1:
        return None
    trail = _trail(call.inputs[0])
    if trail is not None and trail.stage == "mean" and trail.norm is not None:
        trail.norm.eps = value
        trail.norm.line = tracer.line()
        return trail
    return Trail("shifted", shift=value) if tracer.of(call.inputs[0]).weight else None


def _taken_off(tracer: Tracer, call: Call) -> Trail | None:
    """x less its own mean."""
    if len(call.inputs) != 2:
        return None
    trail, label = _trail(call.inputs[1]), _last(tracer, call.inputs[0])
    if trail is None or trail.stage != "average" or trail.label is None:
        return None
    return Trail("centred", label) if trail.label.root is label else None


def _rooted(trail: Trail, inverse: bool) -> Trail:
    return Trail("root", trail.label, trail.norm, inverse)


def _root(tracer: Tracer, call: Call) -> Trail | None:
    trail = _trail(call.inputs[0])
    if trail is None or trail.stage != "mean":
        return None
    return _rooted(trail, inverse=call.name == "rsqrt")


def _divided(tracer: Tracer, call: Call) -> Trail | None:
    if len(call.inputs) != 2:
        return _passed(tracer, call) if _is_normal(call.inputs[0]) else None
    data, root = call.inputs
    return _normalised(tracer, data, _trail(root), inverse=False)


def _multiplied(tracer: Tracer, call: Call) -> Trail | None:
    if len(call.inputs) == 1:  # by a number: the scale of a norm
        return _passed(tracer, call) if _is_normal(call.inputs[0]) else None
    first, second = call.inputs
    if first is second:
        return _squared(tracer, first)
    for data, other in ((first, second), (second, first)):
        found = _normalised(tracer, data, _trail(other), inverse=True)
        if found is not None:
            return found
        if tracer.of(other).weight and not tracer.of(data).weight:
            return _scaled(tracer, data, other)
    return None


def _is_normal(tensor: Tensor) -> bool:
    trail = _trail(tensor)
    return trail is not None and trail.stage == "normal"


def _normalised(
    tracer: Tracer, data: Tensor, trail: Trail | None, inverse: bool
) -> Trail | None:
    if trail is None or trail.stage != "root" or trail.inverse != inverse:
        return None
    if trail.label is None or trail.norm is None:
        return None
    label = _last(tracer, data)
    if label is not trail.label.root:
        return None
    before = _trail(data)
    if before is not None and before.stage == "scaled":
        trail.norm.weight, trail.norm.shift = before.weight, before.shift
    tracer.trace.norms.append(trail.norm)
    return Trail("normal", trail.label, trail.norm)


def _scaled(tracer: Tracer, data: Tensor, weight: Tensor) -> Trail | None:
    """The first weight behind a norm, or the last before it, is its scale.

    Gemma's is 1 + w.
    """
    trail, names = _trail(data), tracer.of(weight).parameters()
    if len(names) != 1:
        return None
    shifted = _trail(weight)
    shift = shifted.shift if shifted is not None else 0.0
    (name,) = names
    if trail is None or trail.stage != "normal" or trail.norm is None:
        return Trail("scaled", shift=shift, weight=name)
    if not trail.norm.weight:
        trail.norm.weight, trail.norm.shift = name, shift
    return None


_STEPS: dict[str, Callable[[Tracer, Call], Trail | None]] = {
    "pow": _powered,
    "square": lambda tracer, call: _squared(tracer, call.inputs[0]),
    "sub": _taken_off,
    "mean": _averaged,
    "linalg_vector_norm": _measured,
    "add": _added,
    "sqrt": _root,
    "rsqrt": _root,
    "div": _divided,
    "mul": _multiplied,
}
