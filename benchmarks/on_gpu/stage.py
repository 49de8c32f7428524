"""Runs one stage, or one part of it, in this process and writes its findings to a file at once, line by line."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.on_gpu.jobs import TICK, end_with_parent

ROOT = Path(__file__).resolve().parents[2]
PASSED, FAILED, CUT, NOT_RUN = "passed", "failed", "cut", "not run"
Verdict = tuple[str, str]  # one of these, and a sentence with numbers


@dataclass(frozen=True)
class Context:
    """The settings of a stage.

    Attributes:
        stage: its name. part: which part of it, or "".
        until: the time by which it has to be done, in seconds of `time.monotonic`; soon after that it is killed.
        scratch: a folder for temporary files.
        rehearsal: whether to run on the CPU with tiny sizes.
        device: the GPU's name.
        data: the file of images, or None.
        minutes: of all stages together.
    """

    stage: str
    part: str
    until: float
    scratch: str
    rehearsal: bool
    device: str
    data: str | None
    minutes: float

    @property
    def left(self) -> float:
        """Seconds until the stage has to be done."""
        return self.until - time.monotonic()

    def record(self, kind: str, **values: Any) -> None:
        """Records a finding, which survives this process."""
        line = json.dumps({"kind": kind, **values}) + "\n"
        with records_file(self.scratch, self.stage).open("a", encoding="utf-8") as file:
            file.write(line)  # in one piece: parts of a stage write to this file, too

    def records(self, kind: str, stage: str | None = None) -> list[dict[str, Any]]:
        """Returns the records of a kind that this stage, or another, has written so far."""
        return [r for r in read_records(records_file(self.scratch, stage or self.stage)) if r["kind"] == kind]

    def wait_for_turn(self) -> None:
        """Waits, in a stage that runs beside others, until those are done."""
        while not turn_file(self.scratch, self.stage).exists() and self.left > 0:
            time.sleep(TICK)

    def part_command(self, part: str, seconds: float) -> list[str]:
        """Returns the command that runs a part of this stage in a separate process, in this one's group."""
        until = min(self.until, time.monotonic() + 0.95 * seconds)
        return command(dataclasses.replace(self, part=part, until=until))


def command(context: Context) -> list[str]:
    """Returns the command that runs a stage."""
    return [sys.executable, "-u", "-m", "benchmarks.on_gpu.stage", json.dumps(dataclasses.asdict(context))]


def run_part(context: Context, part: str, seconds: float, environment: Mapping[str, str] | None = None) -> int | None:
    """Runs a part of the stage; returns its exit code, or None if it was killed after `seconds`."""
    return run_limited(context.part_command(part, seconds), seconds, environment)


def run_limited(given: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None) -> int | None:
    """Runs a command in the repository; returns its exit code, or None if it was killed after `seconds`."""
    process = subprocess.Popen(given, cwd=ROOT, env=None if environment is None else {**os.environ, **environment})
    try:
        return process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def records_file(scratch: str | Path, stage: str) -> Path:
    """Returns the file of a stage's findings."""
    return Path(scratch) / f"{stage}.jsonl"


def turn_file(scratch: str | Path, stage: str) -> Path:
    """Returns the file that exists once the stages before this one are done."""
    return Path(scratch) / f"{stage}.turn"


def read_records(path: Path) -> list[dict[str, Any]]:
    """Returns the complete lines of the file; the last one may have been cut off."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    result = []
    for line in text[: text.rfind("\n") + 1].splitlines():
        try:
            result.append(json.loads(line))
        except ValueError:
            continue
    return result


def main() -> int:
    """Runs the stage described by the only argument."""
    context = Context(**json.loads(sys.argv[1]))
    if not context.part:
        end_with_parent()
    sys.path[1:1] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]  # as in pytest
    try:
        verdict, message = importlib.import_module(f"benchmarks.on_gpu.{context.stage}").run(context)
    except Exception as error:
        traceback.print_exc()
        verdict, message = FAILED, f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
    context.record("part" if context.part else "verdict", verdict=verdict, message=message, part=context.part)
    return int(verdict == FAILED)


if __name__ == "__main__":
    sys.exit(main())
