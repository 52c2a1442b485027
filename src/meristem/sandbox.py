"""A copy of the model that methods may grow and train. Values come back; the user's model is not touched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

from torch import Tensor
from torch.func import functional_call

from meristem.core.axis import Axis
from meristem.core.change import Plan
from meristem.core.errors import DataError
from meristem.core.offer import Proposal, Scaling
from meristem.statistics.batches import length, one_pass
from meristem.statistics.flops import Meter
from meristem.statistics.losses import LossModule, measured
from meristem.structure import Structure, resolve
from meristem.structure.twin import named_tensors, twin
from meristem.surgery.exchange import exchange
from meristem.surgery.tensors import grown_tensors
from meristem.view import View


class Sandbox:
    """A copy of the model, lent to a method. It starts with gradients off and in the model's own train and eval modes.

    Attributes:
        model: The copy.
        trained: Names of the parameters that the user trains.
        meter: What has been computed here.
    """

    def __init__(self, view: View) -> None:
        if view.loss is None or view.data is None:
            raise DataError("training on the side needs a loss and data: pass loss= and data=")
        self._origin = view
        self._loss, self._data = view.loss, view.data
        source = view.structure.model
        self.trained = {name for name, parameter in source.named_parameters() if parameter.requires_grad}
        self.model = twin(source, lambda _, tensor: tensor.detach().clone())
        self.model.requires_grad_(False)
        self.meter = Meter()
        self._module = LossModule(self.model, self._loss)
        self._view: View | None = None

    @property
    def view(self) -> View:
        """A view of the copy as it stands."""
        if self._view is None:
            origin = self._origin
            structure = Structure(self.model, origin.structure.example)
            self._view = View(structure, origin.generator, self._loss, origin.batches, self._data, origin.progress)
        return self._view

    def insert(self, proposals: Sequence[Proposal]) -> tuple[Plan, list[Axis]]:
        """Grow the copy; returns the plan and the axes as they were before."""
        view = self.view
        plan = resolve(view.structure, {proposal.axis: proposal.count for proposal in proposals})
        axes = [view.structure.axes.named(proposal.axis) for proposal in proposals]
        new = grown_tensors(view.values, plan, axes, proposals, Scaling())
        self._view = None
        exchange(self.model, named_tensors(self.model), new, (), plan)
        self.meter = self.meter.at_new_size()
        return plan, axes

    def epoch(self, phase: str) -> Iterator[Any]:
        """Every batch of the data once, in the loader's own order; progress is told as `phase`."""
        total, report = length(self._data), self._origin.progress
        with closing(one_pass(self._data, self._origin.generator)) as passing:
            for number, batch in enumerate(passing):
                if report is not None:
                    report(phase, number, total)
                yield batch

    def loss(self, batch: Any, tensors: Mapping[str, Tensor]) -> Tensor:
        """The loss of the copy on one batch, with some of its tensors replaced."""
        replaced = {f"model.{name}": tensor for name, tensor in tensors.items()}
        return measured(lambda: functional_call(self._module, replaced, (batch,)), training=self.model.training)
