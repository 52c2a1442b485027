"""One labelled forward pass: a dispatch mode that gives every tensor dimension a label and every operation a shape law."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from meristem.structure.labels import UNIT, Conflict, Label, freeze, fresh, mix, unify

Fill = Literal["draw", "bias", "zero", "one", "mean"]


_RECTIFIED = {"relu", "relu_", "sigmoid", "softmax", "exp"}
_SIGN_KEPT = {
    "view", "reshape", "_unsafe_view", "flatten", "permute", "transpose", "t", "clone", "contiguous", "mean", "sum", "add",
    "mul", "cat", "max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "max_pool1d", "max_pool3d_with_indices",
    "dropout", "native_dropout", "expand", "unsqueeze", "squeeze", "select", "slice", "alias", "detach",
}  # fmt: skip
"""Operations whose output is nowhere negative: always, or where their inputs are not."""


class Dim(NamedTuple):
    """One dimension of a traced tensor: its label, and the (parameter, dimension) pairs that it views."""

    label: Label
    origin: frozenset[tuple[str, int]] = frozenset()


@dataclass
class Traced:
    """What the trace knows of one tensor; `weight` says that it was computed from parameters alone, `positive` that no
    entry can be below zero; `readers` are the operations that took it in.
    """

    dims: list[Dim]
    weight: bool = False
    positive: bool = False
    readers: list[str] = field(default_factory=list)

    def parameters(self) -> set[str]:
        return {name for dim in self.dims for name, _ in dim.origin}


@dataclass(frozen=True)
class Norm:
    """A layer norm or RMS norm over one dimension, by the module that holds its weights and eps."""

    module: str
    kind: Literal["layer_norm", "rms_norm"]
    label: Label


@dataclass
class Trace:
    """Everything that one forward pass told: shape laws of the operations, roles of the parameters, costs."""

    laws: list[tuple[str, list[list[Label]]]] = field(default_factory=list)
    consumed: set[tuple[str, int]] = field(default_factory=set)
    produced: set[tuple[str, int]] = field(default_factory=set)
    order: dict[str, int] = field(default_factory=dict)
    fills: dict[str, Fill] = field(default_factory=dict)
    macs: list[list[Label]] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    groups: dict[str, Label] = field(default_factory=dict)
    heads: set[Label] = field(default_factory=set)
    batch_norms: list[Label] = field(default_factory=list)


@dataclass
class Call:
    """One operation as a rule sees it: its name, its arguments by schema name, its tensors."""

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
    """Every tensor in a nest of containers, model outputs and plain objects that hold tensors included."""
    leaves: list[Tensor] = []
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor):
            leaves.append(leaf)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (nn.Module, type)):
            leaves += [value for value in vars(leaf).values() if isinstance(value, Tensor)]
    return leaves


@dataclass
class Pass:
    """One call of a module: the tensors that went in and came out, and the stretch of `Trace.macs` that it caused."""

    name: str
    inputs: list[Tensor]
    outputs: list[Tensor] = field(default_factory=list)
    costs: tuple[int, int] = (0, 0)


class ModuleStack:
    """The names of the modules that are running, outermost first; what a failing forward was doing stays readable.

    `passes` lists every call in the order in which they began, up to `close`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.running: list[str] = []
        self.passes: list[Pass] = []
        self.counted: Callable[[], int] = lambda: 0
        self.recording = True
        self._open: list[Pass] = []
        self.modules = dict(model.named_modules())
        for name, module in self.modules.items():
            module.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True)
            module.register_forward_hook(self._leave)

    def _enter(self, name: str, _module: nn.Module, args: Any, kwargs: Any) -> None:
        self.running.append(name)
        if self.recording:
            entered = Pass(name, tensors((args, kwargs)), costs=(self.counted(), 0))
            self.passes.append(entered)
            self._open.append(entered)

    def _leave(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self.running.pop()
        if self.recording:
            left = self._open.pop()
            left.outputs, left.costs = tensors(output), (left.costs[0], self.counted())

    def close(self) -> None:
        """Record no more, and let go of the tensors."""
        self.recording = False
        self.passes, self._open = [], []

    @property
    def innermost(self) -> str:
        return self.running[-1] if self.running else ""


Rule = Callable[["Tracer", Call], list[Traced] | None]
"""Gives the labels of a call's outputs, or None where it does not know the operation."""


class Tracer(TorchDispatchMode):
    """Labels dimensions while a model runs. Operations without a rule freeze what they touch and say so."""

    def __init__(self, stack: ModuleStack, rule: Rule) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stack, self.rule = stack, rule
        self.trace = Trace()
        self.recording = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace != "aten":
            return result
        outputs = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        if outputs:
            self._label(func, args, kwargs or {}, outputs)
        return result

    def _label(self, func: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> None:
        schema = func._schema.arguments
        arguments = {a.name: a.default_value for a in schema if a.has_default_value()}
        arguments.update(zip([a.name for a in schema], args, strict=False))
        arguments.update(kwargs)
        inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in inputs:
            for name in self.of(tensor).parameters():
                self.trace.order.setdefault(name, len(self.trace.order))
        call = Call(func, func._schema.name.split("::")[1], arguments, inputs, outputs)
        try:
            traced = self.rule(self, call)
        except Conflict as conflict:
            traced = self._freeze_all(call, f"{self.place()}: {conflict}")
        if traced is None:
            traced = self._freeze_all(call, f"{self.place()}: no rule for the operation {call.name!r}")
        scaled = [v for v in arguments.values() if isinstance(v, (int, float))] if call.name in ("add", "mul") else []
        kept = call.name in _SIGN_KEPT and min(scaled, default=0) >= 0
        positive = call.name in _RECTIFIED or (kept and all(self.of(tensor).positive for tensor in inputs))
        for tensor in inputs:
            self.of(tensor).readers.append(call.name)
        for tensor, known in zip(outputs, traced, strict=True):
            known.positive = positive
            tensor._meristem = known  # type: ignore[attr-defined]
        if self.recording:
            self.trace.laws.append((call.name, [[d.label for d in known.dims] for known in traced]))

    def _freeze_all(self, call: Call, reason: str) -> list[Traced]:
        for tensor in call.inputs:
            for dim in self.dims(tensor):
                freeze(dim.label, reason)
        return [Traced([Dim(fresh(n, reason)) for n in tensor.shape]) for tensor in call.outputs]

    def place(self) -> str:
        return self.stack.innermost or "the model"

    def of(self, tensor: Tensor) -> Traced:
        """What is known of `tensor`; a tensor that no traced operation made is a constant of the code."""
        known: Traced | None = getattr(tensor, "_meristem", None)
        if known is None:
            known = Traced([Dim(fresh(n, "a constant tensor of the model's code")) for n in tensor.shape])
            tensor._meristem = known  # type: ignore[attr-defined]
        return known

    def dims(self, tensor: Tensor) -> list[Dim]:
        return self.of(tensor).dims

    def contract(self, first: Dim, second: Dim) -> None:
        """Record a sum over products of two dimensions: a weight's side becomes fan-out, two data sides mix."""
        unify(first.label, second.label)
        self.trace.consumed |= first.origin | second.origin
        if not first.origin and not second.origin:
            mix(first.label, f"{self.place()} multiplies two computed tensors along it")

    def count(self, factors: list[Label]) -> None:
        """Record the multiply-adds of a contraction: the product of the sizes of `factors`."""
        if self.recording:
            self.trace.macs.append(factors)

    def produce(self, dims: Iterable[Dim]) -> None:
        """Record the dimensions along which a weight makes units."""
        for dim in dims:
            self.trace.produced |= dim.origin

    def fill(self, tensor: Tensor | None, fill: Fill) -> None:
        """Say how new entries of the parameters behind `tensor` start; the first word counts."""
        for name in self.of(tensor).parameters() if tensor is not None else ():
            self.trace.fills.setdefault(name, fill)

    def broadcast(self, inputs: list[Tensor], output: Tensor) -> Traced:
        """Labels of an element-wise result: dimensions that are not broadcast agree."""
        rank = output.dim()
        result: list[Dim | None] = [None] * rank
        for tensor in inputs:
            for j, dim in enumerate(self.dims(tensor)):
                position = rank - tensor.dim() + j
                if position < 0 or tensor.shape[j] != output.shape[position]:
                    if dim.label is not UNIT:
                        freeze(dim.label, f"{self.place()} broadcasts it")
                    continue
                present = result[position]
                if present is None or present.label is UNIT:
                    result[position] = dim
                elif dim.label is not UNIT:
                    unify(present.label, dim.label)
                    result[position] = Dim(present.label, present.origin | dim.origin)
        weight = bool(inputs) and all(self.of(tensor).weight for tensor in inputs)
        dims = [d if d is not None else Dim(fresh(n)) for d, n in zip(result, output.shape, strict=True)]
        return Traced(dims if weight else [Dim(d.label) for d in dims], weight)
