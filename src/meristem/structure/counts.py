"""What follows new blocks: numbers of layers, tables with an entry per block,
positions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from meristem.core.change import AttributeChange, Insertion, Plan
from meristem.structure.depth import Depth
from meristem.structure.discover import Structure
from meristem.structure.insertion import insert
from meristem.structure.repair import first_line
from meristem.structure.runs import find_runs
from meristem.structure.tracer import ModuleStack, Sums, with_lists
from meristem.structure.twin import apply_edits, looking, submodule, table_of

TRIALS = 30
"""Largest number of re-traces that the search for one attribute may cost."""
# Names of numbers of layers.
_COUNT = re.compile(
    r"^(n|num|number_of)_?((hidden|encoder|decoder|transformer)_?)?(layers?|blocks?)$"
    r"|^depth$"
)
# Names of positions, where one block is all there is to tell by.
_POSITION = re.compile(
    r"(^|_)(layer|block|depth|stage)_?(idx|index|id|i|num|number|position)$"
    r"|^layer$|^i_(layer|block)$"
)
# Names of positions, where two blocks count on.
_COUNTER = re.compile(
    rf"{_POSITION.pattern}|(^|_)(idx|index|id|number|position|order)$|^(i|n|lid)$"
)

Key = tuple[str, str]
"""A module, and one of its attributes."""


def counts_for(
    structure: Structure, plan: Plan, insertions: Sequence[Insertion]
) -> tuple[tuple[AttributeChange, ...], str | None]:
    """The attributes that follow new or dropped blocks, or the refusal.

    A re-trace must pass through every block.
    """
    # The names that surely count are set first; a wrong guess fails the re-trace.
    followers = _Followers(structure, plan, insertions)
    sure: dict[Key, AttributeChange] = {}
    for insertion in followers.runs:
        depths = list(structure.depths.values())
        for edit in counted(structure.model, depths, insertion):
            sure[edit.module, edit.attribute] = edit
    edits, problem = followers.attempt(list(sure.values()))
    if problem is None:
        return tuple(edits), None
    if sure:  # a name that says something else here: a number of layers of another kind
        edits, without = followers.attempt([])
        if without is None:
            return tuple(edits), None
    possible = []
    for insertion in followers.runs:
        for edit in candidates(structure.model, insertion):
            if (edit.module, edit.attribute) not in sure:
                possible.append(edit)
    # One at a time, then all together.
    alone = [[edit] for edit in possible[:TRIALS]]
    for trial in [*alone, possible]:
        edits, still = followers.attempt([*sure.values(), *trial])
        if still is None:
            return tuple(edits), None
    return (), problem


class _Followers:
    """The re-traces of one plan with its blocks in their places."""

    def __init__(
        self, structure: Structure, plan: Plan, insertions: Sequence[Insertion]
    ) -> None:
        self._structure, self._plan, self._insertions = structure, plan, insertions
        self.runs: list[Insertion] = []
        for insertion in insertions:
            if structure.depths[insertion.axis].copied:
                self.runs.append(insertion)
        paths = {insertion.path for insertion in self.runs}
        self._beside: list[Depth] = []
        for depth in structure.depths.values():
            if depth.copied and depth.path in paths:
                self._beside.append(depth)
        self._positions = {}
        for depth in self._beside:
            self._positions[depth.name] = positions_in(structure.model, depth)

    def attempt(
        self, edits: Sequence[AttributeChange]
    ) -> tuple[list[AttributeChange], str | None]:
        """The edits with the positions that follow, and what stood in the way."""
        structure = self._structure
        mode = structure.mode
        shapes = {change.name: change.after for change in self._plan.tensors}
        copied = structure.twin_of_shape(shapes, self._plan.attributes, mode).eval()
        try:
            followed = self._placed(copied, edits)
        except AttributeError as error:  # a container inside a block that moves
            return [], (
                "these depths lie inside each other; grow one after the other "
                f"({error})"
            )
        stack = ModuleStack(copied)
        args, kwargs = structure.example_for(mode, self._plan.changes)
        try:
            with looking(mode), Sums():
                copied(*args, **kwargs)
        except Exception as error:
            where = stack.innermost or "the model"
            return followed, f"{where} fails with the new depth: {first_line(error)}"
        return followed, self._missed(copied, stack)

    def _placed(
        self, copied: nn.Module, edits: Sequence[AttributeChange]
    ) -> list[AttributeChange]:
        """Put the blocks into a copy, and set what follows them."""
        followed = list(edits)
        for insertion in self._insertions:
            insert(copied, insertion)
        changed = {insertion.axis: insertion for insertion in self.runs}
        for depth in self._beside:
            now = changed.get(depth.name) or depth.unchanged()
            names = standing(copied, now, self.runs)
            moved = shift(now, self.runs)
            known = self._positions[depth.name]
            followed += renumbered(copied, depth, names, known, moved)
        apply_edits(copied, followed)
        return followed

    def _missed(self, copied: nn.Module, stack: ModuleStack) -> str | None:
        """Why the blocks are no runs, or None."""
        found, _ = find_runs(copied, with_lists(copied, stack.passes))
        for insertion in self.runs:
            wanted = tuple(standing(copied, insertion, self.runs))
            if not any(_is_run(run, insertion, wanted) for run in found):
                return (
                    "the forward does not pass through every block of "
                    f"{insertion.path} in order"
                )
        return None


def _is_run(run: Depth, insertion: Insertion, blocks: tuple[str, ...]) -> bool:
    return run.path == insertion.path and run.blocks == blocks


def standing(
    model: nn.Module, insertion: Insertion, beside: Sequence[Insertion] = ()
) -> list[str]:
    """The names of the blocks of a run that has been changed, in order.

    Others (`beside`) may have changed the same container.
    """
    keys = list(submodule(model, insertion.path)._modules)
    prefix = f"{insertion.path}." if insertion.path else ""
    first = insertion.first + shift(insertion, beside)
    return [f"{prefix}{key}" for key in keys[first : first + len(insertion.blocks)]]


def shift(insertion: Insertion, beside: Sequence[Insertion]) -> int:
    """How many places a run moves because runs before it in its container change."""
    moved = 0
    for other in beside:
        if other.path == insertion.path and other.first < insertion.first:
            moved += len(other.blocks) - other.size
    return moved


def counted(
    model: nn.Module, depths: Sequence[Depth], insertion: Insertion
) -> Iterator[AttributeChange]:
    """Attributes that surely follow: numbers of layers on the way to the container.

    They are known by their names.
    """
    rivals = []
    for depth in depths:
        same_size = depth.copied and depth.size == insertion.size
        if same_size and depth.path != insertion.path:
            rivals.append(depth)
    for owner, attribute, value in _numbers(model, insertion.path):
        if value != insertion.size:
            continue
        prefix = f"{owner}." if owner else ""
        shared = any(depth.path.startswith(prefix) for depth in rivals)
        if not shared and _COUNT.search(attribute.rpartition(".")[2]):
            yield AttributeChange(owner, attribute, value, len(insertion.blocks))


def candidates(model: nn.Module, insertion: Insertion) -> Iterator[AttributeChange]:
    """Attributes that may follow: numbers that equal the old depth, tables of blocks."""
    for owner, attribute, value in _numbers(model, insertion.path):
        if value == insertion.size:
            yield AttributeChange(owner, attribute, value, len(insertion.blocks))
        elif type(value) in (list, tuple) and len(value) == insertion.size:
            entries = [value[block] for block in insertion.blocks]
            yield AttributeChange(owner, attribute, value, type(value)(entries))


def _numbers(model: nn.Module, path: str) -> Iterator[tuple[str, str, Any]]:
    """Ints, lists and tuples that the modules on the way to a container hold.

    They hold them themselves, or in a plain object (a config).
    """
    parts = path.split(".") if path else []
    for depth in range(len(parts) + 1):
        owner = ".".join(parts[:depth])
        for attribute, value in vars(submodule(model, owner)).items():
            if attribute.startswith("_") or isinstance(value, (nn.Module, Tensor)):
                continue
            if _is_number_or_table(value):
                yield owner, attribute, value
            elif not isinstance(value, dict):
                for key, inner in table_of(value).items():
                    if _is_number_or_table(inner) and not key.startswith("_"):
                        yield owner, f"{attribute}.{key}", inner


def _is_number_or_table(value: Any) -> bool:
    return isinstance(value, (int, list, tuple)) and not isinstance(value, bool)


def positions_in(model: nn.Module, depth: Depth) -> dict[Key, int]:
    """Attributes inside the blocks that number them, with the number of the first.

    Three blocks that count on from their place are evidence enough. Else the name must
    say so, and that of a lone block together with its number.

    Returns:
        By (module inside the block, attribute), the number of the first block.
    """
    blocks = [submodule(model, name) for name in depth.blocks[depth.fixed :]]
    start = depth.first + depth.fixed
    found = {}
    for name, module in blocks[0].named_modules():
        # The numbers in layers of torch are sizes, never positions.
        if type(module).__module__.startswith("torch."):
            continue
        for attribute, value in vars(module).items():
            if type(value) is not int or attribute.startswith("_"):
                continue
            values = [vars(submodule(block, name)).get(attribute) for block in blocks]
            counts_on = values == [value + i for i in range(len(blocks))]
            if counts_on and _is_position(attribute, value, start, len(blocks)):
                found[name, attribute] = value
    return found


def _is_position(attribute: str, value: int, start: int, blocks: int) -> bool:
    if blocks == 1:
        # Positions count from 0, from 1, or from the place in the container.
        near = value in (0, 1, start, start + 1)
        return near and bool(_POSITION.search(attribute))
    if blocks > 2 and value in (0, start):
        return True
    return bool(_COUNTER.search(attribute))


def renumbered(
    model: nn.Module,
    depth: Depth,
    names: Sequence[str],
    found: Mapping[Key, int],
    moved: int,
) -> Iterator[AttributeChange]:
    """The positions of the blocks that now stand under `names`.

    They are `moved` places on where they count from the start of the container.
    """
    for place, block in enumerate(names[depth.fixed :]):
        for (name, attribute), first in found.items():
            module = f"{block}.{name}" if name else block
            before = getattr(submodule(model, module), attribute)
            after = first + place + (moved if first >= depth.first else 0)
            if before != after:
                yield AttributeChange(module, attribute, before, after)
