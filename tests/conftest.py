"""Shared set-up: the same seed for every test, one torch thread."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # small tensors: a second thread only waits
sys.path.insert(0, str(Path(__file__).parent))

# Programs that a test starts.
collect_ignore = ["integrations/launched"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
