import dataclasses
import importlib
import importlib.metadata
import json
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from click.testing import CliRunner
from emulated_device import EmulatedDevice
from emulated_tf32 import EmulatedTf32
from pretended_device import DEVICE, pretended_device
from torch.utils._pytree import tree_leaves

from bt_fast import ops
from bt_fast.attack import device as engine
from bt_fast.attack.runners import run_eager
from bt_fast.lab import doctor, doctor_checks
from bt_fast.lab.cli import cli
from bt_fast.lab.doctor import Finding
from bt_fast.lab.doctor_checks import CHECKS, STEPS
from bt_fast.lab.doctor_gpu import Nvml, TorchCuda
from bt_fast.ops import availability, divergence
from bt_fast.ops.availability import NO_TRITON, Plain

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ONE = Nvml("580.1", (13, 0), ("H100",))
FULL_CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
OLD = "RuntimeError: The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver"
OPS = [check.op for check in CHECKS]


def bt_fast(*arguments):
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def only(findings):
    (result,) = findings
    return result


def failed(findings):
    return [f.name for f in findings if f.status == "FAILED"]


# The command


def test_a_machine_without_a_gpu_works_and_the_report_says_that_nothing_fused_ran(tmp_path):
    result = bt_fast("doctor", "--device", "cpu", "--json", tmp_path / "found.json")
    assert result.exit_code == 0, result.output
    assert "all that should work here works; nothing fused ran" in result.output
    written = json.loads((tmp_path / "found.json").read_text())
    assert written["works"]
    assert list(dict.fromkeys(f["section"] for f in written["findings"])) == list(doctor.SECTIONS)
    for actual in written["findings"]:
        row = f"{actual['name']} {actual['status']} {actual['text']}"
        assert row in [" ".join(line.split()) for line in result.output.splitlines()]
    checked = {f["name"]: f["status"] for f in written["findings"] if f["section"] == "self-check"}
    assert checked == dict.fromkeys(OPS, "ok")


def test_a_wrong_result_makes_exit_code_1_and_names_the_next_command():
    wrong = mock.patch.object(ops, "order_by_steps", lambda steps, most: (steps, steps[:most]))
    with wrong, mock.patch.object(doctor, "STEPS", ()):
        result = bt_fast("doctor", "--device", "cpu")
    assert result.exit_code == 1
    assert "FAILED (self-check: order_by_steps)" in result.output
    assert "next: python -m pytest tests/test_order_by_steps.py" in result.output.splitlines()


def test_a_device_that_cannot_be_used_fails_and_nothing_runs_elsewhere_instead():
    with mock.patch.object(doctor, "torch_cuda", return_value=TorchCuda("13.0", 1)):
        result = bt_fast("doctor", "--device", "cuda:7")
    assert result.exit_code == 1
    assert "there is no cuda:7: torch sees 1" in result.output
    assert "next: bt-fast doctor --device cuda:0" in result.output
    assert result.output.count("cuda:7 cannot be used") == 2


@pytest.mark.parametrize("name", ["tpu", "mps", "cuda:x"])
def test_a_device_of_another_kind_is_a_mistake_of_the_user(name):
    result = bt_fast("doctor", "--device", name)
    assert result.exit_code == 2
    assert result.stderr == f"bt-fast: --device {name}: expected cpu, cuda or cuda:N\n"


# Driver and GPU


