"""How every slot of new units starts when a method says nothing else.

Weights are drawn as the layers draw their own; what reads the units is zero, so that
the function is preserved; a normalised stream keeps the rule that makes it exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from meristem.core.axis import Axis, Place, Slot
from meristem.lab.laboratory import Lab
from meristem.structure.layers import contracts
from meristem.surgery.tensors import filled
from meristem.surgery.verify import stream_strip

Side = Literal["fan_in", "fan_out"]


def neutral(
    lab: Lab,
    axis: Axis,
    count: int,
    zero: Side | None = "fan_out",
    scale: float = 1.0,
) -> dict[Place, Tensor]:
    """Strips for every slot of `count` new units: the first line of a method.

    What produces the units is drawn from U(-b, b) with b = scale / sqrt(fan-in), as
    nn.Linear and the convolutions draw; depthwise kernels likewise. What reads them is
    zero. Under a layer or RMS norm that runs over the axis, the producers follow the
    rule of the stream instead, and what reads is drawn. Where one weight is both sides
    (tied), the bias is drawn positive: it alone keeps a new unit alive. Norm weights,
    norm biases and statistics have no strip; they start at one, zero and the like by
    themselves.

    Args:
        lab: The laboratory.
        axis: The axis.
        count: New units.
        zero: The side that is zero: "fan_out", "fan_in" (with its biases), or None.
        scale: Factor on b.

    Returns:
        By place, strips of shape (units, entries per unit, *other dimensions).
    """
    # A tied weight has no fan-in of its own; it draws like what it is.
    producers = axis.places("fan_in") or axis.places("fan_out")
    strips: dict[Place, Tensor] = {}
    for slot, shape in lab.shapes(axis, count).items():
        old = lab.values[slot.name]
        if axis.streamed and (slot.tied or slot.role != "fan_out"):
            where = lab.new_units(axis, count, slot.place)
            strips |= stream_strip(axis, slot, old, where)
        elif slot.role == "fan_out":
            # The fan-in of what reads the units is the new width.
            widened = lab.plan(axis, count).change(slot.name).after[slot.dim]
            silent = zero == "fan_out" and not axis.streamed
            limit = 0.0 if silent else scale * bound(lab, slot, widened)
            strips[slot.place] = lab.uniform(shape, limit, old)
        elif slot.fill == "draw":
            silent = zero == "fan_in" and slot.role == "fan_in"
            limit = 0.0 if silent else scale * bound(lab, slot)
            strips[slot.place] = lab.uniform(shape, limit, old)
        elif slot.fill == "bias":
            silent = zero == "fan_in" or not producers
            limit = 0.0 if silent else scale * bound(lab, producers[0])
            strip = lab.uniform(shape, limit, old)
            strips[slot.place] = strip if axis.places("fan_in") else strip.abs()
    return strips


def with_fills(
    lab: Lab, axis: Axis, count: int, strips: Mapping[Place, Tensor]
) -> dict[Place, Tensor]:
    """The strips, and one for every slot that would start by its fill: ones, the mean
    of the present units, zeros.
    """
    whole = dict(strips)
    for slot, shape in lab.shapes(axis, count).items():
        if slot.place not in whole:
            whole[slot.place] = filled(lab.values[slot.name], slot, shape)
    return whole


def awake(
    lab: Lab, axis: Axis, count: int, strips: Mapping[Place, Tensor]
) -> dict[Place, Tensor]:
    """The strips with the fan-in and bias of dead units negated.

    A unit that is silent on the whole first growth batch (a ReLU below zero everywhere)
    receives no gradient on its fan-out, and its negative is active everywhere.
    """
    # Nothing reads the outputs of the model.
    if not axis.places("fan_out"):
        return dict(strips)
    widened = lab.widened(axis, count)
    trial = {}
    for slot in axis.places("fan_out"):
        trial[slot.place] = strips[slot.place].clone().requires_grad_()
    with torch.enable_grad():
        loss = widened.loss({**strips, **trial}, lab.batches[0])
    gradients = torch.autograd.grad(loss, list(trial.values()), allow_unused=True)
    reached = [g.flatten(1).abs().amax(1) for g in gradients if g is not None]
    turned = dict(strips)
    # The loss does not reach the units at all; nothing can be told.
    if not reached:
        return turned
    # A unit is alive if any of its readers feels it.
    sign = torch.where(torch.stack(reached).amax(0) > 0, 1.0, -1.0)
    for slot in axis.slots:
        makes = slot.role == "fan_in" or slot.fill == "bias"
        if makes and slot.role != "fan_out" and slot.place in strips:
            strip = strips[slot.place]
            by_unit = sign.to(strip).reshape(-1, *[1] * (strip.dim() - 1))
            turned[slot.place] = strip * by_unit
    return turned


def bound(lab: Lab, slot: Slot, size: int | None = None) -> float:
    """How wide a layer draws: 1 / sqrt(fan-in), as nn.Linear and the convolutions do.

    Any other tensor is drawn with the standard deviation that its entries have. `size`
    is the new size of the slot's dimension where that is the fan-in.
    """
    if not contracts(lab.owner(slot)):
        spread = lab.values[slot.name].std(correction=0).item()
        return math.sqrt(3) * (spread or 1.0)  # of U(-b, b), b is sqrt(3) deviations
    shape = lab.values.shape(slot.name)
    if size is not None:
        return 1 / math.sqrt(size * math.prod(shape[2:]))
    return 1 / math.sqrt(math.prod(shape) / shape[slot.dim])


def mean_norm(lab: Lab, axis: Axis, side: Side) -> float:
    """The mean L2 norm of the present units' weights on one side, over all its slots."""
    slots = axis.places(side)
    if not slots:
        return 0.0
    total = torch.zeros((), dtype=torch.float64)
    for slot in slots:
        total = total + lab.units(slot, axis).flatten(1).double().square().sum(1)
    return total.sqrt().mean().item()


def flat_size(shapes: Mapping[Slot, Sequence[int]], slots: Sequence[Slot]) -> int:
    """How many weights one unit has in some slots."""
    return sum(math.prod(shapes[slot][1:]) for slot in slots)


def unflatten(
    vectors: Tensor, shapes: Mapping[Slot, Sequence[int]], slots: Sequence[Slot]
) -> dict[Place, Tensor]:
    """Strips from one vector per unit: (units, weights) cut into the slots' shapes."""
    strips, start = {}, 0
    for slot in slots:
        width = math.prod(shapes[slot][1:])
        part = vectors[:, start : start + width]
        strips[slot.place] = part.reshape(len(vectors), *shapes[slot][1:])
        start += width
    return strips
