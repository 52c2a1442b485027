"""A loop on Accelerate in two processes that grows, is saved and loaded."""

from __future__ import annotations

import sys

from launched.alike import alike
from test_accelerate import prepared, step
from torch.nn.parallel import DistributedDataParallel

if __name__ == "__main__":
    run = prepared()
    for _ in range(5):
        step(*run)
    run[0].save_state(sys.argv[1])
    again = prepared()
    again[0].load_state(sys.argv[1])
    for _ in range(3):
        step(*again)
    assert isinstance(again[1], DistributedDataParallel)
    assert again[1].module[0].out_features == 16
    alike(again[1])
