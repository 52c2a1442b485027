"""One labelled forward pass.

A dispatch mode gives every tensor dimension a label, and every operation a shape law.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from meristem.core.axis import Fill
from meristem.structure.labels import UNIT, Conflict, Label, freeze, fresh, mix, unify

# Where the code lies that is nobody's model: torch's, ours, and what was compiled.
_NOT_THE_MODEL = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), "<")
Origin = frozenset[tuple[str, int]]
"""The (parameter, dimension) pairs that a dimension views."""


def is_models(path: str) -> bool:
    """Whether a file of code is a model's own."""
    return not path.startswith(_NOT_THE_MODEL)


class Dim(NamedTuple):
    """One dimension of a traced tensor: its label, and what of the parameters it views."""

    label: Label
    origin: Origin = frozenset()


@dataclass
class Traced:
    """What the trace knows of one tensor.

    Attributes:
        dims: Its dimensions.
        weight: Whether it was computed from parameters alone.
        positive: Whether no entry can be below zero.
        readers: The operations that took it in.
        lawful: Whether its shape follows from its labels. The log-sum-exp that a fused
            attention kernel gives has a shape of the kernel's own.
        loss: Whether it is the loss of a classification, or computed from one.
    """

    dims: list[Dim]
    weight: bool = False
    positive: bool = False
    readers: list[str] = field(default_factory=list)
    lawful: bool = True
    loss: bool = False

    def parameters(self) -> set[str]:
        return {name for dim in self.dims for name, _ in dim.origin}


@dataclass(eq=False)
class Norm:
    """A layer norm or RMS norm over one dimension, known by what it computes.

    Attributes:
        module: The module that ran it.
        kind: What it takes off: the mean and the scale, or the scale alone.
        label: What it runs over.
        reason: What the trace says of that dimension, see `mix`.
        weight: The parameter that scales its result; "" where it has none.
        shift: What the model adds to that parameter first (Gemma scales by 1 + w).
        eps: What it adds to the mean of the squares.
        averages: Whether it divides by the mean of the squares, or by their sum.
        line: Where the code holds the number eps: "model.py:12".
    """

    module: str
    kind: Literal["layer_norm", "rms_norm"]
    label: Label
    reason: str
    weight: str = ""
    shift: float = 0.0
    eps: float = 0.0
    averages: bool = True
    line: str = ""


class Law(NamedTuple):
    """The shapes that an operation gives; None for an output whose shape is its own."""

    name: str
    outputs: list[list[Label] | None]


@dataclass
class Trace:
    """Everything that one forward pass told.

    Attributes:
        laws: The operations in order, with the shapes that they give.
        consumed, produced: Parameter dimensions that are summed over, and along which
            units are made.
        order: When a parameter was first read.
        fills: How new entries of a parameter start.
        macs: The multiply-adds of every contraction, as the labels to multiply.
        norms: The layer and RMS norms.
        groups: The label of the groups of a convolution or group norm, by its weight.
        heads: Labels that number the products of a batched product.
        key_heads: Of these, those that number the keys and values of an attention.
        batch_norms: The labels of what batch norms normalise.
        written: Parameters that the forward itself writes into.
        excused: What is said of softmaxes that only a loss reads: more classes may
            change a loss.
    """

    laws: list[Law] = field(default_factory=list)
    consumed: set[tuple[str, int]] = field(default_factory=set)
    produced: set[tuple[str, int]] = field(default_factory=set)
    order: dict[str, int] = field(default_factory=dict)
    fills: dict[str, Fill] = field(default_factory=dict)
    macs: list[list[Label]] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    groups: dict[str, Label] = field(default_factory=dict)
    heads: set[Label] = field(default_factory=set)
    key_heads: set[Label] = field(default_factory=set)
    batch_norms: list[Label] = field(default_factory=list)
    written: set[str] = field(default_factory=set)
    excused: set[str] = field(default_factory=set)


@dataclass
class Call:
    """One operation as a rule sees it: its arguments by schema name, its tensors."""

    func: Any
    name: str
    arguments: dict[str, Any]
    inputs: list[Tensor]
    outputs: list[Tensor]

    def dim(self, key: str = "dim", default: int = 0) -> int:
        rank = self.inputs[0].dim()
        value = self.arguments.get(key, default)
        return int(value) % rank if rank else 0


