"""From one labelled trace to the axes of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from meristem.core.axis import Axes, Axis, Kind, Place, Role, Slot
from meristem.core.change import AttributeChange, Plan, Sources
from meristem.core.errors import DiscoveryError, GrowthRefused
from meristem.structure.depth import Depth, find_places, find_runs, silent_tensors
from meristem.structure.insertion import CHAIN
from meristem.structure.labels import (
    Label,
    atoms,
    fresh,
    mark_end,
    positions,
)
from meristem.structure.rules import apply_rule
from meristem.structure.tracer import Dim, ModuleStack, Norm, Pass, Traced, Tracer, tensors
from meristem.structure.twin import (
    Example,
    as_example,
    fake_mode,
    looking,
    map_tensors,
    named_tensors,
    set_attribute,
    twin,
)
from meristem.structure.undisturbed import undisturbed

_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "OptimizedModule", "ScriptModule")


class Structure:
    """What can grow in `model`, found by running it once on `example` with data-free copies of its tensors.

    Attributes:
        axes: The axes by name, with `ends` and `frozen`.
        tensors: Parameters and buffers of the model by name.
        labels: One label for each of their dimensions.
        atoms: The label that an axis changes, by axis name.
        norms: The layer and RMS norms over an axis, by axis name.
        outputs: Labels of the model's output tensors.
        depths: Where the blocks of each depth axis stand.
        plans: What has been resolved so far.
        silences: Which tensors of a new block are zero where it adds nothing, by depth axis, as far as that is known.
    """

    def __init__(self, model: nn.Module, example: Any) -> None:
        refuse_wrapped(model)
        self.model = model
        self.example: Example = as_example(example)
        try:
            self._trace(fake=True)
        except DiscoveryError:
            raise
        except Exception as first:
            try:
                self._trace(fake=False)
            except Exception as error:
                raise DiscoveryError(
                    f"the forward of {type(model).__name__} fails on the example "
                    f"({type(error).__name__}: {error}). Received {_describe(self.example)}. hint: pass the example as "
                    "the model is called: a tensor, a tuple of arguments or a dict of keyword arguments"
                ) from first
        self.plans: dict[Any, Plan] = {}
        self.silences: dict[str, tuple[str, ...]] = {}
        self.tensors = named_tensors(model)
        self._collect()

    def _trace(self, fake: bool) -> None:
        self.fake = fake
        self.names = set(named_tensors(self.model))
        mode = fake_mode(fake)
        copied = self.twin_of_shape({}, (), mode).eval()
        stack = ModuleStack(copied)
        tracer = Tracer(stack, apply_rule)
        stack.counted = lambda: len(tracer.trace.macs)
        self.labels: dict[str, list[Label]] = {}
        averaged = {
            id(b) for m in copied.modules() if isinstance(m, nn.modules.batchnorm._NormBase) for b in m.buffers(False)
        }
        for name, tensor in named_tensors(copied).items():
            reason = None
            if not isinstance(tensor, nn.Parameter) and id(tensor) not in averaged:
                reason = f"{name} is a buffer"
            labels = [Label(n, reason) for n in tensor.shape]
            weight = isinstance(tensor, nn.Parameter) or id(tensor) in averaged
            origins = [frozenset({(name, d)}) if weight else frozenset() for d in range(tensor.dim())]
            self.labels[name] = labels
            tensor._meristem = Traced([Dim(x, o) for x, o in zip(labels, origins, strict=True)], weight)  # type: ignore[attr-defined]
        args, kwargs = self.example_for(mode)
        for tensor in tensors((args, kwargs)):
            tensor._meristem = Traced([Dim(fresh(n, "an input of the model")) for n in tensor.shape])  # type: ignore[attr-defined]
        with looking(mode), tracer:
            output = copied(*args, **kwargs)
        self.trace = tracer.trace
        self.outputs = [[dim.label for dim in tracer.dims(tensor)] for tensor in tensors(output)]
        for labels in self.outputs:
            for label in labels:
                mark_end(label, "output")
        self.depths, self.undeepened = self._find_depths(copied, stack, tracer)
        stack.close()
        for labels in self._train_mode(copied, tracer, mode):
            for label in labels:
                mark_end(label, "output")

    def _find_depths(
        self, copied: nn.Module, stack: ModuleStack, tracer: Tracer
    ) -> tuple[dict[str, Depth], dict[str, str]]:
        """The depth axes by name, and the reasons of the containers that are none."""
        runs, reasons = find_runs(copied, stack.passes)
        last = {one.name for one in stack.passes if self._is_output(one, copied, tracer)}
        depths = {}
        costs = {one.name: tuple(self.trace.macs[slice(*one.costs)]) for one in stack.passes}
        streams = {one.name: one.outputs for one in stack.passes}
        for depth in [*runs, *find_places(copied, stack.passes, runs, last)]:
            silent: list[tuple[str, ...]] = []
            for block in depth.blocks if depth.form == "run" else ():
                stream = {atom for dim in tracer.dims(streams[block][0]) for atom in atoms(dim.label)}
                silent.append(silent_tensors(block, copied, stack.passes, self.trace, self.labels, stream))
            spent = tuple(costs.get(block, ()) for block in depth.blocks)
            passed = next((one for one in stack.passes if one.name == depth.path), None)
            activation = "" if depth.form == "run" or passed is None else _activation_at(depth.form, passed, tracer)
            depths[depth.name] = replace(depth, silent=tuple(silent), costs=spent, activation=activation)
        return depths, reasons

    def _is_output(self, one: Pass, copied: nn.Module, tracer: Tracer) -> bool:
        """Whether a layer makes units of the model's output."""
        module = copied.get_submodule(one.name)
        if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or not one.outputs:
            return False
        label = tracer.dims(one.outputs[0])[-1 if isinstance(module, nn.Linear) else 1 - module.weight.dim()].label
        return any(atom.end is not None for atom in atoms(label))

    def _train_mode(self, copied: nn.Module, tracer: Tracer, mode: FakeTensorMode | None) -> list[list[Label]]:
        """Label what runs only while training (auxiliary heads, drop paths) too; returns the outputs' labels.

        A train-mode forward that fails on the example, as batch norm does on one row, has nothing to tell.
        """
        args, kwargs = self.example_for(mode)
        for tensor in tensors((args, kwargs)):
            tensor._meristem = Traced([Dim(fresh(n, "an input of the model")) for n in tensor.shape])  # type: ignore[attr-defined]
        copied.train()
        tracer.recording = False
        try:
            with undisturbed(), looking(mode), tracer:
                output = copied(*args, **kwargs)
        except Exception:
            return []
        return [[dim.label for dim in tracer.dims(tensor)] for tensor in tensors(output)]

    def twin_of_shape(
        self, shapes: Mapping[str, Sequence[int]], edits: Sequence[AttributeChange], mode: FakeTensorMode | None
    ) -> nn.Module:
        """A twin whose tensors have the planned shapes and whose attributes are edited."""

        def convert(name: str, tensor: Tensor) -> Tensor:
            source = tensor.detach()
            if name in shapes:
                source = source.new_zeros(tuple(shapes[name]))
            return mode.from_tensor(source) if mode is not None else source.clone()

        copied = twin(self.model, convert)
        apply_edits(copied, edits)
        return copied

    def example_for(self, mode: FakeTensorMode | None) -> Example:
        example: Example = map_tensors(
            self.example, lambda t: mode.from_tensor(t.detach()) if mode is not None else t.detach().clone()
        )
        return example

    # -- from labels to axes ------------------------------------------------------------------------------------------

    def _collect(self) -> None:
        found: dict[Label, list[Place]] = {}
        for name, labels in self.labels.items():
            for d, label in enumerate(labels):
                for atom in dict.fromkeys(atoms(label)):
                    found.setdefault(atom, []).append(Place(name, d))
        self.atoms: dict[str, Label] = {}
        self.norms: dict[str, list[Norm]] = {}
        axes: dict[str, Axis] = {}
        ends: dict[str, Axis] = {}
        frozen: dict[str, str] = {}
        owners = {atom: self._owner(places) for atom, places in found.items()}
        order = sorted(found, key=lambda atom: self.trace.order.get(owners[atom].name, len(self.trace.order)))
        heads = self._heads()
        for atom in order:
            owner = owners[atom]
            label = self.labels[owner.name][owner.dim]
            reason = self._reason(atom, found[atom])
            name = self._name(atom, owner, label, heads, {*axes, *ends, *frozen})
            if reason is not None:
                hidden = self._role(owner) == "fan_in" or atom.frozen != "a spatial dimension"
                if hidden and atom.size > 1:
                    frozen[name] = reason
                continue
            axis = self._axis(name, atom, label, found[atom])
            self.atoms[name] = atom
            self.norms[name] = [norm for norm in self.trace.norms if atom in atoms(norm.label)]
            (ends if axis.end else axes)[name] = axis
        axes |= {name: depth.axis() for name, depth in self.depths.items()}
        self.axes = Axes(axes, ends, frozen | self.undeepened)

    def _owner(self, places: Sequence[Place]) -> Place:
        """The place that names an axis: its first producer in forward order, else its first place."""

        def rank(place: Place) -> tuple[bool, int]:
            return (place.name, place.dim) not in self.trace.produced, self.trace.order.get(
                place.name, len(self.trace.order)
            )

        return min(places, key=rank)

    def _role(self, place: Place) -> Role:
        if (place.name, place.dim) in self.trace.consumed:
            return "fan_out"
        return "fan_in" if (place.name, place.dim) in self.trace.produced else "carried"

    def _tied(self, place: Place) -> bool:
        key = (place.name, place.dim)
        return key in self.trace.consumed and key in self.trace.produced

    def _name(self, atom: Label, owner: Place, label: Label, heads: set[Label], taken: set[str]) -> str:
        module_name, _, leaf = owner.name.rpartition(".")
        module = self.model.get_submodule(module_name)
        outer = module_name.rpartition(".")[0]
        chain = getattr(self.model.get_submodule(outer), CHAIN, None) if outer else None
        keys = list(self.model.get_submodule(outer)._modules)
        old = chain is not None and keys[0 if chain == "after" else -1] == module_name.rpartition(".")[2]
        leaf_module = bool(module_name) and leaf == "weight" and next(module.children(), None) is None
        name = (outer if old else module_name) if leaf_module else owner.name
        if atom.end == "vocabulary":
            return f"{name}:vocabulary"
        if self._role(owner) == "fan_out" and not self._tied(owner):
            name = f"{name}:in"
        several = len({a for a in atoms(label) if self._reason(a, []) is None}) > 1
        if atom in heads:
            name = f"{name}:heads"
        elif any(a in heads for a in atoms(label)):
            name = f"{name}:head_dim"
        elif several and any(atom in atoms(group) for group in self.trace.groups.values()):
            name = f"{name}:groups"
        base, number = name, 2
        while name in taken:
            name, number = f"{base}:{number}", number + 1
        return name

    def _heads(self) -> set[Label]:
        """Atoms that number the heads of an attention: batch dimensions of its products, inside a parameter dimension."""
        composed = [label for labels in self.labels.values() for label in labels if label.root.kind == "product"]
        inside = {atom for label in composed for atom in atoms(label)}
        return inside & {atom for label in self.trace.heads for atom in atoms(label)}

    def _reason(self, atom: Label, places: Sequence[Place]) -> str | None:
        """Why an atom cannot grow, or None. Without places only the atom itself is judged."""
        if atom.frozen is not None:
            return atom.frozen
        normed = {f"{norm.kind.replace('_', ' ')} {norm.module}" for norm in self.trace.norms}
        others = sorted(atom.mixes - normed)
        if others:
            return others[0]
        if atom.mixes and len({norm.kind for norm in self.trace.norms if atom in atoms(norm.label)}) != 1:
            return "layer norms and RMS norms both normalise over it"
        if not places:
            return None
        roles = {self._role(place) for place in places}
        if atom.end == "output" and roles == {"fan_out"}:
            return "an output that no parameter produces"
        if atom.end is None and "fan_out" not in roles:
            seen = any(place.name in self.trace.order for place in places)
            return "nothing that grows reads it" if seen else "the forward on the example does not use it"
        tied = any(self._tied(place) for place in places)
        normed_stream = bool(atom.mixes)
        if atom.end is None and tied and not normed_stream and "fan_in" not in roles and not self._has_bias(places):
            return "its weight is tied on both sides and no bias would keep a new unit alive"
        if atom.end is None and not tied and "fan_in" not in roles:
            return "no weight produces it"
        return None

    def _has_bias(self, places: Sequence[Place]) -> bool:
        return any(self.trace.fills.get(place.name) == "bias" for place in places)

    def _axis(self, name: str, atom: Label, label: Label, places: Sequence[Place]) -> Axis:
        kind: Kind = "heads" if name.endswith(":heads") else "width"
        multiple = 1
        if ":" not in name and label.root.kind == "product":
            multiple = label.root.size // atom.size
        ordered = sorted(places, key=lambda place: self.trace.order.get(place.name, len(self.trace.order)))
        slots = tuple(self._slot(place) for place in ordered)
        norm = next((n.kind for n in self.trace.norms if atom in atoms(n.label)), None)
        if norm is None and any(atom in atoms(x) for x in self.trace.batch_norms):
            return Axis(name, kind, atom.size * multiple, multiple, slots, "batch_norm", atom.end)
        return Axis(name, kind, atom.size * multiple, multiple, slots, norm, atom.end)

    def _slot(self, place: Place) -> Slot:
        tensor = self.tensors[place.name]
        role = self._role(place)
        fill = self.trace.fills.get(place.name, "draw" if tensor.dim() > 1 or role == "fan_in" else "mean")
        buffer = not isinstance(tensor, nn.Parameter)
        return Slot(place.name, place.dim, role, fill, buffer, self._tied(place))

    def layout(self, axis: str) -> dict[Place, Sources]:
        """Where the present units of an axis lie: for each place, an array (units, entries per unit); none for a depth."""
        slots = self.axes.named(axis).slots
        return {s.place: positions(self.labels[s.name][s.dim], self.atoms[axis], {}) for s in slots}

    @property
    def batch(self) -> int:
        """The example's batch size: the leading dimension of its first tensor."""
        first = next(iter(tensors(self.example)), None)
        return int(first.shape[0]) if first is not None and first.dim() else 1


