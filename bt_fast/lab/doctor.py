"""`bt-fast doctor`: what is installed, what runs fused or does not and why, and whether it computes what it should.

Each probe is given what it looks at, and says of a part that is broken what it said itself: no probe breaks another.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bt_fast.attack import device as engine
from bt_fast.device import out_of_memory
from bt_fast.floors import FLOORS, too_old, upgrade
from bt_fast.lab import provenance
from bt_fast.lab.doctor_checks import (
    CHECKS,
    STEPS,
    Check,
    Given,
    StepCheck,
    largest_difference,
    skip_reason,
    step_difference,
)
from bt_fast.ops import order_by_steps
from bt_fast.ops.availability import NO_TRITON, Plain, python_header, triton_problem, why_plain
from bt_fast.ops.availability import first_line as words_of

SECTIONS = ("versions", "device", "triton", "fused or plain", "self-check", "a training step")
GRAPHS = "CUDA graphs and streams"
SECONDS = 10.0  # of the self-check; a first run also compiles the kernels
INSTALL_DRIVER = "sudo ubuntu-drivers install"
WITHOUT_KERNELS = "python -m pip uninstall triton"
FULL, FREE = "the memory is full", "nvidia-smi"
TROUBLES = {
    FULL: "the memory was full",
    "no kernel image": "torch was not built for this GPU, as was seen",
    "CUDA error": "the device was lost",
    "illegal memory access": "the device was lost",
}


@dataclass(frozen=True)
class Finding:
    """A row of the report.

    Attributes:
        section: one of SECTIONS.
        status: "ok", "note" (worth knowing; nothing that should work here fails), "FAILED" or "skipped".
        next: the command to run, where something can be done.
    """

    section: str
    name: str
    status: str
    text: str
    next: str | None = None


def examine(wanted: torch.device | None) -> list[Finding]:
    """All findings about this machine; of `wanted`, or of the GPU if it can be used, else of the CPU."""
    cuda = torch_cuda()
    where = wanted or torch.device("cuda" if cuda.count else "cpu")
    found = [*probe("versions", "packages", lambda: versions(importlib.metadata.version))]
    nvml = read_nvml(lambda: importlib.import_module("pynvml"))
    visible, pci = os.environ.get("CUDA_VISIBLE_DEVICES"), pci_gpus(Path("/sys/bus/pci/devices"))
    found += probe("device", "GPU", lambda: gpu(cuda, nvml, pci, visible, wanted, torch.cuda.get_device_properties))
    usable = where.type == "cpu" or (where.index or 0) < cuda.count
    on_gpu = where.type == "cuda" and usable
    if usable:
        found += probe("device", GRAPHS, lambda: graphs(where))
    found += probe("triton", "import", lambda: imported(triton_problem(), on_gpu))
    launches = on_gpu and plain_on(where) is None
    found += probe("triton", "C compiler", lambda: compiler(shutil.which, python_header(), launches))
    found += probe("triton", "cache", lambda: cache(triton_cache(os.environ), launches))
    if launches:
        found += probe("triton", "launch", lambda: launched(where))
    if usable:
        found += fused(CHECKS, where, plain_on(where) if on_gpu else None)
        with one_thread(), torch.device("cpu"):  # where the checks make their cases
            found += self_check(CHECKS, where)
            lost = next((why for f in found if f.status == "FAILED" and (why := lost_by(f.text))), "")
            found += training_steps(STEPS, where, lost and f"{lost} before")
    else:
        found += [Finding(s, "all", "skipped", f"{where} cannot be used") for s in SECTIONS[-2:]]
    return found


def probe(section: str, name: str, look: Callable[[], Sequence[Finding]]) -> Sequence[Finding]:
    """What `look` finds; an exception of its own is a finding too."""
    try:
        return look()
    except Exception as error:  # whatever is broken there, the others go on
        return [Finding(section, name, "FAILED", said(error), FREE if out_of_memory(error) else None)]


def said(error: BaseException) -> str:
    """Type and first line of the message; of a check, which has words of its own, the message."""
    if isinstance(error, AssertionError):
        return (str(error).splitlines() or ["no message"])[0]
    return f"{FULL}: {words_of(error)}" if out_of_memory(error) else words_of(error)


def versions(version_of: Callable[[str], str]) -> list[Finding]:
    """What is installed; `version_of` raises PackageNotFoundError as that of importlib.metadata."""
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
    found = {k: str(v) for k, v in provenance.machine(torch.device("cpu")).items() if k not in ("device", "driver")}
    found["torch"] += f", {built}"
    rows = [Finding("versions", name, "ok", text) for name, text in found.items()]
    for name in [name for name in FLOORS if name not in found]:
        try:
            version = version_of(name)
        except importlib.metadata.PackageNotFoundError:
            rows.append(Finding("versions", name, "note", "not installed"))
            continue
        if too_old(name, version):
            status = "note" if name == "triton" else "FAILED"  # whether it is needed is said below
            rows.append(Finding("versions", name, status, f"{version}, needed: {FLOORS[name]}", upgrade(name)))
        else:
            rows.append(Finding("versions", name, "ok", version))
    return rows


# The GPU


@dataclass(frozen=True)
class TorchCuda:
    """What torch says of CUDA: the version that it is built for, how many devices it can use, and why none."""

    built_for: str | None
    count: int
    error: str | None = None


def torch_cuda() -> TorchCuda:
    """What this torch says."""
    try:
        torch.cuda.init()
        return TorchCuda(torch.version.cuda, torch.cuda.device_count())
    except Exception as error:  # no driver, one that is too old, ...: each has a type and words of its own
        return TorchCuda(torch.version.cuda, 0, said(error))


@dataclass(frozen=True)
class Nvml:
    """What the driver's own library says, which hides nothing: its version, the newest CUDA, and the GPUs' names.

    Attributes:
        error: why there is nothing to say: NVML's words, and `kind` the type of its exception.
    """

    driver: str | None = None
    cuda: tuple[int, int] | None = None
    gpus: tuple[str, ...] = ()
    error: str | None = None
    kind: str = ""


def read_nvml(load: Callable[[], Any]) -> Nvml:
    """What the module that `load` returns (pynvml) says. Raises nothing."""
    try:
        nvml = load()
        nvml.nvmlInit()
        try:
            version, cuda = nvml.nvmlSystemGetDriverVersion(), int(nvml.nvmlSystemGetCudaDriverVersion_v2())
            handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
            names = tuple(nvml.nvmlDeviceGetName(handle) for handle in handles)
            return Nvml(version, (cuda // 1000, cuda % 1000 // 10), names)
        finally:
            nvml.nvmlShutdown()
    except Exception as error:
        return Nvml(error=said(error), kind=type(error).__name__)


def pci_gpus(root: Path) -> int:
    """How many display controllers of NVIDIA's are on the bus, with a driver or without."""
    count = 0
    for folder in root.glob("*"):
        with contextlib.suppress(OSError):
            vendor, kind = ((folder / name).read_text().strip() for name in ("vendor", "class"))
            count += vendor == "0x10de" and kind.startswith("0x03")
    return count


