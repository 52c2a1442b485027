"""Looks at new units after their growth: when they are due, and what they found."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from torch import Tensor

from meristem.core.growth import Growth

MOMENTS = (1, 10, 100, 1000)
"""Steps after a growth at which the health of its units is measured."""
BEFORE, RECOVERY = 20, 200
"""Steps that the loss before a growth is averaged over, and steps after it in which a
spike is looked for.
"""
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
            Its mean before, how far above it the running mean rose, and the step that
            met it again; None where too few losses are known.
        """
        if len(self._losses) != self._losses.maxlen:
            return None
        losses = self.numbers()
        before = sum(losses[:BEFORE]) / BEFORE
        after = losses[BEFORE:]
        means = []
        for start in range(len(after) - _SMOOTHED + 1):
            means.append(sum(after[start : start + _SMOOTHED]) / _SMOOTHED)
        recovered = None
        for start, mean in enumerate(means):
            if mean <= before:
                recovered = start + _SMOOTHED
                break
        return {
            "before": before,
            "spike": max(means) - before,
            "steps_to_recover": recovered,
        }


def units_now(growth: Growth, history: Sequence[Growth]) -> dict[str, Sequence[int]]:
    """Where the new units of a growth are now.

    Blocks move where later ones came between them.
    """
    units = growth.units()
    for later in history[history.index(growth) + 1 :]:
        for name in units.keys() & later.blocks.keys():
            came = set(later.blocks[name])
            kept = [place for place in range(later.after[name]) if place not in came]
            units[name] = [kept[place] for place in units[name]]
    return units
