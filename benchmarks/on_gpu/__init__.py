"""Prepares ten minutes on a new GPU: what to check and measure first, in order of value."""
