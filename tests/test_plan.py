import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended_device import DEVICE, pretended_device

from bt_fast import BulletTrain, Plan


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 7), max_size=20))
def test_the_rows_of_each_step_are_the_samples_with_steps_left(steps):
    sizes = torch.arange(len(steps), dtype=torch.float64) + 1
    plan = Plan.from_steps(torch.tensor(steps, dtype=torch.int64), sizes)
    assert len(plan.active_counts) == max(steps, default=0)
    for t, n in enumerate(plan.active_counts):
        assert set(plan.order[:n].tolist()) == {i for i, count in enumerate(steps) if count > t}
    assert sorted(plan.order.tolist()) == list(range(len(steps)))
    assert plan.steps.tolist() == steps
    assert torch.equal(plan.step_size, sizes)
    assert torch.equal(plan.sort(sizes), sizes[plan.order])
    assert torch.equal(plan.unsort(plan.sort(sizes)), sizes)
    descending = sorted(range(len(steps)), key=lambda i: -steps[i])
    assert plan.order.tolist() == descending


def test_a_mined_plan_is_that_of_its_steps():
    torch.manual_seed(0)
    bullet = BulletTrain(4, 2, 1)
    bullet.robust_fraction.fill_(0.15)
    result = bullet.plan(torch.randn(30, 3), torch.randint(3, (30,)))
    assert len(set(result.steps.tolist())) == 3
    expected = Plan.from_steps(result.steps, result.step_size)
    assert result.active_counts == expected.active_counts
    assert torch.equal(result.order, expected.order)


@pytest.mark.parametrize(("m", "steps"), [(5, 3), (1, 0), (0, 2)])
def test_uniform_reorders_nothing(m, steps):
    plan = Plan.uniform(m, steps, 0.007, torch.device("cpu"))
    assert plan.active_counts == (m,) * steps
    assert plan.step_size.tolist() == [0.007] * m
    values = torch.rand(m, 2)
    assert plan.sort(values) is values
    assert plan.unsort(values) is values


def test_making_a_uniform_plan_waits_for_nothing():
    with pretended_device() as reads:
        Plan.uniform(6, 3, 0.007, DEVICE).sort(torch.empty(6, 2, device=DEVICE))
    assert reads.started == 0


@pytest.mark.parametrize(
    ("steps", "sizes", "error", "message"),
    [
        (torch.ones(2), torch.ones(2), TypeError, "steps.*integers.*float32"),
        (torch.tensor([True]), torch.ones(1), TypeError, "steps.*integers.*bool"),
        (torch.tensor([1, -2]), torch.ones(2), ValueError, "steps.*at least 0.*-2"),
        (torch.tensor([1, 2]), torch.ones(3), ValueError, r"steps and step_size.*\[m\].*\[2\] and \[3\]"),
        (torch.tensor([[1]]), torch.ones(1, 1), ValueError, r"\[m\].*\[1, 1\]"),
    ],
)
def test_bad_steps(steps, sizes, error, message):
    with pytest.raises(error, match=message):
        Plan.from_steps(steps, sizes)


ONES = torch.ones(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("steps", "sizes", "error", "message"),
    [
        (ONES, torch.tensor([0.1, 0.0, 0.1]), ValueError, "step_size.*1 of 3"),
        (ONES, torch.tensor([0.1, float("nan"), -1.0]), ValueError, "step_size.*2 of 3"),
        (ONES, ONES, TypeError, "step_size must be floating point.*int64"),
        (ONES, torch.ones(3, device="meta"), ValueError, "step_size must be on cpu.*meta"),
        ([1, 2, 3], torch.ones(3), TypeError, "must be tensors, got list"),
    ],
)
def test_step_sizes_that_are_no_sizes_are_named(steps, sizes, error, message):
    with pytest.raises(error, match=message):
        Plan.from_steps(steps, sizes)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((4, -1, 0.1), ValueError, "steps must be at least 0, got -1"),
        ((-4, 1, 0.1), ValueError, "m must be at least 0, got -4"),
        ((4, 1.5, 0.1), TypeError, "steps must be an integer"),
        ((4, 1, float("nan")), ValueError, "step_size.*nan"),
        ((4, 1, "x"), TypeError, "step_size must be a number, got 'x'"),
    ],
)
def test_a_uniform_plan_names_what_does_not_fit(arguments, error, message):
    with pytest.raises(error, match=message):
        Plan.uniform(*arguments, torch.device("cpu"))
