"""What goes on for some optimizer steps after a growth: shorter steps, fresher
statistics.

It hangs on the optimizers' own step hooks, so that it needs nothing of the training
loop, and takes itself away when its time is over. Later growths are followed.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from meristem.core.change import TensorChange
from meristem.core.errors import DataError, OptimizerError
from meristem.core.offer import Aftercare, Ramp, Tracking
from meristem.surgery.tensors import carry

# By model, all that is still going on.
_RUNNING: weakref.WeakKeyDictionary[nn.Module, list[_Course]] = (
    weakref.WeakKeyDictionary()
)
# By optimizer, what counts its steps.
_COUNTERS: weakref.WeakKeyDictionary[Optimizer, _Counter] = weakref.WeakKeyDictionary()


@dataclass(eq=False)
class _Course:
    """One aftercare on its way.

    Attributes:
        asked: What a care asked for.
        optimizer: Whose steps are counted, and shortened.
        done: Steps so far.
        young: The parameters whose steps are shortened, each with a mask of the entries
            that are new.
        norms: The norms whose statistics follow faster.
    """

    asked: Aftercare
    optimizer: Optimizer
    done: int = 0
    young: dict[Tensor, Tensor] = field(default_factory=dict)
    norms: dict[nn.Module, _Norm] = field(default_factory=dict)

    def begin(self) -> None:
        for module, norm in self.norms.items():
            norm.watch(module)
        if self.optimizer not in _COUNTERS:
            _COUNTERS[self.optimizer] = _Counter(self.optimizer)
        _COUNTERS[self.optimizer].add(self)

    def end(self) -> None:
        self.done = self.asked.steps
        self.leave_norms()

    def leave_norms(self) -> None:
        """Let the norms follow as they always did."""
        for norm in self.norms.values():
            norm.release()
        self.norms = {}

    @property
    def over(self) -> bool:
        return self.done >= self.asked.steps

    def count(self, before: Mapping[Tensor, Tensor]) -> None:
        """Note a step, and shorten it: `before` holds the parameters as they were."""
        self.done += 1
        for parameter, mask in self.young.items():
            shorter = before[parameter].lerp(parameter, self._factor)
            parameter.copy_(torch.where(mask, shorter, parameter))
        if self.over:
            self.end()

    @property
    def _factor(self) -> float:
        assert isinstance(self.asked, Ramp)
        start = self.asked.start
        return start + (1 - start) * self.done / self.asked.steps


@dataclass(eq=False)
class _Norm:
    """A norm whose statistics follow faster for a while.

    It holds nothing but numbers, and its module has another momentum only while it
    runs: a copy of the model made meanwhile is as it was, and follows as it always did.

    Attributes:
        asked: What a care asked for.
        largest: Values per channel of the largest batch so far.
        own: The module's momentum while it has another one.
    """

    asked: Tracking
    largest: int = 1
    own: float = 0.0

    def watch(self, module: nn.Module) -> None:
        self._hooks = [
            module.register_forward_pre_hook(_Faster(self)),
            module.register_forward_hook(_Slower(self), always_call=True),
        ]

    def weight(self, batch: Tensor, own: float) -> float:
        """What a batch counts for in the running statistics."""
        values = batch.numel() // max(batch.shape[1], 1)
        self.largest = max(self.largest, values)
        enough = 2 * self.largest / (self.asked.values + self.largest)
        momentum = max(own, min(self.asked.momentum, enough))
        # Batches count by their size: the last one of an epoch may hold three examples.
        return float(1 - (1 - momentum) ** (values / self.largest))

    def release(self) -> None:
        for hook in self._hooks:
            hook.remove()


class _Hook:
    """A hook that a copy of its module does not have."""

    def __init__(self, norm: _Norm) -> None:
        self.norm = norm

    def __deepcopy__(self, memo: Any) -> Any:
        return _nothing

    def __reduce__(self) -> Any:
        return _get_nothing, ()


class _Faster(_Hook):
    def __call__(self, module: Any, args: tuple[Any, ...]) -> None:
        self.norm.own = module.momentum
        if module.training and args and module.momentum is not None:
            module.momentum = self.norm.weight(args[0], module.momentum)


class _Slower(_Hook):
    def __call__(self, module: Any, *_: Any) -> None:
        module.momentum = self.norm.own


def _nothing(*_: Any) -> None:
    """What stands in a copy for a hook of the original."""


def _get_nothing() -> Any:
    return _nothing


class _Counter:
    """One pair of hooks on an optimizer for all courses that count its steps."""

    def __init__(self, optimizer: Optimizer) -> None:
        # The hooks hold this, and are held by the optimizer.
        self._optimizer = weakref.ref(optimizer)
        self._courses: list[_Course] = []

    def add(self, course: _Course) -> None:
        if not self._courses:
            self._before_step = course.optimizer.register_step_pre_hook(self._remember)
            self._after_step = course.optimizer.register_step_post_hook(self._count)
        self._courses.append(course)

    def _remember(self, optimizer: Optimizer, *_: Any) -> None:
        young = {p for course in self._courses for p in course.young}
        self._before = {p: p.detach().clone() for p in young}
        if all(course.done + 1 >= course.asked.steps for course in self._courses):
            # A hook may take itself away only as the last one in the row.
            self._after_step.remove()
            self._after_step = optimizer.register_step_post_hook(self._count)

    @torch.no_grad()
    def _count(self, *_: Any) -> None:
        for course in self._courses:
            if not course.over:
                course.count(self._before)
        self._before = {}
        self._courses = [course for course in self._courses if not course.over]
        if not self._courses:
            self._before_step.remove()
            self._after_step.remove()


def check_aftercare(
    after: Sequence[Aftercare], optimizers: Sequence[Optimizer]
) -> None:
    """Raise where there is no optimizer whose steps could be counted.

    Raises:
        OptimizerError: There is none.
    """
    if after and not optimizers:
        raise OptimizerError(
            "a care that lasts for some steps hangs on the optimizer: pass optimizer="
        )


def follow(model: nn.Module, resized: Mapping[str, TensorChange]) -> None:
    """Let what is going on follow a growth that has been carried out.

    Args:
        model: The model.
        resized: By their names now, how parameters that were there before have changed.
    """
    running = _running(model)
    parameters = dict(model.named_parameters())
    kept = set(parameters.values())
    for course in running:
        for name, change in resized.items():
            mask = course.young.get(parameters[name])
            # One without dimensions stands for all entries, whatever their number.
            if mask is not None and mask.dim():
                course.young[parameters[name]] = carry(mask, change.sources)
        for dropped in course.young.keys() - kept:
            del course.young[dropped]


def begin(
    model: nn.Module,
    after: Sequence[Aftercare],
    optimizers: Sequence[Optimizer],
    new: Mapping[str, Tensor],
) -> None:
    """Start what a treatment asked for, after the growth has been carried out.

    Args:
        model: The model.
        after: What was asked for.
        optimizers: Those of the model.
        new: The grown parameters by name, each with a mask of its new entries.
    """
    parameters = dict(model.named_parameters())
    for asked in after:
        if isinstance(asked, Tracking):
            # The later of two growths takes over from the earlier.
            for course in _running(model):
                course.leave_norms()
        for number, optimizer in enumerate(optimizers):
            held = {p for group in optimizer.param_groups for p in group["params"]}
            course = _Course(asked, optimizer)
            if isinstance(asked, Tracking):
                # The steps of one optimizer are enough to count.
                course.norms = _norms(model, asked) if number == 0 else {}
            elif asked.whole:
                course.young = {p: _everywhere(p) for p in held}
            else:
                course.young = {
                    parameters[name]: mask
                    for name, mask in new.items()
                    if parameters[name] in held
                }
            if course.young or course.norms:
                _start(model, course)


def _start(model: nn.Module, course: _Course) -> None:
    course.begin()
    _running(model).append(course)


def _everywhere(parameter: Tensor) -> Tensor:
    return torch.ones((), dtype=torch.bool, device=parameter.device)


def _norms(model: nn.Module, asked: Tracking) -> dict[nn.Module, _Norm]:
    """The norms with running statistics.

    One whose momentum is None averages over all batches, and is left to it.
    """
    found = {}
    for module in model.modules():
        follows = isinstance(module, _NormBase) and module.track_running_stats
        if follows and module.momentum is not None:
            found[module] = _Norm(asked)
    return found


def _running(model: nn.Module) -> list[_Course]:
    running = [course for course in _RUNNING.get(model, []) if not course.over]
    _RUNNING[model] = running
    return running


# -- checkpoints


def aftercare_state(
    model: nn.Module, optimizers: Sequence[Optimizer]
) -> list[dict[str, Any]]:
    """What is still going on, in plain types and masks by parameter name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    modules = {module: name for name, module in model.named_modules()}
    numbers = {id(one): number for number, one in enumerate(optimizers)}
    states = []
    for course in _running(model):
        if id(course.optimizer) not in numbers:
            continue
        states.append(
            {
                "kind": type(course.asked).__name__,
                "asked": asdict(course.asked),
                "done": course.done,
                "optimizer": numbers[id(course.optimizer)],
                "young": {names[id(p)]: mask for p, mask in course.young.items()},
                "norms": {modules[m]: norm.largest for m, norm in course.norms.items()},
            }
        )
    return states


def load_aftercare(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    states: Sequence[Mapping[str, Any]],
) -> None:
    """Go on with what was saved; what is going on now ends."""
    for course in _running(model):
        course.end()
    _RUNNING[model] = []
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    kinds: dict[str, type[Aftercare]] = {"Ramp": Ramp, "Tracking": Tracking}
    for state in states:
        if state["optimizer"] >= len(optimizers):
            continue
        asked = kinds[state["kind"]](**state["asked"])
        young: dict[Tensor, Tensor] = {}
        for name, mask in state["young"].items():
            parameter = parameters.get(name)
            if parameter is None or (mask.dim() and mask.shape != parameter.shape):
                raise DataError(
                    f"the state holds a growth that {name} has not had. hint: load the "
                    "model before its grower (see meristem.load)"
                )
            young[parameter] = mask.to(parameter.device)
        norms = {}
        if isinstance(asked, Tracking):
            for name, largest in state["norms"].items():
                norms[modules[name]] = _Norm(asked, largest)
        course = _Course(
            asked, optimizers[state["optimizer"]], state["done"], young, norms
        )
        _start(model, course)
