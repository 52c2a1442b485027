"""The reverse of growth: units whose work the others can take over are removed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from meristem.core.axis import Axis, Place
from meristem.core.change import NO_CHANGE, Plan, index
from meristem.core.errors import GrowthRefused
from meristem.core.growth import Growth
from meristem.core.offer import Scaling
from meristem.core.ranks import shared
from meristem.event.growable import growable
from meristem.event.sharing import Settings
from meristem.event.steps import (
    Event,
    Optimizers,
    accepted,
    carry_out,
    optimizers,
    prepare,
    private_generator,
)
from meristem.how.candidates import next_layers
from meristem.lab.batches import check_reiterable, first_call, growth_batches
from meristem.lab.laboratory import Loan
from meristem.lab.ledger import counting
from meristem.lab.losses import Loss, mean_loss
from meristem.statistics.curvature import Factors, compensated, measure, removal
from meristem.structure import Structure, apart, resolve
from meristem.structure.undisturbed import undisturbed
from meristem.surgery.host import inner, opened_host, ranks_of
from meristem.surgery.probe import grown_twin, live_values
from meristem.surgery.tensors import grown_tensors

# Growth batches; two thirds to weigh units and to compensate on, the others to see
# what that costs.
_BATCHES = 48

# Less than for a score: with more of it, the units that stay would take over less
# than a duplicate's whole work.
_DAMPING = 1e-4


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
    """Remove the units of an axis that are worth least, as many as the loss does not
    notice; the others take over their work.

    Units go one by one, the one first whose removal costs least by SENN's score, the
    larger of

        freeze_i = d_i ||n_i||^2   and   prune_i = d_i ||n_i - W~_i||^2
        (`statistics.curvature.Removal`),

    and the weights of the layers that read them take over what is linear in the units
    that stay, W_act += W_pruned D_pruned,act D_act^-1. The largest number goes for
    which the loss on examples that had no part in this rises by no more than
    `tolerance` of itself. From Mitchell, Menzenbach, Kersting, Mundt, "Self-Expanding
    Neural Networks", 2024, arXiv 2307.04526, who compare both scores with a threshold
    instead.

    Args:
        model: Any module that runs.
        axis: The width.
        example: A tensor, a tuple of arguments or a dict of keyword arguments; by
            default the model's first call in `loss`.
        loss: `loss(model, batch)`, a scalar, the mean over the batch.
        data: A re-iterable of batches.
        optimizer: The optimizer, or all of them, whose state follows.
        tolerance: Largest rise of the loss, relative to it.
        generator: The source of randomness; by default a private one of the model.

    Returns:
        What was done, `added` negative; None where every unit is needed.

    Raises:
        GrowthRefused: The axis is not known, or is read by something else than linear
            layers and ungrouped convolutions.
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
        raise ValueError(
            "tolerance must be a number in [0, inf): a share of the loss; got "
            f"{tolerance!r}"
        )
    check_reiterable(data)
    if generator is None:
        generator = private_generator(inner(model))
    ranks = ranks_of(model)
    data = shared(data, ranks)
    opened = opened_host(model)
    with opened as model, ranks.together(), undisturbed(), counting() as counter:
        ranks.begin(model, generator)
        batches = growth_batches(data, _BATCHES, generator)
        if example is None:
            example = first_call(model, loss, batches[0])
        loan = Loan(generator, loss, batches, ranks=ranks)
        event = prepare(model, example, loan, optimizer=optimizers(optimizer))
        found = event.structure.axes.named(axis)
        if not found.slots:
            raise ValueError(
                f"{axis!r} is a depth; prune_ removes units. hint: narrow_(model, "
                f"{{{axis!r}: 1}}, ...)"
            )
        if found.multiple != found.grain:
            raise GrowthRefused(
                f"axis {axis!r} grows together with others, in steps of {found.multiple}, "
                "and prune_ removes units one by one. hint: narrow_, which takes counts"
            )
        # Two thirds weigh the units, one third sees what their removal costs.
        middle = 2 * len(batches) // 3
        trial = _Trial(event, found, loss, batches[:middle] or batches)
        gone = _most(trial, batches[middle:], tolerance)
        if not gone:
            return None
        planned, changed = trial.without(gone)
        growth = carry_out(event, planned, changed=changed)
    growth.flops = counter.get_total_flops()
    return growth


def _most(trial: _Trial, shown: Sequence[Any], tolerance: float) -> list[int]:
    """The largest number of units that can go without a rise of the loss, by bisection."""
    # The loss before, on the very batches that judge the removals.
    now = trial.loss([], shown)
    limit = now + tolerance * abs(now)
    order = trial.order()
    # The loss rises with every unit that goes, or nearly: bisection is enough.
    low, high = 0, len(order)
    while low < high:
        tried = (low + high + 1) // 2
        if trial.loss(order[:tried], shown) <= limit:
            low = tried
        else:
            high = tried - 1
    return order[:low]


