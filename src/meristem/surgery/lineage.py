"""The lineage of a model: its growths, with the place of every old entry.

It is small and JSON-able. From it a grown model is rebuilt without an example, and any
state dict of an old shape is mapped to the new one.
"""

from __future__ import annotations

import copy
from bisect import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from meristem.core.change import (
    AttributeChange,
    Plan,
    Rescaling,
    Sources,
    insertion_from,
    sources_from,
    spans,
    tensor_json,
)
from meristem.core.errors import CheckpointError
from meristem.core.growth import LINEAGE
from meristem.structure.insertion import insert
from meristem.structure.twin import (
    get_attribute,
    named_tensors,
    opened,
    set_attribute,
    stored_tensors,
)
from meristem.surgery.host import inner
from meristem.surgery.swap import let_go, swap
from meristem.surgery.tensors import carry

DRAWS = "_meristem_draws"
"""The attribute of a grown model that holds the state of its generator."""

Line = Sequence[Mapping[str, Any]]
"""Growths in order."""


@dataclass(frozen=True)
class Names:
    """What a model's tensors were called before a growth.

    Attributes:
        before: Its state dict, with the tensors themselves.
        parameters: The names of its parameters in their order.
        followed: By the id of a new tensor, the id of the one it was made after.
    """

    before: Mapping[str, Tensor] = field(default_factory=dict)
    parameters: Sequence[str] = ()
    followed: Mapping[int, int] = field(default_factory=dict)


def lineage(model: nn.Module) -> list[dict[str, Any]]:
    """The growths of a model so far, in plain types, to be put into anybody's
    checkpoint.

    Examples:
        >>> import torch, meristem as ms
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> _ = ms.grow_(net, {"0": 2}, torch.randn(3, 4))
        >>> [growth["after"] for growth in ms.lineage(net)]
        [{'0': 10}]
    """
    return copy.deepcopy(getattr(inner(model), LINEAGE, []))


def note_draws(model: nn.Module, state: Tensor) -> None:
    """Let a model know how far its growths have drawn random numbers: its deep copies
    know it, too.
    """
    model.__dict__[DRAWS] = state.numpy().tobytes()


def draws_of(model: nn.Module) -> Tensor | None:
    """How far the growths of a model, or of what it is a copy of, have drawn."""
    state = model.__dict__.get(DRAWS)
    return (
        None if state is None else torch.frombuffer(bytearray(state), dtype=torch.uint8)
    )


def record(model: nn.Module, plan: Plan, names: Names, ones: Sequence[str]) -> None:
    """Append a growth to a model's lineage."""
    stored = names.before or stored_tensors(model)
    names_of = _names_of(stored)
    aliases = {name: names_of[id(tensor)] for name, tensor in stored.items()}
    tensors = []
    for change in plan.tensors:
        entry = tensor_json(change)
        entry["aliases"] = aliases.get(change.name, [])
        # Zero would silence a norm and divide by a variance of nothing.
        entry["start"] = "one" if change.name in ones else "zero"
        tensors.append(entry)
    rescaled = {}
    for name, rescaling in plan.rescaled.items():
        for alias in aliases.get(name, [name]):
            rescaled[alias] = list(rescaling)
    renamed, made = _moved(model, names)
    entry = {
        "before": dict(plan.before),
        "after": dict(plan.after),
        "tensors": tensors,
        "rescaled": rescaled,
        "attributes": _edits(plan.attributes),
        "insertions": [asdict(insertion) for insertion in plan.insertions],
        "counts": _edits(plan.counts),
        "renamed": renamed,
        "made": made,
        "parameters": list(names.parameters),
        "parameters_after": [name for name, _ in model.named_parameters()],
    }
    model.__dict__.setdefault(LINEAGE, []).append(entry)


def _names_of(stored: Mapping[str, Tensor]) -> dict[int, list[str]]:
    """All names of each tensor, by its identity."""
    names: dict[int, list[str]] = {}
    for name, tensor in stored.items():
        names.setdefault(id(tensor), []).append(name)
    return names


def _edits(changes: Sequence[AttributeChange]) -> list[list[Any]]:
    return [[edit.module, edit.attribute, edit.after] for edit in changes]


