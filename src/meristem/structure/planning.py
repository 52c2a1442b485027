"""From a wish to a plan: new shapes, what follows them, or the reason of a refusal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, combinations

from torch import nn

from meristem.core.axis import Place
from meristem.core.change import (
    AttributeChange,
    Insertion,
    Plan,
    Rescaling,
    Sources,
    TensorChange,
)
from meristem.core.errors import GrowthRefused
from meristem.structure.adapters import adapter_edits
from meristem.structure.counts import counts_for
from meristem.structure.discover import Structure
from meristem.structure.kinds import KINDS, Amount, added_by, flops
from meristem.structure.labels import Changes, Label, atoms, positions, size, sources
from meristem.structure.mirrors import mirrors, told
from meristem.structure.repair import Search, with_attributes
from meristem.structure.tracer import Norm
from meristem.structure.twin import submodule

# More than any layer, vocabulary or stack has.
_MOST_UNITS, _MOST_BLOCKS = 2**26, 2**14
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
        known = _too_large(structure, wishes)
        if known is None:
            known = _followed(structure, sized(structure, wishes))
        structure.plans[tuple(key)] = known
    return known


def _with_ties(structure: Structure, wishes: Wishes) -> dict[str, Amount]:
    """Wishes, and what grows together with what they name.

    Raises:
        GrowthRefused: An amount is no multiple of the step.
    """
    complete = dict(wishes)
    for name, amount in wishes.items():
        steps = structure.together.get(name)
        if steps is None:
            continue
        units = amount if isinstance(amount, int) else -len(amount)
        times, rest = divmod(units, steps[name])
        if rest:
            raise GrowthRefused(
                f"axis {name!r} changes in multiples of {steps[name]}; got {units}"
            )
        for other, step in steps.items():
            complete.setdefault(other, times * step)
    return complete


def sized(structure: Structure, wishes: Wishes) -> Plan:
    """Shapes and costs of a wish alone: no attribute is looked at, nothing is
    re-traced.

    It is no plan yet, and says so: `followed` is False.
    """
    changes: dict[Label, Sources] = {}
    insertions: list[Insertion] = []
    before, after = {}, {}
    asked = _with_ties(structure, wishes)
    for name, amount in asked.items():
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
    outputs: list[tuple[Sources, ...] | None] = []
    ends = any(
        structure.axes.named(name).end in ("output", "vocabulary") for name in asked
    )
    for labels, is_loss in zip(structure.outputs, structure.losses, strict=True):
        kept = tuple(sources(label, changes) for label in labels)
        # More classes change the loss that a forward gives, and may.
        outputs.append(None if is_loss and ends else kept)
    return Plan(
        before,
        after,
        tensors,
        _layouts(structure, asked, changes),
        changes=changes,
        insertions=tuple(insertions),
        outputs=tuple(outputs),
        parameters=(parameters, parameters + added),
        flops=(flops(structure, {}), spent),
        wishes=dict(wishes),
        example=structure.example,
    )


def _too_large(structure: Structure, wishes: Wishes) -> Plan | None:
    """The refusal of what would list more places than a machine can hold, or None."""
    before, after, reasons = {}, {}, []
    for name, amount in wishes.items():
        axis = structure.axes.named(name)
        most = _MOST_BLOCKS if axis.kind == "depth" else _MOST_UNITS
        added = amount if isinstance(amount, int) else -len(amount)
        before[name], after[name] = axis.size, axis.size + added
        if after[name] > most:
            what = "blocks" if axis.kind == "depth" else "units"
            reasons.append(
                f"{name!r} would have {after[name]:,} {what}, and a plan follows "
                f"{most:,} at most, one by one. hint: a smaller amount"
            )
    if not reasons:
        return None
    return Plan(
        before,
        after,
        refusal=reasons[0],
        wishes=dict(wishes),
        example=structure.example,
        followed=True,
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
    pair = clash(structure, list(plan.after))
    if pair is not None:
        first, second = pair
        return replace(
            plan,
            followed=True,
            refusal=f"{first} and {second} multiply each other; grow one after the other",
        )
    if plan.tensors:
        plan = with_attributes(structure, plan)
        rescaled, constants, fixed = _renormalise(structure, plan)
        plan = replace(
            plan,
            attributes=(*plan.attributes, *constants),
            rescaled=rescaled,
            refusal=plan.refusal or fixed,
        )
    plan = replace(plan, followed=True)
    return with_insertions(structure, plan, plan.insertions) if plan else plan


def with_mirrors(structure: Structure, plan: Plan) -> Plan:
    """A plan with the numbers outside of the traced forward that follow, and those that
    hold the old size.

    With them the forward must still follow the plan. Trials need none of it.
    """
    if not plan or not plan.tensors or plan.mirrored:
        return plan
    ranks = adapter_edits(structure.model, plan)
    known = {(edit.module, edit.attribute) for edit in ranks}
    kept = [one for one in plan.attributes if (one.module, one.attribute) not in known]
    plan = replace(plan, attributes=(*kept, *ranks))
    follow, stale = mirrors(structure, plan, plan.attributes)
    edits = [*plan.attributes, *follow]
    if follow and Search(structure, plan).attempt(edits).problem is not None:
        for edit in follow:
            stale.append(told(edit.module, edit.attribute, edit.before))
        edits = list(plan.attributes)
    return replace(plan, attributes=tuple(edits), stale=tuple(stale), mirrored=True)


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
    return next(factors(structure, names), None)


def factors(structure: Structure, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The pairs of named axes that are factors of one dimension."""
    by_atom = {}
    together = [structure.together.get(name, (name,)) for name in names]
    for name in dict.fromkeys(chain.from_iterable(together)):
        if name in structure.atoms:
            by_atom[structure.atoms[name].root] = name
    if len(by_atom) < 2:
        return
    products = set()
    for labels in structure.labels.values():
        for label in labels:
            if not label.root.is_atom:
                products.add(label.root)
    for label in products:
        yield from _pairs(label, by_atom)


