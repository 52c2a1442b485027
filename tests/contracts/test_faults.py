"""A growth is whole or did not happen, whatever comes between its lines."""

from __future__ import annotations

import copy
import random
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import meristem as ms
from meristem.surgery.deferred import signals_deferred

WISHES: dict[str, tuple[dict[str, int], Any]] = {
    "width": ({"layers.0.linear1": 4}, None),
    "zero block": ({"layers": 1}, None),
    "stack": ({"layers": 1}, ms.how.Stack()),
}
X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.0, batch_first=True, norm_first=True
    )
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    optimizer = torch.optim.AdamW(model.parameters())
    model(X).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


class Interrupt:
    """A Ctrl-C in front of the n-th line of the parts that plan and carry out."""

    def __init__(self, at: int) -> None:
        self.lines, self.at = 0, at

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        path = frame.f_code.co_filename
        if "/meristem/surgery/" not in path and "event/steps" not in path:
            return None
        return self._line

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                sys.settrace(None)
                signal.raise_signal(signal.SIGINT)
        return self._line


def interrupted(wish: str, at: int) -> tuple[int, bool]:
    """Grow with a Ctrl-C in front of a line; how many lines there were, and whether it
    was heard: Python drops one that comes inside of a finalizer.

    The model is then the old one to the last bit, or the grown one, and trains on.
    """
    model, optimizer = trained()
    before = copy.deepcopy(model.state_dict())
    counts, how = WISHES[wish]
    interrupt = Interrupt(at)
    came = False
    tracing: Callable[..., Any] | None = sys.gettrace()
    sys.settrace(interrupt)
    try:
        ms.grow_(model, counts, X, how, optimizer=optimizer)
    except KeyboardInterrupt:
        came = True
    finally:
        sys.settrace(tracing)
    after = model.state_dict()
    if {k: v.shape for k, v in after.items()} == {
        k: v.shape for k, v in before.items()
    }:
        assert all(torch.equal(after[name], value) for name, value in before.items())
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in held] == [id(p) for p in model.parameters()]
    model(X).square().mean().backward()
    optimizer.step()
    return interrupt.lines, came


@pytest.fixture
def listening() -> Iterator[None]:
    """A Ctrl-C is heard, also where a shell in the background turns it off."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("listening")
@pytest.mark.parametrize("wish", WISHES)
@pytest.mark.parametrize(
    "count", [10, pytest.param(700, marks=pytest.mark.slow)], ids=["some", "many"]
)
def test_ctrl_c_leaves_the_old_model_or_the_grown_one(wish: str, count: int) -> None:
    lines, _ = interrupted(wish, at=10**9)
    heard = 0
    for at in random.Random(0).sample(range(1, lines), count):
        _, came = interrupted(wish, at)
        heard += came
    assert heard > 0.9 * count


class OutOfMemory(TorchDispatchMode):
    """The n-th copy of a tensor inside of the exchange finds no memory."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.copies, self.at = 0, at

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame.f_code.co_name != "exchange":
            frame = frame.f_back
        if frame is not None and func._schema.name == "aten::clone":
            self.copies += 1
            if self.copies == self.at:
                raise torch.OutOfMemoryError("no memory for the copy")
        return func(*args, **(kwargs or {}))


def test_no_memory_in_the_middle_changes_nothing() -> None:
    for at in range(1, 12):
        model, optimizer = trained()
        held = list(optimizer.param_groups[0]["params"])
        states = len(optimizer.state)
        with OutOfMemory(at), pytest.raises(torch.OutOfMemoryError):
            ms.grow_(model, {"layers": 1}, X, ms.how.Stack(), optimizer=optimizer)
        assert len(model.layers) == 2
        now = optimizer.param_groups[0]["params"]
        assert [id(p) for p in now] == [id(p) for p in held]
        assert len(optimizer.state) == states


@pytest.mark.usefixtures("listening")
def test_a_signal_that_came_before_an_error_is_heard() -> None:
    with pytest.raises(KeyboardInterrupt), signals_deferred():
        signal.raise_signal(signal.SIGINT)
        raise MemoryError
