import weakref
from types import SimpleNamespace
from unittest import mock

import foolbox
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_pgd import STOOD, loss_of, plain_loop
from pretended_device import DEVICE, pretended_device
from small_models import Undefined, assert_unchanged, batch, build, looked_at, snapshot, with_bright

from bt_fast import PGD, Frozen, ThreatModel
from bt_fast.attack import early_exit
from bt_fast.attack.start import uniform_start
from bt_fast.evaluation import evaluate

LINF, L2 = ThreatModel(0.1), ThreatModel(0.5, "l_2")
NORMS, LOSSES = ["l_inf", "l_2"], ["ce", "margin"]
ALL_LOSSES = [*LOSSES, "dlr", "lse", "kl"]


class Thresholds(torch.nn.Module):
    """Predicts class 1 where the only pixel exceeds 1/2, so that it is known what breaks, and by how much."""

    def forward(self, x):
        z = 10 * (x.flatten(1) - 0.5)
        return torch.cat([-z, z], dim=1)


class Beyond(Thresholds):
    """Multiplies the logits, where the pixel exceeds 1/2, by a function of 0 with a value or slope that may be NaN."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        beyond = x.flatten(1) > 0.5
        factor = self.factor(torch.where(beyond, x.flatten(1) * 0, 1.0))
        return super().forward(x) * torch.where(beyond, factor, 1.0)


def pixels(*values):
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1)


def counts(result):
    return result.clean_correct, result.robust_correct, result.total


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


def seed_of(number):
    """Returns the seed of the random starts in an evaluation with `generator(number)`."""
    return torch.randint(2**63 - 1, (), generator=generator(number))


def classifier(m, name="conv_bn", seed=0):
    """Returns a model, images, and labels that it gets right except every fifth; no class wins everywhere."""
    model, (x, _) = build(name, seed), batch(m, seed)
    model.eval()
    with torch.no_grad():
        centre = model(batch(64, seed + 1)[0]).mean(dim=0)
    layer = [child for child in model.modules() if isinstance(child, torch.nn.Linear)][-1]
    layer.bias.data -= centre
    y = model(x).argmax(dim=1)
    y[::5] = (y[::5] + 1) % 5
    return model, x, y


def in_batches(x, y, size):
    return zip(x.split(size), y.split(size), strict=True)


def fate(result):
    return list(zip(result.restart.tolist(), result.step.tolist(), strict=True))


class Sizes:
    """Records the number of samples in each forward of a model, and the contents of `notes` at that time."""

    def __init__(self, model, note=lambda: None):
        self.seen = []
        looked_at(model)
        self.hook = model.register_forward_hook(lambda _, args, __: self.seen.append((len(args[0]), note())))

    def __iter__(self):
        return iter(n for n, _ in self.seen)


# Counts


def test_a_sample_is_robust_if_its_margin_exceeds_epsilon():
    x = pixels(0.0, 0.39, 0.45, 0.55, 0.61, 1.0, 0.7)
    y = torch.tensor([0, 0, 0, 1, 1, 1, 0])
    result = evaluate(Thresholds(), [(x, y)], LINF, steps=5)
    assert counts(result) == (6, 4, 7)
    assert (result.clean, result.robust) == (6 / 7, 4 / 7)
    assert result.robust_samples.tolist() == [0, 1, 4, 5]
    assert result.restart.tolist() == [STOOD, STOOD, 1, 1, STOOD, STOOD, 0]


def test_l2_breaks_what_lies_within_the_radius():
    x, y = pixels(0.01, 0.2, 0.99), torch.tensor([0, 0, 1])
    assert evaluate(Thresholds(), [(x, y)], L2, steps=5).robust_correct == 0
    assert evaluate(Thresholds(), [(x, y)], ThreatModel(0.4, "l_2"), steps=5).robust_correct == 2


def test_the_random_start_and_the_last_iterate_count():
    x, y = pixels(0.4999, 0.4), torch.tensor([0, 0])
    threat = ThreatModel(0.101)
    result = [
        evaluate(Thresholds(), [(x, y)], threat, steps=1, step_size=0.202, generator=generator(s)) for s in (0, 3)
    ]
    assert {fate(f)[0] for f in result} == {(1, 0), (1, 1)}
    assert {fate(f)[1] for f in result} == {(1, 1)}


# Equal to the plain loop


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ALL_LOSSES)
@settings(max_examples=12, deadline=None)
@given(
    m=st.integers(1, 24),
    size=st.integers(1, 24),
    steps=st.integers(1, 6),
    restarts=st.integers(1, 3),
    scale=st.sampled_from([1e-6, 0.3, 1.0, 1.0, 3.0, 10.0]),  # from none to all samples are broken
    name=st.sampled_from(["conv_bn", "normalising", "tied norm"]),
    burst=st.integers(1, 8),
    seed=st.integers(0, 1000),
)
def test_each_sample_fares_as_in_the_plain_loop(norm, loss, m, size, steps, restarts, scale, name, burst, seed):
    model, x, y = classifier(m, name, seed)
    threat = ThreatModel({"l_inf": 0.05, "l_2": 0.3}[norm] * scale, norm)
    with mock.patch.object(early_exit, "burst_length", return_value=burst):
        result = evaluate(
            model,
            in_batches(x, y, size),
            threat,
            steps=steps,
            restarts=restarts,
            loss=loss,
            generator=generator(seed),
        )
    size = 2 * threat.epsilon / steps
    options = {"steps": steps, "step_size": size, "restarts": restarts, "loss": loss, "seed": seed_of(seed)}
    restart, step = plain_loop(model.eval(), x, y, threat, **options)
    assert fate(result) == list(zip(restart.tolist(), step.tolist(), strict=True))
    assert counts(result) == (int((restart != 0).sum()), int((restart == STOOD).sum()), m)


@pytest.mark.filterwarnings("ignore:epsilon=")
@pytest.mark.parametrize(("scale", "least", "most"), [(1e-6, 32, 32), (0.5, 5, 28), (20.0, 0, 0)])
def test_none_some_and_all_of_the_hypothesis_are_reached(scale, least, most):
    model, x, y = classifier(40)
    result = evaluate(model, [(x, y)], ThreatModel(0.05 * scale), steps=4, generator=generator())
    assert result.clean_correct == 32
    assert least <= result.robust_correct <= most


def test_the_loss_may_be_the_attacks_own_or_a_function():
    model, x, y = classifier(40)

    def run(attack, **options):
        return fate(evaluate(model, in_batches(x, y, 16), attack, generator=generator(), **options))

    def squared(z, rows):  # of probabilities, as "lse"
        return (z.softmax(dim=1) - rows.clean_outputs.softmax(dim=1)).square().sum(dim=1)

    size = 0.05, 0.025, 4
    assert run(PGD(*size, inner="margin")) == run(PGD(*size), loss="margin") != run(PGD(*size))
    assert run(PGD(*size), loss="cross_entropy") == run(PGD(*size), loss="ce") == run(PGD(*size))
    assert run(PGD(*size, inner=squared)) == run(PGD(*size), loss=squared) == run(PGD(*size), loss="lse")
    with pytest.raises(ValueError, match="the attack ascends 'margin', but loss is 'ce': leave one of the two out"):
        run(PGD(*size, inner="margin"), loss="ce")


def test_dlr_needs_three_classes_and_running_statistics():
    stream = [(pixels(0.1, 0.9), torch.tensor([0, 1]))]
    with pytest.raises(ValueError, match=r"inner='dlr'.*K >= 3 classes, got 2: write inner='margin'"):
        evaluate(Thresholds(), stream, LINF, loss="dlr")
    with pytest.raises(ValueError, match=r"statistics must be 'running' in an evaluation, got 'batch': .*: leave stat"):
        evaluate(Thresholds(), stream, PGD(0.1, 0.03, 3, statistics="batch"))


def test_a_frozen_view_judges_alike():
    model, x, y = classifier(40)
    result = [
        evaluate(model, in_batches(x, y, 16), LINF, steps=4, restarts=2, generator=generator(), frozen=view)
        for view in (None, Frozen())
    ]
    assert fate(result[0]) == fate(result[1])


@pytest.mark.parametrize("norm", NORMS)
def test_neither_batches_nor_bursts_nor_neighbours_change_a_samples_fate(norm):
    model, x, y = classifier(32)
    threat = {"l_inf": LINF, "l_2": L2}[norm]
    fates = []
    for size, burst in ((32, 1), (32, 5), (7, 1), (5, 3), (1, 2)):
        with mock.patch.object(early_exit, "burst_length", return_value=burst):
            batches = in_batches(x, y, size)
            fates.append(fate(evaluate(model, batches, threat, steps=4, restarts=2, generator=generator())))
    assert all(f == fates[0] for f in fates)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("norm", NORMS)
def test_samples_fall_where_foolbox_makes_them_fall(norm, loss):
    model, x, y = classifier(48)
    x = 0.5 + 0.2 * (x - 0.5)  # in l_2 foolbox clips pixels after the projection, so none may need clipping here
    y = torch.where(torch.arange(48) % 5 == 0, y, model(x).argmax(dim=1))
    threat, steps = {"l_inf": ThreatModel(0.03), "l_2": ThreatModel(0.15, "l_2")}[norm], 6
    size = 2 * threat.epsilon / steps
    result = evaluate(model, in_batches(x, y, 20), threat, steps=steps, loss=loss, generator=generator(1))

    kind = {"l_inf": foolbox.attacks.LinfPGD, "l_2": foolbox.attacks.L2PGD}[norm]
    start = uniform_start(x, torch.arange(48), 0, threat, seed_of(1))
    theirs = foolbox.PyTorchModel(model.eval(), bounds=(0, 1))
    expected = torch.where(model(x).argmax(dim=1) != y, 0, STOOD)
    for t in range(steps + 1):
        attack = kind(steps=t, abs_stepsize=size, random_start=False)
        attack.random_start, attack.get_random_start = True, lambda x0, _: type(x0)(start)
        attack.get_loss_fn = lambda run, at: lambda z: type(z)(loss_of(loss, run(z).raw, at.raw))
        x_adv = attack.run(theirs, x, foolbox.criteria.Misclassification(y), epsilon=threat.epsilon)
        expected[(expected == STOOD) & (model(x_adv).argmax(dim=1) != y)] = t
    assert result.step.tolist() == expected.tolist()
    assert len(set(result.step.tolist())) >= 4  # early, late and never


# Cost


@pytest.mark.parametrize("size", [40, 12, 7])
def test_a_sample_costs_what_it_lives_through(size):
    model, x, y = classifier(40)
    sizes = Sizes(model)
    result = evaluate(model, in_batches(x, y, size), LINF, steps=4, restarts=3, generator=generator())
    lived = sum(0 if r == 0 else 3 * 5 if r == STOOD else (r - 1) * 5 + t + 1 for r, t in fate(result))
    assert sum(sizes) == 40 + lived
    assert 0 < result.robust_correct < 20


def test_nothing_is_attacked_that_has_fallen():
    model = Thresholds()
    sizes = Sizes(model)
    evaluate(model, [(pixels(0.9, 0.9), torch.tensor([0, 0]))], LINF, steps=3, restarts=4)
    assert list(sizes) == [2]


def test_the_last_iterate_of_all_runs_no_backward():
    model = Thresholds()
    sizes = Sizes(model, torch.is_grad_enabled)
    evaluate(model, [(pixels(0.1, 0.9), torch.tensor([0, 1]))], LINF, steps=2)
    assert sizes.seen == [(2, False), (2, True), (2, True), (2, False)]


def test_the_attack_runs_on_full_batches_while_any_sample_waits():
    model, x, y = classifier(60)
    left = list(in_batches(x, y, 6))
    stream = iter(lambda: left.pop(0) if left else None, None)
    sizes = Sizes(model, lambda: (torch.is_grad_enabled(), len(left)))
    evaluate(model, stream, LINF, steps=4, restarts=2, generator=generator())
    attacks = [n for n, (attacked, waiting) in sizes.seen if attacked and waiting]
    assert len(attacks) > 10
    assert set(attacks) == {6}


@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_no_more_than_two_batches_are_held(scale):
    model, x, y = classifier(80)
    read, decided, most, batches = 0, 0, [], []

    def stream():
        nonlocal read
        for start in range(0, 80, 8):
            assert sum(b() is not None for b in batches) <= 1  # the caller still holds the last
            one = x[start : start + 8].clone()
            batches.append(weakref.ref(one))
            read += 8
            most.append(read - decided)
            yield one, y[start : start + 8]

    def progress(count):
        nonlocal decided
        assert count > decided
        decided = count

    result = evaluate(model, stream(), ThreatModel(0.1 * scale), steps=3, generator=generator(), progress=progress)
    assert decided == result.total == 80
    assert max(most) <= 16


def test_a_gpu_is_read_once_in_a_burst_of_up_to_eight_steps():
    elsewhere = SimpleNamespace(is_cpu=False)
    lengths = {steps: early_exit.burst_length(steps, elsewhere) for steps in (1, 7, 10, 20, 100, 1000)}
    assert lengths == {1: 2, 7: 8, 10: 6, 20: 7, 100: 8, 1000: 8}
    assert early_exit.burst_length(20, torch.zeros(1)) == 1


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["cross_entropy", "margin", "dlr"])
def test_the_host_waits_at_the_end_of_a_burst_only(norm, loss):
    model = build().to(DEVICE).eval()
    with pretended_device() as reads:
        seed = torch.zeros((), dtype=torch.int64, device=DEVICE)
        attack = early_exit.Attack(ThreatModel(0.1, norm), loss, 20, 0.01, 1, seed)
        batch_there = early_exit.WorkingBatch(attack, torch.empty(5, 1, 6, 6, dtype=torch.float64, device=DEVICE))
        batch_there._count = 5
        sizes = Sizes(model)
        batch_there._advance(model)
    assert list(sizes) == [5] * 7
    assert (reads.started, reads.waited) == (1, 1)


# Preserved state


def test_the_model_comes_back_as_it_was():
    model, (x, y) = build("conv_bn"), batch(6)
    model[1].eval()
    before = snapshot(model)
    evaluate(model, [(x, y)], LINF, steps=2, generator=generator())
    assert_unchanged(before, model)


def test_the_images_stay_as_they_were_and_need_no_gradient():
    model, x, y = classifier(6)
    given_x = x.clone().requires_grad_()
    evaluate(model, [(given_x, y)], LINF, steps=2)
    assert torch.equal(given_x, x)
    assert given_x.grad is None


def test_inference_mode_is_no_obstacle():
    with torch.inference_mode():
        result = evaluate(Thresholds(), [(pixels(0.0, 0.45, 1.0), torch.tensor([0, 0, 1]))], LINF, steps=5)
    assert counts(result) == (3, 2, 3)


# Bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 1.5}, TypeError, "steps.*1.5"),
        ({"restarts": 0}, ValueError, "restarts must be at least 1, got 0"),
        ({"step_size": -0.1}, ValueError, "step_size.*-0.1"),
        ({"loss": "hinge"}, ValueError, "loss must be one of 'kl', 'cross_entropy', .* or a function .*, got 'hinge'"),
        ({"loss": 3}, TypeError, "loss must be one of"),
        ({"engine": "bf16"}, ValueError, "engine must have the model's own precision"),
        ({"frozen": Frozen(autocast=torch.bfloat16)}, ValueError, "engine must have the model's own precision"),
    ],
)
def test_bad_options_are_named(options, error, message):
    stream = iter([(pixels(0.1), torch.tensor([0]))])
    with pytest.raises(error, match=message):
        evaluate(Thresholds(), stream, LINF, **options)
    assert next(stream, None) is not None  # nothing has been read


X, Y = torch.rand(6, 1, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 0])


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (X, Y + 5, ValueError, r"labels must lie in 0\.\.4, but 6 of 6"),
        (X, Y - 9, ValueError, r"labels must lie in 0\.\.4, but 6 of 6"),
        (X, Y[:3], ValueError, r"labels must have shape \[6\].*\[3\]"),
        (X, Y.double(), TypeError, "labels must be integers.*float64"),
        (X + 1, Y, ValueError, r"images must lie in \[0, 1\]"),
        (X * float("nan"), Y, ValueError, "images.*NaN"),
        (X.mul(255).byte(), Y, TypeError, "images must be floating point.*uint8"),
        (X[:0], Y[:0], ValueError, "images must be at least 1"),
    ],
)
def test_bad_batches_are_named(x, y, error, message):
    with pytest.raises(error, match=message):
        evaluate(build("conv_bn"), [(x, y)], LINF, steps=1)


def test_a_model_that_gives_nan_is_not_robust_but_an_error():
    model = build("conv_bn")
    model[-1].bias.data[2] = float("nan")
    with pytest.raises(ValueError, match="the model's logits must be finite, but 6 of 6"):
        evaluate(model, [(X, Y)], LINF, steps=1)


@pytest.mark.parametrize("threat", [LINF, L2])
def test_a_gradient_with_nan_is_not_robust_but_an_error(threat):
    model = build(Undefined)
    x, _ = with_bright([0, 6])
    y = model.eval()(x).argmax(dim=1)
    with pytest.raises(ValueError, match=r"input gradient must be finite, but held NaN for 2 of 8 samples"):
        evaluate(model, [(x, y)], threat, steps=1, step_size=1e-3)


def test_what_lies_behind_a_fall_is_no_fault():
    model = Beyond(lambda zero: 1 + 0 * zero.sqrt())  # the root has an infinite derivative at 0
    x, y = pixels(0.45, 0.3), torch.tensor([0, 0])
    assert counts(evaluate(model, [(x, y)], LINF, steps=5, generator=generator())) == (2, 1, 2)


def test_an_iterate_without_logits_is_not_robust_but_an_error():
    model = Beyond(lambda zero: zero / zero)
    x, y = pixels(0.45, 0.3), torch.tensor([0, 0])
    with pytest.raises(ValueError, match=r"the model's logits must be finite, but 1 of 2 rows"):
        evaluate(model, [(x, y)], LINF, steps=5, generator=generator())


@pytest.mark.parametrize("other", [X[..., :5], X.float()])
def test_batches_that_differ_are_named(other):
    with pytest.raises(ValueError, match=r"the images must be alike in all batches, got \[.*\] .* on cpu after \["):
        evaluate(build("conv_bn"), [(X, Y), (other, Y)], LINF, steps=1)


def test_no_samples_are_an_error():
    with pytest.raises(ValueError, match="batches must hold at least 1 sample"):
        evaluate(Thresholds(), [], LINF)


@pytest.mark.parametrize("threat", [LINF, L2], ids=NORMS)
def test_parts_that_know_the_number_of_their_first_sample_fare_as_in_the_whole(threat):
    model, x, y = classifier(23)
    options = {"steps": 3, "step_size": 0.01, "restarts": 2}
    whole = evaluate(model, [(x, y)], threat, generator=generator(), **options)
    parts = [
        evaluate(model, [(x[a:b], y[a:b])], threat, generator=generator(), first=a, **options)
        for a, b in ((0, 9), (9, 10), (10, 23))
    ]
    assert torch.equal(torch.cat([part.restart for part in parts]), whole.restart)
    assert torch.equal(torch.cat([part.step for part in parts]), whole.step)
    assert len(set(whole.restart.tolist())) > 2
    with pytest.raises(ValueError, match="first must be at least 0, got -1"):
        evaluate(model, [(x, y)], threat, first=-1)


@pytest.mark.parametrize("attack", [PGD(0.0, 0.0, 5), PGD(0.0, 0.1, 5, "l2"), ThreatModel(0.0)])
def test_at_an_epsilon_of_0_every_sample_that_is_right_stands_and_no_step_is_run(attack):
    model, x, y = classifier(20)
    seen, drawing = [], generator()
    with mock.patch.object(early_exit.WorkingBatch, "run", side_effect=AssertionError("a step")):
        result = evaluate(model, in_batches(x, y, 8), attack, restarts=3, generator=drawing, progress=seen.append)
    assert counts(result) == (16, 16, 20)
    assert fate(result) == [(0, 0) if i % 5 == 0 else (STOOD, STOOD) for i in range(20)]
    assert seen[-1] == 20
    assert not torch.equal(drawing.get_state(), generator().get_state()), "it draws as at any other"


def test_restarts_begin_anywhere_in_the_ball_or_at_x():
    model, x, y = classifier(4)
    attack = PGD(0.1, 0.03, 2, start="normal", inner="cross_entropy")
    with pytest.raises(
        ValueError, match="attack must start anywhere in the ball or at x, got start='normal': leave start out"
    ):
        evaluate(model, [(x, y)], attack)
