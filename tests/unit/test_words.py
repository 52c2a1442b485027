"""Words of all layers name axes wherever axes are named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import meristem as ms

MLP = [f"layers.{i}.linear1" for i in range(3)]


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


X = torch.randn(2, 5, 8)


def grower(net: nn.Module, **options: object) -> ms.Grower:
    return ms.Grower(
        net,
        torch.optim.SGD(net.parameters(), lr=0.1),
        loss=lambda net, x: net(x).square().mean(),
        data=[X],
        when=ms.when.Every(steps=1),
        **{"how": ms.how.Random()} | options,  # type: ignore[arg-type]
    )


def test_a_word_chooses_and_excludes_axes() -> None:
    net = encoder()
    assert list(ms.find_axes(net, X, axes="mlp")) == MLP
    assert list(ms.find_axes(net, X, axes=["mlp", "layers"])) == [*MLP, "layers"]
    assert not set(ms.find_axes(net, X, axes="!mlp")) & set(MLP)


def test_a_word_names_what_grows() -> None:
    assert ms.plan(encoder(), {"mlp": 4}, X).after == dict.fromkeys(MLP, 20)
    assert ms.grow_(encoder(), {"mlp": 4, "depth": 1}, X).after == {
        **dict.fromkeys(MLP, 20),
        "layers": 4,
    }


def test_a_grower_takes_words_for_axes_amounts_and_sizes() -> None:
    sizes = ms.Budget(sizes={"mlp": 20})
    growth = grower(encoder(), axes="mlp", amount=60, budget=sizes).step(1.0)
    assert growth is not None
    assert growth.after == dict.fromkeys(MLP, 20)
    growth = grower(encoder(), amount={"mlp": 4, "layers": 1}).step(1.0)
    assert growth is not None
    assert growth.after == {**dict.fromkeys(MLP, 20), "layers": 4}


def test_sizes_hold_for_short_names_too() -> None:
    net = nn.ModuleDict({"inner": encoder()})
    net.forward = lambda x: net["inner"](x)  # type: ignore[method-assign]
    limit = ms.Budget(sizes={"layers": 3})
    assert grower(net, amount={"layers": 1}, budget=limit).step(1.0) is None


def test_a_word_that_means_nothing_here() -> None:
    with pytest.raises(ms.GrowthRefused, match="no kv_heads to grow"):
        grower(encoder(), axes="kv_heads")


def test_an_axis_of_that_name_comes_first() -> None:
    net = nn.Sequential()
    net.add_module("mlp", nn.Linear(4, 8))
    net.add_module("out", nn.Linear(8, 2))
    assert ms.grow_(net, {"mlp": 2}, torch.randn(3, 4)).after == {"mlp": 10}


def test_what_cannot_grow_may_be_excluded_limited_and_narrowed() -> None:
    net = encoder()
    chosen = grower(net, axes=["*", "!depth"])
    assert chosen.step(1.0)
    assert grower(net, axes=["*", "!heads"], amount=3).step(1.0)
    limited = grower(net, how=ms.how.GradMax(), budget=ms.Budget(sizes={"depth": 6}))
    assert limited.step(1.0)
    assert not set(ms.find_axes(net, X, axes="!kv_heads")) & {"kv_heads"}


def test_a_word_is_read_with_the_method_that_is_named() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    assert ms.grow_(net, {"depth": 1}, X, how=ms.how.Stack()).after == {"layers": 3}
    assert ms.narrow_(net, {"depth": 1}, X).after == {"layers": 2}


def test_an_axis_that_is_named_wins_over_a_word() -> None:
    after = ms.plan(encoder(), {"layers.0.linear1": 8, "mlp": 4}, X).after
    assert after == {**dict.fromkeys(MLP, 20), "layers.0.linear1": 24}


def test_classes_grow_in_a_grower_where_they_are_named() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    growth = grower(net, amount={"classes": 1}).step(1.0)
    assert growth is not None
    assert growth.after == {"2": 3}
