"""SENN against nets of a fixed size: one file per finished run, and a table.

    python benchmarks/senn/run.py moons spirals regression linear      # a minute or two each, 5 seeds
    python benchmarks/senn/run.py mnist fashion_mnist cifar10          # needs MERISTEM_DATA; 3 seeds
    python benchmarks/senn/run.py "mnist 1000" "mnist 1000 long"       # 20 epochs, or as many steps as 60,000 images get
    python benchmarks/senn/run.py --report

Every grown run is followed, in the same process, by its own final net trained from scratch for as many epochs: accuracy and time
side by side.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meristem as ms
from meristem.experiments.models import ConvNet
from meristem.lab.ledger import step_flops

RESULTS = Path(__file__).parent / "results"
WIDTHS = (1, 2, 4, 8, 16, 32, 64)


class Batches:
    """Shuffled minibatches of tensors."""

    def __init__(self, size: int, *tensors: Tensor) -> None:
        self.size, self.tensors = size, tensors

    def __len__(self) -> int:
        return len(self.tensors[0]) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        rows = torch.randperm(len(self.tensors[0]))
        for i in range(len(self)):
            yield tuple(
                tensor[rows[i * self.size : (i + 1) * self.size]]
                for tensor in self.tensors
            )


def classes(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def squares(model: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


Grown = Callable[[nn.Module, torch.optim.Optimizer, Batches, Any], ms.Grower]


def train(
    model: nn.Module,
    data: Batches,
    loss: Any,
    epochs: int,
    make: Callable[..., Any],
    grown: Grown | None = None,
) -> dict[str, Any]:
    """Train under a cosine, growing where told to; seconds, of which growing took, and floating-point operations."""
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(data))
    grower = grown(model, optimizer, data, loss) if grown else None
    first = next(iter(data))
    cost = step_flops(model, loss, first) * data.size
    total, checking, began = 0.0, 0.0, time.perf_counter()
    growths = []
    for epoch in range(epochs):
        for batch in data:
            value = loss(model, batch)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            total += cost
            if grower is not None:
                at = time.perf_counter()
                growth = grower.step(value)
                checking += time.perf_counter() - at
                if growth is not None:
                    growths.append(
                        {"epoch": epoch, "added": growth.added, "votes": growth.votes}
                    )
                    cost = step_flops(model, loss, first) * data.size
    found = {"seconds": time.perf_counter() - began, "flops": total, "epochs": epochs}
    if grower is not None:
        found |= {
            "seconds_growing": checking,
            "flops_growing": grower.flops,
            "growths": growths,
            "reason": grower.reason,
        }
    return found


def fresh(model: nn.Module) -> nn.Module:
    """The same net, drawn anew; activations that start as the identity start as rectifiers with a slope of a quarter."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        if isinstance(module, ms.PReLU):
            module.slope.data.fill_(0.25)
    return copied


def hidden(model: nn.Module) -> list[int]:
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return [layer.weight.shape[0] for layer in layers[:-1]]


def toy(task: str, seed: int) -> tuple[Batches, tuple[Tensor, Tensor]]:
    from sklearn.datasets import make_moons

    draw = np.random.default_rng(seed)

    def spirals(count: int) -> tuple[np.ndarray, np.ndarray]:
        turn, arm = np.sqrt(draw.uniform(0.05, 1, count)), draw.integers(0, 2, count)
        angle = turn * 3 * np.pi + arm * np.pi
        return np.stack(
            [turn * np.cos(angle), turn * np.sin(angle)], 1
        ) * 3 + draw.normal(0, 0.15, (count, 2)), arm

    def line(count: int) -> tuple[np.ndarray, np.ndarray]:
        x = draw.uniform(-1, 1, (count, 1))
        return 2 * x, np.sin(4 * x) + 0.5 * x + draw.normal(0, 0.1, x.shape)

    def plane(count: int) -> tuple[np.ndarray, np.ndarray]:
        x = draw.normal(size=(count, 5))
        return x, x @ np.array([[1.0], [-2], [0.5], [0], [3]]) + draw.normal(
            0, 0.5, (count, 1)
        )

    made: dict[str, Callable[[int], Any]] = {
        "moons": lambda n: make_moons(
            n, noise=0.3, random_state=int(draw.integers(2**31))
        ),
        "spirals": spirals,
        "regression": line,
        "regression 400": line,
        "linear": plane,
    }
    train_rows = {
        "moons": 200,
        "spirals": 400,
        "regression": 50,
        "regression 400": 400,
        "linear": 200,
    }[task]
    (x, y), (x_test, y_test) = made[task](train_rows), made[task](4000)
    target = torch.float32 if y.ndim == 2 else torch.long
    tensors = [torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=target)]
    tests = (
        torch.tensor(x_test, dtype=torch.float32),
        torch.tensor(y_test, dtype=target),
    )
    return Batches(50 if task == "regression" else 20, *tensors), tests


