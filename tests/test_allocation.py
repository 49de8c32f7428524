import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launches import launches
from minibatch import planned_and_ended
from pretended_device import DEVICE, counted_waits, pretended_device
from test_mining import EPSILON, Y, Z, assert_state, at_fraction, state
from test_mining import policies as counts
from test_ops import batches, fractions, softmax
from tolerances import assert_near

from bt_fast import METRICS, POLICIES, BulletTrain, Fractions, Gaussian, Judged, Oracle, ops
from bt_fast.allocation import certainty_of, three_groups

quick = settings(max_examples=60, deadline=None)
OTHERS = [name for name in METRICS if name != "signed_variance"]


def first_maximum(row):
    return row.index(max(row))


# Metrics


def literal(metric, row, label):
    """Returns the certainty of one sample, from the formula."""
    p, correct = softmax(np.array([row]))[0], first_maximum(row) == label
    if metric == "signed_variance":
        return p.var() if correct else -p.var()
    if metric == "cross_entropy":
        return math.exp(math.log(p[label])) if correct else p[label] - 1
    if metric == "margin":
        return row[label] - max(z for k, z in enumerate(row) if k != label)
    gradient = [p_k - (k == label) for k, p_k in enumerate(p)]
    norm = math.sqrt(sum(g * g for g in gradient))
    return math.sqrt(2) - norm if correct else -norm


