"""The values that pass between the steps of a growth: a plan, a proposal of new weights, the record of what happened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from meristem.axis import Place

Sources = NDArray[np.int64]


@dataclass(frozen=True)
class TensorChange:
    """A parameter or buffer that changes shape; `sources[d][i]` is the old index of entry i of dimension d, or -1."""

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    sources: tuple[Sources, ...]
    buffer: bool = False


@dataclass(frozen=True)
class AttributeChange:
    """A module attribute that mirrors a size."""

    module: str
    attribute: str
    before: Any
    after: Any


@dataclass(frozen=True)
class Insertion:
    """The blocks of a depth axis after a change: on place i stands the present block `blocks[i]` or, where `new[i]`, a new
    one made after it.

    `form` is "run" where like blocks stand in the container at `path`, the first of them at `first`; "after" and "before"
    where layers stand behind or in front of the layer at `path`, which is block 0, with `activation` between.
    """

    axis: str
    path: str
    form: Literal["run", "after", "before"]
    first: int
    size: int
    blocks: tuple[int, ...]
    new: tuple[bool, ...]
    activation: str = ""

    def __str__(self) -> str:
        placed = [f"+{block}" if new else str(block) for block, new in zip(self.blocks, self.new, strict=True)]
        return f"{self.axis}: blocks {', '.join(map(str, range(self.size)))} -> {', '.join(placed)}"


@dataclass(frozen=True)
class Plan:
    """The dry run of a growth: every shape and attribute that would change, or why it is refused. Truthy if possible.

    `before` and `after` are sizes by axis; `layout[axis][place]` tells where the units of an axis lie along a dimension
    after the change, an array (units, entries per unit), old units first; `rescaled` holds the factor of norm weights whose
    width changes, `outputs` the sources of every output dimension; `insertions` say where new blocks stand, `counts` which
    attributes follow them (in modules named as they are then); `parameters` and `flops` (of one forward pass on the example) are pairs,
    before and after.
    """

    before: Mapping[str, int]
    after: Mapping[str, int]
    tensors: tuple[TensorChange, ...] = ()
    layout: Mapping[str, Mapping[Place, Sources]] = field(default_factory=dict, repr=False)
    attributes: tuple[AttributeChange, ...] = ()
    rescaled: Mapping[str, float] = field(default_factory=dict)
    insertions: tuple[Insertion, ...] = ()
    counts: tuple[AttributeChange, ...] = ()
    outputs: tuple[tuple[Sources, ...], ...] = field(default=(), repr=False)
    parameters: tuple[int, int] = (0, 0)
    flops: tuple[int, int] = (0, 0)
    refusal: str | None = None

    def __bool__(self) -> bool:
        return self.refusal is None

    @property
    def added(self) -> dict[str, int]:
        """Units added by axis; negative where they are dropped."""
        return {name: self.after[name] - self.before[name] for name in self.after}

    def change(self, name: str) -> TensorChange:
        """What happens to one tensor."""
        return next(change for change in self.tensors if change.name == name)

    def __repr__(self) -> str:
        lines = [f"{name}: {self.before[name]} -> {self.after[name]}" for name in self.after]
        if self.refusal is not None:
            return "\n".join([*lines, f"refused: {self.refusal}"])
        lines += [f"  {t.name}: {t.before} -> {t.after}" for t in self.tensors]
        lines += [f"  {insertion}" for insertion in self.insertions]
        edits = (*self.attributes, *self.counts)
        lines += [f"  {a.module or 'model'}.{a.attribute}: {a.before} -> {a.after}" for a in edits]
        lines.append("parameters: {} -> {}; forward FLOPs: {} -> {}".format(*self.parameters, *self.flops))
        return "\n".join(lines)


def new_blocks(insertion: Insertion) -> list[int]:
    """The places of the new blocks."""
    return [place for place, new in enumerate(insertion.new) if new]


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


@dataclass
class Growth:
    """What one growth did. Falsy when nothing grew.

    Attributes:
        added: Units added (or, for `narrow_`, removed: negative) by axis.
        before, after: Sizes by axis.
        parameters: Count over the whole model, before and after.
        max_change: Largest change of an output on the example, in eval mode, relative to the largest output.
        seconds: What the growth took.
        flops: What the growth cost, in floating-point operations: votes, proposals, adjustment, verification.
        health_flops: What later looks at the health of its units cost; diagnostics, like an evaluation.
        health: Figures of the new units by moment and axis (see `meristem.health`): "insertion", "adjust" where the method
            adjusts, "1", "10", "100" and "1000" steps later, "trained" at the end of a stage; `health["loss"]` holds the
            loss before, its spike and the steps to recover. Completed by the grower.
        votes: What `where` decided on, by axis, where it measured.
        notes: What the methods said, by axis.
        blocks: The places of new blocks, by depth axis, as they were right after the growth.
        replaced: Old parameter -> new one, where torch did not allow to keep the object. Empty as a rule.
    """

    added: dict[str, int]
    before: dict[str, int]
    after: dict[str, int]
    parameters: tuple[int, int]
    max_change: float
    seconds: float
    flops: int = 0
    health_flops: int = 0
    step: int | None = None
    health: dict[str, Any] = field(default_factory=dict)
    votes: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    blocks: dict[str, list[int]] = field(default_factory=dict)
    replaced: dict[nn.Parameter, nn.Parameter] = field(default_factory=dict, repr=False)

    def __bool__(self) -> bool:
        return any(self.added.values())

    def units(self) -> dict[str, Sequence[int]]:
        """The new units by axis: the last ones of a width, the new blocks of a depth."""
        return {name: self.blocks.get(name, range(self.before[name], self.after[name])) for name in self.added}

    def json(self) -> dict[str, Any]:
        """Everything but `replaced`, in plain types."""
        return {key: value for key, value in vars(self).items() if key != "replaced"}


@dataclass(frozen=True)
class Budget:
    """Upper limits of a grown net; a binding limit grows what still fits.

    Args:
        parameters: Trainable and frozen parameters of the whole model.
        flops: Floating-point operations of one forward pass, per example.
        units: Sum of the sizes of all widths.
        growths: Number of growths.
        sizes: Largest size by axis name.

    Examples:
        >>> Budget(parameters=500_000, sizes={"fc1": 256})
        Budget(parameters=500000, flops=None, units=None, growths=None, sizes={'fc1': 256})
    """

    parameters: int | None = None
    flops: int | None = None
    units: int | None = None
    growths: int | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("parameters", "flops", "units", "growths"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"Budget({name}=...) must be an int in [1, inf); got {value}")


def by_unit(tensor: Tensor, dim: int, layout: Sources) -> Tensor:
    """The entries of a tensor unit by unit: (units, entries per unit, *other dimensions)."""
    return tensor.movedim(dim, 0)[index(layout).to(tensor.device)]


def index(array: Sources) -> Tensor:
    """A source array as an index tensor."""
    return torch.from_numpy(np.ascontiguousarray(array))
