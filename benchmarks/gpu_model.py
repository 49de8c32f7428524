"""Models the time that a device needs for a sequence of kernels: PREDICTIONS, for machines without a GPU.

A small discrete-event simulation. The host walks a program and launches kernels on streams, which takes time; each
stream runs its kernels one after another; a kernel is cut into tiles, each of which keeps one multiprocessor (SM) busy;
the kernels of several streams share the SMs.

    host      an eager launch occupies it `launch_seconds` (the ops of this package: `op_seconds`), a whole graph
              `graph_seconds`. A kernel cannot start before its launch is over.
    start     a kernel's first tile starts `start_seconds` after its launch is over and the kernel before it in the
              stream has ended; within a graph, `node_seconds` after.
    tiles     a matrix product [rows, depth] x [depth, columns] is cut into tiles of r x c outputs, a power of 2 each
              between 32 and 128; everything else into tiles of 8192 elements. Products with fewer tiles than SMs are
              also cut along their depth.
    seconds   of a tile, on its SM: max(FLOPs / fill / (FLOP rate / SMs), bytes / (bandwidth / SMs)), where FLOPs and
              bytes are the kernel's divided by its tiles, and fill is the share of the tiles' outputs that exist.
              Thus a kernel alone on the device takes ceil(tiles / SMs) waves of that.
    sharing   a free SM takes the next tile of the kernel that started first, of all that have tiles left.

Not modelled: caches, clocks that follow the power limit, cuDNN's choice of algorithm and its changes of layout, the
allocator, Python's garbage collection, other users.
With several streams more work or a later launch can make the end come earlier, as in every such schedule (Graham 1969);
in one stream it cannot.
"""

from __future__ import annotations

import functools
import heapq
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

Kind = Literal[
    "conv", "conv_input", "conv_weight", "matmul", "norm", "norm_backward", "pool", "pool_backward", "stream"
]
PRODUCTS: frozenset[Kind] = frozenset({"conv", "conv_input", "conv_weight", "matmul"})


@dataclass(frozen=True)
class Kernel:
    """The work of one launch.

    Attributes:
        name: what it computes, for people.
        kind: the device's rate that applies.
        flops: floating-point operations, as torch counts them: 0 for all but products.
        bytes: read and written.
        rows, columns, depth: of a product's outputs, and the terms of each sum; else the elements, 1, 1.
        fused: one of this package's own ops, whose launch takes the host longer.
    """

    name: str
    kind: Kind
    flops: int
    bytes: int
    rows: int
    columns: int = 1
    depth: int = 1
    fused: bool = False


@dataclass(frozen=True)
class Tiles:
    """The number of a kernel's equal tiles, and the seconds that each keeps one SM busy."""

    count: int
    seconds: float


class Device(Protocol):
    """The interface of a simulated device. Times are in seconds."""

    @property
    def sms(self) -> int:
        """The number of tiles that run at a time."""

    @property
    def asynchronous(self) -> bool:
        """Whether the host continues while a kernel runs."""

    @property
    def graph_seconds(self) -> float:
        """The host's time to launch a whole graph."""

    @property
    def start_seconds(self) -> float:
        """The time from a launch to its first tile."""

    @property
    def node_seconds(self) -> float:
        """The time from the previous kernel's end to a kernel's first tile within a graph."""

    @property
    def wait_seconds(self) -> float:
        """The time from the end of the awaited work until the host continues."""

    def launch_seconds_of(self, kernel: Kernel) -> float:
        """The host's time to launch a kernel eagerly."""

    def tiles(self, kernel: Kernel) -> Tiles:
        """The tiles of a kernel."""


