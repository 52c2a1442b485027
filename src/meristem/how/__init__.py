"""How new units start: one method a file."""

from collections.abc import Mapping

from meristem.how.firefly import Firefly
from meristem.how.gradmax import GradMax
from meristem.how.interpose import Interpose
from meristem.how.net2net import Net2Net
from meristem.how.pairs import Pairs
from meristem.how.random import Random
from meristem.how.senn import SENN
from meristem.how.stack import Stack
from meristem.how.swe import SWE
from meristem.how.tiny import TINY
from meristem.how.zero_block import ZeroBlock

METHODS: Mapping[str, type] = {
    "random": Random,
    "net2net": Net2Net,
    "pairs": Pairs,
    "gradmax": GradMax,
    "firefly": Firefly,
    "tiny": TINY,
    "swe": SWE,
    "senn": SENN,
    "zero_block": ZeroBlock,
    "stack": Stack,
    "interpose": Interpose,
}
"""Every method by its name in a configuration file."""

__all__ = [
    "METHODS",
    "SENN",
    "SWE",
    "TINY",
    "Firefly",
    "GradMax",
    "Interpose",
    "Net2Net",
    "Pairs",
    "Random",
    "Stack",
    "ZeroBlock",
]


def __dir__() -> list[str]:
    return __all__