def _pairs(label: Label, by_atom: Mapping[Label, str]) -> Iterator[tuple[str, str]]:
    """Pairs of named atoms in different factors of a product at or below a label."""
    root = label.root
    inside: list[set[str]] = []
    for part in root.parts:
        yield from _pairs(part, by_atom)
        # A set per factor: an atom in two of them is tied, not multiplied.
        inside.append({by_atom[atom] for atom in atoms(part) if atom in by_atom})
    if not root.is_product:
        return
    for first, second in combinations(inside, 2):
        for one in sorted(first - second):
            for other in sorted(second - first):
                yield one, other


def _renormalise(
    structure: Structure, plan: Plan
) -> tuple[dict[str, Rescaling], list[AttributeChange], str | None]:
    """What keeps a layer norm or RMS norm exact when its width goes from C to C'.

    Its weight x sqrt(C / C'), its eps x C / C'; or why that cannot be.
    """
    rescaled: dict[str, Rescaling] = {}
    constants: dict[tuple[str, str], AttributeChange] = {}
    norms: list[Norm] = []
    for name in plan.after:
        norms += structure.norms.get(name, [])
    for norm in dict.fromkeys(norms):
        # The length of a vector does not change where new entries are zero.
        if not norm.averages:
            continue
        ratio = norm.label.root.size / size(norm.label, plan.changes)
        # A norm without a weight is corrected by its eps alone; that cannot be exact
        # and is found out by the check.
        if norm.weight in structure.labels:
            rescaled[norm.weight] = Rescaling(ratio**0.5, norm.shift)
        # Where none is given it is the least number of the dtype: rounding.
        given = getattr(submodule(structure.model, norm.module), "eps", norm.eps)
        if not norm.eps or given is None:
            continue
        holder = _holder_of_eps(structure, norm)
        if holder is None:
            return {}, [], _fixed_eps(norm)
        module, attribute = holder
        before = getattr(submodule(structure.model, module), attribute)
        change = AttributeChange(module, attribute, before, before * ratio)
        constants[holder] = change
    return rescaled, list(constants.values()), None


def _holder_of_eps(structure: Structure, norm: Norm) -> tuple[str, str] | None:
    """The one attribute of the module that ran a norm, or of those around it, that
    holds its eps.
    """
    name = norm.module
    while True:
        module = submodule(structure.model, name)
        found = []
        for attribute, value in vars(module).items():
            # Kernels take it in single precision.
            is_eps = isinstance(value, float) and math.isclose(
                value, norm.eps, rel_tol=1e-6
            )
            if is_eps and not attribute.startswith("_"):
                found.append(attribute)
        if found:
            return (name, found[0]) if len(found) == 1 else None
        if not name:
            return None
        name = name.rpartition(".")[0]


def _fixed_eps(norm: Norm) -> str:
    where = f" ({norm.line})" if norm.line else ""
    return (
        f"the norm in {norm.module or 'the model'}{where} holds its eps of {norm.eps:g} "
        "as a number, which has to change with the width. hint: keep it in an attribute "
        "of the module, as self.eps"
    )


def products(structure: Structure, weight: str) -> int:
    """Multiply-adds of the layer that a weight belongs to, in a pass on the example."""
    mine = {label.root for label in structure.labels[weight][:2]}
    total = 0
    for factors in structure.trace.macs:
        if mine <= {label.root for label in factors}:
            total += math.prod(size(label, {}) for label in factors)
    return total
