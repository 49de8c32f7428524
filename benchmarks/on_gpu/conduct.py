"""Runs the stages one after another, each within its time, and keeps their records however they end.

Nothing here needs more than the standard library.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.on_gpu import jobs
from benchmarks.on_gpu.page import page, verdict_line
from benchmarks.on_gpu.plan import SHORTEST, Stage, limit
from benchmarks.on_gpu.stage import (
    CUT,
    FAILED,
    NOT_RUN,
    PASSED,
    ROOT,
    Context,
    command,
    read_records,
    records_file,
    turn_file,
)

RESULTS, PAGE, LOG, TRACE = FILES = ("results.json", "page.md", "log.txt", "trace.json.gz")
FORMAT = 1
WITHIN = ("verdict", "part", "trying")  # records for the conductor, or for a stage's own parts
KEPT_FOR_WRITING = 4.0  # seconds reserved for writing
POLL = 0.2
REHEARSED = "rehearsed, not measured"  # in place of figures
LOG_BYTES = 300_000  # of a stage
TRACE_BYTES = 8 << 20
INSTALL_SECONDS, LOOK_SECONDS = 60.0, 60.0
INSTALL = ("-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet", "-e", str(ROOT))
SOURCES = ("bt_fast", "kernels", "benchmarks", "tests")


@dataclass(frozen=True)
class Request:
    """The command line's request: `seconds` for everything together."""

    out: Path
    seconds: float
    stages: tuple[Stage, ...]
    rehearsal: bool
    data: Path | None


class Stop(BaseException):
    """Raised when the time is up or this process is asked to end; only `conduct` catches it."""


@dataclass(eq=False)
class Session:
    """One call of the command: its clock, its files, and its running jobs.

    Attributes:
        content: the content of results.json.
    """

    request: Request
    scratch: Path
    content: dict[str, Any]
    until: float
    running: list[jobs.Job] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds until everything has to be written."""
        return self.until - time.monotonic()

    def write(self) -> None:
        """Replaces results.json and page.md, each atomically."""
        self.content["seconds"] = round(self.request.seconds - KEPT_FOR_WRITING - self.left, 1)
        text = json.dumps(finite(self.content), indent=1, allow_nan=False) + "\n"
        for name, whole in ((RESULTS, text), (PAGE, page(self.content))):
            part = self.request.out / f".{name}.part"
            part.write_text(whole)
            os.replace(part, self.request.out / name)

    def start(self, given: Sequence[str], log: str) -> jobs.Job:
        """Runs a command in the repository."""
        job = jobs.start(given, self.scratch / log, ROOT, environment())
        self.running.append(job)
        return job

    def end(self, job: jobs.Job) -> None:
        """Ends a job and all that it started."""
        job.end()
        self.running.remove(job)


def conduct(request: Request) -> int:
    """Runs the requested stages, writes the results and prints the page; returns the exit status."""
    began = time.monotonic()
    content: dict[str, Any] = {
        "format": FORMAT,
        "rehearsal": request.rehearsal,
        "minutes": request.seconds / 60,
        "began": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "finished": False,
        "stopped": None,
        "source_sha256": source_hash(),
        "machine": None,
        "stages": {},
    }
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, _stop)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, request.seconds - KEPT_FOR_WRITING / 2))  # if all else hangs
    scratch = Path(tempfile.mkdtemp(prefix="on-gpu-"))
    session = Session(request, scratch, content, began + request.seconds - KEPT_FOR_WRITING)
    try:
        stages_in_turn(session)
    except Stop as stop:
        content["stopped"] = str(stop)
    except Exception as error:  # an error of this process, such as a full disk: the known results are still written
        traceback.print_exc()
        content["stopped"] = f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # the rest takes no time
        for job in list(session.running):
            session.end(job)
        conclude(session)
        shutil.rmtree(scratch, ignore_errors=True)
    print((request.out / PAGE).read_text())
    return exit_status(content)


def _stop(number: int, frame: object) -> None:
    raise Stop("the time was up" if number == signal.SIGALRM else f"stopped by {signal.Signals(number).name}")


def stages_in_turn(session: Session) -> None:
    """Runs the requested stages in order; those that need no GPU run beside the others."""
    request = session.request
    session.write()
    session.content["machine"] = prepared(session)
    nothing = session.content["machine"]["unfit"] = why_nothing(session.content["machine"], request.rehearsal)
    session.write()
    beside: dict[str, jobs.Job] = {}
    for number, stage in enumerate(request.stages):
        later = request.stages[number + 1 :]
        if nothing and stage.name != "examination":
            settle(session, stage, (NOT_RUN, nothing), 0.0)
            continue
        if not nothing:
            for other in (stage, *later):
                if other.beside and other is not stage and other.name not in beside:
                    beside[other.name] = begin(session, other, session.left)
        seconds = limit(stage, later, request.seconds, session.left, request.rehearsal)
        if seconds < SHORTEST:
            settle(session, stage, (NOT_RUN, "no time was left"), 0.0)
            continue
        turn_file(session.scratch, stage.name).touch()
        job = beside.get(stage.name) or begin(session, stage, seconds)
        wait(session, stage, job, seconds)


def begin(session: Session, stage: Stage, seconds: float) -> jobs.Job:
    """Starts a stage with this many seconds."""
    request, machine = session.request, session.content["machine"]
    context = Context(
        stage=stage.name,
        part="",
        until=time.monotonic() + 0.97 * seconds,
        scratch=str(session.scratch),
        rehearsal=request.rehearsal,
        device=machine.get("device") or "",
        data=None if request.data is None else str(request.data),
        minutes=request.seconds / 60,
    )
    return session.start(command(context), f"{stage.name}.log")


def wait(session: Session, stage: Stage, job: jobs.Job, seconds: float) -> None:
    """Waits until the stage is done or its time is up, and writes its records meanwhile."""
    began, reported = time.monotonic(), -1
    path = records_file(session.scratch, stage.name)
    while job.code is None and time.monotonic() < began + seconds:
        time.sleep(POLL)
        size = path.stat().st_size if path.exists() else 0
        if size != reported:
            reported = size
            note(session, stage, ("running", ""), time.monotonic() - began)
            session.write()
    code = job.code
    session.end(job)
    verdict = judged(read_records(path), code, seconds, last_line(session.scratch / f"{stage.name}.log"))
    settle(session, stage, verdict, time.monotonic() - began)


def last_line(log: Path) -> str:
    """Returns the last line that a stage printed, shortened."""
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")


def judged(records: Sequence[dict[str, Any]], code: int | None, seconds: float, last: str) -> tuple[str, str]:
    """Returns a stage's own verdict, or how it ended; `last` is the last line that it printed."""
    own = [(r["verdict"], r["message"]) for r in records if r["kind"] == "verdict"]
    if own:
        return own[-1]
    result = f"{len(records)} findings until then" if records else "nothing found until then"
    if code is None:
        return CUT, f"ended after its {seconds:.0f} s; {result}"
    if last:
        result = f"{result}; the last it printed: {last}"
    if code < 0:
        return FAILED, f"died of {signal.Signals(-code).name}; {result}"
    return FAILED, f"ended with {code} and no verdict; {result}"


