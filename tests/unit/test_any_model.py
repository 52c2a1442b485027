"""Kinds of models as people write them: each grows exactly, or is told in one sentence why not."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import meristem as ms
from meristem.structure import discover, resolve
from meristem.structure.ops import OPERATIONS
from meristem.structure.tracer import Operation
from meristem.structure.twin import submodule


def outputs(net: nn.Module, example: Any) -> Tensor:
    with torch.no_grad():
        found = (
            net.eval()(*example) if isinstance(example, tuple) else net.eval()(example)
        )
    return found[-1] if isinstance(found, tuple) else found


def grows(net: nn.Module, axis: str, example: Any, count: int = 2) -> ms.Growth:
    """The axis grows without a change of the old outputs, and a step of AdamW runs behind it."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    before = outputs(net, example)
    growth = ms.grow_(net, {axis: count}, example, optimizer=optimizer)
    after = outputs(net, example)
    kept = after[tuple(slice(size) for size in before.shape)]
    torch.testing.assert_close(kept, before, atol=2e-6, rtol=1e-5)
    after_step = net(*example) if isinstance(example, tuple) else net(example)
    loss = after_step[-1] if isinstance(after_step, tuple) else after_step
    loss.square().mean().backward()
    optimizer.step()
    return growth


# -- norms, known by what they compute


class Scaled(nn.Module):
    """The weight before the root; eps in an attribute of any name."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.tiny = nn.Parameter(torch.rand(width) + 0.5), 1e-2

    def forward(self, x: Tensor) -> Tensor:
        mean = torch.mean(x * x, dim=-1, keepdim=True)
        return self.scale * x / torch.sqrt(mean + self.tiny)


class OnePlus(nn.Module):
    """Gemma's: in float32, and the weight is stored less one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(width) / 9), 1e-2

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * (1.0 + self.weight.float())).type_as(x)


class Written(nn.Module):
    """A layer norm written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(width) + 0.5), 1e-2

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).pow(2).mean(-1, keepdim=True)
        return self.weight * (
            (x - mean) * torch.rsqrt(variance + self.variance_epsilon)
        )


class Unit(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain, self.scale = nn.Parameter(torch.ones(width)), width**0.5

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * self.scale * self.gain


class Called(nn.Module):
    """A layer norm by its function; `eps` in an attribute, or in the code."""

    def __init__(self, width: int, eps: float | None = 1e-2) -> None:
        super().__init__()
        self.gamma, self.beta = (
            nn.Parameter(torch.rand(width)),
            nn.Parameter(torch.ones(width)),
        )
        self.epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        eps = 1e-3 if self.epsilon is None else self.epsilon
        return F.layer_norm(x, self.gamma.shape, self.gamma, self.beta, eps)


class Residual(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.inner, self.first, self.last = nn.Linear(5, 8), norm(8), norm(8)
        self.up, self.down, self.head = (
            nn.Linear(8, 12),
            nn.Linear(12, 8),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return self.head(self.last(x + self.down(F.gelu(self.up(self.first(x))))))


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "nn.RMSNorm": nn.RMSNorm,
    "nn.RMSNorm, eps": lambda width: nn.RMSNorm(width, eps=1e-2),
    "nn.LayerNorm": nn.LayerNorm,
    "root": Scaled,
    "one plus": OnePlus,
    "normalize": Unit,
    "written out": Written,
    "called": Called,
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_the_residual_width_grows_under_every_spelling_of_a_norm(norm: Any) -> None:
    torch.manual_seed(0)
    net, x = Residual(norm), torch.randn(4, 5)
    first = outputs(net, x)
    growth = ms.grow_(net, {"inner": 3}, x)
    assert growth.max_change < 1e-5
    torch.testing.assert_close(outputs(net, x), first, atol=2e-6, rtol=1e-5)
    grows(net, "inner", x)
    before = outputs(net, x)
    ms.narrow_(net, {"up": 1}, x)
    assert outputs(net, x).shape == before.shape


def test_a_number_in_code_is_refused_for_that_axis_with_its_line() -> None:
    axes = ms.find_axes(Residual(lambda width: Called(width, None)), torch.randn(4, 5))
    assert "up" in axes
    assert "test_any_model.py:" in axes.frozen["inner"]
    assert "0.001 as a number" in axes.frozen["inner"]


# -- what a trace meets


class Token(nn.Module):
    """A view of a parameter that a module gives, one that it takes, one that is repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.queries = nn.Embedding(4, 6)
        self.give, self.a, self.b = nn.Identity(), nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        batch = len(x)
        read = self.give(self.token.expand(batch, -1, -1))
        whole = torch.cat([read, self.token.repeat(batch, 1, 1), x], 1)
        hidden = torch.relu(self.a(whole)).mean(1) + self.a(
            self.queries.weight.unsqueeze(0)
        ).mean(1)
        return self.b(hidden)


def test_views_of_parameters_go_in_and_out_of_modules() -> None:
    net, x = Token(), torch.randn(3, 4, 6)
    assert "a" in ms.find_axes(net, x)
    loss = lambda model, batch: model(batch).square().mean()
    growth = ms.grow_(net, {"a": 4}, how=ms.how.GradMax(), loss=loss, data=[x])
    assert growth.after["a"] == 12
    assert growth.flops > 0


