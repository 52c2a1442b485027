"""Depth: what is found, what follows a new block, what is refused with which reason."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from zoo import make

import meristem as ms
from meristem.activations import Rational
from meristem.event import sharing
from meristem.event.calendar import units_now
from meristem.methods import Lab, Offer


class Residual(nn.Module):
    def __init__(self, width: int = 6, layer_idx: int = 0) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.up, self.down = nn.Linear(width, 9), nn.Linear(9, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Blocks behind a layer, with whatever a subclass does to them."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.blocks = nn.ModuleList(Residual(layer_idx=i) for i in range(depth))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


X = torch.randn(5, 4)


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return model(batch).square().mean()


def reason(model: nn.Module, name: str = "blocks") -> str:
    return ms.find_axes(model, X).frozen[name]


class Counting(Net):
    """Numbers, tables and positions that follow the depth."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_layers=3, heads=3)
        self.rates = [0.0, 0.5, 1.0]
        self.turns = 3

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i in range(self.turns):
            x = self.blocks[i](x) * (1 + 0 * self.rates[i])
        return self.head(x)


class Indexed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.turns = 3

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i in range(self.turns):
            x = self.blocks[i](x)
        return self.head(x)


class Tabled(Net):
    def __init__(self) -> None:
        super().__init__()
        self.rates = (0.0, 0.5, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block, rate in zip(self.blocks, self.rates, strict=True):
            assert 0 <= rate <= 1
            x = block(x)
        return self.head(x)


class Picking(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks[1](self.stem(x)))


class Scaled(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = 0.5 * block(x)
        return self.head(x)


class Shared(Net):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.blocks[0]] * 3)


