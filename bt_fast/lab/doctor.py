"""`bt-fast doctor`: checks what is installed, what runs fused or why not, and whether results are correct.

Probes get what they examine as arguments, and an exception in one becomes a finding: no probe breaks another.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
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
    FULL,
    STEPS,
    Check,
    StepCheck,
    largest_difference,
    reason,
    skip_reason,
    step_difference,
)
from bt_fast.lab.doctor_gpu import Nvml, TorchCuda, pci_gpus, read_nvml, torch_cuda, why_none
from bt_fast.ops import order_by_steps
from bt_fast.ops.availability import NO_TRITON, Plain, python_header, triton_problem, why_plain

SECTIONS = ("versions", "device", "triton", "fused or plain", "self-check", "a training step")
GRAPHS = "CUDA graphs and streams"
SECONDS = 10.0  # of the self-check; a first run also compiles the kernels
WITHOUT_KERNELS = "python -m pip uninstall triton"
LIST_PROCESSES = "nvidia-smi"  # lists the processes that fill the memory
# errors after which all others fail too: a part of their message, and their cause
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
        status: "ok", "note" (worth knowing, but no failure), "FAILED" or "skipped".
        next: the command to run, if any.
    """

    section: str
    name: str
    status: str
    text: str
    next: str | None = None


def examine(device: torch.device | None) -> list[Finding]:
    """Returns all findings about this machine and a device; None means the GPU if it can be used, else the CPU."""
    cuda = torch_cuda()
    where = device or torch.device("cuda" if cuda.count else "cpu")
    usable = where.type == "cpu" or (where.index or 0) < cuda.count
    on_gpu = where.type == "cuda" and usable
    launches = on_gpu and plain_on(where) is None
    nvml = read_nvml(lambda: importlib.import_module("pynvml"))
    visible, pci = os.environ.get("CUDA_VISIBLE_DEVICES"), pci_gpus(Path("/sys/bus/pci/devices"))
    rows = [
        *probe("versions", "packages", lambda: versions(importlib.metadata.version)),
        *probe("device", "GPU", lambda: gpu(cuda, nvml, pci, visible, device, torch.cuda.get_device_properties)),
    ]
    if usable:
        rows += probe("device", GRAPHS, lambda: graphs(where))
    rows += probe("triton", "import", lambda: imported(triton_problem(), on_gpu))
    rows += probe("triton", "C compiler", lambda: compiler(shutil.which, python_header(), launches))
    rows += probe("triton", "cache", lambda: cache(triton_cache(os.environ), launches))
    if launches:
        rows += probe("triton", "launch", lambda: launched(where))
    if not usable:
        return [*rows, *(Finding(s, "all", "skipped", f"{where} cannot be used") for s in SECTIONS[-2:])]
    rows += fused(CHECKS, where, plain_on(where) if on_gpu else None)
    with one_thread(), torch.device("cpu"):  # the device of the checks' cases
        rows += self_check(CHECKS, where)
        trouble = next((t for row in rows if row.status == "FAILED" and (t := trouble_in(row.text))), "")
        rows += training_steps(STEPS, where, trouble and f"{trouble} before")
    return rows


def probe(section: str, name: str, look: Callable[[], Sequence[Finding]]) -> Sequence[Finding]:
    """Returns the result of `look`, or its exception as a finding."""
    try:
        return look()
    except Exception as error:  # whatever fails there, the other probes go on
        return [Finding(section, name, "FAILED", reason(error), LIST_PROCESSES if out_of_memory(error) else None)]


def versions(version_of: Callable[[str], str]) -> list[Finding]:
    """Returns what is installed; `version_of` raises PackageNotFoundError like that of importlib.metadata."""
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
    here = {k: str(v) for k, v in provenance.machine(torch.device("cpu")).items() if k not in ("device", "driver")}
    here["torch"] += f", {built}"
    rows = [Finding("versions", name, "ok", text) for name, text in here.items()]
    for name in [name for name in FLOORS if name not in here]:
        try:
            version = version_of(name)
        except importlib.metadata.PackageNotFoundError:
            rows.append(Finding("versions", name, "note", "not installed"))
            continue
        if too_old(name, version):
            status = "note" if name == "triton" else "FAILED"  # the section triton reports whether it is needed
            rows.append(Finding("versions", name, status, f"{version}, needed: {FLOORS[name]}", upgrade(name)))
        else:
            rows.append(Finding("versions", name, "ok", version))
    return rows


# The GPU


