"""HTML and SVG that cannot be broken by the text in it: every string is escaped unless it is markup already."""

from __future__ import annotations

import html
import re

_VOID = {"meta", "br"}
_NUMBER = re.compile(r"[−+]?\d|–$|not a number$")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class Html(str):
    """Markup that is to be taken as it stands."""

    __slots__ = ()


def escape(text: str) -> Html:
    """Text as markup; characters that no page may hold (control characters, lone surrogates) as U+FFFD or '?'."""
    if isinstance(text, Html):
        return text
    return Html(html.escape(_CONTROL.sub("\ufffd", text.encode("utf-8", "replace").decode())))


def join(parts: list[Html]) -> Html:
    """Markup one after the other."""
    return Html("".join(parts))


def element(name: str, /, *children: str, **attributes: str | float | bool | None) -> Html:
    """`<name attributes>children</name>`. Attributes: `_` stands for `-`, a last one is left off; numbers are rounded
    to tenths, True is an attribute without a value, False and None are none."""
    written = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{''.join(map(escape, children))}</{name}>")


def _attribute(key: str, value: str | float | bool | None) -> str:
    key = key.rstrip("_").replace("_", "-")
    if value is None or value is False:
        return ""
    if value is True:
        return f" {key}"
    return f' {key}="{escape(value if isinstance(value, str) else f"{round(value, 1):g}")}"'


def table(caption: str, header: list[str], rows: list[list[str]], marked: frozenset[int] = frozenset()) -> Html:
    """A table that scrolls by itself, also with the keyboard; the first cell of each row is the row's header.

    Args:
        marked: the rows that stand out, by their index; say in words why.
    """
    numeric = [all(_NUMBER.match(row[i]) for row in rows) for i in range(len(header))]
    sides = ["number" if n and i else None for i, n in enumerate(numeric)]
    head = element("tr", *(element("th", t, scope="col", class_=s) for t, s in zip(header, sides, strict=True)))
    body = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            *(element("td", text, class_=side) for text, side in zip(row[1:], sides[1:], strict=True)),
            class_="marked" if i in marked else None,
        )
        for i, row in enumerate(rows)
    ]
    whole = element("table", element("caption", caption), element("thead", head), element("tbody", *body))
    return element("div", whole, class_="scroll", role="region", aria_label=caption, tabindex="0")


def panel(heading: str, *content: Html) -> Html:
    """One of several things side by side."""
    return element("div", element("h3", heading), *content, class_="panel")


def note(text: str) -> Html:
    """A remark, for instance why there is no chart."""
    return element("p", text, class_="note")
