import functools
import json
import re
from dataclasses import dataclass, replace

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu_prediction
from benchmarks.gpu_model import GPUS, Gpu, HostWait, Kernel, Launch, Record, StreamWait, Tiles, kernels_of, simulate
from benchmarks.gpu_prediction import Workload, as_dict, measure, predict, programs
from benchmarks.gpu_trace import NOWHERE, trace, trace_on_cpu
from benchmarks.predict import main
from bt_fast import ops
from bt_fast.attack import device as attack_device

pytestmark = pytest.mark.any_torch
NOTHING = {"launch": 0.0, "start": 0.0, "graph": 0.0, "node": 0.0, "wait": 0.0}


@dataclass(frozen=True)
class Counted:
    """A device on which a kernel's rows count its tiles, and its bytes are their seconds."""

    sms: int = 4
    launch: float = 1.0
    start: float = 0.0
    graph: float = 1.0
    node: float = 0.0
    wait: float = 0.0
    asynchronous: bool = True

    graph_seconds = property(lambda self: self.graph)
    start_seconds = property(lambda self: self.start)
    node_seconds = property(lambda self: self.node)
    wait_seconds = property(lambda self: self.wait)

    def launch_seconds_of(self, kernel):
        return self.launch

    def tiles(self, kernel):
        return Tiles(kernel.rows, kernel.bytes)


def kernel(tiles, seconds):
    return Kernel("", "stream", 0, seconds, tiles)


def launch(tiles, seconds, stream=0):
    return Launch((kernel(tiles, seconds),), stream)


# One stream


def test_a_kernel_starts_after_its_launch_and_takes_a_tiles_time():
    result = simulate([launch(1, 10)], Counted(launch=3.0, start=2.0))
    assert result.seconds == 3 + 2 + 10
    assert result.host_seconds == 3
    assert result.device_seconds == result.sm_seconds == 10


def test_kernels_of_a_stream_run_one_after_another_while_the_host_goes_on():
    assert simulate([launch(1, 10), launch(1, 5)], Counted(launch=3.0, start=2.0)).seconds == 3 + 2 + 10 + 2 + 5


def test_short_kernels_take_the_hosts_time():
    assert simulate([launch(1, 1)] * 20, Counted(launch=7.0)).seconds == 20 * 7 + 1


def test_long_kernels_take_the_devices_time():
    assert simulate([launch(1, 100)] * 20, Counted(launch=7.0)).seconds == 7 + 20 * 100


