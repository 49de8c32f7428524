"""One case of stage d: exactness first, then times, costs and energy, each recorded at once."""

from __future__ import annotations

import faulthandler
import gc
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from benchmarks.on_gpu.rehearsal import device_of, stand_in
from benchmarks.on_gpu.stage import FAILED, PASSED, Context, Verdict
from benchmarks.on_gpu.traces import busy, traced, work_of
from benchmarks.on_gpu.variants import BASES, PLAIN, TOLERANCE, VARIANTS, Bench, Exactness, Variant, fallbacks, without
from bt_fast import PowerMonitor
from bt_fast.device import HostRead, synchronize

WARM, WARM_CAPTURED = 1, 3  # a capture takes place when its size comes again
ROUNDS, MOST_ROUNDS = 3, 8
CHECK_SHARE, WARM_SHARE = 0.3, 0.5  # of the remaining time: after it, no further variant is begun
HANGS = (10.0, 45.0)  # seconds until a variant's first runs count as hanging: half the case's time in this range
JOULES_SECONDS = (0.3, 1.5)  # least and most seconds for each variant
TRACE_SECONDS = 1.0  # to start, read and write a trace
KEPT = 2.0  # seconds for the process's end

# the baselines, and captures of each kind
REHEARSED = tuple(v for v in VARIANTS if v.name in ("reference", "optimised", "bullet, streams, captured"))

Work = dict[Variant, Callable[[], None]]


class LeftOutError(Exception):
    """Raised when a variant cannot be measured; it may have damaged this process."""


def measure(context: Context, model: str, precision: str, batch: int) -> Verdict:
    """Measures as much of a case as time permits, the most wanted first."""
    case = f"{model}/{precision}"
    context.record("case", case=case, model=model, precision=precision, batch=batch)
    fit = [v for v in without({r["variant"] for r in context.records("left_out")}) if v in variants_of(context)]
    with stand_in(context):
        bench = Bench(model, precision, batch, device_of(context), tiny=context.rehearsal)
        try:
            works = warm(context, case, bench, check(context, case, bench, fit))
        except LeftOutError as error:
            print(error)
            return FAILED, str(error)
        rounds(context, case, bench, works, 1 if context.rehearsal else ROUNDS)
        for measure_more in (count_flops, peaks, energy, more_rounds, busy_times):
            try:
                measure_more(context, case, bench, works)
            except Exception as error:  # the others may succeed
                traceback.print_exc()
                message = f"{type(error).__name__}: {error}".splitlines()[0]
                context.record("broke", case=case, message=f"{measure_more.__name__}: {message}")
    return PASSED, ""


def variants_of(context: Context) -> tuple[Variant, ...]:
    """Returns all variants; in a rehearsal one of each kind."""
    return REHEARSED if context.rehearsal else VARIANTS


@contextmanager
def trying(context: Context, case: str, variant: Variant) -> Iterator[None]:
    """Marks the first runs of a variant: if the process ends inside, or hangs, the variant is known."""
    context.record("trying", case=case, variant=variant.name)
    seconds = min(max(HANGS[0], context.left / 2), HANGS[1])
    faulthandler.dump_traceback_later(seconds * (10 if context.rehearsal else 1), exit=True)
    try:
        with fallbacks() as fell_back:
            yield
        synchronize(device_of(context))
    except Exception as error:
        raise _left_out(context, case, variant, f"{type(error).__name__}: {error}") from error
    finally:
        faulthandler.cancel_dump_traceback_later()
    for words in (words for words in fell_back if PLAIN in words):  # true of all variants of ours
        context.record("broke", case=case, variant=variant.name, message=words)
    if fell := [words for words in fell_back if PLAIN not in words]:
        raise _left_out(context, case, variant, fell[0])
    context.record("trying", case=case, variant=None)


def _left_out(context: Context, case: str, variant: Variant, message: str) -> LeftOutError:
    context.record("left_out", case=case, variant=variant.name, message=" ".join(message.split())[:500])
    return LeftOutError(f"{variant.name}: {message}")


def check(context: Context, case: str, bench: Bench, variants: list[Variant]) -> list[Variant]:
    """Returns the exact variants, the only ones to time. Once a network: float64 is the same in every precision."""
    model = case.split("/")[0]
    done = {r["variant"] for r in context.records("exact") if r["model"] == model}
    exactness, exact, enough = None, [], (1 - CHECK_SHARE) * context.left
    for variant in variants:
        if variant.name in done or variant.name in BASES:
            exact.append(variant)
            continue
        if context.left < enough and len(exact) > 2:
            context.record("no_time", case=case, variant=variant.name)
            continue
        exactness = exactness or Exactness(bench)
        with trying(context, case, variant):
            difference = exactness.difference(variant)
        if not difference <= TOLERANCE:
            message = f"not exact: an update in float64 differs by {difference:.2g} (allowed: {TOLERANCE:.0g})"
            raise _left_out(context, case, variant, message)
        context.record("exact", model=model, variant=variant.name, difference=difference)
        exact.append(variant)
    return exact


def warm(context: Context, case: str, bench: Bench, variants: list[Variant]) -> Work:
    """Runs and, where planned, captures the iterations of as many variants as time permits."""
    works: Work = {}
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()  # of the check in float64
    enough = (1 - WARM_SHARE) * context.left
    for variant in variants:
        if context.left < enough and len(works) > 2:
            context.record("no_time", case=case, variant=variant.name)
            continue
        work, before = bench.iteration(variant), bench.groups()
        runs = WARM_CAPTURED if variant.parts else WARM
        with trying(context, case, variant):
            for _ in range(runs):
                bench.ready()
                work()
                synchronize(bench.device)
        if variant.method == "bullet":
            sizes = [(now - then) / runs for now, then in zip(bench.groups(), before, strict=True)]
            context.record("groups", case=case, variant=variant.name, sizes=sizes)
        works[variant] = work
    for variant in works:  # captures return torch's unused memory, which the first round would request again
        if not variant.parts:
            bench.ready()
            works[variant]()
    synchronize(bench.device)
    gc.collect()  # no collection while times are taken
    return works


