"""APGD in training and in `perturb`, sample by sample against the plain reference."""

import copy
import itertools
import warnings
from dataclasses import replace

import pytest
import reference_apgd
import torch
import torch.nn.functional as F
from emulated_device import EmulatedDevice
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended_device import DEVICE, pretended_device
from small_models import Undefined, assert_unchanged, batch, build, looked_at, snapshot, with_bright

from bt_fast import APGD, PGD, BulletTrain, MARTLoss, Oracle, PGDLoss, Plan, ThreatModel, TRADESLoss, perturb
from bt_fast.attack.apgd import checkpoints
from bt_fast.attack.apgd_steps import Trail
from bt_fast.attack.batch import AttackBatch
from bt_fast.attack.dlr import ranked_wrong, with_goal
from bt_fast.attack.inner_values import Aim, values_and_directions
from bt_fast.attack.valued_runners import APGDRunner

NORMS = {"linf": 0.1, "l2": 0.5}
# in l2 rounding grows from step to step, and in DLR by its small denominators
CLOSE = {"linf": {"rtol": 0, "atol": 1e-12}, "l2": {"rtol": 0, "atol": 1e-6}}
LABELLED = tuple(reference_apgd.LOSSES)


def network(m, seed=0, scale=2.0):
    """A classifier in eval mode whose logits spread, images, labels that it mostly gets right, starts in the box."""
    model, (x, _) = looked_at(build("conv_bn", seed)).eval(), batch(m, seed)
    with torch.no_grad():
        model[-1].weight.mul_(scale)
        if m > 1:  # or all logits were 0
            model[-1].bias.sub_(model(x).mean(dim=0))
        y = model(x).argmax(dim=1)
    y[::4] = (y[::4] + 1) % 5
    g = torch.Generator().manual_seed(seed)
    start = (x + 0.02 * (2 * torch.rand(x.shape, generator=g, dtype=x.dtype) - 1)).clamp(0, 1)
    return model, x, y, start


def goals_of(model, x, y):
    return ranked_wrong(model(x).detach(), y, 1)[:, 0]


def reference(model, x, y, start, norm, inner, steps, rho=0.75, epsilon=None):
    """The reference's runs, one for each sample."""
    runs, clean = [], model(x).detach()
    for i, n in enumerate(steps):
        one = (x[i : i + 1], int(y[i]), start[i : i + 1])
        goal = reference_apgd.ranked(clean[i].tolist(), int(y[i]))[0]
        loss = reference_apgd.kl_from(clean[i]) if inner == "kl" else reference_apgd.LOSSES[inner]
        size = epsilon or NORMS[norm]
        runs.append(reference_apgd.apgd(model, *one, size, n, norm, loss, rho=rho, goal=goal))
    return runs


def target_of(inner, model, x, y):
    with torch.no_grad():
        p = model(x).softmax(dim=1)
    if inner == "kl":
        return p
    one_hot = F.one_hot(y, 5).to(x.dtype)
    return with_goal(one_hot, p) if inner == "dlr_targeted" else one_hot


def run(model, x, y, start, norm, inner, steps, rho=0.75):
    """The runner's x' in the caller's order, and the images that the model was given, forward by forward."""
    plan = Plan.from_steps(torch.tensor(steps), torch.ones(len(x)))
    rows = [plan.sort(values) for values in (start, x, target_of(inner, model, x, y))]
    attacked, seen = replace(AttackBatch.of(plan, rows[0].clone(), *rows[1:]), inner=inner, labels=plan.sort(y)), []
    with torch.enable_grad():
        hook = model.register_forward_hook(lambda _, args, __: seen.append((args[0].detach(), torch.is_grad_enabled())))
        APGDRunner(rho)(model, attacked, ThreatModel(NORMS[norm], {"linf": "l_inf", "l2": "l_2"}[norm]), None)
        hook.remove()
    assert not attacked.faulty.any()
    return plan.unsort(attacked.x_adv), seen