class HalfShared(Net):
    """Like blocks with one weight in common."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks[1:]:
            block.up = self.blocks[0].up


class Locked(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


def test_counts_tables_and_positions_follow() -> None:
    for kind in (Indexed, Tabled):
        model = kind()
        ms.grow_(model, {"blocks": 2}, X)
        assert len(model.blocks) == 5
        assert [block.layer_idx for block in model.blocks] == [0, 1, 2, 3, 4]
        ms.narrow_(model, {"blocks": [1, 2]}, X)
        assert [block.layer_idx for block in model.blocks] == [0, 1, 2]
    model = Net()
    model.config = shared = SimpleNamespace(num_layers=3, heads=3)
    model.stem.config = shared
    ms.grow_(model, {"blocks": 2}, X, how=ms.how.Interpose(zero=True))
    assert (model.config.num_layers, model.config.heads) == (5, 3)
    assert model.stem.config is model.config
    assert shared.num_layers == 3  # other models may be built from it
    assert [block.layer_idx for block in model.blocks] == [0, 1, 2, 3, 4]


def test_tables_follow_the_order_of_the_blocks() -> None:
    model = Tabled()
    ms.grow_(model, {"blocks": 2}, X, how=ms.how.Interpose())
    assert model.rates == (0.0, 0.0, 0.5, 0.5, 1.0)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Picking, "picked by index or data"),
        (Scaled, "does not read what"),
        (Shared, "one and the same module"),
        (lambda: Net(0), "holds no block"),
        (Counting, "does not read what"),
    ],
)
def test_what_is_no_run_says_why(kind: Any, words: str) -> None:
    model = kind()
    assert words in reason(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ms.UnknownAxis, match="cannot grow"):
        ms.grow_(model, {"blocks": 1}, X)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_shared_weight_stays_shared_and_is_never_zeroed() -> None:
    model = HalfShared().double()
    x = X.double()
    out = model(x).detach()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    weight = model.blocks[0].up.weight.clone()
    growth = ms.grow_(model, {"blocks": 2}, x, optimizer=opt)
    assert growth.max_change <= 1e-12
    assert (model(x) - out).abs().max() <= 1e-12
    assert all(block.up is model.blocks[0].up for block in model.blocks)
    assert torch.equal(weight, model.blocks[0].up.weight)
    assert len(opt.param_groups[0]["params"]) == len(list(model.parameters()))


def test_a_block_that_cannot_be_copied_changes_nothing() -> None:
    model = Net()
    model.blocks.append(Locked())
    with pytest.raises(ms.DiscoveryError, match="deep-copied"):
        ms.grow_(model, {"blocks": 1}, X)
    assert len(model.blocks) == 4


@pytest.mark.parametrize("count", [0, -1])
def test_counts_are_positive(count: int) -> None:
    model = Net()
    with pytest.raises(ms.GrowthRefused, match=r"int in \[1, inf\)"):
        ms.grow_(model, {"blocks": count}, X)
    assert len(model.blocks) == 3


def test_what_narrowing_must_leave() -> None:
    model = Net()
    for wrong in (3, [0, 1, 2], [3], []):
        with pytest.raises(ms.GrowthRefused, match="blocks 0"):
            ms.narrow_(model, {"blocks": wrong}, X)
    resnet, x = make("resnet18")
    with pytest.raises(ms.GrowthRefused, match="must stay"):
        ms.narrow_(resnet, {"layer2": [0]}, x)  # it changes the stream's shape
    assert ms.find_axes(resnet, x)["layer2"].size == 2
    ms.grow_(resnet, {"layer2": 1}, x)
    assert resnet.layer2[2].downsample is None


def test_stacks_repeat_and_interposed_copies_stand_beside_their_blocks() -> None:
    for how, order in (
        (ms.how.Stack(), [0, 1, 2, 0, 1]),
        (ms.how.Interpose(), [0, 0, 1, 1, 2]),
    ):
        model = Net()
        old = [block.up.weight.clone() for block in model.blocks]
        opt = torch.optim.Adam(model.parameters(), lr=1e-3)
        loss_of(model, X).backward()
        opt.step()
        old = [block.up.weight.clone() for block in model.blocks]
        state = [
            opt.state[block.up.weight]["exp_avg"].clone() for block in model.blocks
        ]
        ms.grow_(model, {"blocks": 2}, X, how=how, optimizer=opt)
        for block, number in zip(model.blocks, order, strict=True):
            assert torch.equal(block.up.weight, old[number])
            assert torch.equal(opt.state[block.up.weight]["exp_avg"], state[number])


@torch.no_grad()
def test_blocks_share_what_they_add_with_their_copies() -> None:
    model = Net()
    average = copy.deepcopy(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    up, down = model.blocks[0].up, model.blocks[0].down
    h = x = model.stem(X)
    for _ in range(3):
        h = h + down(torch.tanh(up(h))) / 3
    blocks = [block.down.weight.clone() for block in model.blocks]
    how = ms.how.Interpose(share=True, behind=[0])
    growth = ms.grow_(model, {"blocks": 2}, X, how=how)
    ours = x
    for block in model.blocks[:3]:
        ours = block(ours)
    torch.testing.assert_close(ours, h)
    # Blocks without a copy keep all of it.
    assert torch.equal(model.blocks[3].down.weight, blocks[1])
    wider = copy.deepcopy(average)
    both = [ms.how.Net2Net(), ms.how.Interpose(share=True, behind=[0])]
    same = ms.grow_(wider, {"blocks": 2, "blocks.0.up": 3}, X, how=both)
    assert same.max_change == pytest.approx(growth.max_change, rel=1e-4)
    stacked = copy.deepcopy(average)
    moved = ms.grow_(stacked, {"blocks": 2}, X, how=ms.how.Interpose(behind=[0]))
    assert growth.max_change < 0.3 * moved.max_change
    # An average of the weights, and any state dict of the old shape, share alike.
    ms.replay_(growth, average)
    line = ms.lineage(model)
    for state in (average.state_dict(), ms.convert(before, line)):
        for name, value in model.state_dict().items():
            torch.testing.assert_close(state[name], value)
    for name, value in ms.convert(model.state_dict(), line, back=True).items():
        torch.testing.assert_close(value, before[name])
    again = ms.Plan.from_json(growth.origin.plan.json())
    assert again.rescaled == growth.origin.plan.rescaled


def test_what_blocks_do_not_own_they_do_not_share() -> None:
    model = Net()
    tied = model.blocks[0].down
    for block in model.blocks:
        block.down = tied
    with pytest.raises(ms.GrowthRefused, match="no tensor of theirs alone"):
        ms.grow_(model, {"blocks": 1}, X, how=ms.how.Interpose(share=True))
    assert len(model.blocks) == 3
    with pytest.raises(ValueError, match="not both"):
        ms.how.Interpose(zero=True, share=True)


class Dilated(nn.Module):
    """Integers that run on from block to block without being positions."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor, self.layer = factor, nn.Sequential(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.factor * self.layer(x)


def test_integers_that_are_no_positions_stay() -> None:
    model = nn.Sequential(Dilated(1), Dilated(2), Dilated(3))
    ms.narrow_(model, {"0:depth": [0]}, X)
    assert [block.factor for block in model] == [2, 3]
    wide = Net()
    ms.grow_(wide, {"blocks.1.up": 1, "blocks.2.up": 2}, X)  # 9, 10, 11
    ms.grow_(wide, {"blocks": 2}, X, how=ms.how.Interpose(zero=True))
    assert [block.up.out_features for block in wide.blocks] == [
        len(block.up.weight) for block in wide.blocks
    ]


def test_blocks_of_different_widths_are_counted_as_they_are() -> None:
    model = Net()
    ms.grow_(model, {"blocks.0.up": 20}, X)
    for how in (ms.how.Stack(), ms.how.Interpose(), ms.how.ZeroBlock()):
        growth = ms.grow_(model, {"blocks": 1}, X, how=how)
        assert growth.parameters[1] == sum(p.numel() for p in model.parameters())