def rounds(context: Context, case: str, bench: Bench, works: Work, count: int, kept: float = KEPT) -> None:
    """Times variants in alternation and rotating order, while a further round fits beside the `kept` seconds."""
    longest = 0.0
    variants = list(works)
    for number in range(count):
        if context.left < kept + 1.2 * longest:
            return
        began = time.monotonic()
        seconds, host = {}, {}
        turn = number % len(variants)
        with fallbacks() as fell_back:
            for variant in variants[turn:] + variants[:turn]:
                seconds[variant.name], host[variant.name] = timed(bench, works[variant])
        context.record("round", case=case, seconds=seconds, host=host)
        for words in fell_back:
            context.record("broke", case=case, message=f"while times were taken: {words}")
        longest = max(longest, time.monotonic() - began)


def more_rounds(context: Context, case: str, bench: Bench, works: Work) -> None:
    """Runs more rounds while time permits, beside the traces."""
    if not context.rehearsal:
        rounds(context, case, bench, works, MOST_ROUNDS - ROUNDS, kept=traces_take(works))


def timed(bench: Bench, work: Callable[[], None]) -> tuple[float, float]:
    """Returns the seconds of an iteration, and the host's until all is enqueued, without its waits for the device.

    If the queue of launches is full the host waits as well, which counts.
    """
    bench.ready()
    synchronize(bench.device)
    with waits() as waited:
        begin = time.perf_counter()
        work()
        enqueued = time.perf_counter()
        synchronize(bench.device)
        end = time.perf_counter()
    return end - begin, enqueued - begin - sum(waited)


@contextmanager
def waits() -> Iterator[list[float]]:
    """Yields the seconds of each wait for a read of the device's counts."""
    waited: list[float] = []
    wait = HostRead.wait

    def timed_wait(read: HostRead) -> list[int]:
        begin = time.perf_counter()
        values = wait(read)
        waited.append(time.perf_counter() - begin)
        return values

    with mock.patch.object(HostRead, "wait", timed_wait):
        yield waited


def count_flops(context: Context, case: str, bench: Bench, works: Work) -> None:
    """Counts the FLOPs of each method, once for each network."""
    model = case.split("/")[0]
    done = {r["method"] for r in context.records("flops") if r["model"] == model}
    for variant in works:
        if variant.method not in done and context.left > KEPT:
            done.add(variant.method)
            context.record("flops", model=model, method=variant.method, flops=bench.flops(variant))


def peaks(context: Context, case: str, bench: Bench, works: Work) -> None:
    """Records the most memory that torch allocates in an iteration beyond that held before (weights, graphs, images).

    Not for replayed variants: a graph works in a separate pool, which torch does not count as allocated.
    """
    if bench.device.type != "cuda":
        return
    for variant, work in works.items():
        if variant.parts:
            continue
        if context.left < KEPT:
            return
        bench.workload.optimizer.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        bench.ready()
        work()
        synchronize(bench.device)
        result = {"peak": torch.cuda.max_memory_allocated() - before, "held": before}
        context.record("memory", case=case, variant=variant.name, **result, reserved=torch.cuda.memory_reserved())


def traces_take(works: Work) -> float:
    """Returns the seconds to keep for `busy_times`."""
    return KEPT + (len(works) + 1) * TRACE_SECONDS


def busy_times(context: Context, case: str, bench: Bench, works: Work) -> None:
    """Records how long the GPU works in an iteration, by its own clock. Runs last: a profiler may slow later work."""
    first = True
    for variant, work in list(works.items())[: 1 if context.rehearsal else None]:
        if context.left < KEPT + 2:
            return
        for _ in range(2 if first else 1):  # the profiler's first trace takes seconds, and may miss work
            bench.ready()
            synchronize(bench.device)
            trace = traced({variant.name: work}, bench.device, host=False)
        first = False
        events = work_of(trace)
        context.record("busy", case=case, variant=variant.name, launches=len(events), **busy(events))


def energy(context: Context, case: str, bench: Bench, works: Work) -> None:
    """Records the GPU's joules for an iteration of each variant, over as many iterations as fit into about a second."""
    least, most = JOULES_SECONDS
    seconds = min(most, 0.6 * (context.left - traces_take(works)) / len(works))
    if seconds < least:
        context.record("joules", case=case, variant=None, reason="no time was left")
        return
    counts: dict[str, int] = {}
    with PowerMonitor(bench.device) as monitor:
        for variant, work in works.items() if monitor.available else ():
            name = variant.name
            monitor.mark(name)
            end = time.monotonic() + seconds
            counts[name] = 0
            while not counts[name] or time.monotonic() < end:
                bench.ready()
                work()
                synchronize(bench.device)
                counts[name] += 1
            monitor.mark(f"after {name}")
            (summary, *_) = monitor.summary(name) or (None,)
            context.record(
                "joules",
                case=case,
                variant=name,
                joules=monitor.joules_per_sample(counts[name], name),
                iterations=counts[name],
                source=None if summary is None else summary.energy_source,
                watts=None if summary is None else summary.mean_power,
                sm_mhz=None if summary is None else summary.mean_sm_clock,
                throttle=None if summary is None else dict(summary.throttle or {}),
            )
    if not counts:
        context.record("joules", case=case, variant=None, reason=monitor.reason)
