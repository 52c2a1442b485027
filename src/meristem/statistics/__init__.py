"""Measuring on the side: what is looked at comes back untouched."""
