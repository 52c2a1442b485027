"""Published methods, put together from their parts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from meristem import care, how, where
from meristem.grower import Amount, Grower
from meristem.growing import Optimizers
from meristem.statistics.losses import Loss
from meristem.values import Budget
from meristem.when import Every, When


def gradmax(
    model: nn.Module,
    optimizer: Optimizers,
    *,
    loss: Loss,
    data: Iterable[Any],
    when: When | None = None,
    amount: Amount = 0.25,
    scale: float = 0.5,
    budget: Budget | None = None,
    axes: str | Sequence[str] = "*",
    example: Any = None,
    generator: torch.Generator | None = None,
) -> Grower:
    """GradMax (Evci et al., ICLR 2022, arXiv 2201.05125): all layers at every event, each in proportion to its size.

    As published: new weights of `scale` x the mean norm of the present ones, a learning-rate schedule that is left alone.
    Beyond the paper: new slices get a warm second moment under Adam, where zero would make them jump.

    Args:
        model: As for `Grower`, like every argument that is not listed here.
        optimizer: As for `Grower`.
        loss: As for `Grower`.
        data: As for `Grower`.
        when: Every epoch unless told otherwise.
        amount: A fraction of the present widths by default.
        scale: Norm of new weights: .5 on CIFAR and ImageNet, 1 in the student-teacher task.

    Returns:
        A `Grower`.

    Examples:
        >>> import torch, meristem as ms
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> data = [(torch.randn(16, 4), torch.randn(16, 2))]
        >>> loss = lambda model, batch: ((model(batch[0]) - batch[1]) ** 2).mean()
        >>> grower = ms.recipes.gradmax(net, optimizer, loss=loss, data=data)
        >>> grower.step().after
        {'0': 10}
    """
    return Grower(
        model,
        optimizer,
        loss=loss,
        data=data,
        when=when if when is not None else Every(epochs=1),
        how=how.GradMax(scale=scale),
        where=where.Proportional(),
        care=care.WarmMoments(),
        amount=amount,
        budget=budget,
        axes=axes,
        example=example,
        generator=generator,
    )
