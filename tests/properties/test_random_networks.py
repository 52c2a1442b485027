"""200 random small networks: every axis discovered, grown, trained one step, grown again, narrowed back to the same bits."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import meristem as ms


class RandomNet(nn.Module):
    """A chain of drawn pieces on [batch, channels, length] data, then flatten and linear layers, one of them tied."""

    def __init__(
        self, pieces: list[tuple[str, int]], hidden: list[int], tie: bool
    ) -> None:
        super().__init__()
        self.pieces = pieces
        channels = 3
        for i, (kind, width) in enumerate(pieces):
            if kind == "conv":
                setattr(self, f"a{i}", nn.Conv1d(channels, width, 3, padding=1))
                channels = width
            elif kind == "residual":
                setattr(self, f"a{i}", nn.Conv1d(channels, width, 1))
                setattr(self, f"b{i}", nn.Conv1d(width, channels, 3, padding=1))
            elif kind == "cat":
                setattr(self, f"a{i}", nn.Conv1d(channels, width, 1))
                channels += width
            elif kind == "glu":
                setattr(self, f"a{i}", nn.Conv1d(channels, 2 * width, 1))
                channels = width
            elif kind == "depthwise":
                setattr(
                    self,
                    f"a{i}",
                    nn.Conv1d(channels, channels, 3, padding=1, groups=channels),
                )
            elif kind == "batch_norm":
                setattr(self, f"a{i}", nn.BatchNorm1d(channels))
            elif kind == "group_norm":
                setattr(self, f"a{i}", nn.GroupNorm(channels, channels))
        self.linears = nn.ModuleList()
        size = channels * 4
        for width in hidden:
            self.linears.append(nn.Linear(size, width))
            size = width
        self.decoder = nn.Linear(size, 5) if tie else None
        self.head = nn.Linear(size, 2)
        with torch.no_grad():
            for p in self.parameters():
                p.add_(0.2 * torch.randn_like(p))

    def forward(self, x: Tensor) -> Tensor:
        for i, (kind, _) in enumerate(self.pieces):
            a = getattr(self, f"a{i}")
            if kind == "residual":
                x = x + getattr(self, f"b{i}")(F.silu(a(x)))
            elif kind == "cat":
                x = torch.cat([x, torch.tanh(a(x))], 1)
            elif kind == "glu":
                value, gate = a(x).chunk(2, 1)
                x = value * torch.sigmoid(gate)
            elif kind == "conv":
                x = F.relu(a(x))
            else:
                x = a(x)
        x = x.flatten(1)
        for layer in self.linears:
            x = torch.tanh(layer(x))
        if self.decoder is not None:
            code = F.relu(self.decoder(x))
            x = F.linear(code, self.decoder.weight.t()) + x
        return self.head(x)


PIECE = st.tuples(
    st.sampled_from(
        ["conv", "residual", "cat", "glu", "depthwise", "batch_norm", "group_norm"]
    ),
    st.integers(2, 5),
)


NETWORKS = given(
    pieces=st.lists(PIECE, min_size=1, max_size=4),
    hidden=st.lists(st.integers(2, 6), max_size=2),
    tie=st.booleans(),
    count=st.integers(1, 5),
    seed=st.integers(0, 10),
)
PLAIN = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@PLAIN
@NETWORKS
def test_every_axis_of_a_random_network(
    pieces: list, hidden: list, tie: bool, count: int, seed: int
) -> None:
    every_axis_grows(pieces, hidden, tie, count, seed)


@pytest.mark.slow
@settings(PLAIN, max_examples=400)
@NETWORKS
def test_every_axis_of_many_random_networks(
    pieces: list, hidden: list, tie: bool, count: int, seed: int
) -> None:
    every_axis_grows(pieces, hidden, tie, count, seed)


def every_axis_grows(
    pieces: list, hidden: list, tie: bool, count: int, seed: int
) -> None:
    torch.manual_seed(seed)
    net = RandomNet([("conv", 4), *pieces], hidden, tie)
    x = torch.randn(3, 3, 4)
    axes = ms.find_axes(net, x)
    assert "a0" in axes
    wishes = [
        {axis.name: count * axis.multiple}
        for axis in axes.values()
        if axis.kind != "depth"
    ]
    if (
        seed % 5 == 0
    ):  # all places of the chain at once, on some of the networks: it is the longest growth
        wishes.append({axis.name: 1 for axis in axes.values() if axis.kind == "depth"})
    for wish in wishes:
        model = copy.deepcopy(net)
        opt = torch.optim.AdamW(model.parameters())
        with torch.no_grad():
            out = model.eval()(x)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        for _ in range(2):
            ms.grow_(model, wish, x, optimizer=opt)
            with torch.no_grad():
                assert (model(x) - out).abs().max() <= 1e-5 * out.abs().max()
        ms.narrow_(
            model, {name: 2 * units for name, units in wish.items()}, x, optimizer=opt
        )
        after = model.state_dict()
        assert all(torch.equal(before[k], after[k]) for k in before)
        ms.grow_(model, wish, x, optimizer=opt)
        model(x).square().sum().backward()
        opt.step()
        assert all(torch.isfinite(p).all() for p in model.parameters())


@settings(max_examples=30, deadline=None, derandomize=True)
@given(first=st.integers(1, 4), second=st.integers(1, 4))
def test_two_growths_lay_out_as_one(first: int, second: int) -> None:
    x = torch.randn(2, 4)
    nets = []
    for counts in ([first, second], [first + second]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        for count in counts:
            ms.grow_(net, {"0": count}, x)
        nets.append(net)
    assert [p.shape for p in nets[0].parameters()] == [
        p.shape for p in nets[1].parameters()
    ]
    assert torch.equal(nets[0][0].weight[:3], nets[1][0].weight[:3])
