"""The settings that people train in: each works, or is refused by the true reason."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import meristem as ms

METHODS = (ms.how.Random(), ms.how.GradMax(), ms.how.SWE(), ms.how.SENN())
DRAWN = torch.Generator().manual_seed(0)
DATA = [
    (torch.randn(8, 6, generator=DRAWN), torch.randint(0, 3, (8,), generator=DRAWN))
    for _ in range(4)
]


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)
    )


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).float(), batch[1])


def in_autocast(model: nn.Module, batch: Any) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.cross_entropy(model(batch[0]), batch[1])


def residual(model: nn.Module, batch: Any) -> Tensor:
    """Of a differential equation: the loss differentiates the model by its input."""
    x = batch[0].clone().requires_grad_(True)
    u = model(x)
    (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return (du.sum(1) + u.sum(1)).square().mean()


class Checkpointed(nn.Module):
    """Activations are computed anew in the backward pass, in eval mode, too."""

    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(6, 8), nn.Linear(8, 3)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.body, self.inp(x), use_reentrant=self.reentrant)
        out: Tensor = self.out(h)
        return out


def bound() -> nn.Module:
    """A forward on the instance that holds the one of the class."""
    model = mlp()
    old = model.forward
    model.forward = types.MethodType(lambda self, x: old(x) * 2, model)  # type: ignore[method-assign]
    return model


def closed() -> nn.Module:
    model = mlp()
    old = model.forward
    model.forward = lambda x: old(x) * 2  # type: ignore[method-assign]
    return model


def in_bfloat16() -> nn.Module:
    return mlp().bfloat16()


def last_channels() -> nn.Module:
    """Its input stays in the ordinary memory format."""
    model = nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    return model.to(memory_format=torch.channels_last)


SETTINGS: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, int]]] = {
    "autocast, neighbouring widths": (mlp, in_autocast, {"0": 2, "2": 2}),
    "a loss that differentiates by the input": (mlp, residual, {"0": 2}),
    "checkpointed": (Checkpointed, cross_entropy, {"body.0": 2}),
    "checkpointed, reentrant": (
        lambda: Checkpointed(reentrant=True),
        cross_entropy,
        {"body.0": 2},
    ),
    "a method on the instance": (bound, cross_entropy, {"0": 2}),
    "a function on the instance": (closed, cross_entropy, {"0": 2}),
    "bfloat16": (in_bfloat16, cross_entropy, {"0": 2, "2": 2}),
    "channels_last": (last_channels, cross_entropy, {"1": 2}),
}


@pytest.mark.parametrize("how", METHODS, ids=lambda how: type(how).__name__)
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_run_grows_and_goes_on(setting: str, how: Any) -> None:
    make, loss, amount = SETTINGS[setting]
    torch.manual_seed(0)
    model = make()
    dtype = next(model.parameters()).dtype
    data = [(x.to(dtype), y) for x, y in DATA]
    optimizer = torch.optim.AdamW(model.parameters())

    def step(batch: Any) -> None:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()

    step(data[0])
    grower = ms.Grower(
        model,
        optimizer,
        loss=loss,
        data=data,
        when=ms.when.Every(steps=1),
        how=how,
        amount=amount,
    )
    growth = grower.step()
    assert growth is not None
    assert growth.added == amount
    step(data[1])


def test_a_model_on_the_meta_device_is_planned_and_not_grown() -> None:
    model = mlp().to("meta")
    x = torch.randn(2, 6, device="meta")
    assert "0" in ms.find_axes(model, x)
    assert ms.plan(model, {"0": 2}, x).after == {"0": 10}
    with pytest.raises(ms.GrowthRefused, match="meta device and holds no data"):
        ms.grow_(model, {"0": 2}, x)


def test_an_example_inside_a_functional_transform_is_none() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        out: Tensor = torch.func.vmap(model)(batch[0])
        return F.cross_entropy(out, batch[1])

    model = mlp()
    with pytest.raises(ms.DataError, match="functional transform"):
        ms.grow_(model, {"0": 2}, how=ms.how.GradMax(), loss=loss, data=DATA)
    x = DATA[0][0]
    ms.grow_(model, {"0": 2}, x, how=ms.how.GradMax(), loss=loss, data=DATA)
    assert model[0].out_features == 10


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_step_is_refused_by_the_true_reason() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-3))
    compiled = torch.compile(lambda: optimizer.step(), backend="eager")
    cross_entropy(model, DATA[0]).backward()
    compiled()
    with pytest.raises(
        ms.GrowthRefused, match=r"compiled optimizer.step\(\) keeps one"
    ):
        ms.grow_(model, {"0": 2}, DATA[0][0], optimizer=optimizer)


def test_a_moving_average_follows() -> None:
    model = mlp()
    average = AveragedModel(model)
    x = DATA[0][0]
    for how in (ms.how.Random(), ms.how.GradMax()):
        growth = ms.grow_(model, {"0": 2}, x, how, loss=cross_entropy, data=DATA)
        ms.replay_(growth, average)
        average.update_parameters(model)
    assert average.module[0].out_features == 12
    assert average(x).shape == (8, 3)


def test_the_clock_counts_the_epochs_of_the_loop() -> None:
    """Gradients of four batches make a step, as the loop does, or says."""
    for accumulation in (1, 4):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        grower = ms.Grower(
            model,
            optimizer,
            loss=cross_entropy,
            data=DATA,
            when=ms.when.Every(epochs=1),
            how=ms.how.Random(),
            amount=2,
            accumulation=accumulation,
        )
        for _ in range(3):
            for batch in DATA:
                (cross_entropy(model, batch) / 4).backward()
            optimizer.step()
            optimizer.zero_grad()
            grower.step()
            grower.epoch()
        assert grower.clock.epoch == 3
        assert len(grower.history) == 3