def measured(model: nn.Module, tests: tuple[Tensor, Tensor]) -> float:
    """Mean squared error, or accuracy."""
    model.eval()
    with torch.no_grad():
        out = torch.cat([model(part) for part in tests[0].split(2000)])
    model.train()
    if tests[1].is_floating_point():
        return F.mse_loss(out, tests[1]).item()
    return (out.argmax(1) == tests[1]).float().mean().item()


def run_toy(task: str, seed: int) -> dict[str, Any]:
    """From a linear net (regression: from one unit), against every fixed width."""
    torch.manual_seed(seed)
    data, tests = toy(task, seed)
    inputs, outputs = data.tensors[0].shape[1], 1 if data.tensors[1].dim() == 2 else 2
    loss, epochs = (
        squares if outputs == 1 else classes,
        2000 if task == "regression" else 400,
    )
    line = task.startswith("regression")

    def adam(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=1e-3)

    def net(width: int) -> nn.Sequential:
        if not width:
            return nn.Sequential(nn.Linear(inputs, outputs))
        return nn.Sequential(
            nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs)
        )

    def by(alpha: float | None) -> Grown:
        def grown(
            model: nn.Module, optimizer: Any, batches: Batches, value: Any
        ) -> ms.Grower:
            axes = "0" if line else "*"
            every = ms.when.Every(epochs=30)
            return ms.recipes.senn(
                model,
                optimizer,
                loss=value,
                data=batches,
                when=every,
                amount=8,
                axes=axes,
                alpha=alpha,
            )

        return grown

    model = net(1 if line else 0)
    result = {"grown": train(model, data, loss, epochs, adam, by(None))}
    result["grown"] |= {"hidden": hidden(model), "test": measured(model, tests)}
    again = fresh(model)
    result["its final net"] = train(again, data, loss, epochs, adam) | {
        "test": measured(again, tests)
    }
    if line:
        model = net(1)
        result["grown, alpha .0025"] = train(
            model, data, loss, epochs, adam, by(2.5e-3)
        )
        result["grown, alpha .0025"] |= {
            "hidden": hidden(model),
            "test": measured(model, tests),
        }
    for width in (0, *WIDTHS):
        fixed = net(width)
        result[f"fixed {width}"] = train(fixed, data, loss, epochs, adam) | {
            "test": measured(fixed, tests)
        }
    return result


def images(task: str, seed: int, rows: int) -> tuple[Batches, tuple[Tensor, Tensor]]:
    found = np.load(Path(os.environ["MERISTEM_DATA"]) / f"{task}.npz")
    x, x_test = (
        torch.tensor(found[name]).float().div(255) for name in ("x_train", "x_test")
    )
    y, y_test = (
        torch.tensor(found[name]).long().flatten() for name in ("y_train", "y_test")
    )
    x, x_test = (
        part.movedim(-1, 1) if part.shape[-1] == 3 else part.flatten(1)
        for part in (x, x_test)
    )
    mean, std = x.mean(), x.std()
    kept = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:rows]
    return Batches(128, ((x - mean) / std)[kept].contiguous(), y[kept]), (
        (x_test - mean) / std,
        y_test,
    )


def run_images(
    task: str, seed: int, rows: int = 60000, steps: int | None = None
) -> dict[str, Any]:
    """From ten units, 20 epochs or so many steps; against the net it ends as, and against random units at the same moments."""
    torch.manual_seed(seed)
    data, tests = images(task, seed, rows)

    def adam(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=1e-3)

    def start() -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(784, 10), nn.ReLU(), nn.Linear(10, 10))

    def grown(
        model: nn.Module, optimizer: Any, batches: Batches, value: Any
    ) -> ms.Grower:
        return ms.recipes.senn(model, optimizer, loss=value, data=batches, axes="0")

    return against(start, data, tests, adam, steps // len(data) if steps else 20, grown)


def run_cifar(seed: int) -> dict[str, Any]:
    """Three convolutions of 8, 16 and 32 channels with batch norm, 10,000 images, 20 epochs, one check after the first."""
    torch.manual_seed(seed)
    data, tests = images("cifar10", seed, 10000)

    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
        )

    def start() -> nn.Module:
        torch.manual_seed(seed)
        return ConvNet(3, 10, 8)

    def grown(
        model: nn.Module, optimizer: Any, batches: Batches, value: Any
    ) -> ms.Grower:
        return ms.Grower(
            model, optimizer, loss=value, data=batches, when=ms.when.At(epochs=(1, 2, 3)), where=ms.where.SENN(),
            how=ms.how.SENN(steps=48, batches=24), amount=16, axes=["conv1", "conv2", "conv3"],
        )  # fmt: skip

    return against(start, data, tests, sgd, 20, grown)


