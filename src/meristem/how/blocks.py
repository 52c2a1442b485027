"""New blocks: fresh weights for them, and the gain that they promise."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from meristem.core.axis import Axis
from meristem.core.change import Insertion, Plan
from meristem.core.errors import GrowthRefused
from meristem.core.offer import Blocks
from meristem.statistics.losses import called, measured
from meristem.structure.depth import Depth
from meristem.structure.discover import apply_edits
from meristem.structure.insertion import insert
from meristem.structure.planning import resolve, with_insertions
from meristem.structure.twin import named_tensors
from meristem.structure.undisturbed import undisturbed
from meristem.surgery.verify import comparable, relative_change, run
from meristem.view import View


def only_runs(view: View, axis: Axis, method: str) -> Depth:
    """The depth of an axis whose blocks can be copied.

    Raises:
        GrowthRefused: It is a place in a chain.
    """
    depth = view.structure.depths[axis.name]
    if depth.form != "run":
        raise GrowthRefused(
            f"{method} copies blocks, and {axis.name!r} is a place in a chain, which has none. hint: how.ZeroBlock() "
            "inserts an identity layer there"
        )
    return depth


def fresh_blocks(view: View, insertion: Insertion) -> dict[tuple[int, str], Tensor]:
    """Weights as the layers of a new block draw them: every module that has `reset_parameters` calls it, the inner ones
    first. What has none (a bare scale) starts as in the block that it is made after; what is shared stays.
    """
    values: dict[tuple[int, str], Tensor] = {}
    copied = view.copied()
    present = {id(tensor) for tensor in named_tensors(copied).values()}
    known = {id(module) for module in copied.modules()}
    with undisturbed():
        torch.manual_seed(int(torch.randint(2**62, (), generator=view.generator)))
        for place, (_, block) in insert(copied, insertion).items():
            for module in reversed(list(block.modules())):
                reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
                own = [*module.parameters(), *module.buffers()]
                if callable(reset) and id(module) not in known and not any(id(t) in present for t in own):
                    with contextlib.suppress(TypeError):  # one that wants arguments
                        reset()
            values |= {(place, n): t.detach() for n, t in named_tensors(block).items() if id(t) not in present}
    return values


def _planned(view: View, axis: Axis, blocks: Blocks) -> Plan:
    """The plan with the new blocks where they are wanted; re-traced only where that is not behind the present ones.

    Raises:
        GrowthRefused: The model cannot take them.
    """
    plan = resolve(view.structure, {axis.name: sum(blocks.insertion.new)})
    if plan.insertions != (blocks.insertion,):
        plan = with_insertions(view.structure, plan, [blocks.insertion])
    if plan.refusal is not None:
        raise GrowthRefused(f"{axis.name} cannot grow: {plan.refusal}")
    return plan


def stirs(view: View, axis: Axis, blocks: Blocks) -> bool:
    """Whether new blocks, as they are, change what the model gives on the example.

    Raises:
        GrowthRefused: The model cannot take them.
    """
    model, example = view.structure.model, view.structure.example
    plan = _planned(view, axis, blocks)
    before, after = run(model, view.values, example), run(model, view.values, example, plan, [blocks])
    return not comparable(before) or relative_change(plan, before, after) > 0


def inserted(view: View, axis: Axis, blocks: Blocks) -> tuple[nn.Module, dict[int, tuple[nn.Module, nn.Module]]]:
    """A copy of the model with the new blocks in their places, and for every place the block before it and itself."""
    plan = _planned(view, axis, blocks)
    copied = view.copied().eval()
    made = insert(copied, blocks.insertion, blocks.values)
    apply_edits(copied, plan.counts)
    return copied, made


def gains(view: View, axis: Axis, blocks: Blocks) -> tuple[float, ...]:
    """For every new block the norm of the gradient that its weights receive on the first growth batch."""
    copied, made = inserted(view, axis, blocks)
    copied.zero_grad()
    loss = measured(lambda: called(view.loss, copied, view.batches[0]))  # type: ignore[arg-type]
    if not loss.requires_grad:
        return (0.0,) * len(made)
    parameters = [[p for p in block.parameters() if p.requires_grad] for _, block in made.values()]
    listed = [p for own in parameters for p in own]
    received = torch.autograd.grad(loss, listed, allow_unused=True) if listed else ()
    squares = {id(p): g.double().square().sum().item() for p, g in zip(listed, received, strict=True) if g is not None}
    return tuple(sum(squares.get(id(p), 0.0) for p in own) ** 0.5 for own in parameters)
