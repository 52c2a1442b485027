"""Are the units alive? What they say, whether anybody listens, and whether they still learn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from itertools import chain, islice
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from meristem.core.axis import Axis, Place, matches
from meristem.core.change import Sources, by_unit
from meristem.core.errors import GrowthRefused
from meristem.statistics.batches import first_call, one_pass
from meristem.statistics.losses import Loss, called, measured
from meristem.structure import Structure
from meristem.structure.tracer import tensors as tensors_in
from meristem.structure.twin import named_tensors, twin
from meristem.structure.undisturbed import undisturbed

Figures = dict[str, float]

DORMANT = 0.025
"""A unit is dormant whose mean absolute value is at most this share of its layer's mean."""
UNREAD = 1e-3
"""A unit is inactive going out whose fan-out norm is below this share of its layer's median."""

_CONTRACTIONS = {
    torch.ops.aten.mm.default: (0, 1, 1, 0),
    torch.ops.aten.addmm.default: (1, 1, 2, 0),
    torch.ops.aten.bmm.default: (0, 2, 1, 1),
}
"""Left operand and its contracted dimension, right operand and its own."""


def health(
    model: nn.Module,
    example: Any = None,
    *,
    loss: Loss,
    data: Iterable[Any],
    axes: str | Sequence[str] = "*",
    units: Mapping[str, Sequence[int]] | None = None,
    batches: int | None = None,
) -> dict[str, Figures]:
    """How the units of any model fare, by axis, in eval mode over the data. The model is left untouched.

    Shares of the units looked at:

    - `inactive_forward`: never above zero, for any input, as what the next layer reads.
    - `inactive_outgoing`: fan-out L2 norm below 1e-3 x the median of the layer's units that have any fan-out.
    - `dormant`: mean absolute value at most .025 of the layer's mean (Sokar, Agarwal, Castro, Evci, "The Dormant
      Neuron Phenomenon in Deep Reinforcement Learning", 2023, arXiv 2302.12902).
    - `dead`: no weight of the unit, on either side, receives gradient from any batch.

    And where `units` names some: `gradient_ratio`, the mean fan-in gradient norm of these over that of the others, and
    `cosine`, the mean over these of the largest cosine between their fan-in and that of another unit.

    Of the blocks of a depth axis: `contribution`, ||y - x|| / ||x|| over what goes into a block and comes out, the mean over
    batches and blocks; `gradient_ratio`, the mean gradient norm of the named blocks over that of the others; `dead`, the share
    of blocks whose weights receive no gradient.

    Args:
        model: Any module that runs.
        example: A tensor, a tuple of arguments or a dict of keyword arguments; by default the model's first call inside
            `loss` on the first batch.
        loss: `loss(model, batch)`, a mean over the batch.
        data: A DataLoader or a re-iterable of batches.
        axes: Glob patterns of the axes to look at; a leading "!" excludes.
        units: Indices of the units to look at, by axis; all units of all axes by default.
        batches: Look at so many batches only.

    Returns:
        Figures by axis. What is read by other means than matrix products and convolutions has no forward figures.

    Raises:
        DataError: The data is empty or one-shot, or a loss is not finite.

    Examples:
        >>> import torch, meristem as ms
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> _ = torch.nn.init.constant_(net[0].bias[:2], -100.0)
        >>> data = [(torch.randn(32, 4), torch.randn(32, 2))]
        >>> loss = lambda model, batch: torch.nn.functional.mse_loss(model(batch[0]), batch[1])
        >>> ms.health(net, loss=loss, data=data)["0"]["inactive_forward"]
        0.25
    """
    if batches is not None and batches < 1:
        raise ValueError(f"batches must be an int in [1, inf), or None for all; got {batches}")
    with undisturbed(), closing(one_pass(data, torch.Generator().manual_seed(0))) as passing:
        first = next(passing)
        if example is None:
            example = first_call(model, loss, first)
        structure = Structure(model, example)
        if units is not None:
            chosen = [_checked(structure.axes.named(name), units[name]) for name in units]
        else:
            chosen = [axis for name, axis in structure.axes.items() if matches(name, axes)]
        rest = passing if batches is None else islice(passing, batches - 1)
        return look(structure, chosen, loss, chain([first], rest), units)


def look(
    structure: Structure,
    axes: Sequence[Axis],
    loss: Loss,
    batches: Iterable[Any],
    units: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Figures]:
    """The figures of `health` for widths and depths of a model that has been traced."""
    widths = [axis for axis in axes if axis.kind != "depth"]
    deep = [axis for axis in axes if axis.kind == "depth"]
    copied = twin(structure.model, lambda _, tensor: tensor.detach().clone())
    figures: dict[str, Figures] = {}
    read = list(batches) if widths and deep else batches
    if widths:
        layouts = {axis.name: structure.layout(axis.name) for axis in widths}
        chosen = {axis.name: units[axis.name] for axis in widths} if units is not None else None
        figures |= measure(copied, widths, layouts, loss, read, chosen)
    if deep:
        places = {axis.name: units[axis.name] if units is not None else range(axis.size) for axis in deep}
        figures |= measure_blocks(structure, copied, places, loss, read)
    return figures


