"""SENN's proposals (Mitchell, Menzenbach, Kersting, Mundt, "Self-Expanding Neural Networks", 2024, arXiv 2307.04526).

A new unit is a random one whose incoming weights have been optimised, by autograd, on what it would add to the score:

    Delta eta' = Tr[S^-1 C A_p^-1 C^T],     C = E[g_r a_p^T],     g_r = g - dW A^-1 a,

where a_p is what the next layer would read from it, and S, A and dW are that layer's (`statistics.curvature`). Its outgoing
weights are zero, so the function is preserved. A new layer of a chain is the identity behind an activation that is the
identity too; it adds to the score through the coefficients of that activation, or through the units that it makes room for. A
new block of a run is silent and adds through its last projections.

Differences from the paper: units are optimised on some of the growth batches, and their gain, Delta eta, is measured on the
others, where that has not flattered them; several units are offered at once, each by what it adds to those before it; any
activation; convolutions over unfolded patches. A gain is given without the part that pure chance gives, one per outgoing
weight and example.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meristem.activations import IDENTITIES, PReLU, Rational
from meristem.axis import Axis, Kind, Place
from meristem.errors import DataError, GrowthRefused
from meristem.how.blocks import inserted
from meristem.how.draws import drawn
from meristem.how.zero_block import ZeroBlock
from meristem.statistics.curvature import (
    DAMPING,
    Candidates,
    Curvature,
    Factors,
    Watched,
    damped,
    effective,
    leading,
    mean_diagonal,
    measure,
    patches,
    residual,
    score,
    scored,
    unexplained,
    whitened,
)
from meristem.statistics.flops import Meter, batch_size
from meristem.statistics.losses import Loss
from meristem.structure import Structure
from meristem.surgery.tensors import new_units
from meristem.surgery.verify import silenced
from meristem.values import Blocks, Proposal, index
from meristem.view import View

_RATE = 0.1
"""Step size of the optimisation of candidates, in root mean squares of their first weights."""
_OPENED = 8
"""Units that are tried in the width that a layer opens."""
_FEW = 1000
"""Examples below which every part of them measures in turn."""
_LOOKS = 8
"""Batches on which optimised candidates are held against their start."""


@dataclass(frozen=True)
class SENN:
    """New units optimised on the score that they add, identity layers behind rational activations, silent blocks.

    Args:
        candidates: Random units that are optimised side by side; as many as are wanted, where that is more.
        steps: Growth batches that their search takes, again from the first where there are fewer.
        batches: Growth batches; candidates are optimised on two thirds of them and measured on the others.
        damping: Share of its mean diagonal that is added to every factor.
        activation: What stands before an inserted layer: "rational", as published, or "prelu", with a slope for every unit.
            Both start as the identity.

    Examples:
        >>> import torch, meristem as ms
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> data = [(torch.randn(64, 4), torch.randn(64, 2)) for _ in range(4)]
        >>> loss = lambda model, batch: torch.nn.functional.mse_loss(model(batch[0]), batch[1])
        >>> ms.grow_(net, {"0": 2}, how=ms.how.SENN(), loss=loss, data=data).after
        {'0': 10}
    """

    candidates: int = 24
    steps: int = 128
    batches: int = 192
    damping: float = DAMPING
    activation: Literal["rational", "prelu"] = "rational"

    def __post_init__(self) -> None:
        if self.activation not in IDENTITIES:
            raise ValueError(
                f"the activation of an inserted layer is one of {', '.join(IDENTITIES)}; got {self.activation!r}"
            )

    @property
    def kinds(self) -> Mapping[Kind, bool]:
        return {"width": True, "depth": True}

    @property
    def preserves(self) -> bool:
        return True

    def propose(self, view: View, axis: Axis, count: int) -> Proposal:
        """The best units that were found, or new blocks; `gains` are what each adds to the score, beyond chance."""
        if view.loss is None or not view.batches:
            raise DataError("SENN measures a score: pass loss= and data=")
        if axis.kind != "depth":
            return _searched(view, view.loss, axis, count, self)
        run = view.structure.depths[axis.name].form == "run"
        return (self._block if run else self._layer)(view, view.loss, axis, count)

    def _block(self, view: View, loss: Loss, axis: Axis, count: int) -> Proposal:
        """Silent blocks of a run; each adds the score of its silent layers."""
        offered = ZeroBlock().propose(replace(view, loss=None), axis, count)
        assert offered.blocks is not None
        copied, made = inserted(view, axis, offered.blocks)
        names = {id(module): name for name, module in copied.named_modules()}
        silent: dict[int, set[str]] = {}
        for place, tensor in silenced(view.structure, offered.blocks.insertion).values:
            module = made[place][1].get_submodule(tensor.rpartition(".")[0])
            silent.setdefault(place, set()).update({names[id(module)]} if scored(module) else ())
        watched = sorted(set().union(*silent.values()))
        meter = Meter()
        first, second = _parts(view, self)[0]
        parts = [measure(copied, loss, part, watched, meter).layers for part in (first, second)]
        gains, freedom, samples = [], 0.0, 1
        for listed in silent.values():
            # a layer may be used without being called
            one, other = (Curvature({name: part[name] for name in listed if name in part}) for part in parts)
            both = list((one if second is first else one + other).layers.values())
            freedom = sum(effective(layer.outputs, self.damping) * layer.gradient.shape[1] for layer in both)
            samples = max((layer.samples for layer in both), default=1)
            gains.append(score(one, other, self.damping) - (freedom / samples if second is first else 0.0))
        return replace(
            offered,
            gains=tuple(gains),
            error=_error(freedom, samples),
            freedom=freedom,
            flops=offered.flops + meter.total,
        )

    def _layer(self, view: View, loss: Loss, axis: Axis, count: int) -> Proposal:
        """Identity layers of a chain. The first adds what its activation can give at the identity, or what the best new units of
        the width that it opens would give, whichever is the surer; those behind it add nothing yet.
        """
        depth = view.structure.depths[axis.name]
        blocks, one = (Blocks(replace(depth.appended(n), activation=self.activation)) for n in (count, 1))
        copied, made = inserted(view, axis, one)
        ((_, block),) = made.values()
        activation = next(module for module in block.children() if isinstance(module, IDENTITIES[self.activation]))
        before = _layer_before(copied, activation)
        found = [self._coefficients(copied, view, loss, before, activation)]
        with contextlib.suppress(GrowthRefused):  # a width that SENN does not grow
            found.append(self._opened(copied, view, loss, before))
        surest = _surest(found)
        gains, flops = (surest.gains[0], *[0.0] * (count - 1)), sum(offer.flops for offer in found)
        return replace(surest, axis=axis.name, count=count, strips={}, blocks=blocks, gains=gains, flops=flops)

    def _opened(self, model: nn.Module, view: View, loss: Loss, before: str) -> Proposal:
        """The best new units of the layer `before` an inserted activation, as many as are surest together."""
        structure = Structure(model, view.structure.example)
        place = Place(f"{before}.weight", 0)
        axis = next((axis for axis in structure.axes.values() if place in [s.place for s in axis.slots]), None)
        if axis is None:
            raise GrowthRefused(f"the width of {before} cannot grow")
        looked = View(structure, view.generator, loss, view.batches)
        offer = _searched(looked, loss, axis, _OPENED * axis.multiple, self)
        several = [
            replace(offer, gains=(sum(offer.gains[:n]),), error=math.sqrt(n) * offer.error, freedom=n * offer.freedom)
            for n in range(1, len(offer.gains) + 1)
        ]
        return _surest(several)

    def _coefficients(
        self, model: nn.Module, view: View, loss: Loss, before: str, activation: Rational | PReLU
    ) -> Proposal:
        """The score of the coefficients of an activation at the identity, behind the layer `before`: of its tangents,

            d sigma / d beta = 1 / (1 + x^2),     d sigma / d gamma = x / (1 + x^2)     (rational),

        beyond what is linear in the input of that layer, which its own weights reach.
        """
        batches, meter = list(view.batches)[: self.batches], Meter()

        def rows(batch: Any) -> tuple[Tensor, Tensor, Tensor, int]:
            with Watched(model, [before]) as watched:
                meter.run(batch, lambda: watched.run(loss, batch))
            read, back, given = watched.rows(before)
            tangents = activation.tangents(given)
            return read, back.repeat(1, len(tangents)), torch.cat(tangents, 1), watched.used(before)

        looked = [rows(batch) for batch in batches[:_LOOKS]]
        reads = torch.cat([read for read, *_ in looked])
        reached = torch.linalg.cholesky(damped(reads.T @ reads, self.damping))
        explains = torch.cholesky_solve(reads.T @ torch.cat([features for _, _, features, _ in looked]), reached)
        gradient, fisher, samples = torch.zeros(()), torch.zeros(()), 0
        for read, back, features, count in itertools.chain(looked, map(rows, batches[_LOOKS:])):
            each = back * (features - read @ explains)
            each = each[: count * (len(each) // count)].reshape(count, -1, each.shape[1]).sum(1)
            gradient, fisher, samples = gradient + each.sum(0), fisher + each.T @ each, samples + count
        fisher = fisher / samples
        found = whitened(damped(fisher, self.damping), gradient[:, None] / samples).square().sum().item()
        free = effective(fisher, self.damping)
        gains = (found - free / samples,)
        return Proposal("", 1, gains=gains, error=_error(free, samples), freedom=free, flops=meter.total)


@dataclass(frozen=True)
class _Seen:
    """A growth batch as the next layers see it: how many of its examples are looked at, in all and at every call, and in rows
    the gradient g_r that the present inputs leave over, whitened by S.
    """

    batch: Any
    samples: Mapping[str, int]
    leading: Mapping[str, list[int]]
    gradients: Mapping[str, Tensor]


class _Reached(BaseException):
    """Every next layer has been reached; the rest of the forward is not needed. No Exception: a model may catch those."""


class _Space:
    """Candidates for one axis: their weights, what the next layers read from them, and what that is worth."""

    def __init__(self, view: View, loss: Loss, axis: Axis, count: int, method: SENN, parts: _Parts) -> None:
        self.view, self.loss, self.axis, self.count, self.method = view, loss, axis, count, method
        self.units = count // axis.multiple
        self.trials = max(method.candidates, self.units)
        self.layers = next_layers(view, axis)
        self._kept: dict[int, _Seen] = {}
        self.copied = view.copied()
        self.first, self.second = parts
        self.meters = {"moments": Meter(), "seen": Meter(), "climb": Meter(), "look": Meter(), "together": Meter()}
        layers = measure(self.copied, loss, self.first[:_LOOKS], self.layers, self.meters["moments"]).layers
        for layer in self.layers:
            if layer not in layers:
                raise GrowthRefused(
                    f"SENN sees nothing of {layer!r}, which reads axis {axis.name!r}: its weight is used without calling it, or "
                    "without gradient. hint: call the module, or grow the axis by how.Random()"
                )
        self.moments = {layer: layers[layer].damped(method.damping) for layer in self.layers}
        self.free = {layer: effective(layers[layer].outputs, method.damping) for layer in self.layers}
        self.slopes = {
            layer: torch.cholesky_solve(m.gradient.T, torch.linalg.cholesky(m.inputs))
            for layer, m in self.moments.items()
        }
        self.widened = view.widened(axis, self.trials * axis.multiple)
        self.new = {
            layer: new_units(self.widened.plan, axis.name, Place(f"{layer}.weight", 1)) for layer in self.layers
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
                left[layer] = whitened(moments.spread * moments.outputs, (back - read @ self.slopes[layer]).T).T
            return replace(self._leading(watched, batch), gradients=left)

        return self.meters["seen"].run(batch, look)

    def _leading(self, watched: Watched, batch: Any) -> _Seen:
        """How many examples of a batch the next layers show."""
        first = {
            layer: [leading(watched.model.get_submodule(layer), *call) for call in watched.calls[layer]]
            for layer in self.layers
        }
        return _Seen(batch, {layer: watched.used(layer) for layer in self.layers}, first, {})

    def _shown(self, step: int) -> _Seen:
        """The batch of a step of the search; where they are few they come again and are kept."""
        number = step % len(self.first)
        if number in self._kept:
            return self._kept[number]
        seen = self.seen(self.first[number])
        if len(self.first) <= self.method.steps // 2:
            self._kept[number] = seen
        return seen

    def _reads(self, strips: Mapping[Place, Tensor], seen: _Seen) -> dict[str, list[Tensor]]:
        """What the next layers read, old and new, on one batch: one tensor for every call. The forward stops behind them."""
        found: dict[str, list[Tensor]] = {layer: [] for layer in self.layers}

        def seen_by(layer: str) -> Any:
            def hook(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
                found[layer].append((*args, *kwargs.values())[0][: seen.leading[layer][len(found[layer])]])
                if all(len(found[name]) == len(seen.leading[name]) for name in found):
                    raise _Reached

            return hook

        model = self.widened.module.model
        hooks = [
            model.get_submodule(layer).register_forward_pre_hook(seen_by(layer), with_kwargs=True)
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
        module = self.widened.module.model.get_submodule(layer)
        channel = -1 if isinstance(module, nn.Linear) else 1
        return torch.cat([patches(module, read.index_select(channel, where.to(read.device))) for read in reads])

    def whitened(self, strips: Mapping[Place, Tensor], seen: _Seen) -> list[Tensor]:
        """L^-1 C^T S^-1/2 with L L^T = A_p, of every candidate alone: (candidates, entries, outputs) for every next layer, on
        one batch, differentiable in the strips. Its square is Delta eta'.
        """
        found = []
        for layer, reads in self._reads(strips, seen).items():
            rows = self._features(layer, reads, index(self.new[layer].ravel())).double()
            rows = rows.reshape(len(rows), self.trials, -1)
            against = torch.einsum("mo,muf->ufo", seen.gradients[layer], rows) / seen.samples[layer]
            own = torch.einsum("muf,mug->ufg", rows, rows) / seen.samples[layer]
            own = own + self._damping(layer) * torch.eye(own.shape[-1], dtype=own.dtype, device=own.device)
            found.append(whitened(own, against))
        return found

    def scores(self, strips: Mapping[Place, Tensor], batches: Sequence[Any]) -> Tensor:
        """Delta eta' of every candidate alone, over several batches."""
        with torch.no_grad():
            parts = []
            for batch in batches:
                seen = self.seen(batch)
                parts.append(self.meters["look"].run(batch, lambda: self.whitened(strips, seen)))  # noqa: B023
            return sum(torch.stack(layer).mean(0).square().sum((1, 2)).cpu() for layer in zip(*parts, strict=True))  # type: ignore[return-value]

    def _damping(self, layer: str) -> float:
        """What damping has added to the diagonal of A; candidates get the same."""
        return self.method.damping / (1 + self.method.damping) * mean_diagonal(self.moments[layer].inputs)

    def together(self, strips: Mapping[Place, Tensor], batches: Sequence[Any]) -> dict[str, _Joint]:
        """All candidates at once beyond what the layer's own inputs explain, on some batches.

        Everything is taken from these batches alone: a slope dW A^-1 from elsewhere would leave an error in g_r that candidates
        optimised on it have learnt to explain.
        """
        sums: dict[str, _Sums] = {}
        for batch in batches:
            own = self.meters["together"].run(batch, lambda: self._sums(strips, batch))  # noqa: B023
            sums = {layer: one + sums[layer] if layer in sums else one for layer, one in own.items()}
        joint = {}
        for layer, one in sums.items():
            count, spread = one.samples, self.moments[layer].spread
            new, present = (
                m / count + self._damping(layer) * torch.eye(len(m), dtype=m.dtype, device=m.device)
                for m in (one.new, one.present)
            )
            outputs = damped(one.outputs / len(batches), self.method.damping)
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
            new = self._features(layer, reads[layer], index(self.new[layer].ravel())).double()
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

    def proposal(self) -> Proposal:
        """The candidates, optimised on the first batches; the best of them by what each adds to those before it on the others."""
        started = self._drawn()
        silent = {slot.place for slot in self.axis.places("fan_out")}
        moving = [place for place in started if place not in silent]
        strips = self.optimised(started, moving)
        order = _best(self.together(strips, self.first[-len(self.second) :]), self.trials, self.units)
        joint = self.together(strips, self.second)
        free = {layer: self.free[layer] * self.new[layer].shape[1] * self._kernel(layer) for layer in self.layers}
        if self.second is self.first:  # the incoming weights were fitted to these examples, too
            free[self.layers[0]] += sum(strips[place][0].numel() for place in moving)
        chance = sum(free[layer] / joint[layer].samples for layer in self.layers)
        chosen = torch.tensor(order)
        return Proposal(
            self.axis.name,
            self.count,
            {place: strip[chosen] for place, strip in strips.items()},
            gains=tuple(gain - chance for gain in _gains(joint, self.trials, order)),
            error=math.hypot(*(_error(free[layer], joint[layer].samples) for layer in self.layers)),
            freedom=sum(free.values()),
            flops=sum(meter.total for meter in self.meters.values()),
        )

    def _drawn(self) -> dict[Place, Tensor]:
        """Random candidates, with learned activations of their own: drawn from U(-1, 1), since the mean of the neighbours is the
        identity in a layer that has just been inserted.
        """
        count = self.trials * self.axis.multiple
        strips = drawn(self.view, self.axis, count, zero="fan_out")
        for slot, shape in self.view.shapes(self.axis, count).items():
            if slot.role == "carried" and slot.fill == "mean" and not slot.buffer:
                strips[slot.place] = self.view.uniform(shape, 1.0, self.view.values[slot.name])
        return strips

    def optimised(self, started: Mapping[Place, Tensor], moving: Sequence[Place]) -> dict[Place, Tensor]:
        """Every candidate after a search uphill, or as it started where that was better.

        On one batch C is mostly noise, and so is a step along its own square. Each candidate therefore climbs along a random
        direction u of the outputs of its own, <u, C>, whose mean over batches is the truth; that keeps candidates apart, too.
        The incoming weights first turn to the mean gradient of some batches, then take steps of Adam.
        """
        strips = {place: strip.detach().clone().requires_grad_(place in moving) for place, strip in started.items()}
        slopes = [m.gradient for m in self.moments.values()]
        along = [F.normalize(self.view.normal((self.trials, 1, len(slope)), slope), dim=2) for slope in slopes]
        turning = self.method.steps // 3
        for step in range(turning):
            self._uphill(strips, self._shown(step), along)
        for slot in self.axis.places("fan_in"):
            gradient, length = strips[slot.place].grad, started[slot.place].flatten(1).norm(dim=1)
            if gradient is not None and turning:
                turned = -F.normalize(gradient.flatten(1)) * length[:, None]
                strips[slot.place].data.copy_(turned.reshape(gradient.shape))
        groups = [
            {"params": [strips[p]], "lr": _RATE * float(started[p].square().mean().sqrt() or 1.0)} for p in moving
        ]
        optimizer = torch.optim.Adam(groups)
        for step in range(turning, self.method.steps):
            optimizer.zero_grad()
            self._uphill(strips, self._shown(step), along)
            optimizer.step()
        before, after = (self.scores(one, self.first[-_LOOKS:]) for one in (started, strips))
        better = after > before
        return {
            place: torch.where(
                better.reshape(-1, *[1] * (strip.dim() - 1)).to(strip.device), strip.detach(), started[place]
            )
            for place, strip in strips.items()
        }

    def _uphill(self, strips: Mapping[Place, Tensor], seen: _Seen, along: Sequence[Tensor]) -> None:
        """Add to the gradients of the strips that of minus <u, C>, summed over candidates and next layers."""

        def climb() -> None:
            with torch.enable_grad():
                found = self.whitened(strips, seen)
                (-sum((one * u).sum() for one, u in zip(found, along, strict=True))).backward()  # type: ignore[union-attr]

        self.meters["climb"].run(seen.batch, climb)

    def _kernel(self, layer: str) -> int:
        return self.view.values[f"{layer}.weight"][0, 0].numel()


