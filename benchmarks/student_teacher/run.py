"""The student-teacher task of GradMax: a 10-10-10 teacher, a student that grows from 5 to 10 hidden units.

    python benchmarks/student_teacher/run.py            # 10 seeds x 5 runs, under two minutes on one core

Full-batch SGD, learning rate .1, 1500 steps, mean squared error on 1000 Gaussian inputs; one unit every 200 steps. As in
the paper the fan-in of a new unit is zero and its fan-out has the mean norm of the others; the activation is max(x, 0)
with slope 1 at the tie, as in the released code. Writes one file per finished run, then the table.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meristem as ms
from meristem.core.axis import Axis
from meristem.core.offer import Offer
from meristem.lab.neutral import mean_norm, neutral
from meristem.methods import Lab

RESULTS = Path(__file__).parent / "results"
SEEDS, STEPS, EVERY, SMALL, BIG = 10, 1500, 200, 5, 10


class ReLU(nn.Module):
    """max(x, 0) with slope 1 at 0."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x >= 0, x, torch.zeros_like(x))


@dataclass(frozen=True)
class RandomFanOut:
    """Zero fan-in, random fan-out of the mean norm.

    Gaussian directions, or the released code's all-positive ones.
    """

    positive: bool = False

    @property
    def kinds(self) -> dict[str, bool]:
        return {"width": True}

    @property
    def batches(self) -> int:
        return 0

    def propose(self, lab: Lab, axis: Axis, count: int) -> Offer:
        strips = neutral(lab, axis, count, zero="fan_in")
        length = mean_norm(lab, axis, "fan_out")
        for slot in axis.places("fan_out"):
            raw = lab.normal(strips[slot.place].shape, strips[slot.place])
            if self.positive:
                raw = lab.uniform(raw.shape, 1.0, raw).abs()
            norms = raw.flatten(1).norm(dim=1)
            strips[slot.place] = length * raw / norms[:, None, None]
        return Offer(axis.name, count, strips)


HOWS = {
    "random, all positive": RandomFanOut(positive=True),
    "random, Gaussian": RandomFanOut(),
    "gradmax": ms.how.GradMax(zero="fan_in", scale=1.0),
}


def net(hidden: int) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(10, hidden), ReLU(), nn.Linear(hidden, 10))
    for p in model.parameters():
        nn.init.uniform_(p, -1, 1)
    return model


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def one(name: str, seed: int) -> dict[str, object]:
    torch.manual_seed(seed)
    teacher, x = net(BIG), torch.randn(1000, 10)
    batch = (x, teacher(x).detach())
    torch.manual_seed(1000 + seed)
    student = net(BIG if name == "big" else SMALL)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    how, curve, gradients = HOWS.get(name), [], []
    for step in range(1, STEPS + 1):
        value = loss(student, batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        curve.append(value.item())
        if how is not None and step % EVERY == 0 and step // EVERY <= BIG - SMALL:
            ms.grow_(
                student,
                {"0": 1},
                x,
                how=how,
                optimizer=optimizer,
                loss=loss,
                data=[batch],
            )
            student.zero_grad()
            loss(student, batch).backward()
            gradients.append(student[0].weight.grad[-1].norm().item())
    final = loss(student, batch).item()
    return {"name": name, "seed": seed, "final": final, "new_gradient": gradients, "curve": curve[::10],
            "torch": torch.__version__, "meristem": ms.__version__}  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    RESULTS.mkdir(exist_ok=True)
    names = ["small", *HOWS, "big"]
    for name in names:
        for seed in range(SEEDS):
            path = (
                RESULTS / f"{name.replace(', ', '_').replace(' ', '_')}_seed{seed}.json"
            )
            if not path.exists():
                path.write_text(json.dumps(one(name, seed)) + "\n")
    rows = [
        "| | final loss, mean of 10 seeds | standard error | norm of the new gradient at growth |",
        "|---|---|---|---|",
    ]
    for name in names:
        runs = [
            json.loads(p.read_text())
            for p in sorted(
                RESULTS.glob(f"{name.replace(', ', '_').replace(' ', '_')}_seed*.json")
            )
        ]
        finals = [run["final"] for run in runs]
        error = statistics.stdev(finals) / len(finals) ** 0.5
        norms = [norm for run in runs for norm in run["new_gradient"]]
        shown = f"{statistics.mean(norms):.3f}" if norms else "-"
        rows.append(
            f"| {name} | {statistics.mean(finals):.3f} | {error:.3f} | {shown} |"
        )
    table = "\n".join(rows)
    (RESULTS / "table.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main()
