"""What every depth axis has in common: blocks that stand in an order, and changes of
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from meristem.core.axis import Axis
from meristem.core.change import Insertion
from meristem.core.errors import GrowthRefused
from meristem.structure.labels import Label

Form = Literal["run", "after", "before"]


def follows(form: Form) -> bool:
    """Whether new blocks of this form stand behind the present ones."""
    return form != "before"


@dataclass(frozen=True)
class Depth:
    """A depth axis of one model: where its blocks stand, and what they cost.

    Attributes:
        name: The axis.
        path: The container of the blocks; in a chain, the layer, or what has grown
            there.
        form: "run" where like blocks stand in a container; "after" and "before" where
            layers stand behind or in front of a layer of a chain.
        first: The place of the first block in its container.
        fixed: How many leading blocks are neither copied nor dropped.
        blocks: The names of the modules.
        silent: By block, the tensors that add to the stream, under their names inside
            it. Where these are zero, a residual block passes the stream on.
        costs: By block, its multiply-adds.
        activation: In a chain, what stands before a new layer.
        copied: Whether a new block is a copy of an old one.
        least: How many blocks must stay.
        parent: The block that one more block is made after.
    """

    name: str
    path: str
    form: Form
    first: int
    fixed: int
    blocks: tuple[str, ...]
    copied: bool
    silent: tuple[tuple[str, ...], ...] = ()
    costs: tuple[tuple[list[Label], ...], ...] = ()
    activation: str = ""

    @property
    def size(self) -> int:
        return len(self.blocks)

    @property
    def follows(self) -> bool:
        """Whether new blocks stand behind the present ones."""
        return follows(self.form)

    @property
    def least(self) -> int:
        return self.fixed + int(self.copied)

    @property
    def parent(self) -> int:
        # In front of an output layer every new layer takes what the old one took.
        return self.size - 1 if self.follows else 0

    @property
    def listed(self) -> bool:
        """Whether records list it: a place of a chain counts once it has grown."""
        return self.copied or self.size > 1 or not self.name.endswith(":depth")

    def axis(self) -> Axis:
        """The depth as an axis: it counts blocks, and no tensor dimension follows it."""
        return Axis(self.name, "depth", self.size, 1, ())

    def with_blocks(self, blocks: Sequence[int], new: Sequence[bool]) -> Insertion:
        """The change that puts old and new blocks in this order."""
        return Insertion(
            self.name,
            self.path,
            self.form,
            self.first,
            self.size,
            tuple(blocks),
            tuple(new),
            self.activation if any(new) else "",
        )

    def unchanged(self) -> Insertion:
        """The blocks as they stand."""
        return self.with_blocks(range(self.size), [False] * self.size)

    def appended(self, count: int) -> Insertion:
        """`count` new blocks behind the present ones, each made after the same parent."""
        blocks = [*range(self.size), *[self.parent] * count]
        return self.with_blocks(blocks, [False] * self.size + [True] * count)

    def without(self, amount: int | Sequence[int]) -> Insertion:
        """The change that drops the last so many blocks, or those with these indices."""
        if isinstance(amount, int):
            drop = set(range(self.size - amount, self.size))
        else:
            drop = {int(block) for block in amount}
        outside = any(not self.fixed <= block < self.size for block in drop)
        if not drop or outside or self.size - len(drop) < self.least:
            must = f", of which the first {self.fixed} must stay" if self.fixed else ""
            raise GrowthRefused(
                f"axis {self.name!r} has blocks 0..{self.size - 1}{must}; "
                f"{self.least} in all must stay; got {amount!r}"
            )
        # The order of the blocks that stay does not change.
        kept = [block for block in range(self.size) if block not in drop]
        return self.with_blocks(kept, [False] * len(kept))

    def renamed(self, name: str) -> Depth:
        return replace(self, name=name)
