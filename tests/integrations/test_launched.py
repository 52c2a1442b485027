"""The integrations in programs of two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LAUNCHER = ["-m", "torch.distributed.run", "--nproc-per-node=2"]


@pytest.mark.slow
@pytest.mark.parametrize("package", ["accelerate", "lightning", "transformers"])
def test_processes_end_alike(package: str, tmp_path: Path) -> None:
    pytest.importorskip(package)
    program = HERE / "launched" / f"with_{package}.py"
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    done = subprocess.run(
        [sys.executable, *LAUNCHER, str(program), str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "alike" in done.stdout