@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_of_one_is_a_batch(batch: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.o = nn.Linear(5, 8), nn.Linear(8, 2)
            self.gain = nn.Parameter(torch.ones(1, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.o(torch.relu(self.a(x)) * self.gain)

    net, x = Net(), torch.randn(batch, 5)
    axes = ms.find_axes(net, x)
    assert list(axes.ends) == ["o"]
    grows(net, "a", x)
    assert net(torch.randn(7, 5)).shape == (7, 2)


def test_a_rule_that_fails_costs_an_axis_and_not_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: Any) -> None:
        raise IndexError("no such dimension")

    monkeypatch.setitem(OPERATIONS, "tanh", Operation(fails))
    net = nn.Sequential(
        nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)
    )
    axes = ms.find_axes(net, torch.randn(3, 5))
    assert "2" in axes
    assert "1: the rule for 'tanh' fails on this call (IndexError" in axes.frozen["0"]


def test_a_fault_of_ours_does_not_blame_the_example(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: Any) -> None:
        raise KeyError("ours")

    monkeypatch.setattr(discover, "find_runs", fails)
    net = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 2))
    with pytest.raises(ms.DiscoveryError, match="a fault of Meristem"):
        ms.find_axes(net, torch.randn(3, 5))
    with pytest.raises(ms.DiscoveryError, match="fails on the example"):
        ms.find_axes(net, torch.randn(3, 4))


