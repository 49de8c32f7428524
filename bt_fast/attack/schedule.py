"""Deprecated: the first version's place of `Schedule`, which is now `bt_fast.Plan`."""

from __future__ import annotations

from bt_fast.deprecated import renamed

__getattr__ = renamed(__name__, {"Schedule": "bt_fast.Plan"})
