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

from torch import nn

from meristem.core.axis import Axes, Axis, Kind, Place, Slot
from meristem.core.change import Insertion, Plan, Rescaling
from meristem.core.errors import nearest
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
