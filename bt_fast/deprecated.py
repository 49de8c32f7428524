"""Keywords of the first version: they work for this one, and each warns with the line to write instead."""

from __future__ import annotations

from collections.abc import Mapping

from bt_fast.warning import warn_deprecated


def check_keywords(function: str, given: Mapping[str, object], new_lines: Mapping[str, str], **names: str) -> None:
    """Warn of each old keyword that a function was given.

    Args:
        function: its name. given: the keywords beside its own.
        new_lines: by old keyword, what to write; `{value}` stands for what was given, others for `names`.

    Raises:
        TypeError: it never had a keyword of that name.
    """
    for name, value in given.items():
        if name not in new_lines:
            raise TypeError(
                f"{function}() has no argument {name!r}: write one of its own, which help(bt_fast.{function}) lists, "
                "or leave it out"
            )
        if value is not None:  # which was the default
            new = new_lines[name].format(value=repr(value), **names)
            warn_deprecated(f"the argument {name}= of {function}", new)