@dataclass(frozen=True)
class _Sums:
    """Sums over examples for one next layer: g a_p^T, a_p a_p^T, g a^T, a a^T, a a_p^T, batches of E[g g^T], and how many."""

    against: Tensor
    new: Tensor
    gradient: Tensor
    present: Tensor
    cross: Tensor
    outputs: Tensor
    samples: int

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class _Joint:
    """All candidates of one next layer beyond what its own inputs explain: E[g a_p^T], whitened by S, and E[a_p a_p^T]."""

    against: Tensor
    own: Tensor
    samples: int


def _best(layers: Mapping[str, _Joint], trials: int, count: int) -> list[int]:
    """The `count` candidates that add most, each beyond those before it. A chosen one is taken out of the others and of the
    gradient (Schur complement).
    """
    left: list[int] = list(range(trials))
    chosen: list[int] = []
    while len(chosen) < count:
        pick = max(left, key=_alone(layers, trials).tolist().__getitem__)
        left.remove(pick)
        chosen.append(pick)
        layers = {name: _without(joint, pick, trials) for name, joint in layers.items()}
    return chosen


def _gains(layers: Mapping[str, _Joint], trials: int, order: Sequence[int]) -> list[float]:
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
        blocks = joint.own.reshape(trials, size, trials, size).diagonal(dim1=0, dim2=2).movedim(-1, 0)
        against = joint.against.reshape(-1, trials, size).permute(1, 2, 0)
        total = total + whitened(blocks, against).square().sum((1, 2)).cpu()
    return total


