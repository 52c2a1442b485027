"""Looks at new units after their growth: when they are due, and what they found."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from meristem.core.errors import GrowthRefused
from meristem.core.growth import Growth
from meristem.core.ranks import ALONE, Ranks
from meristem.event.steps import HEALTH_BATCHES
from meristem.lab.batches import growth_batches
from meristem.lab.ledger import counting
from meristem.lab.losses import Loss
from meristem.statistics.health import look
from meristem.structure import Structure
from meristem.structure.undisturbed import undisturbed

MOMENTS = (1, 10, 100, 1000)
"""Steps after a growth at which the health of its units is measured."""
BEFORE, RECOVERY = 20, 200
"""Steps that the loss before a growth is averaged over, and steps after it in which a
spike is looked for.
"""
COSTLY = 0.05
"""A growth is told of whose loss stays above that before by this share."""
_LOG = logging.getLogger(__name__)
# Steps of the running mean that tells a spike from noise.
_SMOOTHED = 10


class LossRecord:
    """The last training losses, of which a growth's spike is read."""

    def __init__(self) -> None:
        self._losses: deque[Tensor | float] = deque(maxlen=BEFORE + RECOVERY)

    def add(self, loss: Tensor | float) -> None:
        self._losses.append(loss.detach() if isinstance(loss, Tensor) else loss)

    def numbers(self) -> list[float]:
        return [float(loss) for loss in self._losses]

    def restore(self, losses: Sequence[float]) -> None:
        self._losses.clear()
        self._losses.extend(float(loss) for loss in losses)

    def spike(self) -> dict[str, float | None] | None:
        """The loss before a growth that was `RECOVERY` steps ago, and what followed.

        Returns:
            `before`, its mean; `noise`, the standard deviation of a running mean of the
            losses before; `spike`, how far the running mean rose above `before`; and
            `least`, how far it stayed above at its lowest: noise, spike and least as
            shares of `before`. `steps_to_recover` is the step at which the running mean
            met `before` again. None where too few losses are known.
        """
        # Without the steps before the growth there is nothing to compare with.
        if len(self._losses) != self._losses.maxlen:
            return None
        losses = self.numbers()
        earlier, after = losses[:BEFORE], losses[BEFORE:]
        before = fmean(earlier)
        scale = abs(before) or 1.0
        # A running mean: single batches of a noisy loss are no spike.
        means = []
        for start in range(len(after) - _SMOOTHED + 1):
            means.append(fmean(after[start : start + _SMOOTHED]))
        recovered = None
        for start, mean in enumerate(means):
            if mean <= before:
                recovered = start + _SMOOTHED
                break
        return {
            "before": before,
            "noise": stdev(earlier) / math.sqrt(_SMOOTHED) / scale,
            "spike": (max(means) - before) / scale,
            "least": (min(means) - before) / scale,
            "steps_to_recover": recovered,
        }


