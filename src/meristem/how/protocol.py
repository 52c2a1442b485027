"""What a method is: it proposes weights for new units, and may settle them in on a sandbox."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from meristem.core.axis import Axis, Kind
from meristem.core.offer import Proposal, Settled
from meristem.sandbox import Sandbox
from meristem.view import View


@runtime_checkable
class How(Protocol):
    """A method that offers weights for new units.

    `kinds` are the kinds of axes that it speaks for, each with whether the network computes the same function right after
    such a growth; `preserves` says so of the widths (of the depths, where it speaks for these alone); `batches` how many growth
    batches the method measures on, 0 where it needs neither `loss` nor `data`.
    """

    @property
    def kinds(self) -> Mapping[Kind, bool]: ...

    @property
    def preserves(self) -> bool: ...

    @property
    def batches(self) -> int: ...

    def propose(self, view: View, axis: Axis, count: int) -> Proposal: ...


@runtime_checkable
class Thrifty(How, Protocol):
    """A method that keeps to the `allowance` of its view, and knows the least that a proposal costs."""

    def least(self, view: View, axis: Axis, count: int) -> float: ...


@runtime_checkable
class Settles(How, Protocol):
    """A method that grows and trains a copy of the model before anything is swapped in: its own weights and old ones."""

    def settle(self, sandbox: Sandbox, counts: Mapping[str, int]) -> Settled: ...
