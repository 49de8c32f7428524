"""Where kernels cannot run on a GPU, the ops run in plain torch, with equal results and one warning with the reason."""

import contextlib
import importlib
import json
import os
import pkgutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from bt_fast import ops
from bt_fast.floors import numbers
from bt_fast.lab.doctor_checks import CHECKS
from bt_fast.ops import availability, divergence, order_by_steps, trial_compile
from bt_fast.ops.availability import CAPABILITIES, NEWER, NEWER_CAPABILITIES, NO_TRITON, Plain
from bt_fast.ops.order_by_steps import order_reference

ROOT = Path(__file__).parents[1]
STEPS = torch.tensor([3, 0, 5, 1, 5, 2])
NO_COMPILER = "Failed to find C compiler. Please specify via CC environment variable."


def cuda_tensors():
    """Makes CPU tensors, which hold values, report that they are CUDA's."""
    return mock.patch.object(torch.Tensor, "is_cuda", True)


@pytest.fixture
def gpu(monkeypatch):
    """Sets the device's compute capability and triton's version, and clears all else that is known."""
    for name, value in (("_plain", {}), ("_warnings", set()), ("_launched", set())):
        monkeypatch.setattr(availability, name, value)
    availability.compiles_for.cache_clear()

    def known(capability=(9, 0), triton="3.6.0", problem=None):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(availability, "triton_problem", lambda: problem)
        monkeypatch.setattr(availability, "triton_version", lambda: triton)

    known()
    yield known
    availability.compiles_for.cache_clear()


@contextlib.contextmanager
def launching(launch):
    """Replaces every kernel launch by `launch()`, on CPU tensors that call themselves CUDA's; yields the warnings."""
    files = {}
    for result in pkgutil.iter_modules([str(ROOT / "kernels")]):
        names = [w for w in (ROOT / "kernels" / f"{result.name}.py").read_text().split() if w.endswith("_kernel(")]
        kernel = mock.MagicMock()
        kernel.__getitem__.return_value = lambda *_, **__: launch()
        files[f"bt_fast.kernels.{result.name}"] = SimpleNamespace(**{name[:-1]: kernel for name in names})
    package = importlib.import_module("bt_fast.kernels")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as messages, cuda_tensors():
        warnings.simplefilter("always")
        for name, file in files.items():
            patch.setitem(sys.modules, name, file)
            patch.setattr(package, name.rpartition(".")[2], file, raising=False)
        yield messages


def raising(error):
    return mock.Mock(side_effect=error)


def ordered():
    return order_by_steps(STEPS, 5)


def assert_plain(messages, *words):
    """Asserts that the op runs in plain torch, with exactly one warning, which has these words."""
    for result, expected in zip(ordered(), order_reference(STEPS, 5), strict=True):
        assert torch.equal(result, expected)
    (warning,) = messages
    text = str(warning.message)
    assert text.startswith("bt_fast runs in plain torch on cpu, since ")
    assert "results are the same, but without fused kernels each op is many launches" in text
    assert "\n" not in text
    for word in words:
        assert word in text


# Known before a launch


@pytest.mark.parametrize(
    ("known", "words"),
    [
        ({"problem": NO_TRITON}, ["triton is not installed", "python -m pip install 'triton>=3.2'"]),
        ({"capability": (7, 0)}, ["compute capability 7.0 is below 7.5"]),
        ({"capability": (6, 1)}, ["compute capability 6.1 is below 7.5"]),
    ],
)
def test_what_is_known_without_a_launch_is_reported_once_and_nothing_is_launched(gpu, known, words):
    gpu(**known)
    launch = mock.Mock()
    with launching(launch) as messages:
        for _ in range(3):
            ordered()
        assert_plain(messages, *words)
    launch.assert_not_called()


def test_what_holds_for_every_dtype_is_reported_once_for_all(gpu):
    gpu(problem=NO_TRITON)
    with launching(mock.Mock()) as messages:
        assert not any(availability.kernels_run(torch.ones(1, dtype=d)) for d in (torch.float32, torch.bfloat16))
    assert len(messages) == 1


def test_tensors_of_the_cpu_ask_for_nothing_and_nothing_is_reported(gpu):
    gpu(problem=NO_TRITON)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ordered()
    assert availability._plain == {}


def test_where_kernels_run_they_are_launched_and_nothing_is_reported(gpu):
    launch = mock.Mock()
    with launching(launch) as messages:
        ordered()
    assert (launch.call_count, messages) == (1, [])


