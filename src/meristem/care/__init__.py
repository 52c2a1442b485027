"""Care: what the rest of the net and the optimizer get at a growth.

Each says what to do; surgery does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from meristem.core.axis import Axis
from meristem.core.change import Plan
from meristem.core.offer import Scaling, Treatment


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


CARES = {
    "warm_moments": WarmMoments,
    "reset_moments": ResetMoments,
    "variance_transfer": VarianceTransfer,
    "shrink": Shrink,
}
"""Every care by its name in a configuration file."""