def _checked(axis: Axis, units: Any) -> Axis:
    if not isinstance(units, Iterable) or any(not 0 <= int(unit) < axis.size for unit in units):
        raise GrowthRefused(f"axis {axis.name!r} has units 0..{axis.size - 1}; got {units!r}")
    return axis


def measure(
    copied: nn.Module,
    axes: Sequence[Axis],
    layouts: Mapping[str, Mapping[Place, Sources]],
    loss: Loss,
    batches: Iterable[Any],
    units: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Figures]:
    """The figures of `health` on a copy whose gradients may be written. `layouts` tells where the units of an axis lie."""
    copied.eval()
    copied.zero_grad()
    tensors = named_tensors(copied)
    required = {name: tensors[name].requires_grad for name in tensors}
    reader = _Reader(axes, layouts, tensors)
    try:
        for axis in axes:
            for slot in axis.slots:
                if tensors[slot.name].is_floating_point():
                    tensors[slot.name].requires_grad_(not slot.buffer)
        for batch in batches:
            with reader:
                value = measured(lambda: called(loss, copied, batch))  # noqa: B023
            if value.requires_grad:  # else the loss reaches nothing that is looked at
                value.backward()
        return {
            axis.name: _figures(axis, layouts[axis.name], tensors, reader, units[axis.name] if units else None)
            for axis in axes
        }
    finally:
        copied.zero_grad()
        for name, flag in required.items():
            tensors[name].requires_grad_(flag)


