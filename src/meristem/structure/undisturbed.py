"""Measuring leaves no trace: random streams come back where they were, and the caller's
modes do not reach in.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Restore every global random stream (torch on all devices in use, numpy, Python)
    on leaving.

    Inside, gradients are on and autocast is off, whatever the caller's own modes are.
    """
    # The three global streams that a forward, a dataset or a transform may draw from.
    python, legacy = random.getstate(), np.random.get_state()
    # Asking for CUDA here would start it for a user who has not.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with (
            torch.random.fork_rng(devices),
            torch.inference_mode(False),
            torch.enable_grad(),
            contextlib.ExitStack() as stack,
        ):
            for device in ["cpu", *(["cuda"] if devices else [])]:
                stack.enter_context(torch.autocast(device, enabled=False))
            # its copies would hold weak references to the weights
            torch.clear_autocast_cache()
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
