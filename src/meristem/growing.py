"""One growth, from a wish to the exchange: find_axes, plan, grow_, narrow_."""

from __future__ import annotations

import operator
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from meristem.care import Care, WarmMoments
from meristem.core.axis import Axes, Axis, Kind, matches
from meristem.core.change import Plan, new_blocks
from meristem.core.errors import DataError, GrowthRefused, VerificationError
from meristem.core.growth import Growth
from meristem.core.offer import Blocks, Proposal, Settled, Treatment
from meristem.how import METHODS, How, Random, Settles, ZeroBlock
from meristem.sandbox import Sandbox
from meristem.statistics.batches import first_call, growth_batches
from meristem.statistics.flops import counting
from meristem.statistics.health import Figures, measure, measure_blocks
from meristem.statistics.losses import Loss
from meristem.structure import Structure, clash, resolve, with_insertions
from meristem.structure.twin import named_tensors
from meristem.structure.undisturbed import undisturbed
from meristem.surgery.exchange import check_free, exchange
from meristem.surgery.optimizers import check_ownership, check_separable, grown_state
from meristem.surgery.tensors import grown_tensors
from meristem.surgery.verify import check_edit, grown_twin, relative_change, rounding_gap, run, silence
from meristem.view import Progress, View

METHOD_OF: dict[Kind, How] = {"width": Random(), "heads": Random(), "depth": ZeroBlock()}
"""What grows an axis of a kind that the chosen method does not speak for."""
_GENERATORS: weakref.WeakKeyDictionary[nn.Module, torch.Generator] = weakref.WeakKeyDictionary()

Optimizers = Optimizer | Sequence[Optimizer] | None
Methods = How | Sequence[How] | None
TOLERANCE = 1e-5
"""Largest relative change of an output, in float32, that still counts as the same function."""
HEALTH_BATCHES = 4
"""Growth batches that the health of new units is measured on."""


def private_generator(model: nn.Module) -> torch.Generator:
    """The generator of one model's growths, seeded from torch's initial seed when it is first used."""
    if model not in _GENERATORS:
        _GENERATORS[model] = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
    return _GENERATORS[model]


def find_axes(model: nn.Module, example: Any, axes: str | Sequence[str] = "*") -> Axes:
    """The axes that `grow_` accepts, by name; prints as a table.

    The model is run once on `example`, on data-free copies of its tensors, and is left untouched. An axis is named
    after the module whose output units it counts; a depth, after the container of its blocks ("h"), or, where a layer fits
    into a chain, after the layer that it would stand behind or (at the output) before ("fc1:depth"); a second run in one
    container is "h:2". `.frozen` maps what cannot grow to the reason, `.ends` holds the model's classes and vocabulary.

    Args:
        model: Any module that runs.
        example: A tensor, a tuple of arguments or a dict of keyword arguments.
        axes: Glob patterns of the axes to keep; a leading "!" excludes.

    Raises:
        DiscoveryError: The forward fails on the example.
        GrowthRefused: The model is wrapped (DDP, torch.compile).

    Examples:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> list(find_axes(net, torch.randn(3, 4)))
        ['0', '0:depth', '2:depth']
    """
    with undisturbed():
        return growable(Structure(model, example), axes)


def growable(structure: Structure, patterns: str | Sequence[str] = "*", how: Methods = ()) -> Axes:
    """The axes of a structure whose growth was tried: each is re-traced, all at once first, then one by one.

    Depths whose new blocks cannot preserve the function count where `how` names a method that does not claim to.
    """
    found = structure.axes
    refused = dict(found.frozen)
    candidates = {**found, **found.ends}
    # Distinct counts keep sizes that must change together from passing by accident.
    widths = {name: axis for name, axis in found.items() if axis.kind != "depth"}
    together = {name: axis.multiple * (i % 7 + 1) for i, (name, axis) in enumerate(widths.items())}
    plain = bool(together) and resolve(structure, together)
    own = all(_is_layer(structure.model.get_submodule(e.module)) for e in plain.attributes) if plain else False
    deep = {name: 1 for name, axis in found.items() if axis.kind == "depth"}
    tried = {*(widths if own else ()), *(deep if deep and resolve(structure, deep) else ())}
    for name, axis in candidates.items():
        reason = _held(structure, axis)
        if reason is None and name not in tried:
            reason = resolve(structure, {name: axis.multiple}).refusal
        if reason is not None:
            refused[name] = reason
    left = {name: axis for name, axis in candidates.items() if name not in refused}
    refused |= _inexact(structure, {name: axis for name, axis in left.items() if axis.kind != "depth"})
    depths = {name: axis for name, axis in left.items() if axis.kind == "depth"}
    refused |= _unread(structure, depths)
    exact = {n: axis for n, axis in depths.items() if n not in refused and method_for(how, axis).kinds["depth"]}
    refused |= _inexact(structure, exact)
    kept = {name: axis for name, axis in found.items() if name not in refused and matches(name, patterns)}
    ends = {name: axis for name, axis in found.ends.items() if name not in refused}
    return Axes(kept, ends, refused)


