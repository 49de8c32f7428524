"""Reads what torch, the driver and the bus report about GPUs, and explains why torch cannot use one."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bt_fast.lab.doctor_checks import reason

INSTALL_DRIVER = "sudo ubuntu-drivers install"


@dataclass(frozen=True)
class TorchCuda:
    """Torch's report of CUDA: the version it is built for, the number of usable devices, and why there are none."""

    built_for: str | None
    count: int
    error: str | None = None


def torch_cuda() -> TorchCuda:
    """Returns what this torch reports."""
    try:
        torch.cuda.init()
        return TorchCuda(torch.version.cuda, torch.cuda.device_count())
    except Exception as error:  # a driver that is missing, too old, ...: each has its own type
        return TorchCuda(torch.version.cuda, 0, reason(error))


@dataclass(frozen=True)
class Nvml:
    """The report of the driver's own library, which hides no GPU: its version, the newest CUDA, the GPUs' names.

    Without a report, `error` holds the reason, and `kind` the type of its exception.
    """

    driver: str | None = None
    cuda: tuple[int, int] | None = None
    gpus: tuple[str, ...] = ()
    error: str | None = None
    kind: str = ""


def read_nvml(load: Callable[[], Any]) -> Nvml:
    """Returns what the module that `load` returns (pynvml) reports, or its exception."""
    try:
        nvml = load()
        nvml.nvmlInit()
        try:
            version, cuda = nvml.nvmlSystemGetDriverVersion(), int(nvml.nvmlSystemGetCudaDriverVersion_v2())
            handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
            names = tuple(nvml.nvmlDeviceGetName(handle) for handle in handles)
            return Nvml(version, _cuda_version(cuda), names)
        finally:
            nvml.nvmlShutdown()
    except Exception as error:
        return Nvml(error=reason(error), kind=type(error).__name__)


def _cuda_version(number: int) -> tuple[int, int]:
    return number // 1000, number % 1000 // 10


def pci_gpus(root: Path) -> int:
    """Returns the number of NVIDIA's display controllers on the bus, with or without a driver."""
    count = 0
    for folder in root.glob("*"):
        with contextlib.suppress(OSError):
            vendor, kind = ((folder / name).read_text().strip() for name in ("vendor", "class"))
            count += vendor == "0x10de" and kind.startswith("0x03")
    return count


def why_none(cuda: TorchCuda, nvml: Nvml, pci: int, visible: str | None, index: int) -> tuple[str, str]:
    """Returns why torch cannot use the GPU of that index, and the command that helps."""
    present = len(nvml.gpus) or pci
    if visible is not None and cuda.built_for and cuda.count <= index < len(nvml.gpus):
        why = f"CUDA_VISIBLE_DEVICES={visible} hides it: torch sees {cuda.count} of {present}"
        return why, "env -u CUDA_VISIBLE_DEVICES bt-fast doctor"
    if cuda.count:
        return f"there is no cuda:{index}: torch sees {cuda.count}", "bt-fast doctor --device cuda:0"
    if cuda.built_for is None:
        also = f", but there is a GPU ({', '.join(nvml.gpus) or 'on the bus'})" if present else ""
        return f"torch is a build without CUDA{also}", "python -m pip install --force-reinstall torch"
    old = re.search(r"driver on your system is too old \(found version (\d+)\)", cuda.error or "")
    newest = nvml.cuda or (_cuda_version(int(old[1])) if old else None)
    if newest is not None and newest[0] < int(cuda.built_for.split(".")[0]):
        driver = f"driver {nvml.driver}" if nvml.driver else "the NVIDIA driver"
        why = f"{driver} is too old: up to CUDA {newest[0]}.{newest[1]}, torch needs {cuda.built_for}"
        return why, INSTALL_DRIVER
    if nvml.error is not None:
        commands = {
            "NVMLError_LibraryNotFound": ("no NVIDIA driver is installed", INSTALL_DRIVER),
            "NVMLError_DriverNotLoaded": ("the NVIDIA driver is not loaded", "sudo modprobe nvidia"),
            "NVMLError_LibRmVersionMismatch": ("the loaded driver is not the installed one", "sudo reboot"),
            "ModuleNotFoundError": ("nvidia-ml-py is missing", "python -m pip install nvidia-ml-py"),
        }
        why, command = commands.get(nvml.kind, ("the driver does not answer", "nvidia-smi"))
        return f"{why} ({nvml.error}; torch: {cuda.error or 'no device'})", command
    if not present:
        return "there is a driver", "nvidia-smi"
    return f"torch cannot use it ({cuda.error or 'no device'})", "python -c 'import torch; torch.cuda.init()'"
