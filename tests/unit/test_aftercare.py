"""What goes on for some steps after a growth: shorter steps, fresher statistics."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meristem as ms

X, Y = torch.randn(32, 6), torch.randn(32, 3)
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def net(norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    middle = nn.BatchNorm1d(5) if norm else nn.Identity()
    return nn.Sequential(nn.Linear(6, 5), middle, nn.Tanh(), nn.Linear(5, 3))


def deep(blocks: int) -> tuple[nn.Module, torch.optim.Optimizer, Tensor]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, blocks, enable_nested_tensor=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, optimizer, torch.randn(3, 5, 8)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    (model(X) - Y).square().mean().backward()
    optimizer.step()


def grown(
    care: Any, kind: str = "sgd", norm: bool = False, steps: int = 1
) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = net(norm)
    optimizer = OPTIMIZERS[kind](model.parameters())
    for _ in range(steps):
        step(model, optimizer)
    grow(model, optimizer, care)
    return model, optimizer


def grow(model: nn.Module, optimizer: Any, care: Any, **counts: int) -> ms.Growth:
    return ms.grow_(
        model,
        counts or {"0": 3},
        X,
        care=care,
        optimizer=optimizer,
        generator=torch.Generator().manual_seed(1),
    )


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def new_entries(name: str, tensor: Tensor) -> Tensor:
    """Of the net whose first layer has grown from five units to eight."""
    mask = torch.zeros_like(tensor, dtype=torch.bool)
    if name == "3.weight":
        mask[:, 5:] = True
    elif name != "3.bias":
        mask[5:] = True
    return mask


def hooks(optimizer: torch.optim.Optimizer) -> int:
    """Those of aftercare: a Grower counts steps with one of its own."""
    listed = [
        *optimizer._optimizer_step_pre_hooks.values(),
        *optimizer._optimizer_step_post_hooks.values(),
    ]
    return len([one for one in listed if "Witness" not in repr(one)])


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_young_rate_shortens_the_steps_of_new_entries_only(kind: str) -> None:
    plain, usual = grown([], kind)
    model, optimizer = grown([ms.care.YoungRate(steps=4, start=0.2)], kind)
    before = values(model)
    step(plain, usual)
    step(model, optimizer)
    for name, value in values(plain).items():
        new = new_entries(name, value)
        whole, short = value - before[name], values(model)[name] - before[name]
        # The first of four steps: .2 + .8 / 4.
        expected = torch.where(new, 0.4 * whole, whole)
        torch.testing.assert_close(short, expected, rtol=1e-4, atol=1e-6)


def test_a_rewarm_shortens_all_steps_and_ends() -> None:
    plain, usual = grown([])
    model, optimizer = grown([ms.care.Rewarm(steps=2)])
    before = values(model)
    step(plain, usual)
    step(model, optimizer)
    for name, value in values(plain).items():
        short = values(model)[name] - before[name]
        torch.testing.assert_close(short, 0.5 * (value - before[name]))
    assert hooks(optimizer) == 2
    step(model, optimizer)
    assert hooks(optimizer) == 0
    twin = copy.deepcopy(model)
    step(twin, torch.optim.SGD(twin.parameters(), lr=0.1))
    step(model, optimizer)
    for name, value in values(model).items():
        assert torch.equal(value, values(twin)[name])


def test_what_is_young_is_followed_through_later_growths() -> None:
    model, optimizer = grown([ms.care.YoungRate(steps=10)])
    step(model, optimizer)
    grow(model, optimizer, [], **{"0": 2})
    ms.narrow_(model, {"0": [0, 6]}, X, optimizer=optimizer)
    # Units 5 and 7 of the first growth are left, at places 4 and 5; two others came
    # after them, without the care.
    step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    plain = copy.deepcopy(model)
    step(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    before = values(model)
    step(model, optimizer)
    moved = values(model)["0.weight"] - before["0.weight"]
    whole = values(plain)["0.weight"] - before["0.weight"]
    factor = moved.norm(dim=1) / whole.norm(dim=1)
    expected = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.2, 0.2, 1.0, 1.0])
    torch.testing.assert_close(factor, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_growth_while_the_rate_warms_up_again_is_followed(kind: str) -> None:
    model, optimizer = grown([ms.care.Rewarm(steps=10)], kind)
    step(model, optimizer)
    grow(model, optimizer, [], **{"0": 2})
    twin = copy.deepcopy(model)
    plain = OPTIMIZERS[kind](twin.parameters())
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = values(model)
    step(model, optimizer)
    step(twin, plain)
    for name, value in values(model).items():
        # The second step of ten.
        expected = before[name].lerp(values(twin)[name], 0.2)
        torch.testing.assert_close(value, expected)


def test_what_is_young_is_followed_past_blocks_that_came_and_went() -> None:
    model, optimizer, x = deep(3)
    young = ms.care.YoungRate(steps=1000)
    wider, random = "layers.1.linear1", ms.how.Random(zero=None)

    def check(name: str, places: range) -> None:
        """Of one layer, the units at these places are young, and no others."""
        before = values(model)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        layer = model.get_submodule(name)
        moved = (layer.weight - before[f"{name}.weight"]) / (-0.1 * layer.weight.grad)
        share = moved.median(dim=1).values
        expected = torch.ones(len(share))
        expected[places.start : places.stop] = 1e-3
        assert torch.equal(share < 0.1, expected < 0.1)

    ms.grow_(model, {wider: 4}, x, how=random, care=young, optimizer=optimizer)
    check(wider, range(16, 20))
    # Two things at once: every block gets another place, and a width changes.
    ms.grow_(
        model,
        {"layers": 3, wider: 2},
        x,
        how=[ms.how.Interpose(), random],
        optimizer=optimizer,
    )
    check("layers.2.linear1", range(16, 20))
    ms.narrow_(
        model, {"layers": [1], "layers.2.linear1": [0, 1]}, x, optimizer=optimizer
    )
    check("layers.1.linear1", range(14, 18))


def test_the_parameters_of_new_blocks_are_young() -> None:
    model, optimizer, x = deep(2)
    ms.grow_(
        model, {"layers": 1}, x, care=ms.care.YoungRate(steps=1000), optimizer=optimizer
    )
    before = values(model)
    model(x).square().mean().backward()
    optimizer.step()
    for name, value in values(model).items():
        gradient = dict(model.named_parameters())[name].grad
        assert gradient is not None
        factor = 1e-3 if name.startswith("layers.2.") else 1.0
        expected = before[name] - 0.1 * factor * gradient
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-7)


@torch.no_grad()
def weight_of(model: nn.Module, batch: Tensor) -> float:
    """What a batch counts for in the running mean of the net's norm."""
    norm = model.get_submodule("1")
    seen = model.get_submodule("0")(batch).mean(0)
    before = norm.running_mean.clone()
    model.train()(batch)
    moved, way = norm.running_mean - before, seen - before
    return float((moved * way).sum() / way.square().sum())


