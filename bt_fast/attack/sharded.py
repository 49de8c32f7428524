"""Deprecated: the former place of `gathered` and `sharded_parts` of `bt_fast.attack.wrapped`."""

from __future__ import annotations

from bt_fast.attack import wrapped
from bt_fast.deprecated import renamed

__getattr__ = renamed(__name__, {name: f"{wrapped.__name__}.{name}" for name in ("gathered", "sharded_parts")})
