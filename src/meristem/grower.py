"""The grower: decides, inside a user's own training loop, when and where to grow, and does it."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from meristem.care import Care
from meristem.core.axis import Axis
from meristem.core.budget import Budget
from meristem.core.change import Plan
from meristem.core.errors import DataError, GrowthRefused
from meristem.core.growth import Growth
from meristem.core.offer import Proposal, Share
from meristem.growing import (
    HEALTH_BATCHES,
    Methods,
    Optimizers,
    cares,
    check_parts,
    followed,
    growable,
    method_for,
    methods,
    most_batches,
    optimizers,
    perform,
    private_generator,
    proposed,
)
from meristem.how.protocol import Thrifty
from meristem.pruning import prune_
from meristem.statistics.batches import check_reiterable, first_call, growth_batches, length
from meristem.statistics.flops import batch_size, counting, step_flops
from meristem.statistics.health import look
from meristem.statistics.losses import Loss
from meristem.structure import Structure, clash, resized, resolve
from meristem.structure.undisturbed import undisturbed
from meristem.surgery.optimizers import check_ownership
from meristem.view import Progress, View
from meristem.when import Clock, Rations, When
from meristem.where import Choice, Uniform, Where

MOMENTS = (1, 10, 100, 1000)
"""Steps after a growth at which the health of its units is measured."""
BEFORE, RECOVERY = 20, 200
"""Steps that the loss before a growth is averaged over, and steps after it in which a spike is looked for."""

Amount = int | float | Sequence[int | float] | Mapping[str, int]


class Grower:
    """Grows `model` while you train it: call `step` after every optimizer step.

    Args:
        model: Any module that runs.
        optimizer: The optimizer, or all of them, whose state follows.
        loss: `loss(model, batch)`, a scalar, the mean over the batch.
        data: A DataLoader or any re-iterable of batches; read on the side, by a loader of the grower's own.
        when: The trigger.
        how: The method, or several: the first that speaks for the kind of an axis grows it. A kind that none speaks for gets
            random units with zero fan-out, or `how.ZeroBlock`.
        where: Which axis gets how many units.
        care: What the optimizer and the old weights get; a warm second moment by default.
        amount: Units per growth: an int over all axes, a fraction of the present widths, a list of either (one per
            growth), or {axis: count}. An int is shared out among the widths that `axes` lets grow, or among the depths
            where `axes` or the methods speak for these alone (runs of blocks first); `where.ByGain(per_flop=True)` weighs both.
        budget: Upper limits; a growth that would pass one grows what fits.
        axes: Glob patterns of the axes that may grow; a leading "!" excludes.
        round_to: Grown sizes are rounded down to a multiple of this.
        example: The example input; by default the model's first call inside `loss` on the first batch.
        generator: The source of randomness; by default a private one of the model.
        progress: Called as `progress(phase, done, total)` while a method trains on the side.

    Attributes:
        history: Every `Growth` so far.
        done: True once nothing more can grow; `reason` says why, or why nothing grew last.
        flops: Floating-point operations that all growths and checks cost together, without later looks at their health.

    Raises:
        GrowthRefused: The model is wrapped, or nothing in it can grow.
        DataError: `data` is empty, or can be read only once.
        OptimizerError: An optimizer does not hold the model's parameters.

    Examples:
        >>> import torch, meristem as ms
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> data = [(torch.randn(16, 4), torch.randn(16, 2)) for _ in range(5)]
        >>> grower = ms.Grower(
        ...     net, optimizer, loss=lambda model, batch: ((model(batch[0]) - batch[1]) ** 2).mean(),
        ...     data=data, when=ms.when.Every(epochs=1), how=ms.how.Random(), amount=4,
        ... )
        >>> for batch in data:
        ...     loss = grower.loss(net, batch); optimizer.zero_grad(); loss.backward(); optimizer.step()
        ...     growth = grower.step(loss)
        >>> growth.after
        {'0': 12}
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizers,
        *,
        loss: Loss,
        data: Iterable[Any],
        when: When,
        how: Methods,
        where: Where | None = None,
        care: Care | Sequence[Care] | None = None,
        amount: Amount = 32,
        budget: Budget | None = None,
        axes: str | Sequence[str] = "*",
        round_to: int = 1,
        example: Any = None,
        generator: torch.Generator | None = None,
        progress: Progress | None = None,
    ) -> None:
        check_reiterable(data)
        self.model, self.loss, self.data = model, loss, data
        self.optimizers = optimizers(optimizer)
        self.when, self.how, self.where = when, methods(how), where if where is not None else Uniform()
        self.care = cares(care)
        self.amount = amount
        self.budget = budget if budget is not None else Budget()
        self.axes = axes
        self.round_to = round_to
        self.generator = generator if generator is not None else private_generator(model)
        self.clock = Clock()
        self.history: list[Growth] = []
        self.metrics: list[tuple[int, float]] = []
        self.progress = progress
        self._losses: deque[Tensor | float] = deque(maxlen=BEFORE + RECOVERY)
        self.done = False
        self.reason = ""
        self._epoch_length = length(data)
        self._example = example
        self._step_cost: float | None = None
        check_parts(self.how, self.care)
        if not hasattr(when, "due") or isinstance(when, type):
            raise TypeError(f"when must be a trigger such as meristem.when.Every(steps=100); got {when!r}")
        if not isinstance(self.budget, Budget):
            raise TypeError(f"budget must be a meristem.Budget(parameters=..., units=...); got {budget!r}")
        if not hasattr(self.where, "share") or isinstance(self.where, type):
            raise TypeError(f"where must be a choice such as meristem.where.Uniform(); got {where!r}")
        self._check()

    @property
    def flops(self) -> int:
        return round(self.clock.growing)

    def _check(self) -> None:
        """Find out now, not at the first growth, whether the model and the optimizer will do."""
        for amount in _amounts(self.amount):
            if not isinstance(amount, (int, float)) or isinstance(amount, bool) or amount <= 0:
                raise ValueError(f"amount must be positive: units, or a fraction of the present widths; got {amount!r}")
            if isinstance(self.amount, Mapping) and not isinstance(amount, int):
                raise ValueError(f"amount by axis is a number of units; got {dict(self.amount)!r}")
        if self.round_to < 1:
            raise ValueError(f"round_to must be an int in [1, inf); got {self.round_to}")
        with undisturbed():
            structure = self._structure()
            found = growable(structure, self.axes, self.how)
        plain = [self.axes] if isinstance(self.axes, str) else self.axes
        spelt = [p.removeprefix("!") for p in plain if not set(p) & set("*?[")]
        for name in (*self.budget.sizes, *spelt):
            structure.axes.named(name)
        named = set(self.amount) if isinstance(self.amount, Mapping) else set(found)
        for name in named:
            found.named(name)
        if not named:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in list(found.frozen.items())[:3])
            raise GrowthRefused(f"nothing in the model can grow under axes={self.axes!r}. {reasons}")
        slots = {slot.name for name in named for slot in found.named(name).slots}
        live = dict(self.model.named_parameters())
        check_ownership(self.optimizers, {n: live[n] for n in slots & live.keys() if live[n].requires_grad})
        for name in named & structure.depths.keys():
            check_ownership(self.optimizers, followed(structure, resized(structure, {name: 1})))

    def _one_batch(self) -> Any:
        """A growth batch that the generator does not notice."""
        state = self.generator.get_state()
        try:
            (batch,) = growth_batches(self.data, 1, self.generator)
        finally:
            self.generator.set_state(state)
        return batch

    def _structure(self) -> Structure:
        if self._example is None:
            self._example = first_call(self.model, self.loss, self._one_batch())
        return Structure(self.model, self._example)

    def step(self, loss: Tensor | float | None = None) -> Growth | None:
        """Count one optimizer step, after it; grow if it is time. Returns the growth, or None.

        Args:
            loss: The training loss of the step, for triggers that watch it.

        Raises:
            PendingBackward: A graph still holds the weights. Nothing has changed.
            DataError: The loss of a growth batch is not finite. Nothing has changed.
        """
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise ValueError(f"step(loss) takes the scalar training loss; got a tensor of shape {tuple(loss.shape)}")
        if loss is not None:
            self._losses.append(loss.detach() if isinstance(loss, Tensor) else loss)
        ended = self._epoch_length is not None and (self.clock.step + 1) % self._epoch_length == 0
        counted = isinstance(self.when, Rations) and not self.done
        self.clock = replace(
            self.clock,
            step=self.clock.step + 1,
            epoch=self.clock.epoch + int(ended),
            epoch_ended=ended,
            trained=self.clock.trained + (self._cost_of_a_step() if counted else 0.0),
        )
        self._complete_health()
        return self._grow_if_due()

    def epoch(self, metric: float | None = None) -> Growth | None:
        """Record the end of an epoch and its metric. Counts the epoch only where the length of `data` is unknown."""
        if metric is not None:
            self.metrics.append((self.clock.step, float(metric)))
        if self._epoch_length is not None:
            return None
        self.clock = replace(self.clock, epoch=self.clock.epoch + 1, epoch_ended=True)
        growth = self._grow_if_due()
        self.clock = replace(self.clock, epoch_ended=False)
        return growth

    def _cost_of_a_step(self) -> float:
        """Floating-point operations of a training step at the present sizes; counted again after every growth."""
        if self._step_cost is None:
            with undisturbed(), contextlib.suppress(DataError):  # a loss that is not finite is for the training to see
                batch = self._one_batch()
                self._step_cost = step_flops(self.model, self.loss, batch) * batch_size(batch)
        return self._step_cost or 0.0

    def _grow_if_due(self) -> Growth | None:
        if self.done or not self.when.due(self.clock):
            return None
        return self._check_and_grow(self.when.allowance(self.clock) if isinstance(self.when, Rations) else math.inf)

    def grow(self) -> Growth | None:
        """Grow now, whatever the trigger says. Returns the growth, or None where nothing grows: `reason` says why, and `done`
        whether for good.

        Raises:
            PendingBackward: A graph still holds the weights. Nothing has changed.
            DataError: The loss of a growth batch is not finite. Nothing has changed.
        """
        return None if self.done else self._check_and_grow(math.inf)

    def _check_and_grow(self, allowance: float) -> Growth | None:
        """Grow, if something is worth it and finding that out costs no more than `allowance`."""
        state, clock = self.generator.get_state(), self.clock
        try:
            with undisturbed():
                growth, cost = self._grow(allowance)
        except BaseException:
            self.generator.set_state(state)
            self.clock = clock
            raise
        self.clock = replace(self.clock, growing=self.clock.growing + cost, latest=float(cost) or self.clock.latest)
        if growth is not None:
            growth.step = self.clock.step
            self.history.append(growth)
            self._step_cost = None
            self.clock = replace(self.clock, growths=self.clock.growths + 1, refusals=0, least=0.0)
        return growth

    def prune(self, tolerance: float = 1e-3) -> list[Growth]:
        """Remove, axis by axis, units that the others can do without (`meristem.prune_`); growth may go on afterwards.

        Args:
            tolerance: Largest rise of the loss at every axis, relative to it.

        Returns:
            What was done, one for every axis that has become smaller. They are not in `history`, nor do they count as growths.
        """
        done = []
        for axis in growable(self._structure(), self.axes).values():
            if axis.kind == "depth":
                continue
            with contextlib.suppress(GrowthRefused):  # read by something that the score does not know
                growth = prune_(
                    self.model, axis.name, self._example, loss=self.loss, data=self.data, optimizer=self.optimizers,
                    tolerance=tolerance, generator=self.generator,
                )  # fmt: skip
                if growth is not None:
                    growth.step = self.clock.step
                    done.append(growth)
                    self.clock = replace(self.clock, growing=self.clock.growing + growth.flops, refusals=0, least=0.0)
                    self.done, self.reason, self._step_cost = False, "", None
                    for earlier in self.history:
                        if axis.name in earlier.added:  # its units are not followed any more
                            earlier.health["pruned"] = {axis.name: {"step": float(self.clock.step)}}
        return done

    def _grow(self, allowance: float) -> tuple[Growth | None, int]:
        """The growth, or None where nothing grows, and what finding out and doing it cost."""
        if self.budget.growths is not None and self.clock.growths >= self.budget.growths:
            return self._finish(f"the budget of {self.budget.growths} growths is used up")
        structure = self._structure()
        if isinstance(self.amount, Mapping):
            axes = [structure.axes.named(name) for name in self.amount]
        else:
            axes = self._open(structure)
        if not axes:
            return self._finish("every axis has reached the largest size that the budget allows")
        total = self._total(axes)
        if total is None:
            return self._finish("the list of amounts is used up")
        if not isinstance(self.amount, Mapping) and total < min(axis.multiple for axis in axes):
            return self._finish(f"an amount of {total} is less than one step of any axis")
        if self.where.reads_gains and not isinstance(self.amount, Mapping):
            axes = [axis for axis in axes if self._allowed(structure, {axis.name: self._least(axis)})]
            if not axes:
                return self._finish("the budget leaves no room for another unit")
        if allowance < math.inf:
            self.clock = replace(self.clock, least=self._least_cost(structure, axes, total))
            if allowance < self.clock.least:
                return None, 0
        self.clock = replace(self.clock, checked_step=self.clock.step, checked_epoch=self.clock.epoch)
        batches = growth_batches(self.data, most_batches(self.how), self.generator)
        view = View(structure, self.generator, self.loss, batches, self.data, self.progress, allowance / len(axes))
        offered: dict[str, Proposal] = {}
        if isinstance(self.amount, Mapping):
            share = Share(dict(self.amount))
        else:
            if self.where.reads_gains:
                offered = self._offers(view, axes, total)
                axes = [axis for axis in axes if axis.name in offered]
            added = {axis.name: resized(structure, {axis.name: axis.multiple}) for axis in axes}
            flops = {axis.name: max(_more(added[axis.name].flops), 1) / axis.multiple for axis in axes}
            parameters = {axis.name: max(_more(added[axis.name].parameters), 1) / axis.multiple for axis in axes}
            share = self.where.share(
                Choice(axes, total, self.clock.growths, self.clock.refusals, offered, flops, parameters, view)
            )
        cost = share.flops + sum(offer.flops for offer in offered.values())
        if share.refusal:
            self.clock = replace(self.clock, refusals=self.clock.refusals + 1)
            self.done, self.reason = share.final, share.refusal
            return None, cost
        named = {axis.name: axis for axis in axes}
        planned = self._fitting(structure, named, share.counts)
        if planned is None:  # a few good units of one axis may be less than a step of it
            steps = {name: self._least(named[name]) for name in share.counts if name in offered}
            fits = {name: step for name, step in steps.items() if step <= offered[name].count}
            planned = self._fitting(structure, named, fits) if fits else None
        if planned is None:
            return self._finish(
                "the budget leaves no room for another unit"
                if self.budget != Budget()
                else f"an amount of {total} is less than one step of any axis (multiples, round_to={self.round_to})",
                cost,
            )
        if planned.refusal is not None:
            raise GrowthRefused(f"{', '.join(planned.after)} cannot grow together: {planned.refusal}")
        if offered:
            wider = any(axis.kind != "depth" for axis in axes if axis.name in planned.after)
            deep = {axis.name for axis in axes if axis.kind == "depth"} if wider else set()
            proposals = [offered[name].best(count) for name, count in planned.added.items() if name not in deep]
        else:
            proposals = proposed(view, planned, self.how)
        growth = perform(view, planned, proposals, self.how, self.care, self.optimizers)
        growth.flops += share.flops + sum(p.flops for name, p in offered.items() if name not in planned.after)
        growth.votes = share.votes
        return growth, growth.flops

    def _open(self, structure: Structure) -> list[Axis]:
        """The axes that may still grow, without those that multiply an earlier one (groups, and the width of a group)."""
        kept: list[Axis] = []
        axes = list(growable(structure, self.axes, self.how).values())
        if not self.where.weighs_kinds:  # one sort: what the methods speak for, widths first, runs before places
            wide = [axis for axis in axes if axis.kind != "depth"]
            deep = [axis for axis in axes if axis.kind == "depth"]
            runs = [axis for axis in deep if structure.depths[axis.name].form == "run"]
            spoken = {kind for method in self.how for kind in method.kinds}
            axes = (runs or deep) if spoken == {"depth"} else (wide or deep)
        for axis in axes:
            room = self.budget.sizes.get(axis.name, axis.size + axis.multiple) - axis.size
            if room >= axis.multiple and clash(structure, [*[other.name for other in kept], axis.name]) is None:
                kept.append(axis)
        return kept

    def _total(self, axes: Sequence[Axis]) -> int | None:
        """Units to give away at this growth, or None where the list of amounts has ended."""
        amount: Any = self.amount
        if isinstance(amount, Mapping):
            return 0
        if isinstance(amount, Sequence):
            if self.clock.growths >= len(amount):
                return None
            amount = amount[self.clock.growths]
        return round(amount * sum(axis.size for axis in axes)) if isinstance(amount, float) else int(amount)

    def _least_cost(self, structure: Structure, axes: Sequence[Axis], total: int) -> float:
        """What the smallest check costs, by what the methods say, and by what the last one cost where one of them cannot."""
        view = View(structure, self.generator, self.loss, [self._one_batch()], self.data)
        cost = 0.0
        for axis in axes:
            method = method_for(self.how, axis)
            if not isinstance(method, Thrifty):
                cost = max(cost, self.clock.latest)
                continue
            with contextlib.suppress(GrowthRefused):  # it will take no part
                cost += method.least(view, axis, self._asked(axis, total))
        return cost

    def _asked(self, axis: Axis, total: int) -> int:
        """For how many units of an axis its method is asked."""
        if isinstance(self.amount, Mapping):
            return self.amount[axis.name]
        return max(total // axis.multiple, 1) * axis.multiple

    def _offers(self, view: View, axes: Sequence[Axis], total: int) -> dict[str, Proposal]:
        """What the methods offer for every axis; an axis that its method refuses takes no part."""
        offers: dict[str, Proposal] = {}
        reasons = []
        for axis in axes:
            try:
                offers[axis.name] = method_for(self.how, axis).propose(view, axis, self._asked(axis, total))
            except GrowthRefused as refusal:
                reasons.append(str(refusal))
        if not offers:
            raise GrowthRefused(reasons[0])
        return offers

    def _least(self, axis: Axis) -> int:
        """The fewest units by which an axis can grow."""
        step = math.lcm(axis.multiple, self.round_to) if axis.kind != "depth" else 1
        return step - axis.size % step

    def _fitting(self, structure: Structure, axes: Mapping[str, Axis], counts: Mapping[str, int]) -> Plan | None:
        """The plan for the largest share of `counts` that the budget allows, or None where not one unit fits."""

        def shrunk(fraction: float) -> dict[str, int]:
            result = {}
            for name, count in counts.items():
                axis = axes[name]
                cap = self.budget.sizes.get(name)
                wanted = int(count * fraction) if cap is None else min(int(count * fraction), cap - axis.size)
                target = axis.size + wanted
                target -= target % self.round_to if axis.kind != "depth" else 0
                wanted = (target - axis.size) // axis.multiple * axis.multiple
                if wanted > 0:
                    result[name] = wanted
            return result

        everything = shrunk(1.0)
        if everything and self._allowed(structure, everything):
            return resolve(structure, everything)
        low, high = 0.0, 1.0
        for _ in range(24):
            middle = (low + high) / 2
            trial = shrunk(middle)
            low, high = (middle, high) if not trial or self._allowed(structure, trial) else (low, middle)
        fitting = shrunk(low)
        return resolve(structure, fitting) if fitting else None

    def _allowed(self, structure: Structure, counts: Mapping[str, int]) -> bool:
        sizes = resized(structure, counts)
        limits = (
            (self.budget.parameters, sizes.parameters[1]),
            (self.budget.flops, sizes.flops[1] / structure.batch),
            (self.budget.units, _units(structure, counts)),
        )
        return all(limit is None or value <= limit for limit, value in limits)

    def _finish(self, reason: str, cost: int = 0) -> tuple[None, int]:
        self.done, self.reason = True, reason
        return None, cost

    def _complete_health(self) -> None:
        """Measure the units of earlier growths where one of the moments has come. Never stops the user's training."""
        now = self.clock.step
        for growth in self.history:
            age = now - growth.step if growth.step is not None else 0
            if age in MOMENTS and "pruned" not in growth.health:
                self.measure(growth, str(age))
            if age == RECOVERY and len(self._losses) == self._losses.maxlen:
                growth.health["loss"] = _spike([float(loss) for loss in self._losses])

    def measure(self, growth: Growth, moment: str) -> None:
        """Add the health of a growth's units, as they are now, to `growth.health[moment]`; its cost to `growth.health_flops`."""
        state = self.generator.get_state()
        try:
            with undisturbed(), counting() as counter:
                structure = self._structure()
                axes = [structure.axes.named(name) for name in growth.added]
                for axis in axes:
                    if axis.size < growth.after[axis.name]:
                        raise GrowthRefused(f"{axis.name} has been narrowed since; its units are not followed any more")
                batches = growth_batches(self.data, HEALTH_BATCHES, self.generator)
                growth.health[moment] = look(structure, axes, self.loss, batches, self._units_now(growth))
        except Exception as error:  # a look at the units never stops the training
            growth.health[moment] = {"error": f"{type(error).__name__}: {error}"}
        finally:
            self.generator.set_state(state)
        growth.health_flops += counter.get_total_flops()

    def _units_now(self, growth: Growth) -> dict[str, Sequence[int]]:
        """Where the new units of a growth are now: blocks move where later ones came between them."""
        units = growth.units()
        for later in self.history[self.history.index(growth) + 1 :]:
            for name in units.keys() & later.blocks.keys():
                kept = [place for place in range(later.after[name]) if place not in later.blocks[name]]
                units[name] = [kept[place] for place in units[name]]
        return units

    def state_dict(self) -> dict[str, Any]:
        """Clock, history, metrics and generator: what a resumed run needs to grow as if it had never stopped."""
        return {
            "clock": vars(self.clock).copy(),
            "history": [growth.json() for growth in self.history],
            "metrics": [list(entry) for entry in self.metrics],
            "done": self.done,
            "reason": self.reason,
            "losses": [float(loss) for loss in self._losses],
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; the model and optimizer are loaded separately (see `meristem.load`)."""
        missing = {"clock", "history", "metrics", "done", "reason", "losses", "generator"} - set(state)
        if missing:
            raise DataError(f"this is not the state of a Grower: {', '.join(sorted(missing))} missing")
        self.clock = Clock(**state["clock"])
        self.history = [Growth(**entry | {"parameters": tuple(entry["parameters"])}) for entry in state["history"]]
        self.metrics = [(int(step), float(value)) for step, value in state["metrics"]]
        self.done, self.reason = bool(state["done"]), str(state["reason"])
        self._losses.clear()
        self._losses.extend(float(loss) for loss in state["losses"])
        self._step_cost = None
        self.generator.set_state(state["generator"])


def _amounts(amount: Amount) -> list[Any]:
    if isinstance(amount, Mapping):
        return list(amount.values())
    return list(amount) if isinstance(amount, Sequence) else [amount]


def _more(pair: tuple[int, int]) -> int:
    return pair[1] - pair[0]


def _units(structure: Structure, counts: Mapping[str, int]) -> int:
    """Units of all widths together, with those that `counts` adds."""
    return sum(axis.size + counts.get(axis.name, 0) for axis in structure.axes.values() if axis.kind != "depth")


def _spike(losses: Sequence[float]) -> dict[str, float | None]:
    """The loss before a growth, how far above it the running mean of ten steps rose, and the step that met it again."""
    before = sum(losses[:BEFORE]) / BEFORE
    after = losses[BEFORE:]
    means = [sum(after[i : i + 10]) / 10 for i in range(len(after) - 9)]
    recovered = next((i + 10 for i, mean in enumerate(means) if mean <= before), None)
    return {"before": before, "spike": max(means) - before, "steps_to_recover": recovered}
