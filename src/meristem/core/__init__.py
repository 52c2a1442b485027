"""Pure data: axes, changes, offers, growths, errors. Nothing here looks at a model."""
