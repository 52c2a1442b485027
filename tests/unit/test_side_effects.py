"""Forwards with side effects, shared names, and orders: what a growth must not disturb."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meristem as ms
from meristem import methods


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(self.norm(x))))


class CappedEmbedding(nn.Module):
    """`max_norm` rescales rows of the weight in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8, max_norm=0.5)
        self.hidden = nn.Linear(8, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(self.embedding(words))))


class AlwaysTraining(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.running_mean, self.running_var
        return F.batch_norm(x, mean, variance, self.weight, self.bias, True)


class Optioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.options = {"act": "relu"}
        self.hidden = nn.Linear(8, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        if self.options["act"] == "relu":
            return self.head(F.relu(h))
        return self.head(F.softmax(h, -1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.same = self.first
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.first(x)) + F.relu(self.same(x)))


def stacked() -> nn.Sequential:
    """A run of blocks and a chain, both in the root."""
    chain = (nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
    return nn.Sequential(Residual(), Residual(), *chain, nn.Linear(16, 3))


def test_blocks_go_into_two_places_of_one_container() -> None:
    x = torch.randn(16, 8)
    model = stacked()
    y = model(x)
    ms.grow_(model, {"0:depth": 2, "4:depth": 1}, x)
    torch.testing.assert_close(model(x), y)
    assert [type(m) for m in model[:4]] == [Residual] * 4
    assert isinstance(model[6], nn.Sequential)


def test_a_forward_that_writes_its_weights_leaves_them() -> None:
    words = torch.randint(0, 20, (64,))
    model = CappedEmbedding()
    before = copy.deepcopy(model.state_dict())
    ms.find_axes(model, words)
    ms.grow_(model, {"hidden": 8}, words)
    assert torch.equal(
        model.state_dict()["embedding.weight"], before["embedding.weight"]
    )


def test_a_forward_that_writes_its_buffers_leaves_them() -> None:
    x = torch.randn(16, 8)
    model = nn.Sequential(
        nn.Linear(8, 16), AlwaysTraining(16), nn.ReLU(), nn.Linear(16, 3)
    )
    model[1].running_mean.uniform_()
    before = model[1].running_mean.clone()
    ms.grow_(model, {"0": 8}, x)
    assert torch.equal(model[1].running_mean[:16], before)


def test_an_option_in_a_dict_is_seen() -> None:
    x = torch.randn(16, 8)
    model = Optioned()
    assert "hidden" in ms.find_axes(model, x)
    model.options["act"] = "softmax"
    assert "hidden" not in ms.find_axes(model, x)


def test_the_names_of_a_shared_module_are_all_converted() -> None:
    x = torch.randn(16, 8)
    model = Tied()
    before = copy.deepcopy(model.state_dict())
    ms.grow_(model, {"first": 4}, x)
    converted = ms.convert(before, ms.lineage(model))
    assert {k: v.shape for k, v in converted.items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_a_state_with_foreign_names_is_refused(prefix: str) -> None:
    x = torch.randn(16, 8)
    model = Optioned()
    before = {prefix + k: v.clone() for k, v in model.state_dict().items()}
    ms.grow_(model, {"hidden": 4}, x)
    with pytest.raises(ms.CheckpointError):
        ms.convert(before, ms.lineage(model))


def test_a_state_is_not_converted_twice() -> None:
    x = torch.randn(16, 8)
    model = Optioned()
    ms.grow_(model, {"hidden": 4}, x)
    with pytest.raises(ms.CheckpointError):
        ms.convert(copy.deepcopy(model.state_dict()), ms.lineage(model))


def test_new_parameters_stand_in_model_order() -> None:
    """So the state of an optimizer fits a net that is built at its grown size."""
    x = torch.randn(16, 8)
    model = stacked()
    optimizer = torch.optim.AdamW(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    ms.grow_(model, {"0:depth": 1}, x, optimizer=optimizer)
    held = [id(p) for p in optimizer.param_groups[0]["params"]]
    assert held == [id(p) for p in model.parameters()]


def test_a_hook_that_fails_leaves_the_model() -> None:
    def failing(*_: Any) -> None:
        raise RuntimeError("this hook fails")

    x = torch.randn(16, 8)
    model = Optioned()
    shape = model.hidden.weight.shape
    model.register_state_dict_post_hook(failing)
    # The hook is the user's: whether the growth goes on or not, nothing is half done.
    try:
        ms.grow_(model, {"hidden": 4}, x)
    except RuntimeError:
        assert model.hidden.weight.shape == shape
    else:
        assert model.hidden.weight.shape[0] == model.head.weight.shape[1] == 20


def depth_grown() -> tuple[dict[str, Tensor], nn.Module]:
    x = torch.randn(16, 8)
    model = nn.Sequential(Residual(), Residual(), nn.Linear(8, 3))
    before = copy.deepcopy(model.state_dict())
    y = model(x)
    ms.grow_(model, {"0:depth": 2}, x)
    converted = ms.convert(before, ms.lineage(model))
    twin = copy.deepcopy(model)
    twin.load_state_dict(converted)
    torch.testing.assert_close(twin(x), y)
    return before, model


def test_a_state_of_another_depth_is_refused() -> None:
    before, model = depth_grown()
    with pytest.raises(ms.CheckpointError):
        ms.convert(model.state_dict(), ms.lineage(model))
    with pytest.raises(ms.CheckpointError):
        ms.convert(before, ms.lineage(model), back=True)


class Spoiling:
    """A care that scales old weights by what is no number."""

    batches = 0

    def treat(self, model: nn.Module, plan: Any, axes: Any) -> methods.Treatment:
        place = axes[0].slots[0].place
        scaling = methods.Scaling(places={place: float("nan")})
        return methods.Treatment(scaling)


def test_values_that_are_not_finite_are_refused() -> None:
    x = torch.randn(16, 8)
    model = Optioned()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ms.GrowthRefused, match="not finite"):
        ms.grow_(model, {"hidden": 4}, x, care=[Spoiling()])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
