"""Module attributes that mirror a size.

They are found by re-tracing a grown twin until every operation has its planned shape.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice, product
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from meristem.core.change import AttributeChange, Plan
from meristem.structure.blame import Line, failing_line
from meristem.structure.discover import Structure
from meristem.structure.labels import Label, size
from meristem.structure.layers import Shape, layer_of, weight_name
from meristem.structure.tracer import ModuleStack
from meristem.structure.twin import looking, submodule, table_of

TRIALS = 60
"""Largest number of re-traces that the search for one plan's attributes may cost."""
_FORMATS = ("as_strided", "as_strided_")
# Innermost running modules whose configs are looked into.
_NEAR = 2
# Re-traces that one stop of the code may cost.
_AT_ONE = 12
# Stops at one line which no number helped, before others are taken to be hopeless too.
_HOPELESS = 3
# Readings of several numbers at once that are tried.
_READINGS = 8
# Characters of an error that are told on.
_LONGEST = 200

Expected = Sequence[tuple[str, Sequence[Shape | None]]]
"""The operations in order, with the shapes that they should give; None for any."""


class Deviation(Exception):
    """The re-trace left the plan."""


class _Checker(TorchDispatchMode):
    """Compares every operation of a re-trace with its planned output shapes."""

    def __init__(self, expected: Expected) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.expected = expected
        self.reached = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace != "aten":
            return result
        shapes = []
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                shapes.append(tuple(leaf.shape))
        name = func._schema.name.split("::")[1]
        # Views of the same places: which of them run, the memory format decides.
        if shapes and name not in _FORMATS:
            self._compare(name, shapes)
        return result

    def _compare(self, name: str, shapes: list[Shape]) -> None:
        if self.reached >= len(self.expected):
            raise Deviation(f"the grown model runs an extra operation {name!r}")
        planned_name, planned = self.expected[self.reached]
        fits = name == planned_name and len(shapes) == len(planned)
        for shape, wanted in zip(shapes, planned, strict=False):
            fits = fits and wanted in (None, shape)
        if not fits:
            raise Deviation(
                f"{name!r} gives {shapes}, planned was {planned_name!r} with {planned}"
            )
        self.reached += 1


@dataclass(frozen=True)
class Attempt:
    """How far a re-trace got, what stopped it, the modules that were running, and the
    line of code.
    """

    reached: int
    problem: str | None
    running: tuple[str, ...] = ()
    line: Line = field(default_factory=Line)


def with_attributes(structure: Structure, plan: Plan) -> Plan:
    """A sized plan with the attribute changes that make a re-trace follow it, or the
    refusal.
    """
    edits, best, spent = farthest(structure, plan)
    plan = replace(plan, attributes=edits)
    if best.problem is None:
        return plan
    place = best.running[-1] if best.running else ""
    problem = _told(place, best)
    stopped = place if spent < TRIALS else None
    return replace(plan, refusal=problem, stopped=stopped)


def _told(place: str, best: Attempt) -> str:
    """What is said where the code of a module does not follow."""
    at = f" at {best.line.place}" if best.line.place else ""
    said = f"{place or 'the model'} does not follow the new size{at}: {best.problem}"
    if not best.line.place:
        return said
    return (
        f"{said}. hint: let that line read this size from a tensor, or from a number of "
        "its own that the module holds"
    )


def farthest(
    structure: Structure, plan: Plan
) -> tuple[tuple[AttributeChange, ...], Attempt, int]:
    """The attribute changes with which a re-trace gets farthest, how far that is, and
    how many re-traces it took.
    """
    search = Search(structure, plan)
    edits = list(leaf_attributes(structure, plan))
    best = search.attempt(edits)
    while best.problem is not None:
        improved = search.improve(edits, best)
        if improved is None:
            break
        best, more = search.spread(edits, *improved)
        edits += more
    return tuple(edits), best, TRIALS - search.left