def gpu(
    cuda: TorchCuda,
    nvml: Nvml,
    pci: int,
    visible: str | None,
    wanted: torch.device | None,
    properties: Callable[[int], Any],
) -> list[Finding]:
    """The driver, and the GPU or why there is none. That fails if one was asked for, or is in the machine, unused.

    Args:
        pci: how many the bus has. visible: CUDA_VISIBLE_DEVICES. wanted: None if no device was asked for.
        properties: of the device of an index, as torch has them.
    """
    driver = f"{nvml.driver}, up to CUDA {'.'.join(map(str, nvml.cuda or ()))}" if nvml.driver else f"{nvml.error}"
    found = [Finding("device", "driver", "ok" if nvml.driver else "note", driver)]
    if wanted is not None and wanted.type == "cpu":
        return [*found, Finding("device", "GPU", "note", "not looked for: --device cpu")]
    index = (wanted.index or 0) if wanted else 0
    if index < cuda.count:
        return [*found, Finding("device", "GPU", "ok", describe(properties(index)))]
    reason, command = why_none(cuda, nvml, pci, visible, index)
    if not (nvml.gpus or pci or cuda.count):  # nothing to repair
        reason, command = f"{reason}; no GPU is in this machine", "bt-fast doctor --device cpu"
        if wanted is None:
            return [*found, Finding("device", "GPU", "note", reason)]
    return [*found, Finding("device", "GPU", "FAILED", reason, command)]


