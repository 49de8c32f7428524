import collections
import copy
import dataclasses
import html.parser
import itertools
import json
import os
import re
import sys
from datetime import datetime, timezone
from pathlib import Path

import pytest
import test_training
from click.testing import CliRunner
from headless_browser import BROWSER, Browser

from bt_fast.lab import locks, report
from bt_fast.lab.cli import cli
from bt_fast.lab.html_report import drawing
from bt_fast.lab.html_report.charts import styles_of
from bt_fast.lab.html_report.loading import load_runs
from bt_fast.lab.html_report.numbers import duration, plain
from bt_fast.lab.html_report.page import page
from bt_fast.lab.html_report.waterfall import stages

CHARTS = 16  # of the page of `folders`
NOW = datetime(2026, 1, 2, 3, 4, tzinfo=timezone.utc)
CONFIG = {"loss": "trades", "data": "digits", "model": "small-cnn", "steps": 10, "epsilon": 0.2, "seed": 0}
MACHINE = {"torch": "2.13.0", "device": "cpu"}


def entry(clean=0.9, robust=0.7, seconds=40.0, theory=1.0, passes=39.0, **more):
    result = {"label": "a label", "clean": clean, "robust": robust, "attack": "PGD-20 x 1", "seconds": seconds}
    result |= {"iteration_seconds": seconds / 100, "theoretical_speedup": theory, "forward_passes": passes}
    return result | {"speedup": {}} | more


def bullet(speedup, **more):
    fractions = {"boundary": 0.3, "robust": 0.5, "outlier": 0.2}
    return entry(seconds=20.0, theory=2.1, passes=15.4, fractions=fractions, speedup={"reference": speedup}, **more)


def summary(**changes):
    methods = {
        "reference": entry(),
        "optimised": entry(0.91, 0.71, 32.0, 1.0, 30.0, speedup={"reference": 1.25}),
        "bullet": bullet(2.0),
    }
    return {"config": CONFIG, "machine": MACHINE, "methods": methods} | changes


def records():
    for epoch in (1, 2):
        at = {"iteration": 10 * epoch}
        accuracies = {"clean": 0.8 + epoch / 20, "robust": 0.5 + epoch / 20, "loss": 1 / epoch}
        for method, seconds in (("reference", 20.0), ("optimised", 16.0), ("bullet", 12.0)):
            of_epoch = {"kind": "epoch", "epoch": epoch, "method": method, "seconds": epoch * seconds}
            yield at | of_epoch | accuracies
        shares = {"outlier": 0.2, "boundary": 0.3, "robust": 0.5, "robust_fraction": 0.6}
        yield at | {"kind": "fractions", "method": "bullet"} | shares
        steps = {"svar": [-0.05, 0.0, 0.02, 0.08], "steps": [0, 10, 10, 2], "threshold": 0.05}
        yield at | {"kind": "allocation", "method": "bullet"} | steps
    yield of_groups(10, (0.25, 0.75, 0.0), (-0.02, 0.01, None), None)
    yield of_groups(20, (0.25, 0.25, 0.5), (-0.03, 0.02, 0.08), 0.875)


def of_groups(iteration, shares, svar, chance):
    names = ("outlier", "boundary", "robust")
    values = {"shares": dict(zip(names, shares, strict=True)), "svar": dict(zip(names, svar, strict=True))}
    return {"iteration": iteration, "kind": "groups", "boundary_below_robust": chance} | values


def of_corruptions(method, fog=(0.1, 0.2, 0.3, 0.4, 0.5), others=(0.0, 0.0, 0.1, 0.1, 0.3)):
    names = ("motion_blur", "zoom_blur", "snow", "frost", "contrast")
    errors = {"fog": list(fog)} | {name: list(others) for name in names}
    return {"iteration": 20, "kind": "corruptions", "method": method, "robust": 0.8, "errors": errors}


def write_run(folder, content=None, lines=None):
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary() if content is None else content))
    text = "".join(json.dumps(record) + "\n" for record in (records() if lines is None else lines))
    (folder / "metrics.jsonl").write_text(text)
    return folder


def invoke(*arguments):
    return CliRunner().invoke(cli, ["report", *map(str, arguments)])


def error_of(*arguments):
    """Returns the error of a command that failed because of a user's mistake: one line, exit code 2."""
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    line = result.stderr.strip()
    assert "\n" not in line
    assert line.startswith("bt-fast: ")
    return line


def page_of(*folders):
    return page(load_runs(folders), NOW)


