"""What each kind of axis does: one row per kind, the same functions each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import nn

from meristem.activations import IDENTITIES
from meristem.core.axis import Axis, Kind
from meristem.core.change import Insertion, Sources
from meristem.core.errors import GrowthRefused
from meristem.structure.chains import identity_layer
from meristem.structure.depth import Depth
from meristem.structure.discover import Structure
from meristem.structure.labels import Changes, Label, size
from meristem.structure.twin import modules_without, submodule

Amount = int | Sequence[int]
"""Units to add (negative: the last ones to drop), or the indices of units to drop."""


@dataclass(frozen=True)
class Change:
    """What a wish for one axis means: its size afterwards, and what changes."""

    size: int
    labels: Mapping[Label, Sources] = field(default_factory=dict)
    insertions: tuple[Insertion, ...] = ()


@dataclass(frozen=True)
class KindOfAxis:
    """One kind of axis.

    Attributes:
        change: What a wish for an axis means.
        counts: What it counts: "units" of tensors, or whole "blocks".
    """

    change: Callable[[Structure, Axis, Amount], Change]
    counts: Literal["units", "blocks"]


def _unit_change(structure: Structure, axis: Axis, amount: Amount) -> Change:
    atom = structure.atoms[axis.name]
    if isinstance(amount, int):
        kept = _counted(axis, atom, amount)
    else:
        kept = _without(axis, atom, amount)
    if not len(kept):
        raise GrowthRefused(
            f"axis {axis.name!r} has {axis.size} units; at least {axis.multiple} must "
            "stay"
        )
    return Change(len(kept) * axis.grain, {atom: kept})


def _counted(axis: Axis, atom: Label, amount: int) -> Sources:
    """The entries of an atom after so many units came, or went."""
    if amount % axis.multiple:
        raise GrowthRefused(
            f"axis {axis.name!r} changes in multiples of {axis.multiple}; got {amount}"
        )
    entries = amount // axis.grain
    present = np.arange(atom.size)
    if entries > 0:
        return np.concatenate([present, np.full(entries, -1)])
    return present[: max(atom.size + entries, 0)]


def _without(axis: Axis, atom: Label, units: Sequence[int]) -> Sources:
    """The entries of an atom without some units."""
    drop = sorted({int(unit) for unit in units})
    if not drop or drop[0] < 0 or drop[-1] >= axis.size:
        raise GrowthRefused(
            f"axis {axis.name!r} has units 0..{axis.size - 1}; got indices "
            f"{list(units)}"
        )
    dropped = sorted({unit // axis.grain for unit in drop})
    if len(drop) != len(dropped) * axis.grain:
        raise GrowthRefused(
            f"axis {axis.name!r} drops whole groups of {axis.grain} units; got {drop}"
        )
    if len(drop) % axis.multiple:
        raise GrowthRefused(
            f"axis {axis.name!r} changes in multiples of {axis.multiple}; got "
            f"{len(drop)} units to drop"
        )
    return np.setdiff1d(np.arange(atom.size), np.array(dropped))


def _block_change(structure: Structure, axis: Axis, amount: Amount) -> Change:
    depth = structure.depths[axis.name]
    if not isinstance(amount, int):
        insertion = depth.without(amount)
    elif amount < 0:
        insertion = depth.without(-amount)
    else:
        insertion = depth.appended(amount)
    return Change(len(insertion.blocks), insertions=(insertion,))


KINDS: Mapping[Kind, KindOfAxis] = {
    "width": KindOfAxis(_unit_change, "units"),
    "heads": KindOfAxis(_unit_change, "units"),
    "depth": KindOfAxis(_block_change, "blocks"),
}
"""Every kind of axis. The ends of a model are widths that grow only when named."""


def apart(axes: Sequence[Axis]) -> tuple[list[Axis], list[Axis]]:
    """The axes that count units, and those that count blocks."""
    units: list[Axis] = []
    blocks: list[Axis] = []
    for axis in axes:
        (units if KINDS[axis.kind].counts == "units" else blocks).append(axis)
    return units, blocks


def flops(structure: Structure, changes: Changes) -> int:
    """Floating-point operations of one forward pass on the example.

    Two per multiply-add of every contraction.
    """
    total = 0
    for factors in structure.trace.macs:
        total += 2 * math.prod(size(label, changes) for label in factors)
    return total


def added_by(
    structure: Structure, insertion: Insertion, changes: Changes
) -> tuple[int, int]:
    """Parameters and floating-point operations that an insertion adds, at the new
    widths.

    Negative where blocks go.
    """
    depth = structure.depths[insertion.axis]
    parameters = spent = 0
    # A block that is in no place any more has been dropped.
    present = set(insertion.blocks)
    for block in range(depth.size):
        if block not in present:
            parameters -= _parameters_of(structure, depth, block, changes)
            spent -= _spent_by(depth.costs[block], changes)
    for block, new in zip(insertion.blocks, insertion.new, strict=True):
        if not new:
            continue
        if depth.copied:
            parameters += _parameters_of(structure, depth, block, changes)
            spent += _spent_by(depth.costs[block], changes)
        else:
            parameters += _layer_parameters(structure, insertion, block, changes)
            # An identity layer is square: it has one side of the layer that stands
            # there.
            squared = []
            for factors in depth.costs[block]:
                squared.append(_squared(structure, depth, block, factors))
            spent += _spent_by(squared, changes)
    return parameters, spent


def _spent_by(macs: Sequence[list[Label]], changes: Changes) -> int:
    return sum(2 * math.prod(size(label, changes) for label in one) for one in macs)


def _parameters_of(
    structure: Structure, depth: Depth, block: int, changes: Changes
) -> int:
    """The parameters that one block does not share with the rest of the model."""
    inside = [submodule(structure.model, depth.blocks[block])]
    if not depth.copied:  # a layer of a chain goes with its activation
        chain, _, number = depth.blocks[block].rpartition(".")
        beside = int(number) + (-1 if depth.follows else 1)
        inside.append(submodule(structure.model, f"{chain}.{beside}"))
    held = {id(p) for module in inside for p in module.parameters()}
    for module in modules_without(structure.model, *inside):
        # Shared weights stay when a block goes, and are not made anew with one.
        held -= {id(p) for p in module.parameters(False)}
    total = 0
    for name, parameter in structure.model.named_parameters():
        if id(parameter) in held:
            total += math.prod(size(label, changes) for label in structure.labels[name])
    return total


def _ends(structure: Structure, depth: Depth, block: int) -> tuple[Label, Label]:
    """The labels of what a layer of a chain gives and takes."""
    weight = submodule(structure.model, depth.blocks[block]).weight
    for name, tensor in structure.tensors.items():
        if tensor is weight:
            out, into = structure.labels[name][:2]
            return out, into
    raise AssertionError("the weight of a layer is a tensor of the model")


def _squared(
    structure: Structure, depth: Depth, block: int, factors: list[Label]
) -> list[Label]:
    """The multiply-adds of an identity layer, from those of the layer that stands
    there.
    """
    out, into = _ends(structure, depth, block)
    kept, gone = (out, into) if depth.follows else (into, out)
    return [kept if label.root is gone.root else label for label in factors]


def _layer_parameters(
    structure: Structure, insertion: Insertion, block: int, changes: Changes
) -> int:
    """The parameters of an identity layer with its activation."""
    depth = structure.depths[insertion.axis]
    out, into = _ends(structure, depth, block)
    width = size(out if depth.follows else into, changes)
    old: nn.Module = submodule(structure.model, depth.blocks[block])
    weight = identity_layer(old, depth.follows).weight
    assert isinstance(weight, torch.Tensor)
    total = width * width * math.prod(weight.shape[2:]) + width
    activation = IDENTITIES.get(insertion.activation)
    if activation is not None:
        total += sum(p.numel() for p in activation(width).parameters())
    return total
