"""Which tensors of a new block are zero, so that it adds nothing at first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from meristem.core.change import Insertion
from meristem.core.errors import GrowthRefused, VerificationError
from meristem.core.offer import Blocks
from meristem.structure import Structure, resolve
from meristem.structure.twin import submodule
from meristem.surgery import lazy
from meristem.surgery.probe import Values, probe_of, quick_probe, relative_change, run

# Share of a block's whole effect that a hundredth of its weights may have; behind a
# norm a hundredth moves as much as all of them.
_STEEP = 0.3
# How far a new block must move the outputs for float32 to show it, and the share of
# that which is none.
_PLAIN = 1e-4
_NOTHING = 1e-3


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
        whole = self._begin()
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
            if not names or not self._is_silent(names):
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

    def _begin(self) -> float:
        """Choose the numbers to search on; how far a new block moves the outputs then.

        Zeros add nothing in any precision, and float64 costs four times as much. What is
        found is checked in float64 afterwards.
        """
        quick = quick_probe(self._structure)
        if quick is not None:
            self._probe = quick
            whole = self._moved(())
            self._tolerance = _NOTHING * whole
            if whole > _PLAIN:
                return whole
        self._probe = probe_of(self._structure)
        self._tolerance = self._probe.tolerance
        return self._moved(())

    def _is_silent(self, names: Sequence[str]) -> bool:
        return self._moved(names) <= self._tolerance

    def _fewest(self, names: list[str]) -> list[str]:
        owners = dict.fromkeys(name.rpartition(".")[0] for name in names)
        for owner in owners:
            fewer = [name for name in names if name.rpartition(".")[0] != owner]
            # With none of them the block moves the outputs: that is known.
            if fewer and self._is_silent(fewer):
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
