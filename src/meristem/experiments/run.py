"""The runner: one experiment, from its configuration to one JSON file.

A plain loop; started again, it resumes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import platform
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from filelock import FileLock, Timeout
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from meristem import checkpoint
from meristem.care import CARES
from meristem.core import VERSION
from meristem.core.budget import Budget
from meristem.core.errors import nearest
from meristem.core.ranks import ALONE, ranks_over
from meristem.event.growable import growable
from meristem.experiments import data as datasets
from meristem.experiments import models
from meristem.experiments.config import (
    OPTIMIZERS,
    SCHEDULES,
    ConfigError,
    Experiment,
    Grow,
    StagesTable,
    built,
    named,
    trigger,
)
from meristem.experiments.data import Batches, Data, as_input
from meristem.grower import Grower
from meristem.growing import listed_sizes
from meristem.how import METHODS
from meristem.lab.ledger import step_flops
from meristem.stages import ByHand, Stages
from meristem.statistics.health import health
from meristem.structure import structure_of
from meristem.structure.undisturbed import undisturbed
from meristem.where import PLACES

_LOG = logging.getLogger(__name__)
SAVE_SECONDS = 60.0
"""Longest time between two checkpoints."""
EVALUATION = 512
"""Examples per batch where nothing is trained."""

HEALTH_TARGETS = 100_000
"""Most training targets that the last look at the units reads: all images of the usual
sets, some pages of a text.
"""

Report = Callable[["Progress"], None]


class Interrupted(Exception):
    """The run was asked to stop; what it last saved is complete."""


@dataclasses.dataclass
class Progress:
    """Where a run stands; also what a resumed run starts from."""

    step: int = 0
    steps: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    loss: float | Tensor = math.nan
    curve: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    beside: str = ""


def _check_shares(experiment: Experiment, processes: int) -> None:
    if experiment.stages is not None:
        raise ConfigError(
            "stages are trained by one process; hint: start the run without torchrun or "
            "accelerate launch"
        )
    # Batches are of one size within one example: none may leave a process without any.
    if experiment.train.batch_size <= processes:
        raise ConfigError(
            f"train.batch_size must be greater than the number of processes, {processes}"
        )


class Shares:
    """Of every batch the part that this process trains on."""

    def __init__(self, batches: Batches, share: Callable[[Any], Any]) -> None:
        self._batches, self._share = batches, share

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        return map(self._share, self._batches)


@dataclasses.dataclass(frozen=True)
class Tracking:
    """A tracker of Accelerate that follows a run.

    Attributes:
        by: Its name, as "tensorboard", or a tracker.
        name: Of the run.
        folder: Where it writes.
    """

    by: Any
    name: str
    folder: Path


def _accelerator(experiment: Experiment, tracking: Tracking | None) -> Accelerator:
    accelerator = Accelerator(
        mixed_precision=experiment.train.precision,
        # Else several processes without an accelerator would not know each other.
        cpu=not torch.accelerator.is_available(),
        log_with=None if tracking is None else tracking.by,
        project_dir=None if tracking is None else tracking.folder,
    )
    if tracking is not None:
        if not accelerator.log_with:
            raise ConfigError(f"the tracker {tracking.by!r} is not installed")
        accelerator.init_trackers(tracking.name)
    return accelerator


class Run:
    """One experiment in progress."""

    def __init__(
        self,
        experiment: Experiment,
        report: Report = lambda progress: None,
        tracking: Tracking | None = None,
    ) -> None:
        self.experiment, self.report = experiment, report
        self.accelerator = _accelerator(experiment, tracking)
        # Under torchrun or accelerate launch every process trains on its share.
        self.ranks = ALONE
        if self.accelerator.num_processes > 1:
            self.ranks = ranks_over(dist.group.WORLD)
            _check_shares(experiment, self.accelerator.num_processes)
        name, options = experiment.data_options
        data = datasets.prepared(name, **options.model_dump())
        # Once, and not a batch at a step: a GPU would wait for the copies.
        self.data = data.to(self.accelerator.device)
        self.example = as_input(self.data.x_train[: min(8, len(self.data.x_train))])
        # The weights depend on the seed alone, not on the data.
        torch.manual_seed(experiment.seed)
        model = models.build(experiment.model, self.data)
        model = models.sized(model, self.example.cpu(), experiment.sizes)
        self.model = model.to(self.accelerator.device)
        self.optimizers = _optimizers(experiment, self.model)
        self.host: nn.Module = self.model
        if self.ranks.several:
            self.host = DistributedDataParallel(self.model)
        self.batches = self.data.batches(experiment.train.batch_size)
        self.progress = Progress(sizes=_sizes(self.model, self.example))
        self.first_sizes = dict(self.progress.sizes)
        self.stopping = False
        self.flops_per_example = self._flops_per_example()
        self.progress.steps = _steps(
            experiment, self.flops_per_example, len(self.batches), self.data
        )
        grow, stages = experiment.grow, experiment.stages
        self.grower = self._grower(grow) if grow is not None else None
        self.stages = self._stages(stages) if stages is not None else None

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of a batch, on the model's device."""
        x, y = batch
        with self.accelerator.autocast():
            return self.data.loss(model(x), y)

    def _share(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What this process trains on."""
        mine = slice(
            self.accelerator.process_index, None, self.accelerator.num_processes
        )
        x, y = batch
        return x[mine], y[mine]

    def _grower(self, grow: Grow) -> Grower:
        return Grower(
            self.host,
            self.optimizers,
            loss=self.loss,
            data=Shares(self.batches, self._share),
            when=trigger(grow.when, self.progress.steps),
            how=[
                built(one, METHODS, "how")
                for one in (grow.how if isinstance(grow.how, list) else [grow.how])
            ],
            where=built(grow.where or "uniform", PLACES, "where"),
            care=[built(one, CARES, "care") for one in grow.care],
            amount=grow.amount,
            budget=Budget(**grow.budget.model_dump()),
            axes=grow.axes,
            round_to=grow.round_to,
            generator=torch.Generator().manual_seed(self.experiment.seed),
            progress=self._beside,
        )

    def _stages(self, stages: StagesTable) -> Stages:
        assert self.data.held_out is not None
        grower = Grower(
            self.model,
            None,
            loss=self.loss,
            data=self.data.batches(stages.adjust_batch_size, shuffle=False),
            when=ByHand(),
            how=built(stages.how, METHODS, "how"),
            where=built(stages.where, PLACES, "where"),
            amount=stages.amount,
            budget=Budget(**stages.budget.model_dump()),
            axes=stages.axes,
            example=self.example,
            generator=torch.Generator().manual_seed(self.experiment.seed),
            progress=self._beside,
        )
        return Stages(
            grower,
            partial(_optimizer, self.experiment),
            data=self.batches,
            validation=Batches(*self.data.held_out, EVALUATION),
            epochs=stages.epochs,
            patience=stages.patience,
            last_patience=stages.last_patience,
            report=self._epoch_ended,
        )

    def _beside(self, phase: str, done: int, total: int | None) -> None:
        """Tell of training on the side; a growth that is interrupted has changed
        nothing.
        """
        self.progress.beside = f"{phase} {done}/{total or '?'}"
        self.report(self.progress)
        self.progress.beside = ""
        if self.stopping:
            raise Interrupted(
                "stopped during a growth, which is dropped; the run goes on from its "
                "last checkpoint"
            )

    def _flops_per_example(self) -> float:
        """Floating-point operations of a training step at the present size, per
        example.
        """
        return step_flops(
            self.model,
            self.loss,
            (as_input(self.data.x_train[:8]), as_input(self.data.y_train[:8])),
        )

    def train(self, folder: Path) -> None:
        """Train to the end, saving to `folder` on the way; resumes from it if it holds
        a checkpoint.

        Raises:
            Interrupted: SIGINT or SIGTERM came; the checkpoint is complete.
        """
        if (folder / checkpoint.MANIFEST).exists():
            self._resume(folder)
        self._folder, self._saved = folder, time.perf_counter()
        self._started = time.perf_counter() - self.progress.seconds
        # A second signal while saving finds the flag set, and waits.
        handlers = {
            number: signal.signal(number, self._stop)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            if self.stages is not None:
                self._train_stages(self.stages)
            else:
                for batch in self._batches():
                    self._step(batch)
                    self._save_if_due()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _stop(self, *_: Any) -> None:
        self.stopping = True

    def _save_if_due(self) -> None:
        self.progress.seconds = time.perf_counter() - self._started
        is_due = time.perf_counter() - self._saved > SAVE_SECONDS
        if self.ranks.several:
            told = self.ranks.gather((self.stopping, is_due))
            self.stopping = any(stops for stops, _ in told)
            is_due = told[0][1]
        if self.stopping or is_due:
            self._save(self._folder)
            self._saved = time.perf_counter()
        if self.stopping:
            raise Interrupted(
                f"stopped at step {self.progress.step} of {self.progress.steps}"
            )

    def _train_stages(self, stages: Stages) -> None:
        progress = self.progress
        for stage in stages:
            progress.flops += stage.flops
            progress.sizes = dict(stage.sizes)
            self._record()
            progress.curve[-1] |= {
                "validation": stage.validation,
                "epochs": stage.epochs,
                "best_epoch": stage.best_epoch,
            }
            progress.curve[-1]["health"] = health_of(self)
            self._save(self._folder)
            self.report(progress)

    def _epoch_ended(self, stages: Stages) -> None:
        self.progress.step += len(self.batches)
        self.progress.loss = stages.curve[-1][0]
        self.report(self.progress)
        self._save_if_due()

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches from the present step on; the order depends on the seed and the epoch
        alone.
        """
        while self.progress.step < self.progress.steps:
            epoch, done = divmod(self.progress.step, len(self.batches))
            # An odd factor keeps epochs of neighbouring seeds apart.
            generator = torch.Generator().manual_seed(
                self.experiment.seed * 1_000_003 + epoch
            )
            yield from islice(
                self.batches.epoch(generator, done),
                self.progress.steps - self.progress.step,
            )

    def _step(self, batch: tuple[Tensor, Tensor]) -> None:
        progress = self.progress
        share_of_peak = rate(self.experiment, progress.step / progress.steps)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * share_of_peak
        self.model.train()
        share = self._share(batch)
        loss = self.loss(self.host, share)
        # The mean over the ranks is that over the batch, however it is shared out.
        weight = len(share[0]) * self.accelerator.num_processes / len(batch[0])
        self.model.zero_grad()
        self.accelerator.backward(loss * weight)
        if self.experiment.train.clip is not None:
            self.accelerator.clip_grad_norm_(
                self.model.parameters(), self.experiment.train.clip
            )
        for optimizer in self.optimizers:
            optimizer.step()
        progress.step += 1
        progress.flops += self.flops_per_example * len(batch[0])
        progress.loss = loss.detach()
        if self.grower is not None:
            growth = self.grower.step(loss)
            if growth:
                progress.flops += growth.flops
                progress.sizes |= growth.after
                self.flops_per_example = self._flops_per_example()
        if (
            progress.step % (self.experiment.train.evaluate or len(self.batches)) == 0
            or progress.step == progress.steps
        ):
            self._record()
        self.report(progress)

    def _record(self) -> None:
        """Add a point to the curve."""
        progress = self.progress
        model, data = self.model, self.data
        accuracy, loss = scores(model, data, data.x_test, data.y_test)
        point = {
            "step": progress.step,
            "flops": progress.flops,
            "accuracy": accuracy,
            "loss": loss,
        }
        if data.held_out is not None:
            point["validation"] = scores(model, data, *data.held_out)[1]
        progress.curve.append({**point, "sizes": dict(progress.sizes)})
        self.accelerator.log(_figures(progress), step=progress.step)

    def _save(self, folder: Path) -> None:
        config = json.dumps(self.experiment.model_dump(mode="json"))
        self.progress.loss = float(self.progress.loss)
        extra = {
            "progress": dataclasses.asdict(self.progress),
            "rng": torch.get_rng_state(),
            "config": config,
        }
        if self.stages is not None:
            extra["stages"] = self.stages.state_dict()
        if self.accelerator.is_main_process:
            checkpoint.save(
                folder,
                self.model,
                optimizer=self._trained_by(),
                grower=self.grower,
                extra=extra,
            )
        self.accelerator.wait_for_everyone()

    def _trained_by(self) -> Sequence[Optimizer]:
        """What holds the state now; stages make a fresh optimizer each."""
        return [self.stages.optimizer] if self.stages is not None else self.optimizers

    def _resume(self, folder: Path) -> None:
        extra = checkpoint.load_extra(folder)
        if extra is None or not _same(json.loads(extra["config"]), self.experiment):
            return  # written by something else
        if self.stages is not None:
            self.stages.load_state_dict(extra["stages"])
        checkpoint.load(
            folder, self.host, optimizer=self._trained_by(), grower=self.grower
        )
        self.progress = Progress(**extra["progress"])
        torch.set_rng_state(extra["rng"])
        self.flops_per_example = self._flops_per_example()


@torch.no_grad()
def scores(
    model: nn.Module, data: Data, inputs: Tensor, targets: Tensor
) -> tuple[float | None, float]:
    """Accuracy (None for regression) and loss."""
    model.eval()
    hits, total = 0, 0.0
    for x, y in Batches(inputs, targets, EVALUATION):
        output = model(x)
        hits += data.hits(output, y)
        total += data.loss(output, y).item() * len(x)
    accuracy = hits / targets.numel() if data.task != "regression" else None
    return accuracy, total / len(inputs)


def _figures(progress: Progress) -> dict[str, float]:
    """The last point of a curve, as trackers take it."""
    point = progress.curve[-1]
    figures = {f"size/{name}": float(size) for name, size in progress.sizes.items()}
    for key in ("flops", "accuracy", "loss", "validation"):
        if point.get(key) is not None:
            figures[key] = point[key]
    return figures


def health_of(run: Run) -> dict[str, dict[str, dict[str, float]]]:
    """Health over the un-augmented training data.

    Of all units and blocks, and of the units that have grown.
    """
    data = run.data
    if not math.isfinite(run.progress.curve[-1]["loss"]):
        return {}  # a net that has diverged has no health to look at
    some = HEALTH_TARGETS // max(data.y_train[0].numel(), 1)
    plain = Batches(data.x_train[:some], data.y_train[:some], EVALUATION)
    new = {}
    for name, axis in growable(structure_of(run.model, run.example)).items():
        first = run.first_sizes.get(name, axis.size)
        if axis.slots and axis.size > first:
            new[name] = range(first, axis.size)
    looks: dict[str, dict[str, range] | None] = {"all": None}
    if new:
        looks["new"] = new
    found = {}
    for name, units in looks.items():
        found[name] = health(
            run.model, run.example, loss=run.loss, data=plain, units=units
        )
    return found


def result_of(run: Run) -> dict[str, Any]:
    """Everything worth keeping of a finished run, in plain types."""
    progress = run.progress
    last = progress.curve[-1]
    grower = run.stages.grower if run.stages is not None else run.grower
    growths = grower.history if grower is not None else []
    processor = platform.processor() or platform.machine()
    cuda = torch.cuda.is_available()
    return {
        "accuracy": last["accuracy"],
        "loss": last["loss"],
        "validation": last.get("validation"),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "widths": progress.sizes,
        "growths": [growth.json() for growth in growths],
        "health": last["health"] if "health" in last else health_of(run),
        "training_flops": progress.flops,
        "growth_flops": grower.flops if grower is not None else 0,
        "steps": progress.step,
        "seconds": progress.seconds,
        "seed": run.experiment.seed,
        "curve": progress.curve,
        "config": run.experiment.model_dump(mode="json"),
        "versions": {
            "meristem": VERSION,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "processes": run.accelerator.num_processes,
        "hardware": {
            "device": str(run.accelerator.device),
            "name": torch.cuda.get_device_name() if cuda else processor,
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
    }


def run(
    experiment: Experiment,
    out: Path,
    name: str,
    report: Report = lambda progress: None,
    track: Any = None,
) -> Path:
    """Run an experiment, or what is left of it; returns the path of its JSON file.

    A finished run is not run again. The checkpoint lies beside the result until the run
    is finished. `track` names a tracker of Accelerate ("tensorboard"), which writes to
    the folder `tracking`.

    Raises:
        ConfigError: The result of another configuration stands there.
    """
    result = _result(experiment, out, name)
    with _lock(result):
        if finished_before(experiment, out, name) is None:
            # Of one configuration: after an edit of the file another run begins.
            folder = out / "checkpoints" / f"{result.stem}-{digest(experiment)}"
            tracking = None
            if track is not None:
                tracking = Tracking(track, result.stem, out / "tracking")
            running = Run(experiment, report, tracking)
            try:
                running.train(folder)
            finally:
                for tracker in running.accelerator.trackers:
                    tracker.finish()
            found = result_of(running)
            if running.accelerator.is_main_process:
                draft = result.with_suffix(".json.part")
                draft.write_text(json.dumps(found, indent=1) + "\n")
                os.replace(draft, result)
                shutil.rmtree(folder, ignore_errors=True)
            running.accelerator.wait_for_everyone()
    return result


def sizes_after(sizes: Mapping[str, int], result: Mapping[str, Any]) -> dict[str, int]:
    """The sizes that an experiment names, with those that the growths of its run left."""
    found = dict(sizes)
    for growth in result["growths"]:
        found |= growth["after"]
    return found


def digest(experiment: Experiment) -> str:
    """Eight characters that differ where two experiments do."""
    asked = json.dumps(experiment.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(asked.encode()).hexdigest()[:8]


@contextmanager
def _lock(result: Path) -> Iterator[None]:
    """Within, no other program works on the same result; one that waited finds it done.

    Also the processes that a killed launcher leaves behind are waited for: they go on.
    """
    processes = PartialState(cpu=not torch.accelerator.is_available())
    path = result.parent / "locks" / f"{result.stem}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        if processes.is_main_process:
            lock = FileLock(path)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                _LOG.warning("another process works on %s; waiting for it", result)
                lock.acquire()
            held.callback(lock.release)
        processes.wait_for_everyone()
        yield


def _result(experiment: Experiment, out: Path, name: str) -> Path:
    return out / f"{name}_seed{experiment.seed}.json"


def finished_before(experiment: Experiment, out: Path, name: str) -> Path | None:
    """The result of an experiment, where it stands there already.

    Raises:
        ConfigError: What stands there is the result of another configuration, or none.
    """
    result = _result(experiment, out, name)
    if not result.exists():
        return None
    try:
        config = json.loads(result.read_text())["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{result} is not the result of a run ({type(error).__name__}: {error}). "
            "hint: move it away"
        ) from None
    if not _same(config, experiment):
        raise ConfigError(
            f"{result} holds the result of another configuration. hint: --out names "
            "another folder; or move it away"
        )
    return result


def _same(config: Any, experiment: Experiment) -> bool:
    """Whether a stored configuration asks for this experiment; what it does not say yet
    has its default.
    """
    try:
        return Experiment.model_validate(config) == experiment
    except ValidationError:
        return False


def _sizes(model: nn.Module, example: Tensor) -> dict[str, int]:
    with undisturbed():
        return listed_sizes(structure_of(model, example))


def _steps(
    experiment: Experiment, flops_per_example: float, batches: int, data: Data
) -> int:
    """Steps of the whole run; with stages, the most that it can take."""
    train = experiment.train
    if experiment.stages is not None:
        stages = len(experiment.stages.amount) + 1
        return stages * experiment.stages.epochs * batches
    if train.epochs is not None:
        return train.epochs * batches
    if train.steps is not None:
        return train.steps
    assert train.flops is not None
    if 2 * train.flops < flops_per_example * train.batch_size:
        raise ConfigError(
            f"train.flops = {train.flops:.3g} is less than half a step of this net, "
            f"{flops_per_example * train.batch_size:.3g}"
        )
    epochs, rest = divmod(train.flops / flops_per_example, len(data.x_train))
    return max(1, int(epochs) * batches + round(rest / train.batch_size))


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


def _optimizers(experiment: Experiment, model: nn.Module) -> list[Optimizer]:
    """The optimizer of a net; with muon two, of which AdamW has all but the matrices of
    the hidden layers.

    Raises:
        ConfigError: A parameter that the optimizer does not have, or no such matrix.
    """
    name, settings = named(experiment.train.optimizer, OPTIMIZERS, "optimizer")
    if name != "muon":
        return [_optimizer(experiment, model.parameters())]
    matrices = models.hidden_matrices(model)
    if not matrices:
        raise ConfigError(
            "train.optimizer = 'muon' trains the matrices of hidden linear layers, and "
            "this net has none. hint: adamw"
        )
    for key in settings:
        if key not in MUON_KEYS:
            raise ConfigError(
                f"train.optimizer.muon has no parameter {key!r}."
                f"{nearest(key, MUON_KEYS)} Known: {', '.join(MUON_KEYS)}"
            )
    chosen = {id(matrix) for matrix in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        _made("muon", _part(settings, "muon") | MUON, matrices),
        _made("adamw", _part(settings, "adamw"), rest),
    ]


def _part(settings: Mapping[str, Any], optimizer: str) -> dict[str, Any]:
    """What of muon's parameters one of its two optimizers gets."""
    part = {"weight_decay": 0.1}
    for key, value in settings.items():
        if MUON_KEYS[key] in ("both", optimizer):
            part[key] = value
    return part


def _optimizer(experiment: Experiment, parameters: Iterable[Tensor]) -> Optimizer:
    name, settings = named(experiment.train.optimizer, OPTIMIZERS, "optimizer")
    return _made(name, settings, parameters)


MUON_KEYS = {
    "lr": "both",
    "weight_decay": "both",
    "momentum": "muon",
    "nesterov": "muon",
    "ns_steps": "muon",
    "betas": "adamw",
    "eps": "adamw",
}
"""Which of the two optimizers a parameter is for."""
MUON = {"adjust_lr_fn": "match_rms_adamw"}
"""Steps as large as AdamW's, so that one learning rate does for both."""
CLASSES = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "muon": "Muon"}


def _made(
    name: str, settings: Mapping[str, Any], parameters: Iterable[Tensor]
) -> Optimizer:
    """One optimizer of torch, whose groups know their peak rate."""
    kind = getattr(torch.optim, CLASSES[name], None)
    if kind is None:
        raise ConfigError(
            f"train.optimizer = {name!r} is not in torch {torch.__version__}. hint: torch "
            "2.9 or later"
        )
    try:
        optimizer: Optimizer = kind(parameters, **settings)
    except TypeError as error:
        raise ConfigError(f"train.optimizer.{name}: {error}") from None
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer
