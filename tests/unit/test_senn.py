"""SENN: the tests of its specification, on the score, on what is proposed and on what is accepted."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo import make

import meristem as ms
from meristem.core.offer import Offer
from meristem.how.candidates import gains as gains_of
from meristem.how.search import Climb, Search, is_doubtful, searched
from meristem.lab.batches import growth_batches
from meristem.lab.laboratory import Lab, Loan
from meristem.lab.neutral import neutral
from meristem.statistics import curvature
from meristem.statistics.curvature import (
    Candidates,
    Factors,
    bound,
    exact_score,
    gain,
    residual,
)
from meristem.structure import Structure
from meristem.structure.twin import Example


def factors(a: Tensor, g: Tensor) -> Factors:
    n = len(a)
    return Factors(g.T @ a / n, a.T @ a / n, g.T @ g / n, n)


def candidates(a: Tensor, p: Tensor, g: Tensor) -> Candidates:
    n = len(a)
    return Candidates(g.T @ p / n, a.T @ p / n, p.T @ p / n)


A = torch.tensor([[1.0, 0], [0, 1], [1, 1], [2, -1]], dtype=torch.float64)
P = torch.tensor([[1.0], [0], [2], [1]], dtype=torch.float64)
G = torch.tensor([[1.0, 0], [0, 1], [-1, 1], [2, 0]], dtype=torch.float64)
ONE = torch.ones(4, 1, dtype=torch.float64)


def test_the_golden_case() -> None:
    layer, new = factors(A, G), candidates(A, P, G)
    assert layer.score == pytest.approx(1.625668, abs=1e-6)
    assert factors(torch.cat([A, P], 1), G).score == pytest.approx(1.917355, abs=1e-6)
    assert gain(layer, new) == pytest.approx(0.291687, abs=1e-6)
    assert bound(layer, new) == pytest.approx(0.031456, abs=1e-6)
    torch.testing.assert_close(
        residual(layer, new)[:, 0],
        torch.tensor([-0.205882, -0.058824]).double(),
        atol=1e-6,
        rtol=0,
    )
    left = G - A @ torch.linalg.solve(layer.inputs, layer.gradient.T)
    expected = [
        [0.470588, -0.294118],
        [0.823529, 0.235294],
        [-0.705882, -0.058824],
        [0.117647, 0.176471],
    ]
    torch.testing.assert_close(left, torch.tensor(expected).double(), atol=1e-6, rtol=0)
    assert (left.T @ A).abs().max() < 1e-12
    biased = torch.cat([A, ONE], 1)
    assert factors(biased, G).score == pytest.approx(1.909091, abs=1e-6)
    assert gain(factors(biased, G), candidates(biased, P, G)) == pytest.approx(
        0.090909, abs=1e-6
    )


shapes = st.tuples(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 10**6)
)


@given(shapes)
@settings(max_examples=50, deadline=None)
def test_the_bound_and_the_gain(shape: tuple[int, int, int, int]) -> None:
    """0 <= Delta eta' <= Delta eta = eta after - eta before, and neither sees how inputs or candidates are mixed."""
    inputs, new, outputs, seed = shape
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *size: torch.randn(*size, generator=draw, dtype=torch.float64)
    a, p, g = normal(40, inputs), normal(40, new), normal(40, outputs)
    layer, added = factors(a, g), candidates(a, p, g)
    exact = gain(layer, added)
    assert 0 <= bound(layer, added) <= exact * (1 + 1e-9)
    assert exact == pytest.approx(
        factors(torch.cat([a, p], 1), g).score - layer.score, rel=1e-6, abs=1e-9
    )
    mixed_a, mixed_p = a @ normal(inputs, inputs), p @ normal(new, new)
    mixed = factors(mixed_a, g), candidates(mixed_a, mixed_p, g)
    assert gain(*mixed) == pytest.approx(exact, rel=1e-5, abs=1e-9)
    assert bound(*mixed) == pytest.approx(bound(layer, added), rel=1e-5, abs=1e-9)


