"""What a growth, and an idle grower, cost: ratios of one run, in CPU seconds.

python benchmarks/cost/methods.py > benchmarks/cost/results/methods.json
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meristem as ms
from meristem.experiments.data import load

BATCH, POSITIONS, CHANNELS = 128, 32, 64
Batch = tuple[Tensor, Tensor]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def seconds(call: Callable[[], Any]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> Tensor:
    value = loss(model, batch)
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    return value.detach()


class Pair(nn.Module):
    """A pair of convolutions, with a norm between them or without."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.norm = nn.BatchNorm2d(CHANNELS) if norm else nn.Identity()
        self.second = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.head = nn.Linear(CHANNELS, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(F.relu(self.norm(self.first(x))))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def conv_pair(how: Any, norm: bool) -> dict[str, float]:
    """A growth of 16 channels, in training steps."""
    torch.manual_seed(0)
    x = torch.randn(BATCH, CHANNELS, POSITIONS, POSITIONS)
    batch = x, torch.randint(10, (BATCH,))
    model = Pair(norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trained(model, optimizer, batch)
    step = seconds(lambda: [trained(model, optimizer, batch) for _ in range(3)]) / 3
    # What torch does once, at the first growth of a process, belongs to no method.
    ms.grow_(Pair(norm), {"first": 16}, x[:2], how=ms.how.Random())
    grow = seconds(
        lambda: ms.grow_(model, {"first": 16}, x[:2], how=how, loss=loss, data=[batch])
    )
    return {"step": step, "growth": grow, "steps": grow / step}


def digits_batches() -> list[Batch]:
    return [(x.flatten(1), y) for x, y in load("digits").batches(64)]


def digits_event(how: Any) -> Callable[[], float]:
    """An event of a grower in a running loop: eight units more, shared by two layers."""
    torch.manual_seed(0)
    data = digits_batches()
    model = nn.Sequential(
        nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    when = ms.when.At(epochs=[10**6])
    grower = ms.Grower(
        model, optimizer, loss=loss, data=data, when=when, how=how, amount=8
    )

    def event() -> float:
        for batch in data[:3]:
            grower.step(trained(model, optimizer, batch))
        return seconds(grower.grow)

    return event


def digits(how: Any, events: int = 6) -> dict[str, float]:
    """The first event, and the mean of the later ones."""
    event = digits_event(how)
    spent = [event() for _ in range(events)]
    return {"first": spent[0], "later": sum(spent[1:]) / (events - 1)}


def idle(steps: int = 20_000) -> float:
    """Microseconds per step of a grower that has nothing to do."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = [(torch.randn(16, 4), torch.randint(2, (16,)))] * 5
    grower = ms.Grower(
        model, optimizer, loss=loss, data=data, when=ms.when.At(epochs=[10**7]),
        how=ms.how.Random(),
    )  # fmt: skip
    value = loss(model, data[0])
    spent = seconds(lambda: [grower.step(value) for _ in range(steps)])
    return spent / steps * 1e6


def main() -> None:
    torch.set_num_threads(1)
    hows = {
        "random": ms.how.Random(),
        "pairs": ms.how.Pairs(),
        "gradmax": ms.how.GradMax(),
        "tiny": ms.how.TINY(),
        "firefly": ms.how.Firefly(),
        "senn": ms.how.SENN(),
    }
    conv = {}
    for name in ("random", "gradmax", "tiny", "firefly"):
        for norm in (False, True):
            key = f"{name}, batch norm" if norm else name
            conv[key] = conv_pair(hows[name], norm)
    found = {
        "conv pair 64 -> 64, 3x3, 32x32, batch 128, +16": conv,
        "digits MLP, +8, per event": {name: digits(how) for name, how in hows.items()},
        "idle grower, microseconds per step": idle(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
