"""Records what a run depends on, so that it can be repeated: `run.json` in its folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bt_fast
from bt_fast.full_precision import tf32_convolutions
from bt_fast.lab.config import RunConfig
from bt_fast.lab.data import ImageDataset
from bt_fast.lab.files import parse_json, write_text
from bt_fast.power import driver_version

FORMAT = 1


@dataclass(frozen=True)
class Provenance:
    """A run's configuration, its data from `data_summary`, and its start and resumptions from `this_start`."""

    config: RunConfig
    data: dict[str, Any]
    starts: list[dict[str, Any]]

    def write(self, path: Path) -> None:
        """Replaces the file atomically."""
        write_text(path, json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Provenance:
        """Reads what `write` wrote; ValueError, which names the file, if it is missing or holds something else."""
        try:
            content = parse_json(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"found format {content['format']}, expected {FORMAT}")
            run = cls(RunConfig.from_json(json.dumps(content["config"])), content["data"], content["starts"])
            if not isinstance(run.starts, list) or not isinstance(run.data["sha256"], str):
                raise TypeError("expected starts, a list, and data.sha256, a text")
            if not all(isinstance(s.get(key, {}), dict) for s in run.starts for key in ("machine", "settings")):
                raise TypeError("expected machine and settings of a start to be objects")
        except FileNotFoundError as error:
            raise ValueError(
                f"{path}: no such file, which tells what the run is made of; give the folder of a run"
            ) from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: not the description of a run ({error!r}); restore it, or start the run anew"
            ) from error
        return run


def data_summary(dataset: ImageDataset, sha256: str) -> dict[str, Any]:
    """Returns the data set's name and fingerprint, and its numbers of images and classes."""
    return {
        "name": dataset.name,
        "sha256": sha256,
        "training_images": len(dataset.x_train),
        "test_images": len(dataset.x_test),
        "classes": dataset.classes,
    }


def this_start(iteration: int, device: torch.device, ranks: int) -> dict[str, Any]:
    """Describes a start of a run by this process: time, command, machine and settings of torch."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch's old and new settings of TF32 were mixed, and only the new one can be read
        precision = str(torch.backends.cuda.matmul.fp32_precision)
    return {
        "iteration": iteration,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "ranks": ranks,
        "machine": machine(device),
        "settings": {
            "numpy": np.__version__,
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
            "float32_matmul_precision": precision,
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "cudnn_allow_tf32": tf32_convolutions(),
        },
        "revision": _revision(),
    }


def changes(start: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Lists `name: then, now` for each difference between two starts that may affect rounding."""
    one, other = (
        {**s.get("machine", {}), **s.get("settings", {}), "revision": s.get("revision")} for s in (start, now)
    )
    return [f"{name}: {one[name]}, now {other[name]}" for name in one if name in other and one[name] != other[name]]


def fingerprint(dataset: ImageDataset) -> str:
    """Returns the SHA-256 of the arrays, their shapes and the number of classes, in hexadecimal."""
    digest = hashlib.sha256(str(dataset.classes).encode())
    for array in (dataset.x_train, dataset.y_train, dataset.x_test, dataset.y_test):
        digest.update(f"{array.dtype}{list(array.shape)}".encode())
        digest.update(array.contiguous().numpy().data)
    return digest.hexdigest()


def check_configuration(config: RunConfig, stored: RunConfig, path: Path, *, but_data: bool) -> None:
    """Raises ValueError, which names `path`, unless the two are equal; with `but_data` the data's path may differ."""
    differences = config.differences(stored, but=("data",) if but_data else ())
    if differences:
        raise ValueError(
            f"{path}: of another configuration ({'; '.join(differences)}, as asked and as stored); leave these options "
            "away, or begin another run with --out"
        )


def check_data(dataset: ImageDataset, sha256: str, expected: str, path: Path) -> None:
    """Raises ValueError, which names `path`, unless the data have the stored fingerprint."""
    if sha256 != expected:
        raise ValueError(
            f"{path}: of a run on other data than {dataset.name}: its images or labels have the SHA-256 "
            f"{expected[:12]}..., those given {sha256[:12]}...; say with --data where its own are now"
        )


def machine(device: torch.device) -> dict[str, Any]:
    """Returns versions and hardware that a measurement depends on; the driver is None on the CPU and without NVML."""
    return {
        "bt_fast": bt_fast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "driver": driver_version() if device.type == "cuda" else None,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _revision() -> str | None:
    """Returns the commit of the package's repository, with `-dirty` appended if files were changed."""
    root = Path(bt_fast.__file__).parents[1]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        if not (root / ".git").exists():  # git would search the parent folders
            return None
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