def tensors(tree: Any) -> list[Tensor]:
    """Every tensor in a nest of containers, model outputs and objects that hold
    tensors.
    """
    leaves: list[Tensor] = []
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor):
            leaves.append(leaf)
        # Outputs of Hugging Face models are objects that hold their tensors.
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (nn.Module, type)):
            for value in vars(leaf).values():
                if isinstance(value, Tensor):
                    leaves.append(value)
    return leaves


class Stretch(NamedTuple):
    """What a call of a module caused: from so many laws and multiply-adds to so many."""

    laws: tuple[int, int] = (0, 0)
    macs: tuple[int, int] = (0, 0)


@dataclass
class Pass:
    """One call of a module: what went in and came out, and the operations it ran."""

    name: str
    inputs: list[Tensor]
    outputs: list[Tensor] = field(default_factory=list)
    stretch: Stretch = field(default_factory=Stretch)


class Sums(TorchDispatchMode):
    """Notes on two tensors that are added what they are added to, and what comes of it.

    A parent may add the residual around its blocks itself: the stream then goes through
    its sums.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        note_sum(func, args, result)
        return result


def note_sum(func: Any, args: Sequence[Any], result: Any) -> None:
    """Note a sum of two tensors of one shape."""
    if not func._schema.name.startswith("aten::add") or len(args) < 2:
        return
    first, second = args[:2]
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return
    if first.shape == second.shape:
        for one, other in ((first, second), (second, first)):
            one._summed = (other, result)  # type: ignore[attr-defined]


def stream_behind(one: Pass) -> list[Tensor]:
    """Where the stream may go on behind a call: what it gave, or the sum of that and
    what went in.
    """
    given = one.outputs[:1]
    for tensor in list(given):
        other, total = getattr(tensor, "_summed", (None, None))
        if total is not None and any(other is read for read in one.inputs):
            given.append(total)
    return given


def with_lists(model: nn.Module, passes: Sequence[Pass]) -> list[Pass]:
    """The calls, and one more for every nn.ModuleList whose modules stand for a block:
    each of them was called once, one behind the other.
    """
    numbers: dict[str, list[int]] = {}
    for number, one in enumerate(passes):
        numbers.setdefault(one.name, []).append(number)
    added: dict[int, list[Pass]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or name in numbers or not len(module):
            continue
        called = [numbers.get(f"{name}.{key}", []) for key in module._modules]
        if any(len(one) != 1 for one in called):
            continue
        inner = [passes[number[0]] for number in called]
        if not all(_leads(*pair) for pair in pairwise(inner)):
            continue
        first, last = inner[0], inner[-1]
        stretch = Stretch(
            (first.stretch.laws[0], last.stretch.laws[1]),
            (first.stretch.macs[0], last.stretch.macs[1]),
        )
        whole = Pass(name, first.inputs, stream_behind(last)[-1:], stretch)
        added.setdefault(called[0][0], []).append(whole)
    result: list[Pass] = []
    for number, one in enumerate(passes):
        result += [*added.get(number, []), one]
    return result


def _leads(before: Pass, after: Pass) -> bool:
    behind = stream_behind(before)
    return any(read is tensor for read in after.inputs for tensor in behind)


class ModuleStack:
    """The modules that are running; what a failing forward was doing stays readable.

    Attributes:
        running: Their names, outermost first.
        passes: Every call in the order in which they began, up to `close`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.running: list[str] = []
        self.passes: list[Pass] = []
        self.counted: Callable[[], tuple[int, int]] = lambda: (0, 0)
        self.recording = True
        self._open: list[Pass] = []
        self.modules = dict(model.named_modules())
        for name, module in self.modules.items():
            enter = partial(self._enter, name)
            # The model is a twin: the hooks go with it.
            module.register_forward_pre_hook(enter, with_kwargs=True)
            module.register_forward_hook(self._leave)

    def _enter(self, name: str, _module: nn.Module, args: Any, kwargs: Any) -> None:
        self.running.append(name)
        if self.recording:
            laws, macs = self.counted()
            begun = Stretch((laws, laws), (macs, macs))
            entered = Pass(name, tensors((args, kwargs)), stretch=begun)
            self.passes.append(entered)
            self._open.append(entered)

    def _leave(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self.running.pop()
        if self.recording:
            ended = self._open.pop()
            laws, macs = self.counted()
            first_law, first_mac = ended.stretch.laws[0], ended.stretch.macs[0]
            ended.outputs = tensors(output)
            ended.stretch = Stretch((first_law, laws), (first_mac, macs))

    def close(self) -> None:
        """Record no more, and let go of the tensors."""
        self.recording = False
        self.passes, self._open = [], []

    @property
    def innermost(self) -> str:
        return self.running[-1] if self.running else ""


def _by_name(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of an operation by name, whatever way the call passed them."""
    schema = func._schema.arguments
    arguments = {a.name: a.default_value for a in schema if a.has_default_value()}
    arguments.update(zip([a.name for a in schema], args, strict=False))
    arguments.update(kwargs)
    return arguments


def _call(func: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> Call:
    inputs = []
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor):
            inputs.append(leaf)
    name = func._schema.name.split("::")[1]
    return Call(func, name, _by_name(func, args, kwargs), inputs, outputs)


Rule = Callable[["Tracer", Call], list[Traced] | None]
"""The labels of a call's outputs, or None where it does not know the operation."""
Sign = Literal["any", "kept", "positive"]
"""Whether the output is nowhere below zero: never sure, as its inputs are, or always.
"""


@dataclass(frozen=True)
class Operation:
    """One kind of operation: what it does to labels, and to signs."""

    rule: Rule
    sign: Sign = "any"


class Tracer(TorchDispatchMode):
    """Labels dimensions while a model runs.

    Operations that `known` has no row for freeze what they touch, and say so.
    """

    def __init__(
        self,
        stack: ModuleStack,
        known: Callable[[Call], Operation | None],
        follow: Callable[[Tracer, Call], None],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stack, self.known, self.follow = stack, known, follow
        self.memory: dict[int, str] = {}
        self.trace = Trace()
        self.recording = True

    def counted(self) -> tuple[int, int]:
        """How many laws and multiply-adds there are so far."""
        return len(self.trace.laws), len(self.trace.macs)

    def watch(self, tensors_by_name: Mapping[str, Tensor]) -> None:
        """Note in the trace which of these the forward writes into."""
        for name, tensor in tensors_by_name.items():
            self.memory[tensor.untyped_storage()._cdata] = name

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func._schema.is_mutable:
            self._note_writes(func, _by_name(func, args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        # Other namespaces wrap ATen operations, which come by themselves.
        if func.namespace != "aten":
            return result
        note_sum(func, args, result)
        outputs = []
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                outputs.append(leaf)
        if outputs:
            self._label(_call(func, args, kwargs or {}, outputs))
        return result

    def _note_writes(self, func: Any, arguments: Mapping[str, Any]) -> None:
        for argument in func._schema.arguments:
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for tensor in tensors(arguments.get(argument.name)):
                name = self.memory.get(tensor.untyped_storage()._cdata)
                if name is not None:
                    self.trace.written.add(name)

    def _label(self, call: Call) -> None:
        for tensor in call.inputs:
            for name in self.of(tensor).parameters():
                # An axis is named after its first producer in this order.
                self.trace.order.setdefault(name, len(self.trace.order))
        operation = self.known(call)
        traced = self._ruled(operation, call)
        positive = operation is not None and self._positive(operation, call)
        for tensor in call.inputs:
            self.of(tensor).readers.append(call.name)
        for tensor, known in zip(call.outputs, traced, strict=True):
            # A layer behind a ReLU that is already there may be an identity, see
            # chains.
            known.positive = positive
            known.loss = known.loss or any(self.of(t).loss for t in call.inputs)
            tensor._meristem = known  # type: ignore[attr-defined]
        self.follow(self, call)
        if self.recording:
            outputs: list[list[Label] | None] = []
            for known in traced:
                labels = [dim.label for dim in known.dims]
                outputs.append(labels if known.lawful else None)
            self.trace.laws.append(Law(call.name, outputs))

    def _ruled(self, operation: Operation | None, call: Call) -> list[Traced]:
        try:
            traced = operation.rule(self, call) if operation is not None else None
        except Conflict as conflict:
            return self._freeze_all(call, f"{self.where()}: {conflict}")
        except Exception as error:
            # A fault of ours, or a call that no rule foresees: it may cost an axis, not
            # the model.
            what = f"{type(error).__name__}: {error}"
            reason = f"the rule for {call.name!r} fails on this call ({what})"
            return self._freeze_all(call, f"{self.where()}: {reason}")
        if traced is None:
            reason = f"{self.where()}: no rule for the operation {call.name!r}"
            return self._freeze_all(call, f"{reason}. hint: report it, with the model")
        return traced

    def _positive(self, operation: Operation, call: Call) -> bool:
        if operation.sign != "kept":
            return operation.sign == "positive"
        # A number below zero may turn the sign of what was positive.
        if call.name in ("add", "mul"):
            for value in call.arguments.values():
                if isinstance(value, (int, float)) and value < 0:
                    return False
        return all(self.of(tensor).positive for tensor in call.inputs)

    def _freeze_all(self, call: Call, reason: str) -> list[Traced]:
        for tensor in call.inputs:
            for dim in self.dims(tensor):
                freeze(dim.label, reason)
        frozen = []
        for tensor in call.outputs:
            frozen.append(Traced([Dim(fresh(n, reason)) for n in tensor.shape]))
        return frozen

    def place(self) -> str:
        return self.stack.innermost or "the model"

    def where(self) -> str:
        """The module that is running, and the line of code: "blocks.0 (model.py:12)"."""
        line = self.line()
        return f"{self.place()} ({line})" if line else self.place()

    def line(self) -> str:
        """The line of the model's own code that is running, as "model.py:12".

        None inside a module of torch's own: the line that calls it is not to blame.
        """
        running = type(self.stack.modules[self.stack.innermost]).__module__
        if running.startswith("torch.nn.modules.") and "container" not in running:
            return ""
        frame: FrameType | None = sys._getframe()
        # Outside of the traced call there is only who asked for it.
        while frame is not None and frame.f_code.co_name != "_labelled_run":
            path = frame.f_code.co_filename
            if is_models(path):
                return f"{path.rpartition('/')[2]}:{frame.f_lineno}"
            frame = frame.f_back
        return ""

    def of(self, tensor: Tensor) -> Traced:
        """What is known of a tensor; one that no traced operation made is a constant."""
        known: Traced | None = getattr(tensor, "_meristem", None)
        if known is None:
            known = opaque(tensor, "a constant tensor of the model's code")
            tensor._meristem = known  # type: ignore[attr-defined]
        return known

    def dims(self, tensor: Tensor) -> list[Dim]:
        return self.of(tensor).dims

    def contract(self, first: Dim, second: Dim) -> None:
        """Record a sum over products of two dimensions.

        A weight's side becomes fan-out; two data sides mix.
        """
        unify(first.label, second.label)
        self.trace.consumed |= first.origin | second.origin
        if not first.origin and not second.origin:
            mix(
                first.label,
                f"{self.where()} multiplies two computed tensors and sums over it",
            )

    def count(self, factors: list[Label]) -> None:
        """Record the multiply-adds of a contraction: the product of the factors' sizes."""
        if self.recording:
            self.trace.macs.append(factors)

    def produce(self, dims: Iterable[Dim]) -> None:
        """Record the dimensions along which a weight makes units."""
        for dim in dims:
            self.trace.produced |= dim.origin

    def fill(self, tensor: Tensor | None, fill: Fill) -> None:
        """Say how new entries of the parameters behind a tensor start.

        The first word counts.
        """
        if tensor is None:
            return
        for name in self.of(tensor).parameters():
            self.trace.fills.setdefault(name, fill)

    def broadcast(self, inputs: list[Tensor], output: Tensor) -> Traced:
        """Labels of an element-wise result: dimensions that are not broadcast agree."""
        rank = output.dim()
        result: list[Dim | None] = [None] * rank
        for tensor in inputs:
            lead = rank - tensor.dim()
            for j, dim in enumerate(self.dims(tensor)):
                # Broadcasting lines dimensions up from the right.
                position = lead + j
                if position < 0 or tensor.shape[j] != output.shape[position]:
                    if dim.label is not UNIT:
                        freeze(dim.label, f"{self.place()} broadcasts it")
                    continue
                present = result[position]
                # A dimension of size 1 takes the size of the other.
                if present is None or present.label is UNIT:
                    result[position] = dim
                elif dim.label is not UNIT:
                    unify(present.label, dim.label)
                    result[position] = Dim(present.label, present.origin | dim.origin)
        weight = bool(inputs) and all(self.of(tensor).weight for tensor in inputs)
        dims = []
        for known, size in zip(result, output.shape, strict=True):
            dim = known if known is not None else Dim(fresh(size))
            # What is computed from data views no parameter any more.
            dims.append(dim if weight else Dim(dim.label))
        return Traced(dims, weight)


def opaque(tensor: Tensor, reason: str) -> Traced:
    """What is known of a tensor that must keep its shape."""
    return Traced([Dim(fresh(size, reason)) for size in tensor.shape])
