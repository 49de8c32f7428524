"""Stage e: bytes per second of the step kernel and of the start, beside this card's own copies of the same bytes.

Each is timed as one graph of many launches, so that no gap between launches counts: on so many sets of images that none
is in the cache when its turn comes ("cold"), and on one set ("warm").
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

start = import_module("bt_fast.ops.gather_start")  # the op of that name hides the file

SIZES, REHEARSED_SIZES = (128, 8192, 65536), (2, 4, 8)
SHAPE = (3, 32, 32)
CACHES = 4.0  # times the cache that the sets together are larger
MOVED = 2 << 30  # bytes of a run, at least: most of a millisecond, since a graph takes microseconds to start
REPEATS = 5  # runs
LEAST = 4.0  # seconds: no size is begun with less
SIDE = 8192  # of the products that tell the card's own rate of FLOPs

Call = Callable[[], object]


def run(context: Context) -> Verdict:
    """The kernels' share of what a copy reaches, by size."""
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
    """Seconds of a call and of a copy of as many bytes, cold and warm."""
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
    """The calls in turn until they have moved so much that the run is no matter of microseconds."""
    if device.type != "cuda":
        return calls
    return calls * -(-MOVED // (moved * len(calls)))


def sets(moved: int, device: torch.device) -> int:
    """How many sets of so many bytes are `CACHES` times the card's cache."""
    if device.type != "cuda":
        return 2
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 50 << 20)
    return max(2, int(-(-CACHES * cache // moved)))


def step(m: int, dtype: torch.dtype, device: torch.device) -> tuple[Call, int]:
    """The ℓ∞ step of m images, and the bytes that it moves: three images read, one written."""
    given: dict[str, Any] = {"dtype": dtype, "device": device}
    clean, gradient = torch.rand(m, *SHAPE, **given), torch.randn(m, *SHAPE, **given)
    size = torch.full((m,), 0.007, device=device)
    counts = torch.full((m,), 10, device=device), torch.zeros((), dtype=torch.int64, device=device)
    faulty = torch.zeros(m, dtype=torch.int32, device=device)
    images = (clean.clone(), gradient, clean, size.to(dtype), 0.031, 0.0, 1.0)
    run = launch_linf if device.type == "cuda" else ops.linf_step_
    return lambda: run(*images, steps=counts[0], step=counts[1], faulty=faulty), 4 * clean.nbytes


def gather(m: int, dtype: torch.dtype, device: torch.device) -> tuple[Call, int]:
    """The sorted start of m images, and the bytes that it moves: an image read, two written."""
    x, order = torch.rand(m, *SHAPE, dtype=dtype, device=device), torch.randperm(m, device=device)
    steps, state = torch.full((m,), 10, device=device), torch.tensor([1, 2], device=device)
    if device.type != "cuda":  # what it moves; the kernel's own tests say what it computes
        return lambda: (x[order], x.clone()), 3 * x.nbytes
    return lambda: start.launch_gather_start(x, order, steps, state, "normal", 0.001), 3 * x.nbytes


def copy(moved: int, device: torch.device) -> Call:
    """A copy that reads and writes so many bytes together."""
    source = torch.rand(moved // 8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def seconds(calls: list[Call], device: torch.device) -> float:
    """Of one call: the least of several runs of all of them, in a graph."""
    stream = torch.cuda.Stream(device)
    synchronize(device)  # what the calls read was written on another stream
    with torch.cuda.stream(stream):
        calls[0]()  # launched once before a capture
        synchronize(device)
        graph = torch.cuda.CUDAGraph()
        kept = []
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                result = call()
                if calls[0] is not calls[-1]:  # several sets: no result takes the place of another in the cache
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
    """The card's own rate of FLOPs in each precision, from one large product of random matrices."""
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