class Curve:
    """The training loss of a whole run, in few points: means over as many steps as keep
    their number below `LIMIT`.
    """

    LIMIT = 512

    def __init__(self) -> None:
        self._means: list[tuple[int, Tensor | float]] = []
        self._width = 1
        self._sum: Tensor | float = 0.0
        self._count = 0

    def add(self, step: int, loss: Tensor | float) -> None:
        """One more loss; on a device it is not waited for."""
        # Half precision cannot add up many.
        value = loss.detach().float() if isinstance(loss, Tensor) else loss
        self._sum = self._sum + value
        self._count += 1
        if self._count < self._width:
            return
        self._means.append((step, self._sum / self._count))
        self._sum, self._count = 0.0, 0
        if len(self._means) >= self.LIMIT:
            pairs = zip(self._means[::2], self._means[1::2], strict=True)
            self._means = [(step, (a + b) / 2) for (_, a), (step, b) in pairs]
            self._width *= 2

    def points(self) -> list[tuple[int, float]]:
        """Steps, and the mean loss of those up to them."""
        return [(step, float(mean)) for step, mean in self._means]

    def state_dict(self) -> dict[str, Any]:
        return {
            "points": self.points(),
            "width": self._width,
            "sum": float(self._sum),
            "count": self._count,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._means = [(int(step), float(mean)) for step, mean in state["points"]]
        self._width, self._count = int(state["width"]), int(state["count"])
        self._sum = float(state["sum"])


class Calendar:
    """When the units of past growths are looked at, and what was found.

    Attributes:
        history: Every growth so far.
        losses: The last training losses.
        curve: The training loss of the whole run.
    """

    def __init__(
        self,
        structure: Callable[[], Structure],
        loss: Loss,
        data: Iterable[Any],
        generator: torch.Generator,
        ranks: Ranks = ALONE,
    ) -> None:
        self.history: list[Growth] = []
        self.losses = LossRecord()
        self.curve = Curve()
        self._structure, self._loss = structure, loss
        self._data, self._generator = data, generator
        self._ranks = ranks

    def heard(self, step: int, loss: Tensor | float) -> None:
        """Keep the training loss after so many steps."""
        self.losses.add(loss)
        self.curve.add(step, loss)

    def turn(self, step: int) -> None:
        """Complete the health of growths one of whose moments is now."""
        for growth in self.history:
            age = step - growth.step if growth.step is not None else 0
            if age in MOMENTS and "pruned" not in growth.health:
                self.measure(growth, str(age))
            if age == RECOVERY:
                spike = self.losses.spike()
                if spike is not None:
                    growth.health["loss"] = spike
                    _warn(growth, spike)

    def measure(self, growth: Growth, moment: str) -> None:
        """Add the health of a growth's units, as they are now, to `growth.health[moment]`.

        What that costs is added to `growth.health_flops`. It never stops the training: an
        error is written down in place of the figures.
        """
        state = self._generator.get_state()
        try:
            with undisturbed(), self._ranks.together():
                # To find out what can grow may cost a trace, in a run that goes on.
                structure = self._structure()
                with counting() as counter:
                    growth.health[moment] = self._looked(growth, structure)
                growth.health_flops += counter.get_total_flops()
                # One that failed is heard of here, and not in the middle of a step.
                self._ranks.gather(True)
        except Exception as error:
            growth.health[moment] = {"error": f"{type(error).__name__}: {error}"}
        finally:
            self._generator.set_state(state)

    def _looked(
        self, growth: Growth, structure: Structure
    ) -> dict[str, dict[str, float]]:
        axes = [structure.axes.named(name) for name in growth.added]
        for axis in axes:
            # Indices would name other units now.
            if axis.size < growth.after[axis.name]:
                raise GrowthRefused(
                    f"{axis.name} has been narrowed since; its units are not followed any "
                    "more"
                )
        batches = growth_batches(self._data, HEALTH_BATCHES, self._generator)
        units = units_now(growth, self.history)
        return look(structure, axes, self._loss, batches, units)

    def forget(self, axis: str, step: int) -> None:
        """Follow the units of an axis no more: some of them were pruned."""
        for growth in self.history:
            if axis in growth.added:
                growth.health["pruned"] = {axis: {"step": float(step)}}

    def restore(
        self, history: Sequence[Mapping[str, Any]], losses: Sequence[float]
    ) -> None:
        """Go on from what was saved."""
        self.history.clear()
        for entry in history:
            parameters = tuple(entry["parameters"])
            self.history.append(Growth(**{**entry, "parameters": parameters}))
        self.losses.restore(losses)


def _warn(growth: Growth, spike: Mapping[str, float | None]) -> None:
    """Tell of a growth that has cost something for long."""
    least = spike["least"]
    if least is not None and least > COSTLY:
        _LOG.warning(
            "the growth of %s at step %s has raised the loss: %d steps later it is "
            "still %.0f %% above that before (the highest was %.0f %%). hint: "
            "care.YoungRate() or care.Rewarm() let the net take it more slowly",
            ", ".join(growth.added),
            growth.step,
            RECOVERY,
            100 * least,
            100 * (spike["spike"] or 0.0),
        )


def units_now(growth: Growth, history: Sequence[Growth]) -> dict[str, Sequence[int]]:
    """Where the new units of a growth are now.

    Blocks move where later ones came between them.
    """
    units = growth.units()
    for later in history[history.index(growth) + 1 :]:
        for name in units.keys() & later.blocks.keys():
            came = set(later.blocks[name])
            # Places that did not come with the later growth, in their order.
            kept = [place for place in range(later.after[name]) if place not in came]
            units[name] = [kept[place] for place in units[name]]
    return units