def gpu(
    cuda: TorchCuda,
    nvml: Nvml,
    pci: int,
    visible: str | None,
    device: torch.device | None,
    properties: Callable[[int], Any],
) -> list[Finding]:
    """Reports the driver, and the GPU or why there is none: a failure if one was named, or is in the machine unused.

    Args:
        pci: the number on the bus. visible: CUDA_VISIBLE_DEVICES. device: None if none was named.
        properties: returns torch's properties of the device of an index.
    """
    driver = f"{nvml.driver}, up to CUDA {'.'.join(map(str, nvml.cuda or ()))}" if nvml.driver else f"{nvml.error}"
    rows = [Finding("device", "driver", "ok" if nvml.driver else "note", driver)]
    if device is not None and device.type == "cpu":
        return [*rows, Finding("device", "GPU", "note", "not looked for: --device cpu")]
    index = (device.index or 0) if device else 0
    if index < cuda.count:
        p = properties(index)
        text = f"{p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.1f} GiB"
        return [*rows, Finding("device", "GPU", "ok", text)]
    why, command = why_none(cuda, nvml, pci, visible, index)
    if not (nvml.gpus or pci or cuda.count):  # nothing to repair
        why, command = f"{why}; no GPU is in this machine", "bt-fast doctor --device cpu"
        if device is None:
            return [*rows, Finding("device", "GPU", "note", why)]
    return [*rows, Finding("device", "GPU", "FAILED", why, command)]


def graphs(where: torch.device) -> list[Finding]:
    """Reports whether a graph can be captured and replayed on a new stream."""
    x = torch.zeros(1, device=where)
    if why := engine.no_graphs_reason(x):
        return [Finding("device", GRAPHS, "note", f"attacks run eagerly: {why}")]
    stream = engine.new_stream(x)
    stream.wait_stream(engine.current_stream(x))
    with engine.on(stream):
        x.add_(1)  # a first launch before the capture
        with engine.capture(engine.new_pool()) as graph:
            x.add_(1)
        graph.replay()
    engine.current_stream(x).wait_stream(stream)
    if (value := x.item()) != 2:
        raise AssertionError(f"a replayed graph gave {value:g}, expected 2")
    return [Finding("device", GRAPHS, "ok", "a graph was captured and replayed on a stream")]


# What triton needs


def compiler(which: Callable[[str], str | None], header: Path, needed: bool) -> list[Finding]:
    """Reports the C compiler and the header with which triton builds the launcher of a kernel."""
    named = os.environ.get("CC")
    path = next((path for name in ([named] if named else ["gcc", "clang"]) if (path := which(name))), None)
    if path is None:
        text = f"CC={named} is not there" if named else "neither gcc nor clang is there"
        return [missing("C compiler", text, "unset CC" if named else "sudo apt-get install gcc", needed)]
    if not header.is_file():
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        return [missing("C compiler", f"{path}, but no {header.name}", f"sudo apt-get install {package}", needed)]
    return [Finding("triton", "C compiler", "ok", path)]


def missing(name: str, text: str, command: str, needed: bool) -> Finding:
    """Returns what triton lacks: a failure where kernels would run, else a note."""
    if needed:
        return Finding("triton", name, "FAILED", text, command)
    return Finding("triton", name, "note", f"{text}; nothing here needs it")


def imported(problem: Plain | None, needed: bool) -> list[Finding]:
    """Reports whether triton can be imported and is new enough; `problem` is reported where kernels would run."""
    if problem is None:
        return [Finding("triton", "import", "ok", "can be imported")]
    return [] if problem == NO_TRITON else [missing("import", problem.reason, problem.command or "", needed)]


def plain_on(where: torch.device) -> Plain | None:
    """Returns why ops on this CUDA device run in plain torch, as far as known; or None."""
    try:
        return why_plain(torch.device(where.type, where.index or 0))
    except Exception as error:
        return Plain(reason(error))


