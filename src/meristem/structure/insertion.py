"""New blocks in their places: copies of like blocks in a container, identity layers in a chain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from meristem.activations import IDENTITIES
from meristem.core.change import Insertion
from meristem.structure.twin import copy_part, named_tensors

CHAIN = "_meristem_chain"
"""The attribute of a grown nn.Sequential that says where its new layers stand: "after" or "before" the old one."""


def insert(
    model: nn.Module, insertion: Insertion, values: Mapping[tuple[int, str], Tensor] | None = None
) -> dict[int, tuple[nn.Module, nn.Module]]:
    """Put the blocks of an insertion in their places, on a twin or by surgery.

    Returns:
        For the place of every new block, the block that it was made after, and itself.
    """
    made = _insert_blocks(model, insertion) if insertion.form == "run" else _insert_layers(model, insertion)
    for (place, name), value in (values or {}).items():
        with torch.no_grad():
            named_tensors(made[place][1])[name].copy_(value)
    return made


def _insert_blocks(model: nn.Module, insertion: Insertion) -> dict[int, tuple[nn.Module, nn.Module]]:
    container = model.get_submodule(insertion.path)
    old = list(container._modules.items())
    run = old[insertion.first : insertion.first + insertion.size]
    taken = set(container._modules)
    placed: list[tuple[str, nn.Module | None]] = []
    made = {}
    for place, (number, new) in enumerate(zip(insertion.blocks, insertion.new, strict=True)):
        key, block = run[number]
        if new and block is not None:
            copied = copy_part(model, block)
            made[place] = (block, copied)
            key = next(f"{key}_{i}" for i in range(2, len(taken) + 3) if f"{key}_{i}" not in taken)
            taken.add(key)
            placed.append((key, copied))
        else:
            placed.append((key, block))
    entries = [*old[: insertion.first], *placed, *old[insertion.first + insertion.size :]]
    if all(key.isdigit() for key, _ in old):  # a list of modules stays one: append() and load_state_dict() count on it
        entries = [(str(i), module) for i, (_, module) in enumerate(entries)]
    container._modules.clear()
    container._modules.update(entries)
    return made


def _insert_layers(model: nn.Module, insertion: Insertion) -> dict[int, tuple[nn.Module, nn.Module]]:
    module = model.get_submodule(insertion.path)
    parts = list(module.children()) if hasattr(module, CHAIN) else [module]
    if insertion.form == "after":
        old, pairs = parts[0], list(zip(parts[1::2], parts[2::2], strict=True))
    else:
        old, pairs = parts[-1], [(act, layer) for layer, act in zip(parts[:-1:2], parts[1::2], strict=True)]
    made: dict[int, tuple[nn.Module, nn.Module]] = {}
    placed = []
    for place, (number, new) in enumerate(zip(insertion.blocks, insertion.new, strict=True)):
        if new:
            parent = pairs[number - 1][1] if number else old
            layer = identity_layer(parent, insertion.form)
            act = _activation(insertion.activation, layer, parent)
            made[place] = (parent, nn.ModuleList([act, layer]))
            placed.append((act, layer))
        elif number:
            placed.append(pairs[number - 1])
    parent_name, _, leaf = insertion.path.rpartition(".")
    if not placed:
        model.get_submodule(parent_name)._modules[leaf] = old
        return made
    order = [old, *(m for act, layer in placed for m in (act, layer))]
    if insertion.form == "before":
        order = [*(m for act, layer in placed for m in (layer, act)), old]
    chain = module if hasattr(module, CHAIN) else nn.Sequential().train(old.training)
    chain._modules.clear()
    chain._modules.update({str(i): m for i, m in enumerate(order)})
    setattr(chain, CHAIN, insertion.form)
    model.get_submodule(parent_name)._modules[leaf] = chain
    return made


def identity_layer(old: nn.Module, form: str) -> nn.Module:
    """A layer like `old` that starts as the identity of what `old` gives ("after") or takes ("before")."""
    weight = old.weight
    assert isinstance(weight, Tensor)
    width = weight.shape[0 if form == "after" else 1]
    layer: nn.Module
    if isinstance(old, nn.Linear):
        layer = nn.Linear(width, width, device="meta")
    else:
        assert isinstance(old, nn.modules.conv._ConvNd)
        odd = all(k % 2 for k in old.kernel_size)
        kernel = tuple(old.kernel_size) if odd else (1,) * len(old.kernel_size)
        kind = next(k for k in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(old, k))
        padding: Any = tuple(k // 2 for k in kernel)
        size: Any = kernel
        layer = kind(width, width, size, padding=padding, padding_mode=old.padding_mode, device="meta")
    for name, parameter in list(layer.named_parameters()):
        start = weight.detach().new_zeros(parameter.shape)
        if name == "weight" and not _is_fake(weight):
            start = nn.init.eye_(start) if start.dim() == 2 else nn.init.dirac_(start)
        setattr(layer, name, nn.Parameter(start, requires_grad=weight.requires_grad))
    return layer.train(old.training)


def _activation(kind: str, layer: nn.Module, old: nn.Module) -> nn.Module:
    if kind == "relu":
        return nn.ReLU().train(old.training)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    module = IDENTITIES[kind](weight.shape[0], dim=-1 if isinstance(layer, nn.Linear) else 1 - weight.dim())
    for name, parameter in list(module.named_parameters()):
        setattr(module, name, nn.Parameter(_like(weight, parameter.detach()), requires_grad=weight.requires_grad))
    return module.train(old.training)


def _like(weight: Tensor, value: Tensor) -> Tensor:
    """`value` with the dtype and on the device of a weight; data-free where the weight is."""
    return weight.detach().new_zeros(value.shape) if _is_fake(weight) else value.to(weight)


def _is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, torch._subclasses.fake_tensor.FakeTensor) or tensor.is_meta


def kin(parent: nn.Module, new: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Every tensor of a new block: its name inside the block, itself, and the parent's that it follows in the optimizer."""
    theirs = dict(parent.named_parameters()) | dict(parent.named_buffers())
    for name, tensor in named_tensors(new).items():
        leaf = name.rpartition(".")[2]
        relative = theirs.get(name) if name in theirs else theirs.get(leaf, theirs.get("bias", theirs.get("weight")))
        assert relative is not None
        yield name, tensor, relative
