"""The reverse of growth: units whose work the others can take over are removed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from meristem.core.axis import Axis, Place
from meristem.core.change import Plan, index
from meristem.core.errors import GrowthRefused
from meristem.core.growth import Growth
from meristem.core.offer import Scaling
from meristem.growing import Optimizers, accepted, optimizers, perform, private_generator
from meristem.how.search import next_layers
from meristem.statistics.batches import check_reiterable, first_call, growth_batches
from meristem.statistics.curvature import Factors, compensated, measure, removal
from meristem.statistics.flops import counting
from meristem.statistics.losses import Loss, called, measured
from meristem.structure import Structure, resolve
from meristem.structure.undisturbed import undisturbed
from meristem.surgery.tensors import grown_tensors
from meristem.surgery.verify import grown_twin
from meristem.view import View

_BATCHES = 48
"""Growth batches; two thirds to weigh units and to compensate on, the others to see what that costs."""

_DAMPING = 1e-4
"""Less than for a score: with more of it, the units that stay would take over less than a duplicate's whole work."""


def prune_(
    model: nn.Module,
    axis: str,
    example: Any = None,
    *,
    loss: Loss,
    data: Iterable[Any],
    optimizer: Optimizers = None,
    tolerance: float = 1e-3,
    generator: torch.Generator | None = None,
) -> Growth | None:
    """Remove the units of an axis that are worth least, as many as the loss does not notice; the others take over their work.

    Units go one by one, the one first whose removal costs least by SENN's score, the larger of

        freeze_i = d_i ||n_i||^2   and   prune_i = d_i ||n_i - W~_i||^2     (`statistics.curvature.Removal`),

    and the weights of the layers that read them take over what is linear in the units that stay,
    W_act += W_pruned D_pruned,act D_act^-1. The largest number goes for which the loss on examples that had no part in this
    rises by no more than `tolerance` of itself. From Mitchell, Menzenbach, Kersting, Mundt, "Self-Expanding Neural Networks",
    2024, arXiv 2307.04526, who compare both scores with a threshold instead.

    Args:
        model: Any module that runs.
        axis: The width.
        example: A tensor, a tuple of arguments or a dict of keyword arguments; by default the model's first call in `loss`.
        loss: `loss(model, batch)`, a scalar, the mean over the batch.
        data: A re-iterable of batches.
        optimizer: The optimizer, or all of them, whose state follows.
        tolerance: Largest rise of the loss, relative to it.
        generator: The source of randomness; by default a private one of the model.

    Returns:
        What was done, `added` negative; None where every unit is needed.

    Raises:
        GrowthRefused: The axis is not known, or is read by something else than linear layers and ungrouped convolutions.
        DataError: `data` is empty, or can be read only once.

    Examples:
        >>> import torch, meristem as ms
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> twice = ms.grow_(net, {"0": 4}, torch.randn(3, 4), how=ms.how.Net2Net())
        >>> data = [(torch.randn(64, 4), torch.randn(64, 2)) for _ in range(6)]
        >>> loss = lambda model, batch: torch.nn.functional.mse_loss(model(batch[0]), batch[1])
        >>> ms.prune_(net, "0", loss=loss, data=data).after["0"] <= 8
        True
    """
    if isinstance(tolerance, bool) or not tolerance >= 0:
        raise ValueError(f"tolerance must be a number in [0, inf): a share of the loss; got {tolerance!r}")
    check_reiterable(data)
    generator = generator if generator is not None else private_generator(model)
    with undisturbed(), counting() as counter:
        batches = growth_batches(data, _BATCHES, generator)
        structure = Structure(model, first_call(model, loss, batches[0]) if example is None else example)
        view = View(structure, generator, loss, batches)
        found = structure.axes.named(axis)
        if found.kind == "depth":
            raise ValueError(f"{axis!r} is a depth; prune_ removes units. hint: narrow_(model, {{{axis!r}: 1}}, ...)")
        layers = next_layers(view, found)
        middle = 2 * len(batches) // 3
        factors = measure(view.copied(), loss, batches[:middle] or batches, layers).layers
        if missing := [name for name in layers if name not in factors]:
            raise GrowthRefused(f"nothing is seen of {missing[0]!r}, which reads axis {axis!r}. hint: call the module")
        trial = _Trial(view, found, {name: factors[name].damped(_DAMPING) for name in layers})
        shown = batches[middle:]
        now = trial.loss([], shown)
        limit = now + tolerance * abs(now)
        order = trial.order()
        low, high = 0, len(order)
        while low < high:
            tried = (low + high + 1) // 2
            low, high = (tried, high) if trial.loss(order[:tried], shown) <= limit else (low, tried - 1)
        if not low:
            return None
        planned, changed = trial.without(order[:low])
        growth = perform(view, planned, [], (), (), optimizers(optimizer), changed)
    growth.flops = counter.get_total_flops()
    return growth