class Mixed(nn.Module):
    """Two runs and other layers in one list."""

    def __init__(self) -> None:
        super().__init__()
        first = [Residual(4, 0), Residual(4, 1)]
        second = [nn.Sequential(nn.LayerNorm(4), Residual(4, i)) for i in (2, 3)]
        self.h = nn.ModuleList([*first, *second, nn.Linear(4, 2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.h:
            x = layer(x)
        return x


def test_two_runs_in_one_list() -> None:
    model = Mixed().double()
    x = X.double()
    axes = ms.find_axes(model, x)
    assert axes["h"].size == 2
    assert "h:2" in {
        **axes,
        **axes.frozen,
    }  # a norm on the stream: no block of it is silent
    growth = ms.grow_(model, {"h": 1}, x, loss=loss_of, data=[x])
    assert growth.max_change <= 1e-12
    assert [m[1].layer_idx for m in model.h if isinstance(m, nn.Sequential)] == [3, 4]
    ms.grow_(model, {"h": 1, "h:2": 1}, x, how=ms.how.Stack(), loss=loss_of, data=[x])
    assert [m[1].layer_idx for m in model.h if isinstance(m, nn.Sequential)] == [
        4,
        5,
        6,
    ]


def test_a_sequential_stays_a_list(tmp_path: Path) -> None:
    model = nn.Sequential(Residual(4), Residual(4))
    ms.grow_(model, {"0:depth": 1}, X, how=ms.how.Interpose())
    assert list(model._modules) == ["0", "1", "2"]
    ms.save(tmp_path, model)
    built = ms.load(tmp_path, nn.Sequential(Residual(4), Residual(4), Residual(4)))
    assert torch.equal(built(X), model(X))
    ms.narrow_(model, {"0:depth": [0]}, X)
    model.append(Residual(4))
    assert len(model) == 3
    ms.save(tmp_path, model)
    ms.load(tmp_path, model)


def test_a_net_that_grew_and_narrowed_loads_into_one_of_its_size(
    tmp_path: Path,
) -> None:
    model = Net()
    ms.grow_(model, {"blocks": 2}, X)
    ms.narrow_(model, {"blocks": 2}, X)
    ms.save(tmp_path, model)
    assert torch.equal(ms.load(tmp_path, Net())(X), model(X))


def test_layers_that_torch_reads_itself_are_left_alone() -> None:
    model, x = make("post_norm")
    assert not any(
        "linear" in name and name.endswith(":depth") for name in ms.find_axes(model, x)
    )
    plain = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)),
        nn.ReLU(),
        nn.Linear(8, 2),
    )
    assert "0:depth" not in ms.find_axes(plain, X)


def test_outputs_that_follow_the_depth_are_refused() -> None:
    class Telling(Net):
        def forward(self, x: Tensor) -> Any:
            states = [self.stem(x)]
            for block in self.blocks:
                states.append(block(states[-1]))
            return self.head(states[-1]), tuple(states)

    assert "blocks" in ms.find_axes(Telling(), X).frozen


def test_an_optimizer_with_common_state_is_refused() -> None:
    model = Net()
    opt = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_of(model, X)
        loss.backward()
        return loss

    opt.step(closure)
    with pytest.raises(ms.OptimizerError, match="LBFGS"):
        ms.grow_(model, {"blocks": 1}, X, optimizer=opt)
    assert len(model.blocks) == 3


def test_named_parameters_keep_their_names() -> None:
    model = Net()
    opt = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
    ms.grow_(model, {"blocks": 1}, X, how=ms.how.Interpose(), optimizer=opt)
    names = {id(p): name for name, p in model.named_parameters()}
    group = opt.param_groups[0]
    assert [names[id(p)] for p in group["params"]] == group["param_names"]


def test_blocks_are_followed_when_later_ones_come_between() -> None:
    model = Net(2)
    twice = grower(
        model,
        how=ms.how.Interpose(),
        amount={"blocks": 2},
        when=ms.when.At(steps=(1, 2)),
    )
    first = twice.step()
    assert first is not None
    copies = [model.blocks[place] for place in first.blocks["blocks"]]
    twice.step()
    now = units_now(first, twice.history)["blocks"]
    assert [model.blocks[place] for place in now] == copies


def test_methods_that_copy_refuse_a_place_in_a_chain() -> None:
    model, x = make("mlp")
    with pytest.raises(ms.GrowthRefused, match=r"how\.ZeroBlock"):
        ms.grow_(model, {"fc1:depth": 1}, x, how=ms.how.Stack())