# The elements of a page

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Reader(html.parser.HTMLParser):
    """Parses a page into a list of elements, each with its name, attributes, ancestors and text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {[e.name for e in self._open]}"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: {tag} {attrs}"
        result = Element(tag, dict(attrs), tuple(self._open), [])
        self.elements.append(result)
        if tag not in VOID:
            self._open.append(result)

    def handle_endtag(self, tag):
        assert self._open, f"closed, but not open: {tag}"
        assert self._open.pop().name == tag

    def handle_data(self, data):
        for result in self._open:
            result.texts.append(data)

    def all(self, *names):
        return [e for e in self.elements if e.name in names]

    def with_id(self, name):
        (result,) = (e for e in self.elements if e.attributes.get("id") == name)
        return result


@dataclasses.dataclass(eq=False)
class Element:
    name: str
    attributes: dict
    ancestors: tuple
    texts: list

    @property
    def text(self):
        return "".join(self.texts)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("reported")
    other = summary(config=CONFIG | {"seed": 1, "epsilon": 0.1})
    other["methods"]["bullet-fast"] = bullet(1.8)  # slower than bullet: time added
    lines = [*records(), of_corruptions("optimised"), of_corruptions("bullet", fog=[0.2] * 5)]
    return [write_run(root / "one"), write_run(root / "two", other, lines)]


@pytest.fixture(scope="module")
def text(folders):
    return page_of(*folders)


@pytest.fixture(scope="module")
def reader(text):
    return Reader(text)


def test_ids_are_unique_and_references_lead_somewhere(reader):
    ids = [e.attributes["id"] for e in reader.elements if "id" in e.attributes]
    assert [name for name, n in collections.Counter(ids).items() if n > 1] == []
    for result in reader.elements:
        for name in result.attributes.get("aria-labelledby", "").split():
            assert name in ids
        if result.name in ("a", "use"):
            assert result.attributes["href"].removeprefix("#") in ids
        if "clip-path" in result.attributes:
            assert result.attributes["clip-path"].removeprefix("url(#").removesuffix(")") in ids


def test_every_chart_has_a_title_a_description_and_its_numbers(reader):
    charts = [svg for svg in reader.all("svg") if svg.attributes.get("role") == "img"]
    # of two runs: accuracy, trade-off, waterfall, fractions, SVar, and groups and their SVar; of one: corruptions
    assert len(charts) == CHARTS == 7 * 2 + 2
    for chart in charts:
        title, description = map(reader.with_id, chart.attributes["aria-labelledby"].split())
        assert (title.name, description.name) == ("title", "desc")
        assert title.text
        assert description.text
        figure = next(e for e in reversed(chart.ancestors) if e.name == "figure")
        numbers = [t for t in reader.all("table") if figure in t.ancestors]
        assert numbers
        for each in numbers:
            assert any(e.name == "details" for e in each.ancestors)
    titles = [reader.with_id(chart.attributes["aria-labelledby"].split()[0]).text for chart in charts]
    assert len(set(titles)) == len(titles)


def test_every_svg_is_a_chart(reader):
    assert {svg.attributes.get("role") for svg in reader.all("svg")} == {"img"}


def test_headings_are_in_order(reader):
    levels = [int(e.name[1]) for e in reader.all("h1", "h2", "h3", "h4", "h5", "h6")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_tables_have_captions_and_headers_and_scroll_with_the_keyboard(reader):
    assert reader.all("table")
    for result in reader.all("table"):
        inside = [e for e in reader.elements if result in e.ancestors]
        assert [e.text for e in inside if e.name == "caption"] != [""]
        assert {"col", "row"} == {e.attributes["scope"] for e in inside if e.name == "th"}
        assert result.ancestors[-1].attributes["tabindex"] == "0"
        assert result.ancestors[-1].attributes["aria-label"]
        rows = [[e for e in inside if e.ancestors[-1] is row] for row in inside if row.name == "tr"]
        assert len({len(row) for row in rows}) == 1


def test_a_page_names_its_language_and_can_be_skipped_through(reader):
    assert reader.all("html")[0].attributes["lang"] == "en"
    assert reader.all("a")[0].attributes["href"] == f"#{reader.all('main')[0].attributes['id']}"


def test_a_page_takes_nothing_from_elsewhere_and_runs_nothing(text, reader):
    assert "http:" not in text
    assert "https:" not in text
    assert text.count("url(") == text.count("url(#")  # within the page itself
    assert "@import" not in text
    assert not reader.all("script", "link", "img", "iframe", "object", "embed", "form", "base")
    for result in reader.elements:
        assert not [name for name in result.attributes if name.startswith("on") or name == "src"]
        assert "url" not in result.attributes.get("style", "")
        assert "style" not in result.attributes or any(e.name == "svg" for e in result.ancestors)
    (policy,) = (e for e in reader.all("meta") if "http-equiv" in e.attributes)
    assert policy.attributes["content"].startswith("default-src 'none'")


# Colours


def luminance(colour):
    """Relative luminance of `#rrggbb` by WCAG 2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, other):
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_that_of_wcag():
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)


STYLE_SHEET = Path(drawing.__file__).with_name("style.css").read_text()
LIGHT, DARK = (
    dict(re.findall(r"--(\w+):(#\w{6})\b", rule)) for rule in re.findall(r":root{(.*?)}", STYLE_SHEET, re.DOTALL)
)


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_text_and_lines_stand_out_from_what_is_behind_them(palette):
    for behind in ("page", "panel"):
        for name in ("text", "muted", "link"):
            assert contrast(palette[name], palette[behind]) >= 4.5, (name, behind)
        for name in ("rule", "gain", "loss", *(f"s{i}" for i in range(8))):
            assert contrast(palette[name], palette[behind]) >= 3.0, (name, behind)
    assert contrast(palette["text"], palette["marked"]) >= 4.5


