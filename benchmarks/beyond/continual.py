"""SWE for continual learning: new units coupled, old ones frozen, against growth and replay.

    MERISTEM_DATA=... python benchmarks/beyond/continual.py [SEED ...]

Chatzis et al. (arXiv 2509.18842) name continual learning as future work. CIFAR-100 in five tasks of
20 classes, 2,000 training images each, one after the other; a net of three convolutions without
norms gets 20 outputs more with every task, and, where it grows, units. Which task an image is of is
known (its 20 outputs are compared). Ways:

    fixed             the last width from the start
    grown             Random units before every task, everything is trained
    grown, frozen     the same, and what is old keeps its bits (freeze_old_)
    coupled           SWE's units, adjusted on the new task, then everything is trained
    coupled, frozen   the same, and what is old after the adjusting keeps its bits
    grown, replay     Random units, and half of every batch is of 100 kept images per old task

The adjusting of SWE moves present units and all that reads them. `accuracy` is the mean over
tasks at the end, `forgetting` by how much each task has fallen since it was learnt. One file per
way and seed under results/continual; a table at the end.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from keep import kept, tell
from torch import Tensor, nn

import meristem as ms
from meristem.experiments.data import Batches, Data, prepared
from meristem.experiments.tables import spread

OUT = Path(__file__).parent / "results" / "continual"
TASKS, CLASSES, EPOCHS, BATCH, KEPT = 5, 20, 6, 50, 100
FIRST = (12, 24, 48)
ADDED = {"0": 3, "3": 6, "6": 12}
"""Units of a task, by convolution."""
WAYS = {
    "fixed": {},
    "grown": {"how": "random"},
    "grown, frozen": {"how": "random", "frozen": True},
    "coupled": {"how": "swe"},
    "coupled, frozen": {"how": "swe", "frozen": True},
    "grown, replay": {"how": "random", "replay": True},
}


def network(widths: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for width in widths:
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 16, CLASSES))


def of_task(data: Data, task: int, part: str) -> tuple[Tensor, Tensor]:
    """Images and classes of one task."""
    x, y = getattr(data, f"x_{part}"), getattr(data, f"y_{part}")
    mine = y // CLASSES == task
    return x[mine], y[mine]


def loss(model: nn.Module, batch: Any) -> Tensor:
    """Among the outputs of each image's own task."""
    x, y = batch
    output = model(x)
    tasks = torch.arange(output.shape[1]) // CLASSES
    others = tasks[None] != (y // CLASSES)[:, None]
    return F.cross_entropy(output.masked_fill(others, -1e9), y)


@torch.no_grad()
def accuracy(net: nn.Module, data: Data, task: int) -> float:
    x, y = of_task(data, task, "test")
    mine = slice(task * CLASSES, (task + 1) * CLASSES)
    hits = 0
    for images, classes in Batches(x, y, 500):
        found = net(images)[:, mine].argmax(1) + mine.start
        hits += int((found == classes).sum())
    return hits / len(y)


def grow(
    net: nn.Module, way: dict[str, Any], batches: Batches, seed: int
) -> dict[str, Tensor]:
    """Outputs for a task, and units where the way grows; masks of what is new."""
    example = next(iter(batches))[0][:2]
    generator = torch.Generator().manual_seed(seed)
    head = str(len(net) - 1)
    masks = ms.young(ms.grow_(net, {head: CLASSES}, example, generator=generator))
    if "how" in way:
        how = ms.how.SWE() if way["how"] == "swe" else ms.how.Random()
        growth = ms.grow_(
            net, ADDED, example, how=how, loss=loss, data=batches, generator=generator
        )
        masks = ms.young(growth)
    for name in (f"{head}.weight", f"{head}.bias"):
        masks.setdefault(
            name, torch.zeros_like(net.get_parameter(name), dtype=torch.bool)
        )
        masks[name][-CLASSES:] = True
    return masks


def mixed(
    batches: Batches, kept: list[tuple[Tensor, Tensor]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every batch with as many kept images of the old tasks."""
    if not kept:
        yield from batches
        return
    old_x, old_y = (torch.cat(part) for part in zip(*kept, strict=True))
    for x, y in batches:
        some = torch.randint(len(old_x), (len(x),))
        yield torch.cat([x, old_x[some]]), torch.cat([y, old_y[some]])


def one(name: str, seed: int) -> dict[str, Any]:
    way: dict[str, Any] = WAYS[name]
    data = prepared("cifar100", examples=10_000)
    torch.manual_seed(seed)
    last = tuple(
        w + (TASKS - 1) * a for w, a in zip(FIRST, ADDED.values(), strict=True)
    )
    net = network(FIRST if "how" in way else last)
    learnt: list[float] = []
    kept: list[tuple[Tensor, Tensor]] = []
    for task in range(TASKS):
        x, y = of_task(data, task, "train")
        batches = Batches(x, y, BATCH, shuffle=True)
        masks = grow(net, way, batches, seed) if task else {}
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        frozen = (
            ms.freeze_old_(net, masks, optimizer) if task and "frozen" in way else None
        )
        for _ in range(EPOCHS):
            for batch in mixed(batches, kept):
                value = loss(net, batch)
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
        if frozen is not None:
            frozen.remove()
        if "replay" in way:
            kept.append((x[:KEPT], y[:KEPT]))
        learnt.append(accuracy(net, data, task))
    end = [accuracy(net, data, task) for task in range(TASKS)]
    parameters = sum(p.numel() for p in net.parameters())
    return {
        "way": name,
        "seed": seed,
        "learnt": learnt,
        "end": end,
        "parameters": parameters,
    }


def table(results: list[dict[str, Any]]) -> str:
    """Means over seeds, in points."""
    lines = ["| way | accuracy | forgetting | when learnt |", "|---|---|---|---|"]
    for name in WAYS:
        runs = [run for run in results if run["way"] == name]
        columns: list[list[float]] = [[], [], []]
        for run in runs:
            end, learnt = 100 * fmean(run["end"]), 100 * fmean(run["learnt"])
            for column, value in zip(columns, (end, learnt - end, learnt), strict=True):
                column.append(value)
        cells = [spread(values, 1) for values in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(seeds: list[int]) -> None:
    results = []
    for seed in seeds:
        for name in WAYS:
            stem = name.replace(", ", "_")
            path = OUT / f"{stem}_seed{seed}.json"
            results.append(kept(path, partial(one, name, seed)))
    tell(OUT, table(results))


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]] or [0, 1, 2])