def test_numbers_computed_inside_blocks() -> None:
    """A tensor without dimensions, and a power whose exponent is a tensor."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x: Tensor) -> Tensor:
            scale = torch.sqrt(torch.tensor(8.0)) * torch.pow(
                torch.full((8,), 2.0), torch.arange(8.0)
            )
            return x + self.down(torch.relu(self.up(x))) / (1 + scale)

    net = nn.Sequential(
        nn.Linear(5, 8), nn.Sequential(Block(), Block()), nn.Linear(8, 2)
    )
    grows(net, "1", torch.randn(3, 5), 1)
    grows(net, "1.0.up", torch.randn(3, 5))


def test_operations_that_change_a_shape_in_place() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(torch.vmap(self.a)(x).unsqueeze(1).squeeze_(1)))

    grows(Net(), "a", torch.randn(3, 5))


def test_a_module_may_be_called_parameters() -> None:
    net = nn.Module()
    net.add_module("other", nn.Linear(4, 8))
    net._modules["parameters"] = nn.Linear(8, 2)  # hidden from getattr by the method
    whole = nn.Sequential(nn.Sequential())
    whole[0]._modules.update(
        {"modules": nn.Linear(4, 8), "parameters": nn.Linear(8, 2)}
    )
    grows(whole, "0.modules", torch.randn(3, 4))


def test_a_module_that_is_not_there_is_told_as_torch_tells_it() -> None:
    """What asks for it (blocks that move while their container does) expects that error."""
    net = nn.Sequential(nn.Linear(4, 8))
    for name in ("1", "0.weight", "parameters"):
        with pytest.raises(AttributeError):
            submodule(net, name)


@pytest.mark.parametrize("count", [10**9, 2**40])
def test_a_plan_of_any_size_is_told_and_not_tried(count: int) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    plan = ms.plan(net, {"0": count}, torch.randn(3, 4))
    assert not plan
    assert "a smaller amount" in str(plan.refusal)
    with pytest.raises(ms.GrowthRefused, match="a smaller amount"):
        ms.grow_(net, {"0": count}, torch.randn(3, 4))


# -- hooks


class Adapted(nn.Module):
    """A hook of the model's own changes what a layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o, self.adapter = nn.Linear(5, 8), nn.Linear(8, 2), nn.Linear(5, 8)
        self.a.register_forward_hook(lambda _, args, out: out + self.adapter(args[0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.relu(self.a(x)))


class Collecting(nn.Module):
    """Hooks that the model puts on itself at its first forward, and reads from."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2)
        )
        self.head, self.kept, self.ready = nn.Linear(6, 3), [], False

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            self.ready = True
            for block in self.blocks:
                block.register_forward_hook(lambda _, args, out: self.kept.append(out))
        for block in self.blocks:
            x = x + block(x)
        kept, self.kept[:] = list(self.kept), []
        return self.head(x + 0 * kept[-1]), torch.tensor(len(kept))


def test_hooks_of_the_model_go_with_its_copies() -> None:
    grows(Adapted(), "a", torch.randn(3, 5))


def test_new_blocks_have_the_hooks_of_those_that_they_are_made_of() -> None:
    net, x = Collecting().eval(), torch.randn(3, 6)
    ms.find_axes(net, x)
    assert int(net(x)[1]) == 2
    ms.grow_(net, {"blocks": 2}, x, how=ms.how.Stack())
    assert int(net(x)[1]) == 4


def test_hooks_that_only_look_on_do_not_see_our_passes() -> None:
    net, x, seen = (
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)),
        torch.randn(3, 4),
        [],
    )
    net[0].register_forward_hook(lambda _, args, out: seen.append(out))
    box: dict[str, int] = {}

    def counts(_: nn.Module, args: Any, out: Tensor) -> None:
        box["calls"] = box.get("calls", 0) + 1

    net[2].register_forward_hook(counts)
    ms.grow_(net, {"0": 2}, x)
    assert seen == []
    assert box == {}
    net(x)
    assert len(seen) == box["calls"] == 1


def test_a_hook_with_a_state_outside_of_the_model_is_named() -> None:
    net, outside = (
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)),
        SimpleNamespace(by=2),
    )
    net[0].register_forward_hook(lambda _, args, out: out * outside.by)
    with pytest.raises(
        ms.DiscoveryError,
        match="may change what that module gives, and holds an object of class Simple",
    ):
        ms.find_axes(net, torch.randn(3, 4))


# -- numbers outside of the traced forward


class Auto(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.z_dim, self.steps = 4, 4
        self.enc, self.dec = nn.Linear(16, 4), nn.Linear(4, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.dec(self.enc(x))


def test_a_number_that_can_mean_one_thing_follows() -> None:
    net = Auto()
    grows(net, "enc", torch.randn(3, 16))
    assert (net.z_dim, net.steps) == (6, 4)


class Config:
    inner = 24

    def __init__(self) -> None:
        self.layers, self.table = 2, {"hidden": 24}


class Configured(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.head = config, nn.Linear(8, 3)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Linear(8, config.inner), nn.ReLU(), nn.Linear(config.inner, 8)
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def test_a_config_follows_when_all_that_it_means_has_grown_and_is_told_of_before() -> (
    None
):
    config, x = Config(), torch.randn(3, 8)
    net = Configured(config)
    assert "config.inner holds the old size: 24" in repr(
        ms.plan(net, {"layers.0.0": 4}, x)
    )
    growth = grows(net, "layers.0.0", x, 4)
    assert growth.stale == ["config.inner holds the old size: 24"]
    assert net.config.inner == 24
    assert grows(net, "layers.1.0", x, 4).stale == []
    assert net.config.inner == 28
    # Another model may be built from it.
    assert config.inner == 24
    stored = ms.Plan.from_json(ms.plan(net, {"layers.0.0": 1}, x).json())
    assert stored.stale


# -- a second model


def test_a_deep_copy_of_a_grown_model_draws_the_same_units() -> None:
    net, x = (
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)),
        torch.randn(6, 4),
    )
    ms.grow_(net, {"0": 2}, x)
    average = copy.deepcopy(net)
    ms.grow_(net, {"0": 2}, x)
    ms.grow_(average, {"0": 2}, x)
    assert torch.equal(net[0].weight, average[0].weight)


@pytest.mark.parametrize(
    "how", [ms.how.Random(), ms.how.GradMax(), ms.how.Pairs(), ms.how.Net2Net()]
)
def test_a_growth_is_made_once_more_on_a_second_model(how: Any) -> None:
    torch.manual_seed(0)
    net, x = (
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)),
        torch.randn(6, 4),
    )
    average = copy.deepcopy(net)
    with torch.no_grad():
        average[0].weight.mul_(0.9)
    before = outputs(average, x)
    optimizer = torch.optim.Adam(net.parameters())
    loss = lambda model, batch: model(batch).square().mean()
    growth = ms.grow_(net, {"0": 3}, how=how, loss=loss, data=[x], optimizer=optimizer)
    again = ms.replay_(growth, average)
    torch.testing.assert_close(outputs(average, x), before)
    assert again.after == growth.after
    if not isinstance(
        how, ms.how.Net2Net
    ):  # whose new units are copies of each one's own
        assert torch.equal(net[0].weight[8:], average[0].weight[8:])


def test_a_growth_without_its_weights_is_not_made_once_more() -> None:
    net, x = (
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)),
        torch.randn(6, 4),
    )
    loss = lambda model, batch: model(batch).square().mean()
    second = copy.deepcopy(net)
    growth = ms.grow_(net, {"0": 3}, how=ms.how.SWE(), loss=loss, data=[x])
    with pytest.raises(ms.GrowthRefused, match="trained old weights on the side"):
        ms.replay_(growth, second)
    growth.origin = None
    with pytest.raises(ms.GrowthRefused, match="holds no weights"):
        ms.replay_(growth, second)
    assert second[0].out_features == 8


# -- a loss in the forward


@pytest.mark.parametrize("labels", [True, False])
def test_classes_and_vocabulary_grow_beside_a_loss(labels: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.o = nn.Embedding(11, 8), nn.Linear(8, 11)

        def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
            logits = self.o(self.e(ids))
            loss = None
            if labels is not None:
                loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
            return loss, logits

    net, ids = Net(), torch.randint(11, (2, 5))
    example = (ids, ids) if labels else (ids,)
    assert "o" in ms.find_axes(net, example).ends
    grows(net, "o", example)
    assert net(ids)[1].shape == (2, 5, 13)


# -- operations


def rows_added(h: Tensor) -> Tensor:
    return torch.zeros(3, h.shape[-1]).index_add(0, torch.tensor([0, 1, 1]), h)


def rows_scattered(h: Tensor) -> Tensor:
    at = torch.tensor([0, 1, 1])[:, None].expand_as(h)
    return torch.zeros(3, h.shape[-1]).scatter_add(0, at, h)


def rows_reduced(h: Tensor) -> Tensor:
    at = torch.tensor([0, 1, 1])[:, None].expand_as(h)
    return torch.zeros_like(h).scatter_reduce(0, at, h, "amax", include_self=False)


def rows_put(h: Tensor) -> Tensor:
    whole = torch.zeros(5, h.shape[-1])
    whole[torch.tensor([0, 3, 4])] = h
    return whole[:3]


def rows_masked(h: Tensor) -> Tensor:
    whole = h.clone()
    whole[torch.arange(h.shape[0]) == 1] = torch.tensor(0.5)
    return whole


ON_ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "index_add": rows_added,
    "scatter_add": rows_scattered,
    "scatter_reduce": rows_reduced,
    "index_put": rows_put,
    "index_put by a mask": rows_masked,
    "logsigmoid": F.logsigmoid,
    "rot90": lambda h: torch.rot90(h[:, :, None].expand(-1, -1, 2), 2, (0, 2)).mean(-1),
    "kthvalue": lambda h: (
        h - torch.kthvalue(torch.stack([h, 2 * h], -1), 1, dim=-1).values
    ),
    "fft": lambda h: torch.fft.fft(torch.stack([h, 2 * h], -1), dim=-1).real.mean(-1),
    "diagonal": lambda h: torch.diagonal(
        h[:, :, None, None].expand(-1, -1, 2, 2), dim1=2, dim2=3
    ).sum(-1),
    "slice_scatter": lambda h: torch.slice_scatter(
        torch.stack([h, h]), h[None], 0, 1, 2
    ).sum(0),
    "cummax": lambda h: torch.cummax(torch.stack([h, -h]), 0).values[1],
    "nansum": lambda h: torch.nansum(torch.stack([h, -h, h]), 0),
    "complex": lambda h: torch.view_as_real(
        torch.view_as_complex(torch.stack([h, h], -1)) * 1j
    ).sum(-1),
}


@pytest.mark.parametrize("operation", ON_ROWS.values(), ids=ON_ROWS)
def test_operations_that_keep_the_width(operation: Callable[[Tensor], Tensor]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(operation(self.a(x))))

    torch.manual_seed(0)
    grows(Net(), "a", torch.randn(3, 5))


def folded(h: Tensor) -> Tensor:
    return F.fold(F.unfold(h, 2, stride=2), h.shape[-2:], 2, stride=2)


def sampled(h: Tensor) -> Tensor:
    return F.grid_sample(h, torch.zeros(len(h), 4, 4, 2), align_corners=False)


ON_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "pixel_unshuffle": lambda h: F.pixel_shuffle(F.pixel_unshuffle(h, 2), 2),
    "channel_shuffle": lambda h: F.channel_shuffle(h, 2),
    "unfold": folded,
    "grid_sample": sampled,
    "channels_last": lambda h: F.max_pool2d(
        h.contiguous(memory_format=torch.channels_last), 2
    ),
}


@pytest.mark.parametrize("operation", ON_MAPS.values(), ids=ON_MAPS)
def test_operations_that_keep_the_channels(
    operation: Callable[[Tensor], Tensor],
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(operation(torch.relu(self.a(x)))).mean((2, 3))

    torch.manual_seed(0)
    net, x = Net(), torch.randn(2, 3, 4, 4)
    (name,) = [
        name for name, axis in ms.find_axes(net, x).items() if axis.kind == "width"
    ]
    assert name.startswith("a")
    grows(net, name, x)


def test_channels_behind_a_pixel_shuffle_come_in_whole_pixels() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.PixelShuffle(2), nn.Conv2d(2, 4, 1))
    x = torch.randn(2, 3, 4, 4)
    assert ms.find_axes(net, x)["0"].multiple == 4
    grows(net, "0", x, 4)
    assert net[0].out_channels == 12
    assert net[2].in_channels == 3


def test_a_regression_loss_in_the_forward() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor, y: Tensor) -> Any:
            given = self.b(torch.relu(self.a(x)))
            return F.mse_loss(given, y) + F.huber_loss(given, y), given

    grows(Net(), "a", (torch.randn(3, 5), torch.randn(3, 2)))


def test_a_bag_of_rows_and_distances() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.up = nn.EmbeddingBag(9, 6), nn.Linear(6, 8)
            self.far, self.head = nn.Linear(8, 5), nn.Linear(4, 2)
            self.centres = nn.Parameter(torch.randn(4, 5))

        def forward(self, ids: Tensor) -> Tensor:
            hidden = self.far(torch.relu(self.up(self.bag(ids))))
            return self.head(torch.cdist(hidden, self.centres))

    net, ids = Net(), torch.randint(9, (3, 4))
    axes = ms.find_axes(net, ids)
    assert {"bag", "up"} <= set(axes)
    assert "distances sum over it" in axes.frozen["far"]
    grows(net, "bag", ids)
    grows(net, "up", ids)


# -- depth


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))


class Inside(nn.Module):
    def __init__(self, out: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(out, 12), nn.Linear(12, out)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


class Outside(nn.Module):
    """The parent adds what its blocks give."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(mlp() for _ in range(3)), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Listed(nn.Module):
    """A block is a list of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = (
            nn.ModuleList(nn.ModuleList([mlp(), mlp()]) for _ in range(3)),
            nn.Linear(8, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        for first, second in self.blocks:
            x = first(x) + x
            x = second(x) + x
        return self.head(x)


class Walker(nn.Module):
    """It walks its own children."""

    def __init__(self) -> None:
        super().__init__()
        for number in range(3):
            self.add_module(f"block{number}", Inside())

    def forward(self, x: Tensor) -> Tensor:
        for block in self.children():
            x = block(x)
        return x


class Stage(nn.Module):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.down = nn.Identity() if inner == outer else nn.Linear(inner, outer)
        self.blocks = nn.Sequential(Inside(outer), Inside(outer))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.down(x))


DEEP: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "residual outside": (Outside, "blocks"),
    "blocks are lists": (Listed, "blocks"),
    "walks its children": (lambda: nn.Sequential(Walker(), nn.Linear(8, 2)), "0"),
    "a lone stage": (
        lambda: nn.Sequential(Stage(8, 8), Stage(8, 10), nn.Linear(10, 2)),
        "0.blocks",
    ),
    "a second stage": (
        lambda: nn.Sequential(Stage(8, 8), Stage(8, 10), nn.Linear(10, 2)),
        "1.blocks",
    ),
}


@pytest.mark.parametrize(("made", "axis"), DEEP.values(), ids=DEEP)
def test_depth_as_people_write_it(made: Callable[[], nn.Module], axis: str) -> None:
    torch.manual_seed(0)
    net, x = made(), torch.randn(4, 8)
    size = ms.find_axes(net, x)[axis].size
    growth = grows(net, axis, x)
    assert growth.after[axis] == size + 2
    before = outputs(net, x).shape
    ms.narrow_(net, {axis: 2}, x)
    assert outputs(net, x).shape == before
    assert ms.find_axes(net, x)[axis].size == size


def test_blocks_may_share_a_module() -> None:
    class Shares(nn.Module):
        def __init__(self, shared: nn.Module) -> None:
            super().__init__()
            self.shared, self.up, self.down = shared, nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(F.relu(self.up(x + self.shared(x))))

    shared = nn.Linear(8, 8)
    net, x = (
        nn.Sequential(nn.Sequential(Shares(shared), Shares(shared)), nn.Linear(8, 3)),
        torch.randn(4, 8),
    )
    grows(net, "0", x, 1)
    assert net[0][2].shared is shared


# -- heads


def test_heads_whose_number_stands_in_a_config() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config, self.each = SimpleNamespace(heads=4), 4
            self.qkv, self.o = nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            inner, y = self.config.heads * self.each, self.qkv(x)
            parts = y[..., :inner], y[..., inner : 2 * inner], y[..., 2 * inner :]
            q, k, v = (
                t.reshape(*t.shape[:2], -1, self.each).transpose(1, 2) for t in parts
            )
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
            return self.o(y.reshape(*y.shape[:2], -1))

    net, x = Fused(), torch.randn(2, 5, 16)
    (name,) = [
        name for name, axis in ms.find_axes(net, x).items() if axis.kind == "heads"
    ]
    grows(net, name, x, 1)
    assert net.config.heads == 5


# -- recurrent layers


class Recurrent(nn.Module):
    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 6)
        self.rnn = getattr(nn, kind)(6, 8, batch_first=True, **options)
        wide = options.get("proj_size", 8) * (2 if options.get("bidirectional") else 1)
        self.head = nn.Linear(wide, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.inner(x))[0][:, -1])


class Cells(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner, self.rnn, self.head = (
            nn.Linear(5, 6),
            getattr(nn, kind)(6, 8),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in self.inner(x).unbind(1):
            state = self.rnn(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


RECURRENT: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: Recurrent("LSTM"),
    "GRU": lambda: Recurrent("GRU"),
    "RNN": lambda: Recurrent("RNN"),
    "LSTM, both ways": lambda: Recurrent("LSTM", num_layers=2, bidirectional=True),
    "LSTM, projected": lambda: Recurrent("LSTM", proj_size=4),
    "GRU, two layers": lambda: Recurrent("GRU", num_layers=2),
    "LSTMCell": lambda: Cells("LSTMCell"),
    "GRUCell": lambda: Cells("GRUCell"),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("made", RECURRENT.values(), ids=RECURRENT)
def test_recurrent_layers_and_what_feeds_them(
    made: Callable[[], nn.Module], tmp_path: Any
) -> None:
    torch.manual_seed(0)
    net, x = made(), torch.randn(2, 7, 5)
    start = copy.deepcopy(net)
    assert {"inner", "rnn"} <= set(ms.find_axes(net, x))
    grows(net, "rnn", x, 3)
    grows(net, "inner", x, 2)
    assert (net.rnn.hidden_size, net.rnn.input_size) == (11, 8)
    ms.save(tmp_path / "grown", net)
    torch.testing.assert_close(
        outputs(ms.load(tmp_path / "grown", start), x), outputs(net, x)
    )
    before = outputs(net, x)
    ms.narrow_(net, {"rnn": 3}, x)
    assert net.rnn.hidden_size == 8
    assert outputs(net, x).shape == before.shape


@pytest.mark.parametrize("how", [ms.how.Net2Net(), ms.how.GradMax(), ms.how.Pairs()])
def test_methods_on_a_recurrent_layer_keep_their_word(how: Any) -> None:
    torch.manual_seed(0)
    net, x = Recurrent("GRU"), torch.randn(4, 5, 5)
    loss = lambda model, batch: model(batch).square().mean()
    before = outputs(net, x)
    ms.grow_(net, {"rnn": 2}, how=how, loss=loss, data=[x])
    assert net.rnn.hidden_size == 10
    if how.preserves:
        torch.testing.assert_close(outputs(net, x), before, atol=2e-6, rtol=1e-5)


def test_every_operation_has_an_effect_in_the_table() -> None:
    """The page lists what the rows are; a new row stands there, too."""
    script = Path(__file__).parents[2] / "benchmarks" / "operations.py"
    spec = importlib.util.spec_from_file_location("operations", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (script.parents[1] / "docs" / "operations.md").read_text()
    assert module.table() in page


# -- sizes that one number of the code ties


class FromWidth(nn.Module):
    """nanoGPT's attention: the width of a head is the stream's over the heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.n_head, self.n_embd = heads, width
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.c_attn(x).split(self.n_embd, dim=2)
        shape = (batch, length, self.n_head, width // self.n_head)
        q, k, v = (part.view(shape).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.c_proj(mixed.transpose(1, 2).reshape(batch, length, width))


class Torchs(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


class PreNorm(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(16), attention

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm(x))


def stream(attention: Callable[[], nn.Module]) -> nn.Module:
    blocks = [PreNorm(attention()) for _ in range(3)]
    return nn.Sequential(nn.Linear(5, 16), *blocks, nn.LayerNorm(16), nn.Linear(16, 3))


TIED = {
    "nanogpt": lambda: stream(lambda: FromWidth(16, 4)),
    "torch": lambda: stream(lambda: Torchs(16, 4, batch_first=True)),
    "two_sizes": lambda: nn.Sequential(
        stream(lambda: FromWidth(16, 4))[:3],
        PreNorm(FromWidth(16, 2)),
        nn.LayerNorm(16),
        nn.Linear(16, 3),
    ),
    "encoder": lambda: nn.Sequential(
        nn.Linear(5, 16),
        nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 4, 32, norm_first=True, batch_first=True),
            2,
            enable_nested_tensor=False,
        ),
        nn.LayerNorm(16),
        nn.Linear(16, 3),
    ),
}


@pytest.mark.parametrize("name", TIED)
def test_heads_grow_with_the_width_that_their_code_divides(name: str) -> None:
    net, x = TIED[name](), torch.randn(2, 6, 5)
    axes = ms.find_axes(net, x)
    axis = next(iter(axes))
    step = axes[axis].multiple
    assert step == (8 if name == "two_sizes" else 4)
    heads = [key for key in axes.frozen if key.endswith(":heads")]
    assert heads
    for key in heads:
        assert (
            axes.frozen[key] == f"it grows together with {axis!r}, in steps of {step}"
        )
    shapes = {key: value.shape for key, value in net.state_dict().items()}
    first = grows(net, axis, x, 2 * step)
    assert not first.stale
    assert set(first.after) == {axis, *heads}
    # Once more, since the numbers in the code must have followed.
    grows(net, axis, x, step)
    ms.narrow_(net, {axis: 3 * step}, x)
    assert {key: value.shape for key, value in net.state_dict().items()} == shapes


def test_a_width_that_divides_into_heads_grows_without_a_look_before() -> None:
    net, x = TIED["nanogpt"](), torch.randn(2, 6, 5)
    with pytest.raises(ms.GrowthRefused, match="multiples of 4; got 3"):
        ms.grow_(copy.deepcopy(net), {"0": 3}, x)
    assert ms.grow_(net, {"0": 4}, x).after["0"] == 20


class SplitEvenly(nn.Module):
    """Two widths from one number of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.c = 8
        self.make = nn.Conv2d(3, 16, 1)
        self.mix = nn.Conv2d(8, 8, 3, padding=1)
        self.read = nn.Conv2d(24, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.make(x).split((self.c, self.c), 1)
        return self.read(torch.cat((a, b, self.mix(b)), 1)).mean((2, 3))


def test_two_widths_from_one_number_grow_together() -> None:
    net, x = SplitEvenly(), torch.randn(2, 3, 6, 6)
    growth = grows(net, "make", x)
    assert growth.after == {"make": 10, "make:2": 10}
    assert net.c == 10


def test_a_measured_method_grows_widths_that_are_tied() -> None:
    net = SplitEvenly()
    data = [(torch.randn(8, 3, 6, 6), torch.randn(8, 4)) for _ in range(4)]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1])

    before = outputs(net, data[0][0])
    growth = ms.grow_(net, {"make": 2}, how=ms.how.GradMax(), loss=loss, data=data)
    assert growth.after == {"make": 10, "make:2": 10}
    torch.testing.assert_close(outputs(net, data[0][0]), before, atol=1e-5, rtol=1e-4)


def test_classes_that_came_can_go() -> None:
    net, x = (
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)),
        torch.randn(5, 4),
    )
    before = outputs(net, x)
    ms.grow_(net, {"2": 2}, x)
    ms.narrow_(net, {"2": [3, 4]}, x)
    torch.testing.assert_close(outputs(net, x), before)
    ms.narrow_(net, {"2": [0]}, x)
    torch.testing.assert_close(outputs(net, x), before[:, 1:])


# -- weights that are computed from others


def weight_normed(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(
        wrap(nn.Conv1d(2, 8, 3, padding=1)),
        nn.Tanh(),
        wrap(nn.Conv1d(8, 6, 3)),
        nn.Tanh(),
        nn.Flatten(),
        wrap(nn.Linear(6 * 5, 3)),
    )


def pruned_by_a_mask(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", 0.3)


COMPUTED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "weight_norm_by_a_hook": nn.utils.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "spectral_norm_by_a_hook": nn.utils.spectral_norm,
    "pruned": pruned_by_a_mask,
}


@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_weights_that_are_computed_from_others_grow(name: str) -> None:
    net, x = weight_normed(COMPUTED[name]), torch.randn(4, 2, 7)
    axes = ms.find_axes(net, x)
    assert {"0", "2"} <= set(axes), axes.frozen
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    net.train()(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    for axis in ("0", "2"):
        grows(net, axis, x)
    assert net[0].out_channels == 10
    # What goes is what came; a weight norm's scales are those of the layer.
    before = outputs(net, x)
    fresh = copy.deepcopy(net.state_dict())
    ms.grow_(net, {"0": 2}, x)
    ms.narrow_(net, {"0": [10, 11]}, x)
    torch.testing.assert_close(outputs(net, x), before, atol=1e-6, rtol=1e-5)
    for key, value in net.state_dict().items():
        assert torch.equal(value, fresh[key]), key


class Noisy(nn.Module):
    """A linear layer of a noisy net: a buffer of its weight's shape."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.randn(out, into) / 4)
        self.sigma = nn.Parameter(torch.full((out, into), 0.02))
        self.register_buffer("epsilon", torch.randn(out, into))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.mu + self.sigma * self.epsilon if self.training else self.mu
        return F.linear(x, weight)


def test_the_noise_of_a_weight_follows_it() -> None:
    net, x = nn.Sequential(Noisy(4, 8), nn.ReLU(), Noisy(8, 3)), torch.randn(5, 4)
    grows(net.train(), "0.mu", x)
    assert net[0].epsilon.shape == (10, 4)
    assert torch.equal(net[2].epsilon[:, 8:], torch.zeros(3, 2))
    net.train()(x)


class WeightNormBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.utils.parametrizations.weight_norm(nn.Linear(6, 8))
        self.down = nn.utils.parametrizations.weight_norm(nn.Linear(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class OnePlusSandwich(nn.Module):
    """Gemma 2: a norm before and one behind, whose scale is stored less one."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = OnePlus(6), OnePlus(6)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.after(self.down(self.up(self.before(x)).relu()))


@pytest.mark.parametrize("block", [WeightNormBlock, OnePlusSandwich])
def test_a_block_that_its_scale_silences_deepens_exactly(
    block: Callable[[], nn.Module],
) -> None:
    net = nn.Sequential(nn.Linear(4, 6), *[block() for _ in range(3)], nn.Linear(6, 2))
    x = torch.randn(5, 4)
    grows(net, "1:depth", x, 1)
    # The new block learns at once.
    net.zero_grad()
    net(x).square().mean().backward()
    reached = [
        p.grad is not None and p.grad.abs().max() > 0 for p in net[4].parameters()
    ]
    assert any(reached)


def test_a_cell_whose_size_the_code_reads_grows() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.out = nn.GRUCell(5, 12), nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            state = x.new_zeros(len(x), self.cell.hidden_size)
            for step in x.unbind(1):
                state = self.cell(step, state)
            return self.out(state)

    net = Loop()
    grows(net, "cell", torch.randn(2, 6, 5))
    assert net.cell.hidden_size == 14


class Fourier(nn.Module):
    """Complex weights, stored as pairs of real numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.drop = nn.Conv1d(2, 6, 1), nn.Conv1d(6, 1, 1)
        self.weight = nn.Parameter(torch.randn(6, 6, 5, 2) / 6)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(self.lift(x))[..., :5]
        weight = torch.view_as_complex(self.weight)
        mixed = torch.einsum("bim,iom->bom", spectrum, weight)
        return self.drop(torch.fft.irfft(mixed, n=x.shape[-1]))


def test_complex_weights_grow() -> None:
    net, x = Fourier(), torch.randn(2, 2, 16)
    for axis in ("lift", "weight"):
        grows(net, axis, x)
    assert net.weight.shape == (8, 8, 5, 2)


class Experts(nn.Module):
    """Experts in one tensor, rows sorted by expert, as Mixtral's."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(5, 8), nn.Linear(8, 3)
        self.up = nn.Parameter(torch.randn(2, 8, 16) / 3)
        self.down = nn.Parameter(torch.randn(2, 16, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        ends = torch.tensor([len(x) // 2, len(x)], dtype=torch.int32, device=x.device)
        y = torch._grouped_mm(x, self.up, offs=ends).relu()
        return self.out(x + torch._grouped_mm(y, self.down, offs=ends))


def test_experts_of_one_tensor_grow_in_steps_that_their_kernel_asks_for() -> None:
    net, x = Experts(), torch.randn(6, 5)
    axes = ms.find_axes(net, x)
    assert axes["up:2"].multiple == 4
    grows(net, "up:2", x, 4)
    grows(net, "inp", x, 4)


class TwoAtOnce(nn.Module):
    """One line reads three numbers, of which two must change at once."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.wide, self.all = 3, 12, 18
        self.make, self.read = nn.Linear(5, 18), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.split(
            self.make(x), [self.wide, self.all - self.wide], dim=-1
        )
        parts = first.view(len(x), self.heads, 4)
        return self.read(parts.flatten(1)) + second.mean(-1, keepdim=True)


def test_numbers_of_one_line_change_at_once() -> None:
    net, x = TwoAtOnce(), torch.randn(4, 5)
    grows(net, "make", x, 1)
    assert (net.heads, net.wide, net.all) == (4, 16, 22)


class PicksLast(nn.Module):
    """Falcon's: queries, and behind them one key and one value, by their places."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 3
        self.make, self.read = nn.Linear(6, 5 * 4), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        fused = self.make(x).view(batch, length, self.heads + 2, 4)
        q, k, v = fused[..., :-2, :], fused[..., [-2], :], fused[..., -1:, :]
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        k, v = k.expand_as(q), v.expand_as(q)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.read(mixed.transpose(1, 2).reshape(batch, length, -1))


def test_what_stands_beside_a_picked_entry_grows() -> None:
    net, x = PicksLast(), torch.randn(2, 7, 6)
    name = next(n for n, axis in ms.find_axes(net, x).items() if axis.kind == "heads")
    grows(net, name, x, 1)
    assert net.heads == 4


class InADict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        blocks = {f"layer{i}": PicksLast() for i in range(3)}
        self.blocks, self.out = nn.ModuleDict(blocks), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks.values():
            x = block(x)
        return self.out(x)


def test_blocks_in_a_dict_are_a_run() -> None:
    net, x = InADict(), torch.randn(2, 7, 6)
    grows(net, "blocks", x, 2)
    assert len(net.blocks) == 5
    assert list(net.blocks)[:3] == ["layer0", "layer1", "layer2"]


class ByKernel(nn.Module):
    """Attention by one of the kernels that a GPU has."""

    def __init__(self, kernel: str) -> None:
        super().__init__()
        self.kernel, self.heads = kernel, 4
        self.qkv, self.out = nn.Linear(16, 96), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        fused = self.qkv(x).view(batch, length, 3, self.heads, 8)
        attend = getattr(torch.ops.aten, f"_scaled_dot_product_{self.kernel}_attention")
        more = () if self.kernel == "flash" else (None, True)
        mixed = attend(*fused.permute(2, 0, 3, 1, 4), *more)[0]
        return x + self.out(mixed.transpose(1, 2).reshape(batch, length, -1))


@pytest.mark.parametrize("kernel", ["flash", "efficient", "cudnn"])
def test_heads_are_found_through_the_kernels_of_a_gpu(kernel: str) -> None:
    """On tensors without data: none of them runs here."""
    net = ByKernel(kernel)
    structure = discover.Structure(net, torch.randn(2, 7, 16))
    assert structure.fake
    assert resolve(structure, {"qkv:heads": 1}).refusal is None


class GroupedQueries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.kv = 6, 2
        self.q, self.k, self.v = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 8)
        self.o = nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, self.heads, 4).transpose(1, 2)
        k = self.k(x).view(batch, length, self.kv, 4).transpose(1, 2)
        v = self.v(x).view(batch, length, self.kv, 4).transpose(1, 2)
        times = self.heads // self.kv
        k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        scores = (q @ k.transpose(-1, -2)).softmax(-1)
        return x + self.o((scores @ v).transpose(1, 2).reshape(batch, length, -1))


def test_keys_and_the_queries_of_a_key_have_names_of_their_own() -> None:
    net, x = GroupedQueries(), torch.randn(2, 5, 8)
    axes = ms.find_axes(net, x)
    assert (axes["q:kv_heads"].size, axes["q:heads"].size) == (2, 3)
    grows(net, "q:kv_heads", x, 1)
    assert (net.heads, net.kv) == (9, 3)
    grows(net, "q:heads", x, 1)
    assert (net.heads, net.kv) == (12, 3)


class TwoSides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 6), nn.Linear(4, 8)
        self.meet, self.out = nn.Bilinear(6, 8, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.out(self.meet(self.left(x).relu(), self.right(y).relu()))


def test_both_sides_of_a_bilinear_layer_grow() -> None:
    net, example = TwoSides(), (torch.randn(4, 3), torch.randn(4, 4))
    for axis in ("left", "right", "meet"):
        grows(net, axis, example)
    assert net.meet.weight.shape == (7, 8, 10)
    assert (net.meet.in1_features, net.meet.in2_features) == (8, 10)


# -- features as the third end


FEATURES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2)),
        lambda n: torch.randn(4, n),
    ),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(5, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(72, 2),
        ),
        lambda n: torch.randn(2, n, 5, 5),
    ),
    "batch_norm_first": (
        lambda: nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)),
        lambda n: torch.randn(4, n),
    ),
    "flattened": (
        lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(15, 6), nn.Tanh(), nn.Linear(6, 2)
        ),
        lambda n: torch.randn(4, n, 3),
    ),
    "recurrent": (lambda: Last(), lambda n: torch.randn(2, 7, n)),
}


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(5, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0][:, -1])


@pytest.mark.parametrize("name", FEATURES)
def test_input_features_are_an_end_that_grows(name: str) -> None:
    make_net, features = FEATURES[name]
    net, x = make_net(), features(5)
    before = outputs(net, x)
    axes = ms.find_axes(net, x)
    (end,) = [name for name, axis in axes.inputs.items() if axis.size == 5]
    assert end not in axes
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    growth = ms.grow_(net, {end: 2}, x, optimizer=optimizer)
    assert growth.after == {end: 7}
    wide = features(7)
    wide[:, :5] = x if name != "recurrent" else wide[:, :5]
    if name == "recurrent":
        wide[..., :5] = x
    torch.testing.assert_close(outputs(net, wide), before, atol=1e-6, rtol=1e-5)
    # The new features are read from the first step on.
    net.train()(wide).square().mean().backward()
    optimizer.step()
    grows(net, next(iter(ms.find_axes(net, wide))), wide)
    ms.narrow_(net, {end: 2}, wide)
    net(x)


def test_features_grow_where_the_example_does_not_train() -> None:
    """One row is too few for a batch norm in train mode."""
    net, x = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)), torch.randn(1, 5)
    (end,) = ms.find_axes(net, x).inputs
    assert ms.grow_(net, {end: 2}, x).after == {end: 7}


def test_features_that_more_than_a_weight_reads_stay() -> None:
    normed = nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 3))
    axes = ms.find_axes(normed, torch.randn(4, 5))
    assert not axes.inputs
    assert "an input of the model" in axes.frozen.values()
