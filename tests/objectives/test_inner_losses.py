"""Every inner loss in losses and `perturb`: x' of a plain loop, with mining of each sample alone; embeddings."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from plain_pgd import loss_of, projected_step
from small_models import CLASSES, Undefined, assert_unchanged, batch, build, snapshot, with_bright
from torch import nn

from bt_fast import (
    APGD,
    PGD,
    BulletTrain,
    Engine,
    MARTLoss,
    Oracle,
    PerSample,
    PGDLoss,
    ThreatModel,
    TRADESLoss,
    perturb,
)
from bt_fast.attack.inner import NAMES
from bt_fast.attack.start import ball_start, random_state, sorted_start

EPSILON, SIZE, STEPS = 0.06, 0.02, 4
CLOSE = {"rtol": 0, "atol": 1e-9}


def attack(norm="linf", **options):
    size = {"linf": (EPSILON, SIZE), "l2": (0.4, 0.15)}[norm]
    return PGD(*size, STEPS, norm, **options)


def plain_attack(model, x, y, start, pgd, inner, steps=STEPS, size=None):
    """x' of the textbook loop; `inner` a name, or a function of (outputs, clean outputs)."""
    with torch.no_grad():
        clean = model(x)
    x_adv = start
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        z = model(x_adv)
        value = loss_of(inner, z, y, clean.softmax(dim=1)) if isinstance(inner, str) else inner(z, clean).sum()
        (grad,) = torch.autograd.grad(value, x_adv)
        x_adv = projected_step(x_adv.detach(), grad, x, pgd.threat, size or pgd.step_size)
    return x_adv


def noise(x, norm):
    """As the TRADES code draws it: in l2 twice."""
    for _ in range(2 if norm == "l2" else 1):
        drawn = 0.001 * torch.randn(x.shape)
    return x + drawn


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("inner", NAMES)
def test_x_adv_is_that_of_a_plain_loop(inner, norm):
    model, (x, y) = build("conv_bn"), batch()
    torch.manual_seed(1)
    result = perturb(model, x, y, attack(norm, inner=inner))
    torch.manual_seed(1)
    expected = plain_attack(model.eval(), x, y, noise(x, norm), attack(norm), inner)
    torch.testing.assert_close(result, expected, **CLOSE)


@pytest.mark.parametrize("inner", NAMES)
def test_no_two_inner_losses_find_the_same(inner):
    model, (x, y) = build("conv_bn"), batch()
    result = []
    for name in (inner, NAMES[NAMES.index(inner) - 1]):
        torch.manual_seed(1)
        result.append(perturb(model, x, y, attack(inner=name)))
    assert not torch.allclose(*result, atol=1e-3)


@pytest.mark.parametrize("inner", ["margin", "cross_entropy"])
def test_pgd_training_as_bag_of_tricks_has_it(inner):
    """x' from a uniform start, of the margin or the cross-entropy; the update is the cross-entropy of x' alone."""
    model, (x, y) = build("conv_bn"), batch()
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    loss = PGDLoss(attack(inner=inner), engine="exact")(model, x, y)
    loss.backward()
    torch.manual_seed(1)
    start = (x + (2 * torch.rand(x.shape, dtype=x.dtype) - 1) * EPSILON).clamp(0, 1)
    x_adv = plain_attack(twin.eval(), x, y, start, attack(), inner)
    expected = F.cross_entropy(twin.train()(x_adv), y)
    expected.backward()
    assert_same_training(model, loss, twin, expected)


def assert_same_training(model, loss, twin, expected):
    torch.testing.assert_close(loss, expected, **CLOSE)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, **CLOSE)
    for b, c in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(b, c, **CLOSE)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("inner", [*NAMES, "a function"])
def test_with_mining_each_sample_is_attacked_as_if_alone(inner, norm):
    def own(z, rows):
        return (z - rows.clean_outputs).square().sum(dim=1) * (1 + rows.labels)

    model, (x, y) = build("conv_bn").eval(), batch(12)
    y = torch.where(torch.arange(12) % 3 == 0, y, model(x).argmax(dim=1))
    mining = BulletTrain(STEPS, 2, 1)
    mining.robust_fraction.fill_(0.4)
    pgd = attack(norm, inner=own if inner == "a function" else inner, start="uniform")
    details = perturb(model, x, y, pgd, mining, generator=torch.Generator().manual_seed(3), return_details=True)
    mining.observe(model(details.x_adv), y)
    assert set(details.steps.tolist()) == {1, 2, STEPS}
    numbers, seed = torch.arange(12), torch.Generator().manual_seed(3)
    starts = _starts(x, seed, pgd, numbers)
    for i, n in enumerate(details.steps.tolist()):
        one = x[i : i + 1], y[i : i + 1], starts[i : i + 1]
        size = pgd.step_size if n == STEPS else 1.7 * pgd.epsilon / n
        if inner == "a function":

            def alone(z, clean, label=y[i]):
                return (z - clean).square().sum(dim=1) * (1 + label)

        expected = plain_attack(model, *one, pgd, alone if inner == "a function" else inner, n, size)
        torch.testing.assert_close(details.x_adv[i : i + 1], expected, **CLOSE)


