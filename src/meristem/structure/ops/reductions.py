"""Operations that combine the entries of a dimension: norms, softmax, sums."""

from __future__ import annotations

from torch import Tensor

from meristem.core.axis import Fill
from meristem.structure.labels import (
    UNIT,
    atoms,
    freeze,
    mark_end,
    mix,
    split_product,
    unify,
)
from meristem.structure.ops.rules import (
    Result,
    as_data,
    auxiliary,
    carry_along,
    reduced_over,
    unknown,
)
from meristem.structure.ops.written import shift_of
from meristem.structure.tracer import Call, Dim, Norm, Traced, Tracer

_OVER = ": softmax normalises over it"
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
    reason = f"layer norm {tracer.place()}"
    for dim in normal:
        mix(dim.label, reason)
    # Only a norm over one dimension can be kept exact when that grows.
    if count == 1:
        norm = Norm(tracer.stack.innermost, "layer_norm", dims[-1].label, reason)
        scale = call.arguments.get("weight")
        norm.weight = _only_parameter(tracer, scale)
        norm.shift = shift_of(scale) if scale is not None else 0.0
        norm.eps, norm.line = call.arguments["eps"], tracer.line()
        tracer.trace.norms.append(norm)
    statistics = [*dims[:-count], *[Dim(UNIT)] * count]
    others = [auxiliary(tensor, list(statistics)) for tensor in call.outputs[1:]]
    return [Traced(dims), *others]


def _only_parameter(tracer: Tracer, scale: Tensor | None) -> str:
    """The parameter that a scale is."""
    names = tracer.of(scale).parameters() if scale is not None else set()
    return names.pop() if len(names) == 1 else ""


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


def weight_norm(tracer: Tracer, call: Call) -> Result:
    """g v / ||v||, the norm over all dimensions but one: what is zero changes no norm."""
    source, d = tracer.of(call.arguments["v"]), call.dim()
    scale = call.arguments["g"]
    tracer.fill(scale, "mean")
    own = tracer.dims(scale)[d]
    if own.label is not UNIT:
        unify(source.dims[d].label, own.label)
    norms = [Dim(UNIT)] * len(source.dims)
    norms[d] = Dim(source.dims[d].label)
    return [Traced(source.dims, source.weight), Traced(norms, source.weight)]


def softmax(tracer: Tracer, call: Call) -> Result:
    dims = as_data(tracer.dims(call.inputs[0]))
    mix(dims[call.dim()].label, _softmax_over(tracer))
    return [Traced(dims)]


def _softmax_over(tracer: Tracer) -> str:
    return f"{tracer.place()}{_OVER}"


def class_loss(tracer: Tracer, call: Call) -> Result:
    """The loss of a classification: its classes are an end, and it is free to change."""
    dims = tracer.dims(call.inputs[0])
    classes = dims[1 if len(dims) > 1 else 0].label
    mark_end(classes, "output")
    for atom in atoms(classes):
        for reason in atom.mixes:
            if reason.endswith(_OVER):
                tracer.trace.excused.add(reason)
    weight = call.arguments.get("weight")
    if weight is not None:
        freeze(tracer.dims(weight)[0].label, "the weights of the classes in a loss")
    known = []
    for tensor in call.outputs:
        known.append(Traced(unknown(tensor.shape), loss=True))
    return known


def loss(tracer: Tracer, call: Call) -> Result:
    """A loss entry by entry, summed or not."""
    out = call.outputs[0]
    if out.dim():
        return [tracer.broadcast(call.inputs, out)]
    first, second = call.inputs[:2]
    for one, other in zip(tracer.dims(first), tracer.dims(second), strict=True):
        if one.label is not UNIT and other.label is not UNIT:
            unify(one.label, other.label)
    for dim in tracer.dims(first):
        mix(dim.label, f"{tracer.place()}: {call.name} sums over it")
    return [Traced([])]


def reduce(tracer: Tracer, call: Call) -> Result:
    source = tracer.of(call.inputs[0])
    rank = len(source.dims)
    gone = _reduced(call, rank)
    # Of squares it may be a norm that the model writes out, see `written`.
    reason = reduced_over(tracer, call)
    keep = call.arguments.get("keepdim", False)
    dims = []
    for d, dim in enumerate(source.dims):
        if d not in gone:
            dims.append(dim)
            continue
        # What is only for training, as the power iteration of a spectral norm, is no
        # part of the function.
        if tracer.recording or not source.weight:
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
