"""Deprecated: where the first version had `Schedule`. It is `bt_fast.Plan` now."""

from __future__ import annotations

from bt_fast.deprecated import renamed

__getattr__ = renamed(__name__, {"Schedule": "bt_fast.Plan"})
