"""Any calls of the public functions in any order, right and wrong ones: never half a
growth.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn
from zoo import Residual

import meristem as ms

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
BATCHES = [(X, torch.tensor([0, 1, 2, 0])), (X + 1, torch.tensor([1, 1, 0, 2]))]
AXES = ["stem", "blocks.0.up", "blocks", "blocks.1.up", "head:depth", "nothing"]
HOWS: list[Any] = [None, ms.how.Random(), ms.how.GradMax(), ms.how.Stack(), "stack"]
OPTIMIZERS: list[Callable[..., Any]] = [
    torch.optim.AdamW,
    lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=True),
    torch.optim.Adafactor,
    lambda p: torch.optim.ASGD(p, lr=0.01),
]


def net() -> Residual:
    return Residual(nn.Linear(5, 6), width=6, hidden=7)


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


class Calls(RuleBasedStateMachine):
    """One model in training, a copy that follows it, and a folder."""

    @initialize(make=st.sampled_from(OPTIMIZERS))
    def begin(self, make: Callable[..., Any]) -> None:
        torch.manual_seed(0)
        self.make = make
        self.model: nn.Module = net()
        self.inside = self.model
        self.optimizer = make(self.model.parameters())
        self.average = copy.deepcopy(self.model)
        self.growth: ms.Growth | None = None
        self.folder = tempfile.mkdtemp()
        self.saved = False

    def tried(self, act: Callable[[], Any]) -> Any:
        """What a call gives; after an error of ours every number is what it was."""
        before = {name: v.clone() for name, v in self.inside.state_dict().items()}
        held = len(self.optimizer.param_groups[0]["params"])
        try:
            return act()
        except (ms.MeristemError, TypeError, ValueError):
            after = self.inside.state_dict()
            assert list(after) == list(before)
            assert all(
                torch.equal(after[name], value) for name, value in before.items()
            )
            assert len(self.optimizer.param_groups[0]["params"]) == held
            return None

    @rule()
    def step(self) -> None:
        self.optimizer.zero_grad()
        loss(self.model, BATCHES[0]).backward()
        self.optimizer.step()

    @rule(
        axis=st.sampled_from(AXES),
        count=st.integers(-1, 3),
        how=st.sampled_from(HOWS),
        with_data=st.booleans(),
    )
    def grow(self, axis: str, count: int, how: Any, with_data: bool) -> None:
        if len(list(self.inside.blocks)) > 6:  # type: ignore[arg-type]
            return
        data: dict[str, Any] = {"loss": loss, "data": BATCHES} if with_data else {}
        growth = self.tried(
            lambda: ms.grow_(
                self.model, {axis: count}, X, how, optimizer=self.optimizer, **data
            )
        )
        if growth is not None:
            assert growth.after[axis] == growth.before[axis] + count
            ms.replay_(growth, self.average)

    @rule(
        axis=st.sampled_from(AXES), units=st.sampled_from([1, 2, [0], [1, 1], [99], []])
    )
    def narrow(self, axis: str, units: Any) -> None:
        done = self.tried(
            lambda: ms.narrow_(self.model, {axis: units}, X, optimizer=self.optimizer)
        )
        if done is not None:
            ms.narrow_(self.average, {axis: units}, X)

    @rule(axis=st.sampled_from(AXES))
    def prune(self, axis: str) -> None:
        done = self.tried(
            lambda: ms.prune_(
                self.model, axis, X, loss=loss, data=BATCHES, optimizer=self.optimizer
            )
        )
        if done is not None:
            self.average = copy.deepcopy(self.inside)

    @rule()
    def pending(self) -> None:
        waiting = loss(self.model, BATCHES[0])
        with pytest.raises(ms.PendingBackward):
            ms.grow_(self.model, {"stem": 1, "blocks.0.up": 1}, X)
        waiting.backward()

    @rule()
    def save(self) -> None:
        ms.save(self.folder, self.model, optimizer=self.optimizer)
        self.saved = True

    @rule()
    def load(self) -> None:
        if not self.saved:
            return
        fresh: Any = net()
        optimizer = self.make(fresh.parameters())
        ms.load(self.folder, fresh, optimizer=optimizer)
        self.model = self.inside = fresh
        self.optimizer = optimizer
        self.average = copy.deepcopy(fresh)

    @rule()
    def regrow(self) -> None:
        fresh: Any = net()
        ms.regrow_(fresh, ms.lineage(self.model))
        fresh.load_state_dict(self.inside.state_dict())
        assert torch.equal(fresh(X), self.inside(X))

    @rule(wrapped=st.booleans())
    def wrap(self, wrapped: bool) -> None:
        self.model = nn.DataParallel(self.inside) if wrapped else self.inside

    @invariant()
    def whole(self) -> None:
        """The model runs, the optimizer holds all of it, states have its shapes."""
        if not hasattr(self, "inside"):
            return
        assert self.model(X).shape == (4, 3)
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        assert [id(p) for p in held] == [id(p) for p in self.inside.parameters()]
        for p in held:
            assert p.grad is None or p.grad.shape == p.shape
            for key, value in self.optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor) and value.dim() and "var" not in key:
                    assert value.shape == p.shape, key
        shapes = [p.shape for p in self.average.parameters()]
        assert shapes == [p.shape for p in self.inside.parameters()]


@pytest.mark.parametrize(
    "examples", [8, pytest.param(400, marks=pytest.mark.slow)], ids=["some", "many"]
)
@pytest.mark.filterwarnings("ignore")
def test_any_calls_in_any_order(examples: int) -> None:
    run_state_machine_as_test(
        Calls,
        settings=settings(
            max_examples=examples,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
