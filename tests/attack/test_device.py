"""A capture that breaks off leaves streams, generators and the allocator unchanged, or reports that it cannot."""

import gc
import warnings
from contextlib import nullcontext, suppress
from unittest import mock

import pytest
import torch
from emulated_device import UNWINDS, EmulatedDevice, NotPermittedError, current
from planted import Bug, left_out, planted

from bt_fast.attack import device


def raising(x):
    """Raises before any work is captured."""
    raise ArithmeticError("the model's own")


def waiting(x):
    return x.sum().item()


def hiding_its_wait(x):
    with suppress(NotPermittedError):
        x.sum().item()


def leaving_its_stream(x):
    torch.cuda.stream(torch.cuda.Stream()).__enter__()
    raise ArithmeticError("the model's own")


def waiting_on_the_default_stream(x):
    torch.cuda.stream(current().default).__enter__()
    return x.sum().item()


def leaving_its_stream_quietly(x):
    torch.cuda.stream(torch.cuda.Stream()).__enter__()


def leaving_work_unjoined(x):
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        x.add(1)


def beside_a_loader(x):
    assert current().call_from_another_thread() is None


BREAKING = {
    raising: "the model's own",
    waiting: "_local_scalar_dense: operation not permitted",
    hiding_its_wait: "previous error during capture",
    leaving_its_stream: "the model's own",
    waiting_on_the_default_stream: "_local_scalar_dense: operation not permitted",
    leaving_work_unjoined: "unjoined work",
    leaving_its_stream_quietly: None,  # this capture succeeds
    beside_a_loader: None,
}


def broken_and_good(module, breaking, as_torch):
    """Breaks off a capture, draws random numbers, captures again, and returns everything that went wrong."""
    amiss = []
    with EmulatedDevice(as_torch) as emulated, warnings.catch_warnings(record=True) as warned:
        x, side, pool = torch.ones(3), torch.cuda.Stream(), module.new_pool()
        x.sum().item()
        side.wait_stream(torch.cuda.current_stream())
        x.add(1)
        torch.manual_seed(0)
        with (
            mock.patch.object(module, "GIVES_MEMORY_BACK", "memory" in UNWINDS[as_torch]),
            mock.patch.object(module, "_broken", []),
            mock.patch.object(module, "_unusable", None),
        ):
            error = BREAKING[breaking]
            expecting = pytest.raises((RuntimeError, ArithmeticError), match=error) if error else nullcontext()
            with expecting, module.on(side), module.capture(pool):
                if breaking is not raising:
                    x.add(1)
                breaking(x)
            try:
                drawn = torch.rand(2)
                with module.on(side), module.capture(module.new_pool()) as graph:
                    made = x.add(1)
                graph.replay()
            except (RuntimeError, AssertionError) as error:
                return [error]
            amiss += [module._unusable] * (module._unusable is not None)
        amiss += [name for name in ("graph", "under_way", "generator_captures") if getattr(emulated, name)]
        amiss += ["stream"] * (emulated.stream is not emulated.default)
    del graph
    gc.collect()
    amiss += ["memory in use"] * any(emulated.uses.values()) + ["no collection"] * (not gc.isenabled())
    torch.manual_seed(0)
    amiss += ["drawn"] * (not torch.equal(drawn, torch.rand(2))) + ["result"] * (not torch.equal(made, x + 1))
    return amiss + [str(w.message) for w in warned]


@pytest.mark.parametrize("as_torch", UNWINDS)
@pytest.mark.parametrize("breaking", BREAKING, ids=lambda f: f.__name__)
def test_whatever_happens_in_a_capture_the_process_can_draw_and_capture_afterwards(breaking, as_torch):
    assert broken_and_good(device, breaking, as_torch) == []


def one_of_two_graphs_goes(module):
    """Frees the first of two graphs of matrix products on one stream, and returns everything that went wrong."""
    with EmulatedDevice() as emulated:
        x, side, graphs = torch.eye(2), torch.cuda.Stream(), []
        with module.on(side):
            x @ x
            for _ in range(2):
                with module.capture(module.new_pool()) as graph:
                    made = x @ x
                graphs.append(graph)
        amiss = ["left behind"] * any(workspace.pool for workspace in emulated.workspaces.values())
        try:
            graphs[0].replay()
            del graphs[0]
            gc.collect()
            graph.replay()
        except NotPermittedError as error:
            return [error]
        return amiss + ["result"] * (not torch.equal(made, x))


def test_a_graph_works_on_where_another_of_its_stream_goes():
    assert one_of_two_graphs_goes(device) == []


CLEARED = "torch._C._cuda_clearCublasWorkspaces()"
OF_PRODUCTS = [
    Bug("a graph works in its stream's memory", f"    {CLEARED}\n    try", "    pass\n    try"),
    Bug("a stream works in a graph's memory", f"        {CLEARED}\n\n", "        pass\n\n"),
]


@pytest.mark.parametrize("bug", OF_PRODUCTS, ids=str)
def test_a_bug_planted_into_the_memory_of_products_is_caught(bug, tmp_path):
    assert one_of_two_graphs_goes(planted(device, bug, tmp_path))


BUGS = [
    Bug(
        "other threads break it",
        '="thread_local")\n            phase',
        '="global")\n            phase',
        beside_a_loader,
    ),
    Bug("the pool stays under way", "_end_allocation(stream.device_index, pool)\n    if", "pass\n    if"),
    Bug("its memory stays in use", "torch._C._cuda_releasePool(stream.device_index, pool)"),
    Bug("the generator takes itself for capturing", "        graph.capture_end()\n        number", "        number"),
    Bug("the trial's number is drawn", "    random.restore()", "    pass"),
    Bug("the trial launches for the first time", "number.zero_()  #", "pass  #"),
    Bug("the trial captures nothing", "number.zero_()\n        graph", "graph"),
    Bug("no stream for the trial", "on(torch.cuda.Stream(where)):", "suppress():", waiting_on_the_default_stream),
    Bug("the stream is not ended", "with on(stream):  #", "if True:  #", waiting_on_the_default_stream),
    Bug("it ends on another stream", "with on(stream):\n", "if True:\n", leaving_its_stream_quietly),
    Bug("a good end is not the end", "return  # what", "pass  # what", raising),
    Bug("an empty graph is warned of", 'warnings.simplefilter("ignore")', "pass", raising),
    Bug("nothing is unwound", "_unwind(graph, pool, stream, phase)\n            raise", "raise"),
]


def caught(changed, breaking):
    try:
        return any(broken_and_good(changed, breaking, as_torch) for as_torch in UNWINDS)
    except (Exception, pytest.fail.Exception):
        return True


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_a_bug_planted_into_the_device_is_caught(bug, tmp_path):
    assert caught(planted(device, bug, tmp_path), bug.scenario or waiting)


def test_no_call_that_orders_work_is_without_a_planted_bug():
    assert left_out(device, BUGS) == []


def test_where_torch_cannot_capture_any_more_it_is_reported_once_and_no_graph_is_captured():
    x = torch.ones(3)

    def break_off():
        with device.on(torch.cuda.Stream()), device.capture(device.new_pool()):
            waiting(x)

    with (
        EmulatedDevice(),
        mock.patch.object(device, "_end_allocation"),
        warnings.catch_warnings(record=True) as warned,
    ):
        assert device.no_graphs_reason(x) is None
        for _ in range(2):
            with pytest.raises(NotPermittedError):
                break_off()
        assert "unable to capture another (captures_underway" in device.no_graphs_reason(x)
    assert ["no more graphs in this process" in str(w.message) for w in warned] == [True]
    assert "on cpu" in device.no_graphs_reason(x)
