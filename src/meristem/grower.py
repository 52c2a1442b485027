"""The grower: decides, inside a user's own training loop, when to grow."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from meristem.core.budget import Budget
from meristem.core.errors import DataError
from meristem.core.growth import Growth
from meristem.core.ranks import Ranks, replicas_of, shared
from meristem.event.amounts import Amount, is_fraction
from meristem.event.calendar import Calendar
from meristem.event.clockwork import Clockwork
from meristem.event.sharing import Check, Settings, find_growth
from meristem.event.steps import (
    Cares,
    Methods,
    Optimizers,
    all_or_nothing,
    cares,
    methods,
    optimizers,
    private_generator,
)
from meristem.event.witness import Witness
from meristem.lab.batches import check_reiterable, example_of, length
from meristem.lab.laboratory import Progress
from meristem.lab.losses import Loss
from meristem.methods import Clock, When, Where, check_counts, check_part, rations
from meristem.pruning import prune_each
from meristem.report.shown import Shown
from meristem.structure import Structure, structure_of
from meristem.structure.undisturbed import undisturbed
from meristem.surgery.aftercare import aftercare_state, load_aftercare
from meristem.surgery.host import inner, opened_host, ranks_of
from meristem.when import TRIGGERS, counts_epochs
from meristem.where import Proportional, Uniform

_STATE = frozenset(
    [
        "clock",
        "epoch_length",
        "history",
        "metrics",
        "done",
        "reason",
        "losses",
        "curve",
        "passing",
        "generator",
        "aftercare",
    ]
)


def _ranks(model: nn.Module) -> Ranks:
    """The processes that grow alike: those of a wrapper, else all with the same model."""
    ranks = ranks_of(model)
    return ranks if ranks.several else replicas_of(inner(model))


def _over_ranks(loss: Tensor | float, ranks: Ranks) -> Tensor | float:
    """The training loss, a mean over all ranks."""
    if isinstance(loss, Tensor) and loss.numel() != 1:
        raise ValueError(
            "step(loss) takes the scalar training loss; got a tensor of shape "
            f"{tuple(loss.shape)}"
        )
    if not hasattr(loss, "__float__"):
        raise TypeError(
            f"step(loss) takes the scalar training loss; got {type(loss).__name__}"
        )
    # A number would wait for the device.
    if not ranks.several:
        return loss
    return ranks.mean(loss.item() if isinstance(loss, Tensor) else loss)


def sharing_of(amount: Amount) -> Where:
    """Who gets units where nothing is said: a fraction grows every width alike."""
    return Proportional() if is_fraction(amount) else Uniform()


def _check_state(state: Mapping[str, Any]) -> None:
    missing = _STATE - set(state)
    if missing:
        raise DataError(
            f"this is not the state of a Grower: {', '.join(sorted(missing))} missing"
        )


def _steps(batches: int | None, accumulation: int, when: When) -> int | None:
    """Optimizer steps of an epoch; tells where a trigger needs them and they are not known."""
    check_counts("Grower", accumulation=accumulation)
    if batches is not None:
        return math.ceil(batches / accumulation)
    if counts_epochs(when):
        warnings.warn(
            f"data has no length, so that {type(when).__name__} is due only where the "
            "loop calls grower.epoch() at the end of every epoch",
            stacklevel=3,
        )
    return None


class Grower(Shown):
    """Grows `model` while you train it: call `step` after every optimizer step.

    Args:
        model: Any module that runs, also in DistributedDataParallel, as Accelerate
            prepared it, or compiled. Replicas on several processes grow alike: they
            measure on the batches of all.
        optimizer: The optimizer, or all of them, whose state follows.
        loss: `loss(model, batch)`, a scalar, the mean over the batch.
        data: A DataLoader or any re-iterable of batches; read on the side.
        when: The trigger.
        how: The method, or several: the first that speaks for the kind of an axis grows
            it; what none speaks for takes no part. By default Random and ZeroBlock.
        where: Which axis gets how many units; by default all the same number, or, of a
            fraction, in proportion to their sizes.
        care: What optimizer and old weights get; by default a warm second moment, and
            running statistics of batch norms that follow faster for 100 steps.
        amount: Units per growth: an int over all axes, a fraction of the present widths
            (1.0 doubles every one), a list of either (one per growth), or {axis: count}.
            An int goes to widths, or to depths where `axes` or the methods speak for
            these alone (runs of blocks first); `where.ByGain(per_flop=True)` weighs
            both, where methods for both are given.
        budget: Upper limits; a growth that would pass one grows what fits.
        axes: Names or glob patterns of the axes that may grow, or words of all layers
            (`mlp`, `heads`, `kv_heads`, `width`, `depth`, `lora_rank`; in `amount` and
            in a budget's sizes, too); a leading "!" excludes.
        round_to: Grown sizes are rounded down to a multiple of this.
        accumulation: Batches per optimizer step, where gradients are accumulated.
        example: The example input; by default the model's first call inside `loss` on
            the first batch.
        generator: The source of randomness; by default a private one of the model.
        progress: Called as `progress(phase, done, total)` by what trains on the side.

    Attributes:
        history: Every `Growth` so far.
        done: True once nothing more can grow; `reason` says why, or why nothing grew
            last.
        flops: Floating-point operations that all growths and checks cost together.

    Raises:
        GrowthRefused: Nothing in the model can grow, or it is sharded.
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
        how: Methods = None,
        where: Where | None = None,
        care: Cares = None,
        amount: Amount = 32,
        budget: Budget | None = None,
        axes: str | Sequence[str] = "*",
        round_to: int = 1,
        accumulation: int = 1,
        example: Any = None,
        generator: torch.Generator | None = None,
        progress: Progress | None = None,
    ) -> None:
        check_part("when", when, TRIGGERS)
        check_reiterable(data)
        self.host, self.model, self.when = model, inner(model), when
        generator = generator or private_generator(self.model)
        self.ranks = _ranks(model)
        self.loss, self.data = loss, shared(data, self.ranks)
        self.settings = Settings(
            loss=loss,
            data=self.data,
            generator=generator,
            progress=progress,
            how=methods(how),
            where=where if where is not None else sharing_of(amount),
            care=cares(care, optimizer),
            optimizers=optimizers(optimizer),
            amount=amount,
            budget=budget if budget is not None else Budget(),
            axes=axes,
            round_to=round_to,
            ranks=self.ranks,
        )
        self.clockwork = Clockwork(when, _steps(length(data), accumulation, when))
        self.calendar = Calendar(self.structure, loss, self.data, generator, self.ranks)
        self.done, self.reason, self._example = False, "", example
        self._step_cost: float | None = None
        # Asked once: an idle step must cost next to nothing.
        self._rationed = rations(when)
        # Find out now, not at the first growth, whether all of it will do.
        self.settings.check()
        with undisturbed():
            self.settings.check_model(self.structure())
        self._witness = Witness(self.model, self.settings.optimizers)

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        return self.settings.optimizers

    @property
    def clock(self) -> Clock:
        return self.clockwork.clock

    @property
    def metrics(self) -> list[tuple[int, float]]:
        return self.clockwork.metrics

    @property
    def history(self) -> list[Growth]:
        return self.calendar.history

    @property
    def flops(self) -> int:
        return round(self.clock.growing)

    def structure(self) -> Structure:
        """What can grow now."""
        if self._example is None:
            settings = self.settings
            self._example = example_of(
                self.model, settings.loss, settings.data, settings.generator
            )
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
            ValueError: Another model is trained than the one that was given, or by
                another optimizer. Nothing has changed.
            DataError: The loss of a growth batch is not finite. Nothing has changed.
        """
        mean = None if loss is None else _over_ranks(loss, self.ranks)
        if mean is not None:
            self.calendar.heard(self.clock.step, mean)
        # Only such a trigger weighs growth against training; others need no count.
        counted = self._rationed and not self.done
        if counted and self._step_cost is None:
            self._step_cost = self.settings.step_cost(self.model)
        self.clockwork.step(mean, (self._step_cost or 0.0) if counted else 0.0)
        self.calendar.turn(self.clock.step)
        return self._grow_if_due(loss)

    def epoch(self, metric: float | None = None) -> Growth | None:
        """Record the end of an epoch and its metric.

        Counts the epoch where `step` has not: the length of `data` is unknown, or the
        steps of an epoch were others than `accumulation` said. Grows where the trigger
        watches the metric, and it is time.
        """
        growth = None
        try:
            # step() has counted the epoch already, where its length is known.
            if self.clockwork.end_epoch():
                growth = self._grow_if_due()
            if metric is not None and self._note(metric):
                growth = growth or self._grow_if_due()
        finally:
            self.clockwork.settle()
        return growth

    def measured(self, metric: float) -> Growth | None:
        """Record a metric of an evaluation that ends no epoch; grow where the trigger
        watches it, and it is time.
        """
        try:
            return self._grow_if_due() if self._note(metric) else None
        finally:
            self.clockwork.settle()

    def _note(self, metric: float) -> bool:
        return self.clockwork.measured(self.ranks.mean(float(metric)))

    def _grow_if_due(self, loss: object = None) -> Growth | None:
        if self.done or not self.ranks.first(self.when.due(self.clock)):
            return None
        with self.ranks.together():
            self._witness.check(loss)
        allowance = math.inf
        if self._rationed:
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
        ranks, generator = self.ranks, self.settings.generator
        opened = opened_host(self.host)
        with opened, ranks.together(), all_or_nothing(generator):
            ranks.begin(self.model, generator)
            structure = self.structure()
            found = find_growth(Check(self.settings, structure, self.clock, allowance))
        self.clockwork.checked(found.clock, found.flops, found.growth is not None)
        self.done, self.reason = found.done, found.reason or self.reason
        if found.growth is not None:
            found.growth.step = self.clock.step
            self.history.append(found.growth)
            self._step_cost = None
        self._witness.renew()
        return found.growth

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
        settings = self.settings
        done = prune_each(self.structure(), settings.axes, settings, tolerance)
        for growth in done:
            growth.step = self.clock.step
            self.clockwork.spent(growth.flops)
            self.done, self.reason, self._step_cost = False, "", None
            for axis in growth.added:
                self.calendar.forget(axis, self.clock.step)
        self._witness.renew()
        return done

    # -- state -------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to grow as if it had never stopped."""
        return {
            **self.clockwork.state_dict(),
            "history": [growth.json() for growth in self.history],
            "done": self.done,
            "reason": self.reason,
            "losses": self.calendar.losses.numbers(),
            "curve": self.calendar.curve.state_dict(),
            "generator": self.settings.generator.get_state(),
            "aftercare": aftercare_state(self.model, self.optimizers),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Model and optimizer are loaded separately (see `meristem.load`).
        """
        _check_state(state)
        self.clockwork.load_state_dict(state)
        # The model and its optimizer are somebody else's to load.
        self.calendar.restore(state["history"], state["losses"])
        self.calendar.curve.load_state_dict(state["curve"])
        self.done, self.reason = bool(state["done"]), str(state["reason"])
        self._step_cost = None
        self.settings.generator.set_state(state["generator"])
        self._witness.renew()
        load_aftercare(self.model, self.optimizers, state["aftercare"])
