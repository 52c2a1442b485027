"""The search for new units: candidates that climb the score of the layers that read
them (see `how.senn`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meristem.core.axis import Axis, Place
from meristem.core.change import index
from meristem.core.errors import GrowthRefused
from meristem.core.offer import Offer
from meristem.lab.laboratory import Lab
from meristem.lab.ledger import Meter, batch_size
from meristem.lab.losses import Loss
from meristem.lab.neutral import neutral
from meristem.statistics.curvature import (
    ENTRIES,
    Candidates,
    Factors,
    Watched,
    damped,
    effective,
    leading,
    mean_diagonal,
    measure,
    patches,
    residual,
    scored,
    unexplained,
    whitened,
)
from meristem.structure import products, sized
from meristem.structure.layers import channel_of
from meristem.surgery.tensors import new_units

# Step size of the optimisation of candidates, in root mean squares of their first
# weights.
_RATE = 0.1
# Examples below which every part of them measures in turn.
_FEW = 1000
# Standard errors beyond chance at which one part of the examples decides alone.
_CLEAR = 5
LOOKS = 8
"""Batches on which optimised candidates are held against their start."""
# Below these a search is not worth its name.
_LEAST_BATCHES, _LEAST_STEPS = 12, 8

Parts = tuple[Sequence[Any], Sequence[Any]]
"""Growth batches to choose on, and those to measure on."""


@dataclass(frozen=True)
class Search:
    """How much is looked for: so many candidates, climbing so many steps, on so many
    growth batches; where these are few, so many parts of them measure in turn.
    """

    candidates: int
    steps: int
    batches: int
    damping: float
    turns: int = 3

    def trials(self, units: int) -> int:
        """Candidates for so many units."""
        return max(self.candidates, units)

    def within(self, lab: Lab, axis: Axis, count: int) -> Search:
        """As much of this search as the allowance of a lab pays for, halved until it
        fits.
        """
        search = replace(self, batches=min(self.batches, len(lab.batches)))
        while search.cost(lab, axis, count) > lab.allowance and search != search.least:
            search = search.halved
        return search

    @property
    def halved(self) -> Search:
        """Half as many batches and steps, and one part of the examples that measures."""
        least = self.least
        return replace(
            least,
            batches=max(self.batches // 2, least.batches),
            steps=max(self.steps // 2, least.steps),
        )

    @property
    def least(self) -> Search:
        """The smallest search that is worth its name."""
        return replace(
            self,
            batches=min(self.batches, _LEAST_BATCHES),
            steps=min(self.steps, _LEAST_STEPS),
            turns=1,
        )

    def cost(self, lab: Lab, axis: Axis, count: int) -> float:
        """About the floating-point operations that it takes: the passes of `_Space`,
        and the products of what they see.
        """
        batch, trials = (
            lab.batches[0],
            self.trials(count // axis.multiple) * axis.multiple,
        )
        now, wide = (
            f / lab.structure.batch
            for f in sized(lab.structure, {axis.name: trials}).flops
        )
        strips = {
            slot: math.prod(shape)
            for slot, shape in lab.shapes(axis, trials).items()
            if slot.role != "carried"
        }
        made = (
            (wide - now)
            * sum(strips[slot] for slot in axis.places("fan_in"))
            / sum(strips.values())
        )
        present = mixed = new = 0.0
        for slot in axis.places("fan_out"):
            weight = lab.values[slot.name]
            outputs = len(weight)
            reads, entries = weight.numel() / outputs, strips[slot] / outputs
            rows = (
                products(lab.structure, slot.name)
                / weight.numel()
                / lab.structure.batch
            )
            shown = 2 * min(rows, ENTRIES / (reads * batch_size(batch)))
            present += shown * (reads + outputs) ** 2
            mixed += shown * entries * (outputs + entries / trials)
            new += shown * entries * (entries + outputs + reads)
        total = 0.0
        for first, second in self.parts([batch] * self.batches):
            looks, measured = min(LOOKS, len(first)), 2 * len(second)
            total += (3 * looks + min(self.steps, len(first)) + measured) * (
                3 * now + present
            )
            total += self.steps * (now + 3 * (made + mixed)) + 2 * looks * (
                now + made + mixed
            )
            total += measured * (now + made + new)
        return total * batch_size(batch)

    def parts(self, batches: Sequence[Any]) -> list[Parts]:
        """Two thirds of the growth batches to choose on, the others to measure on;
        where these hold few examples, other thirds measure in turn. One batch or two
        are both.
        """
        batches = list(batches)[: self.batches]
        if len(batches) < 3:
            return [(batches, batches)]
        third = len(batches) // 3
        turns = range(self.turns) if third * batch_size(batches[0]) < _FEW else range(1)
        return [
            (turned[third:], turned[:third])
            for i in turns
            for turned in [batches[i * third :] + batches[: i * third]]
        ]


@dataclass(frozen=True)
class _Seen:
    """A growth batch as the next layers see it: how many of its examples are looked at,
    in all and at every call, and in rows the gradient g_r that the present inputs leave
    over, whitened by S.
    """

    batch: Any
    samples: Mapping[str, int]
    leading: Mapping[str, list[int]]
    gradients: Mapping[str, Tensor]


class _Reached(BaseException):
    """Every next layer has been reached; the rest of the forward is not needed.

    No Exception: a model may catch those.
    """


class _Space:
    """Candidates for one axis: their weights, what the next layers read from them, and
    what that is worth.
    """

    def __init__(
        self, lab: Lab, loss: Loss, axis: Axis, count: int, search: Search, parts: Parts
    ) -> None:
        self.lab, self.loss, self.axis, self.count, self.search = (
            lab,
            loss,
            axis,
            count,
            search,
        )
        self.units = count // axis.multiple
        self.trials = search.trials(self.units)
        self.layers = next_layers(lab, axis)
        self._kept: dict[int, _Seen] = {}
        self.copied = lab.copied()
        self.first, self.second = parts
        self.meters = {
            "moments": Meter(),
            "seen": Meter(),
            "climb": Meter(),
            "look": Meter(),
            "together": Meter(),
        }
        layers = measure(
            self.copied, loss, self.first[:LOOKS], self.layers, self.meters["moments"]
        ).layers
        for layer in self.layers:
            if layer not in layers:
                raise GrowthRefused(
                    f"SENN sees nothing of {layer!r}, which reads axis {axis.name!r}: "
                    "its weight is used without calling it, or "
                    "without gradient. hint: call the module, or grow the axis by "
                    "how.Random()"
                )
        self.moments = {
            layer: layers[layer].damped(search.damping) for layer in self.layers
        }
        self.free = {
            layer: effective(layers[layer].outputs, search.damping)
            for layer in self.layers
        }
        self.slopes = {
            layer: torch.cholesky_solve(m.gradient.T, torch.linalg.cholesky(m.inputs))
            for layer, m in self.moments.items()
        }
        self.widened = lab.widened(axis, self.trials * axis.multiple)
        self.new = {
            layer: new_units(self.widened.plan, axis.name, Place(f"{layer}.weight", 1))
            for layer in self.layers
        }

    def seen(self, batch: Any) -> _Seen:
        """A growth batch as the next layers see it."""

        def look() -> _Seen:
            with Watched(self.copied, self.layers) as watched:
                watched.run(self.loss, batch)
            left = {}
            for layer in self.layers:
                read, back, _ = watched.rows(layer)
                moments = self.moments[layer]
                left[layer] = whitened(
                    moments.spread * moments.outputs,
                    (back - read @ self.slopes[layer]).T,
                ).T
            return replace(self._leading(watched, batch), gradients=left)

        return self.meters["seen"].run(batch, look)

    def _leading(self, watched: Watched, batch: Any) -> _Seen:
        """How many examples of a batch the next layers show."""
        first = {
            layer: [
                leading(watched.model.get_submodule(layer), *call)
                for call in watched.calls[layer]
            ]
            for layer in self.layers
        }
        return _Seen(
            batch, {layer: watched.used(layer) for layer in self.layers}, first, {}
        )

    def _shown(self, step: int) -> _Seen:
        """The batch of a step of the search; where they are few they come again and are
        kept.
        """
        number = step % len(self.first)
        if number in self._kept:
            return self._kept[number]
        seen = self.seen(self.first[number])
        if len(self.first) <= self.search.steps // 2:
            self._kept[number] = seen
        return seen

    def _reads(
        self, strips: Mapping[Place, Tensor], seen: _Seen
    ) -> dict[str, list[Tensor]]:
        """What the next layers read, old and new, on one batch: one tensor for every
        call. The forward stops behind them.
        """
        found: dict[str, list[Tensor]] = {layer: [] for layer in self.layers}

        def seen_by(layer: str) -> Any:
            def hook(
                _module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
            ) -> None:
                found[layer].append(
                    (*args, *kwargs.values())[0][
                        : seen.leading[layer][len(found[layer])]
                    ]
                )
                if all(len(found[name]) == len(seen.leading[name]) for name in found):
                    raise _Reached

            return hook

        model = self.widened.model
        hooks = [
            model.get_submodule(layer).register_forward_pre_hook(
                seen_by(layer), with_kwargs=True
            )
            for layer in self.layers
        ]
        try:
            self.widened.loss(strips, seen.batch)
        except _Reached:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def _features(self, layer: str, reads: Sequence[Tensor], where: Tensor) -> Tensor:
        """The rows of some entries of what a layer reads."""
        module = self.widened.model.get_submodule(layer)
        rows = []
        for read in reads:
            picked = read.index_select(channel_of(module, read), where.to(read.device))
            rows.append(patches(module, picked))
        return torch.cat(rows)

    def whitened(self, strips: Mapping[Place, Tensor], seen: _Seen) -> list[Tensor]:
        """L^-1 C^T S^-1/2 with L L^T = A_p, of every candidate alone: (candidates,
        entries, outputs) for every next layer, on one batch, differentiable in the
        strips. Its square is Delta eta'.
        """
        found = []
        for layer, reads in self._reads(strips, seen).items():
            rows = self._features(layer, reads, index(self.new[layer].ravel())).double()
            rows = rows.reshape(len(rows), self.trials, -1)
            against = (
                torch.einsum("mo,muf->ufo", seen.gradients[layer], rows)
                / seen.samples[layer]
            )
            own = torch.einsum("muf,mug->ufg", rows, rows) / seen.samples[layer]
            own = own + self._damping(layer) * torch.eye(
                own.shape[-1], dtype=own.dtype, device=own.device
            )
            found.append(whitened(own, against))
        return found

    def scores(self, strips: Mapping[Place, Tensor], batches: Sequence[Any]) -> Tensor:
        """Delta eta' of every candidate alone, over several batches."""
        with torch.no_grad():
            parts = []
            for batch in batches:
                seen = self.seen(batch)
                look = partial(self.whitened, strips, seen)
                parts.append(self.meters["look"].run(batch, look))
            total = torch.zeros(self.trials, dtype=torch.float64)
            for layer in zip(*parts, strict=True):
                mean = torch.stack(layer).mean(0)
                total += mean.square().sum((1, 2)).cpu()
            return total

    def _damping(self, layer: str) -> float:
        """What damping has added to the diagonal of A; candidates get the same."""
        return (
            self.search.damping
            / (1 + self.search.damping)
            * mean_diagonal(self.moments[layer].inputs)
        )

    def together(
        self, strips: Mapping[Place, Tensor], batches: Sequence[Any]
    ) -> dict[str, _Joint]:
        """All candidates at once beyond what the layer's own inputs explain, on some
        batches.

        Everything is taken from these batches alone: a slope dW A^-1 from elsewhere
        would leave an error in g_r that candidates optimised on it have learnt to
        explain.
        """
        sums: dict[str, _Sums] = {}
        for batch in batches:
            own = self.meters["together"].run(batch, lambda: self._sums(strips, batch))  # noqa: B023
            sums = {
                layer: one + sums[layer] if layer in sums else one
                for layer, one in own.items()
            }
        joint = {}
        for layer, one in sums.items():
            count, spread = one.samples, self.moments[layer].spread
            new, present = (
                m / count
                + self._damping(layer)
                * torch.eye(len(m), dtype=m.dtype, device=m.device)
                for m in (one.new, one.present)
            )
            outputs = damped(one.outputs / len(batches), self.search.damping)
            factors = Factors(one.gradient / count, present, outputs, count, spread)
            candidates = Candidates(one.against / count, one.cross / count, new)
            left = whitened(spread * outputs, residual(factors, candidates))
            joint[layer] = _Joint(left, unexplained(factors, candidates), count)
        return joint

    def _sums(self, strips: Mapping[Place, Tensor], batch: Any) -> dict[str, _Sums]:
        """The sums over the examples of one batch, for every next layer."""
        with Watched(self.copied, self.layers) as watched:
            watched.run(self.loss, batch)
        seen = self._leading(watched, batch)
        with torch.no_grad():
            reads = self._reads(strips, seen)
        sums = {}
        for layer in self.layers:
            present, back, _ = watched.rows(layer)
            new = self._features(
                layer, reads[layer], index(self.new[layer].ravel())
            ).double()
            sums[layer] = _Sums(
                back.T @ new,
                new.T @ new,
                back.T @ present,
                present.T @ present,
                present.T @ new,
                back.T @ back / len(back),
                seen.samples[layer],
            )
        return sums

    def offer(self) -> Offer:
        """The candidates, optimised on the first batches; the best of them by what each
        adds to those before it on the others.
        """
        started = self._drawn()
        silent = {slot.place for slot in self.axis.places("fan_out")}
        moving = [place for place in started if place not in silent]
        strips = self.optimised(started, moving)
        order = _best(
            self.together(strips, self.first[-len(self.second) :]),
            self.trials,
            self.units,
        )
        joint = self.together(strips, self.second)
        free = {
            layer: self.free[layer] * self.new[layer].shape[1] * self._kernel(layer)
            for layer in self.layers
        }
        if (
            self.second is self.first
        ):  # the incoming weights were fitted to these examples, too
            free[self.layers[0]] += sum(strips[place][0].numel() for place in moving)
        chance = sum(free[layer] / joint[layer].samples for layer in self.layers)
        chosen = torch.tensor(order)
        return Offer(
            self.axis.name,
            self.count,
            {place: strip[chosen] for place, strip in strips.items()},
            gains=tuple(gain - chance for gain in _gains(joint, self.trials, order)),
            error=math.hypot(
                *(
                    sampling_error(free[layer], joint[layer].samples)
                    for layer in self.layers
                )
            ),
            freedom=sum(free.values()),
            flops=sum(meter.total for meter in self.meters.values()),
        )

    def _drawn(self) -> dict[Place, Tensor]:
        """Random candidates, with learned activations of their own: drawn from U(-1,
        1), since the mean of the neighbours is the identity in a layer that has just
        been inserted.
        """
        count = self.trials * self.axis.multiple
        strips = neutral(self.lab, self.axis, count, zero="fan_out")
        for slot, shape in self.lab.shapes(self.axis, count).items():
            if slot.role == "carried" and slot.fill == "mean" and not slot.buffer:
                strips[slot.place] = self.lab.uniform(
                    shape, 1.0, self.lab.values[slot.name]
                )
        return strips

    def optimised(
        self, started: Mapping[Place, Tensor], moving: Sequence[Place]
    ) -> dict[Place, Tensor]:
        """Every candidate after a search uphill, or as it started where that was
        better.

        On one batch C is mostly noise, and so is a step along its own square. Each
        candidate therefore climbs along a random direction u of the outputs of its own,
        <u, C>, whose mean over batches is the truth; that keeps candidates apart, too.
        The incoming weights first turn to the mean gradient of some batches, then take
        steps of Adam.
        """
        strips = {
            place: strip.detach().clone().requires_grad_(place in moving)
            for place, strip in started.items()
        }
        slopes = [m.gradient for m in self.moments.values()]
        along = [
            F.normalize(self.lab.normal((self.trials, 1, len(slope)), slope), dim=2)
            for slope in slopes
        ]
        turning = self.search.steps // 3
        for step in range(turning):
            self._uphill(strips, self._shown(step), along)
        for slot in self.axis.places("fan_in"):
            gradient, length = (
                strips[slot.place].grad,
                started[slot.place].flatten(1).norm(dim=1),
            )
            if gradient is not None and turning:
                turned = -F.normalize(gradient.flatten(1)) * length[:, None]
                strips[slot.place].data.copy_(turned.reshape(gradient.shape))
        groups = [
            {
                "params": [strips[p]],
                "lr": _RATE * float(started[p].square().mean().sqrt() or 1.0),
            }
            for p in moving
        ]
        optimizer = torch.optim.Adam(groups)
        for step in range(turning, self.search.steps):
            optimizer.zero_grad()
            self._uphill(strips, self._shown(step), along)
            optimizer.step()
        before, after = (
            self.scores(one, self.first[-LOOKS:]) for one in (started, strips)
        )
        better = after > before
        return {
            place: torch.where(
                better.reshape(-1, *[1] * (strip.dim() - 1)).to(strip.device),
                strip.detach(),
                started[place],
            )
            for place, strip in strips.items()
        }

    def _uphill(
        self, strips: Mapping[Place, Tensor], seen: _Seen, along: Sequence[Tensor]
    ) -> None:
        """Add to the gradients of the strips that of minus <u, C>, summed over
        candidates and next layers.
        """

        def climb() -> None:
            with torch.enable_grad():
                found = self.whitened(strips, seen)
                (
                    -sum((one * u).sum() for one, u in zip(found, along, strict=True))
                ).backward()  # type: ignore[union-attr]

        self.meters["climb"].run(seen.batch, climb)

    def _kernel(self, layer: str) -> int:
        return self.lab.values[f"{layer}.weight"][0, 0].numel()


