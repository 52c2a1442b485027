"""What the runner costs beside training itself: its steps against a plain hand-written loop.

    MERISTEM_DATA=... python benchmarks/best/speed.py [WIDTH] [DEPTH] [STEPS]

The same net, batches and optimizer, in turns of some steps each, five turns a side; prints the
medians and their ratio as JSON. On a GPU under bf16.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from meristem.experiments.config import checked
from meristem.experiments.run import Run

GPU = torch.cuda.is_available()
TURNS = 5


def experiment(width: int, depth: int, steps: int):
    model = {"width": width, "depth": depth, "heads": 4, "hidden": 4 * width}
    data = {"test": 8, "context": 256 if GPU else 64}
    train = {
        "steps": steps,
        "batch_size": 64 if GPU else 32,
        "optimizer": {"adamw": {"lr": 1e-3}},
        "precision": "bf16" if GPU else "no",
        "clip": 1.0,
        # Never within a turn: a plain loop does not evaluate.
        "evaluate": 100 * steps,
    }
    grow = {"when": {"at": 0.999}, "how": "stack", "axes": "depth", "amount": [1]}
    table = {"model": {"gpt": model}, "data": {"text/python_sources": data}}
    return checked(table | {"train": train, "grow": grow})


def finish() -> None:
    if GPU:
        torch.cuda.synchronize()


def plain(run: Run, steps: int) -> float:
    """Seconds of a step that somebody would write by hand."""
    model, data = run.model, run.data
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches = iter(run.batches)
    finish()
    began = time.perf_counter()
    for _ in range(steps):
        x, y = next(batches)
        with torch.autocast("cuda", torch.bfloat16, enabled=GPU):
            loss = data.loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    finish()
    return (time.perf_counter() - began) / steps


def ours(run: Run, steps: int) -> float:
    """Seconds of a step of the runner, its grower included."""
    end = run.progress.step + steps
    finish()
    began = time.perf_counter()
    for batch in run._batches():
        run._step(batch)
        run._save_if_due()
        if run.progress.step == end:
            break
    finish()
    return (time.perf_counter() - began) / steps


def main(width: int = 48, depth: int = 6, steps: int = 100) -> None:
    run = Run(experiment(width, depth, (TURNS + 2) * steps))
    run._folder = Path(tempfile.mkdtemp())
    run._saved = run._started = time.perf_counter()
    plain(run, 10), ours(run, 10)
    sides = [(plain(run, steps), ours(run, steps)) for _ in range(TURNS)]
    by_hand, by_runner = (median(side) for side in zip(*sides, strict=True))
    print(
        json.dumps(
            {
                "device": torch.cuda.get_device_name() if GPU else "cpu",
                "parameters": sum(p.numel() for p in run.model.parameters()),
                "plain_ms": round(1e3 * by_hand, 2),
                "runner_ms": round(1e3 * by_runner, 2),
                "speed": round(by_hand / by_runner, 3),
            }
        )
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
