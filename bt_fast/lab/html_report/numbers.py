"""Numbers as a report writes them."""

from __future__ import annotations

import math
from collections.abc import Mapping

UNKNOWN = "–"


def percent(share: float | None) -> str:
    """A share in percent with one decimal."""
    return UNKNOWN if share is None else _finite(share, f"{100 * share:.1f} %")


def times(ratio: float | None) -> str:
    """A speedup."""
    return UNKNOWN if ratio is None else _finite(ratio, f"{ratio:.2f}×")


def plain(value: float | None, unit: str = "", digits: int = 3) -> str:
    """A number with so many significant digits, or all that are before the point."""
    if value is None:
        return UNKNOWN
    if not math.isfinite(value):
        return _finite(value, "")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    text = f"{value:.{min(decimals, 9)}f}".replace("-", "−")
    return f"{text} {unit}" if unit else text


def duration(seconds: float | None) -> str:
    """A time in milliseconds or seconds."""
    if seconds is not None and abs(seconds) < 1:
        return plain(1000 * seconds, "ms")
    return plain(seconds, "s")


def shares(fractions: Mapping[str, float] | None) -> str:
    """F_B / F_R / F_O."""
    if fractions is None:
        return UNKNOWN
    return " / ".join(f"{fractions[group]:.2f}" for group in ("boundary", "robust", "outlier"))


def _finite(value: float, text: str) -> str:
    return text if math.isfinite(value) else "not a number"