@dataclass(frozen=True)
class _Sums:
    """Sums over examples for one next layer: g a_p^T, a_p a_p^T, g a^T, a a^T, a a_p^T,
    batches of E[g g^T], and how many.
    """

    against: Tensor
    new: Tensor
    gradient: Tensor
    present: Tensor
    cross: Tensor
    outputs: Tensor
    samples: int

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(
            *(getattr(self, f.name) + getattr(other, f.name) for f in fields(self))
        )


@dataclass(frozen=True)
class _Joint:
    """All candidates of one next layer beyond what its own inputs explain: E[g a_p^T],
    whitened by S, and E[a_p a_p^T].
    """

    against: Tensor
    own: Tensor
    samples: int


def _best(layers: Mapping[str, _Joint], trials: int, count: int) -> list[int]:
    """The `count` candidates that add most, each beyond those before it. A chosen one
    is taken out of the others and of the gradient (Schur complement).
    """
    left: list[int] = list(range(trials))
    chosen: list[int] = []
    while len(chosen) < count:
        pick = max(left, key=_alone(layers, trials).tolist().__getitem__)
        left.remove(pick)
        chosen.append(pick)
        layers = {name: _without(joint, pick, trials) for name, joint in layers.items()}
    return chosen


def _gains(
    layers: Mapping[str, _Joint], trials: int, order: Sequence[int]
) -> list[float]:
    """What candidates add, each beyond those before it."""
    found = []
    for unit in order:
        found.append(_alone(layers, trials)[unit].item())
        layers = {name: _without(joint, unit, trials) for name, joint in layers.items()}
    return found