def test_both_palettes_have_a_colour_for_everything_that_the_page_uses(text):
    assert set(re.findall(r"var\(--(\w+)\)", text)) <= set(LIGHT) == set(DARK)
    assert not re.findall(r"(?:fill|stroke): #\w+", text)  # such a colour would be the same in both palettes


def test_series_differ_in_shape_as_well_as_in_colour():
    styles = [tuple(drawing.style_of(i).values()) for i in range(64)]
    assert len(set(styles)) == 64
    assert len({drawing.style_of(i)["marker"] for i in range(8)}) == 8


def test_a_method_looks_the_same_in_every_run(folders):
    styles = styles_of(load_runs(folders[::-1]))
    assert list(styles) == ["reference", "optimised", "bullet", "bullet-fast"]


# Its content


def cells(reader, caption):
    """Returns the rows of the table with this caption."""
    (result,) = (t for t in reader.all("table") if t.texts and t.text.startswith(caption))
    rows = [e for e in reader.all("tr") if result in e.ancestors]
    return [[e.text for e in reader.all("th", "td") if e.ancestors[-1] is row] for row in rows]


def test_the_first_table_has_every_method_of_every_run(reader):
    header, *rows = cells(reader, "All methods")
    assert [row[0] for row in rows] == ["A1", "A2", "A3", "B1", "B2", "B3", "B4"]
    third = dict(zip(header, rows[2], strict=True))
    assert (third["clean"], third["robust"], third["against"]) == ("90.0 %", "70.0 %", "PGD-20 x 1")
    assert third["F_B / F_R / F_O"] == "0.30 / 0.50 / 0.20"
    assert (third["theory"], third["passes"], third["clock"]) == ("2.10×", "15.4 F", "2.00×")
    assert (third["iteration"], third["time"]) == ("200 ms", "20.0 s")


def test_differences_of_configuration_are_reported_in_words(reader):
    _, *rows = cells(reader, "Configuration")
    reported = {row[0]: row[1:] for row in rows}
    assert reported["epsilon"] == ["0.2", "0.1", "differ"]
    assert reported["steps"] == ["10", "10", "agree"]


def test_an_older_summary_is_read_and_what_it_lacks_is_named(tmp_path):
    old = summary()
    for method in old["methods"].values():
        for key in ("label", "theoretical_speedup", "iteration_seconds", "attack"):
            del method[key]
    reader = Reader(page_of(write_run(tmp_path / "old", old)))
    _, *rows = cells(reader, "All methods")
    assert [row[2] for row in rows] == ["TRADES, authors'", "TRADES, ours", "+ BulletTrain"]
    assert [row[7] for row in rows] == ["1.00×", "1.00×", "–"]
    missing = dict(cells(reader, "Not in the summaries")[1:])
    assert missing["theoretical_speedup"] == "A3"
    assert missing["iteration_seconds"] == missing["attack"] == "A1, A2, A3"


def test_results_of_this_repository_can_be_reported():
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    runs = load_runs([results / "compare-digits", results / "mnist-10000"])
    reader = Reader(page(runs, NOW))
    assert len(cells(reader, "All methods")) == 1 + 4 + 3 * 3
    assert [len(stages(run.results)) for run in runs] == [4, 3, 3, 3]
    figures = [e.attributes["id"] for e in reader.all("figure")]
    of_bullet = [f"fractions-{method}" for method in ("A3", "A4", "B3", "C3", "D3")]
    assert [name for name in figures if name.startswith("fractions")] == of_bullet


def test_older_fractions_that_name_no_method_are_of_bullettrain(tmp_path):
    lines = [{k: v for k, v in r.items() if k != "method"} for r in records() if r["kind"] == "fractions"]
    reader = Reader(page_of(write_run(tmp_path / "run", lines=lines)))
    assert reader.with_id("fractions-A3")
    assert "Shares of the groups in training, A3" in [t.text for t in reader.all("title")][-1]


def test_energy_that_nobody_measured_is_no_zero_and_says_why(text, tmp_path):
    assert "Not measured of A1, A2, A3, B1, B2, B3, B4: the summary has no joules, and does not say why." in text
    measured = summary()
    measured["methods"]["bullet"]["joules"] = 3000.0
    measured["methods"]["optimised"] |= {"joules": None, "joules_reason": "the GPU was lost"}
    lines = [r | ({"joules": 100.0 * r["epoch"]} if r["kind"] == "epoch" else {}) for r in records()]
    text = page_of(write_run(tmp_path / "run", measured, lines))
    assert cells(Reader(text), "Energy")[1] == ["A3", "a label", "3000 J", "1500 J", "150 W"]
    assert "Not measured of A2: the GPU was lost." in text
    assert cells(Reader(text), "Accuracy against")[1:3] == [
        ["a label", "1", "85.0 %", "55.0 %", "20.0 s", "100 J"],
        ["a label", "2", "90.0 %", "60.0 %", "40.0 s", "200 J"],
    ]


