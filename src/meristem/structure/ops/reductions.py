"""Operations that combine the entries of a dimension: norms, softmax, sums."""

from __future__ import annotations

import torch

from meristem.core.axis import Fill
from meristem.structure.labels import UNIT, mix, split_product, unify
from meristem.structure.ops.rules import Result, as_data, auxiliary, carry_along
from meristem.structure.tracer import Call, Dim, Norm, Traced, Tracer

_AFFINE: tuple[tuple[str, Fill], ...] = (("weight", "one"), ("bias", "zero"))
_AVERAGED: tuple[tuple[str, Fill], ...] = (
    *_AFFINE,
    ("running_mean", "zero"),
    ("running_var", "one"),
)


def batch_norm(tracer: Tracer, call: Call) -> Result:
    dims = as_data(tracer.dims(call.inputs[0]))
    channels = dims[1]
    for key, fill in _AVERAGED:
        carry_along(tracer, call.arguments.get(key), fill, [channels])
    tracer.trace.batch_norms.append(channels.label)
    others = [auxiliary(tensor, [channels]) for tensor in call.outputs[1:]]
    return [Traced(dims), *others]


def layer_norm(tracer: Tracer, call: Call) -> Result:
    dims = as_data(tracer.dims(call.inputs[0]))
    count = len(call.arguments["normalized_shape"])
    normal = dims[-count:]
    for key, fill in _AFFINE:
        carry_along(tracer, call.arguments.get(key), fill, normal)
    for dim in normal:
        mix(dim.label, f"layer norm {tracer.place()}")
    # Only a norm over one dimension can be kept exact when that grows.
    if count == 1:
        norm = Norm(tracer.stack.innermost, "layer_norm", dims[-1].label)
        tracer.trace.norms.append(norm)
    statistics = [*dims[:-count], *[Dim(UNIT)] * count]
    others = [auxiliary(tensor, list(statistics)) for tensor in call.outputs[1:]]
    return [Traced(dims), *others]


def group_norm(tracer: Tracer, call: Call) -> Result:
    dims = as_data(tracer.dims(call.inputs[0]))
    channels = dims[1]
    groups, inner = split_product(channels.label, call.arguments["group"])
    # Whole groups may be added, channels inside one may not.
    mix(inner, f"group norm {tracer.place()} normalises over the channels of a group")
    for key, fill in _AFFINE:
        tensor = call.arguments.get(key)
        carry_along(tracer, tensor, fill, [channels])
        if tensor is not None:
            for name in tracer.of(tensor).parameters():
                tracer.trace.groups[name] = groups
    statistics = [dims[0], Dim(groups)]
    others = [auxiliary(tensor, list(statistics)) for tensor in call.outputs[1:]]
    return [Traced(dims), *others]


def softmax(tracer: Tracer, call: Call) -> Result:
    dims = as_data(tracer.dims(call.inputs[0]))
    mix(dims[call.dim()].label, f"{tracer.place()}: softmax normalises over it")
    return [Traced(dims)]


def reduce(tracer: Tracer, call: Call) -> Result:
    source = tracer.of(call.inputs[0])
    rank = len(source.dims)
    gone = _reduced(call, rank)
    module = tracer.stack.modules.get(tracer.stack.innermost)
    # Without a fused kernel an RMS norm is a mean over squares, inside its own module.
    inside_rms = isinstance(module, torch.nn.RMSNorm) and gone == {rank - 1}
    reason = f"{tracer.place()}: {call.name} over it"
    if inside_rms:
        reason = f"rms norm {tracer.place()}"
        norm = Norm(tracer.stack.innermost, "rms_norm", source.dims[-1].label)
        tracer.trace.norms.append(norm)
    keep = call.arguments.get("keepdim", False)
    dims = []
    for d, dim in enumerate(source.dims):
        if d not in gone:
            dims.append(dim)
            continue
        mix(dim.label, reason)
        if keep:
            dims.append(Dim(UNIT))
    return [Traced(list(dims), source.weight) for _ in call.outputs]


def _reduced(call: Call, rank: int) -> set[int]:
    """The dimensions that a reduction runs over; all where none is named."""
    chosen = call.arguments.get("dim")
    if isinstance(chosen, int):
        chosen = [chosen]
    if not chosen:
        chosen = range(rank)
    return {int(d) % rank for d in chosen} if rank else set()


def prelu(tracer: Tracer, call: Call) -> Result:
    data, slope = call.inputs
    dims = as_data(tracer.dims(data))
    tracer.fill(slope, "mean")
    for own in tracer.dims(slope):
        if own.label is not UNIT:
            unify(dims[1].label, own.label)
    return [Traced(dims)]