# Algorithm 1


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("inner", [*LABELLED, "kl"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 30])
def test_all_iterates_are_the_references(norm, inner, steps):
    model, x, y, start = network(5)
    result, seen = run(model, x, y, start, norm, inner, [steps] * 5)
    runs = reference(model, x, y, start, norm, inner, [steps] * 5)
    assert len(seen) == steps + 1
    for t, (images, _) in enumerate(seen):
        torch.testing.assert_close(images, torch.cat([r.iterates[t] for r in runs]), **CLOSE[norm])
    torch.testing.assert_close(result, torch.cat([r.best for r in runs]), **CLOSE[norm])


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any),
    norm=st.sampled_from(list(NORMS)),
    inner=st.sampled_from([*LABELLED, "kl"]),
    rho=st.sampled_from([0.0, 0.5, 0.75, 1.0]),
    seed=st.integers(0, 100),
)
def test_each_sample_has_the_checkpoints_of_its_own_number_of_steps(steps, norm, inner, rho, seed):
    model, x, y, start = network(len(steps), seed)
    result, _ = run(model, x, y, start, norm, inner, steps, rho)
    for i, r in enumerate(reference(model, x, y, start, norm, inner, steps, rho)):
        ordered = sorted(map(float, r.values))
        if any(high - low < 1e-12 for low, high in itertools.pairwise(ordered)):
            continue  # two iterates have one inner loss, so that rounding decides whether it rose
        expected = r.best if steps[i] else start[i : i + 1]
        torch.testing.assert_close(result[i : i + 1], expected, **CLOSE[norm])


@pytest.mark.parametrize("norm", NORMS)
def test_the_cases_above_halve_for_both_reasons_and_go_back(norm):
    model, x, y, start = network(5)
    halved = {}
    for rho in (0.75, 0.0):  # at 0 a step halves only where the best loss stands still, or never rose
        runs = reference(model, x, y, start, norm, "cross_entropy", [30] * 5, rho)
        halved[rho] = sum(r.sizes[-1] < r.sizes[0] for r in runs)
        assert any(not torch.equal(r.best, r.iterates[-1]) for r in runs)
    assert halved[0.75] >= 3
    assert halved[0.0] >= 1


