"""Deprecated: the former place of the names of `bt_fast.attack.forward`."""

from __future__ import annotations

from bt_fast.attack import forward
from bt_fast.deprecated import renamed

__getattr__ = renamed(
    __name__, {name: f"{forward.__name__}.{name}" for name in dir(forward) if not name.startswith("_")}
)
