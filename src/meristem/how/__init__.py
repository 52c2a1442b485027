"""How new units start: one method a file."""

from meristem.how.gradmax import GradMax
from meristem.how.net2net import Net2Net
from meristem.how.protocol import How, Settles
from meristem.how.random import Random
from meristem.how.swe import SWE

METHODS = {"random": Random, "net2net": Net2Net, "gradmax": GradMax, "swe": SWE}
"""Every method by its name in a configuration file."""

__all__ = ["METHODS", "SWE", "GradMax", "How", "Net2Net", "Random", "Settles"]