def describe(properties: Any) -> str:
    """Name, compute capability and memory."""
    capability = f"{properties.major}.{properties.minor}"
    return f"{properties.name}, compute capability {capability}, {properties.total_memory / 2**30:.1f} GiB"


def why_none(cuda: TorchCuda, nvml: Nvml, pci: int, visible: str | None, index: int) -> tuple[str, str]:
    """Why torch cannot use the GPU of that index, and the command that helps."""
    there = len(nvml.gpus) or pci
    if visible is not None and cuda.built_for and cuda.count <= index < len(nvml.gpus):
        reason = f"CUDA_VISIBLE_DEVICES={visible} hides it: torch sees {cuda.count} of {there}"
        return reason, "env -u CUDA_VISIBLE_DEVICES bt-fast doctor"
    if cuda.count:
        return f"there is no cuda:{index}: torch sees {cuda.count}", "bt-fast doctor --device cuda:0"
    if cuda.built_for is None:
        also = f", but there is a GPU ({', '.join(nvml.gpus) or 'on the bus'})" if there else ""
        return f"torch is a build without CUDA{also}", "python -m pip install --force-reinstall torch"
    newest = nvml.cuda or _of_driver(cuda.error)
    if newest is not None and newest[0] < int(cuda.built_for.split(".")[0]):
        driver = f"driver {nvml.driver}" if nvml.driver else "the NVIDIA driver"
        reason = f"{driver} is too old: up to CUDA {newest[0]}.{newest[1]}, torch needs {cuda.built_for}"
        return reason, INSTALL_DRIVER
    if nvml.error is not None:
        commands = {
            "NVMLError_LibraryNotFound": ("no NVIDIA driver is installed", INSTALL_DRIVER),
            "NVMLError_DriverNotLoaded": ("the NVIDIA driver is not loaded", "sudo modprobe nvidia"),
            "NVMLError_LibRmVersionMismatch": ("the loaded driver is not the installed one", "sudo reboot"),
            "ModuleNotFoundError": ("nvidia-ml-py is missing", "python -m pip install nvidia-ml-py"),
        }
        reason, command = commands.get(nvml.kind, ("the driver does not answer", "nvidia-smi"))
        return f"{reason} ({nvml.error}; torch: {cuda.error or 'no device'})", command
    if not there:
        return "there is a driver", "nvidia-smi"
    return f"torch cannot use it ({cuda.error or 'no device'})", "python -c 'import torch; torch.cuda.init()'"