def test_checkpoints_are_the_papers_of_a_hundred_steps_and_autoattacks_of_fewer():
    assert list(checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(10) == {2: 2, **dict.fromkeys(range(3, 11), 1)}
    assert checkpoints(1) == {1: 1}
    for n in range(1, 130):
        at, lengths = 0, reference_apgd.periods(n)
        for t, length in checkpoints(n).items():
            assert length == next(lengths)
            at += length
            assert t == at <= n


def test_a_sample_costs_its_steps_and_one_forward_more():
    model, x, y, start = network(5)
    _, seen = run(model, x, y, start, "linf", "cross_entropy", [3, 0, 7, 1, 3])
    with_grad = [len(images) for images, grad in seen if grad]
    assert with_grad == [4, 3, 3, 1, 1, 1, 1]
    assert sum(len(images) for images, grad in seen if not grad) == 4


def test_a_start_outside_of_ball_and_bounds_begins_at_its_projection():
    model, x, y, _ = network(4)
    far = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    for norm, epsilon in NORMS.items():
        _, seen = run(model, x, y, far, norm, "cross_entropy", [2] * 4)
        begin = far.clamp(0, 1)
        if norm == "linf":
            begin = torch.maximum(torch.minimum(begin, x + epsilon), x - epsilon)
        else:
            length = (begin - x).flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            begin = x + (begin - x) * (epsilon / length.clamp(min=epsilon))
        torch.testing.assert_close(seen[0][0], begin, **CLOSE[norm])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_in_fewer_bits_it_stays_in_ball_and_bounds(norm, dtype):
    model, x, y, _ = network(6)
    model, x = model.to(dtype), x.to(dtype)
    x_adv = perturb(model, x, y, APGD(NORMS[norm], 6, norm, "uniform", "cross_entropy")).double()
    assert bool(((x_adv >= 0) & (x_adv <= 1)).all())
    assert (x_adv - x).abs().max() > 0
    delta = (x_adv - x.double()).flatten(1)
    size = delta.abs().amax(dim=1) if norm == "linf" else delta.norm(dim=1)
    assert size.max() <= NORMS[norm] + 4 * torch.finfo(dtype).eps


def test_a_radius_of_each_samples_own_is_that_of_its_attack_alone():
    model, x, y, _ = network(4)
    radii = torch.tensor([0.05, 0.1, 0.2, 0.4], dtype=x.dtype)
    for norm in ("l_inf", "l_2"):
        threat = ThreatModel(1e9, norm)  # which is not used
        together, here = Trail.of(x, radii), x.clone()
        alone = [(Trail.of(x[i : i + 1], float(radii[i])), x[i : i + 1].clone()) for i in range(4)]
        for t in range(6):
            _step(model, together, here, x, y, threat, radii, t)
            for i, (trail, one) in enumerate(alone):
                _step(model, trail, one, x[i : i + 1], y[i : i + 1], threat, float(radii[i]), t)
        torch.testing.assert_close(together.best, torch.cat([trail.best for trail, _ in alone]), **CLOSE["l2"])


def _step(model, trail, x_adv, x, y, threat, epsilon, t):
    probe = x_adv.clone().requires_grad_()
    logits = model(probe)
    values, directions = values_and_directions("cross_entropy", logits.detach(), Aim(None, y))
    (grad,) = torch.autograd.grad(logits, probe, directions)
    trail.look(x_adv, values, grad, t == 0)
    if t in (2, 4):
        trail.check(x_adv, grad, 0.75, 2)
    trail.step(x_adv, x, grad, threat, epsilon, t == 0)


class OneNumber(torch.nn.Module):
    """Its gradient is one number for all pixels of a sample, expanded."""

    def forward(self, x):
        s = x.flatten(1).mean(dim=1, keepdim=True)
        return torch.cat([s, 2 * s, -s, s * s], dim=1)


def test_a_gradient_that_is_expanded_is_no_obstacle():
    x, y = batch(4)
    x_adv = perturb(OneNumber(), x, y.clamp(max=3), APGD(0.1, 8, start="clean", inner="dlr_targeted"))
    assert (x_adv - x).abs().max() > 0


# In perturb and in the losses


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("inner", LABELLED)
@pytest.mark.parametrize("engine", ["exact", "fast"])
def test_perturb_is_the_reference_from_x(norm, inner, engine):
    model, x, y, _ = network(5)
    attack = APGD(NORMS[norm], 6, norm, "clean", inner)
    result = perturb(model, x, y, attack, engine=engine, return_details=True)
    expected = torch.cat([r.best for r in reference(model, x, y, x, norm, inner, [6] * 5)])
    torch.testing.assert_close(result.x_adv, expected, **CLOSE["l2" if engine == "fast" else norm])
    assert (result.logits is None) == (inner != "dlr_targeted")
    assert result.steps.tolist() == [6] * 5


@pytest.mark.parametrize("norm", NORMS)
def test_the_divergence_is_ascended_from_the_authors_normal_start(norm):
    model, x, y, _ = network(5)
    torch.manual_seed(3)
    result = perturb(model, x, y, APGD(NORMS[norm], 5, norm))
    torch.manual_seed(3)
    for _ in range(2 if norm == "l2" else 1):
        noise = 0.001 * torch.randn(x.shape)
    begin = (x + noise).clamp(0, 1)
    expected = torch.cat([r.best for r in reference(model, x, y, begin, norm, "kl", [5] * 5)])
    torch.testing.assert_close(result, expected, **CLOSE[norm])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("numbered", [False, True])
def test_a_uniform_start_is_on_the_balls_surface(norm, numbered):
    class Still(torch.nn.Module):
        """Its first forward is that of the start, and no step improves on it."""

        def forward(self, images):
            return images.flatten(1)[:, :5] * 0

    x = torch.full((4, 1, 6, 6), 0.5, dtype=torch.float64)
    indices = torch.arange(4) if numbered else None
    start = perturb(Still(), x, torch.zeros(4, dtype=torch.int64), APGD(0.1, 1, norm, "uniform"), indices=indices)
    delta = (start - x).flatten(1)
    size = delta.abs().amax(dim=1) if norm == "linf" else delta.norm(dim=1)
    torch.testing.assert_close(size, torch.full((4,), 0.1, dtype=x.dtype))
    assert len(delta[:, 0].unique()) == 4
    if norm == "linf" and not numbered:
        torch.manual_seed(0)
        start = perturb(Still(), x, torch.zeros(4, dtype=torch.int64), APGD(0.1, 1, norm, "uniform"))
        torch.manual_seed(0)
        t = 2 * torch.rand(x.shape, dtype=x.dtype) - 1
        torch.testing.assert_close(start, x + 0.1 * t / t.flatten(1).abs().amax(dim=1).view(-1, 1, 1, 1))


@pytest.mark.parametrize("kind", [TRADESLoss, PGDLoss, MARTLoss])
def test_two_steps_from_x_in_training_are_the_plain_scripts(kind):
    """revisiting-at's attack: APGD-2 of the cross-entropy from x, eval mode, the best of three iterates."""
    model, x, y, _ = network(6)
    model.train()
    twin = copy.deepcopy(model)
    options = {} if kind is PGDLoss else {"beta": 2.0}
    criterion = kind(APGD(0.1, 2, start="clean", inner="cross_entropy"), engine="exact", **options)
    loss = criterion(model, x, y)
    loss.backward()
    twin.eval()
    x_adv = torch.cat([r.best for r in reference(twin, x, y, x, "linf", "cross_entropy", [2] * 6)])
    twin.zero_grad()
    twin.train()
    torch.testing.assert_close(criterion.last.x_adv, x_adv, **CLOSE["linf"])
    if kind is TRADESLoss:
        clean = twin(x)
        z = twin(x_adv)
        second = twin(x)
        kl = F.kl_div(z.log_softmax(dim=1), second.softmax(dim=1), reduction="batchmean")
        expected = F.cross_entropy(clean, y) + 2.0 * kl
    elif kind is PGDLoss:
        expected = F.cross_entropy(twin(x_adv), y)
    else:
        return
    expected.backward()
    torch.testing.assert_close(loss, expected, **CLOSE["linf"])
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, **CLOSE["linf"])


