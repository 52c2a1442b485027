"""Module attributes that mirror a size: found by re-tracing a grown twin until every operation has its planned shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from meristem.core.change import AttributeChange, Plan
from meristem.structure.discover import Structure
from meristem.structure.labels import Changes, size
from meristem.structure.tracer import ModuleStack
from meristem.structure.twin import fake_mode, looking

TRIALS = 60
"""Largest number of re-traces that the search for one plan's attributes may cost."""


class Deviation(Exception):
    """The re-trace left the plan."""


class _Checker(TorchDispatchMode):
    """Compares every operation of a re-trace with its planned output shapes."""

    def __init__(self, expected: list[tuple[str, list[tuple[int, ...]]]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.expected = expected
        self.reached = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace != "aten":
            return result
        shapes = [tuple(leaf.shape) for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        if not shapes:
            return result
        name = func._schema.name.split("::")[1]
        if self.reached >= len(self.expected):
            raise Deviation(f"the grown model runs an extra operation {name!r}")
        planned_name, planned = self.expected[self.reached]
        if (name, shapes) != (planned_name, planned):
            raise Deviation(f"{name!r} gives {shapes}, planned was {planned_name!r} with {planned}")
        self.reached += 1
        return result


@dataclass(frozen=True)
class _Attempt:
    """How far a re-trace got, what stopped it (None: nothing), and the modules that were running."""

    reached: int
    problem: str | None
    running: tuple[str, ...] = ()


def attributes_for(
    structure: Structure, plan: Plan, changes: Changes
) -> tuple[tuple[AttributeChange, ...], str | None]:
    """The attribute changes that make a re-trace follow the plan, and None; or what was tried, and the refusal."""
    shapes = {change.name: change.after for change in plan.tensors}
    expected = [
        (name, [tuple(size(x, changes) for x in dims) for dims in outputs]) for name, outputs in structure.trace.laws
    ]
    resized = _resized(structure, changes)
    edits = list(leaf_attributes(structure, shapes, changes))
    trials = 0

    def attempt(trial: list[AttributeChange]) -> _Attempt:
        nonlocal trials
        trials += 1
        return _retrace(structure, shapes, trial, expected)

    best = attempt(edits)
    while best.problem is not None and trials < TRIALS:
        improved = None
        for edit in _candidates(structure, best.running, resized, edits):
            if trials >= TRIALS:
                break
            result = attempt([*edits, edit])
            if result.problem is None or result.reached > (improved[0] if improved else best).reached:
                improved = (result, edit)
            if result.problem is None:
                break
        if improved is None:
            break
        best = improved[0]
        edits.append(improved[1])
    if best.problem is None:
        return tuple(edits), None
    place = best.running[-1] if best.running else ""
    return tuple(edits), f"{place or 'the model'} does not follow the new size: {best.problem}"


def leaf_attributes(
    structure: Structure, shapes: dict[str, tuple[int, ...]], changes: Changes
) -> Iterator[AttributeChange]:
    """The attributes of torch's own layers that follow from the shapes of their weights."""
    for module_name, module in structure.model.named_modules():
        weight = (module_name + "." if module_name else "") + "weight"
        shape = shapes.get(weight)
        if shape is None:
            shape = shapes.get((module_name + "." if module_name else "") + "running_mean")
        if shape is None:
            continue
        group = structure.trace.groups.get(weight)
        for attribute, value in _mirrored(module, shape, size(group, changes) if group is not None else 1).items():
            if getattr(module, attribute) != value:
                yield AttributeChange(module_name, attribute, getattr(module, attribute), value)


def _mirrored(module: nn.Module, shape: tuple[int, ...], groups: int) -> dict[str, Any]:
    if isinstance(module, nn.Linear):
        return {"out_features": shape[0], "in_features": shape[1]}
    if isinstance(module, nn.Bilinear):
        return {"out_features": shape[0], "in1_features": shape[1], "in2_features": shape[2]}
    if isinstance(module, nn.modules.conv._ConvNd):
        into, outof = (shape[0], shape[1] * groups) if module.transposed else (shape[1] * groups, shape[0])
        return {"in_channels": into, "out_channels": outof, "groups": groups}
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return {"num_features": shape[0]}
    if isinstance(module, nn.GroupNorm):
        return {"num_channels": shape[0], "num_groups": groups}
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return {"normalized_shape": tuple(shape)}
    if isinstance(module, nn.Embedding):
        return {"num_embeddings": shape[0], "embedding_dim": shape[1]}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": shape[0]}
    return {}


def _resized(structure: Structure, changes: Changes) -> dict[int, set[int]]:
    """Old size -> new sizes, over every dimension that the trace saw change."""
    table: dict[int, set[int]] = {}
    labels = [label for dims in structure.labels.values() for label in dims]
    labels += [label for _, outputs in structure.trace.laws for dims in outputs for label in dims]
    for label in {label.root for label in labels}:
        new = size(label, changes)
        if new != label.size:
            table.setdefault(label.size, set()).add(new)
        for part in label.parts:
            if size(part, changes) != part.root.size:
                table.setdefault(part.root.size, set()).add(size(part, changes))
    return table


def _candidates(
    structure: Structure, running: tuple[str, ...], resized: dict[int, set[int]], done: list[AttributeChange]
) -> Iterator[AttributeChange]:
    """Integers, and tuples of integers, of the running modules (innermost first) that equal a size that changed."""
    taken = {(edit.module, edit.attribute) for edit in done}
    for name in dict.fromkeys(reversed(running)):
        for attribute, value in vars(structure.model.get_submodule(name)).items():
            if attribute.startswith("_") or (name, attribute) in taken or isinstance(value, bool):
                continue
            if isinstance(value, int) and value in resized:
                for new in sorted(resized[value]):
                    yield AttributeChange(name, attribute, value, new)
            elif _sizes(value) and any(i in resized for i in value):
                new_values = type(value)(min(resized[i]) if i in resized else i for i in value)
                yield AttributeChange(name, attribute, value, new_values)


def _sizes(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and bool(value) and all(type(i) is int for i in value)


def _retrace(
    structure: Structure,
    shapes: dict[str, tuple[int, ...]],
    edits: list[AttributeChange],
    expected: list[tuple[str, list[tuple[int, ...]]]],
) -> _Attempt:
    mode = fake_mode(structure.fake)
    copied = structure.twin_of_shape(shapes, edits, mode).eval()
    args, kwargs = structure.example_for(mode)
    stack = ModuleStack(copied)
    checker = _Checker(expected)
    try:
        with looking(mode), checker:
            copied(*args, **kwargs)
    except Exception as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        return _Attempt(checker.reached, first_line[:200], tuple(stack.running))
    if checker.reached != len(expected):
        return _Attempt(checker.reached, "the grown model runs fewer operations")
    return _Attempt(checker.reached, None)
