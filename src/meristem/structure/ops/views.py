"""Operations that move, cut and join dimensions, or work entry by entry."""

from __future__ import annotations

import torch

from meristem.structure.labels import (
    COMPLEX,
    SPATIAL,
    STACKED,
    UNIT,
    Label,
    concatenation,
    freeze,
    freeze_at,
    fresh,
    product,
    regroup,
    split_product,
    split_sum,
    unify,
)
from meristem.structure.ops.rules import Result, as_data, unknown
from meristem.structure.tracer import Call, Dim, Origin, Traced, Tracer

_PICKED = "picked by index"


def created(tracer: Tracer, call: Call) -> Result:
    """Tensors that come from no tensor, or only from its dtype: ranges, zeros, masks."""
    return [Traced(unknown(out.shape)) for out in call.outputs]


def pointwise(tracer: Tracer, call: Call) -> Result:
    known = tracer.broadcast(call.inputs, call.outputs[0])
    # A weight that is added to another one is no bias.
    if call.name in ("add", "add_", "sub") and not known.weight:
        for tensor in call.inputs:
            tracer.fill(tensor, "bias")
    others = [Traced(list(known.dims)) for _ in call.outputs[1:]]
    return [known, *others]


def view(tracer: Tracer, call: Call) -> Result:
    source = tracer.of(call.inputs[0])
    old, new = list(call.inputs[0].shape), list(call.outputs[0].shape)
    labels = regroup([dim.label for dim in source.dims], new)
    origins = _regrouped(source.dims, old, new)
    dims = [Dim(*pair) for pair in zip(labels, origins, strict=True)]
    return [Traced(dims, source.weight)]


def _regrouped(dims: list[Dim], old: list[int], new: list[int]) -> list[Origin]:
    """Which parameter dimensions each viewed dimension covers.

    Runs of dimensions with the same product of sizes are matched up.
    """
    nothing: Origin = frozenset()
    result = [nothing] * len(new)
    i = j = 0
    while i < len(old) and j < len(new):
        i_end, j_end = i + 1, j + 1
        have, want = old[i], new[j]
        # Products of sizes are grown on the smaller side until they meet.
        while have != want:
            if have < want and i_end < len(old):
                have *= old[i_end]
                i_end += 1
            elif j_end < len(new):
                want *= new[j_end]
                j_end += 1
            else:
                break
        origin = nothing.union(*(dim.origin for dim in dims[i:i_end]))
        result[j:j_end] = [origin] * (j_end - j)
        i, j = i_end, j_end
    return result


def permute(tracer: Tracer, call: Call) -> Result:
    source = tracer.of(call.inputs[0])
    order = list(range(len(source.dims)))
    if call.name == "permute":
        order = [int(d) % len(order) for d in call.arguments["dims"]]
    elif call.name.startswith("transpose"):
        first, second = call.dim("dim0"), call.dim("dim1")
        order[first], order[second] = order[second], order[first]
    else:
        order.reverse()
    return [Traced([source.dims[d] for d in order], source.weight)]


def unsqueeze(tracer: Tracer, call: Call) -> Result:
    source = tracer.of(call.inputs[0])
    at = call.arguments["dim"] % (len(source.dims) + 1)
    dims = list(source.dims)
    dims.insert(at, Dim(UNIT))
    return [Traced(dims, source.weight)]


def squeeze(tracer: Tracer, call: Call) -> Result:
    source = tracer.of(call.inputs[0])
    # In place the input has its new shape already: the labels tell the old one.
    shape = [dim.label.root.size for dim in source.dims]
    chosen = call.arguments.get("dim", list(range(len(shape))))
    if isinstance(chosen, int):
        chosen = [chosen]
    dropped = {d % len(shape) for d in chosen if shape[d] == 1}
    kept = []
    for d, dim in enumerate(source.dims):
        if d in dropped:
            freeze(dim.label, f"{tracer.where()} squeezes it")
        else:
            kept.append(dim)
    return [Traced(kept, source.weight)]


