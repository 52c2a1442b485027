"""What every integration does beside growing: averages follow, records are told."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path

from torch import nn

from meristem.core.errors import CheckpointError, GrowthRefused
from meristem.core.growth import Growth
from meristem.growing import replay_
from meristem.surgery.lineage import Line, lineage

LINEAGE_FILE = "meristem.json"
_LOG = logging.getLogger(__name__)


def follow(growth: Growth, model: nn.Module, average: nn.Module) -> None:
    """Grow an average of a model's weights as the model has grown."""
    try:
        replay_(growth, average)
    except GrowthRefused as refusal:
        # Old weights were trained on the side: their average belongs to another net.
        _LOG.warning("the average starts anew from the grown weights: %s", refusal)
        vars(average).update(vars(copy.deepcopy(model)))


def figures(growth: Growth) -> dict[str, float]:
    """What a logger is told of a growth: widths, depths and parameters."""
    told = {f"growth/{name}": float(size) for name, size in growth.after.items()}
    told["growth/parameters"] = float(growth.parameters[1])
    told["growth/max_change"] = float(growth.max_change or 0.0)
    return told


def write_lineage(folder: str | Path, model: nn.Module) -> None:
    """Write a model's growths beside somebody else's checkpoint of it."""
    # An empty one, too: the folder may have been used before.
    Path(folder, LINEAGE_FILE).write_text(json.dumps(lineage(model)))


def read_lineage(folder: str | Path) -> Line:
    """The growths beside a checkpoint; none where the model had not grown.

    Raises:
        CheckpointError: The file is not readable.
    """
    path = Path(folder, LINEAGE_FILE)
    if not path.is_file():
        return []
    try:
        line: Line = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not readable: {error}") from None
    return line


def needs(package: str, extra: str) -> str:
    """What is said where an integration's package is missing."""
    return f"{package} is not installed. hint: pip install 'meristem-torch[{extra}]'"
