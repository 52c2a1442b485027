"""The grower inside a user's own loop: triggers, amounts, budgets, resumption."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from zoo import MLP, make

import meristem as ms
from meristem.methods import Choice, Clock, Lab, Offer, Share


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def loader(n: int = 40, batch: int = 8) -> DataLoader:
    torch.manual_seed(3)
    data = TensorDataset(torch.randn(n, 10), torch.randint(0, 4, (n,)))
    return DataLoader(
        data, batch_size=batch, shuffle=True, generator=torch.Generator().manual_seed(0)
    )


def grower(model: nn.Module, opt: Any, data: Any, **options: Any) -> ms.Grower:
    defaults: dict[str, Any] = {
        "when": ms.when.Every(epochs=1),
        "how": ms.how.Random(),
        "amount": 4,
    }
    return ms.Grower(model, opt, loss=loss, data=data, **(defaults | options))


def train(
    model: nn.Module, opt: Any, data: Any, one: ms.Grower, epochs: int
) -> list[ms.Growth]:
    growths = []
    for _ in range(epochs):
        for batch in data:
            value = one.loss(model, batch)
            opt.zero_grad()
            value.backward()
            opt.step()
            growth = one.step(value)
            if growth:
                growths.append(growth)
        one.epoch(metric=0.5)
    return growths


def test_it_grows_at_the_ends_of_epochs_and_tells() -> None:
    model, data = MLP(), loader()
    opt = torch.optim.AdamW(model.parameters())
    one = grower(model, opt, data, how=ms.how.GradMax())
    growths = train(model, opt, data, one, 3)
    assert [g.step for g in growths] == [5, 10, 15]
    assert one.history == growths
    assert model.fc1.out_features == 12 + 3 * 2
    assert {a: f["dead"] for a, f in growths[0].health["insertion"].items()} == {
        "fc1": 0.0,
        "fc2": 0.0,
    }
    assert one.flops > 0
    assert one.metrics == [(5, 0.5), (10, 0.5), (15, 0.5)]


@pytest.mark.parametrize(
    ("when", "clock", "due"),
    [
        (ms.when.Every(steps=5), Clock(step=2), False),
        (ms.when.Every(steps=5), Clock(step=5), True),
        (ms.when.Every(steps=5), Clock(step=7), False),
        (ms.when.Every(steps=5), Clock(step=45), True),
        (ms.when.Every(steps=100, start=50, growths=1), Clock(step=20), False),
        (ms.when.Every(steps=100, start=50, growths=1), Clock(step=75), False),
        (ms.when.Every(steps=100, start=50, growths=1), Clock(step=200), True),
        (
            ms.when.Every(steps=100, start=50, growths=1),
            Clock(step=300, growths=1),
            False,
        ),
        (ms.when.Every(epochs=2), Clock(step=9, epoch=2), False),
        (ms.when.Every(epochs=2), Clock(step=9, epoch=2, epoch_ended=True), True),
        (ms.when.At(steps=(3, 7)), Clock(step=7), True),
        (ms.when.At(epochs=(1,)), Clock(step=7, epoch=1), False),
    ],
)
def test_the_truth_table_of_triggers(when: Any, clock: Clock, due: bool) -> None:
    assert when.due(clock) is due


@pytest.mark.parametrize("options", [{}, {"steps": 3, "epochs": 2}, {"steps": -1}])
def test_triggers_check_their_period(options: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        ms.when.Every(**options)


def test_amounts() -> None:
    cases: list[tuple[Any, Any, list[dict[str, int]]]] = [
        (5, ms.where.Uniform(), [{"fc1": 3, "fc2": 2}]),
        (1.0, ms.where.Proportional(), [{"fc1": 12, "fc2": 9}, {"fc1": 24, "fc2": 18}]),
        ([4, 2], ms.where.Uniform(), [{"fc1": 2, "fc2": 2}, {"fc1": 1, "fc2": 1}]),
        ({"fc2": 7}, ms.where.Uniform(), [{"fc2": 7}, {"fc2": 7}]),
        (3, ms.where.RoundRobin(), [{"fc1": 3}, {"fc2": 3}, {"fc1": 3}]),
    ]
    for amount, where, expected in cases:
        model, data = MLP(), loader(16)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        one = grower(model, opt, data, amount=amount, where=where)
        growths = train(model, opt, data, one, len(expected))
        assert [g.added for g in growths] == expected


def test_the_list_of_amounts_ends() -> None:
    model, data = MLP(), loader(16)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    one = grower(model, opt, data, amount=[2])
    assert len(train(model, opt, data, one, 3)) == 1
    assert one.done
    assert one.reason == "the list of amounts is used up"


def test_by_gain_gives_the_units_to_the_largest_gains() -> None:
    model, data = MLP(), loader(64, 32)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for per_flop in (False, True):
        one = grower(
            model,
            opt,
            data,
            how=ms.how.GradMax(),
            where=ms.where.ByGain(per_flop),
            amount=6,
        )
        (growth,) = train(model, opt, data, one, 1)
        assert sum(growth.added.values()) == 6
    plain = grower(model, opt, data, where=ms.where.ByGain(), amount=6)
    with pytest.raises(ValueError, match=r"how\.GradMax"):
        train(model, opt, data, plain, 1)


@pytest.mark.parametrize(
    ("budget", "most"),
    [
        (
            ms.Budget(parameters=400),
            lambda m: sum(p.numel() for p in m.parameters()) <= 400,
        ),
        (ms.Budget(units=30), lambda m: m.fc1.out_features + m.fc2.out_features <= 30),
        (ms.Budget(flops=700), lambda m: True),
        (
            ms.Budget(sizes={"fc1": 14, "fc2": 9}),
            lambda m: m.fc1.out_features == 14 and m.fc2.out_features == 9,
        ),
        (ms.Budget(growths=2), lambda m: m.fc1.out_features == 20),
    ],
)
def test_budgets_bind_and_say_so(budget: ms.Budget, most: Any) -> None:
    model, data = MLP(), loader(16)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    one = grower(model, opt, data, amount=8, budget=budget)
    assert train(model, opt, data, one, 8)
    assert one.done
    assert "budget" in one.reason
    assert most(model)


class Grouped(nn.Module):
    """One layer that grows by single units, and one by fours."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(10, 8), nn.Linear(8, 12)
        self.conv, self.out = nn.Conv1d(12, 12, 1, groups=4), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.out(torch.relu(self.conv(x[..., None])[..., 0]))


