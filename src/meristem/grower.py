"""The grower: decides, inside a user's own training loop, when to grow."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from meristem.amounts import Amount, check_amount
from meristem.calendar import MOMENTS, RECOVERY, LossRecord, units_now
from meristem.core.budget import Budget
from meristem.core.errors import DataError, GrowthRefused
from meristem.core.growth import Growth
from meristem.event import (
    HEALTH_BATCHES,
    Cares,
    Methods,
    Optimizers,
    all_or_nothing,
    batches_for,
    cares,
    followed,
    methods,
    optimizers,
)
from meristem.growable import growable
from meristem.growing import private_generator
from meristem.lab.batches import (
    check_reiterable,
    first_call,
    growth_batches,
    length,
    peeked,
)
from meristem.lab.laboratory import Progress
from meristem.lab.ledger import batch_size, counting, step_flops
from meristem.lab.losses import Loss
from meristem.methods import Clock, When, Where, check_part, rations
from meristem.pruning import prune_
from meristem.sharing import Check, Found, find_growth
from meristem.statistics.health import look
from meristem.structure import Structure, apart, sized, structure_of
from meristem.structure.undisturbed import undisturbed
from meristem.surgery.optimizers import check_ownership
from meristem.when import TRIGGERS
from meristem.where import PLACES, Uniform


class Grower:
    """Grows `model` while you train it: call `step` after every optimizer step.

    Args:
        model: Any module that runs.
        optimizer: The optimizer, or all of them, whose state follows.
        loss: `loss(model, batch)`, a scalar, the mean over the batch.
        data: A DataLoader or any re-iterable of batches; read on the side, by a loader
            of the grower's own.
        when: The trigger.
        how: The method, or several: the first that speaks for the kind of an axis grows
            it. A kind that none speaks for gets random units with zero fan-out, or
            `how.ZeroBlock`.
        where: Which axis gets how many units.
        care: What the optimizer and the old weights get; a warm second moment by
            default.
        amount: Units per growth: an int over all axes, a fraction of the present
            widths, a list of either (one per growth), or {axis: count}. An int is
            shared out among the widths that `axes` lets grow, or among the depths where
            `axes` or the methods speak for these alone (runs of blocks first);
            `where.ByGain(per_flop=True)` weighs both.
        budget: Upper limits; a growth that would pass one grows what fits.
        axes: Glob patterns of the axes that may grow; a leading "!" excludes.
        round_to: Grown sizes are rounded down to a multiple of this.
        example: The example input; by default the model's first call inside `loss` on
            the first batch.
        generator: The source of randomness; by default a private one of the model.
        progress: Called as `progress(phase, done, total)` while a method trains on the
            side.

    Attributes:
        history: Every `Growth` so far.
        done: True once nothing more can grow; `reason` says why, or why nothing grew
            last.
        flops: Floating-point operations that all growths and checks cost together,
            without later looks at their health.

    Raises:
        GrowthRefused: The model is wrapped, or nothing in it can grow.
        DataError: `data` is empty, or can be read only once.
        OptimizerError: An optimizer does not hold the model's parameters.

    Examples:
        >>> import torch, meristem as ms
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
        ... )
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> data = [(torch.randn(16, 4), torch.randn(16, 2)) for _ in range(5)]
        >>> loss = lambda model, batch: ((model(batch[0]) - batch[1]) ** 2).mean()
        >>> grower = ms.Grower(
        ...     net, optimizer, loss=loss, data=data, when=ms.when.Every(epochs=1),
        ...     how=ms.how.Random(), amount=4,
        ... )
        >>> for batch in data:
        ...     value = loss(net, batch)
        ...     optimizer.zero_grad(); value.backward(); optimizer.step()
        ...     growth = grower.step(value)
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
        care: Cares = None,
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
        self.when, self.how = when, methods(how)
        self.where = where if where is not None else Uniform()
        self.care = cares(care)
        self.amount, self.axes, self.round_to = amount, axes, round_to
        self.budget = budget if budget is not None else Budget()
        if generator is None:
            generator = private_generator(model)
        self.generator = generator
        self.progress = progress
        self.clock = Clock()
        self.history: list[Growth] = []
        self.metrics: list[tuple[int, float]] = []
        self.done, self.reason = False, ""
        self._losses = LossRecord()
        self._epoch_length = length(data)
        self._example = example
        self._step_cost: float | None = None
        check_part("when", when, TRIGGERS)
        check_part("where", self.where, PLACES)
        self._check()

    @property
    def flops(self) -> int:
        return round(self.clock.growing)

    def _check(self) -> None:
        """Find out now, not at the first growth, whether model and optimizer will do."""
        check_amount(self.amount)
        if not isinstance(self.budget, Budget):
            raise TypeError(
                "budget must be a meristem.Budget(parameters=..., units=...); got "
                f"{self.budget!r}"
            )
        if self.round_to < 1:
            raise ValueError(
                f"round_to must be an int in [1, inf); got {self.round_to}"
            )
        with undisturbed():
            structure = self._structure()
            found = growable(structure, self.axes, self.how)
        patterns = [self.axes] if isinstance(self.axes, str) else self.axes
        spelt = [p.removeprefix("!") for p in patterns if not set(p) & set("*?[")]
        for name in (*self.budget.sizes, *spelt):
            structure.axes.named(name)
        named = self.amount if isinstance(self.amount, Mapping) else found
        chosen = [found.named(name) for name in named]
        if not chosen:
            listed = list(found.frozen.items())[:3]
            reasons = "; ".join(f"{name}: {reason}" for name, reason in listed)
            raise GrowthRefused(
                f"nothing in the model can grow under axes={self.axes!r}. {reasons}"
            )
        trained = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                trained[name] = parameter
        slots = {slot.name for axis in chosen for slot in axis.slots}
        check_ownership(
            self.optimizers, {n: trained[n] for n in slots & trained.keys()}
        )
        for axis in apart(chosen)[1]:
            parents = followed(structure, sized(structure, {axis.name: 1}))
            check_ownership(self.optimizers, parents)

    def _structure(self) -> Structure:
        if self._example is None:
            batch = peeked(self.data, self.generator)
            self._example = first_call(self.model, self.loss, batch)
        return structure_of(self.model, self._example)

    # -- the calendar ------------------------------------------------------------------

    def step(self, loss: Tensor | float | None = None) -> Growth | None:
        """Count one optimizer step, after it; grow if it is time.

        Args:
            loss: The training loss of the step, for triggers that watch it.

        Returns:
            The growth, or None.

        Raises:
            PendingBackward: A graph still holds the weights. Nothing has changed.
            DataError: The loss of a growth batch is not finite. Nothing has changed.
        """
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise ValueError(
                "step(loss) takes the scalar training loss; got a tensor of shape "
                f"{tuple(loss.shape)}"
            )
        if loss is not None:
            self._losses.add(loss)
        step = self.clock.step + 1
        ended = self._epoch_length is not None and step % self._epoch_length == 0
        counted = rations(self.when) and not self.done
        cost = self._cost_of_a_step() if counted else 0.0
        self.clock = replace(
            self.clock,
            step=step,
            epoch=self.clock.epoch + int(ended),
            epoch_ended=ended,
            trained=self.clock.trained + cost,
        )
        self._complete_health()
        return self._grow_if_due()

    def epoch(self, metric: float | None = None) -> Growth | None:
        """Record the end of an epoch and its metric.

        Counts the epoch only where the length of `data` is unknown.
        """
        if metric is not None:
            self.metrics.append((self.clock.step, float(metric)))
        if self._epoch_length is not None:
            return None
        self.clock = replace(self.clock, epoch=self.clock.epoch + 1, epoch_ended=True)
        growth = self._grow_if_due()
        self.clock = replace(self.clock, epoch_ended=False)
        return growth

    def _cost_of_a_step(self) -> float:
        """Floating-point operations of a training step at the present sizes."""
        if self._step_cost is None:
            # A loss that is not finite is for the training to see.
            with undisturbed(), contextlib.suppress(DataError):
                batch = peeked(self.data, self.generator)
                each = step_flops(self.model, self.loss, batch)
                self._step_cost = each * batch_size(batch)
        return self._step_cost or 0.0

    def _grow_if_due(self) -> Growth | None:
        if self.done or not self.when.due(self.clock):
            return None
        allowance = math.inf
        if rations(self.when):
            allowance = self.when.allowance(self.clock)  # type: ignore[attr-defined]
        return self._check_and_grow(allowance)

    # -- growing -----------------------------------------------------------------------

    def grow(self) -> Growth | None:
        """Grow now, whatever the trigger says.

        Returns:
            The growth, or None where nothing grows: `reason` says why, and `done`
            whether for good.

        Raises:
            PendingBackward: A graph still holds the weights. Nothing has changed.
            DataError: The loss of a growth batch is not finite. Nothing has changed.
        """
        return None if self.done else self._check_and_grow(math.inf)

    def _check_and_grow(self, allowance: float) -> Growth | None:
        """Grow, if something is worth it, and finding out costs no more than allowed."""
        with all_or_nothing(self.generator):
            found = find_growth(self._asked(allowance))
        clock = found.clock
        clock = replace(
            clock,
            growing=clock.growing + found.flops,
            latest=float(found.flops) or clock.latest,
        )
        self.done, self.reason = found.done, found.reason or self.reason
        if found.growth is not None:
            found.growth.step = clock.step
            self.history.append(found.growth)
            self._step_cost = None
            clock = replace(clock, growths=clock.growths + 1, refusals=0, least=0.0)
        self.clock = clock
        return found.growth

    def _asked(self, allowance: float) -> Check:
        """What a check needs to know."""
        return Check(
            structure=self._structure(),
            loss=self.loss,
            data=self.data,
            generator=self.generator,
            progress=self.progress,
            how=self.how,
            where=self.where,
            care=self.care,
            optimizers=self.optimizers,
            amount=self.amount,
            budget=self.budget,
            axes=self.axes,
            round_to=self.round_to,
            clock=self.clock,
            allowance=allowance,
            batches=batches_for(self.how),
        )

    def prune(self, tolerance: float = 1e-3) -> list[Growth]:
        """Remove, axis by axis, units that the others can do without
        (`meristem.prune_`).

        Growth may go on afterwards.

        Args:
            tolerance: Largest rise of the loss at every axis, relative to it.

        Returns:
            What was done, one for every axis that has become smaller. They are not in
            `history`, nor do they count as growths.
        """
        done = []
        units, _ = apart(list(growable(self._structure(), self.axes).values()))
        for axis in units:
            try:
                growth = prune_(
                    self.model,
                    axis.name,
                    self._example,
                    loss=self.loss,
                    data=self.data,
                    optimizer=self.optimizers,
                    tolerance=tolerance,
                    generator=self.generator,
                )
            except GrowthRefused:
                continue  # read by something that the score does not know
            if growth is None:
                continue
            growth.step = self.clock.step
            done.append(growth)
            spent = self.clock.growing + growth.flops
            self.clock = replace(self.clock, growing=spent, refusals=0, least=0.0)
            self.done, self.reason, self._step_cost = False, "", None
            for earlier in self.history:
                if axis.name in earlier.added:  # its units are not followed any more
                    when = {"step": float(self.clock.step)}
                    earlier.health["pruned"] = {axis.name: when}
        return done

    # -- health ------------------------------------------------------------------------

    def _complete_health(self) -> None:
        """Measure the units of earlier growths where one of the moments has come."""
        for growth in self.history:
            age = self.clock.step - growth.step if growth.step is not None else 0
            if age in MOMENTS and "pruned" not in growth.health:
                self.measure(growth, str(age))
            if age == RECOVERY:
                spike = self._losses.spike()
                if spike is not None:
                    growth.health["loss"] = spike

    def measure(self, growth: Growth, moment: str) -> None:
        """Add the health of a growth's units, as they are now, to
        `growth.health[moment]`.

        What that costs is added to `growth.health_flops`. It never stops the training:
        an error is written down in place of the figures.
        """
        state = self.generator.get_state()
        try:
            with undisturbed(), counting() as counter:
                growth.health[moment] = self._looked(growth)
        except Exception as error:
            growth.health[moment] = {"error": f"{type(error).__name__}: {error}"}
        finally:
            self.generator.set_state(state)
        growth.health_flops += counter.get_total_flops()

    def _looked(self, growth: Growth) -> dict[str, dict[str, float]]:
        structure = self._structure()
        axes = [structure.axes.named(name) for name in growth.added]
        for axis in axes:
            if axis.size < growth.after[axis.name]:
                raise GrowthRefused(
                    f"{axis.name} has been narrowed since; its units are not followed "
                    "any "
                    "more"
                )
        batches = growth_batches(self.data, HEALTH_BATCHES, self.generator)
        return look(
            structure, axes, self.loss, batches, units_now(growth, self.history)
        )

    # -- state -------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to grow as if it had never stopped."""
        return {
            "clock": vars(self.clock).copy(),
            "history": [growth.json() for growth in self.history],
            "metrics": [list(entry) for entry in self.metrics],
            "done": self.done,
            "reason": self.reason,
            "losses": self._losses.numbers(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Model and optimizer are loaded separately (see `meristem.load`).
        """
        needed = {
            "clock",
            "history",
            "metrics",
            "done",
            "reason",
            "losses",
            "generator",
        }
        missing = needed - set(state)
        if missing:
            raise DataError(
                f"this is not the state of a Grower: {', '.join(sorted(missing))} "
                "missing"
            )
        self.clock = Clock(**state["clock"])
        self.history = []
        for entry in state["history"]:
            parameters = tuple(entry["parameters"])
            self.history.append(Growth(**{**entry, "parameters": parameters}))
        self.metrics = [(int(step), float(value)) for step, value in state["metrics"]]
        self.done, self.reason = bool(state["done"]), str(state["reason"])
        self._losses.restore(state["losses"])
        self._step_cost = None
        self.generator.set_state(state["generator"])


__all__ = ["Amount", "Found", "Grower"]