def measure_blocks(
    structure: Structure, copied: nn.Module, places: Mapping[str, Sequence[int]], loss: Loss, batches: Iterable[Any]
) -> dict[str, Figures]:
    """Figures of some blocks of depth axes, on a copy whose gradients may be written. `structure` is the copy's or its like.

    - `contribution`: ||y - x|| / ||x|| over what goes into the block and comes out, the mean over batches and these blocks.
    - `gradient_ratio`: the mean gradient norm of these blocks over that of the others.
    - `dead`: the share of these blocks whose weights receive no gradient from any batch.
    """
    copied.eval()
    copied.zero_grad()
    moved: dict[str, list[float]] = {}

    def watch(name: str) -> Any:
        def seen(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            (out, *_), inward = tensors_in(output), tensors_in((args, kwargs))
            stream = next((tensor for tensor in inward if tensor.shape == out.shape), None)
            if stream is not None and bool(stream.any()):
                change = (out.detach().double() - stream.detach().double()).norm() / stream.detach().double().norm()
                moved.setdefault(name, []).append(change.item())

        return seen

    named = {axis: [structure.depths[axis].blocks[place] for place in found] for axis, found in places.items()}
    hooks = [
        copied.get_submodule(name).register_forward_hook(watch(name), with_kwargs=True)
        for names in named.values()
        for name in names
    ]
    try:
        for batch in batches:
            value = measured(lambda: called(loss, copied, batch))  # noqa: B023
            if value.requires_grad:
                value.backward()
        result: dict[str, Figures] = {}
        for axis, names in named.items():
            norms = {block: _gradient_norm(copied.get_submodule(block)) for block in structure.depths[axis].blocks}
            ours = [norms[name] for name in names]
            others = [norm for block, norm in norms.items() if block not in names]
            figures: Figures = {"units": float(len(names)), "dead": sum(norm == 0 for norm in ours) / len(ours)}
            contributions = [fmean(moved[name]) for name in names if name in moved]
            if contributions:
                figures["contribution"] = fmean(contributions)
            if others and sum(others) > 0:
                figures["gradient_ratio"] = fmean(ours) / fmean(others)
            result[axis] = figures
        return result
    finally:
        for hook in hooks:
            hook.remove()
        copied.zero_grad()


def _gradient_norm(module: nn.Module) -> float:
    gradients = [g for p in module.parameters() if (g := dense_gradient(p)) is not None]
    return math.sqrt(sum(g.double().square().sum().item() for g in gradients))


def _figures(
    axis: Axis, layout: Mapping[Place, Sources], tensors: Mapping[str, Tensor], reader: _Reader, units: Any
) -> Figures:
    strips = {slot.place: by_unit(tensors[slot.name].detach(), slot.dim, layout[slot.place]) for slot in axis.slots}
    count = len(next(iter(strips.values())))
    looked_at = sorted({int(u) // axis.multiple for u in units}) if units is not None else list(range(count))
    picked = torch.tensor(looked_at, dtype=torch.long)
    others = torch.tensor([u for u in range(count) if u not in set(looked_at)], dtype=torch.long)
    figures: Figures = {"units": float(len(picked))}
    if not len(picked):
        return figures
    reached = torch.zeros(count)
    for slot in axis.slots:
        gradient = dense_gradient(tensors[slot.name])
        if gradient is not None:
            reached += by_unit(gradient, slot.dim, layout[slot.place]).flatten(1).abs().amax(1).float().cpu()
    figures["dead"] = _share(reached[picked] == 0)
    if axis.name in reader.largest:
        size = reader.mean[axis.name] / max(reader.passes[axis.name], 1)
        figures["inactive_forward"] = _share(reader.largest[axis.name][picked] <= 0)
        figures["dormant"] = _share(size[picked] <= DORMANT * size.mean())
    outgoing = _norm([strips[slot.place] for slot in axis.places("fan_out")])
    if outgoing is not None:
        heard = outgoing[outgoing > 0]
        limit = UNREAD * heard.median().item() if len(heard) else 0.0
        figures["inactive_outgoing"] = _share(outgoing[picked] <= limit)
    inward = axis.places("fan_in")
    if units is not None and len(others) and inward:
        gradients = [dense_gradient(tensors[s.name]) for s in inward]
        norms = _norm(
            [by_unit(g, s.dim, layout[s.place]) for g, s in zip(gradients, inward, strict=True) if g is not None]
        )
        if norms is not None and norms[others].mean() > 0:
            figures["gradient_ratio"] = (norms[picked].mean() / norms[others].mean()).item()
        vectors = torch.cat([strips[slot.place].flatten(1).double().cpu() for slot in inward], 1)
        vectors = vectors / vectors.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        figures["cosine"] = (vectors[picked] @ vectors[others].T).amax(1).mean().item()
    return figures


def dense_gradient(tensor: Tensor) -> Tensor | None:
    """The gradient of a tensor; that of an embedding may be sparse."""
    return tensor.grad.to_dense() if tensor.grad is not None and tensor.grad.is_sparse else tensor.grad


def _norm(strips: Sequence[Tensor]) -> Tensor | None:
    squares = [strip.flatten(1).double().square().sum(1).cpu() for strip in strips]
    return sum(squares[1:], squares[0]).sqrt() if squares else None


def _share(flags: Tensor) -> float:
    return flags.double().mean().item()


class _Reader(TorchDispatchMode):
    """Watches what the fan-out weights of some axes are multiplied with: the values that the next layers read."""

    def __init__(
        self, axes: Sequence[Axis], layouts: Mapping[str, Mapping[Place, Sources]], tensors: Mapping[str, Tensor]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest: dict[str, Tensor] = {}
        self.mean: dict[str, Tensor] = {}
        self.passes: dict[str, int] = {}
        self._watched: dict[int, list[tuple[str, int, int, int, Sources]]] = {}
        self._alive: list[Tensor] = []
        for axis in axes:
            for slot in axis.places("fan_out"):
                weight = tensors[slot.name]
                entry = (
                    axis.name,
                    slot.dim,
                    weight.shape[slot.dim],
                    weight.stride(slot.dim),
                    layouts[axis.name][slot.place],
                )
                self._watched.setdefault(_address(weight), []).append(entry)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _CONTRACTIONS:
            left, left_dim, right, right_dim = _CONTRACTIONS[func]
            self._seen(args[left], left_dim, args[right], right_dim)
            self._seen(args[right], right_dim, args[left], left_dim)
        elif func is torch.ops.aten.convolution.default and args[8] == 1:
            self._seen(args[0], 1, args[1], 0 if args[6] else 1)
        elif func is torch.ops.aten._to_copy.default and _address(args[0]) in self._watched:
            # A weight in another precision (autocast): followed under its new address, kept alive so that it stays its own.
            self._watched[_address(result)] = self._watched[_address(args[0])]
            self._alive.append(result)
        return result

    def _seen(self, value: Tensor, dim: int, weight: Tensor, weight_dim: int) -> None:
        for axis, _, size, stride, layout in self._watched.get(_address(weight), ()):
            if weight.shape[weight_dim] != size or weight.stride(weight_dim) != stride or value.shape[dim] != size:
                continue
            rows = value.detach().movedim(dim, -1).flatten(0, -2)
            where = torch.from_numpy(layout.copy())
            largest = rows.amax(0).float().cpu()[where].amax(1)
            mean = rows.abs().mean(0, dtype=torch.float32).cpu()[where].mean(1)
            self.largest[axis] = torch.maximum(self.largest[axis], largest) if axis in self.largest else largest
            self.mean[axis] = self.mean[axis] + mean if axis in self.mean else mean
            self.passes[axis] = self.passes.get(axis, 0) + 1


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
