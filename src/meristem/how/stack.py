"""The run of blocks repeated: the network starts as itself applied again.

From Du et al., "Stacking Your Transformers: A Closer Look at Model Growth for Efficient
LLM Pre-Training", 2024, arXiv 2405.15319, after Gong et al., "Efficient Training of
BERT by Progressively Stacking", ICML 2019. Costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from meristem.core.axis import Axis, Kind
from meristem.core.offer import Blocks, Offer
from meristem.how.blocks import only_runs
from meristem.lab.laboratory import Lab


@dataclass(frozen=True)
class Stack:
    """Copies of the present blocks behind them, in their order: A B becomes A B A B.
    The function changes.

    Copies take the optimizer's state along.

    Examples:
        >>> import torch, meristem as ms
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> net = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        >>> growth = ms.grow_(net, {"layers": 2}, torch.randn(3, 5, 8), how=ms.how.Stack())
        >>> len(net.layers), net.num_layers, growth.max_change > 0
        (4, 4, True)
    """

    @property
    def kinds(self) -> Mapping[Kind, bool]:
        return {"depth": False}

    @property
    def preserves(self) -> bool:
        return False

    @property
    def batches(self) -> int:
        return 0

    def propose(self, lab: Lab, axis: Axis, count: int) -> Offer:
        """Copies, round after round; blocks that lead into the run are not repeated."""
        depth = only_runs(lab, axis, "Stack")
        # Round after round through the blocks that are alike.
        repeated = [depth.fixed + i % (depth.size - depth.fixed) for i in range(count)]
        insertion = depth.with_blocks(
            [*range(depth.size), *repeated], [False] * depth.size + [True] * count
        )
        return Offer(axis.name, count, blocks=Blocks(insertion, inherits=True))
