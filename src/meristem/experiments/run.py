"""The runner: one experiment, from its configuration to one JSON file. A plain loop; started again, it resumes."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import meristem
from meristem import checkpoint
from meristem.care import CARES
from meristem.experiments import data as datasets
from meristem.experiments import models
from meristem.experiments.config import OPTIMIZERS, SCHEDULES, ConfigError, Experiment, built, named, trigger
from meristem.grower import Grower
from meristem.growing import find_axes
from meristem.how import METHODS
from meristem.structure import Structure, flops
from meristem.values import Budget
from meristem.where import PLACES

SAVE_SECONDS = 60.0
"""Longest time between two checkpoints."""

Report = Callable[["Progress"], None]


class Interrupted(Exception):
    """The run was asked to stop; its checkpoint is complete."""


@dataclasses.dataclass
class Progress:
    """Where a run stands; also what a resumed run starts from."""

    step: int = 0
    steps: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    loss: float = math.nan
    curve: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)


class Run:
    """One experiment in progress."""

    def __init__(self, experiment: Experiment, report: Report = lambda progress: None) -> None:
        self.experiment, self.report = experiment, report
        self.accelerator = Accelerator(mixed_precision=experiment.train.precision)
        if self.accelerator.num_processes > 1:
            raise ConfigError("a run takes one process so far; hint: start it without torchrun or accelerate launch")
        self.data = datasets.load(experiment.data)
        torch.manual_seed(experiment.seed)
        self.model = models.build(experiment.model, self.data).to(self.accelerator.device)
        self.optimizer = _optimizer(experiment, self.model)
        self.batch_size = experiment.train.batch_size
        self.epoch_steps = math.ceil(len(self.data.x_train) / self.batch_size)
        self.dataset = TensorDataset(self.data.x_train, self.data.y_train)
        self.grower = self._grower() if experiment.grow is not None else None
        self.progress = Progress()
        self.example = self.data.x_train[: min(8, len(self.data.x_train))].to(self.accelerator.device)
        self.forward_flops = self._forward_flops()
        self.progress.steps = self._steps()
        self.progress.sizes = self._sizes()
        self.stopping = False

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of a batch, on the model's device."""
        x, y = (tensor.to(self.accelerator.device) for tensor in batch)
        with self.accelerator.autocast():
            return self.data.loss(model(x), y)

    def _grower(self) -> Grower:
        grow = self.experiment.grow
        assert grow is not None
        loader = DataLoader(
            self.dataset, sampler=BatchSampler(RandomSampler(self.dataset), self.batch_size, False), batch_size=None
        )
        return Grower(
            self.model,
            self.optimizer,
            loss=self.loss,
            data=loader,
            when=trigger(grow.when),
            how=built(grow.how, METHODS, "how"),
            where=built(grow.where, PLACES, "where"),
            care=[built(one, CARES, "care") for one in grow.care],
            amount=grow.amount,
            budget=Budget(**grow.budget.model_dump()),
            axes=grow.axes,
            round_to=grow.round_to,
            generator=torch.Generator().manual_seed(self.experiment.seed),
        )

    def _forward_flops(self) -> float:
        """Floating-point operations of one forward pass, per example."""
        structure = Structure(self.model, self.example)
        return flops(structure) / structure.batch

    def _sizes(self) -> dict[str, int]:
        return {name: axis.size for name, axis in find_axes(self.model, self.example).items()}

    def _steps(self) -> int:
        train = self.experiment.train
        if train.epochs is not None:
            return train.epochs * self.epoch_steps
        assert train.flops is not None
        return max(1, round(train.flops / (3 * self.forward_flops * self.batch_size)))

    def train(self, folder: Path) -> None:
        """Train to the end, saving to `folder` on the way; resumes from it if it holds a checkpoint.

        Raises:
            Interrupted: SIGINT or SIGTERM came; the checkpoint is complete.
        """
        if (folder / checkpoint.MANIFEST).exists():
            self._resume(folder)
        started = time.perf_counter() - self.progress.seconds
        handlers = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            saved = time.perf_counter()
            for batch in self._batches():
                self._step(batch)
                self.progress.seconds = time.perf_counter() - started
                if self.stopping or time.perf_counter() - saved > SAVE_SECONDS:
                    self._save(folder)
                    saved = time.perf_counter()
                if self.stopping:
                    raise Interrupted(f"stopped at step {self.progress.step} of {self.progress.steps}")
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _stop(self, *_: Any) -> None:
        self.stopping = True

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches from the present step on; the order depends on the seed and the epoch alone."""
        while self.progress.step < self.progress.steps:
            epoch, done = divmod(self.progress.step, self.epoch_steps)
            generator = torch.Generator().manual_seed(self.experiment.seed * 1_000_003 + epoch)
            order = torch.randperm(len(self.dataset), generator=generator)
            for chosen in order.split(self.batch_size)[done : done + self.progress.steps - self.progress.step]:
                yield self.data.x_train[chosen], self.data.y_train[chosen]

    def _step(self, batch: tuple[Tensor, Tensor]) -> None:
        progress = self.progress
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate(self.experiment, progress.step / progress.steps)
        self.model.train()
        loss = self.loss(self.model, batch)
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        self.optimizer.step()
        progress.step += 1
        progress.flops += 3 * self.forward_flops * len(batch[0])
        progress.loss = loss.item()
        if self.grower is not None:
            growth = self.grower.step(loss)
            if growth:
                progress.flops += growth.flops
                progress.sizes |= growth.after
                self.forward_flops = self._forward_flops()
        if progress.step % self.epoch_steps == 0 or progress.step == progress.steps:
            accuracy, test_loss = self.evaluate()
            progress.curve.append(
                {
                    "step": progress.step,
                    "flops": progress.flops,
                    "accuracy": accuracy,
                    "loss": test_loss,
                    "sizes": dict(progress.sizes),
                }
            )
        self.report(progress)

    @torch.no_grad()
    def evaluate(self) -> tuple[float | None, float]:
        """Test accuracy (None for regression) and test loss."""
        self.model.eval()
        hits, total = 0, 0.0
        for x, y in zip(self.data.x_test.split(512), self.data.y_test.split(512), strict=True):
            output, target = self.model(x.to(self.accelerator.device)), y.to(self.accelerator.device)
            hits += self.data.hits(output, target)
            total += self.data.loss(output, target).item() * len(x)
        accuracy = hits / self.data.y_test.numel() if self.data.task != "regression" else None
        return accuracy, total / len(self.data.x_test)

    def _save(self, folder: Path) -> None:
        config = json.dumps(self.experiment.model_dump(mode="json"))
        extra = {"progress": dataclasses.asdict(self.progress), "rng": torch.get_rng_state(), "config": config}
        checkpoint.save(folder, self.model, optimizer=self.optimizer, grower=self.grower, extra=extra)

    def _resume(self, folder: Path) -> None:
        extra = checkpoint.load_extra(folder)
        if extra is None or json.loads(extra["config"]) != self.experiment.model_dump(mode="json"):
            return  # left by a run of another configuration
        checkpoint.load(folder, self.model, optimizer=self.optimizer, grower=self.grower)
        self.progress = Progress(**extra["progress"])
        torch.set_rng_state(extra["rng"])
        self.forward_flops = self._forward_flops()

    def result(self) -> dict[str, Any]:
        """Everything worth keeping of a finished run, in plain types."""
        accuracy, loss = self.progress.curve[-1]["accuracy"], self.progress.curve[-1]["loss"]
        return {
            "accuracy": accuracy,
            "loss": loss,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "widths": self.progress.sizes,
            "growths": [growth.json() for growth in self.grower.history] if self.grower is not None else [],
            "training_flops": self.progress.flops,
            "growth_flops": self.grower.flops if self.grower is not None else 0,
            "steps": self.progress.steps,
            "seconds": self.progress.seconds,
            "seed": self.experiment.seed,
            "curve": self.progress.curve,
            "config": self.experiment.model_dump(mode="json"),
            "versions": {
                "meristem": meristem.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "hardware": {
                "device": str(self.accelerator.device),
                "name": torch.cuda.get_device_name()
                if torch.cuda.is_available()
                else platform.processor() or platform.machine(),
                "cores": os.cpu_count(),
                "threads": torch.get_num_threads(),
            },
        }


def run(experiment: Experiment, out: Path, name: str, report: Report = lambda progress: None) -> Path:
    """Run an experiment, or what is left of it; returns the path of its JSON file.

    A finished run is not run again. The checkpoint lies beside the result until the run is finished.
    """
    result = out / f"{name}_seed{experiment.seed}.json"
    if result.exists() and json.loads(result.read_text())["config"] == experiment.model_dump(mode="json"):
        return result
    folder = out / "checkpoints" / f"{name}_seed{experiment.seed}"
    running = Run(experiment, report)
    running.train(folder)
    out.mkdir(parents=True, exist_ok=True)
    draft = result.with_suffix(".json.part")
    draft.write_text(json.dumps(running.result(), indent=1) + "\n")
    os.replace(draft, result)
    shutil.rmtree(folder, ignore_errors=True)
    return result


def rate(experiment: Experiment, progress: float) -> float:
    """The learning rate at a fraction of training, as a multiple of its peak."""
    name, parameters = named(experiment.train.schedule, SCHEDULES, "schedule")
    warmup: float = parameters.get("warmup", 0.0)
    if progress < warmup:
        return max(progress / warmup, 1e-3)
    if name == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
    decay: float = parameters.get("decay", 0.3) if name == "wsd" else 0.0
    return 1.0 if progress < 1 - decay else (1 - progress) / decay


def _optimizer(experiment: Experiment, model: nn.Module) -> Optimizer:
    name, parameters = named(experiment.train.optimizer, OPTIMIZERS, "optimizer")
    kinds: dict[str, Callable[..., Optimizer]] = {
        "sgd": torch.optim.SGD,
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
    }
    try:
        optimizer = kinds[name](model.parameters(), **parameters)
    except TypeError as error:
        raise ConfigError(f"train.optimizer.{name}: {error}") from None
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer
