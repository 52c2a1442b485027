"""Processes that end with the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from threading import Thread


def end_with_parent() -> None:
    """From now on the end of the parent is a SIGTERM here.

    A pool that was killed has told its workers nothing: they would train on, and then wait
    for work for ever.
    """
    Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    # The first signal makes a run save and stop; the next run is already in the queue.
    while True:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
