"""Energy, power, utilisation, clocks, temperature and memory of GPUs during a block of code, as NVML tells them.

Utilisation is the share of a window of 1/6 to 1 s in which some kernel ran: it says nothing about single kernels. The
counter of the total energy exists from Volta on but not on many virtual GPUs, and moves every 10 ms or more rarely;
the power of newer GPUs is an average over a second unless the instant one can be read. What a device does not tell is
None, never 0.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from types import ModuleType
from typing import Any, Literal

import torch

from bt_fast.floors import upgrade
from bt_fast.validation import real

Device = torch.device | int | str
EnergySource = Literal["counter", "power"]

COUNTER_MOVES = 10  # a counter that has moved less often is coarser than integrated power
MOST_WATTS = 3000.0  # a counter that says more was set back (by a driver loaded anew), and did not wrap
COUNTER_BITS = (32, 64)
SHARED = "MIG: all but the memory is of the whole physical GPU, other instances' work included"


@dataclass(frozen=True)
class Sample:
    """What one device told at one time; None where it does not tell, or did not this time.

    Attributes:
        device: UUID, "GPU-..." or "MIG-...".
        time: seconds of `time.perf_counter`.
        power: watts.
        energy: millijoules, the counter since the driver was loaded: only differences mean something.
        sm_utilisation, memory_utilisation: in [0, 1]: the share of NVML's window in which some kernel ran, and in which
            memory was read or written.
        sm_clock, memory_clock: MHz.
        temperature: degrees Celsius.
        throttle: the names of the reasons for which clocks were held back, "sw_power_cap" for example.
        memory_used: bytes, of all processes.
    """

    device: str
    time: float
    power: float | None = None
    energy: int | None = None
    sm_utilisation: float | None = None
    memory_utilisation: float | None = None
    sm_clock: int | None = None
    memory_clock: int | None = None
    temperature: int | None = None
    throttle: tuple[str, ...] | None = None
    memory_used: int | None = None


@dataclass(frozen=True)
class Summary:
    """What one device did from the first to the last of its samples; None where it does not tell.

    Attributes:
        device: UUID, "GPU-..." or "MIG-..."; name: the product's.
        samples: their number. seconds: from the first to the last.
        joules: used in these seconds. energy_source: "counter" (the difference of the total energy) or "power" (the
            trapezoidal integral over the samples, where there is no counter, or it has moved less than ten times).
        mean_power: over time, max_power: in watts. power_source: "instant" or "average", as NVML calls it.
        mean_sm_utilisation, mean_memory_utilisation: in [0, 1]; mean_sm_clock, mean_memory_clock: MHz; over samples.
        max_temperature: degrees Celsius.
        throttle: the share of samples by reason, of those that were met.
        peak_memory: the largest memory in use by all processes that a sample has seen, in bytes.
        unsupported: the fields of `Sample` that this device does not have.
        lost: why the readings ended before the block or span did, or None.
        shared: where the readings are not of this device alone, how; or None.
    """

    device: str
    name: str
    samples: int
    seconds: float
    joules: float | None
    energy_source: EnergySource | None
    mean_power: float | None
    max_power: float | None
    power_source: str | None
    mean_sm_utilisation: float | None
    mean_memory_utilisation: float | None
    mean_sm_clock: float | None
    mean_memory_clock: float | None
    max_temperature: int | None
    throttle: Mapping[str, float] | None
    peak_memory: int | None
    unsupported: tuple[str, ...]
    lost: str | None
    shared: str | None


class PowerMonitor:
    """Samples GPUs in a thread while its `with` block runs.

        with PowerMonitor() as monitor:
            train()
        print(monitor.joules_per_sample(50_000) if monitor.available else monitor.reason)

    Without a driver, or without a GPU that it could read, it does nothing and says why. It raises nothing in the block:
    where a GPU is lost, what was measured until then stays, and the summary says so; where one of several cannot be
    opened, the others are measured. A block begins anew. A sample takes about 0.5 kB, so that a run of days wants an
    interval of a second.

    Args:
        devices: one or several of torch's devices, their indices, or UUIDs as nvidia-smi -L prints them; the current
            CUDA device if not given. NVML's own numbers differ from torch's: devices are found by UUID.
        interval: seconds between samples.

    Attributes:
        available: whether there is something to measure.
        reason: a sentence that says why not, or None.
        missing: of several devices, those that could not be opened for the block, by UUID, and why.

    Raises:
        TypeError: a device is none of these, or the interval is not a number.
        ValueError: the interval is not greater than 0, or longer than a thread can wait, a device is given twice, or
            neither torch nor the driver knows it.
    """

    def __init__(self, devices: Device | Iterable[Device] | None = None, interval: float = 0.02) -> None:
        real("interval", interval)
        if not 0 < interval < float("inf"):
            raise ValueError(
                f"interval must be a finite number of seconds greater than 0, got {interval}: write interval=0.02"
            )
        if interval > threading.TIMEOUT_MAX:
            raise ValueError(
                f"interval must be at most {threading.TIMEOUT_MAX:g} seconds, got a longer one: write interval=0.02"
            )
        self._interval = float(interval)
        self._asked = _listed(devices)
        self._uuids: list[str] = []
        self._gpus: list[_Gpu] = []
        self._nvml: ModuleType | None = None  # while initialised for the block
        self._samples: list[list[Sample]] = []
        self._marks: dict[str, list[int]] = {}  # the number of each device's sample at which a span begins
        self._lock = threading.Lock()  # of reading: the block's thread reads at marks
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._began = self._ended = 0.0
        self.missing: Mapping[str, str] = {}
        self.reason = self._look()

    @property
    def available(self) -> bool:
        """Whether there is something to measure."""
        return self.reason is None

    def __enter__(self) -> PowerMonitor:
        if self._thread is not None:
            raise RuntimeError("this PowerMonitor is in a block already: take another one")
        self._gpus, self._samples, self._marks, self.missing = [], [], {}, {}
        if self.available:
            self.reason = self._open()
        self._began, self._ended = time.perf_counter(), float("inf")
        if self.available:
            try:
                self._read()
                self._stop.clear()
                thread = threading.Thread(target=self._run, name="bt_fast.PowerMonitor", daemon=True)
                thread.start()
            except BaseException:  # there may be no room for a thread
                self.__exit__()
                raise
            self._thread = thread
        return self

    def __exit__(self, *error: object) -> None:
        thread, self._thread = self._thread, None
        nvml, self._nvml = self._nvml, None
        try:
            if thread is not None:
                self._stop.set()
                thread.join()
                self._read()
        finally:
            self._ended = time.perf_counter()
            if nvml is not None:
                _shut(nvml)

    def mark(self, label: str) -> None:
        """End the span that runs, if one does, and begin another of that name, up to the next mark or the block's end.

        It reads the devices at once: a few milliseconds for each.

        Args:
            label: the new span's name.

        Raises:
            ValueError: there is a span of that name.
            RuntimeError: the monitor is in no block.
        """
        if label in self.labels:
            raise ValueError(f"label must be new, but there is a span {label!r}: give another name")
        if self._ended != float("inf"):
            raise RuntimeError(
                "mark must be called inside the monitor's block: write `with monitor: monitor.mark(...)`"
            )
        with self._lock:
            self._read_locked()
            self._marks[label] = [
                len(samples) - (gpu.lost is None) for gpu, samples in zip(self._gpus, self._samples, strict=True)
            ]

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the spans, in their order."""
        return tuple(self._marks)

    @property
    def samples(self) -> tuple[Sample, ...]:
        """All samples so far, device by device."""
        return tuple(sample for samples in self._samples for sample in tuple(samples))

    @property
    def seconds(self) -> float:
        """How long the block has run, measured or not; 0 before it."""
        return min(self._ended, time.perf_counter()) - self._began

    def summary(self, label: str | None = None) -> tuple[Summary, ...]:
        """One for each device that was there, of the whole block or of a span; of what there is so far inside it.

        Args:
            label: the span's name; the whole block if not given.

        Raises:
            ValueError: there is no such span.
        """
        starts, ends = self._span(label)
        found = []
        for gpu, samples, start, end in zip(self._gpus, self._samples, starts, ends, strict=True):
            if of_span := samples[start:end]:
                ended = end is not None and end <= len(samples)  # by a mark, with the device still there
                found.append(_summarised(gpu, of_span, None if ended else gpu.lost))
        return tuple(found)

    def joules(self, label: str | None = None) -> float | None:
        """What all devices used together, in joules; None where one does not tell, was lost, or is missing.

        Args:
            label: the span's name; the whole block if not given.

        Raises:
            ValueError: there is no such span.
        """
        found = self.summary(label)
        used = [s.joules for s in found if s.joules is not None and s.lost is None]
        return sum(used) if found and len(used) == len(self._uuids) else None

    def joules_during(self, intervals: Sequence[tuple[float, float]]) -> float | None:
        """What all devices used together in some intervals of the block, by their power.

        Power is a straight line between samples. So a reading that is an average over a second (`power_source`) tells
        nothing of shorter intervals, and an instant one, renewed every 0.1 s, nothing of much shorter ones.

        Args:
            intervals: begins and ends, in seconds of `time.perf_counter`.

        Returns:
            Joules; None where a device does not tell its power, was lost, or has no samples around an interval.
        """
        used = [power_within(samples, intervals) for samples in self._samples]
        told = [joules for joules in used if joules is not None]
        return sum(told) if told and len(told) == len(self._uuids) else None

    def joules_per_sample(self, n: int, label: str | None = None) -> float | None:
        """`joules` divided by the number of training samples in the block or span.

        Args:
            n: that number, at least 1.
            label: the span's name; the whole block if not given.

        Raises:
            ValueError: n is not at least 1, or there is no such span.
        """
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}: give the number of training samples")
        joules = self.joules(label)
        return None if joules is None else joules / n

    def _span(self, label: str | None) -> tuple[list[int], list[int | None]]:
        """Where a span begins and ends among each device's samples: the one at a mark belongs to both of its spans."""
        if label is None:
            return [0] * len(self._gpus), [None] * len(self._gpus)
        if label not in self._marks:
            there = ", ".join(map(repr, self._marks)) or "none yet"
            raise ValueError(
                f"label must be one of {there}, got {label!r}: name a span that `mark` began, or leave label out"
            )
        starts = list(self._marks.values())
        k = self.labels.index(label)
        return starts[k], [n + 1 for n in starts[k + 1]] if k + 1 < len(starts) else [None] * len(self._gpus)

    # Finding the devices

    def _look(self) -> str | None:
        """Find the devices' UUIDs; why there is nothing to measure, or None."""
        if any(isinstance(d, torch.device) and d.type == "cpu" for d in self._asked):
            return "the device is the CPU, of which NVML tells nothing"
        nvml = _initialised()
        if isinstance(nvml, str):
            return nvml
        try:
            by_uuid = bool(self._asked) and all(isinstance(d, str) for d in self._asked)
            if not by_uuid and not torch.cuda.is_available():
                return "torch sees no CUDA device: name one by its UUID (nvidia-smi -L)"
            asked = self._asked or [torch.device("cuda")]
            self._uuids = [_known(nvml, d if isinstance(d, str) else uuid_of(d)) for d in asked]
            if len(set(self._uuids)) < len(self._uuids):
                raise ValueError(f"devices must differ, got {', '.join(self._uuids)}: name each device once")
        except nvml.NVMLError as error:
            return f"NVML does not tell the devices: {error}"
        finally:
            _shut(nvml)
        return None

    def _open(self) -> str | None:
        """Initialise NVML for the block and find out what each device tells; why that failed, or None."""
        nvml = _initialised()
        if isinstance(nvml, str):
            return nvml
        missing: dict[str, str] = {}
        for uuid in self._uuids:
            try:
                self._gpus.append(_Gpu.of(nvml, uuid))
            except nvml.NVMLError as error:
                missing[uuid] = str(error)
            except BaseException:
                _shut(nvml)
                raise
        if not self._gpus:
            _shut(nvml)
            return f"NVML does not open the device: {'; '.join(missing.values())}"
        self._nvml, self.missing = nvml, missing
        self._samples = [[] for _ in self._gpus]
        return None

    # Sampling

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self._read()

    def _read(self) -> None:
        """One sample of each device that is not lost."""
        with self._lock:
            self._read_locked()

    def _read_locked(self) -> None:
        for gpu, samples in zip(self._gpus, self._samples, strict=True):
            if sample := gpu.sample():
                samples.append(sample)


