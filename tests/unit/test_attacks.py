"""What an adversarial reader found once, and must not find again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler

import meristem as ms


def mlp(hidden: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, hidden), nn.ReLU(), nn.Linear(hidden, 9), nn.ReLU(), nn.Linear(9, 3))


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


class AuxiliaryHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.h, self.aux = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        h = F.relu(self.f(x))
        return (self.h(h), self.aux(h)) if self.training else self.h(h)


def test_what_runs_only_while_training_grows_too() -> None:
    model, x = AuxiliaryHead(), torch.randn(4, 6)
    with torch.no_grad():
        old = model.train()(x)
    ms.grow_(model, {"f": 2}, x)
    new = model.train()(x)
    torch.testing.assert_close(new, old)


class TrainOnlyMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.h = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.f(x))
        return self.h(h - h.mean(-1, keepdim=True) if self.training else h)


def test_what_mixes_only_while_training_is_seen() -> None:
    assert "mean over it" in ms.find_axes(TrainOnlyMean(), torch.randn(4, 6)).frozen["f"]


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.h = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.f(x))
        return self.h(h / h.shape[-1])


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i, self.r, self.f = nn.Linear(6, 8), nn.GRU(8, 10, batch_first=True), nn.Linear(10, 12)
        self.o = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.relu(self.f(self.r(F.relu(self.i(x)))[0][:, -1])))


def test_axes_hold_only_what_grows() -> None:
    assert "depends on its size" in ms.find_axes(Scaled(), torch.randn(4, 6)).frozen["f"]
    model, x = Recurrent(), torch.randn(4, 5, 6)
    axes = ms.find_axes(model, x)
    assert list(axes) == ["f"]
    ms.grow_(model, {"f": 2}, x)


@pytest.mark.parametrize("count", [[8, 9], {"a": 1}, "2", 2.0, True])
def test_counts_of_a_growth_are_ints(count: Any) -> None:
    with pytest.raises(TypeError):
        ms.grow_(mlp(), {"0": count}, torch.randn(4, 6))


def test_numpy_integers_are_ints_and_masks_are_not_indices() -> None:
    x, model = torch.randn(4, 6), mlp()
    ms.grow_(model, {"0": np.int64(2)}, x)
    ms.narrow_(model, {"0": np.int64(1)}, x)
    ms.narrow_(model, {"0": np.array([0, 3])}, x)
    assert model[0].out_features == 7
    for wrong in ([True, False], [1.5], 1.5):
        with pytest.raises(TypeError):
            ms.narrow_(model, {"0": wrong}, x)
    with pytest.raises(TypeError, match="named by a string"):
        ms.grow_(model, {0: 1}, x)
    with pytest.raises(TypeError, match=r"meristem\.how\.Random"):
        ms.grow_(model, {"0": 1}, x, how="net2net")
    with pytest.raises(TypeError, match="care"):
        ms.grow_(model, {"0": 1}, x, care="warm")


def test_a_failed_load_changes_nothing(tmp_path: Path) -> None:
    x, grown = torch.randn(4, 6), mlp()
    adam = torch.optim.Adam(grown.parameters())
    loss(grown, (x, torch.randint(0, 3, (4,)))).backward()
    adam.step()
    ms.grow_(grown, {"0": 2}, x, optimizer=adam)
    ms.save(tmp_path, grown, optimizer=adam)

    def refused(model: nn.Module, error: type[Exception], **options: Any) -> None:
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(error):
            ms.load(tmp_path, model, **options)
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        assert model[0].out_features == 8

    model = mlp()
    pending = model(x).sum()
    refused(model, ms.PendingBackward)
    pending.backward()
    refused(model, ms.CheckpointError, optimizer=torch.optim.Adam([model[0].weight]))
    refused(model, ms.CheckpointError, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    data = [(x, torch.randint(0, 3, (4,)))]
    grower = ms.Grower(model, None, loss=loss, data=data, when=ms.when.Every(steps=1), how=ms.how.Random())
    refused(model, ms.CheckpointError, grower=grower)
    wide = mlp(16)
    ms.save(tmp_path, wide)
    refused(mlp(), ms.CheckpointError)


class Counted(Dataset[Any]):
    def __init__(self) -> None:
        self.seen: set[int] = set()

    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> Any:
        self.seen.add(int(i))
        return torch.randn(6), 0


def test_growth_batches_come_from_the_loaders_own_sampler() -> None:
    data = Counted()
    loader = DataLoader(data, 4, sampler=SubsetRandomSampler(range(8)))
    ms.grow_(mlp(), {"0": 2}, how=ms.how.GradMax(batches=4), loss=loss, data=loader)
    assert data.seen <= set(range(8))


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([(torch.randn(6), 0)] * 32)


def test_iterable_data_sets_have_epochs_of_unknown_length() -> None:
    model = mlp()
    grower = ms.Grower(
        model,
        None,
        loss=loss,
        data=DataLoader(Stream(), 8),
        when=ms.when.Every(epochs=1),
        how=ms.how.Random(),
        amount=2,
    )
    assert grower.step() is None
    assert grower.epoch().after == {"0": 9, "2": 10}


def test_the_callers_modes_do_not_reach_in() -> None:
    x = torch.randn(4, 6)
    data = [(x, torch.randint(0, 3, (4,)))]
    model = mlp()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x).float().sum().backward()
        ms.grow_(model, {"0": 2}, x, how=ms.how.GradMax(), loss=loss, data=data)
    with torch.no_grad():
        ms.grow_(model, {"0": 2}, x, how=ms.how.GradMax(), loss=loss, data=data)
    assert model[0].out_features == 12


def test_a_full_axis_leaves_the_others_growing() -> None:
    model, x = mlp(), torch.randn(4, 6)
    data = [(x, torch.randint(0, 3, (4,)))]
    options: dict[str, Any] = {"loss": loss, "data": data, "when": ms.when.Every(steps=1), "how": ms.how.Random()}
    budget = ms.Budget(sizes={"0": 8, "2": 11})
    grower = ms.Grower(model, None, where=ms.where.RoundRobin(), amount=1, budget=budget, **options)
    assert [bool(grower.step()) for _ in range(4)] == [True, True, False, False]
    assert grower.reason == "every axis has reached the largest size that the budget allows"
    for amount in (0, -1, 0.0, [0], {"0": 0}):
        with pytest.raises(ValueError, match="amount must be positive"):
            ms.Grower(model, None, amount=amount, **options)
    with pytest.raises(ValueError, match="round_to"):
        ms.Grower(model, None, round_to=0, **options)
    with pytest.raises(ms.UnknownAxis):
        ms.Grower(model, None, budget=ms.Budget(sizes={"nope": 9}), **options)
    small = ms.Grower(model, None, amount=0.01, **options)
    assert small.step() is None
    assert "less than one step" in small.reason


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.h = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.h(F.relu(self.f(x)) * mask[:, None])


def test_a_loss_may_call_with_positional_and_keyword_arguments() -> None:
    model, data = Masked(), [(torch.randn(4, 6), torch.ones(4))]
    call = lambda m, b: m(b[0], mask=b[1]).square().mean()
    assert ms.grow_(model, {"f": 2}, loss=call, data=data).after == {"f": 10}


def test_a_loss_that_uses_other_weights_of_the_grown_width() -> None:
    model, x = AuxiliaryHead(), torch.randn(4, 6)
    model.extra = nn.Linear(8, 3)
    call = lambda m, b: m(b).square().mean() + m.extra(F.relu(m.f(b))).square().mean()
    with pytest.raises(ms.GrowthRefused, match="loss fails on a copy"):
        ms.grow_(model, {"f": 2}, x, loss=call, data=[x])
    assert model.f.out_features == 8


def test_half_precision_grows_by_the_side_that_is_exact() -> None:
    model, x = mlp().bfloat16(), torch.randn(4, 6).bfloat16()
    call = lambda m, b: m(b).float().square().mean()
    growth = ms.grow_(model, {"0": 2}, x, how=ms.how.GradMax(), loss=call, data=[x])
    assert growth.max_change <= 1e-2
    assert "zero fan-out" in growth.notes["0"]
