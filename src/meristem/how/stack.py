"""The run of blocks, or a part of it, repeated: the network starts as itself applied
again.

From Du et al., "Stacking Your Transformers: A Closer Look at Model Growth for Efficient
LLM Pre-Training", 2024, arXiv 2405.15319, after Gong et al., "Efficient Training of
BERT by Progressively Stacking", ICML 2019. Costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from meristem.core.axis import Axis, Kind
from meristem.core.offer import Blocks, Offer
from meristem.how.blocks import named_blocks, only_runs
from meristem.lab.laboratory import Lab
from meristem.methods import check_places
from meristem.structure.depth import Depth

Part = Literal["all", "first", "middle", "last"]


@dataclass(frozen=True)
class Stack:
    """Copies of the present blocks behind them, in their order: A B becomes A B A B.
    The function changes.

    Copies take the optimizer's state along.

    Args:
        part: What is repeated, behind itself: "all", or the "first", "middle" or "last"
            third of the run (A B C D E F becomes A B C D C D E F for "middle"). Round
            after round, where more are wanted.
        blocks: The places of the blocks that are repeated, in this order, behind the
            last one of them: `range(8, 24)`. In place of `part`.

    Examples:
        >>> import torch, meristem as ms
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> net = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        >>> growth = ms.grow_(net, {"layers": 2}, torch.randn(3, 5, 8), how=ms.how.Stack())
        >>> len(net.layers), net.num_layers, growth.max_change > 0
        (4, 4, True)
    """

    part: Part = "all"
    blocks: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.part not in get_args(Part):
            raise ValueError(
                'Stack(part=...) is "all", "first", "middle" or "last"; got '
                f"{self.part!r}. hint: blocks=range(8, 24) names any others"
            )
        check_places("Stack", blocks=self.blocks)
        if self.blocks is not None and self.part != "all":
            raise ValueError("Stack takes part= or blocks=, not both")

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
        chosen = self._chosen(depth)
        # Round after round through them, behind the last one.
        stop = max(chosen) + 1
        repeated = [chosen[i % len(chosen)] for i in range(count)]
        blocks = [*range(stop), *repeated, *range(stop, depth.size)]
        new = [False] * stop + [True] * count + [False] * (depth.size - stop)
        insertion = depth.with_blocks(blocks, new)
        return Offer(axis.name, count, blocks=Blocks(insertion, inherits=True))

    def _chosen(self, depth: Depth) -> Sequence[int]:
        """The places of the blocks that are repeated."""
        first, size = depth.fixed, depth.size
        if self.blocks is not None:
            return named_blocks("Stack", depth, self.blocks)
        third = max(1, round((size - first) / 3))
        middle = first + (size - first - third) // 2
        slices = {
            "all": range(first, size),
            "first": range(first, first + third),
            "middle": range(middle, middle + third),
            "last": range(size - third, size),
        }
        return slices[self.part]
