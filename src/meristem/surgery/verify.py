"""Two checks before a growth: is the edit right, and is the function kept?

The first runs on random weights in float64, since real ones (layer scales of 1e-6, zero
initialisations) would hide a wrong edit; the second on the real ones.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from meristem.core.axis import Axis, Place, Slot
from meristem.core.change import NO_CHANGE, Insertion, Plan, Sources, index
from meristem.core.errors import GrowthRefused, VerificationError
from meristem.core.offer import Blocks, Offer, Scaling
from meristem.structure import Structure, resolve, with_features
from meristem.structure.insertion import insert
from meristem.structure.tracer import tensors
from meristem.structure.twin import (
    Example,
    apply_edits,
    looking,
    map_tensors,
    named_tensors,
    submodule,
    twin,
)
from meristem.structure.undisturbed import undisturbed
from meristem.surgery import lazy
from meristem.surgery.tensors import grown_tensors, new_units

STRUCTURAL_TOLERANCE = 1e-9
"""Largest relative output change of a function-preserving edit in float64."""
# The same where the model's code insists on its own precision.
_COARSE_TOLERANCE = 1e-4
# Share of a block's whole effect that a hundredth of its weights may have; behind a
# norm a hundredth moves as much as all of them.
_STEEP = 0.3

Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class Probe:
    """A run of the ungrown model against which edits are checked.

    Attributes:
        values: The tensors it ran on.
        example: The call.
        before: Its outputs.
        tolerance: Largest relative change that counts as none.
    """

    values: dict[str, Tensor]
    example: Example
    before: list[Tensor]
    tolerance: float


def probe_of(structure: Structure) -> Probe:
    """The first of several ways to run the model with which a change would show.

    Random weights in float64; the real weights in float64, where random ones give no
    number (a root of a negative); random weights in the model's own precision, where
    its code insists on that.

    Raises:
        VerificationError: None of them runs and gives floating-point numbers.
    """
    kept = _KEPT.get(structure)
    if kept:
        return kept[0]
    reason = "its outputs hold no floating-point number"
    for probe in _ways(structure):
        try:
            before = run(structure, probe.values, probe.example)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            continue
        if comparable(before):
            found = replace(probe, before=before)
            if kept is not None:
                kept.append(found)
            return found
    raise VerificationError(
        f"what a growth of {type(structure.model).__name__} does to its outputs could "
        f"not be checked: {reason}; nothing was changed"
    )


# The probe of a structure whose checks share it, once it has been made.
_KEPT: weakref.WeakKeyDictionary[Structure, list[Probe]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def one_probe(structure: Structure) -> Iterator[None]:
    """Within, the ungrown model is run once for all checks; nothing may change it."""
    _KEPT[structure] = []
    try:
        yield
    finally:
        del _KEPT[structure]


def _ways(structure: Structure) -> Iterator[Probe]:
    double = _doubled(structure.example)
    random = random_tensors(structure.model, torch.float64)
    yield Probe(random, double, [], STRUCTURAL_TOLERANCE)
    real = {name: lazy.doubled(v) for name, v in live_values(structure).items()}
    yield Probe(real, double, [], STRUCTURAL_TOLERANCE)
    # Last, since rounding is coarse there.
    own = random_tensors(structure.model, None)
    yield Probe(own, structure.example, [], _COARSE_TOLERANCE)


def check_edit(
    structure: Structure, plan: Plan, axes: Sequence[Axis], deepen: bool = True
) -> None:
    """Raise unless the planned edit preserves the function on random weights.

    Grown units get random fan-in and zero fan-out, new blocks random weights and a
    silent end; units that are dropped get a zero fan-out before they go.

    Args:
        structure: The traced model.
        plan: The edit.
        axes: The axes that change.
        deepen: Whether new blocks take part; methods that do not preserve the function
            need not.
    """
    for insertion in plan.insertions:
        _check_read(structure, insertion, deepen)
    insertions = plan.insertions if deepen else ()
    if any(len(insertion.blocks) < insertion.size for insertion in insertions):
        insertions = ()  # what the model computes without a block is the user's choice
    # Blocks that go, and blocks that may change the function, leave nothing to compare.
    if not plan.tensors and not insertions:
        return
    drops = any(count < 0 for count in plan.added.values())
    if drops and any(axis.streamed for axis in axes):
        return  # a norm over the axis sees every unit that goes
    probe = probe_of(structure)
    grown = _grown(plan, axes, probe.values)
    if drops:
        # A unit that nothing reads can go: that is what a removal must keep.
        silent = _silenced_units(plan, axes, probe.values)
        probe = replace(
            probe,
            values=silent,
            before=run(structure, silent, probe.example),
        )
        grown = _grown(plan, axes, silent)
    blocks = [silent_blocks(structure, one, grown) for one in insertions]
    followed = plan if insertions else replace(plan, counts=())
    after = run(structure, grown, probe.example, followed, blocks)
    change = relative_change(plan, probe.before, after)
    if change <= probe.tolerance:
        return
    # Is it the width or the block? The width alone tells.
    if insertions and plan.tensors:
        check_edit(structure, plan, axes, deepen=False)
    if insertions:
        raise VerificationError(_deepened(plan, insertions, change))
    raise VerificationError(
        f"growing {', '.join(plan.after)} would change what the model computes, by "
        f"{change:.1e} of its largest output on random weights; nothing was changed"
    )


def _check_read(structure: Structure, insertion: Insertion, deepen: bool) -> None:
    """Raise where nothing reads new blocks, or where they cannot be silent but should."""
    if not any(insertion.new):
        return
    try:
        silence(structure, insertion)
    except VerificationError:
        # A method that changes the function needs no silence, but its block must be
        # read.
        if deepen:
            raise


def _deepened(plan: Plan, insertions: Sequence[Insertion], change: float) -> str:
    """What is said where new blocks change the function."""
    names = ", ".join(insertion.axis for insertion in insertions)
    remedy = (
        "hint: a method that does not preserve the function, as how.Stack(), grows it"
    )
    if math.isinf(change):
        return (
            f"with a new block of {names} the model gives other outputs, or outputs of "
            "other shapes (one for every block?), which cannot be compared; nothing "
            f"was changed. {remedy}"
        )
    follows = [f"{edit.module or 'model'}.{edit.attribute}" for edit in plan.counts]
    beside = f", with {', '.join(follows)} changed too" if follows else ""
    return (
        f"no new block of {names} leaves the function as it is: the outputs would "
        f"change by {change:.1e} of the largest one{beside}; nothing was changed. "
        f"{remedy}"
    )


def _grown(plan: Plan, axes: Sequence[Axis], values: Values) -> dict[str, Tensor]:
    """Values grown by new units that preserve the function, random wherever they may
    be.
    """
    # From here on large weights are their factors.
    plan, axes = lazy.on_factors(plan, axes, values)
    parts = lazy.split(values)
    generator = torch.Generator().manual_seed(0)
    offers = []
    for axis in axes:
        if plan.added[axis.name] > 0 and axis.slots:
            offers.append(neutral_units(plan, axis, parts, generator))
    grown = grown_tensors(parts, plan, axes, offers, Scaling())
    return {**values, **lazy.joined(grown, parts)}


def neutral_units(
    plan: Plan, axis: Axis, values: Values, generator: torch.Generator
) -> Offer:
    """New units that preserve the function by the rule of their axis, else random."""
    strips: dict[Place, Tensor] = {}
    for slot in axis.slots:
        where = new_units(plan, axis.name, slot.place)
        old = values[slot.name]
        rest = [size for d, size in enumerate(old.shape) if d != slot.dim]
        drawn = torch.randn(
            (*where.shape, *rest), generator=generator, dtype=torch.float64
        )
        strip = drawn.to(device=old.device, dtype=old.dtype)
        reads = slot.role == "fan_out" and not slot.tied
        if axis.streamed and not reads:
            strips |= stream_strip(axis, slot, old, where)
        elif slot.role == "fan_out" and not axis.streamed:
            strips[slot.place] = torch.zeros_like(strip)
        elif slot.name.endswith("running_var"):
            strips[slot.place] = strip.abs() + 0.5
        else:
            strips[slot.place] = strip
    return Offer(axis.name, plan.added[axis.name], strips)


def silent_units(plan: Plan, axis: Axis, values: Values) -> Offer:
    """New units that preserve the function and compute nothing."""
    strips: dict[Place, Tensor] = {}
    for slot in axis.slots:
        if axis.streamed and (slot.tied or slot.role != "fan_out"):
            where = new_units(plan, axis.name, slot.place)
            strips |= stream_strip(axis, slot, values[slot.name], where)
    return Offer(axis.name, plan.added[axis.name], strips)


def stream_strip(
    axis: Axis, slot: Slot, old: Tensor, where: Sources
) -> dict[Place, Tensor]:
    """What a producer into a normalised stream gives its new units.

    The mean of the old ones, zero under an RMS norm. The norm's own weights are left to
    their fill.
    """
    if slot.role == "carried" and slot.fill in ("one", "zero"):
        return {}
    rest = [size for d, size in enumerate(old.shape) if d != slot.dim]
    shape = [*where.shape, *rest]
    if axis.norm == "rms_norm":
        return {slot.place: old.new_zeros(shape)}
    mean = old.mean(slot.dim, keepdim=True).movedim(slot.dim, 0)
    return {slot.place: mean[None].expand(shape).clone()}


def _silenced_units(
    plan: Plan, axes: Sequence[Axis], values: Values
) -> dict[str, Tensor]:
    """Values in which nothing reads the units that are dropped."""
    plan, axes = lazy.on_factors(plan, axes, values)
    parts = lazy.split(values)
    silent: dict[str, Tensor] = {}
    for axis in axes:
        for slot in axis.places("fan_out"):
            change = plan.change(slot.name)
            present = np.arange(change.before[slot.dim])
            dropped = index(np.setdiff1d(present, change.sources[slot.dim]))
            old = silent.get(slot.name, parts[slot.name])
            where = dropped.to(old.device)
            silent[slot.name] = old.index_fill(slot.dim, where, 0.0)
    return {**values, **lazy.joined(silent, parts)}


def random_tensors(model: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Random values for every tensor of a model, always the same; variances are
    positive.

    Args:
        model: The model.
        dtype: Of the floating-point values; their own where None is given.
    """
    generator = torch.Generator().manual_seed(0)
    values = {}
    for name, tensor in named_tensors(model).items():
        value = _random_tensor(tensor, dtype or tensor.dtype, generator)
        if name.rpartition(".")[2] == "running_var":
            value = value.abs() + 0.5
        values[name] = value
    return values


