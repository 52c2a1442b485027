"""New blocks: fresh weights for them, and the gain that they promise."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from meristem.core.axis import Axis
from meristem.core.change import Insertion, Plan, Rescaling
from meristem.core.errors import GrowthRefused
from meristem.core.offer import Blocks
from meristem.lab.laboratory import Lab
from meristem.structure import resolve, with_insertions
from meristem.structure.depth import Depth
from meristem.structure.insertion import Made, insert
from meristem.structure.twin import named_tensors
from meristem.structure.undisturbed import undisturbed
from meristem.surgery.probe import comparable, relative_change
from meristem.surgery.silence import silence


def only_runs(lab: Lab, axis: Axis, method: str) -> Depth:
    """The depth of an axis whose blocks can be copied.

    Raises:
        GrowthRefused: It is a place in a chain.
    """
    depth = lab.depth(axis)
    if not depth.copied:
        raise GrowthRefused(
            f"{method} copies blocks, and {axis.name!r} is a place in a chain, which "
            "has none. hint: how.ZeroBlock() inserts an identity layer there"
        )
    return depth


def named_blocks(method: str, depth: Depth, places: Sequence[int]) -> Sequence[int]:
    """The places of blocks that a user has named.

    Raises:
        GrowthRefused: One of them cannot be copied, or there is none.
    """
    wrong = [place for place in places if not depth.fixed <= place < depth.size]
    if wrong:
        raise GrowthRefused(
            f"{method} names block {wrong[0]}, which {depth.name!r} cannot copy: it can "
            f"those from {depth.fixed} to {depth.size - 1}"
        )
    return places


def fresh_blocks(lab: Lab, insertion: Insertion) -> dict[tuple[int, str], Tensor]:
    """Weights as the layers of a new block draw them.

    Every module that has `reset_parameters` calls it, the inner ones first. What has
    none (a bare scale) starts as in the block that it is made after; what is shared
    stays.
    """
    # Without data: only the new blocks need any.
    copied = lab.skeleton()
    known = {id(module) for module in copied.modules()}
    present = {id(tensor) for tensor in named_tensors(copied).values()}
    started = _as_parents(lab, insertion)
    values: dict[tuple[int, str], Tensor] = {}
    seed = int(torch.randint(2**62, (), generator=lab.generator))
    with undisturbed():
        torch.manual_seed(seed)
        for place, (_, block) in insert(copied, insertion, started).items():
            # Inner modules first, so that an outer one has the last word.
            for module in reversed(list(block.modules())):
                if id(module) not in known:
                    _reset(module, present)
            for name, tensor in named_tensors(block).items():
                if id(tensor) not in present:
                    values[place, name] = tensor.detach()
    return values


def _as_parents(lab: Lab, insertion: Insertion) -> dict[tuple[int, str], Tensor]:
    """The tensors of the blocks that new ones are made after."""
    depth = lab.structure.depths[insertion.axis]
    started: dict[tuple[int, str], Tensor] = {}
    if not depth.copied:
        return started
    for place in insertion.new_places:
        parent = f"{depth.blocks[insertion.blocks[place]]}."
        for name in lab.values:
            if name.startswith(parent):
                started[place, name.removeprefix(parent)] = lab.values[name]
    return started


def _reset(module: nn.Module, present: set[int]) -> None:
    """Let a module of a new block draw its weights, unless it shares some."""
    reset = getattr(module, "reset_parameters", None)
    reset = reset or getattr(module, "_reset_parameters", None)
    if not callable(reset):
        return
    for tensor in (*module.parameters(), *module.buffers()):
        if id(tensor) in present:
            return
    with contextlib.suppress(TypeError):  # one that wants arguments
        reset()


def _planned(lab: Lab, axis: Axis, blocks: Blocks) -> Plan:
    """The plan with the new blocks where they are wanted.

    It is re-traced only where that is not behind the present ones.

    Raises:
        GrowthRefused: The model cannot take them.
    """
    plan = resolve(lab.structure, {axis.name: sum(blocks.insertion.new)})
    # The plan speaks of blocks at the end; elsewhere the numbers may follow otherwise.
    if plan.insertions != (blocks.insertion,):
        plan = with_insertions(lab.structure, plan, [blocks.insertion])
    if plan.refusal is not None:
        raise GrowthRefused(f"{axis.name} cannot grow: {plan.refusal}")
    return plan


def stirs(lab: Lab, axis: Axis, blocks: Blocks) -> bool:
    """Whether new blocks, as they are, change what the model gives on the example.

    Raises:
        GrowthRefused: The model cannot take them.
    """
    before, after, plan = lab.outputs_with(_planned(lab, axis, blocks), blocks)
    return not comparable(before) or relative_change(plan, before, after) > 0


def silenced(lab: Lab, insertion: Insertion) -> Blocks:
    """New blocks as copies that add nothing to the stream; in a chain, identity layers."""
    depth = lab.structure.depths[insertion.axis]
    values: dict[tuple[int, str], Tensor] = {}
    if not depth.copied:
        return Blocks(insertion)
    silent = silence(lab.structure, insertion)
    for place in insertion.new_places:
        block = depth.blocks[insertion.blocks[place]]
        for name, still in silent.items():
            if f"{block}.{name}" not in lab.values:
                raise GrowthRefused(
                    f"a copy of {block} cannot be silenced: its {name} belongs to other "
                    "blocks, too. hint: a method that does not preserve the function, as "
                    "how.Stack(), grows it"
                )
            old = lab.values[f"{block}.{name}"]
            values[place, name] = torch.full_like(old, still)
    return Blocks(insertion, values)


def sharing(lab: Lab, insertion: Insertion) -> Blocks:
    """Blocks that add to the stream, together with their copies, what each has added
    alone; the copies take the optimizer's state along.

    Raises:
        GrowthRefused: What a block adds is not its own.
    """
    depth = lab.structure.depths[insertion.axis]
    silent = silence(lab.structure, insertion)
    told = f"the blocks of {insertion.axis} cannot share what they add to the stream"
    # Behind a norm they silence nothing and scale all the same; what the last block holds
    # together with another is missing from them.
    missing = set(depth.silent[-1]) - silent.keys()
    if not silent or (missing and insertion.axis in lab.structure.loud):
        raise GrowthRefused(
            f"{told}: no tensor of theirs alone scales it. hint: share=False"
        )
    tensors = named_tensors(lab.structure.model)
    # By module: one that stands in two places of the model holds its own all the same.
    holders: Counter[int] = Counter()
    for module in lab.structure.model.modules():
        holders.update(id(p) for p in module.parameters(recurse=False))
    rescaled = {}
    for block, members in Counter(insertion.blocks).items():
        if members == 1:
            continue
        for name, still in silent.items():
            known = f"{depth.blocks[block]}.{name}"
            # What is held twice may be known under its other name.
            if known not in tensors or holders[id(tensors[known])] > 1:
                raise GrowthRefused(
                    f"{told}: {known} belongs to another block, too. hint: share=False"
                )
            rescaled[known] = Rescaling(1 / members, -still)
    return Blocks(insertion, inherits=True, rescaled=rescaled)


def inserted(lab: Lab, axis: Axis, blocks: Blocks) -> tuple[nn.Module, Made]:
    """A copy of the model with the new blocks in their places.

    Returns:
        The copy, and for every place the block before it and itself.
    """
    return lab.with_blocks(_planned(lab, axis, blocks), blocks)


def gains(lab: Lab, axis: Axis, blocks: Blocks) -> tuple[float, ...]:
    """For every new block the norm of the gradient that its weights receive.

    On the first growth batch.
    """
    return lab.block_gradients(_planned(lab, axis, blocks), blocks)