@pytest.mark.parametrize(
    ("cuda", "nvml", "pci", "visible", "reason", "command"),
    [
        (TorchCuda(None, 0), ONE, 1, None, "build without CUDA, but there is a GPU (H100)", "--force-reinstall torch"),
        (TorchCuda("13.0", 0), Nvml("470.1", (11, 4), ("T4",)), 1, None, "470.1 is too old", "ubuntu-drivers"),
        (TorchCuda("13.0", 0), ONE, 1, "", "CUDA_VISIBLE_DEVICES= hides it", "env -u CUDA_VISIBLE_DEVICES"),
        (TorchCuda("13.0", 0), ONE, 1, "-1", "CUDA_VISIBLE_DEVICES=-1 hides it", "env -u CUDA_VISIBLE_DEVICES"),
        (
            TorchCuda("13.0", 0, OLD),
            Nvml(error="ModuleNotFoundError: pynvml"),
            1,
            None,
            "up to CUDA 11.4",
            "ubuntu-drivers",
        ),
        (TorchCuda("13.0", 0, "RuntimeError: broken"), ONE, 1, None, "RuntimeError: broken", "torch.cuda.init()"),
    ],
)
def test_a_gpu_that_is_there_and_cannot_be_used_fails_with_the_reason(cuda, nvml, pci, visible, reason, command):
    result = doctor.gpu(cuda, nvml, pci, visible, None, None)[-1]
    assert result.status == "FAILED"
    assert reason in result.text
    assert command in result.next


@pytest.mark.parametrize(
    ("kind", "reason", "command"),
    [
        ("NVMLError_LibraryNotFound", "no NVIDIA driver is installed", "sudo ubuntu-drivers install"),
        ("NVMLError_DriverNotLoaded", "not loaded", "sudo modprobe nvidia"),
        ("NVMLError_LibRmVersionMismatch", "not the installed one", "sudo reboot"),
        ("NVMLError_Unknown", "does not answer", "nvidia-smi"),
        ("ModuleNotFoundError", "nvidia-ml-py is missing", "python -m pip install nvidia-ml-py"),
    ],
)
def test_each_way_of_a_driver_to_be_missing_has_its_reason_and_command(kind, reason, command):
    nvml = Nvml(error=f"{kind}: words of its own", kind=kind)
    result = doctor.gpu(TorchCuda("13.0", 0, "RuntimeError: no driver"), nvml, 1, None, None, None)[-1]
    assert (result.status, result.next) == ("FAILED", command)
    assert reason in result.text
    assert "words of its own" in result.text
    assert "RuntimeError: no driver" in result.text


def test_without_a_gpu_in_the_machine_there_is_nothing_to_repair_unless_one_is_asked_for():
    nothing = (TorchCuda("13.0", 0), Nvml(error="no library", kind="NVMLError_LibraryNotFound"), 0, None)
    result = doctor.gpu(*nothing, None, None)[-1]
    assert (result.status, result.next) == ("note", None)
    assert "no GPU is in this machine" in result.text
    requested = doctor.gpu(*nothing, GPU, None)[-1]
    assert (requested.status, requested.next) == ("FAILED", "bt-fast doctor --device cpu")


def test_an_index_that_the_environment_hides_is_distinguished_from_one_that_is_not_there():
    two = Nvml("580.1", (13, 0), ("H100", "H100"))
    hidden, missing = (doctor.gpu(TorchCuda("13.0", 1), two, 2, "0", torch.device("cuda", i), None)[-1] for i in (1, 2))
    assert "CUDA_VISIBLE_DEVICES=0 hides it: torch sees 1 of 2" in hidden.text
    assert "there is no cuda:2: torch sees 1" in missing.text


def test_a_gpu_that_can_be_used_is_described():
    properties = SimpleNamespace(name="H100", major=9, minor=0, total_memory=80 * 2**30)
    driver, result = doctor.gpu(TorchCuda("13.0", 1), ONE, 1, None, None, lambda index: properties)
    assert (driver.status, driver.text) == ("ok", "580.1, up to CUDA 13.0")
    assert (result.status, result.text) == ("ok", "H100, compute capability 9.0, 80.0 GiB")


def test_nvml_is_read_and_its_own_error_kept():
    nvml = mock.Mock()
    nvml.nvmlSystemGetDriverVersion.return_value = "470.1"
    nvml.nvmlSystemGetCudaDriverVersion_v2.return_value = 11040
    nvml.nvmlDeviceGetCount.return_value = 2
    nvml.nvmlDeviceGetName.return_value = "T4"
    assert doctor.read_nvml(lambda: nvml) == Nvml("470.1", (11, 4), ("T4", "T4"))
    nvml.nvmlShutdown.assert_called_once()
    nvml.nvmlInit.side_effect = PermissionError("not yours")
    assert doctor.read_nvml(lambda: nvml) == Nvml(error="PermissionError: not yours", kind="PermissionError")


