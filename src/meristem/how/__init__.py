"""How new units start: one method a file."""

from collections.abc import Mapping

from meristem.how.gradmax import GradMax
from meristem.how.interpose import Interpose
from meristem.how.net2net import Net2Net
from meristem.how.random import Random
from meristem.how.senn import SENN
from meristem.how.stack import Stack
from meristem.how.swe import SWE
from meristem.how.zero_block import ZeroBlock

METHODS: Mapping[str, type] = {
    "random": Random,
    "net2net": Net2Net,
    "gradmax": GradMax,
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
    "GradMax",
    "Interpose",
    "Net2Net",
    "Random",
    "Stack",
    "ZeroBlock",
]