def against(
    start: Callable[[], nn.Module],
    data: Batches,
    tests: tuple[Tensor, Tensor],
    make: Any,
    epochs: int,
    grown: Grown,
) -> dict[str, Any]:
    model = start()
    result = {"grown": train(model, data, classes, epochs, make, grown)}
    result["grown"] |= {"hidden": hidden(model), "test": measured(model, tests)}
    again = fresh(model)
    result["its final net"] = train(again, data, classes, epochs, make) | {
        "test": measured(again, tests)
    }
    moments = {
        1 + growth["epoch"]: growth["added"] for growth in result["grown"]["growths"]
    }

    def random(model: nn.Module, optimizer: Any, batches: Batches, value: Any) -> Any:
        return Copied(model, optimizer, batches, moments)

    model = start()
    result["random"] = train(model, data, classes, epochs, make, random) | {
        "test": measured(model, tests)
    }
    model = start()
    result["start"] = train(model, data, classes, epochs, make) | {
        "test": measured(model, tests)
    }
    return result


class Copied:
    """Random units where and when another run has grown."""

    reason, flops = "", 0

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        data: Batches,
        moments: dict[int, dict[str, int]],
    ) -> None:
        self.model, self.optimizer, self.data, self.moments, self.steps = (
            model,
            optimizer,
            data,
            moments,
            0,
        )

    def step(self, _loss: Tensor) -> ms.Growth | None:
        self.steps += 1
        epoch, inside = divmod(self.steps, len(self.data))
        if inside or epoch not in self.moments:
            return None
        return ms.grow_(
            self.model,
            self.moments[epoch],
            self.data.tensors[0][:8],
            optimizer=self.optimizer,
        )


TASKS: dict[str, tuple[int, Callable[[int], dict[str, Any]]]] = {
    **{
        task: (5, lambda seed, task=task: run_toy(task, seed))
        for task in ("moons", "spirals", "regression", "regression 400", "linear")
    },
    **{
        task: (3, lambda seed, task=task: run_images(task, seed))
        for task in ("mnist", "fashion_mnist")
    },
    **{
        f"mnist {rows}": (3, lambda seed, rows=rows: run_images("mnist", seed, rows))
        for rows in (1000, 4000, 16000)
    },
    **{
        f"mnist {rows} long": (
            3,
            lambda seed, rows=rows: run_images("mnist", seed, rows, 20 * 468),
        )
        for rows in (1000, 4000, 16000)
    },
    "cifar10": (3, run_cifar),
}


def report() -> str:
    """Mean and standard deviation over the seeds; the cost of growing as a multiple of that of its final net, in the same run."""
    lines = [
        "| task (seeds) | net | test | hidden | time | FLOPs |",
        "|---|---|---|---|---|---|",
    ]
    for task, (seeds, _) in TASKS.items():
        runs = [
            json.loads(path.read_text())["nets"]
            for s in range(seeds)
            if (path := file(task, s)).exists()
        ]
        for name in runs[0] if runs else ():
            tests = [run[name]["test"] for run in runs]
            spread = statistics.stdev(tests) if len(tests) > 1 else math.nan
            sizes = (
                ", ".join(str(run[name]["hidden"]) for run in runs)
                if "hidden" in runs[0][name]
                else ""
            )
            shown = f"{statistics.mean(tests):.4f} ± {spread:.4f}"
            time, flops = (
                statistics.mean(_multiple(run, name, what) for run in runs)
                for what in ("seconds", "flops")
            )
            lines.append(
                f"| {task} ({len(runs)}) | {name} | {shown} | {sizes} | {time:.2f} x | {flops:.2f} x |"
            )
    return "\n".join(lines)


def _multiple(run: dict[str, Any], name: str, what: str) -> float:
    """The cost of a net, growing included, over that of the final net."""
    mine, final = run[name], run["its final net"]
    return (
        mine[what] + (mine.get("flops_growing", 0) if what == "flops" else 0)
    ) / final[what]


def file(task: str, seed: int) -> Path:
    return RESULTS / f"{task.replace(' ', '_')}-{seed}.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", choices=[*TASKS, []])
    parser.add_argument(
        "--report", action="store_true", help="print the table of what is there"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    RESULTS.mkdir(exist_ok=True)
    for task in args.tasks:
        seeds, run = TASKS[task]
        for seed in range(seeds):
            if not file(task, seed).exists():
                about = {
                    "task": task,
                    "seed": seed,
                    "torch": torch.__version__,
                    "python": platform.python_version(),
                }
                result = {
                    **about,
                    "cores": os.cpu_count(),
                    "threads": 1,
                    "nets": run(seed),
                }
                file(task, seed).with_suffix(".tmp").write_text(
                    json.dumps(result, indent=1)
                )
                file(task, seed).with_suffix(".tmp").replace(file(task, seed))
                grown = result["nets"]["grown"]
                print(
                    f"{task} {seed}: {grown['test']:.4f}, hidden {grown['hidden']}",
                    flush=True,
                )
    if args.report:
        print(report())


if __name__ == "__main__":
    main()