def test_the_groups_that_a_study_records_are_drawn_and_described(folders):
    reader = Reader(page_of(folders[0]))
    assert cells(reader, "Shares of the groups as an attack") == [
        ["iteration", "boundary", "robust", "outlier"],
        ["10", "75.0 %", "0.0 %", "25.0 %"],
        ["20", "25.0 %", "50.0 %", "25.0 %"],
    ]
    assert cells(reader, "Mean signed prediction variance of the groups")[1:] == [
        ["10", "0.0100", "–", "−0.0200", "–"],
        ["20", "0.0200", "0.0800", "−0.0300", "87.5 %"],
    ]
    assert "boundary 50.0 %, robust 25.0 %, outlier 25.0 %" in reader.with_id("groups-A-desc").text
    assert "87.5 % in mean over 1 minibatches with both" in reader.with_id("groups-svar-A-desc").text


def test_errors_under_corruptions_are_drawn_and_described(reader):
    header, *rows = cells(reader, "Error by corruption, run B")
    assert header == ["corruption", "method", *(f"severity {n}" for n in (1, 2, 3, 4, 5)), "mean"]
    assert rows[0] == ["fog", "a label", "10.0 %", "20.0 %", "30.0 %", "40.0 %", "50.0 %", "30.0 %"]
    assert [row[0] for row in rows[:3]] == ["fog", "fog", "motion blur"]
    assert len(rows) == 2 * 6
    by_severity = cells(reader, "Error by severity, run B")[2][1:]
    assert by_severity == ["3.3 %", "3.3 %", "11.7 %", "11.7 %", "28.3 %", "11.7 %"]
    assert "under fog, 30.0 %" in reader.with_id("corruptions-B-desc").text
    assert "1.7 % to 33.3 %" in reader.with_id("severities-B-desc").text


def test_what_studies_alone_record_has_no_section_in_another_run(tmp_path):
    lines = [r for r in records() if r["kind"] != "groups"]
    text = page_of(write_run(tmp_path / "run", lines=lines))
    assert "section-groups" not in text
    assert "section-corruptions" not in text


def test_errors_of_0_are_drawn(tmp_path):
    lines = [*records(), of_corruptions("bullet", [0.0] * 5, [0.0] * 5)]
    assert Reader(page_of(write_run(tmp_path / "run", lines=lines))).with_id("severities-A")


def test_seeds_are_averaged_where_nothing_else_differs(text, tmp_path):
    assert "Means over the seeds" not in text
    second = summary(config=CONFIG | {"seed": 1})
    second["methods"]["bullet"]["clean"] = 0.92
    text = page_of(write_run(tmp_path / "a"), write_run(tmp_path / "b", second))
    assert cells(Reader(text), "Means over the seeds (runs A, B)")[3][1] == "91.0 % (90.0 % to 92.0 %)"


def test_without_any_records_the_page_says_so(tmp_path):
    text = page_of(write_run(tmp_path / "run", lines=[]))
    Reader(text)
    for messages in ("no accuracy of any epoch", "No method of these runs recorded fractions", "Not recorded"):
        assert messages in text


def test_a_loss_that_is_not_a_number_breaks_nothing(tmp_path):
    broken = summary()
    broken["methods"]["optimised"] |= {"clean": float("nan"), "seconds": float("inf")}
    lines = [r | {"clean": float("nan")} if r["kind"] == "epoch" else r for r in records()]
    text = page_of(write_run(tmp_path / "run", broken, lines))
    assert "not a number" in text
    for result in Reader(text).elements:
        assert not [
            v for k, v in result.attributes.items() if k in ("d", "x", "y", "viewbox", "transform") and "nan" in str(v)
        ]


@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_accuracies_at_either_end_are_drawn(tmp_path, accuracy):
    lines = [r | {"clean": accuracy, "robust": accuracy} if r["kind"] == "epoch" else r for r in records()]
    methods = {"reference": entry(accuracy, accuracy), "bullet": bullet(2.0, clean=accuracy, robust=accuracy)}
    reader = Reader(page_of(write_run(tmp_path / "run", summary(methods=methods), lines)))
    for name in ("accuracy-A", "trade-off-A"):
        inside = [e for e in reader.elements if reader.with_id(name) in e.ancestors]
        (chart,) = (e for e in inside if e.name == "svg")
        height = float(chart.attributes["viewbox"].split()[-1])
        heights = [float(e.attributes["y"]) for e in inside if e.name == "use"]
        assert heights
        assert all(0 <= y <= height for y in heights)


def test_of_a_long_run_some_fractions_are_shown_and_the_last(tmp_path):
    lines = [r | {"iteration": 10 * n} for n in range(1, 1001) for r in records() if r["kind"] == "fractions"]
    reader = Reader(page_of(write_run(tmp_path / "run", lines=lines[::2])))
    rows = cells(reader, "Shares of the groups")[1:]
    assert len(rows) == 250
    assert rows[-1][0] == "10000"
    assert "250 of 1000 records are shown." in reader.with_id("fractions-A3-desc").text


