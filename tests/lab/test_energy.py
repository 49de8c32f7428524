"""Tests the joules of training against a stub of NVML; `nvml_stub` describes the scripts."""

import dataclasses
import json
import time
from unittest import mock

import nvml_stub
import pytest
import test_training
import torch
from test_training import CONFIG, CPU, blobs

from bt_fast.lab import energy, report
from bt_fast.lab.energy import TrainingEnergy
from bt_fast.lab.training import Run

A = "GPU-aaaaaaaa-0000"
STEADY = f"device {A}\ninstant 100000"
ALONE = dataclasses.replace(CONFIG, methods=("bullet",), epochs=2)
IN_TURN = dataclasses.replace(CONFIG, methods=("optimised", "bullet"), epochs=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    if nvml_stub.COMPILER is None:
        pytest.skip("the stub of NVML needs a C compiler, and there is neither gcc nor cc")
    with nvml_stub.process_with_stub(tmp_path_factory.mktemp("nvml")) as run_there:
        yield run_there


# Functions that run in the process with the stub


def trained(folder, config):
    """Returns the summary's methods and the epochs' records of a run on the stub's GPU, where no step is too short."""
    with mock.patch.object(energy, "SHORTEST", 0.0):
        result = on_stub(folder, config)
        for _ in result.train():
            pass
        return told(result)


def on_stub(folder, config, **options):
    with mock.patch("bt_fast.lab.training.TrainingEnergy", lambda _, methods: TrainingEnergy(A, methods)):
        return Run(folder, config, blobs(), CPU, **options)


def told(result):
    report.summarise(result, lambda _: None)
    summary = json.loads((result.folder / "summary.json").read_text())
    return summary["methods"], [r for r in result.records() if r["kind"] == "epoch"]


def trained_with_a_break(folder):
    """Does the same for a run that is saved in the middle of an epoch, left, and resumed."""
    first = on_stub(folder, ALONE)
    for at in first.train():
        if at.iteration == 4:
            first.save()
            break
    second = on_stub(folder, ALONE, resume=True)
    so_far = second.energy.joules("bullet")
    for _ in second.train():
        pass
    return so_far, sum(first.contestants[0].seconds), *told(second)


def samples_kept(folder):
    """Returns the number of samples in memory after each save."""
    with mock.patch.object(energy, "INTERVAL", 3600.0):  # samples only at the ends of blocks
        result, kept = on_stub(folder, ALONE), []
    for _ in result.train():
        result.save()
        kept.append(len(result.energy._monitor.samples))
    return kept


def added(*steps, methods="ab", device=A, blocks=1):
    """Returns each method's joules, and why they are unknown, after blocks of steps given as (method, seconds)."""
    result = TrainingEnergy(device, methods)
    for _ in range(blocks):
        with result:
            for method, seconds in steps:
                begin = time.perf_counter()
                time.sleep(seconds)  # at least this long
                result.add(method, (begin, begin + seconds))
    return [result.joules(method) for method in methods], result.reason


def resumed_from(state):
    result = TrainingEnergy(A, "a")
    result.load(state)
    return result.reason, result.joules("a")


# Through a whole run


def test_methods_in_lockstep_have_the_energy_of_their_own_steps(run, tmp_path):
    methods, epochs = run(STEADY, trained, tmp_path / "run", IN_TURN)
    for entry in methods.values():
        assert entry["joules"] == pytest.approx(100 * entry["seconds"], rel=1e-9)
        assert entry["joules_reason"] is None
    assert [r["joules"] for r in epochs] == [pytest.approx(100 * r["seconds"], rel=1e-9) for r in epochs]
    assert 0 < epochs[0]["joules"] < epochs[2]["joules"] == methods["optimised"]["joules"]


def test_on_the_cpu_nothing_is_measured_and_the_summary_says_why(tmp_path):
    config = dataclasses.replace(CONFIG, methods=("optimised",), epochs=1, decay_epochs=())
    summary = report.summarise(test_training.run_to_the_end(tmp_path / "run", config), lambda _: None)
    assert summary["methods"]["optimised"]["joules"] is None
    assert summary["methods"]["optimised"]["joules_reason"] == "the device is the CPU, of which NVML tells nothing"
    assert "energy" not in [column.header for column in report.table(summary).columns]
    summary["methods"]["optimised"]["joules"] = 12_340.0
    *_, last = report.table(summary).columns
    assert (last.header, list(last.cells)) == ("energy", ["12.3 kJ"])


def test_the_energy_before_a_break_is_kept(run, tmp_path):
    so_far, seconds, methods, _ = run(STEADY, trained_with_a_break, tmp_path / "run")
    assert so_far == pytest.approx(100 * seconds, rel=1e-9)
    assert methods["bullet"]["joules"] == pytest.approx(100 * methods["bullet"]["seconds"], rel=1e-9)
    assert methods["bullet"]["seconds"] > seconds


def test_samples_are_forgotten_at_every_save(run, tmp_path):
    kept = run(STEADY, samples_kept, tmp_path / "run")
    assert kept == [1] * 6  # the sample that begins the next block


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (f"device {A}", "the GPU did not tell its power all the time"),
        (f"{STEADY}\nlost_after 3", "the GPU was lost (GPU is lost)"),
        (f"{STEADY}\nlost_after 1", "the GPU was lost"),
        (f"{STEADY} !10 !10", "the GPU did not tell its power all the time"),
        (f"{STEADY}\nclosed 4", "NVML does not open the device: Insufficient Permissions"),
    ],
)
def test_energy_of_which_a_part_is_unknown_is_none_and_says_why(run, script, why):
    assert run(script, added, ("a", 0.01), ("b", 0.01), blocks=2) == ([None, None], why)


