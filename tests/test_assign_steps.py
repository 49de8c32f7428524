import assign_cases
import numpy as np
import pytest
import torch
from assign_cases import assert_same, case, run
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended_device import DEVICE, pretended_device
from test_ops import batches, fractions

from bt_fast import ops
from bt_fast.ops import assign_steps
from bt_fast.ops.assign_steps import _assign_steps, robust_threshold

quick = settings(max_examples=60, deadline=None)


def double(number):
    return torch.tensor(number, dtype=torch.float64)


# The reference


@quick
@given(
    st.lists(st.one_of(st.floats(-0.25, 0.25, width=32), st.sampled_from([0.0, -0.0, 0.1])), min_size=1, max_size=30),
    fractions,
)
def test_threshold_is_numpys_quantile(svar, f_r):
    for dtype in (torch.float64, torch.float32):
        values = torch.tensor(svar, dtype=dtype)
        threshold = robust_threshold(values, double(f_r))
        assert threshold.dtype == torch.float64
        assert threshold.item() == max(0.0, np.quantile(values.double().numpy(), 1.0 - f_r))
        assert not threshold.signbit()


def test_threshold_of_a_batch_whose_ranks_need_more_than_single_precision():
    svar, f_r = torch.arange(70_001, dtype=torch.float64), 0.1234567
    assert robust_threshold(svar, double(f_r)).item() == np.quantile(svar.numpy(), 1.0 - f_r)


@pytest.mark.parametrize("f_r", [float("nan"), -1.0, 2.0])
def test_no_index_is_out_of_range_whatever_the_fraction(f_r):
    assert robust_threshold(torch.tensor([0.1, 0.2]), double(f_r)).shape == ()


@quick
@given(
    st.integers(0, 40),
    st.integers(0, 2**31),
    st.sampled_from(assign_cases.VALUES),
    st.sampled_from(assign_cases.FRACTIONS),
    st.sampled_from(assign_cases.POLICIES),
    st.booleans(),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_assignment_to_the_letter(m, seed, kind, f_r, policy, full, sound, dtype):
    given_ = case(m, seed, kind=kind, f_r=f_r, policy=policy, full=full, sound=sound)
    given_["svar"] = given_["svar"].to(dtype)
    threshold, group, steps, step_size, order, counts, group_counts = run(assign_steps, given_)

    svar = given_["svar"].double().numpy()
    rank = (1.0 - f_r) * (m - 1)
    t = 0.0
    if m:  # numpy.quantile gives NaN if any value is NaN; here NaN is the largest value
        ordered, below = np.sort(svar), int(rank)
        low, high, part = ordered[below], ordered[min(below + 1, m - 1)], rank - below
        with np.errstate(invalid="ignore"):
            t = low + (high - low) * part if part < 0.5 else high - (high - low) * (1 - part)
        t = 0.0 if t <= 0 else t
    assert threshold.dtype == torch.float64
    np.testing.assert_array_equal(threshold.numpy(), t)
    expected = [
        0 if not c else 2 if f_r > 0 and v >= t else 1
        for c, v in zip(given_["correct"].tolist(), svar.tolist(), strict=True)
    ]
    assert group.tolist() == expected
    n = [policy[g] for g in expected]
    assert steps.tolist() == n
    assert step_size.tolist() == [assign_cases.SIZES[g] for g in expected]
    assert order.tolist() == sorted(range(m), key=lambda i: -n[i])
    active = [sum(k > t for k in n) for t in range(max(policy))]
    sizes = [expected.count(g) for g in range(3)]
    faults = given_["faults"].tolist() if full else []
    unfit = [sum(u & bit > 0 for u in given_["unfit"].tolist()) for bit in (1, 2)] if full else [0, 0]
    assert counts.tolist() == [*active, *sizes, *faults, *unfit]
    if full:
        added = [0, 0, 0] if any(faults + unfit) else sizes
        assert group_counts.tolist() == [a + b for a, b in zip([5, 6, 7], added, strict=True)]


@quick
@given(batches(), fractions)
def test_groups_of_signed_variances(batch, f_r):
    z, y = batch
    svar, correct, _, _ = ops.signed_variance(z, y)
    threshold, group, *_ = assign_steps(svar, correct, double(f_r), (0, 10, 2), (0.0, 0.1, 0.1))
    t = max(0.0, np.quantile(svar.double().numpy(), 1.0 - f_r)) if len(z) else 0.0
    assert threshold.item() == t
    assert group.tolist() == [
        ops.OUTLIER if not c else ops.ROBUST if v >= t and f_r > 0 else ops.BOUNDARY
        for v, c in zip(svar.tolist(), correct.tolist(), strict=True)
    ]


@pytest.mark.parametrize("f_r", [0.0, 0.3, 1.0])
def test_minus_zero_is_an_outlier_and_plus_zero_is_not(f_r):
    svar, correct, _, _ = ops.signed_variance(torch.zeros(2, 4), torch.tensor([0, 1]))
    assert svar.tolist() == [0.0, 0.0]
    _, group, *_ = assign_steps(svar, correct, double(f_r), (0, 10, 2), (0.0, 0.1, 0.1))
    assert group.tolist() == [ops.ROBUST if f_r else ops.BOUNDARY, ops.OUTLIER]


# Registration


@pytest.mark.parametrize("full", [False, True])
def test_opcheck(full):
    torch.library.opcheck(_assign_steps, (), case(5, 0, full=full))


def test_a_compiled_assignment_is_one_op():
    targets = []

    def backend(graph, _):
        targets.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def assign(svar, correct, f_r):
        return assign_steps(svar, correct, f_r, (0, 10, 2), (0.0, 0.007, 0.02))

    torch._dynamo.reset()
    inputs = [case(9, 0)[name] for name in ("svar", "correct", "robust_fraction")]
    compiled = torch.compile(assign, fullgraph=True, backend=backend)(*inputs)
    assert_same((*compiled, None), (*assign(*inputs), None))
    assert [t for t in targets if "getitem" not in str(t)] == [torch.ops.bt_fast.assign_steps.default]


def test_the_reference_waits_for_nothing():
    given_ = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in case(6, 0).items()}
    with pretended_device():
        result = assign_steps(**given_ | {"svar": given_["svar"].double()})
    assert all(t.device == DEVICE for t in result)


