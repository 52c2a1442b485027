"""Operations that sum over products: matrix products, convolutions, attention."""

from __future__ import annotations

from torch import Tensor

from meristem.structure.labels import (
    SPATIAL,
    UNIT,
    Label,
    freeze,
    mark_end,
    mix,
    product,
    split_product,
    unify,
)
from meristem.structure.ops.rules import Result, as_data, auxiliary, unknown
from meristem.structure.tracer import Call, Dim, Traced, Tracer


def embedding(tracer: Tracer, call: Call) -> Result:
    weight, where = call.inputs
    rows, width = tracer.dims(weight)
    mark_end(rows.label, "vocabulary")
    tracer.produce([width])
    return [Traced([*as_data(tracer.dims(where)), Dim(width.label)])]


def bag(tracer: Tracer, call: Call) -> Result:
    """Sums or means of rows of a table; the other outputs are the kernel's own."""
    rows, width = tracer.dims(call.arguments["weight"])
    mark_end(rows.label, "vocabulary")
    tracer.produce([width])
    bags = unknown(call.outputs[0].shape[:1])
    main = Traced([*bags, Dim(width.label)])
    others = []
    for tensor in call.outputs[1:]:
        others.append(Traced(unknown(tensor.shape), lawful=False))
    return [main, *others]


def distances(tracer: Tracer, call: Call) -> Result:
    """(..., P, M) and (..., R, M) -> (..., P, R)."""
    first, second = (tracer.dims(tensor) for tensor in call.inputs[:2])
    unify(first[-1].label, second[-1].label)
    mix(first[-1].label, f"{tracer.place()}: distances sum over it")
    columns = as_data(second[-2:-1])
    return [Traced([*as_data(first[:-1]), *columns])]


def matmul(tracer: Tracer, call: Call) -> Result:
    """mm, mv, dot and bmm; with a first input more, what is added to the product."""
    first, second = call.inputs[-2:]
    if tracer.of(first).weight and tracer.of(second).weight and len(call.inputs) == 2:
        return _of_weights(tracer, first, second)
    a, b = tracer.dims(first), tracer.dims(second)
    is_matrix = second.dim() > 1
    batch: list[Dim] = []
    if first.dim() == 3:
        unify(a[0].label, b[0].label)
        batch = as_data(a[:1])
        # A batched product of two computed tensors: attention written by hand.
        if not tracer.of(first).weight and not tracer.of(second).weight:
            tracer.trace.heads.add(a[0].label)
    tracer.contract(a[-1], b[-2] if is_matrix else b[0])
    columns = b[-1:] if is_matrix else []
    # Whatever side is a weight makes units along its other dimension.
    tracer.produce([*a[:-1], *b[:-2], *columns])
    rows = as_data(a[len(batch) : -1])
    known = Traced([*batch, *rows, *as_data(columns)])
    tracer.count([*(dim.label for dim in known.dims), a[-1].label])
    if len(call.inputs) == 3:
        _add_bias(tracer, call, known)
    return [known]


def bilinear(tracer: Tracer, call: Call) -> Result:
    """(N, I) and (N, J) with a weight (O, I, J) -> (N, O), as nn.Bilinear has it."""
    first, weight, second = call.inputs[:3]
    if first.dim() != 2 or weight.dim() != 3 or second.dim() != 2:
        return None
    rows, left = tracer.dims(first)
    others, right = tracer.dims(second)
    made, reads_left, reads_right = tracer.dims(weight)
    unify(rows.label, others.label)
    tracer.contract(left, reads_left)
    tracer.contract(right, reads_right)
    tracer.produce([made])
    tracer.count([rows.label, made.label, left.label, right.label])
    return [Traced(as_data([rows, made]))]


def grouped(tracer: Tracer, call: Call) -> Result:
    """Rows by experts, (T, K) and (E, K, N) -> (T, N): whose row it is, offsets say."""
    first, second = call.inputs[:2]
    if first.dim() != 2 or second.dim() != 3:
        return None
    rows, inner = tracer.dims(first)
    experts, read, made = tracer.dims(second)
    freeze(experts.label, f"it counts the experts among which {tracer.place()} chooses")
    tracer.contract(inner, read)
    tracer.produce([made])
    tracer.count([rows.label, inner.label, made.label])
    return [Traced([*as_data([rows]), *as_data([made])])]


def _of_weights(tracer: Tracer, first: Tensor, second: Tensor) -> Result:
    """A product of weights is a weight: what is read of it, and what is made by it, the
    data will tell.
    """
    a, b = tracer.dims(first), tracer.dims(second)
    rows, columns = a[:-1], b[-1:] if second.dim() > 1 else []
    inner = b[-2] if second.dim() > 1 else b[0]
    if first.dim() == 3:
        unify(a[0].label, b[0].label)
    unify(a[-1].label, inner.label)
    tracer.trace.consumed |= a[-1].origin
    tracer.trace.produced |= inner.origin
    labels = [dim.label for dim in (*rows, *columns)]
    tracer.count([*labels, a[-1].label])
    return [Traced([*rows, *columns], weight=True)]


