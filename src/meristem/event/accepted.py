"""What the parts of a growth give is checked before anything rests on it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from meristem.core.axis import Axis, Place
from meristem.core.change import Insertion, Plan, Rescaling
from meristem.core.errors import GrowthRefused, nearest
from meristem.core.offer import (
    Blocks,
    Copies,
    Offer,
    Ramp,
    Settled,
    Share,
    Tracking,
    Treatment,
)
from meristem.lab.laboratory import Lab
from meristem.methods import Care, Choice, How, Where
from meristem.structure.twin import named_tensors

_BLOCKS = "hint: blocks=Blocks(lab.depth(axis).appended(count))"

# -- what a method offers


def check_offer(how: How, lab: Lab, axis: Axis, count: int, offer: Any) -> None:
    """Raise unless an offer fits the axis that it was asked for.

    Raises:
        TypeError, ValueError: What is wrong, with the shape that would be right.
    """
    name = type(how).__name__
    if not isinstance(offer, Offer):
        raise TypeError(
            f"{name}.propose must return an Offer; got {type(offer).__name__}"
        )
    # An offer for another count would leave some units without weights.
    if offer.axis != axis.name or offer.count != count:
        raise ValueError(
            f"{name} was asked for {count} units of {axis.name!r} and offers "
            f"{offer.count} of {offer.axis!r}. hint: Offer(axis.name, count, strips)"
        )
    _check_flops(f"the offer of {name}", offer.flops)
    _check_note(f"the offer of {name}", offer.note)
    if not all(math.isfinite(gain) for gain in offer.gains):
        raise ValueError(f"the gains of {name} must be finite; got {offer.gains}")
    if not axis.slots:
        if not isinstance(offer.blocks, Blocks):
            raise TypeError(
                f"{name} must offer {count} new blocks of {axis.name!r}. {_BLOCKS}"
            )
        _check_insertion(name, lab, axis, count, offer.blocks.insertion)
        _check_blocks(name, lab, offer.blocks)
        return
    if offer.copies is not None:
        _check_copies(name, axis, count, offer.copies)
    if offer.copies is None or bool(offer.copies.fresh.any()):
        _check_strips(name, lab, axis, count, offer.strips)


def _check_copies(name: str, axis: Axis, count: int, copies: Copies) -> None:
    _check_tensor(f"Copies.parent of {name}", (count,), copies.parent)
    whole = not copies.parent.is_floating_point() and not copies.parent.is_complex()
    parents = copies.parent.tolist()
    if not whole or not all(-1 <= parent < axis.size for parent in parents):
        raise ValueError(
            f"Copies.parent of {name} must name units of {axis.name!r}, whole numbers from "
            f"0 to {axis.size - 1}, or -1 for none; got {parents}"
        )
    _check_tensor(f"Copies.share of {name}", (axis.size + count,), copies.share)


def _check_flops(told: str, flops: Any) -> None:
    if isinstance(flops, bool) or not isinstance(flops, Real):
        raise TypeError(f"{told} has flops={flops!r}, which is no number")


def _check_note(told: str, note: Any) -> None:
    if not isinstance(note, str):
        raise TypeError(f"{told} has note={note!r}, which is no text")


def _check_insertion(
    name: str, lab: Lab, axis: Axis, count: int, placed: Insertion
) -> None:
    """Raise unless the new blocks of a depth stand between its present ones, and these
    stay as they are.
    """
    depth = lab.depth(axis)
    got = f"got {placed.blocks} with new = {placed.new}. {_BLOCKS}"
    flags = all(isinstance(flag, bool) for flag in placed.new)
    fits = flags and len(placed.new) == len(placed.blocks)
    if not fits or sum(placed.new) != count:
        raise ValueError(
            f"{name} must offer {count} new blocks of {axis.name!r}; {got}"
        )
    kept: list[int] = []
    parents: list[int] = []
    for block, new in zip(placed.blocks, placed.new, strict=True):
        (parents if new else kept).append(block)
    known = range(depth.size)
    if kept != list(known) or not set(parents) <= set(known):
        raise ValueError(
            f"{name} must leave the blocks 0 to {depth.size - 1} of {axis.name!r} in their "
            f"order, and make new ones after some of these; {got}"
        )
    # What stands before a new layer of a chain is the method's to choose.
    own = replace(
        depth.with_blocks(placed.blocks, placed.new), activation=placed.activation
    )
    if placed != own:
        raise ValueError(
            f"{name} was asked for blocks of {axis.name!r} and offers some of "
            f"{placed.axis!r}. {_BLOCKS}"
        )


def _check_blocks(name: str, lab: Lab, blocks: Blocks) -> None:
    # Asked for only where needed: it takes a copy of the structure.
    shapes = lab.block_shapes(blocks.insertion) if blocks.values else {}
    for (place, tensor), value in blocks.values.items():
        if place not in shapes:
            raise ValueError(
                f"{name} gives weights to block {place}, which is not new; new are "
                f"{list(shapes)}"
            )
        if tensor not in shapes[place]:
            raise ValueError(
                f"the new block {place} of {name} has no {tensor!r}."
                f"{nearest(tensor, shapes[place])} It has {list(shapes[place])}"
            )
        _check_tensor(
            f"{tensor} of the new block {place} of {name}", shapes[place][tensor], value
        )
    for tensor, rescaling in blocks.rescaled.items():
        if tensor not in lab.values:
            raise ValueError(
                f"{name} rescales {tensor!r}, which is no tensor of the model"
            )
        if not isinstance(rescaling, Rescaling):
            raise TypeError(
                f"{name} rescales {tensor} by {rescaling!r}. hint: Rescaling(factor)"
            )
        if not all(math.isfinite(number) for number in rescaling):
            raise GrowthRefused(
                f"{name} rescales {tensor} by what is not finite; nothing was changed"
            )


def _check_tensor(told: str, shape: tuple[int, ...], value: Any) -> None:
    """Raise unless an offered value is a finite tensor of a shape."""
    is_tensor = isinstance(value, Tensor)
    if not is_tensor or tuple(value.shape) != shape:
        got = tuple(value.shape) if is_tensor else type(value).__name__
        raise ValueError(f"{told} must have shape {shape}; got {got}")
    if not bool(torch.isfinite(value).all()):
        raise GrowthRefused(f"{told} is not finite; nothing was changed")


def _check_strips(
    name: str, lab: Lab, axis: Axis, count: int, strips: Mapping[Place, Tensor]
) -> None:
    shapes = lab.shapes(axis, count)
    places = {slot.place for slot in shapes}
    # A strip that no slot takes would be dropped without a word.
    strange = [place for place in strips if place not in places]
    if strange:
        raise ValueError(
            f"{name} offers a strip for {tuple(strange[0])}, which axis {axis.name!r} "
            f"does not have. Its slots are {[tuple(place) for place in places]}"
        )
    for slot, shape in shapes.items():
        strip = strips.get(slot.place)
        if strip is None:
            if slot.fill == "draw" and not axis.streamed:
                raise ValueError(
                    f"{name} offers no weights for {slot.name} (dimension {slot.dim}, "
                    f"{slot.role}) of axis {axis.name!r}. hint: start from "
                    "neutral(lab, axis, count), which has a strip for every slot"
                )
            continue
        _check_tensor(
            f"the strip of {name} for {slot.name} (dimension {slot.dim}), (units, entries "
            "per unit, *other dimensions),",
            shape,
            strip,
        )


# -- what a method settles


def check_settled(how: How, plan: Plan, model: nn.Module, settled: Any) -> None:
    """Raise unless what a method has settled is every tensor that changes, at its new
    shape.

    Args:
        how: The method.
        plan: What changes.
        model: The model as it is.
        settled: What it gives.
    """
    name = type(how).__name__
    if not isinstance(settled, Settled):
        raise TypeError(
            f"{name}.settle must return a Settled; got {type(settled).__name__}"
        )
    shapes = {key: tuple(t.shape) for key, t in named_tensors(model).items()}
    changes = {change.name: change.after for change in plan.tensors}
    # Buffers are the model's own.
    learned = dict(model.named_parameters())
    for key, shape in changes.items():
        if key in learned and key not in settled.tensors:
            raise ValueError(
                f"{name} settled no {key}, which grows to {shape}. hint: "
                "Settled(dict(sandbox.model.named_parameters()))"
            )
    for key, value in settled.tensors.items():
        if key not in shapes:
            raise ValueError(
                f"{name} settled {key!r}, which is no tensor of the model."
                f"{nearest(key, shapes)}"
            )
        _check_tensor(
            f"{key} as {name} settled it", changes.get(key, shapes[key]), value
        )
    _check_flops(f"what {name} settled", settled.flops)
    if not isinstance(settled.notes, Mapping):
        raise TypeError(
            f"what {name} settled has notes={settled.notes!r}: text by axis"
        )
    for axis, note in settled.notes.items():
        _check_note(f"what {name} settled of {axis}", note)


# -- what a care asks for


def check_treatment(
    care: Care, axes: Sequence[Axis], tensors: Collection[str], treatment: Any
) -> None:
    """Raise unless a treatment names what there is, in numbers that can be used.

    Args:
        care: Whose it is.
        axes: What grows.
        tensors: The names of the model's tensors.
        treatment: What it asks for.
    """
    name = type(care).__name__
    if not isinstance(treatment, Treatment):
        raise TypeError(
            f"{name}.treat must return a Treatment; got {type(treatment).__name__}"
        )
    scaling = treatment.scaling
    for tensor in scaling.tensors:
        if tensor not in tensors:
            raise ValueError(
                f"{name} scales {tensor!r}, which is no tensor of the model."
                f"{nearest(tensor, tensors)}"
            )
    places = {slot.place for axis in axes for slot in axis.slots}
    for place in scaling.places:
        if place not in places:
            raise ValueError(f"{name} scales {tuple(place)}, along which nothing grows")
    for factor in (*scaling.tensors.values(), *scaling.places.values()):
        if not math.isfinite(factor):
            raise GrowthRefused(
                f"{name} scales by {factor}, which is not finite; nothing was changed"
            )
    if not isinstance(treatment.after, tuple):
        raise TypeError(f"{name}: Treatment(after=...) must be a tuple")
    for after in treatment.after:
        _check_after(name, after)


def _check_after(name: str, after: Any) -> None:
    if not isinstance(after, (Ramp, Tracking)):
        raise TypeError(
            f"{name}: Treatment(after=...) takes Ramp and Tracking; got {after!r}"
        )
    start = after.start if isinstance(after, Ramp) else after.momentum
    numbers = isinstance(after.steps, int) and isinstance(start, (int, float))
    if not numbers or after.steps < 1 or not 0 <= start <= 1:
        raise ValueError(
            f"{name}: {after!r} needs a number of steps, and a share in [0, 1]"
        )


# -- what a rule shares out


def check_share(where: Where, choice: Choice, share: Any) -> None:
    """Raise unless a share gives axes what they can take."""
    name = type(where).__name__
    if not isinstance(share, Share):
        raise TypeError(f"{name}.share must return a Share; got {type(share).__name__}")
    if not isinstance(share.counts, Mapping):
        raise TypeError(
            f"{name}: Share(counts) maps names of axes to units; got {share.counts!r}"
        )
    multiples = {axis.name: axis.multiple for axis in choice.axes}
    for axis, count in share.counts.items():
        if not isinstance(count, (Real, Tensor)):
            raise TypeError(
                f"{name} gives {count!r} units to {axis!r}. hint: a whole number"
            )
        if axis not in multiples:
            raise ValueError(
                f"{name} gives units to {axis!r}, which is not among choice.axes: "
                f"{', '.join(multiples)}"
            )
        if count <= 0 or count % multiples[axis]:
            raise ValueError(
                f"{name} gives {count} units to {axis!r}, which grows in multiples of "
                f"{multiples[axis]}"
            )
    if not share.counts and not share.refusal:
        raise ValueError(
            f"{name} gives nothing to any axis; say why: Share({{}}, refusal=...)"
        )