def test_a_chain_becomes_a_sequential_and_its_layer_keeps_its_name(
    tmp_path: Path,
) -> None:
    model, x = make("mlp_norm", torch.float64)
    fc1, head = model.fc1, model.head
    out = model.eval()(x).detach()
    ms.grow_(model, {"fc1:depth": 1, "fc2:depth": 1, "head:depth": 1}, x)
    assert [type(m) for m in model.fc1] == [
        nn.Linear,
        Rational,
        nn.Linear,
    ]  # a norm follows: a ReLU would show
    assert [type(m) for m in model.fc2] == [nn.Linear, nn.ReLU, nn.Linear]
    assert [type(m) for m in model.head] == [nn.Linear, nn.ReLU, nn.Linear]
    assert model.fc1[0] is fc1
    assert model.head[2] is head
    assert (model(x) - out).abs().max() <= 1e-12
    ms.grow_(model, {"fc1": 3, "fc1.2": 2}, x)
    assert (fc1.out_features, model.fc1[2].in_features, model.fc1[2].out_features) == (
        15,
        15,
        14,
    )
    ms.grow_(model, {"fc1:depth": 1, "head:depth": 1}, x)
    assert len(model.fc1) == len(model.head) == 5
    assert model.head[4] is head
    ms.save(tmp_path, model)
    loaded = ms.load(tmp_path, make("mlp_norm", torch.float64)[0]).eval()
    assert torch.equal(loaded(x), model(x))
    axes = ms.find_axes(loaded, x)
    assert (axes["fc1"].size, axes["fc1.2"].size, axes["fc1:depth"].size) == (15, 14, 3)
    out = model(x).detach()
    ms.narrow_(model, {"fc2:depth": 1}, x)
    assert type(model.fc2) is nn.Linear
    assert (model(x) - out).abs().max() <= 1e-12


def test_new_layers_of_a_chain_learn() -> None:
    model, x = make("mlp_norm")
    opt = torch.optim.Adam(model.parameters(), lr=1e-2)
    ms.grow_(model, {"fc1:depth": 1}, x, optimizer=opt)
    rational, layer = model.fc1[1], model.fc1[2]
    loss_of(model, x).backward()
    opt.step()
    assert (rational.gamma != 0).any()
    assert not torch.equal(layer.weight, torch.eye(12))


def test_an_optimizer_without_the_blocks_is_refused() -> None:
    model = Net()
    opt = torch.optim.SGD(model.head.parameters(), lr=0.1)
    with pytest.raises(ms.OptimizerError, match="does not hold"):
        ms.grow_(model, {"blocks": 1}, X, optimizer=opt)
    assert len(model.blocks) == 3


def test_new_blocks_join_the_groups_of_their_parents() -> None:
    model = Net()
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    weights = [p for n, p in model.named_parameters() if n.endswith("weight")]
    opt = torch.optim.AdamW(
        [
            {"params": weights, "weight_decay": 0.1},
            {"params": biases, "weight_decay": 0.0},
        ]
    )
    ms.grow_(model, {"blocks": 2, "stem:depth": 1}, X, optimizer=opt)
    held = [{id(p) for p in group["params"]} for group in opt.param_groups]
    for block in model.blocks[3:]:
        assert id(block.up.weight) in held[0]
        assert id(block.up.bias) in held[1]
    assert held[0] | held[1] == {id(p) for p in model.parameters()}


def test_an_error_while_blocks_are_placed_rolls_everything_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from meristem.surgery import exchange

    model = Net()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss_of(model, X).backward()
    opt.step()
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())

    def fail(*_: Any) -> None:
        raise RuntimeError("no more")

    original = exchange.set_attribute
    monkeypatch.setattr(
        exchange,
        "set_attribute",
        lambda *a: fail() if a[2] == "layer_idx" else original(*a),
    )
    with pytest.raises(RuntimeError, match="no more"):
        ms.grow_(
            model,
            {"blocks": 2, "blocks.0.up": 3, "head:depth": 1},
            X,
            how=[ms.how.ZeroBlock(), ms.how.Random()],
            optimizer=opt,
        )
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert len(opt.state_dict()["param_groups"][0]["params"]) == len(
        state["param_groups"][0]["params"]
    )
    assert type(model.head) is nn.Linear
    assert isinstance(ms.find_axes(model, X)["blocks"], ms.Axis)


def grower(model: nn.Module, **options: Any) -> ms.Grower:
    opt = torch.optim.SGD(model.parameters(), lr=1e-2)
    return ms.Grower(
        model,
        opt,
        loss=loss_of,
        data=[X],
        **{"when": ms.when.Every(steps=1), **options},
    )


def test_one_grower_over_width_and_depth() -> None:
    model = Net()
    both = grower(
        model,
        how=[ms.how.GradMax(), ms.how.Stack()],
        amount={"blocks.0.up": 2, "blocks": 1},
    )
    growth = both.step()
    assert growth is not None
    assert growth.after == {"blocks.0.up": 11, "blocks": 4}
    assert model.blocks[3].up.out_features == 11  # a copy of the block as widened
    assert both.step() is not None
    assert "contribution" in both.history[0].health["1"]["blocks"]


def test_gains_per_flop_rank_units_and_blocks() -> None:
    model = Net()
    ranked = grower(
        model,
        how=[ms.how.GradMax(), ms.how.ZeroBlock()],
        where=ms.where.ByGain(per_flop=True),
        amount=6,
    )
    growth = ranked.step()
    assert growth is not None
    assert sum(growth.added.values()) == 6
    kinds = {ms.find_axes(model, X)[name].kind for name in growth.added}
    assert kinds <= {"width", "depth"}
    check = sharing.Check(ranked.settings, ranked.structure(), ranked.clock, math.inf)
    both = {axis.kind for axis in sharing._open_axes(check)}
    assert both > {"depth"}  # both sorts were offered, whichever won