@pytest.mark.parametrize("metric", METRICS)
@quick
@given(batches([torch.float64]))
def test_a_metric_is_its_formula(metric, batch):
    z, y = batch
    with np.errstate(divide="ignore"):
        expected = [literal(metric, row, label) for row, label in zip(z.tolist(), y.tolist(), strict=True)]
    assert_near(METRICS[metric](z, y), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("metric", METRICS)
@quick
@given(batches())
def test_correct_samples_are_at_zero_or_above_and_misclassified_ones_below(metric, batch):
    z, y = batch
    certainty, correct = certainty_of(METRICS[metric], z, y), z.argmax(dim=1) == y
    assert (certainty[correct] >= 0).all()
    tied = z.max(dim=1).values == z.gather(1, y[:, None])[:, 0]
    assert (certainty[~correct & ~tied] < 0).all()
    assert (certainty[~correct] <= 0).all()


@pytest.mark.parametrize("metric", OTHERS)
@quick
@given(batches([torch.float64]), st.floats(0.1, 5.0))
def test_a_greater_true_logit_is_never_less_certain(metric, batch, more):
    z, y = batch
    raised = z.scatter_add(1, y[:, None], torch.full((len(z), 1), more, dtype=z.dtype))
    assert (METRICS[metric](raised, y) >= METRICS[metric](z, y) - 1e-12).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_certainty_has_the_dtype_of_svar(metric, dtype):
    certainty = certainty_of(METRICS[metric], Z.to(dtype), Y)
    assert certainty.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_near(certainty, METRICS[metric](Z.to(dtype).double(), Y).to(certainty.dtype))


@pytest.mark.parametrize("metric", METRICS)
def test_in_equation_6_a_metric_takes_the_place_of_svar(metric):
    z = 3 * torch.randn(40, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = z.argmax(dim=1)
    y[::4] = (y[::4] + 1) % 5
    got = at_fraction(0.4, metric=metric).plan(z, y)
    values = [literal(metric, row, label) for row, label in zip(z.tolist(), y.tolist(), strict=True)]
    threshold = max(0.0, np.quantile(values, 0.6))
    assert_near(got.certainty, values)
    assert_near(got.threshold, threshold)
    expected = [0 if i % 4 == 0 else 2 if v > threshold else 1 for i, v in enumerate(values)]
    assert got.group.tolist() == expected
    assert set(expected) == {0, 1, 2}
    assert_near(got.svar, ops.signed_variance(z, y).svar)


def test_the_paper_s_metric_and_policy_are_the_default():
    bullet = BulletTrain()
    assert bullet.metric is METRICS["signed_variance"]
    assert bullet.policy is POLICIES["three_groups"]


@quick
@given(batches(), fractions, counts)
def test_the_defaults_given_as_functions_of_ones_own_are_the_fused_ones_to_the_bit(batch, f_r, steps):
    fused = at_fraction(f_r, *steps)
    own = at_fraction(
        f_r, *steps, metric=lambda z, y: ops.signed_variance(z, y).svar, policy=lambda judged: three_groups(judged)
    )
    a, b = (planned_and_ended(bullet, *batch, epsilon=EPSILON) for bullet in (fused, own))
    for name in ("group", "steps", "step_size", "order", "threshold", "svar", "certainty", "probabilities"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert (a.active_counts, a.group_sizes) == (b.active_counts, b.group_sizes)
    assert torch.equal(fused.group_counts, own.group_counts)
    assert own.steps_assigned.item() == a.steps.sum()


def test_an_infinite_certainty_is_the_largest_and_interpolates():
    z = torch.tensor([[0.0, -math.inf], [1.0, 0.0], [-math.inf, 0.0], [2.0, 0.0]])
    bullet = at_fraction(0.5, metric="margin")
    got = bullet.plan(z, torch.zeros(4, dtype=torch.int64))
    most = torch.finfo(torch.float32).max
    assert got.certainty.tolist() == [most, 1.0, -most, 2.0]
    assert got.threshold.item() == 1.5
    assert got.group.tolist() == [2, 1, 0, 2]


def test_a_metric_never_sees_a_label_out_of_range():
    for metric in METRICS:
        with pytest.raises(ValueError, match=r"labels must lie in 0\.\.2, but 2 of 4"):
            BulletTrain(metric=metric).plan(Z, torch.tensor([0, 7, -5, 1]))


# Policies


def judged_of(certainty, correct, f_r, steps):
    certainty, correct = torch.tensor(certainty, dtype=torch.float64), torch.tensor(correct, dtype=torch.bool)
    fraction = torch.tensor(f_r, dtype=torch.float64)
    threshold, group, *_ = ops.assign_steps(certainty, correct, fraction, steps, (0.0, 0.0, 0.0))
    return Judged(certainty, correct, group, threshold, fraction, steps)


@st.composite
def judged(draw):
    m = draw(st.integers(0, 12))
    values = st.one_of(st.sampled_from([0.0, 0.1, 0.25]), st.floats(1e-30, 1), st.floats(1e-30, 1e-8))
    certainty = draw(st.lists(values, min_size=m, max_size=m))
    correct = draw(st.lists(st.booleans(), min_size=m, max_size=m))
    signed = [c if right else -c for c, right in zip(certainty, correct, strict=True)]
    n_b, n_r, n_o = draw(counts)
    return judged_of(signed, correct, draw(fractions), (n_o, n_b, n_r))


@quick
@given(judged())
def test_three_groups_and_uniform_one_sample_at_a_time(given_):
    assert POLICIES["three_groups"](given_).tolist() == [given_.group_steps[g] for g in given_.group.tolist()]
    assert POLICIES["uniform"](given_).tolist() == [given_.group_steps[1]] * len(given_.group)


def gaussian_steps(given_, width, shift):
    """Returns the formula of `Gaussian`, one sample at a time; `shift` moves values slightly before rounding."""
    n_o, n_b, n_r = given_.group_steps
    certainty, group = given_.certainty.tolist(), given_.group.tolist()
    own = [c for c, g in zip(certainty, group, strict=True) if g == ops.BOUNDARY]
    centre, spread = (np.mean(own), np.std(own)) if own else (0.0, 0.0)
    spread = max(spread, 1e-6 * abs(centre))
    steps = []
    for c, g in zip(certainty, group, strict=True):
        away = (c - centre) / (width * spread) if spread else math.inf if c != centre else 0.0
        least = n_o if g == ops.OUTLIER else n_r
        steps.append(max(least, round(n_b * math.exp(-min(away * away, 1400.0) / 2) + shift)) if own else least)
    return steps


@quick
@given(judged(), st.sampled_from([0.3, 1.0, 2.5]))
def test_gaussian_one_sample_at_a_time(given_, width):
    got = Gaussian(width)(given_)
    assert got.dtype == torch.int64
    either = zip(*(gaussian_steps(given_, width, shift) for shift in (-1e-9, 1e-9)), strict=True)
    assert all(n in allowed for n, allowed in zip(got.tolist(), either, strict=True))
    assert all(0 <= n <= max(given_.group_steps) for n in got.tolist())


def test_gaussian_falls_off_on_both_sides_of_the_boundary_and_is_never_less_than_the_group_s_own():
    values = [0.1 * k for k in range(11)]
    given_ = judged_of([*values, -0.05, -0.5, -0.9], [True] * 11 + [False] * 3, 0.0, (1, 10, 2))
    steps = Gaussian()(given_).tolist()
    assert steps[:11] == steps[10::-1] == [3, 4, 6, 8, 10, 10, 10, 8, 6, 4, 3]
    assert steps[11:] == [2, 1, 1]
    assert Gaussian(100.0)(given_).tolist() == [10] * 14


def test_gaussian_of_one_boundary_sample_of_equal_ones_and_of_none():
    one = judged_of([0.1, 0.9, -0.3], [True, True, False], 0.4, (0, 10, 2))
    assert one.group.tolist() == [1, 2, 0]
    assert Gaussian()(one).tolist() == [10, 2, 0]
    equal = judged_of([0.1] * 7, [True] * 7, 0.0, (0, 10, 2))
    assert Gaussian()(equal).tolist() == [10] * 7
    nought = judged_of([0.0] * 3 + [-0.1], [True] * 3 + [False], 0.0, (0, 10, 2))
    assert Gaussian()(nought).tolist() == [10] * 3 + [0]
    none = judged_of([0.0, 0.5, -0.5], [True, True, False], 1.0, (1, 10, 2))
    assert none.group.tolist() == [2, 2, 0]
    assert Gaussian()(none).tolist() == [2, 2, 1]
    assert Gaussian()(judged_of([], [], 0.5, (0, 10, 2))).tolist() == []


@quick
@given(batches([torch.float64]), st.integers(0, 999), counts)
def test_oracle_takes_its_groups_from_the_attacked_logits(batch, seed, steps):
    z, y = batch
    attacked = z + 4 * torch.randn(z.shape, generator=torch.Generator().manual_seed(seed), dtype=z.dtype)
    n_b, n_r, n_o = steps
    bullet = at_fraction(0.4, *steps, policy="oracle")
    got = planned_and_ended(bullet, z, y, epsilon=EPSILON, step_size=0.007, attacked_logits=attacked)
    expected = []
    for row, hit, label in zip(z.tolist(), attacked.tolist(), y.tolist(), strict=True):
        right = [first_maximum(values) == label for values in (row, hit)]
        expected.append("outlier" if not right[0] else "robust" if right[1] else "boundary")
    assert [ops.GROUPS[g] for g in got.group.tolist()] == expected
    assert got.steps.tolist() == [{"outlier": n_o, "boundary": n_b, "robust": n_r}[g] for g in expected]
    assert got.group_sizes == tuple(expected.count(g) for g in ops.GROUPS)
    assert bullet.group_counts.tolist() == list(got.group_sizes)


@quick
@given(batches(), st.data(), counts, st.one_of(st.none(), st.just(0.007)))
def test_any_counts_are_ordered_counted_and_sized(batch, data, steps, alpha):
    z, y = batch
    m, most = len(z), max(steps)
    given_ = data.draw(st.lists(st.integers(0, most), min_size=m, max_size=m))
    bullet = at_fraction(0.3, *steps, policy=lambda judged: torch.tensor(given_, dtype=torch.int64))
    got = planned_and_ended(bullet, z, y, epsilon=EPSILON, step_size=alpha)
    full = alpha or 1.7 * EPSILON / max(steps[0], 1)
    assert got.steps.tolist() == given_
    sizes = [0.0 if n == 0 else full if n == steps[0] else 1.7 * EPSILON / n for n in given_]
    assert got.step_size.tolist() == sizes
    assert got.order.tolist() == sorted(range(m), key=lambda i: -given_[i])
    assert got.active_counts == tuple(sum(n > t for n in given_) for t in range(most))
    plain = at_fraction(0.3, *steps).plan(z, y)
    assert torch.equal(got.group, plain.group)
    assert got.group_sizes == plain.group_sizes
    assert bullet.steps_assigned.item() == sum(given_)


def test_a_policy_sees_what_is_known_of_the_minibatch():
    seen = []
    bullet = at_fraction(0.4, 7, 3, 1, metric="margin", policy=lambda judged: seen.append(judged) or judged.group)
    got = bullet.plan(Z, Y)
    (result,) = seen
    assert result.group_steps == (1, 7, 3)
    assert torch.equal(result.certainty, got.certainty)
    assert torch.equal(result.correct, Z.argmax(dim=1) == Y)
    assert torch.equal(result.group, got.group)
    assert torch.equal(result.threshold, got.threshold)
    assert result.robust_fraction.item() == 0.4


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_steps_of_any_integer_type(dtype):
    got = BulletTrain(policy=lambda judged: torch.tensor([3, 1, 10, 0], dtype=dtype)).plan(Z, Y)
    assert (got.steps.dtype, got.steps.tolist()) == (torch.int64, [3, 1, 10, 0])


# Cost, by arithmetic


def ramp(judged):
    return torch.arange(len(judged.group), device=judged.group.device)


def test_mean_steps_and_the_speedup_of_the_steps_as_they_were_given():
    bullet = BulletTrain(5, 2, 0, policy=ramp)
    assert math.isnan(bullet.mean_steps)
    assert math.isnan(bullet.theoretical_speedup())
    planned_and_ended(bullet, Z, Y)
    planned_and_ended(bullet, Z[:2], Y[:2])
    assert bullet.mean_steps == (0 + 1 + 2 + 3 + 0 + 1) / 6
    assert bullet.theoretical_speedup() == 6 / (7 / 6 + 1)
    assert bullet.theoretical_speedup(10) == 11 / (7 / 6 + 1)
    for baseline, error in ((-1, ValueError), (2.5, TypeError)):
        with pytest.raises(error, match="baseline_steps must be"):
            bullet.theoretical_speedup(baseline)
    bullet.reset_fractions()
    assert math.isnan(bullet.mean_steps)
    assert bullet.steps_assigned == 0


def test_mean_steps_of_three_groups_are_those_of_their_fractions():
    bullet = at_fraction(0.4)
    assert math.isnan(bullet.mean_steps)
    planned_and_ended(bullet, Z, Y)
    assert bullet.mean_steps == bullet.fractions.mean_steps(10, 2, 0)
    assert bullet.steps_assigned is None


def test_what_augmix_saves_is_reported_by_the_samples_that_take_their_step():
    bullet = BulletTrain(1, 0, 0, policy="uniform")
    assert math.isnan(bullet.theoretical_speedup_augmix())
    planned_and_ended(bullet, Z, Y)
    assert bullet.theoretical_speedup_augmix() == 1.0


def test_fractions_are_those_of_equation_6_whatever_the_policy():
    plain, uniform = at_fraction(0.4), at_fraction(0.4, policy="uniform")
    for bullet in (plain, uniform):
        planned_and_ended(bullet, Z, Y)
    assert plain.fractions == uniform.fractions != Fractions(0.0, 0.0, 0.0)


# State


def test_the_default_s_state_is_what_it_was():
    assert set(BulletTrain(metric="margin").state_dict()) == {
        *("robust_fraction", "group_counts", "unreported_faults", "unreported_gradients")
    }


def test_a_state_of_three_groups_loads_into_any_policy_and_tells_the_steps():
    plain = at_fraction(0.4)
    planned_and_ended(plain, Z, Y)
    saved = torch.nn.Sequential(plain).state_dict()
    names = set(saved)
    loaded = torch.nn.Sequential(BulletTrain(policy="uniform"))
    loaded.load_state_dict(saved)
    assert loaded[0].mean_steps == plain.mean_steps
    assert torch.equal(loaded[0].group_counts, plain.group_counts)
    assert set(saved) == names


def test_a_state_with_steps_loads_and_one_of_three_groups_refuses_it():
    bullet = BulletTrain(policy=ramp)
    planned_and_ended(bullet, Z, Y)
    twin, again = copy.deepcopy(bullet), BulletTrain(policy="gaussian")
    again.load_state_dict(bullet.state_dict())
    for other in (twin, again):
        assert_state(other, bullet.state_dict())
    with pytest.raises(RuntimeError, match="steps_assigned"):
        BulletTrain().load_state_dict(bullet.state_dict())
    with pytest.raises(RuntimeError, match="group_counts"):
        BulletTrain(policy="uniform").load_state_dict({"robust_fraction": torch.zeros(())})


def test_repr_tells_what_is_not_the_default():
    def mine(judged):
        return judged.group

    start = "BulletTrain(7, 1, 0, gamma=0.75, momentum=0.9"
    for options, end in [
        ({"metric": "margin"}, ", metric='margin')"),
        ({"policy": "uniform"}, ", policy='uniform')"),
        ({"metric": "gradient_norm", "policy": Gaussian()}, ", metric='gradient_norm', policy='gaussian')"),
        ({"policy": Gaussian(2.0)}, ", policy=Gaussian(width=2.0))"),
        ({"policy": Oracle(7)}, ", policy=Oracle(steps=7))"),
        ({"policy": mine}, ", policy=mine)"),
        ({"metric": "signed_variance", "policy": "three_groups"}, ")"),
    ]:
        assert repr(BulletTrain(7, 1, 0, gamma=0.75, **options)) == start + end


# On a device the host waits only for the counts


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("metric", METRICS)
def test_any_metric_and_policy_start_without_waiting_and_are_read_once(metric, policy):
    bullet = BulletTrain(metric=metric, policy=policy).to(DEVICE)
    z, y = torch.randn(6, 4, device=DEVICE), torch.zeros(6, dtype=torch.int64, device=DEVICE)
    attacked = {"attacked_logits": z} if policy == "oracle" else {}
    with pretended_device(plan=[4] * 10 + [2, 3, 1]) as reads:
        started = bullet.start_plan(z, y, **attacked)
        assert (reads.started, reads.waited) == (1, 0)
        assert started.active_counts == (4,) * 10
        assert started.group_sizes == (2, 3, 1)
        assert reads.started == 1
    assert {t.device for t in (started.order, started.steps, started.step_size, started.certainty)} == {DEVICE}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("metric", METRICS)
def test_a_plan_reads_once(metric, policy):
    with counted_waits() as waits:
        BulletTrain(metric=metric, policy=policy).plan(Z, Y, **({"attacked_logits": Z} if policy == "oracle" else {}))
    assert len(waits) == 1


def test_the_default_launches_no_more_than_before():
    names = launches(lambda: BulletTrain(policy="three_groups", metric="signed_variance").start_plan(Z, Y))
    assert names == launches(lambda: BulletTrain().start_plan(Z, Y))
    assert [name for name in names if name.startswith("bt_fast")] == [
        "bt_fast::signed_variance",
        "bt_fast::assign_steps",
    ]


# Bad input: the error names it, and nothing changes


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: BulletTrain(metric="Margin"), ValueError, "metric must be one of 'signed_variance'.*got 'Margin'"),
        (lambda: BulletTrain(metric=3), TypeError, "metric must be one of .* or a function, got 3"),
        (lambda: BulletTrain(policy="gauss"), ValueError, "policy must be one of 'three_groups'.*got 'gauss'"),
        (lambda: BulletTrain(policy=None), TypeError, "policy must be one of .* or a function, got None"),
        (lambda: BulletTrain(policy=Gaussian), TypeError, "policy must be one of .* or a function, got <class"),
        (lambda: Gaussian(0.0), ValueError, "width must be a finite number greater than 0, got 0.0"),
        (lambda: Gaussian(math.nan), ValueError, "width must be a finite number greater than 0, got nan"),
        (lambda: Gaussian(math.inf), ValueError, "width must be a finite number greater than 0, got inf"),
        (lambda: Gaussian("1"), TypeError, "width must be a number, got '1'"),
        (lambda: Gaussian(True), TypeError, "width must be a number, got True"),
        (lambda: Oracle(0), ValueError, "steps must be at least 1, got 0"),
        (lambda: Oracle(2.0), TypeError, "steps must be an integer, got 2.0"),
        (lambda: Oracle(True), TypeError, "steps must be an integer, got True"),
    ],
)
def test_bad_configuration(make, error, message):
    with pytest.raises(error, match=message):
        make()


