"""The contracts of depth: every method x model x dtype; a new method adds its row first."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from zoo import ZOO, make

import meristem as ms


@dataclass(frozen=True)
class Row:
    how: Any
    exact: bool
    chains: bool = True  # grows places in a chain too
    foreseen: bool = True  # the plan knows the activation of an inserted layer
    shares: bool = False  # what present blocks add to the stream is rescaled


METHODS = {
    "zero_block": Row(ms.how.ZeroBlock(), True),
    "interpose_zero": Row(ms.how.Interpose(zero=True), True, chains=False),
    "interpose": Row(ms.how.Interpose(), False, chains=False),
    "interpose_share": Row(
        ms.how.Interpose(share=True), False, chains=False, shares=True
    ),
    "stack": Row(ms.how.Stack(), False, chains=False),
    "random": Row(ms.how.Random(), False),
    "senn": Row(ms.how.SENN(steps=3, candidates=4), True, foreseen=False),
}
DTYPES = {"float32": torch.float32, "float64": torch.float64}
BLOCKS = ("resnet18", "nanogpt", "convnext", "mixer", "mobilenet", "pre_norm")
CHAINS = ("mlp", "mlp_norm", "bn_conv", "glu")
PAIRS = [
    (m, name)
    for m, row in METHODS.items()
    for name in BLOCKS + (CHAINS if row.chains else ())
]
SINGLE = ("resnet18", "nanogpt", "convnext", "mlp")
CASES = [(m, n, "float64") for m, n in PAIRS] + [
    (m, n, "float32") for m, n in PAIRS if n in SINGLE
]


def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(batch).square().mean()


def step(model: nn.Module, opt: Any, x: Any) -> None:
    model.eval()
    opt.zero_grad()
    loss_of(model, x).backward()
    opt.step()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def trained(name: str, dtype: torch.dtype) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(1)
    model, x = make(name, dtype)
    opt = adamw(model)
    for _ in range(2):
        step(model, opt, x)
    return model, x, opt


def depths(model: nn.Module, x: Any, row: Row) -> dict[str, int]:
    axes = [axis for axis in ms.find_axes(model, x).values() if axis.kind == "depth"]
    return {a.name: 2 for a in axes if row.chains or not is_chain(model, a.name)}


def is_chain(model: nn.Module, name: str) -> bool:
    stem = name.removesuffix(":depth")
    return name.endswith(":depth") and isinstance(
        model.get_submodule(stem), (nn.Linear, nn.modules.conv._ConvNd)
    )


@pytest.mark.parametrize(("method", "name", "dtype"), CASES)
def test_depth_keeps_its_promises(method: str, name: str, dtype: str) -> None:
    row = METHODS[method]
    model, x, opt = trained(name, DTYPES[dtype])
    counts = depths(model, x, row)
    assert counts
    objects = {id(p): p.detach().clone() for p in model.parameters()}
    names = {id(p): name for name, p in model.named_parameters()}
    state = {id(p): copy.deepcopy(opt.state[p]) for p in opt.state}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plan = ms.plan(model, counts, x)
    rng = torch.get_rng_state()
    with torch.no_grad():
        out = model.eval()(x)

    growth = ms.grow_(
        model, counts, x, how=row.how, optimizer=opt, loss=loss_of, data=[x]
    )

    assert torch.equal(rng, torch.get_rng_state())
    assert growth.after == plan.after == {k: growth.before[k] + 2 for k in counts}
    assert growth.parameters == plan.parameters or not row.foreseen
    assert growth.parameters[1] == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        change = ((model(x) - out).abs().max() / out.abs().max()).item()
    assert growth.max_change == pytest.approx(change, rel=1e-4, abs=1e-12)
    assert (
        change <= (1e-5 if dtype == "float32" else 1e-12) if row.exact else change > 0
    )
    live = {id(p): p for p in model.parameters()}
    rescaled = growth.origin.plan.rescaled
    assert bool(rescaled) == row.shares
    for i, old in objects.items():  # the same objects, the same bits
        change = rescaled.get(names[i])
        assert torch.equal(live[i], change.of(old) if change else old)
    assert {id(p) for group in opt.param_groups for p in group["params"]} == live.keys()
    by_identity = {id(p): opt.state[p] for p in opt.state}
    for key, old in state.items():  # the state of old parameters has not been touched
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(by_identity[key][name]))
            for name, v in old.items()
        )
    figures = growth.health["insertion"]
    assert all(figures[axis]["dead"] == 0 for axis in counts)  # new blocks live
    assert all(
        (figures[axis]["contribution"] == 0) == row.exact
        for axis in counts
        if not is_chain(model, axis)
    )
    kept = copy.deepcopy(model), copy.deepcopy(opt.state_dict())
    step(model, opt, x)  # it trains on

    model.load_state_dict(kept[0].state_dict())
    ms.narrow_(model, growth.blocks, x, optimizer=opt)
    assert list(model.state_dict()) == list(before)
    for key, value in model.state_dict().items():
        change = rescaled.get(key)
        # Half of a block stays half of it: narrow_ drops blocks, it does not undo.
        assert torch.equal(value, change.of(before[key]) if change else before[key])
    assert {
        id(p) for group in opt.param_groups for p in group["params"]
    } == objects.keys()
    assert {id(p) for p in opt.state} == objects.keys()


@pytest.mark.parametrize(
    ("method", "name"), [(m, n) for m, n in PAIRS if METHODS[m].exact]
)
def test_old_entries_learn_as_in_the_ungrown_twin(method: str, name: str) -> None:
    row = METHODS[method]
    model, x, opt = trained(name, torch.float64)
    counts = depths(model, x, row)
    assert counts
    twin = copy.deepcopy(model)
    twin_opt = adamw(twin)
    twin_opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    pairs = list(zip(model.parameters(), twin.parameters(), strict=True))
    old = [p.detach().clone() for p in twin.parameters()]
    ms.grow_(model, counts, x, how=row.how, optimizer=opt, loss=loss_of, data=[x])
    step(model, opt, x)
    step(twin, twin_opt, x)
    for (ours, theirs), start in zip(pairs, old, strict=True):
        moved = (theirs - start).abs().max()
        assert (ours - theirs).abs().max() <= 1e-10 * max(moved, theirs.abs().max())


RESUMED = [(m, n) for m, n in PAIRS if n in ("nanogpt", "convnext", "mlp")]
RESUMED += [
    ("zero_block", "resnet18"),
    ("stack", "resnet18"),
    ("stack", "post_norm"),
    ("interpose", "post_norm"),
    ("interpose_share", "post_norm"),
]


@pytest.mark.parametrize(("method", "name"), RESUMED)
def test_a_checkpoint_rebuilds_the_depth_and_goes_on_bit_for_bit(
    method: str, name: str, tmp_path: Path
) -> None:
    row = METHODS[method]
    model, x, opt = trained(name, torch.float32)
    counts = {"encoder.layers": 2} if name == "post_norm" else depths(model, x, row)
    ms.grow_(model, counts, x, how=row.how, optimizer=opt, loss=loss_of, data=[x])
    step(model, opt, x)
    ms.save(tmp_path, model, optimizer=opt)
    fresh = ZOO[name][0]()
    theirs = adamw(fresh)
    ms.load(tmp_path, fresh, optimizer=theirs)
    assert list(fresh.state_dict()) == list(model.state_dict())
    for _ in range(2):
        step(model, opt, x)
        step(fresh, theirs, x)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            model.state_dict().values(), fresh.state_dict().values(), strict=True
        )
    )
    names = set(ms.find_axes(model, x)) | set(ms.find_axes(model, x).frozen)
    assert names == set(ms.find_axes(fresh, x)) | set(ms.find_axes(fresh, x).frozen)


def test_post_norm_blocks_grow_when_their_method_is_named() -> None:
    model, x, opt = trained("post_norm", torch.float64)
    axes = ms.find_axes(model, x)
    assert "encoder.layers" not in axes
    assert "how.Stack" in axes.frozen["encoder.layers"]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ms.VerificationError, match=r"how\.Stack"):
        ms.grow_(model, {"encoder.layers": 1}, x, optimizer=opt)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    growth = ms.grow_(
        model, {"encoder.layers": 1}, x, how=ms.how.Stack(), optimizer=opt
    )
    assert growth.max_change > 1e-3
    assert len(model.encoder.layers) == model.encoder.num_layers == 3
    step(model, opt, x)
    assert ms.narrow_(model, {"encoder.layers": [0]}, x, optimizer=opt).after == {
        "encoder.layers": 2
    }


WIDTHS: dict[str, Callable[[str], bool]] = {
    "resnet18": lambda name: name in ("layer1.0.conv1", "layer2.1.conv1", "conv1"),
    "nanogpt": lambda name: name.endswith("c_fc") or name == "wte",
    "convnext": lambda name: name.endswith("pwconv1"),
    "mlp": lambda name: name in ("fc1", "fc2"),
}
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=SLOW) if n == "resnet18" else n for n in WIDTHS]
)
def test_depth_and_width_grow_in_one_event_and_in_turn(name: str) -> None:
    model, x, opt = trained(name, torch.float64)

    def wishes(axes: ms.Axes) -> tuple[dict[str, int], dict[str, int]]:
        wide = {
            a.name: a.multiple
            for a in axes.values()
            if a.kind != "depth" and WIDTHS[name](a.name)
        }
        deep = {
            a.name: 1
            for a in axes.values()
            if a.kind == "depth" and (name == "mlp" or a.name in COPIED[name])
        }
        return wide, deep

    def grow(counts: dict[str, int], names: ms.Axes) -> ms.Axes:
        with torch.no_grad():
            out = model.eval()(x)
        growth = ms.grow_(model, counts, x, optimizer=opt)
        with torch.no_grad():
            assert ((model(x) - out).abs().max() / out.abs().max()).item() <= 1e-12
        assert growth.parameters[1] == sum(p.numel() for p in model.parameters())
        axes = ms.find_axes(model, x)
        assert set(names) <= set(axes)  # names survive growth
        for p in model.parameters():
            assert all(
                v.dim() == 0 or v.shape == p.shape for v in opt.state[p].values()
            )
        step(model, opt, x)
        return axes

    axes = ms.find_axes(model, x)
    wide, deep = wishes(axes)
    assert wide
    assert deep
    axes = grow(wide | deep, axes)
    for turn in range(4):
        axes = grow(wishes(axes)[turn % 2], axes)


COPIED = {
    "resnet18": ("layer1", "layer2"),
    "nanogpt": ("h",),
    "convnext": ("stages.0", "stages.1"),
}
