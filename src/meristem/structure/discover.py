"""One labelled trace of a model, and what it tells: axes, depths, likeness of blocks."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from meristem.core.axis import Axes, Place
from meristem.core.change import AttributeChange, Plan, Sources, index
from meristem.core.errors import DiscoveryError, GrowthRefused
from meristem.structure.alike import Alike, find_alike
from meristem.structure.chains import activation_at, find_places
from meristem.structure.depth import Depth
from meristem.structure.labels import (
    Changes,
    Label,
    atoms,
    mark_end,
    positions,
    sources,
)
from meristem.structure.layers import beside_weights, channel_of, contracts
from meristem.structure.ops import operation_of
from meristem.structure.ops.written import follow
from meristem.structure.received import check_numbers, not_taken, other_dtypes
from meristem.structure.runs import SilentTensors, find_runs
from meristem.structure.tracer import (
    Dim,
    ModuleStack,
    Pass,
    Trace,
    Traced,
    Tracer,
    opaque,
    tensors,
    with_lists,
)
from meristem.structure.twin import (
    Example,
    apply_edits,
    as_example,
    fake_mode,
    looking,
    map_tensors,
    named_tensors,
    submodule,
    table_of,
    twin,
)
from meristem.structure.undisturbed import under_autocast, undisturbed
from meristem.structure.widths import INPUT, Widths


class Structure:
    """What can grow in a model, found by running it once on data-free copies of its
    tensors.

    Attributes:
        example: The arguments of the call that was traced.
        fake: Whether the copies hold no data; a model that needs values is run on real
            ones.
        mode: Of all re-traces; None where they run on real tensors.
        axes: The axes by name, with `ends` and `frozen`.
        labels: One label for each dimension of the model's tensors.
        atoms: The label that an axis changes, by axis name.
        norms: The layer and RMS norms over an axis, by axis name.
        inputs, outputs: Labels of the tensors of the call, and of what it gives.
        losses: Which of these are the loss of a classification.
        depths: Where the blocks of each depth axis stand.
        alike: Which blocks are alike.
        plans: What has been resolved so far.
        silences: What tensors of a new block hold where it adds nothing, by depth axis,
            as far as that is known.
        loud: Depth axes of which no new block was found that adds nothing.
        stops: How often no number of the code helped a re-trace past a line.
        verdicts: Why an axis cannot grow, or None, as far as that has been tried.
        together: The steps of all axes that grow together with an axis, by its name.
    """

    def __init__(self, model: nn.Module, example: Any) -> None:
        refuse_unready(model)
        # Structures are kept by model: one that held its model would keep it for ever.
        self._model = weakref.ref(model)
        self.example: Example = as_example(example)
        self.plans: dict[Any, Plan] = {}
        self.loud: set[str] = set()
        self.stops: Counter[Any] = Counter()
        self.silences: dict[str, Mapping[str, float]] = {}
        self.verdicts: dict[Any, str | None] = {}
        self.together: dict[str, Mapping[str, int]] = {}
        self._fakes: dict[str, Tensor] = {}
        self.mode: FakeTensorMode | None = None
        self.inputs: list[list[Label]] = []
        self._trace_with_fallback()
        self.mode = fake_mode(self.fake)
        widths = Widths(model, self.trace, self.labels)
        self.atoms, self.norms = widths.atoms, widths.norms
        deep = {name: depth.axis() for name, depth in self.depths.items()}
        frozen = widths.frozen | self._undeepened
        self.axes = Axes(widths.axes | deep, widths.ends, frozen)

    def inherit(self, before: Structure) -> None:
        """Take over the verdicts on the same axes of the model before it grew."""
        same = list(self.axes) == list(before.axes)
        if same and list(self.axes.every_end) == list(before.axes.every_end):
            self.verdicts = dict(before.verdicts)
            self.tie(before.together)

    def tie(self, groups: Mapping[str, Mapping[str, int]]) -> None:
        """Note that axes grow together: by axis, the steps of all of them."""
        axes = dict(self.axes)
        for name, steps in groups.items():
            axes[name] = replace(axes[name], multiple=steps[name])
        self.together |= groups
        self.axes = Axes(axes, self.axes.every_end, self.axes.frozen)
        # What was refused alone may grow now.
        self.plans.clear()

    @property
    def model(self) -> nn.Module:
        """The model; a structure does not keep it alive."""
        model = self._model()
        assert model is not None
        return model

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers of the model by name."""
        return named_tensors(self.model)

    @property
    def batch(self) -> int:
        """The example's batch size: the leading dimension of its first tensor."""
        for tensor in tensors(self.example):
            return int(tensor.shape[0]) if tensor.dim() else 1
        return 1

    def layout(self, axis: str) -> dict[Place, Sources]:
        """Where the present units of an axis lie.

        Returns:
            For each place an array (units, entries per unit); none for a depth.
        """
        layout = {}
        for slot in self.axes.named(axis).slots:
            label = self.labels[slot.name][slot.dim]
            layout[slot.place] = positions(label, self.atoms[axis], {})
        return layout

    # -- the trace ---------------------------------------------------------------------

    def _trace_with_fallback(self) -> None:
        check_numbers(self.example)
        if other_dtypes(self.example, self.model):
            # A trace without data does not notice it; autocast mends it.
            failure = None if under_autocast() else self._failure()
            if failure is not None:
                raise not_taken(self.model, self.example, failure) from failure
        try:
            self._trace(fake=True)
        # A model that cannot be copied cannot be traced on real tensors either.
        except DiscoveryError:
            raise
        except Exception as first:
            try:
                self._trace(fake=False)
            except Exception as error:
                if self._failure() is None:
                    raise DiscoveryError(
                        f"{type(self.model).__name__} runs on the example, and its trace "
                        f"fails ({type(error).__name__}: {error}): a fault of Meristem, "
                        "not of the model. hint: report it, with the model"
                    ) from error
                raise not_taken(self.model, self.example, error) from first

    def _failure(self) -> Exception | None:
        """Why the model, as it is, does not take the example; None where it does."""
        copied = self.twin_of_shape({}, (), None).eval()
        args, kwargs = self.example_for(None)
        try:
            with undisturbed(), torch.no_grad():
                copied(*args, **kwargs)
        except Exception as error:
            return error
        return None

    def _trace(self, fake: bool) -> None:
        self.fake = fake
        mode = fake_mode(fake)
        # Eval mode first: dropout and batch statistics would blur the labels.
        copied = self.twin_of_shape({}, (), mode).eval()
        stack = ModuleStack(copied)
        tracer = Tracer(stack, operation_of, follow)
        stack.counted = tracer.counted
        self.labels = _labelled(copied)
        tracer.watch(dict(copied.named_parameters()))
        output = self._labelled_run(copied, tracer, mode)
        self.trace: Trace = tracer.trace
        self.outputs: list[list[Label]] = _mark_outputs(tracer, output)
        self.losses = [tracer.of(tensor).loss for tensor in tensors(output)]
        self._find_blocks(copied, stack, tracer)
        stack.close()
        self._label_training(copied, tracer, mode)

    def _labelled_run(
        self, copied: nn.Module, tracer: Tracer, mode: FakeTensorMode | None
    ) -> Any:
        args, kwargs = self.example_for(mode)
        inputs = []
        for tensor in tensors((args, kwargs)):
            known = _labelled_input(tensor)
            tensor._meristem = known  # type: ignore[attr-defined]
            inputs.append([dim.label for dim in known.dims])
        # A pass in train mode may end before it has read them.
        if tracer.recording:
            self.inputs = inputs
        with looking(mode), tracer:
            return copied(*args, **kwargs)

    def _label_training(
        self, copied: nn.Module, tracer: Tracer, mode: FakeTensorMode | None
    ) -> None:
        """Label what runs only while training, too (auxiliary heads, drop paths).

        A train-mode forward that fails on the example, as batch norm does on one row,
        has nothing to tell.
        """
        # The same twin: its tensors already carry their labels.
        copied.train()
        tracer.recording = False
        try:
            with undisturbed():
                output = self._labelled_run(copied, tracer, mode)
        except Exception:
            return
        _mark_outputs(tracer, output)

    def _find_blocks(
        self, copied: nn.Module, stack: ModuleStack, tracer: Tracer
    ) -> None:
        """The depth axes, the reasons of containers that are none, and what is alike."""
        stack.passes = with_lists(copied, stack.passes)
        runs, reasons = find_runs(copied, stack.passes)
        self._undeepened = reasons
        self.alike: Alike = find_alike(copied, runs, stack.passes, self.trace.laws)
        outputs = set()
        for one in stack.passes:
            if _makes_output(one, copied, tracer):
                outputs.add(one.name)
        places = find_places(copied, stack.passes, runs, outputs)
        passes = {one.name: one for one in stack.passes}
        self.depths: dict[str, Depth] = {}
        silent = self._silent_tensors(copied, stack, tracer, runs, passes)
        for depth in [*runs, *places]:
            costs = []
            for block in depth.blocks:
                stretch = passes[block].stretch.macs if block in passes else (0, 0)
                costs.append(tuple(self.trace.macs[slice(*stretch)]))
            activation = ""
            if not depth.copied and depth.path in passes:
                activation = activation_at(depth.form, passes[depth.path], tracer)
            self.depths[depth.name] = replace(
                depth,
                silent=silent.get(depth.name, ()),
                costs=tuple(costs),
                activation=activation,
            )

    def _silent_tensors(
        self,
        copied: nn.Module,
        stack: ModuleStack,
        tracer: Tracer,
        runs: Sequence[Depth],
        passes: Mapping[str, Pass],
    ) -> dict[str, tuple[tuple[str, ...], ...]]:
        """By run, what of each block adds to the stream; asked of one block of each
        kind.
        """
        blocks = [block for run in runs for block in run.blocks]
        reader = SilentTensors(copied, blocks, stack.passes, self.trace, self.labels)
        known: dict[str, tuple[str, ...]] = {}
        found = {}
        for run in runs:
            listed = []
            for block in run.blocks:
                # Alike blocks have the same tensors under the same names inside.
                first = self.alike.representative.get(block, block)
                if first not in known:
                    stream: set[Label] = set()
                    for dim in tracer.dims(passes[first].outputs[0]):
                        stream.update(atoms(dim.label))
                    known[first] = reader.of(first, stream)
                listed.append(known[first])
            found[run.name] = tuple(listed)
        return found

    def twin_of_shape(
        self,
        shapes: Mapping[str, Sequence[int]],
        edits: Sequence[AttributeChange],
        mode: FakeTensorMode | None,
    ) -> nn.Module:
        """A twin whose tensors have the planned shapes and whose attributes are edited."""

        def convert(name: str, tensor: Tensor) -> Tensor:
            source = tensor.detach()
            if mode is None:
                resized = name in shapes
                return (
                    source.new_zeros(tuple(shapes[name])) if resized else source.clone()
                )
            fake = self._fake(name, tensor, mode)
            if name in shapes:  # data-free from the start: a plan may ask for any size
                with mode:
                    fake = fake.new_empty(tuple(shapes[name]))
            return fake

        copied = twin(self.model, convert)
        apply_edits(copied, edits)
        return copied

    def _fake(self, name: str, tensor: Tensor, mode: FakeTensorMode) -> Tensor:
        """A tensor without data; those of re-traces, which keep nothing, are shared."""
        if mode is not self.mode:
            fake: Tensor = mode.from_tensor(tensor.detach())
            return fake
        if name not in self._fakes:
            made: Tensor = mode.from_tensor(tensor.detach())
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made, requires_grad=tensor.requires_grad)
            self._fakes[name] = made
        return self._fakes[name]

    def example_for(
        self, mode: FakeTensorMode | None, changes: Changes | None = None
    ) -> Example:
        """The example, copied, with the features that a plan adds; without data under a
        fake mode.
        """
        grown = with_features(self, self.example, changes or {})

        def convert(tensor: Tensor) -> Tensor:
            if mode is None:
                return tensor.detach().clone()
            return mode.from_tensor(tensor.detach())

        example: Example = map_tensors(grown, convert)
        return example


