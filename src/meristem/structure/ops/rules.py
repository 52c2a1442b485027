"""What the rules of operations have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from meristem.core.axis import Fill
from meristem.structure.labels import fresh, unify
from meristem.structure.tracer import Call, Dim, Traced, Tracer

Result = list[Traced] | None
"""What is known of the outputs; None where a rule does not know the case."""


def unknown(sizes: Sequence[int], reason: str | None = None) -> list[Dim]:
    """Dimensions that nothing is known about, or that may not change for a reason."""
    return [Dim(fresh(size, reason)) for size in sizes]


def as_data(dims: Iterable[Dim]) -> list[Dim]:
    """The same dimensions, as computed numbers: they view no parameter any more."""
    return [Dim(dim.label) for dim in dims]


def auxiliary(tensor: Tensor, dims: list[Dim]) -> Traced:
    """What is known of an output beside the main one.

    Fused kernels of attention give log-sums that are empty, or padded to a block: where
    the sizes do not fit, the shape is the kernel's own.
    """
    if [dim.label.root.size for dim in dims] == list(tensor.shape):
        return Traced(dims)
    return Traced(unknown(tensor.shape), lawful=False)


def reduced_over(tracer: Tracer, call: Call) -> str:
    """What is said of a dimension that a reduction runs over.

    A norm that the model writes out is excused by the same words, see `written`.
    """
    return f"{tracer.place()}: {call.name} runs over it"


def carry_along(
    tracer: Tracer, tensor: Tensor | None, fill: Fill, dims: Sequence[Dim]
) -> None:
    """A tensor of scales, shifts or statistics follows the last of some dimensions.

    Its new entries start by `fill`.
    """
    if tensor is None:
        return
    tracer.fill(tensor, fill)
    for dim, own in zip(dims, tracer.dims(tensor), strict=True):
        unify(dim.label, own.label)
