"""New units in pairs that cancel each other (Yuan, Savarese, Maire, "Accelerated
Training via Incrementally Growing Neural Networks using Variance Transfer and Learning
Rate Adaptation", 2023, arXiv 2306.12700).

Both units of a pair start with the same incoming weights, and with opposite outgoing
ones: fan-in (V, V), fan-out (Z, -Z). The function is preserved although neither side is
zero, so both sides learn at once, and the two move apart with the first step. Costs
nothing. The paper joins it with a scale for the old weights (`care.VarianceTransfer`)
and a learning rate for every growth (here `care.YoungRate`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from meristem.core.axis import Axis, Kind
from meristem.core.errors import GrowthRefused
from meristem.core.offer import Offer
from meristem.lab.laboratory import Lab
from meristem.lab.neutral import neutral
from meristem.methods import check_positive


@dataclass(frozen=True)
class Pairs:
    """New units in pairs, fan-in (V, V) and fan-out (Z, -Z).

    V and Z are drawn from U(-b, b), b = scale / sqrt(fan-in), as the layers draw their
    own. A unit without a partner starts with zero fan-out.

    Args:
        scale: Factor on b.

    Examples:
        >>> import torch, meristem as ms
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
        ... )
        >>> growth = ms.grow_(net, {"0": 4}, torch.randn(5, 4), how=ms.how.Pairs())
        >>> growth.max_change < 1e-6, torch.equal(net[2].weight[:, 8], -net[2].weight[:, 9])
        (True, True)
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_positive("Pairs", scale=self.scale)

    @property
    def kinds(self) -> Mapping[Kind, bool]:
        return {"width": self.preserves, "heads": self.preserves}

    @property
    def preserves(self) -> bool:
        return True

    @property
    def batches(self) -> int:
        return 0

    def propose(self, lab: Lab, axis: Axis, count: int) -> Offer:
        """Pairs, one unit beside the other."""
        both_sides = axis.places("fan_in") and axis.places("fan_out")
        tied = any(slot.tied for slot in axis.slots)
        if axis.streamed or tied or not both_sides:
            raise GrowthRefused(
                f"Pairs needs units that are made and read by weights of their own; axis "
                f"{axis.name!r} has none. hint: how.Random grows it"
            )
        strips = neutral(lab, axis, count, None, self.scale)
        read = {slot.place for slot in axis.places("fan_out")}
        for place, strip in strips.items():
            paired = strip.repeat_interleave(2, 0)[: len(strip)]
            if place in read:
                sign = torch.ones(len(strip)).to(strip)
                sign[1::2] = -1
                # The last of an odd number has nobody to cancel it.
                if len(strip) % 2:
                    sign[-1] = 0
                paired = paired * sign.reshape(-1, *[1] * (strip.dim() - 1))
            strips[place] = paired
        return Offer(axis.name, count, strips)
