"""Depth: runs of like blocks that one stream passes through in order, and places in a chain where a layer fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from meristem.core.axis import Axis
from meristem.core.change import Insertion
from meristem.core.errors import GrowthRefused
from meristem.structure.insertion import CHAIN
from meristem.structure.labels import Label, atoms
from meristem.structure.tracer import Pass, Trace
from meristem.structure.twin import named_tensors

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Depth:
    """A depth axis of one model: where its blocks stand, and what makes one of them silent.

    `blocks` names the modules; the first `fixed` of them are neither copied nor dropped. `silent[i]` are the tensors of
    block i that add to the stream, under their names inside it: where these are zero, a residual block passes the stream on.
    `costs[i]` are the multiply-adds of block i.
    """

    name: str
    path: str
    form: Literal["run", "after", "before"]
    first: int
    fixed: int
    blocks: tuple[str, ...]
    silent: tuple[tuple[str, ...], ...] = ()
    costs: tuple[tuple[list[Label], ...], ...] = ()
    activation: str = ""

    @property
    def size(self) -> int:
        return len(self.blocks)

    def axis(self) -> Axis:
        """The depth as an axis: it counts blocks, and no tensor dimension follows it."""
        return Axis(self.name, "depth", self.size, 1, ())

    def with_blocks(self, blocks: Sequence[int], new: Sequence[bool]) -> Insertion:
        """The change that puts old and new blocks in this order."""
        activation = self.activation if any(new) else ""
        return Insertion(self.name, self.path, self.form, self.first, self.size, tuple(blocks), tuple(new), activation)

    def appended(self, count: int) -> Insertion:
        """`count` new blocks behind the present ones, each made after the last (before an output layer: after that)."""
        parent = 0 if self.form == "before" else self.size - 1
        present = list(range(self.size))
        return self.with_blocks(present + [parent] * count, [False] * self.size + [True] * count)

    def without(self, amount: int | Sequence[int]) -> Insertion:
        """The change that drops the last so many blocks, or those with the given indices."""
        drop = _dropped(self, amount)
        kept = [i for i in range(self.size) if i not in drop]
        return self.with_blocks(kept, [False] * len(kept))


def _dropped(depth: Depth, amount: int | Sequence[int]) -> set[int]:
    drop = set(range(depth.size - amount, depth.size)) if isinstance(amount, int) else {int(i) for i in amount}
    least = depth.fixed + (1 if depth.form == "run" else 0)
    wrong = sorted(i for i in drop if not depth.fixed <= i < depth.size)
    if not drop or wrong or depth.size - len(drop) < least:
        raise GrowthRefused(
            f"axis {depth.name!r} has blocks 0..{depth.size - 1}"
            f"{f', of which the first {depth.fixed} must stay' if depth.fixed else ''}; {least} in all must stay; got {amount!r}"
        )
    return drop


@dataclass(frozen=True)
class _Calls:
    """What is known of the calls of a model: its passes, their numbers by module name, and the names of its modules."""

    passes: Sequence[Pass]
    numbers: Mapping[str, list[int]]
    names: Mapping[int, str]

    def of(self, module: nn.Module) -> list[int]:
        return self.numbers.get(self.names[id(module)], [])


def find_runs(model: nn.Module, passes: Sequence[Pass]) -> tuple[list[Depth], dict[str, str]]:
    """The runs of like blocks in the containers of a model that has been called, and why others are none."""
    numbers: dict[str, list[int]] = {}
    for number, one in enumerate(passes):
        numbers.setdefault(one.name, []).append(number)
    calls = _Calls(passes, numbers, {id(module): name for name, module in model.named_modules()})
    runs: list[Depth] = []
    reasons: dict[str, str] = {}
    inside: tuple[str, ...] = ()
    for path, container in model.named_modules():
        if isinstance(container, nn.ModuleDict) and any(_signature(block) for block in container.values()):
            reasons[path] = (
                "its blocks stand in an nn.ModuleDict, which knows no order; an nn.ModuleList or nn.Sequential does"
            )
        if not isinstance(container, (nn.Sequential, nn.ModuleList)) or hasattr(container, CHAIN):
            continue
        if path.startswith(inside):
            continue
        found, reason = _runs_in(path, container, calls)
        if reason is not None and path and not found:
            reasons[path] = reason
        for number, run in enumerate(found, 1):
            inside += tuple(f"{block}." for block in run.blocks)
            listed = path if number == 1 else f"{path}:{number}"
            runs.append(replace(run, name=listed if path else f"{run.blocks[run.fixed]}:depth"))
    return runs, reasons


def _runs_in(path: str, container: nn.Module, calls: _Calls) -> tuple[list[Depth], str | None]:
    """The runs of one container, not named yet, and what stood in the way of another."""
    children = list(container._modules.values())
    reason = "it holds no block" if not children and isinstance(container, nn.ModuleList) else None
    found: list[Depth] = []
    position = 0
    for like, grouped in groupby(children, key=_signature):
        placed = list(grouped)
        start, position = position, position + len(placed)
        group = [block for block in placed if block is not None]
        if like is None:
            continue
        problem = _problem(group, calls)
        passes = [calls.passes[calls.of(block)[0]] for block in group] if problem is None else []
        segments = _segments(passes) if passes else []
        if not segments and (len(group) > 1 or len(group) == len(children)):
            reason = problem or "its blocks change the shape of the stream"
        for fixed, offset, end in segments:
            taken = {name for run in found if run.size - run.fixed > 1 for name in run.blocks}
            lead = fixed if fixed or offset else _lead(children, start, calls, taken)
            first = start + offset - (lead - fixed)
            blocks = [calls.names[id(block)] for block in children[first : start + end] if block is not None]
            found = [run for run in found if not set(run.blocks) & set(blocks)]  # a lone block that leads into this run
            found.append(Depth("", path, "run", first, lead, tuple(blocks)))
    return found, reason


def _problem(group: Sequence[nn.Module], calls: _Calls) -> str | None:
    """Why like blocks are no run, or None."""
    if len({id(block) for block in group}) < len(group):
        return "its blocks are one and the same module"
    if any(len(calls.of(block)) != 1 for block in group):
        return (
            "the forward on the example does not pass through each of its blocks once: they are shared, or picked by index "
            "or data"
        )
    numbers = [calls.of(block)[0] for block in group]
    if numbers != sorted(numbers):
        return "its blocks are not called in their order"
    for before, after in pairwise(calls.passes[number] for number in numbers):
        if not before.outputs or not any(before.outputs[0] is tensor for tensor in after.inputs):
            return f"between {before.name} and {after.name} the stream passes through something else"
    return None


def _signature(block: nn.Module | None) -> Any:
    """What like blocks have in common; None for what is no block: a layer without parts, or without weights."""
    if block is None or next(block.children(), None) is None or next(block.parameters(), None) is None:
        return None
    modules = tuple((name, type_before_parametrizations(module)) for name, module in block.named_modules())
    return modules, tuple(named_tensors(block)), id(block) if hasattr(block, CHAIN) else 0


def _segments(passes: Sequence[Pass]) -> list[tuple[int, int, int]]:
    """Stretches of one stream shape: how many leading blocks change into it (0 or 1), the first block, the end."""
    starts = []
    stream: Any = None
    for number, one in enumerate(passes):
        after = _kind(one.outputs[0]) if one.outputs else None
        came = [stream] if number else [_kind(tensor) for tensor in one.inputs]
        if after is None or after not in came:
            starts.append((1, number))
        elif not starts:
            starts.append((0, number))
        stream = after
    ends = [number for _, number in starts[1:]] + [len(passes)]
    return [(fixed, start, end) for (fixed, start), end in zip(starts, ends, strict=True) if end - start > fixed]


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def _lead(children: Sequence[nn.Module | None], start: int, calls: _Calls, taken: set[str]) -> int:
    """How many blocks of the same class as the run that starts there, but not alike and in no run of their own, lead into it."""
    entry = children[start]
    assert entry is not None
    count, reader = 0, calls.passes[calls.of(entry)[0]]
    for block in reversed(children[:start]):
        if (
            block is None
            or type(block) is not type(entry)
            or isinstance(block, nn.Sequential)
            or len(calls.of(block)) != 1
            or calls.names[id(block)] in taken
        ):
            break
        led = calls.passes[calls.of(block)[0]]
        if not led.outputs or not any(led.outputs[0] is tensor for tensor in reader.inputs):
            break
        count, reader = count + 1, led
    return count


def find_places(model: nn.Module, passes: Sequence[Pass], runs: Sequence[Depth], outputs: set[str]) -> list[Depth]:
    """Layers that a chain passes through: hidden ones, behind which a layer fits, and those named in `outputs`, before which."""
    times: dict[str, int] = {}
    for one in passes:
        times[one.name] = times.get(one.name, 0) + 1
    held: dict[int, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        held[id(module)] = held.get(id(module), 0) + 1
    inside = tuple(f"{block}." for run in runs for block in run.blocks)
    places = []
    grown: list[str] = []
    for name, module in model.named_modules():
        hidden = name.startswith((*inside, *grown)) and not hasattr(module, CHAIN)  # what has grown there can go again
        if not name or hidden or times.get(name) != 1 or held[id(module)] != 1:
            continue
        if hasattr(module, CHAIN):
            stands: Literal["after", "before"] = getattr(module, CHAIN)
            keys = list(module._modules)[::2]
            keys = keys if stands == "after" else [keys[-1], *keys[:-1]]
            places.append(Depth(f"{name}:depth", name, stands, 0, 1, tuple(f"{name}.{key}" for key in keys)))
            grown.append(f"{name}.")
        elif _fits(module) and not _inside_torch(model, name):
            stands = "before" if name in outputs else "after"
            places.append(Depth(f"{name}:depth", name, stands, 0, 1, (name,)))
    return places


def _inside_torch(model: nn.Module, name: str) -> bool:
    """Whether torch's own code holds a layer: it may read its weight directly, as the fast path of attention does."""
    holder = model.get_submodule(name.rpartition(".")[0])
    return type(holder).__module__.startswith("torch.nn.") and not isinstance(
        holder, (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    )


def _fits(module: nn.Module) -> bool:
    """Whether an identity fits behind or before a layer; one behind a layer that widens much would dwarf it (a vocabulary)."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() < 2 or weight.shape[0] > max(1024, 4 * weight.shape[1]):
        return False
    if isinstance(module, nn.modules.conv._ConvNd):
        return not module.transposed and module.groups == 1 and type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return isinstance(module, nn.Linear)


def silent_tensors(
    block: str, model: nn.Module, passes: Sequence[Pass], trace: Trace, labels: Mapping[str, Sequence[Label]],
    stream: set[Label],
) -> tuple[str, ...]:  # fmt: skip
    """The tensors of a block that add to the stream, under their names inside it.

    These are the weights that produce units of the stream, with their biases; where a norm follows such a weight inside
    the block, the norm's weight and bias, as it would turn a zero into its own bias.
    """
    prefix = block + "."
    within = [one for one in passes if one.name.startswith(prefix)]
    found: list[str] = []
    for name, dim in sorted(trace.produced, key=lambda place: trace.order.get(place[0], 0)):
        if not name.startswith(prefix) or not stream & set(atoms(labels[name][dim])):
            continue
        owner, _, leaf = name.rpartition(".")
        norm = _norm_behind(owner, model, within)
        names = [f"{norm}.weight", f"{norm}.bias"] if norm is not None else [name]
        if norm is None and leaf.endswith("weight"):
            names.append(f"{owner}.{leaf.removesuffix('weight')}bias")
        elif norm is None:
            names += [n for n in labels if n.startswith(f"{owner}.") and trace.fills.get(n) == "bias"]
        found += [n.removeprefix(prefix) for n in names if n in labels]
    return tuple(dict.fromkeys(found))


def _norm_behind(owner: str, model: nn.Module, within: Sequence[Pass]) -> str | None:
    """The norm that reads what a layer makes, possibly through layers without weights."""
    start = next((number for number, one in enumerate(within) if one.name == owner), len(within))
    stream = within[start].outputs[:1] if start < len(within) else []
    for reader in within[start + 1 :]:
        if not stream or not any(stream[0] is tensor for tensor in reader.inputs):
            continue
        module = model.get_submodule(reader.name)
        if isinstance(module, _NORMS) and getattr(module, "weight", None) is not None:
            return reader.name
        if next(module.parameters(), None) is not None or next(module.children(), None) is not None:
            return None
        stream = reader.outputs[:1]
    return None
