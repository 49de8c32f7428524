import copy
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launches import launches
from minibatch import planned_and_ended
from pretended_device import DEVICE, counted_waits, pretended_device
from test_ops import batches, fractions, softmax
from tolerances import assert_near

from bt_fast import Balance, BulletTrain, Fractions, ops
from bt_fast.faults import Fault

EPSILON = 0.031
quick = settings(max_examples=60, deadline=None)
policies = st.tuples(st.integers(0, 12), st.integers(0, 5), st.integers(0, 5))


def at_fraction(f_r, *args, **options):
    bullet = BulletTrain(*args, **options)
    bullet.robust_fraction.fill_(f_r)
    return bullet


def state(bullet):
    return {name: value.clone() for name, value in bullet.state_dict().items()}


def assert_state(bullet, expected):
    result = bullet.state_dict()
    assert result.keys() == expected.keys()
    assert all(torch.equal(result[name], value) for name, value in expected.items())


def three():
    """Returns logits of a robust sample, a boundary sample and an outlier, with F_R = 0.4, and their labels."""
    return torch.tensor([[9.0, 0.0], [1.0, 0.9], [0.0, 5.0]]), torch.tensor([0, 0, 0])


# Assignment


@quick
@given(batches(), fractions, policies, st.one_of(st.none(), st.floats(1e-4, 0.1)))
def test_assignment_to_the_letter(batch, f_r, policy, alpha):
    z, y = batch
    m = len(z)
    bullet = at_fraction(f_r, *policy)
    got = planned_and_ended(bullet, z, y, epsilon=EPSILON, step_size=alpha)

    rows = z.double().numpy()
    sign = [1 if row.index(max(row)) == label else -1 for row, label in zip(rows.tolist(), y.tolist(), strict=True)]
    if m:
        assert_near(got.probabilities, softmax(rows))
        assert_near(got.svar, np.array(sign) * softmax(rows).var(axis=1))
    # starts from the module's own SVar, so that the last bit decides alike
    svar = got.svar.double().tolist()
    threshold = max(0.0, np.quantile(svar, 1 - f_r)) if m else 0.0
    group = [
        "outlier" if s < 0 else "robust" if f_r > 0 and v >= threshold else "boundary"
        for s, v in zip(sign, svar, strict=True)
    ]
    n_b, n_r, n_o = policy
    allotted = {
        "boundary": (n_b, n_b and (alpha or 1.7 * EPSILON / n_b)),
        "robust": (n_r, n_r and 1.7 * EPSILON / n_r),
        "outlier": (n_o, n_o and 1.7 * EPSILON / n_o),
    }
    steps = [allotted[g][0] for g in group]

    assert got.threshold.item() == threshold
    assert [ops.GROUPS[g] for g in got.group.tolist()] == group
    assert got.steps.tolist() == steps
    assert_near(got.step_size, [allotted[g][1] for g in group] if m else torch.empty(0))
    assert got.order.tolist() == sorted(range(m), key=lambda i: -steps[i])
    assert got.active_counts == tuple(sum(n > t for n in steps) for t in range(max(policy)))
    assert got.group_sizes == tuple(group.count(name) for name in ops.GROUPS)
    assert bullet.group_counts.tolist() == list(got.group_sizes)
    assert bullet.robust_fraction.item() == f_r


def test_at_the_start_all_correct_samples_are_boundary_and_take_the_full_steps():
    got = BulletTrain().plan(*three(), epsilon=EPSILON, step_size=0.007)
    assert got.steps.tolist() == [10, 10, 0]
    assert got.step_size.tolist() == [0.007, 0.007, 0.0]


def test_robust_samples_take_few_large_steps_and_outliers_none():
    got = at_fraction(0.4).plan(*three(), epsilon=EPSILON, step_size=0.007)
    assert got.steps.tolist() == [2, 10, 0]
    assert got.step_size.tolist() == [1.7 * EPSILON / 2, 0.007, 0.0]
    assert got.order.tolist() == [1, 0, 2]


