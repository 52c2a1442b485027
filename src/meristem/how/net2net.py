"""Net2Net (Chen, Goodfellow, Shlens, "Net2Net: Accelerating Learning via Knowledge
Transfer", 2015, arXiv 1511.05641).

New units copy old ones; the fan-out of a unit and its copies is divided among them, so
the function is preserved. The paper divides equally and adds noise; here the shares are
unequal, which parts the copies under SGD without any noise (Wang et al., LEMON, arXiv
2310.07999). Adam does not see the scale of a gradient: with it, add a little noise.
Costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from meristem.core.axis import Axis, Kind, Place
from meristem.core.errors import GrowthRefused
from meristem.core.offer import Copies, Offer
from meristem.lab.laboratory import Lab
from meristem.methods import check_positive


@dataclass(frozen=True)
class Net2Net:
    """Copies of present units, with unequal shares of their fan-out: U_new = share_j
    U_parent, sum of shares 1.

    Optimizer state follows exactly: with share a, a copy's fan-in keeps (a m, a^2 v),
    its fan-out (m, v).

    Args:
        noise: Standard deviation of the noise on the copies' fan-in, as a fraction of
            its own; 0 preserves the function.

    Examples:
        >>> import torch, meristem as ms
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> ms.grow_(net, {"0": 3}, torch.randn(5, 4), how=ms.how.Net2Net()).max_change < 1e-5
        True
    """

    noise: float = 0.0

    def __post_init__(self) -> None:
        if self.noise != 0:
            check_positive("Net2Net", noise=self.noise)

    @property
    def kinds(self) -> Mapping[Kind, bool]:
        return {"width": self.preserves, "heads": self.preserves}

    @property
    def preserves(self) -> bool:
        return self.noise == 0

    @property
    def batches(self) -> int:
        return 0

    def propose(self, lab: Lab, axis: Axis, count: int) -> Offer:
        """Copies of `count` present units, each unit copied once before any is copied
        twice.
        """
        tied = any(slot.tied for slot in axis.slots)
        if tied or axis.streamed or not axis.slots:
            raise GrowthRefused(
                "Net2Net copies units and divides what reads them; on axis "
                f"{axis.name!r} a weight is both sides, or a norm runs over it. hint: "
                "how.Random grows it"
            )
        old, new = axis.size // axis.grain, count // axis.grain
        rounds = [
            torch.randperm(old, generator=lab.generator) for _ in range(-(-new // old))
        ]
        parent = torch.cat(rounds)[:new]
        weight = (
            torch.rand(old + new, generator=lab.generator, dtype=torch.float64) + 0.5
        )
        family = torch.cat([torch.arange(old), parent])
        # Shares of a family sum to one.
        total = torch.zeros(old, dtype=torch.float64).index_add(0, family, weight)
        strips = {}
        if self.noise:
            for slot, shape in lab.shapes(axis, count).items():
                if slot.role == "fan_in":
                    value = lab.values[slot.name]
                    strips[Place(slot.name, slot.dim)] = (
                        lab.normal(shape, value) * value.std() * self.noise
                    )
        return Offer(
            axis.name, count, strips, copies=Copies(parent, weight / total[family])
        )
