"""What grows in models as they are: torchvision, timm, transformers, and the styles people write in.

    python benchmarks/zoo/run.py                      # every model that is importable, one process each
    python benchmarks/zoo/run.py transformers/Llama   # some of them, or all of one source
    python benchmarks/zoo/run.py --table              # the summary of what has been run

The whole table costs about two hours of one core. Each model leaves one file in results/: axes by kind, what is
frozen and why, and for a sample of axes the largest change of an output, what is left of the old bits after
narrowing back, a step of AdamW, a round trip through a checkpoint, and CPU seconds.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from models import make, names
from torch import Tensor, nn

import meristem as ms
from meristem.structure.tracer import tensors

HERE = Path(__file__).parent
SECONDS = 420
"""Longest time that one model may take."""
EXACT = 1e-4
"""Largest change, relative to the largest output, that counts as rounding, in float32."""
SAMPLE = {"hidden": 3, "stream": 1, "heads": 2, "depth": 2, "end": 1}
"""Axes of each kind that are grown."""


def kind_of(axis: ms.Axis) -> str:
    """hidden, stream (a norm runs over it), heads, depth (a run of blocks), chain, end, input."""
    if axis.end == "input":
        return "input"
    # The stream of a base model is its output too.
    if axis.end and not axis.streamed:
        return "end"
    if axis.kind == "depth":
        return "chain" if axis.size == 1 and axis.name.endswith(":depth") else "depth"
    if axis.kind == "heads":
        return "heads"
    return "stream" if axis.streamed else "hidden"


def call(model: nn.Module, example: Any) -> list[Tensor]:
    """The floating-point outputs in eval mode."""
    model.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        if isinstance(example, dict):
            given = model(**example)
        else:
            given = model(*example) if isinstance(example, tuple) else model(example)
    return [tensor for tensor in tensors(given) if tensor.is_floating_point()]


def change(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest relative change of an old output; new classes are left out."""
    if len(before) != len(after):
        return float("inf")
    worst = 0.0
    for old, new in zip(before, after, strict=True):
        if old.dim() != new.dim():
            return float("inf")
        kept = new[tuple(slice(size) for size in old.shape)]
        if kept.shape != old.shape:
            return float("inf")
        # Grown streams are outputs of base models: only what was there before is compared.
        largest = old.abs().max().item() if old.numel() else 0.0
        if largest:
            worst = max(worst, (kept - old).abs().max().item() / largest)
    return worst


def train(model: nn.Module, example: Any, optimizer: torch.optim.Optimizer) -> None:
    """One step."""
    model.train()
    if isinstance(example, dict):
        given = model(**example)
    else:
        given = model(*example) if isinstance(example, tuple) else model(example)
    found = [t for t in tensors(given) if t.is_floating_point() and t.requires_grad]
    optimizer.zero_grad()
    sum(t.square().mean() for t in found).backward()
    optimizer.step()


def made(name: str) -> tuple[nn.Module, Any]:
    """The model, always the same."""
    torch.manual_seed(0)
    return make(name)


