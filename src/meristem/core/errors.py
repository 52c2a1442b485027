"""The errors that Meristem raises; all of them leave model, optimizer and random state
as they were.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MeristemError(Exception):
    """Base class of every error of Meristem's own."""


class GrowthRefused(MeristemError, ValueError):
    """A growth was asked for that this model cannot do; the message says what stands in
    the way.
    """


class UnknownAxis(GrowthRefused, KeyError):
    """No axis has this name."""

    def __str__(self) -> str:
        return str(self.args[0])


class DiscoveryError(MeristemError, RuntimeError):
    """The model could not be traced on the example."""


class VerificationError(MeristemError, RuntimeError):
    """A grown model did not compute what it should; nothing was changed."""


class OptimizerError(MeristemError, ValueError):
    """The optimizer does not fit the model, or holds state that no rule covers."""


class DataError(MeristemError, ValueError):
    """The growth data cannot be used: empty, one-shot, or its loss is not finite."""


class PendingBackward(MeristemError, RuntimeError):
    """A graph that still holds the weights is waiting for its backward pass."""


class CheckpointError(MeristemError, RuntimeError):
    """A checkpoint is missing, incomplete, or does not belong to this model."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A "did you mean" clause, or an empty string where nothing is close."""
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f" Did you mean {', '.join(repr(c) for c in close)}?" if close else ""