def test_each_way_of_triton_to_be_unfit_has_its_reason_and_command(monkeypatch):
    look = availability.triton_problem.__wrapped__
    monkeypatch.setitem(sys.modules, "triton", None)
    assert look() == NO_TRITON
    monkeypatch.setattr(availability.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.1.0"))
    assert look() == Plain("triton 3.1.0 is older than 3.2", "python -m pip install --upgrade 'triton>=3.2'")
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.2.0+git1234"))
    assert look() is None
    monkeypatch.setattr(availability, "triton_version", raising(OSError("libcuda.so.1: cannot open\nmore")))
    broken = "triton cannot be imported (OSError: libcuda.so.1: cannot open)"
    assert look() == Plain(broken, "python -m pip install --force-reinstall triton")


@pytest.mark.parametrize("code", [0, -6])
def test_a_gpu_that_is_newer_than_triton_is_tried_in_another_process_which_it_may_abort(gpu, monkeypatch, code):
    gpu(capability=(13, 0))
    run = mock.Mock(return_value=SimpleNamespace(returncode=code))
    monkeypatch.setattr(availability.subprocess, "run", run)
    with launching(mock.Mock()) as messages:
        if code:
            assert_plain(
                messages, "triton 3.6.0 does not compile for compute capability 13.0", "--upgrade torch triton"
            )
        ordered()
    assert run.call_count == 1
    assert run.call_args.args[0][1:] == ["-m", "bt_fast.ops.trial_compile", "130"]
    assert len(messages) == bool(code)


@pytest.mark.parametrize(("triton", "tried"), [("3.2.0", True), ("3.5.1", True), ("3.6.0", False), ("3.10.0", False)])
def test_blackwell_is_tried_first_with_a_triton_that_was_not_tested_on_it(gpu, monkeypatch, triton, tried):
    gpu(capability=(12, 0), triton=triton)
    run = mock.Mock(return_value=SimpleNamespace(returncode=0))
    monkeypatch.setattr(availability.subprocess, "run", run)
    assert availability.compiles_for((12, 0))
    assert availability.compiles_for((9, 0))
    assert run.called == tried


@pytest.mark.parametrize(
    ("capability", "triton", "runs"),
    [((7, 5), "3.2.0", False), ((7, 5), "3.6.0", True), ((8, 0), "3.2.0", True)],
)
def test_bfloat16_of_turing_needs_a_newer_triton_and_nothing_else_does(gpu, capability, triton, runs):
    gpu(capability=capability, triton=triton)
    with launching(mock.Mock()) as messages:
        assert availability.kernels_run(torch.ones(1))
        assert availability.kernels_run(torch.ones(1).half())
        assert availability.kernels_run(torch.ones(1).bfloat16()) == runs
        assert len(messages) == (not runs)
    if not runs:
        assert "triton 3.2.0 does not compile bfloat16 for compute capability 7.5" in str(messages[0].message)


def test_this_triton_compiles_for_what_it_is_trusted_with():
    version = importlib.import_module("triton").__version__
    for major, minor in (*CAPABILITIES, *(NEWER_CAPABILITIES if numbers(version)[:2] >= NEWER else ())):
        trial_compile.main(10 * major + minor)


def test_what_this_triton_cannot_compile_is_recognised_and_this_process_lives_on(gpu, monkeypatch):
    monkeypatch.setattr(availability, "triton_version", lambda: importlib.import_module("triton").__version__)
    assert not availability.compiles_for((99, 0))
    monkeypatch.setattr(availability, "CAPABILITIES", ())
    assert availability.compiles_for((9, 0))


# Known from a launch


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError(NO_COMPILER), ["triton finds no C compiler", "sudo apt-get install gcc"]),
        (subprocess.CalledProcessError(1, ["gcc", "main.c"]), ["cannot build its launcher", "bt-fast doctor"]),
        (PermissionError(13, "Permission denied", "/root/.triton"), ["triton's cache", "export TRITON_CACHE_DIR="]),
        (OSError(122, "Disk quota exceeded"), ["triton's cache cannot be written", "Disk quota exceeded"]),
        (RuntimeError("0 active drivers ([]).\nmore"), ["first launch failed (RuntimeError: 0 active", "doctor"]),
        (ValueError("ptxas fatal"), ["first launch failed (ValueError: ptxas fatal)"]),
    ],
)
def test_a_first_launch_that_fails_is_reported_once_and_not_tried_again(gpu, error, words):
    launch = raising(error)
    with launching(launch) as messages:
        for _ in range(3):
            ordered()
        assert_plain(messages, *words)
    assert launch.call_count == 1


def test_a_header_of_python_that_is_missing_is_named(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(availability.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with launching(raising(subprocess.CalledProcessError(1, ["gcc", "main.c"]))) as messages:
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        assert_plain(messages, f"{tmp_path / 'Python.h'} is missing", f"sudo apt-get install {package}")


def test_a_compiler_that_cc_names_and_that_is_not_there_is_named(gpu, monkeypatch):
    monkeypatch.setenv("CC", "/no/cc")
    with launching(raising(FileNotFoundError(2, "No such file or directory", "/no/cc"))) as messages:
        assert_plain(messages, "CC=/no/cc cannot be run", "unset CC")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.op)
def test_every_op_gives_plain_torch_s_result_when_its_launch_fails(gpu, check):
    op = getattr(divergence, f"{check.op}_rows", None) or getattr(ops, check.op)
    cases = {name: case for name, case in check.cases().items() if max(map(length, case.values())) > 1}
    for name, case in cases.items():
        availability._plain.clear()
        expected = check.results(op, **copied(case))
        with launching(raising(RuntimeError(NO_COMPILER))):
            actual = check.results(op, **copied(case))
        assert availability._plain, name
        for result, right in expected.items():
            assert torch.equal(actual[result].nan_to_num(7.0), right.nan_to_num(7.0)), (name, result)


def length(value):
    return len(value) if isinstance(value, torch.Tensor) and value.dim() else 0


def copied(case):
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in case.items()}


