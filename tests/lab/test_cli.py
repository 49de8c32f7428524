import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from bt_fast.__main__ import main
from bt_fast.lab import cli as cli_module
from bt_fast.lab.checkpoint import load_checkpoint
from bt_fast.lab.cli import cli
from bt_fast.lab.methods import COMPARED
from bt_fast.lab.models import build_model
from bt_fast.lab.training import Run

SMALL = [
    "--width",
    "2",
    "--epochs",
    "1",
    "--batch-size",
    "16",
    "--curve-size",
    "8",
    "--eval-steps",
    "2",
    "--steps",
    "3",
]


def bt_fast(*arguments):
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def one_line(result):
    """Returns the error of a command that failed because of a user's mistake."""
    assert result.exit_code == 2, result.output
    line = result.stderr.strip()
    assert "\n" not in line
    assert line.startswith("bt-fast: ")
    return line


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A small npz of two classes, black and white."""
    path = tmp_path_factory.mktemp("data") / "small.npz"
    y = np.arange(64) % 2
    x = np.repeat(y * 255, 256).reshape(64, 16, 16).astype(np.uint8)
    np.savez(path, x_train=x[:48], y_train=y[:48], x_test=x[48:], y_test=y[48:])
    return path


@pytest.fixture(scope="module")
def compared(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "compared"
    result = bt_fast("compare", "--data", data, "--out", folder, *SMALL)
    assert result.exit_code == 0, result.output
    return folder, result.output


def test_compare_prints_one_row_for_each_method_with_accuracies_fractions_and_speedups(compared):
    _, output = compared
    assert re.search(r"TRADES, authors'\s+[\d.]+%\s+[\d.]+%\s+1/0/0\s+1\.00x\s+18\.0F\s+1\.00x\s+\d+ s", output)
    assert re.search(r"TRADES, ours, exact\s+[\d.]+%\s+[\d.]+%\s+1/0/0\s+1\.00x\s+16\.0F\s+[\d.]+x\s+\d+ s", output)
    assert re.search(r"\+ BT, exact\s+[\d.]+%\s+[\d.]+%\s+[\d.]+/[\d.]+/[\d.]+\s+[\d.]+x\s+[\d.]+F\s+[\d.]+x", output)
    assert re.search(r"\+ BT, fast\s+[\d.]+%\s+[\d.]+%\s+[\d.]+/[\d.]+/[\d.]+\s+[\d.]+x\s+[\d.]+F\s+[\d.]+x", output)
    assert "bullet-fast: TRADESLoss, engine 'fast', on cpu; folded view: yes" in output


def test_compare_writes_a_run_folder(compared):
    folder, _ = compared
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["methods"]) == set(COMPARED)
    assert summary["methods"]["bullet-fast"]["speedup"].keys() == set(COMPARED) - {"bullet-fast"}
    assert sum(summary["methods"]["bullet-fast"]["fractions"].values()) == pytest.approx(1)
    for entry in summary["methods"].values():
        assert 0 < entry["iteration_seconds"] < entry["seconds"]
    assert {"torch", "python", "processor", "device"} <= summary["machine"].keys()
    for name in ("accuracy.png", "fractions.png"):
        if (folder / name).exists():
            assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert (folder / "accuracy.png").exists()
    assert all(json.loads(line)["iteration"] for line in (folder / "metrics.jsonl").read_text().splitlines())


def test_evaluate_reads_every_model_of_a_comparison(compared):
    folder, _ = compared
    result = bt_fast("evaluate", folder / "checkpoint.pt", "--steps", "2", "--restarts", "2")
    assert result.exit_code == 0, result.output
    for method in COMPARED:
        line = rf"{method}: clean [\d.]+ %, robust [\d.]+ % \(PGD-2 x 2, l_inf, eps = 0.2, 16 images\)"
        assert re.search(line, result.output)


def test_evaluate_ascends_the_loss_that_is_asked_for(compared):
    arguments = ("evaluate", compared[0] / "checkpoint.pt", "--method", "bullet-fast", "--steps", "2")
    result = bt_fast(*arguments, "--loss", "margin")
    assert result.exit_code == 0, result.output
    assert "(PGD-2 x 1, l_inf, margin loss, eps = 0.2, 16 images)" in result.output
    assert "--loss" in one_line(bt_fast(*arguments, "--loss", "hinge"))


def test_evaluate_shows_how_many_images_are_decided(compared):
    result = bt_fast("evaluate", compared[0] / "checkpoint.pt", "--method", "bullet-fast", "--steps", "2")
    assert "16/16" in result.output


def test_evaluate_agrees_with_the_summary(compared):
    folder, _ = compared
    summary = json.loads((folder / "summary.json").read_text())["methods"]["bullet-fast"]
    result = bt_fast("evaluate", folder / "checkpoint.pt", "--method", "bullet-fast", "--steps", "2")
    clean, robust = map(float, re.search(r"clean ([\d.]+) %, robust ([\d.]+) %", result.output).groups())
    assert (clean, robust) == pytest.approx((100 * summary["clean"], 100 * summary["robust"]), abs=0.01)


def test_evaluate_reads_a_published_state_dict(tmp_path):
    path = tmp_path / "published.pt"
    torch.save(build_model("small-cnn", in_channels=1, image_size=28, num_classes=10).state_dict(), path)
    result = bt_fast("evaluate", path, "--model", "small-cnn", "--test-size", "4", "--steps", "1")
    assert result.exit_code == 0, result.output
    assert "4 images" in result.output


def test_evaluate_on_data_that_the_network_does_not_fit_is_refused(compared, tmp_path):
    path = tmp_path / "colour.npz"
    x, y = np.zeros((4, 3, 16, 16), np.uint8), np.arange(4) % 2
    np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y)
    error = one_line(bt_fast("evaluate", compared[0] / "checkpoint.pt", "--data", path))
    assert "does not fit the data" in error


def test_compare_takes_the_methods_that_it_is_given(data, tmp_path):
    options = ["--data", data, "--out", tmp_path / "run", *SMALL]
    result = bt_fast("compare", "--method", "bullet", "--method", "bullet-bf16", *options)
    assert result.exit_code == 0, result.output
    assert re.search(
        r"\+ BT, bf16\s+[\d.]+%\s+[\d.]+%\s+[\d.]+/[\d.]+/[\d.]+\s+[\d.]+x\s+[\d.]+F\s+[\d.]+x", result.output
    )
    assert set(json.loads((tmp_path / "run" / "summary.json").read_text())["methods"]) == {"bullet", "bullet-bf16"}
    error = one_line(bt_fast("compare", "--method", "bullet", "--method", "bullet", *options))
    assert "--method bullet is given twice" in error


@pytest.mark.parametrize(
    ("loss", "first", "second", "passes"),
    [("mart", "MART, authors'", "MART, ours, exact", "12"), ("pgd", "PGD, plain", "PGD, ours, exact", "9")],
)
def test_compare_takes_another_objective(data, tmp_path, loss, first, second, passes):
    result = bt_fast("compare", "--loss", loss, "--data", data, "--out", tmp_path / "run", *SMALL)
    assert result.exit_code == 0, result.output
    for label in (first, second):
        assert re.search(rf"{label}\s+[\d.]+%\s+[\d.]+%\s+1/0/0\s+1\.00x\s+{passes}\.0F\s+[\d.]+x", result.output)
    assert "TRADES" not in result.output
    methods = json.loads((tmp_path / "run" / "summary.json").read_text())["methods"]
    boundary, robust = (methods["bullet-fast"]["fractions"][group] for group in ("boundary", "robust"))
    expected = 1 + 2 * (3 * boundary + 2 * robust) + (6 if loss == "mart" else 3)
    assert methods["bullet-fast"]["forward_passes"] == pytest.approx(expected)


def test_the_engine_is_an_option_of_every_command_that_runs_one(compared, data, tmp_path):
    options = ["--data", data, *SMALL]
    assert bt_fast("train", "--engine", "fast,graphs=off", "--out", tmp_path / "a", *options).exit_code == 0
    assert load_checkpoint(tmp_path / "a" / "checkpoint.pt")[0].engine == "fast,graphs=off"
    result = bt_fast("compare", "--engine", "bf16", "--out", tmp_path / "b", *options)
    assert "bullet: TRADESLoss, engine 'bf16', on cpu" in result.output
    assert "precision: torch.bfloat16, under autocast" in result.output
    methods = json.loads((tmp_path / "b" / "summary.json").read_text())["methods"]
    assert list(methods) == ["reference", "optimised-exact", "bullet-exact", "bullet"]
    for engine in ("exact", "fast"):
        actual = bt_fast("evaluate", compared[0] / "checkpoint.pt", "--engine", engine, "--steps", "1")
        assert actual.exit_code == 0, actual.output
    assert "own precision" in one_line(bt_fast("evaluate", compared[0] / "checkpoint.pt", "--engine", "bf16"))
    for command in ("train", "compare", "profile"):
        error = one_line(bt_fast(command, "--engine", "quick", *options))
        assert "--engine: engine must be one of exact, fast, bf16, got 'quick'" in error
    assert "--engine: engine must be" in one_line(bt_fast("study", "fig2", "--engine", "quick"))


def test_train_trains_one_method_with_bullettrain_as_the_default(data, tmp_path):
    assert bt_fast("train", "--data", data, "--out", tmp_path / "a", *SMALL).exit_code == 0
    assert list(load_checkpoint(tmp_path / "a" / "checkpoint.pt")[1]["contestants"]) == ["bullet"]
    assert bt_fast("train", "--method", "optimised", "--data", data, "--out", tmp_path / "b", *SMALL).exit_code == 0
    assert list(load_checkpoint(tmp_path / "b" / "checkpoint.pt")[1]["contestants"]) == ["optimised"]


@pytest.fixture(scope="module")
def long_run(data, tmp_path_factory):
    """Returns the options of a run of 48 iterations, and its final state."""
    options = ["--data", str(data), *SMALL, "--epochs", "16"]
    folder = tmp_path_factory.mktemp("runs") / "whole"
    result = bt_fast("train", *options, "--out", folder)
    assert result.exit_code == 0, result.output
    return options, load_checkpoint(folder / "checkpoint.pt")[1]["contestants"]["bullet"]


@pytest.mark.parametrize("killed_by", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_resumes_to_the_same_weights(long_run, tmp_path, killed_by):
    options, end = long_run
    command = [sys.executable, "-m", "bt_fast", "train", *options, "--out", tmp_path / "cut"]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE)
    while not (tmp_path / "cut" / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(killed_by)
    output = process.communicate()[0].decode()
    if killed_by != signal.SIGKILL:
        assert process.returncode == 128 + killed_by
        assert f"--resume {tmp_path / 'cut'}" in output
    stopped_at = load_checkpoint(tmp_path / "cut" / "checkpoint.pt")[1]["iteration"]
    assert stopped_at < 48
    resumed = bt_fast("train", "--resume", tmp_path / "cut" / "checkpoint.pt")
    assert resumed.exit_code == 0, resumed.output
    resumed_end = load_checkpoint(tmp_path / "cut" / "checkpoint.pt")[1]["contestants"]["bullet"]
    for part in ("model", "bullet"):
        for name, value in end[part].items():
            assert torch.equal(value, resumed_end[part][name]), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "--data", "nothing.npz"], "nothing.npz"),
        (["compare", "--data", "mnist", "--data-dir", "nowhere"], "nowhere"),
        (["compare", "--data", "cifar10", "--data-dir", "nowhere"], "nowhere"),
        (["train", "--model", "resnet"], "resnet"),
        (["train", "--model", "wrn-16-2", "--width", "4"], "width"),
        (["train", "--train-size", "6000"], "6000"),
        (["train", "--device", "abacus"], "abacus"),
        (["train", "--device", "cuda:99"], "cuda:99"),
        (["train", "--device", "meta"], "meta"),
        (["train", "--resume", "nothing"], "nothing"),
        (["evaluate", "nothing.pt"], "nothing.pt"),
    ],
)
def test_a_mistake_gets_one_line_that_names_it_and_exit_code_2(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "--device" in arguments and torch.cuda.is_available():
        pytest.skip("the device may exist")
    assert message in one_line(bt_fast(*arguments))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--epsilon", value) for value in ("-1", "many")),
        *(
            (option, value)
            for option in ("--step-size", "--steps", "--epochs", "--batch-size", "--lr")
            for value in ("0", "-1", "many")
        ),
    ],
)
def test_options_out_of_range_are_refused_by_name(option, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert option in one_line(bt_fast("train", option, value))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--epsilon", "--step-size", "--lr", "--beta", "--weight-decay", "--sgd-momentum"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_numbers_must_be_finite(option, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert option in one_line(bt_fast("train", option, value))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "value"), [("--decay-epochs", "0"), ("--seed", "99999999999999999999"), ("--gamma", "0")]
)
def test_other_options_out_of_range(option, value):
    assert option in one_line(bt_fast("train", option, value))


def test_an_unknown_option_gets_one_line():
    assert "--frobnicate" in one_line(bt_fast("train", "--frobnicate"))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x04N.", b"not a checkpoint"])
@pytest.mark.parametrize("options", [[], ["--model", "small-cnn"]])
def test_evaluating_another_file_names_it(content, options, tmp_path):
    path = tmp_path / "other.pt"
    path.write_bytes(content)
    assert "other.pt" in one_line(bt_fast("evaluate", path, *options))


def test_a_truncated_data_file_is_named(data, tmp_path):
    path = tmp_path / "half.npz"
    path.write_bytes(data.read_bytes()[:700])
    assert "half.npz" in one_line(bt_fast("train", "--data", path, "--out", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_resuming_with_another_option_than_the_run_was_started_with_is_refused(compared):
    folder, _ = compared
    before = (folder / "checkpoint.pt").read_bytes()
    assert "epsilon: 0.5 against 0.2" in one_line(bt_fast("compare", "--resume", folder, "--epsilon", "0.5"))
    assert "methods" in one_line(bt_fast("train", "--resume", folder, "--method", "bullet"))
    assert "--out" in one_line(bt_fast("compare", "--resume", folder, "--out", folder / "b"))
    assert (folder / "checkpoint.pt").read_bytes() == before


def test_a_run_folder_in_use_is_not_overwritten(compared, data):
    folder, _ = compared
    assert "already holds a run" in one_line(bt_fast("compare", "--data", data, "--out", folder, *SMALL))


def test_evaluate_names_the_methods_there_are(data, tmp_path):
    bt_fast("train", "--data", data, "--out", tmp_path / "a", *SMALL)
    error = one_line(bt_fast("evaluate", tmp_path / "a" / "checkpoint.pt", "--method", "reference"))
    assert "holds bullet" in error


def test_help_names_every_command():
    output = bt_fast("--help").output
    for command in ("compare", "train", "evaluate"):
        assert command in output


# in children of a process that has imported the package without its commands
WITHOUT = """
import os, sys, bt_fast
for name in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        sys.modules[name] = None
        from bt_fast.__main__ import main
        sys.exit(main())
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_without_the_extra_the_command_says_what_to_install():
    names = ["click", "rich", "matplotlib", "jinja2"]
    result = subprocess.run([sys.executable, "-c", WITHOUT, *names], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["1"] * len(names)
    needs = [f"bt-fast: the command line needs {name}: pip install 'bt-fast[lab]'" for name in names]
    assert result.stderr.splitlines() == needs


def test_a_package_of_the_extra_that_is_too_old_is_named_with_the_version_that_is_needed(monkeypatch):
    installed = {"click": "7.1.2", "rich": "13.0", "matplotlib": "3.10.1", "jinja2": "3.1.6"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: installed[name])
    with pytest.raises(SystemExit) as raised:
        main()
    needed = "click >= 8.1, but 7.1.2 is installed: pip install --upgrade 'bt-fast[lab]'"
    assert str(raised.value) == f"bt-fast: the command line needs {needed}"


OLD_DRIVER = "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by ..."


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError(OLD_DRIVER), "The NVIDIA driver on your system is too old (found version 11040);"),
        (RuntimeError("CUDA error: no kernel image is available for execution on the device\nMore"), "the device;"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"), "cuda: CUDA out of memory;"),
        (AssertionError("Torch not compiled with CUDA enabled"), "cuda: Torch not compiled with CUDA enabled;"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_one_line_that_says_why_and_how_to_go_on(data, tmp_path, error, words):
    with mock.patch.object(torch, "zeros", side_effect=error):
        result = bt_fast("train", "--device", "cuda", "--data", data, "--out", tmp_path / "run", *SMALL)
    line = one_line(result)
    assert words in line
    assert line.endswith("; bt-fast doctor says what to do, and --device cpu goes without")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_full_memory_is_one_line_that_says_what_to_lower(data, compared, tmp_path, error):
    with mock.patch.object(Run, "train", side_effect=error):
        line = one_line(bt_fast("train", "--data", data, "--out", tmp_path / "run", *SMALL))
    assert "the memory is full: try a smaller --batch-size or --model, --device cpu, or end what else" in line
    assert line.endswith(str(error).splitlines()[0])
    with mock.patch.object(cli_module, "evaluate_model", side_effect=error):
        line = one_line(bt_fast("evaluate", compared[0] / "checkpoint.pt"))
    assert "the memory is full: try --device cpu, or end what else runs there" in line


def test_another_error_is_not_taken_for_a_full_memory(data, tmp_path):
    with mock.patch.object(Run, "train", side_effect=RuntimeError("CUDA error: misaligned address")):
        result = bt_fast("train", "--data", data, "--out", tmp_path / "run", *SMALL)
    assert str(result.exception) == "CUDA error: misaligned address"


def test_a_method_that_there_is_not_is_refused_with_those_there_are(data, tmp_path):
    error = one_line(bt_fast("compare", "--method", "free", "--data", data, "--out", tmp_path / "run"))
    assert "--method free: no such method; write one of reference, optimised, bullet, fast" in error
    assert not (tmp_path / "run").exists()


def test_compare_takes_baselines_and_methods_with_options_of_their_own(data, tmp_path):
    methods = [
        "fast-2",
        "yopo-2-3",
        "bullet,robust-steps=0",
        "bullet,policy=gaussian,metric=margin",
        "fast,grad-align=1",
    ]
    options = [argument for method in methods for argument in ("--method", method)]
    result = bt_fast("compare", *options, "--data", data, "--out", tmp_path / "run", *SMALL)
    assert result.exit_code == 0, result.output
    assert re.search(r"\+ FAST-2\s+[\d.]+%\s+[\d.]+%\s+1/0/0\s+1\.33x", result.output)
    assert re.search(r"\+ YOPO-2-3\s+[\d.]+%\s+[\d.]+%\s+1/0/0\s+-", result.output)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())["methods"]
    assert list(summary) == methods
    assert summary["fast-2"]["theoretical_speedup"] == 4 / 3
    assert summary["yopo-2-3"]["theoretical_speedup"] is None


def test_augmix_is_compared_without_its_divergence_and_with_bullettrain(data, tmp_path):
    methods = ["--method", "optimised", "--method", "no-jsd", "--method", "bullet"]
    result = bt_fast("compare", "--loss", "augmix", *methods, "--data", data, "--out", tmp_path / "run", *SMALL)
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())["methods"]
    passes = {name: entry["forward_passes"] for name, entry in summary.items()}
    boundary = summary["bullet"]["fractions"]["boundary"]
    assert passes == {"optimised": 9.0, "no-jsd": 3.0, "bullet": pytest.approx(3 + 6 * boundary)}
    assert summary["bullet"]["theoretical_speedup"] == pytest.approx(3 / (1 + 2 * boundary))
    assert all(entry["robust"] is None for entry in summary.values())
    bt_fast("compare", "--loss", "augmix", "--data", data, "--out", tmp_path / "default", *SMALL)
    assert set(json.loads((tmp_path / "default" / "summary.json").read_text())["methods"]) == {
        "optimised-exact",
        "bullet-exact",
        "bullet-fast",
    }
