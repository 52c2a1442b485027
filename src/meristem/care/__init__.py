"""Care: what the rest of the net and the optimizer get at a growth.

Each says what to do; surgery does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from meristem.core.axis import Axis
from meristem.core.change import Plan
from meristem.core.offer import Ramp, Scaling, Tracking, Treatment
from meristem.methods import check_counts


@dataclass(frozen=True)
class WarmMoments:
    """New slices start with the mean second moment of their tensor, and a zero first
    moment.

    A zero second moment whose bias correction is spent makes Adam move a new weight by
    up to 6.6 x the learning rate; the mean of the tensor takes that spike away. Old
    state is untouched.

    Examples:
        >>> WarmMoments()
        WarmMoments()
    """

    def treat(self, model: nn.Module, plan: Plan, axes: Sequence[Axis]) -> Treatment:
        return Treatment(warm=True)


@dataclass(frozen=True)
class ResetMoments:
    """The optimizer forgets everything: state of all parameters, old and new, steps
    included.

    Examples:
        >>> ResetMoments()
        ResetMoments()
    """

    def treat(self, model: nn.Module, plan: Plan, axes: Sequence[Axis]) -> Treatment:
        return Treatment(reset=True)


@dataclass(frozen=True)
class VarianceTransfer:
    """Old fan-out weights x sqrt(h_old / h_new), so that pre-activations keep the
    variance of a net of the new width.

    Yuan, Savarese, Maire, "Accelerated Training via Incrementally Growing Neural
    Networks using Variance Transfer and Learning Rate Adaptation", 2023, arXiv
    2306.12700. Changes the function.

    Examples:
        >>> VarianceTransfer()
        VarianceTransfer()
    """

    def treat(self, model: nn.Module, plan: Plan, axes: Sequence[Axis]) -> Treatment:
        places = {
            slot.place: (plan.before[axis.name] / plan.after[axis.name]) ** 0.5
            for axis in axes
            for slot in axis.places("fan_out")
        }
        return Treatment(Scaling(places=places))


@dataclass(frozen=True)
class Shrink:
    """Every weight matrix and kernel of the network x `factor`; biases and norms keep
    their values. Changes the function.

    Args:
        factor: In (0, 1); .4 won back most of what naive growth lost on a Fashion-MNIST
            MLP.

    Examples:
        >>> Shrink(0.4)
        Shrink(factor=0.4)
    """

    factor: float = 0.4

    def __post_init__(self) -> None:
        if not 0 < self.factor < 1:
            raise ValueError(
                f"Shrink(factor=...) must be a float in (0, 1); got {self.factor}"
            )

    def treat(self, model: nn.Module, plan: Plan, axes: Sequence[Axis]) -> Treatment:
        names = [
            name
            for name, p in model.named_parameters()
            if p.dim() > 1 and p.requires_grad
        ]
        return Treatment(Scaling(tensors=dict.fromkeys(names, self.factor)))


@dataclass(frozen=True)
class YoungRate:
    """New weights learn slower while they are young: their steps are multiplied by a
    factor that rises evenly from `start` to 1 over `steps` optimizer steps.

    Hooks of the optimizer do it, whichever it is; they are taken away when the weights
    are mature. Moments are collected at the full rate. Follows the rate adaptation of
    Yuan, Savarese, Maire (2023, arXiv 2306.12700) in its purpose; theirs is one rate
    per growth by the norm of its weights.

    Args:
        steps: Optimizer steps until the weights learn as all others do.
        start: The factor at the first one, in [0, 1).

    Examples:
        >>> YoungRate(50)
        YoungRate(steps=50, start=0.0)
    """

    steps: int = 100
    start: float = 0.0

    def __post_init__(self) -> None:
        _check_ramp(self)

    def treat(self, model: nn.Module, plan: Plan, axes: Sequence[Axis]) -> Treatment:
        return Treatment(after=(Ramp(self.steps, self.start),))


@dataclass(frozen=True)
class Rewarm:
    """The learning rate warms up again after a growth: all steps are multiplied by a
    factor that rises evenly from `start` to 1 over `steps` optimizer steps.

    Hooks of the optimizer do it, beside any scheduler of the learning rate.

    Args:
        steps: Optimizer steps of the warm-up.
        start: The factor at the first one, in [0, 1).

    Examples:
        >>> Rewarm(50, start=0.1)
        Rewarm(steps=50, start=0.1)
    """

    steps: int = 100
    start: float = 0.0

    def __post_init__(self) -> None:
        _check_ramp(self)

    def treat(self, model: nn.Module, plan: Plan, axes: Sequence[Axis]) -> Treatment:
        return Treatment(after=(Ramp(self.steps, self.start, whole=True),))


def _check_ramp(care: YoungRate | Rewarm) -> None:
    name = type(care).__name__
    check_counts(name, steps=care.steps)
    if isinstance(care.start, bool) or not 0 <= care.start < 1:
        raise ValueError(
            f"{name}(start=...) must be a float in [0, 1); got {care.start}"
        )


@dataclass(frozen=True)
class FreshStatistics:
    """Running statistics of batch norms follow faster after a growth, for `steps`
    optimizer steps; then each norm gets its own momentum back.

    New units move what the layers behind them see faster than an average over the last
    ten batches can follow: the network that is evaluated is then not the one that is
    trained, and its loss leaps though the training loss falls. A batch of n values per
    channel counts as

        m = min(momentum, 2 n / (values + n)),

    so that the average, over about (2 - m) / m batches, stands for `values` at least; a
    batch smaller than the largest counts for less, 1 - (1 - m)^(n / n_largest). Never
    slower than the norm itself for a full batch. Needs no norm in the model; one that
    averages over all batches (momentum None) is left alone.

    Args:
        steps: For how long.
        momentum: The largest weight of the newest batch meanwhile, in (0, 1].
        values: Values of a channel (examples x positions) that an average stands for.

    Examples:
        >>> FreshStatistics()
        FreshStatistics(steps=100, momentum=0.5, values=1000)
    """

    steps: int = 100
    momentum: float = 0.5
    values: int = 1000

    def __post_init__(self) -> None:
        check_counts("FreshStatistics", steps=self.steps, values=self.values)
        if isinstance(self.momentum, bool) or not 0 < self.momentum <= 1:
            raise ValueError(
                "FreshStatistics(momentum=...) must be a float in (0, 1]; got "
                f"{self.momentum}"
            )

    def treat(self, model: nn.Module, plan: Plan, axes: Sequence[Axis]) -> Treatment:
        return Treatment(after=(Tracking(self.steps, self.momentum, self.values),))


CARES = {
    "warm_moments": WarmMoments,
    "reset_moments": ResetMoments,
    "variance_transfer": VarianceTransfer,
    "shrink": Shrink,
    "young_rate": YoungRate,
    "rewarm": Rewarm,
    "fresh_statistics": FreshStatistics,
}
"""Every care by its name in a configuration file."""

__all__ = [
    "CARES",
    "FreshStatistics",
    "ResetMoments",
    "Rewarm",
    "Shrink",
    "VarianceTransfer",
    "WarmMoments",
    "YoungRate",
]


def __dir__() -> list[str]:
    return __all__