# Devices


def uuid_of(device: torch.device | int) -> str:
    """The UUID of torch's device without NVML's prefix, which torch leaves away.

    Raises:
        ValueError: torch sees no such device.
    """
    index: int | None = device if isinstance(device, int) else device.index
    if index is None:
        index = torch.cuda.current_device()
    if not 0 <= index < torch.cuda.device_count():
        raise ValueError(
            f"devices: torch sees {torch.cuda.device_count()} CUDA devices, there is no cuda:{index}: "
            "name one below that, or leave devices out"
        )
    return str(torch.cuda.get_device_properties(index).uuid)


def _listed(devices: Device | Iterable[Device] | None) -> list[torch.device | int | str]:
    """What was asked for: torch's devices, indices and UUIDs. Empty: the current device."""
    if devices is None:
        return []
    several = isinstance(devices, Iterable) and not isinstance(devices, (str, torch.Tensor))
    given: Iterable[object] = devices if several else [devices]  # type: ignore[assignment]
    found = [_device(d) for d in given]
    if not found:
        raise ValueError(
            "devices must name at least one, or be None for the current one: write devices=None for the current one"
        )
    if len(found) > 1 and any(isinstance(d, torch.device) and d.type == "cpu" for d in found):
        raise ValueError("devices must be the CPU alone or GPUs, got both: take two monitors")
    return found


