"""Two checks before a growth: is the edit right (random float64 weights), and is the function kept (the real ones)?"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from meristem.core.axis import Axis, Place
from meristem.core.change import Insertion, Plan, index
from meristem.core.errors import GrowthRefused, VerificationError
from meristem.core.offer import Blocks, Proposal, Scaling
from meristem.structure import Structure, resolve
from meristem.structure.discover import apply_edits
from meristem.structure.insertion import insert
from meristem.structure.tracer import tensors
from meristem.structure.twin import Example, looking, map_tensors, named_tensors, twin
from meristem.structure.undisturbed import undisturbed
from meristem.surgery.tensors import grown_tensors, new_units

STRUCTURAL_TOLERANCE = 1e-9
"""Largest relative output change of a function-preserving edit on random float64 weights."""


def check_edit(structure: Structure, plan: Plan, axes: Sequence[Axis], deepen: bool = True) -> None:
    """Raise unless the planned edit preserves the function on random float64 weights.

    Grown units get random fan-in and zero fan-out, new blocks (left out where `deepen` is false, as for methods that do
    not preserve the function) random weights and a silent end; units that are dropped get a zero fan-out before they go.
    Real weights would hide wrong edits (layer scale of 1e-6, zero initialisations), so they are not used here.
    """
    for insertion in plan.insertions:
        if any(insertion.new):
            with contextlib.nullcontext() if deepen else contextlib.suppress(VerificationError):
                silence(structure, insertion)
    generator = torch.Generator().manual_seed(0)
    old = _random_tensors(structure.model, generator)
    proposals = []
    insertions = plan.insertions if deepen else ()
    if any(len(insertion.blocks) < insertion.size for insertion in insertions):
        insertions = ()  # what the model computes without a block is the user's choice
    for axis in axes:
        if axis.kind == "depth":
            continue
        if plan.after[axis.name] > plan.before[axis.name]:
            proposals.append(probe(plan, axis, old, generator))
        elif axis.streamed:
            return
        else:
            _silence_dropped(plan, axis, old)
    grown = {**old, **grown_tensors(old, plan, axes, proposals, Scaling())}
    example = _doubled(structure.example)
    try:
        before = run(structure.model, old, example)
        probes = [silenced(structure, insertion) for insertion in insertions]
        after = run(structure.model, grown, example, replace(plan, counts=plan.counts if insertions else ()), probes)
    except Exception:
        return  # code that insists on float32 is left to the check on the real weights
    if not comparable(before):
        return  # so is a root of random weights
    change = relative_change(plan, before, after)
    if not change <= STRUCTURAL_TOLERANCE:
        if insertions and plan.tensors:
            check_edit(structure, plan, axes, deepen=False)
        if insertions:
            follows = ", ".join(f"{edit.module or 'model'}.{edit.attribute}" for edit in plan.counts)
            if math.isinf(change):
                raise VerificationError(
                    f"with a new block of {', '.join(i.axis for i in insertions)} the model gives other outputs, or outputs of "
                    "other shapes (one for every block?), which cannot be compared; nothing was changed. hint: a method that does "
                    "not preserve the function, as how.Stack(), grows it"
                )
            raise VerificationError(
                f"no new block of {', '.join(i.axis for i in insertions)} leaves the function as it is: the outputs would "
                f"change by {change:.1e} of the largest one{f', with {follows} changed too' if follows else ''}; nothing was "
                "changed. hint: a method that does not preserve the function, as how.Stack(), grows it"
            )
        raise VerificationError(
            f"growing {', '.join(plan.after)} would change what the model computes, by {change:.1e} of its largest output "
            "on random weights; nothing was changed"
        )


def probe(plan: Plan, axis: Axis, values: Mapping[str, Tensor], generator: torch.Generator) -> Proposal:
    """New units that preserve the function by the rule of their axis, random wherever they may be."""
    strips: dict[Place, Tensor] = {}
    for slot in axis.slots:
        where = new_units(plan, axis.name, slot.place)
        old = values[slot.name]
        shape = [*where.shape, *[n for d, n in enumerate(old.shape) if d != slot.dim]]
        strip = torch.randn(shape, generator=generator, dtype=torch.float64).to(old.device)
        if axis.streamed:
            reads = slot.role == "fan_out" and not slot.tied
            strips |= {slot.place: strip} if reads else stream_strip(axis, slot.name, slot.dim, old, where)
        elif slot.role == "fan_out":
            strips[slot.place] = torch.zeros_like(strip)
        else:
            strips[slot.place] = strip.abs() + 0.5 if slot.name.endswith("running_var") else strip
    return Proposal(axis.name, plan.added[axis.name], strips)


def stream_strip(axis: Axis, name: str, dim: int, old: Tensor, where: np.ndarray[Any, Any]) -> dict[Place, Tensor]:
    """What a producer into a normalised stream gives its new units: the mean of the old ones, zero under an RMS norm.

    The norm's own weights are left to their fill.
    """
    slot = next(slot for slot in axis.slots if slot.place == Place(name, dim))
    if slot.role == "carried" and slot.fill in ("one", "zero"):
        return {}
    shape = [*where.shape, *[n for d, n in enumerate(old.shape) if d != dim]]
    if axis.norm == "rms_norm":
        return {slot.place: old.new_zeros(shape)}
    return {slot.place: old.mean(dim, keepdim=True).movedim(dim, 0)[None].expand(shape).clone()}


def _random_tensors(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Random float64 values for every tensor of a model; variances are positive."""
    values = {name: _random_tensor(tensor, generator) for name, tensor in named_tensors(model).items()}
    variances = {f"{n}.running_var" if n else "running_var" for n, _ in model.named_modules()}
    return {name: value.abs() + 0.5 if name in variances else value for name, value in values.items()}


