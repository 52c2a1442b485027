"""What a growth changes, as values: shapes, attributes, blocks, and the plan of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from meristem.core.axis import Place
from meristem.core.example import Example, example_from, example_json

Sources = NDArray[np.int64]
"""For every entry of a resized dimension, the old index that it continues, or -1."""
Spans = list[list[int]]
"""Sources in short: [first old index, length] for entries that go together, [-1,
length] for new ones.
"""


@dataclass(frozen=True)
class TensorChange:
    """A parameter or buffer that changes shape.

    `sources[d][i]` is the old index of entry i of dimension d, or -1.
    """

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

    def __str__(self) -> str:
        return (
            f"{self.module or 'model'}.{self.attribute}: {self.before} -> {self.after}"
        )


@dataclass(frozen=True)
class Insertion:
    """The blocks of a depth axis after a change.

    At place i stands the present block `blocks[i]` or, where `new[i]`, a new one made
    after it.

    Attributes:
        axis: The depth.
        path: The container of the blocks; in a chain, the layer, which is block 0.
        form: "run" where like blocks stand in the container; "after" and "before" where
            layers stand behind or in front of the layer.
        first: The place of the first block in its container.
        size: The present number of blocks.
        blocks, new: As above.
        activation: In a chain, what stands before a new layer.
    """

    axis: str
    path: str
    form: Literal["run", "after", "before"]
    first: int
    size: int
    blocks: tuple[int, ...]
    new: tuple[bool, ...]
    activation: str = ""

    @property
    def new_places(self) -> list[int]:
        """The places of the new blocks."""
        return [place for place, new in enumerate(self.new) if new]

    def __str__(self) -> str:
        present = ", ".join(str(block) for block in range(self.size))
        placed = []
        for block, new in zip(self.blocks, self.new, strict=True):
            placed.append(f"+{block}" if new else str(block))
        return f"{self.axis}: blocks {present} -> {', '.join(placed)}"


class Rescaling(NamedTuple):
    """How a present tensor changes: (w + shift) x factor - shift, where the model adds
    `shift` to what it stores. The scale of a norm does where its width grows.
    """

    factor: float
    shift: float = 0.0

    def of(self, value: Tensor) -> Tensor:
        """The tensor after the change."""
        result = value * self.factor
        return result + self.shift * (self.factor - 1) if self.shift else result

    def undone(self, value: Tensor) -> Tensor:
        """The tensor before it."""
        if self.shift:
            value = value - self.shift * (self.factor - 1)
        return value / self.factor


@dataclass(frozen=True)
class Plan:
    """The dry run of a growth: everything that would change, or why it is refused.

    True if the growth is possible. Prints as a list of changes, goes to JSON and back
    (`json`, `from_json`), and is applied by `meristem.grow_(model, plan)`.

    Attributes:
        before, after: Sizes by axis.
        tensors: Every tensor that changes shape, with the place of every old entry.
        layout: By axis and place, where the units lie along a dimension after the
            change: an array (units, entries per unit), old units first.
        attributes: Module attributes that mirror a size.
        rescaled: How norm weights change whose width does, and what blocks add to the
            stream where they share it with their copies.
        insertions: Where new blocks stand.
        counts: Attributes that follow new blocks, in modules named as they are then.
        outputs: The sources of every dimension of every output; None for an output that
            may change (the loss, where there are more classes).
        parameters: Before and after.
        flops: Of one forward pass on the example, before and after.
        refusal: Why the growth is not possible.
        wishes: What was asked for.
        example: The call on which it was planned.
        changes: The labels that change, for the structure that made the plan.
        followed: Whether everything that follows the shapes has been looked at.
        stale: Numbers beside the traced forward that hold the old size, and may or may
            not mean it.
        stopped: The module whose code did not follow, where all its numbers were tried.
        mirrored: Whether the numbers outside of the traced forward have been looked at.
        unsaid: Why the model's config cannot say the new sizes, so that `from_pretrained`
            would not give the grown model back; None where it can or there is none.
    """

    before: Mapping[str, int]
    after: Mapping[str, int]
    tensors: tuple[TensorChange, ...] = ()
    layout: Mapping[str, Mapping[Place, Sources]] = field(default_factory=dict)
    attributes: tuple[AttributeChange, ...] = ()
    rescaled: Mapping[str, Rescaling] = field(default_factory=dict)
    insertions: tuple[Insertion, ...] = ()
    counts: tuple[AttributeChange, ...] = ()
    outputs: tuple[tuple[Sources, ...] | None, ...] = ()
    parameters: tuple[int, int] = (0, 0)
    flops: tuple[int, int] = (0, 0)
    refusal: str | None = None
    wishes: Mapping[str, int | Sequence[int]] = field(default_factory=dict)
    example: Example | None = None
    changes: Mapping[Any, Sources] = field(default_factory=dict)
    followed: bool = False
    stale: tuple[str, ...] = ()
    stopped: str | None = None
    mirrored: bool = False
    unsaid: str | None = None

    def __bool__(self) -> bool:
        return self.followed and self.refusal is None

    @property
    def added(self) -> dict[str, int]:
        """Units added by axis; negative where they are dropped."""
        return {name: self.after[name] - self.before[name] for name in self.after}

    @cached_property
    def _by_name(self) -> dict[str, TensorChange]:
        return {change.name: change for change in self.tensors}

    def change(self, name: str) -> TensorChange:
        """What happens to one tensor."""
        return self._by_name[name]

    def __repr__(self) -> str:
        lines = []
        for name, after in self.after.items():
            lines.append(f"{name}: {self.before[name]} -> {after}")
        if self.refusal is not None:
            return "\n".join([*lines, f"refused: {self.refusal}"])
        for change in self.tensors:
            lines.append(f"  {change.name}: {change.before} -> {change.after}")
        for line in (*self.insertions, *self.attributes, *self.counts):
            lines.append(f"  {line}")
        lines += [f"  {line}" for line in self.stale]
        if self.unsaid is not None:
            lines.append(f"  {self.unsaid}")
        parameters = "parameters: {} -> {}".format(*self.parameters)
        flops = "forward FLOPs: {} -> {}".format(*self.flops)
        return "\n".join([*lines, f"{parameters}; {flops}"])

    def json(self) -> dict[str, Any]:
        """The plan in plain types: what was asked for, and all that it changes.

        The example is kept as shapes, with the values of integers; floating-point
        inputs are drawn anew when the plan is applied.

        Examples:
            >>> import json, torch, meristem as ms
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
            >>> stored = json.dumps(ms.plan(net, {"0": 2}, torch.randn(3, 4)).json())
            >>> ms.grow_(net, ms.Plan.from_json(json.loads(stored))).after
            {'0': 10}
        """
        wishes = {}
        for name, amount in self.wishes.items():
            wishes[name] = amount if isinstance(amount, int) else list(amount)
        return {
            "wishes": wishes,
            "before": dict(self.before),
            "after": dict(self.after),
            "tensors": [tensor_json(change) for change in self.tensors],
            "attributes": _edits_json(self.attributes),
            "rescaled": dict(self.rescaled),
            "insertions": [asdict(insertion) for insertion in self.insertions],
            "counts": _edits_json(self.counts),
            "parameters": list(self.parameters),
            "flops": list(self.flops),
            "refusal": self.refusal,
            "stale": list(self.stale),
            "unsaid": self.unsaid,
            "example": example_json(self.example),
        }

    @staticmethod
    def from_json(stored: Mapping[str, Any]) -> Plan:
        """The plan that `json` gave."""
        insertions = [insertion_from(entry) for entry in stored["insertions"]]
        first, second = stored["parameters"], stored["flops"]
        return Plan(
            dict(stored["before"]),
            dict(stored["after"]),
            tuple(tensor_change_from(entry) for entry in stored["tensors"]),
            attributes=_edits_from(stored["attributes"]),
            rescaled={
                name: Rescaling(*pair) for name, pair in stored["rescaled"].items()
            },
            insertions=tuple(insertions),
            counts=_edits_from(stored["counts"]),
            parameters=(first[0], first[1]),
            flops=(second[0], second[1]),
            refusal=stored["refusal"],
            stale=tuple(stored["stale"]),
            unsaid=stored["unsaid"],
            wishes=dict(stored["wishes"]),
            example=example_from(stored["example"]),
            followed=True,
        )


NO_CHANGE = Plan({}, {}, followed=True)
"""The plan that changes nothing."""


def spans(source: Sources) -> Spans:
    """Sources in short."""
    found: Spans = []
    for entry in source.tolist():
        # Spans keep a lineage small: most entries stay beside their neighbours.
        last = found[-1] if found else None
        continues = last is not None and last[0] >= 0 and entry == last[0] + last[1]
        stays_new = last is not None and last[0] < 0 and entry < 0
        if last is not None and (continues or stays_new):
            last[1] += 1
        else:
            found.append([entry, 1])
    return found


def sources_from(listed: Spans) -> Sources:
    """The sources that `spans` has put in short."""
    parts = [np.zeros(0, dtype=np.int64)]
    for first, length in listed:
        if first < 0:
            parts.append(np.full(length, -1, dtype=np.int64))
        else:
            parts.append(np.arange(first, first + length, dtype=np.int64))
    return np.concatenate(parts)


def tensor_json(change: TensorChange) -> dict[str, Any]:
    """A change of shape in plain types."""
    return {
        "name": change.name,
        "before": list(change.before),
        "after": list(change.after),
        "sources": [spans(source) for source in change.sources],
        "buffer": change.buffer,
    }


def tensor_change_from(entry: Mapping[str, Any]) -> TensorChange:
    """The change of shape that `tensor_json` gave."""
    return TensorChange(
        entry["name"],
        tuple(entry["before"]),
        tuple(entry["after"]),
        tuple(sources_from(source) for source in entry["sources"]),
        entry["buffer"],
    )


def insertion_from(entry: Mapping[str, Any]) -> Insertion:
    """The insertion whose fields were stored."""
    fields: dict[str, Any] = {}
    for key, value in entry.items():
        fields[key] = tuple(value) if isinstance(value, list) else value
    return Insertion(**fields)


def _edits_json(edits: Sequence[AttributeChange]) -> list[list[Any]]:
    listed = []
    for edit in edits:
        listed.append([edit.module, edit.attribute, edit.before, edit.after])
    return listed


def _edits_from(listed: Sequence[Sequence[Any]]) -> tuple[AttributeChange, ...]:
    return tuple(AttributeChange(*entry) for entry in listed)


def by_unit(tensor: Tensor, dim: int, layout: Sources) -> Tensor:
    """The entries of a tensor unit by unit.

    Returns:
        A tensor (units, entries per unit, *other dimensions).
    """
    return tensor.movedim(dim, 0)[index(layout).to(tensor.device)]


def index(array: Sources) -> Tensor:
    """A source array as an index tensor."""
    return torch.from_numpy(np.ascontiguousarray(array))
