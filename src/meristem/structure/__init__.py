"""What can grow: labels for every tensor dimension of a traced model, axes, and plans."""

from meristem.structure.discover import Structure
from meristem.structure.planning import clash, flops, products, resized, resolve, with_insertions

__all__ = ["Structure", "clash", "flops", "products", "resized", "resolve", "with_insertions"]
