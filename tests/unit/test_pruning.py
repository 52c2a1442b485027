"""Removal: what units are worth, and what goes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meristem as ms
from meristem.statistics.curvature import Factors, compensated, removal


def squared(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square().sum(1).mean()


def data(outputs: int = 2, batches: int = 6) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(batches, 64, 4, generator=draw).double()
    y = torch.stack([x[..., 0] * x[..., 1], x[..., 2].sin(), x[..., 3].abs()], -1)[
        ..., :outputs
    ]
    return list(zip(x, y, strict=True))


def net(hidden: int = 6) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 2)).double()


def trained(model: nn.Module, batches: Any, steps: int = 300) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        squared(model, batches[step % len(batches)]).backward()
        optimizer.step()
    return optimizer


def test_a_score_of_removal_is_what_the_quadratic_model_loses() -> None:
    """freeze: eta with all weights less eta without those of unit i. prune: the same where they must end at zero."""
    draw = torch.Generator().manual_seed(0)
    a, g = (
        torch.randn(50, 4, generator=draw).double(),
        torch.randn(50, 2, generator=draw).double(),
    )
    weight = torch.randn(2, 4, generator=draw).double()
    layer = Factors(g.T @ a / 50, a.T @ a / 50, g.T @ g / 50, 50)
    score = removal(layer, weight, [torch.tensor([0]), torch.tensor([1, 2])])
    for unit, gone in enumerate(([0], [1, 2])):
        stay = [i for i in range(4) if i not in gone]
        rest = Factors(
            g.T @ a[:, stay] / 50, layer.inputs[stay][:, stay], layer.outputs, 50
        )
        assert score.freeze[unit].item() == pytest.approx(layer.score - rest.score)
        target = weight - torch.linalg.solve(
            layer.outputs, layer.gradient
        ) @ torch.linalg.inv(layer.inputs)
        there = target[
            :, gone
        ]  # where the quadratic model would like the weights of the unit to be
        left = layer.inputs[gone][:, gone] - layer.inputs[gone][
            :, stay
        ] @ torch.linalg.solve(layer.inputs[stay][:, stay], layer.inputs[stay][:, gone])
        assert score.prune[unit].item() == pytest.approx(
            torch.trace(layer.outputs @ there @ left @ there.T).item()
        )


def test_compensation_takes_over_what_is_linear() -> None:
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(40, 3, generator=draw).double()
    a = torch.cat([a, a[:, :1] - 2 * a[:, 1:2]], 1)
    weight = torch.randn(2, 4, generator=draw).double()
    inputs = a.T @ a / 40 + 1e-10 * torch.eye(4).double()
    gone = torch.tensor([3])
    kept = compensated(inputs, weight, gone)
    torch.testing.assert_close(
        a[:, :3] @ kept[:, :3].T, a @ weight.T, atol=1e-7, rtol=0
    )


def test_duplicates_go_and_the_outputs_stay() -> None:
    model, batches = net(), data()
    trained(model, batches)
    with torch.no_grad():
        before = model(batches[0][0])
    ms.grow_(model, {"0": 4}, batches[0][0], how=ms.how.Net2Net())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    squared(model, batches[0]).backward()
    optimizer.step()
    optimizer.zero_grad()
    growth = ms.prune_(
        model, "0", loss=squared, data=batches, optimizer=optimizer, tolerance=1e-3
    )
    assert growth is not None
    assert growth.after["0"] == 6
    with torch.no_grad():
        assert (model(batches[0][0]) - before).abs().max() < 0.05 * before.abs().max()
    assert all(
        optimizer.state[p]["exp_avg"].shape == p.shape for p in model.parameters()
    )
    squared(model, batches[0]).backward()
    optimizer.step()


def test_a_needed_unit_stays() -> None:
    model, batches = net(3), data()
    trained(model, batches)
    before = copy.deepcopy(model.state_dict())
    assert ms.prune_(model, "0", loss=squared, data=batches, tolerance=1e-3) is None
    assert all(
        torch.equal(value, before[name]) for name, value in model.state_dict().items()
    )


def test_channels_of_a_convolution_go_with_their_patches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2),
    ).double().eval()  # fmt: skip
    batches = [
        (torch.randn(8, 1, 6, 6).double(), torch.randn(8, 2).double()) for _ in range(6)
    ]
    ms.grow_(model, {"0": 2}, batches[0][0], how=ms.how.Net2Net())
    with torch.no_grad():
        before = model(batches[0][0])
    growth = ms.prune_(model, "0", loss=squared, data=batches, tolerance=1e-2)
    assert growth is not None
    assert growth.after["0"] <= 4
    with torch.no_grad():
        assert (model(batches[0][0]) - before).abs().max() < 0.2 * before.abs().max()


def test_grow_and_prune_in_turn() -> None:
    model, batches = net(2), data()
    optimizer = trained(model, batches, 50)
    grower = ms.Grower(
        model, optimizer, loss=squared, data=batches, when=ms.when.Every(steps=1), how=ms.how.SENN(steps=16), amount=6, axes="0"
    )  # fmt: skip
    assert grower.grow() is not None
    removed = grower.prune(tolerance=0.01)
    assert sum(growth.added["0"] for growth in removed) < 0  # new units have no say yet
    assert grower.grow() is not None
    assert len(grower.history) == grower.clock.growths == 2
    assert grower.flops == sum(growth.flops for growth in [*grower.history, *removed])


@pytest.mark.parametrize("tolerance", [-1, float("nan"), True])
def test_a_wrong_tolerance_is_refused(tolerance: Any) -> None:
    with pytest.raises(ValueError, match="tolerance"):
        ms.prune_(net(), "0", loss=squared, data=data(), tolerance=tolerance)


def test_what_cannot_be_pruned_is_refused() -> None:
    with pytest.raises(ms.UnknownAxis):
        ms.prune_(net(), "nothing", loss=squared, data=data())
    with pytest.raises(ValueError, match="depth"):
        ms.prune_(net(), "0:depth", loss=squared, data=data())
    with pytest.raises(ms.DataError):
        ms.prune_(net(), "0", loss=squared, data=iter(data()))
