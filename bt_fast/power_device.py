"""GPUs in NVML: finds the caller's devices, and reads what each of them reports."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

import torch

from bt_fast.floors import upgrade
from bt_fast.power_samples import Sample, Summary, summarise

Device = torch.device | int | str
Reader = Callable[[], dict[str, Any]]  # reads one field of a sample, or several

CPU = torch.device("cpu")
POWER_SOURCES = ("instant", "average")  # in the order of preference
SHARED = "MIG: all but the memory is of the whole physical GPU, other instances' work included"
REASONS = {  # nvmlClocksEventReasons; older versions of nvidia-ml-py have fewer
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


class UnavailableError(Exception):
    """Raised when there is nothing to measure; the message is the reason."""


@contextmanager
def nvml() -> Iterator[ModuleType]:
    """Initialises NVML for a `with` block (the library counts its users). Raises `UnavailableError`."""
    library = _initialised()
    try:
        yield library
    finally:
        with suppress(library.NVMLError):  # another user has shut it down once too often, or the driver is gone
            library.nvmlShutdown()


def _initialised() -> ModuleType:
    try:
        import pynvml
    except ImportError as error:
        raise UnavailableError(f"nvidia-ml-py is not installed: {upgrade('nvidia-ml-py')}") from error
    except Exception as error:  # a broken installation may raise anything
        reason = f"nvidia-ml-py cannot be imported ({type(error).__name__}: {error}): {upgrade('nvidia-ml-py')}"
        raise UnavailableError(reason) from error
    library: ModuleType = pynvml
    if not hasattr(library, "convertStrBytes"):  # before this function, the library's functions took bytes for names
        raise UnavailableError(f"the installed pynvml ({library.__file__}) is too old: {upgrade('nvidia-ml-py')}")
    try:
        library.nvmlInit()
    except library.NVMLError_LibraryNotFound as error:
        raise UnavailableError("there is no NVIDIA driver on this machine (libnvidia-ml.so.1 was not found)") from error
    except library.NVMLError as error:
        raise UnavailableError(f"NVML does not start: {error}") from error
    return library


def driver_version() -> str | None:
    """Returns the version of NVIDIA's driver; None if NVML does not report it."""
    with suppress(UnavailableError), nvml() as library, suppress(library.NVMLError):
        return str(library.nvmlSystemGetDriverVersion())
    return None


# The caller's devices


def uuids_of(devices: Device | Iterable[Device] | None) -> list[str]:
    """Returns the UUIDs of the devices, or of the current one, as in NVML; UnavailableError, TypeError, ValueError."""
    checked = _listed(devices)
    if CPU in checked:
        raise UnavailableError("the device is the CPU, of which NVML tells nothing")
    with nvml() as library:
        by_uuid = bool(checked) and all(isinstance(d, str) for d in checked)
        if not by_uuid and not torch.cuda.is_available():
            raise UnavailableError("torch sees no CUDA device: name one by its UUID (nvidia-smi -L)")
        try:
            uuids = [_known_uuid(library, d) for d in checked or [torch.device("cuda")]]
        except library.NVMLError as error:
            raise UnavailableError(f"NVML does not tell the devices: {error}") from error
    if len(set(uuids)) < len(uuids):
        raise ValueError(f"devices must differ, got {', '.join(uuids)}: name each device once")
    return uuids


def _listed(devices: Device | Iterable[Device] | None) -> list[Device]:
    """Returns the checked devices; empty for the current one."""
    if devices is None:
        return []
    several = isinstance(devices, Iterable) and not isinstance(devices, (str, torch.Tensor))
    checked = [_checked(device) for device in (devices if several else [devices])]  # type: ignore[union-attr]
    if not checked:
        raise ValueError(
            "devices must name at least one, or be None for the current one: write devices=None for the current one"
        )
    if len(checked) > 1 and CPU in checked:
        raise ValueError("devices must be the CPU alone or GPUs, got both: take two monitors")
    return checked


def _checked(device: object) -> Device:
    if isinstance(device, str) and device.startswith(("GPU-", "MIG-")):
        return device
    wrong = f"devices must be torch devices, indices or UUIDs, got {device!r}: write devices=0"
    if isinstance(device, bool) or not isinstance(device, (int, str, torch.device)):
        raise TypeError(wrong)
    if isinstance(device, int):
        if device < 0:
            raise ValueError(f"devices must be at least 0 as indices, got {device}: write devices=0")
        return device  # torch.device would wrap an index above 127
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(wrong) from error
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f'devices must be of CUDA, got {device}: write devices="cuda", or "cpu" for the processor')
    return CPU if device.type == "cpu" else device


def _known_uuid(library: ModuleType, device: Device) -> str:
    name = device if isinstance(device, str) else _uuid_of_torch(device)
    # torch omits NVML's prefix
    candidates = [name] if name.startswith(("GPU-", "MIG-")) else [f"GPU-{name}", f"MIG-{name}"]
    for candidate in candidates:
        try:
            library.nvmlDeviceGetHandleByUUID(candidate)
        except (library.NVMLError_NotFound, library.NVMLError_InvalidArgument):
            continue
        except library.NVMLError:
            pass  # it exists, but does not open: every block tries again
        return candidate
    handles = [library.nvmlDeviceGetHandleByIndex(index) for index in range(library.nvmlDeviceGetCount())]
    known = ", ".join(library.nvmlDeviceGetUUID(handle) for handle in handles) or "none"
    raise ValueError(f"devices: the driver knows no {' or '.join(candidates)}; it has {known}: name one of these")