@pytest.mark.parametrize("inner", [*LABELLED, "kl"])
@pytest.mark.parametrize("start", ["normal", "uniform", "clean"])
def test_with_mining_each_sample_is_attacked_as_if_alone(inner, start):
    if (start, inner) == ("clean", "kl"):
        return
    model, x, y, _ = network(12)
    mining = BulletTrain(8, 3, 1)
    mining.robust_fraction.fill_(0.5)
    attack = APGD(0.1, 8, start=start, inner=inner)
    options = {"generator": torch.Generator().manual_seed(3), "return_details": True}
    details = perturb(model, x, y, attack, mining, **options)
    mining.observe(model(details.x_adv), y)
    steps = details.steps.tolist()
    assert set(steps) == {1, 3, 8}
    begin = _start(x, start, 3)
    for i, r in enumerate(reference(model, x, y, begin, "linf", inner, steps)):
        torch.testing.assert_close(details.x_adv[i : i + 1], r.best, **CLOSE["linf"])


def _start(x, start, seed):
    from bt_fast.attack.start import random_state, sorted_start

    state = random_state(x, torch.Generator().manual_seed(seed))
    noise = {"uniform": "surface"}.get(start, start)
    return sorted_start(x, None, None, state, noise, ThreatModel(0.1))[1].clamp(0, 1)