class Search:
    """The re-traces of one plan."""

    def __init__(self, structure: Structure, plan: Plan) -> None:
        self._structure, self._plan = structure, plan
        self._shapes = {change.name: change.after for change in plan.tensors}
        self._expected = _planned_shapes(structure, plan)
        self._everywhere = _resized(_all_labels(structure), plan)
        self._by_module: dict[str, dict[int, set[int]]] = {}
        self.left = TRIALS

    def improve(
        self, edits: list[AttributeChange], best: Attempt
    ) -> tuple[Attempt, list[AttributeChange]] | None:
        """The further edits with which a re-trace gets farthest, and how far.

        First what the failing line names, each by itself and all together; then the
        other numbers that may mirror a size.
        """
        # Several axes at once may be stopped by any of them.
        place = best.running[-1] if best.running else ""
        kind = type(submodule(self._structure.model, place))
        stop = (best.line.place, kind, len(self._plan.after) > 1)
        stops = self._structure.stops
        if best.line.place and stops[stop] >= _HOPELESS:
            return None
        named: list[AttributeChange] = []
        others: list[AttributeChange] = []
        for edit in self._candidates(best.running, edits):
            is_named = edit.attribute.rpartition(".")[2] in best.line.names
            (named if is_named else others).append(edit)
        before = self.left
        ways = ([[edit] for edit in named], _together(named), [[e] for e in others])
        for sets in ways:
            # Where the code holds a constant no number helps: not all are tried.
            allowed = max(_AT_ONE - (before - self.left), 0)
            improved = self._farthest(edits, best, islice(sets, allowed))
            if improved is not None:
                return improved
        stops[stop] += 1
        return None

    def spread(
        self, edits: list[AttributeChange], best: Attempt, more: list[AttributeChange]
    ) -> tuple[Attempt, list[AttributeChange]]:
        """The same edits in the other modules of the same class, where the next one to
        fail is one of these.
        """
        modules = dict(self._structure.model.named_modules())
        kinds = {type(modules[edit.module]) for edit in more}
        stopped = [type(modules[name]) for name in best.running]
        if best.problem is None or kinds.isdisjoint(stopped):
            return best, more
        wide = list(more)
        for edit in more:
            for name, module in modules.items():
                same = type(module) is type(modules[edit.module])
                if same and name != edit.module and _holds(module, edit):
                    wide.append(replace(edit, module=name))
        result = self.attempt([*edits, *wide])
        further = result.problem is None or result.reached > best.reached
        return (result, wide) if further else (best, more)

    def _farthest(
        self,
        edits: list[AttributeChange],
        best: Attempt,
        sets: Iterable[list[AttributeChange]],
    ) -> tuple[Attempt, list[AttributeChange]] | None:
        improved = None
        reached = best.reached
        for more in sets:
            if not self.left:
                return improved
            result = self.attempt([*edits, *more])
            if result.problem is None:
                return result, more
            # Progress is the only guide: the right number gets the forward further.
            if result.reached > reached:
                improved, reached = (result, more), result.reached
        return improved

    def attempt(self, edits: Sequence[AttributeChange]) -> Attempt:
        self.left -= 1
        structure = self._structure
        mode = structure.mode
        copied = structure.twin_of_shape(self._shapes, edits, mode).eval()
        args, kwargs = structure.example_for(mode, self._plan.changes)
        stack = ModuleStack(copied)
        # Only the names of the running modules are needed.
        stack.close()
        checker = _Checker(self._expected)
        try:
            with looking(mode), checker:
                copied(*args, **kwargs)
        except Exception as error:
            running, line = tuple(stack.running), failing_line(error)
            return Attempt(checker.reached, first_line(error), running, line)
        if checker.reached != len(self._expected):
            problem = "the grown model runs fewer operations"
            return Attempt(checker.reached, problem)
        return Attempt(checker.reached, None)

    def _candidates(
        self, running: Sequence[str], done: Sequence[AttributeChange]
    ) -> Iterator[AttributeChange]:
        """Attributes of the running modules, innermost first, that may mirror a size.

        These are integers, and tuples of integers, that equal a size that changed.
        """
        taken = {(edit.module, edit.attribute) for edit in done}
        for depth, name in enumerate(dict.fromkeys(reversed(running))):
            module = submodule(self._structure.model, name)
            for attribute, value in vars(module).items():
                if attribute.startswith("_") or (name, attribute) in taken:
                    continue
                for new in self._replacements(name, value):
                    yield AttributeChange(name, attribute, value, new)
                # The code that ran reads the config of its own module.
                if depth < _NEAR:
                    yield from self._inside(name, attribute, value, taken)

    def _inside(
        self, name: str, attribute: str, value: Any, taken: set[tuple[str, str]]
    ) -> Iterator[AttributeChange]:
        """The same in a plain object or a dict that a module holds (a config): only what
        its methods name, beside the constructor.
        """
        kind = type(submodule(self._structure.model, name))
        read = _read_by(kind)  # type: ignore[arg-type]
        for key, inner in table_of(value).items():
            path = f"{attribute}.{key}"
            named = key in read or isinstance(value, dict)
            if key.startswith("_") or "." in key or not named:
                continue
            if (name, path) in taken:
                continue
            for new in self._replacements(name, inner):
                yield AttributeChange(name, path, inner, new)

    def _inside_module(self, module: str) -> dict[int, set[int]]:
        if module not in self._by_module:
            prefix = f"{module}." if module else ""
            labels: set[Label] = set()
            for name, dims in self._structure.labels.items():
                if name.startswith(prefix):
                    labels.update(label.root for label in dims)
            self._by_module[module] = _resized(labels, self._plan)
        return self._by_module[module]

    def _replacements(self, module: str, value: Any) -> Iterator[Any]:
        """What a number of a module may become: what the sizes of its own tensors do,
        else what any size of the model does.
        """
        near = self._inside_module(module)
        held = value if _are_sizes(value) else [value]
        known = any(type(entry) is int and entry in near for entry in held)
        resized = near if known else self._everywhere
        if isinstance(value, int) and not isinstance(value, bool):
            yield from sorted(resized.get(value, ()))
        elif _are_sizes(value) and any(entry in resized for entry in value):
            new = []
            for entry in value:
                # Tuples of sizes rarely repeat one; where they do, the smallest change
                # is tried.
                new.append(min(resized[entry]) if entry in resized else entry)
            yield type(value)(new)


