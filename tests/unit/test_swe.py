"""SWE and SVoD: the equations of arXiv 2509.18842, on linear, convolutional, gated and residual axes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import make

import meristem as ms
from meristem.how.swe import SWE, Adjustment
from meristem.lab.laboratory import Lab, Loan, Sandbox
from meristem.methods import Choice
from meristem.structure import Structure
from meristem.structure.twin import named_tensors
from meristem.where import SVoD

AXES = {
    "mlp": "fc1",
    "mlp_norm": "fc1",
    "bn_conv": "conv1",
    "resnet18": "layer1.0.conv1",
    "glu": None,
    "unet": None,
}


def square(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch) - 1).square().mean()


def data_of(x: Any, batches: int = 3) -> list[Any]:
    return [x + 0.1 * torch.randn_like(x) for _ in range(batches)]


def case(
    name: str, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, list[Any], str, Lab]:
    model, x = make(name, dtype)
    data = data_of(x)
    structure = Structure(model, x)
    axis = AXES[name] or next(iter(structure.axes))
    generator = torch.Generator().manual_seed(1)
    return model, data, axis, Lab(structure, Loan(generator, square, data[:1], data))


def adjusted(
    name: str, method: SWE, count: int = 4
) -> tuple[nn.Module, Sandbox, Adjustment, list[Any]]:
    model, data, axis, lab = case(name)
    sandbox = lab.sandbox()
    before = sandbox.lab.structure.axes[axis]
    plan, _ = sandbox.insert([method.propose(sandbox.lab, before, count)])
    return model, sandbox, Adjustment(method, sandbox, plan, before), data


def output(sandbox: Sandbox, x: Any, tensors: dict[str, Tensor]) -> Tensor:
    values = {**named_tensors(sandbox.model), **tensors}
    with torch.no_grad():
        return torch.func.functional_call(sandbox.model.eval(), values, (x,))


@pytest.mark.parametrize("coupling", ["full", "factored"])
@pytest.mark.parametrize("name", AXES)
def test_insertion_and_merge_keep_what_the_spec_says(name: str, coupling: str) -> None:
    model, sandbox, adjustment, data = adjusted(name, SWE.published(coupling))
    with torch.no_grad():
        want = model.eval()(data[0])
    assert torch.allclose(
        output(sandbox, data[0], {}), want, atol=1e-12
    )  # D = 0: the insertion changes nothing
    base = {
        key: value.detach().clone()
        for key, value in named_tensors(sandbox.model).items()
    }
    slots = [slot for slot, _ in adjustment.couplings]
    adjustment.adjust()
    coupled = output(sandbox, data[0], adjustment.effective())
    adjustment.merge()
    assert torch.allclose(output(sandbox, data[0], {}), coupled, atol=1e-12)
    moved = False
    for slot, pair in adjustment.couplings:
        if (
            slot.name not in adjustment.free
        ):  # a tensor that reads the units too is trained whole
            old, new = base[slot.name], named_tensors(sandbox.model)[slot.name]
            assert torch.allclose(
                old.sum(slot.dim), new.sum(slot.dim), atol=1e-10
            )  # what is given is taken
            moved |= not torch.equal(old, new)
        assert torch.allclose(pair.moved().sum(0), torch.zeros(()).double(), atol=1e-10)
    assert moved
    assert slots
    kept = set(base) - {slot.name for slot in slots} - set(adjustment.free)
    assert all(
        torch.equal(base[key], named_tensors(sandbox.model)[key]) for key in kept
    )


def test_the_gradient_of_a_pair_is_the_difference_and_wakes_a_dead_unit() -> None:
    for name in ("mlp", "bn_conv"):
        _, sandbox, adjustment, data = adjusted(name, SWE.published())
        plan = adjustment.plan
        bias = next(slot for slot, _ in adjustment.couplings if slot.fill == "bias")
        new = plan.after[adjustment.axis.name] - plan.before[adjustment.axis.name]
        adjustment.base[bias.name][-new:] = -100.0  # the new units are dead
        tensors = {
            key: value.detach().requires_grad_()
            for key, value in adjustment.effective().items()
        }
        sandbox.loss(data[0], tensors).backward()
        effective = adjustment.effective()
        sandbox.loss(data[0], effective).backward()
        for slot, coupling in adjustment.couplings:
            gradient = tensors[slot.name].grad.movedim(slot.dim, 0)
            old, fresh = gradient[:-new], gradient[-new:]
            pairs = coupling.numbers()[0][0]
            assert torch.allclose(
                pairs.grad[:, :, 0], fresh[:, None] - old[None], atol=1e-12
            )
            if name == "mlp":
                assert fresh.abs().max() == 0  # no gradient of its own
                assert pairs.grad.abs().max() > 0  # yet it moves


def test_the_base_is_frozen_before_the_merge_unless_told() -> None:
    for decay in (False, True):
        _, sandbox, adjustment, data = adjusted(
            "mlp", SWE(coupling="full", coupling_lr=None, decay_base=decay)
        )
        name = "fc1.weight"
        before = adjustment.base[name].detach().clone()
        values = named_tensors(sandbox.model)[name].clone()
        optimizer = adjustment._optimizer(
            [p for _, c in adjustment.couplings for p in c.numbers()]
        )
        for batch in data:
            adjustment._step(batch, optimizer)
        after = adjustment.base[name].detach()
        if decay:
            shrunk = before.abs() - after.abs()
            assert torch.allclose(
                shrunk[before.abs() > 0.01], torch.tensor(3e-3).double(), rtol=0.05
            )  # 1e-3 a step
        else:
            assert torch.equal(before, after)
        assert torch.equal(values, named_tensors(sandbox.model)[name])


@pytest.mark.parametrize("name", ["mlp", "bn_conv", "resnet18"])
def test_factored_equals_full_under_sgd(name: str) -> None:
    results = []
    for coupling in ("full", "factored"):
        torch.manual_seed(0)
        _, sandbox, adjustment, _ = adjusted(
            name, SWE(coupling=coupling, optimizer="sgd", lr=0.05, coupling_lr=None)
        )
        adjustment.adjust()
        adjustment.merge()
        results.append(
            {key: value.clone() for key, value in named_tensors(sandbox.model).items()}
        )
    full, factored = results
    for key, value in full.items():
        if value.is_floating_point():
            assert (
                value - factored[key]
            ).abs().max() <= 1e-5 * value.abs().max().clamp_min(1e-12)


@pytest.mark.parametrize("name", ["mlp", "bn_conv", "resnet18", "glu", "nanogpt"])
def test_settling_lowers_the_loss_and_leaves_no_trace(name: str) -> None:
    model, x = make(name)
    data = [x] * 30
    loss = (
        (
            lambda m, b: F.cross_entropy(
                m(b).flatten(0, -2), torch.zeros(m(b).flatten(0, -2).shape[0]).long()
            )
        )
        if (not x.is_floating_point())
        else square
    )
    axes = list(ms.find_axes(model, x))
    optimizer = torch.optim.Adam(model.parameters())
    before = loss(model.eval(), x).item()
    rng = torch.get_rng_state()
    flags = [
        (m.training, [p.requires_grad for p in m.parameters()]) for m in model.modules()
    ]
    growth = ms.grow_(
        model,
        {axes[0]: 2 * ms.find_axes(model, x)[axes[0]].multiple},
        x,
        how=SWE(),
        optimizer=optimizer,
        loss=loss,
        data=data,
    )
    assert loss(model, x).item() < before
    assert growth.flops > 0
    assert torch.equal(rng, torch.get_rng_state())
    assert flags == [
        (m.training, [p.requires_grad for p in m.parameters()]) for m in model.modules()
    ]
    assert all(p.grad is None for p in model.parameters())
    assert set(growth.health) == {"insertion", "adjust"}
    assert growth.notes


def test_a_failed_adjustment_changes_nothing() -> None:
    model, x = make("mlp")
    before = copy.deepcopy(model.state_dict())
    calls = []

    def bad(m: nn.Module, b: Any) -> Tensor:
        calls.append(1)
        return m(b).square().mean() * (float("nan") if len(calls) > 8 else 1)

    with pytest.raises(ms.DataError, match="nothing was changed"):
        ms.grow_(model, {"fc1": 2, "fc2": 2}, x, how=SWE(), loss=bad, data=[x] * 6)
    assert all(
        torch.equal(value, before[key]) for key, value in model.state_dict().items()
    )
    assert model.fc1.out_features == 12


def votes(
    name: str, total: int, method: SVoD, seed: int = 0
) -> tuple[Any, nn.Module, dict[str, Tensor]]:
    torch.manual_seed(3)
    model, x = make(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    data = data_of(x)
    structure = Structure(model, x)
    lab = Lab(
        structure, Loan(torch.Generator().manual_seed(seed), square, data[:1], data)
    )
    axes = [axis for axis in structure.axes.values() if axis.kind == "width"][:3]
    share = method.share(
        Choice(axes, total, flops_per_unit={a.name: 1.0 for a in axes}, lab=lab)
    )
    return share, model, before


@pytest.mark.parametrize(
    "options", [{}, {"score": "absolute"}, {"normalised": True}, {"per_flop": True}]
)
@pytest.mark.parametrize("name", ["mlp", "bn_conv", "resnet18"])
def test_votes_sum_to_the_total_and_leave_no_trace(
    name: str, options: dict[str, Any]
) -> None:
    share, model, before = votes(name, 7, SVoD(**options))
    assert sum(share.counts.values()) == 7
    assert all(count > 0 for count in share.counts.values())
    assert sum(row["votes"] for row in share.votes.values()) == 7
    assert all(row["candidates"] == 14 for row in share.votes.values())
    assert all(
        torch.equal(value, before[key]) for key, value in model.state_dict().items()
    )
    assert votes(name, 7, SVoD(**options))[0] == share  # the same seed, the same votes


def test_fewer_units_than_layers() -> None:
    share, _, _ = votes("mlp", 1, SVoD())
    assert sum(share.counts.values()) == 1


GATES = {
    ("mlp", "fc1", "fc2"), ("mlp_norm", "fc1", "fc2"), ("bn_conv", "conv1", "conv2"), ("bn_conv", "fc1", "fc2"),
    ("resnet18", "layer1.0.conv1", "layer1.0.conv2"), ("group_norm", None, None), ("glu", None, None),
}  # fmt: skip


@pytest.mark.parametrize(("name", "axis_name", "reader"), sorted(GATES, key=str))
def test_the_gate_gradient_is_activation_times_gradient(
    name: str, axis_name: str | None, reader: str | None
) -> None:
    """sum(a dL/da) over the batch, taken by hooks on what the next layer reads, equals the score of the weights."""
    torch.manual_seed(0)
    model, x = make(name, torch.float64)
    structure = Structure(model, x)
    lab = Lab(structure, Loan(torch.Generator().manual_seed(0), square, [x], [x]))
    axis = (
        structure.axes[axis_name] if axis_name else next(iter(structure.axes.values()))
    )
    reader = reader or axis.places("fan_out")[0].name.rpartition(".")[0]
    assert len(axis.places("fan_out")) == 1
    sandbox = lab.sandbox()
    scores = SVoD().scores(sandbox, Choice([axis], 3 * axis.multiple, lab=lab))[
        axis.name
    ]
    sandbox.model.zero_grad()
    seen = []
    layer = sandbox.model.get_submodule(reader)
    hook = layer.register_forward_pre_hook(
        lambda m, args: (args[0].retain_grad(), seen.append(args[0]))[1]
    )
    square(sandbox.model.train(), x).backward()
    hook.remove()
    product = seen[0] * seen[0].grad
    by_channel = product.sum(
        [
            d
            for d in range(product.dim())
            if d != (1 if product.dim() == 4 else product.dim() - 1)
        ]
    )
    want = by_channel[-6 * axis.multiple :].reshape(6, axis.multiple).sum(1)
    assert torch.allclose(
        torch.tensor(scores).double(),
        want,
        atol=1e-10 * want.abs().max().item() + 1e-14,
    )


def test_the_cost_of_a_vote_is_two_epochs_of_the_widened_copy() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model, x = make("bn_conv")
    data = data_of(x, 4)
    structure = Structure(model, x)
    lab = Lab(structure, Loan(torch.Generator().manual_seed(0), square, data[:1], data))
    axes = [axis for axis in structure.axes.values() if axis.kind == "width"]
    share = SVoD().share(Choice(axes, 8, lab=lab))
    wide = copy.deepcopy(model)
    ms.grow_(wide, {axis.name: 16 for axis in axes}, x)
    with FlopCounterMode(display=False) as counter:
        for batch in data:
            square(wide.train(), batch).backward()
    epoch = counter.get_total_flops()
    assert share.flops <= 2.3 * epoch
    assert share.flops >= 1.9 * epoch


def test_a_layer_without_votes_is_untouched_and_the_deepest_settles_first() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *[m for _ in range(5) for m in (nn.Linear(6, 6), nn.ReLU())], nn.Linear(6, 2)
    )
    x = torch.randn(16, 6)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    told = []
    ms.grow_(
        model,
        {"0": 2, "4": 2},
        x,
        how=SWE(),
        loss=square,
        data=[x] * 3,
        progress=lambda phase, *_: told.append(phase),
    )
    assert list(dict.fromkeys(told)) == ["SWE adjusts 4", "SWE adjusts 0"]
    for key, value in model.state_dict().items():
        touched = key.split(".")[0] in (
            "0",
            "2",
            "4",
            "6",
        )  # the grown layers and those that read them
        same = value.shape == before[key].shape and torch.equal(value, before[key])
        assert same != touched, key


def test_growing_with_votes_in_a_loop() -> None:
    torch.manual_seed(0)
    model, x = make("mlp")
    data = data_of(x, 5)
    optimizer = torch.optim.Adam(model.parameters())
    told = []
    grower = ms.Grower(
        model, optimizer, loss=square, data=data, when=ms.when.Every(steps=2, growths=2), how=SWE(coupling="factored"),
        where=SVoD(), amount=3, progress=lambda *news: told.append(news),
    )  # fmt: skip
    while len(grower.history) < 2:
        loss = square(model, data[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        growth = grower.step(loss)
        if growth:
            assert sum(growth.added.values()) == 3
            assert set(growth.added) == {
                name for name, row in growth.votes.items() if row["votes"]
            }
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert all(
        v.shape == p.shape
        for p in model.parameters()
        for v in optimizer.state[p].values()
        if v.dim()
    )
    phases = {phase for phase, _, _ in told}
    assert "SVoD warms candidates up" in phases
    assert any(phase.startswith("SWE adjusts") for phase in phases)


def test_growth_batch_norm_refuses_single_examples_with_the_remedy() -> None:
    model, x = make("mlp_norm")
    data = [x[:1]] * 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())
    grower = ms.Grower(
        model,
        optimizer,
        loss=square,
        data=data,
        when=ms.when.Every(steps=1),
        how=ms.how.Random(),
        where=SVoD(),
        amount=4,
    )
    with pytest.raises(ms.DataError, match="larger batch size"):
        grower.step()
    assert all(
        torch.equal(value, before[key]) for key, value in model.state_dict().items()
    )


def test_sums_and_unequal_batches_are_taken_as_they_are() -> None:
    shares = []
    for call in (square, lambda m, b: (m(b) - 1).square().sum() / 4):
        torch.manual_seed(0)
        model, x = make("mlp")
        data = [x, x[:2], x[:1]]
        structure = Structure(model, x)
        lab = Lab(
            structure, Loan(torch.Generator().manual_seed(0), call, data[:1], data)
        )
        share = SVoD().share(
            Choice(
                [axis for axis in structure.axes.values() if axis.kind != "depth"],
                6,
                lab=lab,
            )
        )
        assert sum(share.counts.values()) == 6
        shares.append(share)
        growth = ms.grow_(model, share.counts, x, how=SWE(), loss=call, data=data)
        assert growth.added == share.counts
        assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert shares[0].flops == shares[1].flops


def test_a_zero_amount_and_a_one_shot_loader_are_refused() -> None:
    model, x = make("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    arguments = {
        "loss": square,
        "when": ms.when.Every(steps=1),
        "how": SWE(),
        "where": SVoD(),
    }
    with pytest.raises(ValueError, match="amount must be positive"):
        ms.Grower(model, optimizer, data=[x], amount=0, **arguments)
    with pytest.raises(ms.DataError, match="one-shot"):
        ms.Grower(model, optimizer, data=iter([x]), amount=4, **arguments)
    with pytest.raises(ms.GrowthRefused, match="nothing in the model can grow"):
        linear = nn.Linear(3, 2)
        ms.Grower(
            linear,
            torch.optim.SGD(linear.parameters(), lr=0.1),
            data=[torch.randn(4, 3)],
            amount=4,
            **arguments,
        )
    with pytest.raises(ms.DataError, match="loss= and data="):
        ms.grow_(model, {"fc1": 2}, x, how=SWE())
    with pytest.raises(ms.GrowthRefused, match="would undo it"):
        ms.grow_(
            model,
            {"fc1": 2},
            x,
            how=SWE(),
            care=ms.care.Shrink(),
            loss=square,
            data=[x],
        )
    assert model.fc1.out_features == 12
