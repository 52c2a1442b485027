"""Every part holds the contracts that `meristem.testing` has for authors: one row each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import meristem as ms
from meristem.core.offer import Ramp
from meristem.methods import (
    Axis,
    Blocks,
    Choice,
    Clock,
    Copies,
    Lab,
    Offer,
    Place,
    Plan,
    Rescaling,
    Sandbox,
    Scaling,
    Settled,
    Share,
    Treatment,
    neutral,
)
from meristem.testing import check_care, check_how, check_when, check_where

HOWS = {
    "random": ms.how.Random(),
    "random, neither side zero": ms.how.Random(zero=None),
    "net2net": ms.how.Net2Net(),
    "pairs": ms.how.Pairs(),
    "firefly": ms.how.Firefly(steps=3),
    "tiny": ms.how.TINY(),
    "gradmax": ms.how.GradMax(steps=2),
    "gradmax, zero fan-out": ms.how.GradMax(zero="fan_out", steps=2),
    "swe": ms.how.SWE(),
    "senn": ms.how.SENN(steps=3, candidates=4),
    "zero_block": ms.how.ZeroBlock(),
    "stack": ms.how.Stack(),
    "stack, middle": ms.how.Stack(part="middle"),
    "interpose": ms.how.Interpose(),
    "interpose, zero": ms.how.Interpose(zero=True),
    "interpose, share": ms.how.Interpose(share=True),
}
WHERES = {
    "uniform": ms.where.Uniform(),
    "proportional": ms.where.Proportional(),
    "round_robin": ms.where.RoundRobin(),
    "by_gain": ms.where.ByGain(),
    "by_gain, per flop": ms.where.ByGain(per_flop=True),
    "svod": ms.where.SVoD(),
    "senn": ms.where.SENN(alpha=1e-9),
}
WHENS = {
    "every": ms.when.Every(epochs=3),
    "at": ms.when.At(steps=(7, 300)),
    "plateau": ms.when.Plateau(),
    "plateau, metric": ms.when.Plateau(of="metric"),
    "senn": ms.when.SENN(),
}
CARES = {
    "warm_moments": ms.care.WarmMoments(),
    "reset_moments": ms.care.ResetMoments(),
    "variance_transfer": ms.care.VarianceTransfer(),
    "shrink": ms.care.Shrink(),
    "young_rate": ms.care.YoungRate(steps=5),
    "rewarm": ms.care.Rewarm(steps=5),
    "fresh_statistics": ms.care.FreshStatistics(),
}


@pytest.mark.parametrize("name", HOWS)
def test_how(name: str) -> None:
    outcome = check_how(HOWS[name])
    assert "grown" in outcome.values()


@pytest.mark.parametrize("name", WHERES)
def test_where(name: str) -> None:
    check_where(WHERES[name])


@pytest.mark.parametrize("name", WHENS)
def test_when(name: str) -> None:
    check_when(WHENS[name])


@pytest.mark.parametrize("name", CARES)
def test_care(name: str) -> None:
    check_care(CARES[name])


def test_the_table_is_complete() -> None:
    assert {type(one) for one in HOWS.values()} == set(ms.how.METHODS.values())
    assert {type(one) for one in WHERES.values()} == set(ms.where.PLACES.values())
    assert {type(one) for one in WHENS.values()} == set(ms.when.TRIGGERS.values())
    assert {type(one) for one in CARES.values()} == set(ms.care.CARES.values())


# -- a stranger's mistakes are found, and told -------------------------------------------


class Base:
    """What every wrong method below has right."""

    kinds: ClassVar[dict[str, bool]] = {"width": True}
    batches = 0

    def propose(self, lab: Lab, axis: Axis, count: int) -> Offer:
        return Offer(axis.name, count, neutral(lab, axis, count))


class Dead(Base):
    """Zero on both sides: no gradient ever."""

    def propose(self, lab: Lab, axis: Axis, count: int) -> Offer:
        strips = {
            place: torch.zeros_like(s) for place, s in neutral(lab, axis, count).items()
        }
        return Offer(axis.name, count, strips)


class Loud(Base):
    """Says that it preserves the function, and does not."""

    def propose(self, lab: Lab, axis: Axis, count: int) -> Offer:
        return Offer(axis.name, count, neutral(lab, axis, count, zero=None))


class Forgetful(Base):
    """Leaves out what the units are made of."""

    def propose(self, lab: Lab, axis: Axis, count: int) -> Offer:
        strips = neutral(lab, axis, count)
        made = {slot.place for slot in axis.places("fan_in")}
        return Offer(
            axis.name, count, {p: s for p, s in strips.items() if p not in made}
        )


class Flat(Base):
    """Offers strips of the wrong rank."""

    def propose(self, lab: Lab, axis: Axis, count: int) -> Offer:
        strips = {place: s.flatten(1) for place, s in neutral(lab, axis, count).items()}
        return Offer(axis.name, count, strips)


class Stingy(Base):
    """Offers fewer units than it was asked for."""

    def propose(self, lab: Lab, axis: Axis, count: int) -> Offer:
        return replace(super().propose(lab, axis, count), count=count - axis.multiple)


class Moody(Base):
    """Draws from the global stream."""

    def propose(self, lab: Lab, axis: Axis, count: int) -> Offer:
        strips = neutral(lab, axis, count)
        for slot in axis.places("fan_in"):
            if not axis.streamed:
                strips[slot.place] = torch.randn_like(strips[slot.place])
        return Offer(axis.name, count, strips)


@pytest.mark.parametrize(
    ("method", "error", "told"),
    [
        (Dead, AssertionError, "receive no gradient"),
        (Loud, ms.VerificationError, "should preserve the function"),
        (Forgetful, ValueError, "start from neutral"),
        (Flat, ValueError, "must have shape"),
        (Stingy, ValueError, "was asked for"),
        (Moody, AssertionError, "the same seed gave another"),
    ],
)
def test_a_wrong_method_is_found(
    method: type[Base], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        check_how(method())


def test_a_right_method_of_a_stranger_passes() -> None:
    outcome = check_how(Base())
    assert set(outcome.values()) == {"grown"}


def test_what_a_method_gets_is_not_the_users() -> None:
    class Vandal(Base):
        def propose(self, lab: Lab, axis: Axis, count: int) -> Offer:
            for name in lab.values:
                lab.values[name].fill_(7.0)
            for parameter in lab.structure.model.parameters():
                parameter.data = torch.full_like(parameter, 7.0)
            with torch.no_grad():
                for parameter in lab.copied().parameters():
                    parameter.fill_(7.0)
            lab.structure.model.add_module("extra", nn.Linear(2, 2))
            raise ms.GrowthRefused("after the deed")

    net = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
    )
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ms.GrowthRefused, match="after the deed"):
        ms.grow_(net, {"0": 2}, torch.randn(3, 4), how=Vandal())
    assert before.keys() == net.state_dict().keys()
    assert all(
        torch.equal(value, net.state_dict()[name]) for name, value in before.items()
    )


def test_blocks_that_are_missing_are_told() -> None:
    class NoBlocks(Base):
        kinds: ClassVar[dict[str, bool]] = {"depth": False}

        def propose(self, lab: Lab, axis: Axis, count: int) -> Offer:
            return Offer(axis.name, count)

    with pytest.raises(TypeError, match="must offer 2 new blocks"):
        check_how(NoBlocks())


@pytest.mark.parametrize(
    ("parent", "share", "error", "told"),
    [
        ([8, 0], torch.ones(10), ValueError, "from 0 to 7, or -1 for none; got"),
        ([-5, 0], torch.ones(10), ValueError, "or -1 for none"),
        ([0.0, 1.0], torch.ones(10), ValueError, "whole numbers"),
        ([0], torch.ones(10), ValueError, r"parent of Wrong must have shape \(2,\)"),
        ([0, 0], torch.ones(8), ValueError, r"share of Wrong must have shape \(10,\)"),
        ([0, 0], torch.full((10,), torch.nan), ms.GrowthRefused, "not finite"),
        ([0, -1], torch.ones(10), ValueError, "offers no weights for"),
    ],
)
def test_copies_that_do_not_fit_are_told(
    parent: list[float], share: torch.Tensor, error: type[Exception], told: str
) -> None:
    class Wrong(Base):
        def propose(self, lab: Lab, axis: Axis, count: int) -> Offer:
            copies = Copies(torch.tensor(parent), share)
            return Offer(axis.name, count, copies=copies)

    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(error, match=told):
        ms.grow_(net, {"0": 2}, torch.randn(3, 4), how=Wrong())


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"values": {(2, "wieght"): torch.zeros(1)}}, ValueError, "has no 'wieght'"),
        ({"values": {(0, "norm.weight"): torch.ones(8)}}, ValueError, "is not new"),
        ({"values": {(2, "norm.weight"): torch.ones(3)}}, ValueError, r"shape \(8,\)"),
        ({"values": {(2, "norm.weight"): 1.0}}, ValueError, "got float"),
        (
            {"values": {(2, "norm.weight"): torch.full((8,), torch.nan)}},
            ms.GrowthRefused,
            "not finite",
        ),
        ({"rescaled": {"0.wieght": Rescaling(0.5)}}, ValueError, "no tensor of the"),
        (
            {"rescaled": {"0.norm.weight": Rescaling(torch.inf)}},
            ms.GrowthRefused,
            "not finite",
        ),
    ],
)
def test_blocks_that_do_not_fit_are_told(
    change: dict[str, Any], error: type[Exception], told: str
) -> None:
    class Wrong(Base):
        kinds: ClassVar[dict[str, bool]] = {"depth": False}

        def propose(self, lab: Lab, axis: Axis, count: int) -> Offer:
            blocks = Blocks(lab.depth(axis).appended(count), **change)
            return Offer(axis.name, count, blocks=blocks)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.inner = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.relu(self.inner(self.norm(x)))

    net = nn.Sequential(Block(), Block())
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = ms.find_axes(net, torch.randn(3, 8))
    depth = next(axis.name for axis in found.values() if axis.kind == "depth")
    with pytest.raises(error, match=told):
        ms.grow_(net, {depth: 1}, torch.randn(3, 8), how=Wrong())
    after = net.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(
    ("blocks", "new", "told"),
    [
        ((0, 2), (False, True), "must leave the blocks 0 to 2"),
        ((2, 1, 0, 0), (False, False, False, True), "must leave the blocks 0 to 2"),
        (
            (0, 1, 2, 7),
            (False, False, False, True),
            "make new ones after some of these",
        ),
        (
            (0, 1, 2, -1),
            (False, False, False, True),
            "make new ones after some of these",
        ),
        ((0, 1, 2, 2), (False, False, True), "must offer 1 new blocks"),
        ((0, 1, 2, 2), (0, 0, 0, 1), "must offer 1 new blocks"),
        ((0, 1, 2, 2, 2), (False, False, False, True, True), "must offer 1 new blocks"),
    ],
)
def test_no_method_drops_or_moves_a_block(
    blocks: tuple[int, ...], new: tuple[bool, ...], told: str
) -> None:
    class Wrong(Base):
        kinds: ClassVar[dict[str, bool]] = {"depth": False}

        def propose(self, lab: Lab, axis: Axis, count: int) -> Offer:
            placed = lab.depth(axis).with_blocks(blocks, new)
            return Offer(axis.name, count, blocks=Blocks(placed))

    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    before = list(net.parameters())
    with pytest.raises(ValueError, match=told):
        ms.grow_(net, {"layers": 1}, torch.randn(3, 5, 8), how=Wrong())
    assert all(a is b for a, b in zip(before, net.parameters(), strict=True))


class Settling(Base):
    """Settles nothing but what it is told to."""

    def __init__(self, settled: Any) -> None:
        self.settled = settled

    def settle(self, sandbox: Sandbox, counts: Mapping[str, int]) -> Settled:
        parts = []
        for name, count in counts.items():
            axis = sandbox.lab.axes.named(name)
            parts.append(self.propose(sandbox.lab, axis, count))
        sandbox.insert(parts)
        made = {name: p.detach() for name, p in sandbox.model.named_parameters()}
        return self.settled(made)


class Asking:
    """A care that asks for what it is told to."""

    def __init__(self, treatment: Any) -> None:
        self.treatment = treatment

    def treat(self, model: nn.Module, plan: Plan, axes: Any) -> Any:
        return self.treatment


@pytest.mark.parametrize(
    ("parts", "error", "told"),
    [
        ({"how": Settling(lambda made: None)}, TypeError, "must return a Settled"),
        (
            {"how": Settling(lambda made: Settled({}))},
            ValueError,
            "settled no 0.weight",
        ),
        (
            {"how": Settling(lambda made: Settled(made | {"2.bias": torch.ones(7)}))},
            ValueError,
            r"2.bias as Settling settled it must have shape \(2,\)",
        ),
        (
            {"how": Settling(lambda made: Settled(made | {"no": torch.ones(7)}))},
            ValueError,
            "settled 'no', which is no tensor",
        ),
        ({"how": Settling(lambda made: Settled(made, "1"))}, TypeError, "flops='1'"),
        ({"how": Settling(lambda made: Settled(made, notes=3))}, TypeError, "notes=3"),
        ({"care": Asking(None)}, TypeError, "must return a Treatment; got NoneType"),
        (
            {"care": Asking(Treatment(after=("x",)))},
            TypeError,
            "takes Ramp and Tracking",
        ),
        ({"care": Asking(Treatment(after=[]))}, TypeError, "must be a tuple"),
        (
            {"care": Asking(Treatment(after=(Ramp(0),)))},
            ValueError,
            "a number of steps",
        ),
        (
            {"care": Asking(Treatment(after=(Ramp(3, torch.nan),)))},
            ValueError,
            "a share in",
        ),
        (
            {"care": Asking(Treatment(Scaling({"foo": 0.5})))},
            ValueError,
            "scales 'foo', which is no tensor",
        ),
        (
            {"care": Asking(Treatment(Scaling(places={Place("2.weight", 0): 0.5})))},
            ValueError,
            "along which nothing grows",
        ),
        (
            {"care": Asking(Treatment(Scaling({"2.bias": torch.inf})))},
            ms.GrowthRefused,
            "scales by inf",
        ),
    ],
)
def test_what_a_part_gives_is_checked_before_anything_changes(
    parts: dict[str, Any], error: type[Exception], told: str
) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x = torch.randn(3, 4)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return model(batch).square().mean()

    with pytest.raises(error, match=told):
        ms.grow_(net, {"0": 2}, x, optimizer=optimizer, loss=loss, data=[x], **parts)
    after = net.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not ms.lineage(net)


def test_only_what_changes_has_to_be_settled() -> None:
    def changed(made: dict[str, torch.Tensor]) -> Settled:
        return Settled(
            {name: made[name] for name in ("0.weight", "0.bias", "2.weight")}
        )

    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(3, 4)
    how = Settling(changed)
    growth = ms.grow_(
        net, {"0": 2}, x, how=how, loss=lambda m, b: m(b).square().mean(), data=[x]
    )
    assert growth.after == {"0": 10}


def test_a_block_method_of_a_stranger_passes() -> None:
    class Doubled(Base):
        kinds: ClassVar[dict[str, bool]] = {"depth": False}

        def propose(self, lab: Lab, axis: Axis, count: int) -> Offer:
            return Offer(
                axis.name, count, blocks=Blocks(lab.depth(axis).appended(count))
            )

    assert "grown" in check_how(Doubled()).values()


class Greedy:
    reads_gains = False
    weighs_kinds = False

    def share(self, choice: Choice) -> Share:
        return Share({choice.axes[0].name: choice.total + 1})


class Unknown(Greedy):
    def share(self, choice: Choice) -> Share:
        return Share({"elsewhere": 1})


class Wordy(Greedy):
    def share(self, choice: Choice) -> Share:
        return Share({choice.axes[0].name: "2"})  # type: ignore[dict-item]


class Listed(Greedy):
    def share(self, choice: Choice) -> Share:
        return Share([2])  # type: ignore[arg-type]


class Silent(Greedy):
    def share(self, choice: Choice) -> Share:
        return Share({})


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        (Greedy, "given away"),
        (Unknown, "not among"),
        (Silent, "say why"),
        (Wordy, "gives '2' units"),
        (Listed, "maps names of axes to units"),
    ],
)
def test_a_wrong_rule_is_found(rule: type[Greedy], told: str) -> None:
    with pytest.raises((AssertionError, TypeError, ValueError), match=told):
        check_where(rule())


def test_what_is_missing_is_said_at_construction() -> None:
    class Half:
        reads_gains = False

        def share(self, choice: Choice) -> Share:
            return Share({})

    net = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
    )
    data = [torch.randn(3, 4)]
    with pytest.raises(TypeError, match="weighs_kinds"):
        ms.Grower(
            net,
            None,
            loss=lambda m, b: m(b).mean(),
            data=data,
            when=ms.when.Every(steps=1),
            how=ms.how.Random(),
            where=Half(),
        )
    with pytest.raises(TypeError, match="propose"):
        ms.grow_(net, {"0": 2}, data[0], how=object())
    with pytest.raises(TypeError, match=r"Random\(\)"):
        ms.grow_(net, {"0": 2}, data[0], how="random")


def test_a_method_called_allowance_does_not_make_a_budget() -> None:
    class Paid:
        def due(self, clock: Clock) -> bool:
            return clock.step == 2

        def allowance(self) -> str:
            return "pocket money"

    net = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
    )
    grower = ms.Grower(
        net,
        None,
        loss=lambda m, b: m(b).square().mean(),
        data=[torch.randn(3, 4)],
        when=Paid(),
        how=ms.how.Random(),
        amount=2,
    )
    assert grower.step() is None
    assert grower.step()


def test_a_wrong_trigger_and_a_wrong_care_are_found() -> None:
    class Never:
        def due(self, clock: Clock) -> bool:
            return False

    class Maybe:
        def due(self, clock: Clock) -> str:
            return "perhaps"

    class Careless:
        def treat(self, model: nn.Module, plan: ms.Plan, axes: object) -> None:
            return None

    with pytest.raises(AssertionError, match="never due"):
        check_when(Never())
    with pytest.raises(AssertionError, match="bool"):
        check_when(Maybe())
    with pytest.raises(AssertionError, match="Treatment"):
        check_care(Careless())
    assert isinstance(
        ms.care.Shrink().treat(nn.Linear(2, 2), ms.Plan({}, {}), []), Treatment
    )
