"""Short words for the axes of all layers: what "mlp=x1.5" means in one model.

They are read off the structure: what lies inside the blocks, what runs through them,
where the model ends. No family is known by name; the words of an adapter's rank alone
are those of the peft package.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain

from torch import nn

from meristem.core.axis import Axes, Axis
from meristem.core.errors import GrowthRefused, nearest
from meristem.event.growable import growable
from meristem.event.steps import Methods
from meristem.structure import Structure

_AMOUNT = re.compile(r"(?P<sign>[+x]?)(?P<number>\d+(\.\d+)?)$")


@dataclass(frozen=True)
class Wish:
    """One part of `to`: "+4" adds, "x1.5" multiplies, "48" is the size itself."""

    word: str
    text: str
    sign: str
    number: float

    def size(self, present: int, step: int) -> int:
        """The size after the growth, in whole steps."""
        if self.sign == "+":
            return present + int(self.number)
        wanted = present * self.number if self.sign == "x" else self.number
        return round(wanted / step) * step


def wishes(to: str) -> list[Wish]:
    """The parts of "depth=+4,mlp=x1.5".

    Raises:
        GrowthRefused: A word or an amount is none.
    """
    if not isinstance(to, str):
        raise TypeError(f'to is a string, as "depth=+4,mlp=x1.5"; got {to!r}')
    found = []
    for part in to.split(","):
        word, equals, text = (piece.strip() for piece in part.partition("="))
        amount = _AMOUNT.match(text)
        if not part.strip():
            raise GrowthRefused(f"a part of {to!r} is empty")
        if word not in WORDS:
            known = ", ".join(WORDS)
            raise GrowthRefused(
                f"{word!r} is no word of all layers.{nearest(word, WORDS)} There are: "
                f"{known}"
            )
        whole = amount is not None and (
            amount["sign"] == "x" or amount["number"].isdigit()
        )
        if not equals or amount is None or not whole:
            raise GrowthRefused(
                f"{part.strip()!r} is no growth. hint: write {word}=+4 (more), {word}=x1.5 "
                f"(times) or {word}=48 (the size itself)"
            )
        found.append(Wish(word, text, amount["sign"], float(amount["number"])))
    words = [wish.word for wish in found]
    for word in words:
        if words.count(word) > 1:
            raise GrowthRefused(f"{word!r} is named twice in {to!r}")
    return found


def counts(structure: Structure, to: str, how: Methods = ()) -> dict[str, int]:
    """What to add to which axis, for every layer alike.

    Raises:
        GrowthRefused: A word means nothing in this model, or no growth of it.
    """
    asked = wishes(to)
    reader = _Reader(structure, how)
    found: dict[str, int] = {}
    for wish in asked:
        axes = reader.axes(wish.word)
        for axis in axes:
            # Heads are counted as configs count them: all that attend.
            each = reader.heads_per_unit(axis) if wish.word == "heads" else 1
            present = axis.size * each
            more = wish.size(present, axis.multiple * each) - present
            if more <= 0 or more % each:
                raise GrowthRefused(_no_growth(wish, axis, present, each))
            found[axis.name] = more // each
    return found


def _no_growth(wish: Wish, axis: Axis, present: int, each: int) -> str:
    step = axis.multiple * each
    of_steps = f", in steps of {step}" if step > 1 else ""
    return (
        f"{wish.word}={wish.text} does not make {axis.name} larger than its {present}"
        f"{of_steps}"
    )


class _Reader:
    """Which axes of one model a word means."""

    def __init__(self, structure: Structure, how: Methods) -> None:
        self._structure = structure
        self._axes: Axes = growable(structure, how=how)
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


WORDS: Mapping[str, Callable[[_Reader, Axis], bool]] = {
    "mlp": _Reader.mlp,
    "heads": _Reader.heads,
    "kv_heads": _Reader.kv_heads,
    "width": _Reader.width,
    "depth": _Reader.depth,
    "vocabulary": _Reader.vocabulary,
    "classes": _Reader.classes,
    "lora_rank": _Reader.lora_rank,
}
"""The words of all layers, and how each is recognised."""
