"""Whether what trains is what the grower was given: this model, by these optimizers."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree


class Witness:
    """Sees the steps of the optimizers, and what a loss was computed from.

    It speaks up on strong evidence alone: nothing that can be a load, a skipped step or a
    part of the model that is trained on its own.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self._model, self._optimizers = model, optimizers
        this = weakref.ref(self)

        def stepped(*_: Any) -> None:
            witness = this()
            if witness is not None:
                witness._steps += 1

        for one in optimizers:
            weakref.finalize(self, one.register_step_post_hook(stepped).remove)
        self.renew()

    def __deepcopy__(self, memo: dict[int, Any]) -> Witness:
        # A copied optimizer has lost its hooks.
        model = copy.deepcopy(self._model, memo)
        return Witness(model, copy.deepcopy(self._optimizers, memo))

    def renew(self) -> None:
        """From now on: weights were exchanged, or loaded."""
        self._steps = 0
        self._weights = _versions(self._model.parameters())
        self._state = self._state_now()

    def _state_now(self) -> dict[int, int]:
        states = [dict(one.state) for one in self._optimizers]
        leaves: list[Any] = pytree.tree_leaves(states)
        return _versions(leaf for leaf in leaves if isinstance(leaf, Tensor))

    def check(self, loss: object) -> None:
        """Raise where something else is trained.

        Raises:
            ValueError: The loss comes from another model, or another optimizer steps.
        """
        if isinstance(loss, Tensor) and loss.grad_fn is not None:
            self._check_origin(loss)
        if not self._optimizers or self._steps:
            return
        # Some wrappers step what is inside of them, and write to their own state.
        if self._written() and self._state_now() == self._state:
            names = ", ".join(type(one).__name__ for one in self._optimizers)
            raise ValueError(
                f"the weights have changed, and the optimizer that this Grower was given "
                f"({names}) has taken no step: another one trains them. hint: make the "
                "Grower with the optimizer that steps"
            )

    def _check_origin(self, loss: Tensor) -> None:
        reached = {id(leaf) for leaf in _leaves(loss)}
        own = {id(parameter) for parameter in self._model.parameters()}
        for one in self._optimizers:
            own |= {id(p) for group in one.param_groups for p in group["params"]}
        if reached and not reached & own:
            raise ValueError(
                "the loss given to step was computed by another model than the "
                f"{type(self._model).__name__} that this Grower grows. hint: make the "
                "Grower with the model that is trained"
            )

    def _written(self) -> bool:
        """Whether weights were written to more than once; a load writes once."""
        now = _versions(self._model.parameters())
        known = [
            (now[key], before) for key, before in self._weights.items() if key in now
        ]
        return any(after > before + 1 for after, before in known)


def _versions(tensors: Iterable[Tensor]) -> dict[int, int]:
    """How often tensors were written to."""
    return {id(one): one._version for one in tensors if not one.is_inference()}


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    """The parameters that a loss was computed from."""
    waiting, seen = [loss.grad_fn], {loss.grad_fn}
    while waiting:
        node = waiting.pop()
        variable = getattr(node, "variable", None)
        if isinstance(variable, nn.Parameter):
            yield variable
        for following, _ in getattr(node, "next_functions", ()):
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
