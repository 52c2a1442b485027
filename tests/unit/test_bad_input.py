"""Wrong use is specified like right use: a clear error of our own class; model, optimizer and random state bit-identical."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from zoo import MLP, make

import meristem as ms


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.fixture
def net() -> tuple[nn.Module, Any, Any]:
    model = MLP()
    opt = torch.optim.AdamW(model.parameters())
    batch = (torch.randn(8, 10), torch.randint(0, 4, (8,)))
    loss(model, batch).backward()
    opt.step()
    return model, opt, batch


def unchanged(
    model: nn.Module,
    opt: Any,
    act: Callable[[], Any],
    error: type[Exception],
    match: str,
) -> None:
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    grads = {
        n: None if p.grad is None else p.grad.clone()
        for n, p in model.named_parameters()
    }
    state = copy.deepcopy(opt.state_dict())
    attributes = {n: m.extra_repr() for n, m in model.named_modules()}
    rng = torch.get_rng_state()
    with pytest.raises(error, match=match) as caught:
        act()
    assert isinstance(caught.value, (ms.MeristemError, TypeError))
    assert torch.equal(rng, torch.get_rng_state())
    assert {n: m.extra_repr() for n, m in model.named_modules()} == attributes
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    for n, p in model.named_parameters():
        assert (p.grad is None) == (grads[n] is None)
        assert grads[n] is None or torch.equal(grads[n], p.grad)
    now = opt.state_dict()
    assert now["param_groups"] == state["param_groups"]
    for key, entry in state["state"].items():
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(now["state"][key][k]))
            for k, v in entry.items()
        )


def test_unknown_axis_names_the_nearest(net: Any) -> None:
    model, opt, (x, _) = net
    unchanged(
        model,
        opt,
        lambda: ms.grow_(model, {"fc11": 3}, x, optimizer=opt),
        ms.UnknownAxis,
        r"Did you mean 'fc1'",
    )
    unchanged(
        model,
        opt,
        lambda: ms.grow_(model, {"fc1:out": 3}, x, optimizer=opt),
        ms.UnknownAxis,
        r"Did you mean 'fc1",
    )
    unchanged(
        model,
        opt,
        lambda: ms.grow_(model, {}, x, optimizer=opt),
        ms.GrowthRefused,
        "no axis was named",
    )


@pytest.mark.parametrize("count", [0, -3])
def test_counts_are_positive(net: Any, count: int) -> None:
    model, opt, (x, _) = net
    for act in (ms.grow_, ms.narrow_, ms.plan):
        unchanged(
            model,
            opt,
            lambda act=act: act(model, {"fc1": count}, x),
            ms.GrowthRefused,
            r"in \[1, inf\)",
        )


def test_counts_are_whole(net: Any) -> None:
    model, opt, (x, _) = net
    for count in (1.5, "3", None, True):
        unchanged(
            model,
            opt,
            lambda count=count: ms.grow_(model, {"fc1": count}, x),
            TypeError,
            "must be an int",
        )
    unchanged(
        model,
        opt,
        lambda: ms.grow_(model, [("fc1", 3)], x),
        TypeError,
        "must be a dict",
    )


def test_counts_respect_the_granularity() -> None:
    model, x = make("group_norm")
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    unchanged(
        model,
        opt,
        lambda: ms.grow_(model, {"conv1": 3}, x),
        ms.GrowthRefused,
        "multiples of 2",
    )
    unchanged(
        model,
        opt,
        lambda: ms.narrow_(model, {"conv1": [0]}, x),
        ms.GrowthRefused,
        "whole groups",
    )


def test_narrowing_leaves_units(net: Any) -> None:
    model, opt, (x, _) = net
    unchanged(
        model,
        opt,
        lambda: ms.narrow_(model, {"fc1": 12}, x),
        ms.GrowthRefused,
        "must stay",
    )
    unchanged(
        model,
        opt,
        lambda: ms.narrow_(model, {"fc1": [12]}, x),
        ms.GrowthRefused,
        "units 0..11",
    )


def test_a_forward_that_fails_on_the_example(net: Any) -> None:
    model, opt, _ = net
    wrong = torch.randn(2, 9)
    unchanged(
        model,
        opt,
        lambda: ms.grow_(model, {"fc1": 3}, wrong),
        ms.DiscoveryError,
        "fails on the example",
    )
    unchanged(
        model, opt, lambda: ms.find_axes(model, wrong), ms.DiscoveryError, r"\(2, 9\)"
    )


def test_an_optimizer_of_another_model(net: Any) -> None:
    model, opt, (x, _) = net
    other = torch.optim.SGD(MLP().parameters(), lr=0.1)
    unchanged(
        model,
        opt,
        lambda: ms.grow_(model, {"fc1": 3}, x, optimizer=other),
        ms.OptimizerError,
        "does not hold",
    )
    unchanged(
        model,
        opt,
        lambda: ms.grow_(model, {"fc1": 3}, x, optimizer="adam"),
        TypeError,
        "torch.optim.Optimizer",
    )


def test_a_pending_backward_is_refused_and_still_works(net: Any) -> None:
    model, opt, batch = net
    pending = loss(model, batch)
    unchanged(
        model,
        opt,
        lambda: ms.grow_(model, {"fc1": 3}, batch[0], optimizer=opt),
        ms.PendingBackward,
        "optimizer.step",
    )
    pending.backward()
    ms.grow_(
        model, {"fc1": 3}, batch[0], optimizer=opt
    )  # an old loss that is still referenced is no obstacle
    loss(model, batch).backward()
    assert pending is not None


def test_a_loss_that_is_not_finite(net: Any) -> None:
    model, opt, (x, y) = net
    for how in (ms.how.Random(), ms.how.GradMax()):
        bad = lambda m, b: loss(m, b) * float("nan")
        act = lambda how=how, bad=bad: ms.grow_(
            model, {"fc1": 3}, x, how=how, optimizer=opt, loss=bad, data=[(x, y)]
        )
        unchanged(model, opt, act, ms.DataError, "nothing was changed")


def test_data_that_cannot_be_read_twice_or_at_all(net: Any) -> None:
    model, opt, batch = net
    options = {"loss": loss, "when": ms.when.Every(steps=1), "how": ms.how.Random()}
    for data, match in (
        (iter([batch]), "one-shot"),
        ((b for b in [batch]), "one-shot"),
        ([], "empty"),
        (3, "re-iterable"),
    ):
        unchanged(
            model,
            opt,
            lambda data=data: ms.Grower(model, opt, data=data, **options),
            ms.DataError,
            match,
        )
        act = lambda data=data: ms.grow_(
            model, {"fc1": 3}, batch[0], how=ms.how.GradMax(), loss=loss, data=data
        )
        unchanged(model, opt, act, ms.DataError, match)
    act = lambda: ms.grow_(
        model, {"fc1": 3}, batch[0], how=ms.how.GradMax(), optimizer=opt
    )
    unchanged(model, opt, act, ms.DataError, "loss= and data=")
    unchanged(model, opt, lambda: ms.grow_(model, {"fc1": 3}), ms.DataError, "example")


class Odd(torch.optim.SGD):
    """Keeps a state tensor that no rule covers."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["curvature"] = torch.ones_like(p)