class _Trial:
    """What removing units of one axis would give."""

    def __init__(self, view: View, axis: Axis, factors: Mapping[str, Factors]) -> None:
        self.view, self.axis, self.factors = view, axis, factors
        self.units = {name: self._entries(name) for name in factors}

    def _entries(self, layer: str) -> list[Tensor]:
        """For every unit the columns of the layer's flattened weight that read it."""
        kernel = self.view.values[f"{layer}.weight"][0, 0].numel()
        where = index(self.view.structure.layout(self.axis.name)[Place(f"{layer}.weight", 1)])
        spread = where[:, :, None] * kernel + torch.arange(kernel)
        return list(spread.reshape(len(where), -1))

    def _weight(self, layer: str) -> Tensor:
        """The weights of a layer, (outputs, inputs), its bias last."""
        flat = self.view.values[f"{layer}.weight"].flatten(1)
        bias = self.view.values.get(f"{layer}.bias")
        return flat if bias is None else torch.cat([flat, bias[:, None]], 1)

    def order(self) -> list[int]:
        """All units that could go but the last one, those first that are worth least once the ones before them are gone."""
        left = list(range(len(next(iter(self.units.values())))))
        gone: list[int] = []
        while len(left) > 1:
            worth = torch.zeros(len(left), dtype=torch.float64)
            for name, factors in self.factors.items():
                weight, dropped = self._weight(name), [self.units[name][unit] for unit in gone]
                stay = torch.ones(weight.shape[1], dtype=torch.bool)
                if dropped:
                    weight = compensated(factors.inputs, weight, torch.cat(dropped))
                    stay[torch.cat(dropped)] = False
                place = stay.cumsum(0) - 1
                rest = replace(factors, gradient=factors.gradient[:, stay], inputs=factors.inputs[stay][:, stay])
                score = removal(rest, weight[:, stay], [place[self.units[name][unit]] for unit in left])
                worth += torch.maximum(score.freeze, score.prune)
            unit = left.pop(int(worth.argmin()))
            gone.append(unit)
        return gone

    def without(self, units: list[int]) -> tuple[Plan, dict[str, Tensor]]:
        """The plan that drops units, and the old tensors that take over their work, at their present shapes."""
        multiple = self.axis.multiple
        dropped = [unit * multiple + part for unit in units for part in range(multiple)]
        planned = accepted(resolve(self.view.structure, {self.axis.name: dropped}))
        changed: dict[str, Tensor] = {}
        for name, factors in self.factors.items():
            old = self.view.values[f"{name}.weight"]
            columns = torch.cat([self.units[name][unit] for unit in units])
            weight = compensated(factors.inputs, self._weight(name), columns)
            changed[f"{name}.weight"] = weight[:, : old[0].numel()].reshape(old.shape)
            if f"{name}.bias" in self.view.values:
                changed[f"{name}.bias"] = weight[:, -1]
        return planned, changed

    def loss(self, units: list[int], batches: list[Any]) -> float:
        """The mean loss without some units."""
        planned, changed = self.without(units) if units else (Plan({}, {}), {})
        values = {**self.view.values, **changed}
        grown = grown_tensors(values, planned, [self.axis], [], Scaling()) if units else {}
        model = grown_twin(self.view.structure.model, {**values, **grown}, planned).eval()
        loss = self.view.loss
        assert loss is not None
        with torch.no_grad():
            losses = [measured(lambda: called(loss, model, batch)).item() for batch in batches]  # noqa: B023
        return sum(losses) / len(losses)
