"""What each ATen operation does to dimension labels.

One small function per kind of operation; the table is at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from meristem.structure.labels import (
    UNIT,
    Label,
    concatenation,
    freeze,
    fresh,
    mark_end,
    mix,
    product,
    regroup,
    split_product,
    split_sum,
    unify,
)
from meristem.structure.tracer import (
    Call,
    Dim,
    Norm,
    Operation,
    Rule,
    Sign,
    Traced,
    Tracer,
)

Result = list[Traced] | None


def _unknown(sizes: Sequence[int], reason: str | None = None) -> list[Dim]:
    return [Dim(fresh(n, reason)) for n in sizes]


def _like(tensor: Tensor, dims: list[Dim]) -> Traced:
    """`dims` where they describe an auxiliary output; else its shape is its own.

    Fused kernels of attention give log-sums that are empty, or padded to a block.
    """
    if [dim.label.root.size for dim in dims] == list(tensor.shape):
        return Traced(dims)
    return Traced(_unknown(tensor.shape), lawful=False)


def _pointwise(tracer: Tracer, call: Call) -> Result:
    if call.name in ("add", "add_", "sub"):
        for tensor in call.inputs:
            tracer.fill(tensor, "bias")
    known = tracer.broadcast(call.inputs, call.outputs[0])
    return [known, *[Traced(list(known.dims)) for _ in call.outputs[1:]]]


def _view(tracer: Tracer, call: Call) -> Result:
    source, sizes = tracer.of(call.inputs[0]), list(call.outputs[0].shape)
    labels = regroup([dim.label for dim in source.dims], sizes)
    origins = _regroup_origins(source.dims, list(call.inputs[0].shape), sizes)
    return [
        Traced(
            [Dim(label, o) for label, o in zip(labels, origins, strict=True)],
            source.weight,
        )
    ]


def _regroup_origins(
    dims: list[Dim], old: list[int], new: list[int]
) -> list[frozenset[tuple[str, int]]]:
    """Which parameter dimensions each viewed dimension covers: runs of equal size are
    matched up.
    """
    result: list[frozenset[tuple[str, int]]] = [frozenset()] * len(new)
    i = j = 0
    while i < len(old) and j < len(new):
        i_end, j_end, have, want = i + 1, j + 1, old[i], new[j]
        while have != want and (i_end < len(old) or j_end < len(new)):
            if have < want and i_end < len(old):
                have *= old[i_end]
                i_end += 1
            elif j_end < len(new):
                want *= new[j_end]
                j_end += 1
            else:
                break
        run = frozenset[tuple[str, int]]().union(*(dim.origin for dim in dims[i:i_end]))
        result[j:j_end] = [run] * (j_end - j)
        i, j = i_end, j_end
    return result


def _permute(tracer: Tracer, call: Call) -> Result:
    source = tracer.of(call.inputs[0])
    order = list(range(len(source.dims)))
    if call.name == "permute":
        order = [int(i) % len(order) for i in call.arguments["dims"]]
    elif call.name.startswith("transpose"):
        i, j = call.dim("dim0"), call.dim("dim1")
        order[i], order[j] = order[j], order[i]
    else:
        order.reverse()
    return [Traced([source.dims[i] for i in order], source.weight)]


def _unsqueeze(tracer: Tracer, call: Call) -> Result:
    source = tracer.of(call.inputs[0])
    at = call.arguments["dim"] % (len(source.dims) + 1)
    return [Traced([*source.dims[:at], Dim(UNIT), *source.dims[at:]], source.weight)]


def _squeeze(tracer: Tracer, call: Call) -> Result:
    source, shape = tracer.of(call.inputs[0]), call.inputs[0].shape
    chosen = call.arguments.get("dim", list(range(len(shape))))
    chosen = [chosen] if isinstance(chosen, int) else list(chosen)
    dropped = {d % len(shape) for d in chosen if shape[d] == 1}
    for d in dropped:
        freeze(source.dims[d].label, f"{tracer.place()} squeezes it")
    return [
        Traced(
            [dim for d, dim in enumerate(source.dims) if d not in dropped],
            source.weight,
        )
    ]


def _expand(tracer: Tracer, call: Call) -> Result:
    source, shape = tracer.of(call.inputs[0]), call.inputs[0].shape
    lead = call.outputs[0].dim() - len(shape)
    dims = []
    for i, n in enumerate(call.outputs[0].shape):
        if i >= lead and shape[i - lead] == n:
            dims.append(source.dims[i - lead])
        else:
            if i >= lead:
                freeze(source.dims[i - lead].label, f"{tracer.place()} broadcasts it")
            dims.append(Dim(fresh(n)))
    return [Traced(dims, source.weight)]


def _repeat(tracer: Tracer, call: Call) -> Result:
    source, shape = tracer.of(call.inputs[0]), call.inputs[0].shape
    lead = call.outputs[0].dim() - len(shape)
    dims = []
    for i, n in enumerate(call.outputs[0].shape):
        inner = source.dims[i - lead] if i >= lead else Dim(UNIT)
        times = n // (shape[i - lead] if i >= lead else 1)
        dims.append(Dim(product([fresh(times), inner.label]), inner.origin))
    return [Traced(dims, source.weight)]


def _slice(tracer: Tracer, call: Call) -> Result:
    source, d = tracer.of(call.inputs[0]), call.dim()
    full, kept = call.inputs[0].shape[d], call.outputs[0].shape[d]
    dims = list(source.dims)
    if kept != full:
        start = call.arguments.get("start") or 0
        start = max(start + full, 0) if start < 0 else start
        if (call.arguments.get("step") or 1) != 1 or kept in (0, 1):
            freeze(dims[d].label, f"{tracer.place()} picks entries of it by index")
            dims[d] = Dim(fresh(kept, "picked by index"))
        else:
            label = split_sum(dims[d].label, start)[1] if start else dims[d].label
            label = split_sum(label, kept)[0] if kept < label.root.size else label
            dims[d] = Dim(label, dims[d].origin)
    return [Traced(dims, source.weight)]


def _select(tracer: Tracer, call: Call) -> Result:
    source, d = tracer.of(call.inputs[0]), call.dim()
    freeze(source.dims[d].label, f"{tracer.place()} picks entries of it by index")
    dims = source.dims[:d] + source.dims[d + 1 :]
    return [Traced(list(dims), source.weight) for _ in call.outputs]


def _split(tracer: Tracer, call: Call) -> Result:
    source, d = tracer.of(call.inputs[0]), call.dim()
    rest, labels = source.dims[d].label, []
    for output in call.outputs[:-1]:
        head, rest = split_sum(rest, output.shape[d])
        labels.append(head)
    labels.append(rest)
    if (
        "with_sizes" not in call.name
        and len({output.shape[d] for output in call.outputs}) == 1
    ):
        for label in labels[1:]:
            unify(labels[0], label)
    origin = source.dims[d].origin
    return [
        Traced([*source.dims[:d], Dim(x, origin), *source.dims[d + 1 :]], source.weight)
        for x in labels
    ]


def _glu(tracer: Tracer, call: Call) -> Result:
    dims, d = tracer.dims(call.inputs[0]), call.dim(default=-1)
    value, gate = split_sum(dims[d].label, call.outputs[0].shape[d])
    unify(value, gate)
    return [
        Traced(
            [
                *[Dim(x.label) for x in dims[:d]],
                Dim(value),
                *[Dim(x.label) for x in dims[d + 1 :]],
            ]
        )
    ]


def _cat(tracer: Tracer, call: Call) -> Result:
    out = call.outputs[0]
    parts = [t for t in call.inputs if t.numel() or t.dim() == out.dim()]
    d = int(call.arguments.get("dim", 0)) % out.dim()
    dims: list[Dim] = []
    for i in range(out.dim()):
        column = [tracer.dims(t)[i] for t in parts]
        origin = frozenset[tuple[str, int]]().union(*(dim.origin for dim in column))
        if i == d:
            terms = [Label(1) if dim.label is UNIT else dim.label for dim in column]
            dims.append(Dim(concatenation(terms), origin))
        else:
            for dim in column[1:]:
                unify(column[0].label, dim.label)
            dims.append(Dim(column[0].label, origin))
    return [Traced(dims, all(tracer.of(t).weight for t in parts))]


def _stack(tracer: Tracer, call: Call) -> Result:
    out, d = call.outputs[0], int(call.arguments.get("dim", 0)) % call.outputs[0].dim()
    known = tracer.broadcast(call.inputs, call.inputs[0])
    index = Dim(fresh(out.shape[d], "an index of stacked parts"))
    return [Traced([*known.dims[:d], index, *known.dims[d:]], known.weight)]


def _constant_pad(tracer: Tracer, call: Call) -> Result:
    dims, pad = (
        [Dim(x.label) for x in tracer.dims(call.inputs[0])],
        call.arguments["pad"],
    )
    for i in range(len(pad) // 2):
        left, right, d = pad[2 * i], pad[2 * i + 1], len(dims) - 1 - i
        if left < 0 or right < 0:
            freeze(dims[d].label, f"{tracer.place()} crops it")
            dims[d] = Dim(fresh(call.outputs[0].shape[d], "cropped"))
        elif left or right:
            ends = [Label(n, "padding") for n in (left, right)]
            dims[d] = Dim(concatenation([ends[0], dims[d].label, ends[1]]))
    return [Traced(dims)]


def _ordered(tracer: Tracer, call: Call) -> Result:
    """Operations to which the order of entries matters: sorting, rolling, cumulative
    sums.
    """
    dims = tracer.dims(call.inputs[0])
    chosen = call.arguments.get("dims", call.arguments.get("dim", -1))
    for d in [chosen] if isinstance(chosen, int) else list(chosen) or range(len(dims)):
        freeze(
            dims[d].label,
            f"{tracer.place()}: {call.name} depends on the order of its entries",
        )
    shape = call.inputs[0].shape
    return [
        Traced(
            [
                Dim(x.label) if n == m else Dim(fresh(m, call.name))
                for x, n, m in zip(dims, shape, out.shape, strict=False)
            ]
        )
        for out in call.outputs
    ]


def _embedding(tracer: Tracer, call: Call) -> Result:
    weight, index = call.inputs
    rows, width = tracer.dims(weight)
    mark_end(rows.label, "vocabulary")
    tracer.produce([width])
    return [Traced([*[Dim(x.label) for x in tracer.dims(index)], Dim(width.label)])]


def _index(tracer: Tracer, call: Call) -> Result:
    source, out = tracer.dims(call.inputs[0]), call.outputs[0]
    indices = call.arguments["indices"]
    at = [i for i, index in enumerate(indices) if index is not None]
    for i in at:
        freeze(source[i].label, f"{tracer.place()} picks entries of it by index")
    if at != list(range(at[0], at[-1] + 1)) or any(
        indices[i].dtype == torch.bool for i in at
    ):
        return None
    picked = out.dim() - (len(source) - len(at))
    middle = _unknown(out.shape[at[0] : at[0] + picked], "picked by index")
    return [
        Traced(
            [
                *[Dim(x.label) for x in source[: at[0]]],
                *middle,
                *[Dim(x.label) for x in source[at[-1] + 1 :]],
            ]
        )
    ]


def _gather(tracer: Tracer, call: Call) -> Result:
    dims, d, out = list(tracer.dims(call.inputs[0])), call.dim(), call.outputs[0]
    freeze(dims[d].label, f"{tracer.place()} picks entries of it by index")
    same = [
        i != d and n == m
        for i, (n, m) in enumerate(zip(call.inputs[0].shape, out.shape, strict=True))
    ]
    return [
        Traced(
            [
                Dim(x.label) if ok else Dim(fresh(n))
                for x, ok, n in zip(dims, same, out.shape, strict=True)
            ]
        )
    ]


def _matmul(tracer: Tracer, call: Call) -> Result:
    first, second = call.inputs[-2:]
    a, b = tracer.dims(first), tracer.dims(second)
    batch: list[Dim] = []
    if first.dim() == 3:
        unify(a[0].label, b[0].label)
        batch = [Dim(a[0].label)]
        if not (tracer.of(first).weight or tracer.of(second).weight):
            tracer.trace.heads.add(a[0].label)
    tracer.contract(a[-1], b[-2] if second.dim() > 1 else b[0])
    tracer.produce([*a[:-1], *b[:-2], *(b[-1:] if second.dim() > 1 else [])])
    rows = [Dim(x.label) for x in a[len(batch) : -1]]
    columns = [Dim(b[-1].label)] if second.dim() > 1 else []
    known = Traced([*batch, *rows, *columns])
    tracer.count([dim.label for dim in known.dims] + [a[-1].label])
    if len(call.inputs) == 3:
        bias = call.inputs[0]
        tracer.fill(bias, "bias")
        call.outputs[0]._meristem = known  # type: ignore[attr-defined]
        tracer.broadcast([call.outputs[0], bias], call.outputs[0])
    return [known]


def _convolution(tracer: Tracer, call: Call) -> Result:
    x, weight, bias = call.inputs[0], call.arguments["weight"], call.arguments["bias"]
    groups, out = call.arguments["groups"], call.outputs[0]
    data, kernel = tracer.dims(x), tracer.dims(weight)
    for dim in [*data[2:], *kernel[2:]]:
        freeze(dim.label, "a spatial dimension")
    into, from_ = (1, 0) if call.arguments["transposed"] else (0, 1)
    if groups == 1:
        tracer.contract(data[1], kernel[from_])
        tracer.produce([kernel[into]])
        channels = kernel[into].label
    else:
        channels = _grouped(
            tracer, data[1], kernel, groups, call.arguments["transposed"]
        )
        for name in tracer.of(weight).parameters():
            tracer.trace.groups[name] = split_product(data[1].label, groups)[0]
    if bias is not None:
        tracer.fill(bias, "bias")
        unify(tracer.dims(bias)[0].label, channels)
    result = [
        Dim(data[0].label),
        Dim(channels),
        *_unknown(out.shape[2:], "a spatial dimension"),
    ]
    volume = [Label(n) for n in weight.shape[2:]]
    positions = data[2:] if call.arguments["transposed"] else result[2:]
    tracer.count(
        [
            data[0].label,
            *[p.label for p in positions],
            kernel[0].label,
            kernel[1].label,
            *volume,
        ]
    )
    return [Traced(result)]


def _grouped(
    tracer: Tracer, data: Dim, kernel: list[Dim], groups: int, transposed: bool
) -> Label:
    """Grouped convolution: in = g*i and out = g*o; the weight is (g*o, i), transposed
    (g*i, o).
    """
    group, inner = split_product(data.label, groups)
    if transposed:
        unify(data.label, kernel[0].label)
        if inner is not UNIT:
            tracer.trace.consumed |= kernel[0].origin
            freeze(
                inner,
                f"{tracer.place()}: the inner channels of a grouped transposed "
                "convolution",
            )
        return product([group, kernel[1].label])
    row_group, _ = split_product(kernel[0].label, groups)
    unify(group, row_group)
    if inner is not UNIT:
        tracer.contract(Dim(inner), kernel[1])
        tracer.produce([kernel[0]])
    return kernel[0].label


def _attention(tracer: Tracer, call: Call) -> Result:
    q, k, v = (tracer.dims(t) for t in call.inputs[:3])
    unify(q[0].label, k[0].label)
    unify(k[0].label, v[0].label)
    unify(k[1].label, v[1].label)
    unify(k[2].label, v[2].label)
    key_heads = k[1].label.root.size
    grouped = q[1].label.root.size != key_heads
    unify(
        split_product(q[1].label, key_heads)[0] if grouped else q[1].label, k[1].label
    )
    tracer.trace.heads.add(q[1].label)
    unify(q[3].label, k[3].label)
    mix(q[3].label, f"{tracer.place()}: attention scores sum over it")
    mask = call.arguments.get("attn_mask", call.arguments.get("attn_bias"))
    if mask is not None:
        for dim, other in zip(
            reversed(tracer.dims(mask)), (k[2], q[2], q[1], q[0]), strict=False
        ):
            if dim.label is not UNIT:
                unify(dim.label, other.label)
    tracer.count([q[i].label for i in (0, 1, 2, 3)] + [k[2].label])
    tracer.count([q[i].label for i in (0, 1, 2)] + [k[2].label, v[3].label])
    main = Traced([Dim(q[0].label), Dim(q[1].label), Dim(q[2].label), Dim(v[3].label)])
    return [main, *[_like(t, [Dim(x.label) for x in q[:3]]) for t in call.outputs[1:]]]


def _batch_norm(tracer: Tracer, call: Call) -> Result:
    x = call.inputs[0]
    dims = [Dim(d.label) for d in tracer.dims(x)]
    for key, fill in (
        ("weight", "one"),
        ("bias", "zero"),
        ("running_mean", "zero"),
        ("running_var", "one"),
    ):
        tensor = call.arguments.get(key)
        if tensor is not None:
            tracer.fill(tensor, fill)  # type: ignore[arg-type]
            unify(dims[1].label, tracer.dims(tensor)[0].label)
    tracer.trace.batch_norms.append(dims[1].label)
    return [Traced(dims), *[_like(t, [dims[1]]) for t in call.outputs[1:]]]


def _layer_norm(tracer: Tracer, call: Call) -> Result:
    dims = [Dim(d.label) for d in tracer.dims(call.inputs[0])]
    count = len(call.arguments["normalized_shape"])
    for key, fill in (("weight", "one"), ("bias", "zero")):
        tensor = call.arguments.get(key)
        if tensor is not None:
            tracer.fill(tensor, fill)  # type: ignore[arg-type]
            for normal, own in zip(dims[-count:], tracer.dims(tensor), strict=True):
                unify(normal.label, own.label)
    for dim in dims[-count:]:
        mix(dim.label, f"layer norm {tracer.place()}")
    if count == 1:
        tracer.trace.norms.append(
            Norm(tracer.stack.innermost, "layer_norm", dims[-1].label)
        )
    return [
        Traced(dims),
        *[_like(t, [*dims[:-count], *[Dim(UNIT)] * count]) for t in call.outputs[1:]],
    ]


def _group_norm(tracer: Tracer, call: Call) -> Result:
    dims = [Dim(d.label) for d in tracer.dims(call.inputs[0])]
    groups, inner = split_product(dims[1].label, call.arguments["group"])
    mix(inner, f"group norm {tracer.place()} normalises over the channels of a group")
    for key, fill in (("weight", "one"), ("bias", "zero")):
        tensor = call.arguments.get(key)
        if tensor is not None:
            tracer.fill(tensor, fill)  # type: ignore[arg-type]
            unify(dims[1].label, tracer.dims(tensor)[0].label)
            for name in tracer.of(tensor).parameters():
                tracer.trace.groups[name] = groups
    return [Traced(dims), *[_like(t, [dims[0], Dim(groups)]) for t in call.outputs[1:]]]


def _softmax(tracer: Tracer, call: Call) -> Result:
    dims = [Dim(d.label) for d in tracer.dims(call.inputs[0])]
    mix(dims[call.dim()].label, f"{tracer.place()}: softmax normalises over it")
    return [Traced(dims)]


def _reduce(tracer: Tracer, call: Call) -> Result:
    source = tracer.of(call.inputs[0])
    rank = len(source.dims)
    chosen = call.arguments.get("dim")
    chosen = (
        list(range(rank))
        if chosen is None or chosen == []
        else [chosen]
        if isinstance(chosen, int)
        else chosen
    )
    gone = {int(d) % rank for d in chosen} if rank else set()
    module = tracer.stack.modules.get(tracer.stack.innermost)
    inside_rms = isinstance(module, torch.nn.RMSNorm) and gone == {rank - 1}
    for d in gone:
        mix(
            source.dims[d].label,
            f"rms norm {tracer.place()}"
            if inside_rms
            else f"{tracer.place()}: {call.name} over it",
        )
    if inside_rms:
        tracer.trace.norms.append(
            Norm(tracer.stack.innermost, "rms_norm", source.dims[-1].label)
        )
    keep = call.arguments.get("keepdim", False)
    dims = [
        Dim(UNIT) if d in gone else dim
        for d, dim in enumerate(source.dims)
        if d not in gone or keep
    ]
    return [Traced(list(dims), source.weight) for _ in call.outputs]


def _spatial(tracer: Tracer, call: Call) -> Result:
    dims, out = tracer.dims(call.inputs[0]), call.outputs[0]
    lead = 2 if out.dim() >= 4 or "1d" in call.name or "linear1d" in call.name else 1
    for dim in dims[lead:]:
        freeze(dim.label, "a spatial dimension")
    return [
        Traced(
            [
                *[Dim(x.label) for x in dims[:lead]],
                *_unknown(t.shape[lead:], "a spatial dimension"),
            ]
        )
        for t in call.outputs
    ]


def _new(tracer: Tracer, call: Call) -> Result:
    return [Traced(_unknown(out.shape)) for out in call.outputs]


def _prelu(tracer: Tracer, call: Call) -> Result:
    x, slope = call.inputs
    tracer.fill(slope, "mean")
    if slope.numel() > 1:
        own = next(d for d in tracer.dims(slope) if d.label is not UNIT)
        unify(tracer.dims(x)[1].label, own.label)
    return [Traced([Dim(d.label) for d in tracer.dims(x)])]


def _created(tracer: Tracer, call: Call) -> Result:
    """Tensors that come from no tensor: ranges, zeros, masks."""
    return [Traced(_unknown(out.shape)) for out in call.outputs]


def _rows(rule: Rule, names: str, sign: Sign = "any") -> dict[str, Operation]:
    return dict.fromkeys(names.split(), Operation(rule, sign))


OPERATIONS: dict[str, Operation] = {
    **_rows(_view, "view _unsafe_view reshape flatten", "kept"),
    **_rows(_view, "_reshape_alias"),
    **_rows(_permute, "permute transpose t", "kept"),
    **_rows(_permute, "transpose_ t_ numpy_T"),
    **_rows(_unsqueeze, "unsqueeze", "kept"),
    **_rows(_unsqueeze, "unsqueeze_"),
    **_rows(_squeeze, "squeeze", "kept"),
    **_rows(_squeeze, "squeeze_"),
    **_rows(_expand, "expand", "kept"),
    **_rows(_repeat, "repeat"),
    **_rows(_slice, "slice", "kept"),
    **_rows(_select, "select", "kept"),
    **_rows(_select, "unbind"),
    **_rows(_split, "split split_with_sizes chunk unsafe_split unsafe_chunk"),
    **_rows(_glu, "glu"),
    **_rows(_cat, "cat", "kept"),
    **_rows(_stack, "stack"),
    **_rows(_constant_pad, "constant_pad_nd"),
    **_rows(_ordered, "roll flip sort topk cumsum cumprod"),
    **_rows(_embedding, "embedding"),
    **_rows(_index, "index"),
    **_rows(_gather, "index_select gather"),
    **_rows(_matmul, "mm addmm bmm baddbmm mv dot"),
    **_rows(_convolution, "convolution"),
    **_rows(_layer_norm, "native_layer_norm"),
    **_rows(_group_norm, "native_group_norm"),
    **_rows(_softmax, "_softmax _safe_softmax softmax", "positive"),
    **_rows(_softmax, "_log_softmax"),
    **_rows(_reduce, "mean sum", "kept"),
    **_rows(_reduce, "amax amin var std prod linalg_vector_norm norm logsumexp"),
    **_rows(_reduce, "any all argmax argmin max min var_mean median"),
    **_rows(_new, "new_zeros new_ones new_full new_empty new_empty_strided"),
    **_rows(_prelu, "_prelu_kernel prelu"),
    **_rows(_pointwise, "relu relu_ sigmoid exp", "positive"),
    **_rows(_pointwise, "add mul clone alias detach contiguous dropout", "kept"),
    **_rows(_pointwise, "native_dropout", "kept"),
    **_rows(_pointwise, "_to_copy lift_fresh lift_fresh_copy bernoulli bernoulli_"),
    **_rows(_pointwise, "copy_ fill_ zero_ tril triu empty_like zeros_like ones_like"),
    **_rows(_pointwise, "full_like rand_like randn_like masked_fill masked_fill_"),
    **_rows(_pointwise, "floor_divide hardswish hardswish_ silu_ rrelu_with_noise"),
    **_rows(_pointwise, "uniform_ normal_ clamp clamp_ clamp_min clamp_max"),
    **_rows(_spatial, "max_pool1d max_pool2d_with_indices avg_pool2d", "kept"),
    **_rows(_spatial, "max_pool3d_with_indices _adaptive_avg_pool2d", "kept"),
}
"""What is known of each operation by its name. A new one is one row."""

# Operations with one kernel per backend, by a part of their names.
_FAMILIES: tuple[tuple[str, Rule], ...] = (
    ("scaled_dot_product", _attention),
    ("batch_norm", _batch_norm),
)


def operation_of(call: Call) -> Operation | None:
    """The row for a call, or None where nothing is known of the operation."""
    if not call.inputs:
        return Operation(_created)
    if call.name in OPERATIONS:
        return OPERATIONS[call.name]
    for part, rule in _FAMILIES:
        if part in call.name:
            return Operation(rule)
    spatial = any(part in call.name for part in ("pool", "upsample", "_pad"))
    if spatial and call.outputs[0].dim() >= 3:
        return Operation(_spatial)
    if torch.Tag.pointwise in call.func.tags:
        return Operation(_pointwise)
    return None