def only(count, value, like):
    """Returns zeros, with this many other values like `like`."""
    result = torch.zeros(len(like), dtype=like.dtype)
    result[:count] = value
    return result


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"metric": lambda z, y: [1.0] * 4}, TypeError, "metric must return a floating-point tensor, got list"),
        ({"metric": lambda z, y: y}, TypeError, "metric must return a floating-point tensor, got torch.int64"),
        ({"metric": lambda z, y: z}, ValueError, r"metric must return shape \[4\].*got \[4, 3\]"),
        ({"metric": lambda z, y: z[:3, 0]}, ValueError, r"metric must return shape \[4\].*got \[3\]"),
        ({"metric": lambda z, y: z[:, 0].to(DEVICE)}, ValueError, "metric must return a tensor on cpu.*on meta"),
        ({"metric": lambda z, y: only(2, math.nan, z[:, 0])}, ValueError, "metric must return numbers.*NaN for 2 of 4"),
        ({"policy": lambda judged: [1] * 4}, TypeError, "policy must return a tensor of integers, got list"),
        ({"policy": lambda judged: judged.certainty}, TypeError, "policy must return.*integers, got torch.float32"),
        ({"policy": lambda judged: judged.correct}, TypeError, "policy must return.*integers, got torch.bool"),
        ({"policy": lambda judged: judged.group[None]}, ValueError, r"policy must return shape \[4\].*got \[1, 4\]"),
        ({"policy": lambda judged: judged.group.to(DEVICE)}, ValueError, "policy must return a tensor on cpu.*on meta"),
        ({"policy": lambda judged: only(3, 11, judged.group)}, ValueError, r"policy .* steps in 0\.\.10, but 3 of 4"),
        ({"policy": lambda judged: only(1, -1, judged.group)}, ValueError, r"policy .* steps in 0\.\.10, but 1 of 4"),
        ({"policy": lambda judged: only(1, 2**62, judged.group)}, ValueError, r"policy .* steps in 0\.\.10, but 1 of"),
    ],
)
def test_what_a_metric_or_policy_returns(options, error, message):
    bullet = at_fraction(0.3, **options)
    before = state(bullet)
    with pytest.raises(error, match=message):
        bullet.plan(Z, Y)
    assert_state(bullet, before)


