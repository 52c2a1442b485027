"""A run of transformers' Trainer in two processes that grows, and is resumed."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from launched.alike import alike
from test_transformers import growing, trainer

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    straight = trainer(folder, growing(), 8)
    straight.train()
    growth = growing()
    resumed = trainer(folder, growth, 8)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert growth.grower.history
    pairs = zip(straight.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    alike(resumed.model)
