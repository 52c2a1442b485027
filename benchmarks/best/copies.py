"""Stacking whose copies start with a fresh optimizer state, for cpu.toml."""

from __future__ import annotations

from dataclasses import dataclass, replace

from meristem.core.axis import Axis
from meristem.core.offer import Offer
from meristem.how import Stack
from meristem.lab.laboratory import Lab


@dataclass(frozen=True)
class Fresh(Stack):
    """Copies that do not take the optimizer's state along."""

    def propose(self, lab: Lab, axis: Axis, count: int) -> Offer:
        offer = super().propose(lab, axis, count)
        assert offer.blocks is not None
        return replace(offer, blocks=replace(offer.blocks, inherits=False))
