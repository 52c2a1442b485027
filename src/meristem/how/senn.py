"""SENN's offers (Mitchell, Menzenbach, Kersting, Mundt, "Self-Expanding Neural
Networks", 2024, arXiv 2307.04526).

A new unit is a random one whose incoming weights have been optimised, by autograd, on
what it would add to the score:

    Delta eta' = Tr[S^-1 C A_p^-1 C^T],     C = E[g_r a_p^T],     g_r = g - dW A^-1 a,

where a_p is what the next layer would read from it, and S, A and dW are that layer's
(`statistics.curvature`). Its outgoing weights are zero, so the function is preserved. A
new layer of a chain is the identity behind an activation that is the identity too; it
adds to the score through the coefficients of that activation, or through the units that
it makes room for. A new block of a run is silent and adds through its last projections.

Differences from the paper: units are optimised on some of the growth batches, and their
gain, Delta eta, is measured on the others, where that has not flattered them; several
units are offered at once, each by what it adds to those before it; any activation;
convolutions over unfolded patches. A gain is given without the part that pure chance
gives, one per outgoing weight and example.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from meristem.activations import IDENTITIES, PReLU, Rational
from meristem.core.axis import Axis, Kind, Place
from meristem.core.errors import GrowthRefused
from meristem.core.offer import Blocks, Offer
from meristem.how.blocks import inserted, silenced
from meristem.how.candidates import next_layers
from meristem.how.search import LOOKS, Search, sampling_error, searched
from meristem.how.zero_block import ZeroBlock
from meristem.lab.batches import length
from meristem.lab.laboratory import Lab
from meristem.lab.ledger import Meter, batch_size
from meristem.lab.losses import Loss
from meristem.methods import check_counts, check_positive
from meristem.statistics.curvature import (
    DAMPING,
    Curvature,
    Watched,
    damped,
    effective,
    measure,
    score,
    scored,
    whitened,
)
from meristem.structure import Structure, flops, sized
from meristem.structure.twin import submodule

# Units that are tried in the width that a layer opens.
_OPENED = 8
# Growth batches that are seen at least, whatever they cost.
_FEWEST = 6
# Share of the cost of a layer that goes to the search for units in the width that it
# opens.
_UNITS_SHARE = 0.75


@dataclass(frozen=True)
class SENN:
    """New units optimised on the score that they add, identity layers behind rational
    activations, silent blocks.

    Args:
        candidates: Random units that are optimised side by side; as many as are wanted,
            where that is more.
        steps: Growth batches that their search takes, again from the first where there
            are fewer.
        batches: Growth batches; candidates are optimised on two thirds of them and
            measured on the others. Steps and batches are fewer where a trigger allows
            less.
        damping: Share of its mean diagonal that is added to every factor.
        activation: What stands before an inserted layer: "rational", as published, or
            "prelu", with a slope for every unit. Both start as the identity.

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
                "the activation of an inserted layer is one of "
                f"{', '.join(IDENTITIES)}; got {self.activation!r}"
            )
        check_counts("SENN", candidates=self.candidates, batches=self.batches)
        check_counts("SENN", 0, steps=self.steps)
        check_positive("SENN", damping=self.damping)

    @property
    def kinds(self) -> Mapping[Kind, bool]:
        return {"width": True, "depth": True}

    @property
    def preserves(self) -> bool:
        return True

    @property
    def _search(self) -> Search:
        return Search(self.candidates, self.steps, self.batches, self.damping)

    def least(self, lab: Lab, axis: Axis, count: int) -> float:
        """About the floating-point operations of the smallest offer for an axis."""
        if not axis.slots and lab.depth(axis).copied:
            return _FEWEST * _block_pass(lab, axis, count)
        if not axis.slots:
            layer = _inserted(lab, axis, self.activation)
            if layer.opened is None:
                return _FEWEST * _pass(layer.lab)
            search, opened = self._smallest(lab), layer.opened
            return search.cost(layer.lab, opened, _OPENED * opened.grain) / _UNITS_SHARE
        return self._smallest(lab).cost(lab, axis, count)

    def _smallest(self, lab: Lab) -> Search:
        number = length(lab.data) if lab.data is not None else len(lab.batches)
        return replace(
            self._search, batches=min(self.batches, number or self.batches)
        ).least

    def propose(self, lab: Lab, axis: Axis, count: int) -> Offer:
        """The best units that were found, or new blocks; `gains` are what each adds to
        the score, beyond chance.
        """
        loss = lab.user_loss("SENN")
        if axis.slots:
            return searched(lab, loss, axis, count, self._search)
        if lab.depth(axis).copied:
            return self._block(lab, loss, axis, count)
        return self._layer(lab, loss, axis, count)

    def _block(self, lab: Lab, loss: Loss, axis: Axis, count: int) -> Offer:
        """Silent blocks of a run; each adds the score of its silent layers."""
        offered = ZeroBlock().propose(lab.silent(), axis, count)
        assert offered.blocks is not None
        copied, made = inserted(lab, axis, offered.blocks)
        names = {id(module): name for name, module in copied.named_modules()}
        silent: dict[int, set[str]] = {}
        for place, tensor in silenced(lab, offered.blocks.insertion).values:
            module = submodule(made[place][1], tensor.rpartition(".")[0])
            silent.setdefault(place, set()).update(
                {names[id(module)]} if scored(module) else ()
            )
        # Several blocks may share layers: each is looked at once.
        watched = sorted(set().union(*silent.values()))
        meter = Meter()
        number = _affordable(lab, self.batches, _block_pass(lab, axis, count))
        first, second = replace(self._search, batches=number).parts(lab.batches)[0]
        parts = [
            measure(copied, loss, part, watched, meter).layers
            for part in (first, second)
        ]
        gains, freedom, samples = [], 0.0, 1
        for listed in silent.values():
            # a layer may be used without being called
            one, other = (
                Curvature({name: part[name] for name in listed if name in part})
                for part in parts
            )
            # With one part of the examples there is nothing to add.
            both = list((one if second is first else one + other).layers.values())
            freedom = sum(
                effective(layer.outputs, self.damping) * layer.gradient.shape[1]
                for layer in both
            )
            samples = max((layer.samples for layer in both), default=1)
            gains.append(
                score(one, other, self.damping)
                - (freedom / samples if second is first else 0.0)
            )
        return replace(
            offered,
            gains=tuple(gains),
            error=sampling_error(freedom, samples),
            freedom=freedom,
            flops=offered.flops + meter.total,
        )

    def _layer(self, lab: Lab, loss: Loss, axis: Axis, count: int) -> Offer:
        """Identity layers of a chain.

        The first adds what its activation can give at the identity, or what the best new
        units of the width that it opens would give, whichever is the surer; those behind
        it add nothing yet.
        """
        # SENN inserts behind an activation of its own, not behind a ReLU.
        insertion = replace(lab.depth(axis).appended(count), activation=self.activation)
        layer = _inserted(lab, axis, self.activation)
        # An identity layer can pay by itself, or by the units that it makes room for.
        opened = layer.opened
        if opened is None:
            number = _affordable(layer.lab, self.batches, _pass(layer.lab))
            found = [self._coefficients(layer, loss, number)]
        else:
            units = layer.lab.within(_UNITS_SHARE * lab.allowance)
            search = self._search.within(units, opened, _OPENED * opened.grain)
            found = [self._coefficients(layer, loss, search.batches)]
            # Where nothing is seen of what reads the width, the coefficients count alone.
            with contextlib.suppress(GrowthRefused):
                found.append(self._units(units, loss, opened))
        surest = _surest(found)
        return replace(
            surest,
            axis=axis.name,
            count=count,
            strips={},
            blocks=Blocks(insertion),
            gains=(surest.gains[0], *[0.0] * (count - 1)),
            flops=sum(offer.flops for offer in found),
        )

    def _units(self, lab: Lab, loss: Loss, axis: Axis) -> Offer:
        """The best new units of a width, as many as are surest; their gain is one."""
        offer = searched(lab, loss, axis, _OPENED * axis.grain, self._search)
        several = []
        for number in range(1, len(offer.gains) + 1):
            several.append(
                replace(
                    offer,
                    gains=(sum(offer.gains[:number]),),
                    error=math.sqrt(number) * offer.error,
                    freedom=number * offer.freedom,
                )
            )
        return _surest(several)

    def _coefficients(self, layer: _Inserted, loss: Loss, number: int) -> Offer:
        """The score of the coefficients of an inserted activation on so many batches.

        At the identity, of its tangents

            d sigma / d beta = 1 / (1 + x^2),     d sigma / d gamma = x / (1 + x^2)

        (rational), beyond what is linear in the input of the layer before it, which its
        own weights reach.
        """
        batches, meter = list(layer.lab.batches)[:number], Meter()
        looked = [layer.tangents(loss, batch, meter) for batch in batches[:LOOKS]]
        reads = torch.cat([one.read for one in looked])
        features = torch.cat([one.features for one in looked])
        reached = torch.linalg.cholesky(damped(reads.T @ reads, self.damping))
        explains = torch.cholesky_solve(reads.T @ features, reached)
        gradient, fisher, samples = torch.zeros(()), torch.zeros(()), 0
        # The first batches were looked at already; the others are, one at a time.
        later = (layer.tangents(loss, batch, meter) for batch in batches[LOOKS:])
        for one in itertools.chain(looked, later):
            each = one.of_examples(explains)
            gradient = gradient + each.sum(0)
            fisher = fisher + each.T @ each
            samples += len(each)
        fisher = fisher / samples
        mean = gradient[:, None] / samples
        score = whitened(damped(fisher, self.damping), mean).square().sum().item()
        free = effective(fisher, self.damping)
        return Offer(
            "",
            1,
            gains=(score - free / samples,),
            error=sampling_error(free, samples),
            freedom=free,
            flops=meter.total,
        )