def _device(device: object) -> torch.device | int | str:
    if isinstance(device, int) and not isinstance(device, bool):
        if device < 0:
            raise ValueError(f"devices must be at least 0 as indices, got {device}: write devices=0")
        return device
    if isinstance(device, str):
        if device.startswith(("GPU-", "MIG-")):
            return device
        try:
            device = torch.device(device)
        except RuntimeError as error:
            raise ValueError(
                f"devices must be torch devices, indices or UUIDs, got {device!r}: write devices=0"
            ) from error
    if not isinstance(device, torch.device):
        raise TypeError(f"devices must be torch devices, indices or UUIDs, got {device!r}: write devices=0")
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f'devices must be of CUDA, got {device}: write devices="cuda", or "cpu" for the processor')
    return device


def _initialised() -> ModuleType | str:
    """NVML, initialised once more (it counts), or why there is none."""
    try:
        import pynvml
    except ImportError:
        return f"nvidia-ml-py is not installed: {upgrade('nvidia-ml-py')}"
    except Exception as error:  # a broken installation raises whatever it likes
        return f"nvidia-ml-py cannot be imported ({type(error).__name__}: {error}): {upgrade('nvidia-ml-py')}"
    if not hasattr(pynvml, "convertStrBytes"):  # before there was that, its functions took bytes for names
        return f"the installed pynvml ({pynvml.__file__}) is too old: {upgrade('nvidia-ml-py')}"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound:
        return "there is no NVIDIA driver on this machine (libnvidia-ml.so.1 was not found)"
    except pynvml.NVMLError as error:
        return f"NVML does not start: {error}"
    module: ModuleType = pynvml
    return module