def with_features(structure: Structure, example: Example, changes: Changes) -> Example:
    """A call with random values in the features that a plan adds to its tensors."""
    if not changes:
        return example
    labels = iter(structure.inputs)
    grown: Example = map_tensors(
        example, lambda tensor: _widened(tensor, next(labels), changes)
    )
    return grown


def _widened(tensor: Tensor, labels: Sequence[Label], changes: Changes) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    for d, label in enumerate(labels):
        source = sources(label, changes)
        if len(source) == tensor.shape[d] and bool((source >= 0).all()):
            continue
        kept = tensor.detach().index_select(
            d, index(np.maximum(source, 0)).to(tensor.device)
        )
        shape = [-1 if i == d else 1 for i in range(tensor.dim())]
        drawn = torch.randn(len(source), generator=generator).to(tensor).reshape(shape)
        is_new = torch.from_numpy(source < 0).to(tensor.device).reshape(shape)
        tensor = torch.where(is_new, drawn, kept)
    return tensor


def _buffer(name: str, tensor: Tensor) -> str:
    if not tensor.is_floating_point():
        return f"{name} is a table of whole numbers"
    hint = "hint: make it a parameter, or compute it in the forward"
    return f"{name} is a buffer. {hint}"


def _labelled(copied: nn.Module) -> dict[str, list[Label]]:
    """Give every tensor of a copy its labels; returns them by name."""
    following: set[int] = set()
    for module in copied.modules():
        following.update(id(buffer) for buffer in beside_weights(module))
    all_labels = {}
    for name, tensor in named_tensors(copied).items():
        # Of other buffers nobody knows what a new entry should be.
        grows = isinstance(tensor, nn.Parameter) or id(tensor) in following
        reason = None if grows else _buffer(name, tensor)
        labels = [Label(size, reason) for size in tensor.shape]
        dims = []
        for d, label in enumerate(labels):
            origin = frozenset({(name, d)}) if grows else frozenset()
            dims.append(Dim(label, origin))
        all_labels[name] = labels
        tensor._meristem = Traced(dims, grows)  # type: ignore[attr-defined]
    return all_labels


