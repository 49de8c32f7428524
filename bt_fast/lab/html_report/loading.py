"""Reads and checks run folders: an error names what is missing or foreign in them."""

from __future__ import annotations

import dataclasses
import json
import math
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bt_fast.lab.corruptions import SEVERITIES
from bt_fast.lab.files import parse_json, whole_lines
from bt_fast.lab.html_report.numbers import printable
from bt_fast.lab.methods import Method
from bt_fast.lab.provenance import Provenance
from bt_fast.lab.report import label
from bt_fast.ops import GROUPS

Record = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """The result of one method of a run; entries missing from the summary are None.

    Attributes:
        name: on the command line. label: in tables.
        method: the parsed name, with the engine it ran on; without an algorithm if this version knows none.
        clean, robust: accuracies in [0, 1]. attack: the attack used to measure `robust`.
        seconds: of training. iteration_seconds: the median of an iteration.
        forward_passes: F of an iteration. theoretical_speedup: Eq. 7.
        speedup: over the other methods by name, the median of the ratios of paired iterations.
        fractions: of `boundary`, `robust`, `outlier`; None without BulletTrain.
        joules: of training. joules_reason: why they are missing.
        memory: what is remembered of its attacks, in words; None without a memory.
        missing: the entries that an older version's summary lacks.
    """

    name: str
    label: str
    method: Method
    clean: float
    seconds: float
    robust: float | None = None
    attack: str = "an attack that the summary does not name"
    iteration_seconds: float | None = None
    forward_passes: float | None = None
    theoretical_speedup: float | None = None
    speedup: Mapping[str, float] = field(default_factory=dict)
    fractions: Mapping[str, float] | None = None
    joules: float | None = None
    joules_reason: str | None = None
    memory: str | None = None
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoadedRun:
    """A run in a report.

    Attributes:
        letter: its name in the report, "A" for the first. title: its folder as given.
        written: the time of its summary, or of its last record, in seconds since 1970.
        records: of metrics.jsonl.
        data: the SHA-256 of its data; None if an older version's summary lacks it.
        unfinished: its progress, in words; "" for a run with a summary.
    """

    letter: str
    title: str
    written: float
    config: dict[str, Any]
    machine: dict[str, Any]
    results: Sequence[Result]
    records: Sequence[Record]
    data: str | None = None
    unfinished: str = ""

    @property
    def trained_on(self) -> str:
        """The identity of its data: their hash if known, else their path."""
        return self.data or str(self.config.get("data"))

    def of_kind(self, kind: str, method: str) -> list[Record]:
        """A method's records of that kind; older records without a method belong to the first with BulletTrain."""
        bullet = next((r.name for r in self.results if r.method.algorithm == "bullet"), self.results[0].name)
        return [r for r in self.records if r["kind"] == kind and r.get("method", bullet) == method]

    def row_name(self, result: Result) -> str:
        """Returns for example `A2` for the second method of run A: the name of rows and points."""
        return f"{self.letter}{list(self.results).index(result) + 1}"


def load_runs(paths: Sequence[Path]) -> list[LoadedRun]:
    """Returns the runs in run folders, and in folders of run folders like a study's, even while they are written.

    Raises:
        ValueError: a folder holds no run with a finished epoch, is given twice, or a file in it is cut off or foreign.
    """
    folders = [folder for path in paths for folder in _run_folders(path)]
    resolved = [folder.resolve() for folder in folders]
    for folder, place in zip(folders, resolved, strict=True):
        if resolved.count(place) > 1:
            raise ValueError(f"{folder}: given twice; name it once, as each run is reported once")
    return [_load(_letter(i), folder) for i, folder in enumerate(folders)]


def _run_folders(path: Path) -> list[Path]:
    if not path.is_dir():
        raise ValueError(f"{path}: {'a file' if path.exists() else 'no such folder'}, expected a run or study folder")
    for candidates in ([path], sorted(path.iterdir())):
        if runs := [f for f in candidates if (f / "summary.json").exists() or (f / "checkpoint.pt").exists()]:
            return runs
    raise ValueError(
        f"{path}: no run folder: there is no summary.json or checkpoint.pt in it or in a folder in it; name the "
        "folder of a run"
    )


