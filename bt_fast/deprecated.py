"""The names and keywords of the first version: they still work, and each warns with the line to write instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pkgutil import resolve_name

from bt_fast.warning import warn_deprecated


def renamed(module: str, new_names: Mapping[str, str]) -> Callable[[str], object]:
    """Returns the `__getattr__` of a module with old names: `new_names` says where each is now."""

    def get(name: str) -> object:
        if name not in new_names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_deprecated(f"{module}.{name}", f"write {new_names[name]}")
        return resolve_name(new_names[name])

    return get


def check_keywords(function: str, given: Mapping[str, object], new_lines: Mapping[str, str], **names: str) -> None:
    """Warns of each old keyword in a call of the function of that name. TypeError for a keyword that it never had.

    Args:
        given: the keywords other than the function's own.
        new_lines: by old keyword, what to write; `{value}` is replaced by the keyword's value, others by `names`.
    """
    for name, value in given.items():
        if name not in new_lines:
            raise TypeError(
                f"{function}() has no argument {name!r}: write one of its own, which help(bt_fast.{function}) lists, "
                "or leave it out"
            )
        if value is not None:  # the old default
            new = new_lines[name].format(value=repr(value), **names)
            warn_deprecated(f"the argument {name}= of {function}", new)
