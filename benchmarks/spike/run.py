"""Does growth hurt? The steps after one growth, beside the same net that did not grow.

One net is trained, then copied: every copy sees the same batches from there on, one
does not grow. The excess is how far the test loss of a grown copy lies above that of
the other, as a share of it, both as running means over five evaluations (20 steps).

    python benchmarks/spike/run.py --out results           # all, about 25 CPU minutes
    python benchmarks/spike/run.py --table results
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meristem as ms
from meristem.experiments.data import Data, load
from meristem.experiments.models import ConvNet, mlp

STEPS, EVERY, WINDOW = 400, 4, 5
SPIKE_STEPS, EXAMPLES = 200, 2000
"""Steps after the growth, between evaluations, evaluations of a running mean; steps in
which the spike is looked for, test examples.
"""
NOISE = 1e-3
"""Relative noise on the weights of the arm that does not grow: what two trainings that
were the same differ by.
"""
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=5e-4),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
}
METHODS: dict[str, Any] = {
    "nothing": None,
    "random": ms.how.Random(),
    "net2net": ms.how.Net2Net(),
    "pairs": ms.how.Pairs(),
    "gradmax": ms.how.GradMax(),
    "tiny": ms.how.TINY(),
    "firefly": ms.how.Firefly(),
    "swe": ms.how.SWE(),
}
CARES: dict[str, Any] = {
    "warm moments": [ms.care.WarmMoments()],
    "default": None,
    "default + young rate": [
        ms.care.WarmMoments(),
        ms.care.FreshStatistics(),
        ms.care.YoungRate(),
    ],
    "default + rewarm": [
        ms.care.WarmMoments(),
        ms.care.FreshStatistics(),
        ms.care.Rewarm(),
    ],
}


@dataclass(frozen=True)
class Setting:
    """A net, its data, and the step at which it grows."""

    data: str
    make: Callable[[], nn.Module]
    batch: int
    before: int


SETTINGS = {
    "conv_bn": Setting("digits", lambda: ConvNet(1, 10, 4), 64, 110),
    "mlp": Setting("fashion_mnist", lambda: mlp(784, 10, [32, 32]), 128, 470),
    "mlp_bn": Setting("fashion_mnist", lambda: mlp(784, 10, [32, 32], True), 128, 470),
}


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def batches(data: Data, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(data.x_train), generator=generator)
        for part in order.split(size)[:-1]:
            yield data.x_train[part], data.y_train[part]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> Tensor:
    value = loss(model, batch)
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    return value.detach()


@torch.no_grad()
def tested(model: nn.Module, data: Data) -> tuple[float, float]:
    model.eval()
    x, y = data.x_test[:EXAMPLES], data.y_test[:EXAMPLES]
    out = model(x)
    model.train()
    return F.cross_entropy(out, y).item(), (out.argmax(1) == y).double().mean().item()


def after(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Data,
    coming: Iterator[Any],
) -> list[tuple[float, float]]:
    """Test loss and accuracy every few steps."""
    curve = []
    for number in range(1, STEPS + 1):
        step(model, optimizer, next(coming))
        if number % EVERY == 0:
            curve.append(tested(model, data))
    return curve


def copied(
    model: nn.Module, optimizer: torch.optim.Optimizer, name: str
) -> tuple[nn.Module, torch.optim.Optimizer]:
    twin = copy.deepcopy(model)
    follower = OPTIMIZERS[name](twin.parameters())
    follower.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return twin, follower


def smooth(values: list[float]) -> list[float]:
    return [
        sum(values[i : i + WINDOW]) / WINDOW for i in range(len(values) - WINDOW + 1)
    ]


def figures(
    grown: list[tuple[float, float]], control: list[tuple[float, float]]
) -> dict[str, Any]:
    pairs = zip(
        smooth([one[0] for one in grown]),
        smooth([one[0] for one in control]),
        strict=True,
    )
    excess = [a / b - 1 for a, b in pairs][: SPIKE_STEPS // EVERY]
    peak = max(range(len(excess)), key=excess.__getitem__)
    # The step from which on the grown net is level with the other, after the peak.
    back = next((i for i in range(peak, len(excess)) if excess[i] <= 0.02), None)
    return {
        "spike": excess[peak],
        "at": (peak + 1) * EVERY,
        "recovered": None if back is None else (back + 1) * EVERY,
        "loss": sum(one[0] for one in grown[-10:]) / 10,
        "accuracy": sum(one[1] for one in grown[-10:]) / 10,
        "control_loss": sum(one[0] for one in control[-10:]) / 10,
        "control_accuracy": sum(one[1] for one in control[-10:]) / 10,
    }


def runs(
    name: str, kind: str, seed: int, out: Path, arms: list[tuple[str, str]]
) -> None:
    """All arms of one setting, optimizer and seed; one file each."""
    setting = SETTINGS[name]
    torch.manual_seed(seed)
    data, model = load(setting.data), setting.make()
    optimizer = OPTIMIZERS[kind](model.parameters())
    coming = batches(data, setting.batch, seed)
    for _ in range(setting.before):
        step(model, optimizer, next(coming))
    ahead = [next(coming) for _ in range(STEPS)]
    control = after(*copied(model, optimizer, kind), data, iter(ahead))
    side = data.batches(setting.batch)
    for method, care in arms:
        path = out / f"{name}-{kind}-{method}-{care}-{seed}.json".replace(" ", "_")
        if path.exists():
            continue
        grown, follower = copied(model, optimizer, kind)
        change = grow(grown, follower, side, method, care, seed)
        found = figures(after(grown, follower, data, iter(ahead)), control)
        found |= {"setting": name, "optimizer": kind, "how": method, "care": care}
        found |= {"seed": seed, "max_change": change}
        found |= {"torch": torch.__version__, "machine": platform.machine()}
        path.write_text(json.dumps(found, indent=1))
        print(path.name, {k: found[k] for k in ("spike", "recovered", "accuracy")})


def grow(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    side: Any,
    method: str,
    care: str,
    seed: int,
) -> float:
    """Double every width; returns by how much the outputs changed."""
    generator = torch.Generator().manual_seed(seed)
    if METHODS[method] is None:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + NOISE * torch.randn(p.shape, generator=generator))
        return NOISE
    grower = ms.Grower(
        model,
        optimizer,
        loss=loss,
        data=side,
        when=ms.when.At(steps=[1]),
        how=METHODS[method],
        where=ms.where.Proportional(),
        care=CARES[care],
        amount=1.0,
        generator=generator,
    )
    growth = grower.grow()
    assert growth is not None
    return growth.max_change


def table(folder: Path) -> None:
    """By method and care, for every net and optimizer: the spike, mean and worst seed in
    percent, and the accuracy beyond that of the net that did not grow, in points.
    """
    rows: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for path in sorted(folder.glob("*.json")):
        one = json.loads(path.read_text())
        column = f"{one['setting']}, {one['optimizer']}"
        row = rows.setdefault((one["how"], one["care"]), {})
        row.setdefault(column, []).append(one)
    columns = [f"{setting}, {kind}" for setting in SETTINGS for kind in OPTIMIZERS]
    print("| how | care | " + " | ".join(columns) + " |")
    print("|---|---|" + "---|" * len(columns))
    for (how, care), found in sorted(rows.items(), key=lambda row: _order(*row[0])):
        cells = []
        for column in columns:
            runs = found.get(column, [])
            spikes = [100 * one["spike"] for one in runs]
            gained = [100 * (one["accuracy"] - one["control_accuracy"]) for one in runs]
            if not runs:
                cells.append("–")
                continue
            mean, more = sum(spikes) / len(spikes), sum(gained) / len(gained)
            cells.append(f"{mean:.1f} ({max(spikes):.1f}); {more:+.1f}")
        print(f"| {how} | {care} | " + " | ".join(cells) + " |")


def _order(how: str, care: str) -> tuple[int, int]:
    return list(CARES).index(care), list(METHODS).index(how)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--cares", default=",".join(CARES))
    parser.add_argument("--seeds", type=int, default=3)
    told = parser.parse_args()
    if told.table:
        table(told.table)
        return
    torch.set_num_threads(1)
    told.out.mkdir(parents=True, exist_ok=True)
    arms = [(m, c) for m in told.methods.split(",") for c in told.cares.split(",")]
    for name in told.settings.split(","):
        for kind in OPTIMIZERS:
            for seed in range(told.seeds):
                runs(name, kind, seed, told.out, arms)


if __name__ == "__main__":
    main()