def note(session: Session, stage: Stage, verdict: tuple[str, str], seconds: float) -> None:
    """Adds a stage's state to the results."""
    result = read_records(records_file(session.scratch, stage.name))
    session.content["stages"][stage.name] = {
        "letter": stage.letter,
        "title": stage.title,
        "verdict": verdict[0],
        "message": REHEARSED if session.request.rehearsal and verdict[0] == PASSED else verdict[1],
        "seconds": round(seconds, 1),
        "records": [record for record in result if record["kind"] not in WITHIN],
    }


def settle(session: Session, stage: Stage, verdict: tuple[str, str], seconds: float) -> None:
    """Finishes a stage: writes everything, including its log and its trace, and reports it."""
    note(session, stage, verdict, seconds)
    session.write()
    log, trace = session.scratch / f"{stage.name}.log", session.scratch / TRACE
    if log.exists():
        with (session.request.out / LOG).open("ab") as file:
            rehearsed = "REHEARSAL " * session.request.rehearsal
            file.write(f"===== {rehearsed}{stage.letter} {stage.name}: {verdict[0]}\n".encode() + shortened(log))
        log.unlink()
    if trace.exists() and trace.stat().st_size <= TRACE_BYTES:
        shutil.copyfile(trace, session.request.out / TRACE)
        trace.unlink()
    print(verdict_line(session.content["stages"][stage.name]), flush=True)


