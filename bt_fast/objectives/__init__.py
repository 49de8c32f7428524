"""The training objectives that users call."""
