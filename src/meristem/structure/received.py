"""What a call of a model was given, and what to do where the model does not take it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from meristem.core.errors import DataError, DiscoveryError
from meristem.core.example import Example

# Characters of a value that is no array, and of torch's own words.
_LONGEST = 40
_MESSAGE = 200


def not_taken(model: nn.Module, example: Example, error: Exception) -> DiscoveryError:
    """What is told where a model does not take a call."""
    return DiscoveryError(
        f"the forward of {type(model).__name__} fails on the example "
        f"({type(error).__name__}: {_first_line(error)}). Received {received(example)}. "
        f"hint: {remedy(example, model)}"
    )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:_MESSAGE]


def check_numbers(example: Example) -> None:
    """Raise where a call holds NaN, of which nothing can be told."""
    for value in _leaves(example):
        real = _floating(value) and not value.is_meta
        if real and bool(torch.isnan(value).any()):
            raise DataError(
                f"the example holds NaN: {in_short(tuple(example))}. hint: clean the data"
            )


def received(example: Example) -> str:
    """The arguments of a call, arrays by their shapes."""
    described = f"arguments {in_short(example.args)}"
    if not example.kwargs:
        return described
    return f"{described} and keywords {in_short(example.kwargs)}"


def in_short(values: Any) -> str:
    """Nested values, arrays by their shapes."""
    return str(pytree.tree_map(_Shown, values))


class _Shown:
    def __init__(self, value: Any) -> None:
        self._value = value

    def __repr__(self) -> str:
        value = self._value
        if not hasattr(value, "shape"):
            return repr(value)[:_LONGEST]
        return f"{type(value).__name__} {tuple(value.shape)} {value.dtype}"


def other_dtypes(example: Example, model: nn.Module) -> tuple[torch.dtype, ...]:
    """The floating dtypes of a call and of the weights, where they have none in common."""
    given = {x.dtype for x in _leaves(example) if _floating(x)}
    weights = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if not given or not weights or given & weights:
        return ()
    return (given.pop(), weights.pop())


def remedy(example: Example, model: nn.Module) -> str:
    """What to pass in the place of a call that a model does not take."""
    leaves = _leaves(example)
    arrays = [
        x for x in leaves if hasattr(x, "__array__") and not isinstance(x, Tensor)
    ]
    if arrays:
        return (
            f"{type(arrays[0]).__name__} is no tensor; pass torch.as_tensor(...) of it"
        )
    sizes = [x for x in leaves if type(x) is int]
    if sizes and len(sizes) == len(leaves):
        shape = ", ".join(map(str, sizes))
        return f"these are sizes, not a tensor; pass torch.randn({shape})"
    dtypes = other_dtypes(example, model)
    if dtypes:
        return f"the weights are {dtypes[1]}; pass the example in that dtype"
    if len(example.args) == 1 and isinstance(example.args[0], list):
        return "a list is one argument; pass batch[0], or a tuple of arguments"
    if len(leaves) == 1 and isinstance(leaves[0], Tensor):
        return (
            "it does not take a tensor of this shape; pass one as the model is called"
        )
    return (
        "pass the example as the model is called: a tensor, a tuple of arguments or a "
        "dict of keyword arguments"
    )


def _leaves(example: Example) -> list[Any]:
    leaves: list[Any] = pytree.tree_leaves(tuple(example))
    return leaves


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
