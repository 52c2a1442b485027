"""Forward hooks that are part of a model go with its copies; those that only look on
stay behind.

A hook is part of the model where it may change what a module gives, or writes into the
model. On a copy it has to mean the copy: what it holds of the model is exchanged for the
copy's own, and containers that it fills are its own, too.
"""

from __future__ import annotations

import builtins
import contextvars
import dis
import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from meristem.core.errors import DiscoveryError

_PLAIN = (
    type(None), bool, int, float, complex, str, bytes, slice, range, type(...),
    torch.dtype, torch.device, torch.Size, types.ModuleType, types.BuiltinFunctionType,
    type,
)  # fmt: skip


_CONTAINERS = (list, tuple, set, dict)


class _Outside(Exception):
    """A hook holds something that is neither the model's nor a plain value."""


def follow_hook(hook: Any, copies: Mapping[int, Any], own: bool, place: str) -> Any:
    """The hook for a copy of the model, or None where it can stay behind.

    Args:
        hook: A forward hook or forward pre-hook.
        copies: What stands for the objects of the model in its copy, by their ids.
        own: Whether containers that the hook fills are copied: not where the copy
            becomes a part of the same model.
        place: The module that it hangs on, for the words of an error.

    Raises:
        DiscoveryError: It may change what the module gives, and holds something outside
            of the model.
    """
    function = _function_of(hook)
    changes = function is None or _gives_something(function.__code__)
    if not changes and not _writes_into_model(hook, function, copies):
        return None
    try:
        return _Rebinding(copies, own).value(hook)
    except _Outside as outside:
        if not changes:
            return None
        name = getattr(function or hook, "__qualname__", type(hook).__name__)
        raise DiscoveryError(
            f"the forward hook {name!r} of {place or 'the model'} may change what that "
            f"module gives, and holds {outside}, which is outside of the model, so that "
            "it cannot run on a copy. hint: let it return nothing, keep what it needs in "
            "a module of the model, or remove it while the model grows"
        ) from None


def follow_forward(forward: Any, copies: Mapping[int, Any], place: str) -> Any:
    """A forward that was put on a module itself, for a copy of the model: one that holds
    the model ("lambda x: old(x) * 2") holds the copy there.

    Raises:
        DiscoveryError: It holds something else that is neither the model's nor a plain
            value.
    """
    if not _reaches(forward, copies, set()):
        return forward
    try:
        return _Rebinding(copies, own=True).value(forward)
    except _Outside as outside:
        raise DiscoveryError(
            f"the forward that was put on {place or 'the model'} itself holds the model, "
            f"and {outside}, so that it cannot run on a copy. hint: define it in the class"
        ) from None


def _reaches(held: Any, copies: Mapping[int, Any], seen: set[int]) -> bool:
    """Whether what a function holds leads to a module of the model."""
    if id(held) in seen:
        return False
    seen.add(id(held))
    if isinstance(held, nn.Module):
        return id(held) in copies
    inside: list[Any] = []
    if isinstance(held, types.MethodType):
        inside = [held.__func__, held.__self__]
    elif isinstance(held, functools.partial):
        inside = [held.func, *held.args, *held.keywords.values()]
    elif isinstance(held, types.FunctionType):
        inside = _held(held)
    return any(_reaches(one, copies, seen) for one in inside)


