"""Configs that say the new sizes: a model built from one is the grown model.

Which numbers of a config mean a size is not guessed from names. Models are built from
changed configs, without data, until one has the shapes and the numbers of the grown
model; where none has, no config can say the growth.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from meristem.core.change import AttributeChange, Plan
from meristem.core.errors import GrowthRefused
from meristem.structure import Structure
from meristem.structure.insertion import insert
from meristem.structure.repair import Search
from meristem.structure.twin import apply_edits
from meristem.structure.undisturbed import undisturbed

BUILDS, FEW = 400, 60
"""Most models that one search may build: for a growth, and for a dry run."""

Path = tuple[str, ...]
"""Where a number stands in a config: the names of inner configs, and its own."""
# Characters of a refusal by a model's class that are told on.
_LONGEST = 200
_NUMBERS = (int, float, str, bool, type(None))


def has_config(model: nn.Module) -> bool:
    """Whether a model is built from a config that is saved beside it."""
    kind = getattr(type(model), "config_class", None)
    return kind is not None and isinstance(getattr(model, "config", None), kind)


@dataclass
class _Described:
    """What a model is beside its weights: shapes, and the numbers of its modules."""

    shapes: dict[str, tuple[int, ...]]
    numbers: dict[tuple[str, str], Any]

    @classmethod
    def of(cls, model: nn.Module) -> _Described:
        shapes = {n: tuple(t.shape) for n, t in model.named_parameters()}
        shapes |= {n: tuple(t.shape) for n, t in model.named_buffers()}
        numbers = {}
        for name, module in model.named_modules():
            for attribute, value in vars(module).items():
                if attribute.startswith("_") or attribute == "training":
                    continue
                if isinstance(value, (tuple, list)):
                    plain = all(isinstance(one, _NUMBERS) for one in value)
                    value = tuple(value)
                else:
                    plain = isinstance(value, _NUMBERS)
                if plain:
                    numbers[name, attribute] = value
        return cls(shapes, numbers)

    def misshapen(self, other: _Described) -> list[str]:
        """The tensors that only one has, or that have other shapes."""
        names = self.shapes.keys() | other.shapes.keys()
        return sorted(n for n in names if self.shapes.get(n) != other.shapes.get(n))

    def differing(self, other: _Described) -> list[tuple[str, str]]:
        """The numbers that differ, of modules that both have."""
        found = []
        for key, value in self.numbers.items():
            if key in other.numbers and not _same(value, other.numbers[key]):
                found.append(key)
        return found


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    return type(one) is type(other) and bool(one == other)


_FAR = (10**9, 10**9)


@dataclass
class _Builder:
    """Models built from changed configs, without data."""

    model: nn.Module
    target: _Described
    pairs: Sequence[tuple[Any, Any]]
    meant: frozenset[str]
    most: int
    unsaid: frozenset[tuple[str, str]] = frozenset()
    spent: int = 0
    kept: dict[str, _Described | str] = field(default_factory=dict)

    def build(self, values: Mapping[Path, Any]) -> _Described | str:
        """What the model of a config is, or why there is none."""
        key = repr(sorted(values.items()))
        if key not in self.kept:
            self.spent += 1
            self.kept[key] = self._built(values)
        return self.kept[key]

    def _built(self, values: Mapping[Path, Any]) -> _Described | str:
        # A class may refuse sizes in any way; what cannot be built is not said.
        try:
            config = _written(with_values(self.model.config, values))
            with undisturbed(), _quiet(), torch.device("meta"):
                built = type(self.model)(config)
        except Exception as error:
            return " ".join(str(error).split())[:_LONGEST]
        return _Described.of(built)

    def distance(self, values: Mapping[Path, Any]) -> tuple[int, int]:
        """How many shapes, and how many numbers, differ from the grown model's."""
        built = self.build(values)
        if isinstance(built, str):
            return _FAR
        numbers = 0
        for key in self.differing(built):
            # One that merely was not read: the grown model may take it over.
            pair = (self.target.numbers[key], built.numbers[key])
            is_said = type(pair[0]) in (int, str, bool) or key[1] in self.meant
            numbers += pair not in self.pairs and is_said
        return len(self.target.misshapen(built)), numbers

    def differing(self, built: _Described) -> list[tuple[str, str]]:
        """The numbers in which a built model differs, of those that configs do say."""
        return [key for key in self.target.differing(built) if key not in self.unsaid]