def _of_driver(error: str | None) -> tuple[int, int] | None:
    """The newest CUDA of a driver that torch calls too old, as torch says it; or None."""
    found = re.search(r"driver on your system is too old \(found version (\d+)\)", error or "")
    return (int(found[1]) // 1000, int(found[1]) % 1000 // 10) if found else None


def graphs(where: torch.device) -> list[Finding]:
    """Whether a graph can be captured and replayed on a stream of its own."""
    x = torch.zeros(1, device=where)
    if reason := engine.no_graphs_reason(x):
        return [Finding("device", GRAPHS, "note", f"attacks run eagerly: {reason}")]
    stream = engine.new_stream(x)
    stream.wait_stream(engine.current_stream(x))
    with engine.on(stream):
        x.add_(1)  # launched once before a capture
        with engine.capture(engine.new_pool()) as graph:
            x.add_(1)
        graph.replay()
    engine.current_stream(x).wait_stream(stream)
    if (value := x.item()) != 2:
        raise AssertionError(f"a replayed graph gave {value:g}, expected 2")
    return [Finding("device", GRAPHS, "ok", "a graph was captured and replayed on a stream")]


# What triton needs


def compiler(which: Callable[[str], str | None], header: Path, needed: bool) -> list[Finding]:
    """The C compiler and the header with which triton builds the launcher of a kernel."""
    asked = os.environ.get("CC")
    found = next((path for name in ([asked] if asked else ["gcc", "clang"]) if (path := which(name))), None)
    if found is None:
        text = f"CC={asked} is not there" if asked else "neither gcc nor clang is there"
        return [missing("C compiler", text, "unset CC" if asked else "sudo apt-get install gcc", needed)]
    if not header.is_file():
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        return [missing("C compiler", f"{found}, but no {header.name}", f"sudo apt-get install {package}", needed)]
    return [Finding("triton", "C compiler", "ok", found)]


def missing(name: str, text: str, command: str, needed: bool) -> Finding:
    """What triton lacks: a failure where kernels would run, and worth a note elsewhere."""
    if needed:
        return Finding("triton", name, "FAILED", text, command)
    return Finding("triton", name, "note", f"{text}; nothing here needs it")


def imported(problem: Plain | None, needed: bool) -> list[Finding]:
    """Whether triton can be imported, and is new enough. That it is missing is said where it would run."""
    if problem is None:
        return [Finding("triton", "import", "ok", "can be imported")]
    if problem == NO_TRITON:
        return []
    return [missing("import", problem.reason, problem.command or "", needed)]


def plain_on(where: torch.device) -> Plain | None:
    """Why ops on this CUDA device run in plain torch, as far as that is known now; or None."""
    try:
        return why_plain(torch.device(where.type, where.index or 0))
    except Exception as error:
        return Plain(said(error))


def launched(where: torch.device) -> list[Finding]:
    """Whether a kernel can be launched: the compiler, the launcher's build, the cache and the driver together."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is said here
        order_by_steps(torch.zeros(1, dtype=torch.int64, device=where), 1)
    if problem := plain_on(where):
        return [Finding("triton", "launch", "FAILED", problem.reason, problem.command)]
    found = [Finding("triton", "launch", "ok", "a kernel was launched")]
    if problem := why_plain(torch.device(where.type, where.index or 0), bfloat16=True):
        found.append(Finding("triton", "bfloat16", "note", f"plain torch: {problem.reason}", problem.command))
    return found


def triton_cache(environment: Mapping[str, str]) -> Path:
    """Where triton keeps compiled kernels."""
    home = environment.get("TRITON_HOME") or Path.home()
    return Path(environment.get("TRITON_CACHE_DIR") or Path(home) / ".triton" / "cache")


def cache(folder: Path, needed: bool) -> list[Finding]:
    """Whether compiled kernels can be kept in the folder, or in one that is made there."""
    place = next(p for p in (folder, *folder.absolute().parents) if os.path.exists(p))
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"kernel")
    except OSError as error:
        command = f"export TRITON_CACHE_DIR={Path(tempfile.gettempdir()) / 'triton'}"
        return [missing("cache", f"{folder} cannot be written ({said(error)})", command, needed)]
    return [Finding("triton", "cache", "ok", f"{folder}")]


# What runs


def fused(checks: Sequence[Check], where: torch.device, problem: Plain | None) -> list[Finding]:
    """One row for each op: the fused kernel or plain torch, and why: the `problem` of a CUDA device."""
    if where.type == "cuda" and problem is None:
        text = "fused kernel for {}; anything else, float64 too, in plain torch"
        return [Finding("fused or plain", c.op, "ok", text.format(c.fused)) for c in checks]
    problem = problem or Plain(f"kernels are CUDA's, and the device is {where}")
    return [Finding("fused or plain", c.op, "note", f"plain torch: {problem.reason}", problem.command) for c in checks]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """The cases are so small that to hand work to a second thread costs more than it saves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def self_check(checks: Sequence[Check], where: torch.device, seconds: float = SECONDS) -> list[Finding]:
    """One row for each op: its cases on the device. The first of each always runs, the others while there is time."""
    start, lost = time.perf_counter(), ""
    done: dict[str, list[str | float]] = {c.op: [] for c in checks}  # a difference, or what is wrong
    left = dict.fromkeys(done, 0)
    for number, check, name, given in _in_turn(checks):
        if lost or (number and time.perf_counter() - start > seconds):
            left[check.op] += 1
            continue
        try:
            done[check.op].append(largest_difference(check, given, where))
        except Exception as error:
            done[check.op].append(f"{name}: {said(error)}")
            if why := lost_by(said(error)):
                lost = f"{why} in {check.op}"
    return [_row(c, where, done[c.op], left[c.op], lost or f"{seconds:g} s were up: run it again") for c in checks]


def lost_by(message: str) -> str:
    """What has happened if an error is one after which the others fail too, in no fault of theirs; else nothing."""
    return next((happened for words, happened in TROUBLES.items() if words in message), "")


def _in_turn(checks: Sequence[Check]) -> list[tuple[int, Check, str, Given]]:
    """The first case of every op, the second of every op, ...: its number, op, name and arguments."""
    cases = [(n, check, *case) for check in checks for n, case in enumerate(check.cases().items())]
    return sorted(cases, key=lambda case: case[0])


def _row(check: Check, where: torch.device, done: list[str | float], left: int, why_left: str) -> Finding:
    wrong = [d for d in done if isinstance(d, str)]
    rest = f"; {left} skipped, since {why_left}" if left else ""
    if wrong:
        on_cuda, elsewhere = f"-m cuda tests/kernels -k {check.cuda_tests}", f"tests/test_{check.tests}.py"
        command = f"python -m pytest {on_cuda if where.type == 'cuda' else elsewhere}"
        command = FREE if any(FULL in w for w in wrong) else command
        return Finding("self-check", check.op, "FAILED", "; ".join(wrong) + rest, command)
    if not done:
        return Finding("self-check", check.op, "skipped", why_left)
    count = "1 case" if len(done) == 1 else f"{len(done)} cases"
    largest = max(d for d in done if not isinstance(d, str))
    return Finding("self-check", check.op, "ok", f"{count}, largest difference {largest:.1g}{rest}")


def training_steps(steps: Sequence[StepCheck], where: torch.device, lost: str = "") -> list[Finding]:
    """One row for each way to execute a step of `trades_loss` with BulletTrain; none runs on a device that was lost."""
    found = []
    for step in steps:
        found.append(_training_step(step, where, lost))
        if found[-1].status == "FAILED":
            lost = lost_by(found[-1].text)
    return found


def _training_step(step: StepCheck, where: torch.device, lost: str) -> Finding:
    try:
        if reason := lost or skip_reason(step, where):
            return Finding("a training step", step.name, "skipped", reason)
        text = f"3 updates, largest difference {step_difference(step, where):.1g}"
        return Finding("a training step", step.name, "ok", text)
    except Exception as error:
        tests = "-m cuda tests/test_engine_on_cuda.py" if step.graphs else "tests/objectives"
        command = FREE if out_of_memory(error) else f"python -m pytest {tests}"
        return Finding("a training step", step.name, "FAILED", said(error), command)


# The report


def verdict(findings: Sequence[Finding]) -> tuple[bool, str]:
    """Whether all that should work here works, and a sentence that says so."""
    wrong = [f"{f.section}: {f.name}" for f in findings if f.status == "FAILED"]
    if wrong:
        return False, f"{len(wrong)} of {len(findings)} FAILED ({', '.join(wrong)})"
    if _fused(findings):
        return True, "all works, with fused kernels; the full check is python -m pytest -m cuda"
    plain = next((f.text for f in findings if f.section == "fused or plain"), "no op was looked at")
    return True, f"all that should work here works; nothing fused ran ({plain})"


def lines(findings: Sequence[Finding]) -> list[str]:
    """The report: its sections, the verdict, and what to run next."""
    out, width = [], max(len(f.name) for f in findings)
    for section in SECTIONS:
        out.append(section)
        out += [f"  {f.name:<{width}}  {f.status:<7}  {f.text}" for f in findings if f.section == section]
    failed = [f for f in findings if f.status == "FAILED"]
    out += ["", verdict(findings)[1]]
    out += [f"next: {command}" for command in dict.fromkeys(f.next for f in failed or findings if f.next)]
    if _fused(findings) and any(f.section == "self-check" for f in failed):
        out.append(f"to go on in plain torch, without kernels: {WITHOUT_KERNELS}")
    if any(f.name == GRAPHS or (f.section == SECTIONS[-1] and not f.name.startswith("eager")) for f in failed):
        out.append('to go on without graphs: engine="exact", or --engine fast,graphs=off')
    return out


def _fused(findings: Sequence[Finding]) -> bool:
    """Whether kernels run here."""
    return any(f.section == "fused or plain" and f.status == "ok" for f in findings)


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """The same for a bug report."""
    works, sentence = verdict(findings)
    return {"works": works, "verdict": sentence, "findings": [asdict(f) for f in findings]}
