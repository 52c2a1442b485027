"""From a wish to a plan: new shapes, what follows them, or the reason of a refusal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from meristem.core.axis import Place
from meristem.core.change import AttributeChange, Insertion, Plan, Sources, TensorChange
from meristem.structure.counts import counts_for
from meristem.structure.discover import Structure
from meristem.structure.kinds import KINDS, Amount, added_by, flops
from meristem.structure.labels import Changes, Label, atoms, positions, size, sources
from meristem.structure.repair import attributes_for

Wishes = Mapping[str, Amount]
"""By axis: units to add (negative: the last ones to drop), or indices of units to drop.
"""


def resolve(structure: Structure, wishes: Wishes) -> Plan:
    """The plan that adds or drops units as wished, or the refusal.

    Wrong arguments raise. Solved once per wish.
    """
    key = []
    for name, amount in wishes.items():
        key.append((name, amount if isinstance(amount, int) else tuple(amount)))
    known = structure.plans.get(tuple(key))
    if known is None:
        known = _followed(structure, sized(structure, wishes))
        structure.plans[tuple(key)] = known
    return known


def sized(structure: Structure, wishes: Wishes) -> Plan:
    """Shapes and costs of a wish alone: no attribute is looked at, nothing is
    re-traced.

    It is no plan yet, and says so: `followed` is False.
    """
    changes: dict[Label, Sources] = {}
    insertions: list[Insertion] = []
    before, after = {}, {}
    for name, amount in wishes.items():
        axis = structure.axes.named(name)
        change = KINDS[axis.kind].change(structure, axis, amount)
        changes |= change.labels
        insertions += change.insertions
        before[name] = axis.size
        after[name] = change.size
    # Inner ones first, and the last runs of a container: the paths and places of the
    # others then hold.
    insertions.sort(key=_inner_first)
    # From here on nothing depends on the kinds of the axes.
    tensors = _tensor_changes(structure, changes)
    parameters = sum(parameter.numel() for parameter in structure.model.parameters())
    added = 0
    for change_of in tensors:
        if not change_of.buffer:
            added += math.prod(change_of.after) - math.prod(change_of.before)
    spent = flops(structure, changes)
    for insertion in insertions:
        more = added_by(structure, insertion, changes)
        added += more[0]
        spent += more[1]
    outputs = []
    for labels in structure.outputs:
        outputs.append(tuple(sources(label, changes) for label in labels))
    return Plan(
        before,
        after,
        tensors,
        _layouts(structure, wishes, changes),
        changes=changes,
        insertions=tuple(insertions),
        outputs=tuple(outputs),
        parameters=(parameters, parameters + added),
        flops=(flops(structure, {}), spent),
        wishes=dict(wishes),
        example=structure.example,
    )


def _inner_first(insertion: Insertion) -> tuple[int, int]:
    # The model itself, "", is outside of everything.
    depth = len(insertion.path.split(".")) if insertion.path else 0
    return -depth, -insertion.first


def _tensor_changes(structure: Structure, changes: Changes) -> tuple[TensorChange, ...]:
    found = []
    tensors = structure.tensors
    for name, labels in structure.labels.items():
        if not any(atom in changes for label in labels for atom in atoms(label)):
            continue
        tensor = tensors[name]
        found.append(
            TensorChange(
                name,
                tuple(tensor.shape),
                tuple(size(label, changes) for label in labels),
                tuple(sources(label, changes) for label in labels),
                not isinstance(tensor, nn.Parameter),
            )
        )
    return tuple(found)


def _layouts(
    structure: Structure, names: Sequence[str] | Wishes, changes: Changes
) -> dict[str, dict[Place, Sources]]:
    layouts: dict[str, dict[Place, Sources]] = {}
    for name in names:
        layouts[name] = {}
        for slot in structure.axes.named(name).slots:
            label = structure.labels[slot.name][slot.dim]
            where = positions(label, structure.atoms[name], changes)
            layouts[name][slot.place] = where
    return layouts


def _followed(structure: Structure, plan: Plan) -> Plan:
    """A sized plan with everything that follows its shapes, or the refusal."""
    factors = clash(structure, list(plan.after))
    if factors is not None:
        first, second = factors
        return replace(
            plan,
            followed=True,
            refusal=f"{first} and {second} multiply each other; grow one after the other",
        )
    if plan.tensors:
        edits, refusal = attributes_for(structure, plan)
        rescaled, constants = _renormalise(structure, plan)
        plan = replace(
            plan, attributes=(*edits, *constants), rescaled=rescaled, refusal=refusal
        )
    plan = replace(plan, followed=True)
    return with_insertions(structure, plan, plan.insertions) if plan else plan


def with_insertions(
    structure: Structure, plan: Plan, insertions: Sequence[Insertion]
) -> Plan:
    """A plan whose new blocks stand where `insertions` say, or the refusal."""
    if not insertions:
        return plan
    # A method may put blocks elsewhere, whose sizes differ.
    if tuple(insertions) != plan.insertions:
        parameters, spent = plan.parameters[1], plan.flops[1]
        for sign, listed in ((-1, plan.insertions), (1, insertions)):
            for insertion in listed:
                more = added_by(structure, insertion, plan.changes)
                parameters += sign * more[0]
                spent += sign * more[1]
        plan = replace(
            plan,
            parameters=(plan.parameters[0], parameters),
            flops=(plan.flops[0], spent),
        )
    counts, refusal = counts_for(structure, plan, insertions)
    return replace(plan, insertions=tuple(insertions), counts=counts, refusal=refusal)


def clash(structure: Structure, names: Sequence[str]) -> tuple[str, str] | None:
    """Two of the named axes that are factors of one dimension, or None."""
    by_atom = {}
    for name in names:
        if name in structure.atoms:
            by_atom[structure.atoms[name].root] = name
    if len(by_atom) < 2:
        return None
    products = set()
    for labels in structure.labels.values():
        for label in labels:
            if not label.root.is_atom:
                products.add(label.root)
    for label in products:
        found = _two_factors(label, by_atom)
        if found is not None:
            return found
    return None


def _two_factors(label: Label, by_atom: Mapping[Label, str]) -> tuple[str, str] | None:
    """Two named atoms in different factors of a product at or below a label."""
    root = label.root
    inside: list[set[str]] = []
    for part in root.parts:
        below = _two_factors(part, by_atom)
        if below is not None:
            return below
        # A set per factor: an atom in two of them is tied, not multiplied.
        inside.append({by_atom[atom] for atom in atoms(part) if atom in by_atom})
    if not root.is_product:
        return None
    for i, first in enumerate(inside):
        for second in inside[i + 1 :]:
            for one in sorted(first):
                for other in sorted(second - first):
                    if one not in second:
                        return one, other
    return None


def _renormalise(
    structure: Structure, plan: Plan
) -> tuple[dict[str, float], list[AttributeChange]]:
    """What keeps a layer norm or RMS norm exact when its width goes from C to C'.

    Its weight x sqrt(C / C'), its eps x C / C'.
    """
    rescaled: dict[str, float] = {}
    constants = []
    norms = []
    for name in plan.after:
        norms += structure.norms.get(name, [])
    for norm in dict.fromkeys(norms):
        ratio = norm.label.root.size / size(norm.label, plan.changes)
        module = structure.model.get_submodule(norm.module)
        weight = f"{norm.module}.weight" if norm.module else "weight"
        # A norm without a weight is corrected by its eps alone; that cannot be exact
        # and is found out by the check.
        if weight in structure.labels:
            rescaled[weight] = ratio**0.5
        eps = getattr(module, "eps", None)
        if eps is None:  # as RMSNorm has it by default
            eps = torch.finfo(next(module.parameters()).dtype).eps
        constants.append(AttributeChange(norm.module, "eps", module.eps, eps * ratio))
    return rescaled, constants


def products(structure: Structure, weight: str) -> int:
    """Multiply-adds of the layer that a weight belongs to, in a pass on the example."""
    mine = {label.root for label in structure.labels[weight][:2]}
    total = 0
    for factors in structure.trace.macs:
        if mine <= {label.root for label in factors}:
            total += math.prod(size(label, {}) for label in factors)
    return total
