"""Ranks of peft's adapters grow, and peft loads and merges what they have become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meristem as ms

peft = pytest.importorskip("peft")
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))


def adapted(**options: Any) -> Any:
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["0", "2"], **options)
    model = peft.get_peft_model(base(), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


def train(model: Any, optimizer: Any) -> None:
    optimizer.zero_grad()
    model.train()(X).square().mean().backward()
    optimizer.step()
    model.eval()


def check_written(model: Any, folder: Path) -> None:
    """What peft loads, and what it merges, is the model."""
    given: Tensor = model(X)
    model.save_pretrained(folder)
    loaded = peft.PeftModel.from_pretrained(base(), folder).eval()
    assert torch.allclose(loaded(X), given, atol=1e-6)
    assert torch.allclose(model.merge_and_unload()(X), given, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_all_ranks_grow_in_training(options: Any, tmp_path: Path) -> None:
    model = adapted(**options)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    train(model, optimizer)
    before = model(X).detach()
    growth = ms.expand_(model, "lora_rank=+3", X, optimizer=optimizer)
    assert set(growth.added.values()) == {3}
    assert torch.allclose(model(X), before, atol=1e-6)
    assert model.peft_config["default"].r == 5
    train(model, optimizer)
    check_written(model, tmp_path)


def test_ranks_by_module_stand_in_the_adapters_config(tmp_path: Path) -> None:
    model = adapted()
    ms.grow_(model, {"base_model.model.2.lora_A.default": 4}, X)
    config = model.peft_config["default"]
    ranks = {config.r, *config.rank_pattern.values()}
    assert ranks == {2, 6}
    check_written(model, tmp_path)


def test_ranks_grow_where_the_gain_is_largest() -> None:
    model = adapted()
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    grower = ms.Grower(
        model,
        optimizer,
        loss=lambda net, batch: net(batch).square().mean(),
        data=[X],
        when=ms.when.Every(steps=1),
        where=ms.where.ByGain(),
        how=ms.how.GradMax(),
        axes="*lora_A*",
        amount=2,
    )
    train(model, optimizer)
    growth = grower.step()
    assert growth
    assert all("lora_A" in name for name in growth.added)
    ranks = [model.base_model.model[i].r["default"] for i in (0, 2)]
    assert sum(ranks) == 2 + 2 + 2
