"""Tests `PowerMonitor` against a stub of NVML, through the real nvidia-ml-py."""

import sys
import threading
import time
from types import SimpleNamespace
from unittest import mock

import nvml_stub
import pynvml
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bt_fast import PowerMonitor
from bt_fast.power import Sample, counted_energy, driver_version, energy_of, integrated_power, power_within

A, B, MIG = "GPU-aaaaaaaa-0000", "GPU-bbbbbbbb-0000", "MIG-cccccccc-0000"
NEVER = 3600.0  # an interval in which the thread reads nothing: all samples come from marks
EVERYTHING = f"""
device {A}
energy 5000000 +100
instant 250000 350000 300000
power 111000
sm_util 50 100
memory_util 20 40
sm_clock 1500 1700
memory_clock 2600
temperature_v 60 71 65
temperature 60 71 65
events 4 0 68
memory 1000 9000 5000
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    if nvml_stub.COMPILER is None:
        pytest.skip("the stub of NVML needs a C compiler, and there is neither gcc nor cc")
    with nvml_stub.process_with_stub(tmp_path_factory.mktemp("nvml")) as run_there:
        yield run_there


# Functions that run in the process with the stub


def measured(devices, marks=8):
    """Returns a monitor after a block with marks "0", "1", ...; begin, end and each mark take a sample."""
    with PowerMonitor(devices, interval=NEVER) as monitor:
        for k in range(marks):
            monitor.mark(str(k))
    return told(monitor)


def told(monitor):
    """Returns a monitor's reports, for the process of the tests."""
    spans = (None, *monitor.labels)
    return SimpleNamespace(
        available=monitor.available,
        reason=monitor.reason,
        missing=monitor.missing,
        samples=monitor.samples,
        summaries={label: monitor.summary(label) for label in spans},
        joules={label: monitor.joules(label) for label in spans},
        per_sample=monitor.joules_per_sample(10),
    )


def measured_by_torch(devices, uuids, current=0):
    """Measures where torch has CUDA devices with these UUIDs, which it writes without NVML's prefix."""
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "device_count", return_value=len(uuids)),
        mock.patch.object(torch.cuda, "current_device", return_value=current),
        mock.patch.object(torch.cuda, "get_device_properties", lambda k: SimpleNamespace(uuid=uuids[k])),
    ):
        return measured(devices)


def constructed(*args):
    """Returns the constructor's error, or the reason why the monitor does nothing."""
    try:
        return PowerMonitor(*args).reason
    except (TypeError, ValueError) as error:
        return error


def measured_in_a_thread():
    before = threading.active_count()
    with PowerMonitor([A], interval=0.001) as monitor:
        (thread,) = (t for t in threading.enumerate() if t.name == "bt_fast.PowerMonitor")
        deadline = time.monotonic() + 10
        while len(monitor.samples) < 20 and time.monotonic() < deadline:
            time.sleep(0.001)
        inside = monitor.summary()
    return told(monitor), inside, thread.daemon, thread.is_alive(), threading.active_count() - before


def measured_in_threads_twice():
    monitor, result = PowerMonitor([A], interval=0.001), []
    for _ in range(2):
        with monitor:
            deadline = time.monotonic() + 10
            while len(monitor.samples) < 5 and time.monotonic() < deadline:
                time.sleep(0.001)
            result.append(len(monitor.samples))
    return result


def used_in_a_middle_third(devices):
    """Returns the joules of a block's middle third and of intervals that reach beyond it, and the third's length."""
    with PowerMonitor(devices, interval=NEVER) as monitor:
        pass
    begin, end = monitor.samples[0].time, monitor.samples[-1].time
    third = (end - begin) / 3
    beyond = [[(begin - 1, end)], [(begin, end + 1)], [(begin, begin), (end, end + 1)]]
    middle = monitor.joules_during([(begin + third, end - third)])
    return middle, [monitor.joules_during(intervals) for intervals in beyond], third


def measured_twice():
    monitor = PowerMonitor([A], interval=NEVER)
    result = []
    for marks in (3, 1):
        with monitor:
            for k in range(marks):
                monitor.mark(str(k))
        result.append((len(monitor.samples), monitor.labels))
    return result


def references_of_nested_blocks():
    with PowerMonitor([A], interval=NEVER), PowerMonitor([B], interval=NEVER):
        inside = nvml_stub.stub().stub_references()
    return inside, nvml_stub.stub().stub_references()


