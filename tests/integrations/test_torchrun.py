"""`meristem run` under torchrun: the same file, the same figures."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from filelock import FileLock

EXPERIMENT = """
model = { mlp = { hidden = [12, 12] } }
data = "digits"
[train]
steps = 24
batch_size = 63
evaluate = 12
optimizer = { adamw = { lr = 3e-3 } }
[grow]
when = { every = "8 steps" }
how = "gradmax"
where = "by_gain"
amount = 8
budget = { growths = 2 }
"""


def result(folder: Path, *launcher: str) -> dict[str, Any]:
    file = folder / "experiment.toml"
    file.write_text(EXPERIMENT)
    out = folder / "-".join(["out", *launcher]).replace("/", "_")
    command = [sys.executable, *launcher, "-m", "meristem.cli", "run", str(file)]
    done = subprocess.run(
        [*command, "--out", str(out)], capture_output=True, text=True, check=True
    )
    # One process speaks.
    (line,) = done.stdout.split()
    found: dict[str, Any] = json.loads(Path(line).read_text())
    return found


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    one = result(tmp_path)
    two = result(tmp_path, "-m", "torch.distributed.run", "--nproc-per-node=2")
    assert (one["processes"], two["processes"]) == (1, 2)
    assert [g["after"] for g in one["growths"]] == [g["after"] for g in two["growths"]]
    assert len(one["growths"]) == 2
    assert abs(one["loss"] - two["loss"]) < 1e-3 * one["loss"]


# Saved after every step.
OFTEN = """
from meristem import cli
from meristem.experiments import run

run.SAVE_SECONDS = 0
cli.main()
"""


def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    file, out = tmp_path / "experiment.toml", tmp_path / "again"
    launcher = tmp_path / "often.py"
    launcher.write_text(OFTEN)
    file.write_text(EXPERIMENT)
    several = ["-m", "torch.distributed.run", "--nproc-per-node=2"]
    manifests = "checkpoints/experiment_seed0-*/meristem.json"
    running = subprocess.Popen(
        [sys.executable, *several, str(launcher), "run", str(file), "--out", str(out)]
    )
    # Until it has grown.
    while not any(json.loads(m.read_text())["lineage"] for m in out.glob(manifests)):
        assert running.poll() is None
        time.sleep(0.01)
    running.terminate()
    running.wait()
    assert list(out.glob(manifests))
    again = [sys.executable, "-m", "meristem.cli", "run", str(file), "--out", str(out)]
    subprocess.run(again, check=True)
    resumed = json.loads((out / "experiment_seed0.json").read_text())
    one = result(tmp_path)
    assert resumed["steps"] == one["steps"]
    assert [g["after"] for g in resumed["growths"]] == [
        g["after"] for g in one["growths"]
    ]
    assert abs(resumed["loss"] - one["loss"]) < 1e-3 * one["loss"]


def test_a_second_process_waits_for_the_first(tmp_path: Path) -> None:
    """A killed launcher leaves its processes behind; the same command again does not
    write where they write.
    """
    file = tmp_path / "experiment.toml"
    file.write_text(EXPERIMENT)
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "meristem.cli",
        "run",
        str(file),
        "--out",
        str(out),
    ]
    (out / "locks").mkdir(parents=True)
    with FileLock(out / "locks" / "experiment_seed0.lock"):
        waiting = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert waiting.stderr is not None
        assert "another process works on" in waiting.stderr.readline()
        assert not list(out.glob("*.json"))
    waiting.communicate()
    assert waiting.returncode == 0
    assert (out / "experiment_seed0.json").exists()