def _labelled_input(tensor: Tensor) -> Traced:
    """What is known of an input: it keeps its shape, and a batch of one is a batch.

    A leading 1 of a parameter that meets it would be taken for an axis.
    """
    known = opaque(tensor, INPUT)
    if tensor.dim() and len(tensor) == 1:
        known.dims[0] = Dim(Label(1, INPUT))
    # Features may come, where a weight alone reads them; numbers of tokens may not.
    if tensor.is_floating_point():
        for d, size in enumerate(tensor.shape):
            if d and size > 1:
                known.dims[d] = Dim(Label(size))
                mark_end(known.dims[d].label, "input")
    return known


def _mark_outputs(tracer: Tracer, output: Any) -> list[list[Label]]:
    """Mark the dimensions of the outputs as ends; returns their labels."""
    outputs = []
    for tensor in tensors(output):
        labels = [dim.label for dim in tracer.dims(tensor)]
        for label in labels:
            mark_end(label, "output")
        outputs.append(labels)
    return outputs


def _makes_output(one: Pass, copied: nn.Module, tracer: Tracer) -> bool:
    """Whether a layer makes units of the model's output."""
    module = submodule(copied, one.name)
    if not one.outputs or not contracts(module):
        return False
    given = one.outputs[0]
    label = tracer.dims(given)[channel_of(module, given)].label
    return any(atom.end not in (None, "input") for atom in atoms(label))