def _starts(x, generator, pgd, numbers):
    return sorted_start(x, None, None, random_state(x, generator), "uniform", pgd.threat, numbers)[1]


@pytest.mark.parametrize("inner", ["margin", "dlr", "lse"])
def test_the_oracle_groups_by_an_attack_of_the_same_inner_loss(inner):
    groups = {}
    for name in ("cross_entropy", inner):
        model, (x, y) = build("conv_bn"), batch(24)
        with torch.no_grad():
            model[-1].weight.mul_(3)
            y = model.eval()(x).argmax(dim=1)
        mining = BulletTrain(STEPS, 1, 0, policy=Oracle(STEPS))
        generator = torch.Generator().manual_seed(2)
        details = perturb(model, x, y, attack(inner=name), mining, generator=generator, return_details=True)
        groups[name] = details.group
        drawn = torch.Generator().manual_seed(2)
        _draw(x, drawn)
        start = _draw(x, drawn)
        x_adv = plain_attack(model, x, y, start, attack(), name, STEPS, 1.7 * EPSILON / STEPS)
        held = model(x_adv).argmax(dim=1) == y
        assert torch.equal(details.group == 2, held)
        assert 0 < held.sum() < len(held)


def _draw(x, generator):
    """The next start that is drawn by a generator with mining."""
    return sorted_start(x, None, None, random_state(x, generator), "normal", ThreatModel(EPSILON))[1]


@pytest.mark.parametrize("kind", [TRADESLoss, MARTLoss, PGDLoss])
@pytest.mark.parametrize("inner", [*NAMES, "a function"])
def test_every_loss_takes_every_inner_loss_exact_and_fast(kind, inner):
    def own(z, rows):
        return (z - rows.clean_outputs).abs().sum(dim=1)

    losses = []
    for engine in ("exact", "fast"):
        torch.manual_seed(0)
        model, (x, y) = build("conv_bn"), batch()
        criterion = kind(attack(inner=own if inner == "a function" else inner), engine=engine)
        loss = criterion(model, x, y)
        loss.backward()
        losses.append(loss.item())
        assert (criterion.last.x_adv - x).abs().max() > SIZE
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


# Embeddings


class Encoder(nn.Module):
    """Images [n, 1, 6, 6] to embeddings [n, d]."""

    def __init__(self, d):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.GELU(), nn.Flatten(), nn.Linear(48, d))

    def forward(self, x):
        return self.body(x)


def away(outputs, rows):
    """The squared distance of two embeddings, as RobustVLM ascends it."""
    return (outputs - rows.clean_outputs).square().sum(dim=1)


@pytest.mark.parametrize("engine", ["exact", Engine(fold=True)])
@pytest.mark.parametrize("d", [1, 2, 7])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_embedding_is_moved_away_from_that_of_the_clean_image_without_labels(norm, d, engine):
    model, (x, _) = build(lambda: Encoder(d)), batch()
    torch.manual_seed(1)
    details = perturb(model, x, None, attack(norm, inner=away, start="uniform"), engine=engine, return_details=True)
    torch.manual_seed(1)
    start = _ball(x, norm)
    twin = copy.deepcopy(model).eval()
    expected = plain_attack(twin, x, None, start, attack(norm), lambda z, clean: (z - clean).square().sum(dim=1))
    torch.testing.assert_close(details.x_adv, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(details.logits, twin(x).detach())
    assert details.group is None


def _ball(x, norm):
    return ball_start(x, attack(norm).threat)


def test_labels_of_embeddings_are_the_functions_own():
    """Of a table of prompts, say, which has more rows than an embedding has numbers."""
    table = torch.randn(40, 3, dtype=torch.float64)
    y = torch.arange(8) * 5

    def towards_others(outputs, rows):
        return F.cross_entropy(outputs @ table.T, rows.labels, reduction="none")

    model, (x, _) = build(lambda: Encoder(3)), batch()
    torch.manual_seed(1)
    result = perturb(model, x, y, attack(inner=towards_others))
    torch.manual_seed(1)
    start = noise(x, "linf")
    expected = plain_attack(
        model.eval(), x, y, start, attack(), lambda z, _: F.cross_entropy(z @ table.T, y, reduction="none")
    )
    torch.testing.assert_close(result, expected, **CLOSE)


def test_a_samples_own_tensors_are_those_of_its_label_where_samples_take_their_own_steps():
    texts, steps = torch.randn(8, 3, dtype=torch.float64), torch.tensor([1, 3, 0, 2, 3, 1, 0, 2])

    def from_its_text(outputs, rows):
        return -(outputs * texts[rows.labels]).sum(dim=1)

    model, (x, _) = build(lambda: Encoder(3)), batch()
    pgd = attack(inner=from_its_text, start="clean")
    result = perturb(model, x, torch.arange(8), pgd, per_sample=PerSample(steps))
    model.eval()
    for i, n in enumerate(steps.tolist()):
        row = slice(i, i + 1)
        one = plain_attack(model, x[row], None, x[row], attack(), lambda z, _, row=row: -(z * texts[row]).sum(dim=1), n)
        torch.testing.assert_close(result[row], one, **CLOSE)


# Bad input


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(36, 2)).double()

    def forward(self, x):
        return self.body(x)


