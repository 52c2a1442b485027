"""What can grow: labels for every tensor dimension of a traced model, axes, and plans."""

from meristem.structure.discover import Structure

__all__ = ["Structure"]
