"""Every contract of a growth, for authors of methods.

`check_how(MyMethod())` grows a small zoo by a method and raises an AssertionError with
one sentence where a promise is broken. The project's own table of contracts calls the
same functions.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meristem.care import CARES
from meristem.core.axis import Axis, Role
from meristem.core.budget import Budget
from meristem.core.change import Plan, by_unit
from meristem.core.errors import GrowthRefused
from meristem.core.growth import Growth
from meristem.core.offer import Treatment
from meristem.event.steps import methods
from meristem.grower import Grower
from meristem.growing import find_axes, grow_, plan
from meristem.how import GradMax, Random
from meristem.methods import (
    Care,
    Clock,
    How,
    When,
    Where,
    check_part,
    rations,
    settles,
    watched,
)
from meristem.structure import apart, structure_of
from meristem.when import TRIGGERS, Every
from meristem.where import PLACES

EXACT = 1e-10
"""Largest relative change of an output, in float64, that counts as none."""
# Steps of an axis that grow at once.
_UNITS = 4
# Training steps after which every new unit must learn on both its sides.
_STEPS = 3


# -- the zoo


class _Plain(nn.Module):
    def __init__(self, act: Callable[[], nn.Module], bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8, bias=bias)
        self.act = act()
        self.fc2 = nn.Linear(8, 7, bias=bias)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.fc2(self.act(self.fc1(x))))
        return self.head(x)  # type: ignore[no-any-return]


class _Convolutions(nn.Module):
    """Batch norms, a depthwise kernel, a residual join, a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.point, self.norm2 = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.mid = nn.Conv2d(6, 5, 3, stride=2, padding=1)
        self.head = nn.Linear(5 * 3 * 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.stem(x)))
        x = x + F.relu(self.norm2(self.point(self.depthwise(x))))
        return self.head(F.relu(self.mid(x)).flatten(1))  # type: ignore[no-any-return]


class _Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(6, 8), nn.Linear(6, 8)
        self.fused, self.down = nn.Linear(8, 12), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x) * F.silu(self.gate(x))
        return self.down(F.glu(self.fused(x), -1))  # type: ignore[no-any-return]


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 5)
        self.bias = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.encoder.weight.t()
        return F.linear(F.relu(self.encoder(x)), weight, self.bias)


