"""Growth in loops on Hugging Face Accelerate: its checkpoints hold the growths."""

from __future__ import annotations

from typing import Any

from meristem.checkpoint import regrow_
from meristem.grower import Grower
from meristem.integrations.following import read_lineage, write_lineage


def register_growth(accelerator: Any, grower: Grower) -> None:
    """Let `accelerator.save_state` and `load_state` carry what a grower does.

    The growths stand beside the weights, and a freshly prepared model takes their shapes
    before its weights are loaded; the grower's clock goes with the rest of the state.

    Args:
        accelerator: The `Accelerator` that prepared the model and its optimizers.
        grower: A `meristem.Grower` over them.

    Examples:
        >>> from accelerate import Accelerator  # doctest: +SKIP
        >>> register_growth(accelerator, grower)  # doctest: +SKIP
        >>> accelerator.save_state("run")  # doctest: +SKIP
    """

    def save(models: list[Any], weights: list[Any], folder: str) -> None:
        if accelerator.is_main_process:
            write_lineage(folder, grower.model)

    def load(models: list[Any], folder: str) -> None:
        regrow_(grower.host, read_lineage(folder), optimizer=grower.optimizers)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
    accelerator.register_for_checkpointing(grower)
