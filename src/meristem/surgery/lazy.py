"""Tensors that exist only while an operation reads them.

A check in float64 on random weights needs no copy of the model: large weights are
products of two thin random factors, and are multiplied out where an operation cannot
use these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from meristem.core.axis import Axis, Place
from meristem.core.change import Plan, TensorChange

RANK = 8
"""Rank of the random weights; a wrong edit shows at any."""
LARGE = 2**16
"""Entries from which a tensor is not held in full."""
PIECE = 2**17
"""Entries that are looked at together where all of them would take much memory."""

aten = torch.ops.aten


class Lazy(Tensor):
    """A tensor that `make` gives whenever it is read."""

    make: Callable[[], Tensor]

    def __new__(
        cls, make: Callable[[], Tensor], like: Tensor, dtype: torch.dtype
    ) -> Any:
        lazy = Tensor._make_wrapper_subclass(
            cls, like.shape, dtype=dtype, device=like.device
        )
        lazy.make = make
        return lazy

    def __init__(
        self, make: Callable[[], Tensor], like: Tensor, dtype: torch.dtype
    ) -> None:
        pass

    def again(self) -> Lazy:
        return Lazy(self.make, self, self.dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # Parameters are made of detached tensors, new blocks of clones.
        if func in (aten.detach.default, aten.clone.default, aten.alias.default):
            return args[0].again()
        shortcut = _SHORTCUTS.get(func)
        if shortcut is not None and not kwargs:
            result = shortcut(*args)
            if result is not NotImplemented:
                return result
        # Whatever else reads it gets the real thing, for as long as it needs it.
        args, kwargs = pytree.tree_map(_made, (args, kwargs))
        return func(*args, **kwargs)

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"{type(self).__name__}{tuple(self.shape)}"


class Factored(Lazy):
    """rows @ columns, with rows (n, rank) and columns (rank, *other dimensions)."""

    rows: Tensor
    columns: Tensor

    def __new__(cls, rows: Tensor, columns: Tensor) -> Any:
        lazy = Tensor._make_wrapper_subclass(
            cls, (len(rows), *columns.shape[1:]), dtype=rows.dtype, device=rows.device
        )
        lazy.rows, lazy.columns = rows, columns
        lazy.make = lambda: torch.tensordot(rows, columns, 1)
        return lazy

    def __init__(self, rows: Tensor, columns: Tensor) -> None:
        pass

    def again(self) -> Factored:
        return Factored(self.rows, self.columns)


class Doubled(Lazy):
    """A real tensor in float64."""

    base: Tensor

    def __new__(cls, base: Tensor) -> Any:
        lazy = Tensor._make_wrapper_subclass(
            cls, base.shape, dtype=torch.float64, device=base.device
        )
        lazy.base = base
        lazy.make = base.double
        return lazy

    def __init__(self, base: Tensor) -> None:
        pass

    def again(self) -> Doubled:
        return Doubled(self.base)

    def after(self, left: Tensor) -> Tensor:
        """left @ self, without all of it at once."""
        step = max(1, PIECE // max(len(self.base), 1))
        parts = []
        for start in range(0, self.base.shape[1], step):
            parts.append(left @ self.base[:, start : start + step].double())
        return torch.cat(parts, 1)


def _made(value: Any) -> Any:
    return value.make() if isinstance(value, Lazy) else value


def _transposed(weight: Tensor) -> Any:
    if isinstance(weight, Factored) and weight.dim() == 2:
        return Factored(weight.columns.t(), weight.rows.t())
    if isinstance(weight, Doubled) and weight.dim() == 2:
        return Doubled(weight.base.t())
    return NotImplemented


def _product(left: Tensor, right: Tensor) -> Any:
    if isinstance(left, Lazy) or right.dim() != 2:
        return NotImplemented
    if isinstance(right, Factored):
        return (left @ right.rows) @ right.columns
    return right.after(left) if isinstance(right, Doubled) else NotImplemented


def _sum_and_product(added: Tensor, left: Tensor, right: Tensor) -> Any:
    product = _product(left, right)
    if product is NotImplemented or isinstance(added, Lazy):
        return NotImplemented
    return added + product


def _looked_up(weight: Tensor, where: Tensor, *options: Any) -> Any:
    if isinstance(weight, Factored) and weight.dim() == 2:
        return weight.rows[where] @ weight.columns
    if isinstance(weight, Doubled):
        return weight.base[where].double()
    return NotImplemented


# What can be done with the factors alone.
_SHORTCUTS: dict[Any, Callable[..., Any]] = {
    aten.t.default: _transposed,
    aten.mm.default: _product,
    aten.addmm.default: _sum_and_product,
    aten.embedding.default: _looked_up,
}


def doubled(value: Tensor) -> Tensor:
    """A floating-point tensor in float64; a large one only while it is read."""
    if not value.is_floating_point():
        return value
    if value.numel() < LARGE:
        return value.double()
    lazy: Tensor = Doubled(value)
    return lazy


def zeros(like: Tensor) -> Tensor:
    """Zeros; many of them only while they are read."""
    if like.numel() < LARGE:
        return torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    shape, dtype, device = like.shape, like.dtype, like.device
    lazy: Tensor = Lazy(
        lambda: torch.zeros(shape, dtype=dtype, device=device), like, dtype
    )
    return lazy


def scaled(value: Tensor, factor: float) -> Tensor:
    """A tensor times a number."""
    if isinstance(value, Factored):
        factored: Tensor = Factored(factor * value.rows, value.columns)
        return factored
    product: Tensor = factor * value
    return product


def random_matrix(
    like: Tensor, generator: torch.Generator, dtype: torch.dtype = torch.float64
) -> Tensor:
    """A random weight with entries of variance 1 / fan-in, factored where it is large.

    Args:
        like: The tensor whose shape and device it has; two dimensions or more.
        generator: The source of randomness.
        dtype: Its dtype.
    """
    shape = tuple(like.shape)
    # Outputs of unit variance, so that no layer drowns another.
    fan = max(1, like.numel() // max(shape[0], 1))

    def normal(*sizes: int) -> Tensor:
        drawn = torch.randn(sizes, generator=generator, dtype=torch.float64)
        return drawn.to(device=like.device, dtype=dtype)

    if like.numel() < LARGE:
        full: Tensor = normal(*shape) / fan**0.5
        return full
    rank = min(RANK, shape[0], fan)
    # The variance of a product of factors is the product of theirs, times the rank.
    columns = normal(rank, *shape[1:]) / (rank * fan) ** 0.5
    factored: Tensor = Factored(normal(shape[0], rank), columns)
    return factored


# A growth acts on each dimension of a weight by itself: on its rows, or on its columns.
# What is known of growing plain tensors therefore serves the factors as it is.


def _factor(place: Place) -> Place:
    """The factor's dimension that stands for a dimension of its product."""
    if place.dim == 0:
        return Place(f"{place.name}@rows", 0)
    return Place(f"{place.name}@columns", place.dim)


