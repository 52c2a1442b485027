"""Every optimizer that people train with: its state follows growths in width and depth,
bit for bit where it is old, or it is refused at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import optim as O
from torch.optim import Optimizer
from zoo import Residual

import meristem as ms

Make = Callable[[Iterable[Any]], Optimizer]

TORCHS: dict[str, Make] = {
    "SGD": lambda p: O.SGD(p, lr=0.01),
    "SGD momentum": lambda p: O.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "SGD foreach": lambda p: O.SGD(p, lr=0.01, momentum=0.9, foreach=True),
    "SGD fused": lambda p: O.SGD(p, lr=0.01, momentum=0.9, fused=True),
    "Adam": O.Adam,
    "Adam amsgrad": lambda p: O.Adam(p, amsgrad=True),
    "Adam foreach": lambda p: O.Adam(p, foreach=True),
    "AdamW": O.AdamW,
    "AdamW fused": lambda p: O.AdamW(p, fused=True),
    "NAdam": O.NAdam,
    "RAdam": O.RAdam,
    "Adamax": O.Adamax,
    "Adagrad": O.Adagrad,
    "Adadelta": O.Adadelta,
    "RMSprop": O.RMSprop,
    "RMSprop centered": lambda p: O.RMSprop(p, momentum=0.9, centered=True),
    "Rprop": O.Rprop,
    "ASGD": lambda p: O.ASGD(p, t0=1),
    "Adafactor": O.Adafactor,
}

OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Lion": ("lion_pytorch", "Lion", {}),
    "AdamW schedule-free": ("schedulefree", "AdamWScheduleFree", {}),
    "SGD schedule-free": ("schedulefree", "SGDScheduleFree", {"lr": 0.1}),
    "RAdam schedule-free": ("schedulefree", "RAdamScheduleFree", {}),
    "Prodigy": ("prodigyopt", "Prodigy", {}),
    "bitsandbytes AdamW": ("bitsandbytes.optim", "AdamW32bit", {}),
    "bitsandbytes Lion": ("bitsandbytes.optim", "Lion32bit", {}),
    "AdaBelief": ("pytorch_optimizer", "AdaBelief", {}),
    "Adan": ("pytorch_optimizer", "Adan", {}),
    "AdEMAMix": ("pytorch_optimizer", "AdEMAMix", {}),
    "AdaFactor": ("pytorch_optimizer", "AdaFactor", {}),
    "CAME": ("pytorch_optimizer", "CAME", {}),
    "Lamb": ("pytorch_optimizer", "Lamb", {}),
    "Ranger": ("pytorch_optimizer", "Ranger", {}),
    "SOAP": ("pytorch_optimizer", "SOAP", {}),
    "StableAdamW": ("pytorch_optimizer", "StableAdamW", {}),
}


def net() -> Residual:
    """A net with a stem whose width grows, and blocks."""
    return Residual(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 8)))


X = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))


def trained(make: Make, steps: int = 3) -> tuple[Residual, Optimizer]:
    torch.manual_seed(0)
    model = net()
    optimizer = make(model.parameters())
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: Optimizer) -> None:
    if hasattr(optimizer, "train"):
        optimizer.train()
    optimizer.zero_grad()
    model(X).square().mean().backward()
    optimizer.step()


def follows(make: Make) -> None:
    """The state follows a width, a block of zeros and a copied block."""
    model, optimizer = trained(make)
    before = model(X).detach()
    weight = model.stem[0].weight
    state = optimizer.state.get(weight, {})
    old = {key: v.clone() for key, v in state.items() if isinstance(v, Tensor)}
    names = {id(p): name for name, p in model.named_parameters()}
    ms.grow_(model, {"stem.0": 3, "blocks.0.up": 2}, X, optimizer=optimizer)
    assert torch.allclose(model(X), before, atol=1e-5)
    # The objects stay, and what was known of the old units with them.
    assert all(names[id(p)] == name for name, p in model.named_parameters())
    for key, value in old.items():
        now = optimizer.state[weight].get(key)
        if now is None or value.dim() < 2:
            continue
        rows = min(value.shape[0], 6)
        assert torch.equal(now[:rows], value[:rows]), key
        assert value.shape[0] == 1 or now.shape[0] == 9
    step(model, optimizer)
    ms.grow_(model, {"blocks": 1}, X, optimizer=optimizer)
    step(model, optimizer)
    ms.grow_(model, {"blocks": 1}, X, optimizer=optimizer, how=ms.how.Stack())
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in held] == [id(p) for p in model.parameters()]
    for _ in range(3):
        step(model, optimizer)
    assert torch.isfinite(model(X)).all()


@pytest.mark.parametrize("name", TORCHS)
def test_torchs_own(name: str) -> None:
    follows(TORCHS[name])


@pytest.mark.parametrize("name", OTHERS)
def test_those_of_packages(name: str) -> None:
    package, kind, options = OTHERS[name]
    module = pytest.importorskip(package)
    follows(lambda p: getattr(module, kind)(p, **options))


def test_muon_beside_adamw() -> None:
    torch.manual_seed(0)
    model = net()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizers = [O.Muon(matrices, lr=0.01), O.AdamW(vectors)]
    for wish in ({"stem.0": 3}, {"blocks": 1}):
        for optimizer in optimizers:
            step(model, optimizer)
        ms.grow_(model, wish, X, optimizer=optimizers)
    for optimizer in optimizers:
        step(model, optimizer)
    for p in matrices:
        assert optimizers[0].state[p]["momentum_buffer"].shape == p.shape


def test_sparse_adam() -> None:
    model = nn.Sequential(nn.EmbeddingBag(10, 4, sparse=True), nn.Linear(4, 2))
    optimizers = [O.SparseAdam([model[0].weight]), O.SGD([*model[1].parameters()])]
    tokens = torch.tensor([[1, 2], [3, 4]])

    def one() -> None:
        model(tokens).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    one()
    ms.grow_(model, {"0": 3}, tokens, optimizer=optimizers)
    assert optimizers[0].state[model[0].weight]["exp_avg"].shape == (10, 7)
    one()


@pytest.mark.parametrize("begun", [False, True])
def test_one_vector_over_all_parameters_is_refused_at_once(begun: bool) -> None:
    model, optimizer = trained(O.LBFGS, steps=0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(X).square().mean()
        loss.backward()
        return loss

    if begun:
        optimizer.step(closure)
    for wish in ({"stem.0": 3}, {"blocks": 1}):
        with pytest.raises(ms.OptimizerError, match="one vector over all"):
            ms.grow_(model, wish, X, optimizer=optimizer)
    assert model.stem[0].out_features == 6


def test_weights_in_a_state_grow_with_the_weight() -> None:
    """ASGD's mean of the weights is a net of its own: it computes what it did."""
    model, optimizer = trained(lambda p: O.ASGD(p, t0=1), steps=6)
    averaged = net()

    def mean() -> Tensor:
        for name, parameter in model.named_parameters():
            inner = averaged.get_parameter(name)
            inner.data = optimizer.state[parameter]["ax"].clone()
        with torch.no_grad():
            out: Tensor = averaged(X)
        return out

    before = mean()
    ms.grow_(model, {"stem.0": 3, "blocks.0.up": 2}, X, optimizer=optimizer)
    assert torch.allclose(mean(), before, atol=1e-5)


