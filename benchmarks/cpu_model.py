"""Models this machine's CPU as a device of the GPU model, with figures from timing single layers and operations.

None of these layers belongs to the networks whose iterations are then predicted. As in an iteration, their operands are
not in the cache and their results are kept: a loop over the same operands runs up to 1.4 times as fast.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.ops import aten

from benchmarks.gpu_model import Kernel, Tiles, simulate
from benchmarks.gpu_trace import trace_on_cpu
from bt_fast import BulletTrain, trades_loss

GRAIN = 32768  # elements: at::internal::GRAIN_SIZE, below which torch uses one core
VECTOR = 16  # float32 in 512 bits: oneDNN pads channels to it
COPY = 2  # a copy reads and writes
REPEATS = 7
ATTEMPTS = 5
OTHERS, SLACK = (
    0.05,
    0.03,
)  # how much of the machine's time, and how many seconds, other processes may take: its clock ticks at 10 ms
AT_ONCE = 192 << 20  # bytes of a round's operands and results: several times the size of a cache

Call = tuple[Callable[[], Any], int]  # an operation and the bytes that it reads and writes


@dataclass(frozen=True)
class Cpu:
    """A device that finishes each operation, on all cores, before the next one begins.

    A convolution takes the time of its FLOPs, including those of padded channels, and of a copy of its operands and
    result, since oneDNN converts them into its blocked layout and back. Other operations take the longer of the times
    of their FLOPs and of their bytes.

    Attributes:
        flop_rates: FLOP/s by the kind of product.
        byte_rates: bytes/s by kind of operation.
        launch_seconds: the host's time for an operation on one number, with layers, autograd and the iteration's
            Python.
        product_seconds: the same for a product, by kind.
        op_seconds: the same for an op written in Python, without its work.
    """

    sms: int
    flop_rates: dict[str, float]
    byte_rates: dict[str, float]
    launch_seconds: float
    product_seconds: dict[str, float]
    op_seconds: float
    graph_seconds: float = 0.0
    start_seconds: float = 0.0
    node_seconds: float = 0.0
    wait_seconds: float = 0.0
    asynchronous: bool = False

    def launch_seconds_of(self, kernel: Kernel) -> float:
        if kernel.fused:
            return self.op_seconds
        return self.product_seconds.get(kernel.kind, self.launch_seconds)

    def tiles(self, kernel: Kernel) -> Tiles:
        if kernel.kind.startswith("conv"):
            copies = COPY * kernel.bytes / self.byte_rates["stream"]
            return Tiles(self.sms, padded_flops(kernel) / self.flop_rates[kernel.kind] + copies)
        if kernel.kind == "matmul":
            memory = kernel.bytes / self.byte_rates["stream"]
            return Tiles(self.sms, max(kernel.flops / self.flop_rates["matmul"], memory))
        seconds = kernel.bytes / self.byte_rates[kernel.kind]
        return Tiles(self.sms, seconds) if kernel.rows >= GRAIN else Tiles(1, self.sms * seconds)


def padded_flops(kernel: Kernel) -> float:
    """Returns the FLOPs of a convolution with its result's channels padded to whole vectors."""
    channels = kernel.rows if kernel.kind == "conv_weight" else kernel.columns
    return kernel.flops * (-(-channels // VECTOR) * VECTOR) / channels


def keep_memory() -> None:
    """Makes the C library keep freed memory, like CUDA's allocator, so that no page is fetched again."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(-4, 0)  # M_MMAP_MAX: large tensors get no separate mapping
        library.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing is returned to the system


def calibrate() -> Cpu:
    """Times one layer or operation of each kind."""
    byte_rates = {kind: moved / seconds for kind, make in STREAMS.items() for seconds, moved in [timed(make)]}
    stream = byte_rates["stream"]
    flop_rates, product_seconds = {}, {}
    for kind, make in CONVOLUTIONS.items():
        product_seconds[kind] = repeated(make(*TINY)[0])
        seconds, moved = timed(lambda make=make: make(*LAYER))
        flop_rates[kind] = LAYER_FLOPS / (seconds - product_seconds[kind] - COPY * moved / stream)
    product_seconds["matmul"] = repeated(_matmul(1, 16, 16)[0])
    flop_rates["matmul"] = 2 * 96 * 640 * 320 / timed(lambda: _matmul(96, 640, 320))[0]
    nothing = torch.library.custom_op("benchmarks::nothing", _nothing, mutates_args=())
    op_seconds = repeated(lambda: nothing(torch.empty(1)))
    cpu = Cpu(torch.get_num_threads(), flop_rates, byte_rates, _launch_seconds(), product_seconds, op_seconds)
    return _with_host(cpu)


def _with_host(cpu: Cpu) -> Cpu:
    """Adds an iteration's own Python to the host's times of all operations, measured on a layer of four pixels."""
    model, x, y = (
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 10)),
        torch.rand(4, 1, 2, 2),
        torch.arange(4),
    )
    optimizer, bullet = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, foreach=False), BulletTrain()

    def iteration() -> None:
        trades_loss(model, x, y, optimizer, bullet=bullet).backward()
        optimizer.step()

    iteration()
    longer = repeated(iteration, 20) / simulate(trace_on_cpu(iteration), cpu).seconds
    return dataclasses.replace(
        cpu,
        launch_seconds=longer * cpu.launch_seconds,
        product_seconds={kind: longer * seconds for kind, seconds in cpu.product_seconds.items()},
        op_seconds=longer * cpu.op_seconds,
    )


def _nothing(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def _launch_seconds() -> float:
    """Returns the host's seconds for an operation on one number: half of a layer's forward and backward."""
    layers = torch.nn.Sequential(*(torch.nn.ReLU() for _ in range(500)))
    one = torch.ones(1, requires_grad=True)
    return repeated(lambda: torch.autograd.grad(layers(one), one), 1) / (2 * len(layers))


def timed(make: Callable[[], Call]) -> tuple[float, int]:
    """Returns seconds and bytes of a call, each round on new operands; the median of several rounds."""
    first, moved = make()
    calls = [first, *(make()[0] for _ in range(AT_ONCE // moved))]
    rounds = [quiet_seconds(lambda: [call() for call in calls]) for _ in range(REPEATS + 1)]
    return statistics.median(rounds[1:]) / len(calls), moved


def repeated(call: Callable[[], Any], calls: int = 200) -> float:
    """Returns the seconds of a call with almost no work."""
    return statistics.median(quiet_seconds(lambda: [call() for _ in range(calls)]) for _ in range(REPEATS)) / calls


def quiet_seconds(work: Callable[[], Any], prepare: Callable[[], Any] = lambda: None) -> float:
    """Returns the seconds of `work()`, retried while other processes use the machine; finally of the quietest attempt.

    (Two processes with a thread on each core slow each other tenfold.)
    """
    attempts = []
    for _ in range(ATTEMPTS):
        prepare()
        others, start = _others_seconds(), time.perf_counter()
        kept = work()
        seconds, others = time.perf_counter() - start, _others_seconds() - others
        del kept
        attempts.append((max(0.0, others - SLACK) / seconds, seconds))
        if attempts[-1][0] < OTHERS:
            return seconds
        time.sleep(0.3)
    return min(attempts)[1]


def _others_seconds() -> float:
    """Returns the processor time that other processes have used since the start, if the system reports it."""
    try:
        user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    except (OSError, ValueError):
        return 0.0
    own = os.times()
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK") - own.user - own.system


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _images() -> torch.Tensor:
    return torch.rand(64, 24, 20, 20)


def _add() -> Call:
    x = _images()
    return lambda: x + 1, 2 * _bytes(x)


def _norm() -> Call:
    x, s = _images(), torch.ones(24)
    return lambda: aten.native_batch_norm(x, s, s, s, s, False, 0.1, 1e-5), 2 * _bytes(x)


def _norm_backward() -> Call:
    x, g, s = _images(), _images(), torch.ones(24)
    mask = [True, True, True]
    return lambda: aten.native_batch_norm_backward(g, x, s, s, s, s, s, False, 1e-5, mask), 3 * _bytes(x)


def _pool() -> Call:
    x = _images()
    out, indices = aten.max_pool2d_with_indices(x, [2, 2])
    return lambda: aten.max_pool2d_with_indices(x, [2, 2]), _bytes(x, out, indices)


def _pool_backward() -> Call:
    x = _images()
    g, i = aten.max_pool2d_with_indices(x, [2, 2])
    numbers = ([2, 2], [2, 2], [0, 0], [1, 1], False)
    return lambda: aten.max_pool2d_with_indices_backward(g, x, *numbers, i), _bytes(x, x, g, i)


STREAMS = {
    "stream": _add,
    "norm": _norm,
    "norm_backward": _norm_backward,
    "pool": _pool,
    "pool_backward": _pool_backward,
}


LAYER, TINY = (32, 48, 24), (1, 16, 2)  # images, channels, side
LAYER_FLOPS = 2 * (32 * 48 * 24 * 24) * (48 * 3 * 3)


def _layer(images: int, channels: int, side: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = (images, channels, side, side)
    return torch.rand(shape), torch.rand(shape), torch.rand(channels, channels, 3, 3)


def _convolution(images: int, channels: int, side: int) -> Call:
    y, x, w = _layer(images, channels, side)
    return lambda: torch.conv2d(x, w, padding=1), _bytes(y, x, w)


def _convolution_backward(mask: list[bool], *layer: int) -> Call:
    y, x, w = _layer(*layer)
    numbers = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    return lambda: aten.convolution_backward(y, x, w, None, *numbers, mask), _bytes(y, x, w)


def _matmul(rows: int, depth: int, columns: int) -> Call:
    a, b = torch.rand(rows, depth), torch.rand(depth, columns)
    return lambda: a @ b, _bytes(a, b) + 4 * rows * columns


CONVOLUTIONS: dict[str, Callable[..., Call]] = {
    "conv": _convolution,
    "conv_input": functools.partial(_convolution_backward, [True, False, False]),
    "conv_weight": functools.partial(_convolution_backward, [False, True, False]),
}