def _add_bias(tracer: Tracer, call: Call, known: Traced) -> None:
    bias, out = call.inputs[0], call.outputs[0]
    tracer.fill(bias, "bias")
    # The bias is broadcast against the product as an addition would be.
    out._meristem = known  # type: ignore[attr-defined]
    tracer.broadcast([out, bias], out)


def convolution(tracer: Tracer, call: Call) -> Result:
    weight, bias = call.arguments["weight"], call.arguments["bias"]
    transposed, out = call.arguments["transposed"], call.outputs[0]
    data, kernel = tracer.dims(call.inputs[0]), tracer.dims(weight)
    for dim in (*data[2:], *kernel[2:]):
        freeze(dim.label, SPATIAL)
    channels = _channels(tracer, call, data[1], kernel)
    if bias is not None:
        tracer.fill(bias, "bias")
        unify(tracer.dims(bias)[0].label, channels)
    positions = unknown(out.shape[2:], SPATIAL)
    # A transposed convolution multiplies at every position that it reads.
    counted = data[2:] if transposed else positions
    volume = [Label(size) for size in weight.shape[2:]]
    labels = [dim.label for dim in (data[0], *counted, *kernel[:2])]
    tracer.count([*labels, *volume])
    return [Traced([Dim(data[0].label), Dim(channels), *positions])]


def _channels(tracer: Tracer, call: Call, data: Dim, kernel: list[Dim]) -> Label:
    """The label of the channels that a convolution gives."""
    groups, transposed = call.arguments["groups"], call.arguments["transposed"]
    if groups > 1:
        channels = _grouped(tracer, data, kernel, groups, transposed)
        for name in tracer.of(call.arguments["weight"]).parameters():
            # The number of groups follows, where whole groups are added.
            tracer.trace.groups[name] = split_product(data.label, groups)[0]
        return channels
    into, from_ = (kernel[1], kernel[0]) if transposed else (kernel[0], kernel[1])
    tracer.contract(data, from_)
    tracer.produce([into])
    return into.label


def _grouped(
    tracer: Tracer, data: Dim, kernel: list[Dim], groups: int, transposed: bool
) -> Label:
    """Grouped convolution: in = g i and out = g o.

    The weight is (g o, i), transposed (g i, o).
    """
    group, inner = split_product(data.label, groups)
    if transposed:
        unify(data.label, kernel[0].label)
        if inner is not UNIT:
            tracer.trace.consumed |= kernel[0].origin
            which = "the inner channels of a grouped transposed convolution"
            freeze(inner, f"{tracer.place()}: {which}")
        return product([group, kernel[1].label])
    row_group, _ = split_product(kernel[0].label, groups)
    unify(group, row_group)
    if inner is not UNIT:
        tracer.contract(Dim(inner), kernel[1])
        tracer.produce([kernel[0]])
    return kernel[0].label


def attention(tracer: Tracer, call: Call) -> Result:
    """Every kernel of scaled dot-product attention: (batch, heads, positions, width)."""
    q, k, v = (tracer.dims(tensor) for tensor in call.inputs[:3])
    unify(q[0].label, k[0].label)
    for d in (0, 1, 2):
        unify(k[d].label, v[d].label)
    query_heads, key_heads = q[1].label, k[1].label.root.size
    tracer.trace.heads.add(query_heads)
    tracer.trace.key_heads.add(k[1].label)
    if query_heads.root.size != key_heads:  # several queries share a key
        query_heads, _ = split_product(query_heads, key_heads)
    unify(query_heads, k[1].label)
    unify(q[3].label, k[3].label)
    mix(q[3].label, f"{tracer.place()} multiplies queries and keys and sums over it")
    mask = call.arguments.get("attn_mask", call.arguments.get("attn_bias"))
    if mask is not None:
        _follow_mask(tracer, mask, [k[2], q[2], q[1], q[0]])
    rows = [dim.label for dim in q[:3]]
    # First the scores, then their product with the values.
    tracer.count([*rows, q[3].label, k[2].label])
    tracer.count([*rows, k[2].label, v[3].label])
    leading = as_data(q[:3])
    main = Traced([*leading, Dim(v[3].label)])
    others = [auxiliary(tensor, list(leading)) for tensor in call.outputs[1:]]
    return [main, *others]


def _follow_mask(tracer: Tracer, mask: Tensor, dims: list[Dim]) -> None:
    """The dimensions of a mask, the last one first, are those of the scores."""
    for own, dim in zip(reversed(tracer.dims(mask)), dims, strict=False):
        if own.label is not UNIT:
            unify(own.label, dim.label)
