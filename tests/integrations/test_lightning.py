"""Growth in Lightning's Trainer: steps, accumulation, averages, loggers, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from zoo import ResidualBlock

import meristem as ms

pytest.importorskip("lightning")
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

from lightning.pytorch import LightningModule, Trainer  # noqa: E402
from lightning.pytorch.callbacks import EMAWeightAveraging  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from lightning.pytorch.tuner import Tuner  # noqa: E402

from meristem.integrations.lightning import (  # noqa: E402
    GrowthCallback,
    load_from_checkpoint,
)


class Net(LightningModule):
    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.stem = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(ResidualBlock() for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x)
        return out

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), fused=self.hparams["fused"])


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


def loader() -> Any:
    drawn = torch.Generator().manual_seed(0)
    x = torch.randn(48, 4, generator=drawn)
    return DataLoader(
        TensorDataset(x, (x[:, 0] > 0).long()), batch_size=8, generator=drawn
    )


def growing(**options: Any) -> GrowthCallback:
    chosen = {
        "when": ms.when.Every(epochs=1),
        "how": [ms.how.GradMax(), ms.how.ZeroBlock()],
        "amount": {"blocks.0.up": 2, "blocks": 1},
    }
    return GrowthCallback(**{**chosen, **options})


def trained_by(folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    chosen = {"max_epochs": 2, "logger": False}
    return Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **{**chosen, **options},  # type: ignore[arg-type]
    )


def fitted(
    folder: Path, module: Any, *callbacks: Any, resumed: Any = None, **options: Any
) -> Trainer:
    trainer = trained_by(folder, *callbacks, **options)
    torch.manual_seed(0)
    trainer.fit(module, loader(), ckpt_path=resumed, weights_only=False)
    return trainer


def test_it_grows_steps_count_and_loggers_hear_of_it(tmp_path: Path) -> None:
    module, growth = Net(fused=True), growing()
    logger = CSVLogger(tmp_path)
    fitted(tmp_path, module, growth, accumulate_grad_batches=3, logger=logger)
    assert growth.grower is not None
    # Six batches are two steps, and they are an epoch.
    assert [one.step for one in growth.grower.history] == [2, 4]
    assert len(module.blocks) == 4
    assert module.blocks[0].up.out_features == 16
    told = Path(logger.log_dir, "metrics.csv").read_text()
    assert "growth/blocks.0.up" in told
    assert "growth/parameters" in told


def test_manual_optimization_needs_a_loss(tmp_path: Path) -> None:
    def loss(module: Any, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(module(batch[0]), batch[1])

    module = Manual()
    fitted(tmp_path, module, growing(loss=loss))
    assert len(module.blocks) == 4
    with pytest.raises(ms.DataError, match="pass loss= to GrowthCallback"):
        fitted(tmp_path, Manual(), growing())


class Tuned(Net):
    def __init__(self, lr: float = 1e-3) -> None:
        super().__init__()
        self.lr = lr

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def test_the_learning_rate_finder_finds_before_it_grows(tmp_path: Path) -> None:
    module, growth = Tuned(), growing()
    trainer = trained_by(tmp_path, growth, max_epochs=4)
    Tuner(trainer).lr_find(module, loader(), num_training=20)
    assert module.lr != 1e-3
    assert len(module.blocks) == 2
    fitted(tmp_path, module, growth, max_epochs=1)
    assert len(module.blocks) == 3


def test_an_average_of_the_weights_follows(tmp_path: Path) -> None:
    module, average = Net(), EMAWeightAveraging(decay=0.9)
    # It swaps the average in at the end.
    fitted(tmp_path, module, average, growing())
    assert average._average_model.module.blocks[0].up.out_features == 16
    assert len(module.blocks) == 4


def test_a_grown_run_with_an_average_resumes(tmp_path: Path) -> None:
    kept = EMAWeightAveraging(decay=0.9)
    trainer = fitted(tmp_path, Net(), kept, growing())
    path = tmp_path / "stopped.ckpt"
    trainer.save_checkpoint(path)
    # Nothing is left to train: the average is what was saved.
    again = EMAWeightAveraging(decay=0.9)
    fitted(tmp_path, Net(), again, growing(), resumed=path)
    loaded = again._average_model.state_dict()
    assert loaded.keys() == kept._average_model.state_dict().keys()
    for name, value in kept._average_model.state_dict().items():
        assert torch.equal(loaded[name], value), name
    module = Net()
    fitted(tmp_path, module, again, growing(), resumed=path, max_epochs=3)
    assert len(module.blocks) == 5
    assert len(again._average_model.module.blocks) == 5


def test_a_grown_run_resumes(tmp_path: Path) -> None:
    straight = Net()
    fitted(tmp_path, straight, growing(), max_epochs=4)
    stopped = Net()
    trainer = fitted(tmp_path, stopped, growing())
    path = tmp_path / "stopped.ckpt"
    trainer.save_checkpoint(path)
    again, growth = Net(), growing()
    fitted(tmp_path, again, growth, max_epochs=4, resumed=path)
    assert growth.grower is not None
    assert len(growth.grower.history) == 4
    assert len(again.blocks) == len(straight.blocks) == 6
    shapes = [tuple(p.shape) for p in straight.parameters()]
    assert [tuple(p.shape) for p in again.parameters()] == shapes
    loaded = load_from_checkpoint(Net, path, weights_only=False)
    assert type(loaded) is Net
    x = torch.randn(3, 4)
    assert torch.equal(loaded(x), stopped(x))
