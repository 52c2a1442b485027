"""What an adversarial reader found once, and must not find again."""

from __future__ import annotations

import weakref
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
    return nn.Sequential(
        nn.Linear(6, hidden),
        nn.ReLU(),
        nn.Linear(hidden, 9),
        nn.ReLU(),
        nn.Linear(9, 3),
    )


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
    assert (
        "mean runs over it"
        in ms.find_axes(TrainOnlyMean(), torch.randn(4, 6)).frozen["f"]
    )


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
        self.i, self.r, self.f = (
            nn.Linear(6, 8),
            nn.GRU(8, 10, batch_first=True),
            nn.Linear(10, 12),
        )
        self.o = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.relu(self.f(self.r(F.relu(self.i(x)))[0][:, -1])))


def test_axes_hold_only_what_grows() -> None:
    assert (
        "depends on its size" in ms.find_axes(Scaled(), torch.randn(4, 6)).frozen["f"]
    )
    model, x = Recurrent(), torch.randn(4, 5, 6)
    axes = ms.find_axes(model, x)
    widths = [axis.name for axis in axes.values() if axis.kind == "width"]
    assert widths == ["i", "r", "f"]
    for name in widths:
        ms.grow_(model, {name: 2}, x)
    held = weakref.ref(model.f.weight)
    assert "weak reference" in ms.find_axes(model, x).frozen["f"]
    del held
    assert "f" in ms.find_axes(model, x)


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
    refused(
        model, ms.CheckpointError, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)
    )
    data = [(x, torch.randint(0, 3, (4,)))]
    grower = ms.Grower(
        model,
        None,
        loss=loss,
        data=data,
        when=ms.when.Every(steps=1),
        how=ms.how.Random(),
    )
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
    with pytest.warns(UserWarning, match="data has no length"):
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
    options: dict[str, Any] = {
        "loss": loss,
        "data": data,
        "when": ms.when.Every(steps=1),
        "how": ms.how.Random(),
    }
    budget = ms.Budget(sizes={"0": 8, "2": 11})
    grower = ms.Grower(
        model, None, where=ms.where.RoundRobin(), amount=1, budget=budget, **options
    )
    assert [bool(grower.step()) for _ in range(4)] == [True, True, False, False]
    assert (
        grower.reason
        == "every axis has reached the largest size that the budget allows"
    )
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


def mse(model: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)
    )


def pairs(count: int = 5) -> list[Any]:
    return [(torch.randn(16, 4), torch.randn(16, 2)) for _ in range(count)]


