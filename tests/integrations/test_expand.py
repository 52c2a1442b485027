"""Pretrained models grow in every layer, and their directories say so."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import meristem as ms

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
GPT = {"vocab_size": 40, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 32}
T5 = {
    "vocab_size": 40,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
}
IMAGE = {**SMALL, "image_size": 16, "patch_size": 8}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", GROUPED),
    "gemma2": ("Gemma2ForCausalLM", {**GROUPED, "head_dim": 8}),
    "qwen2": ("Qwen2ForCausalLM", GROUPED),
    "gpt2": ("GPT2LMHeadModel", GPT),
    "bert": ("BertForSequenceClassification", SMALL),
    "t5": ("T5ForConditionalGeneration", T5),
    # Its stream is as wide as its heads together.
    "t5_even": ("T5ForConditionalGeneration", {**T5, "tie_word_embeddings": False}),
    "vit": ("ViTForImageClassification", IMAGE),
}


def made(kind: str) -> Any:
    torch.manual_seed(0)
    name, options = KINDS[kind]
    model_class = getattr(transformers, name)
    config = model_class.config_class(pad_token_id=0, **options)
    return model_class(config).eval()


def call_of(model: Any) -> dict[str, Any]:
    drawn = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=drawn)}
    tokens = torch.randint(1, 40, (2, 7), generator=drawn)
    call = {"input_ids": tokens}
    if model.config.is_encoder_decoder:
        call["decoder_input_ids"] = tokens[:, :4]
    return call


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**call_of(model)).logits
    return found


CASES = [
    ("llama", "mlp=x1.5,depth=+2"),
    ("llama", "heads=x2"),
    pytest.param(*("llama", "kv_heads=+2"), marks=pytest.mark.slow),
    ("llama", "width=x1.5"),
    pytest.param(*("llama", "vocabulary=+8,mlp=64"), marks=pytest.mark.slow),
    pytest.param(*("gemma2", "depth=+3"), marks=pytest.mark.slow),
    pytest.param(*("gemma2", "heads=x2,mlp=+16"), marks=pytest.mark.slow),
    pytest.param(*("qwen2", "heads=x2"), marks=pytest.mark.slow),
    ("gpt2", "mlp=x1.5,depth=x1.5"),
    pytest.param(*("gpt2", "vocabulary=+3"), marks=pytest.mark.slow),
    ("bert", "classes=+3,mlp=x2"),
    pytest.param(*("t5", "depth=+1,mlp=+8"), marks=pytest.mark.slow),
    pytest.param("t5", "heads=x2", marks=pytest.mark.slow),
    pytest.param("t5_even", "width=x1.5", marks=pytest.mark.slow),
    ("vit", "depth=+1,classes=+1"),
]


@pytest.mark.parametrize(("kind", "to"), CASES)
def test_outputs_stay_and_from_pretrained_gives_them_back(
    kind: str, to: str, tmp_path: Path
) -> None:
    model = made(kind)
    before = logits(model)
    optimizer = torch.optim.AdamW(model.parameters())
    growth = ms.expand_(model, to, call_of(model), optimizer=optimizer)
    after = logits(model)
    kept = after[tuple(slice(size) for size in before.shape)]
    assert (kept - before).abs().max() < 1e-5 * before.abs().max()
    assert not growth.stale
    model.save_pretrained(tmp_path / "hf")
    again = type(model).from_pretrained(tmp_path / "hf")
    assert torch.equal(logits(again), after)
    # And by a checkpoint of ours, from the old size.
    ms.save(tmp_path / "own", model, optimizer=optimizer)
    loaded = ms.load(tmp_path / "own", made(kind))
    assert torch.equal(logits(loaded), after)
    for key, value in loaded.config.to_dict().items():
        # What save_pretrained has written into the other one.
        if key not in ("architectures", "dtype"):
            assert model.config.to_dict()[key] == value, key
    model.train()(**call_of(model)).logits.square().mean().backward()
    optimizer.step()


def test_a_second_model_and_a_model_inside_follow(tmp_path: Path) -> None:
    model = made("llama")
    average = copy.deepcopy(model)
    growth = ms.expand_(model, "width=x1.5", call_of(model))
    ms.replay_(growth, average)
    average.save_pretrained(tmp_path / "average")
    again = type(model).from_pretrained(tmp_path / "average")
    assert again.config.rms_norm_eps == model.config.rms_norm_eps < 1e-6
    assert torch.equal(logits(again), logits(average))

    class Holder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm = made("llama")

        def forward(self, tokens: torch.Tensor) -> Any:
            return self.lm(input_ids=tokens).logits

    outer = Holder()
    tokens = call_of(model)["input_ids"]
    ms.expand_(outer, "width=x1.5,depth=+1", tokens)
    outer.lm.save_pretrained(tmp_path / "inner")
    again = type(model).from_pretrained(tmp_path / "inner")
    assert torch.equal(logits(again), logits(outer.lm))
    with pytest.raises(
        ms.GrowthRefused, match="not a multiple of the number of attention"
    ):
        ms.expand_(outer, "heads=+6", tokens)


def test_classes_keep_their_names() -> None:
    model = made("bert")
    model.config.id2label = {0: "bad", 1: "good"}
    model.config.label2id = {"bad": 0, "good": 1}
    ms.expand_(model, "classes=+1", call_of(model))
    assert model.config.id2label == {0: "bad", 1: "good", 2: "LABEL_2"}
    assert model.config.label2id == {"bad": 0, "good": 1, "LABEL_2": 2}


@pytest.mark.slow
def test_blocks_and_widths_together_where_blocks_have_types(tmp_path: Path) -> None:
    model = made("gemma2")
    before = logits(model)
    ms.expand_(model, "depth=+2,mlp=x1.25", call_of(model))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.allclose(logits(again), before, atol=1e-6)


@pytest.mark.parametrize(
    ("at", "reason"),
    [
        ([0], 'at is "even"'),
        ([1, 1], 'at is "even"'),
        ([True], 'at is "even"'),
        (3, 'at is "even"'),
        ("start", 'at is "even"'),
        ([1], "names 1 places"),
        ([1, 9], "behind at most 9 blocks; model.layers has 4 blocks and gets 2"),
    ],
)
def test_places_that_there_are_not(at: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ms.expand_(made("llama"), "depth=+2", at=at)
    with pytest.raises(ValueError, match="places its blocks itself"):
        ms.expand_(made("llama"), "depth=+2", None, ms.how.Stack(), at=[1, 2])


def test_generate_gives_the_same_tokens() -> None:
    model, x = made("llama"), {"input_ids": torch.tensor([[3, 5, 8]])}
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    before = [model.generate(**x, **options, use_cache=one) for one in (True, False)]
    ms.expand_(model, "depth=+2,heads=x2,mlp=x1.5")
    after = [model.generate(**x, **options, use_cache=one) for one in (True, False)]
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)


REFUSALS = [
    ("llama", "deepth=+2", "'deepth' is no word of all layers. Did you mean 'depth'"),
    ("llama", "depth=2x", "'depth=2x' is no growth. hint: write depth=\\+4"),
    ("llama", "depth=+1.5", "is no growth"),
    ("llama", "depth=+1,depth=+2", "named twice"),
    ("llama", "depth=+1,", "a part of .* is empty"),
    ("llama", "depth=4", "does not make model.layers larger than its 4"),
    ("llama", "heads=+1", "in steps of 2"),
    ("llama", "classes=+1", "this model has no classes to grow"),
    ("gemma2", "heads=+2", "Gemma2Config cannot say"),
    ("gpt2", "heads=+1", "GPT2Config cannot say the growth"),
    ("gpt2", "width=+8", "GPT2Config cannot say the growth"),
    (
        "gemma2",
        "width=x1.5",
        "Gemma2Config cannot say this growth: .*scalar_embed_scale",
    ),
    ("bert", "depth=+1", "no new block of it leaves the function as it is"),
]


def test_a_plan_says_what_no_config_can() -> None:
    model = made("llama")
    example = {"input_ids": torch.arange(8).view(2, 4)}
    one = ms.plan(model, {"model.layers.0.mlp.gate_proj": 8}, example)
    assert one
    assert "LlamaConfig cannot say" in str(one)
    assert "LlamaConfig cannot say" in str(ms.Plan.from_json(one.json()))
    every = {f"model.layers.{i}.mlp.gate_proj": 8 for i in range(4)}
    assert ms.plan(model, every, example).unsaid is None


def heard_or_seen(kind: str) -> Any:
    torch.manual_seed(0)
    tower = {key: SMALL[key] for key in SMALL if key != "max_position_embeddings"}
    if kind == "clip":
        text = {**SMALL, "eos_token_id": 39, "pad_token_id": 0, "bos_token_id": 1}
        vision = {**tower, "image_size": 16, "patch_size": 8}
        config = transformers.CLIPConfig(
            text_config=text, vision_config=vision, projection_dim=16
        )
        return transformers.CLIPModel(config).eval()
    if kind == "wav2vec2":
        config = transformers.Wav2Vec2Config(
            **tower, conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3),
            num_feat_extract_layers=2, num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2, do_stable_layer_norm=True,
        )  # fmt: skip
        return transformers.Wav2Vec2ForSequenceClassification(config).eval()
    config = transformers.WhisperConfig(
        vocab_size=40, d_model=32, encoder_layers=2, decoder_layers=2, num_mel_bins=8,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_ffn_dim=48, max_source_positions=12, max_target_positions=16,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config).eval()


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("clip", torch.float32),
        ("wav2vec2", torch.bfloat16),
        ("whisper", torch.bfloat16),
    ],
)
def test_what_hears_and_sees_needs_no_example(kind: str, dtype: torch.dtype) -> None:
    model = heard_or_seen(kind).to(dtype)
    growth = ms.expand_(model, "mlp=x1.5")
    assert growth.max_change < 3 * torch.finfo(dtype).eps
    again = type(model)(model.config)
    shapes = [p.shape for p in model.parameters()]
    assert [p.shape for p in again.parameters()] == shapes


@pytest.mark.parametrize(("kind", "to", "reason"), REFUSALS)
def test_what_cannot_be_said_is_refused_and_nothing_changes(
    kind: str, to: str, reason: str
) -> None:
    model = made(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config.to_dict()
    with pytest.raises(ms.GrowthRefused, match=reason):
        ms.expand_(model, to, call_of(model))
    assert model.config.to_dict() == config
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_method_that_is_named_deepens_what_no_silent_block_can() -> None:
    model = made("bert")
    growth = ms.expand_(model, "depth=+2", call_of(model), ms.how.Stack())
    assert growth.max_change > 0
    assert model.config.num_hidden_layers == 6


@pytest.mark.parametrize(
    ("at", "new"),
    [
        ("even", [2, 5]),
        ("middle", [2, 4]),
        ("end", [4, 5]),
        ([1, 4], [1, 5]),
    ],
)
def test_blocks_stand_where_they_are_wanted(at: Any, new: list[int]) -> None:
    model = made("llama")
    growth = ms.expand_(model, "depth=+2", at=at)
    assert growth.blocks == {"model.layers": new}
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [*range(6)]


def test_new_words_start_near_the_mean_or_as_given() -> None:
    model = made("llama")
    old = model.model.embed_tokens.weight.detach().clone()
    given = {"lm_head.weight": torch.full((4, 32), 0.5)}
    growth = ms.expand_(model, "vocabulary=+4", vectors=given)
    rows = growth.rows["model.embed_tokens:vocabulary"]
    assert rows == [40, 41, 42, 43]
    new = model.model.embed_tokens.weight.detach()[rows]
    assert (new - old.mean(0)).std() < 0.2 * old.std()
    assert torch.equal(model.lm_head.weight[rows], given["lm_head.weight"])
    with pytest.raises(ms.GrowthRefused, match="must hold 2 rows of shape"):
        ms.expand_(model, "vocabulary=+2", vectors=given)
    with pytest.raises(ms.GrowthRefused, match="of which nothing grows"):
        ms.expand_(model, "mlp=+2", vectors=given)


def test_nothing_comes_in_front_of_a_head_that_is_tied_by_its_name() -> None:
    assert "lm_head:depth" in ms.find_axes(made("llama"), call_of(made("llama")))
    assert "lm_head:depth" not in ms.find_axes(made("gpt2"), call_of(made("gpt2")))


def test_llama_pro_trains_only_what_is_new() -> None:
    model = made("llama")
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    growth = ms.expand_(model, "depth=+2")
    new = ms.new_parameters(growth)
    assert all(name.startswith(("model.layers.2.", "model.layers.5.")) for name in new)
    assert "18 new parameters" in repr(new)
    ms.freeze_old_(model, ms.young(growth))
    optimizer = torch.optim.AdamW(new.values(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        model(**call_of(model)).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for place, now in zip((0, 1, 2, 3), (0, 1, 3, 4), strict=True):
        for name, value in model.model.layers[now].named_parameters():
            assert torch.equal(value, old[f"model.layers.{place}.{name}"])
    assert model.model.layers[2].mlp.down_proj.weight.abs().max() > 0


def meristem(*words: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "meristem.cli", "expand", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "llama"
    made("llama").to(torch.bfloat16).save_pretrained(folder, max_shard_size="20kB")
    (folder / "README.md").write_text("# A model\n")
    (folder / "tokenizer_notes.txt").write_text("kept")
    return folder


def test_a_directory_becomes_a_directory(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "larger"
    done = meristem(source, "--to", "depth=+2,mlp=x1.5", "--out", out, "--at", "2,4")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}\n"
    assert "model.layers: 4 -> 6" in done.stderr
    assert "largest change of an output: 0.0e+00" in done.stderr
    config = json.loads((out / "config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (6, 72)
    assert (out / "tokenizer_notes.txt").read_text() == "kept"
    assert len(list(out.glob("*.safetensors"))) > 1
    card = (out / "README.md").read_text()
    assert card.startswith("# A model\n\n## Expanded with Meristem")
    first, second = (
        transformers.AutoModelForCausalLM.from_pretrained(one, dtype="auto")
        for one in (source, out)
    )
    assert second.dtype == torch.bfloat16
    assert torch.equal(logits(first), logits(second))
    again = meristem(source, "--to", "depth=+1", "--out", out)
    assert again.returncode == 2
    assert "exists" in again.stderr


@pytest.mark.slow
def test_a_billion_parameters(tmp_path: Path) -> None:
    """In a process of its own, whose memory is told: the model once, and little more."""
    config = transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, vocab_size=32000,
        num_attention_heads=32, num_key_value_heads=4, dtype="bfloat16",
    )  # fmt: skip
    source = tmp_path / "llama"
    transformers.LlamaForCausalLM(config).save_pretrained(source, max_shard_size="1GB")
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    code = """if True:
        import resource, sys
        from pathlib import Path
        from meristem.integrations.checkpoints import expand_checkpoint

        done = expand_checkpoint(Path(sys.argv[1]), "depth=+2", Path(sys.argv[2]))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(done.change, peak)
    """
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "out")]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    change, peak = (float(word) for word in told.stdout.split())
    assert change == 0
    assert peak < 1.6 * size


def test_a_plan_says_what_would_change(source: Path) -> None:
    done = meristem(source, "--to", "mlp=x1.5", "--plan")
    assert done.returncode == 0
    assert "model.layers.0.mlp.gate_proj: 48 -> 72" in done.stdout
    assert "config.intermediate_size: 48 -> 72" in done.stdout


def test_a_kill_leaves_no_half_directory(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "larger"
    command = [sys.executable, "-m", "meristem.cli", "expand", str(source)]
    running = subprocess.Popen([*command, "--to", "depth=+2", "--out", str(out)])
    # While it is written.
    while not list(tmp_path.glob(".larger.part-*/*")):
        assert running.poll() is None
        time.sleep(0.001)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    assert not out.exists()
    assert meristem(source, "--to", "depth=+2", "--out", out).returncode == 0
    assert not list(tmp_path.glob(".larger.part-*"))


def spoil_nothing(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()


def spoil_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def spoil_quantised(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (folder / "config.json").write_text(json.dumps(config))


def spoil_dtypes(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = sorted(folder.glob("*.safetensors"))[0]
    weights = load_file(file)
    first = next(iter(weights))
    weights[first] = weights[first].float()
    save_file(weights, file, metadata={"format": "pt"})


def spoil_missing(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in folder.glob("*.safetensors"):
        weights = load_file(file)
        kept = {k: v for k, v in weights.items() if "layers.1.mlp" not in k}
        save_file(kept, file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    names = table["weight_map"].items()
    table["weight_map"] = {k: v for k, v in names if "layers.1.mlp" not in k}
    index.write_text(json.dumps(table))


def spoil_cut(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])


def spoil_table(folder: Path) -> None:
    (folder / "config.json").write_text("[1]")


def spoil_class(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["NoSuchModel"]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_nothing, "holds no weights"),
        (spoil_config, "config.json is not readable"),
        (spoil_quantised, "holds quantised weights"),
        (spoil_dtypes, "mixes dtypes: "),
        (spoil_class, "must name one architecture .*; it names NoSuchModel"),
        (spoil_missing, "lacks 3 weights of its model"),
        (spoil_cut, "is not readable"),
        (spoil_table, "holds no table"),
    ],
)
def test_a_directory_that_cannot_be_expanded_is_told_of(
    spoil: Any, reason: str, source: Path, tmp_path: Path
) -> None:
    from meristem.integrations.checkpoints import expand_checkpoint

    spoil(source)
    with pytest.raises(ms.CheckpointError, match=reason):
        expand_checkpoint(source, "depth=+2", tmp_path / "larger")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["llama"]