def _alone(layers: Mapping[str, _Joint], trials: int) -> Tensor:
    """What every candidate would add by itself."""
    total = torch.zeros(trials, dtype=torch.float64)
    for joint in layers.values():
        size = joint.own.shape[0] // trials
        blocks = (
            joint.own.reshape(trials, size, trials, size)
            .diagonal(dim1=0, dim2=2)
            .movedim(-1, 0)
        )
        against = joint.against.reshape(-1, trials, size).permute(1, 2, 0)
        total = total + whitened(blocks, against).square().sum((1, 2)).cpu()
    return total


def _without(joint: _Joint, unit: int, trials: int) -> _Joint:
    """The moments of what one candidate does not explain; its own block is left as it
    was.
    """
    size = joint.own.shape[0] // trials
    mine = slice(unit * size, (unit + 1) * size)
    root = torch.linalg.cholesky(joint.own[mine, mine])
    explains = torch.cholesky_solve(joint.own[mine], root)
    own = joint.own - joint.own[:, mine] @ explains
    own[mine, mine] = joint.own[mine, mine]
    return _Joint(joint.against - joint.against[:, mine] @ explains, own, joint.samples)


def next_layers(lab: Lab, axis: Axis) -> list[str]:
    """The layers that read the units of an axis.

    Raises:
        GrowthRefused: Something else reads them.
    """
    if axis.streamed or axis.end:
        raise GrowthRefused(
            f"SENN has no zero side on axis {axis.name!r}. hint: how.Random grows it"
        )
    layers = []
    for slot in axis.places("fan_out"):
        owner = lab.owner(slot)
        if (
            slot.tied
            or slot.dim != 1
            or not slot.name.endswith("weight")
            or not scored(owner)
        ):
            raise GrowthRefused(
                f"SENN scores linear layers and ungrouped convolutions; {slot.name}, "
                f"which reads axis {axis.name!r}, belongs "
                f"to a {type(owner).__name__}. hint: leave it out by axes=, or grow it "
                "by how.Random()"
            )
        layers.append(slot.name.rpartition(".")[0])
    return layers


