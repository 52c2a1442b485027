"""Two checks before a growth: is the edit right, and is the function kept?

The first runs on random weights in float64, since real ones (layer scales of 1e-6, zero
initialisations) would hide a wrong edit; the second on the real ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from meristem.core.axis import Axis, Place, Slot
from meristem.core.change import Insertion, Plan, Sources, index
from meristem.core.errors import VerificationError
from meristem.core.offer import Offer, Scaling
from meristem.structure import Structure
from meristem.surgery import lazy
from meristem.surgery.probe import Values, probe_of, relative_change, run
from meristem.surgery.silence import silence, silent_blocks
from meristem.surgery.tensors import grown_tensors, new_units


def check_edit(
    structure: Structure, plan: Plan, axes: Sequence[Axis], deepen: bool = True
) -> None:
    """Raise unless the planned edit preserves the function on random weights.

    Grown units get random fan-in and zero fan-out, new blocks random weights and a
    silent end; units that are dropped get a zero fan-out before they go.

    Args:
        structure: The traced model.
        plan: The edit.
        axes: The axes that change.
        deepen: Whether new blocks take part; methods that do not preserve the function
            need not.
    """
    for insertion in plan.insertions:
        _check_read(structure, insertion, deepen)
    insertions = plan.insertions if deepen else ()
    if any(len(insertion.blocks) < insertion.size for insertion in insertions):
        insertions = ()  # what the model computes without a block is the user's choice
    # Blocks that go, and blocks that may change the function, leave nothing to compare.
    if not plan.tensors and not insertions:
        return
    drops = any(count < 0 for count in plan.added.values())
    if drops and any(axis.streamed for axis in axes):
        return  # a norm over the axis sees every unit that goes
    probe = probe_of(structure)
    grown = _grown(plan, axes, probe.values)
    if drops:
        # A unit that nothing reads can go: that is what a removal must keep.
        silent = _silenced_units(plan, axes, probe.values)
        probe = replace(
            probe,
            values=silent,
            before=run(structure, silent, probe.example),
        )
        grown = _grown(plan, axes, silent)
    blocks = [silent_blocks(structure, one, grown) for one in insertions]
    followed = plan if insertions else replace(plan, counts=())
    after = run(structure, grown, probe.example, followed, blocks)
    change = relative_change(plan, probe.before, after)
    if change <= probe.tolerance:
        return
    # Is it the width or the block? The width alone tells.
    if insertions and plan.tensors:
        check_edit(structure, plan, axes, deepen=False)
    if insertions:
        raise VerificationError(_deepened(plan, insertions, change))
    raise VerificationError(
        f"growing {', '.join(plan.after)} would change what the model computes, by "
        f"{change:.1e} of its largest output on random weights; nothing was changed"
    )


def _check_read(structure: Structure, insertion: Insertion, deepen: bool) -> None:
    """Raise where nothing reads new blocks, or where they cannot be silent but should."""
    if not any(insertion.new):
        return
    try:
        silence(structure, insertion)
    except VerificationError:
        # A method that changes the function needs no silence, but its block must be
        # read.
        if deepen:
            raise


def _deepened(plan: Plan, insertions: Sequence[Insertion], change: float) -> str:
    """What is said where new blocks change the function."""
    names = ", ".join(insertion.axis for insertion in insertions)
    remedy = (
        "hint: a method that does not preserve the function, as how.Stack(), grows it"
    )
    if math.isinf(change):
        return (
            f"with a new block of {names} the model gives other outputs, or outputs of "
            "other shapes (one for every block?), which cannot be compared; nothing "
            f"was changed. {remedy}"
        )
    follows = [f"{edit.module or 'model'}.{edit.attribute}" for edit in plan.counts]
    beside = f", with {', '.join(follows)} changed too" if follows else ""
    return (
        f"no new block of {names} leaves the function as it is: the outputs would "
        f"change by {change:.1e} of the largest one{beside}; nothing was changed. "
        f"{remedy}"
    )


def _grown(plan: Plan, axes: Sequence[Axis], values: Values) -> dict[str, Tensor]:
    """Values grown by new units that preserve the function, random wherever they may
    be.
    """
    # From here on large weights are their factors.
    plan, axes = lazy.on_factors(plan, axes, values)
    parts = lazy.split(values)
    generator = torch.Generator().manual_seed(0)
    offers = []
    for axis in axes:
        if plan.added[axis.name] > 0 and axis.slots:
            offers.append(neutral_units(plan, axis, parts, generator))
    grown = grown_tensors(parts, plan, axes, offers, Scaling())
    return {**values, **lazy.joined(grown, parts)}


def neutral_units(
    plan: Plan, axis: Axis, values: Values, generator: torch.Generator
) -> Offer:
    """New units that preserve the function by the rule of their axis, else random."""
    strips: dict[Place, Tensor] = {}
    for slot in axis.slots:
        where = new_units(plan, axis.name, slot.place)
        old = values[slot.name]
        rest = [size for d, size in enumerate(old.shape) if d != slot.dim]
        drawn = torch.randn(
            (*where.shape, *rest), generator=generator, dtype=torch.float64
        )
        strip = drawn.to(device=old.device, dtype=old.dtype)
        reads = slot.role == "fan_out" and not slot.tied
        if axis.streamed and not reads:
            strips |= stream_strip(axis, slot, old, where)
        elif slot.role == "fan_out" and not axis.streamed:
            strips[slot.place] = torch.zeros_like(strip)
        elif slot.name.endswith("running_var"):
            strips[slot.place] = strip.abs() + 0.5
        else:
            strips[slot.place] = strip
    return Offer(axis.name, plan.added[axis.name], strips)


def silent_units(plan: Plan, axis: Axis, values: Values) -> Offer:
    """New units that preserve the function and compute nothing."""
    strips: dict[Place, Tensor] = {}
    for slot in axis.slots:
        if axis.streamed and (slot.tied or slot.role != "fan_out"):
            where = new_units(plan, axis.name, slot.place)
            strips |= stream_strip(axis, slot, values[slot.name], where)
    return Offer(axis.name, plan.added[axis.name], strips)


def stream_strip(
    axis: Axis, slot: Slot, old: Tensor, where: Sources
) -> dict[Place, Tensor]:
    """What a producer into a normalised stream gives its new units.

    The mean of the old ones, zero under an RMS norm. The norm's own weights are left to
    their fill.
    """
    if slot.role == "carried" and slot.fill in ("one", "zero"):
        return {}
    rest = [size for d, size in enumerate(old.shape) if d != slot.dim]
    shape = [*where.shape, *rest]
    if axis.norm == "rms_norm":
        return {slot.place: old.new_zeros(shape)}
    mean = old.mean(slot.dim, keepdim=True).movedim(slot.dim, 0)
    return {slot.place: mean[None].expand(shape).clone()}


def _silenced_units(
    plan: Plan, axes: Sequence[Axis], values: Values
) -> dict[str, Tensor]:
    """Values in which nothing reads the units that are dropped."""
    plan, axes = lazy.on_factors(plan, axes, values)
    parts = lazy.split(values)
    silent: dict[str, Tensor] = {}
    for axis in axes:
        for slot in axis.places("fan_out"):
            change = plan.change(slot.name)
            present = np.arange(change.before[slot.dim])
            dropped = index(np.setdiff1d(present, change.sources[slot.dim]))
            old = silent.get(slot.name, parts[slot.name])
            where = dropped.to(old.device)
            silent[slot.name] = old.index_fill(slot.dim, where, 0.0)
    return {**values, **lazy.joined(silent, parts)}