@pytest.mark.parametrize(("tiles", "waves"), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_tiles_beyond_the_sms_take_another_wave(tiles, waves):
    result = simulate([launch(tiles, 10)], Counted(**NOTHING))
    assert result.seconds == 10 * waves
    assert result.sm_seconds == 10 * tiles


def test_a_host_that_waits_launches_after_the_event():
    program = [launch(1, 10), Record(1), HostWait(1), launch(1, 5)]
    assert simulate(program, Counted(launch=3.0, wait=4.0)).seconds == 3 + 10 + 4 + 3 + 5


def test_to_wait_for_what_has_happened_costs_nothing():
    program = [launch(1, 1), Record(1), launch(1, 5), HostWait(1)]
    assert simulate(program, Counted(launch=3.0, wait=4.0)).seconds == 3 + 3 + 5


def test_a_device_without_a_queue_is_done_before_the_next_launch():
    result = simulate([launch(1, 10), launch(1, 5)], Counted(launch=3.0, asynchronous=False))
    assert result.seconds == 3 + 10 + 3 + 5


# Graphs


def test_a_replayed_graph_takes_one_launch_for_all_its_kernels():
    device = Counted(launch=7.0, graph=5.0, start=2.0, node=0.5)
    kernels = (kernel(1, 1),) * 20
    eager = simulate([Launch((k,)) for k in kernels], device)
    replayed = simulate([Launch(kernels, graph=True)], device)
    assert eager.seconds == 20 * 7 + 2 + 1
    assert replayed.seconds == 5 + 2 + 20 * 1 + 19 * 0.5
    assert replayed.host_seconds == 5


# Several streams


def test_streams_that_fit_beside_each_other_overlap():
    assert simulate([launch(2, 10, 0), launch(2, 10, 1)], Counted(launch=1.0)).seconds == 2 + 10


def test_streams_that_do_not_fit_share_the_sms():
    # the first takes all 4 SMs for a wave and 2 in another, in which the second's 4 tiles run in two halves
    assert simulate([launch(6, 10, 0), launch(4, 10, 1)], Counted(**NOTHING)).seconds == 30
    assert simulate([launch(6, 10, 0), launch(2, 10, 1)], Counted(**NOTHING)).seconds == 20


def test_a_stream_that_waits_for_an_event_starts_after_it():
    fork = [launch(1, 10, 0), Record(1, 0), StreamWait(1, 1), launch(1, 5, 1), launch(1, 3, 0)]
    assert simulate(fork, Counted(**NOTHING)).seconds == 15
    join = [*fork, Record(2, 1), StreamWait(2, 0), launch(1, 100, 0)]
    assert simulate(join, Counted(**NOTHING)).seconds == 15 + 100


def test_an_event_counts_what_its_stream_held_when_it_was_recorded():
    program = [launch(1, 10, 0), Record(1, 0), launch(1, 90, 0), StreamWait(1, 1), launch(1, 5, 1)]
    assert simulate(program, Counted(**NOTHING)).seconds == 100
    assert simulate([*program, Record(2, 1), HostWait(2)], Counted(**NOTHING)).host_seconds == 0


def test_an_event_that_is_never_recorded_is_an_error():
    for program in ([HostWait(1)], [StreamWait(1), launch(1, 1)]):
        with pytest.raises(ValueError, match="never recorded"):
            simulate(program, Counted())


# Properties of every program

KERNELS = st.builds(kernel, st.integers(1, 9), st.integers(1, 20))
ONE_STREAM = st.lists(st.builds(lambda k: Launch((k,)), KERNELS), min_size=1, max_size=12)
STREAMS = st.lists(st.builds(lambda k, s: Launch((k,), s), KERNELS, st.integers(0, 2)), min_size=1, max_size=12)
DEVICES = st.builds(Counted, st.integers(1, 5), *[st.sampled_from([0.0, 0.5, 3.0])] * 5)


@settings(max_examples=100, deadline=None)
@given(STREAMS, DEVICES)
def test_no_program_beats_its_longest_chain_its_work_or_its_launches(program, device):
    result = simulate(program, device)
    work = sum(k.rows * k.bytes for k in kernels_of(program))
    chains = [
        sum(device.start + -(-k.rows // device.sms) * k.bytes for k in kernels_of(a for a in program if a.stream == s))
        for s in range(3)
    ]
    assert result.seconds >= max(max(chains), work / device.sms, device.launch * len(program)) - 1e-9
    assert result.sm_seconds == pytest.approx(work)
    assert work / device.sms - 1e-9 <= result.device_seconds <= result.seconds + 1e-9


@settings(max_examples=100, deadline=None)
@given(ONE_STREAM, DEVICES, KERNELS, st.data())
def test_in_one_stream_more_work_or_latency_never_saves_time(program, device, extra, data):
    seconds = simulate(program, device).seconds
    place = data.draw(st.integers(0, len(program)))
    assert simulate([*program[:place], Launch((extra,)), *program[place:]], device).seconds >= seconds - 1e-9
    for name in ("launch", "start"):
        slower = replace(device, **{name: getattr(device, name) + 1.0})
        assert simulate(program, slower).seconds > seconds
    assert simulate(program, replace(device, sms=device.sms + 1)).seconds <= seconds + 1e-9


@settings(max_examples=50, deadline=None)
@given(STREAMS, DEVICES)
def test_the_same_program_takes_the_same_time(program, device):
    assert simulate(program, device) == simulate(program, device)


# A GPU's tiles

ROUND = Gpu(
    "round figures", sms=100, fp32=1e12, tf32=2e12, bandwidth=1e11, product_efficiency=1.0, memory_efficiency=1.0
)


def test_a_product_takes_the_time_of_its_flops_on_full_tiles():
    product = Kernel("", "conv", 2 * 12800 * 128 * 1000, 1, 12800, 128, 1000)
    assert ROUND.tiles(product) == Tiles(100, pytest.approx(2 * 128 * 128 * 1000 / (2e12 / 100)))
    assert ROUND.tiles(replace(product, kind="matmul")).seconds == pytest.approx(2 * 128 * 128 * 1000 / (1e12 / 100))


def test_a_product_fills_its_last_tiles_in_part():
    narrow = Kernel("", "conv", 2 * 12800 * 16 * 1000, 1, 12800, 16, 1000)
    assert ROUND.tiles(narrow) == Tiles(100, pytest.approx(2 * 128 * 32 * 1000 / (2e12 / 100)))


def test_a_small_products_depth_is_cut_so_that_it_finds_more_sms():
    weight = Kernel("", "conv_weight", 2 * 64 * 64 * 100_000, 1, 64, 64, 100_000)
    assert ROUND.tiles(weight).count == 100
    assert ROUND.tiles(replace(weight, flops=2 * 64 * 64 * 1000, depth=1000)).count == 2


def test_what_streams_takes_the_time_of_its_bytes():
    result = simulate([Launch((Kernel("", "stream", 0, 10**9, 8192 * 100),))], ROUND)
    assert result.device_seconds == pytest.approx(1e9 / 1e11)


def test_ops_of_this_package_take_the_host_longer():
    ours = Launch((Kernel("", "stream", 0, 4, 1, fused=True),))
    assert simulate([ours], ROUND).host_seconds == ROUND.op_seconds > ROUND.launch_seconds


# Launches of a piece of code


def tiny(device):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 8, 3, padding=1, stride=2, bias=False)
    return torch.nn.Sequential(conv, torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 4 * 4, 5)).to(device)


def iteration(model, device, *, inputs=True):
    x = torch.ones(2, 3, 8, 8, device=device, requires_grad=inputs)
    return lambda: model(x).sum().backward()


def counted_by_torch(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("inputs", [True, False])
def test_the_flops_are_those_that_torch_counts(inputs):
    work = iteration(tiny("cpu"), "cpu", inputs=inputs)
    expected = counted_by_torch(work)
    traced = trace(iteration(tiny(NOWHERE), NOWHERE, inputs=inputs))
    assert sum(k.flops for k in kernels_of(traced)) == expected
    assert sum(k.flops for k in kernels_of(trace_on_cpu(work))) == expected


def test_each_kernels_bytes_and_shape_are_those_by_hand():
    x, w, y, logits = 2 * 3 * 8 * 8, 8 * 3 * 3 * 3, 2 * 8 * 4 * 4, 2 * 5  # elements
    kernels = kernels_of(trace(iteration(tiny(NOWHERE), NOWHERE)))
    result = {(k.name, k.kind): k for k in kernels}
    outputs = 2 * 4 * 4

    conv = result["convolution", "conv"]
    assert (conv.bytes, conv.rows, conv.columns, conv.depth) == (4 * (x + w + y), outputs, 8, 27)
    assert conv.flops == 2 * outputs * 8 * 27
    relu = result["relu", "stream"]
    assert (relu.bytes, relu.rows, relu.flops) == (4 * (y + y), y, 0)
    linear = result["addmm", "matmul"]
    assert linear.bytes == 4 * (y + 5 * 128 + 5 + logits)
    assert (linear.rows, linear.columns, linear.depth) == (2, 5, 128)
    weight = result["convolution_backward", "conv_weight"]
    assert (weight.bytes, weight.rows, weight.columns, weight.depth) == (4 * (y + x + w), 8, 27, outputs)
    data = result["convolution_backward", "conv_input"]
    assert (data.bytes, data.rows, data.columns) == (4 * (y + w + x), 2 * 8 * 8, 3)
    assert result["threshold_backward", "stream"].bytes == 4 * 3 * y


def test_views_and_room_launch_nothing():
    x = torch.empty(4, 6, device=NOWHERE)
    assert trace(lambda: (x.view(6, 4), x[:2], x.t(), torch.empty_like(x), x.detach())) == []
    assert [k.name for k in kernels_of(trace(lambda: x.view(6, 4) + 1))] == ["add"]


def test_batch_norm_reads_its_input_once_more_in_train_mode():
    norm, x = torch.nn.BatchNorm2d(4).to(NOWHERE), torch.empty(2, 4, 5, 5, device=NOWHERE)

    def bytes_of():
        return sum(k.bytes for k in kernels_of(trace(lambda: norm(x))) if k.kind == "norm")

    train = bytes_of()
    norm.eval()
    assert train - bytes_of() == pytest.approx(4 * x.numel(), abs=4 * 4 * 4)


def test_an_op_of_ours_is_one_launch_on_a_gpu_and_what_it_consists_of_on_the_cpu():
    def work(device):
        logits, target = torch.ones(4, 3, device=device), torch.full((4, 3), 1 / 3, device=device)
        return lambda: ops.ascent_direction(logits, target)

    (ours,) = kernels_of(trace(work(NOWHERE)))
    assert ours.fused
    assert ours.bytes == 4 * 3 * 4 * 3
    first, *inner = kernels_of(trace_on_cpu(work("cpu")))
    assert first.fused
    assert first.bytes == 0
    assert inner
    assert not any(k.fused for k in inner)


def test_tracing_leaves_everything_as_it_was():
    before = (attack_device.no_graphs_reason, torch.is_autocast_enabled, torch.get_autocast_dtype)
    with pytest.raises(RuntimeError, match="inside"):
        trace(lambda: (_ for _ in ()).throw(RuntimeError("inside")))
    assert before == (attack_device.no_graphs_reason, torch.is_autocast_enabled, torch.get_autocast_dtype)
    assert not torch.empty(1, device=NOWHERE).is_cuda


# An iteration of TRADES


@pytest.fixture(scope="module")
def traced():
    return programs("small-cnn", 50)


def graphs(program):
    return [a for a in program if isinstance(a, Launch) and a.graph]


def test_the_reference_takes_the_forward_passes_that_arithmetic_counts(traced):
    flops = {name: sum(k.flops for k in kernels_of(program)) for name, program in traced.items()}
    # 39 F and, since SmallCNN has dropout, 30 F; the first layer's input gradient is not needed in training
    assert flops["reference"] / flops["optimised"] == pytest.approx(39 / 30, rel=0.01)
    assert flops["optimised, graphs"] > flops["optimised"]  # 50 samples in a bucket of 56


def test_graphs_replay_a_step_at_a_time_and_pad_to_the_bucket(traced):
    steps = graphs(traced["bullet, graphs"])
    assert len(steps) == 10
    firsts = [next(k for k in step.kernels if k.kind == "conv").rows // 26**2 for step in steps]
    assert firsts == [48, 48] + [16] * 8  # 41 boundary and robust samples, then 14 boundary samples
    assert not graphs(traced["bullet"])


def test_streams_run_the_groups_beside_each_other_and_join(traced):
    program = traced["bullet, streams"]
    steps = graphs(program)
    by_stream = {s: len([a for a in steps if a.stream == s]) for s in {a.stream for a in steps}}
    assert sorted(by_stream.values()) == [2, 10]
    assert 0 not in by_stream
    joined = [a for a in program if isinstance(a, StreamWait) and a.stream == 0]
    assert len(joined) == 2


def test_the_host_waits_once_for_the_counts(traced):
    waits = [a for a in traced["bullet"] if isinstance(a, HostWait)]
    assert len({a.event for a in waits}) == 1


def test_a_faster_gpu_is_predicted_to_take_less_time():
    seconds = [predict(gpu, "small-cnn", 50).rows["reference"].seconds for gpu in GPUS.values()]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > seconds[-1]


def test_graphs_pay_where_the_host_is_the_limit_and_padding_where_it_is_not():
    slow_host = replace(GPUS["h100"], launch_seconds=1e-3)
    result = predict(slow_host, "small-cnn", 50)
    assert result.rows["bullet, graphs"].seconds < 0.5 * result.rows["bullet"].seconds
    slow_device = replace(GPUS["h100"], tf32=1e9)
    result = predict(slow_device, "small-cnn", 50)
    assert result.rows["bullet, graphs"].seconds > result.rows["bullet"].seconds
    assert result.rows["bullet"].busy > 0.99


def test_the_limit_is_reached_where_nothing_but_flops_takes_time_and_no_sm_idles():
    slow = replace(GPUS["h100"], sms=1, fp32=1e9, tf32=1e9)
    result = predict(slow, "small-cnn", 50)
    assert result.limit("bullet", "reference") == pytest.approx(2.65, abs=0.01)
    assert result.speedup("bullet", "reference") == pytest.approx(result.limit("bullet", "reference"), rel=0.05)
    assert predict(replace(slow, sms=132), "small-cnn", 50).speedup("bullet", "reference") < 2


def test_the_workloads_groups_have_the_papers_sizes():
    workload = Workload("small-cnn", 50, torch.device("cpu"))
    workload.prepare()
    workload.variants()["bullet"]()
    assert workload.bullet.group_counts.tolist() == [9, 14, 27]
    assert workload.counts() == [41, 41] + [14] * 8 + [9, 14, 27]


def test_results_say_whether_they_are_predicted():
    result = as_dict(predict(GPUS["a100"], "small-cnn", 50))
    assert result["predicted"] is True
    json.dumps(result)
    over = result["methods"]["bullet"]["over reference"]
    assert over["of_flop_limit"] == pytest.approx(over["speedup"] / over["flop_limit"])
    assert over["of_eq7"] == pytest.approx(over["speedup"] / 2.254, rel=1e-3)


# The command


def predicted(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr(gpu_prediction, "measurable_device", lambda: None)


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize(("gpu", "name"), [("a100", "A100"), ("b200", "B200"), (None, "H100")])
def test_predict_says_that_it_predicts(gpu, name):
    result = predicted("--model", "small-cnn", "--batch-size", 50, *(["--gpu", gpu] if gpu else []))
    assert result.exit_code == 0, result.output
    assert "PREDICTED, not measured" in result.output
    assert name in result.output
    assert result.output.count("PREDICTED") == 5  # the title and each column of times
    for label in gpu_prediction.LABELS.values():
        assert re.search(rf"{re.escape(label)} +[\d.]+ +\d+% +[\d.]+/[\d.]+ \d+% +[\d.]+/", result.output), label
    assert "Measured" not in result.output


def test_predict_measures_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(gpu_prediction, "measurable_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(gpu_prediction, "measure", functools.partial(measure, rounds=1, warm=0))
    with pytest.warns(UserWarning, match="runs without graphs") as warned:
        result = predicted("--model", "small-cnn", "--batch-size", 4)
    assert len(warned) == 3  # for each row labelled as from graphs or on streams
    assert result.exit_code == 0, result.output
    assert "Measured" in result.output
    assert "predicted" not in result.output.lower()
    assert re.search(r"\+ BulletTrain, streams +[\d.]+ +[\d.]+/[\d.]+ ", result.output)


def test_measurements_are_medians_of_rounds_that_alternate(monkeypatch):
    ticks = iter(range(10**6))
    order = []
    monkeypatch.setattr(gpu_prediction, "now", lambda x: float(next(ticks)))
    names = list(gpu_prediction.LABELS)
    works = {name: (lambda name=name: order.append(name) or [next(ticks) for _ in range(len(name))]) for name in names}
    monkeypatch.setattr(Workload, "variants", lambda self: works)
    monkeypatch.setattr(gpu_prediction, "programs", lambda *_: dict.fromkeys(names, ()))
    result = measure(torch.device("cpu"), "small-cnn", 2, rounds=3, warm=1)
    assert order == names * 4
    assert [row.seconds for row in result.rows.values()] == [len(name) + 1 for name in names]
    assert not result.predicted


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--gpu", "v100"], "'v100' is not one of"),
        (["--model", "wrn-11-1"], "depth must be"),
        (["--model", "vgg"], "vgg"),
        (["--batch-size", "0"], "0 is not in the range"),
    ],
)
@pytest.mark.usefixtures("without_gpu")
def test_bad_input_is_named(arguments, part):
    result = predicted(*arguments)
    assert result.exit_code == 2
    line = result.stderr.splitlines()[-1]
    assert line.startswith("Error: ")
    assert part in line


def test_a_gpu_of_ones_choice_is_refused_where_there_is_one(monkeypatch):
    monkeypatch.setattr(gpu_prediction, "measurable_device", lambda: torch.device("cpu"))
    result = predicted("--gpu", "a100")
    assert result.exit_code == 2
    assert "leave --gpu away" in result.stderr
