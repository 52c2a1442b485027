"""Measuring leaves no trace: random streams come back where they were, and the caller's
modes do not reach in.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch.utils import checkpoint


class _Kept:
    """Stands in for torch's reentrant checkpoint: the function is run, and that is all."""

    @staticmethod
    def apply(function: Callable[..., Any], _preserve: bool, *args: Any) -> Any:
        return function(*args)


def _kept(*_args: Any, **_kwargs: Any) -> Iterator[None]:
    """Stands in for torch's checkpoint without reentrance."""
    yield


@contextlib.contextmanager
def activations_kept() -> Iterator[None]:
    """Checkpointed activations are kept, not computed anew in the backward pass.

    By then a copy no longer holds the weights that it was measured with, nor the hooks
    that looked at it.
    """
    names = {
        "_checkpoint_without_reentrant_generator": _kept,
        "CheckpointFunction": _Kept,
    }
    held = {name: getattr(checkpoint, name) for name in names}
    for name, value in names.items():
        setattr(checkpoint, name, value)
    try:
        yield
    finally:
        for name, value in held.items():
            setattr(checkpoint, name, value)


_callers_autocast: ContextVar[bool] = ContextVar("_callers_autocast", default=False)


def under_autocast() -> bool:
    """Whether the code around the outermost `undisturbed` runs under autocast."""
    return _callers_autocast.get()


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Restore every global random stream (torch on all devices in use, numpy, Python)
    on leaving.

    Inside, gradients are on, autocast is off and activations are kept, whatever the
    caller's own modes are.
    """
    # The three global streams that a forward, a dataset or a transform may draw from.
    python, legacy = random.getstate(), np.random.get_state()
    # Asking for CUDA here would start it for a user who has not.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    cast = any(map(torch.is_autocast_enabled, ["cpu", *(["cuda"] if devices else [])]))
    outer = _callers_autocast.set(_callers_autocast.get() or cast)
    try:
        with (
            torch.random.fork_rng(devices),
            torch.inference_mode(False),
            torch.enable_grad(),
            activations_kept(),
            contextlib.ExitStack() as stack,
        ):
            for device in ["cpu", *(["cuda"] if devices else [])]:
                stack.enter_context(torch.autocast(device, enabled=False))
            # its copies would hold weak references to the weights
            torch.clear_autocast_cache()
            yield
    finally:
        _callers_autocast.reset(outer)
        random.setstate(python)
        np.random.set_state(legacy)