REFUSED = {
    "no labels for a name": (
        lambda m, x, y: perturb(m, x, None, attack(inner="margin")),
        TypeError,
        "y must be the labels",
    ),
    "no labels by default": (
        lambda m, x, y: perturb(m, x, None, attack()),
        TypeError,
        r"which the inner loss 'kl' needs, got None: give them, or write PGD\(\.\.\., inner=function\)",
    ),
    "no labels for mining": (
        lambda m, x, y: perturb(m, x, None, attack(inner=away), BulletTrain(STEPS, 1, 0)),
        TypeError,
        "y must be the labels.*, which mining needs, got None: give them, or leave mining out",
    ),
    "no labels for a loss": (
        lambda m, x, y: PGDLoss(attack(inner=away))(m, x, None),
        TypeError,
        "y must be a tensor of int",
    ),
    "embeddings for mining": (
        lambda m, x, y: perturb(build(lambda: Encoder(1)), x, y, attack(inner=away), BulletTrain(STEPS, 1, 0)),
        ValueError,
        "model must return logits of shape",
    ),
    "embeddings for a loss": (
        lambda m, x, y: TRADESLoss(attack(inner=away))(build(lambda: Encoder(1)), x, y),
        ValueError,
        "model must return logits of shape",
    ),
    "images for embeddings": (
        lambda m, x, y: perturb(nn.Conv2d(1, 1, 3).double(), x, None, attack(inner=away)),
        ValueError,
        r"model must return outputs of shape \[8, d\], got \[8, 1, 4, 4\]",
    ),
    "dlr of two classes": (
        lambda m, x, y: perturb(Two(), x, y % 2, attack(inner="dlr")),
        ValueError,
        "write inner='margin'",
    ),
    "dlr of two classes, mining": (
        lambda m, x, y: TRADESLoss(attack(inner="dlr"), mining=BulletTrain(STEPS, 1, 0))(Two(), x, y % 2),
        ValueError,
        "write inner='margin'",
    ),
    "labels beyond the classes": (
        lambda m, x, y: PGDLoss(attack(inner="margin"))(m, x, y + CLASSES),
        ValueError,
        r"y must lie in 0\.\.4",
    ),
    "labels beyond the classes, the oracle": (
        lambda m, x, y: PGDLoss(attack(inner="dlr"), mining=BulletTrain(STEPS, 1, 0, policy="oracle"))(
            m, x, y + CLASSES
        ),
        ValueError,
        r"y must lie in 0\.\.4",
    ),
    "a function that returns a number": (
        lambda m, x, y: PGDLoss(attack(inner=lambda z, rows: z.sum()))(m, x, y),
        ValueError,
        r"inner must return shape \[8\]",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_with_nothing_changed(call, error, message):
    model, (x, y) = build("conv_bn"), batch()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        call(model, x, y)
    assert_unchanged(before, model)


@pytest.mark.parametrize("inner", [*NAMES, "a function"])
def test_nan_in_a_samples_gradient_is_reported_and_the_model_stays(inner):
    model, (x, y) = build(Undefined), with_bright([2, 5])
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"NaN for 2 of 8 samples.*: samples 2, 5"):
        PGDLoss(attack(inner=away if inner == "a function" else inner), engine="exact")(model, x, y)
    assert_unchanged(before, model)


@pytest.mark.parametrize("mined", [False, True])
@pytest.mark.parametrize("kind", [PGD, partial(PGD, keep="best"), APGD], ids=["last", "best", "apgd"])
def test_a_function_that_gives_nan_with_a_sound_gradient_is_reported(kind, mined):
    """No iterate is greater than NaN, so that what keeps the best one would keep the start."""

    def inner(outputs, rows):
        value = outputs.square().sum(dim=1)
        return value + torch.where(rows.labels == 1, torch.nan, 0.0)

    model, (x, y) = build("conv_bn"), batch()
    mining = BulletTrain(STEPS, STEPS, STEPS) if mined else None
    size = () if kind is APGD else (0.03,)
    modules = [model] if mining is None else [model, mining]
    before, message = snapshot(*modules), rf"held NaN for {int((y == 1).sum())} of 8 samples.*, or in inner where"
    with pytest.raises(ValueError, match=message):
        PGDLoss(kind(0.1, *size, STEPS, inner=inner), mining=mining, engine="exact")(model, x, y)
    assert_unchanged(before, *modules)
