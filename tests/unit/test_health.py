"""Health of units against what hooks see, and in a grower's history."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO, make

import meristem as ms
from meristem.event import steps


def loss(model: nn.Module, batch: Any) -> Tensor:
    return model(batch).square().mean()


def test_figures_equal_what_hooks_see() -> None:
    model, x = make("bn_conv")
    with torch.no_grad():
        model.fc1.bias[:] = 2.0
        model.fc1.bias[:3] = -100.0
        model.fc2.weight[:, 4] = 0.0
    data = [torch.randn_like(x) for _ in range(3)]
    before = copy.deepcopy(model.state_dict())
    seen = []
    hook = model.fc2.register_forward_pre_hook(
        lambda m, args: seen.append(args[0].detach())
    )
    with torch.no_grad():
        for batch in data:
            model.eval()(batch)
    hook.remove()
    values = torch.cat(seen)
    model.train()
    found = ms.health(model, loss=loss, data=data)["fc1"]
    assert model.training
    assert all(
        torch.equal(value, before[key]) for key, value in model.state_dict().items()
    )
    assert all(p.grad is None for p in model.parameters())
    assert found["units"] == 10
    assert found["inactive_forward"] == (values.amax(0) <= 0).double().mean().item()
    size = values.abs().mean(0)
    assert found["dormant"] == (size <= 0.025 * size.mean()).double().mean().item()
    assert found["inactive_outgoing"] == 0.1
    assert found["dead"] == 0.3  # unit 4 still has a gradient going out


def test_convolutions_behind_pools_and_flatten_are_read() -> None:
    model, x = make("bn_conv")
    with torch.no_grad():
        model.bn2.weight[1], model.bn2.bias[1] = 0.0, -1.0
        model.bn1.weight[:2], model.bn1.bias[:2] = 0.0, -1.0
    found = ms.health(model, loss=loss, data=[x])
    assert found["conv2"]["inactive_forward"] == 1 / 8
    assert found["conv1"]["inactive_forward"] == 2 / 6


@pytest.mark.parametrize("name", ZOO)
def test_every_model_can_be_looked_at(name: str) -> None:
    model, x = make(name)
    found = ms.health(model, x, loss=lambda m, b: m(b).square().mean(), data=[x])
    assert set(ms.find_axes(model, x)) <= set(found)
    for figures in found.values():
        assert all(
            0 <= figures[key] <= 1
            for key in ("dead", "inactive_outgoing")
            if key in figures
        )


def test_new_units_are_compared_with_the_others() -> None:
    model, x = make("mlp")
    with torch.no_grad():
        model.fc1.weight[3] = 2 * model.fc1.weight[0]
    found = ms.health(model, x, loss=loss, data=[x], units={"fc1": [3]})["fc1"]
    assert found["units"] == 1
    assert found["cosine"] == pytest.approx(1.0)
    loss(model, x).backward()
    norms = model.fc1.weight.grad.norm(dim=1)
    assert found["gradient_ratio"] == pytest.approx(
        (norms[3] / norms[torch.arange(12) != 3].mean()).item(), rel=1e-5
    )


def test_autocast_weights_are_followed() -> None:
    model, x = make("mlp")

    def mixed(m: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m(batch).float().square().mean()

    assert "inactive_forward" in ms.health(model, x, loss=mixed, data=[x])["fc1"]


def test_history_is_completed_at_later_steps_and_survives_a_checkpoint(
    tmp_path: Any,
) -> None:
    def fresh() -> tuple[Any, Any, Any]:
        torch.manual_seed(0)
        model, x = make("mlp")
        data = [x + 0.1 * torch.randn_like(x) for _ in range(8)]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        grower = ms.Grower(
            model, optimizer, loss=loss, data=data, when=ms.when.At(steps=(30,)), how=ms.how.Random(), amount=4,
            generator=torch.Generator().manual_seed(5),
        )  # fmt: skip
        return model, optimizer, grower

    def train(model: Any, optimizer: Any, grower: Any, until: int) -> None:
        while grower.clock.step < until:
            value = loss(model, grower.data[grower.clock.step % 8])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            grower.step(value)

    model, optimizer, grower = fresh()
    train(model, optimizer, grower, 100)
    ms.save(tmp_path, model, optimizer=optimizer, grower=grower)
    train(model, optimizer, grower, 231)
    health = grower.history[0].health
    assert set(health) == {"insertion", "1", "10", "100", "loss"}
    assert health["insertion"]["fc1"]["inactive_outgoing"] == 1
    assert health["100"]["fc1"]["inactive_outgoing"] < 1
    assert health["insertion"]["fc1"]["gradient_ratio"] == 0
    assert health["10"]["fc1"]["gradient_ratio"] > 0
    assert health["loss"]["before"] > 0
    assert health["loss"]["steps_to_recover"] is not None
    model, optimizer, resumed = fresh()
    model = ms.load(tmp_path, model, optimizer=optimizer, grower=resumed)
    train(model, optimizer, resumed, 231)
    assert resumed.history[0].health == health
    assert resumed.flops == grower.flops
    assert grower.history[0].health_flops > 0


def growing_at_once(
    model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer, amount: Any
) -> ms.Grower:
    return ms.Grower(
        model,
        optimizer,
        loss=loss,
        data=[x],
        when=ms.when.At(steps=(1,)),
        how=ms.how.Random(),
        amount=amount,
    )


def test_units_that_were_narrowed_away_are_not_followed() -> None:
    model, x = make("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    grower = growing_at_once(model, x, optimizer, {"fc1": 4})
    grower.step()
    ms.narrow_(model, {"fc1": 3}, x, optimizer=optimizer)
    grower.step()
    assert "narrowed" in grower.history[0].health["1"]["error"]


def test_diverged_training_is_noted_not_raised() -> None:
    model, x = make("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    grower = growing_at_once(model, x, optimizer, 4)
    grower.step()
    with torch.no_grad():
        model.fc1.weight.fill_(float("nan"))
    grower.step()
    assert "nothing was changed" in grower.history[0].health["1"]["error"]


def test_new_units_are_looked_at_on_a_few_batches_however_many_a_method_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = make("bn_conv")
    looked = []
    measure = steps.measure
    monkeypatch.setattr(
        steps, "measure", lambda *args: looked.append(len(args[4])) or measure(*args)
    )
    data = [torch.randn_like(x) for _ in range(12)]
    growth = ms.grow_(
        model, {"fc1": 2}, x, how=ms.how.GradMax(batches=12), loss=loss, data=data
    )
    assert looked == [steps.HEALTH_BATCHES]
    assert growth.health["insertion"]
