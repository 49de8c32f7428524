"""The table and the pictures of the runs of `ten_times`: accuracies and costs, averaged over seeds."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from benchmarks.ten_times import METHODS, records_of

AUTHORS = 39.0  # F
NAMES = {text: name for name, text in METHODS.items()}
JUDGED = ("clean", "pgd20", "pgd50", "pgd50_margin", "pgd100_margin")
HEAD = (
    "| method | seeds | clean | PGD-20 | PGD-50, CE | PGD-50, margin | PGD-100 × 5, margin | to TRADES, CE / margin "
    "| F_B / F_R / F_O | F | over 39 F | CPU s |"
)


@dataclass(frozen=True)
class Line:
    """The judged runs of one method in one training, which differ by their seeds.

    Attributes:
        epochs: of each run, in their order. judged: of each run.
    """

    method: str
    epochs: list[list[dict[str, Any]]]
    judged: list[dict[str, Any]]

    @property
    def family(self) -> str:
        """The method without its β."""
        return re.sub(r",beta=[^,;]*", "", self.method)

    @property
    def label(self) -> str:
        """The method's name, if it has one, and its text."""
        return f"{NAMES[self.method]}: `{self.method}`" if self.method in NAMES else f"`{self.method}`"

    def mean(self, key: str) -> float:
        """Returns the mean of an accuracy, in per cent."""
        return 100 * statistics.fmean(record[key] for record in self.judged)

    def mean_of_epochs(self, key: str) -> float:
        """Returns the mean over all epochs of all runs."""
        return statistics.fmean(record[key] for run in self.epochs for record in run)

    def spread(self, key: str) -> str:
        """Returns the mean of an accuracy in per cent, with the standard deviation over seeds; "–" if one lacks it."""
        if not all(key in record for record in self.judged):
            return "–"
        values = [100 * record[key] for record in self.judged]
        deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.1f}{deviation}"


def lines_of(folder: Path) -> dict[str, list[Line]]:
    """Returns the judged runs below a folder, by training; the best by the margin loss first."""
    ended: defaultdict[tuple[str, str], list[list[dict[str, Any]]]] = defaultdict(list)
    for path in sorted(folder.glob("*/metrics.jsonl")):
        records = records_of(path)
        if any(record["kind"] == "judged" for record in records):
            ended[_training_of(records[0]), records[0]["method"]].append(records)
    result: defaultdict[str, list[Line]] = defaultdict(list)
    for (training, method), runs in sorted(ended.items()):
        epochs = [[record for record in records if record["kind"] == "epoch"] for records in runs]
        result[training].append(Line(method, epochs, [_judged(records) for records in runs]))
    for lines in result.values():
        lines.sort(key=lambda line: -line.mean("pgd50_margin"))
    return dict(result)


def _judged(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Returns all accuracies of a judged run."""
    of_kind = {record["kind"]: record for record in records if record["kind"] in ("judged", "hard")}
    return of_kind["judged"] | of_kind.get("hard", {})


def _training_of(config: Mapping[str, Any]) -> str:
    kind = f"{config['data']}, {config['train']:,} images, {config['network']}"
    kind += f" of width {config['width']}" if config["network"] == "cnn5" else ""
    moves = f"crops of {config['padding']} pixels" if config["padding"] else "no crops"
    kind += f", {config['epochs']} epochs of minibatches of {config['batch']}, ε = {config['epsilon']:.4g}, {moves}"
    kind += ", flips" if config["flip"] else ""
    return f"{kind}, lr {config['lr']:g}, weight decay {config['weight_decay']:g}, {config['test']:,} test images"


# The table


def table(folder: Path) -> str:
    """Returns the judged runs as tables in Markdown, one for each training.

    "To TRADES" is how far a method lies above the line through TRADES's own points of several β, at its own clean
    accuracy; "–" where no two of these enclose it.
    """
    result = []
    for training, lines in lines_of(folder).items():
        rows = [HEAD, "| --- " * (HEAD.count("|") - 1) + "|", *(_row(line, lines) for line in lines)]
        result.append(f"## {training}\n\n" + "\n".join(rows) + "\n")
    return "\n".join(result)


def _row(line: Line, others: Iterable[Line]) -> str:
    cost, trades = line.mean_of_epochs("F"), [other for other in others if other.family == "10"]
    seconds = statistics.fmean(sum(record["cpu_seconds"] for record in run) for run in line.epochs)
    shares = [f"{line.mean_of_epochs(key):.2f}".lstrip("0") for key in ("boundary", "robust", "outlier")]
    above = [_above(line, trades, key) for key in ("pgd50", "pgd50_margin")]
    cells = [line.label, str(len(line.judged)), *map(line.spread, JUDGED), " / ".join(above), " / ".join(shares)]
    return f"| {' | '.join([*cells, f'{cost:.1f}', f'{AUTHORS / cost:.2f}×', f'{seconds:,.0f}'])} |"


def _above(line: Line, trades: Sequence[Line], key: str) -> str:
    """Returns by how many points a method is above TRADES's own curve at equal clean accuracy."""
    points, clean = sorted((other.mean("clean"), other.mean(key)) for other in trades), line.mean("clean")
    for (low, at_low), (high, at_high) in pairwise(points):
        if low <= clean <= high:
            share = (clean - low) / (high - low) if high > low else 0.0
            return f"{line.mean(key) - at_low - share * (at_high - at_low):+.1f}"
    return "–"


# The pictures


def draw(folder: Path) -> list[Path]:
    """Draws a picture for each training and returns the files.

    On the left the curves of PGD-50 with the margin loss over the forward passes of a training image; on the right,
    for each method at several β, the judgement against clean accuracy.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    paths = []
    for number, (training, lines) in enumerate(lines_of(folder).items(), start=1):
        figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5.5), layout="constrained")
        colours = {family: f"C{k % 10}" for k, family in enumerate(sorted({line.family for line in lines}))}
        styles = ["-", "--", ":", "-."]
        for k, line in enumerate(lines):
            run = range(len(line.epochs[0]))
            passes = [statistics.fmean(of_run[e]["F"] for of_run in line.epochs) for e in run]
            robust = [100 * statistics.fmean(of_run[e]["pgd50_margin"] for of_run in line.epochs) for e in run]
            style = {"color": colours[line.family], "linestyle": styles[k % 4], "label": line.label.replace("`", "")}
            left.plot(list(accumulate(passes)), robust, **style)
        for family, colour in colours.items():
            of_family = sorted(
                (line.mean("clean"), line.mean("pgd50_margin")) for line in lines if line.family == family
            )
            right.plot(*zip(*of_family, strict=True), "o-", color=colour, label=family)
        left.set(
            xlabel="forward passes per training image", ylabel="% robust: PGD-50, margin loss, test images of the curve"
        )
        right.set(xlabel="% clean", ylabel="% robust: PGD-50, margin loss")
        left.legend(fontsize=7)
        figure.suptitle(training, fontsize=9)
        paths.append(folder / f"curves-{number}.png")
        figure.savefig(paths[-1], dpi=120)
        plt.close(figure)
    return paths
