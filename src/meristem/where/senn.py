"""SENN's rule of acceptance (Mitchell, Menzenbach, Kersting, Mundt, "Self-Expanding Neural Networks", 2024, arXiv
2307.04526): grow what adds enough to the natural-gradient score, and stop when nothing does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from meristem.axis import Axis
from meristem.errors import DataError
from meristem.statistics.batches import length
from meristem.statistics.curvature import DAMPING, largest_number, measure, score
from meristem.statistics.flops import counting
from meristem.structure.twin import twin
from meristem.values import Share
from meristem.where.choice import Choice


@dataclass(frozen=True)
class SENN:
    """What is accepted adds Delta eta > alpha, and more than tau of the net's own score eta; the most per parameter first.

    The published alpha and tau were tuned for every experiment. By default they follow from what is added: with k parameters
    of a new unit or layer free to give its gain, K in the net and N examples in the data,

        alpha = k / N       the gain in log likelihood, N Delta eta / 2, beats the k / 2 that fitting k parameters loses on
                            new data (Akaike's criterion, for a gain that is free of its own sampling error),
        tau = k / K         a new parameter promises more than a present one does.

    At most N_s = 1 + (ln lambda - ln alpha) / ln(1 + tau) units are accepted at once, lambda being the largest score
    there could be. Widths and depths take part; where a depth comes first, it grows alone.

    Args:
        alpha: Smallest gain; None for the rule above.
        tau: Smallest gain relative to the net's own score; None for the rule above.
        patience: Checks in a row at which nothing is accepted, after which growth ends.
        per: What a gain is divided by, for the ranking: "parameter" or "flop".
        damping: Share of its mean diagonal that is added to every factor.

    Examples:
        >>> SENN(per="flop")
        SENN(alpha=None, tau=None, patience=3, per='flop', damping=0.01)
    """

    alpha: float | None = None
    tau: float | None = None
    patience: int = 3
    per: Literal["parameter", "flop"] = "parameter"
    damping: float = DAMPING

    def __post_init__(self) -> None:
        for name in ("alpha", "tau"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} of where.SENN must be a number in (0, inf), or None; got {value!r}")
        if isinstance(self.patience, bool) or not isinstance(self.patience, int) or self.patience < 1:
            raise ValueError(f"patience must be an int in [1, inf); got {self.patience!r}")
        if self.per not in ("parameter", "flop"):
            raise ValueError(f"per of where.SENN must be 'parameter' or 'flop'; got {self.per!r}")

    @property
    def reads_gains(self) -> bool:
        return True

    @property
    def weighs_kinds(self) -> bool:
        return True

    def share(self, choice: Choice) -> Share:
        """Counts of the accepted units; none, and the reason, where nothing is worth its parameters."""
        view = choice.view
        assert view is not None
        assert view.loss is not None
        copied = twin(view.structure.model, lambda name, _: view.values[name].clone())
        batches = list(view.batches)
        middle = len(batches) // 2 or 1
        with counting() as counter:
            first = measure(copied, view.loss, batches[:middle])
            second = measure(copied, view.loss, batches[middle:] or batches)
        own = max(score(first, second, self.damping), 0.0)
        total = self._examples(view.data, (first + second).samples, len(batches))
        present = sum(p.numel() for p in view.structure.model.parameters() if p.requires_grad)
        most = float(sum(len(layer.outputs) for layer in first.layers.values()))
        costs = choice.parameters_per_unit if self.per == "parameter" else choice.flops_per_unit
        votes: dict[str, dict[str, float]] = {}
        ranked: list[tuple[float, float, float, Axis]] = []
        for axis in choice.axes:
            gains, free = choice.proposals[axis.name].gains, choice.proposals[axis.name].freedom
            alpha = self.alpha if self.alpha is not None else free / total
            tau = self.tau if self.tau is not None else free / present
            votes[axis.name] = {"gain": max(gains, default=0.0), "alpha": alpha, "tau": tau, "score": own}
            for gain in gains:
                if not (gain > alpha and gain > tau * own):
                    break
                ranked.append((gain / (costs[axis.name] * axis.multiple), alpha, tau, axis))
        flops = counter.get_total_flops()
        if not ranked:
            name, best = max(votes.items(), key=lambda vote: vote[1]["gain"] / vote[1]["alpha"])
            needed = max(best["alpha"], best["tau"] * own)
            reason = f"nothing is worth its parameters: the best, on {name}, adds {best['gain']:.2g} to the score, {needed:.2g} is asked"
            return Share({}, votes, flops, reason, final=choice.refusals + 1 >= self.patience)
        ranked.sort(key=lambda entry: -entry[0])
        if ranked[0][3].kind == "depth":
            return Share({ranked[0][3].name: 1}, votes, flops)
        wide = [entry for entry in ranked if entry[3].kind != "depth"]
        limit = min(math.ceil(largest_number(alpha, tau, most)) - 1 for _, alpha, tau, _ in wide)
        counts: dict[str, int] = {}
        left = choice.total
        for _, _, _, axis in wide[: max(limit, 1)]:
            if axis.multiple <= left:
                counts[axis.name] = counts.get(axis.name, 0) + axis.multiple
                left -= axis.multiple
        return Share(counts, votes, flops)

    def _examples(self, data: Any, seen: int, read: int) -> float:
        """How many examples the data have, as the score counts them, of which it has `seen` in the batches that were read."""
        batches = length(data) if data is not None else read
        if batches is None and self.alpha is None:
            raise DataError(
                "where.SENN weighs gains against the size of the data, and len(data) is unknown. hint: name alpha="
            )
        return seen / read * (batches or read)
