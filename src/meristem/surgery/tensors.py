"""New tensors from old ones: where every old entry goes, and what the new ones hold.

Pure and differentiable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from meristem.core.axis import Axis, Place, Slot
from meristem.core.change import Plan, Sources, TensorChange, index
from meristem.core.offer import Copies, Offer, Scaling


def carry(old: Tensor, sources: Sequence[Sources | None]) -> Tensor:
    """`old` resized: entry i of dimension d continues old entry `sources[d][i]`; new
    entries (-1) are zero.
    """
    result = old
    for d, source in enumerate(sources):
        if source is None or (
            len(source) == result.shape[d]
            and bool((source == np.arange(len(source))).all())
        ):
            continue
        kept = np.flatnonzero(source >= 0)
        picked = result.index_select(d, index(source[kept]).to(result.device))
        shape = [*result.shape[:d], len(source), *result.shape[d + 1 :]]
        result = result.new_zeros(shape).index_copy(
            d, index(kept).to(result.device), picked
        )
    return result


def place_strip(
    grown: Tensor, strip: Tensor, change: TensorChange, dim: int, where: Sources
) -> Tensor:
    """`grown` with the new units' entries along `dim` written in; corners with other
    new units are zero.
    """
    flat = strip.to(grown.dtype).flatten(0, 1).movedim(0, dim)
    others: list[Sources | None] = [
        None if d == dim else source for d, source in enumerate(change.sources)
    ]
    return grown.index_copy(
        dim, index(where.ravel()).to(grown.device), carry(flat, others)
    )


def new_units(plan: Plan, axis: str, place: Place) -> Sources:
    """Where the new units of an axis lie along a place's dimension: an array (new
    units, entries per unit).
    """
    layout = plan.layout[axis][place]
    return layout[(plan.change(place.name).sources[place.dim][layout] < 0).any(axis=1)]


def grown_tensors(
    tensors: Mapping[str, Tensor],
    plan: Plan,
    axes: Sequence[Axis],
    offers: Sequence[Offer],
    scaling: Scaling,
) -> dict[str, Tensor]:
    """Every changed or rescaled tensor at its new size and values: old entries carried,
    scaled, new ones filled.
    """
    by_axis = {offer.axis: offer for offer in offers}
    scaled = {name: tensors[name] * factor for name, factor in scaling.tensors.items()}
    for change in plan.tensors:
        for axis in axes:
            for slot in axis.slots:
                if slot.name == change.name and slot.place in scaling.places:
                    old = scaled.get(change.name, tensors[change.name])
                    scaled[change.name] = _scaled_units(
                        old, plan, change, axis, slot, scaling.places[slot.place]
                    )
    result = dict(scaled)
    for change in plan.tensors:
        result[change.name] = _grown(
            scaled.get(change.name, tensors[change.name]), plan, change, axes, by_axis
        )
    for name, factor in plan.rescaled.items():
        result[name] = result.get(name, tensors[name]) * factor
    return result


def _scaled_units(
    old: Tensor, plan: Plan, change: TensorChange, axis: Axis, slot: Slot, factor: float
) -> Tensor:
    """`old` with the entries of one axis' old units multiplied along a slot's
    dimension; others may share that dimension.
    """
    places = change.sources[slot.dim][plan.layout[axis.name][slot.place]]
    factors = torch.ones(old.shape[slot.dim])
    factors[index(places[places >= 0])] = factor
    return old * _along(factors, old, slot.dim)


def _grown(
    old: Tensor,
    plan: Plan,
    change: TensorChange,
    axes: Sequence[Axis],
    offers: Mapping[str, Offer],
) -> Tensor:
    """One tensor: carried, copies placed and shared, then every slot's strip or fill
    written in.
    """
    copied = copied_slots(axes, offers, change.name)
    grown = carry(old, sources_with_copies(plan, change, copied))
    for axis, slot, copies in copied:
        if slot.role == "fan_out":
            grown = shared(grown, plan, axis, slot, copies.share)
    for axis in axes:
        copies_it = axis.name in offers and offers[axis.name].copies is not None
        for slot in axis.slots:
            where = (
                new_units(plan, axis.name, slot.place)
                if slot.name == change.name
                else None
            )
            if where is None or not len(where):
                continue
            strip = (
                offers[axis.name].strips.get(slot.place)
                if axis.name in offers
                else None
            )
            if not copies_it:
                strip = (
                    _filled(old, slot.fill, slot.dim, where) if strip is None else strip
                )
                grown = place_strip(grown, strip, change, slot.dim, where)
            elif strip is not None:
                grown = grown + place_strip(
                    torch.zeros_like(grown), strip, change, slot.dim, where
                )
    return grown


def sources_with_copies(
    plan: Plan, change: TensorChange, copied: Sequence[tuple[Axis, Slot, Copies]]
) -> list[Sources]:
    """The sources of a change, where a copy continues its parent."""
    sources = [source.copy() for source in change.sources]
    for axis, slot, copies in copied:
        layout = plan.layout[axis.name][slot.place]
        where = new_units(plan, axis.name, slot.place)
        sources[slot.dim][where] = change.sources[slot.dim][
            layout[copies.parent.numpy()]
        ]
    return sources


def copied_slots(
    axes: Sequence[Axis], offers: Mapping[str, Offer], name: str
) -> list[tuple[Axis, Slot, Copies]]:
    """The slots of one tensor whose new units are copies."""
    found = []
    for axis in axes:
        copies = offers[axis.name].copies if axis.name in offers else None
        if copies is not None:
            found += [(axis, slot, copies) for slot in axis.slots if slot.name == name]
    return found


def shared(tensor: Tensor, plan: Plan, axis: Axis, slot: Slot, share: Tensor) -> Tensor:
    """`tensor` with the entries of every unit, old and new, multiplied by its share."""
    layout = plan.layout[axis.name][slot.place]
    factors = torch.ones(tensor.shape[slot.dim], dtype=share.dtype)
    factors[index(layout)] = share[:, None].expand(layout.shape)
    return tensor * _along(factors, tensor, slot.dim)


def _along(factors: Tensor, tensor: Tensor, dim: int) -> Tensor:
    """A vector shaped to multiply `tensor` along `dim`."""
    return factors.to(tensor).reshape(
        [-1 if d == dim else 1 for d in range(tensor.dim())]
    )


def _filled(old: Tensor, fill: str, dim: int, where: Sources) -> Tensor:
    """A strip for a place that no method speaks for: ones, the mean of the neighbours,
    or zeros.
    """
    rest = [n for d, n in enumerate(old.shape) if d != dim]
    shape = [*where.shape, *rest]
    if fill == "one":
        return old.new_ones(shape)
    if fill == "mean" and old.is_floating_point():
        return old.mean(dim, keepdim=True).movedim(dim, 0)[None].expand(shape).clone()
    return old.new_zeros(shape)