def test_gpus_on_the_bus_are_counted_without_a_driver(tmp_path):
    for name, vendor, kind in (("a", "0x10de", "0x030200"), ("b", "0x10de", "0x040300"), ("c", "0x8086", "0x030000")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "class").write_text(f"{kind}\n")
    (tmp_path / "empty").mkdir()
    assert doctor.pci_gpus(tmp_path) == 1
    assert doctor.pci_gpus(tmp_path / "not there") == 0


def test_graphs_are_tried_where_there_are_any():
    assert only(doctor.graphs(CPU)).status == "note"
    with EmulatedDevice():
        assert only(doctor.graphs(CPU)).status == "ok"
    with EmulatedDevice(), mock.patch.object(engine, "capture", side_effect=RuntimeError("no memory")):
        broken = only(doctor.probe("device", doctor.GRAPHS, lambda: doctor.graphs(CPU)))
    assert (broken.status, broken.text) == ("FAILED", "RuntimeError: no memory")
    assert any(line.startswith("to go on without graphs") for line in doctor.lines([broken]))


# Versions and what triton needs


def test_a_package_that_is_missing_is_a_row_like_the_others():
    def version_of(name):
        if name == "triton":
            raise importlib.metadata.PackageNotFoundError(name)
        return "99.2"

    result = {f.name: (f.status, f.text) for f in doctor.versions(version_of)}
    assert result["triton"] == ("note", "not installed")
    assert result["numpy"] == ("ok", "99.2")
    assert result["torch"][1].startswith(torch.__version__)


def test_a_package_that_is_too_old_fails_with_what_is_needed_and_the_command():
    result = {f.name: f for f in doctor.versions(lambda name: "1.2")}
    assert (result["numpy"].status, result["numpy"].text) == ("FAILED", "1.2, needed: 1.24")
    assert result["nvidia-ml-py"].next == "python -m pip install --upgrade 'nvidia-ml-py>=12'"
    assert result["triton"].status == "note"  # without a GPU nothing is lost


