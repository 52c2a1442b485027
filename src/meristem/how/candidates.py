"""Candidate units of one axis: what the next layers read from them, what that is worth.

See `how.senn` for the score, `how.search` for the search.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from meristem.core.axis import Axis, Place
from meristem.core.change import index
from meristem.core.errors import GrowthRefused
from meristem.lab.laboratory import Lab
from meristem.lab.ledger import Meter
from meristem.lab.losses import Loss
from meristem.statistics.curvature import (
    Candidates,
    Factors,
    Watched,
    cast,
    damped,
    effective,
    leading,
    mean_diagonal,
    measure,
    patches,
    product,
    residual,
    scored,
    single,
    unexplained,
    whitened,
)
from meristem.structure.layers import channel_of
from meristem.structure.twin import submodule
from meristem.surgery.tensors import new_units

Strips = Mapping[Place, Tensor]
# Batches that the moments of the next layers are measured on.
_MOMENTS = 8


@dataclass(frozen=True)
class Seen:
    """A growth batch as the next layers see it.

    Attributes:
        batch: The batch.
        samples: How many of its examples are looked at, by layer.
        leading: The same at every call.
        gradients: (rows, outputs): the gradient g_r that the present inputs leave over,
            whitened by S.
    """

    batch: Any
    samples: Mapping[str, int]
    leading: Mapping[str, list[int]]
    gradients: Mapping[str, Tensor]


class _Reached(BaseException):
    """Every next layer has been reached; the rest of the forward is not needed.

    No Exception: a model may catch those.
    """


@dataclass(frozen=True)
class _Sums:
    """Sums over examples for one next layer.

    Attributes:
        against: g a_p^T, (outputs, candidates x entries).
        new: a_p a_p^T.
        gradient: g a^T.
        present: a a^T.
        cross: a a_p^T.
        outputs: E[g g^T], summed over batches.
        samples: How many examples.
    """

    against: Tensor
    new: Tensor
    gradient: Tensor
    present: Tensor
    cross: Tensor
    outputs: Tensor
    samples: int

    def __add__(self, other: _Sums) -> _Sums:
        added = []
        for field in fields(self):
            added.append(getattr(self, field.name) + getattr(other, field.name))
        return _Sums(*added)


@dataclass(frozen=True)
class Joint:
    """All candidates of one next layer beyond what its own inputs explain.

    Attributes:
        against: E[g a_p^T], whitened by S: (outputs, candidates x entries).
        own: E[a_p a_p^T].
        samples: Over how many examples.
    """

    against: Tensor
    own: Tensor
    samples: int

    def without(self, unit: int, trials: int) -> Joint:
        """What one candidate does not explain; its own block is left as it was."""
        size = self.own.shape[0] // trials
        mine = slice(unit * size, (unit + 1) * size)
        root = torch.linalg.cholesky(self.own[mine, mine])
        explains = torch.cholesky_solve(self.own[mine], root)
        own = self.own - self.own[:, mine] @ explains
        own[mine, mine] = self.own[mine, mine]
        against = self.against - self.against[:, mine] @ explains
        return Joint(against, own, self.samples)


Layers = Mapping[str, Joint]


def best(layers: Layers, trials: int, count: int) -> list[int]:
    """The `count` candidates that add most, each beyond those before it.

    A chosen one is taken out of the others and of the gradient (Schur complement).
    """
    left = list(range(trials))
    chosen: list[int] = []
    while len(chosen) < count:
        worth = _alone(layers, trials).tolist()
        pick = max(left, key=worth.__getitem__)
        left.remove(pick)
        chosen.append(pick)
        layers = _without(layers, pick, trials)
    return chosen


def gains(layers: Layers, trials: int, order: Sequence[int]) -> list[float]:
    """What candidates add, each beyond those before it."""
    found = []
    for unit in order:
        found.append(_alone(layers, trials)[unit].item())
        layers = _without(layers, unit, trials)
    return found


def _without(layers: Layers, unit: int, trials: int) -> Layers:
    return {name: joint.without(unit, trials) for name, joint in layers.items()}


def _alone(layers: Layers, trials: int) -> Tensor:
    """(candidates,): what every candidate would add by itself."""
    total = torch.zeros(trials, dtype=torch.float64)
    for joint in layers.values():
        size = joint.own.shape[0] // trials
        blocks = joint.own.reshape(trials, size, trials, size)
        own = blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)
        against = joint.against.reshape(-1, trials, size).permute(1, 2, 0)
        total = total + whitened(own, against).square().sum((1, 2)).cpu()
    return total


def next_layers(lab: Lab, axis: Axis, method: str = "SENN") -> list[str]:
    """The layers that read the units of an axis.

    Raises:
        GrowthRefused: Something else reads them.
    """
    if axis.streamed or axis.end:
        raise GrowthRefused(
            f"{method} has no zero side on axis {axis.name!r}. hint: how.Random grows it"
        )
    layers = []
    for slot in axis.places("fan_out"):
        owner = lab.owner(slot)
        is_weight = slot.dim == 1 and slot.name.endswith("weight")
        if slot.tied or not is_weight or not scored(owner):
            raise GrowthRefused(
                f"{method} looks at linear layers and ungrouped convolutions; {slot.name}, "
                f"which reads axis {axis.name!r}, belongs to a {type(owner).__name__}. "
                "hint: leave it out by axes=, or grow it by how.Random()"
            )
        layers.append(slot.name.rpartition(".")[0])
    return layers


class Space:
    """So many candidates for one axis, as the layers that read them see them.

    Attributes:
        trials: How many candidates there are.
        layers: The layers that read them.
        moments: Their damped factors.
        free: Dimensions of their output gradients that count, by layer.
        new: Where the candidates lie among a layer's inputs: (units, entries per unit).
        meters: What each sort of pass has cost.
    """

    def __init__(
        self,
        lab: Lab,
        loss: Loss,
        axis: Axis,
        trials: int,
        damping: float,
        batches: Sequence[Any],
    ) -> None:
        self.lab, self.axis, self.trials = lab, axis, trials
        self.layers = next_layers(lab, axis)
        self._loss, self._damping = loss, damping
        self._copied = lab.copied()
        sorts = ("moments", "seen", "climb", "look", "together")
        self.meters = {sort: Meter() for sort in sorts}
        self.moments: dict[str, Factors] = {}
        self.free: dict[str, float] = {}
        self._slopes: dict[str, Tensor] = {}
        self._measure(batches[:_MOMENTS])
        self._widened = lab.widened(axis, trials * axis.grain)
        self.new = {}
        for layer in self.layers:
            place = Place(f"{layer}.weight", 1)
            self.new[layer] = new_units(self._widened.plan, axis.name, place)

    def _measure(self, batches: Sequence[Any]) -> None:
        """The moments of the next layers."""
        meter = self.meters["moments"]
        found = measure(self._copied, self._loss, batches, self.layers, meter).layers
        for layer in self.layers:
            if layer not in found:
                raise GrowthRefused(
                    f"SENN sees nothing of {layer!r}, which reads axis "
                    f"{self.axis.name!r}: its weight is used without calling it, or "
                    "without gradient. hint: call the module, or grow the axis by "
                    "how.Random()"
                )
            moments = found[layer].damped(self._damping)
            # Solved once: every batch takes the same slope off its gradients.
            root = torch.linalg.cholesky(moments.inputs)
            self.moments[layer] = moments
            self.free[layer] = effective(found[layer].outputs, self._damping)
            self._slopes[layer] = torch.cholesky_solve(moments.gradient.T, root)

    def kernel(self, layer: str) -> int:
        """Entries of one input of a layer's weight."""
        return self.lab.values.shape(f"{layer}.weight")[2:].numel()

    def damping(self, layer: str) -> float:
        """What damping has added to the diagonal of A; candidates get the same."""
        share = self._damping / (1 + self._damping)
        return share * mean_diagonal(self.moments[layer].inputs)

    def _watched(self, batch: Any) -> Watched:
        with Watched(self._copied, self.layers) as watched:
            watched.run(self._loss, batch)
        return watched

    def _unexplained(self, batch: Any) -> Seen:
        watched = self._watched(batch)
        left = {}
        for layer in self.layers:
            read, back, _ = watched.rows(layer)
            moments = self.moments[layer]
            rest = back - read @ self._slopes[layer].to(read)
            spread = cast(moments.spread * moments.outputs, rest)
            left[layer] = whitened(spread, rest.T).T
        return replace(self._shown(watched, batch), gradients=left)

    def seen(self, batch: Any) -> Seen:
        """A growth batch as the next layers see it."""
        return self.meters["seen"].run(batch, partial(self._unexplained, batch))

    def _shown(self, watched: Watched, batch: Any) -> Seen:
        """How many examples of a batch the next layers show."""
        samples, first = {}, {}
        for layer in self.layers:
            module = submodule(watched.model, layer)
            calls = watched.calls[layer]
            first[layer] = [leading(module, *call) for call in calls]
            samples[layer] = watched.used(layer)
        return Seen(batch, samples, first, {})

    def _reads(self, strips: Strips, seen: Seen) -> dict[str, list[Tensor]]:
        """What the next layers read, old and new, on one batch: a tensor for every call.

        The forward stops behind them.
        """
        found: dict[str, list[Tensor]] = {layer: [] for layer in self.layers}
        with self._caught(found, seen):
            self._widened.loss(strips, seen.batch)
        return found

    @contextmanager
    def _caught(self, found: dict[str, list[Tensor]], seen: Seen) -> Iterator[None]:
        def hook(layer: str, _: nn.Module, args: Any, kwargs: Any) -> None:
            read = (*args, *kwargs.values())[0]
            shown = seen.leading[layer][len(found[layer])]
            found[layer].append(read[:shown])
            counts = [len(found[name]) == len(seen.leading[name]) for name in found]
            # Layers behind the last reader cost time and tell nothing.
            if all(counts):
                raise _Reached

        hooks = []
        for layer in self.layers:
            module = submodule(self._widened.model, layer)
            catch = partial(hook, layer)
            hooks.append(module.register_forward_pre_hook(catch, with_kwargs=True))
        try:
            yield
        except _Reached:
            pass
        finally:
            for one in hooks:
                one.remove()

    def _features(self, layer: str, reads: Sequence[Tensor]) -> Tensor:
        """(rows, candidates x entries): what a layer reads from the candidates."""
        module = submodule(self._widened.model, layer)
        where = index(self.new[layer].ravel())
        rows = []
        for read in reads:
            picked = read.index_select(channel_of(module, read), where.to(read.device))
            rows.append(patches(module, picked))
        return single(torch.cat(rows))

    def whitened(self, strips: Strips, seen: Seen) -> list[Tensor]:
        """L^-1 C^T S^-1/2 with L L^T = A_p, of every candidate alone, on one batch.

        Differentiable in the strips. Its square is Delta eta'.

        Returns:
            (candidates, entries, outputs) for every next layer.
        """
        found = []
        for layer, reads in self._reads(strips, seen).items():
            rows = self._features(layer, reads)
            rows = rows.reshape(len(rows), self.trials, -1)
            gradient, samples = seen.gradients[layer], seen.samples[layer]
            against = torch.einsum("mo,muf->ufo", gradient, rows).double() / samples
            own = torch.einsum("muf,mug->ufg", rows, rows).double() / samples
            own = own + self.damping(layer) * _eye(own)
            found.append(whitened(own, against))
        return found

    @torch.no_grad()
    def scores(self, strips: Strips, batches: Sequence[Any]) -> Tensor:
        """(candidates,): Delta eta' of every candidate alone, over several batches."""
        parts = []
        for batch in batches:
            look = partial(self.whitened, strips, self.seen(batch))
            parts.append(self.meters["look"].run(batch, look))
        total = torch.zeros(self.trials, dtype=torch.float64)
        for layer in zip(*parts, strict=True):
            mean = torch.stack(layer).mean(0)
            total += mean.square().sum((1, 2)).cpu()
        return total

    def together(self, strips: Strips, batches: Sequence[Any]) -> dict[str, Joint]:
        """All candidates at once beyond what the layer's own inputs explain.

        Everything is taken from these batches alone: a slope dW A^-1 from elsewhere would
        leave an error in g_r that candidates optimised on it have learnt to explain.
        """
        sums: dict[str, _Sums] = {}
        for batch in batches:
            look = partial(self._sums, strips, batch)
            for layer, one in self.meters["together"].run(batch, look).items():
                sums[layer] = one + sums[layer] if layer in sums else one
        joint = {}
        for layer, total in sums.items():
            joint[layer] = self._joint(layer, total, len(batches))
        return joint

    def _joint(self, layer: str, total: _Sums, batches: int) -> Joint:
        count, spread = total.samples, self.moments[layer].spread
        added = self.damping(layer)
        new = total.new / count + added * _eye(total.new)
        present = total.present / count + added * _eye(total.present)
        outputs = damped(total.outputs / batches, self._damping)
        factors = Factors(total.gradient / count, present, outputs, count, spread)
        candidates = Candidates(total.against / count, total.cross / count, new)
        left = whitened(spread * outputs, residual(factors, candidates))
        return Joint(left, unexplained(factors, candidates), count)

    def _sums(self, strips: Strips, batch: Any) -> dict[str, _Sums]:
        """The sums over the examples of one batch, for every next layer."""
        watched = self._watched(batch)
        seen = self._shown(watched, batch)
        with torch.no_grad():
            reads = self._reads(strips, seen)
        sums = {}
        for layer in self.layers:
            present, back, _ = watched.rows(layer)
            new = self._features(layer, reads[layer])
            sums[layer] = _Sums(
                against=product(back, new),
                new=product(new, new),
                gradient=product(back, present),
                present=product(present, present),
                cross=product(present, new),
                outputs=product(back, back) / len(back),
                samples=seen.samples[layer],
            )
        return sums


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
