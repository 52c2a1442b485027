"""Growth in the Trainer of Hugging Face transformers, and so in TRL's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from meristem.checkpoint import regrow_
from meristem.core.errors import DataError
from meristem.grower import Grower
from meristem.integrations.following import (
    LINEAGE_FILE,
    figures,
    needs,
    read_lineage,
    write_lineage,
)
from meristem.lab.losses import Loss
from meristem.methods import watched
from meristem.structure.twin import map_tensors
from meristem.surgery.regrow import ends_of

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(needs("transformers", "transformers")) from error

_STATE = "meristem-grower.pt"


class GrowthTrainerCallback(TrainerCallback):
    """Grows a model while transformers' Trainer trains it.

    The Trainer's own optimizer follows, fused or not, and accumulation counts as the
    Trainer counts it. Checkpoints of a grown run hold its growths, and
    `train(resume_from_checkpoint=...)` gives a freshly built model their shapes.

    Args:
        loss: `loss(model, batch)`, a scalar; by default the loss that the model gives
            for the batch.
        data: A re-iterable of batches; by default the Trainer's training data.
        **options: What `meristem.Grower` takes: when, how, where, amount, budget, ...

    Attributes:
        grower: The `Grower`, once training has begun.

    Examples:
        >>> import meristem as ms  # doctest: +SKIP
        >>> growth = GrowthTrainerCallback(  # doctest: +SKIP
        ...     when=ms.when.Every(steps=500), how=ms.how.GradMax(), amount=64
        ... )
        >>> Trainer(model, args, train_dataset=data, callbacks=[growth])  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        loss: Loss | None = None,
        data: Iterable[Any] | None = None,
        **options: Any,
    ) -> None:
        if "loss" in watched(options["when"]):
            raise DataError(
                "the Trainer tells nobody the loss of a step, which this trigger watches. "
                "hint: let it watch the evaluation, as when.Plateau(of='metric')"
            )
        self.grower: Grower | None = None
        self._loss, self._data, self._options = loss, data, options

    def on_init_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Let the model take the shapes of a checkpoint that it is about to load."""
        model = given["model"]
        root = Path(args.output_dir)
        wanted = args.resume_from_checkpoint

        # A plain function: what hangs on a model is copied with it.
        def take_shapes(module: nn.Module, saved: Any, prefix: str, *_: Any) -> None:
            folder = _folder_of(saved, module, root, wanted) if not prefix else None
            if folder is not None:
                regrow_(module, read_lineage(folder))

        model.register_load_state_dict_pre_hook(take_shapes)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        data = self._data if self._data is not None else given["train_dataloader"]
        model = given["model"]
        self.grower = Grower(
            model,
            given["optimizer"],
            loss=_on_device(self._loss or _own_loss, model),
            data=data,
            accumulation=args.gradient_accumulation_steps,
            **self._options,
        )
        # A run that goes on has the clock of the one that it continues.
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        wanted = args.resume_from_checkpoint
        for place in (folder, Path(wanted) if isinstance(wanted, str) else folder):
            if state.global_step and (place / _STATE).is_file():
                saved = torch.load(place / _STATE, weights_only=True)
                self.grower.load_state_dict(saved)
                break

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        assert self.grower is not None
        self._told(self.grower.step(), state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        assert self.grower is not None
        self._told(self.grower.epoch(), state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        metrics = given.get("metrics") or {}
        loss = metrics.get("eval_loss")
        if self.grower is not None and loss is not None:
            self._told(self.grower.measured(loss), state, control)

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self.grower is None or not state.is_world_process_zero:
            return
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        write_lineage(folder, self.grower.model)
        torch.save(self.grower.state_dict(), folder / _STATE)

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        logs = given.get("logs")
        if logs is not None and self.grower is not None and self.grower.history:
            logs.update(figures(self.grower.history[-1]))

    def _told(self, growth: Any, state: Any, control: Any) -> None:
        if growth is not None:
            state.log_history.append({**figures(growth), "step": state.global_step})
            # Trackers hear of it with the next figures.
            control.should_log = True


def _own_loss(model: Any, batch: Any) -> Tensor:
    """The loss that a model gives for a batch with labels."""
    outputs = model(**batch)
    loss: Tensor = outputs["loss"] if isinstance(outputs, Mapping) else outputs[0]
    return loss


def _on_device(loss: Loss, model: nn.Module) -> Loss:
    def on_device(copied: nn.Module, batch: Any) -> Tensor:
        device = next(model.parameters()).device
        return loss(copied, map_tensors(dict(batch), lambda tensor: tensor.to(device)))

    return on_device


def _folder_of(
    saved: Mapping[str, Any], model: nn.Module, root: Path, wanted: Any
) -> Path | None:
    """The checkpoint that a state dict comes from, where its shapes are not the model's."""
    have = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    given = {name: tuple(t.shape) for name, t in saved.items()}
    if all(have.get(name) == shape for name, shape in given.items()):
        return None
    folders = [path.parent for path in root.glob(f"checkpoint-*/{LINEAGE_FILE}")]
    if isinstance(wanted, str):
        folders.insert(0, Path(wanted))
    for folder in folders:
        line = read_lineage(folder)
        names = set(line[-1]["parameters_after"]) if line else {""}
        ends = ends_of(line)
        fits = all(given.get(name) == tuple(end) for name, end in ends.items())
        if fits and names <= given.keys():
            return folder
    return None