def test_a_run_of_augmix_shows_its_accuracy_under_corruptions(tmp_path):
    methods = {"optimised": entry(robust=None), "bullet": bullet(1.5, robust=None)}
    run = summary(config=CONFIG | {"loss": "augmix"}, methods=methods)
    assert "No method has a robust accuracy" in page_of(write_run(tmp_path / "plain", run))
    lines = [{"iteration": 9, "kind": "corruptions", "method": m, "robust": 0.6, "errors": {}} for m in methods]
    _, first, _ = cells(Reader(page_of(write_run(tmp_path / "corrupted", run, lines))), "All methods")
    assert first[4:6] == ["60.0 %", "corruptions"]


def test_many_methods_are_all_in_the_tables_and_the_rest_of_the_charts_is_named(tmp_path):
    names = [f"bullet,gamma=0.{n}" for n in range(10, 30)]
    lines = [r | {"method": n} for n in names for r in records() if r.get("method") == "bullet"]
    text = page_of(write_run(tmp_path / "run", summary(methods={n: bullet(1.0) for n in names}), lines))
    reader = Reader(text)
    assert len(cells(reader, "All methods")) == 21
    assert len(cells(reader, "Accuracy against")) == 41
    assert "the table has 12 more" in text
    assert "not drawn: A9, A10" in text


# The waterfall from the reference to ours


def test_each_optimisation_is_a_stage_with_its_time_and_its_limits(folders):
    result = stages(load_runs(folders)[1].results)
    assert [s.step for s in result] == ["", "our code", "BulletTrain", "fast engine"]
    assert [s.time for s in result] == pytest.approx([1.0, 0.8, 0.5, 1 / 1.8])
    assert [s.equation_7 for s in result] == pytest.approx([1.0, 1.0, 1 / 2.1, 1 / 2.1])
    assert [s.forward_passes for s in result] == pytest.approx([1.0, 30 / 39, 15.4 / 39, 15.4 / 39])


def test_time_added_is_drawn_in_another_way_than_time_saved(reader):
    figure = reader.with_id("waterfall-B")
    styles = [e.attributes["style"] for e in reader.all("path") if figure in e.ancestors and "style" in e.attributes]
    assert LIGHT["loss"] == LIGHT["s2"]
    kinds = {"fill: var(--s0)": "whole", "fill: var(--gain)": "saved", "stroke: var(--s2)": "added"}
    bars = [(kinds[key], "dasharray" in style) for style in styles for key in kinds if key in style]
    saved, whole = ("saved", False), ("whole", False)
    assert bars[:5] == [whole, saved, saved, ("added", True), whole]


def results_of(tmp_path, **methods):
    return load_runs([write_run(tmp_path / "run", summary(methods=methods), [])])[0].results


def test_optimisations_that_a_run_does_not_tell_apart_share_a_stage(tmp_path):
    methods = {"reference": entry(), "bullet-bf16": bullet(3.0)}
    _, last = stages(results_of(tmp_path, **methods))
    assert last.step == "our code + BulletTrain + fast engine + 16 bits"


def test_a_method_with_options_of_its_own_is_no_stage(tmp_path):
    methods = {"reference": entry(), "bullet,gamma=0.5": bullet(3.0)}
    assert stages(results_of(tmp_path, **methods)) == []
    assert "No steps to draw" in page_of(tmp_path / "run")


def test_without_bullettrain_the_views_of_ours_are_the_stages(tmp_path):
    faster = {"optimised-fast": entry(speedup={"reference": 1.5}), "optimised": entry(speedup={"reference": 1.2})}
    assert [s.step for s in stages(results_of(tmp_path, reference=entry(), **faster))][1:] == [
        "our code",
        "fast engine",
    ]


def test_a_limit_that_the_summary_does_not_tell_is_not_drawn(tmp_path):
    methods = {"reference": entry(), "bullet": bullet(2.0)}
    del methods["bullet"]["theoretical_speedup"], methods["reference"]["forward_passes"]
    last = stages(results_of(tmp_path, **methods))[-1]
    assert (last.equation_7, last.forward_passes) == (None, None)


# Scales and numbers


def words(reader, name):
    """Returns the texts in a chart."""
    (chart,) = (e for e in reader.all("svg") if reader.with_id(name) in e.ancestors)
    return [e.text for e in reader.all("text") if chart in e.ancestors]


def test_ticks_are_round_and_within_the_scale(reader):
    of_accuracy = words(reader, "accuracy-A")
    assert of_accuracy[of_accuracy.index("accuracy (%)") - 6 :][:6] == ["50", "60", "70", "80", "90", "100"]
    of_fractions = words(reader, "fractions-A3")
    assert of_fractions[of_fractions.index("share (%)") - 6 :][:6] == ["0", "20", "40", "60", "80", "100"]


