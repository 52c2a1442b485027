"""The arguments of one call of a model, and how they are stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Example(NamedTuple):
    """The arguments of one call of a model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def as_example(example: Any) -> Example:
    """The (args, kwargs) of a call, from a tensor, a tuple of arguments or a dict of
    keyword arguments.
    """
    if isinstance(example, Example):
        return example
    if isinstance(example, dict):
        return Example((), dict(example))
    if isinstance(example, tuple):
        return Example(example, {})
    if example is None:
        raise TypeError(
            "an example input is needed: a tensor, a tuple of arguments or a dict of "
            "keyword arguments"
        )
    return Example((example,), {})


def example_json(value: Any) -> Any:
    """A call in plain types: tensors by shape, those of integers by their values, too."""
    if isinstance(value, Tensor):
        entry: dict[str, Any] = {
            "tensor": list(value.shape),
            "dtype": str(value.dtype).removeprefix("torch."),
        }
        # Indices mean something, and must stay in range; noise will do for the rest.
        if not value.is_floating_point() and not value.is_complex():
            entry["values"] = value.flatten().tolist()
        return entry
    if isinstance(value, Example):
        return {"args": example_json(value.args), "kwargs": example_json(value.kwargs)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [example_json(entry) for entry in value]}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: example_json(entry) for key, entry in value.items()}}
    return {"unknown": type(value).__name__}


def example_from(stored: Any) -> Any:
    """A call like the stored one; floating-point tensors are drawn anew, always alike."""
    if "tensor" in stored:
        dtype = getattr(torch, stored["dtype"])
        if "values" in stored:
            return torch.tensor(stored["values"], dtype=dtype).reshape(stored["tensor"])
        # Not zeros: these would hide a wrong edit.
        generator = torch.Generator().manual_seed(0)
        return torch.randn(stored["tensor"], generator=generator).to(dtype)
    if "args" in stored:
        return Example(example_from(stored["args"]), example_from(stored["kwargs"]))
    if "dict" in stored:
        return {key: example_from(entry) for key, entry in stored["dict"].items()}
    if "list" in stored:
        return [example_from(entry) for entry in stored["list"]]
    if "tuple" in stored:
        return tuple(example_from(entry) for entry in stored["tuple"])
    if "unknown" in stored:
        raise ValueError(
            f"the example of this plan holds a {stored['unknown']}, which JSON cannot "
            "keep. hint: pass example= when the plan is applied"
        )
    return stored["value"]