@pytest.mark.parametrize(
    ("wish", "how", "care"),
    [
        ({"blocks": 1}, ms.how.Interpose(share=True), []),
        ({"blocks": 1, "blocks.0.up": 2}, ms.how.Interpose(share=True), []),
        ({"stem.0": 3}, ms.how.Random(), [ms.care.Shrink()]),
        ({"blocks": 1}, ms.how.Stack(), [ms.care.Shrink()]),
        (
            {"stem.0": 3, "blocks.0.up": 2},
            ms.how.Net2Net(),
            [ms.care.VarianceTransfer(), ms.care.Shrink()],
        ),
    ],
)
def test_weights_in_a_state_are_rescaled_with_the_weight(
    wish: dict[str, int], how: Any, care: list[Any]
) -> None:
    model, optimizer = trained(lambda p: O.ASGD(p, t0=1), steps=6)
    for parameter, state in optimizer.state.items():
        state["ax"] = parameter.detach().clone()
    before = {p: p.detach().clone() for p in model.parameters()}
    hows = [how] if "blocks" not in wish else [how, ms.how.Net2Net()]
    ms.grow_(model, wish, X, optimizer=optimizer, how=hows, care=care)
    alike = [p for p, old in before.items() if p.shape == old.shape]
    assert not all(torch.equal(p, before[p]) for p in alike)
    for parameter, state in optimizer.state.items():
        torch.testing.assert_close(state["ax"], parameter.detach())