def a_block_that_raises():
    try:
        with PowerMonitor([A], interval=0.001) as monitor:
            raise KeyError("the user's")
    except KeyError:
        return len(monitor.samples), [t.name for t in threading.enumerate() if t.name == "bt_fast.PowerMonitor"]


def without_room_for_a_thread():
    with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread")):
        try:
            with PowerMonitor([A]):
                return "not reached"
        except RuntimeError as error:
            return str(error)


def misused():
    """Returns the errors of a second block inside the first, and of wrong marks."""
    monitor, errors = PowerMonitor([A], interval=NEVER), []

    def attempt(call, *args):
        try:
            call(*args)
        except (RuntimeError, ValueError) as error:
            errors.append(f"{type(error).__name__}: {error}")

    attempt(monitor.mark, "before")
    with monitor:
        monitor.mark("epoch 1")
        attempt(monitor.__enter__)
        attempt(monitor.mark, "epoch 1")
        attempt(monitor.summary, "epoch 2")
        attempt(monitor.joules_per_sample, 0)
    attempt(monitor.mark, "after")
    return errors


# Readings


def test_a_sample_holds_every_reading_in_its_unit(run):
    result = run(EVERYTHING, measured, [A])
    assert result.available
    assert result.reason is None
    assert len(result.samples) == 10
    assert result.samples[0] == Sample(
        device=A,
        time=result.samples[0].time,
        power=350.0,  # the first values went to the probes
        energy=5_000_100,
        sm_utilisation=1.0,
        memory_utilisation=0.4,
        sm_clock=1700,
        memory_clock=2600,
        temperature=71,
        throttle=(),
        memory_used=9000,
    )
    assert result.samples[1].throttle == ("sw_power_cap", "hw_thermal_slowdown")
    times = [s.time for s in result.samples]
    assert times == sorted(times)


def test_a_summary_holds_means_over_the_block_and_the_worst(run):
    result = run(EVERYTHING, measured, [A], 18)
    (summary,) = result.summaries[None]
    assert (summary.device, summary.name, summary.samples) == (A, "Stub GPU", 20)
    assert summary.seconds == result.samples[-1].time - result.samples[0].time
    assert (summary.joules, summary.energy_source) == (1.9, "counter")
    assert 300 < summary.mean_power < 350
    assert (summary.max_power, summary.power_source) == (350.0, "instant")
    assert (summary.mean_sm_utilisation, summary.mean_memory_utilisation) == (1.0, pytest.approx(0.4))
    assert (summary.mean_sm_clock, summary.mean_memory_clock) == (1700, 2600)
    assert (summary.max_temperature, summary.peak_memory) == (71, 9000)
    assert summary.throttle == {"sw_power_cap": 0.95, "hw_thermal_slowdown": 0.95}
    assert (summary.unsupported, summary.lost, summary.shared) == ((), None, None)


def test_power_is_the_averaged_one_where_there_is_no_instant_one(run):
    (summary,) = run(f"device {A}\ninstant !3\npower 120000", measured, [A]).summaries[None]
    assert (summary.mean_power, summary.power_source) == (pytest.approx(120), "average")


def test_an_older_driver_is_asked_by_its_older_names(run):
    script = f"device {A}\nevents !13\nthrottle 8\ntemperature_v !13\ntemperature 50"
    (sample, *_) = run(script, measured, [A]).samples
    assert (sample.throttle, sample.temperature) == (("hw_slowdown",), 50)


def test_a_reason_without_a_name_is_reported_as_its_bit(run):
    (sample, *_) = run(f"device {A}\nevents {0x1 + 0x4 + 0x200 + 0x3000}", measured, [A]).samples
    assert sample.throttle == ("gpu_idle", "sw_power_cap", "board_limit", "0x3000")


def test_what_is_not_supported_is_none_and_never_0(run):
    result = run(f"device {A}\ntemperature_v 40\ntemperature 40", measured, [A])
    (summary,) = result.summaries[None]
    assert result.available
    assert result.samples[0] == Sample(A, result.samples[0].time, temperature=40)
    assert (summary.joules, summary.energy_source, summary.mean_power, summary.max_power) == (None,) * 4
    assert (summary.mean_sm_utilisation, summary.mean_sm_clock, summary.throttle, summary.peak_memory) == (None,) * 4
    assert set(summary.unsupported) == {f for f in vars(result.samples[0])} - {"device", "time", "temperature"}
    assert (result.joules[None], result.per_sample) == (None, None)


