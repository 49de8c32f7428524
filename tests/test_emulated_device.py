"""The emulated device refuses what CUDA refuses around a capture, and runs a backward on torch's streams."""

import gc
import inspect
from contextlib import nullcontext

import pytest
import torch
from emulated_device import UNWINDS, EmulatedDevice, NotPermittedError
from torch import nn

CAPTURED, ANOTHER = "captured", "another"


def linear():
    torch.manual_seed(0)
    return nn.Linear(3, 2).double(), torch.rand(4, 3, dtype=torch.float64)


def captured(run, side, warm_ups=1, **options):
    """Returns the graph of what `run` launches on the stream `side`."""
    with torch.cuda.stream(side):
        for _ in range(warm_ups):
            run()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(**options)
        try:
            run()
        finally:
            graph.capture_end()
    return graph


# Gradient nodes


def gradients(model, x):
    return torch.autograd.grad(model(x).square().sum(), list(model.parameters()))


def test_a_capture_of_a_model_s_own_gradients_is_broken_by_an_earlier_loss_and_by_nothing_else():
    model, x = linear()
    with EmulatedDevice() as emulated:
        loss = model(x).sum()
        loss.backward()
        with pytest.raises(RuntimeError, match="previous error during capture") as caught:
            captured(lambda: gradients(model, x), torch.cuda.Stream())
        assert "the default stream waits for a captured one" in str(caught.value.__context__)
        del loss, caught  # their frames hold gradient nodes
        gc.collect()
        captured(lambda: gradients(model, x), torch.cuda.Stream())
    assert emulated.captures == 1


def test_an_earlier_loss_does_not_break_the_capture_of_an_input_s_gradient_nor_of_other_leaves():
    model, x = linear()
    with EmulatedDevice() as emulated:
        loss = model(x).sum()
        leaf = x.clone().requires_grad_()
        captured(lambda: torch.autograd.grad(model(leaf).sum(), leaf), torch.cuda.Stream())
        leaves = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}

        def of_leaves():
            loss = torch.func.functional_call(model, leaves, (x,)).square().sum()
            return torch.autograd.grad(loss, list(leaves.values()))

        captured(of_leaves, torch.cuda.Stream())
        loss.backward()
    assert emulated.captures == 2


def test_an_earlier_loss_of_a_stream_that_is_not_the_default_one_joins_the_capture():
    model, x = linear()
    with EmulatedDevice() as emulated:
        with torch.cuda.stream(torch.cuda.Stream()):
            loss = model(x).sum()
        captured(lambda: gradients(model, x), torch.cuda.Stream())
        loss.backward()
    assert emulated.captures == 1


def test_a_graph_of_nodes_that_were_made_outside_cannot_be_captured():
    model, x = linear()
    with EmulatedDevice():
        loss = model(x).sum()
        weights = list(model.parameters())
        with pytest.raises(RuntimeError, match="previous error during capture"):
            captured(lambda: torch.autograd.grad(loss, weights, retain_graph=True), torch.cuda.Stream())


@pytest.mark.parametrize("leaves", [True, False], ids=["backward", "grad"])
def test_a_backward_runs_on_the_streams_of_its_forward_and_the_caller_waits_for_it(leaves):
    model, x = linear()

    def run(first, second):
        """Runs the first layer's forward on one stream, the second's on another, the backward on the default one."""
        model.zero_grad()
        with first:
            hidden = model(x)
        second.stream.wait_stream(first.stream)
        with second:
            loss = (hidden * hidden).sum()
        torch.cuda.current_stream().wait_stream(second.stream)
        if leaves:
            loss.backward()
            return [p.grad.clone() for p in model.parameters()]
        return [g.clone() for g in torch.autograd.grad(loss, list(model.parameters()))]

    with EmulatedDevice() as emulated:
        streams = torch.cuda.Stream(), torch.cuda.Stream()
        result = run(*(torch.cuda.stream(stream) for stream in streams))
        assert emulated.stream is emulated.default
    of = {stream: [w.call._schema.name for w in emulated.work if w.stream is stream] for stream in streams}
    assert any("mm" in name for name in of[streams[0]][1:])  # the weight's gradient, beside the forward
    assert sum("mul" in name for name in of[streams[1]]) > 1
    for seed in range(200):
        assert all(torch.equal(a, b) for a, b in zip(emulated.shuffled(seed, result), result, strict=True)), seed


# Streams and threads beside a capture


@pytest.mark.parametrize(
    ("waiting", "awaited", "permitted"),
    [
        (ANOTHER, CAPTURED, True),
        ("default", CAPTURED, False),
        (CAPTURED, ANOTHER, False),
        (CAPTURED, "default", False),
        ("default", ANOTHER, True),
    ],
)
def test_a_capture_waits_for_no_stream_outside_nor_the_default_one_for_it(waiting, awaited, permitted):
    with EmulatedDevice() as emulated:
        streams = {"default": emulated.default, CAPTURED: torch.cuda.Stream(), ANOTHER: torch.cuda.Stream()}
        x = torch.ones(2)

        def run():
            x.add(1)
            if emulated.graph:
                streams[waiting].wait_stream(streams[awaited])

        if permitted:
            captured(run, streams[CAPTURED])
        else:
            with pytest.raises(RuntimeError, match="previous error"):
                captured(run, streams[CAPTURED])


