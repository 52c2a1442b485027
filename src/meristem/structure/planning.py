"""From a wish to a plan: new shapes, the attributes that mirror them, what a norm needs, or the reason of a refusal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from meristem.activations import IDENTITIES
from meristem.core.axis import Axis, Place
from meristem.core.change import AttributeChange, Insertion, Plan, Sources, TensorChange
from meristem.core.errors import GrowthRefused
from meristem.structure.counts import counts_for
from meristem.structure.depth import Depth
from meristem.structure.discover import Structure
from meristem.structure.insertion import identity_layer
from meristem.structure.labels import Changes, Label, atoms, multiply, positions, size, sources
from meristem.structure.repair import attributes_for
from meristem.structure.twin import modules_without

Amount = int | Sequence[int]
"""What `resolve` is asked for: units to add (negative: the last ones to drop), or the indices of units to drop."""


def resolve(structure: Structure, wishes: Mapping[str, Amount]) -> Plan:
    """The plan that adds or drops units as wished, or the refusal. Wrong arguments raise. Solved once per wish."""
    key = tuple((name, amount if isinstance(amount, int) else tuple(amount)) for name, amount in wishes.items())
    if key not in structure.plans:
        structure.plans[key] = _resolve(structure, wishes)
    return structure.plans[key]


def resized(structure: Structure, wishes: Mapping[str, Amount]) -> Plan:
    """Shapes and costs of a wish alone: no attribute is looked at, nothing is re-traced."""
    deep = {name: amount for name, amount in wishes.items() if structure.axes.named(name).kind == "depth"}
    changes = _changes(structure, {name: amount for name, amount in wishes.items() if name not in deep})
    insertions = {name: _insertion(structure.depths[name], amount) for name, amount in deep.items()}
    before = {name: structure.axes.named(name).size for name in wishes}
    after = {
        name: len(insertions[name].blocks)
        if name in deep
        else len(changes[structure.atoms[name]]) * structure.axes.named(name).multiple
        for name in wishes
    }
    # Inner ones first, and the last runs of a container: the paths and places of the others then hold.
    ordered = sorted(insertions.values(), key=lambda insertion: (-insertion.path.count("."), -insertion.first))
    return _lay_out(structure, changes, before, after, tuple(ordered))


def _changes(structure: Structure, wishes: Mapping[str, Amount]) -> dict[Label, Sources]:
    return {
        structure.atoms[n]: _sources_of(structure.axes.named(n), structure.atoms[n], a)
        for n, a in wishes.items()
        if n in structure.atoms
    }


def _insertion(depth: Depth, amount: Amount) -> Insertion:
    if not isinstance(amount, int) or amount < 0:
        return depth.without(-amount if isinstance(amount, int) else amount)
    return depth.appended(amount)


def _resolve(structure: Structure, wishes: Mapping[str, Amount]) -> Plan:
    plan, changes = resized(structure, wishes), _changes(structure, wishes)
    widths = [name for name in wishes if name in structure.atoms]
    factors = clash(structure, widths)
    if factors is not None:
        return replace(plan, refusal=f"{factors[0]} and {factors[1]} multiply each other; grow one after the other")
    if widths:
        edits, refusal = attributes_for(structure, plan, changes)
        rescaled, constants = _renormalise(structure, widths, changes)
        plan = replace(plan, attributes=(*edits, *constants), rescaled=rescaled, refusal=refusal)
    return with_insertions(structure, plan, plan.insertions) if plan else plan


def with_insertions(structure: Structure, plan: Plan, insertions: Sequence[Insertion]) -> Plan:
    """A plan whose new blocks stand where `insertions` say, with the attributes that follow them, or the refusal."""
    if not insertions:
        return plan
    if tuple(insertions) != plan.insertions:
        changes = _changes(structure, plan.added)
        spent = [_added(structure, structure.depths[i.axis], i, changes) for i in plan.insertions]
        wanted = [_added(structure, structure.depths[i.axis], i, changes) for i in insertions]
        extra = [sum(cost[k] for cost in wanted) - sum(cost[k] for cost in spent) for k in (0, 1)]
        parameters = (plan.parameters[0], plan.parameters[1] + extra[0])
        plan = replace(plan, parameters=parameters, flops=(plan.flops[0], plan.flops[1] + extra[1]))
    counts, refusal = counts_for(structure, plan, insertions)
    return replace(plan, insertions=tuple(insertions), counts=counts, refusal=refusal)


def clash(structure: Structure, names: Sequence[str]) -> tuple[str, str] | None:
    """Two of the named axes that are factors of one dimension, or None."""
    names = [name for name in names if name in structure.atoms]
    dims = {label.root for labels in structure.labels.values() for label in labels if label.root.kind == "product"}
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            if any(multiply(label, structure.atoms[first], structure.atoms[second]) for label in dims):
                return first, second
    return None


def _renormalise(
    structure: Structure, wishes: Sequence[str], changes: Changes
) -> tuple[dict[str, float], list[AttributeChange]]:
    """What keeps a layer norm or RMS norm exact when its width goes from C to C': weight x sqrt(C/C'), eps x C/C'."""
    rescaled: dict[str, float] = {}
    constants = []
    for norm in dict.fromkeys(norm for name in wishes for norm in structure.norms[name]):
        ratio = norm.label.root.size / size(norm.label, changes)
        module = structure.model.get_submodule(norm.module)
        prefix = norm.module + "." if norm.module else ""
        if prefix + "weight" in structure.labels:
            rescaled[prefix + "weight"] = ratio**0.5
        eps = getattr(module, "eps", None)
        if eps is None:
            eps = torch.finfo(next(module.parameters()).dtype).eps
        constants.append(AttributeChange(norm.module, "eps", module.eps, eps * ratio))
    return rescaled, constants


