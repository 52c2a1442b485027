"""The ledger: what a growth costs is counted, not estimated."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from meristem.lab.losses import Loss, evaluate
from meristem.structure.twin import twin
from meristem.structure.undisturbed import undisturbed

Result = TypeVar("Result")


class _Everywhere:
    """In place of torch's module tracker: all that is counted belongs to the whole.

    The tracker asks every tensor that enters or leaves a module for its gradient
    function, which a view of a parameter does not have.
    """

    parents = frozenset(["Global"])

    def __enter__(self) -> None:
        """Nothing to watch."""

    def __exit__(self, *_: object) -> None:
        """Nothing to let go."""


@contextlib.contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Count the floating-point operations of everything that runs inside.

    Backward passes are included.
    """
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _Everywhere()  # type: ignore[assignment]
    with counter:
        yield counter


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Attention without fused kernels.

    These are not counted on a CPU, and cannot be differentiated twice.
    """
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield


def step_flops(model: nn.Module, loss: Loss, batch: Any) -> float:
    """Floating-point operations of a training step per example of the batch.

    Forward and backward, counted on a twin.
    """
    copied = twin(model, lambda _, tensor: tensor.detach().clone()).train()
    with undisturbed(), plain_attention(), counting() as counter:
        evaluate(loss, copied, batch, training=True).backward()
    return counter.get_total_flops() / batch_size(batch)


def batch_size(batch: Any) -> int:
    """Examples in a batch: the leading dimension of its first tensor."""
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim():
            return len(leaf)
    return 1


class Meter:
    """Counts passes over many batches.

    The first batch of a shape runs under the counter, later ones of that shape count as
    much: the counter costs more than a small network's own step, and what a step costs
    depends on its shapes alone.
    """

    def __init__(self, total: int = 0) -> None:
        self.total = total
        self._known: dict[Any, int] = {}

    def at_new_size(self) -> Meter:
        """A meter that goes on from this total, for passes that cost something else."""
        return Meter(self.total)

    def run(self, batch: Any, call: Callable[[], Result], beside: int = 0) -> Result:
        """`call()`, counted.

        `beside` are operations that the counter of contractions does not see.
        """
        shapes = []
        for leaf in pytree.tree_leaves(batch):
            if isinstance(leaf, Tensor):
                shapes.append(tuple(leaf.shape))
        key = tuple(shapes)
        if key in self._known:
            # What is already known is not counted again.
            result = call()
        else:
            with counting() as counter:
                result = call()
            self._known[key] = counter.get_total_flops()
        self.total += self._known[key] + beside
        return result