@dataclass(frozen=True)
class _Tangents:
    """What the coefficients of an activation see of one batch, in rows.

    Attributes:
        read: What the layer before reads.
        back: The gradient that comes back, once for every coefficient.
        features: The tangents of the activation.
        samples: How many examples these are.
    """

    read: Tensor
    back: Tensor
    features: Tensor
    samples: int

    def of_examples(self, explains: Tensor) -> Tensor:
        """(samples, coefficients): the gradient of each example's coefficients.

        Beyond what is linear in what the layer before reads.
        """
        each = self.back * (self.features - self.read @ explains)
        rows = len(each) // self.samples
        whole = each[: self.samples * rows]
        return whole.reshape(self.samples, rows, each.shape[1]).sum(1)


@dataclass(frozen=True)
class _Inserted:
    """A copy of the model with one identity layer more, in `lab`: the activation before
    it, the layer before that, whose width is the axis `opened`, where SENN can grow it.
    """

    model: nn.Module
    lab: Lab
    activation: Rational | PReLU
    before: str
    opened: Axis | None

    def tangents(self, loss: Loss, batch: Any, meter: Meter) -> _Tangents:
        """What the coefficients of the activation see of one batch."""
        with Watched(self.model, [self.before]) as watched:
            meter.run(batch, lambda: watched.run(loss, batch))
        read, back, given = watched.rows(self.before)
        tangents = self.activation.tangents(given)
        repeated = back.repeat(1, len(tangents))
        samples = watched.used(self.before)
        features = torch.cat(tangents, 1).double()
        return _Tangents(read.double(), repeated.double(), features, samples)