def _shut(nvml: ModuleType) -> None:
    try:
        nvml.nvmlShutdown()
    except nvml.NVMLError:  # somebody else has shut it down once too often, or the driver is gone
        return


def driver_version() -> str | None:
    """Of NVIDIA's driver; None where NVML does not tell."""
    nvml = _initialised()
    if isinstance(nvml, str):
        return None
    try:
        return str(nvml.nvmlSystemGetDriverVersion())
    except nvml.NVMLError:
        return None
    finally:
        _shut(nvml)


def _known(nvml: ModuleType, name: str) -> str:
    """The UUID as NVML writes it.

    Raises:
        ValueError: the driver knows no such device.
    """
    candidates = [name] if name.startswith(("GPU-", "MIG-")) else [f"GPU-{name}", f"MIG-{name}"]
    for candidate in candidates:
        try:
            nvml.nvmlDeviceGetHandleByUUID(candidate)
        except (nvml.NVMLError_NotFound, nvml.NVMLError_InvalidArgument):
            continue
        except nvml.NVMLError:
            pass  # it is there, but does not open: every block tries again
        return candidate
    found = []
    for index in range(nvml.nvmlDeviceGetCount()):
        found.append(nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetHandleByIndex(index)))
    raise ValueError(
        f"devices: the driver knows no {' or '.join(candidates)}; it has {', '.join(found) or 'none'}: "
        "name one of these"
    )


Reader = Callable[[], dict[str, Any]]