@pytest.mark.parametrize(
    ("tied", "count", "options", "told"),
    [
        ((2, 3), 4, {"share": True}, "no tensor of theirs alone scales it"),
        ((1, 2), 2, {"share": True}, "blocks.1.down.weight belongs to another block"),
        ((0, 1), 4, {"share": True}, "blocks.0.down.weight belongs to another block"),
        ((0, 1), 2, {"zero": True}, "its down.weight belongs to other blocks"),
    ],
)
def test_what_blocks_add_with_tied_weights_is_not_scaled(
    tied: tuple[int, int], count: int, options: dict[str, bool], told: str
) -> None:
    model = Net(4)
    first, second = (model.blocks[place].down for place in tied)
    second.weight = first.weight
    with pytest.raises(ms.GrowthRefused, match=told):
        ms.grow_(model, {"blocks": count}, X, how=ms.how.Interpose(**options))
    # Only the blocks that get copies matter.
    if tied != (2, 3):
        ms.grow_(model, {"blocks": 1}, X, how=ms.how.Interpose(behind=[3], **options))


@pytest.mark.parametrize("share", [False, True])
def test_fewer_blocks_than_were_offered_cost_no_present_one(share: bool) -> None:
    class Ranked:
        """Copies in between, ranked: the rule takes the best of both runs."""

        kinds: ClassVar[dict[str, bool]] = {"depth": False}
        batches = 0

        def propose(self, lab: Lab, axis: ms.Axis, count: int) -> Offer:
            offer = ms.how.Interpose(share=share).propose(lab, axis, count)
            gains = tuple(1.0 / (1 + place) for place in range(count))
            return replace(offer, gains=gains, flops=10**9)

    model = nn.Sequential(Net(3), nn.Linear(2, 4), Net(3))
    before = [[*model[place].blocks] for place in (0, 2)]
    weights = [block.down.weight.clone() for block in before[0]]
    ranked = grower(
        model, how=Ranked(), where=ms.where.ByGain(), axes="depth", amount=3
    )
    growth = ranked.step()
    assert growth is not None
    # The first of both, then the second of one.
    assert sorted(growth.added.values()) == [1, 2]
    # What was offered in vain was paid for.
    assert growth.flops // 10**9 == 4
    for place, old in zip((0, 2), before, strict=True):
        now = [*model[place].blocks]
        assert [block for block in now if block in old] == old
    # A block shares with the copies that it got, and with no others.
    two = growth.added["0.blocks"] == 2
    factors = [0.5, 0.5 if two else 1.0, 1.0] if share else [1.0, 1.0, 1.0]
    for block, weight, factor in zip(before[0], weights, factors, strict=True):
        assert torch.equal(block.down.weight, factor * weight)


def test_an_int_goes_to_one_sort_of_axes() -> None:
    growth = grower(Net(), how=ms.how.Random(), amount=6).step()
    assert growth is not None
    assert all(not name.endswith("depth") and name != "blocks" for name in growth.added)
    growth = grower(Net(), how=ms.how.ZeroBlock(), amount=2, axes="blocks").step()
    assert growth is not None
    assert growth.added == {"blocks": 2}


def test_a_budget_binds_depth() -> None:
    model = Net()
    bound = grower(
        model,
        how=ms.how.Stack(),
        amount={"blocks": 9},
        budget=ms.Budget(sizes={"blocks": 5}),
    )
    growth = bound.step()
    assert growth is not None
    assert growth.after == {"blocks": 5}


def test_the_stack_recipe_grows_once_at_its_moment() -> None:
    model = Net(1)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    recipe = ms.recipes.stack(
        model, opt, loss=loss_of, data=[X], to={"blocks": 4}, at=0.5, total="10 steps"
    )
    depth = []
    for _ in range(10):
        opt.zero_grad()
        loss_of(model, X).backward()
        opt.step()
        recipe.step()
        depth.append(len(model.blocks))
    assert depth == [1] * 4 + [4] * 6
    other = Net(1)
    shared = ms.recipes.stack(
        other,
        torch.optim.AdamW(other.parameters()),
        loss=loss_of,
        data=[X],
        to={"blocks": 2},
        at="1 steps",
        how=ms.how.Interpose(share=True),
    )
    growth = shared.step()
    assert growth is not None
    assert growth.origin.plan.rescaled


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"at": 0.0}, ValueError, "fraction of training in"),
        ({"at": 1.0}, ValueError, "fraction of training in"),
        ({"at": 1.5}, ValueError, "fraction of training in"),
        ({"total": "10"}, ValueError, "carries its unit"),
        ({"to": {"blocks": 1}}, ms.GrowthRefused, "more blocks than it has now"),
        ({"to": {"blocks": 0}}, ms.GrowthRefused, "more blocks than it has now"),
        ({"to": {"stem": 9}}, ms.GrowthRefused, "not a depth"),
        ({"to": {}}, ms.GrowthRefused, "name a depth"),
        ({"to": {"blocs": 4}}, ms.UnknownAxis, "Did you mean 'blocks'"),
    ],
)
def test_the_stack_recipe_says_what_is_wrong(
    change: dict[str, Any], error: type[Exception], words: str
) -> None:
    model = Net(1)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    asked = {"to": {"blocks": 4}, "at": 0.5, "total": "10 steps"} | change
    with pytest.raises(error, match=words):
        ms.recipes.stack(model, opt, loss=loss_of, data=[X], **asked)
    assert len(model.blocks) == 1