# Separating the methods


def test_power_goes_to_the_method_in_whose_step_it_was(run):
    (first, second), reason = run(
        f"device {A}\ninstant 0 +100000", added, ("a", 0.25), ("b", 0.25)
    )  # more with every sample
    assert reason is None
    assert second > 2 * first > 0


def test_blocks_add_up(run):
    (joules,), _ = run(STEADY, added, ("a", 0.01), methods="a", blocks=3)
    assert joules == pytest.approx(3.0, rel=1e-6)


def test_short_steps_in_turn_are_not_distinguished(run):
    steps = [("a", 0.02), ("b", 0.25)]
    joules, reason = run(STEADY, added, *steps)
    assert joules == [None, None]
    assert reason.startswith("steps of 0.02 s in turn: power is renewed too rarely")
    assert run(STEADY, added, ("a", 0.02), methods="a")[1] is None


def test_an_average_over_a_second_is_not_shared_out(run):
    script = f"device {A}\npower 100000"
    joules, reason = run(script, added, ("a", 0.25), ("b", 0.25))
    assert joules == [None, None]
    assert reason == "the GPU tells its power as an average over a second, in which several methods take steps"
    (alone,), reason = run(script, added, ("a", 0.05), methods="a")
    assert alone == pytest.approx(5.0, rel=1e-6)


def test_the_power_of_other_instances_is_not_counted_as_ones_own(run):
    mig = "MIG-cccccccc-0000"
    (joules,), reason = run(f"{STEADY}\nmig {mig} {A}", added, ("a", 0.02), methods="a", device=mig)
    assert joules is None
    assert reason.startswith("MIG: ")


def test_a_checkpoint_of_a_version_that_measured_nothing_is_gone_on_with(tmp_path):
    folder = tmp_path / "run"
    result = Run(folder, ALONE, blobs(), CPU)
    content = torch.load(result.checkpoint_path)
    del content["state"]["energy"]
    torch.save(content, result.checkpoint_path)
    test_training.run_to_the_end(folder, ALONE, resume=True)


SUMS = {"joules": {"a": 7.0}, "seconds": {"a": 0.5}, "counts": {"a": 1}}


def test_what_was_not_measured_before_a_break_stays_unknown(run):
    assert run(STEADY, resumed_from, None) == ("the run was begun by a version that did not measure it", None)
    assert run(STEADY, resumed_from, {"unknown": "no driver", **SUMS}) == ("no driver", None)
    assert run(STEADY, resumed_from, {"unknown": None, **SUMS}) == (None, 7.0)


def test_what_was_measured_stays_known_elsewhere_until_a_step_is_taken_there():
    result = TrainingEnergy(CPU, "a")
    result.load({"unknown": None, **SUMS})
    with result:
        assert result.joules("a") == 7.0
        result.add("a", (0.0, 1.0))
    assert (result.joules("a"), result.reason) == (None, "the device is the CPU, of which NVML tells nothing")
