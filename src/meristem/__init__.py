"""Meristem grows neural networks while they train."""

from meristem import care, how, recipes, when, where
from meristem.activations import PReLU, Rational
from meristem.advice import advise
from meristem.checkpoint import load, regrow_, save
from meristem.core import VERSION
from meristem.core.axis import Axes, Axis, Slot
from meristem.core.budget import Budget
from meristem.core.change import Plan
from meristem.core.errors import (
    CheckpointError,
    DataError,
    DiscoveryError,
    GrowthRefused,
    MeristemError,
    OptimizerError,
    PendingBackward,
    UnknownAxis,
    VerificationError,
)
from meristem.core.growth import Growth
from meristem.grower import Grower
from meristem.growing import find_axes, grow_, narrow_, plan, replay_
from meristem.pretrained.expand import expand_
from meristem.pretrained.young import freeze_old_, new_parameters, young
from meristem.pruning import prune_
from meristem.statistics.health import health
from meristem.surgery.lineage import convert, lineage
from meristem.surgery.optimizers import STATE_RULES

__version__ = VERSION

__all__ = [
    "STATE_RULES",
    "Axes",
    "Axis",
    "Budget",
    "CheckpointError",
    "DataError",
    "DiscoveryError",
    "Grower",
    "Growth",
    "GrowthRefused",
    "MeristemError",
    "OptimizerError",
    "PReLU",
    "PendingBackward",
    "Plan",
    "Rational",
    "Slot",
    "UnknownAxis",
    "VerificationError",
    "advise",
    "care",
    "convert",
    "expand_",
    "find_axes",
    "freeze_old_",
    "grow_",
    "health",
    "how",
    "lineage",
    "load",
    "narrow_",
    "new_parameters",
    "plan",
    "prune_",
    "recipes",
    "regrow_",
    "replay_",
    "save",
    "when",
    "where",
    "young",
]


def __dir__() -> list[str]:
    return __all__
