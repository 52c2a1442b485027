"""What the parts of a growth hand on: offered weights, shares, treatments, settled weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from meristem.core.axis import Place
from meristem.core.change import Insertion


@dataclass(frozen=True)
class Copies:
    """New units as copies of old ones.

    `parent[j]` is the old unit that new unit j copies; `share` multiplies the fan-out of all units, old ones first;
    the shares of a unit and its copies sum to 1, so the function is preserved.
    """

    parent: Tensor
    share: Tensor


@dataclass(frozen=True)
class Blocks:
    """New blocks of a depth axis.

    A new block starts as a copy of the one it is made after; `values` holds its own tensors where these differ, by its
    place and their name inside it. `inherits` says that the optimizer's state is copied too.
    """

    insertion: Insertion
    values: Mapping[tuple[int, str], Tensor] = field(default_factory=dict)
    inherits: bool = False

    def first(self, count: int) -> Blocks:
        """The first `count` new blocks alone; all of them stand behind the present ones."""
        placed = self.insertion
        kept = placed.size + count
        insertion = replace(placed, blocks=placed.blocks[:kept], new=placed.new[:kept])
        return replace(self, insertion=insertion, values={k: v for k, v in self.values.items() if k[0] < kept})


@dataclass(frozen=True)
class Proposal:
    """The weights that a method offers for `count` new units of one axis.

    A strip holds the new entries of one place, unit by unit: shape (units, entries per unit, *the other dimensions of
    the tensor at their present size). A place without a strip starts by its fill, or as a copy where `copies` is given.
    New units of a depth axis are `blocks`. `gains` are predicted first-order gains per unit, best first, where the method
    finds them; where they are measured on a sample, `error` is the standard error of one gain, and `freedom` how many weights
    of a unit were fitted to that very sample. `flops` is what finding them cost; `note` is for the reader of the log.
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

    def best(self, count: int) -> Proposal:
        """The first `count` units, which are the best where the method ranks them."""
        if count == self.count:
            return self
        if self.copies is not None:
            raise ValueError("a proposal of copies cannot be cut: its shares belong together")
        if self.blocks is not None:
            return replace(self, count=count, blocks=self.blocks.first(count), gains=self.gains[:count])
        units = count * len(next(iter(self.strips.values()))) // self.count
        strips = {place: strip[:units] for place, strip in self.strips.items()}
        return replace(self, count=count, strips=strips, gains=self.gains[:units])


@dataclass(frozen=True)
class Scaling:
    """What care does to the old weights: one factor per tensor, or one per place along the axis."""

    tensors: Mapping[str, float] = field(default_factory=dict)
    places: Mapping[Place, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Treatment:
    """What the rest of the net and the optimizer get at a growth: the sum of the chosen cares."""

    scaling: Scaling = field(default_factory=Scaling)
    warm: bool = False
    reset: bool = False

    def __add__(self, other: Treatment) -> Treatment:
        tensors = dict(self.scaling.tensors)
        for name, factor in other.scaling.tensors.items():
            tensors[name] = tensors.get(name, 1.0) * factor
        places = dict(self.scaling.places)
        for place, factor in other.scaling.places.items():
            places[place] = places.get(place, 1.0) * factor
        return Treatment(Scaling(tensors, places), self.warm or other.warm, self.reset or other.reset)


@dataclass(frozen=True)
class Settled:
    """What a method that trains on the side gives back: every changed tensor in full, and how the new units fared.

    `health[moment][axis]` holds figures of the new units; `flops` is what settling cost.
    """

    tensors: Mapping[str, Tensor]
    flops: int = 0
    health: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Share:
    """How many units each axis gets, why, and what finding that out cost.

    `votes[axis]` holds the figures behind the decision, where it was a measured one. Where no axis gets any, `refusal`
    says why, and `final` that it is not worth asking again.
    """

    counts: dict[str, int]
    votes: dict[str, dict[str, float]] = field(default_factory=dict)
    flops: int = 0
    refusal: str = ""
    final: bool = False