class Gated(nn.Module):
    """Two projections multiplied: with both at zero neither would ever learn."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate(x) * self.up(x)


class Modulated(nn.Module):
    """A branch scaled by what a condition says, as in a diffusion transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.condition, self.up, self.down = (
            nn.Linear(6, 6),
            nn.Linear(6, 9),
            nn.Linear(9, 6),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.condition(x.mean(0, keepdim=True)) * self.down(
            torch.tanh(self.up(x))
        )


SCALES: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    "plain": (1.0, lambda weight: weight),
    "shifted": (0.0, lambda weight: 1 + weight),
    "exponential": (0.0, torch.exp),
}
"""How norms store their scale: where it starts, and what is made of it."""


class OwnNorm(nn.Module):
    def __init__(self, stored: str) -> None:
        super().__init__()
        self.stored = stored
        self.weight = nn.Parameter(torch.full((6,), SCALES[stored][0]))

    def forward(self, x: Tensor) -> Tensor:
        scaled = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return scaled * SCALES[self.stored][1](self.weight)


class Sandwiched(nn.Module):
    """A norm of the user's own behind the last projection."""

    def __init__(self, stored: str = "plain") -> None:
        super().__init__()
        self.pre, self.up, self.down, self.post = (
            OwnNorm(stored),
            nn.Linear(6, 9),
            nn.Linear(9, 6),
            OwnNorm(stored),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.post(self.down(torch.tanh(self.up(self.pre(x)))))


def chain_of(block: Any, depth: int = 2) -> Net:
    net = Net(0)
    net.blocks.extend(block() for _ in range(depth))
    return net


def gemmas() -> nn.Module:
    return Sandwiched("shifted")


@pytest.mark.parametrize("block", [Gated, Modulated, Sandwiched, gemmas])
@pytest.mark.parametrize("how", [ms.how.ZeroBlock(), ms.how.Interpose(zero=True)])
def test_a_silent_block_learns_at_once_and_gently(block: Any, how: Any) -> None:
    """As little as possible is zero: no product of two zeros, and no zero in front of a norm, whose slope would be 1000."""
    torch.manual_seed(0)
    net = chain_of(block)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    before = net(X).detach()
    growth = ms.grow_(net, {"blocks": 1}, X, how=how, optimizer=optimizer)
    assert torch.equal(net(X), before)
    target = torch.randn(5, 2)
    (net(X) - target).square().mean().backward()
    (new,) = growth.blocks["blocks"]
    norms = [p.grad.norm() for p in net.blocks[new].parameters()]
    old = max(p.grad.norm() for p in net.blocks[0].parameters())
    assert 0 < max(norms) < 10 * old
    optimizer.step()
    assert (net(X) - before).abs().max() < 0.3 * before.abs().max()


def test_a_norm_that_no_zero_silences_is_refused_and_stacks() -> None:
    net = chain_of(lambda: Sandwiched("exponential"))
    assert "no new block of it leaves the function as it is" in reason(net)
    assert ms.grow_(net, {"blocks": 1}, X, how=ms.how.Stack()).max_change > 0


def test_ids_that_are_no_positions_stay_where_one_block_is_all_there_is() -> None:
    net = Net(1)
    net.blocks[0].pad_token_id, net.blocks[0].aux = 0, nn.CrossEntropyLoss()
    ms.grow_(net, {"blocks": 2}, X)
    assert [block.pad_token_id for block in net.blocks] == [0, 0, 0]
    assert [block.aux.ignore_index for block in net.blocks] == [-100] * 3
    assert [block.layer_idx for block in net.blocks] == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "depth"), [("layer_num", 1), ("lid", 2), ("i", 2), ("whatever", 3)]
)
def test_positions_are_known_by_their_name_or_by_counting_on(
    name: str, depth: int
) -> None:
    net = Net(depth)
    for i, block in enumerate(net.blocks):
        setattr(block, name, i)
        block.dilation = i + 5
    ms.grow_(net, {"blocks": 2}, X, how=ms.how.Stack())
    assert [getattr(block, name) for block in net.blocks] == list(range(depth + 2))
    assert [block.dilation for block in net.blocks] != list(range(5, depth + 7))


