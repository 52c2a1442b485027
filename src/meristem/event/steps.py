"""One growth, from prepared parts to the record of what was done.

prepare > offer > settle > build > verify > commit. A draft passes from step to step and
only gains fields; nothing of the user's has changed before the commit. `grow_`,
`narrow_`, `prune_`, `Grower` and `Stages` all come here.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from meristem.care import CARES, FreshStatistics, WarmMoments
from meristem.core.axis import Axis, Kind
from meristem.core.change import Plan, Rescaling, TensorChange
from meristem.core.errors import GrowthRefused, VerificationError
from meristem.core.growth import Growth
from meristem.core.offer import Blocks, Offer, Settled, Treatment
from meristem.event.accepted import check_offer, check_settled, check_treatment
from meristem.how import METHODS, Random, ZeroBlock
from meristem.lab.laboratory import Lab, Loan
from meristem.lab.ledger import counting
from meristem.methods import (
    Care,
    How,
    check_kinds,
    check_part,
    settles,
)
from meristem.statistics.health import Figures, measure, measure_blocks
from meristem.structure import (
    Structure,
    proved,
    structure_of,
    with_insertions,
    with_mirrors,
)
from meristem.structure.insertion import insert
from meristem.structure.kinds import apart
from meristem.structure.twin import named_tensors, submodule
from meristem.structure.undisturbed import undisturbed
from meristem.surgery.aftercare import begin, check_aftercare, follow
from meristem.surgery.deferred import signals_deferred
from meristem.surgery.exchange import OptimizerChange, check_free, exchange
from meristem.surgery.host import check_optimizer, plain
from meristem.surgery.lineage import draws_of, note_draws
from meristem.surgery.optimizers import (
    Followed,
    check_ownership,
    check_separable,
    grown_state,
    rescaled_state,
)
from meristem.surgery.probe import (
    grown_twin,
    live_values,
    relative_change,
    rounding_gap,
    run,
)
from meristem.surgery.tensors import Edit, carry, edits_of, grown_tensors, scaled
from meristem.surgery.verify import check_edit

Optimizers = Optimizer | Sequence[Optimizer] | None
Methods = How | Sequence[How] | None
Cares = Care | Sequence[Care] | None

DEFAULTS: Mapping[Kind, How] = {
    "width": Random(),
    "heads": Random(),
    "depth": ZeroBlock(),
}
"""What grows an axis where no method was chosen."""
TOLERANCE = 1e-5
"""Largest relative change of an output, in float32, that counts as the same function.
"""
# The same in float64.
_DOUBLE_TOLERANCE = 1e-12
# How many times the model's own rounding gap a change may be.
_GAPS = 10
HEALTH_BATCHES, HEALTH_EXAMPLES = 4, 64
"""Growth batches that the health of new units is measured on, and examples of each."""


_GENERATORS: weakref.WeakKeyDictionary[nn.Module, torch.Generator] = (
    weakref.WeakKeyDictionary()
)


def private_generator(model: nn.Module) -> torch.Generator:
    """The generator of one model's growths; checkpoints keep its state.

    It is seeded from torch's initial seed when it is first used.
    """
    # Seeded when first used, so that torch.manual_seed before a script decides.
    if model not in _GENERATORS:
        seed = torch.initial_seed() % 2**63
        generator = torch.Generator().manual_seed(seed)
        # A deep copy of a grown model draws on as that does.
        drawn = draws_of(model)
        if drawn is not None:
            generator.set_state(drawn)
        _GENERATORS[model] = generator
    return _GENERATORS[model]


@dataclass(frozen=True)
class Event:
    """Everything that a growth needs, prepared.

    Attributes:
        structure: What can grow.
        lab: What the methods get.
        how: The methods, the first that speaks for a kind first.
        care: What the rest gets.
        optimizers: Whose state follows.
    """

    structure: Structure
    lab: Lab
    how: tuple[How, ...] = ()
    care: tuple[Care, ...] = ()
    optimizers: tuple[Optimizer, ...] = ()

    @property
    def model(self) -> nn.Module:
        return self.structure.model

    def method(self, axis: Axis) -> How:
        """The method that grows an axis."""
        return method_for(self.how, axis)


@dataclass(frozen=True)
class Origin:
    """What a growth was made of, to be made once more on another model.

    Attributes:
        plan: What changed.
        offers: The new weights, by axis.
        how, care: The methods, and what the rest got.
        whole: Whether that is all: no old weights were trained on the side.
    """

    plan: Plan
    offers: Mapping[str, Offer]
    how: tuple[How, ...]
    care: tuple[Care, ...]
    whole: bool


@dataclass(frozen=True)
class Draft:
    """A growth on its way.

    Attributes:
        plan: What will change.
        treatment: What the rest gets.
        offers: The offered weights, by axis.
        changed: Old tensors, at their present shapes, that take other values, too.
        settled: What a method that trains on the side gave back.
        tensors: Every tensor that takes another value, at its new shape.
        blocks: The new blocks of every insertion.
        change: How far the outputs move.
        health: Figures of the new units by moment and axis.
        flops: What the checks and looks cost.
    """

    plan: Plan
    treatment: Treatment = field(default_factory=Treatment)
    offers: Mapping[str, Offer] = field(default_factory=dict)
    changed: Mapping[str, Tensor] = field(default_factory=dict)
    settled: Settled | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    blocks: Sequence[Blocks] = ()
    change: float = 0.0
    health: Mapping[str, Mapping[str, Figures]] = field(default_factory=dict)
    flops: int = 0


# -- preparing


def prepare(
    model: nn.Module,
    example: Any,
    loan: Loan,
    how: Methods = (),
    care: Cares = (),
    optimizer: Optimizers = None,
) -> Event:
    """The event of one growth of a model.

    Raises:
        GrowthRefused: The model holds no data.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise GrowthRefused(
            "the model stands on the meta device and holds no data that could grow. hint: "
            "meristem.plan tells its new sizes; grow it once its weights are loaded"
        )
    structure = structure_of(model, example)
    lab = Lab(structure, loan)
    return Event(
        structure, lab, methods(how), cares(care, optimizer), optimizers(optimizer)
    )