def _moved(
    model: nn.Module, names: Names
) -> tuple[dict[str, str | None], dict[str, dict[str, Any]]]:
    """What old tensors are called now, where that has changed, and what the new ones
    are.

    A dropped tensor is renamed to None.
    """
    old_names = _names_of(names.before)
    firsts = {key: listed[0] for key, listed in old_names.items()}
    renamed: dict[str, str | None] = {}
    made: dict[str, dict[str, Any]] = {}
    now = stored_tensors(model)
    for name, tensor in now.items():
        key = id(tensor)
        # The same object: it is the same tensor, whatever it is called now.
        if key in old_names:
            listed = old_names[key]
            # A tied tensor has several names; each new one continues one of them.
            old = listed.pop(0) if listed else firsts[key]
            if old != name:
                renamed[old] = name
        elif names.before:
            parent = firsts.get(names.followed.get(key, 0))
            made[name] = _start(name, tensor, names.before.get(parent or ""), parent)
    for listed in old_names.values():
        for name in listed:
            renamed[name] = None
    return renamed, made


def _start(
    name: str, tensor: Tensor, old: Tensor | None, parent: str | None
) -> dict[str, Any]:
    """How a tensor of a new block starts in a converted state dict."""
    # A square hidden layer looks like the identity layer made after it; its values
    # tell.
    if old is not None and old.shape == tensor.shape:
        same_leaf = name.rpartition(".")[2] == (parent or "").rpartition(".")[2]
        # What the growth silenced is silent in an average too.
        if bool(old.any()) and not bool(tensor.any()):
            return {"parent": parent, "shape": list(tensor.shape), "start": "zero"}
        if same_leaf and not _is_identity(tensor):
            return {"parent": parent, "shape": list(tensor.shape)}
    leaf = name.rpartition(".")[2]
    kind = "zero"
    if tensor.dim() > 1:
        kind = "identity"
    elif leaf in ("alpha", "slope"):
        kind = "one"
    return {"parent": parent, "shape": list(tensor.shape), "start": kind}


def _is_identity(tensor: Tensor) -> bool:
    if tensor.dim() < 2 or tensor.shape[0] != tensor.shape[1]:
        return False
    return bool(torch.equal(tensor.detach(), _identity(tensor.detach())))


def _identity(like: Tensor) -> Tensor:
    empty = torch.zeros_like(like)
    if like.dim() == 2:
        return nn.init.eye_(empty)
    return nn.init.dirac_(empty) if like.dim() < 6 else empty


# -- rebuilding


def replay(model: nn.Module, growths: Line) -> None:
    """Give a model the shapes, blocks and attributes of a grown one.

    In the order of its growths; values do not count.
    """
    with opened(model), let_go(model):
        for growth in growths:
            live = named_tensors(model)
            for entry in growth["tensors"]:
                tensor, shape = live[entry["name"]], list(entry["after"])
                # A model built at its grown size has the shape already.
                if list(tensor.shape) == shape:
                    continue
                if list(tensor.shape) != list(entry["before"]):
                    raise CheckpointError(
                        f"the lineage does not belong to this {type(model).__name__}: "
                        f"{entry['name']} has the shape {tuple(tensor.shape)}, and its "
                        f"growth starts from {tuple(entry['before'])}. hint: build the "
                        "model as it was built before it grew"
                    )
                swap(tensor, tensor.detach().new_zeros(shape), None)
            _set_all(model, growth["attributes"])
            for entry in growth["insertions"]:
                insert(model, insertion_from(entry))
            _set_all(model, growth["counts"])


def _set_all(model: nn.Module, attributes: Sequence[Any]) -> None:
    for module_name, attribute, value in attributes:
        try:
            old = get_attribute(model, module_name, attribute)
        except AttributeError:
            # A config may have had its default (head_dim).
            if "." not in attribute:
                raise
            old = None
        if not _may_become(old, value):
            raise CheckpointError(
                f"the lineage sets {module_name}.{attribute}, which holds no size; it was "
                "not written by Meristem, or was edited"
            )
        if isinstance(old, (tuple, list)):  # JSON knows no tuples
            value = type(old)(value)
        set_attribute(model, module_name, attribute, value)


