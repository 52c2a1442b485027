"""Published methods, put together from their parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from meristem import how, where
from meristem import when as triggers
from meristem.core.axis import Axes
from meristem.core.budget import Budget
from meristem.core.errors import GrowthRefused
from meristem.event.amounts import Amount
from meristem.event.steps import Methods, Optimizers
from meristem.grower import Grower
from meristem.how import SWE, Stack
from meristem.lab.batches import example_of
from meristem.lab.laboratory import Progress
from meristem.lab.losses import Loss
from meristem.methods import When
from meristem.stages import ByHand, MakeOptimizer, Stages
from meristem.structure import structure_of
from meristem.structure.undisturbed import undisturbed
from meristem.when import At, Every, duration, moment
from meristem.where import SVoD


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
    """GradMax (Evci et al., ICLR 2022, arXiv 2201.05125): all layers at every event,
    each in proportion to its size.

    As published: new weights of `scale` x the mean norm of the present ones, a
    learning-rate schedule that is left alone. Beyond the paper: new slices get a warm
    second moment under Adam, where zero would make them jump.

    Args:
        model: As for `Grower`, like every argument that is not listed here.
        optimizer: As for `Grower`.
        loss: As for `Grower`.
        data: As for `Grower`.
        when: Every epoch unless told otherwise.
        amount: A fraction of the present widths by default.
        scale: Norm of new weights: .5 on CIFAR and ImageNet, 1 in the student-teacher
            task.

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
        amount=amount,
        budget=budget,
        axes=axes,
        example=example,
        generator=generator,
    )


def senn(
    model: nn.Module,
    optimizer: Optimizers,
    *,
    loss: Loss,
    data: Iterable[Any],
    when: When | None = None,
    alpha: float | None = None,
    tau: float | None = None,
    patience: int = 5,
    amount: Amount = 48,
    budget: Budget | None = None,
    axes: str | Sequence[str] = "*",
    example: Any = None,
    generator: torch.Generator | None = None,
) -> Grower:
    """SENN (Mitchell et al., 2024, arXiv 2307.04526): width and depth, where the
    natural-gradient score says that it pays, until it says no more.

    Unlike published: thresholds that follow from the sampling error of the score (see
    `where.SENN`) in place of ones tuned for every experiment; several units at a time;
    checks within a share of the cost of training; any first-order optimizer.

    Args:
        model: As for `Grower`, like every argument that is not listed here. It may
            start linear: `nn.Sequential(nn.Linear(d, k))`.
        optimizer: As for `Grower`.
        loss: As for `Grower`.
        data: As for `Grower`.
        when: `when.SENN()` unless told otherwise: after the first, checks take at most
            5 % of the operations of training. In a task of seconds that is next to
            nothing: name moments there, `when.Every(epochs=20)`.
        alpha: Smallest gain of a unit, as published; None for the rule of `where.SENN`.
        tau: Smallest gain relative to the net's own score, as published; None for no
            such threshold.
        patience: Checks in a row at which nothing is accepted, after which growth ends.
        amount: Units per growth, at the most; the score decides how many of them.

    Returns:
        A `Grower`.

    Examples:
        >>> import torch, meristem as ms
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 1))
        >>> optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        >>> x = torch.randn(400, 2)
        >>> data = list(zip(x.split(50), (x[:, :1] * x[:, 1:]).split(50)))
        >>> loss = lambda model, batch: ((model(batch[0]) - batch[1]) ** 2).mean()
        >>> grower = ms.recipes.senn(
        ...     net, optimizer, loss=loss, data=data, when=ms.when.Every(epochs=20)
        ... )
        >>> for batch in data * 20:
        ...     value = loss(net, batch)
        ...     optimizer.zero_grad(); value.backward(); optimizer.step()
        ...     growth = grower.step(value)
        >>> growth.added
        {'0:depth': 1}
    """
    return Grower(
        model,
        optimizer,
        loss=loss,
        data=data,
        when=when if when is not None else triggers.SENN(),
        how=how.SENN(activation="prelu"),
        where=where.SENN(alpha=alpha, tau=tau, patience=patience),
        amount=amount,
        budget=budget,
        axes=axes,
        example=example,
        generator=generator,
    )


