"""Discovery is linear in depth: what is alike is tried once, and what was found is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import meristem as ms
from meristem.core.example import Example
from meristem.experiments.models import GPT
from meristem.structure import Structure, discover, repair, resolve, structure_of
from meristem.structure.twin import apply_edits, twin
from meristem.surgery import lazy, probe, silence, verify


def gpt(depth: int, width: int = 16) -> nn.Module:
    return GPT(vocabulary=11, context=8, width=width, heads=2, hidden=24, depth=depth)


TOKENS = torch.randint(11, (2, 7))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often a model was traced, re-traced and run."""
    counts = {"traces": 0, "re-traces": 0, "runs": 0}

    def counting(owner: Any, name: str, key: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            counts[key] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    counting(discover.Structure, "_trace", "traces")
    counting(repair.Search, "attempt", "re-traces")
    for module in (probe, silence, verify):
        counting(module, "run", "runs")
    return counts


def test_as_many_passes_whatever_the_depth(counted: dict[str, int]) -> None:
    seen = []
    for depth in (3, 6, 12):
        counted.update(dict.fromkeys(counted, 0))
        ms.find_axes(gpt(depth), TOKENS)
        seen.append(dict(counted))
    assert seen[0] == seen[1] == seen[2]
    assert seen[0]["traces"] == 1
    assert seen[0]["re-traces"] <= 20


def test_what_was_found_is_kept_until_the_structure_changes(
    counted: dict[str, int],
) -> None:
    model = gpt(3)
    first = ms.find_axes(model, TOKENS)
    counted.update(dict.fromkeys(counted, 0))
    assert list(ms.find_axes(model, TOKENS)) == list(first)
    ms.plan(model, {"blocks.0.up": 2}, torch.randint(11, (2, 7)))
    assert counted["traces"] == 0
    assert structure_of(model, TOKENS) is structure_of(model, TOKENS)
    ms.grow_(model, {"blocks.0.up": 2}, TOKENS)
    ms.find_axes(model, TOKENS)
    assert counted["traces"] == 1
    assert ms.find_axes(model, TOKENS)["blocks.0.up"].size == 26
    model.blocks[1].up = nn.Linear(16, 30)
    model.blocks[1].down = nn.Linear(30, 16)
    assert ms.find_axes(model, TOKENS)["blocks.1.up"].size == 30
    assert counted["traces"] == 2


def test_a_kept_structure_keeps_no_model_alive() -> None:
    import gc
    import weakref

    model = gpt(2)
    ms.find_axes(model, TOKENS)
    watched = weakref.ref(model)
    del model
    gc.collect()
    assert watched() is None


def test_blocks_with_other_numbers_are_not_alike() -> None:
    model = gpt(4)
    structure = Structure(model, TOKENS)
    first = structure.alike.representative
    assert {first[f"blocks.{i}"] for i in range(4)} == {"blocks.0"}
    model.blocks[2].flavour = 3
    structure = Structure(model, TOKENS)
    assert structure.alike.representative["blocks.2"] == "blocks.2"
    assert structure.alike.representative["blocks.3"] == "blocks.0"


def test_a_block_that_differs_is_judged_by_itself() -> None:
    class Block(nn.Module):
        def __init__(self, odd: bool) -> None:
            super().__init__()
            self.odd = odd
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.up(x).relu()
            if self.odd:  # the width stands in the code
                y = y * (8 / y.shape[-1])
            return x + self.down(y)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block(i == 2) for i in range(4))
            self.head = nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    model = Net()
    axes = ms.find_axes(model, torch.randn(3, 6))
    assert [f"blocks.{i}.up" in axes for i in range(4)] == [True, True, False, True]
    assert "depends on its size" in axes.frozen["blocks.2.up"]


