"""`meristem run`, killed at random moments and started again, beside a run that was never stopped.

    python benchmarks/faults/kills.py --kills 200               # 20 minutes
    python benchmarks/faults/kills.py --kills 50 --ranks 2      # under torchrun

The figures of the result must be the same to the last bit. Prints one line, and exits with 1 where they are not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

EXPERIMENT = """
model = { mlp = { hidden = [16, 16] } }
data = "digits"
[train]
steps = 3000
batch_size = 64
evaluate = 200
optimizer = { adamw = { lr = 1e-3 } }
[grow]
when = { every = "200 steps" }
how = "gradmax"
where = "by_gain"
amount = 4
"""
# Saved often, so that a kill falls into a save now and then.
OFTEN = """
from meristem import cli
from meristem.experiments import run

run.SAVE_SECONDS = 0.2
cli.main()
"""
# What may differ between two runs of the same experiment.
TIMES = ("seconds", "health_seconds")


def command(ranks: int, file: Path, out: Path) -> list[str]:
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    start = [sys.executable, *(launcher if ranks > 1 else [])]
    return [*start, str(file.parent / "often.py"), "run", str(file), "--out", str(out)]


def kill(process: subprocess.Popen[bytes], drawn: random.Random) -> None:
    """Kill all processes of a run; of several now and then the launcher alone, which
    leaves the others behind.
    """
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    if drawn.random() < 0.8:
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()
    process.wait()


def figures(out: Path) -> Any:
    (path,) = out.glob("*.json")
    return without_times(json.loads(path.read_text()))


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: without_times(one) for key, one in value.items() if key not in TIMES
        }
    if isinstance(value, list):
        return [without_times(one) for one in value]
    return value


def difference(first: Any, second: Any, path: str = "") -> str:
    """Where two results differ first."""
    if (
        isinstance(first, dict)
        and isinstance(second, dict)
        and first.keys() == second.keys()
    ):
        pairs = [(f"{path}.{key}", first[key], second[key]) for key in first]
    elif (
        isinstance(first, list)
        and isinstance(second, list)
        and len(first) == len(second)
    ):
        rows = enumerate(zip(first, second, strict=True))
        pairs = [(f"{path}[{number}]", *pair) for number, pair in rows]
    else:
        return f"{path}: {first!r} and {second!r}"[:300]
    for inner, one, other in pairs:
        if one != other:
            return difference(one, other, inner)
    return "nowhere"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    drawn = random.Random(asked.seed)
    folder = Path(tempfile.mkdtemp())
    file = folder / "killed.toml"
    (folder / "often.py").write_text(OFTEN)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    file.write_text(EXPERIMENT)
    begun = time.perf_counter()
    subprocess.run(command(asked.ranks, file, folder / "straight"), check=True, **quiet)
    whole = time.perf_counter() - begun
    straight = figures(folder / "straight")
    kills = runs = wrong = 0
    while kills < asked.kills:
        out = folder / f"killed-{runs}"
        runs += 1
        while True:
            process = subprocess.Popen(command(asked.ranks, file, out), **quiet)
            try:
                process.wait(timeout=drawn.uniform(0.3, 0.9) * whole)
                break
            except subprocess.TimeoutExpired:
                kill(process, drawn)
                kills += 1
        if process.returncode != 0:
            print(f"run {runs}: exit code {process.returncode}", file=sys.stderr)
            wrong += 1
        elif figures(out) != straight:
            print(f"run {runs}: {difference(straight, figures(out))}", file=sys.stderr)
            wrong += 1
    print(f"{kills} kills in {runs} runs on {asked.ranks} ranks: {wrong} runs differ")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