def _lay_out(
    structure: Structure,
    changes: Changes,
    before: Mapping[str, int],
    after: Mapping[str, int],
    insertions: tuple[Insertion, ...],
) -> Plan:
    """The shape changes that follow from `changes`, before any attribute is looked at."""
    changed = []
    for name, labels in structure.labels.items():
        new = tuple(size(label, changes) for label in labels)
        if not any(atom in changes for label in labels for atom in atoms(label)):
            continue
        tensor = structure.tensors[name]
        maps = tuple(sources(label, changes) for label in labels)
        changed.append(TensorChange(name, tuple(tensor.shape), new, maps, not isinstance(tensor, nn.Parameter)))
    layout: dict[str, dict[Place, Sources]] = {}
    for axis_name in after:
        if axis_name not in structure.atoms:
            continue
        atom = structure.atoms[axis_name]
        slots = structure.axes.named(axis_name).slots
        layout[axis_name] = {s.place: positions(structure.labels[s.name][s.dim], atom, changes) for s in slots}
    count = sum(p.numel() for p in structure.model.parameters())
    grown = sum(int(np.prod(c.after)) - int(np.prod(c.before)) for c in changed if not c.buffer)
    costs = (flops(structure), flops(structure, changes))
    for insertion in insertions:
        parameters, spent = _added(structure, structure.depths[insertion.axis], insertion, changes)
        grown, costs = grown + parameters, (costs[0], costs[1] + spent)
    outputs = tuple(tuple(sources(label, changes) for label in labels) for labels in structure.outputs)
    pair = (count, count + grown)
    return Plan(
        before, after, tuple(changed), layout, insertions=insertions, outputs=outputs, parameters=pair, flops=costs
    )


def _added(structure: Structure, depth: Depth, insertion: Insertion, changes: Changes) -> tuple[int, int]:
    """Parameters and floating-point operations that an insertion adds, at the new widths; negative where blocks go."""
    gone = [i for i in range(depth.size) if i not in insertion.blocks]
    made = [block for block, new in zip(insertion.blocks, insertion.new, strict=True) if new]
    parameters = spent = 0
    for sign, block in [(1, b) for b in made] + [(-1, b) for b in gone]:
        if depth.form == "run" or sign < 0:
            names = _own(structure, depth, block)
            macs = list(depth.costs[block])
        else:
            names, macs = [], [_squared(structure, depth, block, factors) for factors in depth.costs[block]]
            parameters += _layer_parameters(structure, depth, block, insertion, changes)
        parameters += sign * sum(math.prod(size(x, changes) for x in structure.labels[name]) for name in names)
        spent += sign * 2 * sum(math.prod(size(x, changes) for x in factors) for factors in macs)
    return parameters, spent


