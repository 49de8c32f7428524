"""What charts are made of: scales, axes, lines and marks as SVG. Coordinates are in the units of the view box."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bt_fast.lab.html_report.markup import Html, element, join
from bt_fast.lab.html_report.style import SERIES

WIDTH = 460
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 12, 44  # margins around the area that is drawn on
DASHES = (None, "6 4", "9 3 2 3", "2 3")

Point = tuple[float, float]


@dataclass(frozen=True)
class Scale:
    """A linear map from values low..high to coordinates start..end."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The coordinate of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values within the scale, at most `most` + 1."""
        step = _round_up((self.high - self.low) / most)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


def _round_up(value: float) -> float:
    """The next of 1, 2 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= value * (1 - 1e-9))


def spread(values: Sequence[float], least: float) -> tuple[float, float]:
    """The range of finite values, widened to at least `least` and by a little more, so that marks stand clear."""
    finite = [v for v in values if math.isfinite(v)]
    low, high = (min(finite), max(finite)) if finite else (0.0, least)
    margin = max((least - (high - low)) / 2, 0.06 * (high - low))
    return low - margin, high + margin


def x_scale(low: float, high: float) -> Scale:
    """Across the drawing."""
    return Scale(low, high, LEFT, WIDTH - RIGHT)


def y_scale(low: float, high: float, top: float, bottom: float) -> Scale:
    """Upwards between two heights of the drawing."""
    return Scale(low, high, bottom, top)


def axes(x: Scale, y: Scale, x_label: str, y_label: str) -> Html:
    """Grid lines, ticks with their values, and what they mean."""
    parts = []
    for value in y.ticks():
        parts += [_line(x.start, y(value), x.end, y(value), "grid"), _text(x.start - 6, y(value) + 4, value, "end")]
    for value in x.ticks():
        parts += [_line(x(value), y.start, x(value), y.start + 4, "axis")]
        parts += [_text(x(value), y.start + 17, value, "middle")] if x_label else []
    parts.append(_line(x.start, y.start, x.end, y.start, "axis"))
    parts.append(words((x.start + x.end) / 2, y.start + 36, x_label, "middle"))
    middle = (y.start + y.end) / 2
    turned = element(
        "text", y_label, class_="faint", text_anchor="middle", transform=f"translate(13 {middle:g}) rotate(-90)"
    )
    return join([*parts, turned])


def upright_grid(x: Scale, bottom: float, label: str) -> Html:
    """Vertical grid lines down to an axis at the bottom, for bars and marks that lie in rows."""
    parts = []
    for value in x.ticks():
        parts += [_line(x(value), 0, x(value), bottom, "grid"), _text(x(value), bottom + 17, value, "middle")]
    return join([*parts, words((x.start + x.end) / 2, bottom + 36, label, "middle")])


def words(x: float, y: float, text: str, anchor: str = "start", class_: str | None = "faint") -> Html:
    """A text at a place."""
    return element("text", text, x=x, y=y, text_anchor=anchor, class_=class_)


def _text(x: float, y: float, value: float, anchor: str) -> Html:
    return words(x, y, f"{value:.10g}".replace("-", "−"), anchor)


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Html:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def guide(x: float, top: float, bottom: float) -> Html:
    """A dashed vertical line."""
    return _line(x, top, x, bottom, "guide")


def bar(x1: float, y1: float, x2: float, y2: float, class_: str) -> Html:
    """A filled rectangle between two corners, in any order."""
    return element("rect", x=min(x1, x2), y=min(y1, y2), width=abs(x2 - x1), height=abs(y2 - y1), class_=class_)


@dataclass(frozen=True)
class Style:
    """How a series is told from others: by its colour, its shape and its dashes; hollow marks are a second measure."""

    colour: int
    shape: int
    dash: str | None = None
    hollow: bool = False

    @classmethod
    def of(cls, index: int) -> Style:
        """The style of the series of that number; colour and shape together differ for the first 64."""
        return cls(index % SERIES, (index + index // SERIES) % SERIES)


def line(points: Sequence[Point], style: Style, marks: int = 10) -> Html:
    """A line through the points that are finite, with a mark on about `marks` of them."""
    finite = [p for p in points if math.isfinite(p[0]) and math.isfinite(p[1])]
    if not finite:
        return Html()
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in finite)
    every = max(1, math.ceil(len(finite) / marks))
    marked = [p for i, p in enumerate(reversed(finite)) if i % every == 0]
    drawn = element("path", d=path, class_=f"line s{style.colour}", stroke_dasharray=style.dash)
    return join([drawn, *(mark(p, style) for p in marked)])


_SHAPES = (  # around 0, for marks that are no circle
    "",
    "M-4 -4H4V4H-4Z",
    "M0 -5L5 4H-5Z",
    "M0 -6L5 0L0 6L-5 0Z",
    "M0 5L5 -4H-5Z",
    "M-5 0H5M0 -5V5",
    "M-4 -4L4 4M-4 4L4 -4",
    "M0 -5L5 -1L3 5H-3L-5 -1Z",
)


def mark(point: Point, style: Style) -> Html:
    """The shape of a series at a point."""
    x, y = point
    class_ = f"mark s{style.colour} {'hollow' if style.hollow else f'f{style.colour}'}"
    if not style.shape:
        return element("circle", cx=x, cy=y, r=4, class_=class_)
    return element("path", d=_SHAPES[style.shape], class_=class_, transform=f"translate({x:.1f} {y:.1f})")


def key(style: Style, text: str, *, lined: bool = True) -> Html:
    """An entry of a legend: a piece of the series' line, where it has one, with its mark, and its name."""
    piece = element("path", d="M1 8L33 8", class_=f"line s{style.colour}", stroke_dasharray=style.dash)
    drawn = [*([piece] if lined else []), mark((17.0, 8.0), style)]
    swatch = element("svg", *drawn, viewBox="0 0 34 16", aria_hidden="true", focusable="false")
    return element("li", swatch, element("span", text))


def figure(
    name: str, title: str, description: str, height: float, drawn: list[Html], legend: list[Html], tables: list[Html]
) -> Html:
    """A chart: the drawing with its title and description, a legend, and its numbers behind a disclosure.

    Args:
        name: unique in the page.
    """
    drawing = element(
        "svg",
        element("title", title, id=f"{name}-title"),
        element("desc", description, id=f"{name}-desc"),
        *drawn,
        viewBox=f"0 0 {WIDTH} {height:g}",
        role="img",
        class_="chart",
        aria_labelledby=f"{name}-title {name}-desc",
    )
    keys = [element("ul", *legend, class_="legend", aria_label="Legend")] if legend else []
    numbers = element("details", element("summary", f"Numbers: {title}"), *tables)
    return element("figure", drawing, *keys, element("figcaption", description), numbers, id=name)