def grow_one(name: str, axis: ms.Axis, round_trip: bool) -> dict[str, Any]:
    """One growth, and everything that must hold behind it."""
    model, example = made(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    train(model, example, optimizer)
    optimizer.zero_grad()
    # With its metadata, which some models look for.
    before, bits = call(model, example), copy.deepcopy(model.state_dict())
    started = time.process_time()
    count = 1 if axis.kind == "depth" else axis.multiple
    growth = ms.grow_(model, {axis.name: count}, example, optimizer=optimizer)
    result: dict[str, Any] = {
        "seconds": time.process_time() - started,
        "stale": growth.stale,
    }
    result["change"] = change(before, call(model, example))
    train(model, example, optimizer)
    if round_trip:
        with tempfile.TemporaryDirectory() as folder:
            ms.save(Path(folder) / "one", model, optimizer=optimizer)
            again = ms.load(Path(folder) / "one", made(name)[0])
            result["round_trip"] = change(call(model, example), call(again, example))
    fresh, _ = made(name)
    fresh.load_state_dict(bits)
    ms.grow_(fresh, {axis.name: count}, example)
    ms.narrow_(fresh, {axis.name: count}, example)
    state = fresh.state_dict()
    same = [
        k
        for k, v in bits.items()
        if v.shape == state[k].shape and torch.equal(v, state[k])
    ]
    result["kept_bits"] = len(same) / max(len(bits), 1)
    return result


def examine(name: str) -> dict[str, Any]:
    """Everything that is told of one model."""
    ms.find_axes(nn.Linear(2, 3), torch.randn(1, 2))  # what only the first call costs
    model, example = made(name)
    parameters = sum(p.numel() for p in model.parameters())
    record: dict[str, Any] = {"name": name, "parameters": parameters}
    started = time.process_time()
    axes = ms.find_axes(model, example)
    record["find_axes"] = time.process_time() - started
    listed: dict[str, list[str]] = {}
    for axis in (*axes.values(), *axes.ends.values(), *axes.inputs.values()):
        listed.setdefault(kind_of(axis), []).append(axis.name)
    record["axes"] = listed
    record["frozen"] = axes.frozen
    record["grown"] = {}
    for kind, most in SAMPLE.items():
        present = listed.get(kind, [])
        # The first, the last and one between.
        step = max(len(present) // most, 1)
        for number, axis_name in enumerate(present[::step][:most]):
            axis = axes.named(axis_name)
            try:
                tried = grow_one(name, axis, round_trip=number == 0)
            except Exception as error:
                tried = {"error": f"{type(error).__name__}: {error}"[:300]}
            record["grown"][axis_name] = {"kind": kind, **tried}
    for axis_name, reason in axes.frozen.items():
        if "when its method is named" in reason:
            record.setdefault("stacks", []).append(axis_name)
    if record.get("stacks"):
        model, example = made(name)
        stack = ms.how.Stack()
        record["stacked"] = ms.grow_(
            model, {record["stacks"][0]: 1}, example, how=stack
        ).added
    record["seconds"] = time.process_time() - started
    return record


def run_all(chosen: list[str]) -> None:
    for name in chosen:
        path = HERE / "results" / f"{name.replace('/', '.')}.json"
        command = [sys.executable, __file__, "--one", name]
        started = time.perf_counter()
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=SECONDS
            )
            lines = done.stdout.strip().splitlines()
            told = lines[-1] if done.returncode == 0 and lines else ""
            error = done.stderr.strip().splitlines()[-1:] if not told else []
        except subprocess.TimeoutExpired:
            told, error = "", [f"took more than {SECONDS} s"]
        record = (
            json.loads(told)
            if told
            else {"name": name, "crash": (error or ["?"])[0][:500]}
        )
        path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        print(
            f"{name}: {time.perf_counter() - started:.0f} s {record.get('crash', '')}",
            flush=True,
        )


def results() -> list[dict[str, Any]]:
    return [
        json.loads(path.read_text())
        for path in sorted((HERE / "results").glob("*.json"))
    ]


def table() -> None:
    """The summary, one row a source; then what fell short."""
    by_source: dict[str, list[dict[str, Any]]] = {}
    for record in results():
        by_source.setdefault(record["name"].partition("/")[0], []).append(record)
    print(
        "| source | models | crash | hidden | heads | depth | stream | growths | wrong | refused | find_axes s: median, worst |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for source, records in by_source.items():
        print(row(source, records))
    for record in results():
        for line in faults(record):
            print(f"- {record['name']}: {line}")


def row(source: str, records: list[dict[str, Any]]) -> str:
    ran = [record for record in records if "crash" not in record]
    kinds = Counter(kind for record in ran for kind in record["axes"])
    kinds["depth"] += sum(
        "stacked" in record and "depth" not in record["axes"] for record in ran
    )
    grown = [one for record in ran for one in record["grown"].values()]
    wrong = sum(one.get("change", 0.0) > EXACT for one in grown)
    refused = sum("error" in one for one in grown)
    seconds = [record["find_axes"] for record in ran] or [0.0]
    cells = [source, len(records), len(records) - len(ran)]
    cells += [kinds[kind] for kind in ("hidden", "heads", "depth", "stream")]
    cells += [
        len(grown),
        wrong,
        refused,
        f"{statistics.median(seconds):.1f}, {max(seconds):.1f}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def faults(record: dict[str, Any]) -> list[str]:
    if "crash" in record:
        return [f"crash: {record['crash']}"]
    told = []
    for axis, one in record["grown"].items():
        if "error" in one:
            told.append(f"{axis} ({one['kind']}): {one['error']}")
        elif max(one["change"], one.get("round_trip", 0.0)) > EXACT:
            told.append(
                f"{axis} ({one['kind']}): changes {one['change']:.1e}, {one.get('round_trip')}"
            )
    missing = [kind for kind in ("hidden", "depth") if kind not in record["axes"]]
    if "stacked" in record and "depth" in missing:
        missing.remove("depth")
    told += [f"no {kind}" for kind in missing]
    if record["find_axes"] > 10:
        told.append(f"find_axes {record['find_axes']:.1f} s")
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="models, or beginnings of their names")
    parser.add_argument("--table", action="store_true")
    parser.add_argument(
        "--missing", action="store_true", help="only those without a result"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.table:
        table()
        return
    if told.one:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        torch.set_num_threads(1)
        print(json.dumps(examine(told.one)))
        return
    chosen = [
        name for name in names() if not told.names or name.startswith(tuple(told.names))
    ]
    if told.missing:
        chosen = [
            n
            for n in chosen
            if not (HERE / "results" / f"{n.replace('/', '.')}.json").exists()
        ]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run_all(chosen)


if __name__ == "__main__":
    main()
