"""The table of contracts: every method x model x optimizer x dtype. A new method adds its row first."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from zoo import ZOO, make

import meristem as ms


@dataclass(frozen=True)
class Row:
    how: Any
    zero_side: bool  # one side zero: old entries learn as in the ungrown twin
    everywhere: bool = (
        True  # works on every axis (a layer norm on the axis has no zero side)
    )
    keeps_old: bool = True  # old weights stay bit for bit
    refused: tuple[str, ...] = ()  # axes that it does not grow


METHODS = {
    "random": Row(ms.how.Random(), True),
    "random_zero_fan_in": Row(ms.how.Random(zero="fan_in"), True, everywhere=False),
    "random_both": Row(ms.how.Random(zero=None), False),
    "net2net": Row(ms.how.Net2Net(), False, everywhere=False, keeps_old=False),
    "pairs": Row(ms.how.Pairs(), False, everywhere=False),
    "firefly": Row(ms.how.Firefly(steps=3), False, everywhere=False, keeps_old=False),
    "tiny": Row(ms.how.TINY(), False, everywhere=False, refused=("down2", "up")),
    "gradmax": Row(ms.how.GradMax(steps=2), True, everywhere=False),
    "gradmax_zero_fan_out": Row(
        ms.how.GradMax(zero="fan_out", steps=2), True, everywhere=False
    ),
    "senn": Row(
        ms.how.SENN(steps=3, candidates=4), True, everywhere=False, refused=("down2",)
    ),
    "swe": Row(ms.how.SWE(), False, keeps_old=False),
    "swe_published": Row(ms.how.SWE.published(), False, keeps_old=False),
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "momentum": lambda p: torch.optim.SGD(
        p, lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4
    ),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
}
DTYPES = {"float32": torch.float32, "float64": torch.float64}
MODELS = (
    "mlp",
    "mlp_norm",
    "bn_conv",
    "resnet18",
    "mobilenet",
    "densenet",
    "unet",
    "glu",
    "tied",
)


def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(batch).square().mean()


def trained(
    name: str, dtype: torch.dtype, optimizer: str
) -> tuple[nn.Module, Any, Any]:
    model, x = make(name, dtype)
    opt = OPTIMIZERS[optimizer](model.parameters())
    for _ in range(2):
        step(model, opt, x)
    return model, x, opt


def step(model: nn.Module, opt: Any, x: Any) -> None:
    model.eval()  # dropout off, norms on running statistics
    opt.zero_grad()
    loss_of(model, x).backward()
    opt.step()


def chosen(model: nn.Module, x: Any, row: Row) -> dict[str, int]:
    axes = ms.find_axes(model, x)
    usable = [
        a
        for a in axes.values()
        if a.kind == "width" and (row.everywhere or a.places("fan_in"))
    ]
    usable = [a for a in usable if a.name not in row.refused]
    return {a.name: 2 * a.multiple for a in usable}


def old_part(new: torch.Tensor, change: Any) -> torch.Tensor:
    for d, source in enumerate(change.sources):
        new = new.index_select(d, torch.from_numpy((source >= 0).nonzero()[0]))
    return new


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_growth_keeps_its_promises(method: str, name: str, dtype: str) -> None:
    row = METHODS[method]
    model, x, opt = trained(name, DTYPES[dtype], "adamw")
    counts = chosen(model, x, row)
    if not counts:
        pytest.skip("tied weights have no separate sides")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plan = ms.plan(model, counts, x)
    objects = {k: id(p) for k, p in model.named_parameters()}
    rng = torch.get_rng_state()
    with torch.no_grad():
        out = model.eval()(x)

    growth = ms.grow_(
        model, counts, x, how=row.how, optimizer=opt, loss=loss_of, data=[x]
    )

    assert torch.equal(rng, torch.get_rng_state())
    assert {k: id(p) for k, p in model.named_parameters()} == objects
    assert growth.after == {k: growth.before[k] + n for k, n in counts.items()}
    assert growth.parameters[1] == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        change = ((model(x) - out).abs().max() / out.abs().max()).item()
    bound = 1e-5 if dtype == "float32" else 1e-12
    if row.how.preserves:
        assert change <= bound
        assert growth.max_change <= bound
    for c in plan.tensors:
        new = dict(model.state_dict())[c.name]
        assert tuple(new.shape) == c.after
        assert new.dtype == before[c.name].dtype
        if row.keeps_old:
            assert torch.equal(old_part(new, c), before[c.name])
    for p in model.parameters():
        for value in opt.state[p].values():
            assert value.dim() == 0 or value.shape == p.shape
    step(model, opt, x)  # it trains on


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "name", ["mlp", "mlp_norm", "bn_conv", "mobilenet", "unet", "glu"]
)
@pytest.mark.parametrize("method", [m for m, row in METHODS.items() if row.zero_side])
def test_old_entries_learn_as_in_the_ungrown_twin(
    method: str, name: str, optimizer: str
) -> None:
    row = METHODS[method]
    model, x, opt = trained(name, torch.float64, optimizer)
    twin = copy.deepcopy(model)
    twin_opt = OPTIMIZERS[optimizer](twin.parameters())
    twin_opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    counts = chosen(model, x, row)
    plan = ms.plan(model, counts, x)
    old = {k: v.clone() for k, v in model.state_dict().items()}
    ms.grow_(model, counts, x, how=row.how, optimizer=opt, loss=loss_of, data=[x])
    step(model, opt, x)
    step(twin, twin_opt, x)
    grown, ungrown = model.state_dict(), twin.state_dict()
    changes = {c.name: c for c in plan.tensors}
    for key, value in ungrown.items():
        now = old_part(grown[key], changes[key]) if key in changes else grown[key]
        moved = value - old[key]
        if value.is_floating_point() and moved.abs().max() > 0:
            assert (
                (now - value).abs().max() / moved.abs().max()
            ).item() <= 1e-10 * max(1.0, (value.abs().max() / moved.abs().max()).item())


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
def test_net2net_follows_its_shares(optimizer: str) -> None:
    model, x, opt = trained("mlp", torch.float64, optimizer)
    twin = copy.deepcopy(model)
    twin_opt = OPTIMIZERS[optimizer](twin.parameters())
    twin_opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    old_out = model.fc2.weight.detach().clone()
    ms.grow_(model, {"fc1": 12}, x, how=ms.how.Net2Net(), optimizer=opt)
    share = (model.fc2.weight[:, :12] / old_out)[0].detach()
    old_in, old_outs = (
        model.fc1.weight[:12].detach().clone(),
        model.fc2.weight.detach().clone(),
    )
    twin_in, twin_out = (
        twin.fc1.weight.detach().clone(),
        twin.fc2.weight.detach().clone(),
    )
    assert share.std() > 0.05  # unequal: the copies part
    for group in (*opt.param_groups, *twin_opt.param_groups):
        group["weight_decay"] = 0.0
        group["eps"] = (
            1e-30  # Adam's eps is the one thing in it that sees the scale of a gradient
        )
    step(model, opt, x)
    step(twin, twin_opt, x)
    moved, expected = model.fc1.weight[:12] - old_in, twin.fc1.weight - twin_in
    if optimizer == "adamw":  # Adam divides the share out again
        torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-14)
    else:
        torch.testing.assert_close(
            moved, share[:, None] * expected, rtol=1e-9, atol=1e-14
        )
        moved_out = model.fc2.weight[:, :12] - old_outs[:, :12]
        torch.testing.assert_close(
            moved_out, twin.fc2.weight - twin_out, rtol=1e-9, atol=1e-14
        )


ACTIVATIONS = {
    "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh, "leaky_relu": lambda: nn.LeakyReLU(0.01)
}  # fmt: skip


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize(
    "method", ["random", "net2net", "gradmax", "gradmax_zero_fan_out"]
)
def test_new_units_live_after_one_step(
    method: str, act: str, norm: bool, positive: bool
) -> None:
    """Both sides receive gradient once a step is done, also where all inputs are positive (pixels)."""
    from zoo import MLP

    if method == "net2net" and positive:
        pytest.skip("a copy of a dead unit is dead")
    model = MLP(ACTIVATIONS[act], norm).double()
    x = torch.rand(64, 10) if positive else torch.randn(64, 10)
    x, y = x.double(), torch.randint(0, 4, (64,))
    loss = lambda m, b: F.cross_entropy(m(b[0]), b[1])
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    growth = ms.grow_(
        model,
        {"fc1": 4},
        x,
        how=METHODS[method].how,
        optimizer=opt,
        loss=loss,
        data=[(x, y)],
    )
    assert growth.health["insertion"]["fc1"]["dead"] == 0
    model.train()
    for _ in range(2):
        opt.zero_grad()
        loss(model, (x, y)).backward()
        opt.step()
    assert (model.fc1.weight.grad[12:].abs().amax(1) > 0).all()
    assert (model.fc2.weight.grad[:, 12:].abs().amax(0) > 0).all()


@pytest.mark.parametrize("name", ["mlp", "bn_conv", "glu"])
@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_growth(method: str, name: str) -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        model, x = make(name)
        counts = chosen(model, x, METHODS[method])
        generator = torch.Generator().manual_seed(7)
        ms.grow_(
            model,
            counts,
            x,
            how=METHODS[method].how,
            loss=loss_of,
            data=[x],
            generator=generator,
        )
        results.append(model.state_dict())
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])


@pytest.mark.parametrize("name", ZOO)
def test_every_axis_grows_and_narrows_back_to_the_same_bits(name: str) -> None:
    model, x = make(name)
    axes = ms.find_axes(model, x)
    assert len(axes) > 0
    for axis in (
        axis for axis in axes.values() if axis.kind != "depth"
    ):  # depths: test_depth_methods
        opt = torch.optim.AdamW(model.parameters())
        step(model, opt, x)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        state = copy.deepcopy(opt.state_dict()["state"])
        assert (
            ms.grow_(model, {axis.name: 2 * axis.multiple}, x, optimizer=opt).max_change
            <= 1e-5
        )
        ms.narrow_(model, {axis.name: 2 * axis.multiple}, x, optimizer=opt)
        after = model.state_dict()
        exact = axis.norm not in (
            "layer_norm",
            "rms_norm",
        )  # there the norm weights are rescaled twice
        for key, value in before.items():
            if exact:
                assert torch.equal(value, after[key]), (axis.name, key)
            else:
                torch.testing.assert_close(value, after[key])
        for index, entry in opt.state_dict()["state"].items():
            for key, value in entry.items():
                assert torch.equal(value, state[index][key]), (axis.name, key)


@pytest.mark.parametrize("name", ZOO)
def test_the_ends_grow_and_keep_the_old_outputs(name: str) -> None:
    model, x = make(name)
    out = model.eval()(x).detach()
    for end in ms.find_axes(model, x).ends.values():
        ms.grow_(model, {end.name: 2}, x)
        new = (
            model(x)[:, : out.shape[1]]
            if out.dim() != 3
            else model(x)[..., : out.shape[-1]]
        )
        torch.testing.assert_close(new, out)


def test_discovery_leaves_the_model_untouched() -> None:
    for name in ZOO:
        model, x = make(name)
        model.train()
        calls: list[int] = []
        model.register_forward_hook(lambda *_: calls.append(1))
        before = {k: v.clone() for k, v in model.state_dict().items()}
        attributes = {
            n: repr({k: v for k, v in vars(m).items() if not k.startswith("_")})
            for n, m in model.named_modules()
        }
        rng = torch.get_rng_state()
        ms.find_axes(model, x)
        assert torch.equal(rng, torch.get_rng_state())
        assert model.training
        assert not calls
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        now = {
            n: repr({k: v for k, v in vars(m).items() if not k.startswith("_")})
            for n, m in model.named_modules()
        }
        assert now == attributes
        assert all(
            p.grad is None and not hasattr(p, "_meristem") for p in model.parameters()
        )