def test_charts_name_their_axes_series_and_points(reader):
    assert words(reader, "trade-off-A")[-6:] == ["A1", "A2", "A3", " a label", " a label", " a label"]
    first, second, third = (row[0] for row in cells(reader, "All methods")[1:4])
    assert (first, second, third) == ("A1", "A2", "A3")
    of_fractions = words(reader, "fractions-A3")
    assert "iteration" in of_fractions
    assert of_fractions[-4:] == [" boundary", " robust", " outlier", " F_R, moving robust accuracy"]
    rows = [text for text in words(reader, "waterfall-B") if text.startswith("+ ") or text == "In all"]
    assert rows == ["+ our code", "+ BulletTrain", "+ fast engine", "In all"]
    assert "+5.6 points of the first; 200 ms an iteration" in words(reader, "waterfall-B")


def test_the_same_runs_make_the_same_page(folders, text):
    assert page_of(*folders) == text


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.0123, "12.3 ms"), (45.63, "45.6 s"), (1234.5, "1234 s"), (0, "0 ms"), (None, "–")]
)
def test_durations_have_three_digits(seconds, said):
    assert duration(seconds) == said


def test_numbers_that_are_none_are_reported_to_be():
    assert plain(float("nan")) == "not a number"
    assert plain(-0.00123) == "−0.00123"


# Text from files is text


def test_a_folder_and_names_made_of_markup_are_harmless(tmp_path):
    evil = "<script>alert(1)</script>"
    hostile = summary(config=CONFIG | {"data": f'"{evil}', evil: evil}, machine={"torch": f"'{evil}", evil: [evil]})
    hostile["methods"]["bullet"]["label"] = f"</title>{evil}"
    hostile["methods"][f'" onload="{evil}'] = entry(attack=f"<!--{evil}")
    folder = write_run(tmp_path / "<script>" / "<img src=x onerror=alert(1)>", hostile)
    text = page_of(folder)
    assert "<script" not in text
    reader = Reader(text)
    assert not reader.all("script", "img")
    assert not [k for e in reader.elements for k in e.attributes if k.startswith("on")]
    assert evil in "".join(e.text for e in reader.all("h3", "td"))


def test_names_that_are_no_unicode_can_be_written(tmp_path):
    try:
        folder = write_run(tmp_path / os.fsdecode(b"run\xff\x01"))
    except OSError as error:
        pytest.skip(f"this file system takes no such name ({error})")
    assert invoke(folder, "--out", tmp_path / "out.html").exit_code == 0
    assert "run?\ufffd" in (tmp_path / "out.html").read_text(encoding="utf-8")


def test_text_is_escaped_once_and_shown_as_it_is(tmp_path):
    foreign = '_a<b&\'" id="c fill: #1a5fb4 $x_2$ \\frac'
    content = summary()
    content["methods"]["bullet"]["label"] = foreign
    reader = Reader(page_of(write_run(tmp_path / "run", content)))
    assert cells(reader, "All methods")[3][2] == foreign
    assert reader.with_id("fractions-A3-title").text == f"Shares of the groups in training, A3, {foreign}"
    assert f" {foreign}" in words(reader, "accuracy-A")
    captions = [e.attributes["aria-label"] for e in reader.all("div") if "aria-label" in e.attributes]
    assert f"Over training, A3, {foreign}" in captions


def test_labels_that_are_no_unicode_are_drawn(tmp_path):
    content = summary()
    content["methods"]["bullet"]["label"] = "\ud800\x01"
    assert " ?\ufffd" in words(Reader(page_of(write_run(tmp_path / "run", content))), "accuracy-A")


# The command


def test_the_command_writes_the_page_and_says_where(folders, tmp_path):
    out = tmp_path / "page.html"
    result = invoke(*folders, "--out", out)
    assert result.exit_code == 0, result.output
    assert str(out) in result.output
    assert "Of 2 runs" in Reader(out.read_text(encoding="utf-8")).all("header")[0].text
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_a_folder_of_runs_is_all_of_them(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / "study" / f"seed{seed}")
    (tmp_path / "study" / "corrupted").mkdir()
    assert [run.title[-5:] for run in load_runs([tmp_path / "study"])] == ["seed0", "seed1"]


def test_a_run_of_this_version_is_reported_whole(tmp_path):
    methods = ("reference", "optimised", "bullet", "bullet-fast")
    config = dataclasses.replace(test_training.CONFIG, methods=methods, epochs=1, batch_size=4, decay_epochs=())
    run = test_training.run_to_the_end(tmp_path / "run", config)
    report.summarise(run, lambda _: None)
    (loaded,) = load_runs([tmp_path / "run"])
    assert [result.missing for result in loaded.results] == [()] * 4
    assert len(stages(loaded.results)) == 4
    reader = Reader(page([loaded], NOW))
    names = [e.attributes["id"] for e in reader.all("figure")]
    drawn = [f"{chart}-A{n}" for chart in ("fractions", "svar") for n in (3, 4)]
    assert names == ["accuracy-A", "trade-off-A", "waterfall-A", *drawn]