def test_an_assignment_is_frozen_and_not_a_view_of_the_state():
    bullet = at_fraction(0.4)
    got = bullet.plan(*three())
    values = [t.clone() for t in (got.group, got.steps, got.threshold)]
    bullet.observe(*three())
    bullet.plan(torch.zeros(3, 2), torch.tensor([1, 1, 1]))
    assert all(torch.equal(a, b) for a, b in zip(values, (got.group, got.steps, got.threshold), strict=True))
    with pytest.raises(AttributeError):
        got.steps = got.group


def test_no_gradient_flows_into_an_assignment():
    z, y = three()
    got = BulletTrain().plan(z.requires_grad_(), y)
    assert not any(t.requires_grad for t in (got.svar, got.probabilities, got.step_size, got.threshold))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_labels_of_any_integer_type(dtype):
    z, y = three()
    assert at_fraction(0.4).plan(z, y.to(dtype)).group.tolist() == at_fraction(0.4).plan(z, y).group.tolist()


def test_labels_of_a_narrow_type_and_more_classes_than_it_can_count():
    z, y = torch.randn(4, 300), torch.tensor([100, 200, 250, 3])
    assert at_fraction(0.4).plan(z, y.byte()).group.tolist() == at_fraction(0.4).plan(z, y).group.tolist()


# F_R


@quick
@given(batches(least=1), fractions, st.floats(0.01, 1.0), st.floats(0.0, 0.99))
def test_update_moves_the_fraction_as_equation_5_says(batch, f_r, gamma, momentum):
    z, y = batch
    bullet = at_fraction(f_r, gamma=gamma, momentum=momentum)
    bullet.observe(z, y)
    hits = sum(row.index(max(row)) == label for row, label in zip(z.tolist(), y.tolist(), strict=True))
    assert_near(bullet.robust_fraction, momentum * f_r + (1 - momentum) * gamma * hits / len(z))
    assert bullet.group_counts.tolist() == [0, 0, 0]


def test_the_paper_s_defaults():
    bullet = BulletTrain()
    assert (bullet.boundary_steps, bullet.robust_steps, bullet.outlier_steps) == (10, 2, 0)
    assert (bullet.gamma, bullet.momentum) == (0.8, 0.9)
    assert bullet.robust_fraction.item() == 0.0
    for _ in range(200):
        bullet.observe(*three())
    assert bullet.robust_fraction.item() == pytest.approx(0.8 * 2 / 3)


# State


def test_state_lives_in_buffers_and_nowhere_else():
    bullet = BulletTrain()
    assert list(bullet.parameters()) == []
    assert set(dict(bullet.named_buffers())) == set(bullet.state_dict())
    bullet.plan(*three())
    bullet.observe(*three())
    twin, loaded = copy.deepcopy(bullet), BulletTrain()
    loaded.load_state_dict(bullet.state_dict())
    for other in (twin, loaded):
        assert_state(other, bullet.state_dict())
        other.observe(*three())
    assert_state(twin, loaded.state_dict())
    assert twin.robust_fraction != bullet.robust_fraction


def test_moves_to_another_device_with_its_model():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), BulletTrain()).to(DEVICE)
    assert {b.device for b in model.buffers()} == {DEVICE}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_cast_of_the_model_that_holds_it_does_not_round_the_fraction(dtype):
    """In bfloat16 the moving average would stop short of its limit: an increment is less than half the spacing."""
    bullet = at_fraction(1 / 3)
    torch.nn.Sequential(bullet).to(dtype)
    assert bullet.robust_fraction.dtype == torch.float64
    assert bullet.robust_fraction.item() == 1 / 3