def sizes_of(axes: Axes) -> dict[str, int]:
    """Sizes by axis, as records list them: a place in a chain counts once it has grown."""
    return {
        name: axis.size
        for name, axis in axes.items()
        if axis.kind != "depth" or axis.size > 1 or not name.endswith(":depth")
    }


def _held(structure: Structure, axis: Axis) -> str | None:
    for slot in axis.slots:
        if weakref.getweakrefs(structure.tensors[slot.name]):
            return f"{slot.name} is held by a weak reference (as in nn.GRU), which would keep the old tensor"
    return None


def _inexact(structure: Structure, axes: Mapping[str, Axis]) -> dict[str, str]:
    """Reasons of the axes whose growth would change the function: tried all at once, one by one only if that fails."""

    def changes(chosen: Sequence[Axis]) -> bool:
        planned = resolve(structure, {axis.name: axis.multiple for axis in chosen})
        try:
            check_edit(structure, planned, chosen)
        except VerificationError:
            return True
        return False

    listed = list(axes.values())
    together = clash(structure, list(axes)) is None and resolve(structure, {a.name: a.multiple for a in listed})
    if listed and together and not changes(listed):
        return {}
    reasons = {}
    for axis in listed:
        if changes([axis]):
            reasons[axis.name] = (
                "no new block of it leaves the function as it is; it grows when its method is named, as how.Stack()"
                if axis.kind == "depth"
                else f"a {axis.norm.replace('_', ' ')} normalises over it, and its producers do not feed it directly"
                if axis.streamed and axis.norm is not None
                else "the model's code depends on its size: the outputs would change"
            )
    return reasons


def _unread(structure: Structure, depths: Iterable[str]) -> dict[str, str]:
    """Reasons of the depths whose new blocks nothing would read."""
    reasons = {}
    for name in depths:
        try:
            silence(structure, structure.depths[name].appended(1))
        except VerificationError:
            continue
        except GrowthRefused as refusal:
            reasons[name] = str(refusal)
    return reasons