def test_a_lone_first_block_that_differs_leads_into_the_run() -> None:
    net = Net(3)
    net.num_layers = 3
    net.blocks[0].up = nn.Sequential(nn.Linear(6, 9))
    axes = ms.find_axes(net, X)
    assert {
        name: axis.size
        for name, axis in axes.items()
        if axis.kind == "depth" and ":" not in name
    } == {"blocks": 3}
    growth = ms.grow_(net, {"blocks": 2}, X, how=ms.how.Stack())
    assert [block.layer_idx for block in net.blocks] == [0, 1, 2, 3, 4]
    assert net.num_layers == 5
    ms.narrow_(net, growth.blocks | {}, X)
    assert [block.layer_idx for block in net.blocks] == [0, 1, 2]
    assert net.num_layers == 3


def test_parametrized_blocks_are_alike() -> None:
    net = Net(3)
    for block in net.blocks:
        nn.utils.parametrizations.weight_norm(block.down)
    assert ms.grow_(net, {"blocks": 2}, X, how=ms.how.Stack()).before == {"blocks": 3}
    assert len(net.blocks) == 5


class Tapped(Net):
    """Reads its second and fourth block."""

    def __init__(self) -> None:
        super().__init__(4)
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x, taps = self.stem(x), []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in (1, 3):
                taps.append(x)
        return self.head(torch.cat(taps, -1))


@pytest.mark.parametrize("how", [ms.how.ZeroBlock(), ms.how.Stack()])
def test_blocks_that_nothing_would_read_are_refused(how: Any) -> None:
    net = Tapped()
    with pytest.raises(ms.MeristemError, match="reach"):
        ms.grow_(net, {"blocks": 2}, X, how=how)
    assert len(net.blocks) == 4


class Looping(Net):
    """Numbers that equal the depth by coincidence."""

    def __init__(self) -> None:
        super().__init__(3)
        self.num_mlp_layers = self.patch_depth = self.num_refine_blocks = 3
        self.refine = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        for _ in range(self.num_refine_blocks):
            x = torch.tanh(self.refine(x))
        return self.head(x)


def test_numbers_of_something_else_stay() -> None:
    net = Looping()
    assert ms.grow_(net, {"blocks": 2}, X).max_change == 0
    assert (net.num_mlp_layers, net.patch_depth, net.num_refine_blocks) == (3, 3, 3)


def test_a_layer_inside_a_block_that_is_in_no_run_grows_again_and_narrows() -> None:
    class Between(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = block(1.5 * x)
            return self.head(x)

    net = Between(2)
    growth = ms.grow_(net, {"blocks.0.up:depth": 1}, X)
    ms.grow_(net, {"blocks.0.up:depth": 1}, X)
    ms.narrow_(net, {"blocks.0.up:depth": 2}, X)
    assert isinstance(net.blocks[0].up, nn.Linear)
    assert growth.after == {"blocks.0.up:depth": 2}


def test_wrong_arguments_of_the_grower_are_named_at_once() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    given = {
        "loss": loss_of,
        "data": [X],
        "when": ms.when.Every(steps=1),
        "how": ms.how.Stack(),
        "axes": "blocks",
    }
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"when": "2 steps"}, TypeError, "when must be a trigger"),
        ({"budget": 30}, TypeError, "budget must be a meristem.Budget"),
        ({"how": "stack"}, TypeError, r"got 'stack'. hint: meristem.how.Stack\(\)"),
        ({"care": "warm_moments"}, TypeError, "got 'warm_moments'"),
        ({"amount": {"blocks": 0.5}}, ValueError, "number of units"),
        ({"axes": ["blocks", "blockz"]}, ms.UnknownAxis, "Did you mean 'blocks'"),
    ]
    for wrong, kind, message in cases:
        with pytest.raises(kind, match=message):
            ms.Grower(net, optimizer, **given | wrong)
    with pytest.raises(TypeError, match="number of blocks is an int"):
        ms.recipes.stack(
            net, optimizer, loss=loss_of, data=[X], to={"blocks": 6.5}, total="4 steps"
        )
    with pytest.raises(ms.GrowthRefused, match="unit 0 is named twice"):
        ms.narrow_(net, {"blocks": [0, 0]}, X)
    with pytest.raises(
        ms.UnknownAxis, match=r"Did you mean '0\.blocks' or '2\.blocks'"
    ):
        ms.grow_(nn.Sequential(Net(), nn.Linear(2, 4), Net()), {"blocks": 1}, X)


def test_a_model_that_insists_on_float32_grows_by_its_labels() -> None:
    class Insisting(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float())

    net = Insisting()
    assert ms.grow_(net, {"blocks": 1}, X).max_change == 0
    assert not net.blocks[3].down.weight.any()


class Listing(Net):
    """Gives what every block gives."""

    def forward(self, x: Tensor) -> Any:
        found = [self.stem(x)]
        for block in self.blocks:
            found.append(block(found[-1]))
        return [self.head(x) for x in found]