def _random_tensor(
    tensor: Tensor, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.detach().clone()
    if isinstance(tensor, nn.Parameter) and tensor.dim() > 1:
        return lazy.random_matrix(tensor, generator, dtype)
    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    noise = noise.to(device=tensor.device, dtype=dtype)
    if isinstance(tensor, nn.Parameter):
        # Around one: norm weights near zero would hide what they scale.
        return 1 + 0.5 * noise
    # Buffers keep what they mean (a table of positions), a little disturbed.
    return tensor.detach().to(dtype) + 0.1 * noise


def _doubled(example: Example) -> Example:
    doubled: Example = map_tensors(
        example, lambda t: t.double() if t.is_floating_point() else t
    )
    return doubled


def silent_blocks(structure: Structure, insertion: Insertion, values: Values) -> Blocks:
    """New blocks as copies that add nothing to the stream; in a chain, identity layers."""
    depth = structure.depths[insertion.axis]
    placed: dict[tuple[int, str], Tensor] = {}
    if not depth.copied:
        return Blocks(insertion)
    silent = silence(structure, insertion)
    for place in insertion.new_places:
        block = depth.blocks[insertion.blocks[place]]
        for name, still in silent.items():
            placed[place, name] = _towards(values[f"{block}.{name}"], still)
    return Blocks(insertion, placed)


def _towards(value: Tensor, still: float, scale: float = 0.0) -> Tensor:
    """A tensor that is `still` but for a share of its own values."""
    small = lazy.scaled(value, scale) if scale else lazy.zeros(value)
    return small + still * (1 - scale) if still else small


def silence(structure: Structure, insertion: Insertion) -> Mapping[str, float]:
    """The tensors of a new block that are zero where it adds nothing to the stream, and
    what they hold then: not zero, where the model adds a number to them first.

    They are given under their names inside the block. Tried once for every run, on
    random weights. The labels tell which tensors add to the stream. Of these as few as
    possible are zero, since a product of two zeros never learns. Where a norm without a
    class of torch's own reads the zeros, its slope there is a thousandfold: then it is
    the block's own scales and shifts that are tried.

    Raises:
        GrowthRefused: Nothing would read what a new block gives.
        VerificationError: Only a zero in front of a norm silences the block.
    """
    if not structure.depths[insertion.axis].copied:
        return {}
    if insertion.axis not in structure.silences:
        search = _Silencing(structure, insertion.axis)
        found = {name: search.still(name) for name in search.tensors()}
        structure.silences[insertion.axis] = found
    return structure.silences[insertion.axis]


class _Silencing:
    """The search for the fewest tensors that silence a new block of one run."""

    def __init__(self, structure: Structure, axis: str) -> None:
        self._structure, self._axis = structure, axis
        self._depth = structure.depths[axis]
        self._block = self._depth.blocks[-1]
        self._shifts = {norm.weight: norm.shift for norm in structure.trace.norms}
        self._plan = resolve(structure, {axis: 1})

    def still(self, name: str) -> float:
        """What a tensor of the block holds where it is silent."""
        return -self._shifts.get(f"{self._block}.{name}", 0.0)

    def tensors(self) -> tuple[str, ...]:
        known = self._structure.tensors
        # What the block shares with others is known under their names, and stays.
        labelled = tuple(
            name for name in self._depth.silent[-1] if f"{self._block}.{name}" in known
        )
        if not self._plan:
            return labelled
        self._probe = probe_of(self._structure)
        whole = self._moved(())
        if whole == 0:
            raise GrowthRefused(
                f"what a new block of {self._axis} gives would not reach the output: "
                "the model reads its blocks by their numbers, or a fixed number of "
                "them"
            )
        # Scales and shifts, where projections cannot silence the block.
        block = submodule(self._structure.model, self._block)
        vectors = []
        for name, parameter in block.named_parameters():
            # One number a unit; the scales of a weight norm stand in a column.
            is_vector = parameter.dim() and max(parameter.shape) == parameter.numel()
            if is_vector and f"{self._block}.{name}" in known:
                vectors.append(name)
        steep = False
        self._structure.loud.add(self._axis)
        for names in (list(labelled), vectors):
            if not names or self._moved(names) > self._probe.tolerance:
                continue
            fewest = self._fewest(names)
            if self._moved(fewest, 0.01) <= _STEEP * whole:
                self._structure.loud.discard(self._axis)
                return tuple(fewest)
            steep = True
        if steep:
            raise VerificationError(
                f"a new block of {self._axis} could only be silenced in front of a "
                "norm, where the first step would undo it; nothing was changed. hint: "
                "a method that does not preserve the function, as how.Stack(), grows "
                "it"
            )
        return labelled

    def _fewest(self, names: list[str]) -> list[str]:
        owners = dict.fromkeys(name.rpartition(".")[0] for name in names)
        for owner in owners:
            fewer = [name for name in names if name.rpartition(".")[0] != owner]
            # With none of them the block moves the outputs: that is known.
            if fewer and self._moved(fewer) <= self._probe.tolerance:
                names = fewer
        return names

    def _moved(self, names: Sequence[str], scale: float = 0.0) -> float:
        """How far the outputs move with a new block, some tensors of which are scaled."""
        probe = self._probe
        placed = {}
        for name in names:
            value = probe.values[f"{self._block}.{name}"]
            small = _towards(value, self.still(name), scale)
            placed[self._depth.size, name] = small
        blocks = [Blocks(self._plan.insertions[0], placed)]
        structure = self._structure
        after = run(structure, probe.values, probe.example, self._plan, blocks)
        return relative_change(self._plan, probe.before, after)


def live_values(structure: Structure) -> dict[str, Tensor]:
    """A model's own tensors, to be read.

    Buffers and parameters that a forward may write into are copied.
    """
    values = {}
    for name, parameter in structure.model.named_parameters():
        value = parameter.detach()
        values[name] = value.clone() if name in structure.trace.written else value
    for name, buffer in structure.model.named_buffers():
        values[name] = buffer.detach().clone()
    return values


def grown_twin(
    structure: Structure, values: Values, plan: Plan, blocks: Sequence[Blocks] = ()
) -> nn.Module:
    """A twin that holds the very tensors of `values` and of the new blocks.

    What a forward may write into is copied: the next twin starts from the same values.
    """
    written = structure.trace.written

    def convert(name: str, tensor: Tensor) -> Tensor:
        value = values[name].detach()
        shared = isinstance(tensor, nn.Parameter) and name not in written
        return value if shared else value.clone()

    copied = twin(structure.model, convert)
    apply_edits(copied, plan.attributes)
    for one in blocks:
        insert(copied, one.insertion, _unwritten(structure, one))
    apply_edits(copied, plan.counts)
    return copied


def _unwritten(structure: Structure, blocks: Blocks) -> dict[tuple[int, str], Tensor]:
    """The tensors of new blocks; those that a forward writes into are copied."""
    insertion = blocks.insertion
    names = structure.depths[insertion.axis].blocks
    values = {}
    for (place, name), value in blocks.values.items():
        parent = f"{names[insertion.blocks[place]]}.{name}"
        written = parent in structure.trace.written
        values[place, name] = value.clone() if written else value
    return values


def run(
    structure: Structure,
    values: Values,
    example: Example,
    plan: Plan = NO_CHANGE,
    blocks: Sequence[Blocks] = (),
) -> list[Tensor]:
    """The output tensors of a twin on the example, in eval mode.

    It holds `values`, and is grown by a plan; random layers are seeded alike.
    """
    copied = grown_twin(structure, values, plan, blocks).eval()
    example = with_features(structure, example, plan.changes)
    # Tensors that are no parameters and no buffers stand in the model's own precision.
    with undisturbed(), looking(None), _InDouble():
        # Models that draw numbers in eval mode draw the same ones twice.
        torch.manual_seed(0)
        args, kwargs = map_tensors(example, lambda t: t.detach().clone())
        return tensors(copied(*args, **kwargs))


class _InDouble(TorchDispatchMode):
    """Casts of float64 numbers to a shorter type stay in float64.

    Norms are often computed in float32 whatever the model's own precision: an edit that
    is checked in float64 would drown in their rounding.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].dtype == torch.float64:
            wanted = kwargs.get("dtype")
            if wanted is not None and wanted.is_floating_point:
                kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


def relative_change(
    plan: Plan, before: Sequence[Tensor], after: Sequence[Tensor]
) -> float:
    """The largest difference of an old output entry, relative to the largest old output.

    Infinite where the outputs cannot be compared.
    """
    outputs = plan.outputs or _same_outputs(before)
    # One output per block, say: they cannot be compared at all.
    if len(before) != len(after) or len(before) != len(outputs):
        return math.inf
    pairs = []
    for old, new, sources in zip(before, after, outputs, strict=True):
        if sources is None:
            continue
        if tuple(new.shape) != tuple(len(source) for source in sources):
            return math.inf
        for d, source in enumerate(sources):
            kept = np.flatnonzero(source >= 0)
            if len(kept) != new.shape[d]:
                new = new.index_select(d, index(kept).to(new.device))
            if len(kept) != old.shape[d]:  # classes that go
                old = old.index_select(d, index(source[kept]).to(old.device))
        pairs.append((old, new))
    # What could not be compared has not been found equal.
    return _relative_distance(pairs) if pairs or not outputs else math.inf


def _relative_distance(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The largest difference of finite entries, relative to the largest first entry."""
    worst, scale = 0.0, 0.0
    for first, second in pairs:
        # In pieces: outputs over a large vocabulary would fill the memory in float64.
        parts = zip(
            first.flatten().split(lazy.PIECE),
            second.flatten().split(lazy.PIECE),
            strict=True,
        )
        for old, new in parts:
            exact, grown = old.double(), new.double()
            finite = torch.isfinite(exact)
            if not bool(torch.isfinite(grown)[finite].all()):
                return math.inf
            if first.is_floating_point() and bool(finite.any()):
                exact, grown = exact[finite], grown[finite]
                worst = max(worst, (grown - exact).abs().max().item())
                scale = max(scale, exact.abs().max().item())
    return worst / scale if scale else worst


def _same_outputs(outputs: Sequence[Tensor]) -> list[tuple[Sources, ...]]:
    return [tuple(np.arange(size) for size in out.shape) for out in outputs]


def comparable(outputs: Sequence[Tensor]) -> bool:
    """Whether outputs hold a finite real number, by which a change would show."""
    for out in outputs:
        if out.is_floating_point() and bool(torch.isfinite(out).any()):
            return True
    return False


def rounding_gap(structure: Structure, before: Sequence[Tensor]) -> float:
    """How far the ungrown model's outputs lie from its own in float64, relative.

    Zero where the model does not run in float64.
    """
    values = {}
    for name, value in live_values(structure).items():
        values[name] = lazy.doubled(value)
    try:
        exact = run(structure, values, _doubled(structure.example))
    except Exception:
        return 0.0  # the strictest that can be asked
    pairs = zip(before, exact, strict=True)
    gap = _relative_distance([pair for pair in pairs if pair[0].is_floating_point()])
    return gap if math.isfinite(gap) else 0.0