def stack(
    model: nn.Module,
    optimizer: Optimizers,
    *,
    loss: Loss,
    data: Iterable[Any],
    to: Mapping[str, int],
    at: float | str = 0.5,
    total: str | None = None,
    how: Methods = None,
    budget: Budget | None = None,
    example: Any = None,
    generator: torch.Generator | None = None,
) -> Grower:
    """Train a shallow net, then repeat its blocks: one growth to the full depth, as in
    arXiv 2405.15319 and 2511.04981.

    Copies take the optimizer's state along. Use a schedule that holds its rate until
    after the growth (warm-up, stable, decay), and tune the rate for the grown net as
    you would for the fixed one: see benchmarks/gpt.

    Args:
        model: As for `Grower`, like every argument that is not listed here.
        optimizer: As for `Grower`.
        loss: As for `Grower`.
        data: As for `Grower`.
        to: The final number of blocks, by depth axis.
        at: When to grow: a fraction of training in (0, 1), or a moment, as "800 steps".
        total: How long training is, as "1600 steps" or "12 epochs"; where `at` is a
            fraction.
        how: What the new blocks start as: `how.Stack()`, as published, by default.
            `how.Interpose(share=True)` ended ahead of it in benchmarks/best.

    Returns:
        A `Grower`.

    Raises:
        GrowthRefused: An axis is no depth, or not smaller than it shall become.

    Examples:
        >>> import torch, meristem as ms
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        >>> net = torch.nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        >>> optimizer = torch.optim.AdamW(net.parameters())
        >>> data = [torch.randn(4, 5, 8)]
        >>> loss = lambda model, batch: model(batch).square().mean()
        >>> grower = ms.recipes.stack(
        ...     net, optimizer, loss=loss, data=data, to={"layers": 3}, total="4 steps"
        ... )
        >>> [len(net.layers) for _ in range(4) if grower.step() or True]
        [1, 3, 3, 3]
    """
    due = At(at) if isinstance(at, str) else _fraction(at, total)
    if example is None:
        example = example_of(model, loss, data, torch.Generator().manual_seed(0))
    with undisturbed():
        sizes = _sizes_of_depths(structure_of(model, example).axes, to)
    return Grower(
        model,
        optimizer,
        loss=loss,
        data=data,
        when=due,
        how=Stack() if how is None else how,
        amount={name: size - sizes[name] for name, size in to.items()},
        budget=budget,
        example=example,
        generator=generator,
    )


def _fraction(at: float, total: str | None) -> At:
    """Due at a fraction of training."""
    if total is None:
        raise ValueError(
            f"at={at} is a fraction of training, whose length is not told. hint: "
            'total="2000 steps", or at="1000 steps"'
        )
    length, unit = duration(total)
    return At(f"{moment(at, length)} {unit}")


def _sizes_of_depths(axes: Axes, to: Mapping[str, int]) -> dict[str, int]:
    """The present numbers of blocks; raises unless `to` asks for more of each."""
    if not isinstance(to, Mapping):
        raise TypeError(f"to must be a dict {{depth axis: blocks}}; got {to!r}")
    sizes = {}
    for name, size in to.items():
        axis = axes.named(name)
        if axis.slots:
            raise GrowthRefused(
                f"axis {name!r} is a {axis.kind}, not a depth; only depths are stacked"
            )
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(
                f"to={dict(to)!r}: the number of blocks is an int; got {size!r}"
            )
        sizes[name] = axis.size
    if not to or any(size <= sizes[name] for name, size in to.items()):
        raise GrowthRefused(
            f"to={dict(to)} must give every depth more blocks than it has now: "
            f"{sizes or 'name a depth axis'}"
        )
    return sizes