class _Gpu:
    """One device: what it tells, how, and whether it is still there."""

    def __init__(self, nvml: ModuleType, uuid: str, physical: Any, own: Any) -> None:
        """`physical` is the handle of the whole GPU, `own` that of the MIG instance, or the same."""
        self.uuid = uuid
        self.lost: str | None = None
        self.shared = SHARED if own is not physical else None
        self.power_source: str | None = None
        self._nvml = nvml
        self._gone = (
            nvml.NVMLError_GpuIsLost,
            nvml.NVMLError_ResetRequired,
            nvml.NVMLError_DriverNotLoaded,
            nvml.NVMLError_Uninitialized,
        )
        try:
            self.name = str(nvml.nvmlDeviceGetName(own))
        except nvml.NVMLError:
            self.name = uuid
        self._readers: list[Reader] = []
        self.unsupported: tuple[str, ...] = ()
        for fields, candidates in _readers(nvml, physical, own).items():
            self._probe(fields, candidates)

    @classmethod
    def of(cls, nvml: ModuleType, uuid: str) -> _Gpu:
        """The device of that UUID."""
        own = physical = nvml.nvmlDeviceGetHandleByUUID(uuid)
        if uuid.startswith("MIG-"):
            physical = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(own)
        return cls(nvml, uuid, physical, own)

    def _probe(self, fields: tuple[str, ...], candidates: Mapping[str, Reader]) -> None:
        """Keep the first way to read these fields that the device has."""
        for way, reader in candidates.items():
            try:
                reader()
            except self._gone as error:
                self.lost = str(error)
                return
            except (self._nvml.NVMLError, AttributeError):  # an older nvidia-ml-py lacks the newer functions
                continue
            self._readers.append(reader)
            if fields == ("power",):
                self.power_source = way
            return
        self.unsupported += fields

    def sample(self) -> Sample | None:
        """What it tells now; None once it is lost."""
        if self.lost is not None:
            return None
        told: dict[str, Any] = {}
        begin = time.perf_counter()
        for reader in self._readers:
            try:
                told |= reader()
            except self._gone as error:
                self.lost = str(error)
                return None
            except self._nvml.NVMLError:  # this time: a timeout, say
                continue
        return Sample(self.uuid, begin, **told)


def _readers(nvml: ModuleType, physical: Any, own: Any) -> dict[tuple[str, ...], dict[str, Reader]]:
    """The ways to read each group of fields, the best first."""

    def instant() -> dict[str, Any]:
        (value,) = nvml.nvmlDeviceGetFieldValues(physical, [nvml.NVML_FI_DEV_POWER_INSTANT])
        if value.nvmlReturn != nvml.NVML_SUCCESS:
            raise nvml.NVMLError(value.nvmlReturn)
        return {"power": value.value.uiVal / 1000}

    def utilisation() -> dict[str, Any]:
        rates = nvml.nvmlDeviceGetUtilizationRates(physical)
        return {"sm_utilisation": rates.gpu / 100, "memory_utilisation": rates.memory / 100}

    def events(name: str) -> Reader:
        return lambda: {"throttle": reason_names(getattr(nvml, name)(physical))}

    sensor = nvml.NVML_TEMPERATURE_GPU
    return {
        # power and energy first: they are nearest to the sample's time
        ("energy",): {"counter": lambda: {"energy": nvml.nvmlDeviceGetTotalEnergyConsumption(physical)}},
        ("power",): {
            "instant": instant,
            "average": lambda: {"power": nvml.nvmlDeviceGetPowerUsage(physical) / 1000},
        },
        ("sm_utilisation", "memory_utilisation"): {"rates": utilisation},
        ("sm_clock",): {"sm": lambda: {"sm_clock": nvml.nvmlDeviceGetClockInfo(physical, nvml.NVML_CLOCK_SM)}},
        ("memory_clock",): {
            "mem": lambda: {"memory_clock": nvml.nvmlDeviceGetClockInfo(physical, nvml.NVML_CLOCK_MEM)}
        },
        ("temperature",): {
            "new": lambda: {"temperature": nvml.nvmlDeviceGetTemperatureV(physical, sensor)},
            "old": lambda: {"temperature": nvml.nvmlDeviceGetTemperature(physical, sensor)},
        },
        ("throttle",): {
            "new": events("nvmlDeviceGetCurrentClocksEventReasons"),
            "old": events("nvmlDeviceGetCurrentClocksThrottleReasons"),
        },
        ("memory_used",): {"info": lambda: {"memory_used": int(nvml.nvmlDeviceGetMemoryInfo(own).used)}},
    }


REASONS = {  # nvmlClocksEventReasons, of which older versions of nvidia-ml-py know fewer
    0x1: "gpu_idle",
    0x2: "applications_clocks_setting",
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
    0x200: "board_limit",
    0x400: "reliability",
}


def reason_names(bits: int) -> tuple[str, ...]:
    """The names of the reasons for which clocks are held back, and bits without a name as "0x..."."""
    names = [name for bit, name in REASONS.items() if bits & bit]
    unnamed = bits & ~sum(REASONS)
    return (*names, hex(unnamed)) if unnamed else tuple(names)