def test_what_is_not_supported_is_asked_once_and_then_left_out(run):
    result = run(f"device {A}\npower !3 90000\nenergy 0 +1", measured, [A])
    assert [s.power for s in result.samples] == [None] * 10


def test_a_reading_that_fails_once_is_none_in_that_sample(run):
    result = run(f"device {A}\npower 100000 100000 !10 !999 90000", measured, [A], 2)
    assert [s.power for s in result.samples] == [100.0, None, None, 90.0]
    assert result.summaries[None][0].lost is None


# Energy


def test_the_counter_tells_the_energy_once_it_has_moved_ten_times(run):
    script = f"device {A}\npower 100000\nenergy 7000 +2000"
    result = run(script, measured, [A], 9)
    assert (result.summaries[None][0].energy_source, result.joules[None], result.per_sample) == ("counter", 20.0, 2.0)
    (summary,) = run(script, measured, [A], 8).summaries[None]
    assert (summary.energy_source, summary.joules) == ("power", pytest.approx(100 * summary.seconds))


def test_without_power_a_counter_that_has_moved_has_to_do(run):
    (summary,) = run(f"device {A}\nenergy 7000 7000 9000", measured, [A]).summaries[None]
    assert (summary.energy_source, summary.joules, summary.mean_power) == ("counter", 2.0, None)


def test_a_counter_that_stands_still_tells_nothing(run):
    result = run(f"device {A}\nenergy 7000", measured, [A])
    assert (result.summaries[None][0].energy_source, result.joules[None]) == (None, None)


@pytest.mark.parametrize("bits", [32, 64])
def test_a_counter_that_wraps_goes_on(run, bits):
    result = run(f"device {A}\nenergy {2**bits - 1000} +300 %{2**bits}", measured, [A], 10)
    assert result.samples[-1].energy < 300 * 12 < result.samples[0].energy
    assert (result.summaries[None][0].energy_source, result.joules[None]) == ("counter", pytest.approx(3.3, rel=1e-12))


def test_a_counter_that_is_set_back_leaves_the_word_to_the_power(run):
    values = " ".join(str(v) for v in [*range(5_000_000, 5_000_800, 100), *range(0, 800, 100)])
    (summary,) = run(f"device {A}\npower 200000\nenergy {values}", measured, [A], 12).summaries[None]
    assert (summary.energy_source, summary.joules) == ("power", pytest.approx(200 * summary.seconds))


@given(
    st.lists(st.integers(0, 2900), min_size=1, max_size=30),
    st.sampled_from([32, 64]),
    st.floats(0.0, 1.0),
)
def test_the_counter_sums_what_was_used_wherever_it_wraps(gains, bits, position):
    start = min(int(position * 2**bits), 2**bits - 1) if bits == 32 else 2**64 - 1 - sum(gains) // 2
    totals = [start]
    for gain in gains:
        totals.append(totals[-1] + gain)
    samples = [Sample(A, float(k), energy=total % 2**bits) for k, total in enumerate(totals)]
    assert counted_energy(samples) == (sum(gains) / 1000, sum(gain > 0 for gain in gains))


@given(st.floats(0, 1000), st.floats(-1000, 1000), st.lists(st.floats(0.001, 10), min_size=1, max_size=20))
def test_power_that_changes_evenly_is_integrated_exactly(begin, slope, gaps):
    times = [0.0]
    for gap in gaps:
        times.append(times[-1] + gap)
    joules, seconds = integrated_power([Sample(A, t, power=begin + slope * t) for t in times])
    exact = begin * times[-1] + slope * times[-1] ** 2 / 2
    assert joules == pytest.approx(exact, rel=1e-9, abs=1e-9 * (1 + begin * times[-1] + 1000 * times[-1] ** 2))
    assert seconds == times[-1]


