"""`evaluate` under APGD and AutoAttack's standard version: each sample fares as in the plain attack, one by one."""

import sys
import warnings
from types import SimpleNamespace
from unittest import mock

import plain_apgd
import pytest
import reference_apgd
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended_device import DEVICE, pretended_device
from small_models import Undefined, assert_unchanged, batch, build, looked_at, snapshot, with_bright

from bt_fast import APGD, PGD, Normalization, ThreatModel, course, evaluate
from bt_fast.attack import early_exit
from bt_fast.attack.early_exit import STOOD, Attack, Samples, Verdicts, Waiting
from bt_fast.attack.packed_apgd import PackedAPGD, Rounds
from bt_fast.attack.start import numbered_start

NORMS = {"linf": "l_inf", "l2": "l_2"}
RADII = {"linf": 0.04, "l2": 0.25}


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


def seed_of(number):
    return torch.randint(2**63 - 1, (), generator=generator(number))


def classifier(m, seed=0):
    """A model in eval mode, images, and labels that it gets right, but for each fifth; no class wins everywhere."""
    model, (x, _) = looked_at(build("conv_bn", seed)).eval(), batch(m, seed)
    with torch.no_grad():
        model[-1].weight.mul_(2.0)
        model[-1].bias.sub_(model(batch(64, seed + 1)[0]).mean(dim=0))
        y = model(x).argmax(dim=1)
    y[::5] = (y[::5] + 1) % 5
    return model, x, y


def in_batches(x, y, size):
    return zip(x.split(size), y.split(size), strict=True)


def fates(result):
    return list(zip(result.restart.tolist(), result.step.tolist(), strict=True))


def away(z, rows):
    """An inner loss of one's own."""
    return (z - rows.clean_outputs).square().sum(dim=1) * (1 + rows.labels) - z[:, 0]


def reference_loss(inner, clean):
    """That of one sample with these clean logits, as the reference takes it."""
    if inner is away:
        return lambda z, y, goal=None: (z - clean).square().sum() * (1 + y) - z[0]
    if inner == "lse":
        return lambda z, y, goal=None: (z.softmax(dim=0) - clean.softmax(dim=0)).square().sum()
    return reference_apgd.kl_from(clean) if inner == "kl" else reference_apgd.LOSSES[inner]


def plainly(model, x, y, norm, epsilon, steps, losses, noise, seed, rho=0.75):
    """Restart and step in which each sample falls, one sample after another."""
    result, clean = [], model(x).detach()
    for i in range(len(x)):
        one, label = x[i : i + 1], int(y[i])
        if int(clean[i].argmax()) != label:
            result.append((0, 0))
            continue
        goals, fate, targeted = reference_apgd.ranked(clean[i].tolist(), label), (STOOD, STOOD), 0
        for r, inner in enumerate(losses):
            start = numbered_start(one, noise, torch.tensor([i]), r, ThreatModel(epsilon, NORMS[norm]), seed)
            goal = goals[targeted % len(goals)]
            targeted += inner == "dlr_targeted"
            loss = reference_loss(inner, clean[i])
            run = reference_apgd.apgd(model, one, label, start, epsilon, steps, norm, loss, rho=rho, goal=goal)
            fell = [t for t, z in enumerate(run.iterates) if int(model(z).argmax()) != label]
            if fell:
                fate = (r + 1, fell[0])
                break
        result.append(fate)
    return result


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 12),
    size=st.integers(1, 12),
    steps=st.integers(1, 9),
    restarts=st.integers(1, 3),
    norm=st.sampled_from(list(NORMS)),
    inner=st.sampled_from(list(reference_apgd.LOSSES)),
    start=st.sampled_from(["uniform", "clean"]),
    scale=st.sampled_from([1e-3, 0.3, 1.0, 1.0, 3.0]),
    burst=st.integers(1, 8),
    seed=st.integers(0, 1000),
)
def test_each_sample_fares_as_in_the_plain_attack(m, size, steps, restarts, norm, inner, start, scale, burst, seed):
    model, x, y = classifier(m, seed)
    epsilon = RADII[norm] * scale
    restarts = restarts if start == "uniform" or inner == "dlr_targeted" else 1
    attack = APGD(epsilon, steps, norm, start, inner)
    with mock.patch.object(early_exit, "burst_length", return_value=burst):
        options = {"restarts": restarts, "generator": generator(seed)}
        result = evaluate(model, in_batches(x, y, size), attack, **options)
    noise = "surface" if start == "uniform" else "clean"
    assert fates(result) == plainly(model, x, y, norm, epsilon, steps, [inner] * restarts, noise, seed_of(seed))
    assert result.total == m
    assert result.robust_correct == sum(r == STOOD for r, _ in fates(result))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("inner", ["kl", "lse", away])
