"""Each block beside its copy.

From Kim et al., "SOLAR 10.7B: Scaling Large Language Models with Simple yet Effective
Depth Up-Scaling", 2023, arXiv 2312.15166, as compared with stacking in arXiv
2405.15319; with zero outputs it is the block expansion of LLaMA Pro (arXiv 2401.02415).
Shared outputs are the interpolation of Chang et al., "Multi-level Residual Networks from
Dynamical Systems View", ICLR 2018, arXiv 1710.10348. Costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from meristem.core.axis import Axis, Kind
from meristem.core.offer import Blocks, Offer
from meristem.how.blocks import named_blocks, only_runs, sharing, silenced, stirs
from meristem.lab.laboratory import Lab
from meristem.methods import check_flag, check_places
from meristem.structure.depth import Depth


@dataclass(frozen=True)
class Interpose:
    """Copies of the present blocks, each behind its own: A B becomes A A B B.

    Args:
        zero: Silence what the copies add to the stream: the function is preserved, and
            the copies start with fresh optimizer state. Otherwise they take the state
            along, and the function changes.
        share: Share what a block adds to the stream evenly with its k copies, each
            f / (1 + k): y = x + f(x) becomes h = x + f(x) / 2, y = h + f(h) / 2, an ODE
            solver with half the step. The function changes, the less the less blocks
            add, and every copy learns at once.
        behind: The places of the blocks that get copies; by default all of them, the
            first ones where there are fewer copies. "even" spreads the copies over the
            run, "middle" takes the blocks in its middle.

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
    share: bool = False
    behind: Sequence[int] | Literal["even", "middle"] | None = None

    def __post_init__(self) -> None:
        check_flag("Interpose", zero=self.zero, share=self.share)
        if self.zero and self.share:
            raise ValueError(
                "Interpose takes zero= or share=, not both: silent copies add nothing"
            )
        if self.behind not in ("even", "middle"):
            check_places("Interpose", behind=self.behind)

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
        chosen = self._chosen(depth, count)
        blocks: list[int] = []
        new: list[bool] = []
        for place in range(depth.size):
            copies_of = 0
            if place in chosen:
                # The first blocks get one more where it does not go round evenly.
                rest = chosen.index(place) < count % len(chosen)
                copies_of = count // len(chosen) + rest
            blocks += [place] * (1 + copies_of)
            new += [False] + [True] * copies_of
        insertion = depth.with_blocks(blocks, new)
        if self.share:
            return Offer(axis.name, count, blocks=sharing(lab, insertion))
        copies = Blocks(insertion, inherits=not self.zero)
        if self.zero and stirs(lab, axis, copies):
            copies = silenced(lab, insertion)
        return Offer(axis.name, count, blocks=copies)

    def _chosen(self, depth: Depth, count: int) -> Sequence[int]:
        """The places of the blocks that get copies."""
        every = range(depth.fixed, depth.size)
        if self.behind is None:
            return every
        if not isinstance(self.behind, str):
            return sorted(set(named_blocks("Interpose", depth, self.behind)))
        count = min(count, len(every))
        if self.behind == "even":
            # Behind each of so many parts of the run, as LLaMA-Pro.
            return [
                every[(part + 1) * len(every) // count - 1] for part in range(count)
            ]
        first = (len(every) - count) // 2
        return every[first : first + count]