def test_nothing_changes_before_the_checks_and_the_results_are_new():
    given_ = case(4, 0, sound=True)
    before = given_["group_counts"].clone()
    with pytest.raises(ValueError, match="unfit"):
        assign_steps(**given_ | {"unfit": torch.zeros(3, dtype=torch.uint8)})
    assert torch.equal(given_["group_counts"], before)


WRONG = [
    ("svar", torch.rand(6).half(), TypeError),
    ("svar", torch.rand(6, 1), ValueError),
    ("correct", torch.ones(6), TypeError),
    ("correct", torch.ones(5, dtype=torch.bool), ValueError),
    ("correct", torch.ones(6, dtype=torch.bool, device="meta"), ValueError),
    ("robust_fraction", torch.tensor(0.5), TypeError),
    ("robust_fraction", torch.ones(1, dtype=torch.float64), ValueError),
    ("group_steps", (1, 2), ValueError),
    ("group_steps", (1, -1, 2), ValueError),
    ("group_steps", (1, 2**31, 2), ValueError),
    ("group_step_sizes", (0.1, 0.2, 0.3, 0.4), ValueError),
    ("unfit", torch.zeros(6, dtype=torch.int64), TypeError),
    ("unfit", torch.zeros(7, dtype=torch.uint8), ValueError),
    ("faults", torch.zeros(2), TypeError),
    ("faults", torch.tensor(1), ValueError),
    ("faults", torch.zeros(2, 2, dtype=torch.int64), ValueError),
    ("group_counts", torch.zeros(3), TypeError),
    ("group_counts", torch.zeros(2, dtype=torch.int64), ValueError),
    ("group_counts", torch.zeros(6, dtype=torch.int64)[::2], ValueError),
]


@pytest.mark.parametrize(("name", "value", "error"), WRONG)
def test_an_error_names_the_argument(name, value, error):
    with pytest.raises(error, match=rf"^{name} must"):
        assign_steps(**case(6, 0) | {name: value})
