"""Stage a: the findings of `bt-fast doctor`, after its kernels were compiled in parallel."""

from __future__ import annotations

import subprocess
import time

from benchmarks.on_gpu.stage import FAILED, PASSED, ROOT, Context, Verdict

WORKERS = 8
COMPILING = 0.6  # of the stage's time at most


def run(context: Context) -> Verdict:
    """Returns the doctor's verdict and records all of its findings."""
    if context.part:
        return _compile(context)
    workers = 1 if context.rehearsal else WORKERS
    began, seconds = time.monotonic(), COMPILING * context.left
    running = [subprocess.Popen(context.part_command(f"{k}/{workers}", seconds), cwd=ROOT) for k in range(workers)]
    for process in running:
        try:
            process.wait(max(0.0, began + seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    context.record("compiled", seconds=time.monotonic() - began, codes=[process.returncode for process in running])

    from benchmarks.on_gpu.rehearsal import device_of
    from bt_fast.lab import doctor

    findings = doctor.examine(device_of(context))
    context.record("doctor", **doctor.as_json(findings))
    print(*doctor.lines(findings), sep="\n")
    works, sentence = doctor.verdict(findings)
    return PASSED if works else FAILED, sentence


def _compile(context: Context) -> Verdict:
    """Runs a share of the doctor's checks to compile their kernels."""
    from benchmarks.on_gpu.rehearsal import device_of
    from bt_fast.lab import doctor

    k, workers = map(int, context.part.split("/"))
    checks = doctor.CHECKS[k::workers][: 1 if context.rehearsal else None]
    findings = doctor.self_check(checks, device_of(context), 0.9 * context.left)
    print(*(f"{f.name}: {f.status}: {f.text}" for f in findings), sep="\n")
    return PASSED, ""
