"""New blocks in their places: copies of like blocks in a container, layers in a chain."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn

from meristem.core.change import Insertion
from meristem.structure.chains import insert_layers
from meristem.structure.twin import check_writable, copy_part, named_tensors, submodule

BlockValues = Mapping[tuple[int, str], Tensor]
"""Tensors of new blocks, by the block's place and their name inside it."""
Made = dict[int, tuple[nn.Module, nn.Module]]
"""For the place of every new block, the block that it was made after, and itself."""


def insert(
    model: nn.Module, insertion: Insertion, values: BlockValues | None = None
) -> Made:
    """Put the blocks of an insertion in their places, on a twin or by surgery.

    New blocks hold the very tensors of `values`, where these name them; else copies of
    their parents'.
    """
    check_writable(model)
    return _INSERTED[insertion.form](model, insertion, values or {})


def _insert_layers(model: nn.Module, insertion: Insertion, values: BlockValues) -> Made:
    made = insert_layers(model, insertion)
    for (place, name), value in values.items():
        _hold(made[place][1], name, value)
    return made


def _hold(block: nn.Module, name: str, value: Tensor) -> None:
    """Let a block hold a tensor, under every name that it has there."""
    old = named_tensors(block)[name]
    held: Tensor = value
    if isinstance(old, nn.Parameter):
        fitted = value.to(device=old.device, dtype=old.dtype)
        held = nn.Parameter(fitted, requires_grad=old.requires_grad)
    for module in block.modules():
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is old:
                    table[key] = held  # type: ignore[assignment]


def _insert_blocks(model: nn.Module, insertion: Insertion, values: BlockValues) -> Made:
    container = submodule(model, insertion.path)
    old = list(container._modules.items())
    # Other runs may stand before and behind in the same container.
    end = insertion.first + insertion.size
    run = old[insertion.first : end]
    taken = set(container._modules)
    placed: list[tuple[str, nn.Module | None]] = []
    made = {}
    for place, number in enumerate(insertion.blocks):
        key, block = run[number]
        if insertion.new[place] and block is not None:
            given = {}
            for (number_of_block, name), value in values.items():
                if number_of_block == place:
                    given[name] = value
            copied = copy_part(model, block, given)
            made[place] = (block, copied)
            # Keys of named containers stay; new blocks get one beside their parent.
            key = _free_key(key, taken)
            taken.add(key)
            placed.append((key, copied))
        else:
            placed.append((key, block))
    entries = [*old[: insertion.first], *placed, *old[end:]]
    # A list of modules stays one: append() and load_state_dict() count on its keys.
    if all(key.isdigit() for key, _ in old):
        entries = [(str(i), module) for i, (_, module) in enumerate(entries)]
    container._modules.clear()
    container._modules.update(entries)
    return made


def _free_key(key: str, taken: set[str]) -> str:
    number = 2
    while f"{key}_{number}" in taken:
        number += 1
    return f"{key}_{number}"


_INSERTED: dict[str, Callable[[nn.Module, Insertion, BlockValues], Made]] = {
    "run": _insert_blocks,
    "after": _insert_layers,
    "before": _insert_layers,
}


def kin(parent: nn.Module, new: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Every tensor of a new block, and the parent's that it follows in the optimizer.

    Yields:
        Its name inside the block, itself, the parent's.
    """
    theirs = named_tensors(parent)
    for name, tensor in named_tensors(new).items():
        relative = theirs.get(name)
        if (
            relative is None
        ):  # an identity layer, or its activation: they follow by name
            leaf = name.rpartition(".")[2]
            nearest = [theirs.get(key) for key in (leaf, "bias", "weight")]
            relative = next(tensor for tensor in nearest if tensor is not None)
        yield name, tensor, relative
