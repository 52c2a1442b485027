"""Directories of pretrained models, as transformers writes them: read, expanded, written
whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from meristem.core import VERSION
from meristem.core.change import Plan
from meristem.core.errors import CheckpointError, VerificationError
from meristem.core.growth import Growth
from meristem.event.steps import Methods
from meristem.integrations.following import needs
from meristem.pretrained.expand import At, example_of, expand_, expansion, positions_of
from meristem.pretrained.words import wishes
from meristem.structure.undisturbed import undisturbed

TEXT = (
    "The tissue in which a plant grows is called a meristem. It stands at the tips of "
    "shoots and roots, and its cells divide as long as the plant lives."
)
"""What a language model reads before and after, through its own tokenizer."""
EXACT = 1e-5
"""Of the largest output: what counts as rounding in single precision."""
STEPS = 2
"""Rounding steps of a coarser dtype that count as such."""
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
# Of the old sizes, in forms that are not written.
_OTHER_WEIGHTS = ("*.h5", "*.msgpack", "*.index.json", "*.gguf", "onnx", "openvino")
# Files that are written anew; everything else is copied as it is.
_WRITTEN = ("config.json", "README.md", "model.safetensors.index.json")
Told = Callable[[str], None]


@dataclass(frozen=True)
class Expanded:
    """What became of a checkpoint.

    Attributes:
        out: Where it stands.
        growth: What was done.
        change: The largest difference of an output on the same input, of the written
            checkpoint against the given one, as a part of the largest output.
    """

    out: Path
    growth: Growth
    change: float


def read(source: Path) -> nn.Module:
    """The model of a directory, in its own dtype.

    Raises:
        CheckpointError: The directory holds no model, or one that cannot be expanded.
    """
    config = _config(source)
    _check_weights(source, config)
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError(needs("transformers", "transformers")) from error
    named = config.get("architectures") or []
    kind = getattr(transformers, named[0], None) if len(named) == 1 else None
    if kind is None:
        raise CheckpointError(
            f"{source / 'config.json'} must name one architecture of this version of "
            f"transformers; it names {', '.join(named) or 'none'}. hint: expand_ grows "
            "any model that you can build"
        )
    try:
        model, told = kind.from_pretrained(
            source, dtype="auto", local_files_only=True, output_loading_info=True
        )
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{source} cannot be loaded: {error}") from error
    if told["missing_keys"]:
        raise CheckpointError(
            f"{source} lacks {len(told['missing_keys'])} weights of its model, as "
            f"{min(told['missing_keys'])}: every load would draw others"
        )
    read_model: nn.Module = model.eval()
    return read_model


def _config(source: Path) -> dict[str, Any]:
    if not source.is_dir():
        raise CheckpointError(f"{source} is no directory")
    try:
        config: dict[str, Any] = json.loads((source / "config.json").read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"{source} holds no pretrained model: config.json is missing"
        ) from None
    except ValueError as error:
        raise CheckpointError(
            f"{source / 'config.json'} is not readable: {error}"
        ) from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{source / 'config.json'} holds no table")
    return config


def _check_weights(source: Path, config: Mapping[str, Any]) -> None:
    """Raise where there are no weights, or none that can be told from rounding."""
    if "quantization_config" in config:
        raise CheckpointError(
            f"{source} holds quantised weights, whose new entries would share the scales "
            "of old ones. hint: expand the model that was quantised"
        )
    files = [file for pattern in _WEIGHTS for file in sorted(source.glob(pattern))]
    if not files:
        raise CheckpointError(
            f"{source} holds no weights: neither *.safetensors nor pytorch_model*.bin"
        )
    dtypes: dict[str, str] = {}
    for file in files:
        if file.suffix != ".safetensors":
            continue
        for name, dtype in _dtypes(file):
            if dtype.startswith(("F", "BF")):
                dtypes.setdefault(dtype, name)
    if len(dtypes) > 1:
        (one, first), (other, second) = list(dtypes.items())[:2]
        raise CheckpointError(
            f"{source} mixes dtypes: {first} is {one} and {second} is {other}. hint: "
            "load it in one of them, and save it"
        )


def _dtypes(file: Path) -> list[tuple[str, str]]:
    """The tensors of a file with their dtypes, from its head alone."""
    try:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
            return [(name, opened.get_slice(name).get_dtype()) for name in names]
    except SafetensorError as error:
        raise CheckpointError(f"{file} is not readable: {error}") from error


def example_from(
    source: Path, model: nn.Module, tell: Told = lambda line: None
) -> dict[str, Tensor]:
    """A call of a model: a text through its tokenizer, where it has one."""
    call = example_of(model)
    files = ("tokenizer.json", "tokenizer_config.json")
    if "input_ids" in call and any((source / file).is_file() for file in files):
        tokens = _tokens(source, tell)
        words = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
        if tokens is not None and int(tokens.max()) >= words:
            tell(
                "random tokens are compared: the tokenizer has words that the model lacks"
            )
            tokens = None
        if tokens is not None:
            # Of a text as long as the model reads.
            tokens = tokens[:, : max(positions_of(model), 1)]
            call["input_ids"] = tokens
            if "decoder_input_ids" in call:
                call["decoder_input_ids"] = tokens[:, : tokens.shape[1] // 2]
    return call


def _tokens(source: Path, tell: Told) -> Tensor | None:
    """A text in a model's own words; None where its tokenizer cannot be made here."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    except Exception as error:  # a tokenizer is code of another package
        reason = str(error).strip().partition("\n")[0]
        tell(f"random tokens are compared: the tokenizer cannot be made ({reason})")
        return None
    tokens: Tensor = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    return tokens


