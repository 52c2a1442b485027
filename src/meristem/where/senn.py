"""SENN's rule of acceptance (Mitchell, Menzenbach, Kersting, Mundt, "Self-Expanding
Neural Networks", 2024, arXiv 2307.04526): grow what adds enough to the natural-gradient
score, and stop when nothing does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

from meristem.core.errors import DataError
from meristem.core.offer import Offer, Share
from meristem.lab.batches import length
from meristem.lab.laboratory import Lab
from meristem.lab.ledger import batch_size, counting
from meristem.methods import Choice, check_positive
from meristem.statistics.curvature import (
    DAMPING,
    Watched,
    largest_number,
    measure,
    score,
)

# Standard errors by which a gain must exceed chance.
_SURE = 3
# Batches on which the net's own score is measured.
_LOOKS = 16


@dataclass(frozen=True)
class SENN:
    """What is accepted adds Delta eta > alpha and, where `tau` is given, more than tau
    of the net's own score eta; the most per parameter first.

    The published alpha and tau were tuned for every experiment. By default alpha
    follows from the sampling error: of an axis the m best units are taken for which

        sum Delta eta - 3 sqrt(m) error - m k / N

    is largest, if it is positive: what they add together, less three standard errors,
    less what fitting their k outgoing weights each to the N examples will lose again on
    new ones (Akaike's criterion; the incoming weights were fitted to other examples
    than those that measure the gain). With `tau`, at most N_s = 1 + (ln lambda - ln
    alpha) / ln(1 + tau) units are accepted at once, lambda being the largest score
    there could be. Widths and depths take part; the best axis grows alone.

    Args:
        alpha: Smallest gain of a unit; None for the rule above.
        tau: Smallest gain relative to the net's own score, which costs a pass to
            measure; None asks for none.
        patience: Checks in a row at which nothing is accepted, after which growth ends.
        per: What a gain is divided by, for the ranking of the axes: "parameter",
            "flop", or "growth" for all that a growth adds.
        damping: Share of its mean diagonal that is added to every factor.

    Examples:
        >>> SENN(per="flop")
        SENN(alpha=None, tau=None, patience=5, per='flop', damping=0.01)
    """

    alpha: float | None = None
    tau: float | None = None
    patience: int = 5
    per: Literal["parameter", "flop", "growth"] = "parameter"
    damping: float = DAMPING

    def __post_init__(self) -> None:
        for name in ("alpha", "tau"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(
                    f"{name} of where.SENN must be a number in (0, inf), or None; got "
                    f"{value!r}"
                )
        if (
            isinstance(self.patience, bool)
            or not isinstance(self.patience, int)
            or self.patience < 1
        ):
            raise ValueError(
                f"patience must be an int in [1, inf); got {self.patience!r}"
            )
        check_positive("where.SENN", damping=self.damping)
        if self.per not in ("parameter", "flop", "growth"):
            raise ValueError(
                "per of where.SENN must be 'parameter', 'flop' or 'growth'; got "
                f"{self.per!r}"
            )

    @property
    def reads_gains(self) -> bool:
        return True

    @property
    def weighs_kinds(self) -> bool:
        return True

    def share(self, choice: Choice) -> Share:
        """The accepted units of the best axis.

        None, and the reason, where nothing is worth its parameters.
        """
        lab = choice.lab
        assert lab is not None
        costs: Mapping[str, float] | None = None
        if self.per == "parameter":
            costs = choice.parameters_per_unit
        elif self.per == "flop":
            costs = choice.flops_per_unit
        votes: dict[str, dict[str, float]] = {}
        best: tuple[float, str, int] | None = None
        with counting() as counter:
            examples = self._examples(lab)
            own = self._score(lab) if self.tau is not None else 0.0
            for axis in choice.axes:
                offer = choice.offers[axis.name]
                count, asked, worth = self._accepted(lab, offer, examples, own)
                gain = sum(offer.gains[: max(count, 1)])
                votes[axis.name] = {
                    "gain": gain,
                    "units": float(count),
                    "asked": asked,
                    "error": offer.error,
                }
                units = count * axis.grain
                units -= units % axis.multiple
                if worth <= 0 or not units or units > choice.total:
                    continue
                cost = units * costs[axis.name] if costs is not None else 1.0
                # The name decides between equals, so that all ranks agree.
                if best is None or (gain / cost, axis.name, units) > best:
                    best = (gain / cost, axis.name, units)
        flops = counter.get_total_flops()
        if best is not None:
            return Share({best[1]: best[2]}, votes, flops)
        final = choice.refusals + 1 >= self.patience
        return Share({}, votes, flops, _too_little(votes), final)

    def _accepted(
        self, lab: Lab, offer: Offer, examples: float, own: float
    ) -> tuple[int, float, float]:
        """How many of the offered units are best together.

        Returns:
            Their number, what is asked of each, and what they are worth beyond that.
        """
        if not offer.gains or (not offer.freedom and any(offer.gains)):
            raise ValueError(
                "where.SENN needs a method that measures the score. hint: how.SENN does"
            )
        asked = self.alpha
        if asked is None:
            asked = offer.freedom / examples
        asked = max(asked, (self.tau or 0.0) * own)
        # The bound on how many may be accepted one after the other holds at once, too.
        limit = self._limit(lab, asked)
        margins = [gain - asked for gain in offer.gains[:limit]]
        slack = _SURE * offer.error
        # The published rule stops at the first unit that falls short.
        if self.alpha is not None:
            margins = list(takewhile(lambda margin: margin > 0, margins))
            slack = 0.0
        best, worth, total = 0, -math.inf, 0.0
        for number, margin in enumerate(margins, 1):
            total += margin
            net = total - slack * math.sqrt(number)
            if net > worth:
                best, worth = number, net
        return best, asked, worth

    def _limit(self, lab: Lab, asked: float) -> int | None:
        """The most units that can be accepted at once, where `tau` bounds them."""
        if self.tau is None or asked <= 0:
            return None
        most = sum(len(p) for p in lab.structure.model.parameters() if p.dim() > 1)
        return max(math.ceil(largest_number(asked, self.tau, max(most, asked))) - 1, 1)

    def _score(self, lab: Lab) -> float:
        """eta of the whole net, without its sampling error from two batches on."""
        loss = lab.user_loss("where.SENN")
        copied = lab.copied()
        batches = list(lab.batches)[:_LOOKS]
        middle = len(batches) // 2
        first = measure(copied, loss, batches[:middle] or batches)
        second = measure(copied, loss, batches[middle:])
        return max(score(first, second, self.damping), 0.0)

    def _examples(self, lab: Lab) -> float:
        """How many examples the data have, as the score counts them: images, or tokens."""
        assert lab.loss is not None
        batches = length(lab.data) if lab.data is not None else len(lab.batches)
        if batches is None:
            if self.alpha is None:
                raise DataError(
                    "where.SENN weighs gains against the size of the data, and "
                    "len(data) is unknown. hint: name alpha="
                )
            return 1.0
        copied = lab.copied()
        with Watched(copied, []) as watched:
            watched.run(lab.loss, lab.batches[0])
        sizes = [batch_size(batch) for batch in lab.batches]
        return watched.samples / sizes[0] * sum(sizes) / len(sizes) * batches


def _too_little(votes: Mapping[str, Mapping[str, float]]) -> str:
    """What is said where nothing is accepted: how near the nearest came."""

    def surely(vote: tuple[str, Mapping[str, float]]) -> float:
        return vote[1]["gain"] - _SURE * vote[1]["error"]

    name, nearest = max(votes.items(), key=surely)
    return (
        f"nothing is worth its parameters: the best, on {name}, adds "
        f"{nearest['gain']:.2g} to the score, with a standard error of "
        f"{nearest['error']:.2g}, and {nearest['asked']:.2g} is asked"
    )
