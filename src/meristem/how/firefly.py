"""Firefly (Wu, Liu, Stone, Liu, "Firefly Neural Architecture Descent: a General Approach
for Growing Neural Networks", NeurIPS 2020, arXiv 2102.08574).

More candidates than are wanted are put into a copy of the net, all together and all
nearly silent: fresh units, and splits of present ones. They are optimised jointly for a
few steps, each kept within a small ball; then each is worth what the loss would fall to
first order along it,

    s_i = -(1/n) sum_z <dL/de_i (z e), e_i>,      z = 1/n, ..., 1,

and the best are kept.

    fresh unit    fan-in psi, fan-out e_i            ||e_i|| <= radius x mean fan-out norm
    split         theta -> theta, theta + e_i,       ||e_i|| <= radius x ||theta||
                  half of the fan-out each

The function moves by what the candidates have learnt, which the radius bounds.
Differences from the paper: one half of a split keeps its weights, so that nothing that
is there moves; where to grow is left to `where.ByGain`, which reads s_i; new layers are
left to `how.ZeroBlock`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from meristem.core.axis import Axis, Kind, Place
from meristem.core.errors import GrowthRefused
from meristem.core.offer import Copies, Offer
from meristem.how.mixed import cut_batches
from meristem.lab.laboratory import Lab
from meristem.lab.ledger import counting
from meristem.lab.neutral import mean_norm, neutral, with_fills
from meristem.methods import check_counts, check_positive

# Points on the way from silence to the optimised candidates at which slopes are taken.
_POINTS = 3
# Rows of a batch (examples x positions) per weight of a unit that are enough.
_ROWS = 16
# Step size of their optimisation, in radii.
_RATE = 0.25


@dataclass(frozen=True)
class Firefly:
    """The best of fresh units and splits that were optimised side by side.

    Args:
        candidates: Candidates per wanted unit.
        splits: Share of the candidates that are splits of present units; there are no
            more of them than units.
        steps: Steps of Adam that optimise them.
        radius: Largest length of a candidate, relative to the weights of its layer.
        batches: Growth batches of the optimisation, taken in turn.

    Examples:
        >>> import torch, meristem as ms
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> data = [(torch.randn(32, 4), torch.randn(32, 2)) for _ in range(4)]
        >>> loss = lambda model, batch: torch.nn.functional.mse_loss(model(batch[0]), batch[1])
        >>> ms.grow_(net, {"0": 3}, how=ms.how.Firefly(), loss=loss, data=data).after
        {'0': 11}
    """

    candidates: int = 2
    splits: float = 0.5
    steps: int = 16
    radius: float = 0.1
    batches: int = 4

    def __post_init__(self) -> None:
        check_counts("Firefly", candidates=self.candidates, batches=self.batches)
        check_counts("Firefly", 0, steps=self.steps)
        check_positive("Firefly", radius=self.radius)
        if isinstance(self.splits, bool) or not 0 <= self.splits <= 1:
            raise ValueError(
                f"Firefly(splits=...) must be a float in [0, 1]; got {self.splits!r}"
            )

    @property
    def kinds(self) -> Mapping[Kind, bool]:
        return {"width": self.preserves, "heads": self.preserves}

    @property
    def preserves(self) -> bool:
        return False

    def propose(self, lab: Lab, axis: Axis, count: int) -> Offer:
        """The `count` best candidates, the best first; `gains` are s_i."""
        lab.user_loss("Firefly")
        tied = any(slot.tied for slot in axis.slots)
        both_sides = axis.places("fan_in") and axis.places("fan_out")
        if axis.streamed or axis.end or tied or not both_sides:
            raise GrowthRefused(
                "Firefly needs units that are made and read by weights of their own; "
                f"axis {axis.name!r} has none. hint: how.Random grows it"
            )
        with counting() as counter:
            field = _Field(self, lab, axis, count // axis.grain)
            field.optimise()
            offer = field.offer(count)
        return Offer(
            offer.axis,
            count,
            offer.strips,
            offer.copies,
            gains=offer.gains,
            flops=counter.get_total_flops(),
            note=offer.note,
        )


class _Field:
    """All candidates of one axis in one widened copy of the net.

    In the copy a split is two new units: theta + e_i, read by half of the fan-out, and
    theta, read by minus a half. Together with the old unit that is the split, and
    nothing of the old has to be written.

    Attributes:
        parent: The units that are split.
        moves: By place, e_i of the splits, or the weights of the fresh units.
    """

    def __init__(self, method: Firefly, lab: Lab, axis: Axis, units: int) -> None:
        self.method, self.lab, self.axis, self.units = method, lab, axis, units
        old = axis.size // axis.grain
        wanted = method.candidates * units
        self.splits = min(old, round(method.splits * wanted))
        self.fresh = max(wanted - self.splits, units - self.splits)
        order = torch.randperm(old, generator=lab.generator)
        self.parent = order[: self.splits]
        trials = 2 * self.splits + self.fresh
        self.widened = lab.widened(axis, trials * axis.grain)
        self.inward = [slot.place for slot in axis.places("fan_in")]
        self.outward = [slot.place for slot in axis.places("fan_out")]
        count = units * axis.grain
        self.batches = cut_batches(lab, axis, count, method.batches, _ROWS)
        self._draw()

    def _draw(self) -> None:
        lab, axis = self.lab, self.axis
        fresh: dict[Place, Tensor] = {}
        # None at all where all candidates are splits.
        if self.fresh:
            count = self.fresh * axis.grain
            fresh = with_fills(lab, axis, count, neutral(lab, axis, count))
        self.held = {
            slot.place: lab.units(slot, axis)[self.parent] for slot in axis.slots
        }
        self.new = {}
        for place, held in self.held.items():
            self.new[place] = fresh.get(place, held[:0])
        self.reach_in = self.method.radius * _norms(self.held, self.inward)
        reach = self.method.radius * (mean_norm(lab, axis, "fan_out") or 1.0)
        self.reach_out = torch.full((self.fresh,), reach, dtype=torch.float64)
        # Off the start, where a silent unit would have no slope of its own.
        self.splitting = {p: self._drawn(self.held[p]) for p in self.inward}
        self.reading = {p: self._drawn(self.new[p]) for p in self.outward}
        self._shorten(0.5)

    def _drawn(self, like: Tensor) -> Tensor:
        return self.lab.normal(like.shape, like)

    @torch.no_grad()
    def _shorten(self, share: float | None = None) -> None:
        """Bring every candidate back into its ball, or to a share of its radius."""
        for moves, reach in (
            (self.splitting, self.reach_in),
            (self.reading, self.reach_out),
        ):
            norms = _norms(moves, list(moves))
            factor = reach / norms.clamp_min(1e-30)
            factor = share * factor if share is not None else factor.clamp_max(1.0)
            for move in moves.values():
                move.mul_(_by_unit(factor, move))

    def strips(self, length: float) -> dict[Place, Tensor]:
        """The weights of the copy's new units, with all e_i at a part of their length."""
        strips = {}
        for place, held in self.held.items():
            new = self.new[place]
            if place in self.splitting:
                moved = held + length * self.splitting[place]
                strips[place] = torch.cat([moved, held, new])
            elif place in self.reading:
                half = 0.5 * held
                strips[place] = torch.cat([half, -half, length * self.reading[place]])
            else:
                strips[place] = torch.cat([held, held, new])
        return strips

    def optimise(self) -> None:
        """All candidates together, downhill, each within its ball."""
        batches = self.batches
        fresh_in = [self.new[place] for place in self.inward]
        moving = [*self.splitting.values(), *self.reading.values(), *fresh_in]
        groups = []
        for tensor in moving:
            size = tensor.square().mean().sqrt().item() if tensor.numel() else 1.0
            tensor.requires_grad_()
            groups.append({"params": [tensor], "lr": _RATE * (size or 1.0)})
        optimizer = torch.optim.Adam(groups)
        for step in range(self.method.steps):
            optimizer.zero_grad()
            with torch.enable_grad():
                self.widened.loss(
                    self.strips(1.0), batches[step % len(batches)]
                ).backward()
            optimizer.step()
            self._shorten()

    def gains(self) -> tuple[Tensor, Tensor]:
        """s_i of the splits, and of the fresh units."""
        batches = self.batches
        splits = torch.zeros(self.splits, dtype=torch.float64)
        fresh = torch.zeros(self.fresh, dtype=torch.float64)
        moves = [*self.splitting.values(), *self.reading.values()]
        for point in range(1, _POINTS + 1):
            for batch in batches:
                with torch.enable_grad():
                    loss = self.widened.loss(self.strips(point / _POINTS), batch)
                slopes = torch.autograd.grad(loss, moves, materialize_grads=True)
                # The strips hold z e: the slope by e is z times that by z e.
                weight = _POINTS / point / _POINTS / len(batches)
                for move, slope in zip(moves, slopes, strict=True):
                    along = (move * slope).detach().flatten(1).sum(1).double().cpu()
                    if any(move is one for one in self.splitting.values()):
                        splits -= weight * along
                    else:
                        fresh -= weight * along
        return splits, fresh

    def offer(self, count: int) -> Offer:
        """The best candidates."""
        splits, fresh = self.gains()
        gains = torch.cat([splits, fresh])
        order = gains.argsort(descending=True)[: self.units]
        is_split = order < self.splits
        parent = torch.full((self.units,), -1)
        parent[is_split] = self.parent[order[is_split]]
        old = self.axis.size // self.axis.grain
        share = torch.ones(old + self.units, dtype=torch.float64)
        share[parent[is_split]] = 0.5
        share[old:][is_split] = 0.5
        strips = {}
        for place, held in self.held.items():
            nothing = torch.zeros_like(held)
            both = [self.splitting.get(place, nothing), self.new[place]]
            if place in self.reading:
                both = [nothing, self.reading[place]]
            strips[place] = torch.cat(both).detach()[order.to(held.device)]
        note = f"{int(is_split.sum())} splits, {int((~is_split).sum())} fresh units"
        chosen = tuple(gains[order].tolist())
        copies = Copies(parent, share)
        return Offer(self.axis.name, count, strips, copies, gains=chosen, note=note)


def _norms(tensors: Mapping[Place, Tensor], places: list[Place]) -> Tensor:
    """The L2 norm of every unit over some places."""
    total = torch.zeros(len(tensors[places[0]]), dtype=torch.float64)
    for place in places:
        total = total + tensors[place].flatten(1).double().square().sum(1).cpu()
    return total.sqrt()


def _by_unit(factor: Tensor, like: Tensor) -> Tensor:
    return factor.to(like).reshape(-1, *[1] * (like.dim() - 1))
