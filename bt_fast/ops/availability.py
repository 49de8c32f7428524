"""Decides whether kernels run on a device: on CUDA, until its properties or a launch show that they cannot.

Then a warning says why, and the device's ops run in plain torch for the rest of the process. A call costs one look-up
in a dictionary.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from bt_fast.device import out_of_memory
from bt_fast.floors import FLOORS, numbers, too_old, upgrade

LEAST_CAPABILITY = (7, 5)
# every supported triton compiles for these; from NEWER on also for the next ones, and for bfloat16 on 7.5
CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0))
NEWER, NEWER_CAPABILITIES = [3, 6], ((10, 0), (10, 3), (12, 0), (12, 1))
BFLOAT16_CAPABILITY = (8, 0)

Given = ParamSpec("Given")
Result = TypeVar("Result")


class Plain(NamedTuple):
    """Why a device's ops run in plain torch, and the command that helps, if any."""

    reason: str
    command: str | None = None


NO_TRITON = Plain("triton is not installed", f"python -m pip install 'triton>={FLOORS['triton']}'")

_plain: dict[tuple[torch.device, bool], Plain | None] = {}  # by device and whether in bfloat16; None: kernels run
_launched: set[torch.device] = set()  # devices with a successful launch
_warnings: set[str] = set()  # already given


def kernels_run(x: Tensor) -> bool:
    """Whether ops on `x`, which is on a CUDA device, launch kernels; the first call warns if not."""
    key = x.device, x.dtype == torch.bfloat16
    if key not in _plain:
        _plain[key] = problem = why_plain(*key)
        if problem is not None:
            _warn(x.device, problem)
    return _plain[key] is None


def why_plain(device: torch.device, bfloat16: bool = False) -> Plain | None:
    """Returns why ops on this CUDA device run in plain torch, as far as known; or None."""
    if (device, bfloat16) in _plain:
        return _plain[device, bfloat16]
    if problem := triton_problem():
        return problem
    if torch.version.hip is not None:
        return None
    version, capability = triton_version(), torch.cuda.get_device_capability(device)
    name = "compute capability {}.{}".format(*capability)
    if capability < LEAST_CAPABILITY:
        return Plain(f"{name} is below {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]}, the least that the kernels support")
    newer = "python -m pip install --upgrade torch triton"
    if not compiles_for(capability):
        return Plain(f"triton {version} does not compile for {name}", newer)
    if bfloat16 and capability < BFLOAT16_CAPABILITY and numbers(version)[:2] < NEWER:
        return Plain(f"triton {version} does not compile bfloat16 for {name}", newer)
    return None


@functools.cache
def triton_problem() -> Plain | None:
    """Returns what is wrong with the installed triton, or None. Imports it if it is installed."""
    if importlib.util.find_spec("triton") is None:
        return NO_TRITON
    try:
        version = triton_version()
    except Exception as error:  # a broken installation may raise anything
        return Plain(
            f"triton cannot be imported ({first_line(error)})", "python -m pip install --force-reinstall triton"
        )
    if too_old("triton", version):
        return Plain(f"triton {version} is older than {FLOORS['triton']}", upgrade("triton"))
    return None


def triton_version() -> str:
    """Returns the version of the imported triton."""
    import triton

    return str(triton.__version__)


@functools.cache
def compiles_for(capability: tuple[int, int]) -> bool:
    """Whether triton compiles for a compute capability.

    Its compiler aborts the whole process for a capability newer than it supports. So a capability that is not known to
    work is tried in another process, which takes seconds.
    """
    if capability in CAPABILITIES or (numbers(triton_version())[:2] >= NEWER and capability in NEWER_CAPABILITIES):
        return True
    major, minor = capability
    trial = [sys.executable, "-m", "bt_fast.ops.trial_compile", f"{10 * major + minor}"]
    path = os.pathsep.join(sys.path)
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    return subprocess.run(trial, capture_output=True, env=environment, check=False).returncode == 0


def or_plain(reference: Callable[Given, Result]) -> Callable[[Callable[Given, Result]], Callable[Given, Result]]:
    """Decorates a launch on the first argument's device: if it is impossible, `reference` computes this call's results.

    An error shows that if no launch has succeeded yet, or if triton lacks something outside itself. Any other error is
    a bug and raised; also raised are out of memory, and an error inside a capture, which says nothing about the device.
    """

    def decorated(launch: Callable[Given, Result]) -> Callable[Given, Result]:
        @functools.wraps(launch)
        def run(*given: Given.args, **named: Given.kwargs) -> Result:
            first: Any = next(iter((*given, *named.values())))
            try:
                with torch.cuda.device_of(first):
                    result = launch(*given, **named)
            except Exception as error:
                problem = _problem(error, first)
                if problem is None:
                    raise
                _plain.update({(first.device, bfloat16): problem for bfloat16 in (False, True)})
                _warn(first.device, problem)
            else:
                if first.numel():
                    _launched.add(first.device)
                return result
            return reference(*given, **named)

        return run

    return decorated


def no_way_back(error: Exception) -> None:
    """Marks an error of a launch after one that changed the caller's tensors: plain torch would do so again."""
    error.no_way_back = True  # type: ignore[attr-defined]


def first_line(error: BaseException) -> str:
    """Returns type and first line of the message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"


def _warn(device: torch.device, problem: Plain) -> None:
    """Warns of a problem, once."""
    cure = f". To have them: {problem.command}" if problem.command else ""
    text = (
        f"bt_fast runs in plain torch on {device}, since {problem.reason}: results are the same, but without fused "
        f"kernels each op is many launches instead of one{cure}"
    )
    if text not in _warnings:
        _warnings.add(text)
        warnings.warn(text, stacklevel=3)


def _problem(error: Exception, x: Tensor) -> Plain | None:
    """Returns the device's problem shown by an error of a launch on `x`; None if it is a bug or shows none."""
    if not x.is_cuda or hasattr(error, "no_way_back") or out_of_memory(error):
        return None
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return None
    problem = _lacking(error)
    if problem is not None or x.device in _launched:
        return problem
    return Plain(f"the first launch failed ({first_line(error)})", "bt-fast doctor")


def _lacking(error: Exception) -> Plain | None:
    """Returns what triton lacks: a C compiler or Python's header for its launcher, or a place for its cache."""
    if "Failed to find C compiler" in str(error):
        return Plain("triton finds no C compiler to build its launcher with", "sudo apt-get install gcc")
    if isinstance(error, subprocess.CalledProcessError):
        if python_header().is_file():
            return Plain(f"triton cannot build its launcher ({first_line(error)})", "bt-fast doctor")
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        return Plain(f"{python_header()} is missing, for triton's launcher", f"sudo apt-get install {package}")
    if not isinstance(error, OSError):
        return None
    if error.filename is not None and error.filename == os.environ.get("CC"):
        return Plain(f"CC={error.filename} cannot be run ({first_line(error)})", "unset CC")
    command = f"export TRITON_CACHE_DIR={Path(tempfile.gettempdir()) / 'triton'}"
    return Plain(f"triton's cache cannot be written ({first_line(error)})", command)


def python_header() -> Path:
    """Returns Python's own header file, which the launcher of a kernel includes."""
    return Path(sysconfig.get_paths()["include"]) / "Python.h"
