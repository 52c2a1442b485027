"""What can grow: axes, and the tensor dimensions that follow them."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from meristem.core.errors import UnknownAxis, nearest

Role = Literal["fan_in", "fan_out", "carried"]
Kind = Literal["width", "heads", "depth"]
Fill = Literal["draw", "bias", "zero", "one", "mean"]


class Place(NamedTuple):
    """A parameter or buffer and one of its dimensions."""

    name: str
    dim: int


@dataclass(frozen=True)
class Slot:
    """A tensor dimension that follows an axis.

    `role` is "fan_in" where the tensor produces the units, "fan_out" where it reads
    them, "carried" where it goes along (biases, norm weights and statistics, depthwise
    kernels). `fill` says how a new entry starts when nobody says more: drawn as the
    layer draws its weights, as a bias, zero, one, or the mean of its neighbours. `tied`
    marks a "fan_out" slot that produces the units as well (a weight used on both
    sides).
    """

    name: str
    dim: int
    role: Role
    fill: Fill
    buffer: bool = False
    tied: bool = False

    @property
    def place(self) -> Place:
        return Place(self.name, self.dim)


@dataclass(frozen=True)
class Axis:
    """One size of the network that can change on its own.

    Attributes:
        name: The module whose output units it counts ("fc1"), or the bare parameter.
        kind: "width", "heads" or "depth".
        size: Its present size, in its own units (neurons, channels, heads).
        multiple: Counts come in multiples of this (channels per group of a group norm;
            the width of a head, where heads grow with it).
        slots: Every tensor dimension that follows it.
        norm: What normalises the units on their way: "batch_norm", "layer_norm",
            "rms_norm" or None.
        end: "output", "vocabulary" or "input" where the axis is an end of the model, else
            None.
        grain: How many units make one entry of a layout. Fewer than `multiple` where
            other axes grow with it.
    """

    name: str
    kind: Kind
    size: int
    multiple: int
    slots: tuple[Slot, ...]
    norm: str | None = None
    end: str | None = None
    grain: int = 1

    @property
    def streamed(self) -> bool:
        """Whether a layer or RMS norm runs over the axis: its producers then follow the
        rule of a normalised stream.
        """
        return self.norm in ("layer_norm", "rms_norm")

    def places(self, role: Role) -> tuple[Slot, ...]:
        """The slots of one role, in forward order."""
        return tuple(slot for slot in self.slots if slot.role == role)


class Axes(Mapping[str, Axis]):
    """The axes of one model by name; prints as a table.

    `frozen` maps what cannot grow to the reason. `ends` holds the model's classes and
    vocabulary, `inputs` the features that it reads: these grow only when they are named.
    """

    def __init__(
        self,
        axes: Mapping[str, Axis],
        ends: Mapping[str, Axis],
        frozen: Mapping[str, str],
    ) -> None:
        self._axes = dict(axes)
        self.ends: dict[str, Axis] = {}
        self.inputs: dict[str, Axis] = {}
        for name, axis in ends.items():
            (self.inputs if axis.end == "input" else self.ends)[name] = axis
        self.frozen = dict(frozen)

    def __getitem__(self, name: str) -> Axis:
        full = self.full(name)
        if full not in self._axes:
            raise self.unknown(name)
        return self._axes[full]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.full(name) in self._axes

    def __iter__(self) -> Iterator[str]:
        return iter(self._axes)

    def __len__(self) -> int:
        return len(self._axes)

    @property
    def every_end(self) -> dict[str, Axis]:
        """Classes, vocabulary and features."""
        return self.ends | self.inputs

    def named(self, name: str) -> Axis:
        """The axis or end called `name`."""
        full, ends = self.full(name), self.every_end
        return ends[full] if full in ends else self[full]

    def full(self, name: str) -> str:
        """The whole name of an axis, where its end is enough: "layers" for
        "model.layers", if no other axis ends so.
        """
        if name in self._axes or name in self.every_end or name in self.frozen:
            return name
        known = [*self._axes, *self.every_end]
        ending = [other for other in known if other.endswith(f".{name}")]
        return ending[0] if len(ending) == 1 else name

    def unknown(self, name: str) -> UnknownAxis:
        """The error for a name that is no axis, with its reason where it is frozen,
        else the nearest names.
        """
        if name in self.frozen:
            return UnknownAxis(f"axis {name!r} cannot grow: {self.frozen[name]}")
        known = [*self._axes, *self.every_end]
        # "c_fc" for "h.0.mlp.c_fc": the end of a name is what people remember.
        ending = [other for other in known if other.rpartition(".")[2] == name]
        if ending:
            return UnknownAxis(
                f"no axis is called {name!r}. Did you mean "
                f"{' or '.join(map(repr, ending[:3]))}?"
            )
        listed = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
        return UnknownAxis(
            f"no axis is called {name!r}.{nearest(name, known)} This model has: "
            f"{listed or 'none'}"
        )

    def __repr__(self) -> str:
        rows = [("axis", "kind", "size", "multiple", "tensors")]
        for axis in self.values():
            rows.append(
                (axis.name, axis.kind, str(axis.size), str(axis.multiple), _slots(axis))
            )
        for axis in self.every_end.values():
            rows.append(
                (
                    axis.name,
                    f"end ({axis.end})",
                    str(axis.size),
                    str(axis.multiple),
                    _slots(axis),
                )
            )
        for name, reason in self.frozen.items():
            rows.append((name, "frozen", "", "", reason))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join(
            "  ".join(
                [
                    *(
                        cell.ljust(width)
                        for cell, width in zip(row, widths, strict=False)
                    ),
                    row[4],
                ]
            ).rstrip()
            for row in rows
        )


def _slots(axis: Axis) -> str:
    shown = [f"{slot.name}[{slot.dim}]" for slot in axis.slots if not slot.buffer]
    return ", ".join(shown[:4]) + (f", ... ({len(shown)})" if len(shown) > 4 else "")


def matches(name: str, patterns: str | Sequence[str]) -> bool:
    """Whether a name fits glob patterns, of which those with a leading "!" exclude."""
    listed = [patterns] if isinstance(patterns, str) else list(patterns)
    # Exclusions alone mean: everything else.
    wanted = [p for p in listed if not p.startswith("!")] or ["*"]
    barred = [p[1:] for p in listed if p.startswith("!")]
    return any(fnmatch.fnmatchcase(name, p) for p in wanted) and not any(
        fnmatch.fnmatchcase(name, p) for p in barred
    )
