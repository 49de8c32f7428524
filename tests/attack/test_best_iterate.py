"""`PGD(keep="best")`, sample by sample against a plain loop."""

import copy
import warnings
from dataclasses import replace

import pytest
import reference_apgd
import torch
import torch.nn.functional as F
from emulated_device import EmulatedDevice
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_pgd import projected_step
from small_models import Dead, Undefined, assert_unchanged, batch, build, looked_at, snapshot, with_bright

from bt_fast import PGD, BulletTrain, MARTLoss, PGDLoss, Plan, ThreatModel, TRADESLoss, perturb
from bt_fast.attack.batch import AttackBatch
from bt_fast.attack.inner import NAMES
from bt_fast.attack.runners import run_eager
from bt_fast.attack.start import given_start
from bt_fast.attack.valued_runners import PGDRunner

NORMS = {"linf": (0.1, 0.06), "l2": (0.5, 0.4)}  # long steps, so that the last iterate is not always the best
THREATS = {"linf": ThreatModel(0.1), "l2": ThreatModel(0.5, "l_2")}
CLOSE = {"rtol": 0, "atol": 1e-12}


def network(m, seed=0):
    """A classifier in eval mode, images, labels that it mostly gets right, and starts inside ball and bounds."""
    model, (x, _) = looked_at(build("conv_bn", seed)).eval(), batch(m, seed)
    with torch.no_grad():
        model[-1].weight.mul_(3.0)
        y = model(x).argmax(dim=1)
    y[::4] = (y[::4] + 1) % 5
    g = torch.Generator().manual_seed(seed)
    start = (x + 0.02 * (2 * torch.rand(x.shape, generator=g, dtype=x.dtype) - 1)).clamp(0, 1)
    return model, x, y, start


def squared(z, rows):
    """An inner loss of one's own."""
    return ((z - rows.clean_outputs).square().sum(dim=1) + 0.1 * z.sum(dim=1)) * (1 + rows.labels)


def loss_of(inner, clean):
    if inner == "kl":
        return reference_apgd.kl_from(clean)
    if inner == "lse":
        return lambda z, y: (z.softmax(dim=0) - clean.softmax(dim=0)).square().sum()
    if inner is squared:
        return lambda z, y: ((z - clean).square().sum() + 0.1 * z.sum()) * (1 + y)
    return reference_apgd.LOSSES[inner]


def target_of(inner, model, x, y):
    clean = model(x).detach()
    if inner is squared:
        return clean
    return clean.softmax(dim=1) if inner in ("kl", "lse") else F.one_hot(y, 5).to(x.dtype)


def iterates(model, x, y, start, threat, inner, steps, size):
    """Images and inner losses of one sample's attack, plainly; in ℓ2 up to a gradient of 0 (then ours draws)."""
    loss, x_adv, seen = loss_of(inner, model(x)[0].detach()), start, []
    for t in range(steps + 1):
        x_adv = x_adv.detach().requires_grad_()
        value = loss(model(x_adv)[0], int(y))
        seen.append((x_adv.detach(), float(value.detach())))
        if t < steps:
            (grad,) = torch.autograd.grad(value, x_adv)
            if threat.norm == "l_2" and not grad.any():
                break
            x_adv = projected_step(x_adv.detach(), grad, x, threat, size)
    return seen


def best_of(seen):
    return max(seen, key=lambda pair: pair[1])[0]  # the first of equals


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any),
    norm=st.sampled_from(list(NORMS)),
    inner=st.sampled_from([*NAMES, squared]),
    keep=st.sampled_from(["best", "last"]),
    radii=st.booleans(),
    seed=st.integers(0, 100),
)
def test_each_sample_keeps_the_iterate_that_a_plain_loop_keeps(steps, norm, inner, keep, radii, seed):
    model, x, y, start = network(len(steps), seed)
    size = NORMS[norm][1]
    plan = Plan.from_steps(torch.tensor(steps), torch.full((len(x),), size, dtype=x.dtype))
    rows = [plan.sort(values) for values in (start, x, target_of(inner, model, x, y))]
    attacked = replace(AttackBatch.of(plan, rows[0].clone(), *rows[1:]), inner=inner, labels=plan.sort(y))
    threats = [THREATS[norm]] * len(x)
    if radii:
        threats = [replace(THREATS[norm], epsilon=(0.3 + i) * THREATS[norm].epsilon) for i in range(len(x))]
        own = torch.tensor([threat.epsilon for threat in threats], dtype=x.dtype)
        attacked = replace(attacked, epsilon=plan.sort(own))
        if keep == "best":  # from the start's projection
            start = torch.cat([given_start(start[i : i + 1], x[i : i + 1], threats[i]) for i in range(len(x))])
    (PGDRunner() if keep == "best" else run_eager)(model, attacked, THREATS[norm], None)
    result = plan.unsort(attacked.x_adv)
    for i, n in enumerate(steps):
        one = slice(i, i + 1)
        seen = iterates(model, x[one], y[one], start[one], threats[i], inner, n, size)
        if len(seen) <= n:
            continue  # dead units
        expected = best_of(seen) if keep == "best" and n else seen[-1][0]
        torch.testing.assert_close(result[one], expected, **CLOSE)


