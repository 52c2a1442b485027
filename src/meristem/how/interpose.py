"""Each block beside its copy.

From Kim et al., "SOLAR 10.7B: Scaling Large Language Models with Simple yet Effective
Depth Up-Scaling", 2023, arXiv 2312.15166, as compared with stacking in arXiv
2405.15319; with zero outputs it is the block expansion of LLaMA Pro (arXiv 2401.02415).
Costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from meristem.core.axis import Axis, Kind
from meristem.core.offer import Blocks, Offer
from meristem.how.blocks import only_runs, silenced, stirs
from meristem.lab.laboratory import Lab
from meristem.methods import check_flag


@dataclass(frozen=True)
class Interpose:
    """Copies of the present blocks, each behind its own: A B becomes A A B B.

    Args:
        zero: Silence what the copies add to the stream: the function is preserved, and
            the copies start with fresh optimizer state. Otherwise they take the state
            along, and the function changes.

    Examples:
        >>> import torch, meristem as ms
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        >>> net = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        >>> how = ms.how.Interpose(zero=True)
        >>> growth = ms.grow_(net, {"layers": 2}, torch.randn(3, 5, 8), how=how)
        >>> growth.after, growth.max_change < 1e-6
        ({'layers': 4}, True)
    """

    zero: bool = False

    def __post_init__(self) -> None:
        check_flag("Interpose", zero=self.zero)

    @property
    def kinds(self) -> Mapping[Kind, bool]:
        return {"depth": self.zero}

    @property
    def preserves(self) -> bool:
        return self.zero

    @property
    def batches(self) -> int:
        return 0

    def propose(self, lab: Lab, axis: Axis, count: int) -> Offer:
        """Copies; where they do not go round evenly, the first blocks get one more."""
        depth = only_runs(lab, axis, "Interpose")
        free = depth.size - depth.fixed
        blocks, new = list(range(depth.fixed)), [False] * depth.fixed
        for i in range(free):
            # The first blocks get one more where it does not go round evenly.
            each = count // free + (i < count % free)
            blocks += [depth.fixed + i] * (1 + each)
            new += [False] + [True] * each
        insertion = depth.with_blocks(blocks, new)
        copies = Blocks(insertion, inherits=not self.zero)
        if self.zero and stirs(lab, axis, copies):
            copies = silenced(lab, insertion)
        return Offer(axis.name, count, blocks=copies)
