"""A Lightning run of two processes that grows; prints whether they end alike."""

from __future__ import annotations

import sys

import torch
from launched.alike import alike
from lightning.pytorch import Trainer
from test_lightning import Net, growing, loader

if __name__ == "__main__":
    module, growth = Net(), growing()
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=3,
        callbacks=[growth],
        default_root_dir=sys.argv[1],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    torch.manual_seed(0)
    trainer.fit(module, loader())
    assert len(module.blocks) == 5
    assert growth.grower is not None
    assert growth.grower.ranks.several
    alike(module)