@pytest.mark.parametrize("joined", [True, False])
def test_a_capture_ends_where_it_waits_for_all_its_work_and_not_before(joined):
    with EmulatedDevice() as emulated:
        x, side, *others = torch.ones(2), *(torch.cuda.Stream() for _ in range(3))

        def run():
            x.add(1)
            for before, stream in zip([side, *others], others, strict=False):
                stream.wait_stream(before)
                with torch.cuda.stream(stream):
                    x.add(1)
            if joined:
                side.wait_stream(others[-1])

        with nullcontext() if joined else pytest.raises(RuntimeError, match="unjoined work"):
            captured(run, side)
    assert emulated.captures == joined


def test_what_a_stream_outside_a_capture_is_given_runs():
    with EmulatedDevice() as emulated:
        x, side = torch.ones(2), torch.cuda.Stream()

        def run():
            x.mul(2)
            with torch.cuda.stream(emulated.default):
                x.add_(1)

        graph = captured(run, side)
        assert x.tolist() == [3, 3]
        graph.replay()
        assert x.tolist() == [3, 3]


@pytest.mark.parametrize("mode", ["global", "thread_local"])
def test_another_thread_s_call_breaks_a_capture_in_global_mode(mode):
    with EmulatedDevice() as emulated:
        x, errors = torch.ones(2), []

        def run():
            x.add(1)
            errors.append(emulated.call_from_another_thread())

        if mode == "global":
            with pytest.raises(RuntimeError, match="previous error"):
                captured(run, torch.cuda.Stream(), capture_error_mode=mode)
        else:
            captured(run, torch.cuda.Stream(), capture_error_mode=mode)
    assert [type(e) for e in errors] == [type(None), NotPermittedError if mode == "global" else type(None)]


# State after a broken capture


@pytest.mark.parametrize("as_torch", UNWINDS)
def test_what_a_broken_capture_leaves_under_way_depends_on_torch(as_torch):
    with EmulatedDevice(as_torch) as emulated:
        x, pool = torch.ones(2), torch.cuda.graph_pool_handle()
        with pytest.raises(RuntimeError, match="previous error"):
            captured(lambda: x.sum().item(), torch.cuda.Stream(), pool=pool)
        if as_torch == "2.6":
            with pytest.raises(RuntimeError, match="captures_underway"):
                torch.cuda.empty_cache()
            with pytest.raises(RuntimeError, match="already recording"):
                captured(lambda: x.add(1), torch.cuda.Stream(), pool=pool)
            with pytest.raises(RuntimeError, match="encountered unexpectedly"):
                torch.rand(2)
            emulated.under_way.clear()
        captured(lambda: x.add(1), torch.cuda.Stream())
        torch.rand(2)
        torch.cuda.empty_cache()
    gc.collect()
    assert emulated.uses[pool] == {"2.6": 1, "2.13": 1, "2.15": 0}[as_torch]


def test_torch_s_own_context_leaves_its_stream_the_current_one_where_it_does_not_care():
    with EmulatedDevice() as emulated:
        x = torch.ones(2)
        x.sum().item()
        with pytest.raises(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.Stream()):
            x.sum().item()
        cares = "finally:" in inspect.getsource(torch.cuda.graph.__exit__)  # as in torch 2.15
        assert (emulated.stream is emulated.default) == cares


def test_a_graph_that_goes_takes_the_memory_in_which_cublas_works_on_its_stream_with_it():
    with EmulatedDevice():
        x, side = torch.ones(2, 2), torch.cuda.Stream()
        first, second = (captured(lambda: x @ x, side) for _ in range(2))
        second.replay()
        del first
        gc.collect()
        with pytest.raises(NotPermittedError, match="cuBLAS"):
            second.replay()


def test_a_graph_keeps_the_memory_of_cublas_that_it_took_from_its_own_pool():
    with EmulatedDevice():
        x, side = torch.ones(2, 2), torch.cuda.Stream()

        def run():
            torch._C._cuda_clearCublasWorkspaces()
            x @ x

        first, second = (captured(run, side) for _ in range(2))
        del first
        gc.collect()
        second.replay()


def test_a_pool_that_no_graph_uses_any_more_is_not_taken_again():
    with EmulatedDevice():
        x, pool = torch.ones(2), torch.cuda.graph_pool_handle()
        graphs = [captured(lambda: x.add(1), torch.cuda.Stream(), pool=pool) for _ in range(2)]
        graphs.pop()
        graphs.append(captured(lambda: x.add(1), torch.cuda.Stream(), pool=pool))
        graphs.clear()
        gc.collect()
        with pytest.raises(RuntimeError, match="use_count > 0"):
            captured(lambda: x.add(1), torch.cuda.Stream(), pool=pool)