def plan_checkpoint(
    source: Path, to: str, how: Methods = None, at: At = "even"
) -> Plan:
    """The dry run of `expand_checkpoint`."""
    source = Path(source)
    wishes(to)
    model = read(source)
    return expansion(model, to, example_from(source, model), how, at)


def expand_checkpoint(
    source: Path,
    to: str,
    out: Path,
    how: Methods = None,
    at: At = "even",
    tell: Told = lambda line: None,
) -> Expanded:
    """Write an expanded copy of a pretrained model's directory.

    `from_pretrained` of the copy gives the outputs of the source: the copy is loaded
    once more and compared before it gets its name. Whatever happens on the way, the
    directory is absent or whole.

    Args:
        source: A directory with config.json and weights.
        to: Words and sizes, as of `meristem.expand_`.
        how: The method, or one by kind of axis, as of `meristem.expand_`.
        at: Where new blocks go, as of `meristem.expand_`.
        out: The directory to write; it must not exist.
        tell: Hears what is done.

    Raises:
        CheckpointError: The source holds no such model, or the target exists.
        GrowthRefused: As of `expand_`.
        VerificationError: What was written gives other outputs.
    """
    source, out = Path(source), Path(out)
    wishes(to)
    if out.exists():
        raise CheckpointError(f"{out} exists. hint: name a directory that does not")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be made: {error}") from error
    model = read(source)
    call = example_from(source, model, tell)
    with _without_name(out) as draft:
        before = _outputs(model, call)
        growth = expand_(model, to, call, how, at=at)
        for name, after in growth.after.items():
            tell(f"{name}: {growth.before[name]} -> {after}")
        tell("parameters: {:,} -> {:,}".format(*growth.parameters))
        grown = _outputs(model, call)
        _save(model, draft, source)
        kind: Any = type(model)
        del model
        _copy_rest(source, draft)
        _write_card(source, draft, to, growth)
        again = kind.from_pretrained(draft, dtype="auto", local_files_only=True)
        written = _outputs(again.eval(), call)
        for one, other in zip(grown, written, strict=True):
            # Kernels add in another order where weights lie otherwise in memory.
            rounding = max(STEPS * torch.finfo(one.dtype).eps, EXACT)
            if not _change(one, other) <= rounding:
                raise VerificationError(
                    f"{source}: what was written gives other outputs than the grown "
                    f"model, by {_change(one, other):.1e} of the largest; nothing was "
                    "kept. hint: this is a fault of meristem's"
                )
        change = max(_change(*pair) for pair in zip(before, written, strict=True))
    return Expanded(out, growth, change)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


@contextmanager
def _without_name(out: Path) -> Iterator[Path]:
    """A directory that gets its name when it is whole."""
    for left in out.parent.glob(f".{out.name}.part-*"):
        number = left.name.rpartition("-")[2]
        if number.isdigit() and not _is_running(int(number)):
            shutil.rmtree(left, ignore_errors=True)
    draft = out.parent / f".{out.name}.part-{os.getpid()}"
    draft.mkdir()
    try:
        yield draft
        os.replace(draft, out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _outputs(model: nn.Module, call: Mapping[str, Tensor]) -> list[Tensor]:
    with undisturbed(), torch.no_grad():
        given = model(**call)
    return [
        v for v in given.values() if isinstance(v, Tensor) and v.is_floating_point()
    ]


def _change(before: Tensor, after: Tensor) -> float:
    """The largest difference where both have entries: classes may have come."""
    old = after[tuple(slice(size) for size in before.shape)]
    largest = before.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((old.double() - before.double()).abs().max() / largest)


def _save(model: Any, draft: Path, source: Path) -> None:
    """Weights in shards as large as those of the source, where it has several."""
    sizes = [file.stat().st_size for file in source.glob("*.safetensors")]
    options = {"max_shard_size": max(sizes)} if len(sizes) > 1 else {}
    model.save_pretrained(draft, **options)


def _copy_rest(source: Path, draft: Path) -> None:
    """Tokenizers, generation configs and what else lies there, as it is."""
    for file in source.iterdir():
        weights = any(file.match(pattern) for pattern in (*_WEIGHTS, *_OTHER_WEIGHTS))
        if weights or file.name in _WRITTEN:
            continue
        if file.is_dir():
            shutil.copytree(file, draft / file.name, dirs_exist_ok=True)
        else:
            shutil.copy2(file, draft / file.name)


def _write_card(source: Path, draft: Path, to: str, growth: Growth) -> None:
    """The model card with a line of what this model came from."""
    card = source / "README.md"
    text = card.read_text() if card.is_file() else ""
    rows = []
    for name, after in growth.after.items():
        rows.append(f"| {name} | {growth.before[name]} | {after} |")
    before, after = growth.parameters
    entry = [
        "## Expanded with Meristem",
        f"Expanded from `{source.name}` by `meristem expand --to {to}` ({VERSION}): "
        f"{before:,} -> {after:,} parameters, with the outputs of the model that it came "
        f"from (largest change {growth.max_change:.1e}).",
        "| axis | before | after |\n|---|---|---|\n" + "\n".join(rows),
    ]
    head = f"{text.rstrip()}\n\n" if text else ""
    (draft / "README.md").write_text(head + "\n\n".join(entry) + "\n")
