"""Axes that a number of the code ties: they grow together.

`C // n_head` makes the width of a stream a multiple of the heads, and
`split((c, c))` gives two widths one number. Neither follows alone. They are found by
growing them together, in proportion to their sizes, until a re-trace follows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence

from meristem.structure.discover import Structure
from meristem.structure.labels import Label, atoms
from meristem.structure.planning import clash, sized
from meristem.structure.repair import Attempt, farthest

_ALIGNED = re.compile(r"multiple of (\d+) bytes")
# Re-traces that the search for ties may cost in one model.
_MOST = 100


def tie(structure: Structure, refused: Sequence[str]) -> dict[str, str | None]:
    """Find which of the axes that do not follow alone grow together, and note it.

    Args:
        structure: The traced model.
        refused: The axes, one of each kind of block.

    Returns:
        None for an axis that grows and takes others along, and what is said of these.
    """
    told: dict[str, str | None] = {}
    structure.stops.clear()
    search = _Ties(structure, refused)
    for leader in refused:
        if leader in told or search.left <= 0:
            continue
        steps = search.around(leader)
        if steps is None:
            continue
        _note(structure, leader, steps)
        beside = f"it grows together with {leader!r}, in steps of {steps[leader]}"
        told |= {name: None if name == leader else beside for name in steps}
    return told


def _note(structure: Structure, leader: str, steps: Mapping[str, int]) -> None:
    """Note that some axes grow together, and so do those of blocks that are alike."""
    groups: dict[str, Mapping[str, int]] = {}
    for group in _alike(structure, leader, steps):
        groups |= dict.fromkeys(group, group)
    structure.tie(groups)


def _alike(
    structure: Structure, leader: str, steps: Mapping[str, int]
) -> Iterator[dict[str, int]]:
    """The group, and the groups of the same names in blocks that are alike."""
    yield dict(steps)
    alike = structure.alike
    block = alike.block(structure.axes[leader])
    if block is None:
        return
    for other in alike.same(block):
        group = {}
        for name, step in steps.items():
            moved = f"{other}.{name.removeprefix(f'{block}.')}"
            group[moved if name.startswith(f"{block}.") else name] = step
        if other != block and all(name in structure.axes for name in group):
            yield group


class _Ties:
    """The search among the axes that do not follow alone."""

    def __init__(self, structure: Structure, refused: Sequence[str]) -> None:
        self._structure, self._refused = structure, list(refused)
        self._classes = structure.alike.classes(structure.axes.values())
        self.left = _MOST

    def around(self, leader: str) -> dict[str, int] | None:
        """The steps in which an axis grows, by itself or with others, or None."""
        group = [leader]
        best = self._attempt(group)
        step = self._asked(leader, best.problem or "")
        if step is not None:
            _, attempt, _ = farthest(self._structure, sized(self._structure, step))
            return step if attempt.problem is None else None
        while best.problem is not None:
            improved = self._joined(group, best)
            if improved is None:
                return None
            group, best = improved
        return self._steps(group) if len(group) > 1 else None

    def _asked(self, name: str, problem: str) -> dict[str, int] | None:
        """The step that a kernel asks for: rows that are aligned in memory."""
        asked = _ALIGNED.search(problem)
        if asked is None:
            return None
        axis = self._structure.axes[name]
        tensor = self._structure.tensors[axis.slots[0].name]
        return {name: axis.grain * max(int(asked[1]) // tensor.element_size(), 1)}

    def _joined(
        self, group: list[str], best: Attempt
    ) -> tuple[list[str], Attempt] | None:
        """The group with the others with which a re-trace gets farthest."""
        improved, reached = None, best.reached
        for others in self._candidates(group, best):
            if self.left <= 0:
                return None
            joined = [*group, *others]
            result = self._attempt(joined)
            if result.problem is None:
                return joined, result
            if result.reached > reached:
                improved, reached = (joined, result), result.reached
        return improved

    def _candidates(self, group: Sequence[str], best: Attempt) -> Iterator[list[str]]:
        """Axes that the operation gives where the re-trace has stopped, or those beside
        it; with each those that are alike.
        """
        structure = self._structure
        near: set[Label] = set()
        for law in structure.trace.laws[max(best.reached - 1, 0) : best.reached + 2]:
            for labels in law.outputs:
                for label in labels or ():
                    near.update(atoms(label))
        for name in self._refused:
            names = self._classes[name]
            close = any(structure.atoms[one].root in near for one in names)
            if close and name not in group and clash(structure, [*group, name]) is None:
                yield names

    def _attempt(self, group: Sequence[str]) -> Attempt:
        structure = self._structure
        plan = sized(structure, dict(self._steps(group)))
        _, attempt, spent = farthest(structure, plan)
        self.left -= spent
        return attempt

    def _steps(self, group: Sequence[str]) -> dict[str, int]:
        """The smallest units of each that keep the proportions of their sizes."""
        axes = [self._structure.axes[name] for name in group]
        common = math.gcd(*(axis.size // axis.grain for axis in axes))
        return {axis.name: axis.size // common for axis in axes}