def method_for(how: Methods, axis: Axis) -> How:
    """The method that grows an axis: the first of those given that speaks for its kind;
    where none was given, the kind's default.

    Raises:
        GrowthRefused: None of those given speaks for its kind.
    """
    given = methods(how)
    for one in given or (DEFAULTS[axis.kind],):
        if axis.kind in one.kinds:
            return one
    names = " and ".join(type(one).__name__ for one in given)
    calls = ", ".join(f"{type(one).__name__}()" for one in given)
    default = type(DEFAULTS[axis.kind]).__name__
    raise GrowthRefused(
        f"{names} cannot grow {axis.name}, whose kind is {axis.kind!r}. hint: "
        f"how=[{calls}, {default}()] adds a method for it"
    )


def batches_for(how: Methods) -> int:
    """Growth batches that the methods, and a look at the new units, need."""
    asked = [one.batches for one in (*methods(how), *DEFAULTS.values())]
    return max(HEALTH_BATCHES, *asked)


def methods(how: Methods) -> tuple[How, ...]:
    """One method, several or none as a tuple; checked."""
    listed = _listed(how)
    for one in listed:
        if isinstance(one, Optimizer):
            raise TypeError("how got an optimizer. hint: optimizer=...")
        check_part("how", one, METHODS)
        check_kinds(one)
    return listed


def cares(care: Cares, optimizer: Optimizers) -> tuple[Care, ...]:
    """One care or several as a tuple; checked.

    Where None is given, a warm second moment, and fresh statistics where there is an
    optimizer to count their steps.
    """
    if care is None:
        return (WarmMoments(), FreshStatistics()) if optimizers(optimizer) else ()
    listed = _listed(care)
    for one in listed:
        check_part("care", one, CARES)
    return listed


def _listed(given: Any) -> tuple[Any, ...]:
    if given is None:
        return ()
    several = isinstance(given, Sequence) and not isinstance(given, str)
    return tuple(given) if several else (given,)


def optimizers(optimizer: Optimizers) -> tuple[Optimizer, ...]:
    """One optimizer, several or none as a tuple; checked."""
    if optimizer is None:
        return ()
    given: Any = optimizer
    single = isinstance(plain(given), Optimizer) or not isinstance(given, Iterable)
    listed = [given] if single else tuple(given)
    return tuple(check_optimizer(one) for one in listed)


