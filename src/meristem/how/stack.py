"""The run of blocks, or a part of it, repeated: the network starts as itself applied
again.

From Du et al., "Stacking Your Transformers: A Closer Look at Model Growth for Efficient
LLM Pre-Training", 2024, arXiv 2405.15319, after Gong et al., "Efficient Training of
BERT by Progressively Stacking", ICML 2019. Costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from meristem.core.axis import Axis, Kind
from meristem.core.errors import GrowthRefused
from meristem.core.offer import Blocks, Offer
from meristem.how.blocks import only_runs
from meristem.lab.laboratory import Lab
from meristem.structure.depth import Depth

Part = Literal["all", "first", "middle", "last"]


@dataclass(frozen=True)
class Stack:
    """Copies of the present blocks behind them, in their order: A B becomes A B A B.
    The function changes.

    Copies take the optimizer's state along.

    Args:
        part: What is repeated, behind itself: "all"; the "first", "middle" or "last"
            third of the run (A B C D E F becomes A B C D C D E F for "middle"); or the
            places (from, to) of a slice. Round after round, where more are wanted.

    Examples:
        >>> import torch, meristem as ms
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> net = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        >>> growth = ms.grow_(net, {"layers": 2}, torch.randn(3, 5, 8), how=ms.how.Stack())
        >>> len(net.layers), net.num_layers, growth.max_change > 0
        (4, 4, True)
    """

    part: Part | tuple[int, int] = "all"

    def __post_init__(self) -> None:
        if isinstance(self.part, str):
            if self.part not in get_args(Part):
                raise ValueError(
                    'Stack(part=...) is "all", "first", "middle", "last" or a slice '
                    f"(from, to) of places; got {self.part!r}"
                )
            return
        object.__setattr__(self, "part", tuple(self.part))
        start, stop = self.part
        if not 0 <= start < stop:
            raise ValueError(
                f"Stack(part=(from, to)) needs 0 <= from < to; got {self.part!r}"
            )

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
        start, stop = self._slice(depth)
        # Round after round through the blocks of the part, behind its last one.
        repeated = [start + i % (stop - start) for i in range(count)]
        blocks = [*range(stop), *repeated, *range(stop, depth.size)]
        new = [False] * stop + [True] * count + [False] * (depth.size - stop)
        insertion = depth.with_blocks(blocks, new)
        return Offer(axis.name, count, blocks=Blocks(insertion, inherits=True))

    def _slice(self, depth: Depth) -> tuple[int, int]:
        """The places of the part that is repeated."""
        first, size = depth.fixed, depth.size
        if not isinstance(self.part, str):
            start, stop = self.part
            if start < first or stop > size:
                raise GrowthRefused(
                    f"Stack(part={self.part}) names blocks that {depth.name!r} cannot "
                    f"repeat: it can those from {first} to {size}"
                )
            return start, stop
        third = max(1, round((size - first) / 3))
        middle = first + (size - first - third) // 2
        slices = {
            "all": (first, size),
            "first": (first, first + third),
            "middle": (middle, middle + third),
            "last": (size - third, size),
        }
        return slices[self.part]