@given(
    st.floats(0, 1000),
    st.floats(-1000, 1000),
    st.lists(st.floats(0.001, 10), min_size=1, max_size=20),
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=5),
)
def test_power_that_changes_evenly_is_integrated_exactly_in_every_interval(begin, slope, gaps, parts):
    times = [0.0]
    for gap in gaps:
        times.append(times[-1] + gap)
    intervals = [tuple(times[-1] * part for part in sorted(ends)) for ends in parts]
    joules = power_within([Sample(A, t, power=begin + slope * t) for t in times], intervals)
    exact = sum(begin * (v - u) + slope * (v * v - u * u) / 2 for u, v in intervals)
    assert joules == pytest.approx(exact, rel=1e-9, abs=1e-9 * (1 + begin * times[-1] + 1000 * times[-1] ** 2))


def test_intervals_have_the_power_between_the_samples_around_them():
    samples = [Sample(A, t, power=p) for t, p in ((0.0, 100.0), (1.0, 100.0), (2.0, None), (3.0, 300.0), (4.0, 300.0))]
    assert power_within(samples, [(0.5, 1.0)]) == 50.0
    assert power_within(samples, [(1.0, 3.0)]) == 400.0
    assert power_within(samples, [(1.0, 2.0)]) == 150.0
    assert power_within(samples, [(0.0, 0.25), (2.5, 4.0)]) == 25.0 + 0.5 * 275.0 + 300.0
    assert power_within(samples, [(4.0, 4.0)]) == 0.0
    assert power_within(samples, []) == 0.0


def test_energy_is_reported_of_intervals_inside_the_block_alone(run):
    middle, beyond, third = run(f"device {A}\npower 90000", used_in_a_middle_third, [A])
    assert middle == pytest.approx(90 * third)
    assert beyond == [None] * 3


def test_energy_of_intervals_takes_the_power_of_every_device(run):
    middle, _, third = run(f"device {A}\npower 90000\ndevice {B}\npower 10000", used_in_a_middle_third, [A, B])
    assert middle == pytest.approx(100 * third)
    for other in ("energy 0 +1000", "power 10000\nlost_after 2", "power 10000\nclosed 4"):
        assert run(f"device {A}\npower 90000\ndevice {B}\n{other}", used_in_a_middle_third, [A, B])[0] is None


def test_one_reading_tells_no_energy():
    assert energy_of([Sample(A, 0.0, power=100.0, energy=5), Sample(A, 1.0)]) == (None, None)


# Spans


