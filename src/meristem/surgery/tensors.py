"""New tensors from old ones: where every old entry goes, and what the new ones hold.

Pure and differentiable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from meristem.core.axis import Axis, Place, Slot
from meristem.core.change import Plan, Sources, TensorChange, index
from meristem.core.offer import Copies, Offer, Scaling


@dataclass(frozen=True)
class Edit:
    """What one axis does to one tensor along one of its dimensions.

    Attributes:
        slot: The dimension.
        layout: (units, entries per unit): where the units lie after the change.
        where: The same of the new units alone.
        strip: (new units, entries per unit, *other dimensions): what they hold, where a
            method says so.
        copies: The new units as copies of old ones.
    """

    slot: Slot
    layout: Sources
    where: Sources
    strip: Tensor | None = None
    copies: Copies | None = None

    @property
    def dim(self) -> int:
        return self.slot.dim


def edits_of(
    change: TensorChange, plan: Plan, axes: Sequence[Axis], offers: Sequence[Offer]
) -> list[Edit]:
    """What every axis does to one tensor."""
    by_axis = {offer.axis: offer for offer in offers}
    edits = []
    for axis in axes:
        offer = by_axis.get(axis.name)
        for slot in axis.slots:
            if slot.name != change.name:
                continue
            layout = plan.layout[axis.name][slot.place]
            where = new_units(plan, axis.name, slot.place)
            if offer is None:
                edits.append(Edit(slot, layout, where))
            else:
                strip = offer.strips.get(slot.place)
                edits.append(Edit(slot, layout, where, strip, offer.copies))
    return edits


def new_units(plan: Plan, axis: str, place: Place) -> Sources:
    """Where the new units of an axis lie along a place's dimension.

    Returns:
        An array (new units, entries per unit).
    """
    layout = plan.layout[axis][place]
    source = plan.change(place.name).sources[place.dim]
    # A unit is new if any of its entries is.
    is_new = (source[layout] < 0).any(axis=1)
    return layout[is_new]


def carry(old: Tensor, sources: Sequence[Sources | None]) -> Tensor:
    """A tensor resized; new entries are zero.

    Entry i of dimension d continues old entry `sources[d][i]`, or is new where that is -1.
    """
    result = old
    for d, source in enumerate(sources):
        if source is None or _keeps_all(source, result.shape[d]):
            continue
        kept = np.flatnonzero(source >= 0)
        picked = result.index_select(d, index(source[kept]).to(result.device))
        shape = [*result.shape[:d], len(source), *result.shape[d + 1 :]]
        empty = result.new_zeros(shape)
        result = empty.index_copy(d, index(kept).to(result.device), picked)
    return result


def _keeps_all(source: Sources, size: int) -> bool:
    """Whether every entry of a dimension stays in its place."""
    return len(source) == size and bool((source == np.arange(size)).all())


def laid_out_like(old: Tensor, value: Tensor) -> Tensor:
    """A value with the memory format of the tensor that it replaces."""
    # Also true of tensors with one channel, whatever their format.
    if old.is_contiguous():
        return value
    for rank, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if old.dim() == rank and old.is_contiguous(memory_format=layout):
            return value.contiguous(memory_format=layout)
    return value


def grown_tensors(
    tensors: Mapping[str, Tensor],
    plan: Plan,
    axes: Sequence[Axis],
    offers: Sequence[Offer],
    scaling: Scaling,
) -> dict[str, Tensor]:
    """Every changed or rescaled tensor at its new size and values.

    Old entries are carried and scaled, new ones filled.
    """
    result = {name: scaled(tensors[name], name, scaling) for name in scaling.tensors}
    for change in plan.tensors:
        edits = edits_of(change, plan, axes, offers)
        old = scaled(tensors[change.name], change.name, scaling, change, edits)
        result[change.name] = grown_tensor(old, change, edits)
    for name, rescaling in plan.rescaled.items():
        result[name] = rescaling.of(result.get(name, tensors[name]))
    return result


def scaled(
    value: Tensor,
    name: str,
    scaling: Scaling,
    change: TensorChange | None = None,
    edits: Sequence[Edit] = (),
) -> Tensor:
    """The weights of one tensor, at their old size, as care scales them."""
    if name in scaling.tensors:
        value = value * scaling.tensors[name]
    if change is None:
        return value
    for edit in edits:
        factor = scaling.places.get(edit.slot.place)
        if factor is not None:
            value = _scaled_units(value, change, edit, factor)
    return value


def _scaled_units(
    old: Tensor, change: TensorChange, edit: Edit, factor: float
) -> Tensor:
    """A tensor with the entries of the old units multiplied; others may share them."""
    places = change.sources[edit.dim][edit.layout]
    factors = torch.ones(old.shape[edit.dim])
    factors[index(places[places >= 0])] = factor
    return old * _along(factors, old, edit.dim)


def grown_tensor(old: Tensor, change: TensorChange, edits: Sequence[Edit]) -> Tensor:
    """One tensor: carried, copies placed and shared, then strips or fills written in."""
    grown = carry(old, sources_with_copies(change, edits))
    for edit in edits:
        if edit.copies is not None and edit.slot.role == "fan_out":
            grown = shared(grown, edit, edit.copies.share)
    for edit in edits:
        if not len(edit.where):
            continue
        strip = edit.strip
        if strip is None:
            rest = [n for d, n in enumerate(old.shape) if d != edit.dim]
            strip = filled(old, edit.slot, [*edit.where.shape, *rest])
        if edit.copies is None:
            grown = _placed(grown, strip, change, edit)
            continue
        # On the copies a strip is noise, and there is none where none was offered.
        if edit.strip is None:
            fresh = edit.copies.fresh.to(strip.device)
            strip = strip * _along(fresh.to(strip.dtype), strip, 0)
        grown = grown + _placed(torch.zeros_like(grown), strip, change, edit)
    return grown


def _placed(grown: Tensor, strip: Tensor, change: TensorChange, edit: Edit) -> Tensor:
    """A tensor with the new units' entries written in.

    Corners with other new units are zero.
    """
    # Strips speak of the old tensor: its other dimensions grow with it.
    flat = strip.to(grown.dtype).flatten(0, 1).movedim(0, edit.dim)
    others: list[Sources | None] = list(change.sources)
    others[edit.dim] = None
    where = index(edit.where.ravel()).to(grown.device)
    return grown.index_copy(edit.dim, where, carry(flat, others))


def sources_with_copies(change: TensorChange, edits: Sequence[Edit]) -> list[Sources]:
    """The sources of a change, where a copy continues its parent."""
    sources = [source.copy() for source in change.sources]
    for edit in edits:
        if edit.copies is not None:
            parent = edit.copies.parent.numpy()
            copied = parent >= 0
            parents = edit.layout[parent[copied]]
            sources[edit.dim][edit.where[copied]] = change.sources[edit.dim][parents]
    return sources


def shared(tensor: Tensor, edit: Edit, share: Tensor) -> Tensor:
    """A tensor with the entries of every unit, old and new, multiplied by its share."""
    factors = torch.ones(tensor.shape[edit.dim], dtype=share.dtype)
    factors[index(edit.layout)] = share[:, None].expand(edit.layout.shape)
    return tensor * _along(factors, tensor, edit.dim)


def _along(factors: Tensor, tensor: Tensor, dim: int) -> Tensor:
    """A vector shaped to multiply a tensor along one dimension."""
    shape = [1] * tensor.dim()
    shape[dim] = -1
    return factors.to(tensor).reshape(shape)


def filled(old: Tensor, slot: Slot, shape: Sequence[int]) -> Tensor:
    """A strip for a place that no method speaks for.

    Ones, the mean of the neighbours, or zeros.
    """
    if slot.fill == "one":
        return old.new_ones(shape)
    if slot.fill == "mean" and old.is_floating_point():
        mean = old.mean(slot.dim, keepdim=True).movedim(slot.dim, 0)
        return mean[None].expand(shape).clone()
    return old.new_zeros(shape)
