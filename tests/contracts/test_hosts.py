"""Wrapped models grow: the wrapper stays the same object, and fits afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import replicas
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import meristem as ms

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def step(model: nn.Module, optimizer: Any) -> None:
    model(X).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_compiled(tmp_path: Path) -> None:
    inside = net()
    model = torch.compile(inside, backend="eager")
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    before = model(X).detach()
    assert list(ms.find_axes(model, X)) == list(ms.find_axes(inside, X))
    ms.grow_(model, {"0": 2}, X, optimizer=optimizer)
    assert torch.allclose(model(X), before, atol=1e-6)
    step(model, optimizer)
    ms.narrow_(model, {"0": 1}, X, optimizer=optimizer)
    step(model, optimizer)
    # The checkpoint is one of the model inside.
    ms.save(tmp_path, model, optimizer=optimizer)
    again = torch.compile(net(), backend="eager")
    other = torch.optim.AdamW(again.parameters())
    assert ms.load(tmp_path, again, optimizer=other) is again
    assert torch.equal(again(X), model(X))
    assert ms.lineage(again) == ms.lineage(model)


def test_data_parallel() -> None:
    model = nn.DataParallel(net())
    ms.grow_(model, {"0": 2}, X)
    assert model.module[0].out_features == 10
    assert model(X).shape == (4, 3)


@pytest.mark.usefixtures("alone")
def test_distributed_data_parallel_stays_the_same_object(tmp_path: Path) -> None:
    inside = net()
    model = DistributedDataParallel(inside, find_unused_parameters=True)
    seen: list[Any] = []
    model.register_forward_hook(lambda *_: seen.append(1))
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    before = model(X).detach()
    ms.grow_(model, {"0": 2}, X, optimizer=optimizer)
    assert torch.allclose(model(X), before, atol=1e-6)
    seen.clear()
    step(model, optimizer)
    assert seen
    assert model.find_unused_parameters
    assert model.module is inside
    # A refusal leaves a wrapper that works, too.
    with pytest.raises(ms.UnknownAxis):
        ms.grow_(model, {"7": 2}, X, optimizer=optimizer)
    step(model, optimizer)
    ms.save(tmp_path, model, optimizer=optimizer)
    assert torch.equal(ms.load(tmp_path, net())(X), model(X))


@pytest.mark.usefixtures("alone")
def test_the_model_inside_a_living_wrapper_may_be_named() -> None:
    """Trainers hand out the model inside."""
    inside = net()
    model = DistributedDataParallel(inside)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, optimizer)
    ms.grow_(inside, {"0": 2}, X, optimizer=optimizer)
    step(model, optimizer)
    assert inside[0].out_features == 10


@pytest.mark.usefixtures("alone")
def test_sharded_parameters_are_refused() -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    model = fully_shard(net(), mesh=mesh)
    with pytest.raises(ms.GrowthRefused, match="sharded"):
        ms.grow_(model, {"0": 2}, X)


class Engine(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.module(x)
        return out


def test_a_wrapper_that_keeps_flat_copies_is_refused() -> None:
    kind = type("DeepSpeedEngine", (Engine,), {})
    with pytest.raises(ms.GrowthRefused, match="DeepSpeedEngine, which keeps flat"):
        ms.grow_(kind(net()), {"module.0": 2}, X)


def test_a_layer_of_keras_is_refused() -> None:
    layer = type("TorchLayer", (nn.Module,), {})
    dense = type("Dense", (layer, nn.Linear), {})
    model = nn.Sequential(nn.Linear(4, 4), dense(4, 4))
    with pytest.raises(
        ms.GrowthRefused, match="1 is a layer of Keras, whose variables"
    ):
        ms.find_axes(model, torch.randn(2, 4))


def test_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerate = pytest.importorskip("accelerate")
    # Accelerate keeps the precision of the process: other tests have their own.
    for kind in (accelerate.state.AcceleratorState, accelerate.state.PartialState):
        monkeypatch.setattr(kind, "_shared_state", {})
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model, optimizer = accelerator.prepare(net(), torch.optim.AdamW(net().parameters()))
    optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters()))
    accelerator.backward(model(X).square().mean())
    optimizer.step()
    optimizer.zero_grad()
    before = model(X).detach()
    ms.grow_(model, {"0": 2}, X, optimizer=optimizer)
    assert torch.allclose(model(X), before, atol=2e-2)
    accelerator.backward(model(X).square().mean())
    optimizer.step()


def told_by_two(hows: list[str]) -> dict[int, Any]:
    results = mp.Manager().dict()
    port = random.randint(20000, 40000)
    mp.spawn(replicas.work, (2, port, hows, results), nprocs=2)
    return dict(results)


def check_replicas(told: dict[int, Any], hows: list[str]) -> None:
    for how in hows:
        first, second = told[0][how], told[1][how]
        assert first["after"] == second["after"], how
        assert all(first["same"] + second["same"]), how
    # One that fails tells the others, and no model has changed.
    assert told[1]["fails"] == "OSError: the disk is gone"
    assert told[0]["fails"].startswith("RankFailed: rank 1 failed (OSError")
    assert told[1]["memory"] == "MemoryError: no room"
    assert told[0]["memory"].startswith("RankFailed: rank 1 failed (MemoryError")
    assert told[1]["damage"].startswith("CheckpointError: ")
    assert told[0]["damage"].startswith("RankFailed: rank 1 failed (CheckpointError")
    # Two ranks are one with the doubled batch.
    assert told[0]["double"] < 1e-6


def test_replicas_grow_alike_whatever_their_data_seeds_and_clocks() -> None:
    hows = ["gradmax", "svod"]
    told = told_by_two(hows)
    check_replicas(told, hows)
    assert told[0]["gradmax"]["after"]


@pytest.mark.slow
def test_replicas_grow_alike_by_every_method() -> None:
    hows = list(replicas.HOWS)
    check_replicas(told_by_two(hows), hows)


@pytest.mark.usefixtures("alone")
def test_a_grower_prunes_inside_a_wrapper() -> None:
    model = DistributedDataParallel(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = [(X, torch.tensor([0, 1, 2, 0]))] * 3
    grower = ms.Grower(
        model,
        optimizer,
        loss=replicas.loss,
        data=data,
        when=ms.when.Every(steps=1),
        how=ms.how.Random(),
        amount={"0": 4},
    )
    grower.step()
    grower.prune(tolerance=10.0)
    assert model.module[0].out_features < 12
    step(model, optimizer)


@pytest.mark.usefixtures("alone")
def test_a_wrapper_that_cannot_be_made_again_is_refused() -> None:
    inside = net()
    model = DistributedDataParallel(inside)
    inside.requires_grad_(False)
    with pytest.raises(ms.GrowthRefused, match="nothing to train"):
        ms.grow_(model, {"0": 2}, X)
    inside.requires_grad_(True)
    model(X).sum().backward()
