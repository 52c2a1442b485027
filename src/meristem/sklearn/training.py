"""How a net for a table is trained: it starts as the best linear one, grows for as long
as that pays, and is trained with a falling rate.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from meristem import where
from meristem.core.axis import Axis, Kind
from meristem.core.budget import Budget
from meristem.core.growth import Growth
from meristem.core.offer import Blocks, Offer, Share
from meristem.grower import Grower
from meristem.growing import find_axes, grow_, plan
from meristem.how import SENN, Random
from meristem.lab.laboratory import Lab
from meristem.lab.ledger import Meter
from meristem.when import Every
from meristem.where import Choice

STEPS = 4000
"""Steps of training after the last growth, about: passes are as many as that takes, in
`PASSES`.
"""
PASSES = (40, 200)
WIDTHS = (64, 96, 128)
"""At its n-th round of growth a net gets n hidden layers, each of WIDTHS[n - 1] units at
least; later rounds grow what SENN's rule names alone.
"""
AVERAGED, EVERY = 0.99, 4
"""Weight of the past, per step, in the running average of the weights that a trained
net ends with; steps between two additions to it.
"""
LOOKED_AT = 512
"""Examples in a batch on which growth is measured, at the most."""
LEAST = 32
"""Units that a width gains at least by SENN's rule."""
SMALL = 20
"""Fewer examples than this are too few to look for growth."""
SEPARATED = 0.01
"""Share of the training examples that a linear net gets wrong, below which the score
has nothing left to look at.
"""
SURE = 2.0
"""Standard errors by which a larger net must do better on held-out data, where these
alone decide.
"""

EachLoss = Callable[[Tensor, Tensor], Tensor]
"""The loss of every example, from outputs and targets."""


