"""Growth batches: read on the side, never from the user's running iterator."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator, Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, IterableDataset

from meristem.core.errors import DataError
from meristem.core.ranks import RankData
from meristem.lab.losses import Loss, called
from meristem.structure.received import in_short
from meristem.structure.tracer import tensors
from meristem.structure.twin import Example, twin
from meristem.structure.undisturbed import undisturbed


def check_reiterable(data: Iterable[Any]) -> None:
    """Raise where `data` can be read only once, or not at all."""
    if isinstance(data, RankData):
        data = data.data
    if isinstance(data, Iterator):
        raise DataError(
            f"data is a one-shot iterator ({type(data).__name__}): growth would eat "
            "the batches that training needs. hint: pass the DataLoader itself, or a "
            "list of batches"
        )
    if isinstance(data, (Mapping, Tensor, str)) or _is_batch(data):
        raise DataError(
            f"data is one batch ({type(data).__name__}), and a re-iterable of batches is "
            "needed. hint: pass the DataLoader, or [batch]"
        )
    if not isinstance(data, Iterable):
        raise DataError(
            "data must be a DataLoader or a re-iterable of batches; got "
            f"{type(data).__name__}"
        )
    # A loader over a generator looks re-iterable, and is not.
    dataset = getattr(data, "dataset", None)
    if isinstance(data, DataLoader) and isinstance(dataset, Iterator):
        raise DataError(
            "the dataset of the DataLoader is a one-shot iterator "
            f"({type(dataset).__name__}): growth would eat the examples "
            "that training needs. hint: let its __iter__ begin anew"
        )
    if length(data) == 0:
        raise DataError("data is empty: growth needs at least one batch")


def _is_batch(data: Any) -> bool:
    """Whether a list holds the tensors of one batch, as inputs and labels."""
    if not isinstance(data, (list, tuple)) or len(data) < 2:
        return False
    if not all(isinstance(part, Tensor) for part in data):
        return False
    # Batches are alike; the parts of one differ in what they are.
    return len({(part.dtype, part.dim()) for part in data}) > 1


def length(data: Iterable[Any]) -> int | None:
    """The number of batches, or None where it is not known (an iterable dataset)."""
    try:
        return len(data) if isinstance(data, Sized) else None
    except TypeError:
        return None


def growth_batches(
    data: Iterable[Any], count: int, generator: torch.Generator
) -> list[Any]:
    """`count` batches of `data`, fewer where it has fewer.

    From a DataLoader: by a loader of our own over the same dataset, sampler and collate
    function, whose generators are borrowed and put back. From another re-iterable: its
    first ones.
    """
    check_reiterable(data)
    # One number of the generator decides the order of all batches.
    seed = int(torch.randint(2**62, (), generator=generator))
    if isinstance(data, RankData) and isinstance(data.data, DataLoader):
        # Loaders that are shuffled alike would give every rank the same examples.
        seed += data.ranks.rank
    with undisturbed(), _borrowed(data, seed):
        torch.manual_seed(seed)
        batches = list(itertools.islice(_own_loader(data), count))
    if not batches and count:
        raise DataError("data is empty: growth needs at least one batch")
    return batches


def one_pass(
    data: Iterable[Any], generator: torch.Generator
) -> Generator[Any, None, None]:
    """Every batch of `data` once, in its own order, by a loader of our own; to be
    closed where it is not used up.
    """
    check_reiterable(data)
    seed = int(torch.randint(2**62, (), generator=generator))
    empty = True
    with _borrowed(data, seed):
        torch.manual_seed(seed)
        for batch in _own_loader(data):
            empty = False
            yield batch
    if empty:
        raise DataError("data is empty: growth needs at least one batch")


def _own_loader(data: Iterable[Any]) -> Iterable[Any]:
    if isinstance(data, RankData):
        return data.ranks.joined(_own_loader(data.data))
    if not isinstance(data, DataLoader):
        return data
    if isinstance(data.dataset, IterableDataset):
        return DataLoader(
            data.dataset,
            batch_size=data.batch_size,
            collate_fn=data.collate_fn,
            drop_last=data.drop_last,
        )
    # A loader without batching: the dataset gives whole batches.
    if data.batch_sampler is None:
        return DataLoader(
            data.dataset,
            batch_size=None,
            sampler=data.sampler,
            collate_fn=data.collate_fn,
        )
    return DataLoader(
        data.dataset, batch_sampler=data.batch_sampler, collate_fn=data.collate_fn
    )


@contextlib.contextmanager
def _borrowed(data: Any, seed: int) -> Iterator[None]:
    """Seed the generators of a loader and its samplers for our own pass, and restore
    their state.
    """
    generators: dict[int, torch.Generator] = {}
    holders = [data.data if isinstance(data, RankData) else data]
    while holders:
        holder = holders.pop()
        found = getattr(holder, "generator", None)
        if isinstance(found, torch.Generator):
            generators[id(found)] = found
        holders += [
            part
            for name in ("sampler", "batch_sampler")
            if (part := getattr(holder, name, None)) is not None
        ]
    states = [(one, one.get_state()) for one in generators.values()]
    try:
        for one, _ in states:
            one.manual_seed(seed)
        yield
    finally:
        for one, state in states:
            one.set_state(state)


class _Called(Exception):
    """Carries the arguments of the model's first call out of the user's loss."""


def example_of(
    model: nn.Module, loss: Loss, data: Iterable[Any], generator: torch.Generator
) -> Example:
    """The arguments of the model's first call inside `loss` on the first batch of
    `data`.

    The generator is left as it was.
    """
    return first_call(model, loss, peeked(data, generator))


def peeked(data: Iterable[Any], generator: torch.Generator) -> Any:
    """A growth batch that the generator does not notice."""
    state = generator.get_state()
    try:
        (batch,) = growth_batches(data, 1, generator)
    finally:
        generator.set_state(state)
    return batch


def first_call(model: nn.Module, loss: Loss, batch: Any) -> Example:
    """The arguments of the model's first call inside `loss(model, batch)`."""

    def catch(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        raise _Called(args, kwargs)

    # The hook must not stand on the user's model, not even for a moment.
    copied = twin(model, lambda _name, tensor: tensor.detach().clone())
    copied.register_forward_pre_hook(catch, with_kwargs=True)
    with undisturbed(), torch.no_grad():
        try:
            called(loss, copied, batch)
        except _Called as caught:
            args, kwargs = caught.args
            if any(is_functorch_wrapped_tensor(t) for t in tensors((args, kwargs))):
                raise DataError(
                    "loss(model, batch) calls the model inside a functional transform "
                    "(vmap, grad), where its input is none of its own. hint: pass "
                    "example=, a call of the model as it stands"
                ) from None
            return Example(args, kwargs)
        except Exception as error:
            raise DataError(
                f"loss(model, batch) fails on the first batch of data "
                f"({type(error).__name__}: {error}). It got the model and {in_short(batch)}. hint: "
                "lambda model, batch: criterion(model(batch[0]), batch[1])"
            ) from error
    raise DataError(
        "loss(model, batch) never calls the model, so no example input is known. "
        "hint: pass example=, or call model(...) inside the loss"
    )


def cut(batch: Any, count: int) -> Any:
    """The first `count` examples of a batch; all of it where that cannot be told.

    Examples lie along the leading dimension, which all its tensors share then.
    """
    leaves, spec = pytree.tree_flatten(batch)
    lengths = {len(x) for x in leaves if isinstance(x, Tensor) and x.dim()}
    if len(lengths) != 1 or lengths.pop() <= count:
        return batch
    parts = []
    for leaf in leaves:
        has_examples = isinstance(leaf, Tensor) and leaf.dim()
        parts.append(leaf[:count] if has_examples else leaf)
    return pytree.tree_unflatten(parts, spec)
