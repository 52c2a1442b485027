"""transformers' architectures, tiny and with random weights; head models, with labels where they take them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

TEXT: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IMAGE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 8,
    "num_labels": 5,
}
Made = tuple[nn.Module, Any]


def _built(name: str, config: str, settings: Mapping[str, Any]) -> nn.Module:
    package = importlib.import_module("transformers")
    if not hasattr(package, name):
        name = name.replace("ForCausalLM", "LMHeadModel")
    model: nn.Module = getattr(package, name)(getattr(package, config)(**settings))
    return model.eval()


def causal(kind: str, config: str = "", **settings: Any) -> Made:
    """A language model, called without labels."""
    model = _built(
        f"{kind}ForCausalLM", config or f"{kind}Config", {**TEXT, **settings}
    )
    return model, {"input_ids": torch.randint(3, 40, (2, 7)), "use_cache": False}


def classifier(kind: str, **settings: Any) -> Made:
    """An encoder with a classification head, called with labels."""
    model = _built(
        f"{kind}ForSequenceClassification",
        f"{kind}Config",
        {**TEXT, "num_labels": 5, **settings},
    )
    ids = torch.randint(3, 40, (2, 7))
    return model, {"input_ids": ids, "labels": torch.tensor([1, 4])}


def masked(kind: str, **settings: Any) -> Made:
    model = _built(f"{kind}ForMaskedLM", f"{kind}Config", {**TEXT, **settings})
    return model, {"input_ids": torch.randint(3, 40, (2, 7))}


def seq2seq(kind: str, **settings: Any) -> Made:
    model = _built(
        f"{kind}ForConditionalGeneration", f"{kind}Config", {**TEXT, **settings}
    )
    ids = torch.randint(3, 40, (2, 7))
    return model, {
        "input_ids": ids,
        "decoder_input_ids": ids[:, :5],
        "use_cache": False,
    }


def image(kind: str, size: int = 16, bare: bool = False, **settings: Any) -> Made:
    base = {"num_labels": 5} if bare else IMAGE
    model = _built(
        f"{kind}ForImageClassification", f"{kind}Config", {**base, **settings}
    )
    return model, {"pixel_values": torch.randn(2, 3, size, size)}


def base(kind: str, example: Callable[[], Any], **settings: Any) -> Made:
    return _built(f"{kind}Model", f"{kind}Config", settings), example()


def _ids() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, 40, (2, 7))}


def _clip() -> Made:
    text = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}
    config = {"text_config": text, "vision_config": {**IMAGE}, "projection_dim": 16}
    model = _built("CLIPModel", "CLIPConfig", config)
    return model, {**_ids(), "pixel_values": torch.randn(2, 3, 16, 16)}


def _whisper() -> Made:
    settings = {
        "vocab_size": 40,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "num_mel_bins": 8,
        "max_source_positions": 16,
        "max_target_positions": 16,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    }
    model = _built("WhisperForConditionalGeneration", "WhisperConfig", settings)
    features = torch.randn(2, 8, 32)
    return model, {
        "input_features": features,
        "decoder_input_ids": torch.randint(3, 40, (2, 5)),
        "use_cache": False,
    }


def _xlnet() -> Made:
    settings = {
        "vocab_size": 40,
        "d_model": 32,
        "n_layer": 2,
        "n_head": 4,
        "d_inner": 48,
        "num_labels": 5,
    }
    model = _built("XLNetForSequenceClassification", "XLNetConfig", settings)
    return model, {**_ids(), "labels": torch.tensor([1, 4])}


def _wav2vec2() -> Made:
    settings = {
        **TEXT,
        "conv_dim": (16, 16),
        "conv_stride": (4, 2),
        "conv_kernel": (8, 4),
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 2,
        "num_labels": 5,
    }
    model = _built("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", settings)
    return model, {"input_values": torch.randn(2, 200)}


_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_STAGES = {
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "image_size": 32,
    "patch_size": 4,
}

ARCHITECTURES: dict[str, Callable[[], Made]] = {
    "Llama": partial(causal, "Llama"),
    "Mistral": partial(causal, "Mistral"),
    "Mixtral": partial(causal, "Mixtral", num_local_experts=2, num_experts_per_tok=1),
    "Qwen2": partial(causal, "Qwen2"),
    "Qwen3": partial(causal, "Qwen3", head_dim=8),
    "Qwen2Moe": partial(causal, "Qwen2Moe", **_MOE, shared_expert_intermediate_size=24),
    "Gemma": partial(causal, "Gemma", head_dim=8),
    "Gemma2": partial(causal, "Gemma2", head_dim=8),
    "Gemma3": partial(causal, "Gemma3", "Gemma3TextConfig", head_dim=8),
    "Phi": partial(causal, "Phi"),
    "Phi3": partial(causal, "Phi3"),
    "GPT2": partial(causal, "GPT2", **_GPT, n_inner=48),
    "GPTNeo": partial(
        causal,
        "GPTNeo",
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
    ),
    "GPTNeoX": partial(causal, "GPTNeoX"),
    "GPTJ": partial(causal, "GPTJ", **_GPT, rotary_dim=4),
    "GPTBigCode": partial(causal, "GPTBigCode", **_GPT, n_inner=48),
    "CodeGen": partial(causal, "CodeGen", **_GPT, rotary_dim=4),
    "OPT": partial(causal, "OPT", ffn_dim=48, word_embed_proj_dim=32),
    "Bloom": partial(causal, "Bloom", n_layer=2, n_head=4),
    "Falcon": partial(causal, "Falcon"),
    "Olmo": partial(causal, "Olmo"),
    "Olmo2": partial(causal, "Olmo2"),
    "Cohere": partial(causal, "Cohere"),
    "Starcoder2": partial(causal, "Starcoder2"),
    "StableLm": partial(causal, "StableLm"),
    "Granite": partial(causal, "Granite"),
    "Glm": partial(causal, "Glm", head_dim=8),
    "Nemotron": partial(causal, "Nemotron"),
    "Persimmon": partial(causal, "Persimmon"),
    "BioGpt": partial(causal, "BioGpt"),
    "XGLM": partial(
        causal, "XGLM", d_model=32, num_layers=2, attention_heads=4, ffn_dim=48
    ),
    "Mamba": partial(causal, "Mamba", state_size=4),
    "Mamba2": partial(
        causal,
        "Mamba2",
        state_size=4,
        num_heads=8,
        head_dim=8,
        n_groups=2,
        chunk_size=8,
    ),
    "Bert": partial(classifier, "Bert"),
    "Roberta": partial(classifier, "Roberta"),
    "Electra": partial(classifier, "Electra", embedding_size=16),
    "DebertaV2": partial(
        classifier,
        "DebertaV2",
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_buckets=8,
    ),
    "Albert": partial(classifier, "Albert", embedding_size=16),
    "DistilBert": partial(
        classifier, "DistilBert", dim=32, n_layers=2, n_heads=4, hidden_dim=48
    ),
    "MPNet": partial(classifier, "MPNet"),
    "ModernBert": partial(classifier, "ModernBert"),
    "FNet": partial(classifier, "FNet"),
    "ConvBert": partial(classifier, "ConvBert", embedding_size=32),
    "SqueezeBert": partial(classifier, "SqueezeBert", embedding_size=32),
    "BertLM": partial(masked, "Bert"),
    "XLNet": _xlnet,
    "T5": partial(seq2seq, "T5", **_T5),
    "Bart": partial(seq2seq, "Bart", **_BART),
    "Pegasus": partial(seq2seq, "Pegasus", **_BART),
    "Whisper": _whisper,
    "Wav2Vec2": _wav2vec2,
    "CLIP": _clip,
    "ViT": partial(image, "ViT"),
    "DeiT": partial(image, "DeiT"),
    "Beit": partial(image, "Beit"),
    "Dinov2": partial(image, "Dinov2"),
    "Swin": partial(image, "Swin", 32, True, **_STAGES),
    "Swinv2": partial(image, "Swinv2", 32, True, **_STAGES),
    "ConvNext": partial(
        image,
        "ConvNext",
        32,
        True,
        hidden_sizes=[8, 12, 16, 20],
        depths=[2, 2, 2, 2],
        image_size=32,
    ),
    "ResNet": partial(
        image,
        "ResNet",
        32,
        True,
        embedding_size=8,
        hidden_sizes=[8, 12],
        depths=[2, 2],
        layer_type="basic",
    ),
    "Segformer": partial(
        image,
        "Segformer",
        64,
        True,
        hidden_sizes=[8, 16, 24, 32],
        depths=[2, 2, 2, 2],
        num_attention_heads=[1, 2, 2, 4],
    ),
    "MobileViT": partial(
        image,
        "MobileViT",
        64,
        True,
        hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 40],
        num_attention_heads=2,
        image_size=64,
    ),
    "ViTMAE": partial(
        base, "ViTMAE", lambda: {"pixel_values": torch.randn(2, 3, 16, 16)}, **IMAGE
    ),
}
"""By name, what makes one with an example of its call."""