def test_the_oracle_groups_by_an_apgd():
    model, x, y, _ = network(12)
    mining = BulletTrain(4, 1, 0, policy=Oracle(4))
    attack = APGD(0.1, 4, start="clean", inner="cross_entropy")
    details = perturb(model, x, y, attack, mining, return_details=True)
    attacked = torch.cat([r.best for r in reference(model, x, y, x, "linf", "cross_entropy", [4] * 12)])
    held = model(attacked).argmax(dim=1) == y
    assert torch.equal(details.group == 2, held)
    assert 0 < held.sum() < 12


def test_a_sample_without_steps_is_x_and_one_with_steps_is_not():
    model, x, y, _ = network(12)
    criterion = TRADESLoss(APGD(0.1, 4), mining=BulletTrain(4, 0, 0), engine="exact")
    criterion(model.train(), x, y).backward()
    moved = (criterion.last.x_adv != x).flatten(1).any(dim=1)
    assert torch.equal(moved, criterion.last.steps > 0)
    assert 0 < moved.sum() < 12


# Engines


def losses(engine, mining=None, seed=0):
    torch.manual_seed(seed)
    model, x, y, _ = network(6)
    criterion = TRADESLoss(APGD(0.1, 4, inner="margin"), mining=mining, engine=engine)
    result = []
    for k in range(3):
        loss = criterion(model.train(), x, y, generator=torch.Generator().manual_seed(k))
        loss.backward()
        result.append(loss.detach().clone())
    return torch.stack(result), criterion.explain()


def test_on_the_cpu_fast_is_exact_up_to_rounding_and_explain_says_that_the_attack_is_eager():
    exact, _ = losses("exact")
    fast, explained = losses("fast")
    torch.testing.assert_close(fast, exact, rtol=1e-6, atol=0)
    assert "attack steps: eagerly, without graphs and streams, since APGD chooses each sample's step size" in explained
    assert "folded view: yes" in explained


@pytest.mark.parametrize("mining", [False, True])
def test_where_there_are_graphs_the_attack_runs_eagerly_beside_a_captured_update(mining):
    made = [BulletTrain(4, 1, 0) if mining else None for _ in range(2)]
    expected, _ = losses("fast", made[0])
    with EmulatedDevice() as emulated, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result, explained = losses("fast", made[1])
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=0)
    assert "attack steps: eagerly, without graphs and streams" in explained
    for seed in range(3):
        (shuffled,) = emulated.shuffled(seed, [result])
        assert torch.equal(shuffled, result)


@pytest.mark.parametrize("inner", [*LABELLED, "kl"])
@pytest.mark.parametrize("norm", ["l_inf", "l_2"])
def test_no_step_waits_for_the_device(inner, norm):
    model = build("conv_bn").to(DEVICE).eval()
    x, target = torch.empty(6, 1, 6, 6, dtype=torch.float64, device=DEVICE), torch.empty(6, 5, device=DEVICE)
    with pretended_device() as reads:
        numbers = torch.empty(6, dtype=torch.float64, device=DEVICE)
        steps, faulty = (torch.empty(6, dtype=kind, device=DEVICE) for kind in (torch.int64, torch.int32))
        labels = torch.empty(6, dtype=torch.int64, device=DEVICE)
        attacked = AttackBatch(x, x.clone(), target, numbers, steps, (6, 6, 4, 4, 1), faulty, inner, labels)
        APGDRunner(0.75)(model, attacked, ThreatModel(0.1, norm), None)
    assert (reads.started, reads.waited) == (0, 0)


# What goes wrong


