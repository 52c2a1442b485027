"""What follows a parameter through its growth: objects, hooks, groups, gradients, layout, ties, copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from zoo import MLP, make

import meristem as ms


def test_hooks_gradients_flags_and_attributes_stay() -> None:
    model, x = MLP(), torch.randn(3, 10)
    calls: list[str] = []
    handle = model.fc1.weight.register_hook(lambda g: calls.append("hook"))
    model.fc1.weight.register_post_accumulate_grad_hook(lambda p: calls.append("post"))
    model.fc1.register_forward_hook(lambda *_: calls.append("forward"))
    model.fc1.weight.note = "mine"
    model.fc2.bias.requires_grad_(False)
    model(x).sum().backward()
    old = model.fc1.weight.grad.clone()
    calls.clear()
    ms.grow_(model, {"fc1": 2, "fc2": 1}, x)
    assert calls == []
    assert torch.equal(model.fc1.weight.grad[:12], old)
    assert model.fc1.weight.grad[12:].abs().max() == 0
    assert model.fc1.weight.note == "mine"
    assert not model.fc2.bias.requires_grad
    model(x).sum().backward()
    assert sorted(calls) == ["forward", "hook", "post"]
    handle.remove()
    calls.clear()
    model(x).sum().backward()
    assert sorted(calls) == ["forward", "post"]


def test_param_groups_keep_their_order_and_options() -> None:
    model, x = MLP(), torch.randn(3, 10)
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    first, second = (
        torch.optim.SGD(decay, lr=0.1, momentum=0.9),
        torch.optim.AdamW([{"params": rest, "lr": 1e-2}]),
    )
    model(x).sum().backward()
    first.step()
    second.step()
    ms.grow_(model, {"fc1": 2}, x, optimizer=[first, second])
    assert all(
        a is b for a, b in zip(first.param_groups[0]["params"], decay, strict=True)
    )
    assert first.state[model.fc1.weight]["momentum_buffer"].shape == (14, 10)
    assert second.state[model.fc1.bias]["exp_avg"].shape == (14,)


def test_channels_last_and_ties_stay() -> None:
    model, x = make("bn_conv")
    model = model.to(memory_format=torch.channels_last)
    ms.grow_(
        model, {"conv1": 2, "conv2": 2}, x.contiguous(memory_format=torch.channels_last)
    )
    assert model.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    gpt, tokens = make("nanogpt")
    ms.grow_(gpt, {"h.0.mlp.c_fc": 4}, tokens)
    assert gpt.lm_head.weight is gpt.wte.weight


def test_a_grown_model_copies_and_pickles() -> None:
    model, x = MLP(), torch.randn(3, 10)
    ms.grow_(model, {"fc1": 2}, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        assert ms.grow_(other, {"fc1": 1}, x).after == {"fc1": 15}


def test_warm_moments_take_the_mean_and_zero_is_the_alternative() -> None:
    model, x = MLP(), torch.randn(3, 10)
    opt = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        opt.zero_grad()
        model(x).square().sum().backward()
        opt.step()
    level = opt.state[model.fc1.weight]["exp_avg_sq"].mean()
    ms.grow_(model, {"fc1": 2}, x, optimizer=opt)
    state = opt.state[model.fc1.weight]
    torch.testing.assert_close(state["exp_avg_sq"][12:], level.expand(2, 10))
    assert state["exp_avg"][12:].abs().max() == 0
    assert state["step"] == 3
    ms.grow_(model, {"fc1": 2}, x, optimizer=opt, care=())
    assert opt.state[model.fc1.weight]["exp_avg_sq"][14:].abs().max() == 0


def test_cares_that_move_old_weights() -> None:
    model, x = MLP(), torch.randn(3, 10)
    opt = torch.optim.AdamW(model.parameters())
    model(x).sum().backward()
    opt.step()
    old = {n: p.detach().clone() for n, p in model.named_parameters()}
    growth = ms.grow_(
        model,
        {"fc1": 12},
        x,
        optimizer=opt,
        care=[ms.care.VarianceTransfer(), ms.care.ResetMoments()],
    )
    torch.testing.assert_close(model.fc2.weight[:, :12], old["fc2.weight"] * 0.5**0.5)
    assert torch.equal(model.fc1.weight[:12], old["fc1.weight"])
    assert not opt.state
    assert growth.max_change > 0
    head = model.head.weight.detach().clone()
    ms.grow_(model, {"fc1": 1}, x, care=ms.care.Shrink(0.4))
    torch.testing.assert_close(model.head.weight, 0.4 * head)
    assert torch.equal(model.head.bias, old["head.bias"])
    with pytest.raises(ValueError, match=r"\(0, 1\)"):
        ms.care.Shrink(1.5)


def test_variance_transfer_scales_only_the_grown_axis_of_a_concatenation() -> None:
    model, x = make("unet")
    old = model.merge.weight.detach().clone()
    ms.grow_(model, {"down1": 5}, x, care=ms.care.VarianceTransfer())
    torch.testing.assert_close(model.merge.weight[:, :5], old[:, :5] * 0.5**0.5)
    assert torch.equal(model.merge.weight[:, 10:], old[:, 5:])


def test_net2net_noise_moves_only_the_copies() -> None:
    model, x = MLP(), torch.randn(3, 10)
    old = model.fc1.weight.detach().clone()
    growth = ms.grow_(model, {"fc1": 12}, x, how=ms.how.Net2Net(noise=0.01))
    assert torch.equal(model.fc1.weight[:12], old)
    assert 0 < growth.max_change < 0.1
    assert not any((model.fc1.weight[12 + i] == old).all(1).any() for i in range(12))


def test_attributes_of_the_users_own_follow() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width = 12
            self.fc1, self.fc2 = nn.Linear(10, 12), nn.Linear(12, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc2(
                F.layer_norm(self.fc1(x).relu(), (10,))
                if x.shape[-1] == 3
                else self.fc1(x).view(-1, self.width).relu()
            )

    model, x = Own(), torch.randn(5, 10)
    plan = ms.plan(model, {"fc1": 3}, x)
    assert ("width", 12, 15) in [
        (a.attribute, a.before, a.after) for a in plan.attributes
    ]
    assert model.width == 12
    ms.grow_(model, {"fc1": 3}, x)
    assert model.width == 15


def test_narrowing_drops_the_named_units() -> None:
    model, x = MLP(), torch.randn(3, 10)
    weight = model.fc1.weight.detach().clone()
    growth = ms.narrow_(model, {"fc1": [3, 5]}, x)
    kept = [i for i in range(12) if i not in (3, 5)]
    assert torch.equal(model.fc1.weight, weight[kept])
    assert growth.added == {"fc1": -2}


def test_net2net_over_two_neighbouring_axes_at_once() -> None:
    model, x = MLP().double(), torch.randn(3, 10).double()
    assert (
        ms.grow_(model, {"fc1": 5, "fc2": 4}, x, how=ms.how.Net2Net()).max_change
        <= 1e-12
    )


def test_growth_is_plain_data() -> None:
    import json

    model, x = MLP(), torch.randn(3, 10)
    growth = ms.grow_(model, {"fc1": 2}, x)
    assert growth
    assert json.loads(json.dumps(growth.json()))["added"] == {"fc1": 2}
    assert growth.replaced == {}