def test_values_that_only_the_device_can_see_are_raised_with_the_counts():
    for options, message in [
        ({"metric": lambda z, y: only(2, math.nan, z[:, 0])}, "metric"),
        ({"policy": lambda judged: only(3, 11, judged.group)}, "policy"),
    ]:
        bullet = BulletTrain(**options)
        started = bullet.start_plan(Z, Y)
        with pytest.raises(ValueError, match=message):
            _ = started.active_counts
        assert_state(bullet, BulletTrain(**options).state_dict())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("metric", METRICS)
def test_logits_without_softmax_are_reported_as_such_and_not_as_the_metric_s_or_policy_s(metric, policy):
    z = Z.clone().index_put((torch.tensor(2), torch.tensor(1)), torch.tensor(math.nan))
    bullet = at_fraction(0.3, metric=metric, policy=policy)
    before = state(bullet)
    with pytest.raises(ValueError, match="logits must be finite, but 1 of 4"):
        bullet.plan(z, Y, **({"attacked_logits": z} if policy == "oracle" else {}))
    assert_state(bullet, before)


@pytest.mark.parametrize(
    ("options", "attacked", "error", "message"),
    [
        ({"policy": "oracle"}, None, ValueError, "policy is an Oracle.*needs? attacked_logits="),
        ({"policy": "oracle"}, [[0.0]], TypeError, "attacked_logits must be a floating-point tensor, got list"),
        ({"policy": "oracle"}, Z.long(), TypeError, "attacked_logits must be a floating.*got torch.int64"),
        (
            {"policy": "oracle"},
            Z[:3],
            ValueError,
            r"attacked_logits must have the logits' shape \[4, 3\], got \[3, 3\]",
        ),
        ({"policy": "oracle"}, Z.to(DEVICE), ValueError, "attacked_logits must be on cpu.*on meta"),
        ({"policy": "oracle"}, Z * math.nan, ValueError, "attacked_logits must be finite, but 4 of 4"),
        ({"policy": "gaussian"}, Z, ValueError, "attacked_logits are for the policy 'oracle' alone"),
        ({}, Z, ValueError, "attacked_logits are for the policy 'oracle' alone"),
    ],
)
def test_attacked_logits(options, attacked, error, message):
    bullet = at_fraction(0.3, **options)
    before = state(bullet)
    with pytest.raises(error, match=message):
        bullet.plan(Z, Y, attacked_logits=attacked)
    assert_state(bullet, before)
