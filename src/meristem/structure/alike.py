"""Blocks that are alike: what is proved of one holds for the others.

Blocks are alike that stand in one run, are made of the same modules with the same
whole numbers in them, hold tensors of the same shapes, and ran the same operations on the
same shapes. Numbers that count on from block to block (a position) may differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from meristem.core.axis import Axis
from meristem.structure.depth import Depth
from meristem.structure.tracer import Law, Pass
from meristem.structure.twin import named_tensors, submodule

_PLAIN = (int, float, str, bool, type(None), tuple, list, dict, set)


@dataclass(frozen=True)
class Alike:
    """Which block is represented by which.

    Attributes:
        representative: By block name, the first block that it is alike to.
    """

    representative: Mapping[str, str]

    def classes(self, axes: Iterable[Axis]) -> dict[str, list[str]]:
        """The names of axes that are alike, by the one that stands for them."""
        by_key: dict[Any, list[str]] = {}
        for axis in axes:
            by_key.setdefault(self._key(axis), []).append(axis.name)
        return {names[0]: names for names in by_key.values()}

    def told_of(self, reason: str, axis: Axis, other: Axis) -> str:
        """What is said of one axis, as it is said of another that is alike."""
        old, new = self.block(axis), self.block(other)
        if old is None or new is None:
            return reason
        # A sentence may begin with the block itself.
        if reason.startswith(f"{old} "):
            reason = new + reason.removeprefix(old)
        return reason.replace(f"{old}.", f"{new}.")

    def _key(self, axis: Axis) -> Any:
        block = self.block(axis)
        if block is None:
            return axis.name
        # Names and shapes inside the block, not the name of the block.
        first = self.representative[block]
        slots = []
        for slot in axis.slots:
            inside = slot.name.removeprefix(f"{block}.")
            slots.append((inside, slot.dim, slot.role, slot.fill, slot.tied))
        suffix = axis.name.removeprefix(block)
        return (
            first,
            suffix,
            axis.kind,
            axis.size,
            axis.grain,
            axis.norm,
            tuple(slots),
        )

    def block(self, axis: Axis) -> str | None:
        """The one block that holds all slots of an axis, or None."""
        blocks = {self._around(slot.name) for slot in axis.slots}
        return blocks.pop() if len(blocks) == 1 else None

    def same(self, block: str) -> list[str]:
        """The blocks that are alike to one."""
        first = self.representative[block]
        return [name for name, other in self.representative.items() if other == first]

    def _around(self, name: str) -> str | None:
        end = name.find(".")
        while end >= 0:
            if name[:end] in self.representative:
                return name[:end]
            end = name.find(".", end + 1)
        return None


def find_alike(
    model: nn.Module,
    runs: Iterable[Depth],
    passes: Sequence[Pass],
    laws: Sequence[Law],
) -> Alike:
    """The blocks of a traced model that are alike."""
    stretches = {one.name: one.stretch.laws for one in passes}
    representative: dict[str, str] = {}
    for run in runs:
        blocks = run.blocks[run.fixed :]
        modules = [submodule(model, block) for block in blocks]
        numbers = [_numbers(module) for module in modules]
        constant = _without_counters(numbers)
        firsts: dict[Any, str] = {}
        for block, module, kept in zip(blocks, modules, constant, strict=True):
            key = (_shapes(module), _operations(laws, stretches[block]), kept)
            representative[block] = firsts.setdefault(key, block)
    return Alike(representative)


def _shapes(module: nn.Module) -> Any:
    found = []
    for name, inner in module.named_modules():
        found.append((name, type(inner)))
    tensors = []
    for name, tensor in named_tensors(module).items():
        tensors.append((name, tuple(tensor.shape), tensor.dtype))
    return tuple(found), tuple(tensors)


def _operations(laws: Sequence[Law], stretch: tuple[int, int]) -> Any:
    ran = []
    for name, outputs in laws[slice(*stretch)]:
        shapes = []
        for labels in outputs:
            # A number has a shape, too: the empty one.
            known = None if labels is None else tuple(label.size for label in labels)
            shapes.append(known)
        ran.append((name, tuple(shapes)))
    return tuple(ran)


def _numbers(block: nn.Module) -> dict[tuple[str, str], Any]:
    """The plain values that the modules of a block hold."""
    found: dict[tuple[str, str], Any] = {}
    for name, module in block.named_modules():
        for attribute, value in vars(module).items():
            if not attribute.startswith("_") and isinstance(value, _PLAIN):
                kept = value if type(value) is int else repr(value)
                # No size is a fraction: rates of dropout rise from block to block.
                found[name, attribute] = "" if type(value) is float else kept
    return found


def _without_counters(blocks: Sequence[dict[tuple[str, str], Any]]) -> list[Any]:
    """The values of every block, without those that number the blocks."""
    counters = set()
    for key, first in blocks[0].items():
        # A flag that differs is no counter.
        if type(first) is not int:
            continue
        values = [block.get(key) for block in blocks]
        counts_on = [first + i for i in range(len(blocks))]
        if len(blocks) > 1 and values == counts_on:
            counters.add(key)
    kept = []
    for block in blocks:
        items = [(key, value) for key, value in block.items() if key not in counters]
        kept.append(tuple(sorted(items)))
    return kept
