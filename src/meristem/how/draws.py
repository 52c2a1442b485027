"""Weights drawn as the layers draw their own, and the rules that keep a normalised stream exact."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from meristem.axis import Axis, Place, Slot
from meristem.how.view import View
from meristem.surgery.tensors import new_units
from meristem.surgery.verify import stream_strip

Side = Literal["fan_in", "fan_out"]


def drawn(view: View, axis: Axis, count: int, zero: Side | None, scale: float = 1.0) -> dict[Place, Tensor]:
    """Strips for every slot: the `zero` side zero, the rest from U(-b, b), b = scale / sqrt(fan-in of the layer).

    That is what nn.Linear and the convolutions draw. Biases are drawn alike, or zero with a zero fan-in. Where a layer
    or RMS norm sits on the axis the stream's rule decides what the producers give. Where one weight is both sides, the
    bias is drawn positive: it alone keeps a new unit alive.
    """
    strips: dict[Place, Tensor] = {}
    plan = view.plan(axis, count)
    fan_in = _fan_in(view, axis)
    for slot, shape in view.shapes(axis, count).items():
        old = view.values[slot.name]
        if axis.norm in ("layer_norm", "rms_norm") and slot.role != "fan_out":
            strips |= stream_strip(axis, slot.name, slot.dim, old, new_units(plan, axis.name, slot.place))
        elif slot.role == "fan_out":
            reads = plan_size(view, axis, count, slot) * math.prod(old.shape[2:])
            bound = 0.0 if zero == "fan_out" and axis.norm not in ("layer_norm", "rms_norm") else scale / math.sqrt(reads)
            strips[slot.place] = view.uniform(shape, bound, old)
        elif slot.fill == "draw":
            bound = 0.0 if zero == "fan_in" and slot.role == "fan_in" else scale / math.sqrt(old.numel() / old.shape[slot.dim])
            strips[slot.place] = view.uniform(shape, bound, old)
        elif slot.fill == "bias":
            strip = view.uniform(shape, 0.0 if zero == "fan_in" else scale / math.sqrt(fan_in), old)
            strips[slot.place] = strip if axis.places("fan_in") else strip.abs()
    return strips


def plan_size(view: View, axis: Axis, count: int, slot: Slot) -> int:
    """The size of a slot's dimension after the growth."""
    change = next(c for c in view.plan(axis, count).tensors if c.name == slot.name)
    return change.after[slot.dim]


def _fan_in(view: View, axis: Axis) -> float:
    slots = axis.places("fan_in") or axis.places("fan_out")
    value = view.values[slots[0].name]
    return value.numel() / value.shape[slots[0].dim]


def mean_norm(view: View, axis: Axis, side: Side) -> float:
    """The mean L2 norm of the present units' weights on one side, over all its slots together."""
    squares = [view.units(slot, axis).flatten(1).double().square().sum(1) for slot in axis.places(side)]
    return sum(squares[1:], squares[0]).sqrt().mean().item() if squares else 0.0


def flat_size(shapes: Mapping[Slot, tuple[int, ...]], slots: tuple[Slot, ...]) -> int:
    """How many weights one unit has in `slots`."""
    return sum(math.prod(shapes[slot][1:]) for slot in slots)


def unflatten(vectors: Tensor, shapes: Mapping[Slot, tuple[int, ...]], slots: tuple[Slot, ...]) -> dict[Place, Tensor]:
    """Strips from one vector per unit: (units, weights) cut into the slots' shapes."""
    strips, start = {}, 0
    for slot in slots:
        width = math.prod(shapes[slot][1:])
        strips[slot.place] = vectors[:, start : start + width].reshape(len(vectors), *shapes[slot][1:])
        start += width
    return strips