def test_spans_share_the_sample_at_their_mark_and_sum_to_the_whole(run):
    result = run(f"device {A}\nenergy 0 +1000", measured, [A], 5)
    assert [result.joules[label] for label in (None, "0", "1", "2", "3", "4")] == [6.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert [result.summaries[label][0].samples for label in (None, "0", "4")] == [7, 2, 2]


def test_a_new_block_begins_anew(run):
    assert run(f"device {A}\nenergy 0 +1000", measured_twice) == [(5, ("0", "1", "2")), (3, ("0",))]


def test_the_thread_samples_a_second_block_too(run):
    assert min(run(EVERYTHING, measured_in_threads_twice)) >= 5


def test_misuse_is_an_error_that_says_so(run):
    assert run(EVERYTHING, misused) == [
        "RuntimeError: mark must be called inside the monitor's block: write `with monitor: monitor.mark(...)`",
        "RuntimeError: this PowerMonitor is in a block already: take another one",
        "ValueError: label must be new, but there is a span 'epoch 1': give another name",
        "ValueError: label must be one of 'epoch 1', got 'epoch 2': name a span that `mark` began, or leave label out",
        "ValueError: n must be at least 1, got 0: give the number of training samples",
        "RuntimeError: mark must be called inside the monitor's block: write `with monitor: monitor.mark(...)`",
    ]


# The thread, and the library's reference count, which every call of `run` checks as well


def test_the_thread_samples_during_the_block_and_ends_with_it(run):
    result, inside, daemon, alive, more = run(EVERYTHING, measured_in_a_thread)
    assert len(result.samples) >= 20
    assert inside[0].samples >= 20
    assert daemon
    assert not alive
    assert more == 0


def test_a_block_that_raises_is_left_as_any_other(run):
    samples, threads = run(EVERYTHING, a_block_that_raises)
    assert samples >= 2
    assert threads == []


def test_a_block_that_cannot_begin_gives_the_library_back(run):
    assert run(EVERYTHING, without_room_for_a_thread) == "can't start new thread"


def test_monitors_count_their_uses_of_the_library(run):
    assert run(f"device {A}\ndevice {B}", references_of_nested_blocks) == (2, 0)


# A lost GPU


def test_what_was_measured_before_a_gpu_is_lost_stays(run):
    result = run(f"device {A}\nenergy 0 +1000\nlost_after 5", measured, [A], 6)
    (summary,) = result.summaries[None]
    assert (summary.samples, summary.joules, summary.lost) == (3, 2.0, "GPU is lost")
    assert (result.joules[None], result.per_sample) == (None, None)  # the rest of the block was not measured
    assert (result.joules["0"], result.summaries["0"][0].lost) == (1.0, None)  # complete
    assert (result.joules["1"], result.summaries["1"][0].lost) == (None, "GPU is lost")
    assert (result.joules["3"], result.summaries["3"]) == (None, ())


def test_a_gpu_that_is_lost_from_the_first_raises_nothing(run):
    result = run(f"device {A}\nenergy 0 +1000\nlost_after 1", measured, [A])
    assert (result.samples, result.summaries[None], result.joules[None]) == ((), (), None)


# Several devices


TWO = f"device {A}\nenergy 0 +1000\ndevice {B}\nenergy 0 +3000\n"


def test_several_devices_have_a_summary_each_and_sum_their_energy(run):
    result = run(TWO, measured, [B, A], 9)
    assert [(s.device, s.joules) for s in result.summaries[None]] == [(B, 30.0), (A, 10.0)]
    assert (result.joules[None], result.per_sample) == (40.0, 4.0)


def test_without_one_of_several_devices_there_is_no_sum(run):
    result = run(TWO + "lost_after 4", measured, [A, B], 9)
    assert [(s.device, s.joules, s.lost) for s in result.summaries[None]] == [(A, 10.0, None), (B, 3.0, "GPU is lost")]
    assert result.joules[None] is None
    result = run(TWO + f"device {B}2", measured, [A, f"{B}2"], 9)
    assert [s.joules for s in result.summaries[None]] == [10.0, None]
    assert result.joules[None] is None


def test_the_others_are_measured_where_one_cannot_be_opened_and_it_is_named(run):
    result = run(TWO + "closed 4", measured, [A, B], 9)
    assert result.available
    assert result.missing == {B: "Insufficient Permissions"}
    assert [(s.device, s.joules) for s in result.summaries[None]] == [(A, 10.0)]
    assert (result.joules[None], result.per_sample) == (None, None)  # not of all devices


def test_where_none_can_be_opened_there_is_nothing_to_measure(run):
    result = run(f"device {A}\nclosed 4\ndevice {B}\nclosed 15", measured, [A, B])
    assert (result.available, result.missing, result.samples) == (False, {}, ())
    assert result.reason == "NVML does not open the device: Insufficient Permissions; GPU is lost"


@pytest.mark.parametrize("devices", [1, "cuda:1", torch.device("cuda", 1), [torch.device("cuda:1")], (1,)])
def test_devices_of_torch_are_identified_by_uuid_and_not_by_their_number(run, devices):
    uuids = [B.removeprefix("GPU-"), A.removeprefix("GPU-")]  # torch has the opposite order
    assert run(TWO, measured_by_torch, devices, uuids).summaries[None][0].device == A


@pytest.mark.parametrize("devices", [None, "cuda", torch.device("cuda")])
def test_the_current_device_is_the_default(run, devices):
    uuids = [B.removeprefix("GPU-"), A.removeprefix("GPU-")]
    assert run(TWO, measured_by_torch, devices, uuids, 0).summaries[None][0].device == B
    assert run(TWO, measured_by_torch, devices, uuids, 1).summaries[None][0].device == A


# MIG


OF_MIG = f"device {A}\npower 400000\nenergy 0 +1000\nmemory 70000\nmig {MIG} {A}\nmemory 800\n"


@pytest.mark.parametrize("by_torch", [False, True])
def test_an_instance_of_mig_has_the_power_of_its_gpu_and_memory_of_its_own(run, by_torch):
    call = (measured_by_torch, None, [MIG.removeprefix("MIG-")]) if by_torch else (measured, MIG)
    result = run(OF_MIG, *call)
    (summary,) = result.summaries[None]
    assert (summary.device, summary.name) == (MIG, "Stub GPU MIG 1g")
    assert (summary.max_power, summary.peak_memory) == (400.0, 800)
    assert "physical GPU" in summary.shared
    assert {"sm_utilisation", "memory_utilisation"} <= set(summary.unsupported)


# Nothing to measure


def test_without_a_driver_it_does_nothing_and_says_so(monkeypatch):
    monkeypatch.setattr(pynvml, "nvmlLib", None)
    monkeypatch.setattr(pynvml, "CDLL", mock.Mock(side_effect=OSError))
    with PowerMonitor() as monitor:
        monitor.mark("epoch 1")
    result = told(monitor)
    assert not result.available
    assert result.reason == "there is no NVIDIA driver on this machine (libnvidia-ml.so.1 was not found)"
    assert (result.samples, result.summaries) == ((), {None: (), "epoch 1": ()})
    assert (result.joules, result.per_sample) == ({None: None, "epoch 1": None}, None)
    assert monitor.seconds > 0
    assert "bt_fast.PowerMonitor" not in {t.name for t in threading.enumerate()}


def test_without_nvidia_ml_py_it_does_nothing_and_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    command = "python -m pip install --upgrade 'nvidia-ml-py>=12'"
    assert PowerMonitor().reason == f"nvidia-ml-py is not installed: {command}"


def test_nvidia_ml_py_that_takes_no_strings_is_called_too_old(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(__file__="/lib/pynvml.py"))
    command = "python -m pip install --upgrade 'nvidia-ml-py>=12'"
    with PowerMonitor() as monitor:
        assert monitor.reason == f"the installed pynvml (/lib/pynvml.py) is too old: {command}"
    assert driver_version() is None


def test_nvidia_ml_py_that_cannot_be_imported_is_reported(monkeypatch, tmp_path):
    (tmp_path / "pynvml.py").write_text("raise OSError('libcuda')")
    monkeypatch.delitem(sys.modules, "pynvml")
    monkeypatch.syspath_prepend(tmp_path)
    assert PowerMonitor().reason.startswith("nvidia-ml-py cannot be imported (OSError: libcuda): python -m pip")


def test_a_driver_that_does_not_start_is_reported(run):
    reason = run(f"init 9\ndevice {A}", constructed, [A])
    assert reason.startswith("NVML does not start: ")


def test_the_driver_tells_its_version_unless_it_does_not_start(run):
    assert run(f"device {A}", driver_version) == "570.26"
    assert run("init 9", driver_version) is None


def test_a_driver_that_torch_does_not_use_is_reported(run):
    assert run(f"device {A}", constructed) == "torch sees no CUDA device: name one by its UUID (nvidia-smi -L)"


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), ["cpu"]])
def test_the_cpu_has_nothing_to_measure(device):
    with PowerMonitor(device) as monitor:
        pass
    assert (monitor.available, monitor.reason) == (False, "the device is the CPU, of which NVML tells nothing")
    assert monitor.joules() is None


