"""Tables and panels of the page, and the parts that its charts share: colours, marks, lines and legends."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DRAWN = 8  # most methods in a chart, or charts of a run: more are indistinguishable; tables have all
MARKERS = "os^Dv+xp"
_LIGHT = Path(__file__).with_name("style.css").read_text(encoding="utf-8").partition("@media")[0]
COLOURS: dict[str, str] = dict(re.findall(r"--(\w+):(#\w{6})", _LIGHT))  # by the names of the variables
_VARIABLES = {colour: name for name, colour in COLOURS.items()}
RC: Any = {  # of matplotlib; `Any`, since its types differ from version to version
    "axes.axisbelow": True,
    "axes.edgecolor": COLOURS["rule"],
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": COLOURS["muted"],
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "figure.dpi": 72,  # as in SVG, so that a pixel is a point
    "figure.facecolor": "none",
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 11,
    "grid.color": COLOURS["grid"],
    "legend.fontsize": 10,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "bt-fast",
    "text.color": COLOURS["text"],
    "text.parse_math": False,
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "ytick.left": False,
}
WIDTH = 5.6  # width of a chart, in inches
_LONGEST = 52  # most characters of a name in a chart

Style = dict[str, Any]  # arguments of `Axes.plot`
Columns = Mapping[str, Callable[[Any], str]]  # by name, the format of the values; that of numbers is not `str`


@dataclass(frozen=True)
class Table:
    """A table with row headings in the first column; rows with indices in `marked` are highlighted."""

    caption: str
    columns: Columns
    rows: Sequence[Sequence[Any]]
    marked: Collection[int] = ()


@dataclass(frozen=True)
class Panel:
    """A chart with its numbers, or a remark without a figure.

    Attributes:
        text: the chart's description, or the remark.
        name: the chart's unique name in the page. title: of the chart and its numbers.
    """

    text: str
    heading: str = ""
    name: str = ""
    title: str = ""
    figure: Figure | None = None
    tables: Sequence[Table] = ()

    def drawing(self) -> str:
        """The inside of the SVG element: ids begin with the panel's name, colours are variables of the style sheet."""
        assert self.figure is not None
        file = io.StringIO()
        self.figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        svg = file.getvalue()
        return re.sub("<[^>]*>", self._tag, svg[svg.index("<g ") : svg.rindex("</svg>")])

    def _tag(self, match: re.Match[str]) -> str:
        tag = match[0].replace("xlink:href", "href")
        tag = re.sub(r'( id="|href="#|url\(#)', rf"\1{self.name}-", tag)
        return re.sub("(?<=: )#[0-9a-f]{6}", lambda colour: f"var(--{_VARIABLES[colour[0]]})", tag)


def style_of(index: int) -> Style:
    """Returns the style of the series with this number; colour and marker together differ for the first 64."""
    return {"color": COLOURS[f"s{index % 8}"], "marker": MARKERS[(index + index // 8) % 8]}


def hollow(style: Style) -> Style:
    """Returns the style with hollow marks, and dashed if it has a solid line: for a second measure."""
    return {"linestyle": "--", **style, "markerfacecolor": COLOURS["panel"]}


def drawable(*values: float | None) -> bool:
    """Whether a chart can show the values: they are numbers, none of them too large for an axis."""
    return all(value is not None and abs(value) < 1e15 for value in values)


def chart(x_label: str, y_label: str = "", height: float = 3.6) -> tuple[Figure, Axes]:
    """Returns a figure with one chart, `height` inches high."""
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.subplots()
    axes.set(xlabel=x_label, ylabel=y_label)
    return figure, axes


def line(axes: Axes, x: Iterable[float], y: Iterable[float | None], style: Style, scale: float = 100) -> Artist:
    """Draws a line through the drawable points, with about ten marks, one of them on the last point."""
    points = [(a, scale * b) for a, b in zip(x, y, strict=True) if b is not None and drawable(a, b)]
    every = max(1, math.ceil(len(points) / 10))
    return marks(axes, points, {"linestyle": "-", **style, "markevery": ((len(points) - 1) % every, every)})


def marks(axes: Axes, points: Sequence[tuple[float, float]], style: Style) -> Artist:
    """Draws a mark on each point, without a line if the style has none."""
    x, y = zip(*points, strict=True) if points else ((), ())
    (drawn,) = axes.plot(x, y, **{"linestyle": "none", **style}, clip_on=False, in_layout=False)
    return drawn


def legend(figure: Figure, series: Sequence[tuple[Artist, str]]) -> None:
    """Names the series below the chart, and enlarges the figure accordingly."""
    columns = 2 if sum(sorted(len(name) for _, name in series)[-2:]) <= _LONGEST else 1
    figure.set_figheight(figure.get_figheight() + 0.21 * math.ceil(len(series) / columns))
    names = [f" {shortened(name)}" for _, name in series]  # matplotlib omits names that begin with "_"
    figure.legend([artist for artist, _ in series], names, loc="outside lower left", ncols=columns)


def shortened(name: str) -> str:
    """Shortens a name to fit into a chart."""
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"


def undrawn(methods: int) -> str:
    """Returns a sentence about the methods omitted from a chart, if there are too many."""
    rest = methods - DRAWN
    return f" The first {DRAWN} methods are drawn; the table has {rest} more." if rest > 0 else ""