def _doubled(example: Example) -> Example:
    doubled: Example = map_tensors(example, lambda t: t.double() if t.is_floating_point() else t)
    return doubled


def _random_tensor(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.detach().clone()
    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    if not isinstance(tensor, nn.Parameter):
        return tensor.detach().double() + 0.1 * noise.to(tensor.device)
    fan = max(1, tensor.numel() // max(tensor.shape[0], 1)) if tensor.dim() > 1 else 1
    return (noise / fan**0.5 if tensor.dim() > 1 else 1 + 0.5 * noise).to(tensor.device)


def _silence_dropped(plan: Plan, axis: Axis, values: dict[str, Tensor]) -> None:
    for slot in axis.places("fan_out"):
        change = plan.change(slot.name)
        kept = change.sources[slot.dim]
        dropped = np.setdiff1d(np.arange(change.before[slot.dim]), kept)
        values[slot.name] = values[slot.name].index_fill(slot.dim, index(dropped).to(values[slot.name].device), 0.0)


def silenced(structure: Structure, insertion: Insertion) -> Blocks:
    """New blocks as copies that add nothing to the stream; in a chain, identity layers."""
    values: dict[tuple[int, str], Tensor] = {}
    if insertion.form == "run":
        depth = structure.depths[insertion.axis]
        silent = silence(structure, insertion)
        for place, (block, new) in enumerate(zip(insertion.blocks, insertion.new, strict=True)):
            if new:
                tensors_of = named_tensors(structure.model.get_submodule(depth.blocks[block]))
                values |= {(place, name): torch.zeros_like(tensors_of[name].detach()) for name in silent}
    return Blocks(insertion, values)


def silence(structure: Structure, insertion: Insertion) -> tuple[str, ...]:
    """The tensors of a new block of a run that are zero where it adds nothing, under their names inside it; tried once for every
    run, on random float64 weights.

    The labels tell which tensors add to the stream. Of these as few as possible are zero, since a product of two zeros never
    learns. Where a norm without a class of torch's own reads the zeros, its slope there is a thousandfold: then it is the
    block's own scales and shifts that are tried.

    Raises:
        GrowthRefused: Nothing would read what a new block gives.
        VerificationError: Only a zero in front of a norm silences the block.
    """
    if insertion.form != "run":
        return ()
    if insertion.axis not in structure.silences:
        structure.silences[insertion.axis] = _silence(structure, insertion.axis)
    return structure.silences[insertion.axis]


def _silence(structure: Structure, axis: str) -> tuple[str, ...]:
    depth = structure.depths[axis]
    labelled, block = depth.silent[-1], depth.blocks[-1]
    plan = resolve(structure, {axis: 1})
    if plan.refusal is not None:
        return labelled
    values = _random_tensors(structure.model, torch.Generator().manual_seed(0))
    example = _doubled(structure.example)

    def outputs(blocks: Sequence[Blocks] = ()) -> list[Tensor]:
        return run(structure.model, values, example, plan if blocks else None, blocks)

    def moved(names: Sequence[str], scale: float = 0.0) -> float:
        placed = {(depth.size, name): scale * values[f"{block}.{name}"] for name in names}
        return relative_change(plan, before, outputs([Blocks(plan.insertions[0], placed)]))

    try:
        before = outputs()
        whole = moved(())
    except Exception:
        return labelled  # code that insists on float32
    if not comparable(before):
        return labelled  # a root of random weights, or classes for outputs
    if whole == 0:
        raise GrowthRefused(
            f"what a new block of {axis} gives would not reach the output: the model reads its blocks by their numbers, or a "
            "fixed number of them"
        )
    steep = False
    vectors = [n for n, p in structure.model.get_submodule(block).named_parameters() if p.dim() == 1]
    for names in (list(labelled), vectors):
        if not names or moved(names) > STRUCTURAL_TOLERANCE:
            continue
        for owner in dict.fromkeys(name.rpartition(".")[0] for name in names):
            fewer = [name for name in names if name.rpartition(".")[0] != owner]
            names = fewer if moved(fewer) <= STRUCTURAL_TOLERANCE else names
        if moved(names, 0.01) <= 0.3 * whole:  # behind a norm a hundredth of the weights moves as much as all of them
            return tuple(names)
        steep = True
    if steep:
        raise VerificationError(
            f"a new block of {axis} could only be silenced in front of a norm, where the first step would undo it; nothing was "
            "changed. hint: a method that does not preserve the function, as how.Stack(), grows it"
        )
    return labelled


def grown_twin(model: nn.Module, values: Mapping[str, Tensor], plan: Plan, blocks: Sequence[Blocks] = ()) -> nn.Module:
    """A twin that holds `values` (at their grown shapes) and the new blocks."""
    copied = twin(model, lambda name, _: values[name].detach().clone())
    apply_edits(copied, plan.attributes)
    for one in blocks:
        insert(copied, one.insertion, one.values)
    apply_edits(copied, plan.counts)
    return copied


def run(
    model: nn.Module,
    values: Mapping[str, Tensor],
    example: Example,
    plan: Plan | None = None,
    blocks: Sequence[Blocks] = (),
) -> list[Tensor]:
    """The output tensors of a twin that holds `values`, grown by a plan or not, in eval mode, on the example; random layers
    are seeded alike.
    """
    copied = grown_twin(model, values, plan if plan is not None else Plan({}, {}), blocks).eval()
    if any(value.dtype == torch.float64 for value in values.values()):
        copied.double()
    with undisturbed(), looking(None):
        torch.manual_seed(0)
        args, kwargs = map_tensors(example, lambda t: t.detach().clone())
        return tensors(copied(*args, **kwargs))


def relative_change(plan: Plan, before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The largest difference of an old output entry, relative to the largest old output."""
    if len(before) != len(after) or len(before) != len(plan.outputs):
        return float("inf")
    worst, scale = 0.0, 0.0
    for old, new, kept_by_dim in zip(before, after, plan.outputs, strict=True):
        if tuple(new.shape) != tuple(len(source) for source in kept_by_dim):
            return float("inf")
        for d, source in enumerate(kept_by_dim):
            kept = np.flatnonzero(source >= 0)
            if len(kept) != new.shape[d]:
                new = new.index_select(d, index(kept).to(new.device))
        finite = torch.isfinite(old.double())
        if not bool(torch.isfinite(new.double())[finite].all()):
            return float("inf")
        if old.is_floating_point() and bool(finite.any()):
            worst = max(worst, (new.double() - old.double())[finite].abs().max().item())
            scale = max(scale, old.double()[finite].abs().max().item())
    return worst / scale if scale else worst


def comparable(outputs: Sequence[Tensor]) -> bool:
    """Whether outputs hold a finite real number, by which a change would show."""
    return any(out.is_floating_point() and bool(torch.isfinite(out).any()) for out in outputs)


def rounding_gap(structure: Structure, values: Mapping[str, Tensor], before: Sequence[Tensor]) -> float:
    """How far the ungrown model's own outputs lie from a float64 evaluation, relative to the largest output."""
    doubled = {name: value.double() if value.is_floating_point() else value for name, value in values.items()}
    try:
        exact = run(structure.model, doubled, _doubled(structure.example))
    except Exception:
        return 0.0
    floats = [(a, b) for a, b in zip(before, exact, strict=True) if a.is_floating_point() and a.numel()]
    scale = max((a.double().abs().max().item() for a, _ in floats), default=0.0)
    gap = max(((a.double() - b.double()).abs().max().item() for a, b in floats), default=0.0)
    return gap / scale if scale else gap