class Listed(Optimizer):
    """State in a list: a preconditioner by rows and columns."""

    def __init__(self, parameters: Iterable[Any]) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("m", torch.zeros_like(p))
                state.setdefault("pre", [torch.zeros(n) for n in p.shape])
                state["m"].add_(p.grad)
                state["pre"][0].add_(p.grad.reshape(p.shape[0], -1).sum(1))
                p.sub_(1e-3 * state["m"])


def test_state_in_lists_is_neither_shared_nor_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(ms.STATE_RULES, Listed, {"m": "first"})
    model, optimizer = trained(Listed)
    with pytest.raises(ms.OptimizerError, match="'pre': 'reset'"):
        ms.grow_(model, {"stem.0": 3}, X, optimizer=optimizer)
    assert model.stem[0].out_features == 6
    ms.grow_(model, {"blocks": 1}, X, optimizer=optimizer, how=ms.how.Stack())
    first, copy = (optimizer.state[b.up.weight]["pre"] for b in model.blocks[1:])
    assert first is not copy
    assert first[0].data_ptr() != copy[0].data_ptr()
    monkeypatch.setitem(ms.STATE_RULES, Listed, {"m": "first", "pre": "reset"})
    ms.grow_(model, {"stem.0": 3}, X, optimizer=optimizer)
    # Half a state would be taken for a whole one.
    assert optimizer.state[model.stem[0].weight] == {}
    step(model, optimizer)


def test_quantised_state_is_refused_with_the_reason() -> None:
    model, optimizer = trained(lambda p: O.AdamW(p, lr=1e-3))
    for state in optimizer.state.values():
        state["exp_avg"] = state["exp_avg"].to(torch.uint8)
    with pytest.raises(ms.OptimizerError, match="quantised"):
        ms.grow_(model, {"stem.0": 3}, X, optimizer=optimizer)


def test_the_hint_proposes_the_right_row() -> None:
    class Odd(O.Optimizer):
        def __init__(self, parameters: Iterable[Any]) -> None:
            super().__init__(parameters, {})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for p in self.param_groups[0]["params"]:
                self.state[p].setdefault("exp_avg_sq", torch.zeros_like(p))

    model, optimizer = trained(Odd)
    with pytest.raises(ms.OptimizerError, match="'exp_avg_sq': 'second'"):
        ms.grow_(model, {"stem.0": 3}, X, optimizer=optimizer)


def test_moments_keep_their_memory_format() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    model = model.to(memory_format=torch.channels_last)
    optimizer = O.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    model(x).square().mean().backward()
    optimizer.step()
    ms.grow_(model, {"0": 4}, x, optimizer=optimizer)
    for layer in (model[0], model[2]):
        moment = optimizer.state[layer.weight]["momentum_buffer"]
        assert moment.stride() == layer.weight.stride()