def test_the_reasons_of_alike_blocks_name_their_own_modules() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(self.up(x).reshape(-1, 8))

    model = nn.Sequential(*[Fixed() for _ in range(3)], nn.Linear(6, 2))
    frozen = ms.find_axes(model, torch.randn(3, 6)).frozen
    for i in range(3):
        assert frozen[f"{i}.up"].startswith(f"{i} does not follow")


def test_a_check_needs_no_copy_of_the_weights() -> None:
    """Large weights are factored: the check holds a small share of what they are."""
    model = nn.Sequential(nn.Linear(600, 700), nn.ReLU(), nn.Linear(700, 500))
    values = probe.random_tensors(model, torch.float64)
    held = 0
    for value in values.values():
        parts = [value]
        if isinstance(value, lazy.Factored):
            parts = [value.rows, value.columns]
        held += sum(part.numel() for part in parts)
    assert held < 0.05 * sum(p.numel() for p in model.parameters())
    axes = ms.find_axes(model, torch.randn(3, 600))
    assert "0" in axes


@pytest.mark.parametrize("bias", [True, False])
def test_factors_compute_what_their_product_does(bias: bool) -> None:
    layer = nn.Linear(300, 400, bias=bias).double()
    weight = lazy.random_matrix(layer.weight, torch.Generator().manual_seed(0))
    assert isinstance(weight, lazy.Factored)
    full = weight.make()
    x = torch.randn(5, 300, dtype=torch.float64)
    torch.testing.assert_close(nn.functional.linear(x, weight), x @ full.T)
    where = torch.tensor([[0, 399], [7, 7]])
    torch.testing.assert_close(nn.functional.embedding(where, weight), full[where])
    torch.testing.assert_close(weight[:3].clone(), full[:3])
    torch.testing.assert_close(weight.t() @ x.new_ones(400), full.T @ x.new_ones(400))


def test_wrong_edits_show_behind_factors() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(300, 400), nn.Linear(400, 300)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.fc1(x).relu()
            return self.fc2(y * (400 / y.shape[-1]) ** 0.5)

    frozen = ms.find_axes(Net(), torch.randn(3, 300)).frozen
    assert "depends on its size" in frozen["fc1"]


class FusedAttention(nn.Module):
    """Calls the kernel that CUDA would choose; on fake tensors it needs no device."""

    def __init__(self, width: int = 12, head: int = 4) -> None:
        super().__init__()
        self.head = head
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width)
        self.v, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        split = []
        for layer in (self.q, self.k, self.v):
            split.append(layer(x).unflatten(-1, (-1, self.head)).transpose(1, 2))
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        mixed, log_sum_exp, *_ = kernel(*split, None, False)
        self.shapes.append(tuple(log_sum_exp.shape))
        return self.out(mixed.transpose(1, 2).flatten(2))


def test_fused_kernels_give_shapes_of_their_own_and_heads_still_grow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on CUDA, where the log-sum-exp of fused attention is empty, or padded."""
    model, x = FusedAttention(), torch.randn(2, 7, 12)

    def on_cuda(self: Structure, shapes: Any, edits: Any, mode: Any) -> nn.Module:
        def convert(name: str, tensor: torch.Tensor) -> torch.Tensor:
            shape = tuple(shapes.get(name, tensor.shape))
            with mode:
                return torch.empty(shape, dtype=tensor.dtype, device="cuda")

        copied = twin(self.model, convert)
        apply_edits(copied, edits)
        return copied

    def example_on_cuda(self: Structure, mode: Any, changes: Any = None) -> Example:
        with mode:
            return Example((torch.empty((2, 7, 12), device="cuda"),), {})

    monkeypatch.setattr(Structure, "twin_of_shape", on_cuda)
    monkeypatch.setattr(Structure, "example_for", example_on_cuda)
    structure = Structure(model, x)
    assert structure.fake
    heads = [name for name, axis in structure.axes.items() if axis.kind == "heads"]
    assert heads
    plan = resolve(structure, {heads[0]: 1})
    assert plan.refusal is None
    assert plan.change("q.weight").after == (16, 12)
