"""The user's loss on a copy of the model: called with other tensors in its place, and checked."""

from __future__ import annotations

import copy
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from meristem.core.errors import DataError, GrowthRefused

Loss = Callable[[nn.Module, Any], Tensor]


class LossModule(nn.Module):
    """`loss(model, batch)` as a module, so that torch can call it with other tensors in the model's place."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Any) -> Tensor:
        return called(self.loss, self.model, batch)


def called(loss: Loss, model: nn.Module, batch: Any) -> Tensor:
    """`loss(model, batch)` on a shallow copy of the batch: growth batches are read more than once, and a loss may pop."""
    return loss(model, copy.copy(batch) if isinstance(batch, (list, MutableMapping)) else batch)


def measured(call: Callable[[], Tensor], training: bool = False) -> Tensor:
    """The loss that `call` gives on a copy of the model; raises our own errors where it fails or is not finite."""
    mode = "train" if training else "eval"
    # Without this a cast that autocast has kept would outlive a step of the weights: our own context keeps its cache open.
    torch.clear_autocast_cache()
    try:
        loss = call()
    except Exception as error:
        if "more than 1 value per channel" in str(error):
            raise DataError(
                "a batch norm cannot train on a batch with one value per channel; nothing was changed. hint: use a "
                "larger batch size, or drop_last=True where only the last batch is that small"
            ) from error
        raise GrowthRefused(
            f"the loss fails on a copy of the model in {mode} mode ({type(error).__name__}: {error}); nothing was "
            "changed. hint: a weight that only the loss uses does not grow; let the model's forward use it"
        ) from error
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        received = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise DataError(f"loss(model, batch) must return a scalar tensor; got {received}; nothing was changed")
    if not bool(torch.isfinite(loss)):
        raise DataError(f"the loss of a growth batch is {loss.item()}; nothing was changed")
    return loss
