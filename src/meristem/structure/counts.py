"""What follows new blocks: numbers of layers, tables with an entry per block, positions inside the blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from meristem.core.change import AttributeChange, Insertion, Plan
from meristem.structure.depth import Depth, find_runs
from meristem.structure.discover import Structure, apply_edits
from meristem.structure.insertion import insert
from meristem.structure.tracer import ModuleStack
from meristem.structure.twin import fake_mode, looking

TRIALS = 30
"""Largest number of re-traces that the search for one attribute may cost."""
_COUNT = re.compile(r"^(n|num|number_of)_?((hidden|encoder|decoder|transformer)_?)?(layers?|blocks?)$|^depth$")
_POSITION = re.compile(
    r"(^|_)(layer|block|depth|stage)_?(idx|index|id|i|num|number|position)$|^layer$|^i_(layer|block)$"
)
_COUNTER = re.compile(rf"{_POSITION.pattern}|(^|_)(idx|index|id|number|position|order)$|^(i|n|lid)$")
"""Names of numbers of layers; of positions where one block is all there is to tell by; and where two count on."""


def counts_for(
    structure: Structure, plan: Plan, insertions: Sequence[Insertion]
) -> tuple[tuple[AttributeChange, ...], str | None]:
    """The attributes that follow new or dropped blocks, so that a re-trace passes through every block; or the refusal."""
    shapes = {change.name: change.after for change in plan.tensors}
    runs = [insertion for insertion in insertions if insertion.form == "run"]
    changed = {i.axis: i for i in runs}
    beside = [d for d in structure.depths.values() if d.form == "run" and d.path in {i.path for i in runs}]
    positions = {depth.name: positions_in(structure.model, depth) for depth in beside}
    sure = {}
    for insertion in runs:
        for edit in counted(structure.model, list(structure.depths.values()), insertion):
            sure[edit.module, edit.attribute] = edit

    def attempt(edits: Sequence[AttributeChange]) -> tuple[list[AttributeChange], str | None]:
        mode = fake_mode(structure.fake)
        copied = structure.twin_of_shape(shapes, plan.attributes, mode).eval()
        followed = list(edits)
        try:
            for insertion in insertions:
                insert(copied, insertion)
            for depth in beside:
                now = changed.get(depth.name) or depth.with_blocks(range(depth.size), [False] * depth.size)
                names = standing(copied, now, runs)
                followed += renumbered(copied, depth, names, positions[depth.name], shift(now, runs))
            apply_edits(copied, followed)
        except AttributeError as error:  # a container inside a block that moves
            return [], f"these depths lie inside each other; grow one after the other ({error})"
        stack = ModuleStack(copied)
        args, kwargs = structure.example_for(mode)
        try:
            with looking(mode):
                copied(*args, **kwargs)
        except Exception as error:
            first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
            return followed, f"{stack.innermost or 'the model'} fails with the new depth: {first_line[:200]}"
        found, _ = find_runs(copied, stack.passes)
        for insertion in runs:
            wanted = tuple(standing(copied, insertion, runs))
            if not any(run.path == insertion.path and run.blocks == wanted for run in found):
                return followed, f"the forward does not pass through every block of {insertion.path} in order"
        return followed, None

    edits, problem = attempt(list(sure.values()))
    if problem is None:
        return tuple(edits), None
    if sure:  # a name that says something else here: a number of layers of another kind
        edits, without = attempt([])
        if without is None:
            return tuple(edits), None
    possible = [e for i in runs for e in candidates(structure.model, i) if (e.module, e.attribute) not in sure]
    for trial in [*[[edit] for edit in possible[:TRIALS]], possible]:
        edits, still = attempt([*sure.values(), *trial])
        if still is None:
            return tuple(edits), None
    return (), problem


def standing(model: nn.Module, insertion: Insertion, beside: Sequence[Insertion] = ()) -> list[str]:
    """The names of the blocks of a run that has been changed, in order; `beside` may have changed the same container."""
    keys = list(model.get_submodule(insertion.path)._modules)
    prefix = f"{insertion.path}." if insertion.path else ""
    first = insertion.first + shift(insertion, beside)
    return [f"{prefix}{key}" for key in keys[first : first + len(insertion.blocks)]]


def shift(insertion: Insertion, beside: Sequence[Insertion]) -> int:
    """How many places the blocks of a run move because runs before it in the same container change."""
    ahead = [other for other in beside if other.path == insertion.path and other.first < insertion.first]
    return sum(len(other.blocks) - other.size for other in ahead)


def counted(model: nn.Module, depths: Sequence[Depth], insertion: Insertion) -> Iterator[AttributeChange]:
    """Attributes that surely follow: numbers of layers on the way to the container, by their names; positions in blocks."""
    rivals = [d for d in depths if d.form == "run" and d.size == insertion.size and d.path != insertion.path]
    for owner, attribute, value in _numbers(model, insertion.path):
        shared = any(d.path.startswith(f"{owner}." if owner else "") for d in rivals)
        if value == insertion.size and _COUNT.search(attribute.rpartition(".")[2]) and not shared:
            yield AttributeChange(owner, attribute, value, len(insertion.blocks))


def candidates(model: nn.Module, insertion: Insertion) -> Iterator[AttributeChange]:
    """Attributes that may follow: any number that equals the old depth, any table with an entry for every block."""
    for owner, attribute, value in _numbers(model, insertion.path):
        if value == insertion.size:
            yield AttributeChange(owner, attribute, value, len(insertion.blocks))
        elif type(value) in (list, tuple) and len(value) == insertion.size:
            yield AttributeChange(owner, attribute, value, type(value)(value[block] for block in insertion.blocks))


def _numbers(model: nn.Module, path: str) -> Iterator[tuple[str, str, Any]]:
    """Ints, lists and tuples that the modules on the way to `path` hold, themselves or in a plain object (a config)."""
    parts = path.split(".") if path else []
    for depth in range(len(parts) + 1):
        owner = ".".join(parts[:depth])
        for attribute, value in vars(model.get_submodule(owner)).items():
            if attribute.startswith("_") or isinstance(value, (bool, nn.Module, Tensor)):
                continue
            if isinstance(value, (int, list, tuple)):
                yield owner, attribute, value
            elif hasattr(value, "__dict__") and not callable(value):
                for key, inner in vars(value).items():
                    if (
                        isinstance(inner, (int, list, tuple))
                        and not isinstance(inner, bool)
                        and not key.startswith("_")
                    ):
                        yield owner, f"{attribute}.{key}", inner


def positions_in(model: nn.Module, depth: Depth) -> dict[tuple[str, str], int]:
    """Attributes inside the blocks that number them, with the number of the first: (module inside the block, name).

    Three blocks that count on from their place are evidence enough; else the name must say so, and that of a lone block
    together with its number.
    """
    blocks = [model.get_submodule(name) for name in depth.blocks[depth.fixed :]]
    start = depth.first + depth.fixed

    def is_position(attribute: str, value: int) -> bool:
        if len(blocks) == 1:
            return value in (0, 1, start, start + 1) and bool(_POSITION.search(attribute))
        return (len(blocks) > 2 and value in (0, start)) or bool(_COUNTER.search(attribute))

    found = {}
    for name, module in blocks[0].named_modules():
        for attribute, value in vars(module).items():
            if type(value) is not int or attribute.startswith("_") or type(module).__module__.startswith("torch."):
                continue
            values = [vars(block.get_submodule(name)).get(attribute) for block in blocks]
            if values == [value + i for i in range(len(blocks))] and is_position(attribute, value):
                found[name, attribute] = value
    return found


def renumbered(
    model: nn.Module, depth: Depth, names: Sequence[str], found: Mapping[tuple[str, str], int], moved: int
) -> Iterator[AttributeChange]:
    """The positions of the blocks that now stand in `model` under `names`, `moved` places on where they count from the start
    of the container.
    """
    for place, block in enumerate(names[depth.fixed :]):
        for (name, attribute), first in found.items():
            module = f"{block}.{name}" if name else block
            before = getattr(model.get_submodule(module), attribute)
            after = first + place + (moved if first >= depth.first else 0)
            if before != after:
                yield AttributeChange(module, attribute, before, after)
