"""What a growth changes, as values: shapes, attributes, blocks, and the plan that lists them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from meristem.core.axis import Place

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


def by_unit(tensor: Tensor, dim: int, layout: Sources) -> Tensor:
    """The entries of a tensor unit by unit: (units, entries per unit, *other dimensions)."""
    return tensor.movedim(dim, 0)[index(layout).to(tensor.device)]


def index(array: Sources) -> Tensor:
    """A source array as an index tensor."""
    return torch.from_numpy(np.ascontiguousarray(array))

