"""Copies of a model to look at: data-free fakes, or real tensors of another kind; the
model itself is never touched.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from meristem.core.change import AttributeChange
from meristem.core.errors import DiscoveryError
from meristem.core.example import Example as Example
from meristem.core.example import as_example as as_example
from meristem.core.growth import LINEAGE
from meristem.structure.hooks import follow_forward, follow_hook

# The models whose modules may be changed: twins, and what surgery has opened.
_WRITABLE: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def check_writable(model: nn.Module) -> None:
    """Raise unless a model is a twin, or surgery is at work on it."""
    if model not in _WRITABLE:
        raise AssertionError(
            "only surgery changes a model; everything else works on twins"
        )


@contextlib.contextmanager
def opened(model: nn.Module) -> Iterator[None]:
    """Let a user's model be changed. Surgery alone may ask for that; a test holds it."""
    twin_already = model in _WRITABLE
    _WRITABLE.add(model)
    try:
        yield
    finally:
        if not twin_already:
            _WRITABLE.discard(model)


_FORWARD: tuple[str, ...] = ("_forward_hooks", "_forward_pre_hooks")
_HOOKS = (*_FORWARD, "_backward_hooks", "_backward_pre_hooks")
Convert = Callable[[str, Tensor], Tensor]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; a shared one under its first name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def submodule(model: nn.Module, name: str) -> nn.Module:
    """The module of a dotted name; "" is the model.

    A child that has the name of a method ("parameters") hides behind it from getattr,
    and so from `nn.Module.get_submodule`.

    Raises:
        AttributeError: There is none, as torch has it.
    """
    module: nn.Module = model
    for key in name.split(".") if name else ():
        child = module._modules.get(key)
        if child is None:
            raise AttributeError(f"{type(module).__name__} has no module {key!r}")
        module = child
    return module


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a state dict names, with every name of a shared tensor; no hook is called."""
    stored: dict[str, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        dotted = f"{prefix}." if prefix else ""
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if (
                    tensor is not None
                    and name not in module._non_persistent_buffers_set
                ):
                    stored[f"{dotted}{name}"] = tensor
    return stored


def twin(model: nn.Module, convert: Convert) -> nn.Module:
    """A deep copy of the module tree whose tensors are made by `convert(name, tensor)`.

    Hooks that are part of the model come with it, see `hooks`.
    """
    memo: dict[int, Any] = {}
    for name, tensor in named_tensors(model).items():
        new = convert(name, tensor)
        if isinstance(tensor, nn.Parameter) and not isinstance(new, nn.Parameter):
            # Integers cannot require gradients; a twin may hold them in place of
            # weights.
            new = nn.Parameter(
                new, requires_grad=tensor.requires_grad and new.is_floating_point()
            )
        memo[id(tensor)] = new
    copied = _copied(model, memo)
    _WRITABLE.add(copied)
    return copied


def copy_part(
    model: nn.Module, part: nn.Module, given: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """A deep copy of one module, which holds the `given` tensors, else copies of its
    own.

    What it shares with the rest of the model (weights, modules, a config) stays shared.
    """
    memo: dict[int, Any] = {}
    for module in modules_without(model, part):
        memo[id(module)] = module
        # What the rest of the model holds stays shared: weights, modules, configs.
        held = [
            *vars(module).values(),
            *module.parameters(False),
            *module.buffers(False),
        ]
        for value in held:
            is_config = hasattr(value, "__dict__") and not isinstance(value, nn.Module)
            if isinstance(value, Tensor) or is_config:
                memo[id(value)] = value
    for name, tensor in named_tensors(part).items():
        if id(tensor) in memo:
            continue
        new = (given or {}).get(name)
        if new is None:
            new = tensor.detach().clone()
        new = new.to(device=tensor.device, dtype=tensor.dtype)
        if not isinstance(tensor, nn.Parameter):
            new = new.clone()  # a forward may write into it
        else:
            new = nn.Parameter(new, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = new
    # It becomes a part of the same model: what its hooks fill is shared.
    return _copied(part, memo, own=False)


def modules_without(model: nn.Module, *parts: nn.Module) -> list[nn.Module]:
    """The modules that the model would still hold without some parts; what is shared
    with them counts.
    """
    found: dict[int, nn.Module] = {}
    pending = [model]
    while pending:
        module = pending.pop()
        if id(module) not in found and not any(module is part for part in parts):
            found[id(module)] = module
            pending += module.children()
    return list(found.values())


def _read(holder: Any, name: str) -> Any:
    """A property, or None where it cannot be read now."""
    try:
        return getattr(holder, name)
    except (AttributeError, KeyError, TypeError, ValueError, NotImplementedError):
        return None


def table_of(value: Any) -> Mapping[str, Any]:
    """What a plain object or a dict that a module holds says by name; nothing else has
    any.

    A config may hold its numbers in its class.
    """
    if isinstance(value, dict):
        return {key: one for key, one in value.items() if isinstance(key, str)}
    if isinstance(value, (Tensor, nn.Module)) or callable(value):
        return {}
    if not hasattr(value, "__dict__"):
        return {}
    found: dict[str, Any] = {}
    for kind in reversed(type(value).__mro__):
        for name, one in vars(kind).items():
            if type(one) in (int, tuple, list) and not name.startswith("_"):
                found[name] = one
            elif isinstance(one, property) and one.fset is not None:
                # A number that is kept in another form (num_labels, in id2label).
                number = _read(value, name)
                if type(number) is int:
                    found[name] = number
    return {**found, **vars(value)}


def set_attribute(
    model: nn.Module, module: str, attribute: str, value: Any
) -> Callable[[], None]:
    """Set an attribute of a module, or "config.n_layer" in a plain object or a dict that
    it holds; returns what undoes it.

    The object itself may be the user's, and other models may be built from it: the
    module, and those inside it that hold the object, get a changed copy.
    """
    check_writable(model)
    holder = submodule(model, module)
    outer, _, inner = attribute.partition(".")
    if not inner:
        old = getattr(holder, attribute)
        setattr(holder, attribute, value)
        return lambda: setattr(holder, attribute, old)
    present = getattr(holder, outer)
    changed = _with_value(present, inner.split("."), value)
    held = []
    for one in holder.modules():
        for key, other in vars(one).items():
            if other is present:
                held.append((one, key))
    for one, key in held:
        one.__dict__[key] = changed

    def undo() -> None:
        for one, key in held:
            one.__dict__[key] = present

    return undo


def apply_edits(model: nn.Module, edits: Sequence[AttributeChange]) -> None:
    """Set module attributes."""
    for edit in edits:
        set_attribute(model, edit.module, edit.attribute, edit.after)


def get_attribute(model: nn.Module, module: str, attribute: str) -> Any:
    """The attribute that `set_attribute` would set."""
    value: Any = submodule(model, module)
    for key in attribute.split("."):
        value = value[key] if isinstance(value, dict) else getattr(value, key)
    return value


def _with_value(holder: Any, path: Sequence[str], value: Any) -> Any:
    """A shallow copy of an object or a dict in which one number differs."""
    key, *rest = path
    is_table = isinstance(holder, dict)
    if rest:
        value = _with_value(
            holder[key] if is_table else getattr(holder, key), rest, value
        )
    changed = copy.copy(holder)
    if is_table:
        changed[key] = value
    else:
        # Also where the class is frozen: the copy is ours.
        object.__setattr__(changed, key, value)
        _keep_names(holder, changed)
    return changed


def _keep_names(before: Any, after: Any) -> None:
    """Give classes the names that they had, where setting their number renames them."""
    old, new = (vars(one).get("id2label") for one in (before, after))
    if new is old or not isinstance(old, dict) or not isinstance(new, dict):
        return
    named = {place: old.get(place, name) for place, name in new.items()}
    after.id2label = named
    after.label2id = {name: place for place, name in named.items()}


def _copied(model: nn.Module, memo: dict[int, Any], own: bool = True) -> nn.Module:
    for module in model.modules():
        for value in vars(module).values():
            if id(value) in memo:
                continue
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
            # A dozen empty tables in every module are most of what a copy costs.
            elif type(value) in (dict, OrderedDict) and not value:
                memo[id(value)] = type(value)()
    # Past growths are many numbers, and none of them changes.
    line = vars(model).get(LINEAGE)
    if line is not None:
        memo[id(line)] = list(line)
    # A hook may hold all of a training: it is not copied, but built anew below.
    hooks = [entry for entry in _hooks(model) if not _belongs_to_torch(entry.hook)]
    for entry in hooks:
        memo[id(entry.hook)] = _silent
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise DiscoveryError(
            f"{type(model).__name__} cannot be deep-copied ({type(error).__name__}: "
            f"{error}). Meristem looks at a copy, never at the model itself. hint: "
            "keep what cannot be copied (locks, files, generators) outside the module"
        ) from error
    for place, module in model.named_modules():
        if "forward" in vars(module):
            present = _function_on(module)
            forward = follow_forward(present, memo, place)
            copy_of = memo[id(module)]
            if forward is not present and present is not vars(module)["forward"]:
                forward = types.MethodType(forward, copy_of)
            if forward is not present:
                copy_of.forward = forward
    for entry in hooks:
        memo.pop(id(entry.hook), None)
    for entry in hooks:
        kept = None
        if entry.table in _FORWARD:
            kept = follow_hook(entry.hook, memo, own, entry.place)
        table = getattr(memo[id(entry.module)], entry.table)
        if kept is None:
            del table[entry.key]
        else:
            table[entry.key] = kept
    return copied


def _function_on(module: nn.Module) -> Any:
    """A forward that was put on a module itself; without its module, where it is bound
    to that.
    """
    forward = vars(module)["forward"]
    if getattr(forward, "__self__", None) is module:
        return forward.__func__
    return forward


class _Hook(NamedTuple):
    """A hook: the module that it hangs on, with its name, the table and the key."""

    place: str
    module: nn.Module
    table: str
    key: int
    hook: Any


def _hooks(model: nn.Module) -> Iterator[_Hook]:
    for place, module in model.named_modules():
        for table in _HOOKS:
            for key, hook in getattr(module, table).items():
                yield _Hook(place, module, table, key, hook)


def _belongs_to_torch(hook: Any) -> bool:
    where: str = getattr(hook, "__module__", "") or ""
    return where.startswith("torch.nn.utils")


def _silent(*_: Any) -> None:
    """Stands in for a user's hook while a model is copied."""


def fake_mode(fake: bool) -> FakeTensorMode | None:
    return FakeTensorMode(allow_non_fake_inputs=True) if fake else None


@contextlib.contextmanager
def looking(mode: FakeTensorMode | None, fused: bool = False) -> Iterator[None]:
    """Run a twin without gradients, without fused attention kernels, under the fake
    mode if there is one.

    Args:
        mode: The fake mode, or None for real numbers.
        fused: Whether fused kernels may run, where nobody looks at the operations.
    """
    # The fast path of torch.nn.MultiheadAttention is one opaque operation.
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    # So is a fused recurrent layer.
    onednn = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = onednn and fused  # type: ignore[assignment]
    # It reports every shape that does not fit, and such shapes are tried on purpose.
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with torch.no_grad(), mode or contextlib.nullcontext():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        torch.backends.mkldnn.enabled = onednn
        log.setLevel(level)


def map_tensors(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`tree` with every tensor replaced."""
    return pytree.tree_map(
        lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree
    )
