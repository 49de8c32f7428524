"""Stage c: the engine's tests on the GPU, each in a separate process, since a broken capture would affect others."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from dataclasses import dataclass
from typing import IO

from benchmarks.on_gpu.pytest_runs import kernels_own, marked_files, pytest_command
from benchmarks.on_gpu.stage import CUT, FAILED, PASSED, ROOT, Context, Verdict

AT_ONCE = 8  # most of a test is the start of its process: half the cores, but at most this many
SECONDS = 60.0  # for each test; more if emulated
LEAST = 5.0  # seconds: with less, no test is begun
TAIL = 3000  # characters of a failed test's output
REHEARSED = re.compile(r"\[GraphRunner-uniform-model\]$|_with_dropout_draws_from_graphs_")


@dataclass(eq=False)
class _Running:
    test: str
    process: subprocess.Popen[str]
    output: IO[str]
    began: float


def run(context: Context) -> Verdict:
    """Counts the tests that passed, and reports the output of those that failed."""
    collected, whole = collect(context)
    waiting, running, outcomes = list(collected), [], []
    while waiting or running:
        while waiting and len(running) < at_once(context, os.cpu_count() or 1) and context.left > LEAST:
            running.append(_start(context, waiting.pop(0)))
        for one in list(running):
            seconds = time.monotonic() - one.began
            outcome = _outcome(one, min(SECONDS * (3 if context.rehearsal else 1), context.left + seconds))
            if outcome is not None:
                running.remove(one)
                outcomes.append(outcome)
                context.record("test", id=one.test, outcome=outcome, seconds=seconds, message=_message(one, outcome))
        if not running and context.left <= LEAST:
            break
        time.sleep(0.05)
    counts = {outcome: outcomes.count(outcome) for outcome in dict.fromkeys(sorted(outcomes))}
    message = ", ".join(f"{n} {outcome}" for outcome, n in counts.items()) + f" of {len(collected)}"
    if not whole:
        return FAILED, f"{message}; a file could not be collected"
    if set(outcomes) - {"passed"}:
        return FAILED, message
    return (CUT if waiting else PASSED), message


def at_once(context: Context, cores: int) -> int:
    """Returns the number of tests that run at once."""
    return 2 if context.rehearsal else min(AT_ONCE, max(2, cores // 2))


def collect(context: Context) -> tuple[list[str], bool]:
    """Returns the tests' names, and whether every file could be read.

    Raises:
        RuntimeError: pytest finds no tests.
    """
    files = [path for path in marked_files() if not kernels_own(path)]
    given = pytest_command(context, ["--collect-only", "-q", *files])
    done = subprocess.run(given, cwd=ROOT, capture_output=True, text=True, timeout=max(1.0, context.left))
    print(done.stdout, done.stderr)
    result = [line.strip() for line in done.stdout.splitlines() if line.startswith("tests/") and "::" in line]
    if context.rehearsal:
        result = [name for name in result if REHEARSED.search(name)]
    if not result:
        message = (done.stdout + done.stderr).strip().splitlines() or ["nothing"]
        raise RuntimeError(f"pytest collected no test of {', '.join(files)}: {message[-1]}")
    context.record("collected", count=len(result), code=done.returncode)
    return result, done.returncode == 0


def _start(context: Context, test: str) -> _Running:
    output = tempfile.TemporaryFile("w+", dir=context.scratch, errors="replace")  # noqa: SIM115 (closed in _message)
    process = subprocess.Popen(
        pytest_command(context, ["-q", test]), cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, text=True
    )
    return _Running(test, process, output, time.monotonic())


def _outcome(one: _Running, seconds: float) -> str | None:
    """Returns the outcome of a test, or None while it runs within its time."""
    code = one.process.poll()
    if code is None:
        if time.monotonic() - one.began < seconds:
            return None
        one.process.kill()
        one.process.wait()
        return "hung"
    one.output.seek(0)
    if code == 0:
        return "passed" if re.search(r"\b1 passed\b", one.output.read()) else "skipped"
    return "failed" if code == 1 else "died" if code < 0 else "error"


def _message(one: _Running, outcome: str) -> str:
    """Returns the end of the output of a test that did not pass."""
    one.output.seek(0)
    text = one.output.read()
    one.output.close()
    print(f"----- {one.test}: {outcome}\n{text if outcome != 'passed' else ''}", flush=True)
    return "" if outcome == "passed" else text[-TAIL:]