@pytest.mark.parametrize("burst", [1, 3])
def test_what_an_inner_loss_compares_with_goes_along_with_each_sample(norm, inner, burst):
    model, x, y = classifier(24)
    expected = plainly(model, x, y, norm, RADII[norm], 7, [inner] * 2, "surface", seed_of(3))
    for attack, options in (
        (APGD(RADII[norm], 7, norm, inner=inner), {}),
        (APGD(RADII[norm], 7, norm), {"loss": inner}),
    ):
        with mock.patch.object(early_exit, "burst_length", return_value=burst):
            result = evaluate(model, in_batches(x, y, 5), attack, restarts=2, generator=generator(), **options)
        assert fates(result) == expected
        assert result.attacks == ("apgd" if inner is away else f"apgd-{inner}",)
    assert len(set(expected)) >= 3


@pytest.mark.parametrize(
    ("attack", "options", "names"),
    [
        (APGD(0.0, 5, inner="dlr_targeted"), {"restarts": 3}, ("apgd-t",)),
        (APGD(0.0, 5), {"loss": away}, ("apgd",)),
        (ThreatModel(0.0), {"attacks": "standard"}, ("apgd-ce", "apgd-t", "fab-t", "square")),
    ],
)
def test_at_a_radius_of_0_every_sample_that_is_right_stands(attack, options, names):
    model, x, y = classifier(20)
    with mock.patch.object(early_exit.WorkingBatch, "run", side_effect=AssertionError("a step")):
        result = evaluate(model, in_batches(x, y, 8), attack, **options)
    assert fates(result) == [(0, 0) if i % 5 == 0 else (STOOD, STOOD) for i in range(20)]
    assert result.attacks == names


@pytest.mark.parametrize("norm", NORMS)
def test_early_late_and_no_falls_are_among_them(norm):
    model, x, y = classifier(120)
    result = evaluate(model, in_batches(x, y, 32), APGD(RADII[norm], 12, norm), restarts=2, generator=generator())
    assert {0, 1, STOOD} <= set(result.restart.tolist()) <= {0, 1, 2, STOOD}
    assert len(set(result.step.tolist())) >= 3
    assert result.attacks == ("apgd-ce",)


@pytest.mark.parametrize(("inner", "name"), [("margin", "margin"), ("dlr", "dlr"), ("dlr_targeted", "t")])
def test_the_result_names_the_attack(inner, name):
    model, x, y = classifier(4)
    assert evaluate(model, [(x, y)], APGD(0.01, 1, inner=inner)).attacks == (f"apgd-{name}",)
    assert evaluate(model, [(x, y)], PGD(0.01, 0.01, 1)).attacks == ("pgd",)


def test_a_sample_costs_what_it_lives_through_and_batches_are_full():
    model, x, y = classifier(40)
    seen, left = [], list(in_batches(x, y, 8))
    stream = iter(lambda: left.pop(0) if left else None, None)
    model.register_forward_hook(lambda _, args, __: seen.append((len(args[0]), torch.is_grad_enabled(), len(left))))
    result = evaluate(model, stream, APGD(0.04, 6), restarts=2, generator=generator())
    lived = sum(0 if r == 0 else 2 * 7 if r == STOOD else (r - 1) * 7 + t + 1 for r, t in fates(result))
    assert sum(n for n, _, _ in seen) == 40 + lived
    assert {n for n, grad, waiting in seen if grad and waiting} == {8}


