"""What the parts of a growth hand on: offered weights, shares, treatments, settled
weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from meristem.core.axis import Place
from meristem.core.change import Insertion, Rescaling


@dataclass(frozen=True)
class Copies:
    """New units as copies of old ones.

    Attributes:
        parent: (new units,): the old unit that new unit j copies; -1 where it copies
            none, and starts by its strips.
        share: (all units,): what the fan-out of every unit is multiplied by, old ones
            first. The shares of a unit and its copies sum to 1, so the function is
            preserved.
    """

    parent: Tensor
    share: Tensor

    @property
    def fresh(self) -> Tensor:
        """(new units,): which of them copy none."""
        return self.parent < 0

    def first(self, units: int) -> Copies:
        """The first new units; what the others had goes back to their families."""
        old = len(self.share) - len(self.parent)
        parent, share = self.parent[:units], self.share[: old + units]
        alone = old + torch.arange(units)
        family = torch.cat([torch.arange(old), torch.where(parent < 0, alone, parent)])
        total = share.new_zeros(old + units).index_add(0, family, share)
        return Copies(parent, share / total[family])


@dataclass(frozen=True)
class Blocks:
    """New blocks of a depth axis.

    A new block starts as a copy of the one that it is made after.

    Attributes:
        insertion: Where they stand.
        values: Tensors of a new block that differ, by its place and their name inside
            it.
        inherits: Whether the optimizer's state is copied, too.
        rescaled: How tensors of present blocks change before they are copied.
    """

    insertion: Insertion
    values: Mapping[tuple[int, str], Tensor] = field(default_factory=dict)
    inherits: bool = False
    rescaled: Mapping[str, Rescaling] = field(default_factory=dict)


@dataclass(frozen=True)
class Offer:
    """The weights that a method offers for `count` new units of one axis.

    A strip holds the new entries of one place, unit by unit: (units, entries per unit,
    *the other dimensions of the tensor at their present size). A place without a strip
    starts by its fill, or as a copy where `copies` is given.

    Attributes:
        axis, count: For which axis, and how many units or blocks of it.
        strips: The new entries, by place.
        copies: The new units as copies of old ones.
        blocks: New units of a depth axis.
        gains: Predicted first-order gains per unit, best first, where the method finds
            them.
        error: The standard error of one gain, where gains are measured on a sample.
        freedom: How many weights of a unit were fitted to that very sample.
        flops: What finding the weights cost.
        note: For the reader of the log.
    """

    axis: str
    count: int
    strips: Mapping[Place, Tensor] = field(default_factory=dict)
    copies: Copies | None = None
    blocks: Blocks | None = None
    gains: tuple[float, ...] = ()
    error: float = 0.0
    freedom: float = 0.0
    flops: int = 0
    note: str = ""

    def best(self, count: int) -> Offer:
        """The first `count` units, which are the best where the method ranks them."""
        if count == self.count:
            return self
        held = list(self.strips.values())
        if self.copies is not None:
            held.append(self.copies.parent)
        # All hold the same number; one without any starts by the fills of its places.
        units = count * len(held[0]) // self.count if held else count
        strips = {place: strip[:units] for place, strip in self.strips.items()}
        copies = self.copies.first(units) if self.copies else None
        return replace(
            self, count=count, strips=strips, copies=copies, gains=self.gains[:units]
        )


@dataclass(frozen=True)
class Scaling:
    """What care does to the old weights: factors per tensor, or per place along an
    axis.
    """

    tensors: Mapping[str, float] = field(default_factory=dict)
    places: Mapping[Place, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.tensors or self.places)

    def __add__(self, other: Scaling) -> Scaling:
        tensors, places = dict(self.tensors), dict(self.places)
        for name, factor in other.tensors.items():
            tensors[name] = tensors.get(name, 1.0) * factor
        for place, factor in other.places.items():
            places[place] = places.get(place, 1.0) * factor
        return Scaling(tensors, places)


@dataclass(frozen=True)
class Ramp:
    """Shorter steps of the optimizers for a while: by a factor that rises evenly from
    `start` to 1.

    Attributes:
        steps: For how many optimizer steps after the growth.
        start: The factor at first.
        whole: Whether all weights go slower, or only the new entries.
    """

    steps: int
    start: float = 0.0
    whole: bool = False


@dataclass(frozen=True)
class Tracking:
    """Running statistics of norms that follow the batches faster for a while.

    Attributes:
        steps: For how many optimizer steps after the growth.
        momentum: The largest weight of the newest batch in the running mean meanwhile.
        values: How many values of a channel the running mean shall stand for at least.
    """

    steps: int
    momentum: float
    values: int


Aftercare = Ramp | Tracking
"""What goes on for some steps after a growth."""


@dataclass(frozen=True)
class Treatment:
    """What the rest of the net and the optimizer get at a growth.

    Attributes:
        scaling: What happens to the old weights.
        warm: Whether new second moments start at the mean of the old ones.
        reset: Whether the optimizers forget everything.
        after: What goes on for some steps after it.
    """

    scaling: Scaling = field(default_factory=Scaling)
    warm: bool = False
    reset: bool = False
    after: tuple[Aftercare, ...] = ()

    def __add__(self, other: Treatment) -> Treatment:
        return Treatment(
            self.scaling + other.scaling,
            self.warm or other.warm,
            self.reset or other.reset,
            self.after + other.after,
        )


@dataclass(frozen=True)
class Settled:
    """What a method that trains on the side gives back.

    Attributes:
        tensors: Every changed tensor in full, at its new shape.
        flops: What settling cost.
        health: By moment and axis, figures of the new units.
        notes: For the reader of the log, by axis.
    """

    tensors: Mapping[str, Tensor]
    flops: int = 0
    health: Mapping[str, Mapping[str, Mapping[str, float]]] = field(
        default_factory=dict
    )
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Share:
    """How many units each axis gets, why, and what finding that out cost.

    Attributes:
        counts: Units by axis.
        votes: By axis, the figures behind the decision, where it was a measured one.
        flops: What it cost.
        refusal: Why no axis gets any.
        final: Whether it is not worth asking again.
    """

    counts: dict[str, int]
    votes: dict[str, dict[str, float]] = field(default_factory=dict)
    flops: int = 0
    refusal: str = ""
    final: bool = False