def test_the_cases_above_keep_first_middle_and_last_iterates():
    model, x, y, start = network(20)
    kept = set()
    for inner in ("kl", "cross_entropy", "margin"):
        for i in range(20):
            one = slice(i, i + 1)
            seen = iterates(model, x[one], y[one], start[one], THREATS["l2"], inner, 6, NORMS["l2"][1])
            kept.add(max(range(7), key=lambda t: seen[t][1]))
    assert len(kept) >= 3
    assert 6 in kept


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("inner", ["kl", "cross_entropy"])
def test_the_iterates_are_those_of_the_last_kept_to_the_bit(norm, inner):
    """The best of one sample is the last iterate of fewer steps, from the same random numbers."""
    model, x, y, _ = network(8)
    attacks = [PGD(*NORMS[norm], n, norm, start="uniform", inner=inner) for n in range(1, 6)]
    last = []
    for attack in attacks:
        last.append(perturb(model, x, y, attack, generator=torch.Generator().manual_seed(1)))
    best = PGD(*NORMS[norm], 5, norm, start="uniform", inner=inner, keep="best")
    result = perturb(model, x, y, best, generator=torch.Generator().manual_seed(1))
    equal = torch.stack([(x_adv == result).flatten(1).all(dim=1) for x_adv in last])
    assert equal.any(dim=0).sum() >= 6  # the others keep their start
    assert equal[4].any()


def test_it_takes_one_forward_more_and_no_backward_more():
    model, x, y, _ = network(8)
    seen = []
    model.register_forward_hook(lambda _, args, __: seen.append((len(args[0]), torch.is_grad_enabled())))
    attack = PGD(0.1, 0.06, 3, start="uniform", inner="cross_entropy", keep="best")
    perturb(model, x, y, attack)
    assert seen == [(2, False), *[(8, True)] * 3, (8, False)]
    seen.clear()
    mining = BulletTrain(3, 1, 0)
    mining.robust_fraction.fill_(0.5)
    steps = perturb(model, x, y, attack, mining, return_details=True).steps
    assert sum(n for n, grad in seen if grad) == steps.sum()
    assert sum(n for n, grad in seen if not grad) == 8 + (steps > 0).sum()


@pytest.mark.parametrize("kind", [TRADESLoss, MARTLoss, PGDLoss])
@pytest.mark.parametrize("mining", [False, True])
def test_losses_train_on_the_best_iterate(kind, mining):
    model, x, y, _ = network(8)
    bullet = BulletTrain(4, 1, 0) if mining else None
    attack = PGD(0.1, 0.06, 4, start="uniform", inner="cross_entropy", keep="best")
    criterion = kind(attack, mining=bullet, engine="exact")
    criterion(copy.deepcopy(model).train(), x, y, generator=torch.Generator().manual_seed(5)).backward()
    x_adv, steps = criterion.last.x_adv, criterion.last.steps.tolist()
    begin = _start(x, 5, mined=mining)
    for i, n in enumerate(steps):
        one = slice(i, i + 1)
        size = 0.06 if n == 4 else 1.7 * 0.1 / max(n, 1)
        seen = iterates(model, x[one], y[one], begin[one], THREATS["linf"], "cross_entropy", n, size)
        torch.testing.assert_close(x_adv[one], best_of(seen) if n else x[one], rtol=0, atol=1e-9)


def _start(x, seed, mined):
    from bt_fast.attack.start import ball_start, random_state, sorted_start

    generator = torch.Generator().manual_seed(seed)
    if not mined:
        return ball_start(x, ThreatModel(0.1), generator)
    return sorted_start(x, None, None, random_state(x, generator), "uniform", ThreatModel(0.1))[1]


def test_a_normal_start_outside_of_the_bounds_is_never_kept():
    model = build(Dead).eval()  # no step improves on the start
    x, y = torch.zeros(4, 1, 6, 6, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    x_adv = perturb(model, x, y, PGD(0.1, 0.02, 2, keep="best"))
    assert 0 == x_adv.min() < x_adv.max()


# Engines


def losses(engine, attack, mining):
    model, x, y, _ = network(6)
    criterion = TRADESLoss(attack, mining=mining, engine=engine)
    result = []
    for k in range(3):
        loss = criterion(model.train(), x, y, generator=torch.Generator().manual_seed(k))
        loss.backward()
        result.append(loss.detach().clone())
    return torch.stack(result), criterion.explain()


@pytest.mark.parametrize("mining", [False, True])
def test_graphs_and_streams_give_way_to_an_eager_attack_and_explain_says_so(mining):
    attack, why = PGD(0.1, 0.06, 3, keep="best"), "each sample keeps its best iterate"
    expected, _ = losses("exact", attack, BulletTrain(3, 1, 0) if mining else None)
    fast, explained = losses("fast", attack, BulletTrain(3, 1, 0) if mining else None)
    torch.testing.assert_close(fast, expected, rtol=1e-6, atol=0)
    assert f"attack steps: eagerly, without graphs and streams, since {why}" in explained
    with EmulatedDevice(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        emulated, explained = losses("fast", attack, BulletTrain(3, 1, 0) if mining else None)
    torch.testing.assert_close(emulated, fast, rtol=1e-9, atol=0)
    assert f"attack steps: eagerly, without graphs and streams, since {why}" in explained


# What goes wrong


def test_nan_in_a_samples_gradient_is_reported_and_the_model_stays():
    model, (x, y) = build(Undefined), with_bright([2, 5])
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"NaN for 2 of 8 samples.*: samples 2, 5"):
        PGDLoss(PGD(0.1, 0.02, 3, keep="best"), engine="exact")(model, x, y)
    assert_unchanged(before, model)


@pytest.mark.parametrize("keep", ["first", None, True])
def test_another_choice_is_refused(keep):
    with pytest.raises(ValueError, match=f"keep must be one of 'last', 'best', got {keep!r}: write keep='last'"):
        PGD(0.1, 0.02, 3, keep=keep)