def test_statistics_follow_faster_for_a_while() -> None:
    care = ms.care.FreshStatistics(steps=3, momentum=0.7, values=10)
    model, optimizer = grown([care], norm=True)
    norm = model.get_submodule("1")
    step(model, optimizer)
    assert weight_of(model, X) == pytest.approx(0.7, rel=1e-4)
    assert norm.momentum == 0.1
    # The later of two growths takes over.
    care = ms.care.FreshStatistics(steps=3, momentum=0.9, values=10)
    grow(model, optimizer, [care], **{"0": 1})
    for expected in (0.9, 0.9, 0.1):
        step(model, optimizer)
        assert weight_of(model, X) == pytest.approx(expected, rel=1e-3)
    assert hooks(optimizer) == 0
    assert not norm._forward_pre_hooks
    assert not norm._forward_hooks


def test_a_batch_counts_by_its_size() -> None:
    model, _ = grown([ms.care.FreshStatistics(values=96)], norm=True)
    # 32 examples: 2 x 32 / (96 + 32)
    assert weight_of(model, X) == pytest.approx(0.5, rel=1e-4)
    assert weight_of(model, X[:8]) == pytest.approx(1 - 0.5**0.25, rel=1e-4)
    # It is never slower than the norm itself.
    model, _ = grown([ms.care.FreshStatistics(values=10**6)], norm=True)
    assert weight_of(model, X) == pytest.approx(0.1, rel=1e-4)
    before = model.get_submodule("1").running_mean.clone()
    model.eval()(X)
    assert torch.equal(model.get_submodule("1").running_mean, before)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "average"])