# Bad input


def test_a_device_that_the_driver_does_not_know_is_an_error_that_names_those_it_has(run):
    error = run(TWO, constructed, ["GPU-elsewhere"])
    assert isinstance(error, ValueError)
    assert str(error) == f"devices: the driver knows no GPU-elsewhere; it has {A}, {B}: name one of these"


def test_a_device_given_twice_is_an_error(run):
    assert str(run(TWO, constructed, [A, A])) == f"devices must differ, got {A}, {A}: name each device once"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([],), ValueError, "devices must name at least one"),
        ((-1,), ValueError, "devices must be at least 0 as indices, got -1"),
        ((True,), TypeError, "devices must be torch devices, indices or UUIDs, got True"),
        ((1.5,), TypeError, "devices must be torch devices, indices or UUIDs, got 1.5"),
        (("gpu",), ValueError, "devices must be torch devices, indices or UUIDs, got 'gpu'"),
        (("meta",), ValueError, "devices must be of CUDA, got meta"),
        ((["cpu", "cuda"],), ValueError, "devices must be the CPU alone or GPUs, got both"),
        ((None, 0), ValueError, "interval must be a finite number of seconds greater than 0, got 0"),
        ((None, float("nan")), ValueError, "interval must be a finite number of seconds greater than 0, got nan"),
        ((None, "1"), TypeError, "interval must be a number, got '1'"),
    ],
)
def test_bad_arguments_are_errors_that_name_them(arguments, error, message):
    with pytest.raises(error) as raised:
        PowerMonitor(*arguments)
    assert message in str(raised.value)