_STRUCTURES: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Structure]] = (
    weakref.WeakKeyDictionary()
)


# By model, what it was like right after a growth, and the structure that it grew from.
_PROVED: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Structure]] = (
    weakref.WeakKeyDictionary()
)


def structure_of(model: nn.Module, example: Any) -> Structure:
    """The structure of a model; traced again only where the model or its call has
    changed.
    """
    if not isinstance(model, nn.Module):
        refuse_unready(model)
    call = as_example(example)
    key = _fingerprint(model, call)
    kept = _STRUCTURES.get(model)
    # The values of the call may differ; only its shapes were used.
    if kept is not None and kept[0] == key:
        structure = kept[1]
        structure.example = call
        return structure
    structure = Structure(model, call)
    grown_from = _PROVED.pop(model, None)
    if grown_from is not None and grown_from[0] == key:
        structure.inherit(grown_from[1])
    if structure.fake:  # else what was seen depends on the values of the call
        _STRUCTURES[model] = (key, structure)
    return structure


def proved(structure: Structure, model: nn.Module) -> None:
    """Note that a growth has been proved and carried out: what was found out about the
    axes before it still holds for the model as it is now.
    """
    _PROVED[model] = (_fingerprint(model, structure.example), structure)


def known_example(model: nn.Module) -> Example | None:
    """The call that a model was last looked at on, or None."""
    kept = _STRUCTURES.get(model)
    return kept[1].example if kept is not None else None