def _is_layer(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def plan(model: nn.Module, counts: Mapping[str, int], example: Any) -> Plan:
    """The dry run of `grow_`: every shape and attribute that would change, or the refusal and its reason.

    Args:
        model: Any module that runs.
        counts: Units to add by axis name.
        example: A tensor, a tuple of arguments or a dict of keyword arguments.

    Returns:
        A `Plan`, falsy where the growth would be refused.

    Raises:
        UnknownAxis: A name is no axis of the model.
        GrowthRefused: A count is not positive or not a multiple of the axis' granularity.

    Examples:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> print(plan(net, {"0": 2}, torch.randn(3, 4)))
        0: 8 -> 10
          0.weight: (8, 4) -> (10, 4)
          0.bias: (8,) -> (10,)
          2.weight: (2, 8) -> (2, 10)
          0.out_features: 8 -> 10
          2.in_features: 8 -> 10
        parameters: 58 -> 72; forward FLOPs: 288 -> 360
    """
    with undisturbed():
        return _planned(Structure(model, example), _counts(counts))


def grow_(
    model: nn.Module,
    counts: Mapping[str, int],
    example: Any = None,
    how: Methods = None,
    *,
    care: Care | Sequence[Care] | None = None,
    optimizer: Optimizers = None,
    loss: Loss | None = None,
    data: Iterable[Any] | None = None,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Growth:
    """Grow a model now, in place, all or nothing.

    Module and Parameter objects stay the same objects; buffers, attributes, gradients, optimizer state, devices, dtypes,
    hooks and tied weights follow. The function is preserved unless the method says otherwise, and that is checked
    before anything changes.

    Args:
        model: Any module that runs.
        counts: Units to add by axis name.
        example: A tensor, a tuple of arguments or a dict of keyword arguments; None takes the model's first call inside
            `loss` on the first batch.
        how: The method, or several, of which the first that speaks for the kind of an axis grows it; by default random
            fan-in and zero fan-out for widths, and `how.ZeroBlock` for depths.
        care: What the optimizer and the old weights get; by default the new slices get a warm second moment.
        optimizer: The optimizer, or all of them, whose state follows.
        loss: For methods that measure or train: `loss(model, batch)`, a mean over the batch.
        data: A DataLoader or a re-iterable of batches, for `loss`.
        generator: The source of randomness; by default a private one of this model.
        progress: Called as `progress(phase, done, total)` by methods that train on the side.

    Returns:
        What was done.

    Raises:
        GrowthRefused: Unknown axis, wrong count, or the model cannot follow.
        VerificationError: The grown model would compute something else.
        OptimizerError, DataError, PendingBackward: As their names say. Nothing has changed in any case.

    Examples:
        >>> import torch, meristem as ms
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> growth = ms.grow_(net, {"0": 2}, torch.randn(3, 4))
        >>> growth.after, net[0].out_features
        ({'0': 10}, 10)
    """
    generator = generator if generator is not None else private_generator(model)
    hows = methods(how)
    counts = _counts(counts)
    check_parts(hows, cares(care))
    state = generator.get_state()
    try:
        with undisturbed():
            batches = growth_batches(data, most_batches(hows), generator) if data is not None else []
            if example is None:
                if loss is None or not batches:
                    raise DataError("grow_ needs an example input, or loss= and data= to find one")
                example = first_call(model, loss, batches[0])
            structure = Structure(model, example)
            planned = accepted(_planned(structure, counts))
            view = View(structure, generator, loss, batches, data, progress)
            return perform(view, planned, proposed(view, planned, hows), hows, cares(care), optimizers(optimizer))
    except BaseException:
        generator.set_state(state)
        raise


def narrow_(
    model: nn.Module,
    units: Mapping[str, int | Sequence[int]],
    example: Any,
    *,
    optimizer: Optimizers = None,
) -> Growth:
    """The inverse of `grow_`: drop units, by index or the last ones by count, with their optimizer state.

    Args:
        model: Any module that runs.
        units: Unit indices, or a count, by axis name.
        example: A tensor, a tuple of arguments or a dict of keyword arguments.
        optimizer: The optimizer, or all of them, whose state follows.

    Returns:
        What was done; `added` is negative.

    Raises:
        GrowthRefused: Unknown axis, an index out of range, or the model cannot follow. Nothing has changed then.

    Examples:
        >>> import torch, meristem as ms
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> ms.narrow_(net, {"0": [3, 5]}, torch.randn(3, 4)).after
        {'0': 6}
    """
    with undisturbed():
        structure = Structure(model, example)
        planned = accepted(_planned(structure, _drops(units)))
        view = View(structure, torch.Generator())
        return perform(view, planned, [], (), (), optimizers(optimizer))


def method_for(how: Methods, axis: Axis) -> How:
    """The method that grows an axis: the first of those given that speaks for its kind, else the kind's default."""
    return next((one for one in methods(how) if axis.kind in one.kinds), METHOD_OF[axis.kind])


def most_batches(how: Methods) -> int:
    """Growth batches that the methods, and a look at the new units, need."""
    return max(HEALTH_BATCHES, *(one.batches for one in (*methods(how), *METHOD_OF.values())))


def proposed(view: View, plan: Plan, how: Methods) -> list[Proposal]:
    """What the methods offer for the axes of a plan; nothing where new units are settled in on a sandbox, and nothing for
    depths that grow with widths: their blocks are made when the widths are known (see `perform`).
    """
    offers = []
    axes = [view.structure.axes.named(name) for name in plan.after]
    wider = any(axis.kind != "depth" for axis in axes)
    for axis in axes:
        method = method_for(how, axis)
        if not isinstance(method, Settles) and not (axis.kind == "depth" and wider):
            offers.append(method.propose(view, axis, plan.added[axis.name]))
    return offers


def perform(
    view: View,
    plan: Plan,
    proposals: Sequence[Proposal],
    how: Methods,
    care: Sequence[Care],
    owners: Sequence[Optimizer],
    changed: Mapping[str, Tensor] | None = None,
) -> Growth:
    """Build every new tensor and block, verify, swap; the last steps of every growth. Raises before anything has changed.

    `changed` are old tensors, at their present shapes, that take other values with it.
    """
    started = time.perf_counter()
    structure = view.structure
    model = structure.model
    axes = [structure.axes.named(name) for name in plan.after]
    widths = [axis for axis in axes if axis.kind != "depth"]
    deep = [axis for axis in axes if axis.kind == "depth"]
    growing = any(count > 0 for count in plan.added.values())
    chosen = [method_for(how, axis) for axis in axes] if growing else []
    treatment = sum((c.treat(model, plan, widths) for c in care), Treatment())
    live = named_tensors(model)
    changed = dict(changed or {})
    changing = {name: live[name] for name in [*(change.name for change in plan.tensors), *changed]}
    check_ownership(owners, {name: tensor for name, tensor in changing.items() if tensor.requires_grad})
    check_ownership(owners, followed(structure, plan))
    if plan.insertions:
        check_separable(owners)
    check_free(changing)  # before anything is measured or trained; again below, where every tensor is known
    exact_depth = all(method_for(how, axis).kinds["depth"] for axis in deep)
    with counting() as checking:
        check_edit(structure, plan, axes, deepen=exact_depth)
    new = changed | grown_tensors({**view.values, **changed}, plan, widths, proposals, treatment.scaling)
    settles = next((one for one in chosen if isinstance(one, Settles)), None)
    settled = _settled(view, plan, settles, widths, treatment) if settles is not None else None
    if settled is not None:
        new |= _moved(model, settled.tensors)
    values = {**view.values, **new}
    plan, proposals, blocks = _with_blocks(view, plan, proposals, how, deep, values)
    with counting() as counter:
        before = run(model, view.values, structure.example)
        after = run(model, values, structure.example, plan, blocks)
        change = relative_change(plan, before, after)
        scaled = treatment.scaling.tensors or treatment.scaling.places
        keeps = all(one.kinds[axis.kind] for one, axis in zip(chosen, axes, strict=True)) if growing else False
        if keeps and not scaled:
            _check_preserved(view, before, change, dict.fromkeys(type(one).__name__ for one in chosen))
        health = dict(settled.health) if settled is not None else {}
        for moment, figures in _health(view, plan, axes, values, blocks, settled is None).items():
            health[moment] = {**health.get(moment, {}), **figures}
    states = []
    for optimizer in owners:
        for tensor_change in plan.tensors:
            parameter = live[tensor_change.name]
            if parameter in optimizer.state:
                state = grown_state(optimizer, parameter, tensor_change, plan, widths, proposals, treatment.warm)
                states.append((optimizer, parameter, state))
    check_free({name: live[name] for name in new})
    exchange(model, live, new, states, plan, owners if treatment.reset else (), blocks, owners)
    return Growth(
        added=plan.added,
        before=dict(plan.before),
        after=dict(plan.after),
        parameters=plan.parameters,
        max_change=change,
        seconds=time.perf_counter() - started,
        flops=checking.get_total_flops()
        + counter.get_total_flops()
        + sum(p.flops for p in proposals)
        + (settled.flops if settled else 0),
        health={moment: dict(figures) for moment, figures in health.items()},
        notes=dict(settled.notes) if settled else {p.axis: p.note for p in proposals if p.note},
        blocks={i.axis: new_blocks(i) for i in plan.insertions if new_blocks(i)},
    )


def followed(structure: Structure, plan: Plan) -> dict[str, Tensor]:
    """The trained parameters whose groups in the optimizer new blocks will join."""
    parents = {
        structure.depths[insertion.axis].blocks[block]
        for insertion in plan.insertions
        for block, new in zip(insertion.blocks, insertion.new, strict=True)
        if new
    }
    return {
        f"{name}.{inner}": parameter
        for name in sorted(parents)
        for inner, parameter in structure.model.get_submodule(name).named_parameters()
        if parameter.requires_grad
    }


def _with_blocks(
    view: View,
    plan: Plan,
    proposals: Sequence[Proposal],
    how: Methods,
    deep: Sequence[Axis],
    values: Mapping[str, Tensor],
) -> tuple[Plan, list[Proposal], list[Blocks]]:
    """The plan with the blocks where the methods want them. Beside growing widths, blocks are made on a widened copy."""
    proposals = list(proposals)
    offered = {proposal.axis for proposal in proposals}
    if any(plan.added[axis.name] > 0 and axis.name not in offered for axis in deep):
        widened = grown_twin(view.structure.model, values, replace(plan, counts=()))
        structure = Structure(widened, view.structure.example)
        looked = View(
            structure, view.generator, view.loss, view.batches, view.data, view.progress, view.allowance / len(deep)
        )
        for axis in deep:
            if axis.name not in offered:
                same = structure.axes.named(axis.name)
                proposals.append(method_for(how, axis).propose(looked, same, plan.added[axis.name]))
    found = {proposal.axis: proposal.blocks for proposal in proposals if proposal.blocks is not None}
    blocks = [found.get(insertion.axis) or Blocks(insertion) for insertion in plan.insertions]
    insertions = [one.insertion for one in blocks]
    if insertions != list(plan.insertions):
        plan = accepted(with_insertions(view.structure, plan, insertions))
    return plan, proposals, blocks


def _settled(view: View, plan: Plan, how: Settles, widths: Sequence[Axis], treatment: Treatment) -> Settled:
    """The weights that a method finds by growing and training a copy."""
    if treatment.scaling.tensors or treatment.scaling.places:
        raise GrowthRefused(
            f"{type(how).__name__} settles new units beside the present weights; a care that scales these afterwards "
            "(VarianceTransfer, Shrink) would undo it. hint: use WarmMoments or ResetMoments"
        )
    return how.settle(Sandbox(view), {axis.name: plan.added[axis.name] for axis in widths})


def _moved(model: nn.Module, settled: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The settled parameters that differ from the model's. Buffers are left out: what a forward on the side did to them
    is not the user's.
    """
    parameters = dict(model.named_parameters())
    return {name: settled[name] for name, p in parameters.items() if not torch.equal(settled[name], p)}


def _check_preserved(view: View, before: Sequence[Tensor], change: float, names: Iterable[str]) -> None:
    """Raise unless the change is within rounding: the larger of the fixed bound and ten times the model's own gap."""
    double = all(t.dtype == torch.float64 for t in before if t.is_floating_point())
    if change <= (TOLERANCE if not double else TOLERANCE * 1e-7):
        return
    gap = rounding_gap(view.structure, view.values, before)
    if not double and change <= 10 * gap:
        return
    raise VerificationError(
        f"{', '.join(names)} should preserve the function, but an output would change by {change:.1e} of the largest "
        "one; nothing was changed. hint: for widths, an activation that is not 0 at 0 breaks a zero fan-in; use zero='fan_out'"
    )


def _health(
    view: View, plan: Plan, axes: Sequence[Axis], values: Mapping[str, Tensor], blocks: Sequence[Blocks], widths: bool
) -> dict[str, dict[str, Figures]]:
    """Figures of the new units and blocks right after the insertion, of the widths only where asked for; empty without loss
    and data, and where something was dropped.
    """
    if view.loss is None or not view.batches or min(plan.added.values()) < 0:
        return {}
    figures: dict[str, Figures] = {}
    batches = view.batches[:HEALTH_BATCHES]
    grown = [axis for axis in axes if axis.kind != "depth"]
    if widths and grown:
        copied = grown_twin(view.structure.model, values, replace(plan, counts=()))
        units = {axis.name: range(plan.before[axis.name], plan.after[axis.name]) for axis in grown}
        figures |= measure(copied, grown, plan.layout, view.loss, batches, units)
    if blocks:
        copied = grown_twin(view.structure.model, values, plan, blocks)
        structure = Structure(copied, view.structure.example)
        new = {one.insertion.axis: new_blocks(one.insertion) for one in blocks}
        figures |= measure_blocks(structure, copied, new, view.loss, batches)
    return {"insertion": figures} if figures else {}


def _planned(structure: Structure, wishes: Mapping[str, Any]) -> Plan:
    if not wishes:
        raise GrowthRefused("no axis was named: pass {axis: count}")
    for name in wishes:
        structure.axes.named(name)
    return resolve(structure, wishes)


def accepted(plan: Plan) -> Plan:
    if plan.refusal is not None:
        raise GrowthRefused(f"{', '.join(plan.after)} cannot grow: {plan.refusal}")
    return plan


def _counts(counts: Mapping[str, Any]) -> dict[str, int]:
    """Checked counts, as Python ints."""
    if not isinstance(counts, Mapping):
        raise TypeError(f"counts must be a dict {{axis: count}}; got {type(counts).__name__}")
    checked = {}
    for name, count in counts.items():
        if not isinstance(name, str):
            raise TypeError(f"an axis is named by a string; got {name!r}")
        if isinstance(count, bool) or not hasattr(count, "__index__"):
            raise TypeError(f"the count for axis {name!r} must be an int; got {count!r}")
        checked[name] = operator.index(count)
        if checked[name] <= 0:
            raise GrowthRefused(f"the count for axis {name!r} must be an int in [1, inf); got {count}")
    return checked


def _drops(units: Mapping[str, Any]) -> dict[str, int | list[int]]:
    """Checked wishes of `narrow_`: negative counts, or lists of indices."""
    if not isinstance(units, Mapping):
        raise TypeError(f"units must be a dict {{axis: count or indices}}; got {type(units).__name__}")
    wishes: dict[str, int | list[int]] = {}
    for name, amount in units.items():
        if isinstance(amount, Iterable) and not isinstance(amount, str):
            listed = list(amount)
            wrong = [i for i in listed if isinstance(i, bool) or not hasattr(i, "__index__")]
            if wrong:
                raise TypeError(f"units of axis {name!r} are named by int indices; got {wrong[0]!r}")
            indices = [operator.index(i) for i in listed]
            wishes[name] = indices
            twice = [i for i, count in Counter(indices).items() if count > 1]
            if twice:
                raise GrowthRefused(f"axis {name!r}: unit {twice[0]} is named twice in {amount!r}")
        else:
            wishes[name] = -_counts({name: amount})[name]
    return wishes


def methods(how: Methods) -> tuple[How, ...]:
    """One method, several or none as a tuple."""
    return () if how is None else tuple(how) if isinstance(how, Sequence) and not isinstance(how, str) else (how,)


def check_parts(how: Sequence[Any], care: Sequence[Any]) -> None:
    """Raise unless methods and cares are what they should be."""
    for one in how:
        if not isinstance(one, How) or isinstance(one, type):
            spelt = METHODS.get(one) if isinstance(one, str) else None
            hint = f" hint: meristem.how.{spelt.__name__}()" if spelt is not None else ""
            raise TypeError(f"how must be a method such as meristem.how.Random(), or several; got {one!r}.{hint}")
    for one in care:
        if not hasattr(one, "treat") or isinstance(one, type):
            raise TypeError(f"care must be made of cares such as meristem.care.WarmMoments(); got {one!r}")


def cares(care: Care | Sequence[Care] | None) -> tuple[Care, ...]:
    """The chosen cares; a warm second moment where none is named."""
    if care is None:
        return (WarmMoments(),)
    return tuple(care) if isinstance(care, Sequence) and not isinstance(care, str) else (care,)


def optimizers(optimizer: Optimizers) -> tuple[Optimizer, ...]:
    """One optimizer, several or none as a tuple."""
    listed = () if optimizer is None else (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer)
    for one in listed:
        if not isinstance(one, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer or a list of them; got {type(one).__name__}")
    return listed
