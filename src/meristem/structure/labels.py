"""The algebra of dimension labels.

Every dimension of every tensor in a traced forward pass carries a `Label`. A label is
an *atom*, an ordered *product* of labels (heads x head_dim, channels x 7 x 7 after a
flatten) or an ordered *sum* of labels (after a concatenation or before a split).
Operations that force two dimensions to agree `unify` their labels; what remains are the
independent sizes of the network. Because products and sums are ordered, the algebra
answers the two questions that surgery asks: how large a dimension becomes when atoms
change (`size`), and where every new entry comes from (`sources`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

# Reasons that several operations give.
SPATIAL = "a spatial dimension"
COMPLEX = "real and imaginary parts"
STACKED = "it counts tensors that the code stacks"

Sources = NDArray[np.int64]
"""For every entry of a resized dimension, the old index that it continues, or -1 where
it is new.
"""


class Conflict(Exception):
    """Two labels cannot be brought into agreement, or a label cannot be cut where an
    operation cuts it.
    """


class Label:
    """One dimension's identity: a union-find node that may be refined into a product or
    a sum of finer labels.
    """

    __slots__ = ("composition", "end", "frozen", "mixes", "parent", "parts", "size")

    def __init__(self, size: int, frozen: str | None = None) -> None:
        self.size = size
        self.parent: Label | None = None
        self.composition: Literal["atom", "product", "sum"] = "atom"
        self.parts: list[Label] = []
        self.frozen = frozen
        self.end: str | None = None
        self.mixes: set[str] = set()

    @property
    def root(self) -> Label:
        # Chains stay short: a label is merged once, into the one that knows more.
        node = self
        while node.parent is not None:
            node = node.parent
        return node

    @property
    def is_atom(self) -> bool:
        return self.composition == "atom"

    @property
    def is_product(self) -> bool:
        return self.composition == "product"

    @property
    def is_sum(self) -> bool:
        return self.composition == "sum"

    def __repr__(self) -> str:
        root = self.root
        if root.is_atom:
            return str(root.size)
        sign = "*" if root.is_product else "+"
        return f"({sign.join(map(repr, root.parts))})"


# Dimensions of size 1 broadcast against everything, so one label serves them all.
UNIT = Label(1, "a broadcast dimension of size 1")


def fresh(size: int, frozen: str | None = None) -> Label:
    """A label for a dimension that nothing is known about; size-1 dimensions broadcast
    and share one label.
    """
    return UNIT if size == 1 else Label(size, frozen)


def atoms(label: Label) -> Iterator[Label]:
    """The finest labels below `label`, in order, with repetitions where an atom stands
    in several places.
    """
    root = label.root
    if root.is_atom:
        yield root
    for part in root.parts:
        yield from atoms(part)


def freeze(label: Label, reason: str) -> None:
    """Forbid every atom below `label` to change; the first reason is kept."""
    for atom in atoms(label):
        # The first reason is the one nearest to the cause.
        if atom is not UNIT and atom.frozen is None:
            atom.frozen = reason


def freeze_at(label: Label, position: int, reason: str) -> None:
    """Forbid the part of a dimension to change that one entry lies in.

    Of a sum it is one term: the others may grow beside it.
    """
    root = label.root
    if not root.is_sum:
        freeze(root, reason)
        return
    position %= root.size
    for part in root.parts:
        if position < part.root.size:
            freeze_at(part, position, reason)
            return
        position -= part.root.size


def mix(label: Label, reason: str) -> None:
    """Record that an operation combines the entries of `label`, so that new entries
    disturb old ones.
    """
    for atom in atoms(label):
        atom.mixes.add(reason)


def mark_end(label: Label, end: str) -> None:
    """Mark the atoms below `label` as an end of the model (its classes, its
    vocabulary).
    """
    for atom in atoms(label):
        # Dimensions of size 1 are no classes and no vocabulary.
        if atom is not UNIT and atom.end is None:
            atom.end = end


def _refine(
    label: Label, kind: Literal["product", "sum"], parts: Sequence[Label]
) -> None:
    root = label.root
    root.composition, root.parts = kind, list(parts)
    for part in parts:
        _inherit(part, root)


def _inherit(heir: Label, origin: Label) -> None:
    if origin.frozen is not None:
        freeze(heir, origin.frozen)
    if origin.end is not None:
        mark_end(heir, origin.end)
    for reason in origin.mixes:
        mix(heir, reason)


def _flat(labels: Sequence[Label], kind: Literal["product", "sum"]) -> list[Label]:
    flat: list[Label] = []
    for label in labels:
        root = label.root
        if root.composition == kind:
            flat += _flat(root.parts, kind)
        # A factor of 1 changes no product; a term of 1 does change a sum.
        elif not (kind == "product" and root is UNIT):
            flat.append(root)
    return flat


def product(labels: Sequence[Label]) -> Label:
    """The label of a dimension that runs over all combinations of `labels`, the last
    one fastest.
    """
    parts = _flat(labels, "product")
    # A product of one factor is that factor.
    if len(parts) < 2:
        return parts[0] if parts else UNIT
    result = Label(math.prod(part.size for part in parts))
    result.composition, result.parts = "product", parts
    return result


def concatenation(labels: Sequence[Label]) -> Label:
    """The label of a dimension that runs through `labels` one after the other."""
    # Empty parts of a concatenation add no entries.
    parts = [part for part in _flat(labels, "sum") if part.size]
    if len(parts) == 1:
        return parts[0]
    result = Label(sum(part.size for part in parts))
    result.composition, result.parts = "sum", parts
    return result


def split_product(label: Label, outer: int) -> tuple[Label, Label]:
    """Cut `label` into an outer factor of size `outer` and the inner rest, refining it
    where it is still an atom.
    """
    root = label.root
    if outer == 1:
        return UNIT, root
    if outer == root.size:
        return root, UNIT
    # Only a view that cuts the dimension evenly says what its parts are.
    if root.size % outer:
        raise Conflict(
            f"a dimension of size {root.size} cannot be cut into {outer} equal parts"
        )
    if root.is_atom:
        first, second = Label(outer), Label(root.size // outer)
        _refine(root, "product", [first, second])
        return first, second
    # Every term is cut into rows of the same length: (a + b) x c.
    if root.is_sum:
        return _split_sum_of_equal_rows(root, root.size // outer)
    taken: list[Label] = []
    # Whole factors are taken from the left, until one must be cut itself.
    rest = _flat([root], "product")
    while outer > 1:
        factor = rest.pop(0)
        if outer % factor.size == 0:
            taken.append(factor)
            outer //= factor.size
        elif factor.size % outer == 0:
            first, second = split_product(factor, outer)
            taken.append(first)
            rest.insert(0, second)
            outer = 1
        else:
            raise Conflict(f"a dimension {root!r} cannot be cut at {outer}")
    return product(taken), product(rest)


def _split_sum_of_equal_rows(root: Label, inner: int) -> tuple[Label, Label]:
    terms = _flat([root], "sum")
    if any(term.size % inner for term in terms):
        raise Conflict(f"a concatenation {root!r} cannot be cut into rows of {inner}")
    pairs = [split_product(term, term.size // inner) for term in terms]
    for _, second in pairs[1:]:
        unify(pairs[0][1], second)
    # Each term is one row: the outer index only numbers stacked parts.
    if all(term.size == inner for term in terms):
        return Label(len(terms), STACKED), pairs[0][1]
    return concatenation([first for first, _ in pairs]), pairs[0][1]


def split_sum(label: Label, position: int) -> tuple[Label, Label]:
    """Cut `label` at `position` into what comes before and what comes after."""
    root = label.root
    # A cut at either end would leave an empty label.
    if not 0 < position < root.size:
        raise Conflict(f"a dimension of size {root.size} cannot be cut at {position}")
    if root.is_atom:
        left, right = Label(position), Label(root.size - position)
        _refine(root, "sum", [left, right])
        return left, right
    if root.is_sum:
        taken: list[Label] = []
        rest = _flat([root], "sum")
        while position:
            term = rest.pop(0)
            if term.size <= position:
                taken.append(term)
                position -= term.size
            else:
                left, right = split_sum(term, position)
                taken.append(left)
                rest.insert(0, right)
                position = 0
        return concatenation(taken), concatenation(rest)
    # Of a product the slowest factor is cut: the others lie inside each of its entries.
    factors = _flat([root], "product")
    inner = root.size // factors[0].size
    if position % inner:
        raise Conflict(f"a dimension {root!r} cannot be cut at {position}")
    left, right = split_sum(factors[0], position // inner)
    return product([left, *factors[1:]]), product([right, *factors[1:]])


def unify(first: Label, second: Label) -> None:
    """Make two labels of one size the same label; what cannot agree is frozen with the
    reason.
    """
    a, b = first.root, second.root
    if a is b:
        return
    # A dimension that meets a broadcast one would stop broadcasting if it grew.
    if a is UNIT or b is UNIT:
        freeze(b if a is UNIT else a, "meets a broadcast dimension of size 1")
        return
    if a.size != b.size:
        raise Conflict(f"sizes {a.size} and {b.size} meet")
    # A label that is a part of the other: the rest of that has size 1, and must keep it.
    if _stands_in(a, b) or _stands_in(b, a):
        for label in (a, b):
            freeze(label, "a dimension meets its own product with one of size 1")
        return
    try:
        if not a.is_atom and not b.is_atom:
            _unify_structure(a, b)
    except Conflict as conflict:
        freeze(a, str(conflict))
        freeze(b, str(conflict))
        return
    a, b = a.root, b.root
    if a is b:
        return
    # The finer label survives, since it tells more.
    if a.is_atom:
        a, b = b, a
    b.parent = a
    _inherit(a, b)


def _stands_in(part: Label, whole: Label) -> bool:
    """Whether a label is one of those that another is made of."""
    inner = [part_of.root for part_of in whole.root.parts]
    return any(one is part or _stands_in(part, one) for one in inner)


def _unify_structure(a: Label, b: Label) -> None:
    if a.is_product and b.is_product:
        _zip_parts(
            a, b, "product", split_product, lambda label, size: label.size % size == 0
        )
    elif a.is_sum and b.is_sum:
        _zip_parts(a, b, "sum", split_sum, lambda label, size: True)
    else:
        # A product meets a sum: the sum distributes over the inner factors.
        whole, parts = (a, b) if a.is_product else (b, a)
        factors = _flat([whole], "product")
        outer, inner = split_product(parts, factors[0].size)
        unify(factors[0], outer)
        unify(product(factors[1:]), inner)


def _zip_parts(
    a: Label,
    b: Label,
    kind: Literal["product", "sum"],
    split: Callable[[Label, int], tuple[Label, Label]],
    fits: Callable[[Label, int], bool],
) -> None:
    # Both sides are consumed from the left; the longer part is cut to fit the shorter.
    left, right = _flat([a], kind), _flat([b], kind)
    while left and right:
        p, q = left[0].root, right[0].root
        if p.size == q.size:
            unify(p, q)
            left.pop(0)
            right.pop(0)
        elif p.size > q.size and fits(p, q.size):
            head, left[0] = split(p, q.size)
            unify(head, q)
            right.pop(0)
        elif q.size > p.size and fits(q, p.size):
            head, right[0] = split(q, p.size)
            unify(p, head)
            left.pop(0)
        else:
            raise Conflict(f"{p!r} and {q!r} meet")


def regroup(labels: Sequence[Label], sizes: Sequence[int]) -> list[Label]:
    """The labels of a view: the factors of `labels`, in order, dealt out to dimensions
    of the given `sizes`.
    """
    factors = _flat(labels, "product")
    result: list[Label] = []
    try:
        for size in sizes:
            taken: list[Label] = []
            # A view of size 1 still uses up a factor of size 1, where one is next.
            while size > 1 or (not taken and factors and factors[0].root.size == 1):
                factor = factors.pop(0).root
                if factor.is_product:
                    factors[:0] = _flat([factor], "product")
                elif size % factor.size == 0:
                    taken.append(factor)
                    size //= factor.size
                elif factor.size % size == 0:
                    first, second = split_product(factor, size)
                    taken.append(first)
                    factors.insert(0, second)
                    size = 1
                else:
                    raise Conflict(f"a view cuts {list(labels)!r} into {list(sizes)}")
            result.append(product(taken))
        # What is left over has size 1: a dimension that the view has dropped.
        for left in factors:
            freeze(left, "a view drops a dimension of size 1")
    except (Conflict, IndexError) as conflict:
        for label in labels:
            freeze(label, str(conflict) or "a view regroups it")
        return [fresh(size, "a view regroups it") for size in sizes]
    return result


Changes = Mapping[Label, Sources]
"""For every atom that changes, its `Sources`."""


def size(label: Label, changes: Changes) -> int:
    """The size of a dimension after `changes`."""
    root = label.root
    if root.is_atom:
        return len(changes[root]) if root in changes else root.size
    sizes = [size(part, changes) for part in root.parts]
    return math.prod(sizes) if root.is_product else sum(sizes)


def sources(label: Label, changes: Changes) -> Sources:
    """Where every entry of a dimension comes from after `changes`: its old index, or -1
    where it is new.
    """
    root = label.root
    if root.is_atom:
        return changes[root] if root in changes else np.arange(root.size)
    parts = [(part.root.size, sources(part, changes)) for part in root.parts]
    if root.is_sum:
        # Terms of a sum follow each other: their entries are shifted by those before.
        offsets = np.cumsum([0] + [old for old, _ in parts])
        shifted = [
            np.where(new < 0, -1, new + start)
            for start, (_, new) in zip(offsets, parts, strict=False)
        ]
        return np.concatenate(shifted)
    result = np.zeros(1, dtype=np.int64)
    for old, new in parts:
        # Row-major order: the last factor runs fastest.
        combined = result[:, None] * old + new[None, :]
        result = np.where(
            (result[:, None] < 0) | (new[None, :] < 0), -1, combined
        ).ravel()
    return result


def owners(label: Label, atom: Label, changes: Changes) -> Sources:
    """For every entry of a dimension after `changes`, the entry of `atom` that it
    belongs to, or -1.
    """
    root = label.root
    if root.is_atom:
        count = size(root, changes)
        return np.arange(count) if root is atom.root else np.full(count, -1)
    parts = [owners(part, atom, changes) for part in root.parts]
    if root.is_sum:
        return np.concatenate(parts)
    result = parts[0]
    for new in parts[1:]:
        result = np.where(result[:, None] >= 0, result[:, None], new[None, :]).ravel()
    return result


def multiply(label: Label, first: Label, second: Label) -> bool:
    """Whether two atoms stand in different factors of one product at or below `label`."""
    root = label.root
    if root.is_product:
        holds = [(first in atoms(part), second in atoms(part)) for part in root.parts]
        # Two atoms in one factor do not multiply each other, one in each of two do.
        if any(a and not b for a, b in holds) and any(b and not a for a, b in holds):
            return True
    return any(multiply(part, first, second) for part in root.parts)


def positions(label: Label, atom: Label, changes: Changes) -> Sources:
    """The places of every entry of `atom` along a dimension: an array (entries, places
    per entry).
    """
    owner = owners(label, atom, changes)
    # A stable sort groups the places by entry and keeps their order; -1 sorts first.
    where = np.argsort(owner, kind="stable")[int((owner < 0).sum()) :]
    return where.reshape(size(atom, changes), -1)
