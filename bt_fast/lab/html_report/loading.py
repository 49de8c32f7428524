"""What run folders hold, checked: a report names what is missing or foreign instead of drawing it."""

from __future__ import annotations

import json
import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bt_fast.lab.corruptions import SEVERITIES
from bt_fast.lab.files import parse_json
from bt_fast.lab.methods import Method
from bt_fast.lab.provenance import Provenance
from bt_fast.lab.report import label
from bt_fast.ops import GROUPS

Record = dict[str, Any]

_BY_DEFINITION = {"reference": 1.0, "optimised": 1.0}  # Eq. 7 of the objective itself; older summaries leave it out
_NUMBERS = {  # of a record by its kind; what a report does not draw is not looked at
    "epoch": ("epoch", "clean", "seconds"),
    "fractions": ("boundary", "robust", "outlier", "robust_fraction"),
    "allocation": ("threshold",),
    "corruptions": ("robust",),
}


@dataclass(frozen=True)
class Result:
    """What a method came to; None is what the summary does not tell.

    Attributes:
        name: as on the command line; label: as in tables.
        algorithm: as of `Method`; "" where the name is none of this version.
        engine: "exact", "fast" or "bf16", the run's where the name has none.
        own: whether the method has options of its own.
        clean, robust: accuracies in [0, 1], and `attack`, what `robust` stands against.
        seconds: of training. iteration_seconds: the median of an iteration.
        forward_passes: F of an iteration. theoretical_speedup: Eq. 7.
        speedup: over the other methods by name, the median of the ratios of paired iterations.
        fractions: of `boundary`, `robust`, `outlier`; None without BulletTrain.
        joules: of training. joules_reason: why there are none, where the summary says it.
        missing: the names of what an older version did not write.
    """

    name: str
    label: str
    algorithm: str
    engine: str
    own: bool
    clean: float
    robust: float | None
    attack: str
    seconds: float
    iteration_seconds: float | None
    forward_passes: float | None
    theoretical_speedup: float | None
    speedup: Mapping[str, float]
    fractions: Mapping[str, float] | None
    joules: float | None
    joules_reason: str | None
    missing: tuple[str, ...]


@dataclass(frozen=True)
class LoadedRun:
    """A run.

    Attributes:
        letter: stands for it in the report, "A" for the first.
        title: its folder as it was given. written: when its summary, or its last record, was, in seconds since 1970.
        records: of metrics.jsonl.
        data: the SHA-256 of its data; None where its summary, of an older version, does not tell.
        unfinished: how far it is, in words; "" of one with a summary.
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
        """What tells its data from others: what they are where that is known, else where they lay."""
        return self.data or str(self.config.get("data"))

    def of_kind(self, kind: str, method: str) -> list[Record]:
        """A method's records of that kind; older ones that name no method are of the first with BulletTrain."""
        bullet = next((r.name for r in self.results if r.algorithm == "bullet"), self.results[0].name)
        return [r for r in self.records if r["kind"] == kind and r.get("method", bullet) == method]


