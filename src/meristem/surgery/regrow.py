"""What a lineage has in store for a model that was built anew."""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor, nn

from meristem.core.errors import CheckpointError
from meristem.core.growth import LINEAGE
from meristem.structure.twin import named_tensors, twin
from meristem.surgery.lineage import Line, replay


def missing(
    model: nn.Module,
    lineage: list[Any],
    have: dict[str, Tensor],
    saved: dict[str, Tensor],
) -> Line:
    """The growths that a model has not had yet: none of its own, or the first ones of
    the checkpoint's.

    A model that was built at its grown size only lacks the attributes that no
    constructor knows (an eps).
    """
    later = _later(model, lineage)
    if later is not None:
        return later
    if have.keys() != saved.keys() or any(
        have[name].shape != saved[name].shape for name in have
    ):
        return lineage
    return _attributes_alone(model, lineage)


def _later(model: nn.Module, line: Line) -> Line | None:
    """The later growths, where a model has had the first ones of a lineage."""
    own = json.loads(json.dumps(getattr(model, LINEAGE, [])))
    return line[len(own) :] if own and own == line[: len(own)] else None


def _attributes_alone(model: nn.Module, lineage: Line) -> Line:
    """What growths set that no constructor knows (an eps), without shapes."""
    held = {name for name, _ in model.named_modules()}
    missing = []
    for growth in lineage:
        entry: dict[str, Any] = {"tensors": [], "insertions": []}
        for key in ("attributes", "counts"):
            entry[key] = [edit for edit in growth[key] if edit[0] in held]
        missing.append(entry)
    return missing


def left(model: nn.Module, line: Line) -> Line:
    """The growths that a model has not had yet."""
    line = json.loads(json.dumps(line))
    later = _later(model, line)
    if later is not None:
        return later
    last = line[-1]["parameters_after"] if line else []
    names = [name for name, _ in model.named_parameters()]
    shapes = {name: list(t.shape) for name, t in named_tensors(model).items()}
    ends = ends_of(line)
    built = names == last and all(shapes.get(name) == end for name, end in ends.items())
    return _attributes_alone(model, line) if built else line


def changing(growths: Line, targets: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model that some growths will exchange."""
    found = {}
    for growth in growths:
        for entry in growth["tensors"]:
            if entry["name"] in targets:
                found[entry["name"]] = targets[entry["name"]]
    return found


def replayed(
    model: nn.Module, growths: Line
) -> tuple[nn.Module, dict[int, nn.Parameter]]:
    """A copy of a model without data that has had some growths, and what has become of
    each parameter, by the identity of the model's own.

    Raises:
        CheckpointError: They do not belong to it.
    """
    kind = type(model).__name__
    grown = twin(model, lambda _, tensor: tensor.detach().to("meta"))
    pairs = zip(model.parameters(), grown.parameters(), strict=True)
    followed = {id(parameter): copied for parameter, copied in pairs}
    try:
        replay(grown, growths)
    except (AttributeError, IndexError, KeyError, StopIteration) as error:
        raise CheckpointError(
            f"the checkpoint does not belong to this {kind}: its growths cannot be "
            f"repeated on it ({error})"
        ) from error
    return grown, followed


def ends_of(line: Line) -> dict[str, list[int]]:
    """The shapes that grown tensors have at the end of a lineage, by their names then."""
    ends: dict[str, list[int]] = {}
    for growth in line:
        renamed = growth["renamed"]
        moved = {renamed.get(name, name): shape for name, shape in ends.items()}
        ends = {name: shape for name, shape in moved.items() if name is not None}
        for entry in growth["tensors"]:
            name = entry["name"]
            ends[renamed.get(name, name)] = list(entry["after"])
    return ends
