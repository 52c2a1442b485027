"""The rank of LoRA adapters is raised in the middle of training; Adam's moments stay.

python examples/lora_rank.py
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import meristem as ms

torch.manual_seed(0)
torch.set_num_threads(1)
base = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
)
adapters = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
model = get_peft_model(base, adapters)
optimizer = torch.optim.AdamW(
    [p for p in model.parameters() if p.requires_grad], lr=1e-2
)
tokens = torch.randint(128, (8, 32))


def train(steps: int) -> float:
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


print(f"rank 4: loss {train(30):.3f}")
growth = ms.expand_(model, "lora_rank=+4", {"input_ids": tokens}, optimizer=optimizer)
print(growth)
assert growth.max_change < 1e-5
weight = model.get_parameter(
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
)
moments = optimizer.state[weight]["exp_avg"]
print(
    f"{tuple(weight.shape)}, first moment of the old rows: {moments[:4].abs().mean():.1e}"
)
assert moments[:4].abs().sum() > 0
print(f"rank 8: loss {train(30):.3f}")
