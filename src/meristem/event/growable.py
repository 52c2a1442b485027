"""Which of the axes that the labels tell of really grow: each kind of block is tried
once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from meristem.core.axis import Axes, Axis, matches
from meristem.core.errors import GrowthRefused, VerificationError
from meristem.event.steps import Methods, method_for
from meristem.event.words import spelled
from meristem.structure import Structure, clash, factors, resolve
from meristem.structure.kinds import apart
from meristem.structure.ties import tie
from meristem.structure.twin import submodule
from meristem.surgery.exchange import held_weakly
from meristem.surgery.probe import one_probe
from meristem.surgery.silence import silence
from meristem.surgery.verify import check_edit

Reason = str | None

_LOUD = (
    "no new block of it leaves the function as it is; it grows when its method is named, "
    "as how.Stack() (on the command line --how stack)"
)


def growable(
    structure: Structure, patterns: str | Sequence[str] = "*", how: Methods = ()
) -> Axes:
    """The axes of a structure whose growth was tried.

    Patterns are globs, or words of all layers ("mlp"); a leading "!" excludes.

    Of axes that are alike one is tried; all are tried together first, and the halves of
    what fails. Depths whose new blocks cannot preserve the function count where `how`
    names a method that does not claim to.
    """
    trial = _Trial(structure, {**structure.axes, **structure.axes.every_end})
    found = structure.axes
    candidates = {**found, **found.every_end}
    refused = dict(found.frozen)
    held = held_weakly(structure.tensors, structure.model)
    for name, axis in candidates.items():
        try:
            exact = method_for(how, axis).kinds[axis.kind]
        except GrowthRefused as refusal:
            refused[name] = str(refusal)
            continue
        kept_by = [held[slot.name] for slot in axis.slots if slot.name in held]
        reason = kept_by[0] if kept_by else trial.reason(name, exact)
        if reason is not None:
            refused[name] = reason
    grows = [name for name in candidates if name not in refused]
    kept = {name: found[name] for name in found if name in grows}
    ends = {name: found.every_end[name] for name in found.every_end if name in grows}
    inside = _inside(grows)
    told = {name: _hinted(name, reason, inside) for name, reason in refused.items()}
    listed = spelled(structure, Axes(kept, ends, told), patterns)
    wanted = {name: axis for name, axis in kept.items() if matches(name, listed)}
    return Axes(wanted, ends, told)


def _inside(grows: Sequence[str]) -> dict[str, str]:
    """For every module the first axis inside of it that grows."""
    found: dict[str, str] = {}
    for name in grows:
        # Of another kind: no way round.
        if name.endswith((":depth", ":vocabulary")):
            continue
        module = name.partition(":")[0]
        while module:
            found.setdefault(module, name)
            module = module.rpartition(".")[0]
    return found


def _hinted(name: str, reason: str, inside: Mapping[str, str]) -> str:
    """A reason with an axis of the same module that does grow, where there is one."""
    if any(known in reason for known in ("hint:", "grows together", "it grows when")):
        return reason
    path = name.partition(":")[0]
    for module in (path, path.rpartition(".")[0]):
        if module in inside:
            return f"{reason}. hint: {inside[module]!r} grows"
    return reason


class _Trial:
    """The trials of a structure's axes; what they said is kept with the structure."""

    def __init__(self, structure: Structure, axes: Mapping[str, Axis]) -> None:
        self._structure, self._axes = structure, axes
        # The module in which the last trial stopped, where that is known.
        self._stopped: str | None = None
        if "classes" not in structure.verdicts:
            # One axis of each kind of block stands for all of them.
            classes = structure.alike.classes(axes.values())
            for first, names in classes.items():
                for name in names:
                    structure.verdicts["first", name] = first
            structure.verdicts["classes"] = ""
            with one_probe(structure):
                self._try(list(classes))
        self._verdicts = structure.verdicts

    def reason(self, name: str, exact: bool) -> Reason:
        """Why an axis cannot grow, or cannot grow exactly where that is asked; or None."""
        first = self._verdicts["first", name]
        assert first is not None
        reason = self._verdicts["grows", first]
        # Exactness of depths counts only where a method claims it.
        if reason is None and exact:
            reason = self._verdicts["exact", first]
        if reason is None:
            return None
        axes = self._axes
        return self._structure.alike.told_of(reason, axes[first], axes[name])

    def _try(self, names: Sequence[str]) -> None:
        units, blocks = apart([self._axes[name] for name in names])
        self._verdicts = self._structure.verdicts
        self._try_units(units)
        self._try_blocks([axis.name for axis in blocks])

    def _try_units(self, units: Sequence[Axis]) -> None:
        wide = [axis.name for axis in units]
        for group in self._groups(wide):
            self._halve(group, "grows", self._follows)
        # What does not follow alone may follow together with others.
        refused = []
        for axis in units:
            if self._verdicts["grows", axis.name] is not None and axis.end is None:
                refused.append(axis.name)
        for name, told in tie(self._structure, refused).items():
            self._verdicts["grows", name] = told
        left = [name for name in wide if self._verdicts["grows", name] is None]
        for group in self._groups(left):
            self._halve(group, "grows", self._changes)
        for name in left:
            reason = self._verdicts["grows", name]
            if reason is None:
                continue
            for other in self._structure.together.get(name, ()):
                if other != name:
                    beside = f"it grows together with {name!r}, which cannot: {reason}"
                    self._verdicts["grows", other] = beside
        for axis in units:
            self._verdicts["exact", axis.name] = None

    def _try_blocks(self, deep: Sequence[str]) -> None:
        for group in self._levels(deep):
            self._halve(group, "grows", self._follows_depth)
        for name in deep:
            if self._verdicts["grows", name] is None:
                self._verdicts["grows", name] = self._unread(name)
        left = [name for name in deep if self._verdicts["grows", name] is None]
        # Those that could not be silenced are known to change the function.
        loud = [name for name in left if name in self._structure.loud]
        for name in loud:
            self._verdicts["exact", name] = _LOUD
        for group in self._levels([name for name in left if name not in loud]):
            self._halve(group, "exact", self._changes_depth)

    def _levels(self, names: Sequence[str]) -> list[list[str]]:
        """Depths that may grow together: none stands below the container of another,
        whose blocks move.
        """
        paths = {name: self._structure.depths[name].path for name in names}
        containers = {f"{path}." if path else "" for path in paths.values()}
        levels: dict[int, list[str]] = {}
        for name, path in paths.items():
            above = [outer for outer in containers if path.startswith(outer)]
            levels.setdefault(len(above), []).append(name)
        return list(levels.values())

    def _groups(self, names: Sequence[str]) -> list[list[str]]:
        """Names that may pass together: no two multiply each other, and streams, which
        touch everything, are tried by themselves.
        """
        barred: dict[str, set[str]] = {name: set() for name in names}
        for first, second in factors(self._structure, names):
            if first in barred and second in barred:
                barred[first].add(second)
                barred[second].add(first)
        groups: list[list[str]] = []
        streams: list[list[str]] = []
        for name in names:
            sort = streams if self._axes[name].streamed else groups
            for group in sort:
                if barred[name].isdisjoint(group):
                    group.append(name)
                    break
            else:
                sort.append([name])
        return [*groups, *streams]

    def _halve(
        self, names: Sequence[str], what: str, tried: Callable[[Sequence[str]], Reason]
    ) -> None:
        """Try names together, and the halves of what fails; keep what is said of each."""
        if not names:
            return
        self._stopped = None
        reason = tried(names)
        if reason is None or len(names) == 1:
            for name in names:
                self._verdicts[what, name] = reason
            return
        suspects: list[str] = []
        if self._stopped:
            suspects = self._within(self._stopped, names)
        # Where the code stopped in a module of one of them alone, that one cannot grow.
        if len(suspects) == 1:
            self._verdicts[what, suspects[0]] = reason
            rest = [name for name in names if name not in suspects]
            self._halve(rest, what, tried)
            return
        # What fails together may still pass in parts; log n trials find the culprit.
        middle = len(names) // 2
        self._halve(names[:middle], what, tried)
        self._halve(names[middle:], what, tried)

    def _steps(self, names: Iterable[str]) -> dict[str, int]:
        # Distinct counts keep sizes that must change together from passing by accident.
        steps = {}
        for number, name in enumerate(names, 1):
            steps[name] = self._axes[name].multiple * number
        return steps

    def _follows(self, names: Sequence[str]) -> Reason:
        """Why the code does not follow new widths, or None."""
        if len(names) == 1:
            step = self._axes[names[0]].multiple
            return resolve(self._structure, {names[0]: step}).refusal
        # Factors of one dimension cannot grow at once, whatever each can do alone.
        if clash(self._structure, names) is not None:
            return "some of them multiply each other"
        plan = resolve(self._structure, self._steps(names))
        if plan.refusal is not None:
            self._stopped = plan.stopped
            return plan.refusal
        # An attribute of the user's own code may have changed for another axis' sake.
        for edit in plan.attributes:
            module = submodule(self._structure.model, edit.module)
            is_torchs = type(module).__module__.startswith("torch.nn.")
            if not is_torchs and len(self._within(edit.module, names)) > 1:
                return "they share an attribute"
        return None

    def _within(self, module: str, names: Sequence[str]) -> list[str]:
        """Which of some axes have a tensor inside a module."""
        prefix = f"{module}." if module else ""
        found = []
        for name in names:
            slots = self._axes[name].slots
            if any(slot.name.startswith(prefix) for slot in slots):
                found.append(name)
        return found

    def _changes(self, names: Sequence[str]) -> Reason:
        """Why a growth of widths changes the function, or None."""
        if clash(self._structure, names) is not None:
            return "some of them multiply each other"
        known = self._structure.axes
        steps = {name: known.named(name).multiple for name in names}
        plan = resolve(self._structure, steps)
        if plan.refusal is not None:
            return plan.refusal
        axes = [known.named(name) for name in plan.after]
        try:
            check_edit(self._structure, plan, axes)
        except VerificationError as error:
            return _why_inexact(axes[0], str(error))
        return None

    def _follows_depth(self, names: Sequence[str]) -> Reason:
        # No number of the code counts the layers at a place in a chain.
        depths = self._structure.depths
        runs = [name for name in names if depths[name].copied]
        steps = dict.fromkeys(names, 1) | self._steps(runs)
        return resolve(self._structure, steps).refusal

    def _unread(self, name: str) -> Reason:
        """Why nothing would read a new block, or None."""
        try:
            silence(self._structure, self._structure.depths[name].appended(1))
        except VerificationError:
            return None  # it is read; whether it can be silent is asked elsewhere
        except GrowthRefused as refusal:
            return str(refusal)
        return None

    def _changes_depth(self, names: Sequence[str]) -> Reason:
        """Why new blocks change the function, or None."""
        plan = resolve(self._structure, dict.fromkeys(names, 1))
        if plan.refusal is not None:
            return plan.refusal
        try:
            check_edit(self._structure, plan, [self._axes[name] for name in names])
        except VerificationError as error:
            if "could not be checked" in str(error):
                return str(error)
            return _LOUD
        return None


def _why_inexact(axis: Axis, error: str) -> str:
    if "could not be checked" in error:
        return error
    if axis.streamed and axis.norm is not None:
        kind = "an RMS norm" if axis.norm == "rms_norm" else "a layer norm"
        return (
            f"{kind} normalises over it, and neither zeros nor means of its old units "
            "leave that as it is: they pass something else on their way there"
        )
    return "the model's code depends on its size: the outputs would change"