@dataclass(frozen=True)
class Gpu:
    """The figures of a GPU. Rates are for dense operands and the whole device; times are in seconds.

    The data sheets give SMs, peaks and bandwidth. The rest is ASSUMED, the same for all GPUs, since no data sheet gives
    it:

    Attributes:
        fp32, tf32: FLOP/s. With torch's defaults convolutions run in TF32 and linear layers in FP32.
        bandwidth: bytes/s.
        product_efficiency: the share of the peak that a product reaches while all SMs work on full tiles. Assumed.
        memory_efficiency: the share of the bandwidth that streaming reaches. Assumed.
        launch_seconds: the host's time for an operation of eager PyTorch, forward and backward mixed. Assumed.
        op_seconds: the same for a custom op in Python that launches a Triton kernel. Assumed; its dispatch alone takes
            25 to 50 µs on the CPU.
        graph_seconds: the host's time for replaying a graph. Assumed.
        start_seconds: from one kernel of a stream to the next. Assumed.
        node_seconds: the same within a graph. Assumed; CUDA.jl documents 70 µs for a graph of 80 small kernels.
        wait_seconds: from an event until the waiting host continues. Assumed.
    """

    name: str
    sms: int
    fp32: float
    tf32: float
    bandwidth: float
    product_efficiency: float = 0.5
    memory_efficiency: float = 0.85
    launch_seconds: float = 7e-6
    op_seconds: float = 40e-6
    graph_seconds: float = 10e-6
    start_seconds: float = 2e-6
    node_seconds: float = 1e-6
    wait_seconds: float = 10e-6
    asynchronous: bool = True

    def launch_seconds_of(self, kernel: Kernel) -> float:
        """`op_seconds` for this package's ops, else `launch_seconds`."""
        return self.op_seconds if kernel.fused else self.launch_seconds

    def tiles(self, kernel: Kernel) -> Tiles:
        """Tiles by the module's equations."""
        fill, flop_rate = 1.0, self.fp32
        if kernel.kind in PRODUCTS:
            r, c = _tile_side(kernel.rows), _tile_side(kernel.columns)
            across, down = -(-kernel.columns // c), -(-kernel.rows // r)
            count = across * down
            fill = kernel.rows * kernel.columns / (count * r * c)
            count *= max(1, min(self.sms // count, -(-kernel.depth // SPLIT_DEPTH)))
            flop_rate = self.fp32 if kernel.kind == "matmul" else self.tf32
        else:
            count = max(1, -(-kernel.rows // STREAM_TILE))
        compute = kernel.flops / count / fill / (flop_rate * self.product_efficiency / self.sms)
        memory = kernel.bytes / count / (self.bandwidth * self.memory_efficiency / self.sms)
        return Tiles(count, max(compute, memory))


STREAM_TILE = 8192  # elements: the 2048 threads that an SM holds, 128 bits each of float32, twice
SPLIT_DEPTH = 512  # a product's depth is cut into pieces no shorter than this


def _tile_side(size: int) -> int:
    return min(128, max(32, 1 << (size - 1).bit_length()))


GPUS = {
    # NVIDIA A100 data sheet (June 2021), SXM4 80 GB: 19.5 TFLOPS FP32, 156 TF32 dense, 2039 GB/s; 108 SMs (GA100 white
    # paper)
    "a100": Gpu("A100 SXM 80 GB", sms=108, fp32=19.5e12, tf32=156e12, bandwidth=2.039e12),
    # NVIDIA H100 data sheet, SXM5: 67 TFLOPS FP32, 989 TF32 with sparsity, so 494.5 dense, 3.35 TB/s; 132 SMs (GH100
    # white paper)
    "h100": Gpu("H100 SXM", sms=132, fp32=67e12, tf32=494.5e12, bandwidth=3.35e12),
    # NVIDIA HGX B200 data sheet, an eighth of the board's 600 TFLOPS FP32, 18 PFLOPS TF32 with sparsity (so 1.125 dense
    # each) and 62 TB/s; no data sheet gives the 148 SMs, which tables of its specification do
    "b200": Gpu("B200 SXM", sms=148, fp32=75e12, tf32=1.125e15, bandwidth=7.75e12),
}


@dataclass(frozen=True)
class Launch:
    """A launch on a stream: of one eager kernel, or of all kernels of a graph."""

    kernels: tuple[Kernel, ...]
    stream: int = 0
    graph: bool = False


@dataclass(frozen=True)
class Record:
    """An event that happens when the stream has finished its current work."""

    event: int
    stream: int = 0


@dataclass(frozen=True)
class StreamWait:
    """Makes the stream's later work wait for the event."""

    event: int
    stream: int = 0


@dataclass(frozen=True)
class HostWait:
    """Makes the host wait for the event."""

    event: int


Action = Launch | Record | StreamWait | HostWait


@dataclass(frozen=True)
class Timeline:
    """The result of a simulation, in seconds.

    Attributes:
        seconds: until host and device are done.
        host_seconds: the host's work, without its waits.
        device_seconds: during which at least one tile ran.
        sm_seconds: busy, summed over all SMs.
    """

    seconds: float
    host_seconds: float
    device_seconds: float
    sm_seconds: float


def simulate(program: Sequence[Action], device: Device) -> Timeline:
    """Simulates a program on a device. The same input gives the same result.

    Raises:
        ValueError: the program waits for an event that is never recorded.
    """
    return _Simulation(program, device).run()


@dataclass(eq=False)
class _Running:
    """A kernel in progress, with the numbers of its tiles still to start and to end."""

    stream: int
    tiles: Tiles
    unstarted: int
    unended: int


@dataclass(frozen=True, eq=False)
class _Queued:
    kernel: Kernel
    gap: float


@dataclass(eq=False)
class _Stream:
    queue: deque[_Queued | Record | StreamWait] = field(default_factory=deque)
    busy: bool = False  # a kernel of this stream starts or runs


class _Simulation:
    """The device and its agenda; the host is a generator that yields what it waits for."""

    def __init__(self, program: Sequence[Action], device: Device) -> None:
        self._device = device
        self._now = 0.0
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._entries = 0  # entries of the same time happen in the order of their creation
        self._streams: dict[int, _Stream] = {}
        self._happened: set[int] = set()
        self._running: list[_Running] = []  # kernels with tiles left to start, in the order of their starts
        self._free = device.sms
        self._cut: dict[Kernel, Tiles] = {}
        self._host = self._walk(program)
        self._host_awaits: int | None = None
        self._host_done = False
        self._host_seconds = self._device_seconds = self._sm_seconds = 0.0

    def run(self) -> Timeline:
        self._resume_host()
        while self._agenda:
            time, _, happen = heapq.heappop(self._agenda)
            busy = self._device.sms - self._free
            self._device_seconds += (time - self._now) * (busy > 0)
            self._sm_seconds += (time - self._now) * busy
            self._now = time
            happen()
            if not self._agenda or self._agenda[0][0] > time:  # only after all entries of this time
                self._start_tiles()
        if not self._host_done or any(stream.queue for stream in self._streams.values()):
            raise ValueError("the program waits for an event that is never recorded")
        return Timeline(self._now, self._host_seconds, self._device_seconds, self._sm_seconds)

    def _in(self, seconds: float, happen: Callable[[], None]) -> None:
        self._entries += 1
        heapq.heappush(self._agenda, (self._now + seconds, self._entries, happen))

    # The host

    def _walk(self, program: Sequence[Action]) -> Iterator[float | HostWait]:
        """Yields seconds of work, or the event to wait for."""
        for action in program:
            if isinstance(action, HostWait):
                if action.event not in self._happened:
                    yield action
                    yield self._device.wait_seconds
                continue
            if isinstance(action, Launch):
                seconds = self._device.graph_seconds
                if not action.graph:
                    seconds = sum(self._device.launch_seconds_of(kernel) for kernel in action.kernels)
                self._host_seconds += seconds
                yield seconds
                self._enqueue(action)
                if not self._device.asynchronous:
                    self._give(action.stream, Record(-1, action.stream))
                    yield HostWait(-1)
                    self._happened.discard(-1)
            else:
                self._give(action.stream, action)

    def _resume_host(self) -> None:
        """Lets the host work until it must wait or its work takes time."""
        for wish in self._host:
            if isinstance(wish, HostWait):
                if wish.event not in self._happened:
                    self._host_awaits = wish.event
                    return
            elif wish:
                self._in(wish, self._resume_host)
                return
        self._host_done = True

    # The streams

    def _enqueue(self, launch: Launch) -> None:
        for i, kernel in enumerate(launch.kernels):
            within = launch.graph and i > 0
            self._give(
                launch.stream, _Queued(kernel, self._device.node_seconds if within else self._device.start_seconds)
            )

    def _give(self, number: int, item: _Queued | Record | StreamWait) -> None:
        self._streams.setdefault(number, _Stream()).queue.append(item)
        self._advance(number)

    def _advance(self, number: int) -> None:
        """Processes the head of a stream's queue as far as possible now."""
        stream = self._streams[number]
        while stream.queue and not stream.busy:
            head = stream.queue[0]
            if isinstance(head, StreamWait) and head.event not in self._happened:
                return
            stream.queue.popleft()
            if isinstance(head, Record):
                self._happen(head.event)
            elif isinstance(head, _Queued):
                stream.busy = True
                if head.kernel not in self._cut:
                    self._cut[head.kernel] = self._device.tiles(head.kernel)
                tiles = self._cut[head.kernel]
                running = _Running(number, tiles, tiles.count, tiles.count)
                self._in(head.gap, functools.partial(self._running.append, running))

    def _happen(self, event: int) -> None:
        self._happened.add(event)
        if self._host_awaits == event:
            self._host_awaits = None
            self._in(0.0, self._resume_host)
        for number, stream in self._streams.items():
            if stream.queue and stream.queue[0] == StreamWait(event, number):
                self._in(0.0, functools.partial(self._advance, number))

    # The multiprocessors

    def _start_tiles(self) -> None:
        for kernel in self._running:
            count = min(self._free, kernel.unstarted)
            if count:
                kernel.unstarted -= count
                self._free -= count
                self._in(kernel.tiles.seconds, functools.partial(self._end_tiles, kernel, count))
        self._running[:] = [kernel for kernel in self._running if kernel.unstarted]

    def _end_tiles(self, kernel: _Running, count: int) -> None:
        self._free += count
        kernel.unended -= count
        if not kernel.unended:
            self._streams[kernel.stream].busy = False
            self._advance(kernel.stream)


def kernels_of(program: Iterable[Action]) -> list[Kernel]:
    """Returns all kernels of a program, in the order of their launches."""
    return [kernel for action in program if isinstance(action, Launch) for kernel in action.kernels]
