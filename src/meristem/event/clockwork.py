"""Keeps the training clock: steps, epochs, and what a trigger watches of the training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from meristem.methods import Clock, When, watched


class Clockwork:
    """Turns the clock of one training.

    Attributes:
        clock: Where training stands.
        metrics: Every metric so far, with the step at which it came.
    """

    def __init__(self, when: When, epoch_length: int | None) -> None:
        self.clock = Clock()
        self.metrics: list[tuple[int, float]] = []
        self.epoch_length = epoch_length
        self._trigger = type(when).__name__
        self._watched = watched(when)
        # Sum and number of the losses of this epoch.
        self._passing: tuple[Tensor | float, int] = (0.0, 0)

    def step(self, loss: Tensor | float | None, cost: float) -> None:
        """Count one optimizer step, and what it has cost."""
        if "loss" in self._watched:
            self._add(loss)
        step = self.clock.step + 1
        # An epoch is len(data) steps, until the user's loop says otherwise.
        ended = self.epoch_length is not None and step % self.epoch_length == 0
        self.clock = replace(
            self.clock,
            step=step,
            epoch=self.clock.epoch + int(ended),
            epoch_ended=ended,
            trained=self.clock.trained + cost,
        )
        if ended:
            self._close_epoch()

    def _add(self, loss: Tensor | float | None) -> None:
        if loss is None:
            raise ValueError(
                f"{self._trigger} watches the training loss: call grower.step(loss)"
            )
        total, number = self._passing
        value = loss.detach().float() if isinstance(loss, Tensor) else loss
        self._passing = (total + value, number + 1)

    def _close_epoch(self) -> None:
        total, number = self._passing
        if number:
            losses = (*self.clock.losses, float(total) / number)
            self.clock = replace(self.clock, losses=losses)
        self._passing = (0.0, 0)

    def end_epoch(self) -> bool:
        """Note that the user's loop has ended an epoch; whether that was news.

        Where its steps are no multiple of the length of the data (gradients are
        accumulated, the last batch is dropped), the loop knows better from here on.
        """
        if self.epoch_length is not None and self.clock.step % self.epoch_length == 0:
            return False
        self.epoch_length = None
        now = self.clock.epoch + 1
        self.clock = replace(self.clock, epoch=now, epoch_ended=True)
        self._close_epoch()
        return True

    def measured(self, metric: float) -> bool:
        """Note a metric; whether the trigger wants to know."""
        self.metrics.append((self.clock.step, metric))
        if "metric" not in self._watched:
            return False
        metrics = (*self.clock.metrics, metric)
        self.clock = replace(self.clock, metrics=metrics, measured=True)
        return True

    def settle(self) -> None:
        """Nothing has just ended or been measured any more."""
        self.clock = replace(self.clock, epoch_ended=False, measured=False)

    def checked(self, clock: Clock, flops: int, grown: bool) -> None:
        """Go on from a check, and what it has cost."""
        clock = replace(
            clock,
            growing=clock.growing + flops,
            # A check that cost nothing says nothing about the next one.
            latest=float(flops) or clock.latest,
        )
        if grown:
            clock = replace(clock, growths=clock.growths + 1, refusals=0, least=0.0)
            # What has stood still before says nothing about the larger net.
            clock = replace(clock, losses=(), metrics=())
        self.clock = clock

    def spent(self, flops: int) -> None:
        """Count what was done beside the checks; they begin anew."""
        growing = self.clock.growing + flops
        self.clock = replace(self.clock, growing=growing, refusals=0, least=0.0)

    def state_dict(self) -> dict[str, Any]:
        return {
            "clock": vars(self.clock).copy(),
            "epoch_length": self.epoch_length,
            "metrics": [list(entry) for entry in self.metrics],
            "passing": [float(self._passing[0]), self._passing[1]],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        read = dict(state["clock"])
        for name in ("losses", "metrics"):
            read[name] = tuple(read[name])
        self.clock = Clock(**read)
        self.epoch_length = state["epoch_length"]
        self.metrics = [(int(step), float(value)) for step, value in state["metrics"]]
        total, number = state["passing"]
        self._passing = (float(total), int(number))