class _Block(nn.Module):
    """Attention whose head count is read from the width, and an MLP, both pre-norm."""

    def __init__(self, width: int, head: int) -> None:
        super().__init__()
        self.head = head
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k = nn.Linear(width, 2 * head), nn.Linear(width, 2 * head)
        self.v, self.o = nn.Linear(width, 2 * head), nn.Linear(2 * head, width)
        self.up, self.down = nn.Linear(width, 10), nn.Linear(10, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln1(x)
        split = [
            p(y).unflatten(-1, (-1, self.head)).transpose(1, 2) for p in self._qkv()
        ]
        mixed = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        x = x + self.o(mixed)
        return x + self.down(F.gelu(self.up(self.ln2(x))))  # type: ignore[no-any-return]

    def _qkv(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.q, self.k, self.v


class _Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(_Block(8, 4) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Case:
    """A model of the zoo.

    Attributes:
        make: Makes it.
        shape: The shape of its inputs.
        rectified: Whether a unit may be off on all of the data, and so learn nothing.
            Of such units half must live, of others all.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    rectified: bool = False


ZOO: Mapping[str, Case] = {
    "relu": Case(lambda: _Plain(nn.ReLU), (64, 6), True),
    "tanh": Case(lambda: _Plain(nn.Tanh), (64, 6)),
    "gelu, no bias": Case(lambda: _Plain(nn.GELU, bias=False), (64, 6)),
    "convolutions": Case(_Convolutions, (32, 3, 6, 6), True),
    "gated": Case(_Gated, (64, 6)),
    "tied": Case(_Tied, (64, 6), True),
    "transformer": Case(_Transformer, (16, 5, 6)),
}
"""Small models, one for each kind of place that units stand in."""


class Trial:
    """A trained model of the zoo with its optimizer, data and loss, in float64."""

    def __init__(self, name: str, seed: int = 0) -> None:
        torch.manual_seed(seed)
        case = ZOO[name]
        self.name = name
        self.model = case.make().double()
        self.x = torch.randn(case.shape, dtype=torch.float64)
        out = self.model(self.x)
        self.data = [(self.x, torch.randn_like(out)) for _ in range(3)]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        # Moments of the optimizer are there before the growth, as in a real run.
        for _ in range(2):
            self.step()

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1])

    def step(self) -> None:
        self.model.eval()  # norms on running statistics, so that steps can be compared
        self.optimizer.zero_grad()
        self.loss(self.model, self.data[0]).backward()
        self.optimizer.step()

    def grow(self, counts: Mapping[str, int], how: Any, **options: Any) -> Growth:
        generator = torch.Generator().manual_seed(7)
        return grow_(
            self.model,
            counts,
            self.x,
            how,
            optimizer=self.optimizer,
            loss=self.loss,
            data=self.data,
            generator=generator,
            **options,
        )


# -- how


def check_how(how: How) -> dict[str, str]:
    """Grow every axis of the zoo that a method speaks for, and hold all promises.

    - offers have the right shapes; a method writes into nothing but its own copies;
    - shapes, attributes and optimizer state follow; random streams are left alone;
    - old weights keep their values, unless the method copies units, or settles them in;
    - the function is preserved where `kinds` says so;
    - within a few steps every new unit receives gradient on both its sides;
    - the same seed gives the same growth.

    Args:
        how: The method.

    Returns:
        What became of every axis: "grown", or the reason why the method refused.

    Raises:
        AssertionError: A promise is broken; the message says which, and where.
        TypeError, ValueError: The method, or an offer of it, is not what it should be.

    Examples:
        >>> import meristem as ms, meristem.testing
        >>> outcome = meristem.testing.check_how(ms.how.Stack())
        >>> outcome["transformer: blocks"]
        'grown'
    """
    (how,) = methods(how)
    outcome: dict[str, str] = {}
    grown_kinds = set()
    for name in ZOO:
        trial = Trial(name)
        for axis in find_axes(trial.model, trial.x).values():
            if axis.kind not in how.kinds:
                continue
            where = f"{name}: {axis.name}"
            try:
                _check_growth(how, name, axis, where)
            except GrowthRefused as refusal:
                outcome[where] = str(refusal)
                continue
            outcome[where] = "grown"
            grown_kinds.add(axis.kind)
    for kind in how.kinds:
        assert kind in grown_kinds, (
            f"{_named(how)} grew no axis of kind {kind!r}: {outcome}"
        )
    return outcome


def _named(part: Any) -> str:
    return type(part).__name__


def _check_growth(how: How, name: str, axis: Axis, where: str) -> None:
    """Hold every promise at the growth of one axis of one model."""
    trial = Trial(name)
    counts = {axis.name: (_UNITS if axis.slots else 2) * axis.multiple}
    planned = plan(trial.model, counts, trial.x)
    before = copy.deepcopy(trial.model.state_dict())
    out = trial.model.eval()(trial.x).detach()
    stream = torch.get_rng_state()
    try:
        growth = trial.grow(counts, how)
    except GrowthRefused:
        _assert_same(before, trial.model.state_dict(), f"{where}: a refusal changed")
        raise
    told = f"{_named(how)}, {where}"
    assert torch.equal(stream, torch.get_rng_state()), f"{told}: it drew global numbers"
    assert growth.added == counts, f"{told}: added {growth.added}, asked {counts}"
    change = (trial.model(trial.x) - out).abs().max() / out.abs().max()
    if how.kinds[axis.kind]:
        assert change <= EXACT, (
            f"{told}: outputs moved by {change:.1e}, none was promised"
        )
    _check_old(how, trial, planned, before, axis, told)
    for parameter in trial.model.parameters():
        for value in trial.optimizer.state[parameter].values():
            fits = value.dim() == 0 or value.shape == parameter.shape
            assert fits, f"{told}: optimizer state of shape {tuple(value.shape)}"
    again = Trial(name)
    torch.manual_seed(99)  # global randomness is no source
    again.grow(counts, how)
    _assert_same(
        trial.model.state_dict(),
        again.model.state_dict(),
        f"{told}: the same seed gave another",
    )
    for _ in range(_STEPS):
        trial.step()
    _check_alive(trial, growth, axis, told)


def _assert_same(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], text: str
) -> None:
    assert first.keys() == second.keys(), text
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"{text} {name}"


def _check_old(
    how: How,
    trial: Trial,
    planned: Plan,
    before: Mapping[str, Tensor],
    axis: Axis,
    told: str,
) -> None:
    """Old entries keep their values; copies share their fan-out, settling moves all."""
    copies = not axis.slots or settles(how)
    now = trial.model.state_dict()
    for change in planned.tensors:
        value = now[change.name]
        assert tuple(value.shape) == change.after, f"{told}: shape of {change.name}"
        # What moves old weights by design is held by the change of the outputs.
        if copies or change.name in planned.rescaled:
            continue
        for d, source in enumerate(change.sources):
            kept = torch.from_numpy((source >= 0).nonzero()[0])
            value = value.index_select(d, kept)
        slots = [slot for slot in axis.slots if slot.name == change.name]
        shared = any(slot.role == "fan_out" for slot in slots)
        same = torch.equal(value, before[change.name])
        # A method that copies units divides their fan-out.
        divided = shared and bool(
            (value.abs() <= before[change.name].abs() + EXACT).all()
        )
        assert same or divided, f"{told}: old entries of {change.name} changed"


def _check_alive(trial: Trial, growth: Growth, axis: Axis, told: str) -> None:
    """Every new unit, or block, receives gradient."""
    trial.optimizer.zero_grad()
    trial.loss(trial.model, trial.data[0]).backward()
    # A depth has blocks instead of slots: every parameter of the net must learn.
    if not axis.slots:
        found = find_axes(trial.model, trial.x)
        assert found.named(axis.name).size == growth.after[axis.name], (
            f"{told}: its size"
        )
        for name, parameter in trial.model.named_parameters():
            learns = parameter.grad is not None and bool(parameter.grad.any())
            assert learns or parameter.numel() == 0, f"{told}: {name} gets no gradient"
        return
    units = range(growth.before[axis.name], growth.after[axis.name])

    structure = structure_of(trial.model, trial.x)
    now = structure.axes.named(axis.name)
    layout = structure.layout(axis.name)
    parameters = dict(trial.model.named_parameters())
    sides: tuple[Role, Role] = ("fan_in", "fan_out")
    for side in sides:
        reached = torch.zeros(now.size // now.grain)
        slots = now.places(side)
        for slot in slots:
            gradient = parameters[slot.name].grad
            if gradient is not None:
                by = by_unit(gradient, slot.dim, layout[slot.place])
                reached += by.flatten(1).abs().amax(1).float()
        new = reached[[unit // now.grain for unit in units]]
        dead = int((new == 0).sum())
        # Behind a ReLU half of them may be off on the batch.
        allowed = len(new) // 2 if ZOO[trial.name].rectified else 0
        assert not slots or dead <= allowed, (
            f"{told}: {dead} of {len(new)} new units receive no gradient on their "
            f"{side} after {_STEPS} steps"
        )


# -- where, when, care


def check_where(where: Where) -> None:
    """Let a rule share units out, and hold what is asked of a share.

    Counts are whole steps of known axes and no more than there are; the same generator
    gives the same share; a grower grows by it, within a budget.

    Raises:
        AssertionError, TypeError, ValueError: Something does not hold; the message says
            what.

    Examples:
        >>> import meristem as ms, meristem.testing
        >>> meristem.testing.check_where(ms.where.RoundRobin())
    """
    check_part("where", where, PLACES)
    for name in ("relu", "convolutions"):
        results = []
        for _ in range(2):
            trial = Trial(name)
            grower = Grower(
                trial.model,
                trial.optimizer,
                loss=trial.loss,
                data=trial.data,
                when=Every(steps=1),
                how=_measuring(where),
                where=where,
                amount=6,
                budget=Budget(units=200),
                example=trial.x,
                generator=torch.Generator().manual_seed(3),
            )
            growth = grower.step()
            told = f"{_named(where)}, {name}"
            if growth is None:
                assert grower.reason, f"{told}: nothing grew, and no reason is given"
                results.append(grower.reason)
                continue
            total = sum(growth.added.values())
            assert 0 < total <= 6, f"{told}: {total} units of 6 were given away"
            results.append(repr(growth.added))
        assert results[0] == results[1], f"{told}: the same seed gave another share"


def _measuring(where: Where) -> How:
    """A method that finds what a rule reads."""
    if not where.reads_gains:
        return Random()
    from meristem.how import SENN
    from meristem.where import SENN as ByScore

    if isinstance(where, ByScore):
        return SENN(steps=3, candidates=4)
    return GradMax(steps=2)


def check_when(when: When) -> None:
    """Ask a trigger at every step of a training, and hold what is asked of it.

    It answers with a bool, the same for the same clock, and is due at least once in
    2,000 steps of 100 epochs; one that has `allowance(clock)` gives a number.

    Raises:
        AssertionError, TypeError: Something does not hold; the message says what.

    Examples:
        >>> import meristem as ms, meristem.testing
        >>> meristem.testing.check_when(ms.when.Every(epochs=3))
    """
    check_part("when", when, TRIGGERS)
    told = _named(when)
    times = 0
    asked = range(1, 2001)
    # A trigger that watches the metric is asked again where one has come.
    measured = "metric" in watched(when)
    for step, just_measured in itertools.product(asked, {False, measured}):
        # Operations enough for any budget; a loss and a metric that stand still.
        still = (1.0,) * (step // 20)
        clock = Clock(
            step,
            step // 20,
            step % 20 == 0,
            times,
            trained=1e12 * step,
            losses=still,
            metrics=still,
            measured=just_measured and step % 20 == 0,
        )
        due = when.due(clock)
        assert isinstance(due, bool), f"{told}.due must return a bool; got {due!r}"
        assert due == when.due(clock), f"{told}: the same clock gave another answer"
        if rations(when):
            allowance = when.allowance(clock)  # type: ignore[attr-defined]
            number = isinstance(allowance, (int, float)) and not math.isnan(allowance)
            assert number, f"{told}.allowance must return a number; got {allowance!r}"
        times += due
    assert times, f"{told} is never due in 2,000 steps of 100 epochs"


def check_care(care: Care) -> None:
    """Grow with a care, and hold that old weights move only as its treatment says.

    Raises:
        AssertionError, TypeError: Something does not hold; the message says what.

    Examples:
        >>> import meristem as ms, meristem.testing
        >>> meristem.testing.check_care(ms.care.Shrink(0.5))
    """
    check_part("care", care, CARES)
    told = _named(care)
    for name in ("relu", "convolutions", "transformer"):
        trial = Trial(name)
        units, _ = apart(list(find_axes(trial.model, trial.x).values()))
        axis = units[0]
        counts = {axis.name: 2 * axis.multiple}
        planned = plan(trial.model, counts, trial.x)
        treatment = care.treat(trial.model, planned, [axis])
        assert isinstance(treatment, Treatment), f"{told}.treat must return a Treatment"
        moved = set(treatment.scaling.tensors)
        moved |= {place.name for place in treatment.scaling.places}
        before = copy.deepcopy(trial.model.state_dict())
        trial.grow(counts, Random(), care=care)
        now = trial.model.state_dict()
        changed = {change.name for change in planned.tensors} | set(planned.rescaled)
        for key, value in before.items():
            if key not in moved | changed:
                same = torch.equal(value, now[key])
                assert same, f"{told}, {name}: {key} moved, and no scaling says so"
        for _ in range(_STEPS):
            trial.step()
        loss = trial.loss(trial.model, trial.data[0])
        assert bool(torch.isfinite(loss)), f"{told}, {name}: the loss is not finite"


__all__ = [
    "ZOO",
    "Case",
    "check_care",
    "check_how",
    "check_when",
    "check_where",
]
