"""The ledger: what a growth costs is counted, not estimated."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from meristem.statistics.losses import Loss, called, measured
from meristem.structure.twin import twin
from meristem.structure.undisturbed import undisturbed

Result = TypeVar("Result")


@contextlib.contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Count the floating-point operations of everything that runs inside, backward passes included."""
    with FlopCounterMode(display=False) as counter:
        yield counter


def step_flops(model: nn.Module, loss: Loss, batch: Any) -> float:
    """Floating-point operations of a training step, forward and backward, per example of the batch; counted on a twin."""
    copied = twin(model, lambda _, tensor: tensor.detach().clone()).train()
    math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)  # fused kernels are not counted on a CPU
    with undisturbed(), math, counting() as counter:
        measured(lambda: called(loss, copied, batch), training=True).backward()
    return counter.get_total_flops() / batch_size(batch)


def batch_size(batch: Any) -> int:
    """Examples in a batch: the leading dimension of its first tensor."""
    first = next((leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()), None)
    return len(first) if first is not None else 1


class Meter:
    """Counts passes over many batches: the first batch of a shape under the counter, later ones of that shape alike.

    The counter costs more than a small network's own step; what a step costs depends on its shapes alone.
    """

    def __init__(self, total: int = 0) -> None:
        self.total = total
        self._known: dict[Any, int] = {}

    def at_new_size(self) -> Meter:
        """A meter that goes on from this total, for passes that cost something else."""
        return Meter(self.total)

    def run(self, batch: Any, call: Callable[[], Result], beside: int = 0) -> Result:
        """`call()`, counted; `beside` are operations of its own that the counter of contractions does not see."""
        key = tuple(tuple(leaf.shape) for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor))
        if key in self._known:
            result = call()
        else:
            with counting() as counter:
                result = call()
            self._known[key] = counter.get_total_flops()
        self.total += self._known[key] + beside
        return result