# Summaries


def _summarised(gpu: _Gpu, samples: Sequence[Sample], lost: str | None) -> Summary:
    joules, source = energy_of(samples)
    integral = integrated_power(samples)
    temperatures = [s.temperature for s in samples if s.temperature is not None]
    memory = [s.memory_used for s in samples if s.memory_used is not None]
    powers = [s.power for s in samples if s.power is not None]
    return Summary(
        device=gpu.uuid,
        name=gpu.name,
        samples=len(samples),
        seconds=samples[-1].time - samples[0].time,
        joules=joules,
        energy_source=source,
        mean_power=_mean(powers) if integral is None else integral[0] / integral[1],
        max_power=max(powers, default=None),
        power_source=gpu.power_source,
        mean_sm_utilisation=_mean([s.sm_utilisation for s in samples]),
        mean_memory_utilisation=_mean([s.memory_utilisation for s in samples]),
        mean_sm_clock=_mean([s.sm_clock for s in samples]),
        mean_memory_clock=_mean([s.memory_clock for s in samples]),
        max_temperature=max(temperatures, default=None),
        throttle=_shares([s.throttle for s in samples if s.throttle is not None]),
        peak_memory=max(memory, default=None),
        unsupported=gpu.unsupported,
        lost=lost,
        shared=gpu.shared,
    )


def energy_of(samples: Sequence[Sample]) -> tuple[float | None, EnergySource | None]:
    """Joules from the first to the last sample, and whether the counter or the power tells them."""
    counted, integral = counted_energy(samples), integrated_power(samples)
    if counted is not None and (counted[1] >= COUNTER_MOVES or (counted[1] and integral is None)):
        return counted[0], "counter"
    if integral is not None:
        return integral[0], "power"
    return None, None


def counted_energy(samples: Sequence[Sample]) -> tuple[float, int] | None:
    """Joules by the counter, which may wrap, and how often it moved; None where it says nothing that could be."""
    told = [(s.time, s.energy) for s in samples if s.energy is not None]
    if len(told) < 2:
        return None
    millijoules = moves = 0
    for (t, before), (u, after) in pairwise(told):
        gained = after - before
        if gained < 0:
            gained += 2 ** next(bits for bits in COUNTER_BITS if before < 2**bits)
            if gained > 1000 * MOST_WATTS * max(u - t, 1e-3):
                return None
        millijoules += gained
        moves += gained > 0
    return millijoules / 1000, moves


def integrated_power(samples: Sequence[Sample]) -> tuple[float, float] | None:
    """The trapezoidal integral of the power in joules, and the seconds that it spans; None without two readings."""
    told = [(s.time, s.power) for s in samples if s.power is not None]
    pairs = list(pairwise(told))
    if not pairs or told[-1][0] <= told[0][0]:
        return None
    return sum((u - t) * (p + q) / 2 for (t, p), (u, q) in pairs), told[-1][0] - told[0][0]


def power_within(samples: Sequence[Sample], intervals: Sequence[tuple[float, float]]) -> float | None:
    """Joules in intervals of time: the integral of the straight lines between the samples' powers.

    None without two readings, or where an interval is not between the first and the last of them.
    """
    told = [(s.time, s.power) for s in samples if s.power is not None]
    if len(told) < 2 or not all(told[0][0] <= begin <= end <= told[-1][0] for begin, end in intervals):
        return None
    times = [t for t, _ in told]
    until = list(accumulate(((u - t) * (p + q) / 2 for (t, p), (u, q) in pairwise(told)), initial=0.0))

    def joules(at: float) -> float:
        """From the first sample to this time."""
        k = bisect_right(times, at) - 1
        if k == len(told) - 1:
            return until[k]
        (t, p), (u, q) = told[k], told[k + 1]
        return until[k] + (at - t) * (p + (q - p) * (at - t) / (u - t) / 2)

    return sum(joules(end) - joules(begin) for begin, end in intervals)


def _mean(values: Sequence[float | None]) -> float | None:
    told = [v for v in values if v is not None]
    return sum(told) / len(told) if told else None


def _shares(reasons: Sequence[tuple[str, ...]]) -> dict[str, float] | None:
    if not reasons:
        return None
    met = sorted({name for names in reasons for name in names})
    return {name: sum(name in names for names in reasons) / len(reasons) for name in met}
