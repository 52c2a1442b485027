"""New tensors from old ones: where every old entry goes, and what the new ones hold. Pure and differentiable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from meristem.axis import Axis, Place
from meristem.values import Plan, Proposal, Scaling, Sources, TensorChange, index


def carry(old: Tensor, sources: Sequence[Sources | None]) -> Tensor:
    """`old` resized: entry i of dimension d continues old entry `sources[d][i]`; new entries (-1) are zero."""
    result = old
    for d, source in enumerate(sources):
        if source is None or (len(source) == result.shape[d] and bool((source == np.arange(len(source))).all())):
            continue
        kept = np.flatnonzero(source >= 0)
        picked = result.index_select(d, index(source[kept]).to(result.device))
        shape = [*result.shape[:d], len(source), *result.shape[d + 1 :]]
        result = result.new_zeros(shape).index_copy(d, index(kept).to(result.device), picked)
    return result


def along(factors: Tensor, tensor: Tensor, dim: int) -> Tensor:
    """A vector shaped to multiply `tensor` along `dim`."""
    return factors.to(tensor).reshape([-1 if d == dim else 1 for d in range(tensor.dim())])


def place_strip(grown: Tensor, strip: Tensor, change: TensorChange, dim: int, where: Sources) -> Tensor:
    """`grown` with the new units' entries along `dim` written in; corners with other new units are zero."""
    flat = strip.to(grown.dtype).flatten(0, 1).movedim(0, dim)
    others: list[Sources | None] = [None if d == dim else source for d, source in enumerate(change.sources)]
    return grown.index_copy(dim, index(where.ravel()).to(grown.device), carry(flat, others))


def new_units(plan: Plan, axis: str, place: Place) -> Sources:
    """Where the new units of an axis lie along a place's dimension: an array (new units, entries per unit)."""
    layout = plan.layout[axis][place]
    change = next(change for change in plan.tensors if change.name == place.name)
    return layout[(change.sources[place.dim][layout] < 0).any(axis=1)]


def grown_tensors(
    tensors: Mapping[str, Tensor], plan: Plan, axes: Sequence[Axis], proposals: Sequence[Proposal], scaling: Scaling
) -> dict[str, Tensor]:
    """Every changed or rescaled tensor at its new size and values: old entries carried, scaled, new ones filled."""
    result = {}
    by_axis = {proposal.axis: proposal for proposal in proposals}
    changes = {change.name: change for change in plan.tensors}
    for name, change in changes.items():
        old = tensors[name] * scaling.tensors[name] if name in scaling.tensors else tensors[name]
        copies = [
            (axis, slot.dim)
            for axis in axes
            for slot in axis.slots
            if slot.name == name and axis.name in by_axis and by_axis[axis.name].copies is not None
        ]
        for place, factor in scaling.places.items():
            if place.name == name:
                old = old * factor
        grown = carry(old, _with_copies(plan, by_axis, change, copies))
        grown = _share_fan_out(grown, plan, by_axis, axes, name)
        for axis in axes:
            for slot in axis.slots:
                if slot.name != name:
                    continue
                where = new_units(plan, axis.name, slot.place)
                strip = by_axis[axis.name].strips.get(slot.place) if axis.name in by_axis else None
                if (axis, slot.dim) in copies and strip is not None:
                    grown = grown + place_strip(torch.zeros_like(grown), strip, change, slot.dim, where)
                if not len(where) or (axis, slot.dim) in copies:
                    continue
                if strip is None:
                    strip = _filled(tensors[name], slot.fill, slot.dim, where)
                grown = place_strip(grown, strip, change, slot.dim, where)
        result[name] = grown
    for name, factor in scaling.tensors.items():
        if name not in result:
            result[name] = tensors[name] * factor
    for name, factor in plan.rescaled.items():
        result[name] = result.get(name, tensors[name]) * factor
    return result


def _with_copies(
    plan: Plan, proposals: Mapping[str, Proposal], change: TensorChange, copies: Sequence[tuple[Axis, int]]
) -> list[Sources]:
    sources = [source.copy() for source in change.sources]
    for axis, dim in copies:
        copied = proposals[axis.name].copies
        assert copied is not None
        layout = plan.layout[axis.name][Place(change.name, dim)]
        where = new_units(plan, axis.name, Place(change.name, dim))
        sources[dim][where] = change.sources[dim][layout[copied.parent.numpy()]]
    return sources


def _share_fan_out(
    grown: Tensor, plan: Plan, proposals: Mapping[str, Proposal], axes: Sequence[Axis], name: str
) -> Tensor:
    """Multiply the fan-out of copied units, old and new, by their shares."""
    for axis in axes:
        copies = proposals[axis.name].copies if axis.name in proposals else None
        for slot in axis.places("fan_out") if copies is not None else ():
            if slot.name == name:
                assert copies is not None
                layout = plan.layout[axis.name][slot.place]
                factors = torch.ones(grown.shape[slot.dim], dtype=copies.share.dtype)
                factors[index(layout)] = copies.share[:, None].expand(layout.shape)
                grown = grown * along(factors, grown, slot.dim)
    return grown


def _filled(old: Tensor, fill: str, dim: int, where: Sources) -> Tensor:
    """A strip for a place that no method speaks for: ones, the mean of the neighbours, or zeros."""
    rest = [n for d, n in enumerate(old.shape) if d != dim]
    shape = [*where.shape, *rest]
    if fill == "one":
        return old.new_ones(shape)
    if fill == "mean" and old.is_floating_point():
        return old.mean(dim, keepdim=True).movedim(dim, 0)[None].expand(shape).clone()
    return old.new_zeros(shape)
