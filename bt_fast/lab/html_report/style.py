"""How the page looks: two palettes whose contrast the tests compute, and the style sheet that uses them."""

from __future__ import annotations

SERIES = 8  # colours, and as many shapes

# "page" and "panel" are behind text and lines; "s0" to "s7" are lines, "gain" and "loss" bars
LIGHT = {
    "page": "#ffffff",
    "panel": "#f5f6f8",
    "text": "#1b1f24",
    "muted": "#4d5661",
    "rule": "#868e98",
    "grid": "#dfe3e8",
    "link": "#0b57b0",
    "marked": "#fff0c2",
    "gain": "#2c6e49",
    "loss": "#b3261e",
    "s0": "#5a6470",
    "s1": "#1a5fb4",
    "s2": "#b3261e",
    "s3": "#8f4700",
    "s4": "#7a3c9e",
    "s5": "#00695f",
    "s6": "#a32a6f",
    "s7": "#5c5c00",
}
DARK = {
    "page": "#14171c",
    "panel": "#1d2128",
    "text": "#e9ecf0",
    "muted": "#b2bac4",
    "rule": "#7d8793",
    "grid": "#343a44",
    "link": "#86b9ff",
    "marked": "#4a3d12",
    "gain": "#6fce98",
    "loss": "#ff8a80",
    "s0": "#aab4c0",
    "s1": "#78b4ff",
    "s2": "#ff8a80",
    "s3": "#ffb366",
    "s4": "#cf9fff",
    "s5": "#53d0c3",
    "s6": "#ff8fcb",
    "s7": "#d3d352",
}

_SHEET = """
*{box-sizing:border-box}
html{color-scheme:light dark}
body{margin:0;background:var(--page);color:var(--text);font:16px/1.5 system-ui,sans-serif}
main,header{max-width:74rem;margin:0 auto;padding:0 1rem}
h1{font-size:1.7rem;margin:1.2rem 0 .4rem}
h2{font-size:1.3rem;margin:2.4rem 0 .5rem;border-bottom:1px solid var(--rule)}
h3{font-size:1.05rem;margin:0 0 .5rem;overflow-wrap:anywhere}
p,li{max-width:46rem;overflow-wrap:anywhere}
a{color:var(--link)}
:focus-visible{outline:3px solid var(--link);outline-offset:2px}
.skip{position:absolute;left:-99rem}
.skip:focus{left:1rem;top:.5rem;background:var(--page);padding:.4rem .8rem;z-index:1}
nav ul{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;list-style:none;padding:0}
.note{color:var(--muted)}
.panels{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr))}
.panel{background:var(--panel);border:1px solid var(--grid);border-radius:6px;padding:.8rem;max-width:36rem;min-width:0}
figure{margin:0}
svg.chart{display:block;width:100%;height:auto;overflow:visible}
svg text{fill:var(--text);font:13px system-ui,sans-serif;paint-order:stroke;stroke:var(--panel);stroke-width:3px}
svg .faint{fill:var(--muted)}
.axis{stroke:var(--rule);fill:none}
.grid{stroke:var(--grid);fill:none}
.line{fill:none;stroke-width:2}
.mark{stroke-width:2}
.hollow{fill:var(--panel)}
.guide{stroke:var(--text);stroke-dasharray:5 3;fill:none}
.gain{fill:var(--gain);stroke:var(--gain)}
.loss{fill:var(--panel);stroke:var(--loss);stroke-width:2;stroke-dasharray:4 2}
.whole{fill:var(--s0);stroke:var(--s0)}
.limit{fill:var(--panel);stroke:var(--text);stroke-width:2}
.legend{display:flex;flex-wrap:wrap;gap:.1rem 1rem;list-style:none;padding:0;margin:.4rem 0;font-size:.88rem}
.legend li{display:flex;align-items:center;gap:.35rem}
.legend svg{flex:none;width:34px;height:16px}
figcaption{font-size:.88rem;color:var(--muted)}
details{margin:.5rem 0}
summary{cursor:pointer;color:var(--link)}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--muted);padding:.3rem 0}
th,td{text-align:left;white-space:nowrap;padding:.25rem .6rem;border-bottom:1px solid var(--grid)}
th{font-weight:600}
.number{text-align:right}
thead th{border-bottom:1px solid var(--rule);vertical-align:bottom}
tr.marked>*{background:var(--marked)}
@media (max-width:32rem){svg.chart text{font-size:16px}.panel{padding:.6rem .4rem}}
"""


def style_sheet() -> str:
    """The page's only style sheet."""
    series = "".join(f".s{i}{{stroke:var(--s{i})}}.f{i}{{fill:var(--s{i})}}" for i in range(SERIES))
    dark = f"@media (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}"
    return f":root{{{_variables(LIGHT)}}}{dark}{_SHEET}{series}"


def _variables(palette: dict[str, str]) -> str:
    return ";".join(f"--{name}:{colour}" for name, colour in palette.items())
