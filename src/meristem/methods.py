"""All that an author of a method needs: what a part is, what it gets, what it gives.

A growth is put together from four parts, each a small frozen dataclass that satisfies a
protocol below; nothing is inherited. See "Write a method" in the documentation, and
`meristem.testing` for the contracts.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from meristem.core.axis import Axes, Axis, Kind, Place, Slot
from meristem.core.change import Insertion, Plan, Rescaling
from meristem.core.errors import GrowthRefused, nearest
from meristem.core.offer import (
    Blocks,
    Copies,
    Offer,
    Scaling,
    Settled,
    Share,
    Treatment,
)
from meristem.lab.laboratory import Lab, Sandbox, Widened
from meristem.lab.neutral import neutral
from meristem.structure.depth import Depth

__all__ = [
    "Axes",
    "Axis",
    "Blocks",
    "Care",
    "Choice",
    "Clock",
    "Copies",
    "Depth",
    "How",
    "Insertion",
    "Kind",
    "Lab",
    "Offer",
    "Place",
    "Plan",
    "Rations",
    "Rescaling",
    "Sandbox",
    "Scaling",
    "Settled",
    "Settles",
    "Share",
    "Slot",
    "Thrifty",
    "Treatment",
    "Watches",
    "When",
    "Where",
    "Widened",
    "check_counts",
    "check_flag",
    "check_positive",
    "neutral",
]


class How(Protocol):
    """A method that offers weights for new units.

    Attributes:
        kinds: The kinds of axes that it speaks for, each with whether the network
            computes the same function right after such a growth.
        batches: How many growth batches it measures on; 0 where it needs neither `loss`
            nor `data`.
    """

    @property
    def kinds(self) -> Mapping[Kind, bool]: ...

    @property
    def batches(self) -> int: ...

    def propose(self, lab: Lab, axis: Axis, count: int) -> Offer:
        """Weights for `count` new units of an axis."""
        ...


class Thrifty(How, Protocol):
    """A method that keeps to the `allowance` of its lab."""

    def least(self, lab: Lab, axis: Axis, count: int) -> float:
        """The least that a proposal costs, in floating-point operations."""
        ...


class Settles(How, Protocol):
    """A method that grows and trains a copy of the model: its own weights and old ones."""

    def settle(self, sandbox: Sandbox, counts: Mapping[str, int]) -> Settled:
        """Grow the copy by so many units per axis, train it, and give its tensors back."""
        ...


@dataclass(frozen=True)
class Choice:
    """What a rule of distribution has to choose from.

    Attributes:
        axes: The axes.
        total: Units to give away.
        growths: How often the net has grown.
        refusals: At how many checks in a row since then nothing was worth growing.
        offers: One per axis, for as many units as it may get; for rules that
            `reads_gains`.
        flops_per_unit, parameters_per_unit: What a unit of an axis adds.
        lab: For rules that measure.
    """

    axes: Sequence[Axis]
    total: int
    growths: int = 0
    refusals: int = 0
    offers: Mapping[str, Offer] = field(default_factory=dict)
    flops_per_unit: Mapping[str, float] = field(default_factory=dict)
    parameters_per_unit: Mapping[str, float] = field(default_factory=dict)
    lab: Lab | None = None


class Where(Protocol):
    """A rule that shares units out.

    Attributes:
        reads_gains: Whether it looks at the offers.
        weighs_kinds: Whether it can weigh a unit of a width against a block of a depth;
            a rule that cannot gets axes of one sort.
    """

    @property
    def reads_gains(self) -> bool: ...

    @property
    def weighs_kinds(self) -> bool: ...

    def share(self, choice: Choice) -> Share:
        """How many units each axis gets; in multiples of `axis.multiple`."""
        ...


@dataclass(frozen=True)
class Clock:
    """Where training stands after an optimizer step.

    Attributes:
        step, epoch, growths: Counts so far.
        epoch_ended: Whether an epoch has just ended.
        refusals: The last checks in a row at which nothing was worth growing.
        checked_step, checked_epoch: When the last check was.
        trained: What the training steps cost so far, in floating-point operations.
            Known only where the trigger `Rations`, as `least` is.
        losses, metrics: Since the last growth, the mean training loss of every epoch, and
            every metric. Known only where the trigger `Watches` them.
        measured: Whether a metric has just been added.
        least: What the next check costs at least.
        growing: What all growths and checks cost.
        latest: What the last one cost.
    """

    step: int = 0
    epoch: int = 0
    epoch_ended: bool = False
    growths: int = 0
    refusals: int = 0
    checked_step: int = 0
    checked_epoch: int = 0
    trained: float = 0.0
    growing: float = 0.0
    latest: float = 0.0
    least: float = 0.0
    losses: tuple[float, ...] = ()
    metrics: tuple[float, ...] = ()
    measured: bool = False


class When(Protocol):
    """A trigger."""

    def due(self, clock: Clock) -> bool:
        """Whether to grow now."""
        ...


class Rations(When, Protocol):
    """A trigger that also says what a check may cost."""

    def allowance(self, clock: Clock) -> float:
        """Floating-point operations that a check may cost now."""
        ...


class Watches(When, Protocol):
    """A trigger that looks at how training goes.

    Attributes:
        watches: Of "loss" and "metric", what it looks at. One that watches the metric is
            asked in `Grower.epoch` too.
    """

    @property
    def watches(self) -> tuple[str, ...]: ...


class Care(Protocol):
    """One thing done for a grown network."""

    def treat(self, model: nn.Module, plan: Plan, axes: Sequence[Axis]) -> Treatment:
        """What the old weights and the optimizers get; `model` is a copy without data."""
        ...


# -- checks where a part enters

# By kind of part: its protocol, attributes, methods with their arguments, an example.
_PARTS: dict[str, tuple[type, tuple[str, ...], dict[str, int], str]] = {
    "how": (
        How,
        ("kinds", "batches"),
        {"propose": 3},
        "a method such as meristem.how.Random()",
    ),
    "where": (
        Where,
        ("reads_gains", "weighs_kinds"),
        {"share": 1},
        "a choice such as meristem.where.Uniform()",
    ),
    "when": (When, (), {"due": 1}, "a trigger such as meristem.when.Every(steps=100)"),
    "care": (Care, (), {"treat": 3}, "a care such as meristem.care.WarmMoments()"),
}


def check_part(kind: str, part: Any, known: Mapping[str, type]) -> None:
    """Raise unless a part has what its protocol asks for.

    Args:
        kind: "how", "where", "when" or "care".
        part: What was given.
        known: The registry of such parts, for a hint.

    Raises:
        TypeError: Something is missing; the message says what.
    """
    protocol, attributes, methods, example = _PARTS[kind]
    if isinstance(part, str):
        # A name, as a configuration file would have it.
        hint = nearest(part, known)
        if kind == "when" and any(unit in part for unit in ("step", "epoch")):
            hint = f" hint: meristem.when.Every({part!r})"
        if part in known:
            hint = f" hint: meristem.{kind}.{known[part].__name__}()"
        raise TypeError(f"{kind} must be {example}; got {part!r}.{hint}")
    if isinstance(part, type):
        raise TypeError(
            f"{kind} must be {example}; got the class {part.__name__}. "
            f"hint: {part.__name__}()"
        )
    missing = [name for name in attributes if not hasattr(part, name)]
    for name, arguments in methods.items():
        if not takes(part, name, arguments):
            missing.append(f"{name}(...) with {arguments} argument(s)")
    if missing:
        raise TypeError(
            f"{kind} must be {example}; {type(part).__name__} lacks "
            f"{', '.join(missing)}. hint: see meristem.methods.{protocol.__name__}"
        )


def takes(part: Any, name: str, arguments: int) -> bool:
    """Whether an object has a method of this name that takes so many arguments."""
    method = getattr(part, name, None)
    if not callable(method):
        return False
    try:
        # By shape, not by name alone: a method of the same name may mean something
        # else.
        inspect.signature(method).bind(*[None] * arguments)
    except (TypeError, ValueError):
        return False
    return True


def rations(when: When) -> bool:
    """Whether a trigger says what a check may cost: it has `allowance(clock)`."""
    return takes(when, "allowance", 1)


def watched(when: When) -> tuple[str, ...]:
    """What a trigger looks at of how training goes."""
    found: tuple[str, ...] = getattr(when, "watches", ())
    return found


def is_thrifty(how: How) -> bool:
    """Whether a method says what its smallest proposal costs."""
    return takes(how, "least", 3)


def settles(how: How) -> bool:
    """Whether a method settles new units in on a sandbox."""
    return takes(how, "settle", 2)


def check_kinds(how: How) -> None:
    """Raise where the kinds of a method are not what they should be."""
    kinds = how.kinds
    if not isinstance(kinds, Mapping) or not kinds:
        raise TypeError(
            f"{type(how).__name__}.kinds must map the kinds of axes that it grows to "
            "whether "
            f'the function is preserved, as {{"width": True}}; got {kinds!r}'
        )
    for kind in kinds:
        if kind not in ("width", "heads", "depth"):
            raise TypeError(
                f"{type(how).__name__}.kinds names {kind!r}; kinds of axes are "
                "'width', 'heads' and 'depth'"
            )


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
    if not axis.slots:
        if offer.blocks is None or sum(offer.blocks.insertion.new) != count:
            raise ValueError(
                f"{name} must offer {count} new blocks of {axis.name!r}. hint: "
                "blocks=Blocks(lab.depth(axis).appended(count))"
            )
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


# -- checks of hyperparameters


def check_positive(owner: str, **values: Any) -> None:
    """Raise unless every value is a finite number above zero."""
    for name, value in values.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 < value < math.inf:
            raise ValueError(
                f"{owner}({name}=...) must be a number in (0, inf); got {value!r}"
            )


def check_counts(owner: str, least: int = 1, **values: Any) -> None:
    """Raise unless every value is an int, `least` or more."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(
                f"{owner}({name}=...) must be an int in [{least}, inf); got {value!r}"
            )


def check_places(owner: str, **values: Any) -> None:
    """Raise unless every value is None, or places of blocks."""
    for name, value in values.items():
        if value is None:
            continue
        listed = list(value) if isinstance(value, (range, list, tuple)) else []
        whole = all(type(place) is int and place >= 0 for place in listed)
        if not listed or not whole:
            raise ValueError(
                f"{owner}({name}=...) names blocks by their places, as range(8, 24) or "
                f"[3, 7]; got {value!r}"
            )


def check_flag(owner: str, **values: Any) -> None:
    """Raise unless every value is True or False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ValueError(f"{owner}({name}=...) is True or False; got {value!r}")