@pytest.mark.parametrize("needed", [True, False])
def test_what_triton_lacks_fails_where_kernels_would_run_and_is_a_note_elsewhere(needed, tmp_path, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    file = tmp_path / "file"
    file.write_text("")

    broken = Plain("triton cannot be imported (ImportError: libcuda)", "pip install --force-reinstall triton")
    result = [
        only(doctor.compiler(lambda name: None, file, needed)),
        only(doctor.compiler(lambda name: f"/bin/{name}", tmp_path / "Python.h", needed)),
        only(doctor.cache(file / "cache", needed)),
        only(doctor.imported(broken, needed)),
    ]
    assert [f.status for f in result] == ["FAILED" if needed else "note"] * 4
    if needed:
        commands = ("apt-get install gcc", "-dev", "export TRITON_CACHE_DIR=", "--force-reinstall triton")
        assert all(command in f.next for command, f in zip(commands, result, strict=True))
    else:
        assert not any(f.next for f in result)


def test_what_triton_has_is_ok_and_its_cache_is_not_made(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", "cc-of-mine")
    assert only(doctor.compiler(lambda name: name, tmp_path, True)).status == "FAILED"  # a folder is not a header
    (tmp_path / "Python.h").write_text("")
    result = only(doctor.compiler(lambda name: f"/bin/{name}", tmp_path / "Python.h", True))
    assert (result.status, result.text) == ("ok", "/bin/cc-of-mine")
    assert only(doctor.cache(tmp_path / "a" / "b", True)).status == "ok"
    assert [p.name for p in tmp_path.iterdir()] == ["Python.h"]
    assert doctor.triton_cache({"TRITON_HOME": "/home/me"}).as_posix() == "/home/me/.triton/cache"
    assert doctor.triton_cache({"TRITON_CACHE_DIR": "/fast"}).as_posix() == "/fast"


def test_an_exception_of_a_probe_is_a_finding():
    def broken():
        raise RuntimeError("first line\nsecond line")

    assert only(doctor.probe("device", "GPU", broken)) == Finding("device", "GPU", "FAILED", "RuntimeError: first line")


# Fused or plain


def test_each_op_says_why_it_does_not_run_fused():
    for where, problem, reason in ((CPU, None, "the device is cpu"), (GPU, NO_TRITON, "triton is not installed")):
        rows = doctor.fused(CHECKS, where, problem)
        assert [f.name for f in rows] == OPS
        assert all(f.status == "note" and reason in f.text for f in rows)
    assert {f.next for f in rows} == {"python -m pip install 'triton>=3.2'"}
    assert {f.status for f in doctor.fused(CHECKS, GPU, None)} == {"ok"}


def test_what_is_reported_to_run_fused_is_what_the_ops_take():
    pytest.importorskip("triton")
    takes = {name: importlib.import_module(f"bt_fast.ops.{name}") for name in ("rows", "pgd_step", "gather_start")}
    with pretended_device():
        for dtype, expected in ((torch.float32, True), (torch.bfloat16, True), (torch.float64, False)):
            z, x = torch.empty(4, 3, dtype=dtype, device=DEVICE), torch.empty(4, 3, 8, 8, dtype=dtype, device=DEVICE)
            assert takes["rows"].kernel_takes(z) == expected
            assert takes["pgd_step"].kernel_takes(x) == expected
            assert takes["gather_start"]._kernel_takes(x) == expected


@pytest.fixture
def forgotten(monkeypatch):
    """Clears all that is known of devices."""
    monkeypatch.setattr(availability, "_plain", {})
    monkeypatch.setattr(availability, "_warnings", set())
    monkeypatch.setattr(availability, "_launched", set())


def test_a_gpu_that_is_too_old_for_the_kernels_is_a_note_and_its_ops_run_in_plain_torch(forgotten, monkeypatch):
    monkeypatch.setattr(availability, "triton_problem", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    rows = doctor.fused(CHECKS, GPU, doctor.plain_on(GPU))
    assert {f.status for f in rows} == {"note"}
    assert "compute capability 7.0 is below 7.5" in rows[0].text
    assert doctor.verdict(rows)[0]


def test_a_launch_that_fails_is_a_finding_with_the_command(forgotten, monkeypatch):
    problem = Plain("triton finds no C compiler to build its launcher with", "sudo apt-get install gcc")
    availability._plain[CPU, False] = problem
    monkeypatch.setattr(doctor, "plain_on", lambda where: problem)
    assert only(doctor.launched(CPU)) == Finding("triton", "launch", "FAILED", *problem)


def test_a_launch_that_goes_well_is_reported_and_that_bfloat16_does_not_compile_is_a_note(forgotten, monkeypatch):
    where = torch.device("cpu", 0)
    availability._plain |= {(where, False): None, (where, True): None}
    assert [f.status for f in doctor.launched(CPU)] == ["ok"]
    availability._plain[where, True] = Plain("triton 3.2.0 does not compile bfloat16", "pip install")
    assert [(f.name, f.status) for f in doctor.launched(CPU)] == [("launch", "ok"), ("bfloat16", "note")]


def test_a_look_at_the_device_that_fails_is_reported_in_place_of_kernels(forgotten, monkeypatch):
    monkeypatch.setattr(availability, "triton_problem", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", mock.Mock(side_effect=RuntimeError("lost")))
    assert doctor.plain_on(GPU) == Plain("RuntimeError: lost")


# The self-check


def target(op):
    return (divergence, f"{op}_rows") if hasattr(divergence, f"{op}_rows") else (ops, op)


def spoiling(real):
    """Returns the op with an error of 0.01 (or 1) in the first tensor that it returns or changes."""

    def run(*args, **kwargs):
        out = real(*args, **kwargs)
        first = next(v for v in tree_leaves(out if out is not None else kwargs) if isinstance(v, torch.Tensor))
        first += 0.01 if first.is_floating_point() else 1
        return out

    return run


@pytest.mark.parametrize("op", OPS)
def test_an_op_that_gives_a_wrong_result_fails_alone(op):
    module, name = target(op)
    with mock.patch.object(module, name, spoiling(getattr(module, name))):
        findings = doctor.self_check(CHECKS, CPU, seconds=0.0)
    assert failed(findings) == [op]
    assert doctor.verdict(findings)[0] is False


@pytest.mark.parametrize("op", OPS)
def test_an_op_that_raises_fails_alone_with_its_own_words(op):
    with mock.patch.object(*target(op), mock.Mock(side_effect=RuntimeError("PassManager::run failed\nmore"))):
        findings = doctor.self_check(CHECKS, CPU, seconds=0.0)
    assert failed(findings) == [op]
    text = next(f.text for f in findings if f.name == op)
    assert "RuntimeError: PassManager::run failed" in text
    assert "more" not in text


def test_an_op_that_is_wrong_in_one_of_its_cases_is_caught_and_the_case_named():
    real, check = ops.signed_variance, CHECKS[0]

    def only_wrong_in_16_bits(logits, labels):
        result = real(logits, labels)
        return result if logits.dtype != torch.bfloat16 else result._replace(correct=~result.correct)

    with mock.patch.object(ops, "signed_variance", only_wrong_in_16_bits):
        result = only(doctor.self_check([check], CPU))
    assert result.status == "FAILED"
    assert result.text == "bfloat16, 100 classes: correct differs in 33 of 33 places"


@pytest.mark.parametrize("check", CHECKS, ids=OPS)
def test_the_command_after_a_failure_names_tests_that_exist(check):
    tests = Path(__file__).parents[1]
    on_cuda = re.findall(r"def (test_\w+)", (tests / "kernels" / "test_on_cuda.py").read_text())
    assert [name for name in on_cuda if check.cuda_tests in name]
    assert (tests / f"test_{check.tests}.py").is_file()


def test_after_an_error_that_loses_the_device_nothing_else_is_blamed():
    lost = mock.Mock(side_effect=RuntimeError("CUDA error: an illegal memory access was encountered"))
    with mock.patch.object(ops, "signed_variance", lost):
        findings = doctor.self_check(CHECKS, CPU)
    assert [f.status for f in findings] == ["FAILED"] + ["skipped"] * (len(OPS) - 1)
    assert lost.call_count == 1
    assert findings[1].text == "the device was lost in signed_variance"
    assert {f.status for f in doctor.training_steps(STEPS, CPU, "the device was lost")} == {"skipped"}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError(FULL_CUBLAS)])
def test_a_full_gpu_is_called_full_and_no_op_is_blamed(error):
    with mock.patch.object(ops, "assign_steps", mock.Mock(side_effect=error)):
        findings = doctor.self_check(CHECKS, CPU)
    _, full, *others = findings
    assert (full.status, full.next) == ("FAILED", "nvidia-smi")
    assert "the memory is full: " in full.text
    assert {(f.status, f.text) for f in others} == {("skipped", "the memory was full in assign_steps")}
    with mock.patch.object(doctor, "step_difference", mock.Mock(side_effect=error)):
        steps = doctor.training_steps([STEPS[0], STEPS[0]], CPU)
    assert [(f.status, f.next) for f in steps] == [("FAILED", "nvidia-smi"), ("skipped", None)]
    result = only(doctor.probe("device", doctor.GRAPHS, mock.Mock(side_effect=error)))
    assert (result.status, result.next) == ("FAILED", "nvidia-smi")


def test_a_gpu_that_torch_was_not_built_for_is_not_called_lost():
    error = RuntimeError("CUDA error: no kernel image is available for execution on the device\nMore")
    with mock.patch.object(ops, "signed_variance", mock.Mock(side_effect=error)):
        findings = doctor.self_check(CHECKS, CPU)
    assert {f.text for f in findings[1:]} == {"torch was not built for this GPU, as was seen in signed_variance"}


def test_when_time_is_up_every_op_has_been_checked_and_the_rest_is_reported_to_be_skipped():
    for check, result in zip(CHECKS, doctor.self_check(CHECKS, CPU, seconds=0.0), strict=True):
        assert result.status == "ok"
        assert result.text.startswith("1 case, ")
        assert f"{len(check.cases()) - 1} skipped, since 0 s were up" in result.text


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (torch.tensor([1.0, 2.1]), "x differs by up to 0.1"),
        (torch.tensor([1.0, torch.nan]), "x is NaN in other places"),
        (torch.tensor([1.0, torch.inf]), "x differs by up to inf"),
        (torch.tensor([1, 3]), "x differs in 1 of 2 places"),
        (torch.tensor([1.0]), "x has shape"),
    ],
)
def test_what_is_not_equal_is_reported(found, words):
    with pytest.raises(AssertionError, match=words):
        doctor_checks.compare({"x": found}, {"x": torch.tensor([1.0, 2.0], dtype=torch.float64)}, 1e-6)


