"""Signals wait until a growth is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Within, a Ctrl-C (or a polite end) waits; it is delivered when all is done.

    Only the main thread is ever interrupted by signals; elsewhere nothing is to do. A
    signal with torch's or the system's own handler is left to it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []

    def wait(number: int, frame: FrameType | None) -> None:
        came.append((number, frame))

    handlers: dict[int, Any] = {}
    try:
        for number in _SIGNALS:
            if callable(signal.getsignal(number)):
                handlers[number] = signal.getsignal(number)
                signal.signal(number, wait)
        yield
    finally:
        # The one that is likely to come is given back last.
        for known in reversed(handlers):
            signal.signal(known, handlers[known])
        for arrived, frame in came:
            handlers[arrived](arrived, frame)
