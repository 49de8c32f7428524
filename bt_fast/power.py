"""Measures energy, power, utilisation, clocks, temperature and memory of GPUs during a block of code, through NVML.

Utilisation is the share of a window of 1/6 to 1 s in which some kernel ran: it says nothing about single kernels. The
counter of the total energy exists from Volta on but not on many virtual GPUs, and moves every 10 ms or more rarely;
the power of newer GPUs is an average over a second unless the instant one can be read. A value that a device does not
report is None, never 0.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack

from bt_fast.power_device import Device, Gpu, UnavailableError, driver_version, nvml, uuids_of
from bt_fast.power_samples import Sample, Summary, counted_energy, energy_of, integrated_power, power_within
from bt_fast.validation import real

__all__ = [
    "PowerMonitor",
    "Sample",
    "Summary",
    "counted_energy",
    "driver_version",
    "energy_of",
    "integrated_power",
    "power_within",
]


class PowerMonitor:
    """Measures the power and the energy of GPUs, by a thread, while its `with` block runs.

        with PowerMonitor() as monitor:
            train()
        print(monitor.joules_per_sample(50_000) if monitor.available else monitor.reason)

    Without a driver, or without a readable GPU, it does nothing and gives the `reason`. It raises nothing in the block:
    if a GPU is lost, earlier measurements are kept, and the summary says so; if one of several cannot be opened, the
    others are measured. Each block starts again. A sample takes about 0.5 kB: for a run of days choose an interval of a
    second.

    Args:
        devices: one or several torch devices, their indices, or UUIDs as printed by nvidia-smi -L; None is the current
            CUDA device. NVML's own numbers differ from torch's: devices are found by UUID.
        interval: seconds between samples.

    Attributes:
        reason: a sentence why there is nothing to measure, or None.
        missing: among several devices, those that could not be opened for the block, by UUID, with the reasons.

    Raises:
        TypeError: a device has another type, or the interval is not a number.
        ValueError: the interval is not greater than 0, or longer than a thread can wait, a device is given twice, or
            unknown to torch and the driver.
    """

    def __init__(self, devices: Device | Iterable[Device] | None = None, interval: float = 0.02) -> None:
        self._interval = real("interval", interval)
        if not 0 < interval < float("inf"):
            raise ValueError(
                f"interval must be a finite number of seconds greater than 0, got {interval}: write interval=0.02"
            )
        if interval > threading.TIMEOUT_MAX:
            raise ValueError(
                f"interval must be at most {threading.TIMEOUT_MAX:g} seconds, got a longer one: write interval=0.02"
            )
        self._uuids: list[str] = []
        self._gpus: list[Gpu] = []
        self._labels: list[str] = []  # of the spans
        self._opened = ExitStack()  # holds NVML for the block
        self._lock = threading.Lock()  # for reading: the block's thread reads at marks
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._began = self._ended = 0.0
        self.missing: Mapping[str, str] = {}
        self.reason: str | None = None
        try:
            self._uuids = uuids_of(devices)
        except UnavailableError as reason:
            self.reason = str(reason)

    @property
    def available(self) -> bool:
        """Whether there is something to measure."""
        return self.reason is None

    def __enter__(self) -> PowerMonitor:
        if self._thread is not None:
            raise RuntimeError("this PowerMonitor is in a block already: take another one")
        self._gpus, self._labels, self.missing = [], [], {}
        if self.available:
            try:
                self._open()
            except UnavailableError as reason:
                self.reason = str(reason)
        self._began, self._ended = time.perf_counter(), float("inf")
        if self.available:
            try:
                self._read()
                self._stop.clear()
                thread = threading.Thread(target=self._run, name="bt_fast.PowerMonitor", daemon=True)
                thread.start()
            except BaseException:  # there may be no memory for a thread
                self.__exit__()
                raise
            self._thread = thread
        return self

    def __exit__(self, *error: object) -> None:
        thread, self._thread = self._thread, None
        with self._opened:
            try:
                if thread is not None:
                    self._stop.set()
                    thread.join()
                    self._read()
            finally:
                self._ended = time.perf_counter()

    def _open(self) -> None:
        """Initialises NVML for the block, and opens each device."""
        missing = {}
        with ExitStack() as stack:
            library = stack.enter_context(nvml())
            for uuid in self._uuids:
                try:
                    self._gpus.append(Gpu(library, uuid))
                except library.NVMLError as error:
                    missing[uuid] = str(error)
            if not self._gpus:
                raise UnavailableError(f"NVML does not open the device: {'; '.join(missing.values())}")
            self._opened, self.missing = stack.pop_all(), missing

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self._read()

    def _read(self, label: str | None = None) -> None:
        """Takes one sample of each device; with a label, a span begins at it."""
        with self._lock:
            for gpu in self._gpus:
                gpu.read(starts_span=label is not None)
            if label is not None:
                self._labels.append(label)

    def mark(self, label: str) -> None:
        """Ends the current span and begins the span `label`, up to the next mark or the end of the block.

        It reads the devices immediately, in a few milliseconds each. ValueError if a span has that name, RuntimeError
        outside the block.
        """
        if label in self.labels:
            raise ValueError(f"label must be new, but there is a span {label!r}: give another name")
        if self._ended != float("inf"):
            raise RuntimeError(
                "mark must be called inside the monitor's block: write `with monitor: monitor.mark(...)`"
            )
        self._read(label)

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the spans, in their order."""
        return tuple(self._labels)

    @property
    def samples(self) -> tuple[Sample, ...]:
        """All samples so far, device by device."""
        return tuple(sample for gpu in self._gpus for sample in tuple(gpu.samples))

    @property
    def seconds(self) -> float:
        """The seconds that the block has run, measured or not; 0 before it."""
        return min(self._ended, time.perf_counter()) - self._began

    def summary(self, label: str | None = None) -> tuple[Summary, ...]:
        """Returns a summary for each device with samples: of the whole block, or of the span `label`.

        Inside the block it covers the samples so far. ValueError if there is no such span.
        """
        if label is not None and label not in self._labels:
            known = ", ".join(map(repr, self._labels)) or "none yet"
            raise ValueError(
                f"label must be one of {known}, got {label!r}: name a span that `mark` began, or leave label out"
            )
        k = None if label is None else self._labels.index(label)
        return tuple(summary for gpu in self._gpus if (summary := gpu.summary(k)))

    def joules(self, label: str | None = None) -> float | None:
        """Returns the joules of all devices together, in the whole block or in the span `label`.

        None if a device does not report them, was lost, or is missing. ValueError if there is no such span.
        """
        return self._total([s.joules if s.lost is None else None for s in self.summary(label)])

    def joules_during(self, intervals: Sequence[tuple[float, float]]) -> float | None:
        """Returns the joules of all devices together in some intervals of the block, from their power.

        Power is interpolated linearly between samples. So a reading that is an average over a second (`power_source`)
        says nothing about shorter intervals, and an instant one, updated every 0.1 s, nothing about much shorter ones.
        None if a device does not report its power, was lost, or has no samples around an interval.

        Args:
            intervals: begins and ends, in seconds of `time.perf_counter`.
        """
        return self._total([power_within(gpu.samples, intervals) for gpu in self._gpus])

    def _total(self, joules: list[float | None]) -> float | None:
        known = [j for j in joules if j is not None]
        return sum(known) if known and len(known) == len(self._uuids) else None

    def joules_per_sample(self, n: int, label: str | None = None) -> float | None:
        """Returns `joules` of the block or of the span `label`, divided by n, its number of training samples.

        ValueError if n is not at least 1, or there is no such span.
        """
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}: give the number of training samples")
        joules = self.joules(label)
        return None if joules is None else joules / n