@contextmanager
def _quiet() -> Iterator[None]:
    """Within, nobody warns of a config that is only tried."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def with_values(config: Any, values: Mapping[Path, Any]) -> Any:
    """A copy of a config in which some numbers differ."""
    changed = copy.deepcopy(config)
    for path, value in values.items():
        holder = changed
        for name in path[:-1]:
            holder = getattr(holder, name)
        setattr(holder, path[-1], value)
    return changed


def _written(config: Any) -> Any:
    """A config as it comes back from a file, where it can be written to one."""
    if not hasattr(config, "to_json_string"):
        return config
    return type(config).from_dict(json.loads(config.to_json_string()))


def said_by_config(structure: Structure, plan: Plan, builds: int = BUILDS) -> Plan:
    """The plan with what the configs in its model must say, and the numbers that models
    built from them have.

    Raises:
        GrowthRefused: No config says it.
    """
    holders = _holders(structure.model)
    if not holders:
        return plan
    grown = structure.twin_of_shape(
        {change.name: change.after for change in plan.tensors},
        plan.attributes,
        structure.mode,
    )
    for insertion in plan.insertions:
        insert(grown, insertion)
    apply_edits(grown, plan.counts)
    for name in holders:
        plan = _said(structure, plan, grown, name, builds)
    return plan


def unsaid(structure: Structure, plan: Plan) -> str | None:
    """Why no config says the new sizes of a plan; None where one does."""
    if not plan:
        return None
    try:
        said_by_config(structure, plan, FEW)
    except _SearchEnded:
        return None
    except GrowthRefused as refusal:
        return str(refusal)
    return None


class _SearchEnded(GrowthRefused):
    """No config was found among so many; there may be one."""


def _holders(model: nn.Module) -> list[str]:
    """The outermost modules that are built from configs."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(not outer or name.startswith(f"{outer}.") for outer in found)
        if not inside and has_config(module):
            found.append(name)
    return found


def _said(
    structure: Structure, plan: Plan, grown: nn.Module, name: str, builds: int
) -> Plan:
    """The plan with what the config of one module must say."""
    model: Any = structure.model.get_submodule(name)
    part: Any = grown.get_submodule(name)
    target, own = _Described.of(part), _Described.of(model)
    # Constants that the growth sets, as the eps of a norm.
    meant = frozenset(
        edit.attribute for edit in plan.attributes if type(edit.after) is float
    )
    pairs = _pairs(plan)
    builder = _Builder(model, target, pairs, meant, builds)
    as_built = builder.build({})
    if isinstance(as_built, str) or own.misshapen(as_built):
        if name:  # with adapters inside: no config says it now
            return plan
    else:
        # Set by a user, or by the forward itself: no config has said them before.
        builder.unsaid = frozenset(own.differing(as_built))
    present = dict(_entries(model.config))
    followed = dict(_entries(part.config))
    start = {path: v for path, v in followed.items() if v != present.get(path)}
    offered = [*_candidates(present, plan, pairs), *_unnamed(present, target)]
    found = _search(builder, start, offered)
    built = builder.build(found)
    if isinstance(built, str) or target.misshapen(built):
        # What comes nearest to the wish may be refused, and says more than the rest.
        wished = builder.build(start)
        nearest = wished if isinstance(wished, str) else built
        ended = _SearchEnded if builder.spent >= builder.most else GrowthRefused
        raise ended(_why(model, plan, target, nearest))
    differing = builder.differing(built)
    saying = _Saying(name, present, found, target, built, differing, meant, pairs)
    return _with_edits(structure, plan, saying)


