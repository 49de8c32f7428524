"""`bt-fast profile`: phases from a trace, numbers per iteration, sample and epoch, and the files."""

import dataclasses
import io
import json

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from bt_fast.lab.cli import cli
from bt_fast.lab.profile import ITERATION, OTHER, Phase, Profile, lines, phases_of, table
from bt_fast.power import Summary
from bt_fast.ranges import ATTACK_STEP, BACKWARD, MINING, UPDATE


def bt_fast(*arguments):
    return CliRunner().invoke(cli, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "small.npz"
    y = np.arange(24) % 2
    x = np.random.default_rng(0).integers(0, 256, (24, 16, 16), dtype=np.uint8)
    np.savez(path, x_train=x[:20], y_train=y[:20], x_test=x[20:], y_test=y[20:])
    return path


@pytest.fixture(scope="module")
def profiled(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("profiles") / "one"
    small = ["--data", data, "--width", 2, "--batch-size", 8, "--steps", 3, "--robust-steps", 3, "--outlier-steps", 3]
    result = bt_fast("profile", *small, "--iterations", 2, "--device", "cpu", "--out", folder)
    assert result.exit_code == 0, result.output
    return folder, result.output, small


# Handmade traces, in microseconds


def annotation(name, start, duration):
    return {"ph": "X", "cat": "user_annotation", "name": name, "ts": start, "dur": duration, "tid": 1}


def kernel(launched, duration, correlation, thread=1, cat="kernel", launch="cuda_runtime"):
    args = {"correlation": correlation}
    return [
        {"ph": "X", "cat": launch, "name": "launch", "ts": launched, "dur": 1, "tid": thread, "args": args},
        {"ph": "X", "cat": cat, "name": "work", "ts": 10_000, "dur": duration, "tid": 7, "args": args},
    ]


TWO_ITERATIONS = [
    annotation(ITERATION, 0, 1000),
    annotation(MINING, 100, 200),
    annotation(ATTACK_STEP, 300, 50),
    annotation(ATTACK_STEP, 350, 50),
    annotation(ATTACK_STEP, 400, 50),
    annotation(UPDATE, 500, 100),
    annotation(BACKWARD, 700, 200),
    annotation(ITERATION, 1000, 1000),
    annotation(ATTACK_STEP, 1100, 50),
    annotation(BACKWARD, 1800, 100),
    {"ph": "X", "cat": "gpu_user_annotation", "name": UPDATE, "ts": 0, "dur": 9999, "tid": 7},
    {"ph": "i", "name": "a mark without a category", "ts": 5},
]


def test_time_of_a_phase_is_its_ranges_per_iteration_and_the_rest_is_other():
    assert phases_of(TWO_ITERATIONS) == (
        Phase(MINING, 0.5, pytest.approx(100e-6), None),
        Phase(ATTACK_STEP, 2, pytest.approx(100e-6), None),
        Phase(UPDATE, 0.5, pytest.approx(50e-6), None),
        Phase(BACKWARD, 1, pytest.approx(150e-6), None),
        Phase(OTHER, 0, pytest.approx(600e-6), None),
    )


def test_a_phase_within_another_belongs_to_the_outer_one():
    oracle = [annotation(ITERATION, 0, 500), annotation(MINING, 0, 300), annotation(ATTACK_STEP, 50, 100)]
    mining, other = phases_of(oracle)
    assert (mining, other.host) == (Phase(MINING, 1, pytest.approx(300e-6), None), pytest.approx(200e-6))


def test_gpu_work_belongs_to_the_phase_in_which_it_was_launched_on_any_thread():
    events = [
        *TWO_ITERATIONS,
        *kernel(100, 30, 1),  # mining, from its first moment
        *kernel(300, 5, 2),  # ends where the first step begins
        *kernel(420, 7, 3, launch="cuda_driver"),
        *kernel(750, 40, 4, thread=2),  # of the backward, from autograd's thread
        *kernel(1810, 60, 5, cat="gpu_memcpy"),
        *kernel(950, 11, 6),  # in no phase
        *kernel(2500, 1000, 7),  # in no iteration
        kernel(0, 1000, 8)[1],  # without a launch event
    ]
    found = {phase.name: phase.device for phase in phases_of(events)}
    expected = {MINING: 15e-6, ATTACK_STEP: 6e-6, UPDATE: 0.0, BACKWARD: 50e-6, OTHER: 5.5e-6}
    assert found == {name: pytest.approx(seconds, abs=1e-12) for name, seconds in expected.items()}


def test_all_kernels_of_a_replayed_graph_belong_to_its_launch():
    launch, work = kernel(360, 20, 1)
    found = {phase.name: phase.device for phase in phases_of([*TWO_ITERATIONS, launch, work, dict(work, dur=30)])}
    assert found[ATTACK_STEP] == pytest.approx(25e-6)


def test_a_trace_without_iterations_is_an_error():
    with pytest.raises(ValueError, match="the trace holds no bt_fast::iteration"):
        phases_of([annotation(MINING, 0, 1)])


# The command


def test_it_prints_the_phases_the_time_and_why_there_is_no_energy(profiled):
    _, output, _ = profiled
    for phase, calls in (("mining", "1"), ("attack step", "3"), ("update", "1"), ("backward", "1"), ("other", "-")):
        (line,) = [line.split() for line in output.splitlines() if line.strip().startswith(phase)]
        assert line[-4] == calls
        assert line[-1] == "-"
    assert "ms per iteration (median of 2, not traced)" in output
    assert "s per epoch of 20" in output
    assert "energy: not measured: the device is the CPU, of which NVML tells nothing" in output


def test_the_trace_is_one_that_viewers_read_and_does_not_name_the_machine(profiled):
    folder, _, _ = profiled
    trace = json.loads((folder / "trace.json").read_text())
    names = [event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    assert names.count(ITERATION) == names.count(UPDATE) == names.count(MINING) == 3
    assert names.count(ATTACK_STEP) == 9
    assert any(event.get("cat") == "cpu_op" for event in trace["traceEvents"])
    assert "host_name" not in trace


def test_the_numbers_are_in_a_file(profiled):
    folder, _, _ = profiled
    found = json.loads((folder / "profile.json").read_text())
    assert [phase["name"] for phase in found["phases"]] == [MINING, ATTACK_STEP, UPDATE, BACKWARD, OTHER]
    assert len(found["seconds"]) == 2
    assert all(phase["host"] > 0 for phase in found["phases"])
    assert (found["joules"], found["power"], found["batch_size"], found["epoch"]) == (None, [], 8, 20)


def test_files_are_not_overwritten(profiled):
    folder, _, small = profiled
    result = bt_fast("profile", *small, "--out", folder)
    assert result.exit_code == 2
    assert result.stderr == f"bt-fast: --out: {folder} already holds trace.json; name another folder\n"


def test_a_method_that_there_is_not_is_an_error(profiled):
    assert "--method none: no such method" in bt_fast("profile", "--method", "none").stderr


# Output on a machine with a GPU


NOTHING = {field.name: None for field in dataclasses.fields(Summary)}
TOLD = {
    "device": "GPU-1",
    "name": "Stub GPU",
    "samples": 9,
    "seconds": 2.0,
    "joules": 500.0,
    "energy_source": "counter",
    "mean_power": 250.0,
    "max_power": 300.4,
    "power_source": "instant",
    "mean_sm_utilisation": 0.955,
    "mean_memory_utilisation": 0.4,
    "mean_sm_clock": 1700.0,
    "max_temperature": 71,
    "throttle": {"sw_power_cap": 0.5},
    "peak_memory": 3 * 2**30,
    "unsupported": (),
}


def found(summary, joules=50.0):
    phases = (Phase(MINING, 1, 0.2, 0.1), Phase(OTHER, 0, 0.2, 0.0))
    return Profile("bullet", "trades", 100, 50_000, (0.5, 0.3, 0.4), phases, (summary,), None, joules, {})


def test_energy_is_reported_per_iteration_sample_and_epoch_beside_the_time():
    messages = lines(found(Summary(**NOTHING | TOLD)))
    assert messages == [
        "time: 400.00 ms per iteration (median of 3, not traced), 4000.0 us per sample, 200.0 s per epoch of 50000",
        "energy: 50 J per iteration, 0.5 J per sample, 2.5e+04 J per epoch of 50000, at this rate",
        "Stub GPU: energy from the counter, 250 W in mean, 300 W at most, SM 96%, memory 40%, 1700 MHz, 71 C, "
        "3.0 GiB in use, clocks held back: sw_power_cap 50%",
    ]


def test_what_the_device_does_not_tell_is_left_out():
    silent = NOTHING | {"name": "Stub GPU", "lost": "GPU is lost", "shared": "MIG: shared"}
    messages = lines(found(Summary(**silent), joules=None))
    assert messages[1:] == [
        "energy: not measured: the device does not tell it, or was lost",
        "Stub GPU: LOST: GPU is lost, MIG: shared",
    ]


def test_the_table_has_the_gpus_time_where_there_is_one():
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(found(Summary(**NOTHING | TOLD))))
    assert "100.00" in console.export_text()
