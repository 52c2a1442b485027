"""When to grow: triggers read the training clock."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import InitVar, dataclass
from typing import Any, Literal

from meristem.methods import Clock, When, check_counts

_DURATION = re.compile(r"\s*(\d+)\s*(steps?|epochs?)\s*")


def duration(text: object) -> tuple[int, Literal["steps", "epochs"]]:
    """The number and unit of "500 steps" or "2 epochs"."""
    match = _DURATION.fullmatch(text) if isinstance(text, str) else None
    if match is None or int(match[1]) < 1:
        raise ValueError(
            f'a duration carries its unit, as in "500 steps" or "2 epochs"; got {text!r}'
        )
    return int(match[1]), "steps" if match[2].startswith("step") else "epochs"


def moment(fraction: float, total: int) -> int:
    """The step (or epoch) at a fraction of training, `total` of which there are."""
    if (
        isinstance(fraction, bool)
        or not isinstance(fraction, (int, float))
        or not 0 < fraction < 1
    ):
        raise ValueError(
            f"a growth moment is a fraction of training in (0, 1); got {fraction!r}"
        )
    if round(fraction * total) < 1:
        raise ValueError(
            f"{fraction} of {total} is before the first; hint: train longer, or grow "
            "later"
        )
    return round(fraction * total)


def counts_epochs(when: When) -> bool:
    """Whether a trigger can be due at the end of an epoch alone."""
    every = getattr(when, "every", "")
    in_epochs = bool(getattr(when, "epochs", None)) or "epoch" in str(every)
    return in_epochs or isinstance(when, Plateau)


def _read(name: str, told: object, steps: object, epochs: object) -> dict[str, Any]:
    """The moments of a trigger by their unit: from text, or from one keyword."""
    if told is not None and not (steps is epochs is None):
        raise ValueError(f"{name} takes a duration, steps= or epochs=; got two of them")
    given = {"steps": steps, "epochs": epochs}
    found: dict[str, Any] = {
        u: value for u, value in given.items() if value is not None
    }
    listed = told if isinstance(told, (list, tuple)) else [told]
    for number, unit in map(duration, [] if told is None else listed):
        found[unit] = (*found.get(unit, ()), number)
    if len(found) > 1:
        raise ValueError(f"{name} mixes steps and epochs")
    if not found:
        raise ValueError(
            f'{name} needs steps or epochs. hint: {name}("100 steps") or '
            f"{name}(epochs=2)"
        )
    return found


@dataclass(frozen=True)
class Every:
    """Due every so many steps or epochs, from `start` on, at most `growths` times.

    Args:
        period: With its unit, as "100 steps" or "2 epochs"; or
        steps: the period in optimizer steps, or
        epochs: the period in epochs.
        start: First step (or epoch) that counts.
        growths: Largest number of growths; None for no limit.

    Examples:
        >>> Every(steps=100, start=50, growths=1).due(Clock(step=200))
        True
        >>> Every("2 epochs")
        Every(steps=None, epochs=2, start=None, growths=None)
    """

    period: InitVar[str | None] = None
    steps: int | None = None
    epochs: int | None = None
    start: int | None = None
    growths: int | None = None

    def __post_init__(self, period: str | None) -> None:
        if period is not None:
            duration(period)
        ((unit, number),) = _read("Every", period, self.steps, self.epochs).items()
        if period is not None:
            (number,) = number
            object.__setattr__(self, unit, number)
        check_counts("Every", **{unit: number})
        if self.start is not None:
            check_counts("Every", start=self.start)
        if self.growths is not None:
            check_counts("Every", growths=self.growths)

    def due(self, clock: Clock) -> bool:
        """Whether to grow now."""
        if self.growths is not None and clock.growths >= self.growths:
            return False
        # Epochs count only where one has just ended, or each step of it would be due.
        now = clock.step if self.steps else clock.epoch
        if self.epochs and not clock.epoch_ended:
            return False
        return now % (self.steps or self.epochs or 1) == 0 and now >= (self.start or 1)


@dataclass(frozen=True)
class At:
    """Due at the given steps, or at the ends of the given epochs.

    Args:
        moments: With their unit, as "60 steps" or ["2 epochs", "4 epochs"]; or
        steps: the steps, one or several, or
        epochs: the epochs.

    Examples:
        >>> At(epochs=(2, 4)).due(Clock(step=50, epoch=2, epoch_ended=True))
        True
        >>> At("60 steps")
        At(steps=(60,), epochs=())
    """

    moments: InitVar[str | Sequence[str] | None] = None
    steps: tuple[int, ...] = ()
    epochs: tuple[int, ...] = ()

    def __post_init__(self, moments: str | Sequence[str] | None) -> None:
        # Empty is the same as not given.
        given = {unit: getattr(self, unit) for unit in ("steps", "epochs")}
        kept = {u: None if value in ((), []) else value for u, value in given.items()}
        ((unit, found),) = _read("At", moments, **kept).items()
        listed = tuple(found) if isinstance(found, Iterable) else (found,)
        for one in listed:
            check_counts("At", **{unit: one})
        if not listed:
            raise ValueError(f"At({unit}=...) names no moment, and would never be due")
        object.__setattr__(self, unit, listed)

    def due(self, clock: Clock) -> bool:
        """Whether to grow now."""
        return (
            clock.step in self.steps
            if self.steps
            else clock.epoch_ended and clock.epoch in self.epochs
        )


@dataclass(frozen=True)
class Plateau:
    """Due when the training loss or the metric has stood still for `patience` epochs
    since the last growth.

    It has where none of the last `patience` values is better than the best one before
    them by more than `tolerance` of it. The loss may go on falling long after the
    metric has stopped: by default either is enough.

    Args:
        patience: Epochs without improvement.
        of: "loss", the mean training loss of an epoch, from `grower.step(loss)`;
            "metric", from `grower.epoch(metric=...)`; "either".
        mode: Whether a better metric is larger ("max") or smaller ("min").
        tolerance: Relative improvement that does not count.
        growths: Largest number of growths; None for no limit.

    Examples:
        >>> clock = Clock(epoch_ended=True, losses=(1.0, 0.5, 0.51, 0.52))
        >>> Plateau(patience=2).due(clock), Plateau(patience=3).due(clock)
        (True, False)
    """

    patience: int = 3
    of: Literal["loss", "metric", "either"] = "either"
    mode: Literal["max", "min"] = "max"
    tolerance: float = 1e-3
    growths: int | None = None

    def __post_init__(self) -> None:
        check_counts("Plateau", patience=self.patience)
        if self.growths is not None:
            check_counts("Plateau", growths=self.growths)
        if self.of not in ("loss", "metric", "either"):
            raise ValueError(
                f'Plateau(of=...) is "loss", "metric" or "either"; got {self.of!r}'
            )
        if self.mode not in ("max", "min"):
            raise ValueError(f'Plateau(mode=...) is "max" or "min"; got {self.mode!r}')
        if isinstance(self.tolerance, bool) or not 0 <= self.tolerance < 1:
            raise ValueError(
                f"Plateau(tolerance=...) must be a float in [0, 1); got {self.tolerance}"
            )

    @property
    def watches(self) -> tuple[str, ...]:
        """What it looks at."""
        return ("loss", "metric") if self.of == "either" else (self.of,)

    def due(self, clock: Clock) -> bool:
        """Whether to grow now."""
        if self.growths is not None and clock.growths >= self.growths:
            return False
        if clock.measured:
            return "metric" in self.watches and self._still(clock.metrics, self.mode)
        return (
            clock.epoch_ended
            and "loss" in self.watches
            and self._still(clock.losses, "min")
        )

    def _still(self, values: Sequence[float], mode: str) -> bool:
        if len(values) <= self.patience:
            return False
        signed = [value if mode == "max" else -value for value in values]
        earlier, latest = signed[: -self.patience], signed[-self.patience :]
        best = max(earlier)
        return max(latest) <= best + self.tolerance * abs(best)


@dataclass(frozen=True)
class SENN:
    """Due as often as a share of the cost of training allows, and ever more rarely
    while nothing is found.

    What all checks and growths cost stays below `budget` times the floating-point
    operations that training has taken: a check waits until the smallest one fits, and
    how.SENN searches no longer than it may (of other methods a check is taken to cost
    what the last one did). The first need not wait: it may cost `credit`, which is paid
    back before the second, so that a short training sees one check only. After every
    check that finds nothing the next one waits twice as long: five in a row take 31
    times `every`. Mitchell et al., "Self-Expanding Neural Networks", 2024, arXiv
    2307.04526, check every 10 to 30 epochs, whatever that costs.

    Args:
        budget: Largest share of training that checks and growths may cost.
        every: The shortest time between two of them, and before the first: "1 epochs",
            "500 steps".
        credit: Floating-point operations that the first check may cost before training
            has earned them; by default what a core does in about a second.

    Examples:
        >>> clock = Clock(100, 1, True, trained=1e9, growing=2e7, least=2e7)
        >>> SENN(budget=0.05, credit=0).due(clock)
        True
    """

    budget: float = 0.05
    every: str = "1 epochs"
    credit: float = 1e10

    def __post_init__(self) -> None:
        if isinstance(self.budget, bool) or not 0 < self.budget < 1:
            raise ValueError(
                "the budget of when.SENN is a share of training in (0, 1); got "
                f"{self.budget!r}"
            )
        if isinstance(self.credit, bool) or not 0 <= self.credit < math.inf:
            raise ValueError(
                "the credit of when.SENN is a number of operations in [0, inf); got "
                f"{self.credit!r}"
            )
        duration(self.every)

    def allowance(self, clock: Clock) -> float:
        """What a check may cost now."""
        # After the first check the credit is paid back before anything is earned.
        earned = self.budget * clock.trained
        return earned - clock.growing if clock.growing else max(earned, self.credit)

    def due(self, clock: Clock) -> bool:
        """Whether to check now."""
        number, unit = duration(self.every)
        steps = unit == "steps"
        waited = (
            clock.step - clock.checked_step
            if steps
            else clock.epoch - clock.checked_epoch
        )
        if waited < number * 2**clock.refusals or not (steps or clock.epoch_ended):
            return False
        return self.allowance(clock) >= clock.least


TRIGGERS = {"every": Every, "at": At, "plateau": Plateau, "senn": SENN}
"""Every trigger by its name in a configuration file."""

__all__ = ["SENN", "TRIGGERS", "At", "Every", "Plateau"]


def __dir__() -> list[str]:
    return __all__