class Gainful(ms.how.Random):
    """Random units with gains, the first of them alone worth anything."""

    def propose(self, lab: Lab, axis: ms.Axis, count: int) -> Offer:
        offer = super().propose(lab, axis, count)
        gains = tuple(1.0 / (1 + place) for place in range(count // axis.multiple))
        return replace(offer, gains=gains)


def added(one: ms.Grower, growths: int = 2) -> list[dict[str, int]]:
    found = []
    for _ in range(growths):
        growth = one.grow()
        found.append(dict(growth.added) if growth else {})
    return found


@pytest.mark.parametrize(
    "where", [ms.where.RoundRobin(), ms.where.Uniform(), ms.where.ByGain()]
)
def test_an_axis_with_larger_steps_than_the_amount_is_passed_over(where: Any) -> None:
    model = Grouped()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {
        "where": where,
        "how": Gainful(),
        "amount": 2,
        "axes": ["first", "second"],
    }
    one = grower(model, opt, loader(), **options)
    assert added(one) == [{"first": 2}, {"first": 2}]
    assert not one.done


@pytest.mark.parametrize("where", [ms.where.RoundRobin(), ms.where.Uniform()])
def test_an_axis_past_the_budget_is_passed_over(where: Any) -> None:
    model = MLP()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    costs = {}
    for name in ("fc1", "fc2"):
        costs[name] = ms.plan(model, {name: 1}, torch.randn(2, 10)).parameters[1]
    cheap = min(costs, key=lambda name: costs[name])
    assert costs[cheap] < max(costs.values())
    budget = ms.Budget(parameters=costs[cheap])
    one = grower(model, opt, loader(), where=where, amount=1, budget=budget)
    assert added(one) == [{cheap: 1}, {}]
    assert one.done


class Attention(nn.Module):
    """As in nanoGPT: the width of the stream and the heads grow together."""

    def __init__(self) -> None:
        super().__init__()
        self.n_head = 4
        self.stem, self.head = nn.Linear(10, 16), nn.Linear(16, 4)
        self.into, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.stem(x)[:, None]
        batch, length, width = stream.shape
        parts = []
        for part in self.into(stream).split(width, 2):
            shape = (batch, length, self.n_head, width // self.n_head)
            parts.append(part.view(shape).transpose(1, 2))
        mixed = F.scaled_dot_product_attention(*parts).transpose(1, 2)
        return self.head(stream + self.out(mixed.reshape(stream.shape)))[:, 0]


def test_a_budget_binds_what_grows_together_with_an_axis() -> None:
    model = Attention()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {
        "amount": 8,
        "axes": ["stem"],
        "budget": ms.Budget(sizes={"into:heads": 5}),
    }
    one = grower(model, opt, loader(), **options)
    assert added(one) == [{"stem": 4, "into:heads": 1}, {}]
    assert one.done


@pytest.mark.parametrize("where", [ms.where.Uniform(), ms.where.ByGain()])
def test_rounding_does_not_multiply_an_amount(where: Any) -> None:
    model = MLP()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"where": where, "how": Gainful(), "amount": 4, "round_to": 4}
    one = grower(model, opt, loader(), **options)
    found = added(one, 3)
    # From 9 to 12 there are three.
    assert [sum(counts.values()) for counts in found] == [3, 4, 4]


def test_a_rule_may_give_more_than_was_offered() -> None:
    class Lavish(ms.where.ByGain):
        def share(self, choice: Choice) -> Share:
            return Share({choice.axes[0].name: 4 * choice.total})

    model = MLP()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    one = grower(model, opt, loader(), where=Lavish(), how=Gainful(), amount=2)
    assert added(one, 1) == [{"fc1": 8}]


def test_axes_are_chosen_by_pattern_and_rounded() -> None:
    model, data = MLP(), loader(16)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    one = grower(model, opt, data, axes=["fc*", "!fc2"], amount=7, round_to=8)
    (growth,) = train(model, opt, data, one, 1)
    assert growth.after == {"fc1": 16}
    with pytest.raises(ms.GrowthRefused, match="nothing in the model can grow"):
        grower(model, opt, data, axes="encoder*")


def test_resuming_is_never_having_stopped(tmp_path: Any) -> None:
    def fresh() -> tuple[nn.Module, Any, ms.Grower, Any]:
        torch.manual_seed(0)
        model, data = MLP(), loader()
        opt = torch.optim.AdamW(model.parameters())
        one = grower(
            model,
            opt,
            data,
            how=ms.how.GradMax(),
            generator=torch.Generator().manual_seed(1),
        )
        return model, opt, one, list(data)

    model, opt, one, batches = fresh()
    train(model, opt, batches, one, 4)

    half, half_opt, half_one, batches = fresh()
    train(half, half_opt, batches, half_one, 2)
    ms.save(tmp_path / "run", half, optimizer=half_opt, grower=half_one)

    again, again_opt, again_one, batches = fresh()
    assert (
        ms.load(tmp_path / "run", again, optimizer=again_opt, grower=again_one) is again
    )
    train(again, again_opt, batches, again_one, 2)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    assert [g.step for g in again_one.history] == [g.step for g in one.history]


def test_epochs_of_unknown_length_are_counted_by_epoch() -> None:
    class Stream:
        def __iter__(self) -> Any:
            return iter([(torch.randn(8, 10), torch.randint(0, 4, (8,)))] * 3)

    model, data = MLP(), Stream()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="data has no length"):
        one = grower(model, opt, data)
    for batch in data:
        value = loss(model, batch)
        opt.zero_grad()
        value.backward()
        opt.step()
        assert one.step(value) is None
    assert one.epoch().after == {"fc1": 14, "fc2": 11}


def test_the_users_iterator_and_generator_are_left_alone() -> None:
    data = loader()
    orders = []
    for grows in (False, True):
        model = MLP()
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        data.generator.manual_seed(0)
        one = grower(
            model, opt, data, when=ms.when.Every(steps=1), how=ms.how.GradMax()
        )
        seen = []
        for x, y in data:
            seen.append(x)
            if grows:
                value = loss(model, (x, y))
                opt.zero_grad()
                value.backward()
                opt.step()
                one.step(value)
        orders.append(seen)
    assert all(torch.equal(a, b) for a, b in zip(*orders, strict=True))


def test_the_recipe_runs_on_convolutions() -> None:
    model, x = make("bn_conv")
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    batch = (x, torch.randint(0, 4, (len(x),)))
    one = ms.recipes.gradmax(
        model, opt, loss=loss, data=[batch], when=ms.when.Every(steps=1)
    )
    model.train()
    loss(model, batch).backward()
    opt.step()
    assert one.step().added == {"conv1": 2, "conv2": 2, "fc1": 2}
    assert model.training


def test_a_step_without_growth_traces_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = MLP(), loader()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    one = grower(model, opt, data, when=ms.when.Every(steps=1000))
    monkeypatch.setattr("meristem.grower.Structure", None)
    train(model, opt, data, one, 1)
    assert one.clock.step == 5
