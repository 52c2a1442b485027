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
        how=ms.how.Random(),
        **options,  # type: ignore[arg-type]
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