def accepted(plan: Plan) -> Plan:
    """A plan that can be carried out.

    Raises:
        GrowthRefused: It cannot.
    """
    if plan.refusal is not None:
        raise GrowthRefused(f"{', '.join(plan.after)} cannot grow: {plan.refusal}")
    return plan


@contextmanager
def all_or_nothing(generator: torch.Generator) -> Iterator[None]:
    """Global randomness comes back where it was; after an error the generator, too."""
    # A growth that fails must not move the stream of the next one.
    state = generator.get_state()
    try:
        with undisturbed():
            yield
    except BaseException:
        generator.set_state(state)
        raise


# -- the event


def propose(event: Event, lab: Lab, axis: Axis, count: int) -> Offer:
    """What the method of an axis offers for it, checked."""
    method = event.method(axis)
    with lab.guarded(method):
        # Whatever a method does, it does to what it was lent.
        offer = method.propose(lab, axis, count)
    check_offer(method, lab, axis, count, offer)
    return offer


def carry_out(
    event: Event,
    plan: Plan,
    offers: Mapping[str, Offer] | None = None,
    changed: Mapping[str, Tensor] | None = None,
) -> Growth:
    """Carry out a plan, all or nothing.

    Args:
        event: The prepared event.
        plan: What to do.
        offers: Weights that have been offered before.
        changed: Old tensors, at their present shapes, that take other values with it.
    """
    started = time.perf_counter()
    plan = with_mirrors(event.structure, plan)
    draft = Draft(plan, offers=dict(offers or {}), changed=dict(changed or {}))
    # Each step reads what the steps before it have written into the draft.
    draft = _treated(event, draft)
    _check_owners(event, draft)
    draft = _proved(event, draft)
    draft = _offered(event, draft)
    draft = _settled(event, draft)
    draft = _built(event, draft)
    draft = _deepened(event, draft)
    draft = _verified(event, draft)
    return _committed(event, draft, started)


def _axes(event: Event, plan: Plan) -> list[Axis]:
    return [event.structure.axes.named(name) for name in plan.after]


def _growing(event: Event, plan: Plan) -> list[Axis]:
    return [axis for axis in _axes(event, plan) if plan.added[axis.name] > 0]


def _treated(event: Event, draft: Draft) -> Draft:
    """What the rest of the net gets."""
    axes = _axes(event, draft.plan)
    tensors = named_tensors(event.model)
    treatment = Treatment()
    for care in event.care:
        with event.lab.guarded(care):
            given = care.treat(event.lab.structure.model, draft.plan, axes)
        check_treatment(care, axes, tensors, given)
        treatment = treatment + given
    return replace(draft, treatment=treatment)


def _check_owners(event: Event, draft: Draft) -> None:
    """Raise where the optimizers or a waiting graph stand in the way.

    Before anything is measured or trained; again where every tensor is known.
    """
    live = named_tensors(event.model)
    names = [*(change.name for change in draft.plan.tensors), *draft.changed]
    changing = {name: live[name] for name in names}
    trained = {name: t for name, t in changing.items() if t.requires_grad}
    # Now, and not after minutes of training on the side.
    check_ownership(event.optimizers, trained)
    check_ownership(event.optimizers, followed(event.structure, draft.plan))
    check_aftercare(draft.treatment.after, event.optimizers)
    check_separable(event.optimizers)
    check_free(changing, event.model)


def followed(structure: Structure, plan: Plan) -> dict[str, Tensor]:
    """The trained parameters whose groups in the optimizer new blocks will join."""
    parents = set()
    for insertion in plan.insertions:
        for place in insertion.new_places:
            block = insertion.blocks[place]
            parents.add(structure.depths[insertion.axis].blocks[block])
    found: dict[str, Tensor] = {}
    for name in sorted(parents):
        for inner, parameter in submodule(structure.model, name).named_parameters():
            if parameter.requires_grad:
                found[f"{name}.{inner}"] = parameter
    return found