def _own(structure: Structure, depth: Depth, block: int) -> list[str]:
    """The parameters that one block does not share with the rest of the model; in a chain, its activation's too."""
    inside = [structure.model.get_submodule(depth.blocks[block])]
    if depth.form != "run":
        chain, number = depth.blocks[block].rpartition(".")[::2]
        activation = int(number) + (-1 if depth.form == "after" else 1)
        inside.append(structure.model.get_submodule(f"{chain}.{activation}"))
    held = {id(p) for module in inside for p in module.parameters()}
    others = {id(p) for m in modules_without(structure.model, *inside) for p in m.parameters(False)}
    return [name for name, p in structure.model.named_parameters() if id(p) in held - others]


def _ends(structure: Structure, depth: Depth, block: int) -> tuple[Label, Label]:
    """The labels of what a layer of a chain gives and takes."""
    weight = structure.model.get_submodule(depth.blocks[block]).weight
    out, into, *_ = next(structure.labels[name] for name, tensor in structure.tensors.items() if tensor is weight)
    return out, into


def _squared(structure: Structure, depth: Depth, block: int, factors: list[Label]) -> list[Label]:
    """The multiply-adds of an identity layer at a place of a chain, from those of the layer that stands there."""
    out, into = _ends(structure, depth, block)
    kept, gone = (out, into) if depth.form == "after" else (into, out)
    return [kept if label.root is gone.root else label for label in factors]


def _layer_parameters(structure: Structure, depth: Depth, block: int, insertion: Insertion, changes: Changes) -> int:
    out, into = _ends(structure, depth, block)
    width = size(out if depth.form == "after" else into, changes)
    layer = identity_layer(structure.model.get_submodule(depth.blocks[block]), depth.form)
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    kernel = math.prod(weight.shape[2:])
    activation = IDENTITIES.get(insertion.activation)
    learned = sum(p.numel() for p in activation(width).parameters()) if activation is not None else 0
    return width * width * kernel + width + learned


def flops(structure: Structure, changes: Changes | None = None) -> int:
    """Floating-point operations of one forward pass on the example: two per multiply-add of every contraction."""
    total = 0
    for factors in structure.trace.macs:
        macs = 1
        for label in factors:
            macs *= size(label, changes or {})
        total += 2 * macs
    return total


def products(structure: Structure, weight: str) -> int:
    """Multiply-adds of the layer, linear or a convolution, that a weight belongs to, in a forward pass on the example."""
    mine = {label.root for label in structure.labels[weight][:2]}
    return sum(
        math.prod(size(label, {}) for label in factors)
        for factors in structure.trace.macs
        if mine <= {label.root for label in factors}
    )


def _sources_of(axis: Axis, atom: Label, amount: Amount) -> Sources:
    present = np.arange(atom.size)
    if isinstance(amount, bool) or (not isinstance(amount, int) and isinstance(amount, (str, float))):
        raise TypeError(f"the count for axis {axis.name!r} must be an int; got {amount!r}")
    if isinstance(amount, int):
        if amount % axis.multiple:
            raise GrowthRefused(f"axis {axis.name!r} changes in multiples of {axis.multiple}; got {amount}")
        entries = amount // axis.multiple
        if entries > 0:
            return np.concatenate([present, np.full(entries, -1)])
        kept = present[: atom.size + entries] if atom.size + entries > 0 else present[:0]
    else:
        drop = sorted({int(i) for i in amount})
        wrong = [i for i in drop if not 0 <= i < axis.size]
        if wrong or not drop:
            raise GrowthRefused(f"axis {axis.name!r} has units 0..{axis.size - 1}; got indices {list(amount)}")
        dropped = sorted({i // axis.multiple for i in drop})
        whole = [g * axis.multiple + i for g in dropped for i in range(axis.multiple)]
        if drop != whole:
            raise GrowthRefused(f"axis {axis.name!r} drops whole groups of {axis.multiple} units; got {drop}")
        kept = np.setdiff1d(present, np.array(dropped))
    if not len(kept):
        raise GrowthRefused(f"axis {axis.name!r} has {axis.size} units; at least {axis.multiple} must stay")
    return kept