@pytest.mark.parametrize("norm", NORMS)
def test_neither_batches_nor_bursts_nor_parts_change_a_samples_fate(norm):
    model, x, y = classifier(24)
    attack, results = APGD(RADII[norm], 9, norm, inner="dlr_targeted"), []
    for size, burst in ((24, 1), (24, 8), (7, 1), (5, 3), (1, 2)):
        with mock.patch.object(early_exit, "burst_length", return_value=burst):
            results.append(fates(evaluate(model, in_batches(x, y, size), attack, restarts=3, generator=generator())))
    assert all(result == results[0] for result in results)
    parts = [
        fates(evaluate(model, [(x[a:b], y[a:b])], attack, restarts=3, generator=generator(), first=a))
        for a, b in ((0, 9), (9, 24))
    ]
    assert parts[0] + parts[1] == results[0]
    assert fates(evaluate(model, [(x, y)], attack, restarts=3, generator=generator(), engine="fast")) == results[0]


def test_images_of_a_loader_that_normalises():
    model, x, y = classifier(20)
    normalization = Normalization((0.5,), (0.25,))
    front = torch.nn.Sequential(_Denormalising(), model)
    results = [
        evaluate(model, [(x, y)], APGD(0.04, 6), generator=generator()),
        evaluate(front, [((x - 0.5) / 0.25, y)], APGD(0.04, 6, normalization=normalization), generator=generator()),
    ]
    assert fates(results[0]) == fates(results[1])


class _Denormalising(torch.nn.Module):
    def forward(self, x):
        return x * 0.25 + 0.5


@pytest.mark.parametrize("norm", NORMS.values())
def test_the_host_waits_at_the_end_of_a_burst_only(norm):
    model, seed = build("conv_bn").to(DEVICE).eval(), torch.zeros((), dtype=torch.int64, device=DEVICE)
    attack = Attack(ThreatModel(0.1, norm), "cross_entropy", 20, 0.2, 5, seed)
    rounds = Rounds(("cross_entropy", *["dlr_targeted"] * 4), 0.75)
    working = PackedAPGD(attack, rounds, torch.empty(5, 1, 6, 6, dtype=torch.float64, device=DEVICE), goals=4)
    with pretended_device() as reads:
        working._count = 5
        working._restart[1] = 2
        working._advance(model)
    assert (reads.started, reads.waited) == (1, 1)


@pytest.mark.parametrize("norm", NORMS)
def test_a_gradient_with_nan_is_not_robust_but_an_error(norm):
    model = build(Undefined)
    x, _ = with_bright([0, 6])
    y = model.eval()(x).argmax(dim=1)
    with pytest.raises(ValueError, match=r"input gradient must be finite, but held NaN for 2 of 8 samples"):
        evaluate(model, [(x, y)], APGD(1e-3, 2, norm))


# PGD of other losses and starts


def test_pgd_takes_its_own_inner_loss_and_start():
    model, x, y = classifier(40)
    size = (0.04, 0.01, 5)
    options = {"generator": generator()}
    margin = evaluate(model, [(x, y)], PGD(*size, inner="margin"), **options)
    old = evaluate(model, [(x, y)], PGD(*size), loss="margin", generator=generator())
    assert fates(margin) == fates(old)
    assert fates(margin) != fates(evaluate(model, [(x, y)], PGD(*size), generator=generator()))
    dlr = evaluate(model, [(x, y)], PGD(*size, inner="dlr", start="clean"))
    assert dlr.robust_correct < dlr.clean_correct
    assert not ((dlr.step == 0) & (dlr.restart == 1)).any()
    cross_entropy = evaluate(model, [(x, y)], PGD(*size, start="clean"), loss="ce")
    assert not ((cross_entropy.step == 0) & (cross_entropy.restart == 1)).any()
    kept = evaluate(model, [(x, y)], PGD(*size, keep="best"), generator=generator())
    assert fates(kept) == fates(evaluate(model, [(x, y)], PGD(*size), generator=generator()))


# AutoAttack's standard version


