"""TINY (Verbockhaven, Rudkiewicz, Charpiat, Chevallier, "Growing Tiny Networks: Spotting
Expressivity Bottlenecks and Fixing Them Optimally", 2024, arXiv 2405.19816).

What the layer after would have liked to give, and cannot give by any change of its own
weights, is the residual goal

    V = -g - dW* h,      dW* = -E[g h^T] E[h h^T]^-1,

with g the gradient of its pre-activation and h what it reads. New units that read b
come nearest to it along the singular vectors of S^-1/2 N,

    S = E[b b^T],  N = E[b V^T],  S^-1/2 N = sum_k l_k u_k v_k^T,
    psi_k = sqrt(l_k) S^-1/2 u_k  going in,      omega_k = sqrt(l_k) v_k  going out,

and l_k^2 is the loss that unit k takes away to first order, where the layer after takes
the step dW* of its own too. How long the new weights should be is found by trial on the
growth batch, without that step; where no length lowers the loss, they are short.
Neither side is zero: the function changes.

N is the mixed second derivative of `how.mixed`, of <V, output> in place of the loss, so
it is exact for convolutions, pooling and several readers too. Where the activation has
no slope at zero (ReLU), slopes are taken at a half. A batch norm on the axis would
rescale the units: its statistics start at those that the units have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from meristem.core.axis import Axis, Kind, Place
from meristem.core.errors import GrowthRefused
from meristem.core.offer import Offer
from meristem.how.candidates import next_layers
from meristem.how.mixed import OFFSET, Mixed
from meristem.lab.laboratory import Lab, Widened
from meristem.lab.ledger import counting
from meristem.lab.neutral import mean_norm
from meristem.methods import check_counts, check_positive
from meristem.statistics.curvature import Watched, damped, scored
from meristem.structure.twin import submodule
from meristem.surgery.tensors import carry

# Lengths that are tried, as powers of two of the one that theory gives.
_LENGTHS = range(-8, 5)


@dataclass(frozen=True)
class TINY:
    """New units that give what the next layer cannot give by itself.

    Args:
        scale: Largest norm of the new weights on either side, over the mean norm of the
            present units'; None for no bound, as published: S^-1/2 makes units that see
            directions of little variance long, and a step of SGD on such a unit is large.
        damping: Share of its mean diagonal that is added to E[b b^T] and E[h h^T].
        batches: Growth batches that everything is averaged over.
        rows: Of a batch, so many rows (examples x positions) per weight of a unit are
            enough.

    Examples:
        >>> import torch, meristem as ms
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 2), torch.nn.Tanh(), torch.nn.Linear(2, 4))
        >>> x = torch.randn(64, 8)
        >>> data = [(x, x[:, :4])]
        >>> loss = lambda model, batch: torch.nn.functional.mse_loss(model(batch[0]), batch[1])
        >>> before = loss(net, data[0]).item()
        >>> growth = ms.grow_(net, {"0": 2}, how=ms.how.TINY(), loss=loss, data=data)
        >>> growth.after, loss(net, data[0]).item() < before
        ({'0': 4}, True)
    """

    scale: float | None = 1.0
    damping: float = 0.01
    batches: int = 1
    rows: int = 16

    def __post_init__(self) -> None:
        if self.scale is not None:
            check_positive("TINY", scale=self.scale)
        check_positive("TINY", damping=self.damping)
        check_counts("TINY", batches=self.batches, rows=self.rows)

    @classmethod
    def published(cls) -> TINY:
        """The setting of the paper: new weights of any length."""
        return cls(scale=None)

    @property
    def kinds(self) -> Mapping[Kind, bool]:
        return {"width": self.preserves, "heads": self.preserves}

    @property
    def preserves(self) -> bool:
        return False

    def propose(self, lab: Lab, axis: Axis, count: int) -> Offer:
        """The `count` best units at the best length; `gains` are l_k^2."""
        lab.user_loss("TINY")
        readers = next_layers(lab, axis, "TINY")
        for slot in axis.places("fan_in"):
            owner = lab.owner(slot)
            if slot.dim or not slot.name.endswith("weight") or not scored(owner):
                raise GrowthRefused(
                    "TINY needs units that a linear layer or an ungrouped convolution "
                    f"makes; those of axis {axis.name!r} come from {slot.name} of a "
                    f"{type(owner).__name__}. hint: how.Random grows it"
                )
        if not axis.places("fan_in"):
            raise GrowthRefused(
                f"TINY finds nothing that makes axis {axis.name!r}. hint: how.Random "
                "grows it"
            )
        with counting() as counter:
            units = _Units(lab, axis, count, self, readers)
            strips, gains = units.best()
        return Offer(
            axis.name, count, strips, gains=gains, flops=counter.get_total_flops()
        )


@dataclass(frozen=True)
class _Sums:
    """Sums over what a layer has seen.

    Attributes:
        read: Of what it reads, (inputs,), the last being 1 where it has a bias.
        moments: Of a a^T.
        against: Of g a^T, g being the gradient of the mean loss.
        examples, rows: How many of each there were.
    """

    read: Tensor
    moments: Tensor
    against: Tensor
    examples: int
    rows: int

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(
            self.read + other.read,
            self.moments + other.moments,
            self.against + other.against,
            self.examples + other.examples,
            self.rows + other.rows,
        )


class _Units(Mixed):
    """New units of TINY, from the triplets of S^-1/2 N."""

    def __init__(
        self, lab: Lab, axis: Axis, count: int, method: TINY, readers: list[str]
    ) -> None:
        super().__init__(lab, axis, count, method.batches, method.rows, self.goal)
        self.damping, self.readers = method.damping, readers
        scale = method.scale if method.scale is not None else math.inf
        self.longest_in = scale * (mean_norm(lab, axis, "fan_in") or 1.0)
        self.longest_out = scale * (mean_norm(lab, axis, "fan_out") or 1.0)
        self._looked()

    def _looked(self) -> None:
        """What makes the units reads, and what their readers can give by themselves."""
        producers = [slot.name.rpartition(".")[0] for slot in self.inward]
        seen = self._sums(list(dict.fromkeys([*producers, *self.readers])))
        # dW* of every reader, for the gradient of the mean loss.
        self.steps = {}
        for name in self.readers:
            whole = damped(seen[name].moments, self.damping)
            self.steps[name] = -torch.linalg.solve(whole, seen[name].against.T).T
        # S^-1/2 of everything that makes the units.
        self.roots = []
        for slot, name in zip(self.inward, producers, strict=True):
            weights = math.prod(self.lab.values.shape(slot.name)[1:])
            # Without the 1 for the bias: new units start without one.
            own = seen[name].moments[:weights, :weights] / seen[name].examples
            values, vectors = torch.linalg.eigh(damped(own, self.damping))
            self.roots.append(vectors @ values.rsqrt().diag() @ vectors.T)
        # Mean and second moment of what the first of them reads, position by position.
        first = seen[producers[0]]
        weights = math.prod(self.lab.values.shape(self.inward[0].name)[1:])
        self.mean = first.read[:weights] / first.rows
        self.moment = first.moments[:weights, :weights] / first.rows

    def _sums(self, names: Sequence[str]) -> dict[str, _Sums]:
        loss, copied = self.lab.user_loss("TINY"), self.lab.copied()
        found: dict[str, _Sums] = {}
        for batch in self.batches:
            with Watched(copied, names) as watched:
                watched.run(loss, batch)
            for name in names:
                if name not in watched.calls:
                    raise GrowthRefused(
                        f"TINY sees nothing of {name}: it is used without being called, "
                        "or without gradient. hint: how.Random grows the axis"
                    )
                read, back, _ = watched.rows(name)
                against = back.T @ read / watched.samples
                moments, examples = read.T @ read, watched.used(name)
                one = _Sums(read.sum(0), moments, against, examples, len(read))
                found[name] = found[name] + one if name in found else one
        return found

    def goal(
        self, widened: Widened, strips: Mapping[Place, Tensor], batch: Any
    ) -> Tensor:
        """<-V, output of the readers>, V held fixed."""
        with _caught(widened.model, self.readers) as calls:
            loss = widened.loss(strips, batch)
        outputs = [given for found in calls.values() for _, given in found]
        slopes = torch.autograd.grad(
            loss, outputs, retain_graph=True, materialize_grads=True
        )
        waiting = iter(slopes)
        total = torch.zeros((), dtype=loss.dtype, device=loss.device)
        for name, found in calls.items():
            module = submodule(widened.model, name)
            own = self._step_of(widened, name)
            for read, given in found:
                with torch.no_grad():
                    reached = functional_call(module, own, (read,))
                goal = next(waiting) + reached
                total = total + (goal * given).sum()
        return total

    def _step_of(self, widened: Widened, name: str) -> dict[str, Tensor]:
        """dW* as the tensors of a reader in the widened copy."""
        step = self.steps[name]
        weight = self.lab.values[f"{name}.weight"]
        matrix = step[:, : weight[0].numel()].reshape(weight.shape).to(weight)
        own = {"weight": matrix}
        if step.shape[1] > weight[0].numel():
            own["bias"] = step[:, -1].to(weight)
        changes = {change.name: change for change in widened.plan.tensors}
        for key, tensor in own.items():
            change = changes.get(f"{name}.{key}")
            own[key] = tensor if change is None else carry(tensor, change.sources)
        return own

    def whitened(self, vectors: Tensor) -> Tensor:
        """S^-1/2 on fan-in vectors in rows."""
        parts, start = [], 0
        shapes = self.lab.shapes(self.axis, self.axis.grain)
        for slot, root in zip(self.inward, self.roots, strict=True):
            width = math.prod(shapes[slot][1:])
            part = vectors[:, start : start + width]
            by_entry = part.reshape(len(vectors), -1, len(root)) @ root.to(part)
            parts.append(by_entry.reshape(len(vectors), width))
            start += width
        return torch.cat(parts, 1)

    def best(self) -> tuple[dict[Place, Tensor], tuple[float, ...]]:
        """The strips of the best units, and their gains."""
        forward, adjoint = self.operators(OFFSET if self.flat() else 0.0)
        inward, values, outward = self.triplets(
            lambda rows: self.whitened(forward(rows)),
            lambda rows: adjoint(self.whitened(rows)),
        )
        values = torch.where(values > 1e-10 * values.max(), values, 0.0)
        values = torch.nn.functional.pad(values, (0, max(0, self.units - len(values))))
        values = values[: self.units]
        inward = _padded(self.whitened(inward), self.units)
        outward = _padded(outward, self.units)
        lengths = values.sqrt()[:, None]
        # Units beyond the rank have nothing to give: they start as the others, unread.
        spare = self.lab.normal(inward.shape, inward) * inward.norm(dim=1).mean()
        inward = torch.where(lengths > 0, inward, spare)
        # N holds -V: a step against the gradient.
        strips = self._along(inward, lengths, -lengths * outward)
        return strips, tuple(values.square().tolist())

    def _along(
        self, inward: Tensor, lengths: Tensor, outward: Tensor
    ) -> dict[Place, Tensor]:
        """The units at the length that lowers the loss most on the growth batch."""
        scale = torch.where(lengths > 0, lengths, 1.0)
        widened = self.lab.widened(self.axis, self.count)
        tried = []
        for power in _LENGTHS:
            factor = 2.0 ** (power / 2)
            strips = self._with_statistics(
                _shortened(factor * scale * inward, self.longest_in),
                _shortened(factor * outward, self.longest_out),
            )
            with torch.no_grad():
                losses = [_finite(widened, strips, batch) for batch in self.batches]
            tried.append((sum(losses), -power, strips))
        return min(tried, key=lambda one: one[:2])[2]

    def _with_statistics(self, inward: Tensor, outward: Tensor) -> dict[Place, Tensor]:
        """Strips; running statistics of norms on the axis as the units have them."""
        strips = self.strips(inward.to(self.like), outward.to(self.like))
        # Where several layers make the units nothing tells which norm follows which.
        if len(self.inward) > 1:
            return strips
        shapes = self.lab.shapes(self.axis, self.count)
        for slot, shape in shapes.items():
            if slot.buffer and slot.fill in ("zero", "one"):
                mean, spread = self._moments(inward)
                value = mean if slot.fill == "zero" else spread
                strips[slot.place] = value.reshape(shape).to(self.like)
        return strips

    def _moments(self, inward: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the units, where one layer makes them."""
        rows = inward.reshape(-1, len(self.mean))
        mean = rows @ self.mean.to(rows)
        second = ((rows @ self.moment.to(rows)) * rows).sum(1)
        variance = (second - mean.square()).clamp_min(1e-12)
        return mean, variance


def _finite(widened: Widened, strips: Mapping[Place, Tensor], batch: Any) -> float:
    value = widened.loss(strips, batch).item()
    return value if math.isfinite(value) else math.inf


def _shortened(rows: Tensor, longest: float) -> Tensor:
    """Rows, each no longer than that."""
    norms = rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    shorter: Tensor = rows * (longest / norms).clamp_max(1.0)
    return shorter


def _padded(rows: Tensor, count: int) -> Tensor:
    missing = max(0, count - len(rows))
    return torch.nn.functional.pad(rows, (0, 0, 0, missing))[:count]


@contextmanager
def _caught(
    model: nn.Module, names: list[str]
) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """What some layers read and give, call by call."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}

    def hook(name: str) -> Callable[..., None]:
        def catch(_module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            calls[name].append(((*args, *kwargs.values())[0].detach(), output))

        return catch

    hooks = []
    for name in names:
        module = submodule(model, name)
        hooks.append(module.register_forward_hook(hook(name), with_kwargs=True))
    try:
        yield calls
    finally:
        for one in hooks:
            one.remove()
