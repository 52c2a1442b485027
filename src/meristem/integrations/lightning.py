"""Growth in Lightning's Trainer."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from meristem.checkpoint import regrow_
from meristem.core.errors import DataError
from meristem.grower import Grower
from meristem.integrations.following import figures, follow, needs
from meristem.lab.losses import Loss
from meristem.surgery.lineage import lineage

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.utilities import move_data_to_device
except ImportError as error:
    raise ImportError(needs("lightning", "lightning")) from error

_KEY = "meristem"
Module = TypeVar("Module", bound=LightningModule)


class GrowthCallback(Callback):
    """Grows a LightningModule while a Trainer trains it.

    Automatic and manual optimization, accumulation, mixed precision and DDP are the
    Trainer's affair; averages of Lightning's WeightAveraging follow; loggers get widths
    and parameters; a run resumes by `fit(ckpt_path=...)`.

    Args:
        loss: `loss(module, batch)`, a scalar; by default what `training_step` returns.
        data: A re-iterable of batches; by default the Trainer's training data.
        monitor: The logged metric that triggers watch, taken after every validation.
        **options: What `meristem.Grower` takes: when, how, where, amount, budget, ...

    Attributes:
        grower: The `Grower`, once training has begun.

    Examples:
        >>> import meristem as ms  # doctest: +SKIP
        >>> growth = GrowthCallback(  # doctest: +SKIP
        ...     when=ms.when.Every(epochs=5), how=ms.how.GradMax(), amount=32
        ... )
        >>> Trainer(callbacks=[growth]).fit(module, loader)  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        loss: Loss | None = None,
        data: Iterable[Any] | None = None,
        monitor: str = "val_loss",
        **options: Any,
    ) -> None:
        self._monitor = monitor
        self.grower: Grower | None = None
        self._loss, self._data, self._options = loss, data, options
        self._state: Mapping[str, Any] | None = None
        self._steps = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the module take the shapes of a checkpoint before it loads the weights."""
        if stage == "fit":
            self.grower = None  # of another fit
        own = pl_module.on_load_checkpoint

        # A plain function: what hangs on a module is copied with it.
        def take_shapes(checkpoint: dict[str, Any]) -> None:
            for line in _lines(checkpoint):
                for module in (pl_module, *_averages(trainer)):
                    regrow_(module, line)
            own(checkpoint)

        pl_module.on_load_checkpoint = take_shapes  # type: ignore[method-assign]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        vars(pl_module).pop("on_load_checkpoint", None)
        data = self._data if self._data is not None else trainer.train_dataloader
        if data is None:
            raise DataError("the Trainer has no training data: pass data=")
        with _without_trainer(pl_module):
            self.grower = Grower(
                pl_module,
                list(trainer.optimizers),
                loss=self._on_device(pl_module),
                data=data,
                accumulation=trainer.accumulate_grad_batches,
                **self._options,
            )
            if self._state is not None:
                self.grower.load_state_dict(self._state)
                self._state = None
        self._steps = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        # A batch whose gradients only accumulate is no step.
        if trainer.global_step == self._steps:
            return
        self._steps = trainer.global_step
        value = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        grower = self._running()
        with _without_trainer(pl_module):
            growth = grower.step(value if isinstance(value, Tensor) else None)
        self._told(growth, trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with _without_trainer(pl_module):
            growth = self._running().epoch()
        self._told(growth, trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        value = trainer.callback_metrics.get(self._monitor)
        # The sanity check comes before training.
        if self.grower is None or value is None or trainer.sanity_checking:
            return
        with _without_trainer(pl_module):
            growth = self.grower.measured(float(value))
        self._told(growth, trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        if self.grower is None:
            return {}
        return {_KEY: lineage(self.grower.model), "grower": self.grower.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict.get("grower")

    def _running(self) -> Grower:
        assert self.grower is not None
        return self.grower

    def _told(self, growth: Any, trainer: Trainer, pl_module: LightningModule) -> None:
        if growth is None:
            return
        for average in _averages(trainer):
            with _without_trainer(pl_module), _without_trainer(average):
                follow(growth, pl_module, average)
        for logger in trainer.loggers:
            logger.log_metrics(figures(growth), step=trainer.global_step)

    def _on_device(self, pl_module: LightningModule) -> Loss:
        loss = self._loss or _training_step

        def on_device(module: nn.Module, batch: Any) -> Tensor:
            return loss(module, move_data_to_device(batch, pl_module.device))

        return on_device


def _averages(trainer: Trainer) -> list[nn.Module]:
    """The averages of the weights that Lightning's WeightAveraging keeps."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    kept = [getattr(one, "_average_model", None) for one in callbacks]
    return [one.get_submodule("module") for one in kept if one is not None]


def _training_step(module: Any, batch: Any) -> Tensor:
    """The loss that a module's own training step gives."""
    if not module.automatic_optimization:
        raise DataError(
            "a training_step that steps by itself gives no loss to measure on. hint: "
            "pass loss= to GrowthCallback"
        )
    value = module.training_step(batch, 0)
    found: Tensor = value["loss"] if isinstance(value, Mapping) else value
    return found


@contextlib.contextmanager
def _without_trainer(module: Any) -> Iterator[None]:
    """Within, a module knows no Trainer: copies of it would copy all of the run, and what
    they log is nobody's.
    """
    held = [(one, one._trainer) for one in module.modules() if hasattr(one, "_trainer")]
    for one, _ in held:
        one._trainer = None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You are trying to `self.log")
            yield
    finally:
        for one, trainer in held:
            one._trainer = trainer


def load_from_checkpoint(kind: type[Module], path: Any, **options: Any) -> Module:
    """`kind.load_from_checkpoint(path, **options)` for a module that has grown."""
    saved = torch.load(path, map_location="cpu", weights_only=False)

    def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        for line in _lines(saved):
            regrow_(self, line)
        kind.on_load_checkpoint(self, checkpoint)

    hook = {"on_load_checkpoint": on_load_checkpoint}
    grown: Any = type(kind.__name__, (kind,), hook)
    module: Module = grown.load_from_checkpoint(path, **options)
    module.__class__ = kind
    return module


def _lines(checkpoint: Mapping[str, Any]) -> list[Any]:
    """The lineages in a checkpoint: that of the callback, if there was one."""
    states = checkpoint.get("callbacks", {}).values()
    return [one[_KEY] for one in states if isinstance(one, Mapping) and _KEY in one]
