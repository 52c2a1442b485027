"""What a growth costs on two ranks, beside one process with the doubled batch, and what is sent.

    python benchmarks/cost/ranks.py              # a minute; writes results/ranks.json
    python benchmarks/cost/ranks.py --ranks 8    # five minutes on two cores, where only
                                                 # the bytes mean something; ranks-8.json

CPU seconds of a rank, a median over growths of one run; the ratio compares methods on the same machine at the same time.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import meristem as ms

BATCH, GROWTHS = 256, 9
HOWS = {"random": ms.how.Random(), "GradMax": ms.how.GradMax(), "SWE": ms.how.SWE()}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(256, 128),
        nn.ReLU(),
        nn.Linear(128, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def batches(size: int, seed: int) -> list[Any]:
    drawn = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(16):
        x = torch.randn(size, 256, generator=drawn)
        made.append((x, torch.randint(0, 10, (size,), generator=drawn)))
    return made


def seconds(model: nn.Module, how: Any, data: list[Any]) -> tuple[float, int]:
    """CPU seconds of a growth, and bytes that this process gave to the others."""
    optimizer = torch.optim.AdamW(model.parameters())
    grower = ms.Grower(
        model, optimizer, loss=loss, data=data, when=ms.when.Every(steps=1), how=how,
        amount={"0": 8, "2": 8},
    )  # fmt: skip
    taken = []
    for number in range(GROWTHS + 1):
        loss(model, data[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
        begun, sent = time.process_time(), grower.ranks.sent
        grower.grow()
        if number:  # the first one discovers the model
            taken.append(time.process_time() - begun)
    return statistics.median(taken), grower.ranks.sent - sent


def work(rank: int, port: int, ranks: int, told: Any) -> None:
    torch.set_num_threads(1)
    # torch keeps what it has found out about every shape: the first to grow pays for it.
    for how in HOWS.values():
        seconds(net(), how, batches(BATCH, 0))
        seconds(net(), how, batches(BATCH * ranks, 0))
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks
    )
    for name, how in HOWS.items():
        parallel = seconds(DistributedDataParallel(net()), how, batches(BATCH, rank))
        told[name, "ranks", rank] = parallel
    dist.destroy_process_group()
    # The same, each for itself, while the other process is as busy.
    for name, how in HOWS.items():
        told[name, "alone", rank] = seconds(net(), how, batches(BATCH * ranks, 0))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=2)
    count = parser.parse_args().ranks
    told = mp.Manager().dict()
    mp.spawn(work, (random.randint(20000, 40000), count, told), nprocs=count)
    rows = []
    for name in HOWS:
        ranks, sent = told[name, "ranks", 0]
        alone, _ = told[name, "alone", 0]
        rows.append(
            {
                "method": name,
                "ranks_s": round(ranks, 4),
                "alone_s": round(alone, 4),
                "ratio": round(ranks / alone, 2),
                "sent_bytes": sent,
                "growth_batches_bytes": BATCH * (256 * 4 + 8),
            }
        )
        print(rows[-1])
    name = "ranks.json" if count == 2 else f"ranks-{count}.json"
    path = Path(__file__).parent / "results" / name
    path.write_text(
        json.dumps({"ranks": count, "batch": BATCH, "rows": rows}, indent=1)
    )


if __name__ == "__main__":
    main()