def _uuid_of_torch(device: torch.device | int) -> str:
    index: int | None = device if isinstance(device, int) else device.index
    index = torch.cuda.current_device() if index is None else index
    if not 0 <= index < torch.cuda.device_count():
        raise ValueError(
            f"devices: torch sees {torch.cuda.device_count()} CUDA devices, there is no cuda:{index}: "
            "name one below that, or leave devices out"
        )
    return str(torch.cuda.get_device_properties(index).uuid)


# Readings of a device


class Gpu:
    """One device: its samples so far, its readers, and whether it is lost."""

    def __init__(self, library: ModuleType, uuid: str) -> None:
        own = physical = library.nvmlDeviceGetHandleByUUID(uuid)
        if uuid.startswith("MIG-"):
            physical = library.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(own)
        self.samples: list[Sample] = []
        self.lost: str | None = None
        self._span_starts: list[int] = []  # the sample index at which each span begins
        self._uuid, self._error = uuid, library.NVMLError
        reasons = ("GpuIsLost", "ResetRequired", "DriverNotLoaded", "Uninitialized")
        self._gone = tuple(getattr(library, f"NVMLError_{reason}") for reason in reasons)
        shared = SHARED if own is not physical else None
        self._described: dict[str, Any] = {"name": uuid, "power_source": None, "unsupported": (), "shared": shared}
        with suppress(library.NVMLError):
            self._described["name"] = str(library.nvmlDeviceGetName(own))
        self._readers: list[Reader] = []
        for fields, candidates in _readers(library, physical, own):
            self._probe(fields, candidates)

    def _probe(self, fields: tuple[str, ...], candidates: Sequence[Reader]) -> None:
        """Keeps the first reader of these fields that the device supports."""
        for k, reader in enumerate(candidates):
            try:
                reader()
            except self._gone as error:
                self.lost = str(error)
                return
            except (self._error, AttributeError):  # an older nvidia-ml-py lacks the newer functions
                continue
            self._readers.append(reader)
            if fields == ("power",):
                self._described["power_source"] = POWER_SOURCES[k]
            return
        self._described["unsupported"] += fields

    def read(self, *, starts_span: bool = False) -> None:
        """Takes a sample, unless the device is lost."""
        self._take()
        if starts_span:
            self._span_starts.append(len(self.samples) - (self.lost is None))

    def _take(self) -> None:
        if self.lost is not None:
            return
        values: dict[str, Any] = {}
        begin = time.perf_counter()
        for reader in self._readers:
            try:
                values |= reader()
            except self._gone as error:
                self.lost = str(error)
                return
            except self._error:  # a temporary error, for example a timeout
                continue
        self.samples.append(Sample(self._uuid, begin, **values))

    def summary(self, k: int | None) -> Summary | None:
        """Returns the summary of the k-th span, or of all samples; None without samples."""
        starts = [0] if k is None else self._span_starts[k : k + 2]
        end = starts[1] + 1 if len(starts) > 1 else None  # the sample at a mark belongs to both of its spans
        samples = self.samples[starts[0] : end]
        complete = end is not None and end <= len(self.samples)
        return summarise(samples, lost=None if complete else self.lost, **self._described) if samples else None


def _readers(library: ModuleType, physical: Any, own: Any) -> list[tuple[tuple[str, ...], list[Reader]]]:
    """The readers of each group of fields, the best first; `own` is the handle of a MIG instance, or `physical`."""

    def reader(field: str, function: str, *args: Any, convert: Callable[[Any], Any] = int) -> Reader:
        return lambda: {field: convert(getattr(library, function)(physical, *args))}

    def instant() -> dict[str, Any]:
        (value,) = library.nvmlDeviceGetFieldValues(physical, [library.NVML_FI_DEV_POWER_INSTANT])
        if value.nvmlReturn != library.NVML_SUCCESS:
            raise library.NVMLError(value.nvmlReturn)
        return {"power": value.value.uiVal / 1000}

    def utilisation() -> dict[str, Any]:
        rates = library.nvmlDeviceGetUtilizationRates(physical)
        return {"sm_utilisation": rates.gpu / 100, "memory_utilisation": rates.memory / 100}

    def memory() -> dict[str, Any]:
        return {"memory_used": int(library.nvmlDeviceGetMemoryInfo(own).used)}

    average = reader("power", "nvmlDeviceGetPowerUsage", convert=lambda milliwatts: milliwatts / 1000)
    sensor = library.NVML_TEMPERATURE_GPU
    temperatures = ("nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature")  # the second is the older one
    events = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")  # likewise
    return [
        # energy and power first: they should be nearest to the sample's time
        (("energy",), [reader("energy", "nvmlDeviceGetTotalEnergyConsumption")]),
        (("power",), [instant, average]),
        (("sm_utilisation", "memory_utilisation"), [utilisation]),
        (("sm_clock",), [reader("sm_clock", "nvmlDeviceGetClockInfo", library.NVML_CLOCK_SM)]),
        (("memory_clock",), [reader("memory_clock", "nvmlDeviceGetClockInfo", library.NVML_CLOCK_MEM)]),
        (("temperature",), [reader("temperature", name, sensor) for name in temperatures]),
        (("throttle",), [reader("throttle", name, convert=_reason_names) for name in events]),
        (("memory_used",), [memory]),
    ]


def _reason_names(bits: int) -> tuple[str, ...]:
    """Returns the names of the set bits, with "0x..." for bits without a name."""
    names = [name for bit, name in REASONS.items() if bits & bit]
    unnamed = bits & ~sum(REASONS)
    return (*names, hex(unnamed)) if unnamed else tuple(names)
