"""How new units start: one method a file."""

from meristem.how.gradmax import GradMax
from meristem.how.net2net import Net2Net
from meristem.how.random import Random
from meristem.how.view import How, Sandbox, View

METHODS = {"random": Random, "net2net": Net2Net, "gradmax": GradMax}
"""Every method by its name in a configuration file."""

__all__ = ["METHODS", "GradMax", "How", "Net2Net", "Random", "Sandbox", "View"]
