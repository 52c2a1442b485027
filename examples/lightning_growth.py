"""Growth in a Lightning Trainer: one callback.

python examples/lightning_growth.py
"""

import logging
import warnings

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn import functional as F

import meristem as ms
from meristem.integrations.lightning import GrowthCallback

warnings.filterwarnings("ignore", module="lightning")
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
torch.manual_seed(0)
x = torch.randn(512, 8)
data = torch.utils.data.TensorDataset(x, x.square().sum(1, keepdim=True))
loader = torch.utils.data.DataLoader(data, batch_size=32, shuffle=True)


class Regressor(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        return F.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


growing = GrowthCallback(
    when=ms.when.Every("2 epochs", growths=3), how=ms.how.GradMax(), amount=8
)
module = Regressor()
trainer = Trainer(
    max_epochs=8,
    callbacks=[growing],
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(module, loader)
print(module.net)
assert module.net[0].out_features == 28