def launched(where: torch.device) -> list[Finding]:
    """Reports whether a kernel can be launched: compiler, launcher build, cache and driver together."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the finding reports it
        order_by_steps(torch.zeros(1, dtype=torch.int64, device=where), 1)
    if problem := plain_on(where):
        return [Finding("triton", "launch", "FAILED", problem.reason, problem.command)]
    rows = [Finding("triton", "launch", "ok", "a kernel was launched")]
    if problem := why_plain(torch.device(where.type, where.index or 0), bfloat16=True):
        rows.append(Finding("triton", "bfloat16", "note", f"plain torch: {problem.reason}", problem.command))
    return rows


def triton_cache(environment: Mapping[str, str]) -> Path:
    """Returns the folder where triton keeps compiled kernels."""
    home = environment.get("TRITON_HOME") or Path.home()
    return Path(environment.get("TRITON_CACHE_DIR") or Path(home) / ".triton" / "cache")


def cache(folder: Path, needed: bool) -> list[Finding]:
    """Reports whether compiled kernels can be kept in the folder, or in one that triton would make there."""
    place = next(p for p in (folder, *folder.absolute().parents) if os.path.exists(p))
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"kernel")
    except OSError as error:
        command = f"export TRITON_CACHE_DIR={Path(tempfile.gettempdir()) / 'triton'}"
        return [missing("cache", f"{folder} cannot be written ({reason(error)})", command, needed)]
    return [Finding("triton", "cache", "ok", f"{folder}")]


# What runs


def fused(checks: Sequence[Check], where: torch.device, problem: Plain | None) -> list[Finding]:
    """Returns one row for each op: the fused kernel or plain torch, with the `problem` of a CUDA device."""
    if where.type == "cuda" and problem is None:
        text = "fused kernel for {}; anything else, float64 too, in plain torch"
        return [Finding("fused or plain", c.op, "ok", text.format(c.fused)) for c in checks]
    problem = problem or Plain(f"kernels are CUDA's, and the device is {where}")
    return [Finding("fused or plain", c.op, "note", f"plain torch: {problem.reason}", problem.command) for c in checks]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Sets torch to one thread: the cases are too small for a second one to pay."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def self_check(checks: Sequence[Check], where: torch.device, seconds: float = SECONDS) -> list[Finding]:
    """Returns one row for each op: its cases on the device. The first always runs, others while there is time."""
    start, trouble = time.perf_counter(), ""
    results: dict[str, list[str | float]] = {c.op: [] for c in checks}  # a difference, or an error's text
    left = dict.fromkeys(results, 0)
    cases = [(n, check, *case) for check in checks for n, case in enumerate(check.cases().items())]
    for number, check, name, arguments in sorted(cases, key=lambda case: case[0]):  # first cases of all ops, ...
        if trouble or (number and time.perf_counter() - start > seconds):
            left[check.op] += 1
            continue
        try:
            results[check.op].append(largest_difference(check, arguments, where))
        except Exception as error:
            results[check.op].append(f"{name}: {reason(error)}")
            if happened := trouble_in(reason(error)):
                trouble = f"{happened} in {check.op}"
    why_left = trouble or f"{seconds:g} s were up: run it again"
    return [_row(c, where, results[c.op], left[c.op], why_left) for c in checks]


def trouble_in(message: str) -> str:
    """Returns the cause if an error is one after which all others fail too; else nothing."""
    return next((happened for words, happened in TROUBLES.items() if words in message), "")


def _row(check: Check, where: torch.device, results: list[str | float], left: int, why_left: str) -> Finding:
    wrong = [result for result in results if isinstance(result, str)]
    rest = f"; {left} skipped, since {why_left}" if left else ""
    if wrong:
        on_cuda, elsewhere = f"-m cuda tests/kernels -k {check.cuda_tests}", f"tests/test_{check.tests}.py"
        command = f"python -m pytest {on_cuda if where.type == 'cuda' else elsewhere}"
        command = LIST_PROCESSES if any(FULL in text for text in wrong) else command
        return Finding("self-check", check.op, "FAILED", "; ".join(wrong) + rest, command)
    if not results:
        return Finding("self-check", check.op, "skipped", why_left)
    count = "1 case" if len(results) == 1 else f"{len(results)} cases"
    largest = max(result for result in results if not isinstance(result, str))
    return Finding("self-check", check.op, "ok", f"{count}, largest difference {largest:.1g}{rest}")


def training_steps(steps: Sequence[StepCheck], where: torch.device, trouble: str = "") -> list[Finding]:
    """Returns one row for each way to execute a step of `trades_loss` with BulletTrain; none runs after `trouble`."""
    rows = []
    for step in steps:
        rows.append(_training_step(step, where, trouble))
        if rows[-1].status == "FAILED":
            trouble = trouble_in(rows[-1].text)
    return rows


def _training_step(step: StepCheck, where: torch.device, trouble: str) -> Finding:
    try:
        if why := trouble or skip_reason(step, where):
            return Finding("a training step", step.name, "skipped", why)
        text = f"3 updates, largest difference {step_difference(step, where):.1g}"
        return Finding("a training step", step.name, "ok", text)
    except Exception as error:
        tests = "-m cuda tests/test_engine_on_cuda.py" if step.graphs else "tests/objectives"
        command = LIST_PROCESSES if out_of_memory(error) else f"python -m pytest {tests}"
        return Finding("a training step", step.name, "FAILED", reason(error), command)


# The report


def verdict(findings: Sequence[Finding]) -> tuple[bool, str]:
    """Returns whether all that should work here works, and a sentence about it."""
    wrong = [f"{f.section}: {f.name}" for f in findings if f.status == "FAILED"]
    if wrong:
        return False, f"{len(wrong)} of {len(findings)} FAILED ({', '.join(wrong)})"
    if _fused(findings):
        return True, "all works, with fused kernels; the full check is python -m pytest -m cuda"
    plain = next((f.text for f in findings if f.section == "fused or plain"), "no op was looked at")
    return True, f"all that should work here works; nothing fused ran ({plain})"


def lines(findings: Sequence[Finding]) -> list[str]:
    """Returns the report: its sections, the verdict, and what to run next."""
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
    """Returns the report as data, for a bug report."""
    works, sentence = verdict(findings)
    return {"works": works, "verdict": sentence, "findings": [asdict(f) for f in findings]}
