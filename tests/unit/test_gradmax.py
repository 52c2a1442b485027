"""The tests of the method's specification: the operator is exact, its optimum is reached, the signs and norms are right."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import make

import meristem as ms
from meristem.how.gradmax import GradMax, _Units
from meristem.lab.laboratory import Lab, Loan
from meristem.structure import Structure


def mse(model: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def output_gradient(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """dL/d(output); no graph through the weights stays alive."""
    out = net(x).detach().requires_grad_()
    return torch.autograd.grad(F.mse_loss(out, y), out)[0]


def space(
    model: nn.Module, axis: str, count: int, data: list[Any], **options: Any
) -> _Units:
    structure = Structure(model, data[0][0])
    lab = Lab(structure, Loan(torch.Generator().manual_seed(0), mse, data))
    return _Units(lab, structure.axes[axis], count, GradMax(**options))


def dense(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, list[Any]]:
    net = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 6)).to(dtype)
    return net, [(torch.randn(40, 7, dtype=dtype), torch.randn(40, 6, dtype=dtype))]


def test_dense_operator_is_the_papers_matrix() -> None:
    net, data = dense()
    x, y = data[0]
    g = output_gradient(net, x, y)
    b = g.T @ x  # sum over the batch: the loss is already a mean
    inward, values, outward = space(net, "0", 3, data).triplets(
        *space(net, "0", 3, data).operators(0.0)
    )
    u, s, v = torch.linalg.svd(b)
    torch.testing.assert_close(values[:6], s)
    torch.testing.assert_close(
        (outward[:3] @ u[:, :3]).abs(),
        torch.eye(3, dtype=torch.float64),
        atol=1e-6,
        rtol=0,
    )
    torch.testing.assert_close(
        (inward[:3] @ v[:3].T).abs(),
        torch.eye(3, dtype=torch.float64),
        atol=1e-6,
        rtol=0,
    )


@pytest.mark.parametrize("count", [1, 3])
def test_new_gradient_is_the_predicted_one_and_beats_random_frames(count: int) -> None:
    net, data = dense()
    norm = net[2].weight.norm(dim=0).mean().item()
    growth = ms.grow_(
        net, {"0": count}, data[0][0], how=GradMax(scale=0.5), loss=mse, data=data
    )
    assert growth.max_change <= 1e-15
    mse(net, data[0]).backward()
    reached = net[0].weight.grad[5:].square().sum().item()
    assert net[2].weight.grad[:, 5:].abs().max() == 0
    fan_out = net[2].weight[:, 5:].detach()
    gram = fan_out.T @ fan_out
    torch.testing.assert_close(
        gram, (0.5 * norm) ** 2 * torch.eye(count, dtype=torch.float64)
    )
    assert (fan_out.gather(0, fan_out.abs().argmax(0, keepdim=True)) > 0).all()
    x, y = data[0]
    g = output_gradient(net, x, y)
    b = g.T @ x
    singular = torch.linalg.svdvals(b)[:count]
    assert reached == pytest.approx(
        (0.5 * norm) ** 2 * singular.square().sum().item(), rel=1e-8
    )
    for _ in range(1000):
        frame = (
            torch.linalg.qr(torch.randn(6, count, dtype=torch.float64))[0] * 0.5 * norm
        )
        assert (frame.T @ b).square().sum().item() <= reached * (1 + 1e-9)


def exact_conv(
    x: Tensor, g: Tensor, conv1: nn.Conv2d, conv2: nn.Conv2d, hidden: tuple[int, int]
) -> Tensor:
    """M of the specification, by explicit sums: unfold(x) Q^T."""
    patches = F.unfold(
        x, conv1.kernel_size, conv1.dilation, conv1.padding, conv1.stride
    )  # (n, C k1^2, R)
    n, o = g.shape[:2]
    k2 = conv2.kernel_size[0]
    rows = []
    for out in range(o):
        for q in range(k2 * k2):
            kernel = torch.zeros(1, 1, k2, k2, dtype=x.dtype)
            kernel.view(-1)[q] = 1
            spread = torch.zeros(n, 1, *hidden, dtype=x.dtype, requires_grad=True)
            image = F.conv2d(
                spread, kernel, None, conv2.stride, conv2.padding, conv2.dilation
            )
            rows.append(
                torch.autograd.grad((image[:, 0] * g[:, out]).sum(), spread)[0].flatten(
                    1
                )
            )
    spread_all = torch.stack(rows, 1)  # (n, O k2^2, R)
    return torch.einsum("ncr,nqr->cq", patches, spread_all)


CASES = list(itertools.product((1, 2), (1, 2), (1, 3, 5), (1, 3), (0, 1), (1, 2)))


@pytest.mark.parametrize("size", [7, 8, 2])
def test_convolution_reaches_the_optimum_of_the_exact_operator(size: int) -> None:
    """Strides, kernels, paddings, dilations, odd and even maps; the energy within 1e-4 of the exact optimum."""
    checked = 0
    for s1, s2, k1, k2, padded, dilation in CASES:
        if dilation == 2 and (k1 != 3 or k2 != 3):
            continue
        p1, p2 = (padded * (k1 // 2) * dilation, padded * (k2 // 2))
        torch.manual_seed(k1)
        conv1 = nn.Conv2d(2, 4, k1, s1, p1, dilation, bias=False)
        net = nn.Sequential(
            conv1, nn.Tanh(), nn.Conv2d(4, 3, k2, s2, p2, bias=False)
        ).double()
        x = torch.randn(3, 2, size, size, dtype=torch.float64)
        try:
            hidden = net[0](x).shape[-2:]
            out = net(x).detach()
        except RuntimeError:
            continue  # the map is smaller than the kernel
        target = torch.randn_like(out)
        g = output_gradient(net, x, target)
        m = exact_conv(x, g, net[0], net[2], tuple(hidden))
        best = torch.linalg.svdvals(m)[:2].square().sum().item()
        length = (
            net[2].weight.transpose(0, 1).flatten(1).norm(dim=1).mean().item() * 0.5
        )
        ms.grow_(net, {"0": 2}, x, how=GradMax(), loss=mse, data=[(x, target)])
        net.zero_grad()
        mse(net, (x, target)).backward()
        reached = net[0].weight.grad[4:].square().sum().item() / length**2
        assert reached == pytest.approx(best, rel=1e-4), (
            s1,
            s2,
            k1,
            k2,
            p1,
            p2,
            dilation,
        )
        checked += 1
    assert checked >= 8


def test_subspace_iteration_reaches_the_optimum_where_the_space_is_large() -> None:
    net = nn.Sequential(nn.Linear(300, 4), nn.Tanh(), nn.Linear(4, 280)).double()
    data = [(torch.randn(500, 300).double(), torch.randn(500, 280).double())]
    one = space(net, "0", 2, data)
    assert one.trials < one.rank
    _, values, _ = one.triplets(*one.operators(0.0))
    x, y = data[0]
    g = output_gradient(net, x, y)
    exact = torch.linalg.svdvals(g.T @ x)[:2]
    assert values[:2].square().sum().item() == pytest.approx(
        exact.square().sum().item(), rel=1e-4
    )


def test_micro_batches_and_loss_scale_give_the_same_units() -> None:
    net, data = dense()
    x, y = data[0]
    halves = [(x[:20], y[:20]), (x[20:], y[20:])]
    whole = space(net, "0", 2, data).frame()
    split = space(net, "0", 2, halves, batches=2).frame()
    torch.testing.assert_close(whole[2], split[2], atol=1e-6, rtol=0)
    structure = Structure(net, x)
    scaled = Lab(
        structure,
        Loan(torch.Generator().manual_seed(0), lambda m, b: 1000 * mse(m, b), data),
    )
    times = _Units(scaled, structure.axes["0"], 2, GradMax()).frame()
    torch.testing.assert_close(whole[2], times[2], atol=1e-6, rtol=0)


def test_zero_gradient_and_small_rank_are_no_trouble() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    x = torch.randn(16, 4)
    data = [(x, net(x).detach())]
    ms.grow_(net, {"0": 3}, x, how=GradMax(), loss=mse, data=data)
    assert all(torch.isfinite(p).all() for p in net.parameters())
    growth = ms.grow_(
        net, {"0": 5}, x, how=GradMax(), loss=mse, data=[(x, torch.randn(16, 2))]
    )
    assert "3 units are random" in growth.notes["0"]


def test_measuring_does_not_disturb() -> None:
    from zoo import make

    model, x = make("bn_conv")
    y = torch.randint(0, 4, (3,))
    loss = lambda m, b: F.cross_entropy(m(b[0]), b[1])
    model.train()
    loss(model, (x, y)).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    structure = Structure(model, x)
    lab = Lab(structure, Loan(torch.Generator().manual_seed(0), loss, [(x, y)]))
    rng = torch.get_rng_state()
    for axis in (axis for axis in structure.axes.values() if axis.kind == "width"):
        GradMax(steps=2).propose(lab, axis, 2)
    assert torch.equal(rng, torch.get_rng_state())
    assert model.training
    assert all(torch.equal(grads[n], p.grad) for n, p in model.named_parameters())
    assert all(torch.equal(buffers[n], b) for n, b in model.named_buffers())


def test_ascent_never_ends_below_its_start() -> None:
    from zoo import make

    model, x = make("bn_conv")
    y = torch.randint(0, 4, (3,))
    loss = lambda m, b: F.cross_entropy(m(b[0]), b[1])
    structure = Structure(model, x)
    gains = []
    for steps in (0, 20):
        lab = Lab(structure, Loan(torch.Generator().manual_seed(0), loss, [(x, y)]))
        gains.append(
            sum(
                GradMax(zero="fan_out", steps=steps)
                .propose(lab, structure.axes["conv2"], 3)
                .gains
            )
        )
    assert gains[1] >= gains[0] > 0


def test_units_behind_a_depthwise_convolution_receive_gradient() -> None:
    torch.manual_seed(0)
    model, x = make("mobilenet")
    model.eval()
    labels = torch.arange(len(x)) % 3
    loss = lambda net, batch: F.cross_entropy(net(batch[0]), batch[1])
    expanded = 0
    for name, axis in ms.find_axes(model, x).items():
        # The mean kernel as it stands turned all of them negative before a rectifier.
        if any(slot.role == "carried" and slot.fill == "draw" for slot in axis.slots):
            how = ms.how.GradMax(steps=1)
            counts = {name: 4 * axis.multiple}
            data = [(x, labels)]
            growth = ms.grow_(model, counts, x, how=how, loss=loss, data=data)
            assert "units are random" not in growth.notes[name], growth.notes
            expanded += 1
    assert expanded >= 3