def load_runs(paths: Sequence[Path]) -> list[LoadedRun]:
    """The runs in run folders, and in folders of run folders such as a study's; other processes may write them now.

    Raises:
        ValueError: a folder holds no run of which an epoch has ended or is given twice, or a file in it is cut off or
            another thing.
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
    if _holds_run(path):
        return [path]
    found = [child for child in sorted(path.iterdir()) if child.is_dir() and _holds_run(child)]
    if not found:
        raise ValueError(
            f"{path}: no run folder: there is no summary.json or checkpoint.pt in it or in a folder in it; name the "
            "folder of a run"
        )
    return found


def _holds_run(folder: Path) -> bool:
    return (folder / "summary.json").exists() or (folder / "checkpoint.pt").exists()


def _letter(index: int) -> str:
    letters = string.ascii_uppercase
    return (_letter(index // 26 - 1) if index >= 26 else "") + letters[index % 26]


def _load(letter: str, folder: Path) -> LoadedRun:
    path = folder / "summary.json"
    if not path.exists():
        return _load_unfinished(letter, folder)
    try:
        summary = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also of text that is not UTF-8
        raise ValueError(f"{path}: cut off, or not a summary ({error}); restore it, or make the run anew") from error
    parts = summary if isinstance(summary, dict) else {}
    for name in ("config", "machine", "methods"):
        if not isinstance(parts.get(name), dict):
            raise ValueError(
                f"{path}: not a summary of a run: {name} must be an object, got {parts.get(name)!r}; "
                "name a run that `bt-fast train` wrote"
            )
    if not parts["methods"]:
        raise ValueError(f"{path}: not a summary of a run: methods is empty; name a run that `bt-fast train` wrote")
    records = _records(folder / "metrics.jsonl")
    loss = str(parts["config"].get("loss"))
    corrupted = {r.get("method"): r["robust"] for r in records if r["kind"] == "corruptions"}
    try:
        engine = str(parts["config"].get("engine", "exact"))
        methods = parts["methods"].items()
        results = [_result(path, name, entry, loss, engine, corrupted.get(name)) for name, entry in methods]
    except ValueError as error:
        raise ValueError(f"{error}; restore the summary, or leave the run out") from error
    written, data = path.stat().st_mtime, _sha256(path, parts.get("data"))
    return LoadedRun(letter, str(folder), written, parts["config"], parts["machine"], results, records, data)


def _sha256(path: Path, data: Any) -> str | None:
    if data is None:
        return None
    if not isinstance(data, dict) or not isinstance(data.get("sha256"), str):
        raise ValueError(
            f"{path}: not a summary of a run: data must be an object with a sha256, got {data!r}; "
            "name a run that `bt-fast train` wrote"
        )
    return str(data["sha256"])


def _load_unfinished(letter: str, folder: Path) -> LoadedRun:
    """A run without a summary, as it is after the last epoch of which every method has its record."""
    records = _records(folder / "metrics.jsonl")
    epochs = {(record["method"], record["epoch"]): record for record in records if record["kind"] == "epoch"}
    told = Provenance.read(folder / "run.json") if epochs else None
    methods = () if told is None else told.config.methods
    of_all = [epoch for _, epoch in epochs if all((method, epoch) in epochs for method in methods)]
    if told is None or not of_all:
        raise ValueError(
            f"{folder}: a run without a summary.json, so not finished, of which no epoch has ended; report it later, "
            f"go on with it by --resume {folder}, or leave it out"
        )
    written = (folder / "metrics.jsonl").stat().st_mtime
    config, ended = told.config, max(of_all)
    attack = f"PGD-{config.eval_steps} x 1, {config.curve_size} test images"
    results = []
    for name in config.methods:
        kind, last = Method.parse(name), epochs[name, ended]
        results.append(
            Result(
                name=name,
                label=label(name, config.loss),
                algorithm=kind.algorithm,
                engine=_engine(kind, config.engine),
                own=bool(kind.changes),
                clean=float(last["clean"]),
                robust=None if last.get("robust") is None else float(last["robust"]),
                attack=attack,
                seconds=float(last["seconds"]),
                iteration_seconds=None,
                forward_passes=None,
                theoretical_speedup=None,
                speedup={},
                fractions=None,
                joules=None if last.get("joules") is None else float(last["joules"]),
                joules_reason="the run is not finished",
                missing=(),
            )
        )
    machine = told.starts[-1].get("machine", {}) if told.starts else {}
    return LoadedRun(
        letter,
        str(folder),
        written,
        json.loads(config.to_json()),
        machine,
        results,
        records,
        told.data["sha256"],
        f"epoch {ended:g} of {config.epochs} has ended",
    )


def _engine(kind: Method, of_run: str) -> str:
    """What a method ran on: the authors' code as it was written."""
    return "exact" if kind.algorithm in ("reference", "yopo") else kind.engine or of_run.partition(",")[0]


def _result(path: Path, name: str, entry: Any, loss: str, engine: str, corrupted: float | None) -> Result:
    where = f"{path}, method {name}"
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected an object, got {entry!r}")
    try:
        kind, made = Method.parse(name), label(name, loss)
    except (ValueError, KeyError):  # of another version
        kind, made = Method(name, ""), name
    speedup = _object_of_numbers(entry, "speedup", where)
    fractions = _object_of_numbers(entry, "fractions", where)
    for group in GROUPS if fractions is not None else ():
        _number(fractions or {}, group, f"{where}, fractions")
    theory = _optional(entry, "theoretical_speedup", where)
    if "theoretical_speedup" not in entry:
        theory = _BY_DEFINITION.get(kind.algorithm)
    attack = str(entry.get("attack", "an attack that the summary does not name"))
    robust = _optional(entry, "robust", where)
    if corrupted is not None:
        robust, attack = corrupted, "corruptions"
    told = {"theoretical_speedup": theory is not None or "theoretical_speedup" in entry}
    told |= {key: key in entry for key in ("attack", "iteration_seconds", "forward_passes", "speedup")}
    told |= {"fractions": fractions is not None} if kind.algorithm == "bullet" else {}
    return Result(
        name=name,
        label=str(entry.get("label", made)),
        algorithm=kind.algorithm,
        engine=_engine(kind, engine),
        own=bool(kind.changes),
        clean=_number(entry, "clean", where),
        robust=robust,
        attack=attack,
        seconds=_number(entry, "seconds", where),
        iteration_seconds=_optional(entry, "iteration_seconds", where),
        forward_passes=_optional(entry, "forward_passes", where),
        theoretical_speedup=theory,
        speedup=speedup or {},
        fractions=fractions,
        joules=_optional(entry, "joules", where),
        joules_reason=None if entry.get("joules_reason") is None else str(entry["joules_reason"]),
        missing=tuple(key for key, there in told.items() if not there),
    )


