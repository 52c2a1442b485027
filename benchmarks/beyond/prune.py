"""SWE's coupling run backwards: do units hand over their work before they are dropped?

    MERISTEM_DATA=... python benchmarks/beyond/prune.py [SEED ...]

Chatzis et al. (arXiv 2509.18842) name pruning as future work. A net is trained; then half of the
units of every hidden width go, or three quarters: those with the smallest product of the norms of
fan-in and fan-out. Each way is scored at once and after one more epoch of training:

    drop      narrow_ alone
    trained   one plain epoch, as much data as the coupling reads, then narrow_
    faded     one epoch in which the units that go are faded out, and only the layers that read
              the units learn; then narrow_
    spread    the same with the coupling D beside it, which moves weight between units:
              that stays: W_i + sum_j D[j, i]        that goes: W_j - sum_i D[j, i]
    prune_    what prune_ removes, by its own score and with compensation, at the tolerance out of
              a few whose count is next to that of the others

One file per net and seed under results/prune; a table at the end.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from keep import kept, tell
from torch import Tensor, nn
from torch.func import functional_call

import meristem as ms
from meristem.experiments import models
from meristem.experiments.data import Data, as_input, prepared
from meristem.experiments.run import scores
from meristem.experiments.tables import spread

OUT = Path(__file__).parent / "results" / "prune"
NETS: dict[str, dict[str, Any]] = {
    "mlp": {
        "model": {"mlp": {"hidden": [64, 64]}},
        "data": {"name": "fashion_mnist", "examples": 20_000},
        "axes": ["1", "3"],
        "epochs": 6,
    },
    "conv": {
        "model": {"convnet": {"width": 16}},
        "data": {"name": "cifar10", "examples": 10_000, "test": 5_000},
        "axes": ["conv1", "conv2", "conv3"],
        "epochs": 6,
    },
    "gpt": {
        "model": {"gpt": {"width": 48, "heads": 4, "hidden": 192, "depth": 2}},
        "data": {"name": "shakespeare"},
        "axes": ["blocks.0.up", "blocks.1.up"],
        "epochs": 4,
    },
}
SHARES = (0.5, 0.75)
TOLERANCES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
RATE, COUPLING_RATE, BATCH = 1e-3, 1e-4, 64


class Task:
    """One net with its data."""

    def __init__(self, name: str, seed: int) -> None:
        self.settings = NETS[name]
        self.data: Data = prepared(**self.settings["data"])
        self.example = as_input(self.data.x_train[:8])
        torch.manual_seed(seed)
        self.net = models.build(self.settings["model"], self.data)
        self.train(self.net, self.settings["epochs"])

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self.data.loss(model(batch[0]), batch[1])

    def train(self, net: nn.Module, epochs: int) -> None:
        optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
        net.train()
        for _ in range(epochs):
            for batch in self.data.batches(BATCH):
                loss = self.loss(net, batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    def score(self, net: nn.Module) -> list[float]:
        """Accuracy and loss on the test data."""
        accuracy, loss = scores(net, self.data, self.data.x_test, self.data.y_test)
        return [float(accuracy or 0), loss]

    def both_scores(self, net: nn.Module) -> dict[str, list[float]]:
        """At once, and after one more epoch."""
        at_once = self.score(net)
        torch.manual_seed(1)
        self.train(net, 1)
        return {"at once": at_once, "after an epoch": self.score(net)}


def ends_of(net: nn.Module, axis: ms.Axis) -> tuple[str, str]:
    """The weights that make the units of an axis, and those that read them."""
    (makes,) = (slot.name for slot in axis.slots if slot.role == "fan_in")
    (reads,) = (slot.name for slot in axis.slots if slot.role == "fan_out")
    return makes, reads


def chosen(task: Task, share: float) -> dict[str, list[int]]:
    """By axis the units that go."""
    axes = ms.find_axes(task.net, task.example)
    found = {}
    for name in task.settings["axes"]:
        makes, reads = ends_of(task.net, axes.named(name))
        inner = task.net.get_parameter(makes).flatten(1).norm(dim=1)
        weight = task.net.get_parameter(reads)
        # Behind a flattened map a unit is read by several columns.
        outer = weight.transpose(0, 1).reshape(len(inner), -1).norm(dim=1)
        order = (inner * outer).argsort()
        found[name] = sorted(order[: round(share * len(inner))].tolist())
    return found


class Coupling:
    """D between the units of one weight that go and those that stay."""

    def __init__(self, weight: Tensor, units: list[int]) -> None:
        gone = set(units)
        self.goes = torch.tensor(units)
        self.stays = torch.tensor([i for i in range(len(weight)) if i not in gone])
        size = (len(self.goes), len(self.stays), *weight.shape[1:])
        self.d = (1e-4 * torch.randn(size)).requires_grad_()

    def moved(self, weight: Tensor) -> Tensor:
        """The weight that takes effect."""
        weight = weight.index_add(0, self.stays, self.d.sum(0))
        return weight.index_add(0, self.goes, -self.d.sum(1))


def faded(weight: Tensor, units: list[int], size: int, share: float) -> Tensor:
    """A weight that reads `size` units, some of them less by a share."""
    # Behind a flattened map a unit is read by several columns.
    per_unit = weight.shape[1] // size
    columns = torch.tensor(units)[:, None] * per_unit + torch.arange(per_unit)
    left = torch.ones(weight.shape[1])
    left[columns.flatten()] = 1 - share
    return weight * left.view(1, -1, *[1] * (weight.dim() - 2))


def handed_over(task: Task, gone: dict[str, list[int]], coupled: bool) -> nn.Module:
    """A copy of the net after an epoch in which the units that go fade, with D or without."""
    net = copy.deepcopy(task.net)
    axes = ms.find_axes(net, task.example)
    weights = dict(net.named_parameters())
    couplings: dict[str, Coupling] = {}
    readers: dict[str, tuple[list[int], int]] = {}
    for name, units in gone.items():
        makes, reads = ends_of(net, axes.named(name))
        readers[reads] = units, axes.named(name).size
        if coupled:
            couplings[makes] = Coupling(weights[makes], units)
    groups = [{"params": [weights[reads] for reads in readers], "lr": RATE}]
    groups += [{"params": [one.d], "lr": COUPLING_RATE} for one in couplings.values()]
    optimizer = torch.optim.Adam(groups)
    batches = task.data.batches(BATCH)
    net.eval()
    for step, (x, y) in enumerate(batches):
        values = {makes: one.moved(weights[makes]) for makes, one in couplings.items()}
        # Gone for the last tenth, so that the readers settle.
        share = min(1.0, step / (0.9 * len(batches)))
        for reads, (units, size) in readers.items():
            weight = values.get(reads, weights[reads])
            values[reads] = faded(weight, units, size, share)
        loss = task.data.loss(functional_call(net, values, (x,)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        for makes, one in couplings.items():
            weights[makes].copy_(one.moved(weights[makes]))
    return net


def narrowed(task: Task, net: nn.Module, gone: dict[str, list[int]]) -> nn.Module:
    ms.narrow_(net, gone, task.example)
    return net


def pruned(task: Task, wanted: int) -> tuple[nn.Module, float, int]:
    """What prune_ makes at the tolerance that comes next to a count, and how many went."""
    best: tuple[int, nn.Module, float, int] | None = None
    for tolerance in TOLERANCES:
        net = copy.deepcopy(task.net)
        count = 0
        for axis in task.settings["axes"]:
            growth = ms.prune_(
                net,
                axis,
                task.example,
                loss=task.loss,
                data=task.data.batches(BATCH),
                tolerance=tolerance,
            )
            count -= 0 if growth is None else sum(growth.added.values())
        if best is None or abs(count - wanted) < best[0]:
            best = abs(count - wanted), net, tolerance, count
    assert best is not None
    return best[1:]


def one(name: str, seed: int) -> dict[str, Any]:
    """All ways on one net."""
    task = Task(name, seed)
    found: dict[str, Any] = {"net": name, "seed": seed, "whole": task.score(task.net)}
    for share in SHARES:
        gone = chosen(task, share)
        wanted = sum(map(len, gone.values()))

        def trained(gone: dict[str, list[int]] = gone) -> nn.Module:
            net = copy.deepcopy(task.net)
            task.train(net, 1)
            return net

        ways: dict[str, Callable[[], nn.Module]] = {
            "drop": lambda: copy.deepcopy(task.net),
            "trained": trained,
            "faded": lambda gone=gone: handed_over(task, gone, coupled=False),
            "spread": lambda gone=gone: handed_over(task, gone, coupled=True),
        }
        row = {}
        for way, make in ways.items():
            torch.manual_seed(seed)
            row[way] = task.both_scores(narrowed(task, make(), gone)) | {"gone": wanted}
        net, tolerance, count = pruned(task, wanted)
        row["prune_"] = task.both_scores(net) | {"gone": count, "tolerance": tolerance}
        found[str(share)] = row
    return found


def table(results: list[dict[str, Any]]) -> str:
    """Means over seeds: accuracy at once and after one epoch."""
    lines = ["| net | gone | way | at once | after an epoch |", "|---|---|---|---|---|"]
    for name in NETS:
        runs = [result for result in results if result["net"] == name]
        if not runs:
            continue
        whole = 100 * fmean(run["whole"][0] for run in runs)
        lines.append(f"| {name} | 0 | whole | {whole:.2f} | |")
        for share in map(str, SHARES):
            for way in runs[0][share]:
                rows = [run[share][way] for run in runs]
                cells = []
                for moment in ("at once", "after an epoch"):
                    values = [100 * row[moment][0] for row in rows]
                    cells.append(spread(values, 2))
                count = fmean(row["gone"] for row in rows)
                lines.append(f"| {name} | {count:.0f} | {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(seeds: list[int]) -> None:
    results = []
    for seed in seeds:
        for name in NETS:
            path = OUT / f"{name}_seed{seed}.json"
            results.append(kept(path, partial(one, name, seed)))
    tell(OUT, table(results))


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]] or [0, 1, 2])