def _activation_at(form: str, passed: Pass, tracer: Tracer) -> str:
    """Where a ReLU of the model's own follows (or its output comes in), a second one changes nothing; elsewhere it would."""
    if form == "after":
        return "relu" if tracer.of(passed.outputs[0]).readers in (["relu"], ["relu_"]) else "rational"
    return "relu" if tracer.of(passed.inputs[0]).positive else "rational"


def apply_edits(model: nn.Module, edits: Sequence[AttributeChange]) -> None:
    """Set module attributes; on a twin, or by surgery."""
    for edit in edits:
        set_attribute(model, edit.module, edit.attribute, edit.after)


def refuse_wrapped(model: nn.Module) -> None:
    """Raise where a wrapper holds the model: it would keep stale references to the tensors that change."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"a torch.nn.Module is needed; got {type(model).__name__}")
    for kind in type(model).__mro__:
        if kind.__name__ in _WRAPPERS:
            inner = "_orig_mod" if kind.__name__ == "OptimizedModule" else "module"
            raise GrowthRefused(
                f"the model is wrapped in {kind.__name__}, which keeps references to the old tensors. "
                f"hint: grow the inner model (model.{inner}) and wrap it again"
            )
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()):
        raise GrowthRefused("the model has lazy parameters without a shape. hint: run it once before it grows")


def _describe(example: Example) -> str:
    args, kwargs = map_tensors(example, lambda t: f"{tuple(t.shape)} {t.dtype}")  # type: ignore[arg-type,return-value]
    return f"arguments {args}" + (f" and keywords {kwargs}" if kwargs else "")