def _fingerprint(model: nn.Module, example: Example) -> Any:
    """All that a trace depends on: modules, the numbers in them, shapes, the call."""
    modules = []
    beside: dict[int, Any] = {}
    for name, module in model.named_modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        numbers = tuple(id(hook) for hook in hooks)
        values = _plain_values(vars(module))
        modules.append((name, id(module), type(module), values, numbers))
        for value in vars(module).values():
            if not isinstance(value, dict) and hasattr(value, "__dict__"):
                table = table_of(value)
                if table:
                    beside.setdefault(id(value), _plain_values(table))
    held = []
    for name, tensor in named_tensors(model).items():
        shape = tuple(tensor.shape)
        held.append((name, id(tensor), shape, tensor.dtype, tensor.device))
    call: list[Any] = []
    for tensor in tensors(example):
        call.append((tuple(tensor.shape), tensor.dtype, tensor.device))
    rest = repr(map_tensors(example, lambda tensor: None))  # type: ignore[arg-type,return-value]
    return tuple(modules), tuple(beside.items()), tuple(held), tuple(call), rest


def _plain_values(table: Mapping[str, Any]) -> Any:
    values: list[Any] = []
    for attribute, value in table.items():
        if attribute == "training":
            continue  # both modes are traced
        if isinstance(value, (int, float, str, tuple, list)) or (
            isinstance(value, (dict, set)) and not attribute.startswith("_")
        ):
            values.append((attribute, repr(value)))
        elif callable(value) and not isinstance(value, nn.Module):
            values.append((attribute, id(value)))
    return tuple(values)


def refuse_unready(model: nn.Module) -> None:
    """Raise where a model has parameters that nothing can be said of here."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"a torch.nn.Module is needed; got {type(model).__name__}")
    if any(type(parameter).__name__ == "DTensor" for parameter in model.parameters()):
        raise GrowthRefused(
            "the model's parameters are sharded (DTensor, as of fully_shard or tensor "
            "parallelism): this process holds only a part of each. hint: grow it with "
            "meristem.integrations.fsdp.grow_sharded, or before it is sharded"
        )
    for name, module in model.named_modules():
        if any(kind.__name__ == "TorchLayer" for kind in type(module).__mro__):
            raise GrowthRefused(
                f"{name or 'the model'} is a layer of Keras, whose variables would go on "
                "holding the old weights. hint: build it of torch.nn modules"
            )
    lazy = nn.parameter.UninitializedParameter
    if any(isinstance(parameter, lazy) for parameter in model.parameters()):
        raise GrowthRefused(
            "the model has lazy parameters without a shape. hint: run it once before "
            "it grows"
        )