def test_training_on_the_side_sees_its_own_steps_under_autocast() -> None:
    inputs = [torch.randn(64, 4) for _ in range(100)]
    data = [(x, torch.tanh(x[:, :2])) for x in inputs]

    def mixed(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(batch[0])
        return F.mse_loss(out.float(), batch[1])

    losses = []
    for call in (mse, mixed):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        ms.grow_(
            model,
            {"0": 4},
            how=ms.how.SWE(lr=1e-2, coupling="full"),
            loss=call,
            data=data,
        )
        losses.append(mse(model, data[0]).item())
    assert losses[1] < 1.5 * losses[0] + 0.01


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.a, self.b1, self.b2 = (
            nn.Linear(4, 8),
            nn.Linear(8, 2),
            nn.Linear(8, 5),
            nn.Linear(5, 2),
        )

    def forward(self, x: Tensor) -> Any:
        h = F.relu(self.trunk(x))
        return self.a(h), self.b2(F.relu(self.b1(h)))


def test_an_axis_that_the_loss_does_not_reach() -> None:
    model, data = TwoOutputs(), pairs()
    call = lambda m, b: F.mse_loss(m(b[0])[0], b[1])
    with pytest.raises(ms.GrowthRefused, match="does not reach b1"):
        ms.grow_(model, {"b1": 3}, how=ms.how.SWE(), loss=call, data=data)
    assert model.b1.out_features == 5
    assert ms.health(model, loss=call, data=data)["b1"]["dead"] == 1
    ms.grow_(model, {"b1": 3}, how=ms.how.Random(zero=None), loss=call, data=data)
    assert model.b1.out_features == 8
    with torch.no_grad():
        frozen = lambda m, b: mse(m, b).detach()
    with pytest.raises(ms.DataError, match="no gradient"):
        ms.Grower(
            small(), None, loss=frozen, data=data, when=ms.when.Every(steps=1), how=ms.how.Random(), where=ms.where.SVoD(), amount=4
        ).step()  # fmt: skip


def test_an_amount_below_one_unit_ends_the_growth() -> None:
    told: list[Any] = []
    grower = ms.recipes.swe_svod(
        small(),
        None,
        loss=mse,
        data=pairs(),
        when=ms.when.Every(steps=1),
        amount=0.01,
        progress=lambda *a: told.append(a),
    )
    assert grower.step() is None
    assert grower.done
    assert "less than one step" in grower.reason
    assert not told


class Endless(torch.utils.data.IterableDataset[Any]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Any:
        return iter([(torch.randn(4), torch.randn(2)) for _ in range(self.count)])


class Spent(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        return torch.randn(4), torch.randn(2)


def test_iterable_datasets_keep_drop_last_and_one_shot_ones_are_refused() -> None:
    model = nn.Sequential(
        nn.Linear(4, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Linear(8, 6),
        nn.ReLU(),
        nn.Linear(6, 2),
    )
    loader = torch.utils.data.DataLoader(Endless(33), batch_size=8, drop_last=True)
    arguments = {"loss": mse, "when": ms.when.Every(epochs=1), "amount": 6}
    with pytest.warns(UserWarning, match="data has no length"):
        growing = ms.recipes.swe_svod(model, None, data=loader, **arguments)
    assert growing.epoch()
    with pytest.raises(ms.DataError, match="one-shot"):
        ms.recipes.swe_svod(
            small(),
            None,
            data=torch.utils.data.DataLoader(Spent(), batch_size=8),
            **arguments,
        )


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l, self.norm, self.h = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.h(F.relu(self.norm(self.l(x))))


def test_buffers_that_a_forward_changes_stay_as_they_are() -> None:
    model = Counting()
    before = model.norm.running_var.clone()

    def call(m: nn.Module, b: Any) -> Tensor:
        return mse(m.train(), b)

    ms.grow_(model, {"l": 3}, how=ms.how.SWE(), loss=call, data=pairs())
    assert model.calls == 0
    assert torch.equal(model.norm.running_var[:8], before)
    assert model.norm.num_batches_tracked == 0


class SparseText(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.l, self.h = (
            nn.Embedding(10, 8, sparse=True),
            nn.Linear(8, 6),
            nn.Linear(6, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.h(F.relu(self.l(self.e(x).mean(1))))


@pytest.mark.parametrize("how", [ms.how.Random(), ms.how.SWE()])
def test_sparse_embeddings_grow(how: Any) -> None:
    model, data = (
        SparseText(),
        [(torch.randint(0, 10, (8, 3)), torch.randn(8, 2)) for _ in range(3)],
    )
    assert ms.health(model, loss=mse, data=data)["e"]["dead"] == 0
    grower = ms.Grower(
        model,
        None,
        loss=mse,
        data=data,
        when=ms.when.Every(steps=1),
        how=how,
        where=ms.where.SVoD(),
        amount=6,
    )
    assert grower.step()


def test_a_loss_may_take_its_batch_apart() -> None:
    data = [{"x": torch.randn(8, 4), "y": torch.randn(8, 2)} for _ in range(3)]

    def call(m: nn.Module, b: Any) -> Tensor:
        y = b.pop("y")
        return F.mse_loss(m(**{"input": b["x"]}), y)

    growth = ms.grow_(small(), {"0": 2}, how=ms.how.SWE(), loss=call, data=data)
    assert growth
    assert all(set(batch) == {"x", "y"} for batch in data)


def test_health_checks_its_arguments() -> None:
    for units, error in (
        ({"0": [100]}, "units 0..7"),
        ({"0": 3}, "units 0..7"),
        ({"0": [-1]}, "units 0..7"),
    ):
        with pytest.raises(ms.GrowthRefused, match=error):
            ms.health(small(), loss=mse, data=pairs(), units=units)
    with pytest.raises(ValueError, match="batches must be"):
        ms.health(small(), loss=mse, data=pairs(), batches=0)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: ms.where.SVoD(lr=-1), lambda: ms.where.SVoD(candidates=1.5), lambda: ms.how.SWE(lr=float("nan")),
        lambda: ms.how.SWE(lr=None), lambda: ms.how.SWE(weight_decay=None), lambda: ms.how.SWE(coupling="half"),
        lambda: ms.how.Random(zero="both"),
    ],
)  # fmt: skip
def test_hyperparameters_are_checked_at_once(wrong: Any) -> None:
    with pytest.raises(ValueError, match="got"):
        wrong()


def test_where_and_loss_are_checked_at_once() -> None:
    arguments = {
        "loss": mse,
        "data": pairs(),
        "when": ms.when.Every(steps=1),
        "how": ms.how.Random(),
        "amount": 2,
    }
    for where in ("svod", ms.where.SVoD):
        with pytest.raises(TypeError, match="where must be"):
            ms.Grower(small(), None, where=where, **arguments)
    with pytest.raises(ValueError, match="scalar"):
        ms.Grower(small(), None, **arguments).step(torch.ones(3))


def test_stages_that_diverge_say_so() -> None:
    model = small()
    stages = ms.recipes.swe_svod_stages(
        model,
        lambda p: torch.optim.SGD(p, lr=1e30),
        loss=mse,
        data=pairs(),
        validation=pairs(1),
        amount=[2],
        epochs=2,
    )
    with pytest.raises(ms.DataError, match="not finite in any epoch"):
        next(stages)