def shortened(log: Path) -> bytes:
    """Returns the beginning and the end of a stage's output."""
    text = log.read_bytes()
    if len(text) <= LOG_BYTES:
        return text
    return text[: LOG_BYTES // 4] + b"\n[...]\n" + text[-3 * LOG_BYTES // 4 :]


def conclude(session: Session) -> None:
    """Reports at the end which stages did not run, and why."""
    stages, stopped = session.content["stages"], session.content["stopped"]
    for stage in session.request.stages:
        state = stages.get(stage.name)
        with suppress(OSError):  # a full disk must not hide the page
            if state is None:
                settle(session, stage, (NOT_RUN, stopped or ""), 0.0)
            elif state["verdict"] == "running":
                records = read_records(records_file(session.scratch, stage.name))
                own = [(r["verdict"], r["message"]) for r in records if r["kind"] == "verdict"]
                cut = (CUT, f"{stopped}; {len(records)} findings until then")
                settle(session, stage, own[-1] if own else cut, state["seconds"])
    session.content["finished"] = session.content["stopped"] is None
    session.write()


def exit_status(content: dict[str, Any]) -> int:
    """Returns 0 if nothing failed; a rehearsal must pass as a whole."""
    verdicts = {state["verdict"] for state in content["stages"].values()}
    wrong = verdicts - {PASSED} if content["rehearsal"] else verdicts & {FAILED}
    unfit = content["machine"] is None or content["machine"]["unfit"]
    return int(bool(wrong or unfit or content["stopped"]))


# The machine


def prepared(session: Session) -> dict[str, Any]:
    """Returns the machine's description, after installing the package from this tree if another one is imported."""
    result = looked_at(session)
    if not comes_from_here(result):
        print("installing the package from this tree", flush=True)
        job = session.start([sys.executable, *INSTALL], "install.log")
        settled(session, job, INSTALL_SECONDS)
        message = (session.scratch / "install.log").read_text(errors="replace").strip()
        result = looked_at(session) | {"installed": job.code == 0, "pip": message[-2000:]}
    if not comes_from_here(result):
        result["broken"] = f"bt_fast comes from {result.get('bt_fast')}, its kernels from {result.get('kernels')}"
        if result.get("pip"):
            result["broken"] += f"; pip: {result['pip'].splitlines()[-1]}"
    return result


def looked_at(session: Session) -> dict[str, Any]:
    """Returns the output of `machine.py`."""
    job = session.start([sys.executable, "-m", "benchmarks.on_gpu.machine"], "machine.log")
    settled(session, job, LOOK_SECONDS)
    path = session.scratch / "machine.log"
    lines = path.read_text(errors="replace").splitlines()
    path.unlink()
    for line in reversed(lines):
        with suppress(ValueError):
            if isinstance(result := json.loads(line), dict):
                return result
    why = (lines or ["it printed nothing"])[-1]
    return {"device": None, "why_none": f"python -m benchmarks.on_gpu.machine ended with {job.code}: {why}"}


def settled(session: Session, job: jobs.Job, seconds: float) -> None:
    """Waits for a job, at most this long."""
    end = time.monotonic() + min(seconds, session.left)
    while job.code is None and time.monotonic() < end:
        time.sleep(POLL / 4)
    session.end(job)


def comes_from_here(looked_at: dict[str, Any]) -> bool:
    """Returns whether the package and its kernels are imported from this tree."""
    return all(
        Path(looked_at.get(name, "")) == ROOT / folder
        for name, folder in (("bt_fast", "bt_fast"), ("kernels", "kernels"))
    )


def why_nothing(machine: dict[str, Any], rehearsal: bool) -> str:
    """Returns why no stage can run, or ""."""
    if machine.get("broken"):
        return str(machine["broken"])
    if not rehearsal and not machine.get("device"):
        return f"no GPU that torch can use ({machine.get('why_none')}); --rehearse runs all on the CPU"
    return ""


def environment() -> dict[str, str]:
    """Returns the stages' environment: one folder for compiled kernels, which a second call reuses."""
    cache = Path(tempfile.gettempdir()) / "on-gpu-triton"
    # the teardown of a profiler crashes after graphs were replayed (as torch/profiler/profiler.py documents)
    profiler = {"TEARDOWN_CUPTI": "0", "DISABLE_CUPTI_LAZY_REINIT": "1"}
    python = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", "COLUMNS": "400"}  # pytest truncates its lines
    return {"TRITON_CACHE_DIR": str(cache), **os.environ, **profiler, **python}


def source_hash() -> str:
    """Returns the SHA-256 of the sources, which identifies the tree without git."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def finite(value: Any) -> Any:
    """Replaces NaN and infinity, which JSON lacks, by None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
