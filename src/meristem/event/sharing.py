"""One check of a grower: what could grow, what is worth it, what the budget allows."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from meristem.core.axis import Axis, matches
from meristem.core.budget import Budget
from meristem.core.change import Plan
from meristem.core.errors import DataError, GrowthRefused
from meristem.core.growth import Growth
from meristem.core.offer import Offer, Share
from meristem.core.ranks import ALONE, Ranks
from meristem.event.accepted import check_share
from meristem.event.amounts import (
    Amount,
    allows,
    check_amount,
    fitting_plan,
    least_step,
    total_units,
)
from meristem.event.growable import growable
from meristem.event.steps import Event, batches_for, carry_out, followed, propose
from meristem.event.words import by_axis, spelled
from meristem.lab.batches import growth_batches, peeked
from meristem.lab.laboratory import Lab, Loan, Progress
from meristem.lab.ledger import batch_size, step_flops
from meristem.lab.losses import Loss
from meristem.methods import (
    Care,
    Choice,
    Clock,
    How,
    Where,
    check_counts,
    check_part,
    is_thrifty,
)
from meristem.structure import Structure, apart, clash, sized
from meristem.structure.undisturbed import undisturbed
from meristem.surgery.optimizers import check_ownership
from meristem.where import PLACES

_NO_ROOM = "the budget leaves no room for another unit"


@dataclass(frozen=True)
class Settings:
    """What a grower was told; see `Grower` for the meaning of each."""

    loss: Loss
    data: Iterable[Any]
    generator: torch.Generator
    progress: Progress | None
    how: tuple[How, ...]
    where: Where
    care: tuple[Care, ...]
    optimizers: tuple[Optimizer, ...]
    amount: Amount
    budget: Budget
    axes: str | Sequence[str]
    round_to: int
    ranks: Ranks = ALONE

    @property
    def by_name(self) -> Mapping[str, int] | None:
        """The amounts, where they are named by axis."""
        return self.amount if isinstance(self.amount, Mapping) else None

    @property
    def patterns(self) -> Sequence[str]:
        """What `axes` says, as a list."""
        return [self.axes] if isinstance(self.axes, str) else self.axes

    def step_cost(self, model: nn.Module) -> float:
        """Floating-point operations of a training step at the present sizes."""
        # A loss that is not finite is for the training to see.
        with undisturbed(), contextlib.suppress(DataError):
            batch = peeked(self.data, self.generator)
            return step_flops(model, self.loss, batch) * batch_size(batch)
        return 0.0

    def check(self) -> None:
        """Raise where something is not what it should be."""
        check_amount(self.amount)
        check_part("where", self.where, PLACES)
        if not isinstance(self.budget, Budget):
            raise TypeError(
                "budget must be a meristem.Budget(parameters=..., units=...); got "
                f"{self.budget!r}"
            )
        check_counts("Grower", round_to=self.round_to)
        if not callable(self.loss):
            raise TypeError(
                "loss must be callable as loss(model, batch); got "
                f"{type(self.loss).__name__}"
            )
        listed = isinstance(self.patterns, (list, tuple))
        if not listed or not all(isinstance(name, str) for name in self.patterns):
            raise TypeError(
                f"axes must be a name, a pattern, or a list of them; got {self.axes!r}"
            )

    def check_model(self, structure: Structure) -> None:
        """Raise where nothing can grow, a name is unknown, or an optimizer lacks weights."""
        every = partial(growable, structure, how=self.how)
        found = growable(structure, self.axes, self.how)
        named = self.by_name or found
        for pattern in self.patterns:
            if not set(pattern) & set("*?["):
                excludes = pattern.startswith("!")
                name = pattern.removeprefix("!")
                by_axis(structure, every, {name: 0}, limits=excludes)
        by_axis(structure, every, self.budget.sizes, limits=True)
        chosen = [found.named(name) for name in by_axis(structure, every, named)]
        if not chosen:
            patterns = spelled(structure, every(), self.axes)
            asked = [name for name in found.frozen if matches(name, patterns)]
            listed = [(name, found.frozen[name]) for name in asked[:3]]
            reasons = "; ".join(f"{name}: {reason}" for name, reason in listed)
            if not asked:
                reasons = f"This model has {', '.join([*every()][:8]) or 'no axis'}"
            raise GrowthRefused(
                f"nothing in the model can grow under axes={self.axes!r}. {reasons}"
            )
        slots = {slot.name for axis in chosen for slot in axis.slots}
        trained: dict[str, Tensor] = {}
        for name, parameter in structure.model.named_parameters():
            if parameter.requires_grad and name in slots:
                trained[name] = parameter
        check_ownership(self.optimizers, trained)
        for axis in apart(chosen)[1]:
            parents = followed(structure, sized(structure, {axis.name: 1}))
            check_ownership(self.optimizers, parents)


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        settings: What the grower was told.
        structure: What can grow now.
        clock: Where training stands.
        allowance: Floating-point operations that the check may cost.
    """

    settings: Settings
    structure: Structure
    clock: Clock
    allowance: float

    @cached_property
    def by_name(self) -> dict[str, int] | None:
        """The amounts by axis, where they are named."""
        named = self.settings.by_name
        return None if named is None else self._by_axis(named)

    @cached_property
    def budget(self) -> Budget:
        """The budget, its sizes by axis."""
        budget = self.settings.budget
        return replace(budget, sizes=self._by_axis(budget.sizes, limits=True))

    def _by_axis(
        self, named: Mapping[str, int], limits: bool = False
    ) -> dict[str, int]:
        growing = partial(growable, self.structure, how=self.settings.how)
        return by_axis(self.structure, growing, named, limits=limits)

    def asked(self, axis: Axis, total: int) -> int:
        """For how many units of an axis its method is asked."""
        if self.by_name is not None:
            return self.by_name[axis.name]
        return max(total // axis.multiple, 1) * axis.multiple

    def event(self, batches: Sequence[Any], allowance: float = math.inf) -> Event:
        told = self.settings
        loan = Loan(
            told.generator,
            told.loss,
            batches,
            told.data,
            told.progress,
            allowance,
            told.ranks,
        )
        lab = Lab(self.structure, loan)
        return Event(self.structure, lab, told.how, told.care, told.optimizers)


@dataclass(frozen=True)
class Found:
    """What a check came to.

    Attributes:
        clock: Where training stands, with the check noted.
        growth: What was done, or None.
        flops: What finding out and doing it cost.
        reason: Why nothing grew.
        done: Whether nothing will grow any more.
    """

    clock: Clock
    growth: Growth | None = None
    flops: int = 0
    reason: str = ""
    done: bool = False


def find_growth(check: Check) -> Found:
    """Look for what is worth growing, and grow it."""
    clock = check.clock
    # The cheapest reasons first: nothing has been read or traced yet.
    limit = check.budget.growths
    if limit is not None and clock.growths >= limit:
        return _ended(clock, f"the budget of {limit} growths is used up")
    axes, total, reason = _what_may_grow(check)
    if reason:
        return _ended(clock, reason)
    if check.allowance < math.inf:
        clock = replace(clock, least=_least_cost(check, axes, total))
        if check.allowance < clock.least:
            return Found(clock, reason=_unaffordable(check, clock))
    # From here on it counts as a check, whatever comes of it.
    clock = replace(clock, checked_step=clock.step, checked_epoch=clock.epoch)
    # The generator moves once per check, so that a resumed run draws alike.
    batches = growth_batches(
        check.settings.data, batches_for(check.settings.how), check.settings.generator
    )
    event = check.event(batches, check.allowance / len(axes))
    offers: dict[str, Offer] = {}
    if check.by_name is not None:
        share = Share(check.by_name)
    else:
        if check.settings.where.reads_gains:
            offers = _offers(check, event, axes, total)
            axes = [axis for axis in axes if axis.name in offers]
        share = _shared(check, event, axes, total, offers)
    cost = share.flops + sum(offer.flops for offer in offers.values())
    if share.refusal:
        clock = replace(clock, refusals=clock.refusals + 1)
        return Found(clock, None, cost, share.refusal, share.final)
    plan = _planned(check, axes, share, offers, total)
    if plan is None:
        return _ended(clock, _no_room(check, total), cost)
    # Each was tried alone; together they may still meet in one attribute.
    if plan.refusal is not None:
        names = ", ".join(plan.after)
        raise GrowthRefused(f"{names} cannot grow together: {plan.refusal}")
    kept = _kept(axes, plan, offers)
    growth = carry_out(event, plan, kept)
    for name, offer in offers.items():
        # What was offered in vain was paid for, too.
        if name not in kept:
            growth.flops += offer.flops
    growth.flops += share.flops
    growth.votes = share.votes
    return Found(clock, growth, growth.flops)


def _ended(clock: Clock, reason: str, cost: int = 0) -> Found:
    return Found(clock, None, cost, reason, True)


def _unaffordable(check: Check, clock: Clock) -> str:
    """What the next check costs, and what it may cost by now."""
    allowed = max(check.allowance, 0.0)
    return (
        f"the smallest check costs {clock.least:.2g} floating-point operations, and "
        f"the trigger allows {allowed:.2g} after {clock.trained:.2g} of "
        "training. hint: a larger budget, fewer axes, or when.At, which asks for no price"
    )


def _no_room(check: Check, total: int) -> str:
    if check.budget != Budget():
        return _NO_ROOM
    return (
        f"an amount of {total} is less than one step of any axis (multiples, "
        f"round_to={check.settings.round_to})"
    )


def _what_may_grow(check: Check) -> tuple[list[Axis], int, str]:
    """The axes, the units to give away among them, and why there is nothing to do."""
    structure = check.structure
    if check.by_name is not None:
        axes = [structure.axes.named(name) for name in check.by_name]
    else:
        axes = _open_axes(check)
    if not axes:
        return [], 0, "every axis has reached the largest size that the budget allows"
    total = total_units(check.settings.amount, axes, check.clock.growths)
    if total is None:
        return [], 0, "the list of amounts is used up"
    if check.by_name is not None:
        return axes, total, ""
    # An axis that grows in larger steps, or past the budget, takes no part: a rule would
    # give it units in vain.
    axes = [axis for axis in axes if axis.multiple <= total]
    if not axes:
        return [], 0, f"an amount of {total} is less than one step of any axis"
    if check.budget == Budget():
        return axes, total, ""
    with_room = []
    for axis in axes:
        step = {axis.name: least_step(axis, check.settings.round_to)}
        if allows(check.budget, structure, step):
            with_room.append(axis)
    return with_room, total, "" if with_room else _NO_ROOM


def _open_axes(check: Check) -> list[Axis]:
    """The axes that may still grow.

    Without those that multiply an earlier one (groups, and the width of a group).
    """
    structure = check.structure
    axes = list(growable(structure, check.settings.axes, check.settings.how).values())
    if not check.settings.where.weighs_kinds:
        axes = _one_sort(check, axes)
    kept: list[Axis] = []
    for axis in axes:
        largest = check.budget.sizes.get(axis.name, axis.size + axis.multiple)
        names = [*[other.name for other in kept], axis.name]
        if largest - axis.size >= axis.multiple and clash(structure, names) is None:
            kept.append(axis)
    return kept


def _one_sort(check: Check, axes: Sequence[Axis]) -> list[Axis]:
    """Axes of one sort: widths first, runs of blocks before places of a chain."""
    units, blocks = apart(axes)
    runs = [axis for axis in blocks if check.structure.depths[axis.name].copied]
    return units or runs or blocks


def _least_cost(check: Check, axes: Sequence[Axis], total: int) -> float:
    """What the smallest check costs.

    By what the methods say, and by what the last check cost where one of them cannot
    say.
    """
    event = check.event([peeked(check.settings.data, check.settings.generator)])
    cost = 0.0
    for axis in axes:
        method = event.method(axis)
        if not is_thrifty(method):
            cost = max(cost, check.clock.latest)
            continue
        with contextlib.suppress(GrowthRefused):  # it will take no part
            count = check.asked(axis, total)
            cost += method.least(event.lab, axis, count)  # type: ignore[attr-defined]
    return cost


def _offers(
    check: Check, event: Event, axes: Sequence[Axis], total: int
) -> dict[str, Offer]:
    """What the methods offer for every axis; one that its method refuses takes no part."""
    offers: dict[str, Offer] = {}
    reasons = []
    for axis in axes:
        try:
            count = check.asked(axis, total)
            offers[axis.name] = propose(event, event.lab, axis, count)
        except GrowthRefused as refusal:
            reasons.append(str(refusal))
    if not offers:
        raise GrowthRefused(reasons[0])
    return offers


def _shared(
    check: Check,
    event: Event,
    axes: Sequence[Axis],
    total: int,
    offers: Mapping[str, Offer],
) -> Share:
    """The units by axis, as the rule shares them out."""
    flops, parameters = {}, {}
    for axis in axes:
        plan = sized(check.structure, {axis.name: axis.multiple})
        # At least 1, so that a unit that costs nothing can be compared.
        more_flops = plan.flops[1] - plan.flops[0]
        more_parameters = plan.parameters[1] - plan.parameters[0]
        flops[axis.name] = max(more_flops, 1) / axis.multiple
        parameters[axis.name] = max(more_parameters, 1) / axis.multiple
    choice = Choice(
        axes,
        total,
        check.clock.growths,
        check.clock.refusals,
        offers,
        flops,
        parameters,
        event.lab,
    )
    with event.lab.guarded(check.settings.where):
        share = check.settings.where.share(choice)
    check_share(check.settings.where, choice, share)
    return share


def _planned(
    check: Check,
    axes: Sequence[Axis],
    share: Share,
    offers: Mapping[str, Offer],
    total: int,
) -> Plan | None:
    """The plan of what the budget allows of a share, or None."""
    named = {axis.name: axis for axis in axes}
    arguments = (check.budget, check.structure, named)
    plan = fitting_plan(*arguments, share.counts, check.settings.round_to)
    if plan is not None or check.by_name is not None:
        return plan
    # What every axis gets may be less than a step of it: those with the most get one,
    # the smallest first, while the units last.
    order = sorted(
        share.counts, key=lambda name: (-share.counts[name], named[name].size)
    )
    steps: dict[str, int] = {}
    for name in order:
        step = least_step(named[name], check.settings.round_to)
        left = total - sum(steps.values())
        # A first step may take all that was offered, if that is more.
        most = offers[name].count if name in offers and not steps else left
        if step <= most:
            steps[name] = step
    return fitting_plan(*arguments, steps, check.settings.round_to) if steps else None


def _kept(
    axes: Sequence[Axis], plan: Plan, offers: Mapping[str, Offer]
) -> dict[str, Offer]:
    """The best units of the offers; more units or other blocks than offered, and blocks
    beside growing widths, are offered anew.
    """
    growing = [axis for axis in axes if axis.name in plan.after]
    units, blocks = apart(growing)
    kept = {}
    # Where widths grow, blocks are made anew on the widened copy.
    for axis in units or blocks:
        offer = offers.get(axis.name)
        count = plan.added[axis.name]
        if offer is None:
            continue
        # Where blocks stand, and what they share, hangs on how many they are.
        enough = count <= offer.count if axis.slots else count == offer.count
        if enough:
            kept[axis.name] = offer.best(count)
    return kept