def test_a_copy_made_meanwhile_follows_as_ever(way: str) -> None:
    care = ms.care.FreshStatistics(values=96)
    model, optimizer = grown([care, ms.care.YoungRate(steps=9)], norm=True)
    step(model, optimizer)
    copied: Any
    if way == "deepcopy":
        copied = copy.deepcopy(model)
    elif way == "average":
        copied = torch.optim.swa_utils.AveragedModel(model).module
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert weight_of(copied, X) == pytest.approx(0.1, rel=1e-4)
    assert weight_of(model, X) == pytest.approx(0.5, rel=1e-4)
    copy.deepcopy(optimizer)


def test_a_grower_is_not_loaded_before_its_model() -> None:
    model, optimizer = grown([ms.care.YoungRate(steps=9)])
    loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()

    def made(model: nn.Module, optimizer: Any) -> ms.Grower:
        when = ms.when.At(epochs=[99])
        return ms.Grower(
            model, optimizer, loss=loss, data=[(X, Y)], when=when, how=ms.how.Random()
        )

    state = made(model, optimizer).state_dict()
    fresh = net()
    follower = made(fresh, torch.optim.SGD(fresh.parameters(), lr=0.1))
    with pytest.raises(ms.DataError, match="load the model before"):
        follower.load_state_dict(state)


def test_a_norm_that_averages_over_all_batches_is_left_to_it() -> None:
    model = net(norm=True)
    model[1].momentum = None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    grow(model, optimizer, ms.care.FreshStatistics())
    assert model[1].momentum is None
    assert hooks(optimizer) == 0


@pytest.mark.parametrize("way", ["save", "grower"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_resumed_run_goes_on_with_it(way: str, kind: str, tmp_path: Path) -> None:
    care = [
        ms.care.YoungRate(steps=5),
        ms.care.Rewarm(steps=6),
        ms.care.FreshStatistics(steps=4, values=50),
    ]
    model, optimizer = grown(care, kind, norm=True)
    loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()

    def made(model: nn.Module, optimizer: Any) -> ms.Grower:
        when = ms.when.At(epochs=[99])
        data = [(X, Y)]
        return ms.Grower(
            model, optimizer, loss=loss, data=data, when=when, how=ms.how.Random()
        )

    step(model, optimizer)
    grower = made(model, optimizer) if way == "grower" else None
    ms.save(tmp_path, model, optimizer=optimizer, grower=grower)
    for _ in range(8):
        step(model, optimizer)
    fresh = net(norm=True)
    other = OPTIMIZERS[kind](fresh.parameters())
    follower = made(fresh, other) if way == "grower" else None
    ms.load(tmp_path, fresh, optimizer=other, grower=follower)
    assert len(fresh[1]._forward_pre_hooks) == 1
    assert hooks(other) == 2
    for _ in range(8):
        step(fresh, other)
    for name, value in model.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name
    assert fresh[1].momentum == 0.1
    assert hooks(other) == 0


def test_each_of_several_optimizers_takes_part() -> None:
    model = net()
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    second = torch.optim.AdamW(model[3].parameters(), lr=0.01)
    grow(model, [first, second], ms.care.YoungRate(steps=1))
    assert hooks(first) == hooks(second) == 2
    step(model, first)
    second.step()
    assert hooks(first) == hooks(second) == 0


def test_without_an_optimizer_it_is_refused_and_nothing_changes() -> None:
    model = net()
    before = values(model)
    for care in (ms.care.YoungRate(), ms.care.Rewarm(), ms.care.FreshStatistics()):
        with pytest.raises(ms.OptimizerError, match="pass optimizer="):
            grow(model, None, care)
    assert all(
        torch.equal(value, before[name]) for name, value in values(model).items()
    )


def test_a_refused_growth_leaves_no_hooks() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    waiting = model(X).sum()
    with pytest.raises(ms.PendingBackward):
        grow(model, optimizer, ms.care.YoungRate())
    assert hooks(optimizer) == 0
    del waiting


@pytest.mark.parametrize(
    "make",
    [
        lambda: ms.care.YoungRate(steps=0),
        lambda: ms.care.YoungRate(start=1.0),
        lambda: ms.care.YoungRate(start=-0.1),
        lambda: ms.care.Rewarm(steps=2.5),
        lambda: ms.care.Rewarm(start=True),
        lambda: ms.care.FreshStatistics(steps=-1),
        lambda: ms.care.FreshStatistics(momentum=0.0),
        lambda: ms.care.FreshStatistics(momentum=1.5),
        lambda: ms.care.FreshStatistics(values=0),
    ],
)
def test_wrong_numbers_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="must be"):
        make()
