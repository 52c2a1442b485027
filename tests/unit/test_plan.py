"""A plan is complete: it prints, goes to JSON and back, and is applied."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from zoo import ZOO, make

import meristem as ms
from meristem.core.change import sources_from, spans
from meristem.structure import Structure, sized

KINDS = {
    "mlp": "fc1",
    "bn_conv": "conv2",
    "resnet18": "layer1",
    "nanogpt": "h",
    "pre_norm": None,
}


def wish(name: str) -> tuple[nn.Module, object, dict[str, int]]:
    model, x = make(name)
    axes = ms.find_axes(model, x)
    axis = axes[KINDS[name]] if KINDS[name] else next(iter(axes.values()))
    return model, x, {axis.name: 2 * axis.multiple}


@pytest.mark.parametrize("name", KINDS)
def test_a_plan_is_applied(name: str) -> None:
    model, x, counts = wish(name)
    plan = ms.plan(model, counts, x)
    out = model.eval()(x).detach()
    growth = ms.grow_(model, plan)
    assert growth.after == plan.after
    assert growth.parameters == plan.parameters
    torch.testing.assert_close(model.eval()(x), out)


@pytest.mark.parametrize("name", KINDS)
def test_a_plan_survives_json(name: str) -> None:
    model, x, counts = wish(name)
    plan = ms.plan(model, counts, x)
    stored = ms.Plan.from_json(json.loads(json.dumps(plan.json())))
    assert bool(stored)
    assert repr(stored) == repr(plan)
    twin = copy.deepcopy(model)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    ms.grow_(model, counts, x, generator=generators[0])
    ms.grow_(twin, stored, generator=generators[1])
    for key, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[key]), key


def test_a_plan_for_another_model_is_refused() -> None:
    model, x, counts = wish("mlp")
    plan = ms.plan(model, counts, x)
    ms.grow_(model, counts, x)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ms.GrowthRefused, match="before it changed"):
        ms.grow_(model, plan)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


def test_an_edited_plan_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(3, 4)
    stored = ms.plan(model, {"0": 2}, x).json()
    stored["after"]["0"] = 99
    with pytest.raises(ms.GrowthRefused, match="edited"):
        ms.grow_(model, ms.Plan.from_json(stored), x)


def test_a_refused_plan_is_false_and_raises_its_reason() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(x).reshape(-1, 8))

    model, x = Fixed(), torch.randn(3, 4)
    plan = ms.plan(model, {"up": 1}, x)
    assert not plan
    with pytest.raises(ms.GrowthRefused, match="does not follow"):
        ms.grow_(model, plan)


def test_sizes_alone_are_no_plan() -> None:
    model, x, counts = wish("mlp")
    structure = Structure(model, x)
    assert not sized(structure, counts)


def test_an_example_that_json_cannot_keep_is_asked_for() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor, how: object) -> torch.Tensor:
            return self.fc2(self.fc1(x).relu())

    x = torch.randn(3, 4)
    model = Net()
    stored = ms.plan(model, {"fc1": 2}, (x, object())).json()
    with pytest.raises(ValueError, match="pass example="):
        ms.Plan.from_json(json.loads(json.dumps(stored)))


@pytest.mark.parametrize("listed", [[0, 1, 2], [0, 1, -1, -1], [-1, 3, 4, -1, 0], []])
def test_sources_in_short(listed: list[int]) -> None:
    import numpy as np

    source = np.array(listed, dtype=np.int64)
    assert sources_from(spans(source)).tolist() == listed


def test_one_layer_viewed_as_a_product_counts_its_own_units() -> None:
    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.mix, self.out = (
                nn.Linear(5, 12),
                nn.Linear(4, 4),
                nn.Linear(3, 2),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.mix(self.fc(x).unflatten(1, (-1, self.mix.in_features)).relu())
            return self.out(y.relu().amax(2))

    model, x = Viewed(), torch.randn(6, 5)
    axes = ms.find_axes(model, x)
    for axis in [
        a for a in axes.values() if a.name.startswith("fc") and a.kind == "width"
    ]:
        assert axis.size == 12
        plan = ms.plan(model, {axis.name: axis.multiple}, x)
        change = plan.change("fc.weight")
        assert change.after[0] - change.before[0] == axis.multiple


def test_every_zoo_model_has_the_same_axes_twice() -> None:
    for name in ZOO:
        model, x = make(name)
        first, second = ms.find_axes(model, x), ms.find_axes(model, x)
        assert list(first) == list(second)
        assert first.frozen == second.frozen
