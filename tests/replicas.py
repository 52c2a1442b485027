"""What the processes of `test_distributed` run: replicas that grow, compared afterwards."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from zoo import Residual

import meristem as ms
from meristem.event import steps


def net() -> Residual:
    """Widths, a batch norm whose statistics every process follows by itself, blocks."""
    return Residual(
        nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8))
    )


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def batches(rank: int, size: int = 8) -> list[Any]:
    drawn = torch.Generator().manual_seed(100 + rank)
    made = []
    for _ in range(6):
        x = torch.randn(size, 6, generator=drawn)
        made.append((x, torch.randint(0, 3, (size,), generator=drawn)))
    return made


HOWS = {
    "random": (lambda: ms.how.Random(), lambda: ms.where.Uniform()),
    "gradmax": (lambda: ms.how.GradMax(), lambda: ms.where.ByGain()),
    "tiny": (lambda: ms.how.TINY(), lambda: ms.where.ByGain()),
    "svod": (lambda: ms.how.SWE(), lambda: ms.where.SVoD()),
    "swe": (lambda: ms.how.SWE(), lambda: ms.where.Uniform()),
    "senn": (lambda: ms.how.SENN(), lambda: ms.where.SENN()),
    "stack": (lambda: ms.how.Stack(), lambda: ms.where.Uniform()),
}


def prints(model: nn.Module, optimizer: Any, grower: Any) -> list[Any]:
    """Everything that must be the same on all ranks, in bits."""
    found: list[Any] = []
    for name, value in model.state_dict().items():
        found.append((name, value.double().numpy().tobytes()))
    for group in optimizer.param_groups:
        for p in group["params"]:
            for key, value in optimizer.state.get(p, {}).items():
                found.append((key, torch.as_tensor(value).double().numpy().tobytes()))
    found.append(grower.settings.generator.get_state().numpy().tobytes())
    return found


def train(rank: int, how: str) -> dict[str, Any]:
    """A short run of one replica."""
    torch.manual_seed(0)
    model = DDP(net())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    method, where = HOWS[how]
    data = batches(rank)
    # Seeds, clocks and data differ.
    torch.manual_seed(rank)
    grower = ms.Grower(
        model,
        optimizer,
        loss=loss,
        data=data,
        when=ms.when.Every(steps=2 + rank),
        how=method(),
        where=where(),
        amount=2,
        axes="blocks" if how == "stack" else "*",
        generator=torch.Generator().manual_seed(rank),
    )
    same = []
    for batch in data:
        value = loss(model, batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if grower.step(value) is not None:
            told: list[Any] = [None, None]
            dist.all_gather_object(told, prints(model.module, optimizer, grower))
            same.append(told[0] == told[1])
    assert isinstance(model, DDP)
    return {
        "same": same,
        "after": [growth.after for growth in grower.history],
        "sent": grower.ranks.sent,
        "reason": grower.reason,
    }


def fails_alone(rank: int) -> str:
    """One rank cannot grow; the others are told, and nothing has changed."""
    torch.manual_seed(0)
    model = DDP(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = batches(rank)
    grower = ms.Grower(
        model, optimizer, loss=loss, data=data, when=ms.when.Every(steps=1),
        how=ms.how.GradMax(), amount=2,
    )  # fmt: skip
    if rank == 1:
        data[0] = (data[0][0] * float("nan"), data[0][1])
        data[:] = [data[0]] * len(data)
        grower.settings.data.data = _Broken()
    try:
        grower.grow()
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for p in net().parameters()
    )
    # The wrapper still reduces.
    loss(model, batches(rank)[0]).backward()
    optimizer.step()
    return said


def runs_out_of_memory(rank: int) -> str:
    """One rank fails while it carries out what all have agreed on."""
    torch.manual_seed(0)
    model = DDP(net())
    kept = steps.exchange

    def exchange(*args: Any, **kwargs: Any) -> None:
        if rank == 1:
            raise MemoryError("no room")
        kept(*args, **kwargs)

    steps.exchange = exchange
    try:
        ms.grow_(model, {"stem.0": 2}, torch.randn(4, 6))
        said = "grown"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    finally:
        steps.exchange = kept
    assert model.module.stem[0].out_features == 8
    loss(model, batches(rank)[0]).backward()
    return said


def reads_a_damaged_file(rank: int) -> str:
    """One rank's copy of a checkpoint is damaged: no model has changed."""
    torch.manual_seed(0)
    grown = net()
    ms.grow_(grown, {"stem.0": 2}, torch.randn(4, 6))
    torch.manual_seed(0)
    model = DDP(net())
    with tempfile.TemporaryDirectory() as folder:
        ms.save(folder, grown)
        if rank == 1:
            next(Path(folder).glob("*.safetensors")).write_bytes(b"nothing")
        try:
            ms.load(folder, model)
            said = "loaded"
        except ms.MeristemError as error:
            said = f"{type(error).__name__}: {error}"
    assert model.module.stem[0].out_features == 8
    loss(model, batches(rank)[0]).backward()
    return said


class _Broken:
    def __iter__(self) -> Any:
        raise OSError("the disk is gone")

    def __len__(self) -> int:
        return 6


def joined_equals_double(rank: int) -> float:
    """Two ranks against one with the doubled batch: how far the grown weights differ."""

    def grown(model: nn.Module, data: list[Any]) -> nn.Module:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ms.Grower(
            model, optimizer, loss=loss, data=data, when=ms.when.Every(steps=1),
            how=ms.how.GradMax(), amount={"stem.0": 3, "blocks.0.up": 2},
            generator=torch.Generator().manual_seed(5),
        ).grow()  # fmt: skip
        return model

    torch.manual_seed(0)
    two = grown(DDP(net()), batches(rank)).module
    torch.manual_seed(0)
    double = []
    for first, second in zip(batches(0), batches(1), strict=True):
        double.append(
            tuple(torch.cat(pair) for pair in zip(first, second, strict=True))
        )
    alone = net()
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    ms.grow_(
        alone, {"stem.0": 3, "blocks.0.up": 2}, double[0][0], ms.how.GradMax(),
        loss=loss, data=double, optimizer=optimizer,
        generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    worst = 0.0
    for (name, a), b in zip(
        two.state_dict().items(), alone.state_dict().values(), strict=True
    ):
        assert a.shape == b.shape, name
        worst = max(worst, (a.double() - b.double()).abs().max().item())
    return worst


def work(rank: int, world: int, port: int, hows: list[str], results: Any) -> None:
    """One process."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    told: dict[str, Any] = {how: train(rank, how) for how in hows}
    told["fails"] = fails_alone(rank)
    told["memory"] = runs_out_of_memory(rank)
    told["damage"] = reads_a_damaged_file(rank)
    told["double"] = joined_equals_double(rank)
    results[rank] = told
    dist.barrier()
    # A thread of gloo's that outlives Python aborts, now and then, any program.
    os._exit(0)
