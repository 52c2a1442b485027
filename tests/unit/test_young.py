"""Training only what is new."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import meristem as ms

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_old_entries_keep_their_bits_whatever_the_optimizer_does(name: str) -> None:
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    for _ in range(2):  # momentum of the old entries
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    growth = ms.grow_(model, {"0": 3, "2": 2}, X, optimizer=optimizer)
    masks = ms.young(growth)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    handle = ms.freeze_old_(model, masks, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    for key, parameter in model.named_parameters():
        old = ~masks.get(key, torch.zeros_like(parameter, dtype=torch.bool))
        assert torch.equal(parameter[old], before[key][old]), key
    moved = [
        key for key, p in model.named_parameters() if not torch.equal(p, before[key])
    ]
    assert "0.weight" in moved
    handle.remove()
    optimizer.zero_grad()
    model(X).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model[3].bias, before["3.bias"])


def test_gradients_that_are_left_move_nothing_old() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model(X).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    growth = ms.grow_(model, {"0": 3}, X, optimizer=optimizer)
    ms.freeze_old_(model, ms.young(growth), optimizer)
    before = model[3].weight.detach().clone()
    optimizer.step()
    assert torch.equal(model[3].weight, before)


def test_a_block_after_a_frozen_one_is_trained() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    for place in (3, 1):
        growth = ms.expand_(model, "depth=+1", torch.randn(2, 3, 8), at=[place])
        ms.freeze_old_(model, ms.young(growth))
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == set(ms.new_parameters(growth))


def test_a_growth_beside_a_freeze_is_told_of() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    growth = ms.grow_(model, {"0": 3}, X, optimizer=optimizer)
    ms.freeze_old_(model, ms.young(growth), optimizer)
    ms.grow_(model, {"0": 1}, X, optimizer=optimizer)
    with pytest.raises(ms.GrowthRefused, match="has grown since its old entries"):
        model(X).square().mean().backward()


def test_masks_are_saved_and_used_in_a_later_run(tmp_path: Path) -> None:
    model = net()
    growth = ms.grow_(model, {"0": 3}, X)
    torch.save({"masks": ms.young(growth)}, tmp_path / "masks.pt")
    ms.save(tmp_path / "run", model)
    again = ms.load(tmp_path / "run", net())
    masks = torch.load(tmp_path / "masks.pt")["masks"]
    optimizer = torch.optim.AdamW(again.parameters())
    ms.freeze_old_(again, masks, optimizer)
    trained = [name for name, p in again.named_parameters() if p.requires_grad]
    assert trained == ["0.weight", "0.bias", "2.weight"]


def test_masks_follow_blocks_that_move() -> None:
    """Widths and blocks of one growth: the blocks behind a new one have other names."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    growth = ms.expand_(model, "depth=+1,mlp=+4", torch.randn(2, 3, 8), at=[1])
    assert growth.blocks == {"layers": [1]}
    masks = ms.young(growth)
    for place in range(4):
        mask = masks[f"layers.{place}.linear1.weight"]
        assert mask.sum() == (mask.numel() if place == 1 else 4 * 8)
    assert set(ms.new_parameters(growth)) == {
        name for name in dict(model.named_parameters()) if name.startswith("layers.1.")
    }


def test_wrong_masks_are_refused() -> None:
    model = net()
    growth = ms.grow_(model, {"0": 3}, X)
    with pytest.raises(ms.GrowthRefused, match="pass optimizer="):
        ms.freeze_old_(model, ms.young(growth))
    with pytest.raises(ms.GrowthRefused, match="belongs to no parameter of its shape"):
        ms.freeze_old_(net(), ms.young(growth), torch.optim.SGD(model.parameters()))
    assert all(p.requires_grad for p in model.parameters())
