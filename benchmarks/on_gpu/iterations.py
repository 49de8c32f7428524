"""Stage d: one TRADES iteration, each case (network and precision) in a separate process.

A variant that ends its process (a capture that poisons it, a hang) is left out, and the case restarts without it.
"""

from __future__ import annotations

from benchmarks.on_gpu.figures import cases_of, headline
from benchmarks.on_gpu.plan import batch_size, cases
from benchmarks.on_gpu.stage import CUT, FAILED, PASSED, Context, Verdict, run_part

ATTEMPTS = 5  # one for each part of the engine that may fail, and one without them
LEAST = 8.0  # seconds: with less, no case is begun


def run(context: Context) -> Verdict:
    """Reports BulletTrain's result in each case, and the variants left out."""
    if context.part:
        from benchmarks.on_gpu.iteration import measure

        model, precision, batch = context.part.split("/")
        return measure(context, model, precision, int(batch))
    todo = cases(context.minutes, context.rehearsal)
    for number, (model, precision, share) in enumerate(todo):
        seconds = context.left * share / sum(other[2] for other in todo[number:])
        _case(context, model, precision, seconds)
    return verdict(context)


def _case(context: Context, model: str, precision: str, seconds: float) -> None:
    case = f"{model}/{precision}"
    end = context.left - seconds  # the time that is left then
    for _ in range(ATTEMPTS):
        if (left := context.left - end) < LEAST:
            context.record("ended", case=case, message="no time was left")
            return
        code = run_part(context, f"{case}/{batch_size(context.rehearsal)}", left)
        if code == 0:
            return
        if code is None:
            context.record("ended", case=case, message=f"cut after {left:.0f} s")
            return
        blamed = tried_last(context, case)
        if blamed is None:
            context.record("broke", case=case, message=f"its process ended with {code}: {last_message(context, case)}")
            return
        if not any(r["variant"] == blamed for r in context.records("left_out")):
            context.record("left_out", case=case, variant=blamed, message=f"its process ended with {code} in it")


def tried_last(context: Context, case: str) -> str | None:
    """Returns the variant in its first runs when the case's process ended, or None."""
    tried = [r for r in context.records("trying") if r["case"] == case]
    return None if not tried or tried[-1]["variant"] is None else str(tried[-1]["variant"])


def last_message(context: Context, case: str) -> str:
    """Returns the last message of the case's last process, if any."""
    messages = [r["message"] for r in context.records("part") if r["part"].startswith(case)]
    return messages[-1] if messages else "it reported nothing"


def verdict(context: Context) -> Verdict:
    """Returns "failed" if a variant is not exact, fell back or broke, and "cut" if a case has no times."""
    records = [r for kind in ("round", "flops") for r in context.records(kind)]
    broken = [r for kind in ("left_out", "broke") for r in context.records(kind)]
    wrong = [f"{r['case'].replace('/', ' ')}, {r.get('variant', 'the case')}: {r['message']}" for r in broken]
    result = cases_of(records)
    message = "; ".join([*(headline(case, rows) for case, rows in result.items()), *wrong]) or "nothing was measured"
    if wrong:
        return FAILED, message
    return (PASSED if len(result) == len(cases(context.minutes, context.rehearsal)) else CUT), message