def _inserted(lab: Lab, axis: Axis, activation: str) -> _Inserted:
    blocks = Blocks(replace(lab.depth(axis).appended(1), activation=activation))
    model, made = inserted(lab, axis, blocks)
    ((_, block),) = made.values()
    stands = next(
        module
        for module in block.children()
        if isinstance(module, IDENTITIES[activation])
    )
    assert isinstance(stands, (Rational, PReLU))
    before = _layer_before(model, stands)
    structure = Structure(model, lab.structure.example)
    looked = lab.of(structure)
    return _Inserted(model, looked, stands, before, _width(looked, before))


def _width(lab: Lab, layer: str) -> Axis | None:
    """The axis of the units of a layer, where SENN can grow it."""
    place = Place(f"{layer}.weight", 0)
    for axis in lab.structure.axes.values():
        if place in [slot.place for slot in axis.slots]:
            with contextlib.suppress(GrowthRefused):
                next_layers(lab, axis)
                return axis
    return None


def _pass(lab: Lab) -> float:
    """Floating-point operations of a growth batch, forward and backward."""
    return (
        3 * flops(lab.structure, {}) / lab.structure.batch * batch_size(lab.batches[0])
    )


def _block_pass(lab: Lab, axis: Axis, count: int) -> float:
    """The same with `count` more blocks of a run, and the moments of their last
    projections, which cost about as much again.
    """
    more = sized(lab.structure, {axis.name: count}).flops
    return 2 * _pass(lab) * more[1] / max(more[0], 1)


def _affordable(lab: Lab, most: int, each: float) -> int:
    """How many growth batches the allowance of a lab pays for, up to `most`."""
    if lab.allowance == math.inf:
        return most
    return min(most, max(_FEWEST, int(lab.allowance / max(each, 1.0))))


def _surest(offers: Sequence[Offer]) -> Offer:
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