def _proved(event: Event, draft: Draft) -> Draft:
    """The edit is right on random weights."""
    axes = _axes(event, draft.plan)
    _, blocks = apart(axes)
    # A stacked block changes the function by design; its check is that it is read.
    deepen = all(event.method(axis).kinds[axis.kind] for axis in blocks)
    with counting() as counter:
        check_edit(event.structure, draft.plan, axes, deepen)
    return replace(draft, flops=draft.flops + counter.get_total_flops())


def _offered(event: Event, draft: Draft) -> Draft:
    """What the methods offer, where that has not been asked yet.

    Not for axes whose units settle in on a sandbox, and not for depths that grow beside
    widths: their blocks are made when the widths are known.
    """
    units, blocks = apart(_growing(event, draft.plan))
    offers = dict(draft.offers)
    for axis in units or blocks:
        # A grower may have asked for the offers already, to weigh them.
        if axis.name not in offers and not settles(event.method(axis)):
            count = draft.plan.added[axis.name]
            offers[axis.name] = propose(event, event.lab, axis, count)
    return replace(draft, offers=offers)


def _settled(event: Event, draft: Draft) -> Draft:
    """The weights that a method finds by growing and training a copy."""
    units, _ = apart(_growing(event, draft.plan))
    for axis in units:
        method = event.method(axis)
        if not settles(method):
            continue
        if draft.treatment.scaling:
            raise GrowthRefused(
                f"{type(method).__name__} settles new units beside the present "
                "weights; a care that scales these afterwards (VarianceTransfer, "
                "Shrink) would undo it. hint: use WarmMoments or ResetMoments"
            )
        # What grows together with a named axis comes along with it.
        named = [axis.name for axis in units if axis.name in draft.plan.wishes]
        counts = {name: draft.plan.added[name] for name in named}
        with event.lab.guarded(method):
            settled = method.settle(event.lab.sandbox(), counts)  # type: ignore[attr-defined]
        check_settled(method, draft.plan, event.model, settled)
        # One method settles all widths of an event, each beside the others.
        return replace(draft, settled=settled)
    return draft


def _built(event: Event, draft: Draft) -> Draft:
    """Every tensor at its new shape and values."""
    axes = _axes(event, draft.plan)
    # Pruning hands over compensated weights: they are cut like old ones.
    values = {**live_values(event.structure), **draft.changed}
    offers = list(draft.offers.values())
    grown = grown_tensors(values, draft.plan, axes, offers, draft.treatment.scaling)
    tensors = {**draft.changed, **grown}
    if draft.settled is not None:
        # Buffers are left out: what a forward on the side did to them is not the
        # user's.
        for name, parameter in event.model.named_parameters():
            value = draft.settled.tensors.get(name)
            if value is not None and not torch.equal(value, parameter):
                tensors[name] = value
    return replace(draft, tensors=tensors)


def _deepened(event: Event, draft: Draft) -> Draft:
    """The new blocks, with all their tensors, where the methods want them."""
    plan = draft.plan
    if not plan.insertions:
        return draft
    values = {**live_values(event.structure), **draft.tensors}
    offers = dict(draft.offers)
    _, deep = apart(_growing(event, plan))
    missing = [axis for axis in deep if axis.name not in offers]
    if missing:
        widened = grown_twin(event.structure, values, replace(plan, counts=()))
        structure = Structure(widened, event.structure.example)
        lab = event.lab.of(structure).within(event.lab.allowance / len(deep))
        for axis in missing:
            # The same axis by name, on the widened copy.
            same = structure.axes.named(axis.name)
            offers[axis.name] = propose(event, lab, same, plan.added[axis.name])
    blocks = []
    for insertion in plan.insertions:
        offer = offers.get(insertion.axis)
        offered = offer.blocks if offer is not None else None
        blocks.append(offered if offered is not None else Blocks(insertion))
    # A method may want its blocks elsewhere than behind the present ones.
    wanted = [one.insertion for one in blocks]
    if wanted != list(plan.insertions):
        plan = accepted(with_insertions(event.structure, plan, wanted))
    plan, rescaled = _rescaled(plan, values, blocks)
    # New blocks are copies of what the present ones have become.
    whole = _whole_blocks(event.structure, {**values, **rescaled}, plan, blocks)
    tensors = {**draft.tensors, **rescaled}
    return replace(draft, plan=plan, offers=offers, blocks=whole, tensors=tensors)


