"""Runs of a model with other tensors and other parts, to see what an edit does to its
outputs.
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

from meristem.core.change import NO_CHANGE, Plan, Sources, index
from meristem.core.errors import VerificationError
from meristem.core.offer import Blocks
from meristem.structure import Structure, with_features
from meristem.structure.insertion import insert
from meristem.structure.tracer import tensors
from meristem.structure.twin import (
    Example,
    apply_edits,
    looking,
    map_tensors,
    named_tensors,
    twin,
)
from meristem.structure.undisturbed import undisturbed
from meristem.surgery import lazy

STRUCTURAL_TOLERANCE = 1e-9
"""Largest relative output change of a function-preserving edit in float64."""
# The same where the model's code insists on its own precision.
_COARSE_TOLERANCE = 1e-4

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
    kept = _KEPT.get(structure, {})
    if "exact" in kept:
        return kept["exact"]
    reason = "its outputs hold no floating-point number"
    for probe in _ways(structure):
        try:
            before = run(structure, probe.values, probe.example)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            continue
        if comparable(before):
            kept["exact"] = replace(probe, before=before)
            return kept["exact"]
    raise VerificationError(
        f"what a growth of {type(structure.model).__name__} does to its outputs could "
        f"not be checked: {reason}; nothing was changed"
    )


def quick_probe(structure: Structure) -> Probe | None:
    """A run on random weights in float32, where that gives numbers; for searches whose
    result is checked again.
    """
    kept = _KEPT.get(structure, {})
    if "quick" not in kept:
        values = random_tensors(structure.model, torch.float32)
        example = _cast(structure.example, torch.float32)
        try:
            before = run(structure, values, example)
        except Exception:
            before = []  # code that insists on another precision: the exact probe tells
        kept["quick"] = Probe(values, example, before, _COARSE_TOLERANCE)
    found = kept["quick"]
    return found if comparable(found.before) else None


# The probes of a structure whose checks share them, once they have been made.
_KEPT: weakref.WeakKeyDictionary[Structure, dict[str, Probe]]
_KEPT = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def one_probe(structure: Structure) -> Iterator[None]:
    """Within, the ungrown model is run once for all checks; nothing may change it."""
    _KEPT[structure] = {}
    try:
        yield
    finally:
        del _KEPT[structure]


def _ways(structure: Structure) -> Iterator[Probe]:
    double = _cast(structure.example, torch.float64)
    random = random_tensors(structure.model, torch.float64)
    yield Probe(random, double, [], STRUCTURAL_TOLERANCE)
    real = {name: lazy.doubled(v) for name, v in live_values(structure).items()}
    yield Probe(real, double, [], STRUCTURAL_TOLERANCE)
    # Last, since rounding is coarse there.
    own = random_tensors(structure.model, None)
    yield Probe(own, structure.example, [], _COARSE_TOLERANCE)


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
        # A model without data is looked at on the CPU.
        if tensor.is_meta:
            tensor = _without_values(tensor)
        value = _random_tensor(tensor, dtype or tensor.dtype, generator)
        if name.rpartition(".")[2] == "running_var":
            value = value.abs() + 0.5
        values[name] = value
    return values


def _without_values(tensor: Tensor) -> Tensor:
    empty = torch.zeros_like(tensor, device="cpu")
    return nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty


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


def _cast(example: Example, dtype: torch.dtype) -> Example:
    """The call with floating-point numbers of a type; random ones where it has none."""

    def cast(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor
        if tensor.is_meta:
            return torch.randn(tensor.shape, dtype=dtype)
        return tensor.to(dtype)

    with torch.random.fork_rng(devices=()):
        return map_tensors(example, cast)  # type: ignore[no-any-return]


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
    with undisturbed(), looking(None, fused=True), _InDouble():
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
        exact = run(structure, values, _cast(structure.example, torch.float64))
    except Exception:
        return 0.0  # the strictest that can be asked
    pairs = zip(before, exact, strict=True)
    gap = _relative_distance([pair for pair in pairs if pair[0].is_floating_point()])
    return gap if math.isfinite(gap) else 0.0