def test_measured_fractions_and_the_speedup_that_they_imply():
    bullet = at_fraction(0.4)
    assert bullet.fractions == Fractions(0.0, 0.0, 0.0)
    planned_and_ended(bullet, *three())
    planned_and_ended(bullet, torch.tensor([[0.0, 5.0]]), torch.tensor([0]))
    assert bullet.fractions == Fractions(boundary=0.25, robust=0.25, outlier=0.5)
    assert bullet.theoretical_speedup() == pytest.approx(11 / (0.25 * 10 + 0.25 * 2 + 1))
    assert bullet.theoretical_speedup(baseline_steps=20) == pytest.approx(21 / (0.25 * 10 + 0.25 * 2 + 1))
    bullet.reset_fractions()
    assert bullet.fractions == Fractions(0.0, 0.0, 0.0)
    assert bullet.robust_fraction.item() == 0.4


def test_repr_is_the_configuration():
    assert repr(BulletTrain(7, 1, 0, gamma=0.75)) == "BulletTrain(7, 1, 0, gamma=0.75, momentum=0.9)"


# Bad input: the error names it, and nothing changes


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"boundary_steps": -1}, ValueError, "boundary_steps.*at least 0.*-1"),
        ({"robust_steps": -2}, ValueError, "robust_steps.*at least 0.*-2"),
        ({"outlier_steps": -3}, ValueError, "outlier_steps.*at least 0.*-3"),
        ({"boundary_steps": 2.5}, TypeError, "boundary_steps.*integer.*2.5"),
        ({"robust_steps": True}, TypeError, "robust_steps.*integer.*True"),
        ({"gamma": 0.0}, ValueError, r"gamma.*\(0, 1\].*0.0"),
        ({"gamma": 1.01}, ValueError, r"gamma.*\(0, 1\].*1.01"),
        ({"gamma": math.nan}, ValueError, "gamma.*nan"),
        ({"gamma": "x"}, TypeError, "gamma must be a number, got 'x'"),
        ({"momentum": 1.0}, ValueError, r"momentum.*\[0, 1\).*1.0"),
        ({"momentum": -0.1}, ValueError, r"momentum.*\[0, 1\).*-0.1"),
        ({"balance": True}, TypeError, r"balance must be a Balance or None, got bool: write balance=.*Balance\(\)"),
        ({"balance": Balance}, TypeError, "balance must be a Balance or None, got type"),
    ],
)
def test_bad_configuration(options, error, message):
    with pytest.raises(error, match=message):
        BulletTrain(**options)


def test_a_balance_may_be_given_before_the_process_group():
    balance = Balance()
    assert BulletTrain(balance=balance).balance is balance
    assert BulletTrain(balance=None).balance is None


def test_steps_may_be_any_integer_object():
    assert BulletTrain(np.int64(7)).boundary_steps == 7


Z, Y = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])
WITH_NAN = Z.clone().index_put((torch.tensor(2), torch.tensor(1)), torch.tensor(math.nan))
BAD_LOGITS = [
    pytest.param(Z.long(), Y, TypeError, "logits.*floating point.*int64", id="integer logits"),
    pytest.param(Z[0], Y, ValueError, r"logits.*\[m, K\].*\[3\]", id="one-dimensional logits"),
    pytest.param(Z[:, :1], Y * 0, ValueError, r"logits.*K >= 2.*\[4, 1\]", id="one class"),
    pytest.param(Z, Y.float(), TypeError, "labels.*integers.*float32", id="float labels"),
    pytest.param(Z, Y > 0, TypeError, "labels.*integers.*bool", id="bool labels"),
    pytest.param(Z, Y[:3], ValueError, r"labels.*\[4\].*\[3\]", id="too few labels"),
    pytest.param(Z, Y[:, None], ValueError, r"labels.*\[4\].*\[4, 1\]", id="labels of a wrong shape"),
    pytest.param(Z, Y.to(DEVICE), ValueError, "labels.*cpu.*meta", id="labels elsewhere"),
    pytest.param(Z.to(DEVICE), Y.to(DEVICE), ValueError, "BulletTrain is on cpu.*meta", id="state elsewhere"),
    pytest.param(Z, Y + 1, ValueError, r"labels.*0\.\.2.*1 of 4", id="label too large"),
    pytest.param(Z, Y - 1, ValueError, r"labels.*0\.\.2.*2 of 4", id="label negative"),
    pytest.param(WITH_NAN, Y, ValueError, "logits.*finite.*1 of 4", id="NaN"),
    pytest.param(WITH_NAN.half(), Y, ValueError, "logits.*finite.*1 of 4", id="NaN in half precision"),
]