class Others:
    """Stands in for the package's class: FAB-T and Square break the images that are bright at their first pixel."""

    def __init__(self, model, norm, eps, seed, version, verbose, device):
        self.model, self.given = model, (norm, eps, version, verbose, device)
        self.attacks_to_run, self.fab = ["apgd-ce", "apgd-t", "fab-t", "square"], SimpleNamespace(n_target_classes=9)
        assert 0 <= seed < 2**32
        self.made.append(self)

    def run_standard_evaluation(self, x, y, bs):
        self.seen, self.labels, self.batch_size = x.clone(), y.clone(), bs
        z = self.model(x.float())  # as the package, which computes in float32
        assert torch.equal(z.argmax(dim=1), y), "all that it is given stand"
        others = torch.zeros_like(x)  # where the model may say anything
        wrong = (x[:, 0, 0, 0] > 0.5) & (self.model(others.float()).argmax(dim=1) != y)
        self.broken = wrong
        return torch.where(wrong[:, None, None, None], others, x)


@pytest.fixture
def package(monkeypatch):
    monkeypatch.setitem(sys.modules, "autoattack", mock.Mock(AutoAttack=Others))
    monkeypatch.setattr(Others, "made", [], raising=False)
    monkeypatch.setattr(course, "STANDARD_STEPS", 7)
    return Others.made


@pytest.fixture
def no_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "autoattack", None)
    monkeypatch.setattr(course, "STANDARD_STEPS", 7)


LOSSES = ["cross_entropy", *["dlr_targeted"] * 4]  # of five classes there are four wrong ones


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", [24, 7])
def test_without_the_package_it_is_apgd_ce_and_apgd_t_and_a_warning_says_so(norm, size, no_package):
    model, x, y = classifier(24)
    threat = ThreatModel(RADII[norm], NORMS[norm])
    with pytest.warns(
        UserWarning, match="that of APGD-CE and APGD-T alone, without FAB-T and Square .*pip install git"
    ):
        result = evaluate(model, in_batches(x, y, size), threat, attacks="standard", generator=generator())
    expected = plainly(model, x, y, norm, threat.epsilon, 7, LOSSES, "surface", seed_of(3))
    assert fates(result) == expected
    assert result.attacks == ("apgd-ce", "apgd-t")
    assert {1, STOOD} <= set(result.restart.tolist())


@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_a_loop_over_whole_batches_breaks_the_same(norm, drop, no_package):
    model, x, y = classifier(40)
    threat = ThreatModel(RADII[norm], NORMS[norm])
    with pytest.warns(UserWarning, match="alone"):
        result = evaluate(model, in_batches(x, y, 12), threat, attacks="standard", generator=generator())
    expected = plain_apgd.standard(model, in_batches(x, y, 12), threat, 7, 4, seed_of(3), drop=drop)
    assert torch.equal(torch.stack([result.restart, result.step]), expected)


def test_both_parts_break_samples_that_the_other_does_not():
    model, x, y = classifier(200)
    with mock.patch.object(course, "STANDARD_STEPS", 7), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = evaluate(model, in_batches(x, y, 50), ThreatModel(0.04), attacks="standard", generator=generator())
    ranks = set(result.restart.tolist())
    assert 1 in ranks
    assert ranks & {2, 3, 4, 5}


def test_the_package_is_handed_the_survivors_alone_and_gives_each_its_verdict(package):
    model, x, y = classifier(40)
    options = {"attacks": "standard", "generator": generator()}
    before, state = snapshot(model), torch.get_rng_state()
    result = evaluate(model, in_batches(x, y, 12), ThreatModel(0.02), **options)
    assert_unchanged(before, model)
    assert torch.equal(torch.get_rng_state(), state)
    alone = plainly(model, x, y, "linf", 0.02, 7, LOSSES, "surface", seed_of(3))
    stood = [i for i, (r, _) in enumerate(alone) if r == STOOD]
    (attack,) = package
    assert attack.given == ("Linf", 0.02, "standard", False, "cpu")
    assert attack.attacks_to_run == ["fab-t", "square"]
    assert attack.fab.n_target_classes == 4
    assert attack.batch_size == 12
    assert torch.equal(attack.seen, x[stood])
    assert torch.equal(attack.labels, y[stood])
    broken = {i for i, wrong in zip(stood, attack.broken.tolist(), strict=True) if wrong}
    assert 0 < len(broken) < len(stood)
    expected = [(6, 0) if i in broken else fate for i, fate in enumerate(alone)]
    assert fates(result) == expected
    assert result.robust_correct == len(stood) - len(broken)
    assert result.robust_samples.tolist() == [i for i in stood if i not in broken]
    assert result.attacks == ("apgd-ce", "apgd-t", "fab-t", "square")