def prune_each(
    structure: Structure,
    patterns: str | Sequence[str],
    settings: Settings,
    tolerance: float,
) -> list[Growth]:
    """Prune every width that patterns name, one after the other; what has become smaller."""
    done = []
    model, example = structure.model, structure.example
    units, _ = apart(list(growable(structure, patterns).values()))
    for axis in units:
        # An axis may be read by something that the score does not know.
        with contextlib.suppress(GrowthRefused):
            growth = prune_(
                model,
                axis.name,
                example,
                loss=settings.loss,
                data=settings.data,
                optimizer=settings.optimizers,
                tolerance=tolerance,
                generator=settings.generator,
            )
            if growth is not None:
                done.append(growth)
    return done


class _Trial:
    """What removing units of one axis would give."""

    def __init__(
        self, event: Event, axis: Axis, loss: Loss, batches: Sequence[Any]
    ) -> None:
        self.structure, self.axis, self._loss = event.structure, axis, loss
        self.lab = event.lab
        layers = next_layers(self.lab, axis)
        factors = measure(self.lab.copied(), loss, batches, layers).layers
        self.factors: dict[str, Factors] = {}
        for name in layers:
            if name not in factors:
                raise GrowthRefused(
                    f"nothing is seen of {name!r}, which reads axis {axis.name!r}. "
                    "hint: call the module"
                )
            self.factors[name] = factors[name].damped(_DAMPING)
        self.units = {name: self._entries(name) for name in self.factors}

    def _entries(self, layer: str) -> list[Tensor]:
        """For every unit the columns of the layer's flattened weight that read it."""
        kernel = self.lab.values[f"{layer}.weight"][0, 0].numel()
        where = index(
            self.structure.layout(self.axis.name)[Place(f"{layer}.weight", 1)]
        )
        spread = where[:, :, None] * kernel + torch.arange(kernel)
        return list(spread.reshape(len(where), -1))

    def _weight(self, layer: str) -> Tensor:
        """The weights of a layer, (outputs, inputs), its bias last."""
        flat = self.lab.values[f"{layer}.weight"].flatten(1)
        bias = self.lab.values.get(f"{layer}.bias")
        return flat if bias is None else torch.cat([flat, bias[:, None]], 1)

    def order(self) -> list[int]:
        """All units that could go but the last one, those first that are worth least
        once the ones before them are gone.
        """
        left = list(range(len(next(iter(self.units.values())))))
        gone: list[int] = []
        while len(left) > 1:
            worth = torch.zeros(len(left), dtype=torch.float64)
            for name, factors in self.factors.items():
                weight, dropped = (
                    self._weight(name),
                    [self.units[name][unit] for unit in gone],
                )
                stay = torch.ones(weight.shape[1], dtype=torch.bool)
                if dropped:
                    # Units are weighed in the net in which those before them are gone.
                    weight = compensated(factors.inputs, weight, torch.cat(dropped))
                    stay[torch.cat(dropped)] = False
                # Where a column stands once the dropped ones are gone.
                place = stay.cumsum(0) - 1
                rest = replace(
                    factors,
                    gradient=factors.gradient[:, stay],
                    inputs=factors.inputs[stay][:, stay],
                )
                score = removal(
                    rest,
                    weight[:, stay],
                    [place[self.units[name][unit]] for unit in left],
                )
                worth += torch.maximum(score.freeze, score.prune)
            unit = left.pop(int(worth.argmin()))
            gone.append(unit)
        return gone

    def without(self, units: list[int]) -> tuple[Plan, dict[str, Tensor]]:
        """The plan that drops units, and the old tensors that take over their work, at
        their present shapes.
        """
        multiple = self.axis.grain
        dropped = [unit * multiple + part for unit in units for part in range(multiple)]
        planned = accepted(resolve(self.structure, {self.axis.name: dropped}))
        changed: dict[str, Tensor] = {}
        for name, factors in self.factors.items():
            old = self.lab.values[f"{name}.weight"]
            columns = torch.cat([self.units[name][unit] for unit in units])
            weight = compensated(factors.inputs, self._weight(name), columns)
            changed[f"{name}.weight"] = weight[:, : old[0].numel()].reshape(old.shape)
            if f"{name}.bias" in self.lab.values:
                changed[f"{name}.bias"] = weight[:, -1]
        return planned, changed

    def loss(self, units: list[int], batches: Sequence[Any]) -> float:
        """The mean loss without some units."""
        planned, changed = self.without(units) if units else (NO_CHANGE, {})
        values = {**live_values(self.structure), **changed}
        if units:
            values |= grown_tensors(values, planned, [self.axis], [], Scaling())
        model = grown_twin(self.structure, values, planned).eval()
        return mean_loss(self._loss, model, batches)
