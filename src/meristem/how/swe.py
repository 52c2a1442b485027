"""SWE, the shared-weights extender (Chatzis, Kordonis, Theodosis, Maragos,
"Shared-Weights Extender and Gradient Voting for Neural Network Expansion", 2025, arXiv
2509.18842).

New units are coupled to the present ones while they settle in, so that those which
receive no gradient of their own move with the gradients of the others. One layer at a
time, deepest first: insert, adjust, merge.

    coupled forward    old unit i: W_i - sum_j D[j, i]        new unit j: V_j + sum_i
    D[j, i] its gradient       dL/dD[j, i] = G_new_j - G_old_i        G: gradient of the
    effective weights

V starts as the layer draws its weights, U' = [U | 0] going out, D near zero. Adjusting
trains D and all of the next layer for one pass over the data; everything else is frozen
and in eval mode. Merging keeps the coupled function and drops D.

Beyond the paper, the same formulas on every axis: d is whatever one unit has in a
tensor (a kernel, a column of an embedding); every tensor that produces the units has a
coupling of its own (both halves of a gated unit, all producers of a residual stream,
depthwise kernels), norms on the axis are extended by their neutral values, "the next
layer" is every module that reads the units, and tied weights count as next layer. Only
the sums R = sum_j D[j] and C = sum_i D[:, i] reach the forward pass, so under SGD they
are all that is needed:

    dR_i = -lr (sum_j G_new_j - m G_old_i)        dC_j = -lr (n G_new_j - sum_i G_old_i)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from meristem.core.axis import Axis, Kind, Slot
from meristem.core.change import Plan, Sources, index
from meristem.core.errors import DataError, GrowthRefused
from meristem.core.offer import Offer, Settled
from meristem.lab.laboratory import Lab, Sandbox
from meristem.lab.ledger import counting
from meristem.lab.neutral import neutral
from meristem.statistics.health import Figures, measure
from meristem.structure.twin import named_tensors, submodule
from meristem.surgery.tensors import new_units

# Standard deviation of the coupling at the start.
_NOISE = 1e-4
# Operations per coupling number and step: two sums, its gradient, Adam. The counter
# of contractions does not see them.
_STEP_WORK = 16
# Batches that the running statistics of new units are taken from.
_NORM_BATCHES = 10


@dataclass(frozen=True)
class SWE:
    """New units coupled to the present ones while they settle in. Trains on all of the
    data, on the side.

    The insertion preserves the function; adjusting then changes it, for the better on
    the training data.

    Args:
        coupling: "full" holds one vector per pair of a new and an old unit (the paper;
            m n d numbers, four times with gradient and Adam's moments); "factored" only
            their sums ((n + m) d numbers), equal under SGD, and an approximation under
            Adam, with steps of the same largest size (n x and m x the learning rate).
            We measured no difference between them but the cost.
        optimizer: What adjusts: "adam" as published, or "sgd".
        lr: Its learning rate.
        coupling_lr: The learning rate of the coupling; None for `lr`, as published. Every
            weight of an old unit takes part in as many couplings as there are new units
            and moves by as many steps: at the published 1e-3 that is too far for a
            training that goes on with its optimizer.
        weight_decay: L2, as torch.optim.Adam has it.
        decay_base: Also decay the frozen weights of the layer, by about `lr` per step,
            as the released code does.

    Examples:
        >>> import torch, meristem as ms
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> data = [(torch.randn(16, 4), torch.randn(16, 2)) for _ in range(10)]
        >>> loss = lambda model, batch: torch.nn.functional.mse_loss(model(batch[0]), batch[1])
        >>> growth = ms.grow_(net, {"0": 3}, how=ms.how.SWE(), loss=loss, data=data)
        >>> growth.after, list(growth.health)
        ({'0': 11}, ['insertion', 'adjust'])
    """

    coupling: Literal["full", "factored"] = "factored"
    optimizer: Literal["adam", "sgd"] = "adam"
    lr: float = 1e-3
    coupling_lr: float | None = 1e-4
    weight_decay: float = 1e-4
    decay_base: bool = False

    def __post_init__(self) -> None:
        if self.coupling not in _COUPLINGS:
            raise ValueError(
                f'SWE(coupling=...) is "full" or "factored"; got {self.coupling!r}'
            )
        if self.optimizer not in ("adam", "sgd"):
            raise ValueError(
                f'SWE(optimizer=...) is "adam" or "sgd"; got {self.optimizer!r}'
            )
        for name in ("lr", "coupling_lr", "weight_decay"):
            value = getattr(self, name)
            if value is None and name == "coupling_lr":
                continue
            if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(
                    f"SWE({name}=...) must be a float in [0, inf); got {value}"
                )

    @classmethod
    def published(cls, coupling: Literal["full", "factored"] = "full") -> SWE:
        """The setting of the paper: one rate for everything, for stages that start a
        fresh optimizer (`meristem.recipes.swe_svod_stages`).
        """
        return cls(coupling=coupling, coupling_lr=None)

    @property
    def kinds(self) -> Mapping[Kind, bool]:
        return {"width": self.preserves, "heads": self.preserves}

    @property
    def preserves(self) -> bool:
        return False

    @property
    def batches(self) -> int:
        return 1

    def propose(self, lab: Lab, axis: Axis, count: int) -> Offer:
        """The insertion: fan-in and biases as the layer draws them, zero fan-out."""
        if axis.end:
            raise GrowthRefused(
                f"SWE adjusts the layer after; {axis.name!r} is an end. hint: "
                "how.Random grows it"
            )
        return Offer(axis.name, count, neutral(lab, axis, count, "fan_out"))

    def settle(self, sandbox: Sandbox, counts: Mapping[str, int]) -> Settled:
        """Insert, adjust, merge, the deepest axis first; the grown values of everything
        that has changed.
        """
        health: dict[str, dict[str, Figures]] = {"insertion": {}, "adjust": {}}
        notes = {}
        # The paper goes from the output to the input.
        depth = {name: place for place, name in enumerate(sandbox.lab.axes)}
        for name in sorted(counts, key=lambda name: depth.get(name, -1), reverse=True):
            axis = sandbox.lab.axes.named(name)
            offers = []
            for other, count in sandbox.lab.plan(axis, counts[name]).added.items():
                grown = sandbox.lab.axes.named(other)
                offers.append(self.propose(sandbox.lab, grown, count))
            plan, _ = sandbox.insert(offers)
            _measure_norms(sandbox, plan, axis)
            adjustment = Adjustment(self, sandbox, plan, axis)
            health["insertion"] |= _health(sandbox, plan, axis)
            losses = adjustment.adjust()
            adjustment.merge()
            health["adjust"] |= _health(sandbox, plan, axis)
            if losses:
                first, last = (
                    sum(part) / len(part) for part in (losses[:10], losses[-10:])
                )
                notes[name] = (
                    f"adjusted in {len(losses)} steps; loss {first:.4g} in the first "
                    f"ten, {last:.4g} in the last"
                )
        tensors = {
            name: tensor.detach()
            for name, tensor in named_tensors(sandbox.model).items()
        }
        return Settled(tensors, sandbox.meter.total, health, notes)


def _measure_norms(sandbox: Sandbox, plan: Plan, axis: Axis) -> None:
    """Give batch norms the statistics of the new units, from the first batches.

    What is adjusted under a mean of 0 and a variance of 1 would have another scale as
    soon as training goes on under those of its batches.
    """
    slots = [slot for slot in axis.slots if slot.buffer]
    names = dict.fromkeys(slot.name.rpartition(".")[0] for slot in slots)
    norms: list[_BatchNorm] = []
    for name in names:
        module = submodule(sandbox.model, name)
        if isinstance(module, _BatchNorm):
            norms.append(module)
    if not norms:
        return
    buffers = dict(sandbox.model.named_buffers())
    held = {name: buffer.clone() for name, buffer in buffers.items()}
    momenta = [norm.momentum for norm in norms]
    sandbox.model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the average of all batches
        norm.train()
    with torch.no_grad():
        for batch in islice(sandbox.epoch(f"SWE looks at {axis.name}"), _NORM_BATCHES):
            sandbox.meter.run(batch, partial(sandbox.loss, batch, {}))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
    # Present units keep the statistics that training has given them.
    for slot in slots:
        new = index(new_units(plan, axis.name, slot.place).ravel())
        new = new.to(held[slot.name].device)
        held[slot.name][new] = buffers[slot.name][new]
    for name, buffer in buffers.items():
        buffer.copy_(held[name])


def _health(sandbox: Sandbox, plan: Plan, axis: Axis) -> dict[str, Figures]:
    new = {axis.name: list(range(plan.before[axis.name], plan.after[axis.name]))}
    lab = sandbox.lab
    assert lab.loss is not None
    with counting() as counter:
        figures = measure(
            sandbox.model,
            [axis],
            {axis.name: plan.layout[axis.name]},
            lab.loss,
            lab.batches,
            new,
        )
    sandbox.meter.total += counter.get_total_flops()
    return figures


class Coupling(Protocol):
    """D, or its sums, for one tensor that produces `old` + `new` units."""

    def numbers(self) -> list[tuple[Tensor, int]]:
        """What is trained, each with the factor of Adam's rate that makes its largest
        step that of the full D.
        """
        ...

    def moved(self) -> Tensor:
        """What is added to the units, old ones first."""
        ...

    def before_step(self) -> None: ...

    def after_step(self) -> None: ...


class FullCoupling:
    """D itself: (new, old, entries per unit, *other dimensions)."""

    def __init__(self, rows: Iterator[Tensor], new: int) -> None:
        self.pairs = torch.stack(list(rows)).requires_grad_()

    def numbers(self) -> list[tuple[Tensor, int]]:
        return [(self.pairs, 1)]

    def moved(self) -> Tensor:
        return torch.cat([-self.pairs.sum(0), self.pairs.sum(1)])

    def before_step(self) -> None:
        """Autograd gives dL/dD as it is."""

    def after_step(self) -> None:
        """The sums of D hand weight over by themselves."""


class FactoredCoupling:
    """The sums of D alone, as what each unit has gained: -R for old ones, C for new
    ones. The gains sum to zero.
    """

    def __init__(self, rows: Iterator[Tensor], new: int) -> None:
        # The rows are drawn one by one: all of them would be as large as the full D.
        first = next(rows)
        old = len(first)
        gained = first.new_zeros(
            old + new, *first.shape[1:]
        )  # filled in place: one row of D at a time is in memory
        for j, row in enumerate(chain([first], rows)):
            gained[:old] -= row
            gained[old + j] = row.sum(0)
        self.gained = gained.requires_grad_()
        # Views of the same memory: each side has a learning rate of its own.
        self.old, self.new = self.gained.detach()[:old], self.gained.detach()[old:]

    def numbers(self) -> list[tuple[Tensor, int]]:
        return [(self.old, len(self.new)), (self.new, len(self.old))]

    def moved(self) -> Tensor:
        return self.gained

    def before_step(self) -> None:
        """The sums of dL/dD over new and over old units, from the gradient of the
        effective weights.
        """
        gradient = self.gained.grad
        assert gradient is not None
        # The sums of dL/dD over new and over old units, see the module.
        m, n = len(self.new), len(self.old)
        old, new = gradient[:n], gradient[n:]
        from_new, from_old = new.sum(0), old.sum(0)
        self.old.grad = old.mul_(m).sub_(from_new)
        self.new.grad = new.mul_(n).sub_(from_old)
        self.gained.grad = None

    @torch.no_grad()
    def after_step(self) -> None:
        """What is given is taken: Adam's element-wise steps are brought back to a sum
        of zero.
        """
        # Half of it from each side, so that neither drifts.
        surplus = self.gained.sum(0)
        self.old -= surplus / (2 * len(self.old))
        self.new -= surplus / (2 * len(self.new))


_COUPLINGS: dict[str, type[FullCoupling] | type[FactoredCoupling]] = {
    "full": FullCoupling,
    "factored": FactoredCoupling,
}


class Adjustment:
    """One axis of a sandbox between insertion and merge.

    Attributes:
        free: The next layer: tensors that are trained whole, by name.
        couplings: What produces the units, with its coupling.
    """

    def __init__(self, method: SWE, sandbox: Sandbox, plan: Plan, axis: Axis) -> None:
        self.method, self.sandbox, self.plan, self.axis = method, sandbox, plan, axis
        sandbox.model.eval()
        self.base = {
            name: tensor.detach()
            for name, tensor in named_tensors(sandbox.model).items()
        }
        self.free = {
            name: self.base[name].clone().requires_grad_()
            for name in self._next_layer()
        }
        self.couplings: list[tuple[Slot, Coupling]] = []
        for slot in axis.slots:
            produces = (
                slot.role != "fan_out"
                and slot.fill in ("draw", "bias")
                and not slot.buffer
            )
            if produces and slot.name in sandbox.trained:
                self.couplings.append((slot, self._coupling(slot)))
        self.decayed = []
        if method.decay_base:
            names = dict.fromkeys(slot.name for slot, _ in self.couplings)
            self.decayed = [name for name in names if name not in self.free]
            self.base |= {name: self.base[name].clone() for name in self.decayed}

    def _next_layer(self) -> list[str]:
        """Every trained weight that reads the units, and the biases of the same layers."""
        names = []
        for slot in self.axis.places("fan_out"):
            names.append(slot.name)
            module_name, _, _ = slot.name.rpartition(".")
            module = submodule(self.sandbox.model, module_name)
            bias = f"{module_name}.bias"
            if next(module.children(), None) is None and isinstance(
                getattr(module, "bias", None), nn.Parameter
            ):
                names.append(bias)
        return [name for name in dict.fromkeys(names) if name in self.sandbox.trained]

    def _coupling(self, slot: Slot) -> Coupling:
        layout = self.plan.layout[self.axis.name][slot.place]
        value = self.base[slot.name]
        new = self.plan.added[self.axis.name] // self.axis.grain
        shape = (
            len(layout) - new,
            layout.shape[1],
            *[n for d, n in enumerate(value.shape) if d != slot.dim],
        )
        draw = self.sandbox.lab.normal
        return _COUPLINGS[self.method.coupling](
            (_NOISE * draw(shape, value) for _ in range(new)), new
        )

    def effective(self) -> dict[str, Tensor]:
        """The tensors of the coupled forward pass, where they differ from the
        sandbox's.
        """
        tensors = {name: self.base[name] for name in self.decayed} | dict(self.free)
        for slot, coupling in self.couplings:
            value = tensors.get(slot.name, self.base[slot.name])
            layout = self.plan.layout[self.axis.name][slot.place]
            tensors[slot.name] = value + _spread(
                coupling.moved(), value, slot.dim, layout
            )
        return tensors

    def adjust(self) -> list[float]:
        """Train the coupling and the next layer for one pass over the data; returns the
        loss of every step.
        """
        numbers = [
            (tensor, factor)
            for _, coupling in self.couplings
            for tensor, factor in coupling.numbers()
        ]
        if not numbers and not self.free:
            return []
        optimizer = self._optimizer(numbers)
        work = _STEP_WORK * sum(tensor.numel() for tensor, _ in numbers)
        losses = []
        for batch in self.sandbox.epoch(f"SWE adjusts {self.axis.name}"):
            step = partial(self._step, batch, optimizer)
            losses.append(self.sandbox.meter.run(batch, step, work))
        return losses

    def merge(self) -> None:
        """Write the coupled values into the sandbox's model; the coupling is not needed
        any more.
        """
        merged = {name: tensor.detach() for name, tensor in self.effective().items()}
        odd = [
            name
            for name, tensor in merged.items()
            if not bool(torch.isfinite(tensor).all())
        ]
        if odd:
            raise DataError(
                f"adjusting {self.axis.name} diverged: {odd[0]} is not finite; nothing "
                "was grown. hint: a smaller lr"
            )
        with torch.no_grad():
            for name, tensor in named_tensors(self.sandbox.model).items():
                if name in merged:
                    tensor.copy_(merged[name])

    def _optimizer(self, numbers: list[tuple[Tensor, int]]) -> torch.optim.Optimizer:
        method = self.method
        # The coupling may learn slower than the next layer.
        rate = method.lr if method.coupling_lr is None else method.coupling_lr
        adam = method.optimizer == "adam"
        groups = [
            {"params": [tensor], "lr": (factor if adam else 1) * rate}
            for tensor, factor in numbers
        ]
        groups.append(
            {
                "params": [
                    *self.free.values(),
                    *(self.base[name] for name in self.decayed),
                ]
            }
        )
        kind = torch.optim.Adam if adam else torch.optim.SGD
        return kind(
            [group for group in groups if group["params"]],
            lr=method.lr,
            weight_decay=method.weight_decay,
        )

    def _step(self, batch: object, optimizer: torch.optim.Optimizer) -> float:
        optimizer.zero_grad()
        loss = self.sandbox.loss(batch, self.effective())
        if not loss.requires_grad:
            raise GrowthRefused(
                f"the loss does not reach {self.axis.name}, so nothing can settle "
                "there; nothing was changed. hint: how.Random"
            )
        loss.backward()
        # A gradient of zero lets Adam see the weight decay alone, as the released code
        # does.
        for name in self.decayed:
            self.base[name].grad = torch.zeros_like(self.base[name])
        for _, coupling in self.couplings:
            coupling.before_step()
        optimizer.step()
        for _, coupling in self.couplings:
            coupling.after_step()
        return loss.item()


def _spread(moved: Tensor, value: Tensor, dim: int, layout: Sources) -> Tensor:
    """`moved`, unit by unit, laid out along `dim` of a tensor like `value`; zero where
    there are no units.
    """
    flat = moved.flatten(0, 1).movedim(0, dim)
    where = layout.ravel()
    if len(where) == value.shape[dim] and bool((where == np.arange(len(where))).all()):
        return flat
    return torch.zeros_like(value).index_copy(dim, index(where).to(value.device), flat)
