"""Training in stages: early stop, best weights, a fresh optimizer, growth data in their own order, resumption."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meristem as ms
from meristem.stages import Stages


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)
    )


def batches(count: int, seed: int) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(4, 2, generator=generator)
    inputs = [torch.randn(16, 4, generator=generator) for _ in range(count)]
    return [(x, (x @ teacher).relu()) for x in inputs]


def stages(model: nn.Module, **options: Any) -> Stages:
    made = options.pop("made", [])

    def make_optimizer(parameters: Any) -> torch.optim.Optimizer:
        made.append(torch.optim.Adam(parameters, lr=0.02))
        return made[-1]

    arguments = {
        "loss": loss, "data": batches(6, 0), "validation": batches(2, 0), "amount": [4, 3], "epochs": 5, "patience": 2,
        "generator": torch.Generator().manual_seed(7),
    } | options  # fmt: skip
    return ms.recipes.swe_svod_stages(model, make_optimizer, **arguments)


def test_every_stage_ends_with_its_best_weights_and_begins_with_a_fresh_optimizer() -> (
    None
):
    model, made = net(), []
    validation = batches(2, 0)
    sizes = []
    for stage in stages(model, made=made, validation=validation):
        model.eval()
        with torch.no_grad():
            now = sum(loss(model, batch).item() * 16 for batch in validation) / 32
        assert now == pytest.approx(stage.validation, rel=1e-5)
        assert stage.validation == min(pair[1] for pair in stage.curve)
        assert stage.curve[stage.best_epoch - 1][1] == stage.validation
        assert stage.epochs == len(stage.curve)
        assert stage.flops > 0
        sizes.append(sum(stage.sizes.values()))
        if stage.index:
            assert sum(stage.growth.added.values()) == [4, 3][stage.index - 1]
            assert {"insertion", "adjust", "trained"} <= set(stage.growth.health)
        else:
            assert stage.growth is None
    assert sizes == [11, 15, 18]
    assert len(made) == 3
    held = {id(p) for group in made[-1].param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


def test_a_stage_stops_when_validation_does_not_improve() -> None:
    model = net()
    endless = stages(
        model,
        epochs=50,
        patience=2,
        last_patience=3,
        amount=[2],
        validation=[(torch.randn(8, 4), torch.randn(8, 2))],
    )
    first, last = list(endless)
    assert first.epochs == first.best_epoch + 2
    assert last.epochs == last.best_epoch + 3


def test_growth_reads_its_own_loader_in_order() -> None:
    read = []

    class Ordered:
        def __len__(self) -> int:
            return 3

        def __iter__(self) -> Any:
            for number, batch in enumerate(batches(3, 0)):
                read.append(number)
                yield batch

    growing = stages(net(), adjust_data=Ordered(), amount=[2], epochs=1)
    next(growing)
    assert read == []
    next(growing)
    passes = "".join(map(str, read))
    assert (
        passes.count("012") >= 2 + 1
    )  # two for the votes, one for every layer that grew


def test_a_resumed_training_equals_one_that_never_stopped(tmp_path: Any) -> None:
    whole = net()
    want = [(stage.sizes, stage.curve) for stage in stages(whole)]

    class Stop(Exception):
        pass

    def stop(running: Stages) -> None:
        if running.index == 1 and running.epoch == 2:
            ms.save(
                tmp_path,
                running.model,
                optimizer=running.optimizer,
                extra={"stages": running.state_dict()},
            )
            raise Stop

    cut = stages(net(), report=stop)
    with pytest.raises(Stop):
        list(cut)
    model = net()
    resumed = stages(model)
    from meristem.checkpoint import load_extra

    ms.load(tmp_path, model, optimizer=resumed.optimizer)
    resumed.load_state_dict(load_extra(tmp_path)["stages"])
    rest = [(stage.sizes, stage.curve) for stage in resumed]
    assert rest == want[1:]
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            whole.state_dict().values(), model.state_dict().values(), strict=True
        )
    )


def test_wrong_arguments_are_told_at_once() -> None:
    with pytest.raises(ValueError, match="patience must be an int"):
        stages(net(), patience=0)
    with pytest.raises(ms.DataError, match="one-shot"):
        stages(net(), validation=iter(batches(1, 0)))
    with pytest.raises(ms.DataError, match="validation is empty"):
        next(stages(net(), validation=Empty()))
    with pytest.raises(ms.GrowthRefused, match="nothing in the model can grow"):
        stages(nn.Sequential(nn.Linear(4, 2)), axes="!*:depth")


class Empty:
    def __iter__(self) -> Any:
        return iter(())


def test_the_recipe_in_a_loop_keeps_one_optimizer() -> None:
    model, data = net(), batches(4, 0)
    optimizer = torch.optim.Adam(model.parameters())
    grower = ms.recipes.swe_svod(
        model,
        optimizer,
        loss=loss,
        data=data,
        when=ms.when.Every(epochs=1, growths=2),
        amount=3,
    )
    state = copy.deepcopy(optimizer.state_dict()["param_groups"])
    for _ in range(3):
        for batch in data:
            value = loss(model, batch)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            grower.step(value)
    assert len(grower.history) == 2
    assert optimizer.state_dict()["param_groups"] == state
    assert all(growth.votes for growth in grower.history)
