"""Fresh blocks that start silent, so that the function is preserved; in a chain, an
identity layer.

A residual block x + F(x) whose last projections are zero passes the stream on, and F
learns at once through them. From Bachlechner et al., "ReZero is All You Need", 2020,
arXiv 2003.04887, and Wu et al., "LLaMA Pro: Progressive LLaMA with Block Expansion",
2024, arXiv 2401.02415; the identity layer is Net2DeeperNet's (Chen, Goodfellow, Shlens,
2016, arXiv 1511.05641). Costs one pass forward and backward where a loss and data are
at hand, to predict the gain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from meristem.core.axis import Axis, Kind
from meristem.core.offer import Blocks, Offer
from meristem.how.blocks import fresh_blocks, gains, silenced, stirs
from meristem.lab.laboratory import Lab
from meristem.lab.ledger import counting


@dataclass(frozen=True)
class ZeroBlock:
    """New blocks behind the present ones, drawn as their layers draw, with everything
    that adds to the stream at zero.

    What adds to the stream is taken from the traced labels: the last projections of the
    block with their biases, or the norm that follows them. At a place in a chain the
    new layer is the identity, W = I and b = 0, behind a ReLU where the model has one
    there, else behind an activation that starts as the identity.

    Examples:
        >>> import torch, meristem as ms
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> growth = ms.grow_(net, {"0:depth": 1}, torch.randn(5, 4), how=ms.how.ZeroBlock())
        >>> net[0]
        Sequential(
          (0): Linear(in_features=4, out_features=8, bias=True)
          (1): ReLU()
          (2): Linear(in_features=8, out_features=8, bias=True)
        )
    """

    @property
    def kinds(self) -> Mapping[Kind, bool]:
        return {"depth": True}

    @property
    def preserves(self) -> bool:
        return True

    @property
    def batches(self) -> int:
        return 0

    def propose(self, lab: Lab, axis: Axis, count: int) -> Offer:
        """Silent blocks.

        The gain of a block is the norm of the gradient that its weights receive on the
        first batch.
        """
        depth = lab.depth(axis)
        insertion = depth.appended(count)
        with counting() as counter:
            blocks = Blocks(insertion)
            if depth.copied:
                blocks = Blocks(insertion, fresh_blocks(lab, insertion))
            # Else a scale that is still zero (ReZero) silences it, and learns.
            if stirs(lab, axis, blocks):
                silent = silenced(lab, insertion).values
                blocks = Blocks(insertion, {**blocks.values, **silent})
            found = gains(lab, axis, blocks) if lab.measures else ()
        return Offer(
            axis.name,
            count,
            blocks=blocks,
            gains=found,
            flops=counter.get_total_flops(),
        )
