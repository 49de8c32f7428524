"""The table of the runs of `ten_times`: accuracies and costs, averaged over seeds."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ten_times import METHODS, records_of

AUTHORS = 39.0  # F


def table(folder: Path) -> str:
    """Returns the runs that have been judged as a table in Markdown: means over seeds, the best by margin first."""
    ended: defaultdict[tuple[str, str], list[list[dict[str, Any]]]] = defaultdict(list)
    for path in sorted(folder.glob("*/metrics.jsonl")):
        records = records_of(path)
        if records and records[-1]["kind"] == "judged":
            ended[_training_of(records[0]), records[0]["method"]].append(records)
    lines: list[str] = []
    for training in sorted({key[0] for key in ended}):
        of_training = {method: runs for (where, method), runs in ended.items() if where == training}
        lines += [f"## {training}", "", *_table_of(of_training), ""]
    return "\n".join(lines)


def _training_of(config: dict[str, Any]) -> str:
    kind = f"{config['data']}, {config['train']:,} images, {config['network']}"
    kind += f" of width {config['width']}" if config["network"] == "cnn5" else ""
    moves = f"crops of {config['padding']} pixels" if config["padding"] else "no crops"
    kind += f", {config['epochs']} epochs of minibatches of {config['batch']}, ε = {config['epsilon']:.4g}, {moves}"
    kind += ", flips" if config["flip"] else ""
    return f"{kind}, lr {config['lr']:g}, weight decay {config['weight_decay']:g}, {config['test']:,} test images"


HEAD = "| method | seeds | clean | PGD-20 | PGD-50, CE | PGD-50, margin | F_B / F_R / F_O | F | over 39 F | CPU s |"


def _table_of(of_training: dict[str, list[list[dict[str, Any]]]]) -> Iterable[str]:
    yield HEAD
    yield "| --- " * (HEAD.count("|") - 1) + "|"
    names = {text: name for name, text in METHODS.items()}
    rows = []
    for method, runs in of_training.items():
        last = [records[-1] for records in runs]
        epochs = [[r for r in records if r["kind"] == "epoch"] for records in runs]
        cells = [_spread([100 * r[key] for r in last]) for key in ("clean", "pgd20", "pgd50", "pgd50_margin")]
        shares = [_mean([r[key] for of_run in epochs for r in of_run]) for key in ("boundary", "robust", "outlier")]
        cost = _mean([r["F"] for of_run in epochs for r in of_run])
        seconds = _mean([sum(r["cpu_seconds"] for r in of_run) for of_run in epochs])
        named = f"{names[method]}: `{method}`" if method in names else f"`{method}`"
        line = [named, str(len(runs)), *cells, " / ".join(f"{share:.2f}".lstrip("0") for share in shares)]
        line += [f"{cost:.1f}", f"{AUTHORS / cost:.2f}×", f"{seconds:,.0f}"]
        rows.append((_mean([r["pgd50_margin"] for r in last]), f"| {' | '.join(line)} |"))
    yield from (line for _, line in sorted(rows, reverse=True))


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def _spread(values: Sequence[float]) -> str:
    """Returns the mean in per cent, and from two seeds on the standard deviation."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{_mean(values):.1f}{deviation}"
