"""A pretrained checkpoint becomes deeper and wider, and gives the outputs that it gave before.

    python examples/expand_checkpoint.py [DIRECTORY]      # by default a small random Llama

What `meristem expand DIRECTORY --to depth=+2,mlp=x1.5 --out NEW` does, from Python.
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import meristem as ms
from meristem.integrations.checkpoints import expand_checkpoint

with tempfile.TemporaryDirectory() as folder:
    source = Path(folder, "llama")
    if len(sys.argv) > 1:
        source = Path(sys.argv[1])
    else:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        LlamaForCausalLM(config).save_pretrained(source)

    done = expand_checkpoint(
        source, "depth=+2,mlp=x1.5", Path(folder, "larger"), tell=print
    )
    old = AutoModelForCausalLM.from_pretrained(source)
    new = AutoModelForCausalLM.from_pretrained(done.out)
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        change = (old(tokens).logits - new(tokens).logits).abs().max().item()
    print(f"{old.num_parameters():,} -> {new.num_parameters():,} parameters")
    print(f"largest change of a logit: {change:.1e}")
    assert change < 1e-5

    # In a program, in place, and then only the new blocks are trained.
    growth = ms.expand_(old, "depth=+2")
    new_parameters = ms.new_parameters(growth)
    print(f"{len(new_parameters)} new tensors in blocks {growth.blocks}")
    optimizer = torch.optim.AdamW(new_parameters.values(), lr=1e-3)
    old(tokens, labels=tokens).loss.backward()
    optimizer.step()