def swe_svod(
    model: nn.Module,
    optimizer: Optimizers,
    *,
    loss: Loss,
    data: Iterable[Any],
    when: When | None = None,
    amount: Amount = 0.25,
    budget: Budget | None = None,
    axes: str | Sequence[str] = "*",
    example: Any = None,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Grower:
    """SWE + SVoD (Chatzis, Kordonis, Theodosis, Maragos, 2025, arXiv 2509.18842) inside
    a training loop of your own.

    Votes decide which layer gets the new units, coupling settles them in; one optimizer
    throughout, whose new slices get a warm second moment. The paper starts a fresh
    optimizer after each growth: see `swe_svod_stages`. An event costs two epochs of the
    candidate-widened copy and one epoch per grown layer.

    Where the optimizer goes on, the coupling's published learning rate of 1e-3 moves
    the present weights too far: here it is 1e-4, which was better in accuracy and in
    inactive units (benchmarks/swe_svod/coupling_rate.toml).

    Args:
        model: As for `Grower`, like every argument that is not listed here.
        optimizer: As for `Grower`.
        loss: As for `Grower`.
        data: As for `Grower`.
        when: Every five epochs unless told otherwise.
        amount: A fraction of the present widths by default; the paper's rounds add 19
            to 27 %.

    Returns:
        A `Grower`.

    Examples:
        >>> import torch, meristem as ms
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> optimizer = torch.optim.Adam(net.parameters())
        >>> data = [(torch.randn(16, 4), torch.randn(16, 2))]
        >>> loss = lambda model, batch: ((model(batch[0]) - batch[1]) ** 2).mean()
        >>> grower = ms.recipes.swe_svod(
        ...     net, optimizer, loss=loss, data=data, when=ms.when.Every(steps=1)
        ... )
        >>> grower.step().after
        {'0': 10}
    """
    return Grower(
        model,
        optimizer,
        loss=loss,
        data=data,
        when=when if when is not None else Every(epochs=5),
        how=SWE(),
        where=SVoD(),
        amount=amount,
        budget=budget,
        axes=axes,
        example=example,
        generator=generator,
        progress=progress,
    )


def swe_svod_stages(
    model: nn.Module,
    make_optimizer: MakeOptimizer,
    *,
    loss: Loss,
    data: Iterable[Any],
    validation: Iterable[Any],
    amount: Sequence[int | float],
    adjust_data: Iterable[Any] | None = None,
    coupling: Literal["full", "factored"] = "full",
    epochs: int = 250,
    patience: int = 20,
    last_patience: int | None = None,
    budget: Budget | None = None,
    axes: str | Sequence[str] = "*",
    example: Any = None,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
    report: Callable[[Stages], None] = lambda stages: None,
) -> Stages:
    """Progressive training as the SWE + SVoD paper runs it (arXiv 2509.18842): one
    stage more than there are amounts.

    Each stage trains everything with a fresh optimizer until the validation loss has
    not improved for `patience` epochs and goes back to its best weights; then the net
    expands, and the next stage begins.

    Args:
        model: Any module that runs.
        make_optimizer: Called with the parameters at the start of every stage, as
            `torch.optim.Adam` would be.
        loss: `loss(model, batch)`, a mean over the batch.
        data: Training batches, read once per epoch.
        validation: Batches for early stopping.
        amount: New units over all axes, one entry per growth: ints, or fractions of the
            present widths.
        adjust_data: What votes and adjustment read; the paper's is not shuffled, in
            batches of 100. `data` by default.
        coupling: Of SWE: the paper's by default, whose memory and time grow with new x
            old units x inputs; "factored" costs little more than training (see
            `how.SWE`).
        epochs: Most epochs of a stage.
        patience: Epochs without improvement that end a stage.
        last_patience: The same for the last stage (30 in the paper's code).
        budget: Upper limits.
        axes: Glob patterns of the axes that may grow; a leading "!" excludes.
        example: The example input; by default the model's first call inside `loss` on
            the first batch.
        generator: The source of randomness; by default a private one of the model.
        progress: Called as `progress(phase, done, total)` while the growth trains on
            the side.
        report: Called with the stages after every epoch.

    Returns:
        `Stages`: iterate to train; each item is a `Stage` that has ended, its best
        weights in the model.

    Raises:
        DataError: Data that are empty or can be read only once.
        GrowthRefused: Nothing in the model can grow.

    Examples:
        >>> import torch, meristem as ms
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> data = [(torch.randn(16, 4), torch.randn(16, 2)) for _ in range(4)]
        >>> loss = lambda model, batch: ((model(batch[0]) - batch[1]) ** 2).mean()
        >>> stages = ms.recipes.swe_svod_stages(
        ...     net, torch.optim.Adam, loss=loss, data=data, validation=data[:1],
        ...     amount=[4, 2], epochs=2,
        ... )
        >>> [stage.sizes for stage in stages]
        [{'0': 8}, {'0': 12}, {'0': 14}]
    """
    if example is None:
        example = example_of(model, loss, data, torch.Generator().manual_seed(0))
    grower = Grower(
        model,
        None,
        loss=loss,
        data=data if adjust_data is None else adjust_data,
        when=ByHand(),
        how=SWE.published(coupling),
        where=SVoD(),
        amount=list(amount),
        budget=budget,
        axes=axes,
        example=example,
        generator=generator,
        progress=progress,
    )
    return Stages(
        grower,
        make_optimizer,
        data=data,
        validation=validation,
        epochs=epochs,
        patience=patience,
        last_patience=last_patience,
        report=report,
    )


__all__ = ["gradmax", "senn", "stack", "swe_svod", "swe_svod_stages"]


def __dir__() -> list[str]:
    return __all__