def test_equal_within_the_tolerance_gives_the_largest_difference():
    expected = torch.tensor([1.0, torch.nan, torch.inf, 3.0], dtype=torch.float64)
    result = {"x": (expected + torch.tensor([0.0, 0.0, 0.0, 1e-6])).float()}
    assert doctor_checks.compare(result, {"x": expected}, 1e-6) == pytest.approx(1e-6, rel=0.2)
    assert doctor_checks.compare({"x": torch.empty(0)}, {"x": torch.empty(0).double()}, 0.0) == 0.0


# A training step


def step(name):
    return next(s for s in STEPS if s.name == name)


def test_a_step_from_graphs_is_compared_where_there_are_graphs():
    with EmulatedDevice(), mock.patch.object(engine, "capture", wraps=engine.capture) as captured:
        result = only(doctor.training_steps([step("graphs, float64")], CPU))
    assert result.status == "ok", result.text
    assert captured.called


@pytest.mark.parametrize("name", ["graphs, float64", "graphs, float32"])
@pytest.mark.parametrize("kind", ["wrong", "raises", "falls back"])
def test_a_runner_that_is_wrong_or_falls_back_fails(kind, name):
    def runner(model, batch, *rest):
        if kind == "raises":
            raise ValueError("no stream")
        if kind == "falls back":
            doctor_checks.warnings.warn("the attack runs without graphs: no memory", stacklevel=1)
        run_eager(model, batch, *rest)
        if kind == "wrong":
            batch.x_adv.copy_(batch.clean)

    check = dataclasses.replace(step(name), graphs=False, runner=lambda: runner)
    result = only(doctor.training_steps([check], CPU))
    assert result.status == "FAILED"
    words = {"wrong": "differs by up to", "raises": "ValueError: no stream", "falls back": "without graphs: no memory"}
    assert words[kind] in result.text
    assert 'to go on without graphs: engine="exact", or --engine fast,graphs=off' in doctor.lines([result])


def test_a_step_in_float32_is_compared_without_tf32():
    eager = [step("eager, float32")]
    with EmulatedTf32():
        assert only(doctor.training_steps(eager, CPU)).status == "ok"
    with EmulatedTf32(), mock.patch.object(doctor_checks, "full_precision", nullcontext):
        assert "differs by up to" in only(doctor.training_steps(eager, CPU)).text


# The report


def test_the_next_commands_are_those_of_what_failed_each_once():
    fused = Finding("fused or plain", "a", "ok", "fused")
    note = Finding("versions", "b", "note", "old", "python -m pip install b")
    wrong = [Finding("self-check", name, "FAILED", "wrong", "python -m pytest -m cuda") for name in "cd"]
    assert [v for v in doctor.lines([fused, note]) if v.startswith("next")] == ["next: python -m pip install b"]
    text = doctor.lines([fused, note, *wrong])
    assert [v for v in text if v.startswith("next")] == ["next: python -m pytest -m cuda"]
    assert text[-1] == "to go on in plain torch, without kernels: python -m pip uninstall triton"
    assert doctor.verdict([fused, note]) == (
        True,
        "all works, with fused kernels; the full check is python -m pytest -m cuda",
    )
