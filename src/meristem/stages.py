"""Training in stages, as the SWE + SVoD paper runs it: train to early stop, keep the
best weights, expand, train on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from meristem.core.errors import DataError
from meristem.core.growth import Growth
from meristem.grower import Grower
from meristem.growing import listed_sizes
from meristem.lab.batches import check_reiterable, growth_batches
from meristem.lab.ledger import batch_size, step_flops
from meristem.methods import Clock
from meristem.structure.undisturbed import undisturbed

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


@dataclass(frozen=True)
class Stage:
    """One stage that has ended; the model holds its best weights.

    Attributes:
        index: 0 for the small net.
        growth: What it began with; None for stage 0.
        sizes: Sizes by axis.
        validation: Loss of the best weights on the validation data.
        epochs, best_epoch: Epochs trained, and the one (from 1) that was best.
        flops: Floating-point operations of training it and of the growth before it.
        curve: (training loss, validation loss) of every epoch.
    """

    index: int
    growth: Growth | None
    sizes: dict[str, int]
    validation: float
    epochs: int
    best_epoch: int
    flops: float
    curve: tuple[tuple[float, float], ...]


class ByHand:
    """A trigger that is never due: growth is called for."""

    def due(self, clock: Clock) -> bool:
        return False


class Stages(Iterator[Stage]):
    """Iterate to train: yields a `Stage` each time one has ended.

    See `meristem.recipes.swe_svod_stages`.

    Args:
        grower: What grows the model, by hand; its amounts are a list, one per growth.
        make_optimizer: Called with the parameters at the start of every stage.
        data: Training batches, read once per epoch.
        validation: Batches for early stopping.
        epochs: Most epochs of a stage.
        patience: Epochs without improvement that end a stage.
        last_patience: The same for the last stage.
        report: Called with the stages after every epoch.

    Attributes:
        model: The model.
        optimizer: That of the present stage.
        grower: What grows it; `grower.history` lists the growths.
        index, epoch: The present stage, and the epochs it has been trained for.
    """

    def __init__(
        self,
        grower: Grower,
        make_optimizer: MakeOptimizer,
        *,
        data: Iterable[Any],
        validation: Iterable[Any],
        epochs: int = 250,
        patience: int = 20,
        last_patience: int | None = None,
        report: Callable[[Stages], None] = lambda stages: None,
    ) -> None:
        lengths = {"epochs": epochs, "patience": patience}
        if last_patience is not None:
            lengths["last_patience"] = last_patience
        for name, value in lengths.items():
            if value < 1:
                raise ValueError(f"{name} must be an int in [1, inf); got {value}")
        check_reiterable(data)
        check_reiterable(validation)
        amount = grower.settings.amount
        if not isinstance(amount, Sequence):
            raise TypeError(
                f"stages take a list of amounts, one per growth; got {amount!r}"
            )
        self.grower, self.model, self.loss = grower, grower.model, grower.loss
        self.data, self.validation, self.report = data, validation, report
        self.growths = len(amount)
        self.epochs, self.patience = epochs, patience
        self.last_patience = last_patience if last_patience is not None else patience
        self._make_optimizer = make_optimizer
        self.index = 0
        self._begin()

    def _begin(self) -> None:
        """A fresh optimizer and a clean record."""
        self.optimizer = self._make_optimizer(self.model.parameters())
        self.epoch, self.best_epoch = 0, 0
        self.best = float("inf")
        self.flops = 0.0
        self._per_example: float | None = None
        self.curve: list[tuple[float, float]] = []
        self._best_weights = copy.deepcopy(self.model.state_dict())
        self._ended = False

    def __next__(self) -> Stage:
        if self._ended:
            if self.index == self.growths or self.grower.grow() is None:
                raise StopIteration
            self.index += 1
            self._begin()
        # The paper waits longer in the last stage.
        is_last = self.index == self.growths
        patience = self.last_patience if is_last else self.patience
        while self.epoch < self.epochs and self.epoch - self.best_epoch < patience:
            self._train_epoch()
            self.report(self)
        if not self.best_epoch:
            raise DataError(
                "the validation loss was not finite in any epoch of stage "
                f"{self.index}; the model holds its last weights. hint: a smaller "
                "learning rate"
            )
        self.model.load_state_dict(self._best_weights)
        self._ended = True
        return self._stage()

    def _stage(self) -> Stage:
        """The record of the stage that has ended."""
        growth = None
        spent = self.flops
        if self.index:
            growth = self.grower.history[-1]
            spent += growth.flops
            self.grower.calendar.measure(growth, "trained")
        with undisturbed():
            sizes = listed_sizes(self.grower.structure())
        return Stage(
            self.index,
            growth,
            sizes,
            self.best,
            self.epoch,
            self.best_epoch,
            spent,
            tuple(self.curve),
        )

    def _train_epoch(self) -> None:
        if self._per_example is None:
            # The cost of a step depends on shapes alone; any batch will do.
            (batch,) = growth_batches(self.data, 1, torch.Generator().manual_seed(0))
            self._per_example = step_flops(self.model, self.loss, batch)
        self.model.train()
        total, seen = 0.0, 0
        for batch in self.data:
            loss = self.loss(self.model, batch)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            size = batch_size(batch)
            total, seen = total + loss.item() * size, seen + size
            self.flops += self._per_example * size
            self.grower.step(loss.detach())
        validation = self._validate()
        self.epoch += 1
        self.curve.append((total / max(seen, 1), validation))
        # NaN is never smaller: a diverged epoch is never the best.
        if validation < self.best:
            self.best, self.best_epoch = validation, self.epoch
            self._best_weights = copy.deepcopy(self.model.state_dict())

    @torch.no_grad()
    def _validate(self) -> float:
        self.model.eval()
        total, seen = 0.0, 0
        for batch in self.validation:
            size = batch_size(batch)
            total, seen = (
                total + self.loss(self.model, batch).item() * size,
                seen + size,
            )
        if not seen:
            raise DataError(
                "validation is empty: early stopping needs at least one batch"
            )
        return total / seen

    def state_dict(self) -> dict[str, Any]:
        """All but the model's present weights and the optimizer's state, which
        `meristem.save` takes.
        """
        return {
            "index": self.index,
            "epoch": self.epoch,
            "best_epoch": self.best_epoch,
            "best": self.best,
            "flops": self.flops,
            "curve": [list(pair) for pair in self.curve],
            "best_weights": self._best_weights,
            "ended": self._ended,
            "grower": self.grower.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; load model and optimizer with
        `meristem.load` afterwards.
        """
        self.index, self.epoch, self.best_epoch = (
            state["index"],
            state["epoch"],
            state["best_epoch"],
        )
        self.best, self.flops, self._ended = (
            state["best"],
            state["flops"],
            state["ended"],
        )
        self.curve = [(float(a), float(b)) for a, b in state["curve"]]
        self._best_weights = dict(state["best_weights"])
        self.grower.load_state_dict(state["grower"])