def _without(joint: _Joint, unit: int, trials: int) -> _Joint:
    """The moments of what one candidate does not explain; its own block is left as it was."""
    size = joint.own.shape[0] // trials
    mine = slice(unit * size, (unit + 1) * size)
    root = torch.linalg.cholesky(joint.own[mine, mine])
    explains = torch.cholesky_solve(joint.own[mine], root)
    own = joint.own - joint.own[:, mine] @ explains
    own[mine, mine] = joint.own[mine, mine]
    return _Joint(joint.against - joint.against[:, mine] @ explains, own, joint.samples)


def _surest(offers: Sequence[Proposal]) -> Proposal:
    """The offer whose first gain is largest less two standard errors."""
    return max(offers, key=lambda offer: offer.gains[0] - 2 * offer.error)


def _layer_before(model: nn.Module, activation: nn.Module) -> str:
    """The name of the layer that feeds an inserted activation."""
    for name, chain in model.named_modules():
        keys = list(chain._modules)
        stands = [key for key, module in chain._modules.items() if module is activation]
        if stands:
            return f"{name}.{keys[keys.index(stands[0]) - 1]}".removeprefix(".")
    raise AssertionError("the activation has just been inserted")


def next_layers(view: View, axis: Axis) -> list[str]:
    """The layers that read the units of an axis.

    Raises:
        GrowthRefused: Something else reads them.
    """
    if axis.streamed or axis.end:
        raise GrowthRefused(f"SENN has no zero side on axis {axis.name!r}. hint: how.Random grows it")
    layers = []
    for slot in axis.places("fan_out"):
        owner = view.owner(slot)
        if slot.tied or slot.dim != 1 or not slot.name.endswith("weight") or not scored(owner):
            raise GrowthRefused(
                f"SENN scores linear layers and ungrouped convolutions; {slot.name}, which reads axis {axis.name!r}, belongs "
                f"to a {type(owner).__name__}. hint: leave it out by axes=, or grow it by how.Random()"
            )
        layers.append(slot.name.rpartition(".")[0])
    return layers