def test_a_folder_that_is_no_run_is_named(folders, tmp_path):
    out = tmp_path / "out.html"
    assert f"{tmp_path}: no run folder" in error_of(tmp_path, "--out", out)
    assert "no such folder" in error_of(tmp_path / "none", "--out", out)
    assert "a file, expected a run" in error_of(folders[0] / "summary.json", "--out", out)
    assert "given twice" in error_of(folders[0], folders[0].parent, "--out", out)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "checkpoint.pt").touch()
    assert "begun: a run without a summary.json, so not finished" in error_of(tmp_path, "--out", out)
    assert not out.exists()


@pytest.mark.parametrize("cut", [0, 1, 50, -1])
def test_a_summary_that_was_cut_off_is_named(tmp_path, cut):
    folder = write_run(tmp_path / "run")
    path = folder / "summary.json"
    path.write_text(path.read_text()[:cut])
    assert "summary.json: cut off, or not a summary" in error_of(folder, "--out", tmp_path / "out.html")


def change(where, value):
    """Returns a summary with one entry replaced."""
    result = copy.deepcopy(summary())
    *path, last = where
    inner = result
    for key in path:
        inner = inner[key]
    inner[last] = value
    return result


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "config must be an object, got None"),
        (change(["methods"], {}), "methods is empty"),
        (change(["methods"], [1]), "methods must be an object, got [1]"),
        (change(["methods", "bullet"], 3), "method bullet: expected an object, got 3"),
        (change(["methods", "bullet", "clean"], "high"), "method bullet: clean must be a number, got 'high'"),
        (change(["methods", "bullet", "clean"], True), "clean must be a number, got True"),
        (change(["methods", "bullet", "speedup"], 2), "speedup must be an object, got 2"),
        (change(["methods", "bullet", "fractions"], {"boundary": 1}), "method bullet, fractions: no outlier"),
    ],
)
def test_what_is_wrong_with_a_summary_is_reported(tmp_path, content, said):
    assert said in error_of(write_run(tmp_path / "run", content), "--out", tmp_path / "out.html")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("no record", "line 2: not a record (Expecting value"),
        ("5", "line 2: not a record: expected an object with a kind, got '5'"),
        ('{"iteration": 1}', "expected an object with a kind"),
        ('{"kind": "epoch"}', "line 2: no iteration"),
        (
            '{"kind": "epoch", "iteration": 1, "epoch": 1, "clean": "x", "seconds": 1}',
            "clean must be a number, got 'x'",
        ),
        ('{"kind": "epoch", "iteration": 1, "epoch": 1, "clean": 1, "seconds": 1}', "line 2: no method"),
        ('{"kind": "x", "iteration": 1, "method": 5}', "method must be a name, got 5"),
        (
            '{"kind": "allocation", "iteration": 1, "threshold": 0, "svar": [1], "steps": []}',
            "svar and steps must be lists of the same length",
        ),
        (
            '{"kind": "allocation", "iteration": 1, "threshold": 0, "svar": [NaN], "steps": [1]}',
            "svar must hold numbers in -1..1, got nan",
        ),
        ('{"kind": "groups", "iteration": 1, "svar": {}}', "shares must be an object, got None"),
        ('{"kind": "groups", "iteration": 1, "shares": {"outlier": 1}}', "line 2, shares: no boundary"),
        (json.dumps(of_groups(1, (0, 1, 0), ("x", 0, 0), None)), "svar: outlier must be a number, got 'x'"),
        (json.dumps(of_groups(1, (0, 1, 0), (0, 0, 0), [])), "boundary_below_robust must be a number, got []"),
        ('{"kind": "corruptions", "iteration": 1, "robust": 1, "errors": 1}', "errors must be an object, got 1"),
        (json.dumps(of_corruptions("a", fog=[0.5])), "errors of fog must be 5 numbers, got [0.5]"),
        (json.dumps(of_corruptions("a", fog=[0, 0, 0, 0, 2])), "errors of fog must be in 0..1, got 2"),
        (json.dumps(of_corruptions("a", fog=[0, 0, 0, 0, None])), "errors: fog must be a number, got None"),
        ('{"kind": "x", "iteration": Infinity}', "iteration must be finite, got inf"),
        (f'{{"kind": "x", "iteration": 1{400 * "0"}}}', "iteration must be a number, got one of 401 digits"),
    ],
)
def test_a_foreign_line_among_the_metrics_is_named(tmp_path, line, said):
    folder = write_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_text(f"{json.dumps(next(records()))}\n{line}\n")
    error = error_of(folder, "--out", tmp_path / "out.html")
    assert "metrics.jsonl, line 2" in error
    assert said in error


def test_a_last_record_cut_off_while_it_was_written_is_left_out(tmp_path):
    folder = write_run(tmp_path / "run")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 30, "ki')
    assert len(load_runs([folder])[0].records) == len(list(records()))


def test_a_page_that_cannot_be_written_is_reported_before_anything_else(folders, tmp_path):
    assert "there is no folder" in error_of(folders[0], "--out", tmp_path / "none" / "out.html")
    assert "it is a folder" in error_of(folders[0], "--out", tmp_path, "--tensorboard", tmp_path / "events")
    assert not list(tmp_path.iterdir())


# TensorBoard


