"""Short words for the axes of all layers: which axes "mlp" means in one model.

They are read off the structure: what lies inside the blocks, what runs through them,
where the model ends. No family is known by name; the words of an adapter's rank alone
are those of the peft package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import TypeVar

from torch import nn

from meristem.core.axis import Axes, Axis
from meristem.core.errors import GrowthRefused
from meristem.structure import Structure

T = TypeVar("T")


def spelled(
    structure: Structure, growing: Axes, patterns: str | Sequence[str]
) -> list[str]:
    """Glob patterns in which words of all layers have become names of axes."""
    found = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        name = pattern.removeprefix("!")
        sign = pattern[: len(pattern) - len(name)]
        if _is_word(structure, name):
            reader = Reader(structure, growing)
            # What cannot grow may be left out all the same.
            meant = reader.meant(name) if sign else reader.axes(name)
            found += [sign + axis.name for axis in meant]
        else:
            found.append(pattern)
    return found


def by_axis(
    structure: Structure,
    growing: Callable[[], Axes],
    named: Mapping[str, T],
    *,
    limits: bool = False,
) -> dict[str, T]:
    """What is said of axes by their names, by short names or by words, by whole names.

    Args:
        structure: Of the model.
        growing: Gives the axes that grow; asked only where there is a word.
        named: By name; what is named itself wins over what a word means.
        limits: Whether this forbids rather than asks: of axes that do not grow, too.

    Raises:
        UnknownAxis: A name is neither.
        GrowthRefused: A word means nothing in this model.
    """
    found: dict[str, T] = {}
    explicit: dict[str, T] = {}
    for name, value in named.items():
        if _is_word(structure, name):
            reader = Reader(structure, growing())
            for axis in reader.meant(name) if limits else reader.axes(name):
                found.setdefault(axis.name, value)
        else:
            explicit[structure.axes.named(name).name] = value
    return found | explicit


def _is_word(structure: Structure, name: str) -> bool:
    """Whether a name is a word, and not that of an axis of this model."""
    axes = structure.axes
    known = {**axes, **axes.every_end, **axes.frozen}
    return name in WORDS and axes.full(name) not in known


class Reader:
    """Which of the axes of one model that grow a word means."""

    def __init__(self, structure: Structure, growing: Axes) -> None:
        self._structure = structure
        self._axes = growing
        self._runs: dict[str, tuple[str, ...]] = {}
        for name, depth in structure.depths.items():
            if depth.copied:
                self._runs[name] = tuple(f"{block}." for block in depth.blocks)
        self._blocks = tuple(chain.from_iterable(self._runs.values()))
        every = {**structure.axes, **structure.axes.every_end}
        self._streams: set[str] = set()
        for axis in every.values():
            if axis.kind == "width" and self._through(axis):
                self._streams.update(slot.name for slot in axis.slots)

    def meant(self, word: str) -> list[Axis]:
        """The axes that a word means, whether they grow or not."""
        axes = self._structure.axes
        every = {**axes, **axes.every_end}
        return [axis for axis in every.values() if WORDS[word](self, axis)]

    def axes(self, word: str) -> list[Axis]:
        """The axes that a word means; at least one.

        Raises:
            GrowthRefused: There is none.
        """
        every = {**self._axes, **self._axes.every_end}
        found = [axis for axis in every.values() if WORDS[word](self, axis)]
        if not found:
            raise GrowthRefused(self._absent(word))
        return found

    def _absent(self, word: str) -> str:
        """Why a word means nothing here: the reason of the first axis that it would
        have meant.
        """
        every = {**self._structure.axes, **self._structure.axes.every_end}
        for name, axis in every.items():
            if name in self._axes.frozen and WORDS[word](self, axis):
                return f"{word} cannot grow: {name}: {self._axes.frozen[name]}"
        for name, reason in self._axes.frozen.items():
            if name.endswith(f":{word}"):
                return f"{word} cannot grow: {name}: {reason}"
        if word in ("mlp", "heads", "kv_heads", "depth") and not self._blocks:
            return f"this model has no {word} to grow: none of its blocks repeat"
        return f"this model has no {word} to grow"

    def heads_per_unit(self, axis: Axis) -> int:
        """How many heads attend more where the axis has one more unit: with grouped
        queries one in every group.
        """
        groups = axis.name.rpartition(":")[0] + ":kv_heads"
        every = {**self._structure.axes}
        return every[groups].size if groups in every else 1

    # -- one question for every word

    def _inside(self, axis: Axis) -> bool:
        return axis.name.startswith(self._blocks)

    def _through(self, axis: Axis) -> bool:
        """Whether blocks read it or write to it from outside."""
        names = [slot.name for slot in axis.slots]
        inside = any(name.startswith(self._blocks) for name in names)
        return inside and not self._inside(axis)

    def mlp(self, axis: Axis) -> bool:
        # A part of a tensor is named by its dimension.
        suffix = axis.name.partition(":")[2]
        is_plain = axis.kind == "width" and (not suffix or suffix.isdigit())
        if not is_plain or not self._inside(axis) or self.lora_rank(axis):
            return False
        # What reads the stream; other small nets in a block make positions and gates.
        made = {slot.name for slot in axis.places("fan_in")}
        return not self._streams or bool(made & self._streams)

    def heads(self, axis: Axis) -> bool:
        return axis.kind == "heads" and axis.name.endswith(":heads")

    def kv_heads(self, axis: Axis) -> bool:
        return axis.kind == "heads" and axis.name.endswith(":kv_heads")

    def width(self, axis: Axis) -> bool:
        is_end = axis.end in ("vocabulary", "input")
        return axis.kind == "width" and not is_end and self._through(axis)

    def depth(self, axis: Axis) -> bool:
        if axis.name not in self._runs:
            return False
        # Of stages with blocks in them the blocks are what is meant.
        mine = self._runs[axis.name]
        depths = self._structure.depths
        inner = [depths[name].path for name in self._runs if name != axis.name]
        return not any(f"{path}.".startswith(mine) for path in inner)

    def vocabulary(self, axis: Axis) -> bool:
        words, head = _embeddings(self._structure.model)
        holders = {slot.name.rpartition(".")[0] for slot in axis.slots}
        if words is None:
            ends = self._structure.axes.ends.values()
            tables = [end for end in ends if end.end == "vocabulary"]
            return tables == [axis]
        if axis.end == "vocabulary":
            return words in holders
        return axis.end == "output" and head in holders and not self._through(axis)

    def classes(self, axis: Axis) -> bool:
        is_output = axis.end == "output" and not self._through(axis)
        return is_output and not self.vocabulary(axis)

    def lora_rank(self, axis: Axis) -> bool:
        return axis.kind == "width" and "lora_" in axis.name


def _embeddings(model: nn.Module) -> tuple[str | None, str | None]:
    """The modules of words in and words out, where the model says which they are."""
    names = {id(module): name for name, module in model.named_modules()}
    found: list[str | None] = []
    for ask in ("get_input_embeddings", "get_output_embeddings"):
        try:
            told = getattr(model, ask, lambda: None)()
        except NotImplementedError:  # it has none
            told = None
        found.append(names.get(id(told)))
    return found[0], found[1]


WORDS: Mapping[str, Callable[[Reader, Axis], bool]] = {
    "mlp": Reader.mlp,
    "heads": Reader.heads,
    "kv_heads": Reader.kv_heads,
    "width": Reader.width,
    "depth": Reader.depth,
    "vocabulary": Reader.vocabulary,
    "classes": Reader.classes,
    "lora_rank": Reader.lora_rank,
}
"""The words of all layers, and how each is recognised."""
