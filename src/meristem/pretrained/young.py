"""Training only what is new: which parameters and entries a growth has made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from meristem.core.errors import GrowthRefused
from meristem.core.growth import Growth
from meristem.event.steps import Optimizers, masks, optimizers
from meristem.surgery.host import inner


class NewParameters(dict[str, nn.Parameter]):
    """Parameters by name; prints as a list of names and counts."""

    def __repr__(self) -> str:
        lines = [f"{name}: {parameter.numel():,}" for name, parameter in self.items()]
        total = sum(parameter.numel() for parameter in self.values())
        return "\n".join([*lines, f"{len(self)} new parameters, {total:,} numbers"])


def new_parameters(growth: Growth) -> NewParameters:
    """The parameters that a growth has made: those of whole new blocks.

    Print it: it says what will be trained, by name and count. New slices of old
    parameters are told by `young`.

    Args:
        growth: What `expand_`, `grow_` or a grower gave, in this program.

    Examples:
        >>> import torch, meristem as ms
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
        ... )
        >>> growth = ms.grow_(net, {"0:depth": 1}, torch.randn(3, 4))
        >>> new_parameters(growth)
        0.2.weight: 64
        0.2.bias: 8
        2 new parameters, 72 numbers
    """
    return NewParameters(growth.fresh)


def young(growth: Growth) -> dict[str, Tensor]:
    """By name the parameters that have new entries, each with a mask of them.

    The masks are plain tensors of bools: they may be saved, and given to `freeze_old_`
    in a later run.

    Args:
        growth: What `expand_`, `grow_` or a grower gave, in this program.

    Examples:
        >>> import torch, meristem as ms
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> growth = ms.grow_(net, {"0": 2}, torch.randn(3, 4))
        >>> {name: int(mask.sum()) for name, mask in young(growth).items()}
        {'0.weight': 8, '0.bias': 2, '1.weight': 4}
    """
    return masks(growth.fresh, growth.resized)


class Frozen:
    """Old weights that do not move, until `remove` is called."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], Any]] = []

    def remove(self) -> None:
        """Let the old weights be trained again."""
        while self._undo:
            self._undo.pop()()


def freeze_old_(
    model: nn.Module, masks: Mapping[str, Tensor], optimizer: Optimizers = None
) -> Frozen:
    """Let training move only what is new; every old entry keeps its bits.

    Parameters without a mask need no gradient. Those with old and new entries get no
    gradient for the old ones, and after every step of the optimizer the old ones are put
    back, whatever weight decay or momentum did to them.

    Args:
        model: The grown model.
        masks: What `young` gave for the last growth.
        optimizer: The optimizer, or all of them; needed where parameters have old and new
            entries.

    Returns:
        A handle; `remove()` lets everything be trained again.

    Raises:
        GrowthRefused: A mask belongs to no parameter of this shape. A backward pass after
            a later growth says that the handle must be removed first.

    Examples:
        >>> import torch, meristem as ms
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> growth = ms.grow_(net, {"0": 2}, torch.randn(3, 4))
        >>> adamw = torch.optim.AdamW(net.parameters(), weight_decay=0.1)
        >>> old = net[0].weight[:8].clone()
        >>> handle = freeze_old_(net, young(growth), adamw)
        >>> net(torch.randn(3, 4)).square().mean().backward(); adamw.step()
        >>> torch.equal(net[0].weight[:8], old), net[1].bias.requires_grad
        (True, False)
    """
    held = inner(model)
    parameters = dict(held.named_parameters())
    for name, mask in masks.items():
        fits = name in parameters and parameters[name].shape == mask.shape
        if not fits or mask.dtype != torch.bool:
            raise GrowthRefused(
                f"the mask of {name} belongs to no parameter of its shape, or holds no "
                "bools. hint: take the masks of the last growth, of this model"
            )
    given = optimizers(optimizer)
    mixed = [name for name, mask in masks.items() if not bool(mask.all())]
    if mixed and not given:
        raise GrowthRefused(
            f"{mixed[0]} has old and new entries, which an optimizer moves together. "
            "hint: pass optimizer="
        )
    frozen = Frozen()
    for name, parameter in parameters.items():
        # A new block that is made after a frozen one is frozen, too.
        trained = name in masks
        if parameter.requires_grad != trained:
            frozen._undo.append(
                partial(parameter.requires_grad_, parameter.requires_grad)
            )
            parameter.requires_grad_(trained)
        if not trained:
            parameter.grad = None  # else the next step would move it
    kept = {}
    for name in mixed:
        parameter = parameters[name]
        mask = masks[name].to(parameter.device)
        kept[name] = (parameter, mask, parameter.detach().clone())
        hook = parameter.register_hook(partial(_of_the_new, name, mask))
        frozen._undo.append(hook.remove)

    def put_back(*_: Any) -> None:
        with torch.no_grad():
            for parameter, mask, old in kept.values():
                parameter.copy_(torch.where(mask, parameter, old))

    for one in given:
        frozen._undo.append(one.register_step_post_hook(put_back).remove)
    return frozen


def _of_the_new(name: str, mask: Tensor, gradient: Tensor) -> Tensor:
    if gradient.shape != mask.shape:
        raise GrowthRefused(
            f"{name} has grown since its old entries were frozen. hint: call remove() of "
            "the handle before a growth, and freeze_old_ after it"
        )
    return gradient * mask
