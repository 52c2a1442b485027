"""Whether what trains is what the grower was given: this model, by these optimizers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree


class Witness:
    """Sees the steps of the optimizers, and what a loss was computed from."""

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self._model, self._optimizers = model, optimizers
        for one in optimizers:
            one.register_step_post_hook(self._stepped)
        self.renew()

    def renew(self) -> None:
        """From now on: weights were exchanged, or loaded."""
        self._steps = 0
        self._weights = _versions(self._model.parameters())
        self._state = self._state_now()

    def _stepped(self, *_: Any) -> None:
        self._steps += 1

    def _state_now(self) -> list[tuple[int, int]]:
        states = [one.state for one in self._optimizers]
        leaves: list[Any] = pytree.tree_leaves(list(map(dict, states)))
        return _versions(x for x in leaves if isinstance(x, Tensor))

    def check(self, loss: object) -> None:
        """Raise where something else is trained.

        Raises:
            ValueError: The loss comes from another model, or another optimizer steps.
        """
        if isinstance(loss, Tensor) and loss.grad_fn is not None:
            reached = {id(leaf) for leaf in _leaves(loss)}
            own = {id(parameter) for parameter in self._model.parameters()}
            if reached and not reached & own:
                raise ValueError(
                    f"the loss given to step was computed by another model than the "
                    f"{type(self._model).__name__} that this Grower grows. hint: make "
                    "the Grower with the model that is trained"
                )
        if not self._optimizers or self._steps:
            return
        moved = _versions(self._model.parameters()) != self._weights
        # Some wrappers step what is inside of them, and write to their own state.
        if moved and self._state_now() == self._state:
            names = ", ".join(type(one).__name__ for one in self._optimizers)
            raise ValueError(
                f"the weights have changed, and the optimizer that this Grower was given "
                f"({names}) has taken no step: another one trains them. hint: make the "
                "Grower with the optimizer that steps"
            )


def _versions(tensors: Any) -> list[tuple[int, int]]:
    """What tells whether tensors were written to."""
    return [(id(tensor), tensor._version) for tensor in tensors]


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