def _entries(config: Any, above: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The numbers of a config and of the configs inside it."""
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if hasattr(value, "to_dict") and hasattr(value, "__dict__"):
            yield from _entries(value, (*above, name))
        elif not isinstance(value, dict):
            yield (*above, name), value
    # A number that is kept in another form (num_labels, in id2label).
    labels = getattr(config, "num_labels", None)
    if type(labels) is int:
        yield (*above, "num_labels"), labels


def _candidates(
    present: Mapping[Path, Any], plan: Plan, pairs: Sequence[tuple[Any, Any]]
) -> Iterator[tuple[Path, Any]]:
    """Numbers that may have to change, with what they may be afterwards."""
    orders = list(plan.insertions)
    sizes = {new for _, new in pairs if type(new) is int}
    for change in plan.tensors:
        sizes.update(change.after)
    for path, value in present.items():
        if type(value) in (int, float):
            for old, new in pairs:
                if _same(value, old):
                    yield path, new
                elif type(new) is int and type(old) is int and old:
                    # A ratio of sizes (mlp_ratio).
                    yield path, _scaled(value, new, old)
            # A number that the rest of the config gave until now.
            yield path, value
        elif isinstance(value, (list, tuple)) and value:
            yield from _listed(path, value, pairs, orders)
        elif value is None:
            for new in sorted(sizes):
                yield path, new


def _scaled(value: float, new: int, old: int) -> float:
    scaled = value * new / old
    return int(scaled) if type(value) is int and scaled == int(scaled) else scaled


def _unnamed(
    present: Mapping[Path, Any], target: _Described
) -> Iterator[tuple[Path, Any]]:
    """Numbers of the modules that a config need not have, and may (head_dim)."""
    names = {path[-1] for path in present}
    found: dict[tuple[str, int], None] = {}
    for (_, attribute), value in target.numbers.items():
        if type(value) is int and attribute not in names:
            found[attribute, value] = None
    for attribute, value in found:
        yield (attribute,), value


def _pairs(plan: Plan) -> list[tuple[Any, Any]]:
    """Old and new sizes, of everything that changes."""
    found: dict[tuple[Any, Any], None] = {}
    for name, after in plan.after.items():
        found[plan.before[name], after] = None
    for change in plan.tensors:
        for old, new in zip(change.before, change.after, strict=True):
            if old != new:
                found[old, new] = None
    for edit in (*plan.attributes, *plan.counts):
        if type(edit.before) in (int, float):
            found[edit.before, edit.after] = None
    return list(found)


def _listed(
    path: Path, value: Sequence[Any], pairs: Sequence[tuple[Any, Any]], orders: Any
) -> Iterator[tuple[Path, Any]]:
    """What a list may be: an entry for every block, or sizes."""
    kind: Any = type(value)
    for insertion in orders:
        if len(value) == insertion.size:
            yield path, kind(value[block] for block in insertion.blocks)
    for old, new in pairs:
        if old and all(type(one) in (int, float) for one in value):
            yield path, kind(_scaled(one, new, old) for one in value)
        places = [i for i, one in enumerate(value) if _same(one, old)]
        if places:
            yield path, kind(new if i in places else v for i, v in enumerate(value))
        if len(places) > 1:
            for place in places:
                yield path, kind(new if i == place else v for i, v in enumerate(value))


def _search(
    builder: _Builder, start: Mapping[Path, Any], offered: Sequence[tuple[Path, Any]]
) -> dict[Path, Any]:
    """The changes of a config that come nearest to the grown model."""
    found = dict(start)
    nearest = builder.distance(found)
    # Lists with an entry per block must fit the number of blocks at once.
    together = found | {p: v for p, v in offered if isinstance(v, (list, tuple))}
    if nearest == _FAR and builder.distance(together) < nearest:
        found, nearest = together, builder.distance(together)
    while nearest > (0, 0) and builder.spent < builder.most:
        best = found
        for path, value in offered:
            if builder.spent >= builder.most:
                break
            trial = {**found, path: value}
            if trial != found and builder.distance(trial) < nearest:
                best, nearest = trial, builder.distance(trial)
        if best is found:
            break
        found = best
    return found


def _why(
    model: nn.Module, plan: Plan, target: _Described, built: _Described | str
) -> str:
    name = type(model.config).__name__
    names = list(plan.after)
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    shown = ", ".join(names[:2]) + more
    if isinstance(built, str):
        why = f"with these sizes its model cannot be built ({built.rstrip('.')})"
    else:
        tensor = target.misshapen(built)[0]
        wanted = target.shapes.get(tensor, "absent")
        has = built.shapes.get(tensor, "absent")
        why = f"{tensor} would be {wanted}, and a model built from it has {has}"
    return (
        f"{name} cannot say the growth of {shown}: {why}. hint: grow_ grows it, and "
        "meristem.save keeps it"
    )


@dataclass(frozen=True)
class _Saying:
    """A config that was found, and the model that is built from it."""

    holder: str
    present: Mapping[Path, Any]
    values: Mapping[Path, Any]
    target: _Described
    built: _Described
    differing: Sequence[tuple[str, str]]
    meant: frozenset[str]
    pairs: Sequence[tuple[Any, Any]]


def _with_edits(structure: Structure, plan: Plan, saying: _Saying) -> Plan:
    """The plan with the numbers that the config and the modules built from it have.

    Raises:
        GrowthRefused: With these the forward would be another.
    """
    edits = {(edit.module, edit.attribute): edit for edit in plan.attributes}
    # Numbers of blocks are set once these stand in their places.
    late = {(edit.module, edit.attribute): edit for edit in plan.counts}
    follow = late if plan.insertions else edits
    kind = type(structure.model.get_submodule(saying.holder).config).__name__
    for path, value in saying.values.items():
        key = (saying.holder, ".".join(("config", *path)))
        before = saying.present.get(path)
        known = edits.get(key) or late.get(key)
        if known is not None and known.after == value:
            continue
        edits.pop(key, None)
        if value != before:
            follow[key] = AttributeChange(*key, before, value)
    for inner, attribute in saying.differing:
        old, new = (
            one.numbers[inner, attribute] for one in (saying.target, saying.built)
        )
        module = ".".join(part for part in (saying.holder, inner) if part)
        guessed = edits.get((module, attribute))
        if guessed is not None and guessed.before == new:
            # It followed another size that was as large; the forward is tried below.
            del edits[module, attribute]
            continue
        if attribute in saying.meant or not _adoptable(old, new, plan, saying):
            raise GrowthRefused(
                f"{kind} cannot say this growth: {module}.{attribute} would be {old!r}, "
                f"and a model built from it has {new!r}. hint: grow_ grows it, and "
                "meristem.save keeps it"
            )
        follow[module, attribute] = AttributeChange(module, attribute, old, new)
    stale = tuple(line for line in plan.stale if not _settled(line, saying))
    followed = replace(
        plan,
        attributes=tuple(edits.values()),
        counts=tuple(late.values()),
        stale=stale,
    )
    if plan.tensors:
        attempt = Search(structure, followed).attempt(followed.attributes)
        if attempt.problem is not None:
            raise GrowthRefused(
                f"{kind} cannot say this growth: with what it says {attempt.problem}. "
                "hint: grow_ grows it, and meristem.save keeps it"
            )
    return followed


def _settled(line: str, saying: _Saying) -> bool:
    """Whether a number that may hold an old size has been compared with a built model's."""
    told = line.partition(" holds the old size")[0]
    holder = f"{saying.holder}." if saying.holder else ""
    module, _, attribute = told.removeprefix(holder).rpartition(".")
    return "config." in told or (module, attribute) in saying.target.numbers


def _adoptable(old: Any, new: Any, plan: Plan, saying: _Saying) -> bool:
    """Whether a number that no shape follows from may be what a built model has.

    A size that is kept and not read, a list of the config itself, a rate that depends on
    the number of blocks. That outputs are kept is checked afterwards.
    """
    if isinstance(old, float):
        return bool(plan.insertions)
    if isinstance(old, tuple):
        return any(list(new) == list(v) for v in saying.values.values() if _listy(v))
    return (old, new) in saying.pairs


def _listy(value: Any) -> bool:
    return isinstance(value, (list, tuple))