@pytest.mark.parametrize("method", ["plan", "observe"])
@pytest.mark.parametrize(("z", "y", "error", "message"), BAD_LOGITS)
def test_bad_logits_and_labels(method, z, y, error, message):
    bullet = at_fraction(0.3)
    bullet.plan(Z, Y)
    before = state(bullet)
    with pytest.raises(error, match=message):
        getattr(bullet, method)(z, y)
    assert_state(bullet, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": -0.1}, "epsilon.*at least 0.*-0.1"),
        ({"epsilon": math.nan}, "epsilon.*nan"),
        ({"step_size": 0.0}, "step_size.*greater than 0.*0.0"),
        ({"step_size": -1.0}, "step_size.*greater than 0.*-1.0"),
    ],
)
def test_bad_sizes(options, message):
    bullet = at_fraction(0.3)
    before = state(bullet)
    with pytest.raises(ValueError, match=message):
        bullet.plan(Z, Y, **options)
    assert_state(bullet, before)


@pytest.mark.parametrize("step_size", [None, 0.0, 0.1])
def test_at_an_epsilon_of_0_the_groups_are_the_same_and_nobody_takes_a_step(step_size):
    plan, other = at_fraction(0.3).plan(Z, Y, epsilon=0.0, step_size=step_size), at_fraction(0.3).plan(Z, Y)
    assert torch.equal(plan.group, other.group)
    assert plan.group_sizes == other.group_sizes
    assert not plan.steps.any()
    assert plan.active_counts == ()


def test_an_update_of_nothing():
    bullet = at_fraction(0.3)
    with pytest.raises(ValueError, match=r"at least 1 row.*0"):
        bullet.observe(Z[:0], Y[:0])
    assert bullet.robust_fraction.item() == 0.3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_logits_too_large_to_add_up_are_no_fault(dtype):
    largest = torch.finfo(dtype).max
    z = torch.tensor([[largest, largest, -largest], [largest, -largest, -math.inf]], dtype=dtype)
    bullet = BulletTrain()
    bullet.observe(z, torch.tensor([0, 0]))
    bullet.plan(z, torch.tensor([0, 0]))
    assert_near(bullet.robust_fraction, 0.1 * 0.8)


def test_a_callers_fault_travels_with_the_counts():
    bullet = BulletTrain()
    started = bullet.start_plan(Z, Y, inputs=[Fault(torch.tensor(2), "{count} things are wrong")])
    with pytest.raises(ValueError, match="2 things are wrong"):
        _ = started.active_counts
    assert_state(bullet, BulletTrain().state_dict())


# On a device the host waits only for the counts


def on_device():
    return BulletTrain().to(DEVICE), torch.randn(6, 4, device=DEVICE), torch.zeros(6, dtype=torch.int64, device=DEVICE)


def test_an_assignment_starts_without_waiting_and_is_read_once():
    bullet, z, y = on_device()
    with pretended_device(plan=[4] * 10 + [2, 3, 1]) as reads:
        started = bullet.start_plan(z, y)
        assert (reads.started, reads.waited) == (1, 0)
        assert started.active_counts == (4,) * 10
        assert reads.waited == 1
        assert started.group_sizes == (2, 3, 1)
        assert reads.started == 1
    assert {t.device for t in (started.order, started.steps, started.step_size, started.threshold)} == {DEVICE}