def _function_of(hook: Any) -> Any:
    """The Python function behind a hook, or None."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    if isinstance(hook, types.MethodType):
        hook = hook.__func__
    if not isinstance(hook, types.FunctionType):
        call = vars(type(hook)).get("__call__")
        hook = call if isinstance(call, types.FunctionType) else None
    return hook


def _gives_something(code: types.CodeType) -> bool:
    """Whether a function may return anything but None."""
    before = None
    for step in dis.get_instructions(code):
        if step.opname == "RETURN_CONST" and step.argval is not None:
            return True
        if step.opname == "RETURN_VALUE":
            constant = before is not None and before.opname == "LOAD_CONST"
            if not (constant and before is not None and before.argval is None):
                return True
        before = step
    return False


def _writes_into_model(hook: Any, function: Any, copies: Mapping[int, Any]) -> bool:
    """Whether a hook that gives nothing can leave something for the forward to read."""
    held = [getattr(hook, "__self__", None), *_held(function)]
    if any(id(value) in copies for value in held if value is not None):
        return True
    if any(_is_context(value) for value in _globals_of(function).values()):
        return True
    return any(
        step.opname in ("STORE_ATTR", "STORE_SUBSCR")
        for step in dis.get_instructions(function.__code__)
    )


def _held(function: types.FunctionType) -> list[Any]:
    cells = function.__closure__ or ()
    held = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in cells:
        with_content = cell != types.CellType()
        if with_content:
            held.append(cell.cell_contents)
    return held


def _globals_of(function: types.FunctionType) -> dict[str, Any]:
    """The global values that a function, or one inside it, names."""
    found = {}
    for name in _names(function.__code__):
        if name in function.__globals__ and not hasattr(builtins, name):
            found[name] = function.__globals__[name]
    return found


def _names(code: types.CodeType) -> Iterator[str]:
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield step.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _is_context(value: Any) -> bool:
    """Whether a value belongs to the call that is running, as a context variable does."""
    parts = [value, *getattr(value, "__dict__", {}).values()]
    return any(isinstance(part, contextvars.ContextVar) for part in parts)


def _is_known(value: Any) -> bool:
    """Whether a global may be shared with the hook of a copy."""
    shared = isinstance(value, (*_PLAIN, *_CONTAINERS, Tensor, nn.Module))
    return shared or _is_context(value) or callable(value)


class _Rebinding:
    """Puts the copy's objects in the place of the model's."""

    def __init__(self, copies: Mapping[int, Any], own: bool) -> None:
        self._copies, self._own = copies, own
        self._seen: dict[int, Any] = {}

    def value(self, held: Any) -> Any:
        """What a hook of the copy holds in place of a value."""
        if id(held) in self._copies:
            return self._copies[id(held)]
        if id(held) in self._seen:
            return self._seen[id(held)]
        # A module or a tensor beside the model is a constant to it.
        if isinstance(held, (*_PLAIN, Tensor, nn.Module)) or _is_context(held):
            return held
        if isinstance(held, types.FunctionType):
            return self._function(held)
        if isinstance(held, types.MethodType):
            return types.MethodType(held.__func__, self.value(held.__self__))
        if isinstance(held, functools.partial):
            args = [self.value(one) for one in held.args]
            keywords = {key: self.value(one) for key, one in held.keywords.items()}
            return functools.partial(self.value(held.func), *args, **keywords)
        if type(held) in _CONTAINERS:
            return self._container(held)
        raise _Outside(f"an object of class {type(held).__name__}")

    def _container(self, held: Any) -> Any:
        if not self._own:
            return held
        if isinstance(held, dict):
            return {key: self.value(one) for key, one in held.items()}
        return type(held)(self.value(one) for one in held)

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        outer = function.__globals__
        for name, value in _globals_of(function).items():
            if type(value) in _CONTAINERS and self._own:
                outer = {**outer, name: self._container(value)}
            elif not _is_known(value):
                raise _Outside(f"the global {name!r}")
        cells = function.__closure__ or ()
        # Known before its cells are filled: it may hold itself.
        empty = tuple(types.CellType() for _ in cells)
        made = types.FunctionType(
            function.__code__, outer, function.__name__, None, empty
        )
        self._seen[id(function)] = made
        for cell, new in zip(cells, empty, strict=True):
            if cell != types.CellType():
                new.cell_contents = self.value(cell.cell_contents)
        made.__defaults__ = self.value(function.__defaults__)
        made.__kwdefaults__ = self.value(function.__kwdefaults__)
        made.__qualname__, made.__module__ = function.__qualname__, function.__module__
        return made
