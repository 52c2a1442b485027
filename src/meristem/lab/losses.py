"""The user's loss on a copy of the model: the one place that runs it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from meristem.core.errors import DataError, GrowthRefused

Loss = Callable[[nn.Module, Any], Tensor]


class _LossModule(nn.Module):
    """`loss(model, batch)` as a module, so that torch can call it with other tensors."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Any) -> Tensor:
        return called(self.loss, self.model, batch)


def called(loss: Loss, model: nn.Module, batch: Any) -> Tensor:
    """`loss(model, batch)` on a shallow copy of the batch.

    Growth batches are read more than once, and a loss may pop.
    """
    if isinstance(batch, (list, MutableMapping)):
        batch = copy.copy(batch)
    return loss(model, batch)


def evaluate(
    loss: Loss,
    model: nn.Module,
    batch: Any,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    training: bool = False,
) -> Tensor:
    """The loss of a copy of the model on one batch, checked.

    Args:
        loss: The user's loss.
        model: The copy.
        batch: The batch.
        tensors: What takes the place of the copy's own tensors, by name.
        training: Whether the copy is in train mode, for the words of an error.

    Returns:
        A finite scalar.

    Raises:
        GrowthRefused: The loss fails on the copy.
        DataError: It is no finite scalar.
    """
    try:
        if tensors is None:
            value = called(loss, model, batch)
        else:
            # functional_call names tensors as the wrapping module sees them.
            inner = {f"model.{name}": tensor for name, tensor in tensors.items()}
            value = functional_call(_LossModule(model, loss), inner, (batch,))
    except Exception as error:
        raise _told(error, "train" if training else "eval") from error
    finally:
        # A cast that autocast has kept would outlive a step of the weights, and hold
        # them: our own context keeps its cache open.
        torch.clear_autocast_cache()
    if not isinstance(value, Tensor) or value.numel() != 1:
        is_tensor = isinstance(value, Tensor)
        received = tuple(value.shape) if is_tensor else type(value).__name__
        raise DataError(
            f"loss(model, batch) must return a scalar tensor; got {received}; nothing "
            "was changed"
        )
    if not bool(torch.isfinite(value)):
        raise DataError(
            f"the loss of a growth batch is {value.item()}; nothing was changed"
        )
    return value


def _told(error: Exception, mode: str) -> Exception:
    # The one failure of a loss that a setting of the loader mends.
    if "more than 1 value per channel" in str(error):
        return DataError(
            "a batch norm cannot train on a batch with one value per channel; nothing "
            "was changed. hint: use a larger batch size, or drop_last=True where only "
            "the last batch is that small"
        )
    told = (
        f"the loss fails on a copy of the model in {mode} mode "
        f"({type(error).__name__}: {error}); nothing was changed"
    )
    if any(word in str(error) for word in ("size", "shape")):
        told += (
            ". hint: a weight that only the loss uses does not grow; let the model's "
            "forward use it"
        )
    return GrowthRefused(told)


@torch.no_grad()
def mean_loss(loss: Loss, model: nn.Module, batches: Iterable[Any]) -> float:
    """The mean loss of a copy over some batches."""
    losses = [evaluate(loss, model, batch).item() for batch in batches]
    return sum(losses) / len(losses)