def expand(tracer: Tracer, call: Call) -> Result:
    source, shape = tracer.of(call.inputs[0]), call.inputs[0].shape
    lead = call.outputs[0].dim() - len(shape)
    dims = unknown(call.outputs[0].shape[:lead])
    for dim, old, new in zip(
        source.dims, shape, call.outputs[0].shape[lead:], strict=True
    ):
        if old == new:
            dims.append(dim)
        else:
            freeze(dim.label, f"{tracer.where()} broadcasts it")
            dims.append(Dim(fresh(new)))
    return [Traced(dims, source.weight)]


def repeat(tracer: Tracer, call: Call) -> Result:
    source, shape = tracer.of(call.inputs[0]), list(call.inputs[0].shape)
    sizes = call.outputs[0].shape
    lead = len(sizes) - len(shape)
    inner = [Dim(UNIT)] * lead + source.dims
    old = [1] * lead + shape
    dims = []
    for dim, before, after in zip(inner, old, sizes, strict=True):
        if before == 1 and after > 1:
            # A single entry is repeated as a broadcast would be.
            freeze(dim.label, f"{tracer.where()} repeats it")
            dims.append(Dim(fresh(after)))
            continue
        # Copies lie one behind the other: the outer factor numbers them.
        times = fresh(after // before)
        dims.append(Dim(product([times, dim.label]), dim.origin))
    return [Traced(dims, source.weight)]


def slice_(tracer: Tracer, call: Call) -> Result:
    source, d = tracer.of(call.inputs[0]), call.dim()
    full, kept = call.inputs[0].shape[d], call.outputs[0].shape[d]
    dims = list(source.dims)
    if kept == full:
        return [Traced(dims, source.weight)]
    label, origin = dims[d]
    step = call.arguments.get("step") or 1
    # A stride, or a single entry, depends on where entries stand.
    start = call.arguments.get("start") or 0
    if start < 0:
        start = max(start + full, 0)
    if step != 1 or kept in (0, 1):
        reason = f"{tracer.where()} picks entries of it by index"
        if kept == 1:
            freeze_at(label, start, reason)
        else:
            freeze(label, reason)
        dims[d] = Dim(fresh(kept, _PICKED))
        return [Traced(dims, source.weight)]
    if start:
        _, label = split_sum(label, start)
    if kept < label.root.size:
        label, _ = split_sum(label, kept)
    dims[d] = Dim(label, origin)
    return [Traced(dims, source.weight)]


def select(tracer: Tracer, call: Call) -> Result:
    source, d = tracer.of(call.inputs[0]), call.dim()
    reason, label = (
        f"{tracer.where()} picks entries of it by index",
        source.dims[d].label,
    )
    if "index" in call.arguments:
        freeze_at(label, int(call.arguments["index"]), reason)
    else:  # each of its entries
        freeze(label, reason)
    dims = source.dims[:d] + source.dims[d + 1 :]
    return [Traced(list(dims), source.weight) for _ in call.outputs]


def split(tracer: Tracer, call: Call) -> Result:
    source, d = tracer.of(call.inputs[0]), call.dim()
    rest = source.dims[d].label
    parts = []
    for output in call.outputs[:-1]:
        head, rest = split_sum(rest, output.shape[d])
        parts.append(head)
    parts.append(rest)
    sizes = {output.shape[d] for output in call.outputs}
    # A split into equal parts ties them; one into named sizes does not.
    if "with_sizes" not in call.name and len(sizes) == 1:
        for part in parts[1:]:
            unify(parts[0], part)
    results = []
    for part in parts:
        dims = list(source.dims)
        dims[d] = Dim(part, source.dims[d].origin)
        results.append(Traced(dims, source.weight))
    return results


def glu(tracer: Tracer, call: Call) -> Result:
    d = call.dim(default=-1)
    dims = as_data(tracer.dims(call.inputs[0]))
    value, gate = split_sum(dims[d].label, call.outputs[0].shape[d])
    unify(value, gate)
    dims[d] = Dim(value)
    return [Traced(dims)]


def cat(tracer: Tracer, call: Call) -> Result:
    out = call.outputs[0]
    # torch still lets an empty tensor of one dimension stand among the parts.
    parts = [t for t in call.inputs if t.numel() or t.dim() == out.dim()]
    joined = int(call.arguments.get("dim", 0)) % out.dim()
    dims: list[Dim] = []
    for d in range(out.dim()):
        column = [tracer.dims(part)[d] for part in parts]
        nothing: Origin = frozenset()
        origin = nothing.union(*(dim.origin for dim in column))
        if d == joined:
            # A size of 1 is a real entry in a concatenation, and broadcasts nowhere.
            terms = []
            for dim in column:
                terms.append(Label(1) if dim.label is UNIT else dim.label)
            dims.append(Dim(concatenation(terms), origin))
            continue
        for dim in column[1:]:
            unify(column[0].label, dim.label)
        dims.append(Dim(column[0].label, origin))
    return [Traced(dims, all(tracer.of(part).weight for part in parts))]


def stack(tracer: Tracer, call: Call) -> Result:
    out = call.outputs[0]
    at = int(call.arguments.get("dim", 0)) % out.dim()
    known = tracer.broadcast(call.inputs, call.inputs[0])
    dims = list(known.dims)
    dims.insert(at, Dim(fresh(out.shape[at], STACKED)))
    return [Traced(dims, known.weight)]


def constant_pad(tracer: Tracer, call: Call) -> Result:
    dims = as_data(tracer.dims(call.inputs[0]))
    pad = call.arguments["pad"]  # (left, right) of the last dimension, then inwards
    for pair in range(len(pad) // 2):
        left, right = pad[2 * pair], pad[2 * pair + 1]
        d = len(dims) - 1 - pair
        if left < 0 or right < 0:
            freeze(dims[d].label, f"{tracer.where()} crops it")
            dims[d] = Dim(fresh(call.outputs[0].shape[d], "cropped"))
        elif left or right:
            before, after = Label(left, "padding"), Label(right, "padding")
            dims[d] = Dim(concatenation([before, dims[d].label, after]))
    return [Traced(dims)]


def ordered(tracer: Tracer, call: Call) -> Result:
    """Operations to which the order of entries matters: sorts, rolls, running sums."""
    dims = tracer.dims(call.inputs[0])
    chosen = call.arguments.get("dims", call.arguments.get("dim", -1))
    if isinstance(chosen, int):
        chosen = [chosen]
    does = "depends on the order of its entries"
    if call.name in ("topk", "kthvalue"):
        does = "chooses among its entries"
    reason = f"{tracer.where()}: {call.name} {does}"
    for d in list(chosen) or range(len(dims)):
        freeze(dims[d].label, reason)
    shape = call.inputs[0].shape
    results = []
    for out in call.outputs:
        known = []
        for dim, before, after in zip(dims, shape, out.shape, strict=False):
            same = before == after
            known.append(Dim(dim.label if same else fresh(after, call.name)))
        results.append(Traced(known))
    return results


def index(tracer: Tracer, call: Call) -> Result:
    source, out = tracer.dims(call.inputs[0]), call.outputs[0]
    indices = call.arguments["indices"]
    at = [d for d, one in enumerate(indices) if one is not None]
    reason = f"{tracer.where()} picks entries of it by index"
    for d in at:
        written = getattr(indices[d], "constant", None)
        if written is not None and written.numel() == 1:  # x[..., [-2], :]
            freeze_at(source[d].label, int(written), reason)
        else:
            freeze(source[d].label, reason)
    # Indices that are apart move their dimensions to the front: that is left to no
    # rule.
    in_one_run = at == list(range(at[0], at[-1] + 1))
    if not in_one_run or any(indices[d].dtype == torch.bool for d in at):
        return None
    first = at[0]
    picked = out.dim() - (len(source) - len(at))
    before, after = as_data(source[:first]), as_data(source[at[-1] + 1 :])
    middle = unknown(out.shape[first : first + picked], _PICKED)
    return [Traced([*before, *middle, *after])]


def gather(tracer: Tracer, call: Call) -> Result:
    source, chosen = tracer.dims(call.inputs[0]), call.dim()
    freeze(source[chosen].label, f"{tracer.where()} picks entries of it by index")
    dims = unknown(call.outputs[0].shape)
    places = call.inputs[-1]
    for d, size in enumerate(call.inputs[0].shape):
        if d == chosen or size != call.outputs[0].shape[d]:
            continue
        dims[d] = Dim(source[d].label)
        # An index for every entry follows the entries.
        if places.dim() == len(source):
            unify(source[d].label, tracer.dims(places)[d].label)
    return [Traced(dims)]


def scatter(tracer: Tracer, call: Call) -> Result:
    """Entries of a source are put or added where an index says, along one dimension.

    The others are those of what is written to, of the source and of an index that has
    all of them.
    """
    target, chosen = call.inputs[0], call.dim()
    dims = tracer.dims(target)
    reason = f"{tracer.where()}: {call.name} picks entries of it by index"
    freeze(dims[chosen].label, reason)
    for tensor in call.inputs[1:]:
        if tensor.dim() != target.dim():
            continue
        own = tracer.dims(tensor)
        freeze(own[chosen].label, reason)
        for d, size in enumerate(target.shape):
            if d != chosen and tensor.shape[d] == size:
                unify(dims[d].label, own[d].label)
    return [Traced(as_data(dims))]


def put(tracer: Tracer, call: Call) -> Result:
    """Values are put where the indices of the leading dimensions say; a mask stands for
    as many dimensions as it has.
    """
    target, indices = call.inputs[0], call.arguments["indices"]
    dims, out = tracer.dims(target), call.outputs[0]
    if any(one is None for one in indices):
        return None
    covered = sum(one.dim() if one.dtype == torch.bool else 1 for one in indices)
    for dim in dims[:covered]:
        freeze(dim.label, f"{tracer.where()} picks entries of it by index")
    values = call.arguments["values"]
    for own, dim in zip(
        reversed(tracer.dims(values)), reversed(dims[covered:]), strict=False
    ):
        if own.label is not UNIT:
            unify(dim.label, own.label)
    assert out.shape == target.shape
    return [Traced(as_data(dims))]


def from_channels(tracer: Tracer, call: Call) -> Result:
    """Positions come out of the channels: a pixel shuffle, (..., C r r, H, W) ->
    (..., C, H r, W r), or patches folded, (..., C x kernel, positions) -> (..., C, H, W).
    """
    dims, out = tracer.dims(call.inputs[0]), call.outputs[0]
    before = out.dim() - 3
    for dim in dims[before + 1 :]:
        freeze(dim.label, SPATIAL)
    channels, inner = split_product(dims[before].label, out.shape[before])
    freeze(inner, SPATIAL)
    kept = [*as_data(dims[:before]), Dim(channels)]
    return [Traced([*kept, *unknown(out.shape[-2:], SPATIAL)])]


def into_channels(tracer: Tracer, call: Call) -> Result:
    """The way back: a pixel unshuffle, or an image unfolded into patches."""
    dims, out = tracer.dims(call.inputs[0]), call.outputs[0]
    for dim in dims[-2:]:
        freeze(dim.label, SPATIAL)
    before = len(dims) - 3
    inner = fresh(out.shape[before] // call.inputs[0].shape[-3], SPATIAL)
    kept = [*as_data(dims[:-3]), Dim(product([dims[-3].label, inner]))]
    return [Traced([*kept, *unknown(out.shape[before + 1 :], SPATIAL)])]


def channel_shuffle(tracer: Tracer, call: Call) -> Result:
    """(B, g C, ...) -> (B, C g, ...)."""
    dims = as_data(tracer.dims(call.inputs[0]))
    group, inner = split_product(dims[1].label, call.arguments["groups"])
    dims[1] = Dim(product([inner, group]))
    return [Traced(dims)]


def fourier(tracer: Tracer, call: Call) -> Result:
    dims, out = tracer.dims(call.inputs[0]), call.outputs[0]
    result = as_data(dims)
    counted = f"it counts the frequencies of a Fourier transform, {tracer.where()}"
    for d in call.arguments["dim"]:
        freeze(dims[d].label, f"{tracer.where()}: a Fourier transform runs over it")
        result[d] = unknown([out.shape[d]], counted)[0]
    return [Traced(result)]


def as_complex(tracer: Tracer, call: Call) -> Result:
    source = tracer.of(call.inputs[0])
    freeze(source.dims[-1].label, COMPLEX)
    return [Traced(source.dims[:-1], source.weight)]


def as_real(tracer: Tracer, call: Call) -> Result:
    source = tracer.of(call.inputs[0])
    parts = Dim(Label(2, COMPLEX))
    return [Traced([*source.dims, parts], source.weight)]


def restrided(tracer: Tracer, call: Call) -> Result:
    """A view of the same places only, as a change of the memory format gives."""
    source, size = call.inputs[0], list(call.arguments["size"])
    same = list(source.shape) == size
    if not same or list(source.stride()) != list(call.arguments["stride"]):
        return None
    known = tracer.of(source)
    # In place the source has its new shape already: its labels tell the old one.
    if [dim.label.root.size for dim in known.dims] != size:
        return None
    return [known]


def written_to(tracer: Tracer, call: Call) -> Result:
    """A tensor some of whose entries along one dimension are others now."""
    target, d = call.inputs[0], call.dim()
    dims = tracer.dims(target)
    freeze(dims[d].label, f"{tracer.where()}: {call.name} picks entries of it by index")
    for source in call.inputs[1:]:
        own = tracer.dims(source)
        others = [*dims[:d], *dims[d + 1 :]]
        if len(own) == len(dims):
            own = [*own[:d], *own[d + 1 :]]
        if len(own) == len(others):
            for one, dim in zip(own, others, strict=True):
                unify(one.label, dim.label)
    return [Traced(as_data(dims))]


def diagonal(tracer: Tracer, call: Call) -> Result:
    source = tracer.of(call.inputs[0])
    rank = len(source.dims)
    first, second = (call.arguments[key] % rank for key in ("dim1", "dim2"))
    for d in (first, second):
        freeze(source.dims[d].label, f"{tracer.where()} takes its diagonal")
    kept = [dim for d, dim in enumerate(source.dims) if d not in (first, second)]
    return [Traced([*kept, *unknown(call.outputs[0].shape[-1:], _PICKED)])]


def turned(tracer: Tracer, call: Call) -> Result:
    """Quarter turns in the plane of two dimensions."""
    dims = as_data(tracer.dims(call.inputs[0]))
    first, second = call.arguments["dims"]
    for d in (first, second):
        freeze(
            dims[d].label, f"{tracer.where()}: rot90 depends on the order of entries"
        )
    if call.arguments["k"] % 2:
        dims[first], dims[second] = dims[second], dims[first]
    return [Traced(dims)]


def picked(tracer: Tracer, call: Call) -> Result:
    """The entry of a rank along one dimension."""
    dims, d = as_data(tracer.dims(call.inputs[0])), call.dim(default=-1)
    freeze(dims[d].label, f"{tracer.where()}: {call.name} picks one of its entries")
    kept = [Dim(UNIT)] if call.arguments.get("keepdim", False) else []
    dims = [*dims[:d], *kept, *dims[d + 1 :]]
    return [Traced(list(dims)) for _ in call.outputs]


def spatial(tracer: Tracer, call: Call) -> Result:
    """Pooling, padding, resizing: all but the batch and the channels is spatial."""
    dims, out = tracer.dims(call.inputs[0]), call.outputs[0]
    batched = out.dim() >= 4 or "1d" in call.name or "linear1d" in call.name
    lead = 2 if batched else 1
    for dim in dims[lead:]:
        freeze(dim.label, SPATIAL)
    results = []
    for tensor in call.outputs:
        kept = as_data(dims[:lead])
        results.append(Traced([*kept, *unknown(tensor.shape[lead:], SPATIAL)]))
    return results