def _letter(index: int) -> str:
    letters = string.ascii_uppercase
    return (_letter(index // 26 - 1) if index >= 26 else "") + letters[index % 26]


def _load(letter: str, folder: Path) -> LoadedRun:
    path = folder / "summary.json"
    if not path.exists():
        return _load_unfinished(letter, folder)
    try:
        summary = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also for text that is not UTF-8
        raise ValueError(f"{path}: cut off, or not a summary ({error}); restore it, or make the run anew") from error
    records = _records(folder / "metrics.jsonl")
    try:
        parts = _parts(path, summary, records)
    except ValueError as error:
        raise ValueError(f"{error}; restore the summary that `bt-fast train` wrote, or leave the run out") from error
    return LoadedRun(letter, str(folder), path.stat().st_mtime, records=records, **parts)


def _parts(path: Path, summary: Any, records: list[Record]) -> dict[str, Any]:
    """Returns the fields of `LoadedRun` that a summary holds."""
    where = f"{path}: not a summary of a run"
    entries = summary if isinstance(summary, dict) else {}
    config, machine, methods = (_object(entries, name, where) for name in ("config", "machine", "methods"))
    if not methods:
        raise ValueError(f"{where}: methods is empty")
    data = None if entries.get("data") is None else _object(entries, "data", where).get("sha256", 0)
    if not isinstance(data, str | None):
        raise ValueError(f"{where}: data must be an object with a sha256, got {entries['data']!r}")
    corrupted = {r.get("method"): r["robust"] for r in records if r["kind"] == "corruptions"}
    results = []
    for name, entry in methods.items():
        if not isinstance(entry, dict):
            raise ValueError(f"{path}, method {name}: expected an object, got {entry!r}")
        results.append(_result(f"{path}, method {name}", name, entry, config, corrupted.get(name)))
    return {"config": config, "machine": machine, "results": results, "data": data}


def _result(where: str, name: str, entry: dict[str, Any], config: dict[str, Any], corrupted: float | None) -> Result:
    fields = _of_name(name, str(config.get("loss")), str(config.get("engine", "exact")))
    algorithm = fields["method"].algorithm
    if "theoretical_speedup" not in entry and algorithm in ("reference", "optimised"):
        fields["theoretical_speedup"] = 1.0  # by definition; older summaries omit it
    for key, read in _ENTRIES.items():
        if key in ("clean", "seconds") or entry.get(key) is not None:
            fields[key] = read(entry, key, where)
    expected = (*_EXPECTED, "fractions") if algorithm == "bullet" else _EXPECTED
    fields["missing"] = tuple(key for key in expected if key not in entry and key not in fields)
    if corrupted is not None:
        fields |= {"robust": corrupted, "attack": "corruptions"}
    return Result(**fields)


def _of_name(name: str, loss: str, engine: str) -> dict[str, Any]:
    """Returns the fields of `Result` given by a method's name, in a run with this engine."""
    try:
        method, made = Method.parse(name), label(name, loss)
    except (ValueError, KeyError):  # from another version
        method, made = Method(name, ""), name
    authors = method.algorithm in ("reference", "yopo")  # their code ignores the engine
    ran_on = "exact" if authors else method.engine or engine.partition(",")[0]
    return {"name": name, "label": printable(made), "method": dataclasses.replace(method, engine=ran_on)}


def _load_unfinished(letter: str, folder: Path) -> LoadedRun:
    """Returns a run without a summary, up to the last epoch with a record of every method."""
    path = folder / "metrics.jsonl"
    records = _records(path)
    epochs = {(record["method"], record["epoch"]): record for record in records if record["kind"] == "epoch"}
    provenance = Provenance.read(folder / "run.json") if epochs else None
    methods = provenance.config.methods if provenance else ()
    ended = max((e for _, e in epochs if all((method, e) in epochs for method in methods)), default=None)
    if provenance is None or ended is None:
        raise ValueError(
            f"{folder}: a run without a summary.json, so not finished, of which no epoch has ended; report it later, "
            f"go on with it by --resume {folder}, or leave it out"
        )
    config, starts = provenance.config, provenance.starts
    results = []
    for name in methods:
        last, fields = epochs[name, ended], _of_name(name, config.loss, config.engine)
        fields |= {key: last.get(key) for key in ("clean", "robust", "seconds", "joules")}
        attack = f"PGD-{config.eval_steps} x 1, {config.curve_size} test images"
        results.append(Result(**fields, attack=attack, joules_reason="the run is not finished"))
    machine = starts[-1].get("machine", {}) if starts else {}
    progress = f"epoch {ended:g} of {config.epochs} has ended"
    settings, data = json.loads(config.to_json()), provenance.data["sha256"]
    return LoadedRun(letter, str(folder), path.stat().st_mtime, settings, machine, results, records, data, progress)


def _records(path: Path) -> list[Record]:
    """Returns the records, except a last line that was cut off during writing."""
    records = []
    for n, line in enumerate(whole_lines(path), start=1):
        try:
            records.append(_record(line, f"{path}, line {n}"))
        except ValueError as error:
            raise ValueError(f"{error}; mend or take out that line, or leave the run out") from error
    return records


def _record(line: str, where: str) -> Record:
    try:
        record = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{where}: not a record ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        raise ValueError(f"{where}: not a record: expected an object with a kind, got {line[:80]!r}")
    if not math.isfinite(_number(record, "iteration", where)):
        raise ValueError(f"{where}: iteration must be finite, got {record['iteration']}")
    for key, read in _RECORDS.get(record["kind"], {}).items():
        read(record, key, where)
    if record["kind"] == "epoch" and "method" not in record:
        raise ValueError(f"{where}: no method")
    if not isinstance(record.get("method", ""), str):
        raise ValueError(f"{where}: method must be a name, got {record['method']!r}")
    return record


# Readers of an object's entry; the callers complete the errors with advice

_Read = Callable[[Mapping[str, Any], str, str], Any]


def _number(entries: Mapping[str, Any], key: str, where: str) -> float:
    if key not in entries:
        raise ValueError(f"{where}: no {key}")
    value = entries[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{where}: {key} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{where}: {key} must be a number, got one of {len(str(value))} digits") from error


def _object(entries: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    value = entries.get(key)
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {key} must be an object, got {value!r}")
    return value


def _optional(read: _Read) -> _Read:
    return lambda entries, key, where: None if entries.get(key) is None else read(entries, key, where)


def _each(read: _Read, keys: Iterable[str] = ()) -> _Read:
    """Returns a reader of an object with these keys, or with any."""

    def read_object(entries: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
        inner = _object(entries, key, where)
        return {name: read(inner, name, f"{where}, {key}") for name in keys or inner}

    return read_object


def _text(entries: Mapping[str, Any], key: str, where: str) -> str:
    return printable(str(entries[key]))


def _allocation(record: Mapping[str, Any], key: str, where: str) -> None:
    svar, steps = record.get("svar"), record.get("steps")
    if not isinstance(svar, list) or not isinstance(steps, list) or not 0 < len(svar) == len(steps):
        raise ValueError(f"{where}: svar and steps must be lists of the same length, of at least 1")
    low, high = (-1, 1) if key == "svar" else (0, 2**63)  # a variance of probabilities is below 1/4
    for value in record[key]:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise ValueError(f"{where}: {key} must hold numbers in {low}..{high}, got {value!r}")


def _severities(errors: Mapping[str, Any], name: str, where: str) -> None:
    shares = errors[name]
    if not isinstance(shares, list) or len(shares) != len(SEVERITIES):
        raise ValueError(f"{where} of {name} must be {len(SEVERITIES)} numbers, got {shares!r}")
    for share in shares:
        if not 0 <= _number({name: share}, name, where) <= 1:
            raise ValueError(f"{where} of {name} must be in 0..1, got {share!r}")


_EXPECTED = ("theoretical_speedup", "attack", "iteration_seconds", "forward_passes", "speedup")
_ENTRIES: dict[str, _Read] = {  # of a method in a summary
    **dict.fromkeys(("clean", "robust", "seconds", "iteration_seconds", "forward_passes"), _number),
    **dict.fromkeys(("theoretical_speedup", "joules"), _number),
    **dict.fromkeys(("label", "attack", "joules_reason", "memory"), _text),
    "speedup": _each(_number),
    "fractions": _each(_number, GROUPS),
}
_RECORDS: dict[str, dict[str, _Read]] = {  # entries of records by kind; entries that a report does not draw are ignored
    "epoch": {
        **dict.fromkeys(("epoch", "clean", "seconds"), _number),
        **dict.fromkeys(("robust", "loss", "joules"), _optional(_number)),
    },
    "fractions": dict.fromkeys((*GROUPS, "robust_fraction"), _number),
    "allocation": {"threshold": _number, "svar": _allocation, "steps": _allocation},
    "groups": {
        "shares": _each(_number, GROUPS),
        "svar": _each(_optional(_number), GROUPS),
        "boundary_below_robust": _optional(_number),
    },
    "corruptions": {"robust": _number, "errors": _optional(_each(_severities))},
}
