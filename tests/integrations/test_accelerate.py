"""Growth in loops on Accelerate: save_state and load_state carry it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import meristem as ms

accelerate = pytest.importorskip("accelerate")

from meristem.integrations.accelerate import register_growth  # noqa: E402


def prepared() -> tuple[Any, Any, Any, Any]:
    torch.manual_seed(0)
    accelerator = accelerate.Accelerator(cpu=True)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters()))
    data = [torch.randn(8, 4) for _ in range(4)]
    grower = ms.Grower(
        model,
        optimizer,
        loss=lambda m, x: m(x).square().mean(),
        data=data,
        when=ms.when.Every(steps=2),
        how=ms.how.GradMax(),
        amount={"0": 2},
    )
    register_growth(accelerator, grower)
    return accelerator, model, optimizer, grower


def step(accelerator: Any, model: Any, optimizer: Any, grower: Any) -> None:
    x = torch.ones(3, 4)
    accelerator.backward(model(x).square().mean())
    optimizer.step()
    optimizer.zero_grad()
    grower.step()


def test_states_of_a_grown_run_are_loaded_into_a_fresh_one(tmp_path: Path) -> None:
    run = prepared()
    for _ in range(5):
        step(*run)
    run[0].save_state(str(tmp_path))
    again = prepared()
    again[0].load_state(str(tmp_path))
    assert again[1][0].out_features == 12
    for _ in range(3):
        step(*run)
        step(*again)
    assert again[1][0].out_features == 16
    for first, second in zip(run[1].parameters(), again[1].parameters(), strict=True):
        assert torch.equal(first, second)