class Batches:
    """Shuffled minibatches of tensors of nearly one size, in another order at every
    pass, drawn from torch's own generator.
    """

    def __init__(self, size: int, *tensors: Tensor) -> None:
        self.size, self.tensors = size, tensors

    def __len__(self) -> int:
        return -(-len(self.tensors[0]) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for rows in torch.randperm(len(self.tensors[0])).tensor_split(len(self)):
            yield tuple(tensor[rows] for tensor in self.tensors)


@dataclass(frozen=True)
class Settings:
    """What an estimator was told.

    Attributes:
        rate, decay: Of AdamW.
        passes: Most passes over the data.
        patience, tolerance: Passes without a better held-out loss after which training
            ends, and the relative improvement that counts.
        growths, between: Most growths, and the passes between two of them.
        parameters: Largest number of trained numbers.
        linear_steps: Steps of L-BFGS towards the best linear net.
        classes: Whether the targets are classes.
        smoothing: Share of every label that is spread over all classes once the net has
            grown.
        verbose: Whether a line is printed after every pass.
    """

    rate: float
    decay: float
    passes: int
    patience: int
    tolerance: float
    growths: int
    between: int
    parameters: int | None
    linear_steps: int
    classes: bool
    smoothing: float = 0.0
    verbose: bool = False


@dataclass
class Record:
    """What has been done so far.

    Attributes:
        losses, held_out: After every pass.
        growths: Every growth.
        rounds: How often the net has grown; a round may be several growths.
        meter: What all of it has cost.
    """

    losses: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    growths: list[Growth] = field(default_factory=list)
    rounds: int = 0
    meter: Meter = field(default_factory=Meter)


def linear(inputs: int, outputs: int) -> nn.Sequential:
    """A linear net; from zero the best one is the same for every seed."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return nn.Sequential(layer)


def layers(model: nn.Module) -> list[nn.Linear]:
    """The linear layers, in order."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def hidden(model: nn.Module) -> list[int]:
    """The widths of the hidden layers, in order."""
    return [layer.out_features for layer in layers(model)][:-1]


class Trainer:
    """One net in training."""

    def __init__(
        self, model: nn.Sequential, told: Settings, each: EachLoss, record: Record
    ) -> None:
        self.told, self.record, self._each = told, record, each
        self.take(model)

    def take(self, model: nn.Sequential) -> None:
        """Train this net from here on."""
        self.model = model
        told = self.told
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            told.rate,
            (0.9, 0.95),
            weight_decay=told.decay,
            fused=True,
        )

    def loss(self, model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        """The mean training loss of a batch."""
        return self._mean(model(batch[0]), batch)

    def _mean(self, outputs: Tensor, batch: Sequence[Tensor]) -> Tensor:
        _, targets, importance = batch
        loss: Tensor = (self._each(outputs, targets) * importance).mean()
        return loss

    def _smoothed(self, batch: Sequence[Tensor]) -> Tensor:
        outputs = self.model(batch[0])
        loss = self._mean(outputs, batch)
        if not self.told.smoothing or not hidden(self.model):
            return loss
        spread = -(outputs.log_softmax(1).mean(1) * batch[2]).mean()
        smooth: Tensor = (1 - self.told.smoothing) * loss + self.told.smoothing * spread
        return smooth

    # -- the whole -----------------------------------------------------------------

    def fit(
        self, data: Batches, held_out: Sequence[Tensor], fresh: bool = True
    ) -> None:
        """Grow early, then train."""
        if fresh:
            self.solve(data.tensors)
        self.grow(data, held_out)
        if not hidden(self.model) and self._separated(data.tensors):
            self._try_larger(data, held_out)
        else:
            self.train(data, held_out)

    def solve(self, tensors: Sequence[Tensor]) -> None:
        """The best linear net, to which new units have to add something.

        Before it is reached, what a change of its weights would give, the scale of its
        outputs above all, looks like a feature that is missing.
        """
        optimizer = torch.optim.LBFGS(
            self.model.parameters(),
            max_iter=self.told.linear_steps,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(self.model, tensors)
            loss.backward()
            return loss

        self.record.meter.run(tensors, lambda: optimizer.step(closure))

    def _separated(self, tensors: Sequence[Tensor]) -> bool:
        """Whether a net that may grow gets nearly all training examples right."""
        if not self.told.classes or not self.told.growths:
            return False
        with torch.no_grad():
            wrong = self.model(tensors[0]).argmax(1) != tensors[1]
        share: float = wrong.double().mean().item()
        return share < SEPARATED

    def _try_larger(self, data: Batches, held_out: Sequence[Tensor]) -> None:
        """Train the linear net and a larger one; held-out data decide.

        What a change of scale would mend does not count.
        """
        before = copy.deepcopy(self.model)
        self.train(data, held_out)
        kept, alone = self.model, self._best_scaled(held_out)
        self.take(before)
        growths = self._climb(data, 2)
        if not growths:
            self.take(kept)
            return
        self.train(data, held_out)
        won = alone - self._best_scaled(held_out)
        sure = SURE * (won.std() / math.sqrt(len(won))).item()
        if won.mean().item() > sure:
            self.record.growths += growths
            self.record.rounds += 1
        else:
            self.take(kept)

    def _best_scaled(self, held_out: Sequence[Tensor]) -> Tensor:
        """The held-out losses, example by example, at the best scale of the outputs."""
        with torch.no_grad():
            outputs = self.model(held_out[0])
            scales = 2.0 ** torch.arange(-3, 7, 0.25)
            tried = [self._each(scale * outputs, held_out[1]) for scale in scales]
        return min(tried, key=lambda losses: losses.mean().item())

    def calibrate(self, held_out: Sequence[Tensor]) -> None:
        """Scale the outputs for the best held-out loss."""
        with torch.no_grad():
            outputs = self.model(held_out[0])
            scales = 2.0 ** torch.arange(-2, 2.1, 0.125)
            losses = [self._mean(scale * outputs, held_out) for scale in scales]
            best = scales[int(torch.stack(losses).argmin())]
            # A scale of the outputs is one of the last layer.
            for parameter in layers(self.model)[-1].parameters():
                parameter.mul_(best)

    # -- growing -------------------------------------------------------------------

    def grow(self, data: Batches, held_out: Sequence[Tensor]) -> None:
        """Grow a few passes apart, for as long as SENN's rule finds something."""
        grower = self._grower(data)
        while grower is not None and not grower.done and not self._spent:
            if not self.grown(grower, data):
                return
            for _ in range(self.told.between):
                if not self._spent:
                    self.one_pass(data, held_out)

    @property
    def _spent(self) -> bool:
        return len(self.record.losses) >= self.told.passes

    def _grower(self, data: Batches) -> Grower | None:
        """What grows the net; None where growth is used up, or cannot be measured: too
        few examples, or targets all alike.
        """
        examples, left = len(data.tensors[0]), self.told.growths - self.record.rounds
        varied = bool((data.tensors[1] != data.tensors[1][0]).any())
        if examples < SMALL or left < 1 or not varied:
            return None
        # Twelve batches at least, so that a third of them can measure.
        looked = Batches(max(1, min(LOOKED_AT, examples // 12)), *data.tensors)
        return Grower(
            self.model,
            self.optimizer,
            loss=self.loss,
            data=looked,
            when=Every(epochs=1),
            where=_Bold(),
            how=SENN(activation="prelu", steps=12),
            budget=Budget(parameters=self.told.parameters, growths=left),
        )

    def grown(self, grower: Grower, data: Batches) -> bool:
        """Whether the net has grown by SENN's rule, and by what the ladder of shapes
        adds to it.
        """
        before = grower.flops
        amount = max(_bold(width) for width in hidden(self.model) or [1])
        grower.settings = replace(grower.settings, amount=amount)
        growth = grower.grow()
        self.record.meter = self.record.meter.at_new_size()
        self.record.meter.total += grower.flops - before
        if growth is None:
            return False
        self.record.rounds += 1
        self.record.growths.append(self._noted(growth))
        self.record.growths += self._climb(data, self.record.rounds)
        return True

    def grow_once(self, data: Batches) -> None:
        """One round of growth, where SENN's rule finds something."""
        grower = self._grower(data)
        if grower is not None:
            self.grown(grower, data)

    def _noted(self, growth: Growth) -> Growth:
        growth.step = len(self.record.losses)
        return growth

    def _climb(self, data: Batches, rounds: int) -> list[Growth]:
        """Grow to a step of the ladder of shapes, where the budget has room for it."""
        if rounds > len(WIDTHS):
            return []
        example = data.tensors[0][:4]
        done: list[Growth] = []
        while len(hidden(self.model)) < rounds:
            axes = find_axes(self.model, example)
            place = [name for name, axis in axes.items() if not axis.slots][-1]
            if not self._allowed({place: 1}, example):
                return done
            done.append(self._grow({place: 1}, example))
        counts = {}
        for name, axis in find_axes(self.model, example).items():
            if axis.slots and axis.size < WIDTHS[rounds - 1]:
                counts[name] = WIDTHS[rounds - 1] - axis.size
        if counts and self._allowed(counts, example):
            done.append(self._grow(counts, example))
        return done

    def _allowed(self, counts: Mapping[str, int], example: Tensor) -> bool:
        most = self.told.parameters
        return most is None or plan(self.model, counts, example).parameters[1] <= most

    def _grow(self, counts: Mapping[str, int], example: Tensor) -> Growth:
        how = (_Identity(), Random())
        growth = grow_(self.model, counts, example, how=how, optimizer=self.optimizer)
        self.record.meter = self.record.meter.at_new_size()
        self.record.meter.total += growth.flops
        return self._noted(growth)

    # -- training ------------------------------------------------------------------

    def train(self, data: Batches, held_out: Sequence[Tensor]) -> None:
        """Train with a rate that falls to zero along a cosine, until the held-out loss of
        the averaged weights stands still; the net ends with those that had the lowest.
        """
        passes = math.ceil(STEPS / len(data))
        passes = min(max(passes, PASSES[0]), PASSES[1])
        passes = max(min(passes, self.told.passes - len(self.record.losses)), 0)
        weights = [parameter.detach() for parameter in self.model.parameters()]
        average = [weight.clone() for weight in weights]
        best = [weight.clone() for weight in weights]
        lowest = self._held_out_loss(held_out)
        waited = 0
        for number in range(passes):
            if waited == self.told.patience:
                break
            schedule = _Cosine(self.told.rate, number / passes, 1 / passes)
            value = self.one_pass(data, held_out, average, schedule)
            waited += 1
            if value < lowest * (1 - self.told.tolerance):
                best, lowest, waited = [one.clone() for one in average], value, 0
        for weight, found in zip(weights, best, strict=True):
            weight.copy_(found)
        for group in self.optimizer.param_groups:
            group["lr"] = self.told.rate

    def one_pass(
        self,
        data: Batches,
        held_out: Sequence[Tensor],
        average: list[Tensor] | None = None,
        schedule: _Cosine | None = None,
    ) -> float:
        """One pass of training; the held-out loss after it, of the averaged weights
        where there are some.
        """
        weights = [parameter.detach() for parameter in self.model.parameters()]
        total, batches = 0.0, len(data)
        for number, batch in enumerate(data):
            if schedule is not None:
                for group in self.optimizer.param_groups:
                    group["lr"] = schedule.rate(number / batches)
            loss = self.record.meter.run(batch, partial(self._step, batch))
            total += loss * len(batch[0])
            if average is not None and number % EVERY == EVERY - 1:
                for mean, weight in zip(average, weights, strict=True):
                    mean.lerp_(weight, 1 - AVERAGED**EVERY)
        self.record.losses.append(total / len(data.tensors[0]))
        value = self._held_out_loss(held_out, average)
        self.record.held_out.append(value)
        if self.told.verbose:
            losses = f"loss {self.record.losses[-1]:.4f}, held out {value:.4f}"
            print(
                f"pass {len(self.record.losses)}: {losses}, hidden {hidden(self.model)}"
            )
        return value

    def _step(self, batch: Sequence[Tensor]) -> float:
        loss = self._smoothed(batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def _held_out_loss(
        self, held_out: Sequence[Tensor], average: Sequence[Tensor] | None = None
    ) -> float:
        """The held-out loss; of the averaged weights, where these are given."""
        tensors: dict[str, Tensor] = {}
        if average is not None:
            names = [name for name, _ in self.model.named_parameters()]
            tensors = dict(zip(names, average, strict=True))
        with torch.no_grad():
            outputs = functional_call(self.model, tensors, (held_out[0],))
            return self._mean(outputs, held_out).item()


@dataclass(frozen=True)
class _Cosine:
    """A part of a rate that falls along a cosine: `length` of it, from `start` on."""

    most: float
    start: float
    length: float

    def rate(self, part: float) -> float:
        """The rate at a part of the part."""
        done = self.start + part * self.length
        return self.most * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class _Identity:
    """Identity layers of a chain behind a PReLU of slope one."""

    kinds: ClassVar[Mapping[Kind, bool]] = {"depth": True}
    batches: ClassVar[int] = 0

    def propose(self, lab: Lab, axis: Axis, count: int) -> Offer:
        insertion = replace(lab.depth(axis).appended(count), activation="prelu")
        return Offer(axis.name, count, blocks=Blocks(insertion))


@dataclass(frozen=True)
class _Bold:
    """The axis that adds most by SENN's rule gets half of what it has, `LEAST` units at
    least, or one layer.

    Held-out data stop training in time, so units need not be worth their parameters one
    by one, as the rule asks.
    """

    reads_gains: ClassVar[bool] = True
    weighs_kinds: ClassVar[bool] = True

    def share(self, choice: Choice) -> Share:
        share = where.SENN(patience=1, per="growth").share(choice)
        kinds = {axis.name: axis for axis in choice.axes}
        counts = {}
        for name in share.counts:
            axis = kinds[name]
            counts[name] = _bold(axis.size) if axis.slots else 1
        return replace(share, counts=counts)


def _bold(width: int) -> int:
    return max(LEAST, width // 2)
