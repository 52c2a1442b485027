"""What a user gives by mistake is told at once, in one sentence, with the remedy."""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import meristem as ms
from meristem.event.calendar import Curve

X, Y = torch.randn(64, 20), torch.randint(0, 3, (64,))
BATCHES = [(X[i : i + 16], Y[i : i + 16]) for i in range(0, 64, 16)]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 3))


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def grower(model: Any = None, optimizer: Any = None, **options: Any) -> ms.Grower:
    model = model if model is not None else net()
    if optimizer is None:
        optimizer = torch.optim.AdamW(model.parameters())
    given = {
        "loss": loss,
        "data": BATCHES,
        "when": ms.when.Every(steps=2),
        "how": ms.how.Random(),
        "amount": 4,
    }
    return ms.Grower(model, optimizer, **given | options)


def train(one: ms.Grower, model: nn.Module, optimizer: Any, steps: int = 3) -> None:
    for step in range(steps):
        value = loss(model, BATCHES[step % 4])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        one.step(value)


class Endless(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(zip(X, Y, strict=True))


ENDLESS: Any = torch.utils.data.DataLoader(Endless(), batch_size=16)
EXAMPLE = torch.randn(4, 20)
MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "At(3)": (lambda: ms.when.At(3), ValueError, "carries its unit"),  # type: ignore[arg-type]
    "Every(2)": (lambda: ms.when.Every(2), ValueError, "carries its unit"),  # type: ignore[arg-type]
    "no moment": (lambda: ms.when.At(steps=()), ValueError, "needs steps or epochs"),
    "empty moments": (lambda: ms.when.At([]), ValueError, "needs steps or epochs"),
    "two units": (lambda: ms.when.At(["2 steps", "1 epochs"]), ValueError, "mixes"),
    "half a step": (lambda: ms.when.Every(steps=2.5), ValueError, "must be an int"),  # type: ignore[arg-type]
    "zero side": (lambda: ms.how.GradMax(zero="fanin"), ValueError, '"fan_in"'),  # type: ignore[arg-type]
    "scale": (lambda: ms.how.GradMax(scale=-1), ValueError, r"in \(0, inf\)"),
    "noise": (lambda: ms.how.Net2Net(noise=-1), ValueError, r"in \(0, inf\)"),
    "budget": (lambda: ms.Budget(parameters="5k"), ValueError, "got '5k'"),  # type: ignore[arg-type]
    "budget sizes": (lambda: ms.Budget(sizes={"0": 0}), ValueError, "'0': ..."),
    "amount": (lambda: grower(amount="many"), TypeError, "got 'many'"),
    "round_to": (lambda: grower(round_to=2.5), ValueError, "must be an int"),
    "accumulation": (lambda: grower(accumulation=0), ValueError, "must be an int"),
    "axes": (lambda: grower(axes=3), TypeError, "got 3"),
    "one batch": (lambda: grower(data=BATCHES[0]), ms.DataError, r"\[batch\]"),
    "a dict as batch": (lambda: grower(data={"x": X}), ms.DataError, r"\[batch\]"),
    "a tensor as data": (lambda: grower(data=X), ms.DataError, r"\[batch\]"),
    "how class": (lambda: grower(how=ms.how.Net2Net), TypeError, r"hint: Net2Net\(\)"),
    "loss": (lambda: grower(loss=3), TypeError, "loss must be callable"),
    "criterion": (lambda: grower(loss=F.cross_entropy), ms.DataError, "first batch"),
    "optimizer class": (
        lambda: grower(optimizer=torch.optim.AdamW), TypeError, "build it, AdamW"
    ),
    "model class": (lambda: ms.find_axes(nn.Sequential, X), TypeError, "build it, Seq"),  # type: ignore[arg-type]
    "load, class": (lambda: ms.load("x", nn.Sequential), TypeError, "build it, Seq"),  # type: ignore[type-var]
    "load, optimizer": (
        lambda: ms.load("x", net(), optimizer=torch.optim.SGD), TypeError, "build it, SGD"  # type: ignore[arg-type]
    ),
    "save, swapped": (lambda: ms.save(net(), "x"), TypeError, r"\(path, model\)"),  # type: ignore[arg-type]
    "save, nowhere": (lambda: ms.save(None, net()), TypeError, "got NoneType"),  # type: ignore[arg-type]
    "half": (
        lambda: ms.find_axes(net().half(), EXAMPLE), ms.DiscoveryError, "in that dtype"
    ),
    "numpy": (
        lambda: ms.find_axes(net(), np.zeros((4, 20), np.float32)),
        ms.DiscoveryError,
        r"ndarray \(4, 20\) float32.*torch.as_tensor",
    ),
    "a shape": (
        lambda: ms.find_axes(net(), (4, 20)), ms.DiscoveryError, r"torch.randn\(4, 20\)"
    ),
    "step": (lambda: grower().step("x"), TypeError, "got str"),  # type: ignore[arg-type]
    "unspoken, grow_": (
        lambda: ms.grow_(net(), {"0": 2}, EXAMPLE, how=ms.how.Stack()),
        ms.GrowthRefused,
        r"how=\[Stack\(\), Random\(\)\]",
    ),
    "unspoken, amount": (
        lambda: grower(how=ms.how.Stack(), amount={"0": 2}),
        ms.UnknownAxis,
        r"how=\[Stack\(\), Random\(\)\]",
    ),
    "unspoken, axes": (
        lambda: grower(how=ms.how.Stack(), axes="0"),
        ms.GrowthRefused,
        "Stack cannot grow 0",
    ),
    "a fraction of what": (
        lambda: ms.recipes.stack(
            net(), None, loss=loss, data=BATCHES, to={"layers": 3}, at=0.5
        ),
        ValueError,
        "whose length is not told",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told(mistake: str) -> None:
    make, kind, words = MISTAKES[mistake]
    with pytest.raises(kind, match=words) as told:
        make()
    assert len(str(told.value)) < 500
    assert "\n" not in str(told.value)


def test_durations_carry_their_unit() -> None:
    assert ms.when.At("60 steps") == ms.when.At(steps=(60,))
    assert ms.when.At(["2 epochs", "4 epochs"]) == ms.when.At(epochs=(2, 4))
    assert ms.when.At(steps=3) == ms.when.At(steps=(3,))  # type: ignore[arg-type]
    assert ms.when.Every("2 epochs") == ms.when.Every(epochs=2)


def test_a_fraction_grows_every_width_alike() -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(
        nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3)
    )
    growth = grower(wide, amount=1.0).grow()
    assert growth is not None
    assert growth.after == {"0": 16, "2": 64}


def test_an_epoch_of_unknown_length_is_told_of() -> None:
    with pytest.warns(UserWarning, match=r"grower.epoch\(\)"):
        grower(data=ENDLESS, when=ms.when.Every(epochs=1))
    grower(data=ENDLESS, when=ms.when.Every(steps=1))


def test_another_model_than_the_given_one_is_told_of() -> None:
    other = net()
    one = grower()
    before = [p.clone() for p in one.model.parameters()]
    with pytest.raises(ValueError, match="computed by another model"):
        train(one, other, torch.optim.SGD(other.parameters(), lr=0.1))
    assert all(map(torch.equal, one.model.parameters(), before))


def test_another_optimizer_than_the_given_one_is_told_of() -> None:
    model = net()
    one = grower(model)
    with pytest.raises(ValueError, match="has taken no step"):
        train(one, model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert model[0].out_features == 8


def test_the_given_ones_are_not(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    one = grower(model, optimizer)
    train(one, model, optimizer)
    assert model[0].out_features == 12
    ms.save(tmp_path, model, optimizer=optimizer, grower=one)
    ms.load(tmp_path, model, optimizer=optimizer, grower=one)
    one.step(1.0)
    assert model[0].out_features == 16


def test_short_reprs() -> None:
    one = grower()
    assert repr(one) == "Grower(Sequential, Every(steps=2), step 0, growths 0)"
    growth = one.grow()
    assert repr(growth).startswith(
        "Growth(0: 8 -> 12 at step 0; parameters 195 -> 291;"
    )
    assert "sizes {'0': 12}" in repr(one)


def test_no_strangers_in_a_module() -> None:
    for module in (ms, ms.how, ms.where, ms.when, ms.care, ms.recipes):
        assert dir(module) == sorted(module.__all__)


def test_a_copied_grower_goes_on() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mine, its, one = copy.deepcopy((model, optimizer, grower(model, optimizer)))
    train(one, mine, its, 2)
    assert mine[0].out_features == 12


def test_a_load_and_a_skipped_step_are_no_other_optimizer() -> None:
    model = net()
    one = grower(model)
    model.load_state_dict(net().state_dict())
    one.step(1.0)
    assert one.step(1.0)


def test_a_head_that_is_trained_alone_is_no_other_model() -> None:
    model, head = net(), nn.Linear(3, 3)
    optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.1)
    one = grower(model, optimizer)
    for _ in range(2):
        value = F.cross_entropy(head(model(X).detach()), Y)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        growth = one.step(value)
    assert growth


def test_a_grower_that_is_gone_leaves_nothing_in_the_optimizer() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        grower(model, optimizer)
    gc.collect()
    assert not optimizer._optimizer_step_post_hooks


def test_a_long_run_in_half_precision_has_its_curve() -> None:
    curve = Curve()
    for step in range(40_000):
        curve.add(step, torch.ones((), dtype=torch.bfloat16))
    assert {loss for _, loss in curve.points()} == {1.0}


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("stopped", [0, 1, 700, 1333])
def test_a_curve_goes_on_as_if_it_had_never_stopped(every: int, stopped: int) -> None:
    whole, first = Curve(), Curve()
    for place in range(3000):
        whole.add(every * place, 1 / (1 + place))
        if place < stopped:
            first.add(every * place, 1 / (1 + place))
    again = Curve()
    # A checkpoint holds numbers.
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for place in range(stopped, 3000):
        again.add(every * place, 1 / (1 + place))
    assert again.points() == whole.points()
