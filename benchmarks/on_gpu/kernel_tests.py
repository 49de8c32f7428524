"""Stage b: the kernels' tests on the GPU, in parallel, each recorded as it ends."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import threading
import time

from benchmarks.on_gpu.pytest_runs import explained, has_xdist, kernels_own, marked_files, progress, pytest_command
from benchmarks.on_gpu.stage import CUT, FAILED, PASSED, ROOT, Context, Verdict

WORKERS = 8
REPORTED_EVERY = 1.0  # seconds
TELLING = 12.0  # seconds for an interrupted pytest to report what has failed so far, and why
INTERRUPTED = 2  # pytest's exit code
BAD = {"failed", "error"}
REHEARSED = "test_order_by_steps and (128 or 8193)"


def run(context: Context) -> Verdict:
    """Counts the tests that passed, and reports the messages of those that failed."""
    parallel = ["-n", str(min(WORKERS, os.cpu_count() or 1))] if has_xdist() and not context.rehearsal else []
    picked = ["-k", REHEARSED] if context.rehearsal else []
    files = [path for path in marked_files() if kernels_own(path)]
    given = pytest_command(context, ["-v", *parallel, *picked, *files])
    outcomes: dict[str, str] = {}
    reported = 0.0
    process = subprocess.Popen(
        given,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # a process started in the background, as this may be, would ignore the signal
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    up = threading.Timer(context.left - min(TELLING, context.left / 2), process.send_signal, [signal.SIGINT])
    up.daemon = True
    up.start()
    for line in process.stdout:
        print(line, end="", flush=True)
        if result := progress(line.rstrip()):
            outcomes[result[0]] = result[1]
            if result[1] in BAD:
                context.record("failure", id=result[0], message="")
        if why := explained(line.rstrip()):
            context.record("failure", id=why[0], message=why[1])
        if time.monotonic() > reported + REPORTED_EVERY:
            reported = time.monotonic()
            context.record("tests", **counted(outcomes))
    code = process.wait()
    up.cancel()
    counts = counted(outcomes)
    context.record("tests", **counts)
    message = ", ".join(f"{n} {outcome}" for outcome, n in counts.items()) or "no test ran"
    if code == INTERRUPTED and context.left < TELLING:
        return FAILED if counts.keys() & BAD else CUT, f"{message} until the time was up"
    good = code == 0 and counts.get("passed", 0) > 0 and not counts.keys() & {"skipped", *BAD}
    return PASSED if good else FAILED, message if good else f"{message}; pytest ended with {code}"


def counted(outcomes: dict[str, str]) -> dict[str, int]:
    """Returns the number of tests of each outcome."""
    result: dict[str, int] = {}
    for outcome in outcomes.values():
        result[outcome] = result.get(outcome, 0) + 1
    return result