def split(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values with the two factors in place of every factored one."""
    parts: dict[str, Tensor] = {}
    for name, value in values.items():
        if isinstance(value, Factored):
            parts[f"{name}@rows"] = value.rows
            parts[f"{name}@columns"] = value.columns
        else:
            parts[name] = value
    return parts


def joined(
    parts: Mapping[str, Tensor], beside: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The values whose factors were grown; a factor that did not grow is in `beside`."""
    values: dict[str, Tensor] = {}
    for name, value in parts.items():
        stem, at, _ = name.rpartition("@")
        if not at:
            values[name] = value
            continue
        rows, columns = f"{stem}@rows", f"{stem}@columns"
        values[stem] = Factored(
            parts[rows] if rows in parts else beside[rows],
            parts[columns] if columns in parts else beside[columns],
        )
    return values


def on_factors(
    plan: Plan, axes: Sequence[Axis], values: Mapping[str, Tensor]
) -> tuple[Plan, list[Axis]]:
    """A plan and its axes, for the factors in place of the factored values."""
    factored = {name for name, v in values.items() if isinstance(v, Factored)}
    if not factored:
        return plan, list(axes)
    changes: list[TensorChange] = []
    for change in plan.tensors:
        if change.name in factored:
            changes += _on_factors(change, values[change.name])
        else:
            changes.append(change)
    layout: dict[str, dict[Place, Any]] = {}
    for axis_name, by_place in plan.layout.items():
        layout[axis_name] = {}
        for place, where in by_place.items():
            moved = _factor(place) if place.name in factored else place
            layout[axis_name][moved] = where
    moved_axes = []
    for axis in axes:
        slots = []
        for slot in axis.slots:
            if slot.name in factored:
                place = _factor(slot.place)
                slots.append(replace(slot, name=place.name, dim=place.dim))
            else:
                slots.append(slot)
        moved_axes.append(replace(axis, slots=tuple(slots)))
    return replace(plan, tensors=tuple(changes), layout=layout), moved_axes


def _on_factors(change: TensorChange, value: Tensor) -> list[TensorChange]:
    assert isinstance(value, Factored)
    rank = value.rows.shape[1]
    kept = np.arange(rank)
    rows = TensorChange(
        f"{change.name}@rows",
        (change.before[0], rank),
        (change.after[0], rank),
        (change.sources[0], kept),
    )
    columns = TensorChange(
        f"{change.name}@columns",
        (rank, *change.before[1:]),
        (rank, *change.after[1:]),
        (kept, *change.sources[1:]),
    )
    return [rows, columns]
