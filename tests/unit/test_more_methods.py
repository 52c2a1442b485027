"""Pairs, TINY, Firefly, Plateau, and parts of a run that are stacked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meristem as ms
from meristem.core.offer import Copies, Offer
from meristem.event.steps import prepare
from meristem.lab.laboratory import Lab, Loan
from meristem.methods import Clock


def mse(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def dense(width: int = 3) -> tuple[nn.Sequential, list[Any]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 4)).double()
    x = torch.randn(128, 6, dtype=torch.float64)
    return net, [(x, torch.tanh(x @ torch.randn(6, 4).double()))]


def lab_of(net: nn.Module, data: list[Any]) -> Lab:
    loan = Loan(torch.Generator().manual_seed(0), mse, data, data)
    return prepare(net, data[0][0], loan).lab


# -- TINY


def test_tiny_finds_the_papers_units() -> None:
    net, data = dense()
    x, y = data[0]
    damping = 1e-6
    lab = lab_of(net, data)
    offer = ms.how.TINY(damping=damping, rows=10**6).propose(lab, lab.axes["0"], 2)
    with torch.no_grad():
        h = torch.cat([net[1](net[0](x)), torch.ones(len(x), 1).double()], 1)
        # The gradient of every example's own loss by what the last layer gives.
        g = 2 * (net(x) - y) / y.shape[1]
    n = len(x)
    step = -(g.T @ h) @ torch.linalg.inv(h.T @ h)
    v = -g - h @ step.T
    s = x.T @ x / n
    values, vectors = torch.linalg.eigh(s)
    root = vectors @ values.rsqrt().diag() @ vectors.T
    u, sizes, w = torch.linalg.svd(root @ (x.T @ v / n))
    torch.testing.assert_close(
        torch.tensor(offer.gains).double(), sizes[:2].square(), rtol=1e-3, atol=1e-9
    )
    strips = {place.name: strip.flatten(1) for place, strip in offer.strips.items()}
    for k in range(2):
        for found, wanted in (
            (strips["0.weight"][k], root @ u[:, k]),
            (strips["2.weight"][k], w[k]),
        ):
            cosine = F.cosine_similarity(found, wanted, 0).abs()
            assert cosine > 0.999, (k, cosine)
    # Against the gradient: what the units give points along the residual goal.
    given = torch.tanh(x @ strips["0.weight"].T) @ strips["2.weight"]
    assert (given * v).sum() > 0


@pytest.mark.parametrize("norm", [False, True])
def test_tiny_lowers_the_loss_of_a_conv_net(norm: bool) -> None:
    torch.manual_seed(1)
    middle = nn.BatchNorm2d(2) if norm else nn.Identity()
    net = nn.Sequential(
        nn.Conv2d(3, 2, 3, padding=1, bias=not norm),
        middle,
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(2, 4, 3, stride=2),
        nn.Flatten(),
    )
    x = torch.randn(64, 3, 8, 8)
    data = [(x, F.avg_pool2d(x, 8).flatten(1).repeat(1, 2)[:, :4])]
    data = [(x, net(x).detach() + torch.randn(64, 4))]
    net.eval()
    before = mse(net, data[0]).item()
    ms.grow_(net, {"0": 4}, how=ms.how.TINY(), loss=mse, data=data)
    assert mse(net, data[0]).item() < before
    if norm:
        # What the norm sees of the new units is what its statistics say.
        seen = net[0](x)[:, 2:]
        torch.testing.assert_close(seen.mean((0, 2, 3)), net[1].running_mean[2:])
        spread = seen.var((0, 2, 3), correction=0)
        torch.testing.assert_close(spread, net[1].running_var[2:], rtol=1e-2, atol=1e-6)


# -- pairs


def test_a_pair_cancels_and_both_sides_learn() -> None:
    net, data = dense()
    growth = ms.grow_(net, {"0": 5}, data[0][0], how=ms.how.Pairs())
    assert growth.max_change < 1e-12
    made, read = net[0].weight[3:], net[2].weight[:, 3:]
    assert torch.equal(made[0], made[1])
    assert torch.equal(read[:, 0], -read[:, 1])
    assert not read[:, 4].any()
    mse(net, data[0]).backward()
    assert net[0].weight.grad[3:7].abs().amin() > 0
    assert net[2].weight.grad[:, 3:].abs().amin() > 0
    # Opposite gradients take them apart.
    torch.testing.assert_close(net[0].weight.grad[3], -net[0].weight.grad[4])


# -- Firefly


def test_firefly_offers_splits_and_fresh_units_by_gain() -> None:
    net, data = dense(6)
    before = net(data[0][0]).detach()
    weights = net[0].weight.detach().clone()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    mse(net, data[0]).backward()
    optimizer.step()
    before, weights = net(data[0][0]).detach(), net[0].weight.detach().clone()
    lab = lab_of(net, data)
    offer = ms.how.Firefly(candidates=3).propose(lab, lab.axes["0"], 6)
    assert list(offer.gains) == sorted(offer.gains, reverse=True)
    assert offer.gains[0] > 0
    assert -1 in offer.copies.parent.tolist()
    how = ms.how.Firefly(candidates=1, splits=0.2, radius=0.05)
    offer = how.propose(lab, lab.axes["0"], 18)
    # All candidates are taken, the splits among them.
    splits = offer.copies.parent[offer.copies.parent >= 0]
    assert 0 < len(splits) <= 6
    assert len(set(splits.tolist())) == len(splits)
    assert offer.copies.share[splits].tolist() == [0.5] * len(splits)
    how = ms.how.Firefly(candidates=1, splits=0.5, radius=0.05)
    growth = ms.grow_(
        net, {"0": 6}, data[0][0], how=how, loss=mse, data=data, optimizer=optimizer
    )
    assert torch.equal(net[0].weight[:6], weights)
    change = (net(data[0][0]) - before).abs().max() / before.abs().max()
    assert 0 < change < 0.3
    assert growth.max_change < 0.3
    state = optimizer.state[net[0].weight]
    assert state["exp_avg_sq"].shape == (12, 6)
    assert bool((state["exp_avg_sq"] > 0).all())


def test_an_offer_of_copies_can_be_cut() -> None:
    # Units 0, 0 and 2 are copied; the third new unit copies none.
    parent = torch.tensor([0, 2, -1, 0])
    share = torch.tensor([0.5, 1, 0.7, 1, 1, 1, 0.2, 0.3, 1.0, 0.3])
    cut = Copies(parent, share).first(3)
    assert cut.parent.tolist() == [0, 2, -1]
    families = cut.share[0] + cut.share[6], cut.share[2] + cut.share[7], cut.share[8]
    assert [round(float(total), 6) for total in families] == [1, 1, 1]
    offer = Offer("0", 4, copies=Copies(parent, share)).best(3)
    assert offer.count == 3


def test_by_gain_grows_by_firefly_over_all_layers() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2)
    )
    data = [(torch.randn(32, 6), torch.randn(32, 2)) for _ in range(3)]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    grower = ms.Grower(
        net, optimizer, loss=mse, data=data, when=ms.when.Every(steps=1),
        how=ms.how.Firefly(steps=4), where=ms.where.ByGain(), amount=4,
    )  # fmt: skip
    mse(net, data[0]).backward()
    optimizer.step()
    growth = grower.step()
    assert sum(growth.added.values()) == 4
    assert growth.max_change < 0.5


@pytest.mark.parametrize(
    "make",
    [
        lambda: ms.how.Pairs(scale=0),
        lambda: ms.how.TINY(damping=-1),
        lambda: ms.how.TINY(batches=0),
        lambda: ms.how.Firefly(candidates=0),
        lambda: ms.how.Firefly(splits=1.5),
        lambda: ms.how.Firefly(radius=float("inf")),
        lambda: ms.how.GradMax(scale=0),
        lambda: ms.how.GradMax(zero="both"),
        lambda: ms.how.GradMax(batches=1.5),
        lambda: ms.how.Net2Net(noise=-0.1),
        lambda: ms.how.Random(scale=float("nan")),
        lambda: ms.how.SENN(candidates=0),
        lambda: ms.how.SENN(damping=0),
        lambda: ms.how.Interpose(zero="yes"),
        lambda: ms.how.Stack(part="end"),
        lambda: ms.how.Stack(blocks=range(3, 2)),
        lambda: ms.how.Stack(part="last", blocks=[1]),
        lambda: ms.how.Interpose(behind=[-1]),
        lambda: ms.how.Interpose(behind=2),
        lambda: ms.when.Plateau(patience=0),
        lambda: ms.when.Plateau(of="accuracy"),
        lambda: ms.when.Plateau(mode="up"),
        lambda: ms.when.Plateau(tolerance=1.0),
        lambda: ms.when.Every(steps=2.5),
        lambda: ms.when.Every(steps=2, growths=0),
        lambda: ms.when.At(steps=(1.5,)),
        lambda: ms.where.SVoD(lr=0),
    ],
)
def test_hyperparameters_out_of_range_are_refused_at_construction(make: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        make()


# -- plateau


def test_plateau_of_the_loss_and_of_the_metric() -> None:
    still = (1.0, 0.9, 0.9, 0.9)
    ended = Clock(epoch_ended=True, losses=still)
    assert ms.when.Plateau(patience=2).due(ended)
    assert not ms.when.Plateau(patience=2, of="metric").due(ended)
    assert not ms.when.Plateau(patience=2).due(Clock(losses=still))
    falls = Clock(epoch_ended=True, losses=(1.0, 0.9, 0.8, 0.7))
    assert not ms.when.Plateau(patience=2).due(falls)
    measured = Clock(measured=True, metrics=(0.5, 0.7, 0.7, 0.69))
    assert ms.when.Plateau(patience=2).due(measured)
    assert not ms.when.Plateau(patience=2, mode="min").due(
        Clock(measured=True, metrics=(0.5, 0.4, 0.3))
    )
    assert not ms.when.Plateau(patience=2, growths=1).due(Clock(growths=1, epoch_ended=True, losses=still))  # fmt: skip


def test_a_grower_waits_for_a_plateau_and_resumes_in_the_middle() -> None:
    _, data = dense()
    data = [
        (x, y) for x, y in zip(data[0][0].split(32), data[0][1].split(32), strict=True)
    ]

    def made(how_many: int) -> ms.Grower:
        model, _ = dense(how_many)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        return ms.Grower(
            model, optimizer, loss=mse, data=data, when=ms.when.Plateau(patience=2),
            how=ms.how.Random(), amount=1,
        )  # fmt: skip

    grower = made(3)
    found = []
    for number, loss in enumerate([4.0, 2.0, 2.0, 2.0, 1.9, 1.9, 1.9]):
        for step in range(4):
            if number == 2 and step == 2:
                state = grower.state_dict()
                grower = made(3)
                grower.load_state_dict(state)
            growth = grower.step(loss)
            found.append((number, step) if growth else None)
    assert [one for one in found if one] == [(3, 3), (6, 3)]
    grower = made(3)
    with pytest.raises(ValueError, match=r"step\(loss\)"):
        grower.step()


def test_a_metric_that_stands_still_grows_in_epoch() -> None:
    net, data = dense()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    grower = ms.Grower(
        net, optimizer, loss=mse, data=data, how=ms.how.Random(), amount=1,
        when=ms.when.Plateau(patience=1, of="metric"),
    )  # fmt: skip
    grown = []
    for metric in (0.5, 0.6, 0.6, 0.6, 0.7):
        grower.step(1.0)
        grown.append(bool(grower.epoch(metric=metric)))
    assert grown == [False, False, True, False, False]


# -- parts of a run


@pytest.mark.parametrize(
    ("part", "count", "order"),
    [
        ("all", 6, "ABCDEFABCDEF"),
        ("middle", 2, "ABCDCDEF"),
        ("middle", 4, "ABCDCDCDEF"),
        ("first", 2, "ABABCDEF"),
        ("last", 3, "ABCDEFEFE"),
    ],
)
def test_a_part_of_a_run_is_repeated(part: Any, count: int, order: str) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    net = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
    with torch.no_grad():
        for number, block in enumerate(net.layers):
            block.linear1.bias.fill_(float(number))
    ms.grow_(net, {"layers": count}, torch.randn(2, 3, 8), how=ms.how.Stack(part=part))
    found = "".join("ABCDEF"[int(block.linear1.bias[0])] for block in net.layers)
    assert found == order
