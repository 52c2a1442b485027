"""What discovery and a growth cost, as ratios of one run.

    python benchmarks/cost/run.py            # about five minutes of one core

Writes results/DATE_HARDWARE.json beside this file, and a table to stdout. Every figure is
taken in a process of its own, so that peaks of memory do not mix. Llamas need transformers
and are left out, with a word, where it is not installed.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meristem as ms
from meristem.experiments.models import GPT

RESULTS = Path(__file__).parent / "results"
STEPS = 3
"""Training steps that a step's time is the mean of."""


def gpt(
    depth: int, width: int, heads: int, context: int, vocabulary: int = 256
) -> nn.Module:
    torch.manual_seed(0)
    return GPT(
        vocabulary=vocabulary,
        context=context,
        width=width,
        heads=heads,
        hidden=4 * width,
        depth=depth,
    )


def llama(
    depth: int, width: int, hidden: int, heads: int, vocabulary: int
) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        vocab_size=vocabulary,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config)


def cross_entropy(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def seconds(call: Callable[[], Any]) -> float:
    """CPU seconds of a call, on one thread."""
    started = time.process_time()
    call()
    return time.process_time() - started


def discovery(kind: str, depth: int) -> dict[str, float]:
    """CPU seconds of find_axes, in a process that has looked at a model before."""
    small = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    ms.find_axes(small, torch.randn(2, 4))  # imports are not discovery
    if kind == "llama":
        model = llama(depth, 32, 64, 4, 97)
        example: Any = {"input_ids": torch.randint(0, 97, (2, 13))}
    else:
        model, example = gpt(depth, 32, 4, 16, 97), torch.randint(0, 97, (2, 13))
    found: list[Any] = []
    spent = seconds(lambda: found.append(ms.find_axes(model, example)))
    return {"seconds": spent, "axes": len(found[0])}


def growth(_: str, depth: int) -> dict[str, float]:
    """One growth of an MLP width, in training steps of the same model."""
    model = gpt(depth, 256, 4, 128)
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.randint(0, 256, (32, 129))

    def step() -> None:
        loss = cross_entropy(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step()
    each = seconds(lambda: [step() for _ in range(STEPS)]) / STEPS
    example = batch[:, :-1]
    small = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    ms.grow_(small, {"0": 2}, torch.randn(2, 4))  # imports are no part of a growth

    def grow(name: str) -> None:
        ms.grow_(
            model,
            {name: 64},
            example,
            optimizer=optimizer,
            loss=cross_entropy,
            data=[batch],
        )

    first = seconds(lambda: grow("blocks.0.up"))
    ms.find_axes(model, example)
    cached = seconds(lambda: grow("blocks.1.up"))
    return {"step_seconds": each, "first": first / each, "cached": cached / each}


def memory(kind: str, depth: int) -> dict[str, float]:
    """Peak memory of find_axes and of growths beyond the model, in shares of the model.

    The activations of one growth batch are measured first, and taken off.
    """
    what, _, dtype = kind.partition(" ")
    if what == "llama":
        model = llama(depth, 1024, 2816, 16, 32000)
        example: Any = {"input_ids": torch.randint(0, 32000, (2, 64))}
    else:
        model, example = gpt(depth, 1024, 16, 64, 8192), torch.randint(0, 8192, (2, 64))
    model = model.to(getattr(torch, dtype)).eval()
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    small = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    ms.grow_(small, {"0": 2}, torch.randn(2, 4))

    def forward() -> None:
        with torch.no_grad():
            model(**example) if isinstance(example, dict) else model(example)

    forward()
    activations = peak(forward)
    found: list[Any] = []
    spent = seconds(lambda: found.append(peak(lambda: ms.find_axes(model, example))))
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "model_mb": size,
        "find_axes_seconds": spent,
        "find_axes": (found[0] - activations) / size,
    }
    axes = ms.find_axes(model, example)
    width = next(name for name in axes if name.endswith(("gate_proj", ".up")))
    depths = next(
        name for name, axis in axes.items() if axis.kind == "depth" and axis.size > 2
    )
    for short, name, count in (("width", width, 256), ("depth", depths, 2)):
        plan = ms.plan(model, {name: count}, example)
        element = next(model.parameters()).element_size()
        # A growth writes every tensor that changes anew; the old ones go when it is done.
        entries = sum(math.prod(change.after) for change in plan.tensors)
        if not plan.tensors:
            entries = plan.parameters[1] - plan.parameters[0]
        grown = element * entries / 2**20
        grow = partial(ms.grow_, model, plan, example)
        started = time.process_time()
        took = peak(grow)
        figures[f"{short}_seconds"] = time.process_time() - started
        figures[f"{short}_grown_mb"] = grown
        figures[f"{short}_beyond_grown"] = (took - activations - grown) / size
    return figures


def peak(call: Callable[[], Any]) -> float:
    """How far the resident memory rises above where it is, in MB."""
    import gc

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(key)


MEASURED: dict[str, Callable[[str, int], dict[str, float]]] = {
    "discovery": discovery,
    "growth": growth,
    "memory": memory,
}
RUNS = [
    ("discovery", "gpt", 12),
    ("discovery", "gpt", 24),
    ("discovery", "llama", 12),
    ("discovery", "llama", 24),
    ("growth", "gpt", 8),
    ("memory", "gpt float32", 10),
    ("memory", "llama float32", 8),
    ("memory", "llama bfloat16", 8),
]


def main() -> None:
    results = []
    for what, kind, depth in RUNS:
        if kind.startswith("llama") and not _has_transformers():
            print(
                f"{what} {kind} {depth}: left out, transformers is not installed",
                file=sys.stderr,
            )
            continue
        print(f"{what} {kind} {depth} ...", file=sys.stderr)
        command = [sys.executable, __file__, what, kind, str(depth)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, env=environment
        )
        figures = json.loads(done.stdout.splitlines()[-1])
        results.append({"what": what, "kind": kind, "depth": depth, **figures})
        shown = ", ".join(f"{key} {value:.3g}" for key, value in figures.items())
        print(f"| {what} | {kind} | {depth} | {shown} |")
    record = {
        "versions": {"torch": torch.__version__, "meristem": ms.__version__},
        "hardware": f"{platform.machine()}, one thread",
        "results": results,
    }
    RESULTS.mkdir(exist_ok=True)
    name = f"{time.strftime('%Y-%m-%d')}_cpu.json"
    (RESULTS / name).write_text(json.dumps(record, indent=1) + "\n")


def _has_transformers() -> bool:
    import importlib.util

    return importlib.util.find_spec("transformers") is not None


if __name__ == "__main__":
    if len(sys.argv) == 4:
        torch.set_num_threads(1)
        print(json.dumps(MEASURED[sys.argv[1]](sys.argv[2], int(sys.argv[3]))))
    else:
        main()
