"""Describes this machine in one line of JSON: where the package comes from, the versions, and the GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "numpy", "pytest", "pytest-xdist", "nvidia-ml-py", "pillow")


def machine() -> dict[str, Any]:
    """Returns versions and torch's description of the GPU; a part that fails is reported with its error."""
    result: dict[str, Any] = {"packages": {name: version(name) for name in PACKAGES}, "cores": os.cpu_count()}
    result["bt_fast"], result["kernels"] = place("bt_fast"), place("bt_fast.kernels")
    try:
        result |= gpu()
    except Exception as error:
        result |= {"device": None, "why_none": f"{type(error).__name__}: {error}"}
    if shutil.which("nvidia-smi"):
        fields = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit,mig.mode.current"
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        try:
            result["nvidia_smi"] = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
        except (OSError, subprocess.SubprocessError) as error:  # torch may still work
            result["nvidia_smi"] = f"{type(error).__name__}: {error}"
    return result


def version(package: str) -> str | None:
    """Returns the version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def place(module: str) -> str:
    """Returns the folder of a module, or the error of its import."""
    try:
        return str(Path(str(import_module(module).__file__)).resolve().parent)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def gpu() -> dict[str, Any]:
    """Returns torch's build, and the GPU with what determines its speed; or why there is none."""
    import torch

    result: dict[str, Any] = {"built_for": torch.version.cuda, "device": None}
    if not torch.cuda.is_available():
        try:
            torch.cuda.init()
            why = "torch sees no device"
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
        return result | {"why_none": why}
    properties = torch.cuda.get_device_properties(0)
    return result | {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "sms": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cache_bytes": getattr(properties, "L2_cache_size", None),
        "cudnn": torch.backends.cudnn.version(),
    }


if __name__ == "__main__":
    print(json.dumps(machine()))