def _may_become(old: Any, new: Any) -> bool:
    """Whether a growth may make one value of the other: numbers, also where there was
    none; a list with a word for every block ("layer_types"), longer or shorter; a table
    of numbers (ranks by module).
    """
    if old is None:
        return type(new) in (int, float)
    if isinstance(old, dict) and isinstance(new, dict):
        old, new = list(old.values()), list(new.values())
    if not isinstance(old, (tuple, list)):
        old, new = [old], [new]
    if all(type(entry) in (int, float) for entry in (*old, *new)):
        return True
    return isinstance(new, (tuple, list)) and bool(new) and set(new) <= set(old)


def members(names: Sequence[str], growths: Line) -> list[str]:
    """The parameters that a group of an optimizer holds after some growths."""
    for growth in growths:
        end = growth["parameters_after"]
        names = _members(names, growth, end, dict(growth["renamed"]), back=False)
    return list(names)


def rebuild(
    model: nn.Module, values: Mapping[str, Tensor], growths: Line, line: Line
) -> None:
    """Repeat growths, the end of a lineage, on a model, and give it the grown one's
    values.
    """
    replay(model, growths)
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            tensor.copy_(values[name])
    model.__dict__[LINEAGE] = list(line)


# -- converting


def convert(
    state: Mapping[str, Any],
    line: Line,
    *,
    names: Sequence[str] | None = None,
    back: bool = False,
) -> dict[str, Any]:
    """A state dict of an old shape, mapped to the new one by a lineage.

    Old entries go where the growths put them. New ones of weights start at zero, those
    of norm weights and variances at one; tensors of new blocks start as those that they
    were made after, or as the identity. In an optimizer's state every new entry is
    zero, and parameters of new blocks join the groups of those that they were made
    after, in the order of the model. Old entries keep the values that they come with:
    what a method did to old weights (Net2Net divides fan-outs) is neither done nor
    undone.

    Args:
        state: The state dict of a model, of an average of its weights, or of an
            optimizer.
        line: `meristem.lineage(model)`, or its end: the growths that the state has not
            had.
        names: For an optimizer, the parameters that it held, in the order of its
            groups; all of the model's by default.
        back: Map a state of the new shape to the old one, where units were only added.

    Returns:
        A new state dict; the given one is left alone.

    Raises:
        CheckpointError: The state does not have the shapes that the lineage starts
            from.

    Examples:
        >>> import torch, meristem as ms
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> averaged = {name: w.clone() for name, w in net.state_dict().items()}
        >>> _ = ms.grow_(net, {"0": 2}, torch.randn(3, 4))
        >>> ms.convert(averaged, ms.lineage(net))["0.weight"].shape
        torch.Size([10, 4])
    """
    result: dict[str, Any] = dict(state)
    is_optimizer = "param_groups" in state and "state" in state
    for growth in reversed(line) if back else line:
        if is_optimizer:
            result, names = _converted_optimizer(result, growth, names, back)
        elif back:
            result = _restored(result, growth)
        else:
            result = _converted(result, growth)
    return result