def _together(named: Sequence[AttributeChange]) -> Iterator[list[AttributeChange]]:
    """Changes of all numbers that a line names, in every reading of theirs."""
    by_place: dict[tuple[str, str], list[AttributeChange]] = {}
    for edit in named:
        by_place.setdefault((edit.module, edit.attribute), []).append(edit)
    if len(by_place) > 1:
        for reading in islice(product(*by_place.values()), _READINGS):
            yield list(reading)


def _holds(module: nn.Module, edit: AttributeChange) -> bool:
    """Whether a module holds the number that an edit changes."""
    value: Any = module
    for key in edit.attribute.split("."):
        value = value.get(key) if isinstance(value, dict) else getattr(value, key, None)
    return type(value) is type(edit.before) and bool(value == edit.before)


@cache
def _read_by(kind: type) -> frozenset[str]:
    """The attributes that the methods of a class name, without its constructor."""
    names: set[str] = set()
    for base in kind.__mro__:
        if base.__module__.startswith("torch."):
            continue
        for name, method in vars(base).items():
            # Decorators hide the method itself.
            inner = inspect.unwrap(method) if callable(method) else method
            code = getattr(inner, "__code__", None)
            if code is not None and name != "__init__":
                names.update(code.co_names)
    return frozenset(names)


def first_line(error: Exception) -> str:
    """What an error says, in a line."""
    text = str(error)
    return text.splitlines()[0][:_LONGEST] if text else type(error).__name__


def _planned_shapes(structure: Structure, plan: Plan) -> Expected:
    expected = []
    for law in structure.trace.laws:
        if law.name in _FORMATS:
            continue
        shapes: list[Shape | None] = []
        for labels in law.outputs:
            if labels is None:
                shapes.append(None)
            else:
                shapes.append(tuple(size(label, plan.changes) for label in labels))
        expected.append((law.name, shapes))
    return expected


def leaf_attributes(structure: Structure, plan: Plan) -> Iterator[AttributeChange]:
    """The attributes of torch's own layers that follow from the shapes of their
    weights.
    """
    model = structure.model
    shapes = {weight_name(model, one.name): one.after for one in plan.tensors}
    known = structure.trace.groups
    group_of = {weight_name(model, name): label for name, label in known.items()}
    for module_name, module in model.named_modules():
        layer = layer_of(module)
        if layer is None:
            continue
        prefix = f"{module_name}." if module_name else ""
        # A batch norm without affine weights still counts its features.
        shape = shapes.get(f"{prefix}{layer.sized_by}") or shapes.get(
            f"{prefix}running_mean"
        )
        if shape is None:
            continue
        group = group_of.get(f"{prefix}weight")
        groups = size(group, plan.changes) if group is not None else 1
        for attribute, value in layer.mirrored(module, shape, groups).items():
            present = getattr(module, attribute)
            if present != value:
                yield AttributeChange(module_name, attribute, present, value)


def _all_labels(structure: Structure) -> set[Label]:
    """The labels of every dimension that the trace saw."""
    labels: set[Label] = set()
    for dims in structure.labels.values():
        labels.update(label.root for label in dims)
    for law in structure.trace.laws:
        for outputs in law.outputs:
            labels.update(label.root for label in outputs or ())
    return labels


def _resized(labels: set[Label], plan: Plan) -> dict[int, set[int]]:
    """Old size -> new sizes, over the dimensions that change."""
    for label in list(labels):
        labels.update(part.root for part in label.parts)
    table: dict[int, set[int]] = {}
    for label in labels:
        new = size(label, plan.changes)
        if new != label.size:
            table.setdefault(label.size, set()).add(new)
    return table


def _are_sizes(value: Any) -> bool:
    if not isinstance(value, (tuple, list)) or not value:
        return False
    return all(type(entry) is int for entry in value)
