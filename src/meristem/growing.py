"""One growth, now: find_axes, plan, grow_, narrow_."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from meristem.care import FreshStatistics, Rewarm, YoungRate
from meristem.core.axis import Axes
from meristem.core.change import Plan
from meristem.core.errors import DataError, GrowthRefused
from meristem.core.growth import Growth
from meristem.core.ranks import shared
from meristem.event.growable import growable
from meristem.event.steps import (
    Cares,
    Methods,
    Optimizers,
    Origin,
    accepted,
    all_or_nothing,
    batches_for,
    cares,
    carry_out,
    methods,
    optimizers,
    prepare,
    private_generator,
)
from meristem.event.words import by_axis
from meristem.lab.batches import first_call, growth_batches
from meristem.lab.laboratory import Loan, Progress
from meristem.lab.losses import Loss
from meristem.structure import (
    Structure,
    known_example,
    resolve,
    structure_of,
    with_mirrors,
)
from meristem.structure.configs import unsaid
from meristem.structure.undisturbed import undisturbed
from meristem.surgery.host import inner, opened_host, ranks_of


def find_axes(model: nn.Module, example: Any, axes: str | Sequence[str] = "*") -> Axes:
    """The axes that `grow_` accepts, by name; prints as a table.

    The model is run on `example`, on data-free copies of its tensors, and left
    untouched. An axis is named after the module whose output units it counts; a depth,
    after the container of its blocks ("h"), a second run there "h:2". Where a layer
    fits into a chain, the depth is named after the layer that it would stand behind or,
    at the output, in front of ("fc1:depth"). `.frozen` maps what cannot grow to the
    reason; `.ends` holds the model's classes and vocabulary, `.inputs` the features that
    it reads.

    Args:
        model: Any module that runs.
        example: A tensor, a tuple of arguments or a dict of keyword arguments.
        axes: Glob patterns of the axes to keep, or words of all layers ("mlp"); a
            leading "!" excludes.

    Raises:
        DiscoveryError: The forward fails on the example.
        GrowthRefused: The model is sharded, or wrapped in what cannot be grown.

    Examples:
        >>> import torch
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
        ... )
        >>> list(find_axes(net, torch.randn(3, 4)))
        ['0', '0:depth', '2:depth']
    """
    with undisturbed():
        return growable(structure_of(inner(model), example), axes)


def listed_sizes(structure: Structure) -> dict[str, int]:
    """Sizes by axis, as records list them: a place in a chain counts once it has grown."""
    sizes = {}
    for name, axis in growable(structure).items():
        depth = structure.depths.get(name)
        if depth is None or depth.listed:
            sizes[name] = axis.size
    return sizes


def plan(model: nn.Module, counts: Mapping[str, int], example: Any) -> Plan:
    """The dry run of `grow_`: everything that would change, or the refusal and its
    reason.

    `grow_(model, plan)` carries it out; `plan.json()` stores it.

    Args:
        model: Any module that runs.
        counts: Units to add by axis name; a word of all layers ("mlp") names every axis
            that it means.
        example: A tensor, a tuple of arguments or a dict of keyword arguments.

    Returns:
        A `Plan`, false where the growth would be refused.

    Raises:
        UnknownAxis: A name is no axis of the model.
        GrowthRefused: A count is not positive or not a multiple of the axis'
            granularity.

    Examples:
        >>> import torch
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
        ... )
        >>> print(plan(net, {"0": 2}, torch.randn(3, 4)))
        0: 8 -> 10
          0.weight: (8, 4) -> (10, 4)
          0.bias: (8,) -> (10,)
          2.weight: (2, 8) -> (2, 10)
          0.out_features: 8 -> 10
          2.in_features: 8 -> 10
        parameters: 58 -> 72; forward FLOPs: 288 -> 360
    """
    checked = _counts(counts)
    with undisturbed():
        structure = structure_of(inner(model), example)
        whole = by_axis(structure, partial(growable, structure), checked)
        planned = with_mirrors(structure, planned_for(structure, whole))
        return replace(planned, unsaid=unsaid(structure, planned))


def grow_(
    model: nn.Module,
    counts: Mapping[str, int] | Plan,
    example: Any = None,
    how: Methods = None,
    *,
    care: Cares = None,
    optimizer: Optimizers = None,
    loss: Loss | None = None,
    data: Iterable[Any] | None = None,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Growth:
    """Grow a model now, in place, all or nothing.

    Module and Parameter objects stay the same objects; buffers, attributes, gradients,
    optimizer state, devices, dtypes, hooks and tied weights follow. The function is
    preserved unless the method says otherwise, and that is checked before anything
    changes.

    Args:
        model: Any module that runs.
        counts: Units to add by axis name, or what `plan` gave.
        example: A tensor, a tuple of arguments or a dict of keyword arguments; None
            takes that of the plan, else the model's first call inside `loss` on the
            first batch.
        how: The method, or several, of which the first that speaks for the kind of an
            axis grows it; by default random fan-in and zero fan-out for widths, and
            `how.ZeroBlock` for depths.
        care: What the optimizer and the old weights get; by default a warm second
            moment of the new slices, and running statistics of batch norms that follow
            faster for 100 steps.
        optimizer: The optimizer, or all of them, whose state follows.
        loss: For methods that measure or train: `loss(model, batch)`, a mean over the
            batch.
        data: A DataLoader or a re-iterable of batches, for `loss`.
        generator: The source of randomness; by default a private one of this model.
        progress: Called as `progress(phase, done, total)` by methods that train on the
            side.

    Returns:
        What was done.

    Raises:
        GrowthRefused: Unknown axis, wrong count, or the model cannot follow.
        VerificationError: The grown model would compute something else.
        OptimizerError, DataError, PendingBackward: As their names say. Nothing has
            changed in any case.

    Examples:
        >>> import torch, meristem as ms
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
        ... )
        >>> growth = ms.grow_(net, {"0": 2}, torch.randn(3, 4))
        >>> growth.after, net[0].out_features
        ({'0': 10}, 10)
    """
    # Wrong arguments are told before anything is run.
    wish = counts if isinstance(counts, Plan) else _counts(counts)
    how, care = methods(how), cares(care, optimizer)
    ranks = ranks_of(model)
    if generator is None:
        generator = private_generator(inner(model))
    with opened_host(model) as model, ranks.together(), all_or_nothing(generator):
        ranks.begin(model, generator)
        batches: list[Any] = []
        data = None if data is None else shared(data, ranks)
        if data is not None:
            # Read once: the example, the offers and the health use the same batches.
            batches = growth_batches(data, batches_for(how), generator)
        if example is None:
            example = _example(model, wish, loss, batches)
        loan = Loan(generator, loss, batches, data, progress, ranks=ranks)
        event = prepare(model, example, loan, how, care, optimizer)
        if isinstance(wish, Plan):
            planned = _same(event.structure, wish)
        else:
            every = partial(growable, event.structure, how=event.how)
            whole = by_axis(event.structure, every, wish)
            planned = planned_for(event.structure, whole)
        return carry_out(event, accepted(planned))


def _example(
    model: nn.Module, wish: Any, loss: Loss | None, batches: Sequence[Any]
) -> Any:
    """The call to look at the model on, where none was named."""
    if isinstance(wish, Plan):
        return wish.example if wish.example is not None else known_example(model)
    if loss is None or not batches:
        raise DataError("grow_ needs an example input, or loss= and data= to find one")
    return first_call(model, loss, batches[0])


def _same(structure: Structure, stored: Plan) -> Plan:
    """A stored plan, planned anew.

    Raises:
        GrowthRefused: On this model it would change something else.
    """
    planned = planned_for(structure, stored.wishes)
    # The values of the example may differ, the shapes of the edit may not.
    shapes = [(c.name, c.before, c.after) for c in planned.tensors]
    if (
        shapes != [(c.name, c.before, c.after) for c in stored.tensors]
        or _places(planned) != _places(stored)
        or (planned.before, planned.after) != (stored.before, stored.after)
    ):
        raise GrowthRefused(
            "the plan was made for another model, or for this one before it changed, or "
            "was edited. hint: make it anew with meristem.plan"
        )
    return planned


def _places(plan: Plan) -> list[tuple[str, str, int, int]]:
    """Where blocks come in, and how many; which of them are new, the method says."""
    places = []
    for one in plan.insertions:
        places.append((one.axis, one.path, one.size, len(one.blocks)))
    return places


def replay_(
    growth: Growth,
    model: nn.Module,
    *,
    example: Any = None,
    optimizer: Optimizers = None,
) -> Growth:
    """The same growth, with the same new units, on a second model of the same shape: an
    average of the weights, a teacher.

    New units get the very weights that they got in the first model; old weights stay the
    second model's own, and so do the copies that new blocks are made of.

    Args:
        growth: What `grow_`, `narrow_` or a grower gave.
        model: The second model, as large as the first one was before.
        example: The call to check it on; by default that of the growth.
        optimizer: Optimizers of the second model, if it is trained.

    Returns:
        What was done.

    Raises:
        GrowthRefused: The growth cannot be made once more: it was loaded from a
            checkpoint, or trained old weights on the side (how.SWE); or the model is of
            another shape. Nothing has changed then.

    Examples:
        >>> import copy, torch, meristem as ms
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> average = copy.deepcopy(net)
        >>> growth = ms.grow_(net, {"0": 2}, torch.randn(3, 4))
        >>> ms.replay_(growth, average).after, torch.equal(net[0].weight, average[0].weight)
        ({'0': 10}, True)
    """
    origin = growth.origin
    if not isinstance(origin, Origin):
        raise GrowthRefused(
            "this growth holds no weights: it was loaded, or did nothing. hint: "
            "meristem.convert carries the weights of an old shape over"
        )
    if not origin.whole:
        raise GrowthRefused(
            "this growth trained old weights on the side (how.SWE), which belong to the "
            "first model alone. hint: copy the grown model"
        )
    given = optimizers(optimizer)
    # Cares that count the steps of an optimizer need one.
    counting_steps = (FreshStatistics, YoungRate, Rewarm)
    care = [one for one in origin.care if given or not isinstance(one, counting_steps)]
    call = origin.plan.example if example is None else example
    ranks = ranks_of(model)
    with opened_host(model) as model, ranks.together(), undisturbed():
        loan = Loan(torch.Generator(), ranks=ranks)
        event = prepare(model, call, loan, origin.how, care, given)
        plan = accepted(_same(event.structure, origin.plan))
        # The numbers beside the forward, too, are those of the first model.
        plan = replace(
            plan,
            attributes=origin.plan.attributes,
            counts=origin.plan.counts,
            stale=origin.plan.stale,
            mirrored=True,
        )
        return carry_out(event, plan, origin.offers)


def narrow_(
    model: nn.Module,
    units: Mapping[str, int | Sequence[int]],
    example: Any,
    *,
    optimizer: Optimizers = None,
) -> Growth:
    """The inverse of `grow_`: drop units, by index or the last ones, with their state.

    Args:
        model: Any module that runs.
        units: By axis name the indices of the units to remove, or how many to remove:
            the last ones.
        example: A tensor, a tuple of arguments or a dict of keyword arguments.
        optimizer: The optimizer, or all of them, whose state follows.

    Returns:
        What was done; `added` is negative.

    Raises:
        GrowthRefused: Unknown axis, an index out of range, or the model cannot follow.
            Nothing has changed then.

    Examples:
        >>> import torch, meristem as ms
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
        ... )
        >>> ms.narrow_(net, {"0": [3, 5]}, torch.randn(3, 4)).after
        {'0': 6}
    """
    ranks = ranks_of(model)
    with opened_host(model) as model, ranks.together(), undisturbed():
        loan = Loan(torch.Generator(), ranks=ranks)
        event = prepare(model, example, loan, optimizer=optimizers(optimizer))
        structure = event.structure
        # What does not grow can become smaller all the same.
        every = partial(growable, structure)
        drops = by_axis(structure, every, _drops(units), limits=True)
        return carry_out(event, accepted(planned_for(structure, drops)))


def planned_for(structure: Structure, wishes: Mapping[str, Any]) -> Plan:
    """The plan of wishes by whole names of axes; it may be a refusal."""
    if not wishes:
        raise GrowthRefused("no axis was named: pass {axis: count}")
    plan = resolve(structure, wishes)
    if plan.refusal is not None:
        # What does not follow alone may grow together with others.
        growable(structure)
        plan = resolve(structure, wishes)
    return plan


def _counts(counts: Mapping[str, Any]) -> dict[str, int]:
    """Checked counts, as Python ints."""
    if not isinstance(counts, Mapping):
        raise TypeError(
            f"counts must be a dict {{axis: count}}; got {type(counts).__name__}"
        )
    checked = {}
    for name, count in counts.items():
        if not isinstance(name, str):
            raise TypeError(f"an axis is named by a string; got {name!r}")
        if not _is_int(count):
            raise TypeError(
                f"the count for axis {name!r} must be an int; got {count!r}"
            )
        checked[name] = operator.index(count)
        if checked[name] <= 0:
            raise GrowthRefused(
                f"the count for axis {name!r} must be an int in [1, inf); got {count}"
            )
    return checked


def _is_int(value: Any) -> bool:
    return not isinstance(value, bool) and hasattr(value, "__index__")


def _drops(units: Mapping[str, Any]) -> dict[str, int | list[int]]:
    """Checked wishes of `narrow_`: negative counts, or lists of indices."""
    if not isinstance(units, Mapping):
        raise TypeError(
            f"units must be a dict {{axis: count or indices}}; got "
            f"{type(units).__name__}"
        )
    wishes: dict[str, int | list[int]] = {}
    for name, amount in units.items():
        if not isinstance(amount, Iterable) or isinstance(amount, str):
            # A negative count means: the last so many units.
            wishes[name] = -_counts({name: amount})[name]
            continue
        indices = []
        for unit in amount:
            if not _is_int(unit):
                raise TypeError(
                    f"units of axis {name!r} are named by int indices; got {unit!r}"
                )
            indices.append(operator.index(unit))
        for unit, times in Counter(indices).items():
            if times > 1:
                raise GrowthRefused(
                    f"axis {name!r}: unit {unit} is named twice in {amount!r}"
                )
        wishes[name] = indices
    return wishes