def test_without_tensorboard_the_error_says_what_to_install(folders, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    out = tmp_path / "out.html"
    error = error_of(folders[0], "--out", out, "--tensorboard", tmp_path / "events")
    assert "pip install 'bt-fast[tensorboard]'" in error
    assert not out.exists()


def test_scalars_are_those_of_the_records(tmp_path):
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    lines = [r | {"joules": 50.0 * r["epoch"]} if r["kind"] == "epoch" else r for r in records()]
    run = write_run(tmp_path / "run", lines=lines)
    arguments = (run, "--out", tmp_path / "out.html", "--tensorboard", tmp_path / "events")
    assert invoke(*arguments).exit_code == 0
    names = sorted(p.name for p in (tmp_path / "events").iterdir())
    assert names == ["A1-reference", "A2-optimised", "A3-bullet"]
    events = module.EventAccumulator(str(tmp_path / "events" / "A3-bullet")).Reload()
    tags = {"accuracy/clean", "accuracy/robust", "loss", "joules"}
    tags |= {f"fractions/{key}" for key in ("boundary", "robust", "outlier", "robust_fraction")}
    assert set(events.Tags()["scalars"]) == tags
    first, second = events.Scalars("accuracy/robust")
    assert (first.step, second.step) == (10, 20)
    assert (first.value, second.value) == pytest.approx((0.55, 0.6))
    assert [e.value for e in events.Scalars("joules")] == [50.0, 100.0]
    assert second.wall_time - first.wall_time == pytest.approx(12.0, abs=1e-3)  # seconds of training
    assert "not an empty folder" in error_of(*arguments)


def test_two_processes_do_not_write_their_scalars_into_one_folder(folders, tmp_path):
    pytest.importorskip("tensorboard")
    events = tmp_path / "events"
    events.mkdir()
    descriptor = locks.take(events / locks.NAME)  # as if held by another process
    error = error_of(folders[0], "--out", tmp_path / "out.html", "--tensorboard", events)
    os.close(descriptor)
    assert "writes there" in error
    assert [path.name for path in tmp_path.rglob("*") if path != events] == [locks.NAME]


# In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if BROWSER is None:
        pytest.skip("needs chromium (apt-get install chromium)")
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def written(text, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_all_charts_without_errors_requests_or_overflow(browser, written, width, scheme):
    browser.open(written, width, scheme=scheme)
    size = browser.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert size[0] <= size[1] <= width
    boxes = browser.evaluate(
        "[...document.querySelectorAll('svg.chart')].map(e => e.getBoundingClientRect())"
        ".map(b => [b.width, b.height, b.left, b.right])"
    )
    assert len(boxes) == CHARTS
    for wide, high, left, right in boxes:
        assert wide >= 300
        assert high >= 150
        assert 0 <= left < right <= width
    behind = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert behind == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 28)")
    reported = [e for e in browser.events if e["method"] in ("Log.entryAdded", "Runtime.consoleAPICalled")]
    reported += [e for e in browser.events if e["method"] == "Runtime.exceptionThrown"]
    assert reported == []
    requested = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert requested == [written.resolve().as_uri()]


def test_words_in_charts_stay_inside_them(browser, written):
    browser.open(written, 1280)
    outside = browser.evaluate(
        "[...document.querySelectorAll('svg.chart text')].filter(t => {"
        "const a = t.getBoundingClientRect(), b = t.closest('.panel').getBoundingClientRect();"
        "return a.left < b.left || a.right > b.right || a.bottom > b.bottom}).map(t => t.textContent)"
    )
    assert outside == []


def test_the_keyboard_reaches_the_skip_link_the_tables_and_the_numbers(browser, written):
    browser.open(written, 1280)
    here = "(e => [e.tagName, e.textContent.slice(0, 20), getComputedStyle(e).outlineStyle])(document.activeElement)"
    seen = []
    while not seen or seen[-1][0] != "BODY":  # where the page ends
        browser.press("Tab", 9)
        seen.append(browser.evaluate(here))
    del seen[-1]
    assert seen[0][:2] == ["A", "Skip to the results"]
    assert [e for e in seen if e[2] != "solid"] == []  # the focus is visible
    names = {name for name, *_ in seen}
    assert names == {"A", "DIV", "SUMMARY"}
    assert [name for name, *_ in seen].count("SUMMARY") == CHARTS
    browser.evaluate("document.querySelector('summary').focus()")
    browser.press("Enter", 13, "\r")
    assert browser.evaluate("document.querySelector('details').open")


def test_a_screen_reader_gets_what_each_chart_shows(browser, written):
    browser.open(written, 1280)
    nodes = browser.send("Accessibility.getFullAXTree")["nodes"]
    images = [n for n in nodes if n.get("role", {}).get("value") in ("image", "img") and not n.get("ignored")]
    names = [n["name"]["value"] for n in images]
    assert len(names) == CHARTS
    assert all("run" in name or "A3" in name or "B3" in name for name in names)
    headings = [n for n in nodes if n.get("role", {}).get("value") == "heading"]
    assert len(headings) == 1 + 11 + CHARTS
