"""Low-rank adapters, as the peft package makes them: what must follow their ranks.

An adapter adds B A x times alpha / r, or times alpha / sqrt(r). The factor that a layer
holds is computed once more when an adapter is loaded: so that it stays what it is, alpha
follows r. Ranks that differ are told by module, in `rank_pattern` and `alpha_pattern`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from meristem.core.change import AttributeChange, Plan


def adapter_edits(model: nn.Module, plan: Plan) -> list[AttributeChange]:
    """The numbers of adapters that follow a plan."""
    shapes = {change.name: change.after for change in plan.tensors}
    changes: list[AttributeChange] = []
    ranks: dict[str, dict[str, tuple[int, float]]] = {}
    for name, layer in model.named_modules():
        if not _is_adapter(layer):
            continue
        for adapter, old, new in _ranks(name, layer, shapes):
            alpha = layer.lora_alpha[adapter]
            root = getattr(layer, "use_rslora", {}).get(adapter, False)
            followed = _alpha(alpha, (new / old) ** (0.5 if root else 1.0))
            ranks.setdefault(adapter, {})[name] = (new, followed)
            if new != old:
                at = f"lora_alpha.{adapter}"
                changes.append(AttributeChange(name, f"r.{adapter}", old, new))
                changes.append(AttributeChange(name, at, alpha, followed))
    if changes:
        for adapter, by_layer in ranks.items():
            changes += _config_edits(model, adapter, by_layer)
    return changes


def _is_adapter(layer: Any) -> bool:
    held = vars(layer)
    tables = all(isinstance(held.get(one), dict) for one in ("r", "lora_alpha"))
    return tables and "scaling" in held


def _ranks(
    name: str, layer: Any, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, int, int]]:
    """By adapter, the rank that a layer has and will have."""
    for adapter, rank in layer.r.items():
        tables = (("lora_A", ".weight"), ("lora_embedding_A", ""))
        for table, inner in tables:
            tensor = f"{name}.{table}.{adapter}{inner}"
            if adapter in getattr(layer, table, {}):
                yield adapter, rank, shapes.get(tensor, (rank,))[0]


def _alpha(alpha: float, factor: float) -> float:
    scaled = alpha * factor
    return round(scaled) if abs(scaled - round(scaled)) < 1e-9 else scaled


def _config_edits(
    model: nn.Module, adapter: str, by_layer: Mapping[str, tuple[int, float]]
) -> Iterator[AttributeChange]:
    """What the config of an adapter must say, so that it is loaded as it is."""
    configs = getattr(model, "peft_config", None)
    if configs is None:
        return
    config = configs[adapter]
    kinds = list(by_layer.values())
    usual = max(set(kinds), key=kinds.count)
    ranks, alphas = {}, {}
    for name, (rank, alpha) in by_layer.items():
        if (rank, alpha) != usual:
            key = name.removeprefix("base_model.model.")
            ranks[key], alphas[key] = rank, alpha
    said = {
        "r": usual[0],
        "lora_alpha": usual[1],
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }
    for attribute, value in said.items():
        before = getattr(config, attribute)
        if before != value:
            at = f"peft_config.{adapter}.{attribute}"
            yield AttributeChange("", at, before, value)