def test_an_assignment_is_a_few_launches():
    bullet = BulletTrain()
    names = launches(lambda: bullet.start_plan(Z, Y))
    assert names.count("bt_fast::assign_steps") == 1
    assert not {"aten::sort", "aten::cat", "aten::cumsum"} & set(names)


def test_observe_waits_for_nothing():
    bullet, z, y = on_device()
    with pretended_device() as reads:
        bullet.observe(z, y)
    assert (reads.started, reads.waited) == (0, 0)


def test_a_plan_reads_once():
    with counted_waits() as waits:
        BulletTrain().plan(Z, Y)
    assert len(waits) == 1


def test_a_fault_that_observe_could_not_report_comes_with_the_next_plan():
    bullet = BulletTrain()
    bullet.unreported_faults.fill_(1)
    with pytest.raises(ValueError, match=re.escape("an earlier update met NaN logits")):
        bullet.plan(Z, Y)
    assert bullet.group_counts.tolist() == [0, 0, 0]
    planned_and_ended(bullet, Z, Y)
    assert bullet.group_counts.sum() == 4


def test_a_plan_counts_when_its_minibatch_ends_and_only_the_last_one():
    bullet = at_fraction(0.4)
    before = state(bullet)
    bullet.plan(*three())  # as if its attack stopped
    bullet.plan(Z, Y)
    assert_state(bullet, before)
    bullet.observe(Z, Y)
    assert bullet.group_counts.sum() == 4
    bullet.observe(Z, Y)  # without a plan
    assert bullet.group_counts.sum() == 4


def test_a_minibatch_that_ends_with_an_error_does_not_count():
    bullet = at_fraction(0.4)
    bullet.plan(Z, Y)
    before = state(bullet)
    with pytest.raises(ValueError, match="adversarial_logits must be finite"):
        bullet.observe(WITH_NAN, Y)
    assert_state(bullet, before)


def test_a_copy_knows_nothing_of_the_minibatch_that_has_begun():
    bullet = at_fraction(0.4)
    bullet.plan(Z, Y)
    twin = copy.deepcopy(bullet)
    twin.observe(Z, Y)
    assert not twin.group_counts.any()


def test_samples_without_a_gradient_come_with_the_next_plan_on_a_device():
    bullet = BulletTrain()
    bullet.unreported_gradients.fill_(2)
    with pytest.raises(ValueError, match="held NaN for 2 samples of earlier attacks"):
        bullet.plan(Z, Y)
    assert not bullet.group_counts.any()
    planned_and_ended(bullet, Z, Y)
    bullet, z, y = on_device()
    with pretended_device() as reads:
        bullet.observe(z, y, faulty=torch.zeros(len(y), dtype=torch.int32, device=DEVICE))
    assert reads.started == 0


@pytest.mark.parametrize("call", ["plan", "observe"])
def test_what_is_no_tensor_is_named(call):
    bullet = BulletTrain()
    with pytest.raises(TypeError, match="logits must be a tensor, got list"):
        getattr(bullet, call)([[0.0, 1.0]], torch.tensor([0]))
    with pytest.raises(TypeError, match="labels must be a tensor of integers, got list"):
        getattr(bullet, call)(torch.zeros(1, 2), [0])


def test_update_refuses_infinite_logits_as_assign_does():
    bullet = BulletTrain()
    infinite = torch.tensor([[0.0, math.inf], [0.0, 1.0]])
    with pytest.raises(ValueError, match="adversarial_logits must be finite, but 1 of 2"):
        bullet.observe(infinite, torch.tensor([0, 1]))
    assert bullet.robust_fraction == 0


def test_a_module_pickled_whole_by_an_older_version_goes_on():
    bullet = BulletTrain(3, 1, 0)
    state = {name: value for name, value in bullet.__getstate__().items() if name not in ("_last", "_reuse")}
    older = BulletTrain.__new__(BulletTrain)
    older.__setstate__(state)
    logits, labels = torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)
    older.plan(logits, labels)
    older.observe(logits, labels)
    assert older.group_counts.sum() == 4
