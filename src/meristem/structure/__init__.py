"""What can grow: labels for every tensor dimension of a traced model, axes, and plans."""

from meristem.structure.discover import (
    Structure,
    known_example,
    proved,
    structure_of,
    with_features,
)
from meristem.structure.kinds import apart, flops
from meristem.structure.planning import (
    clash,
    factors,
    products,
    resolve,
    sized,
    with_insertions,
    with_mirrors,
)

__all__ = [
    "Structure",
    "apart",
    "clash",
    "factors",
    "flops",
    "known_example",
    "products",
    "proved",
    "resolve",
    "sized",
    "structure_of",
    "with_features",
    "with_insertions",
    "with_mirrors",
]
