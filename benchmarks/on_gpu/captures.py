"""Stage f: the seconds of a capture, the bytes that graphs hold, and the number of iterations after which this pays."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from benchmarks.on_gpu.plan import batch_size, cases
from benchmarks.on_gpu.rehearsal import device_of, stand_in
from benchmarks.on_gpu.stage import CUT, FAILED, PASSED, Context, Verdict
from benchmarks.on_gpu.variants import BY_NAME, Bench, Variant, fallbacks
from bt_fast.attack import device as engine
from bt_fast.device import synchronize

CAPTURED = ("bullet, graphs", "bullet, streams", "bullet, captured", "optimised, captured")
REHEARSED = ("bullet, streams", "bullet, captured")
REPEATS = 3  # of a replayed iteration
LEAST = 5.0  # seconds: with less, no variant is begun


def run(context: Context) -> Verdict:
    """Measures seconds, bytes and graphs of each kind's captures, each on its own network; one shares memory."""
    model = cases(context.minutes, context.rehearsal)[0][0]
    messages, wrong = [], False
    with stand_in(context):
        for number, name in enumerate(REHEARSED if context.rehearsal else CAPTURED):
            if context.left < LEAST:
                return CUT, "; ".join(messages)
            bench = Bench(model, "tf32", batch_size(context.rehearsal), device_of(context), tiny=context.rehearsal)
            eager = repeated(bench, bench.iteration(Variant("bullet")))
            if number == 0:
                context.record("eager", model=model, seconds=eager)
            result = captured(bench, BY_NAME[name])
            context.record("capture", model=model, variant=name, **result)
            wrong |= result["fell_back"] is not None
            messages.append(
                f"{name}: {result['captures']} captures, {result['capture_seconds']:.2f} s, "
                f"{result['held_bytes'] / 2**20:.0f} MiB" + (f", {result['fell_back']}" if result["fell_back"] else "")
            )
    return FAILED if wrong else PASSED, "; ".join(messages)


def captured(bench: Bench, variant: Variant) -> dict[str, Any]:
    """Runs the iterations of a variant until it is replayed.

    `capture_seconds` are those inside captures; `first_seconds` those of the iterations before the first replayed one,
    each including additional work for a capture (such as its warm-up). `held_bytes` are the bytes that torch keeps for
    the graphs after all else is freed, `driver_bytes` those missing on the card, which include the graphs themselves.
    """
    before = held(bench.device)
    work, first = bench.iteration(variant), []
    with fallbacks() as fell_back, counted() as seconds:
        for _ in range(REPEATS):
            first.append(once(bench, work))
        replayed = repeated(bench, work)
    after = held(bench.device)
    return {
        "captures": len(seconds),
        "capture_seconds": sum(seconds),
        "first_seconds": first,
        "replayed_seconds": replayed,
        "held_bytes": after[0] - before[0],
        "driver_bytes": after[1] - before[1],
        "fell_back": fell_back[0] if fell_back else None,
    }


@contextmanager
def counted() -> Iterator[list[float]]:
    """Yields the seconds of each capture made inside: of a step, or of an update's forward or backward."""
    seconds: list[float] = []
    capture = engine.capture

    @contextmanager
    def timed(*given: Any, **options: Any) -> Iterator[Any]:
        begin = time.perf_counter()
        with capture(*given, **options) as graph:
            yield graph
        seconds.append(time.perf_counter() - begin)

    with mock.patch.object(engine, "capture", timed):
        yield seconds


def once(bench: Bench, work: Callable[[], None]) -> float:
    """Returns the seconds of an iteration."""
    bench.ready()
    synchronize(bench.device)
    begin = time.perf_counter()
    work()
    synchronize(bench.device)
    return time.perf_counter() - begin


def repeated(bench: Bench, work: Callable[[], None]) -> float:
    """Returns the median seconds of some iterations."""
    return statistics.median(once(bench, work) for _ in range(REPEATS))


def held(device: torch.device) -> tuple[int, int]:
    """Returns the bytes that torch has reserved and cannot return, and the bytes in use on the card."""
    if device.type != "cuda":
        return 0, 0
    gc.collect()
    synchronize(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return torch.cuda.memory_reserved(device), total - free
