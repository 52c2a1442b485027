"""What "depth=+4,mlp=x1.5" means in one model."""

from __future__ import annotations

import re
from dataclasses import dataclass

from meristem.core.axis import Axis
from meristem.core.errors import GrowthRefused, nearest
from meristem.event.growable import growable
from meristem.event.steps import Methods
from meristem.event.words import WORDS, Reader
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
        bare = re.match(r"[a-z_]*", word)
        if not equals and bare is not None and bare[0] in WORDS:
            amount_told = word.removeprefix(bare[0]) or "+4"
            raise GrowthRefused(
                f"{part.strip()!r} is no growth. hint: write {bare[0]}={amount_told}"
            )
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
    reader = Reader(structure, growable(structure, how=how))
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
