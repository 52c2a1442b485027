"""The lineage maps what an old shape left behind: weights, averages, optimizer states."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from zoo import make

import meristem as ms

CASES = {
    "mlp": {"fc1": 3, "fc2": 2},
    "bn_conv": {"conv1": 2, "conv2": 2, "fc1": 1},
    "resnet18": {"layer1.0.conv1": 2, "layer2": 1},
    "nanogpt": {"h.0.mlp.c_fc": 2, "h": 2},
    "normed_mlp": {},
}


def grown(
    name: str,
) -> tuple[nn.Module, nn.Module, torch.Tensor, list[dict[str, object]]]:
    """The model before, the model after, the example, and the lineage through JSON."""
    model, x = make(name, torch.float64)
    counts = CASES[name]
    if not counts:
        axes = ms.find_axes(model, x).values()
        streamed = next(a for a in axes if a.streamed)
        counts = {streamed.name: 2 * streamed.multiple}
    before = copy.deepcopy(model)
    ms.grow_(model, counts, x)
    return before, model, x, json.loads(json.dumps(ms.lineage(model)))


@pytest.mark.parametrize("name", CASES)
def test_weights_of_the_old_shape_are_mapped(name: str) -> None:
    before, after, _, line = grown(name)
    converted = ms.convert(before.state_dict(), line)
    wanted = after.state_dict()
    assert converted.keys() == wanted.keys()
    assert all(converted[key].shape == wanted[key].shape for key in wanted)
    restored = ms.convert(converted, line, back=True)
    for key, value in before.state_dict().items():
        torch.testing.assert_close(restored[key], value, rtol=1e-14, atol=0)
    old = {id(p): n for n, p in before.named_parameters()}
    assert old
    again = ms.convert(wanted, line, back=True)
    for key, value in before.state_dict().items():
        torch.testing.assert_close(again[key], value, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", ["mlp", "bn_conv", "resnet18", "nanogpt"])
def test_an_average_computes_what_it_did(name: str) -> None:
    before, after, x, line = grown(name)
    with torch.no_grad():
        for parameter in before.parameters():  # another set of weights: an average, say
            parameter.add_(0.1 * torch.randn_like(parameter))
    out = before.eval()(x).detach()
    average = copy.deepcopy(after)
    average.load_state_dict(ms.convert(before.state_dict(), line))
    torch.testing.assert_close(average.eval()(x), out)


@pytest.mark.parametrize("name", CASES)
def test_the_state_of_an_optimizer_is_mapped(name: str) -> None:
    before, after, x, line = grown(name)
    old = torch.optim.AdamW(before.parameters())
    before.eval()(x).square().mean().backward()
    old.step()
    state = ms.convert(copy.deepcopy(old.state_dict()), line)
    new = torch.optim.AdamW(after.parameters())
    new.load_state_dict(state)
    held = dict(after.named_parameters())
    names = dict(before.named_parameters())
    renamed = {k: v for growth in line for k, v in growth["renamed"].items()}
    for key, parameter in names.items():
        moved = held[renamed.get(key, key)]
        if parameter not in old.state:
            continue
        moments, wide = old.state[parameter]["exp_avg"], new.state[moved]["exp_avg"]
        assert wide.shape == moved.shape
        torch.testing.assert_close(wide.sum(), moments.sum())
    back = ms.convert(
        state, line, names=[n for n, _ in after.named_parameters()], back=True
    )
    for index, entry in old.state_dict()["state"].items():
        for key, value in entry.items():
            assert torch.equal(back["state"][index][key], value)


def test_a_state_that_does_not_fit_is_refused() -> None:
    before, after, _, line = grown("mlp")
    with pytest.raises(ms.CheckpointError, match="had"):
        ms.convert({k: v[:2] for k, v in before.state_dict().items()}, line)
    optimizer = torch.optim.SGD(list(before.parameters())[:2])
    with pytest.raises(ms.CheckpointError, match="names="):
        ms.convert(optimizer.state_dict(), line)
    ms.narrow_(after, {"fc1": 1}, torch.randn(5, 10, dtype=torch.float64))
    with pytest.raises(ms.CheckpointError, match="dropped"):
        ms.convert(after.state_dict(), ms.lineage(after), back=True)


def test_the_generator_goes_on_after_loading(tmp_path: Path) -> None:
    model, x = make("mlp")
    ms.grow_(model, {"fc1": 2}, x)
    ms.save(tmp_path, model)
    ms.grow_(model, {"fc1": 2}, x)
    fresh, _ = make("mlp")
    ms.load(tmp_path, fresh)
    ms.grow_(fresh, {"fc1": 2}, x)
    for key, value in model.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[key]), key