def test_reasons_are_told_for_every_container_of_blocks() -> None:
    with pytest.raises(ms.VerificationError, match="one for every block"):
        ms.grow_(Listing(), {"blocks": 1}, X, how=ms.how.ZeroBlock())

    class Keyed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleDict({"a": Residual(), "b": Residual()})

        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks["b"](self.blocks["a"](self.stem(x)))
            return self.head(x)

    assert "does not pass through every block" in reason(Keyed())

    class Widening(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.act = nn.Linear(4, 6), nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.up(x))

    assert "change the shape" in reason(
        nn.Sequential(nn.Sequential(Widening()), nn.Linear(6, 2)), "0"
    )


class Scaled(nn.Module):
    """A branch whose scale starts at zero (ReZero)."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)
        self.scale = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.down(torch.tanh(self.up(x)))


@pytest.mark.parametrize("shape", [(), (1,), (6,)])
@pytest.mark.parametrize("how", [ms.how.ZeroBlock(), ms.how.Interpose(zero=True)])
def test_a_scale_that_is_still_zero_silences_a_block_by_itself(
    shape: tuple[int, ...], how: Any
) -> None:
    net = chain_of(lambda: Scaled(shape))
    assert ms.grow_(net, {"blocks": 1}, X, how=how).max_change == 0
    net(X).square().mean().backward()
    assert all(block.scale.grad.abs().sum() > 0 for block in net.blocks)


def test_a_lone_block_keeps_numbers_that_mean_something_else() -> None:
    net = Net(1)
    net.blocks[0].depth = net.blocks[0].n_layer = net.blocks[0].stage = 2
    ms.grow_(net, {"blocks": 2}, X)
    assert [(b.depth, b.n_layer, b.stage) for b in net.blocks] == [(2, 2, 2)] * 3


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_positions_that_count_from_one_follow(depth: int) -> None:
    net = Net(depth)
    for i, block in enumerate(net.blocks):
        block.layer_number = i + 1
    ms.grow_(net, {"blocks": 2}, X, how=ms.how.Stack())
    assert [block.layer_number for block in net.blocks] == list(range(1, depth + 3))


class Rooted(Net):
    """A square root that random weights of the checks fall out of."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(64))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain.sqrt().mean()


@pytest.mark.parametrize("how", [ms.how.ZeroBlock(), ms.how.Stack()])
def test_what_random_weights_cannot_tell_is_left_to_the_real_ones(how: Any) -> None:
    net = Rooted()
    growth = ms.grow_(net, {"blocks": 1}, X, how=how)
    assert (growth.max_change == 0) == isinstance(how, ms.how.ZeroBlock)


def test_a_grower_with_a_method_for_depth_grows_depth_and_refuses_at_once() -> None:
    net = Net()
    given = {
        "loss": loss_of,
        "data": [X],
        "when": ms.when.Every(steps=1),
        "how": ms.how.Stack(),
        "amount": 2,
    }
    grower = ms.Grower(net, torch.optim.SGD(net.parameters(), lr=0.1), **given)
    growth = grower.grow()
    assert growth is not None
    assert growth.added == {"blocks": 2}
    tapped = Tapped()
    with pytest.raises(ms.UnknownAxis, match="would not reach the output"):
        ms.Grower(
            tapped,
            torch.optim.SGD(tapped.parameters(), lr=0.1),
            **given | {"amount": {"blocks": 1}},
        )


def test_blocks_are_repeated_and_copied_where_they_are_named() -> None:
    net = chain_of(Sandwiched, 5)
    stacked = copy.deepcopy(net)
    growth = ms.grow_(stacked, {"blocks": 3}, X, how=ms.how.Stack(blocks=[3, 1]))
    assert growth.blocks["blocks"] == [4, 5, 6]
    for place, parent in zip((4, 5, 6), (3, 1, 3), strict=True):
        assert torch.equal(
            stacked.blocks[place].up.weight, net.blocks[parent].up.weight
        )
    beside = copy.deepcopy(net)
    how = ms.how.Interpose(zero=True, behind=[1, 3])
    growth = ms.grow_(beside, {"blocks": 2}, X, how=how)
    assert growth.blocks["blocks"] == [2, 5]
    assert torch.equal(beside(X), net(X))
    with pytest.raises(ms.GrowthRefused, match="names block 7"):
        ms.grow_(net, {"blocks": 1}, X, how=ms.how.Stack(blocks=[7]))


def test_the_end_of_a_name_is_enough_where_it_is_the_only_one() -> None:
    net = nn.Sequential(chain_of(Sandwiched))
    axes = ms.find_axes(net, X)
    assert axes["blocks"].name == "0.blocks"
    assert ms.grow_(net, {"blocks": 1}, X).after == {"0.blocks": 3}
    with pytest.raises(ms.UnknownAxis, match=r"0\.blocks\.0\.up"):
        ms.grow_(net, {"up": 1}, X)  # each block has one