def _rescaled(
    plan: Plan, values: Mapping[str, Tensor], blocks: Sequence[Blocks]
) -> tuple[Plan, dict[str, Tensor]]:
    """The plan with what new blocks rescale of the present tensors, and these."""
    known = dict(plan.rescaled)
    tensors = {}
    for one in blocks:
        for name, change in one.rescaled.items():
            # A norm that grows is rescaled already.
            before = known.get(name, Rescaling(1.0)).factor
            known[name] = change._replace(factor=before * change.factor)
            tensors[name] = change.of(values[name])
    return replace(plan, rescaled=known), tensors


def _whole_blocks(
    structure: Structure,
    values: Mapping[str, Tensor],
    plan: Plan,
    blocks: Sequence[Blocks],
) -> list[Blocks]:
    """Blocks with every tensor of their own; the model will hold these very tensors."""
    copied = grown_twin(structure, values, replace(plan, counts=()))
    whole = []
    for one in blocks:
        present = {id(tensor) for tensor in named_tensors(copied).values()}
        given = _apart_in_memory(one.values)
        for (place, name), tensor in given.items():
            _check_finite(f"{name} of block {place} of {one.insertion.axis}", tensor)
        made = insert(copied, one.insertion, given)
        complete = {}
        for place, (_, block) in made.items():
            for name, tensor in named_tensors(block).items():
                # Shared tensors are the model's own already.
                if id(tensor) not in present:
                    complete[place, name] = tensor.detach()
        whole.append(replace(one, values=complete))
    return whole


def _apart_in_memory(
    values: Mapping[tuple[int, str], Tensor],
) -> dict[tuple[int, str], Tensor]:
    """Tensors of which no two share memory, as an offer's may."""
    apart_now = {}
    taken: set[int] = set()
    for key, value in values.items():
        address = value.untyped_storage().data_ptr()
        # Two blocks that share memory would learn as one.
        if address in taken:
            value = value.clone()
        taken.add(address)
        apart_now[key] = value.detach()
    return apart_now


def _verified(event: Event, draft: Draft) -> Draft:
    """The function is kept on the real weights, where that was promised; new units
    live.
    """
    plan = draft.plan
    present = live_values(event.structure)
    for name, tensor in draft.tensors.items():
        # Masks may hold infinities of their own.
        if name not in present or bool(torch.isfinite(present[name]).all()):
            _check_finite(name, tensor)
    values = {**present, **draft.tensors}
    with counting() as counter:
        before = run(event.structure, present, event.structure.example)
        after = run(
            event.structure, values, event.structure.example, plan, draft.blocks
        )
        change = relative_change(plan, before, after)
        growing = _growing(event, plan)
        # A promise counts only where every method of the event makes it.
        exact = [event.method(axis).kinds[axis.kind] for axis in growing]
        if growing and all(exact) and not draft.treatment.scaling:
            _check_preserved(event, plan, before, change)
        health = _health(event, draft, values)
    flops = draft.flops + counter.get_total_flops()
    return replace(draft, change=change, health=health, flops=flops)


