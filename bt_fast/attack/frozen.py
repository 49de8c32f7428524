"""Deprecated: the former place of the names of `bt_fast.attack.forward`."""

from __future__ import annotations

from typing import Any

from bt_fast.attack import forward
from bt_fast.warning import warn_deprecated


def __getattr__(name: str) -> Any:
    """The name in its new module."""
    if name.startswith("_") or not hasattr(forward, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warn_deprecated(f"bt_fast.attack.frozen.{name}", f"write bt_fast.attack.forward.{name}")
    return getattr(forward, name)
