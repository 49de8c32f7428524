"""Stage h: whether the chains of BulletTrain's groups run at the same time, from a trace."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from benchmarks.on_gpu.plan import batch_size, cases
from benchmarks.on_gpu.rehearsal import device_of, stand_in
from benchmarks.on_gpu.stage import FAILED, PASSED, Context, Verdict
from benchmarks.on_gpu.traces import busy, range_of, traced, work_of
from benchmarks.on_gpu.variants import BY_NAME, Bench, fallbacks
from bt_fast.device import synchronize

TRACED = ("bullet", "bullet, graphs", "bullet, streams", "bullet, streams, captured")
REHEARSED = ("bullet", "bullet, streams")
STREAMS = "bullet, streams"
WARM = 3
OVERLAP = 0.02  # of the busy time; below it, chains do not count as overlapping


def run(context: Context) -> Verdict:
    """Reports the share of the GPU's busy time with work on at least two streams, and writes the trace to a file."""
    model = cases(context.minutes, context.rehearsal)[0][0]
    with stand_in(context), fallbacks() as fell_back:
        bench = Bench(model, "tf32", batch_size(context.rehearsal), device_of(context), tiny=context.rehearsal)
        works = {name: bench.iteration(BY_NAME[name]) for name in (REHEARSED if context.rehearsal else TRACED)}
        for work in works.values():
            for _ in range(WARM):
                bench.ready()
                work()
        synchronize(bench.device)
        traced({STREAMS: lambda: None}, bench.device, host=True)  # for the profiler's start
        bench.ready()
        trace = traced(works, bench.device, host=True)
    with gzip.open(Path(context.scratch) / "trace.json.gz", "wt") as file:
        json.dump({"rehearsal": context.rehearsal, **trace}, file)
    lines = []
    for name in works:
        events = work_of(trace, name)
        begin, end = range_of(trace, name)
        streams = len({e.get("args", {}).get("stream") for e in events})
        result = {"launches": len(events), "streams": streams, "range": (end - begin) / 1e6, **busy(events)}
        context.record("overlap", model=model, variant=name, **result)
        if result["busy"]:
            lines.append(f"{name}: {result['overlapping'] / result['busy']:.0%} of {1e3 * result['busy']:.1f} ms")
    if fell_back:
        return FAILED, fell_back[0]
    if context.rehearsal:
        return PASSED, "traced on the CPU, where there are no streams"
    if not lines:
        return FAILED, "the trace holds no work of the GPU"
    last = next(r for r in context.records("overlap") if r["variant"] == STREAMS)
    overlaps = last["overlapping"] > OVERLAP * last["busy"]
    return PASSED, f"chains {'overlap' if overlaps else 'do not overlap'}: two streams at work in " + "; ".join(lines)