def _entries(growth: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What happened to each tensor, under every name that it had."""
    entries = {}
    for entry in growth["tensors"]:
        for name in (entry["name"], *entry["aliases"]):
            entries[name] = entry
    return entries


def _sources(entry: Mapping[str, Any]) -> tuple[Sources, ...]:
    return tuple(sources_from(source) for source in entry["sources"])


def _check_known(state: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise where a state has nothing of what a growth changed."""
    names = list(known)
    if names and not any(name in state for name in names):
        first = next(iter(state), None)
        raise CheckpointError(
            f"the state has none of the tensors of this growth ({names[0]}, ...); its first "
            f"is {first!r}. hint: take a prefix such as 'module.' off its names, and pass "
            "the growths that fit it"
        )


def _converted(state: Mapping[str, Any], growth: Mapping[str, Any]) -> dict[str, Any]:
    entries = _entries(growth)
    _check_known(state, [*entries, *growth["renamed"]])
    # Names that only the grown model has.
    later = {*growth["made"], *growth["renamed"].values()} - growth["renamed"].keys()
    for name in state:
        if name in later:
            raise CheckpointError(
                f"the state has {name}, which the growth makes. hint: pass the growths "
                "that this state has not had"
            )
    carried: dict[str, Any] = {}
    for name, value in state.items():
        if name in entries:
            value = _carried(name, value, entries[name])
        if name in growth["rescaled"]:
            value = Rescaling(*growth["rescaled"][name]).of(value)
        carried[name] = value
    result: dict[str, Any] = {}
    # First the shapes under old names, then the new names.
    for name, value in carried.items():
        new_name = growth["renamed"].get(name, name)
        if new_name is not None:
            result[new_name] = value
    for name, made in growth["made"].items():
        result[name] = _started(made, carried)
    return result


def _carried(name: str, value: Tensor, entry: Mapping[str, Any]) -> Tensor:
    if list(value.shape) != list(entry["before"]):
        raise CheckpointError(
            f"{name} has shape {tuple(value.shape)}, the growth starts from "
            f"{tuple(entry['before'])}. hint: pass the growths that this state has not had"
        )
    sources = _sources(entry)
    grown = carry(value, sources)
    if entry["start"] == "one":
        # One where an entry is old, zero where it is new.
        kept = carry(torch.ones_like(value), sources)
        grown = grown + (1 - kept)
    return grown


def _started(made: Mapping[str, Any], state: Mapping[str, Tensor]) -> Tensor:
    parent = state.get(made["parent"]) if made["parent"] else None
    if parent is not None and "start" not in made:
        return parent.clone()
    # Its dtype and device, where there is one.
    like = parent if parent is not None else torch.zeros(())
    start = like.new_zeros(made["shape"])
    if made.get("start") == "one":
        return start + 1
    return _identity(start) if made.get("start") == "identity" else start


def _restored(state: Mapping[str, Any], growth: Mapping[str, Any]) -> dict[str, Any]:
    """A state as it was before a growth that only added."""
    if any(growth["after"][name] < n for name, n in growth["before"].items()):
        raise CheckpointError("a growth that dropped units cannot be mapped back")
    entries = _entries(growth)
    old_names = {new: old for old, new in growth["renamed"].items()}
    _check_known(state, [*entries, *old_names])
    _check_known(state, growth["made"])
    result: dict[str, Any] = {}
    for name, value in state.items():
        # Tensors of blocks that had not come yet.
        if name in growth["made"]:
            continue
        old = old_names.get(name, name)
        if old in growth["rescaled"]:
            value = Rescaling(*growth["rescaled"][old]).undone(value)
        if old in entries:
            value = _picked(value, entries[old])
        result[old] = value
    return result


def _picked(value: Tensor, entry: Mapping[str, Any]) -> Tensor:
    """The old entries of a grown tensor, in their old order."""
    if list(value.shape) != list(entry["after"]):
        raise CheckpointError(
            f"{entry['name']} has shape {tuple(value.shape)}, the growth ends at "
            f"{tuple(entry['after'])}. hint: pass the growths that this state has had"
        )
    for d, source in enumerate(_sources(entry)):
        kept = torch.from_numpy((source >= 0).nonzero()[0])
        value = value.index_select(d, kept.to(value.device))
    return value


def _converted_optimizer(
    state: Mapping[str, Any],
    growth: Mapping[str, Any],
    names: Sequence[str] | None,
    back: bool,
) -> tuple[dict[str, Any], list[str]]:
    """An optimizer's state after (or before) one growth, and what it holds then."""
    orders = growth["parameters"], growth["parameters_after"]
    start, end = reversed(orders) if back else orders
    held = list(names if names is not None else start)
    # An optimizer numbers its parameters through all groups.
    indices = [i for group in state["param_groups"] for i in group["params"]]
    if len(held) != len(indices):
        raise CheckpointError(
            f"the optimizer holds {len(indices)} parameters, {len(held)} are named. "
            "hint: pass names=, the parameters in the order of its groups"
        )
    name_of = dict(zip(indices, held, strict=True))
    renamed = _new_names(growth, back)
    groups: list[dict[str, Any]] = []
    order: list[str] = []
    for group in state["param_groups"]:
        olds = [name_of[i] for i in group["params"]]
        listed = _members(olds, growth, end, renamed, back)
        first = len(order)
        order += listed
        moved = {**group, "params": list(range(first, len(order)))}
        if "param_names" in group:
            moved["param_names"] = listed
        groups.append(moved)
    places = {name: i for i, name in enumerate(order)}
    entries = _entries(growth)
    states = {}
    for i, entry in state["state"].items():
        new_name = renamed.get(name_of[i], name_of[i])
        if new_name not in places:
            continue
        old = _old_name(growth, name_of[i]) if back else name_of[i]
        states[places[new_name]] = _converted_entry(entry, entries.get(old), back)
    return {**state, "state": states, "param_groups": groups}, order


def _members(
    olds: Sequence[str],
    growth: Mapping[str, Any],
    end: Sequence[str],
    renamed: Mapping[str, str | None],
    back: bool,
) -> list[str]:
    """The parameters of a group after a growth, as surgery lets new ones join it."""
    moved = [renamed.get(name, name) for name in olds]
    kept = [name for name in moved if name is not None]
    if back:
        return kept
    place = {name: number for number, name in enumerate(end)}
    for name in end:
        made = growth["made"].get(name)
        if made is None or made["parent"] not in olds:
            continue
        parent = kept.index(str(renamed.get(made["parent"], made["parent"])))
        places = [place.get(one, -1) for one in kept]
        kept.insert(place_in_group(places, place[name], parent), name)
    return kept


def place_in_group(places: Sequence[int], new: int, parent: int) -> int:
    """Where a new parameter joins a group of an optimizer.

    Args:
        places: The places in the model of those that the group holds, in its order.
        new: The place in the model of the new one.
        parent: Which of the group it was made after.
    """
    # In the order of the model, not that of arrival: positional states fit it.
    if list(places) == sorted(places):
        return bisect(places, new)
    # A group in an order of its own: behind the one that it follows.
    return parent + 1


def _new_names(growth: Mapping[str, Any], back: bool) -> dict[str, str | None]:
    if not back:
        return dict(growth["renamed"])
    names: dict[str, str | None] = {new: old for old, new in growth["renamed"].items()}
    for name in growth["made"]:
        names[name] = None
    return names


def _old_name(growth: Mapping[str, Any], name: str) -> str:
    for old, new in growth["renamed"].items():
        if new == name:
            return str(old)
    return name


def _converted_entry(
    state: Mapping[str, Any], entry: Mapping[str, Any] | None, back: bool
) -> dict[str, Any]:
    """The state of one parameter; counters of steps have no dimensions and stay."""
    converted = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.dim() and entry is not None:
            inside = _inside(key, tuple(value.shape), entry, back)
            value = _picked(value, inside) if back else carry(value, _sources(inside))
        converted[key] = value
    return converted


def _inside(
    key: str, shape: tuple[int, ...], entry: Mapping[str, Any], back: bool
) -> Mapping[str, Any]:
    """What happens to a state that has its parameter's dimensions, but for one that it
    is summed over: that has one entry, or is missing.
    """
    whole = tuple(entry["after" if back else "before"])
    if shape == whole or len(whole) < 2:
        return entry
    summed = {"before": 1, "after": 1, "sources": spans(np.arange(1))}
    # Rows and columns of a square are told apart by what the state is called.
    for dim in (-2, -1) if "col" in key else (-1, -2):
        one = {name: list(entry[name]) for name in summed}
        missing = {name: list(entry[name]) for name in summed}
        for name, value in summed.items():
            one[name][dim] = value
            del missing[name][dim]
        for cut in (one, missing):
            if shape == tuple(cut["after" if back else "before"]):
                return {**entry, **cut}
    raise CheckpointError(
        f"the state {key!r} of {entry['name']} has shape {shape}, its parameter {whole}: "
        "no rule says how it follows. hint: leave it out, so that it starts anew"
    )
