"""Growth batches: read on the side, never from the user's running iterator."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler

from meristem.errors import DataError
from meristem.statistics.undisturbed import undisturbed
from meristem.structure.twin import Example, twin


def check_reiterable(data: Iterable[Any]) -> None:
    """Raise where `data` can be read only once, or not at all."""
    if isinstance(data, Iterator):
        raise DataError(
            f"data is a one-shot iterator ({type(data).__name__}): growth would eat the batches that training needs. "
            "hint: pass the DataLoader itself, or a list of batches"
        )
    if not isinstance(data, Iterable):
        raise DataError(f"data must be a DataLoader or a re-iterable of batches; got {type(data).__name__}")
    if isinstance(data, Sized) and len(data) == 0:
        raise DataError("data is empty: growth needs at least one batch")


def growth_batches(data: Iterable[Any], count: int, generator: torch.Generator) -> list[Any]:
    """`count` batches of `data`, fewer where it has fewer. From a DataLoader: drawn by a loader of our own over the same
    dataset and collate function; from another re-iterable: its first ones."""
    check_reiterable(data)
    with undisturbed():
        batches = list(itertools.islice(_own_loader(data, generator), count))
    if not batches and count:
        raise DataError("data is empty: growth needs at least one batch")
    return batches


def _own_loader(data: Iterable[Any], generator: torch.Generator) -> Iterable[Any]:
    if not isinstance(data, DataLoader):
        return data
    dataset = data.dataset
    if isinstance(dataset, IterableDataset):
        return DataLoader(dataset, batch_size=data.batch_size, collate_fn=data.collate_fn)
    shuffled = RandomSampler(dataset, generator=generator)  # type: ignore[arg-type]
    if data.batch_size is None and data.batch_sampler is None:
        size = getattr(data.sampler, "batch_size", None)
        sampler = BatchSampler(shuffled, size, drop_last=False) if size else shuffled
        return DataLoader(dataset, batch_size=None, sampler=sampler, collate_fn=data.collate_fn)
    size = data.batch_size or getattr(data.batch_sampler, "batch_size", 1)
    return DataLoader(dataset, batch_size=size, sampler=shuffled, collate_fn=data.collate_fn)


class _Called(Exception):
    """Carries the arguments of the model's first call out of the user's loss."""


def first_call(model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: Any) -> Example:
    """The arguments of the model's first call inside `loss(model, batch)`."""

    def catch(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Called(args, kwargs)

    copied = twin(model, lambda _name, tensor: tensor.detach())
    copied.register_forward_pre_hook(catch, with_kwargs=True)
    with undisturbed(), torch.no_grad():
        try:
            loss(copied, batch)
        except _Called as called:
            args, kwargs = called.args
            return args, kwargs
    raise DataError(
        "loss(model, batch) never calls the model, so no example input is known. hint: pass example=, or call model(...) "
        "inside the loss"
    )
