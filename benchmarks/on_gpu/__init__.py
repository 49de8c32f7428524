"""Ten minutes on a GPU that nobody has seen before, prepared: what to check and measure first, in order of value."""
