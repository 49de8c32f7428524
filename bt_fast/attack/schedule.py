"""Deprecated: where the first version had `Schedule`. It is `bt_fast.Plan` now."""

from __future__ import annotations

from bt_fast.plan import Plan
from bt_fast.warning import warn_deprecated


def __getattr__(name: str) -> object:
    """The name of the first version."""
    if name != "Schedule":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warn_deprecated("bt_fast.attack.schedule.Schedule", "write bt_fast.Plan")
    return Plan
