"""Memory and time of one adjust pass with m = 174 new units, n = 200 present ones, d = 4096 inputs.

python benchmarks/swe_svod/adjust_cost.py

Each figure comes from processes of its own, the smallest of three; the ratios are between processes of one run.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import meristem as ms
from meristem.how.swe import SWE, Adjustment
from meristem.lab.laboratory import Lab, Loan
from meristem.structure import Structure

NEW, OLD, INPUTS, BATCH = 174, 200, 4096, 100
STEPS = {"plain": 60, "factored": 60, "full": 6}


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def measure(what: str) -> dict[str, float]:
    """Seconds per step and the growth of the peak memory, in bytes, over what was there before the first step."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(INPUTS, OLD), nn.ReLU(), nn.Linear(OLD, 100))
    batch = (torch.randn(BATCH, INPUTS), torch.randint(0, 100, (BATCH,)))
    data = [batch] * STEPS[what]
    if what == "plain":
        ms.grow_(model, {"0": NEW}, batch[0])
        optimizer = torch.optim.Adam(model.parameters())
        start = peak()

        def step() -> None:
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()

        step()
        began = time.perf_counter()
        for _ in range(STEPS[what]):
            step()
        return {
            "seconds": (time.perf_counter() - began) / STEPS[what],
            "bytes": peak() - start,
        }
    method = SWE.published("full" if what == "full" else "factored")
    loan = Loan(torch.Generator().manual_seed(0), loss, [batch], data)
    lab = Lab(Structure(model, batch[0]), loan)
    sandbox = lab.sandbox()
    axis = sandbox.lab.structure.axes["0"]
    plan, _ = sandbox.insert([method.propose(sandbox.lab, axis, NEW)])
    adjustment = Adjustment(method, sandbox, plan, axis)
    adjustment.adjust()  # the first pass allocates everything; memory is read after it
    began = time.perf_counter()
    adjustment.adjust()
    return {
        "seconds": (time.perf_counter() - began) / STEPS[what],
        "bytes": peak() - BASE,
    }


def peak() -> int:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


BASE = 0


def main() -> None:
    global BASE
    if len(sys.argv) > 1:
        # Two small steps first: what torch itself keeps is not the coupling's.
        model = nn.Sequential(
            nn.Linear(INPUTS, OLD + NEW), nn.ReLU(), nn.Linear(OLD + NEW, 100)
        )
        optimizer = torch.optim.Adam(model.parameters())
        for _ in range(2):
            model(torch.randn(BATCH, INPUTS)).sum().backward()
            optimizer.step()
        del model, optimizer
        BASE = peak()
        print(json.dumps(measure(sys.argv[1])))
        return
    found: dict[str, dict[str, float]] = {}
    for what in STEPS:
        for _ in range(
            1 if what == "full" else 3
        ):  # the fastest of three: what else the machine does only adds
            answer = subprocess.run(
                [sys.executable, __file__, what],
                check=True,
                capture_output=True,
                text=True,
            )
            now = json.loads(answer.stdout)
            found[what] = {key: min(now[key], found.get(what, now)[key]) for key in now}
        print(
            f"{what:9} {1e3 * found[what]['seconds']:9.1f} ms a step   {found[what]['bytes'] / 1e6:9.1f} MB extra"
        )
    print(
        f"factored / full, extra memory: {found['factored']['bytes'] / found['full']['bytes']:.4f} (asked: <= 0.05)"
    )
    print(
        f"factored / plain step, time:   {found['factored']['seconds'] / found['plain']['seconds']:.2f} (asked: <= 1.3)"
    )
    print(
        f"full / plain step, time:       {found['full']['seconds'] / found['plain']['seconds']:.1f}"
    )


if __name__ == "__main__":
    main()
