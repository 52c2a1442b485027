"""Growth in transformers' Trainer: its own optimizer, accumulation, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import meristem as ms

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from meristem.integrations.transformers import GrowthTrainerCallback  # noqa: E402


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=16,
        )
    )


def examples() -> list[dict[str, Any]]:
    drawn = torch.Generator().manual_seed(0)
    rows = torch.randint(32, (32, 8), generator=drawn)
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer(folder: Path, growth: Any, steps: int, **options: Any) -> Any:
    chosen = {
        "optim": "adamw_torch_fused",
        "save_steps": 4,
        "gradient_accumulation_steps": 2,
    }
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=steps,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=2,
        **{**chosen, **options},
    )
    return Trainer(llama(), arguments, train_dataset=examples(), callbacks=[growth])


def growing() -> Any:
    return GrowthTrainerCallback(
        when=ms.when.Every(steps=3),
        how=[ms.how.GradMax(), ms.how.Stack()],
        amount={"model.layers.0.mlp.gate_proj": 4, "model.layers": 1},
    )


def test_a_run_grows_and_resumes_with_the_right_moments(tmp_path: Path) -> None:
    growth = growing()
    straight = trainer(tmp_path / "a", growth, 8)
    straight.train()
    assert growth.grower is not None
    assert [one.step for one in growth.grower.history] == [3, 6]
    model = straight.model
    assert len(model.model.layers) == 4
    assert model.config.num_hidden_layers == 4
    assert any("growth/parameters" in entry for entry in straight.state.log_history)
    again = growing()
    resumed = trainer(tmp_path / "a", again, 8)
    # Step 4 lies behind the first growth.
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert [one.step for one in again.grower.history] == [3, 6]
    old, new = dict(model.named_parameters()), dict(resumed.model.named_parameters())
    assert list(old) == list(new)
    for name, parameter in old.items():
        assert torch.equal(parameter, new[name]), name
    first, second = straight.optimizer.optimizer, resumed.optimizer.optimizer
    for name, parameter in old.items():
        for key, value in first.state[parameter].items():
            assert torch.equal(value, second.state[new[name]][key]), (name, key)


def test_an_epoch_is_as_many_steps_as_accumulation_leaves(tmp_path: Path) -> None:
    growth = GrowthTrainerCallback(
        when=ms.when.Every(epochs=1), how=ms.how.Random(), amount=4
    )
    trainer(tmp_path, growth, 8, save_strategy="no").train()
    # 32 examples by 4, by 2.
    assert [one.step for one in growth.grower.history] == [4, 8]
