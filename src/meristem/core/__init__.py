"""Pure data: axes, changes, offers, growths, errors. Nothing here looks at a model."""

VERSION = "0.1.0"
"""Of the distribution, meristem-torch."""
