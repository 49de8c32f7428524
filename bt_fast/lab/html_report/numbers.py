"""Formats numbers and foreign text for a report."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping

UNKNOWN = "–"
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def printable(text: str) -> str:
    """Replaces what no page may hold by U+FFFD or "?": control characters and lone surrogates."""
    return _CONTROL.sub("\ufffd", text.encode("utf-8", "replace").decode())


def _number(value: float | None, written: str) -> str:
    if value is None:
        return UNKNOWN
    return written.format(value).replace("-", "−") if math.isfinite(value) else "not a number"


def percent(share: float | None) -> str:
    """Formats a share in percent with one decimal."""
    return _number(None if share is None else 100 * share, "{:.1f} %")


def times(ratio: float | None) -> str:
    """Formats a speedup."""
    return _number(ratio, "{:.2f}×")


def points(change: float | None) -> str:
    """Formats a difference of two shares."""
    return _number(None if change is None else 100 * change, "{:+.1f} points")


def plain(value: float | None, unit: str = "") -> str:
    """Formats a number with three significant digits, or all before the point."""
    finite = value is not None and math.isfinite(value)
    decimals = max(0, 2 - math.floor(math.log10(abs(value)))) if value and finite else 0
    return _number(value, f"{{:.{min(decimals, 9)}f}}{' ' if unit else ''}{unit}")


def duration(seconds: float | None) -> str:
    """Formats a time in milliseconds or seconds."""
    if seconds is not None and abs(seconds) < 1:
        return plain(1000 * seconds, "ms")
    return plain(seconds, "s")


joules, watts, passes = (functools.partial(plain, unit=unit) for unit in ("J", "W", "F"))


def count(number: float) -> str:
    """Formats a number without rounding."""
    return str(number)


def shares(fractions: Mapping[str, float] | None) -> str:
    """Formats F_B / F_R / F_O."""
    if fractions is None:
        return UNKNOWN
    return " / ".join(_number(fractions[group], "{:.2f}") for group in ("boundary", "robust", "outlier"))
