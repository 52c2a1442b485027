"""Growth in transformers' Trainer: one callback deepens a small Llama while it trains.

python examples/trainer_growth.py
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import meristem as ms
from meristem.integrations.transformers import GrowthTrainerCallback

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
)
rows = torch.arange(40).repeat(64, 1) + torch.randint(24, (64, 1))
data = [{"input_ids": row, "labels": row} for row in rows]
growing = GrowthTrainerCallback(
    when=ms.when.At("10 steps"),
    how=ms.how.Interpose(zero=True),
    amount={"model.layers": 2},
)
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        max_steps=20,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=5,
    )
    Trainer(model, arguments, train_dataset=data, callbacks=[growing]).train()
print(
    f"{len(model.model.layers)} layers; the config says {model.config.num_hidden_layers}"
)
assert len(model.model.layers) == 4