def searched(lab: Lab, loss: Loss, axis: Axis, count: int, search: Search) -> Offer:
    """The best units that were found on the first part of the batches, with what such
    units add on the average over the parts; the others are left out where the first one
    leaves no doubt.
    """
    next_layers(lab, axis)
    search = search.within(lab, axis, count)
    offers: list[Offer] = []
    for parts in search.parts(lab.batches):
        offers.append(_Space(lab, loss, axis, count, search, parts).offer())
        if not _doubtful(offers[0]):
            break
    gains = tuple(
        sum(each) / len(offers)
        for each in zip(*(offer.gains for offer in offers), strict=True)
    )
    error, flops = (
        offers[0].error / math.sqrt(len(offers)),
        sum(offer.flops for offer in offers),
    )
    return replace(offers[0], gains=gains, error=error, flops=flops)


def _doubtful(offer: Offer) -> bool:
    """Whether units are worth something, and not surely so: the best number of them,
    with the error of their sum.
    """
    best = max(
        total / math.sqrt(n)
        for n, total in enumerate(itertools.accumulate(offer.gains), 1)
    )
    return 0 < best < _CLEAR * offer.error


def sampling_error(freedom: float, samples: int) -> float:
    """The standard error of a score that is zero: N eta is chi-squared, with one degree
    of freedom per weight that counts.
    """
    return math.sqrt(2 * freedom) / samples
