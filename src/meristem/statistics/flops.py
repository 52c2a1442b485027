"""The ledger: what a growth costs is counted, not estimated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch.utils.flop_counter import FlopCounterMode


@contextlib.contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Count the floating-point operations of everything that runs inside, backward passes included."""
    with FlopCounterMode(display=False) as counter:
        yield counter