def test_a_duplicate_and_a_constant_add_nothing() -> None:
    draw = torch.Generator().manual_seed(0)
    a = torch.cat(
        [torch.randn(30, 3, generator=draw).double(), torch.ones(30, 1).double()], 1
    )
    g = torch.randn(30, 2, generator=draw).double()
    for p in (a[:, :1] * 2, torch.full((30, 1), 3.0).double()):
        assert bound(factors(a, g), candidates(a, p, g)) < 1e-20
        damped = factors(a, g).damped(0.01)
        assert (
            gain(damped, candidates(a, p, g).damped(0.01, factors(a, g)))
            < 0.02 * damped.score
        )


def net(activation: type[nn.Module] = nn.Tanh, hidden: int = 6) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(4, hidden), activation(), nn.Linear(hidden, 3)
    ).double()


def squared(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square().sum(1).mean()


def data(batches: int = 4, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(batches, size, 4, generator=draw).double()
    y = torch.stack([(x[..., 0] * x[..., 1]), x[..., 2].sin(), x[..., 3].abs()], -1)
    return list(zip(x, y, strict=True))


def test_the_score_of_a_network_is_made_of_its_own_moments() -> None:
    """Against moments of explicit rows: linear with its bias, over batches, with the gradients of single examples."""
    model, batches = net(), data()
    found = curvature.measure(copy.deepcopy(model), squared, batches)
    x, y = (torch.cat([b[i] for b in batches]) for i in range(2))
    hidden = model[1](model[0](x)).detach()
    back = 2 * (model(x) - y).detach()
    expected = factors(torch.cat([hidden, torch.ones(len(x), 1).double()], 1), back)
    layer = found.layers["2"]
    torch.testing.assert_close(layer.gradient, expected.gradient)
    torch.testing.assert_close(layer.inputs, expected.inputs)
    torch.testing.assert_close(layer.outputs, expected.outputs)
    assert layer.samples == len(x)
    assert found.score() == pytest.approx(
        sum(one.damped(curvature.DAMPING).score for one in found.layers.values())
    )


@pytest.mark.parametrize("options", [
    {}, {"stride": 2}, {"padding": 1, "padding_mode": "circular"}, {"dilation": 2, "padding": "same"}, {"bias": False},
])  # fmt: skip
def test_a_convolution_is_scored_over_its_patches(options: dict[str, Any]) -> None:
    """The gradient from patches is the gradient that autograd gives the kernel."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, **options),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    ).double()
    batch = torch.randn(5, 3, 8, 8).double(), torch.randn(5, 2).double()
    layer = curvature.measure(copy.deepcopy(model), squared, [batch]).layers["0"]
    squared(model, batch).backward()
    expected = model[0].weight.grad.flatten(1)
    if model[0].bias is not None:
        expected = torch.cat([expected, model[0].bias.grad[:, None]], 1)
    torch.testing.assert_close(layer.gradient, expected)
    assert torch.linalg.eigvalsh(layer.damped(0.1).inputs).min() > 0


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm([4, 5, 5])]
)
def test_a_norm_is_scored_by_its_scale_and_shift(norm: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        copy.deepcopy(norm),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(100, 2),
    ).double()
    batch = torch.randn(6, 3, 5, 5).double(), torch.randn(6, 2).double()
    layer = curvature.measure(copy.deepcopy(model), squared, [batch]).layers["1"]
    squared(model.eval(), batch).backward()
    expected = torch.cat([model[1].weight.grad.flatten(), model[1].bias.grad.flatten()])
    torch.testing.assert_close(layer.gradient[0], expected)


def test_the_exact_score_stays_below_the_loss_gradients_own_norm() -> None:
    """eta = (1/N) ||P g_y||^2 <= lambda = (1/N) ||g_y||^2 with the exact Fisher matrix, here of the outputs."""
    draw = torch.Generator().manual_seed(0)
    jacobian, back = (
        torch.randn(20, 12, generator=draw).double(),
        torch.randn(20, generator=draw).double(),
    )
    gradient = jacobian.T @ back / 20
    eta = exact_score(jacobian, gradient)
    assert eta <= back.square().mean().item()
    assert eta == pytest.approx(
        (back @ jacobian @ torch.linalg.lstsq(jacobian, back[:, None]).solution).item()
        / 20
    )


def test_additions_on_frozen_parameters_respect_the_rate_bound() -> None:
    """Random features one after the other, each taken where it adds more than tau of the score and alpha in all."""
    draw = torch.Generator().manual_seed(0)
    for tau, alpha in ((0.05, 0.01), (0.3, 0.001), (1.0, 0.05)):
        back = torch.randn(60, generator=draw).double()
        rows = torch.randn(60, 1, generator=draw).double()
        most, taken = back.square().mean().item(), 0
        eta = exact_score(rows, rows.T @ back / 60)
        for _ in range(58):
            wider = torch.cat([rows, torch.randn(60, 1, generator=draw).double()], 1)
            new = exact_score(wider, wider.T @ back / 60)
            if new - eta > max(tau * eta, alpha):
                rows, eta, taken = wider, new, taken + 1
        assert taken < curvature.largest_number(alpha, tau, most)


def space(
    model: nn.Module, axis: str = "0", method: ms.how.SENN | None = None, count: int = 2
) -> Climb:
    batches = data()
    structure = Structure(model, Example((batches[0][0],), {}))
    lab = Lab(
        structure,
        Loan(
            torch.Generator().manual_seed(0),
            squared,
            growth_batches(batches, 4, torch.Generator()),
        ),
    )
    method = method or ms.how.SENN(candidates=5)
    search = Search(method.candidates, method.steps, method.batches, method.damping)
    return Climb(
        lab,
        squared,
        structure.axes.named(axis),
        count,
        search,
        search.parts(lab.batches)[0],
    )


def test_the_gradient_of_the_score_matches_finite_differences() -> None:
    tried = space(net())
    started = neutral(tried.lab, tried.axis, tried.space.trials, zero="fan_out")
    place = tried.axis.places("fan_in")[0].place

    def score(strip: Tensor) -> Tensor:
        found = tried.space.whitened(
            {**started, place: strip}, tried.space.seen(tried.first[0])
        )
        return sum(layer.square().sum((1, 2)) for layer in found)

    assert torch.autograd.gradcheck(
        score, started[place].clone().requires_grad_(), atol=1e-6
    )
    alone = bound_by_hand(tried, started, 3)
    assert score(started[place])[3].item() == pytest.approx(alone, rel=1e-6)


def bound_by_hand(tried: Climb, strips: Any, unit: int) -> float:
    """Delta eta' of one candidate from rows that are computed here; the layer's own moments are those of all batches."""
    model = tried.lab.copied()
    x, y = tried.first[0]
    weight, bias = (
        strips[slot.place] for slot in tried.axis.slots if slot.role != "fan_out"
    )
    read = torch.tanh(x @ weight[unit].flatten() + bias[unit].item())[:, None]
    hidden = torch.cat(
        [model[1](model[0](x)), torch.ones(len(x), 1).double()], 1
    ).detach()
    layer = tried.space.moments["2"]
    back = 2 * (model(x) - y).detach()
    left = back - hidden @ torch.linalg.solve(layer.inputs, layer.gradient.T)
    own = (read.T @ read / len(x)).item() + tried.space.damping("2")
    against = (left.T @ read / len(x))[:, 0]
    return (
        (against @ torch.linalg.solve(layer.outputs, against)).item()
        / own
        / layer.spread
    )


def test_optimised_candidates_never_score_below_their_start() -> None:
    tried = space(net(nn.ReLU), method=ms.how.SENN(candidates=8, steps=25))
    started = neutral(tried.lab, tried.axis, tried.space.trials, zero="fan_out")
    moving = [slot.place for slot in tried.axis.slots if slot.role != "fan_out"]
    reached = tried.optimised(started, moving)
    before, after = (tried.space.scores(one, tried.first) for one in (started, reached))
    assert (after >= before).all()
    assert (after > 1.5 * before).sum() >= 4


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.GELU])
def test_what_is_inserted_is_what_was_optimised(activation: type[nn.Module]) -> None:
    """Outputs stay (a wider matrix product may sum in another order); the new fan-out receives E[g a_p^T], the new fan-in
    nothing.
    """
    model, batches = net(activation), data()
    x, y = batches[0]
    with torch.no_grad():
        before = model(x)
    offered: list[Any] = []

    class Seen(ms.how.SENN):
        def propose(self, *args: Any) -> Any:
            offered.append(super().propose(*args))
            return offered[-1]

    growth = ms.grow_(model, {"0": 3}, x, how=Seen(), loss=squared, data=batches)
    assert growth.flops > 0
    with torch.no_grad():
        torch.testing.assert_close(model(x), before, rtol=0, atol=1e-14)
    assert not model[2].weight[:, 6:].any()
    weight = offered[0].strips[("0.weight", 0)][:, 0]
    assert torch.equal(model[0].weight[6:], weight)
    squared(model, (x, y)).backward()
    new = torch.nn.functional.linear(x, model[0].weight[6:], model[0].bias[6:])
    expected = (2 * (before - y)).T @ activation()(new) / len(x)
    torch.testing.assert_close(model[2].weight.grad[:, 6:], expected.detach())
    assert not model[0].weight.grad[6:].any()
    assert (
        list(offered[0].gains) == sorted(offered[0].gains, reverse=True)
        or len(offered[0].gains) == 3
    )


def test_a_layer_is_the_identity_when_it_is_inserted() -> None:
    model = net().float()
    batches = [(x.float(), y.float()) for x, y in data()]
    growth = ms.grow_(
        model,
        {"2:depth": 1},
        batches[0][0],
        how=ms.how.SENN(),
        loss=squared,
        data=batches,
    )
    assert growth.max_change <= 1e-6
    assert isinstance(model[2][1], ms.Rational)


def test_no_gradient_no_growth() -> None:
    """A net that fits exactly: no NaN, nothing accepted."""
    model = net()
    batches = [(x, model(x).detach()) for x, _ in data()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    grower = ms.Grower(
        model, optimizer, loss=squared, data=batches, when=ms.when.Every(steps=1), how=ms.how.SENN(), where=ms.where.SENN(),
        amount=4,
    )  # fmt: skip
    assert grower.grow() is None
    assert grower.clock.refusals == 1
    assert all(torch.isfinite(p).all() for p in model.parameters())


def linear_start(outputs: int) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, outputs))
    return model, torch.optim.Adam(model.parameters(), lr=1e-2)


def grown_in_training(
    model: nn.Module,
    optimizer: Any,
    batches: Any,
    loss: Any,
    epochs: int,
    **options: Any,
) -> ms.Grower:
    every = ms.when.Every(epochs=20)
    grower = ms.recipes.senn(
        model, optimizer, loss=loss, data=batches, when=every, amount=8, **options
    )
    for _ in range(epochs):
        for batch in batches:
            value = loss(model, batch)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            grower.step(value)
    return grower


def moons(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    make_moons = pytest.importorskip("sklearn.datasets").make_moons
    x, y = make_moons(rows, noise=0.3, random_state=seed)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y)


def test_two_moons_open_a_hidden_layer_and_growth_ends_by_itself() -> None:
    x, y = moons(200, 0)
    batches = list(zip(x.split(20), y.split(20), strict=True))
    model, optimizer = linear_start(2)
    loss = lambda net, batch: nn.functional.cross_entropy(net(batch[0]), batch[1])
    grower = grown_in_training(model, optimizer, batches, loss, 300)
    assert any(isinstance(module, ms.PReLU) for module in model.modules())
    assert grower.done
    assert "nothing is worth its parameters" in grower.reason
    unseen, labels = moons(2000, 1)
    assert (model(unseen).argmax(1) == labels).float().mean() > 0.88


@pytest.mark.parametrize("seed", range(4))
def test_a_linear_target_adds_nothing(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 2, generator=draw)
    y = x @ torch.tensor([[1.0], [-2.0]]) + 0.3 * torch.randn(200, 1, generator=draw)
    model, optimizer = linear_start(1)
    grower = grown_in_training(
        model, optimizer, list(zip(x.split(20), y.split(20), strict=True)), squared, 120
    )
    assert grower.history == []
    assert grower.clock.refusals >= 5
    assert grower.done


def test_a_higher_threshold_never_accepts_more() -> None:
    accepted = []
    for tau in (0.01, 0.1, 1.0, 10.0):
        model = net()
        grower = ms.Grower(
            model, torch.optim.SGD(model.parameters(), lr=0.1), loss=squared, data=data(12), when=ms.when.Every(steps=1),
            how=ms.how.SENN(steps=24), where=ms.where.SENN(alpha=1e-3, tau=tau), amount=8, axes="0",
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        growth = grower.grow()
        accepted.append(growth.added["0"] if growth is not None else 0)
    assert accepted == sorted(accepted, reverse=True)
    assert accepted[0] > accepted[-1] == 0


def test_only_a_method_that_measures_the_score_can_be_weighed() -> None:
    model = net()
    grower = ms.Grower(
        model, torch.optim.SGD(model.parameters(), lr=0.1), loss=squared, data=data(), when=ms.when.Every(steps=1),
        how=ms.how.GradMax(steps=1), where=ms.where.SENN(), axes="0",
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"how\.SENN"):
        grower.grow()


def test_checks_wait_until_they_are_affordable() -> None:
    trigger = ms.when.SENN(budget=0.1, every="10 steps", credit=15)
    clock = lambda **now: ms.when.Clock(**now)
    assert trigger.due(clock(step=10, trained=100.0, least=15.0))
    assert not trigger.due(clock(step=10, trained=100.0, least=16.0))
    assert not trigger.due(clock(step=9, trained=100.0))
    assert not trigger.due(
        clock(step=20, trained=290.0, growing=15.0, least=15.0, checked_step=10)
    )
    assert trigger.due(
        clock(step=20, trained=300.0, growing=15.0, least=15.0, checked_step=10)
    )
    assert not trigger.due(
        clock(step=19, trained=300.0, growing=15.0, least=15.0, checked_step=10)
    )
    assert (
        trigger.allowance(clock(trained=100.0))
        == trigger.allowance(clock(trained=300.0, growing=15.0))
        == 15.0
    )


def test_checks_that_find_nothing_become_rare() -> None:
    trigger, clock, at = ms.when.SENN(every="2 epochs"), ms.when.Clock(), []
    for epoch in range(1, 100):
        clock = replace(clock, epoch=epoch, epoch_ended=True)
        if trigger.due(clock):
            at.append(epoch)
            clock = replace(clock, checked_epoch=epoch, refusals=clock.refusals + 1)
    assert at == [2, 6, 14, 30, 62]


def squares_of(model: nn.Module, batch: Any) -> Tensor:
    return model(batch).square().mean()


def priced(
    model: nn.Module,
    batches: Any,
    loss: Any,
    axes: str,
    amount: int = 8,
    how: Any = None,
) -> tuple[ms.Grower, float]:
    """A grower that finds nothing worth its while, and what it says that its smallest check costs."""
    grower = ms.Grower(
        model, torch.optim.SGD(model.parameters(), lr=0.1), loss=loss, data=batches, when=ms.when.SENN(), axes=axes, amount=amount,
        how=how or ms.how.SENN(), where=ms.where.SENN(alpha=1e9) if how is None else None,
    )  # fmt: skip
    assert grower._check_and_grow(1.0) is None
    assert grower.flops == 0
    assert grower.clock.checked_step == grower.clock.refusals == 0
    assert f"the smallest check costs {grower.clock.least:.2g}" in grower.reason
    assert "allows 1 after 0 of training" in grower.reason
    return grower, grower.clock.least


@pytest.mark.parametrize("case", ["mlp", "many", "opened", "conv", "flatten", "run"])
@pytest.mark.parametrize("times", [1.0, 4.0])
def test_a_check_costs_no_more_than_it_may(case: str, times: float) -> None:
    """However much is allowed, from the least that is needed on; one that may not, costs nothing."""
    torch.manual_seed(0)
    classes = lambda net, batch: nn.functional.cross_entropy(net(batch[0]), batch[1])
    model, batches, loss, axes, amount = {
        "mlp": (WIDE, rows(12), classes, "0", 8),
        "many": (WIDE, rows(12), classes, "0", 100),
        "opened": (nn.Sequential(nn.Linear(20, 4)), rows(24), classes, "*", 8),
        "conv": (CONV, images(24), classes, "0", 8),
        "flatten": (CONV, images(24), classes, "2", 8),
        "run": (
            nn.Sequential(*[Residual() for _ in range(3)], nn.Linear(12, 4)),
            [torch.randn(32, 12) for _ in range(24)],
            squares_of,
            "0:depth",
            1,
        ),
    }[case]
    grower, least = priced(copy.deepcopy(model), batches, loss, axes, amount)
    assert grower._check_and_grow(times * least) is None
    assert 0 < grower.flops <= 1.05 * times * least
    assert grower.clock.refusals == 1


def test_a_method_that_does_not_know_its_cost_waits_for_what_it_took_last() -> None:
    model = copy.deepcopy(WIDE)
    grower = ms.Grower(
        model, torch.optim.SGD(model.parameters(), lr=0.1), loss=lambda net, b: nn.functional.cross_entropy(net(b[0]), b[1]),
        data=rows(8), when=ms.when.SENN(), axes="0", amount=2, how=ms.how.GradMax(steps=2),
    )  # fmt: skip
    assert grower._check_and_grow(1.0) is not None
    spent = grower.flops
    assert grower._check_and_grow(0.9 * spent) is None
    assert grower.clock.least == grower.flops == spent


def test_checks_and_training_keep_the_budget() -> None:
    """In a loop: whenever a check is over, all of them together are within the budget, up to what a growth itself takes."""
    torch.manual_seed(0)
    model, batches = net(), data(20)
    grower = ms.Grower(
        model, torch.optim.Adam(model.parameters(), lr=1e-2), loss=squared, data=batches, amount=2, axes="0",
        when=ms.when.SENN(budget=0.5, every="5 steps", credit=0), how=ms.how.SENN(candidates=4), where=ms.where.SENN(alpha=1e9),
    )  # fmt: skip
    checks = 0
    while not grower.done and checks < 3:
        for batch in batches:
            before = grower.flops
            value = squared(model, batch)
            grower.optimizers[0].zero_grad()
            value.backward()
            grower.optimizers[0].step()
            grower.step(value)
            checks += grower.flops > before
            assert grower.flops <= 1.05 * 0.5 * grower.clock.trained
    assert checks == 3


@pytest.mark.parametrize(("make", "match"), [
    (lambda: ms.where.SENN(alpha=-1.0), "alpha"), (lambda: ms.where.SENN(tau=0.0), "tau"),
    (lambda: ms.where.SENN(patience=0), "patience"), (lambda: ms.where.SENN(per="unit"), "per"),
    (lambda: ms.when.SENN(budget=5), "budget"), (lambda: ms.when.SENN(credit=-1.0), "credit"), (lambda: ms.how.SENN(activation="relu"), "activation"),
])  # fmt: skip
def test_wrong_hyperparameters_are_refused(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("case", ["constant", "zero rows", "singular", "tiny"])
def test_odd_batches_never_give_nan(case: str) -> None:
    model = net().float()
    x = torch.randn(4, 32, 4)
    x = {
        "constant": torch.ones_like(x),
        "zero rows": x * 0,
        "singular": x[..., :1].expand(-1, -1, 4),
        "tiny": x[:1, :2],
    }[case]
    batches = [(part, torch.randn(len(part), 3)) for part in x]
    growth = ms.grow_(
        model,
        {"0": 2, "2:depth": 1},
        batches[0][0],
        how=ms.how.SENN(steps=6),
        loss=squared,
        data=batches,
    )
    assert growth.max_change <= 1e-5
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_the_gain_of_candidates_together_is_the_exact_one() -> None:
    """Delta eta of all candidates in a row against `curvature.gain` on the rows of the batches that measure them."""
    tried = space(net())
    strips = tried.drawn()
    joint = tried.space.together(strips, tried.second)
    order = list(range(tried.space.trials))
    model = tried.lab.copied()
    x, y = (torch.cat([batch[i] for batch in tried.second]) for i in range(2))
    hidden = torch.cat(
        [model[1](model[0](x)), torch.ones(len(x), 1).double()], 1
    ).detach()
    weight, bias = (
        strips[slot.place] for slot in tried.axis.slots if slot.role != "fan_out"
    )
    new = torch.tanh(x @ weight.flatten(1).T + bias.flatten())
    back = 2 * (model(x) - y).detach()
    damping = tried.space.damping("2")
    per_batch = [2 * (model(batch[0]) - batch[1]).detach() for batch in tried.second]
    outputs = torch.stack([g.T @ g / len(g) for g in per_batch]).mean(0)
    eye = lambda size: torch.eye(size).double()
    layer = Factors(
        back.T @ hidden / len(x), hidden.T @ hidden / len(x) + damping * eye(7),
        curvature.damped(outputs, curvature.DAMPING), len(x), tried.space.moments["2"].spread,
    )  # fmt: skip
    added = Candidates(
        back.T @ new / len(x),
        hidden.T @ new / len(x),
        new.T @ new / len(x) + damping * eye(len(order)),
    )
    assert sum(gains_of(joint, tried.space.trials, order)) == pytest.approx(
        gain(layer, added), rel=1e-6
    )


def test_the_axis_that_fits_the_budget_grows() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 3)).double()
    now = sum(p.numel() for p in model.parameters())
    grower = ms.Grower(
        model, torch.optim.SGD(model.parameters(), lr=0.1), loss=squared, data=data(12), when=ms.when.Every(steps=1),
        how=ms.how.SENN(steps=24), where=ms.where.SENN(per="growth"), amount=8, budget=ms.Budget(parameters=now + 20),
    )  # fmt: skip
    growth = grower.grow()
    assert growth is None or growth.parameters[1] <= now + 20
    assert "no room" not in grower.reason


def test_a_layer_that_is_used_without_being_called_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(
                torch.tanh(self.a(x)), self.b.weight, self.b.bias
            )

    model = Odd().double()
    with pytest.raises(ms.GrowthRefused, match="without calling"):
        ms.grow_(
            model,
            {"a": 2},
            data()[0][0],
            how=ms.how.SENN(steps=3),
            loss=squared,
            data=data(),
        )
    with pytest.raises(ms.GrowthRefused, match="nothing is seen"):
        ms.prune_(model, "a", loss=squared, data=data())


def test_a_loss_in_front_of_the_outputs_does_not_hide_the_examples() -> None:
    class Told(nn.Module):
        def __init__(self, first: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.net = first, net()

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            out = self.net(x)
            loss = (out - y).square().sum(1).mean()
            return (loss, out) if self.first else (out, loss)

    losses = {
        True: lambda model, batch: model(*batch)[0],
        False: lambda model, batch: model(*batch)[1],
    }
    found = [
        curvature.measure(Told(first), loss, data()).score()
        for first, loss in losses.items()
    ]
    assert found[0] == pytest.approx(found[1])


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


def looked_at(model: nn.Module, batches: list[Any], loss: Any) -> Lab:
    structure = Structure(model, Example((batches[0][0],), {}))
    return Lab(structure, Loan(torch.Generator().manual_seed(0), loss, batches))


def images(batches: int) -> list[tuple[Tensor, Tensor]]:
    return [
        (torch.randn(16, 3, 8, 8), torch.randint(0, 4, (16,))) for _ in range(batches)
    ]


def rows(batches: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(400, 20), torch.randint(0, 4, (400,))) for _ in range(batches)]


CONV = nn.Sequential(
    nn.Conv2d(3, 6, 3, padding=1),
    nn.ReLU(),
    nn.Conv2d(6, 8, 3),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(288, 4),
)
WIDE = nn.Sequential(
    nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
)


@pytest.mark.parametrize(
    ("model", "make"), [(CONV, images), (WIDE, rows)], ids=["conv", "mlp"]
)
@pytest.mark.parametrize(
    "search",
    [Search(24, 128, 192, 0.01), Search(8, 16, 12, 0.01)],
    ids=["whole", "small"],
)
def test_a_search_costs_about_what_was_said_before(
    model: nn.Module, make: Any, search: Search
) -> None:
    torch.manual_seed(0)
    loss = lambda net, batch: nn.functional.cross_entropy(net(batch[0]), batch[1])
    lab = looked_at(model, make(18), loss)
    said = replace(search, batches=min(search.batches, 18)).cost(
        lab, lab.structure.axes["0"], 4
    )
    found = searched(lab, loss, lab.structure.axes["0"], 4, search).flops
    assert (
        0.2 * said < found < 1.25 * said
    )  # one part of the examples may decide, two more are counted on


def test_a_search_is_halved_until_it_is_affordable() -> None:
    lab = looked_at(WIDE, rows(40), squared)
    axis, search = lab.structure.axes["0"], Search(24, 128, 192, 0.01)
    assert search.within(lab, axis, 4) == replace(search, batches=40)
    costs = []
    for allowance in (1e9, 1e8, 1e7, 0.0):
        fits = search.within(lab.within(allowance), axis, 4)
        costs.append(fits.cost(lab, axis, 4))
        assert costs[-1] <= allowance or fits == search.least
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > costs[-1]
    assert ms.how.SENN().least(lab, axis, 4) == pytest.approx(
        search.least.cost(lab, axis, 4)
    )
    few = looked_at(WIDE, [(x[:20], y[:20]) for x, y in rows(40)], squared)
    chain = [search]
    while chain[-1] != search.least:
        chain.append(chain[-1].halved)
    costs = [one.cost(few, axis, 4) for one in chain]
    assert costs == sorted(costs, reverse=True)


@pytest.mark.parametrize(
    ("gains", "doubt"),
    [
        ((-0.1, -0.2), False),
        ((0.1, 0.0), True),
        ((0.1, 0.12), True),
        ((0.6, -0.1), False),
    ],
)
def test_one_part_of_the_examples_decides_where_there_is_no_doubt(
    gains: tuple[float, ...], doubt: bool
) -> None:
    assert is_doubtful(Offer("0", len(gains), gains=gains, error=0.1)) == doubt


def test_an_axis_that_has_no_zero_side_is_refused_by_name() -> None:
    model, tokens = make("nanogpt")
    loss = lambda net, x: net(x).square().mean()
    with pytest.raises(ms.GrowthRefused, match="no zero side"):
        ms.grow_(
            model,
            {"wpe:vocabulary": 2},
            tokens,
            how=ms.how.SENN(),
            loss=loss,
            data=[tokens] * 3,
        )