def test_where_nothing_stands_the_package_is_not_run(package):
    model, x, y = classifier(10)
    result = evaluate(model, [(x, y)], ThreatModel(0.9), attacks="standard")
    assert result.robust_correct == 0
    assert package == []
    assert result.attacks == ("apgd-ce", "apgd-t", "fab-t", "square")


def test_what_the_package_cannot_attack_is_said(package):
    model, x, y = classifier(6)
    with pytest.warns(UserWarning, match="without FAB-T and Square of AutoAttack: it has the bounds 0 and 1"):
        result = evaluate(model, [(x, y)], ThreatModel(0.01, lower=-1.0), attacks="standard")
    flat = torch.nn.Sequential(torch.nn.Unflatten(1, (1, 6, 6)), model)
    with pytest.warns(UserWarning, match=r"it takes images \[n, C, H, W\], and these have shape \[6, 36\]"):
        flattened = evaluate(flat, [(x.flatten(1), y)], ThreatModel(0.01), attacks="standard")
    assert result.attacks == flattened.attacks == ("apgd-ce", "apgd-t")
    assert package == []


def test_a_model_of_more_classes_goes_to_nine(no_package):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 12)).double()
    x, _ = batch(16)
    y = model(x).argmax(dim=1)
    with pytest.warns(UserWarning, match="alone"):
        result = evaluate(model, [(x, y)], ThreatModel(0.02), attacks="standard", generator=generator())
    losses = ["cross_entropy", *["dlr_targeted"] * 9]
    assert fates(result) == plainly(model, x, y, "linf", 0.02, 7, losses, "surface", seed_of(3))
    rows = []
    model.register_forward_hook(lambda _, args, __: rows.append(len(args[0]) if len(args[0]) == 16 else 0))
    with pytest.warns(UserWarning, match="alone"):
        unbroken = evaluate(model, [(x, y)], ThreatModel(1e-9), attacks="standard", generator=generator())
    assert unbroken.robust_correct == 16
    assert sum(rows) == 16 + 16 * (1 + 9) * (7 + 1)


# Bad input


@pytest.mark.parametrize(
    ("attack", "options", "error", "message"),
    [
        (APGD(0.1, 2, start="normal"), {}, ValueError, "attack must start anywhere in the ball or at x, got start='n"),
        (
            APGD(0.1, 2, start="clean"),
            {"loss": "kl"},
            ValueError,
            "attack must not start at x with the inner loss 'kl'",
        ),
        (PGD(0.1, 0.1, 2, start="clean", inner="lse"), {}, ValueError, "attack must not start at x with the inner"),
        (APGD(0.1, 2), {"steps": 3}, ValueError, "steps is an option of the attack"),
        (APGD(0.1, 2, inner="dlr"), {"loss": "margin"}, ValueError, "the attack ascends 'dlr', but loss is 'margin'"),
        (APGD(0.1, 2), {"loss": "hinge"}, ValueError, "loss must be one of 'kl', .* got 'hinge'"),
        (APGD(0.1, 2, start="clean"), {"restarts": 2}, ValueError, "restarts must be 1 for an attack that starts at x"),
        (PGD(0.1, 0.1, 2, start="clean"), {"restarts": 2}, ValueError, "restarts must be 1 for an attack that starts"),
        (PGD(0.1, 0.1, 2), {"attacks": "plus"}, ValueError, "attacks must be one of 'standard', None, got 'plus'"),
        (PGD(0.1, 0.1, 2), {"attacks": "standard"}, TypeError, "attack must be a ThreatModel, got PGD: write evaluate"),
        (
            ThreatModel(0.1),
            {"attacks": "standard", "restarts": 2},
            ValueError,
            "restarts must be left out with attacks",
        ),
        (ThreatModel(0.1), {"attacks": "standard", "steps": 9}, ValueError, "steps must be left out with attacks="),
        (ThreatModel(0.1), {"attacks": "standard", "loss": "ce"}, ValueError, "loss must be left out with attacks="),
        (ThreatModel(0.1), {"attacks": "standard", "engine": "bf16"}, ValueError, "engine must have the model's own"),
        (0.1, {}, TypeError, "attack must be a PGD, got float"),
    ],
)
def test_bad_options_are_named_before_anything_is_read(attack, options, error, message):
    model, x, y = classifier(4)
    stream = iter([(x, y)])
    with pytest.raises(error, match=message):
        evaluate(model, stream, attack, **options)
    assert next(stream, None) is not None


