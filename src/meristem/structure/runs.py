"""Runs of like blocks that one stream passes through in order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from meristem.structure.chains import CHAIN
from meristem.structure.depth import Depth
from meristem.structure.labels import Label, atoms
from meristem.structure.layers import is_norm
from meristem.structure.tracer import Pass, Trace, stream_behind
from meristem.structure.twin import named_tensors, submodule

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# What a forward calls that goes through the children of its module.
_WALKS = frozenset(["children", "named_children", "_modules"])


@dataclass(frozen=True)
class _Calls:
    """What is known of the calls of a model.

    Attributes:
        passes: Its calls.
        numbers: Their numbers by module name.
        names: The names of its modules, by id.
    """

    passes: Sequence[Pass]
    numbers: Mapping[str, list[int]]
    names: Mapping[int, str]

    def of(self, module: nn.Module) -> list[int]:
        return self.numbers.get(self.names[id(module)], [])

    def first(self, module: nn.Module) -> Pass:
        return self.passes[self.of(module)[0]]


def find_runs(
    model: nn.Module, passes: Sequence[Pass]
) -> tuple[list[Depth], dict[str, str]]:
    """The runs in the containers of a called model, and why other containers are none."""
    numbers: dict[str, list[int]] = {}
    for number, one in enumerate(passes):
        numbers.setdefault(one.name, []).append(number)
    names = {id(module): name for name, module in model.named_modules()}
    calls = _Calls(passes, numbers, names)
    runs: list[Depth] = []
    reasons: dict[str, str] = {}
    inside: set[str] = set()
    for path, container in model.named_modules():
        if not _holds_blocks(container) or hasattr(container, CHAIN):
            continue
        if "parametrizations" in path.split("."):
            continue  # what weights are computed by
        # Runs inside the blocks of a run grow with these, not by themselves.
        if _lies_inside(path, inside):
            continue
        found, reason = _runs_in(path, container, calls)
        if reason is not None and path and not found:
            reasons[path] = reason
        inside |= _blocks_of_runs(found)
        for number, run in enumerate(found, 1):
            runs.append(run.renamed(_run_name(path, number, run)))
    return _without_stages(runs), reasons


def _without_stages(runs: Sequence[Depth]) -> list[Depth]:
    """The runs without lone blocks that hold a run, or stand in another lone block.

    A stage of a pyramid is one block of its kind; its depth is that of the run in it.
    """
    lone = {run.name for run in runs if run.size - run.fixed < 2}
    kept: list[Depth] = []
    taken: set[str] = set()
    for run in runs:
        if run.name in lone:
            blocks = set(run.blocks)
            others = [other.path for other in runs if other.name not in lone]
            if any(_lies_inside(path, blocks) for path in others):
                continue
            if _lies_inside(run.path, taken):
                continue
            taken |= blocks
        kept.append(run)
    return kept


def _holds_blocks(module: nn.Module) -> bool:
    """Whether a module may be a container of blocks: one of torch's, or one whose
    forward walks its own children.
    """
    if isinstance(module, _CONTAINERS):
        return True
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and not _WALKS.isdisjoint(code.co_names)


def _lies_inside(path: str, blocks: set[str]) -> bool:
    """Whether a module is one of these blocks, or stands in one."""
    parts = path.split(".")
    return any(".".join(parts[:i]) in blocks for i in range(1, len(parts) + 1))


def _run_name(path: str, number: int, run: Depth) -> str:
    if not path:  # the model itself is the container
        return f"{run.blocks[run.fixed]}:depth"
    return path if number == 1 else f"{path}:{number}"


def _runs_in(
    path: str, container: nn.Module, calls: _Calls
) -> tuple[list[Depth], str | None]:
    """The runs of one container, not named yet, and what stood in the way of another."""
    children = list(container._modules.values())
    reason = None
    if not children and isinstance(container, nn.ModuleList):
        reason = "it holds no block"
    found: list[Depth] = []
    position = 0
    for like, grouped in groupby(children, key=_signature):
        placed = list(grouped)
        start = position
        position += len(placed)
        # Activations and other layers without weights part two runs.
        if like is None:
            continue
        group = [block for block in placed if block is not None]
        problem = _problem(group, calls)
        segments = []
        if problem is None:
            segments = _segments([calls.first(block) for block in group])
        if not segments and (len(group) > 1 or len(group) == len(children)):
            reason = (
                problem
                or "its blocks change the shape of the stream: no copy of one fits behind it"
            )
        for fixed, offset, end in segments:
            taken = _blocks_of_runs(found)
            # ResNet stages begin with a block that changes the stream: it leads the
            # run.
            lead = fixed
            if not fixed and not offset:
                lead = _lead(children, start, calls, taken)
            first = start + offset - (lead - fixed)
            blocks = []
            for block in children[first : start + end]:
                if block is not None:
                    blocks.append(calls.names[id(block)])
            # A lone block that leads into this run is no run of its own.
            found = [run for run in found if not set(run.blocks) & set(blocks)]
            found.append(Depth("", path, "run", first, lead, tuple(blocks), True))
    return found, reason


def _blocks_of_runs(runs: Sequence[Depth]) -> set[str]:
    """The blocks of runs that have several of them."""
    names: set[str] = set()
    for run in runs:
        if run.size - run.fixed > 1:
            names.update(run.blocks)
    return names


def _problem(group: Sequence[nn.Module], calls: _Calls) -> str | None:
    """Why like blocks are no run, or None."""
    if len({id(block) for block in group}) < len(group):
        return "its blocks are one and the same module"
    if any(len(calls.of(block)) != 1 for block in group):
        return (
            "the forward on the example does not pass through each of its blocks once: "
            "they are shared, or picked by index or data"
        )
    numbers = [calls.of(block)[0] for block in group]
    if numbers != sorted(numbers):
        return "its blocks are not called in their order"
    for before, after in pairwise(calls.passes[number] for number in numbers):
        behind = stream_behind(before)
        if not any(_holds(after.inputs, tensor) for tensor in behind):
            return (
                f"{after.name} does not read what {before.name} gives, as it is: the "
                "blocks do not follow one on another"
            )
    return None


def _holds(tensors: Sequence[Tensor], wanted: Tensor) -> bool:
    return any(wanted is tensor for tensor in tensors)


def _signature(block: nn.Module | None) -> Any:
    """What like blocks have in common.

    None for what is no block: a layer without parts, or without weights.
    """
    if block is None or next(block.children(), None) is None:
        return None
    if next(block.parameters(), None) is None:
        return None
    modules = []
    for name, module in block.named_modules():
        modules.append((name, type_before_parametrizations(module)))
    # A block that has been lengthened is like no other.
    chain = id(block) if hasattr(block, CHAIN) else 0
    return tuple(modules), tuple(named_tensors(block)), chain


def _segments(passes: Sequence[Pass]) -> list[tuple[int, int, int]]:
    """Stretches of one stream shape.

    Each is: how many leading blocks change into it (0 or 1), the first block, the end.
    """
    starts = []
    stream: Any = None
    for number, one in enumerate(passes):
        # The first output is the stream; attention weights and caches follow it.
        after = _kind(one.outputs[0]) if one.outputs else None
        came = [stream] if number else [_kind(tensor) for tensor in one.inputs]
        if after is None or after not in came:
            starts.append((1, number))
        elif not starts:
            starts.append((0, number))
        stream = after
    ends = [number for _, number in starts[1:]] + [len(passes)]
    segments = []
    for (fixed, start), end in zip(starts, ends, strict=True):
        if end - start > fixed:
            segments.append((fixed, start, end))
    return segments


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def _lead(
    children: Sequence[nn.Module | None], start: int, calls: _Calls, taken: set[str]
) -> int:
    """How many blocks lead into the run that starts there.

    They are of the same class as its blocks, but not alike, and in no other run.
    """
    entry = children[start]
    assert entry is not None
    count, reader = 0, calls.first(entry)
    for block in reversed(children[:start]):
        if type(block) is not type(entry) or isinstance(block, nn.Sequential):
            break
        assert block is not None
        if len(calls.of(block)) != 1 or calls.names[id(block)] in taken:
            break
        led = calls.first(block)
        if not led.outputs or not _holds(reader.inputs, led.outputs[0]):
            break
        count, reader = count + 1, led
    return count


class SilentTensors:
    """Which tensors of a block add to the stream; the trace is sorted by block once."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[str],
        passes: Sequence[Pass],
        trace: Trace,
        labels: Mapping[str, Sequence[Label]],
    ) -> None:
        self._model, self._trace, self._labels = model, trace, labels
        self._passes: dict[str, list[Pass]] = {block: [] for block in blocks}
        for one in passes:
            for block in _outer(one.name, self._passes):
                self._passes[block].append(one)
        self._produced: dict[str, list[tuple[str, int]]] = {b: [] for b in blocks}
        ordered = sorted(trace.produced, key=lambda place: trace.order.get(place[0], 0))
        for place in ordered:
            for block in _outer(place[0], self._produced):
                self._produced[block].append(place)
        # By module, the scales of the norms, whatever class they are of.
        self._scales: dict[str, str] = {}
        for norm in trace.norms:
            if norm.weight.startswith(f"{norm.module}."):
                self._scales[norm.module] = norm.weight
        for name, module in model.named_modules():
            if is_norm(module) and getattr(module, "weight", None) is not None:
                self._scales[name] = f"{name}.weight"
        self._biases: dict[str, list[str]] = {}
        for name in labels:
            if trace.fills.get(name) == "bias":
                owner = name.rpartition(".")[0]
                self._biases.setdefault(owner, []).append(name)

    def of(self, block: str, stream: set[Label]) -> tuple[str, ...]:
        """The tensors of a block that add to the stream, under their names inside it.

        These are the weights that produce units of the stream, with their biases. Where
        a norm follows such a weight inside the block, the norm's weight and bias, as it
        would turn a zero into its own bias.
        """
        prefix = f"{block}."
        found: list[str] = []
        for name, dim in self._produced[block]:
            if not stream.isdisjoint(atoms(self._labels[name][dim])):
                found += self._silencing(name, self._passes[block])
        inside = [name.removeprefix(prefix) for name in found if name in self._labels]
        return tuple(dict.fromkeys(inside))

    def _silencing(self, name: str, within: Sequence[Pass]) -> list[str]:
        owner, _, leaf = name.rpartition(".")
        norm = self._norm_behind(owner, within)
        # A zero in front of a norm would come out as the bias of the norm.
        if norm is not None:
            return [self._scales[norm], f"{norm}.bias"]
        if leaf.endswith("weight"):
            return [name, f"{owner}.{leaf.removesuffix('weight')}bias"]
        return [name, *self._biases.get(owner, [])]

    def _norm_behind(self, owner: str, within: Sequence[Pass]) -> str | None:
        """The norm that reads what a layer makes, possibly through layers without weights."""
        start = len(within)
        for number, one in enumerate(within):
            if one.name == owner:
                start = number
                break
        stream = within[start].outputs[:1] if start < len(within) else []
        for reader in within[start + 1 :]:
            if not stream or not _holds(reader.inputs, stream[0]):
                continue
            if reader.name in self._scales:
                return reader.name
            module = submodule(self._model, reader.name)
            # Another layer with weights: what it makes of a zero is its own affair.
            if next(module.parameters(), None) is not None:
                return None
            if next(module.children(), None) is not None:
                return None
            stream = reader.outputs[:1]
        return None


def _outer(name: str, blocks: Mapping[str, Any]) -> Iterator[str]:
    """The blocks that a name lies inside of."""
    end = name.find(".")
    while end >= 0:
        if name[:end] in blocks:
            yield name[:end]
        end = name.find(".", end + 1)