@pytest.mark.parametrize("norm", NORMS)
def test_nan_in_a_samples_gradient_is_reported_and_the_model_stays(norm):
    model, (x, y) = build(Undefined), with_bright([2, 5])
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"NaN for 2 of 8 samples.*: samples 2, 5"):
        PGDLoss(APGD(0.01, 3, norm), engine="exact")(model, x, y)
    assert_unchanged(before, model)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epsilon": -1}, ValueError, "epsilon must be a finite number of at least 0, got -1"),
        ({"epsilon": "8/255"}, TypeError, "epsilon must be a number"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 2.5}, TypeError, "steps must be an integer, got 2.5"),
        ({"norm": "l1"}, ValueError, "norm must be one of 'linf', 'l2', got 'l1'"),
        ({"start": "ball"}, ValueError, "start must be one of 'normal', 'uniform', 'clean', None, got 'ball'"),
        ({"start": "surface"}, ValueError, "start must be one of .*, got 'surface'"),
        (
            {"inner": "hinge"},
            ValueError,
            "inner must be one of 'kl', .*'dlr_targeted' or a function of .*, got 'hinge'",
        ),
        ({"start": "clean", "inner": "kl"}, ValueError, "attack must not start at x with the inner loss 'kl'"),
        ({"start": "clean", "inner": "lse"}, ValueError, "attack must not start at x with the inner loss 'lse'"),
        ({"rho": 1.5}, ValueError, r"rho must lie in \[0, 1\], got 1.5: write rho=0.75"),
        ({"rho": None}, TypeError, "rho must be a number, got None"),
        ({"rho": float("nan")}, ValueError, r"rho must lie in \[0, 1\], got nan"),
        ({"bounds": (1, 0)}, ValueError, "bounds must be a smaller and a greater number"),
        ({"normalization": 0.5}, TypeError, "normalization must be a Normalization or None, got float"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        APGD(**{"epsilon": 0.1, "steps": 3} | options)


def test_it_is_plain_data():
    attack = APGD(0.1, 3, bounds=[0, 1])
    assert len({attack, copy.deepcopy(attack)}) == 1
    assert (attack.threat, attack.step_size) == (ThreatModel(0.1), 0.2)
    assert attack.bounds == (0.0, 1.0)


class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 2)).double()

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize("mining", [False, True])
@pytest.mark.parametrize("inner", ["dlr", "dlr_targeted"])
@pytest.mark.parametrize("kind", [PGD, APGD])
def test_too_few_classes_are_refused_with_nothing_changed(kind, inner, mining):
    if (kind, inner) == (PGD, "dlr_targeted"):
        with pytest.raises(ValueError, match="inner must be one of"):
            PGD(0.1, 0.02, 3, inner=inner)
        return
    model, (x, y) = Two(), batch()
    before = snapshot(model)
    attack = APGD(0.1, 3, inner=inner) if kind is APGD else PGD(0.1, 0.02, 3, inner=inner)
    bullet = BulletTrain(3, 1, 0) if mining else None
    with pytest.raises(ValueError, match=f"inner='{inner}' divides by .* must have K >= . classes, got 2"):
        TRADESLoss(attack, mining=bullet)(model, x, y % 2)
    assert_unchanged(before, model)


def test_a_loss_that_ascends_the_divergence_cannot_start_at_x():
    model, (x, y) = build("conv_bn"), batch()
    for attack in (APGD(0.1, 3, start="clean"), PGD(0.1, 0.02, 3, start="clean")):
        before = snapshot(model)
        with pytest.raises(ValueError, match="attack must not start at x with the inner loss 'kl'"):
            TRADESLoss(attack)(model, x, y)
        assert_unchanged(before, model)


def test_mining_takes_the_attacks_steps():
    with pytest.raises(ValueError, match="attack takes 3 steps, but mining 10 boundary steps"):
        TRADESLoss(APGD(0.1, 3), mining=BulletTrain())
    with pytest.raises(TypeError, match="attack must be a PGD, got float"):
        TRADESLoss(0.1)
