"""Pretrained architectures, every layer alike: what `expand_` does, and what its config says.

    python benchmarks/expand/run.py                  # 45 architectures of transformers, 20 minutes of one core
    python benchmarks/expand/run.py Llama T5         # some of them
    python benchmarks/expand/run.py --table          # the summary of what has been run

Small random models of each architecture. For every word that the model has (mlp, heads, kv_heads, width, depth,
vocabulary, classes; and the stream with as many more heads, where a config has one number for both), in float32 and in bfloat16: the largest change of an output; whether the model that
from_pretrained gives from save_pretrained's directory gives equal outputs; generate with and without cache, before
and after; a step of AdamW; the old bits after narrowing back. One file per architecture in results/.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "zoo"))

from architectures import ARCHITECTURES  # noqa: E402
from models import make  # noqa: E402
from run import call, change, train  # noqa: E402

import meristem as ms  # noqa: E402

TO = {
    "mlp": "mlp=x1.5",
    "heads": "heads=x2",
    "kv_heads": "kv_heads=x2",
    "width": "width=x1.5",
    "width_and_heads": "width=x1.5,heads=x1.5",
    "depth": "depth=+1",
    "vocabulary": "vocabulary=+8",
    "classes": "classes=+3",
}
EXACT = 1e-5
STEPS = 2
"""Rounding steps of bfloat16 that count as rounding, of the largest output."""


def made(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model, example = make(f"transformers/{name}")
    if dtype != torch.float32:
        # As users get one: what is computed in the constructor stays in float32.
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            model = type(model).from_pretrained(folder, dtype=dtype)
    if isinstance(example, dict):
        for key, value in example.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                example[key] = value.to(dtype)
    return model, example


def given(model: Any, example: Any) -> list[Tensor]:
    """What a model gives; no loss, which is another one over more classes."""
    return [output for output in call(model, example) if output.dim()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def written(model: Any, example: Any) -> list[Tensor]:
    """What the model gives that comes back from a directory."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        dtype = next(model.parameters()).dtype
        return call(type(model).from_pretrained(folder, dtype=dtype), example)


def generated(model: Any, example: Any, cached: bool) -> Any:
    """Tokens, where the model makes any."""
    if not getattr(model, "can_generate", lambda: False)():
        return None
    tokens = dict(example) if isinstance(example, dict) else {"input_ids": example}
    for key in ("labels", "use_cache"):
        tokens.pop(key, None)
    torch.manual_seed(0)
    return model.generate(
        **tokens, max_new_tokens=4, do_sample=False, use_cache=cached, pad_token_id=0
    ).tolist()


def equal_tokens(model: Any, example: Any, before: dict[bool, Any]) -> bool:
    return all(
        generated(model, example, cached) == tokens for cached, tokens in before.items()
    )


def expand(name: str, word: str, dtype: torch.dtype) -> dict[str, Any]:
    model, example = made(name, dtype)
    bits = {k: v.clone() for k, v in model.state_dict().items()}
    try:
        before = given(model, example)
    except RuntimeError as error:
        return {"refused": f"the model itself does not run in {dtype}: {error}"}
    tokens = {cached: generated(model, example, cached) for cached in (True, False)}
    started = time.process_time()
    try:
        growth = ms.expand_(model, TO[word], example)
    except ms.MeristemError as refusal:
        return {"refused": str(refusal)}
    result: dict[str, Any] = {
        "seconds": round(time.process_time() - started, 2),
        "axes": growth.added,
        "change": change(before, given(model, example)),
        "from_pretrained": same(call(model, example), written(model, example)),
        "generates": equal_tokens(model, example, tokens)
        if word != "vocabulary"
        else True,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    train(model, example, optimizer)
    result["trains"] = all(bool(torch.isfinite(p).all()) for p in model.parameters())
    result["kept_bits"] = kept(name, word, dtype, bits)
    return result


def kept(name: str, word: str, dtype: torch.dtype, bits: dict[str, Tensor]) -> float:
    """The part of the old tensors that has its bits after narrowing back."""
    fresh, example = made(name, dtype)
    fresh.load_state_dict(bits)
    growth = ms.expand_(fresh, TO[word], example)
    ms.narrow_(
        fresh, {axis: list(units) for axis, units in growth.units().items()}, example
    )
    state = fresh.state_dict()
    equal = [
        k
        for k, v in bits.items()
        if v.shape == state[k].shape and torch.equal(v, state[k])
    ]
    return len(equal) / len(bits)


def examine(name: str, words: list[str]) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    path = HERE / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    record: dict[str, Any] = (
        json.loads(path.read_text()) if path.exists() else {"name": name}
    )
    for word in words or TO:
        for dtype in (torch.float32, torch.bfloat16):
            key = f"{word} {str(dtype).removeprefix('torch.')}"
            try:
                record[key] = expand(name, word, dtype)
            except Exception as error:
                record[key] = {"crash": f"{type(error).__name__}: {error}"[:300]}
            if "refused" in record[key]:
                break
    path.write_text(json.dumps(record, indent=1))
    print(
        name, {k: verdict(k, v) for k, v in record.items() if k != "name"}, flush=True
    )


def verdict(key: str, found: dict[str, Any]) -> str:
    if "crash" in found:
        return "crash"
    if "refused" in found:
        return "refused"
    step = torch.finfo(torch.bfloat16).eps
    bound = EXACT if key.endswith("float32") else STEPS * step
    wrong = [
        one for one in ("from_pretrained", "generates", "trains") if not found[one]
    ]
    if not found["change"] <= bound:
        wrong.append(f"change {found['change']:.1e}")
    # The norms of a stream are scaled, and scaled back.
    if found["kept_bits"] < 1 and not key.startswith("width"):
        wrong.append(f"bits {found['kept_bits']:.2f}")
    return ", ".join(wrong) or "equal"


def table() -> None:
    counts: dict[str, Counter[str]] = {}
    for path in sorted((HERE / "results").glob("*.json")):
        record = json.loads(path.read_text())
        for key, found in record.items():
            if key != "name":
                counts.setdefault(key, Counter())[verdict(key, found)] += 1
    for key, counter in counts.items():
        print(f"| {key} | {dict(counter)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument(
        "--word", action="append", default=[], help="of TO; all by default"
    )
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--one", action="store_true", help="in this process")
    asked = parser.parse_args()
    if asked.table:
        return table()
    for name in asked.names or list(ARCHITECTURES):
        if asked.one:
            examine(name, asked.word)
        else:
            subprocess.run(
                [sys.executable, __file__, "--one", name], timeout=600, check=False
            )
    return None


if __name__ == "__main__":
    main()