class Few(torch.nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, classes)).double()

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize(
    ("attack", "options", "classes", "message"),
    [
        (PGD(0.1, 0.1, 2, inner="dlr"), {}, 2, "inner='dlr' divides .* must have K >= 3 classes, got 2"),
        (APGD(0.1, 2, inner="dlr"), {}, 2, "inner='dlr' divides .* must have K >= 3 classes, got 2"),
        (APGD(0.1, 2, inner="dlr_targeted"), {}, 3, "must have K >= 4 classes, got 3"),
        (ThreatModel(0.1), {"attacks": "standard"}, 3, "attacks='standard' needs a model of at least 4 classes, got"),
    ],
)
def test_too_few_classes_are_refused(attack, options, classes, message):
    x, y = batch(4)
    model = Few(classes)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        evaluate(model, [(x, y.clamp(max=classes - 1))], attack, **options)
    assert_unchanged(before, model)


# The packages, where they are installed


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("theirs", "inner"), [("ce", "cross_entropy"), ("dlr", "dlr")])
def test_the_real_package_has_the_same_best_points(norm, theirs, inner):
    base = pytest.importorskip("autoattack.autopgd_base")
    from bt_fast import perturb

    model, x, y = classifier(12)
    model, x = model.float(), x.float()
    names = {"linf": "Linf", "l2": "L2"}
    attack = base.APGDAttack(model, n_iter=20, norm=names[norm], eps=RADII[norm], loss=theirs, device="cpu")
    attack.init_hyperparam(x)
    expected = attack.attack_single_run(x, y, x_init=x)[0]
    result = perturb(model, x, y, APGD(RADII[norm], 20, norm, "clean", inner))
    close = (result - expected).flatten(1).abs().amax(dim=1) < 1e-4
    assert close.float().mean() >= 0.8  # a sign of a gradient near 0 may be another one in float32


def test_samples_like_those_of_the_real_package_fall():
    package = pytest.importorskip("autoattack")
    model, x, y = classifier(32)
    model, x = model.float(), x.float()
    y = model(x).argmax(dim=1)
    result = evaluate(model, [(x, y)], ThreatModel(0.02), attacks="standard", generator=generator())
    adversary = package.AutoAttack(model, norm="Linf", eps=0.02, version="standard", device="cpu", verbose=False)
    adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = 4
    stood = model(adversary.run_standard_evaluation(x, y, bs=32)).argmax(dim=1) == y
    differ = (stood != (result.restart == STOOD)).sum()
    assert differ <= 1


def test_samples_that_left_take_nothing_of_their_successors_along():
    """Rows are filled again: what APGD remembers of the sample before must be gone."""
    model, x, y = classifier(30)
    result = [
        evaluate(model, in_batches(x, y, size), APGD(0.06, 15), restarts=2, generator=generator()) for size in (2, 30)
    ]
    assert fates(result[0]) == fates(result[1])


def test_unused_names_of_the_packed_attack_are_what_they_were():
    samples = Samples(torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64), torch.arange(2), goals=torch.ones(2, 3))
    assert samples[:1].goals.shape == (1, 3)
    verdicts = Verdicts()
    verdicts.number(3)
    verdicts.record(torch.arange(3), torch.tensor([1, STOOD, STOOD]), torch.tensor([4, STOOD, STOOD]))
    verdicts.overrule(torch.tensor([2]), 6)
    assert [t.tolist() for t in verdicts.in_order()] == [[1, STOOD, 6], [4, STOOD, 0]]
    assert Waiting(iter([samples])).take(1).goals is not None
