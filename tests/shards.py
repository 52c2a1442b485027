"""What the processes of `test_fsdp` run: sharded replicas that grow."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from replicas import batches, loss, net
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP

import meristem as ms
from meristem.integrations.fsdp import grow_sharded


def build() -> nn.Module:
    torch.manual_seed(0)
    return net()


def shard(model: nn.Module) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def optimize(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def train(model: nn.Module, optimizer: Any, data: list[Any]) -> None:
    # Without what differs between shards and replicas: batch norm's own statistics.
    model.eval()
    for batch in data:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()


def first(model: nn.Module, optimizer: Any, data: list[Any]) -> None:
    ms.grow_(
        model, {"stem.0": 4, "blocks.0.up": 2}, data[0][0], ms.how.GradMax(), loss=loss,
        data=data, optimizer=optimizer, generator=torch.Generator().manual_seed(1),
    )  # fmt: skip


def second(model: nn.Module, optimizer: Any, data: list[Any]) -> None:
    ms.grow_(
        model, {"blocks": 1}, data[0][0], ms.how.ZeroBlock(), optimizer=optimizer,
        generator=torch.Generator().manual_seed(2),
    )  # fmt: skip


# With the steps that follow: blocks that have not been trained have no moments.
GROWTHS = [(first, 2), (second, 0), (second, 2)]


def whole(model: nn.Module, optimizer: Any) -> Any:
    return get_state_dict(
        model, optimizer, options=StateDictOptions(full_state_dict=True)
    )


def difference(one: Any, other: Any) -> float:
    """The largest difference between the tensors of two state dicts."""
    (weights, state), (weights2, state2) = one, other
    assert weights.keys() == weights2.keys()
    assert state["state"].keys() == state2["state"].keys()
    pairs = [(weights[name], weights2[name]) for name in weights]
    for name, kept in state["state"].items():
        pairs += [(value, state2["state"][name][key]) for key, value in kept.items()]
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


def work(rank: int, world: int, port: int, results: Any) -> None:
    """Train, grow, train, deepen and train: sharded, and as replicas under DDP."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    data = batches(rank)

    sharded = build()
    shard(sharded)
    optimizer = optimize(sharded.parameters())
    train(sharded, optimizer, data[:2])
    changes = []
    for grow, steps in GROWTHS:
        before = sharded(data[0][0]).detach()
        sharded, optimizer = grow_sharded(
            sharded,
            optimizer,
            lambda model, grown_by, grow=grow: grow(model, grown_by, data),
            build=build,
            shard=shard,
            optimize=optimize,
        )
        sharded.eval()
        changes.append((sharded(data[0][0]) - before).abs().max().item())
        train(sharded, optimizer, data[:steps])

    replica = DDP(build())
    beside = optimize(replica.parameters())
    train(replica, beside, data[:2])
    for grow, steps in GROWTHS:
        grow(replica, beside, data)
        train(replica, beside, data[:steps])

    results[rank] = {
        "changes": changes,
        "sharded": all(isinstance(p, DTensor) for p in sharded.parameters()),
        "sizes": [sharded.stem[0].weight.shape[0], len(sharded.blocks)],
        "difference": difference(
            whole(sharded, optimizer), whole(replica.module, beside)
        ),
    }
    dist.barrier()
    # A thread of gloo's that outlives Python aborts, now and then, any program.
    os._exit(0)