def _number(entry: Mapping[str, Any], key: str, where: str) -> float:
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{where}: {key} must be a number, got {value!r}" if key in entry else f"{where}: no {key}")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{where}: {key} must be a number, got one of {len(str(value))} digits") from error


def _optional(entry: Mapping[str, Any], key: str, where: str) -> float | None:
    return None if entry.get(key) is None else _number(entry, key, where)


def _object_of_numbers(entry: Mapping[str, Any], key: str, where: str) -> dict[str, float] | None:
    value = entry.get(key)
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {key} must be an object, got {value!r}")
    return {name: _number(value, name, f"{where}, {key}") for name in value}


def _records(path: Path) -> list[Record]:
    """The records, but for a last line that was cut off while it was written."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1].split("\n")[:-1]
    return [_line(line, f"{path}, line {n}") for n, line in enumerate(whole, start=1)]


def _line(line: str, where: str) -> Record:
    try:
        return _record(line, where)
    except ValueError as error:
        raise ValueError(f"{error}; mend or take out that line, or leave the run out") from error


def _record(line: str, where: str) -> Record:
    try:
        record = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{where}: not a record ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        raise ValueError(f"{where}: not a record: expected an object with a kind, got {line[:80]!r}")
    for key in ("iteration", *_NUMBERS.get(record["kind"], ())):
        if not math.isfinite(_number(record, key, where)) and key == "iteration":
            raise ValueError(f"{where}: iteration must be finite, got {record[key]}")
    if record["kind"] == "epoch":
        for key in ("robust", "loss", "joules"):
            _optional(record, key, where)
        if "method" not in record:
            raise ValueError(f"{where}: no method")
    for kind, check in (("allocation", _check_allocation), ("groups", _check_groups), ("corruptions", _check_errors)):
        if record["kind"] == kind:
            check(record, where)
    if not isinstance(record.get("method", ""), str):
        raise ValueError(f"{where}: method must be a name, got {record['method']!r}")
    return record


def _check_allocation(record: Record, where: str) -> None:
    lists = [record.get(key) for key in ("svar", "steps")]
    if not all(isinstance(values, list) for values in lists) or not 0 < len(lists[0] or ()) == len(lists[1] or ()):
        raise ValueError(f"{where}: svar and steps must be lists of the same length, of at least 1")
    for key, low, high in (("svar", -1, 1), ("steps", 0, 2**63)):  # a variance of probabilities is below 1/4
        for value in record[key]:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise ValueError(f"{where}: {key} must hold numbers in {low}..{high}, got {value!r}")


def _check_groups(record: Record, where: str) -> None:
    for key, number in (("shares", _number), ("svar", _optional)):
        if not isinstance(record.get(key), dict):
            raise ValueError(f"{where}: {key} must be an object, got {record.get(key)!r}")
        for group in GROUPS:
            number(record[key], group, f"{where}, {key}")
    _optional(record, "boundary_below_robust", where)


def _check_errors(record: Record, where: str) -> None:
    """Of each corruption a share for each severity; a record without `errors` is one too."""
    errors = record.get("errors", {})
    if not isinstance(errors, dict):
        raise ValueError(f"{where}: errors must be an object, got {errors!r}")
    for name, of_severities in errors.items():
        if not isinstance(of_severities, list) or len(of_severities) != len(SEVERITIES):
            raise ValueError(f"{where}: errors of {name} must be {len(SEVERITIES)} numbers, got {of_severities!r}")
        for value in of_severities:
            if not 0 <= _number({name: value}, name, f"{where}, errors") <= 1:
                raise ValueError(f"{where}: errors of {name} must be in 0..1, got {value!r}")
