"""Random new units, the baseline that every method has to beat.

Preserves the function where one side is zero (the default). Costs one batch where it
can look for dead units, else nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from meristem.core.axis import Axis, Kind
from meristem.core.offer import Blocks, Offer
from meristem.how.blocks import fresh_blocks
from meristem.lab.laboratory import Lab
from meristem.lab.ledger import counting
from meristem.lab.neutral import awake, neutral
from meristem.methods import check_positive


@dataclass(frozen=True)
class Random:
    """New weights from U(-b, b), as nn.Linear and the convolutions draw their own.

    b = scale / sqrt(fan-in).

    Args:
        zero: The side that starts at zero: "fan_out" (the new units compute but are not
            read yet), "fan_in" (read but silent; dead for ever under an activation
            whose derivative at 0 is 0, such as ReLU), or None for neither.
        scale: Factor on b.

    Examples:
        >>> import torch, meristem as ms
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
        ... )
        >>> ms.grow_(net, {"0": 3}, torch.randn(5, 4), how=ms.how.Random()).after
        {'0': 11}
    """

    zero: Literal["fan_out", "fan_in"] | None = "fan_out"
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.zero not in ("fan_out", "fan_in", None):
            raise ValueError(
                f'Random(zero=...) is "fan_out", "fan_in" or None; got {self.zero!r}'
            )
        check_positive("Random", scale=self.scale)

    @property
    def kinds(self) -> Mapping[Kind, bool]:
        return {"width": self.preserves, "heads": self.preserves, "depth": False}

    @property
    def preserves(self) -> bool:
        return self.zero is not None

    @property
    def batches(self) -> int:
        return 0

    def propose(self, lab: Lab, axis: Axis, count: int) -> Offer:
        """Drawn weights for `count` units; where batches are at hand, none starts dead.

        On a depth axis, fresh blocks behind the present ones (in a chain a fresh
        layer); their outputs are not zero, so the function changes.
        """
        if not axis.slots:
            insertion = lab.depth(axis).appended(count)
            blocks = Blocks(insertion, fresh_blocks(lab, insertion))
            return Offer(axis.name, count, blocks=blocks)
        strips = neutral(lab, axis, count, self.zero, self.scale)
        # Batches have none of the features that an input end adds.
        measures = lab.measures and axis.end != "input"
        if self.zero != "fan_out" or not measures:
            return Offer(axis.name, count, strips)
        with counting() as counter:
            strips = awake(lab, axis, count, strips)
        return Offer(axis.name, count, strips, flops=counter.get_total_flops())
