import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended_device import DEVICE, pretended_device

from bt_fast import BulletTrain, Schedule


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 7), max_size=20))
def test_the_rows_of_each_step_are_the_samples_with_steps_left(steps):
    sizes = torch.arange(len(steps), dtype=torch.float64) + 1
    schedule = Schedule.from_steps(torch.tensor(steps, dtype=torch.int64), sizes)
    assert len(schedule.active) == max(steps, default=0)
    for t, n in enumerate(schedule.active):
        assert set(schedule.order[:n].tolist()) == {i for i, count in enumerate(steps) if count > t}
    assert sorted(schedule.order.tolist()) == list(range(len(steps)))
    assert torch.equal(schedule.step_size, sizes[schedule.order])
    assert torch.equal(schedule.sort(sizes), schedule.step_size)
    descending = sorted(range(len(steps)), key=lambda i: -steps[i])
    assert schedule.order.tolist() == descending


def test_an_assignments_schedule_is_that_of_its_steps():
    torch.manual_seed(0)
    bullet = BulletTrain(4, 2, 1)
    bullet.robust_fraction.fill_(0.15)
    assignment = bullet.assign(torch.randn(30, 3), torch.randint(3, (30,)))
    assert len(set(assignment.steps.tolist())) == 3
    found = Schedule.from_assignment(assignment)
    expected = Schedule.from_steps(assignment.steps, assignment.step_size)
    assert found.active == expected.active
    assert torch.equal(found.order, expected.order)
    assert torch.equal(found.step_size, expected.step_size)


@pytest.mark.parametrize(("m", "steps"), [(5, 3), (1, 0), (0, 2)])
def test_uniform_reorders_nothing(m, steps):
    schedule = Schedule.uniform(m, steps, 0.007, torch.device("cpu"))
    assert schedule.active == (m,) * steps
    assert schedule.step_size.tolist() == [0.007] * m
    values = torch.rand(m, 2)
    assert schedule.sort(values) is values


def test_making_a_uniform_schedule_waits_for_nothing():
    with pretended_device() as reads:
        Schedule.uniform(6, 3, 0.007, DEVICE).sort(torch.empty(6, 2, device=DEVICE))
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
        Schedule.from_steps(steps, sizes)


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
        Schedule.from_steps(steps, sizes)


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
def test_a_uniform_schedule_names_what_does_not_fit(arguments, error, message):
    with pytest.raises(error, match=message):
        Schedule.uniform(*arguments, torch.device("cpu"))