def test_a_state_tensor_without_a_rule() -> None:
    model, x = MLP(), torch.randn(3, 10)
    opt = Odd(model.parameters(), lr=0.1)
    model(x).sum().backward()
    opt.step()
    unchanged(
        model,
        opt,
        lambda: ms.grow_(model, {"fc1": 3}, x, optimizer=opt),
        ms.OptimizerError,
        "'curvature' of Odd",
    )
    ms.STATE_RULES[Odd] = {"curvature": "second"}
    try:
        ms.grow_(model, {"fc1": 3}, x, optimizer=opt)
        assert opt.state[model.fc1.weight]["curvature"].shape == (15, 10)
    finally:
        del ms.STATE_RULES[Odd]


class Hard(nn.Module):
    """Hard-codes a size."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(10, 12), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.fc1(x).view(-1, 3, 4).relu().view(-1, 12))


def test_code_that_hard_codes_a_size_is_refused_with_its_place() -> None:
    model, x = Hard(), torch.randn(3, 10)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    axes = ms.find_axes(model, x)
    assert all(axis.kind == "depth" for axis in axes.values())
    plan = ms.plan(model, {"fc1": 4}, x) if "fc1" not in axes.frozen else None
    assert plan is None or not plan
    unchanged(
        model,
        opt,
        lambda: ms.grow_(model, {"fc1": 4}, x, optimizer=opt),
        ms.GrowthRefused,
        "fc1",
    )


def test_an_error_during_the_exchange_rolls_everything_back(
    net: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from meristem.surgery import exchange

    model, opt, batch = net
    real = exchange.set_attribute

    def fail(owner: nn.Module, module: str, attribute: str, value: Any) -> Any:
        if module == "fc2":
            raise RuntimeError("no more")
        return real(owner, module, attribute, value)

    monkeypatch.setattr(exchange, "set_attribute", fail)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    state = copy.deepcopy(opt.state_dict())
    with pytest.raises(RuntimeError, match="no more"):
        ms.grow_(model, {"fc1": 3}, batch[0], optimizer=opt)
    assert model.fc1.out_features == 12
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    for key, entry in state["state"].items():
        assert all(
            torch.equal(
                torch.as_tensor(v), torch.as_tensor(opt.state_dict()["state"][key][k])
            )
            for k, v in entry.items()
        )
    opt.zero_grad()
    loss(model, batch).backward()
    opt.step()


def test_a_zero_fan_in_under_an_activation_that_is_not_zero_at_zero() -> None:
    model, x = (
        nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 2)),
        torch.randn(3, 4),
    )
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    act = lambda: ms.grow_(
        model, {"0": 2}, x, how=ms.how.Random(zero="fan_in"), optimizer=opt
    )
    unchanged(model, opt, act, ms.VerificationError, "zero='fan_out'")
