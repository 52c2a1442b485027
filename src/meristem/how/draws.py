"""Weights drawn as the layers draw their own, and the rules that keep a normalised stream exact."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from meristem.core.axis import Axis, Place, Slot
from meristem.surgery.tensors import new_units
from meristem.surgery.verify import stream_strip
from meristem.view import View

Side = Literal["fan_in", "fan_out"]


def drawn(view: View, axis: Axis, count: int, zero: Side | None, scale: float = 1.0) -> dict[Place, Tensor]:
    """Strips for every slot: the `zero` side zero, the rest from U(-b, b) with `bound` times `scale`.

    Biases are drawn like the weights of their layer, or zero with a zero fan-in. Where a layer or RMS norm sits on the
    axis the stream's rule decides what the producers give. Where one weight is both sides, the bias is drawn positive: it
    alone keeps a new unit alive.
    """
    strips: dict[Place, Tensor] = {}
    plan = view.plan(axis, count)
    producers = axis.places("fan_in") or axis.places("fan_out")
    for slot, shape in view.shapes(axis, count).items():
        old = view.values[slot.name]
        if axis.streamed and (slot.tied or slot.role != "fan_out"):
            strips |= stream_strip(axis, slot.name, slot.dim, old, new_units(plan, axis.name, slot.place))
        elif slot.role == "fan_out":
            widened = plan.change(slot.name).after[slot.dim]
            silent = zero == "fan_out" and not axis.streamed
            strips[slot.place] = view.uniform(shape, 0.0 if silent else scale * bound(view, slot, widened), old)
        elif slot.fill == "draw":
            silent = zero == "fan_in" and slot.role == "fan_in"
            strips[slot.place] = view.uniform(shape, 0.0 if silent else scale * bound(view, slot), old)
        elif slot.fill == "bias":
            limit = 0.0 if zero == "fan_in" or not producers else scale * bound(view, producers[0])
            strip = view.uniform(shape, limit, old)
            strips[slot.place] = strip if axis.places("fan_in") else strip.abs()
    return strips


def awake(view: View, axis: Axis, count: int, strips: Mapping[Place, Tensor]) -> dict[Place, Tensor]:
    """The strips with the fan-in and bias of dead units negated: a unit that is silent on the whole first growth batch
    (a ReLU below zero everywhere) receives no gradient on its fan-out, and its negative is active everywhere.
    """
    widened = view.widened(axis, count)
    trial = {slot.place: strips[slot.place].clone().requires_grad_() for slot in axis.places("fan_out")}
    with torch.enable_grad():
        loss = widened.loss({**strips, **trial}, view.batches[0])
    gradients = torch.autograd.grad(loss, list(trial.values()), allow_unused=True)
    reached = [g.flatten(1).abs().amax(1) for g in gradients if g is not None]
    if not reached:
        return dict(strips)
    sign = torch.where(torch.stack(reached).amax(0) > 0, 1.0, -1.0)
    turned = [slot for slot in axis.slots if slot.role == "fan_in" or slot.fill == "bias"]
    return {**strips} | {
        slot.place: strips[slot.place] * sign.to(strips[slot.place]).reshape(-1, *[1] * (strips[slot.place].dim() - 1))
        for slot in turned
        if slot.place in strips and slot.role != "fan_out"
    }


def bound(view: View, slot: Slot, size: int | None = None) -> float:
    """How wide a layer draws: 1 / sqrt(fan-in), as nn.Linear and the convolutions do; any other tensor is drawn with the
    standard deviation that its entries have. `size` is the new size of the slot's dimension where that is the fan-in.
    """
    old = view.values[slot.name]
    if not isinstance(view.owner(slot), (nn.Linear, nn.modules.conv._ConvNd)):
        return math.sqrt(3) * (old.std(correction=0).item() or 1.0)
    reads = size * math.prod(old.shape[2:]) if size is not None else old.numel() / old.shape[slot.dim]
    return 1 / math.sqrt(reads)


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