def test_every_launch_can_fall_back():
    files = [importlib.import_module(f"bt_fast.ops.{file.name}") for file in pkgutil.iter_modules(ops.__path__)]
    launches = {f for file in files for name, f in vars(file).items() if name.startswith("launch_")}
    assert launches
    assert all(hasattr(launch, "__wrapped__") for launch in launches)


def test_after_a_launch_that_went_well_a_bug_is_raised_and_what_triton_lacks_is_not(gpu):
    launch = mock.Mock()
    with launching(launch) as messages:
        ordered()
        launch.side_effect = ValueError("a bug")
        with pytest.raises(ValueError, match="a bug"):
            ordered()
        assert messages == []
        launch.side_effect = RuntimeError(NO_COMPILER)
        assert_plain(messages, "triton finds no C compiler")


def test_an_op_on_nothing_launches_nothing_and_says_nothing_of_the_device(gpu):
    with launching(raising(ValueError("first"))) as messages:
        ops.ascent_direction(torch.empty(0, 3), torch.empty(0, 3))
        assert_plain(messages, "the first launch failed (ValueError: first)")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("Triton Error [CUDA]: out of memory")])
def test_a_full_memory_is_raised_and_says_nothing_of_kernels(gpu, error):
    launch = raising(error)
    with launching(launch) as messages:
        for _ in range(2):
            with pytest.raises(RuntimeError, match=str(error).split(": ")[-1]):
                ordered()
    assert (launch.call_count, messages) == (2, [])


def test_a_launch_inside_a_capture_says_nothing_of_kernels(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    launch = raising(RuntimeError("operation not permitted when stream is capturing"))
    with launching(launch) as messages:
        with pytest.raises(RuntimeError, match="not permitted"):
            ordered()
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        launch.side_effect = None
        ordered()
    assert (launch.call_count, messages) == (2, [])


def test_a_step_that_is_half_done_is_not_done_again_by_plain_torch(gpu):
    x = torch.full((2, 1, 4, 4), 0.5)
    given = (x, torch.ones_like(x), x.clone(), torch.full((2,), 0.1), 0.3, 0.0, 1.0, torch.tensor(5))
    launch = mock.Mock(side_effect=[None, RuntimeError(NO_COMPILER)])
    with launching(launch) as messages, pytest.raises(RuntimeError, match="C compiler"):
        ops.l2_step_(*given)
    assert torch.equal(x, torch.full_like(x, 0.5))  # unchanged by the kernels, which do nothing here
    assert messages == []


# Real messages of triton


REAL = """
import json, os, sys, warnings
import torch
from test_availability import cuda_tensors
from bt_fast.ops import availability, order_by_steps
steps = torch.tensor([3, 0, 5, 1, 5, 2])
expected = order_by_steps(steps, 5)
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_properties = lambda device: None

def said():
    availability._plain.clear()
    with warnings.catch_warnings(record=True) as found, cuda_tensors():
        warnings.simplefilter("always")
        results = order_by_steps(steps, 5)
    assert all(torch.equal(a, b) for a, b in zip(results, expected)), results
    return [str(w.message) for w in found if "bt_fast" in str(w.message)]

print(json.dumps({"no driver": said()}))
torch.cuda.is_available = lambda: True
folder = sys.argv[1]
os.environ |= {"TRITON_LIBCUDA_PATH": folder, "TRITON_CACHE_DIR": folder + "/cache", "PATH": folder}
os.environ.pop("CC", None)
print(json.dumps({"no compiler": said()}))
os.environ["TRITON_CACHE_DIR"] = folder + "/file/cache"
print(json.dumps({"no cache": said()}))
os.environ["TRITON_CACHE_DIR"] = folder + "/cache"
os.environ["CC"] = "/bin/false"
print(json.dumps({"broken compiler": said()}))
"""


def test_triton_s_own_errors_are_recognised_and_the_results_are_plain_torch_s(tmp_path):
    """Runs in a process where triton assumes a GPU, up to the build of its launcher."""
    pytest.importorskip("triton")
    (tmp_path / "file").write_text("")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run([sys.executable, "-c", REAL, tmp_path], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    actual = {}
    for line in result.stdout.splitlines():
        actual |= json.loads(line)
    words = {
        "no driver": "the first launch failed (RuntimeError: 0 active drivers",
        "no compiler": "triton finds no C compiler to build its launcher with",
        "no cache": f"triton's cache cannot be written (NotADirectoryError: [Errno 20] Not a directory: '{tmp_path}",
        "broken compiler": "triton cannot build its launcher (CalledProcessError: Command '['/bin/false'",
    }
    assert list(actual) == list(words)
    for case, text in words.items():
        (warning,) = actual[case]
        assert text in warning
