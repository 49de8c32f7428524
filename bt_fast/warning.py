"""Warnings that point at the line of the caller's script, from any depth in the package."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

_PACKAGE = str(Path(__file__).parent) + os.sep


def warn_caller(message: str, kind: type[Warning] = UserWarning) -> None:
    """Warns of `message` at the line that called the package.

    Frames of other libraries (context managers, torch) may lie in between: the line is below the last of our frames.
    """
    caller, level, frame = 1, 1, sys._getframe()
    while frame.f_back is not None:
        if frame.f_code.co_filename.startswith(_PACKAGE):
            caller = level + 1
        frame, level = frame.f_back, level + 1
    warnings.warn(message, kind, stacklevel=caller)


def warn_deprecated(old: str, new: str) -> None:
    """Warns that `old` will be removed in the next version; `new` says what to write instead."""
    warn_caller(f"{old} is deprecated and will go with the next version: {new}", DeprecationWarning)