def _check_finite(name: str, tensor: Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise GrowthRefused(
            f"the growth would put values that are not finite into {name}; nothing was "
            "changed. hint: a how that offers them, or a care that scales by them, is at "
            "fault"
        )


def _check_preserved(
    event: Event, plan: Plan, before: Sequence[Tensor], change: float
) -> None:
    """Raise unless the change is within rounding.

    That is a fixed bound, or so many times the model's own rounding gap.
    """
    floats = [t.dtype for t in before if t.is_floating_point()]
    double = all(dtype == torch.float64 for dtype in floats)
    if change <= (_DOUBLE_TOLERANCE if double else TOLERANCE):
        return
    # The gap costs a run in float64, so it is measured only where it decides.
    if not double and change <= _GAPS * rounding_gap(event.structure, before):
        return
    axes = [event.structure.axes.named(name) for name in plan.after]
    spoken = ", ".join(
        dict.fromkeys(type(event.method(axis)).__name__ for axis in axes)
    )
    raise VerificationError(
        f"{spoken} should preserve the function, but an output would change by "
        f"{change:.1e} of the largest one; nothing was changed. hint: for widths, an "
        "activation that is not 0 at 0 breaks a zero fan-in; use zero='fan_out'"
    )


def _health(
    event: Event, draft: Draft, values: Mapping[str, Tensor]
) -> dict[str, dict[str, Figures]]:
    """Figures of the new units by moment, those of the settling method's included.

    Empty without loss and data, and where something was dropped.
    """
    health: dict[str, dict[str, Figures]] = {}
    if draft.settled is not None:
        for moment, by_axis in draft.settled.health.items():
            health[moment] = {name: dict(figures) for name, figures in by_axis.items()}
    plan, lab = draft.plan, event.lab
    if lab.loss is None or not lab.batches or min(plan.added.values()) < 0:
        return health
    # A look, not a survey: a few batches tell dead units from living ones.
    batches = [lab.cut(b, HEALTH_EXAMPLES) for b in lab.batches[:HEALTH_BATCHES]]
    figures: dict[str, Figures] = {}
    units, _ = apart(_axes(event, plan))
    if any(axis.end == "input" for axis in units):
        return health  # the batches have the old features
    if units and draft.settled is None:
        copied = grown_twin(event.structure, values, replace(plan, counts=()))
        new = {}
        for axis in units:
            new[axis.name] = range(plan.before[axis.name], plan.after[axis.name])
        figures |= measure(copied, units, plan.layout, lab.loss, batches, new)
    if draft.blocks:
        copied = grown_twin(event.structure, values, plan, draft.blocks)
        structure = Structure(copied, event.structure.example)
        places = {one.insertion.axis: one.insertion.new_places for one in draft.blocks}
        figures |= measure_blocks(structure, copied, places, lab.loss, batches)
    if figures:
        health["insertion"] = {**health.get("insertion", {}), **figures}
    return health


def _agreed(event: Event, draft: Draft) -> Draft:
    """The draft, which is the same on all processes now."""
    blocks = {}
    for number, one in enumerate(draft.blocks):
        for (place, name), value in one.values.items():
            blocks[f"block {number} {place} {name}"] = value
    planned = f"{draft.plan.before} {draft.plan.after}"
    agreed = event.lab.ranks.agree(planned, {**draft.tensors, **blocks})
    same = []
    for number, one in enumerate(draft.blocks):
        values = {}
        for place, name in one.values:
            values[place, name] = agreed[f"block {number} {place} {name}"]
        same.append(replace(one, values=values))
    return replace(
        draft, tensors={name: agreed[name] for name in draft.tensors}, blocks=same
    )


def _states(
    event: Event, draft: Draft, axes: Sequence[Axis]
) -> list[tuple[Optimizer, Tensor, dict[str, Any]]]:
    """The optimizers' states of all changed parameters, at their new sizes."""
    live = named_tensors(event.model)
    offers = list(draft.offers.values())
    changes = {change.name: change for change in draft.plan.tensors}
    # Weights that a state holds are rescaled where the shape stays, too.
    rescaled = {*draft.treatment.scaling.tensors, *draft.plan.rescaled}
    states = []
    for name in [*changes, *sorted(rescaled - changes.keys())]:
        parameter = live[name]
        change = changes.get(name)
        edits = edits_of(change, draft.plan, axes, offers) if change else []
        rescale = partial(_rescale, draft, name, change, edits)
        for optimizer in event.optimizers:
            if parameter not in optimizer.state:
                continue
            if change is None:
                state = rescaled_state(optimizer, parameter, rescale)
            else:
                new, warm = draft.tensors[name], draft.treatment.warm
                of = Followed(parameter, new, change, edits, warm, rescale)
                state = grown_state(optimizer, of)
            states.append((optimizer, parameter, state))
    return states


def _rescale(
    draft: Draft,
    name: str,
    change: TensorChange | None,
    edits: Sequence[Edit],
    value: Tensor,
) -> Tensor:
    """What becomes of weights of another time, as the optimizer may hold them, before
    their size changes.
    """
    value = scaled(value, name, draft.treatment.scaling, change, edits)
    rescaling = draft.plan.rescaled.get(name)
    return value if rescaling is None else rescaling.of(value)


def _committed(event: Event, draft: Draft, started: float) -> Growth:
    """Surgery: the one step that changes the user's model and optimizers."""
    plan, treatment = draft.plan, draft.treatment
    axes = _axes(event, plan)
    states = _states(event, draft, axes)
    live = named_tensors(event.model)
    # Measuring may have left a graph alive, in the user's loss for example.
    check_free({name: live[name] for name in draft.tensors}, event.model)
    # What may fail on one rank alone has been done.
    draft = _agreed(event, draft)
    ranks = event.lab.ranks
    following = OptimizerChange(event.optimizers, states, treatment.reset)
    known = {id(parameter) for parameter in event.model.parameters()}
    changing = {id(live[change.name]): change for change in plan.tensors}
    with signals_deferred():
        exchange(
            event.model,
            draft.tensors,
            plan,
            draft.blocks,
            following,
            _ones(axes),
            confirm=lambda: ranks.gather(True),
        )
        if _GENERATORS.get(event.model) is event.lab.generator:
            note_draws(event.model, event.lab.generator.get_state())
        fresh, resized = _new_parts(event.model, known, changing)
        follow(event.model, resized)
        # New blocks are other axes, or in other places; they are tried anew.
        if not plan.insertions:
            proved(event.structure, event.model)
        if treatment.after:
            parameters = dict(event.model.named_parameters())
            new = masks(fresh, resized).items()
            entries = {name: mask.to(parameters[name].device) for name, mask in new}
            begin(event.model, treatment.after, event.optimizers, entries)
    ranks.check_alike(event.model)
    return Growth(
        added=plan.added,
        before=dict(plan.before),
        after=dict(plan.after),
        parameters=plan.parameters,
        max_change=draft.change,
        seconds=time.perf_counter() - started,
        flops=draft.flops + _spent_on(draft),
        health={moment: dict(figures) for moment, figures in draft.health.items()},
        notes=_notes(draft),
        blocks=_new_blocks(plan),
        rows=_new_rows(axes, plan),
        fresh=fresh,
        resized=resized,
        stale=list(plan.stale),
        origin=Origin(plan, draft.offers, event.how, event.care, draft.settled is None),
    )


def _new_parts(
    model: nn.Module, known: Container[int], changing: Mapping[int, TensorChange]
) -> tuple[dict[str, nn.Parameter], dict[str, TensorChange]]:
    """By name the parameters that were not there before, and the changes of those that
    were; between new blocks, old ones may have other names than before.
    """
    fresh, resized = {}, {}
    for name, parameter in model.named_parameters():
        if id(parameter) not in known:
            fresh[name] = parameter
        elif id(parameter) in changing:
            resized[name] = changing[id(parameter)]
    return fresh, resized


def masks(
    fresh: Mapping[str, nn.Parameter], resized: Mapping[str, TensorChange]
) -> dict[str, Tensor]:
    """By parameter of a grown model, which of its entries are new; on the CPU."""
    found = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in fresh.items()}
    for name, change in resized.items():
        old = torch.ones(change.before, dtype=torch.bool)
        found[name] = ~carry(old, change.sources)
    return found


def _ones(axes: Iterable[Axis]) -> list[str]:
    """Tensors whose new entries start at one."""
    return [slot.name for axis in axes for slot in axis.slots if slot.fill == "one"]


def _spent_on(draft: Draft) -> int:
    settled = draft.settled.flops if draft.settled is not None else 0
    return settled + sum(offer.flops for offer in draft.offers.values())


def _notes(draft: Draft) -> dict[str, str]:
    if draft.settled is not None:
        return dict(draft.settled.notes)
    return {name: offer.note for name, offer in draft.offers.items() if offer.note}


def _new_blocks(plan: Plan) -> dict[str, list[int]]:
    blocks = {}
    for insertion in plan.insertions:
        if insertion.new_places:
            blocks[insertion.axis] = insertion.new_places
    return blocks


def _new_rows(axes: Iterable[Axis], plan: Plan) -> dict[str, list[int]]:
    rows = {}
    for axis in axes:
        if axis.end is not None and plan.added[axis.name] > 0:
            rows[axis.name] = list(range(plan.before[axis.name], plan.after[axis.name]))
    return rows
