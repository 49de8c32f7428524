"""Stage e: bytes per second of the step kernel and of the start, compared with this card's copies of the same bytes.

Each is timed as one graph of many launches, so that gaps between launches do not count: on so many sets of images that
none is still in the cache when it comes again ("cold"), and on one set ("warm").
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
from typing import Any

import torch
from test_kernels import bandwidth

from benchmarks.on_gpu.rehearsal import device_of, stand_in
from benchmarks.on_gpu.stage import CUT, PASSED, Context, Verdict
from bt_fast import ops
from bt_fast.device import synchronize
from bt_fast.ops.pgd_step import launch_linf

start = import_module("bt_fast.ops.gather_start")  # the op of this name hides the file

SIZES, REHEARSED_SIZES = (128, 8192, 65536), (2, 4, 8)
SHAPE = (3, 32, 32)
CACHES = 4.0  # how many times the cache all sets together are
MOVED = 2 << 30  # least bytes of a run: most of a millisecond, since a graph takes microseconds to start
REPEATS = 5  # runs
LEAST = 4.0  # seconds: with less, no size is begun
SIDE = 8192  # of the products that show the card's FLOP rate

Call = Callable[[], object]


def run(context: Context) -> Verdict:
    """Measures the share of a copy's speed that the kernels reach, by size."""
    device = device_of(context)
    if device.type == "cuda":
        context.record("copy", bytes_per_second=bandwidth(device))
        products(context, device)
    messages = []
    for m in REHEARSED_SIZES if context.rehearsal else SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            for name, make in (("step", step), ("start", gather)):
                if context.left < LEAST:
                    return CUT, "; ".join(messages)
                with stand_in(context):
                    result = measured(make, m, dtype, device)
                context.record("kernel", name=name, m=m, dtype=str(dtype).removeprefix("torch."), **result)
                if dtype == torch.float32:
                    share = result["copy_cold_seconds"] / result["cold_seconds"]
                    rate = result["bytes"] / result["copy_cold_seconds"] / 1e12
                    messages.append(f"{name} {m}: {share:.2f} of a copy's {rate:.2f} TB/s")
    return PASSED, "; ".join(messages)


def measured(make: Callable[..., tuple[Call, int]], m: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Returns the seconds of a call and of a copy of the same bytes, cold and warm."""
    first, moved = make(m, dtype, device)
    calls = [first, *(make(m, dtype, device)[0] for _ in range(sets(moved, device) - 1))]
    copies = [copy(moved, device) for _ in calls]
    return {
        "bytes": moved,
        "sets": len(calls),
        "cold_seconds": seconds(often(calls, moved, device), device),
        "warm_seconds": seconds(often(calls[:1], moved, device), device),
        "copy_cold_seconds": seconds(often(copies, moved, device), device),
        "copy_warm_seconds": seconds(often(copies[:1], moved, device), device),
    }


def often(calls: list[Call], moved: int, device: torch.device) -> list[Call]:
    """Repeats the calls in turn until the run moves enough bytes to take longer than microseconds."""
    if device.type != "cuda":
        return calls
    return calls * -(-MOVED // (moved * len(calls)))


def sets(moved: int, device: torch.device) -> int:
    """Returns the number of sets of this many bytes that make `CACHES` times the card's cache."""
    if device.type != "cuda":
        return 2
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 50 << 20)
    return max(2, int(-(-CACHES * cache // moved)))


def step(m: int, dtype: torch.dtype, device: torch.device) -> tuple[Call, int]:
    """Returns the ℓ∞ step of m images, and the bytes that it moves: three images read, one written."""
    given: dict[str, Any] = {"dtype": dtype, "device": device}
    clean, gradient = torch.rand(m, *SHAPE, **given), torch.randn(m, *SHAPE, **given)
    size = torch.full((m,), 0.007, device=device)
    counts = torch.full((m,), 10, device=device), torch.zeros((), dtype=torch.int64, device=device)
    faulty = torch.zeros(m, dtype=torch.int32, device=device)
    images = (clean.clone(), gradient, clean, size.to(dtype), 0.031, 0.0, 1.0)
    run = launch_linf if device.type == "cuda" else ops.linf_step_
    return lambda: run(*images, steps=counts[0], step=counts[1], faulty=faulty), 4 * clean.nbytes


def gather(m: int, dtype: torch.dtype, device: torch.device) -> tuple[Call, int]:
    """Returns the sorted start of m images, and the bytes that it moves: an image read, two written."""
    x, order = torch.rand(m, *SHAPE, dtype=dtype, device=device), torch.randperm(m, device=device)
    steps, state = torch.full((m,), 10, device=device), torch.tensor([1, 2], device=device)
    if device.type != "cuda":  # only its traffic; the kernel's own tests check its results
        return lambda: (x[order], x.clone()), 3 * x.nbytes
    return lambda: start.launch_gather_start(x, order, steps, state, "normal", 0.001), 3 * x.nbytes


def copy(moved: int, device: torch.device) -> Call:
    """Returns a copy that reads and writes this many bytes in total."""
    source = torch.rand(moved // 8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def seconds(calls: list[Call], device: torch.device) -> float:
    """Returns the seconds of one call: the least of several runs of all calls, in a graph."""
    stream = torch.cuda.Stream(device)
    synchronize(device)  # the calls' inputs were written on another stream
    with torch.cuda.stream(stream):
        calls[0]()  # a first launch before the capture
        synchronize(device)
        graph = torch.cuda.CUDAGraph()
        kept = []
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                result = call()
                if calls[0] is not calls[-1]:  # several sets: no result replaces another in the cache
                    kept.append(result)
        graph.replay()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        synchronize(device)
    kept.clear()
    return min(a.elapsed_time(b) for a, b in pairwise(events)) / 1e3 / len(calls)


def products(context: Context, device: torch.device) -> None:
    """Measures the card's FLOP rate in each precision, on one large product of random matrices."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    for precision, dtype in (("float32", torch.float32), ("tf32", torch.float32), ("bfloat16", torch.bfloat16)):
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        a, b = (torch.randn(SIDE, SIDE, dtype=dtype, device=device) for _ in range(2))
        taken = []
        for _ in range(4):
            synchronize(device)
            begin = time.perf_counter()
            a @ b
            synchronize(device)
            taken.append(time.perf_counter() - begin)
        context.record("product", precision=precision, flops_per_second=2 * SIDE**3 / min(taken[1:]))
    torch.backends.cuda.matmul.allow_tf32 = allowed
