import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended_device import DEVICE, pretended_device

from bt_fast.ops import order_by_steps

quick = settings(max_examples=60, deadline=None)


@quick
@given(
    st.lists(st.integers(0, 6), max_size=30),
    st.integers(0, 3),
    st.sampled_from([torch.int64, torch.int32, torch.uint8]),
)
def test_order_is_stable_and_descending_and_active_counts_are_prefixes(steps, spare, dtype):
    most = max(steps, default=0) + spare
    order, active = order_by_steps(torch.tensor(steps, dtype=dtype), most)
    assert order.tolist() == sorted(range(len(steps)), key=lambda i: -steps[i])
    assert active.tolist() == [sum(n > t for n in steps) for t in range(most)]
    assert order.dtype == active.dtype == torch.int64


def test_opcheck():
    torch.library.opcheck(torch.ops.bt_fast.order_by_steps.default, (torch.tensor([1, 3, 0, 3]), 4))


def test_a_compiled_order_is_one_op():
    targets = []

    def backend(graph, _):
        targets.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch._dynamo.reset()
    steps = torch.tensor([1, 3, 0, 3])
    order, active = torch.compile(lambda s: order_by_steps(s, 4), fullgraph=True, backend=backend)(steps)
    assert (order.tolist(), active.tolist()) == ([1, 3, 0, 2], [3, 2, 2, 0])
    assert [t for t in targets if "getitem" not in str(t)] == [torch.ops.bt_fast.order_by_steps.default]


def test_the_reference_waits_for_nothing():
    steps = torch.zeros(2**20 + 1, dtype=torch.int64, device=DEVICE)
    with pretended_device():
        order, active = order_by_steps(steps, 5)
    assert (order.shape, active.shape) == ((2**20 + 1,), (5,))


@pytest.mark.parametrize(
    ("steps", "most", "error", "name"),
    [
        (torch.ones(3), 1, TypeError, "steps"),
        (torch.ones(3, dtype=torch.bool), 1, TypeError, "steps"),
        (torch.ones(3, 1, dtype=torch.int64), 1, ValueError, "steps"),
        (torch.ones(3, dtype=torch.int64), -1, ValueError, "most"),
    ],
)
def test_an_error_names_the_argument(steps, most, error, name):
    with pytest.raises(error, match=rf"^{name} must"):
        order_by_steps(steps, most)