_Parts = tuple[Sequence[Any], Sequence[Any]]
"""Growth batches to choose on, and those to measure on."""


def _parts(view: View, method: SENN) -> list[_Parts]:
    """Two thirds of the growth batches to choose on, the others to measure on; where these hold few examples, every third
    measures in turn. One batch or two are both.
    """
    batches = list(view.batches)[: method.batches]
    if len(batches) < 3:
        return [(batches, batches)]
    third = len(batches) // 3
    turns = range(3) if third * batch_size(batches[0]) < _FEW else range(1)
    return [(turned[third:], turned[:third]) for i in turns for turned in [batches[i * third :] + batches[: i * third]]]


def _searched(view: View, loss: Loss, axis: Axis, count: int, method: SENN) -> Proposal:
    """The best units that were found on the first part of the batches, with what such units add on the average over all parts."""
    offers = [_Space(view, loss, axis, count, method, parts).proposal() for parts in _parts(view, method)]
    gains = tuple(sum(each) / len(offers) for each in zip(*(offer.gains for offer in offers), strict=True))
    error, flops = offers[0].error / math.sqrt(len(offers)), sum(offer.flops for offer in offers)
    return replace(offers[0], gains=gains, error=error, flops=flops)


def _error(freedom: float, samples: int) -> float:
    """The standard error of a score that is zero: N eta is chi-squared, with one degree of freedom per weight that counts."""
    return math.sqrt(2 * freedom) / samples
