"""Replicas of one model on several processes: what they tell each other, so that they
grow alike.

All of them measure on the batches of all of them, joined, and draw from one generator:
then they decide the same without anybody in command. What they have decided is compared
before anything changes, and what they have become afterwards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from functools import cache, partial
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from meristem.core.errors import MeristemError

Value = TypeVar("Value")


class RankFailed(MeristemError):
    """Another process failed; nothing has changed on any of them."""


class Ranks:
    """The processes that hold the same model.

    Attributes:
        group: Over which they talk; None for a process alone.
        sent: Bytes of tensors that this process has given to the others.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.sent = 0

    @property
    def several(self) -> bool:
        return self.group is not None

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group) if self.several else 0

    def gather(self, value: Value) -> list[Value]:
        """A value of every process, in the order of their ranks.

        Raises:
            RankFailed: One of them has failed in the meantime.
        """
        if not self.several:
            return [value]
        return self._exchange(value, None)

    def _exchange(self, value: Any, failed: str | None) -> list[Any]:
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, Tensor):
                self.sent += leaf.nbytes
        told: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(told, (value, failed), group=self.group)
        for rank, (_, problem) in enumerate(told):
            if problem is not None and failed is None:
                raise RankFailed(
                    f"rank {rank} failed ({problem}); nothing was changed on any rank"
                )
        return [given for given, _ in told]

    def first(self, value: Value) -> Value:
        """The value of the first process."""
        return self.gather(value)[0]

    def mean(self, value: float) -> float:
        values = self.gather(value)
        return sum(values) / len(values)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within, a process that fails tells those that wait for it."""
        try:
            yield
        except RankFailed:
            raise  # everybody knows
        except BaseException as error:
            if self.several:
                self._exchange(None, f"{type(error).__name__}: {error}")
            raise

    def begin(self, model: nn.Module, generator: torch.Generator) -> None:
        """Start from the same buffers, which every process follows by itself, and the
        same randomness.
        """
        if not self.several:
            return
        buffers = {name: b.detach().cpu() for name, b in model.named_buffers()}
        state, kept = self.first((generator.get_state(), buffers))
        generator.set_state(state)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(kept[name])

    def agree(self, plan: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the first process, once all are known to plan the same.

        Raises:
            RankFailed: They plan different growths.
        """
        if not self.several:
            return dict(tensors)
        prints = self.gather((plan, _fingerprint(tensors)))
        if len({other for other, _ in prints}) > 1:
            raise RankFailed(
                "the ranks have planned different growths, and nothing was changed. "
                "hint: build model, optimizer and Grower alike on every rank"
            )
        if len({print_ for _, print_ in prints}) == 1:
            return dict(tensors)
        # Kernels that add in any order give other last bits.
        kept = self.first({name: t.cpu() for name, t in tensors.items()})
        return {name: kept[name].to(t.device) for name, t in tensors.items()}

    def check_alike(self, model: nn.Module) -> None:
        """Raise where the ranks have become different models."""
        if self.several and not _alike(self.gather(_shapes(model))):
            raise MeristemError(
                "after the growth the ranks hold models of different shapes. hint: load "
                "the last checkpoint on all of them"
            )

    def joined(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches of all processes, joined along their examples, until the first one
        has no more.
        """
        if not self.several:
            yield from batches
            return
        waiting = iter(batches)
        while True:
            several = [_plain(batch) for batch in islice(waiting, TOGETHER)]
            # By batch, what every process has of it.
            told = self.gather([pytree.tree_map(_to_cpu, one) for one in several])
            shortest = min(len(batches) for batches in told)
            for own, *parts in zip(several, *told, strict=False):
                yield from _joined(parts, own)
            if shortest < TOGETHER:
                return


ALONE = Ranks()
TOGETHER = 4
"""Batches that are sent at once."""


def _plain(batch: Any) -> Any:
    # Batches of tokenizers are mappings of a class of their own.
    is_other = isinstance(batch, Mapping) and type(batch) is not dict
    return dict(batch) if is_other else batch


def _to_cpu(leaf: Any) -> Any:
    return leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf


def _joined(parts: Sequence[Any], own: Any) -> Iterator[Any]:
    """One batch of several; one after the other where they cannot be joined."""
    leaves, spec = zip(*(pytree.tree_flatten(part) for part in parts), strict=True)
    devices = []
    for leaf in pytree.tree_leaves(own):
        devices.append(leaf.device if isinstance(leaf, Tensor) else None)
    joinable = all(one == spec[0] for one in spec) and all(
        _has_examples(column) for column in zip(*leaves, strict=False)
    )
    if not joinable:
        device = next((one for one in devices if one is not None), None)
        for part in parts:
            yield pytree.tree_map(partial(_moved, device=device), part)
        return
    columns = []
    for column, device in zip(zip(*leaves, strict=True), devices, strict=True):
        if device is None:
            columns.append(column[0])
        else:
            columns.append(torch.cat(column).to(device))
    yield pytree.tree_unflatten(columns, spec[0])


def _moved(leaf: Any, device: torch.device | None) -> Any:
    return leaf.to(device) if isinstance(leaf, Tensor) else leaf


def _has_examples(column: Sequence[Any]) -> bool:
    if not any(isinstance(leaf, Tensor) for leaf in column):
        plain = all(isinstance(leaf, (int, float, str, type(None))) for leaf in column)
        return plain and len(set(column)) == 1
    shapes = [tuple(leaf.shape[1:]) for leaf in column if isinstance(leaf, Tensor)]
    return all(leaf.dim() > 0 for leaf in column) and len(set(shapes)) == 1


class RankData:
    """Batches of data of which every process has its own share."""

    def __init__(self, data: Iterable[Any], ranks: Ranks) -> None:
        self.data, self.ranks = data, ranks

    def __iter__(self) -> Iterator[Any]:
        return self.ranks.joined(self.data)

    def __len__(self) -> int:
        if not isinstance(self.data, Sized):
            raise TypeError("the number of batches is not known")
        return len(self.data)


def shared(data: Iterable[Any], ranks: Ranks) -> Iterable[Any]:
    """The data of all processes."""
    if isinstance(data, RankData):
        return data
    return RankData(data, ranks) if ranks.several else data


def ranks_over(group: Any) -> Ranks:
    """The processes of a group, which talk on the CPU."""
    return ALONE if dist.get_world_size(group) == 1 else Ranks(_on_cpu(group))


def _on_cpu(group: Any) -> Any:
    """The same processes as a group whose messages need no accelerator."""
    # Nothing of ours outlives a group of the user's: its threads would outlive Python.
    return group if dist.get_backend(group) == "gloo" else _beside(group)


@cache
def _beside(group: Any) -> Any:
    members = dist.get_process_group_ranks(group)
    return dist.new_group(members, backend="gloo", use_local_synchronization=True)


def replicas_of(model: nn.Module) -> Ranks:
    """The processes that hold the same weights, in a distributed program whose model is
    not wrapped; a collective call.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    ranks = ranks_over(dist.group.WORLD)
    held = dict(model.named_parameters())
    mine = (_shapes(model), _fingerprint(held))
    return ranks if _alike(ranks.gather(mine)) else ALONE


def _alike(shapes: Sequence[Any]) -> bool:
    return all(one == shapes[0] for one in shapes)


def _shapes(model: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(value.shape)) for name, value in model.state_dict().items()]


def _fingerprint(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
