"""Options of the losses: label smoothing, how often the clean batch moves batch norm, a further term."""

import copy
import math
import pickle
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from emulated_device import EmulatedDevice
from hypothesis import given, settings
from hypothesis import strategies as st
from mixed_images import mixup
from small_models import CLASSES, MODELS, Undefined, assert_unchanged, batch, build, gradients, looked_at, snapshot
from test_soft_labels import confident, own_labels, seeded
from tolerances import UPDATES, assert_near, assert_near_nested
from torch import nn

from bt_fast import (
    PGD,
    AdversarialLoss,
    AugMixLoss,
    BulletTrain,
    Engine,
    Guard,
    MARTLoss,
    Normalization,
    Normalize,
    PGDLoss,
    TRADESLoss,
    UpdateBatch,
    ops,
)
from bt_fast.objectives.cross_entropy import CrossEntropy

ATTACK = PGD(0.1, 0.03, 4)
KINDS = pytest.mark.parametrize("kind", [TRADESLoss, MARTLoss, PGDLoss])
MINED = pytest.mark.parametrize(
    "mining", [None, BulletTrain(4, 2, 0), BulletTrain(4, 0, 0)], ids=["uniform", "mined", "skipping"]
)


def backward_of(loss, model):
    model.zero_grad()
    loss.backward()
    return {"loss": loss.detach(), **gradients(model), **{n: b.clone() for n, b in model.named_buffers()}}


# Label smoothing


@st.composite
def rows(draw):
    m, k = draw(st.integers(1, 5)), draw(st.integers(2, 12))
    g = seeded(draw(st.integers(0, 1000)))
    z = draw(st.sampled_from([0.1, 3.0, 100.0])) * torch.randn(m, k, generator=g, dtype=torch.float64)
    y = torch.randint(k, (m,), generator=g)
    soft = draw(st.sampled_from([0.0, 0.2, 3.0])) * torch.rand(m, k, generator=g, dtype=torch.float64)
    return z, y, (soft + F.one_hot(y, k)) / (soft.sum(dim=1, keepdim=True) + 1.0)


SMOOTHING = st.sampled_from([0.0, 0.1, 0.5, 0.99])


@settings(max_examples=100, deadline=None)
@given(rows=rows(), s=SMOOTHING, soft=st.booleans())
def test_smoothing_as_torch_has_it(rows, s, soft):
    z, y, distributions = rows
    labels = distributions if soft else y
    assert_near(CrossEntropy(s)(z, labels), F.cross_entropy(z, labels, label_smoothing=s))


@settings(max_examples=100, deadline=None)
@given(rows=rows(), s=SMOOTHING, soft=st.booleans())
def test_smoothing_over_the_other_classes(rows, s, soft):
    z, y, distributions = rows
    k = z.shape[1]
    of_class = torch.full((k, k), s / (k - 1), dtype=torch.float64).fill_diagonal_(1.0 - s)
    target = (distributions if soft else F.one_hot(y, k).double()) @ of_class
    expected = -(target * F.log_softmax(z, dim=1)).sum(dim=1).mean()
    assert_near(CrossEntropy(s, "others")(z, distributions if soft else y), expected)


@pytest.mark.parametrize("smoothing", ["torch", "others"])
def test_without_smoothing_it_is_the_cross_entropy_to_the_bit(smoothing):
    z, y = torch.randn(6, 4, generator=seeded(0)), torch.arange(6) % 4
    assert torch.equal(CrossEntropy(0.0, smoothing)(z, y), F.cross_entropy(z, y))


def test_16_bits_are_computed_in_single_precision():
    z, y = torch.randn(6, 4, generator=seeded(0)).bfloat16(), torch.arange(6) % 4
    for labels in (y, F.one_hot(y, 4).bfloat16()):
        value = CrossEntropy(0.1, "others")(z, labels)
        assert value.dtype == torch.float32
        assert_near(value, CrossEntropy(0.1, "others")(z.double(), y), torch.float32)


@KINDS
@pytest.mark.parametrize("smoothing", ["torch", "others"])
@pytest.mark.parametrize("mined", [False, True])
def test_a_smoothed_loss_is_the_loss_of_smoothed_labels(kind, smoothing, mined):
    """But for the attack, which sees the labels as they are given; the inner loss "kl" sees none."""
    model, (x, y) = confident(), batch(12)
    results = []
    for s in (0.2, 0.0):
        torch.manual_seed(0)
        mining = BulletTrain(4, 2, 0) if mined else None
        criterion = kind(
            PGD(0.1, 0.03, 4, inner="kl"), mining=mining, label_smoothing=s, smoothing=smoothing, engine="exact"
        )
        target = CrossEntropy(0.2, smoothing).target(y, torch.zeros(12, CLASSES, dtype=torch.float64))
        twin = copy.deepcopy(model)
        results.append(backward_of(criterion(twin, x, y if s else target), twin))
    assert_near_nested(*results)


@pytest.mark.parametrize("kind", [TRADESLoss, MARTLoss, PGDLoss, AugMixLoss])
def test_smoothing_may_be_set_later(kind):
    criterion = kind() if kind is AugMixLoss else kind(ATTACK)
    criterion.label_smoothing, criterion.smoothing = 0.2, "others"
    assert criterion.cross_entropy == CrossEntropy(0.2, "others")
    with pytest.raises(ValueError, match="label_smoothing must lie in"):
        criterion.label_smoothing = 1.0
    assert criterion.label_smoothing == 0.2
    assert criterion.smoothing == "others"


def test_augmix_smooths_its_cross_entropy():
    model, (x, y) = build("conv_bn"), batch(8)
    values = []
    for options in ({}, {"label_smoothing": 0.2}):
        values.append(AugMixLoss(engine="exact", **options)(copy.deepcopy(model), x, y, generator=seeded(0)))
    with torch.no_grad():
        views = []
        model.register_forward_hook(lambda m, args, out: views.append(out))
        AugMixLoss(engine="exact")(model, x, y, generator=seeded(0))
    clean = views[0][:8]
    assert_near(values[1] - values[0], F.cross_entropy(clean, y, label_smoothing=0.2) - F.cross_entropy(clean, y))


# How often batch norm moves


@pytest.mark.parametrize("name", MODELS)
def test_one_clean_update_is_one_clean_forward(name):
    """DM-Improves-AT's update: the clean batch, then the adversarial one."""
    model, (x, y) = looked_at(build(name)), batch(8)
    twin = copy.deepcopy(model)
    torch.manual_seed(0)
    criterion = TRADESLoss(ATTACK, 5.0, clean_updates=1, engine="exact")
    ours = backward_of(criterion(model, x, y), model)
    torch.manual_seed(0)
    torch.randn(x.shape)  # the start's noise
    z, z_adv = twin(x), twin(criterion.last.x_adv)
    loss = F.cross_entropy(z, y) + 5.0 * F.kl_div(z_adv.log_softmax(1), z.softmax(1), reduction="batchmean")
    assert_near_nested(ours, backward_of(loss, twin), UPDATES)


@MINED
def test_two_clean_updates_differ_in_batch_norms_buffers_alone(mining):
    model, (x, y) = confident(), batch(8)
    results = []
    for clean_updates in (2, 1):
        torch.manual_seed(0)
        criterion = TRADESLoss(ATTACK, mining=copy.deepcopy(mining), clean_updates=clean_updates, engine="exact")
        twin = copy.deepcopy(model)
        results.append(backward_of(criterion(twin, x, y), twin))
        moved = [n for n in results[-1] if n.endswith("num_batches_tracked")]
        adversarial = 1 if mining is None or mining.robust_steps or bool((criterion.last.steps > 0).any()) else 0
        assert [int(results[-1][n]) for n in moved] == [clean_updates + adversarial] * 2
    two, one = results
    assert all(torch.equal(two[n], one[n]) == (not n.split(".")[-1].startswith(("running", "num"))) for n in two)


def test_clean_updates_and_smoothing_are_numbers_of_a_graph():
    def run(engine):
        model, result = build("conv_bn"), []
        options = ({}, {"clean_updates": 1}, {"label_smoothing": 0.2}, {"label_smoothing": 0.2, "smoothing": "others"})
        criteria = [TRADESLoss(ATTACK, engine=engine, **o) for o in options]
        shared = criteria[0]._cache  # as a user's loss has one cache, whatever changes about it
        for criterion in criteria:
            criterion._cache = shared
        for k in range(8):
            torch.manual_seed(k)
            loss = criteria[k % 4](model, *batch(6, seed=k))
            loss.backward()
            result += [v.detach().clone() for v in (loss, *(p.grad for p in model.parameters()), *model.buffers())]
            model.zero_grad()
        return result, criteria[0].explain()

    expected, _ = run("exact")
    with EmulatedDevice() as emulated:
        result, explained = run(Engine(graphs=True))
    assert "update: from CUDA graphs, 4 captured" in explained
    assert all(torch.equal(a, b) for a, b in zip(emulated.shuffled(0, result), expected, strict=True))


# A further term


class Noted:
    """A further term that keeps the batch that it is given."""

    def __call__(self, given):
        self.batch = given
        return 0.0 * given.adversarial_logits.sum()


@KINDS
@MINED
@pytest.mark.parametrize("soft", [False, True])
def test_its_batch_is_in_the_callers_order(kind, mining, soft):
    model, (x, y) = confident(), batch(12)
    y = own_labels(model, x)
    y = mixup(x, y, CLASSES)[1] if soft else y.int()
    noted = Noted()
    criterion = kind(ATTACK, mining=copy.deepcopy(mining), extra=noted, engine="exact")
    criterion(model, x, y)
    given, last = noted.batch, criterion.last
    assert isinstance(given, UpdateBatch)
    assert torch.equal(given.x, x)
    assert torch.equal(given.x_adv, last.x_adv)
    assert torch.equal(given.adversarial_logits, last.adversarial_logits)
    assert given.adversarial_logits.requires_grad
    if kind is PGDLoss:
        assert given.logits is None
    else:
        assert torch.equal(given.logits, last.logits)
        assert given.logits.requires_grad
    assert torch.equal(given.y, y.double() if soft else y.long())
    assert given.y.dtype == (torch.float64 if soft else torch.int64)
    assert not torch.equal(last.x_adv, x)


@MINED
def test_the_gradient_of_each_sample_is_its_own(mining):
    """A term with a weight for each sample, and a teacher's logits that were made before the attack."""
    model, (x, y) = confident(), batch(12)
    y = own_labels(model, x)
    weights = torch.rand(12, generator=seeded(0)).double()
    teacher = build("conv_bn", seed=3).eval()
    learnt = teacher(x).detach()

    def term(z, z_adv):
        return (weights * (z - learnt).square().sum(dim=1)).mean() + (
            weights * (z_adv - learnt).abs().sum(dim=1)
        ).mean()

    results = []
    for with_extra in (True, False):
        torch.manual_seed(0)
        twin = copy.deepcopy(model)
        extra = partial(lambda b: term(b.logits, b.adversarial_logits)) if with_extra else None
        criterion = TRADESLoss(ATTACK, mining=copy.deepcopy(mining), extra=extra, clean_updates=1, engine="exact")
        result = backward_of(criterion(twin, x, y), twin)
        if not with_extra:  # the term by hand, on the same batches
            other, last = copy.deepcopy(model), criterion.last
            z = other(x)
            z_adv = z.clone()
            taken = last.steps > 0 if mining is not None and not mining.robust_steps else torch.ones(12).bool()
            z_adv[taken] = other(last.x_adv[taken])
            by_hand = backward_of(term(z, z_adv), other)
            result = {
                n: v + by_hand[n] if n == "loss" or n in dict(twin.named_parameters()) else v for n, v in result.items()
            }
        results.append(result)
    assert_near_nested(*results)


def test_it_runs_in_the_modes_of_the_update_and_moves_batch_norm_last():
    model, (x, y) = build("conv_bn"), batch(8)
    twin, modes = copy.deepcopy(model), []

    def helper(given):
        modes.append(model.training)
        return F.cross_entropy(model(given.x + 2 * (given.x_adv - given.x)), given.y)

    model.eval()
    criterion = TRADESLoss(ATTACK, extra=helper, clean_updates=1, engine="exact")
    criterion(model, x, y).backward()
    assert modes == [True]
    assert not model.training
    x_adv = criterion.last.x_adv
    for images in (x, x_adv, x + 2 * (x_adv - x)):
        twin(images)
    assert_near_nested({n: b for n, b in model.named_buffers()}, {n: b for n, b in twin.named_buffers()})


def test_normalised_images_arrive_as_the_caller_has_them():
    mean, std = (0.4,), (0.25,)
    model, (x, y) = build("conv_bn"), batch(8)
    normalized = Normalize(mean, std).double()(x)
    noted = Noted()
    attack = PGD(0.1, 0.03, 4, normalization=Normalization(mean, std))
    criterion = TRADESLoss(attack, mining=BulletTrain(4, 0, 0), extra=noted, engine="exact")
    criterion(model, normalized, y)
    assert torch.equal(noted.batch.x, normalized)
    assert torch.equal(noted.batch.x_adv, criterion.last.x_adv)
    assert 0 < (noted.batch.x_adv - normalized).abs().max() <= 0.1 / 0.25 + 1e-6


def test_a_module_is_a_part_of_the_loss_and_is_trained():
    class Distillation(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(CLASSES, CLASSES).double()

        def forward(self, given):
            return F.mse_loss(self.head(given.logits), given.adversarial_logits)

    model, (x, y) = build("conv_bn"), batch(8)
    criterion = MARTLoss(ATTACK, extra=Distillation(), engine="exact")
    criterion(model, x, y).backward()
    assert "extra.head.weight" in criterion.state_dict()
    assert criterion.extra.head.weight.grad.abs().sum() > 0
    assert "extra=Distillation" in repr(criterion) or "(extra): Distillation" in repr(criterion)


def test_the_loss_keeps_its_dtype():
    model, (x, y) = build("conv_bn", dtype=torch.float32), batch(8, dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float64):
        loss = TRADESLoss(ATTACK, extra=lambda b, d=dtype: b.logits.sum().to(d) * 0 + 1, engine="exact")(model, x, y)
        assert loss.dtype == torch.float32


def test_under_bf16_it_gets_16_bit_logits():
    model, (x, y) = build("conv_bn", dtype=torch.float32), batch(8, dtype=torch.float32)
    noted = Noted()
    loss = TRADESLoss(ATTACK, mining=BulletTrain(4, 1, 0), extra=noted, engine="bf16")(model, x, y)
    loss.backward()
    assert loss.dtype == torch.float32
    assert noted.batch.logits.dtype == torch.bfloat16


class Keyed(AdversarialLoss):
    """A further term as a loss of one's own, which a graph may capture."""

    def objective(self, clean_logits, adversarial_logits, y):
        robust = ops.trades_kl(adversarial_logits, clean_logits) / len(y)
        return robust + F.mse_loss(clean_logits, adversarial_logits)

    def graph_key(self):
        return ()


@pytest.mark.parametrize("with_extra", [True, False])
def test_an_update_with_it_runs_eagerly_and_says_so(with_extra):
    def run(engine):
        model, result = build("conv_bn"), []
        extra = {"extra": lambda b: F.mse_loss(b.logits, b.adversarial_logits)} if with_extra else {}
        criterion = (TRADESLoss if with_extra else Keyed)(ATTACK, engine=engine, **extra)
        for k in range(4):
            torch.manual_seed(k)
            loss = criterion(model, *batch(6, seed=k))
            loss.backward()
            result += [v.detach().clone() for v in (loss, *(p.grad for p in model.parameters()), *model.buffers())]
            model.zero_grad()
        return result, criterion.explain()

    expected, _ = run("exact")
    with EmulatedDevice() as emulated, warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        result, explained = run(Engine(graphs=True))
    assert all(torch.equal(a, b) for a, b in zip(emulated.shuffled(0, result), expected, strict=True))
    why = "extra is a function of your own, which a graph would not run again"
    assert (f"update: eagerly, since {why}" in explained) == with_extra
    assert [why in str(w.message) for w in messages].count(True) == with_extra
    assert ("update: from CUDA graphs" in explained) == (not with_extra)


def test_nan_in_it_is_a_minibatch_that_a_guard_leaves_out():
    model, (x, y) = build("conv_bn"), batch(8)
    bullet = BulletTrain(4, 1, 0)
    criterion = TRADESLoss(ATTACK, mining=bullet, extra=lambda b: b.logits.sum() * math.nan, engine="exact")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = Guard(optimizer, model, bullet, non_finite="skip")
    before = snapshot(model, bullet)
    with guard.minibatch():
        loss = criterion(model, x, y)
        loss.backward()
        guard.step(loss)
    guard.settle()
    optimizer.zero_grad()
    assert [skipped.reason for skipped in guard.skipped] == ["the loss is NaN or infinite"]
    assert_unchanged(before, model, bullet)


def test_a_minibatch_that_the_attack_refuses_does_not_reach_it():
    noted = Noted()
    criterion = TRADESLoss(ATTACK, extra=noted)
    x, y = batch(8)
    x[:, 0, 2, 2] = 0.8
    with pytest.raises(ValueError, match="input gradient must be finite"):
        criterion(build(Undefined), x, y)
    assert not hasattr(noted, "batch")


class OfATeacher(nn.Module):
    """A further term that is a module, and so a part of the loss."""

    def __init__(self):
        super().__init__()
        self.teacher = build("conv_bn", seed=1).eval()

    def forward(self, batch):
        with torch.no_grad():
            of_teacher = self.teacher(batch.x)
        return F.mse_loss(batch.adversarial_logits, of_teacher)


def test_a_copy_and_a_pickle_keep_a_further_term_that_is_a_module():
    model, (x, y) = build("conv_bn"), batch(8)
    criterion = TRADESLoss(ATTACK, extra=OfATeacher(), engine="exact")
    values = []
    for loss in (criterion, copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        torch.manual_seed(0)
        values.append(loss(copy.deepcopy(model), x, y).item())
    assert values[0] == values[1] == values[2]
    without = TRADESLoss(ATTACK, engine="exact")
    torch.manual_seed(0)
    assert without(copy.deepcopy(model), x, y).item() != values[0]


def test_a_copy_and_a_pickle_have_the_options():
    criterion = TRADESLoss(ATTACK, label_smoothing=0.1, smoothing="others", clean_updates=1, extra=torch.sum)
    for twin in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert twin.cross_entropy == CrossEntropy(0.1, "others")
        assert twin.clean_forwards == 1
        assert twin.extra is torch.sum


def test_the_repr_shows_the_options():
    shown = repr(TRADESLoss(ATTACK, label_smoothing=0.1, smoothing="others", clean_updates=1, extra=own_labels))
    assert "extra=own_labels, label_smoothing=0.1, smoothing='others', clean_updates=1" in shown
    assert "smoothing" not in repr(MARTLoss(ATTACK))


# Bad input


BAD = {
    "smoothing below 0": ({"label_smoothing": -0.1}, ValueError, r"label_smoothing must lie in \[0, 1\), got -0\.1"),
    "smoothing of 1": (
        {"label_smoothing": 1},
        ValueError,
        r"label_smoothing must lie in \[0, 1\), got 1\.0: write label_",
    ),
    "smoothing NaN": ({"label_smoothing": math.nan}, ValueError, r"label_smoothing must lie in \[0, 1\), got nan"),
    "smoothing in words": ({"label_smoothing": "a"}, TypeError, "label_smoothing must be a number, got 'a'"),
    "another convention": ({"smoothing": "all"}, ValueError, "smoothing must be one of 'torch', 'others', got 'all'"),
    "no convention": ({"smoothing": None}, ValueError, "smoothing must be one of 'torch', 'others', got None"),
    "extra": (
        {"extra": 3},
        TypeError,
        r"extra must be a function of an UpdateBatch, got int: write extra=lambda batch",
    ),
}
BAD_OF_TRADES = {
    "no clean update": ({"clean_updates": 0}, ValueError, "clean_updates must be at least 1, got 0"),
    "three": ({"clean_updates": 3}, ValueError, "clean_updates must be 1 or 2, got 3: write clean_updates=1"),
    "a bool": ({"clean_updates": True}, TypeError, "clean_updates must be an integer, got True"),
    "a fraction": ({"clean_updates": 1.5}, TypeError, r"clean_updates must be an integer, got 1\.5"),
}


@KINDS
@pytest.mark.parametrize(("options", "error", "message"), BAD.values(), ids=BAD)
def test_bad_options(kind, options, error, message):
    with pytest.raises(error, match=message):
        kind(ATTACK, **options)


@pytest.mark.parametrize(("options", "error", "message"), BAD_OF_TRADES.values(), ids=BAD_OF_TRADES)
def test_bad_options_of_trades(options, error, message):
    with pytest.raises(error, match=message):
        TRADESLoss(ATTACK, **options)


@pytest.mark.parametrize("name", [name for name in BAD if "smoothing" in name or "convention" in name])
def test_bad_options_of_augmix(name):
    options, error, message = BAD[name]
    with pytest.raises(error, match=message):
        AugMixLoss(**options)


BAD_TERMS = {
    "nothing": (lambda b: None, TypeError, "extra must return a floating-point tensor, got NoneType"),
    "a number": (lambda b: 0.5, TypeError, "extra must return a floating-point tensor, got float"),
    "an integer": (lambda b: b.y.sum(), TypeError, r"extra must return a floating-point tensor, got torch\.int64"),
    "elsewhere": (lambda b: b.logits.mean().to("meta"), ValueError, "extra's result must be on cpu like the loss"),
    "a row": (
        lambda b: b.logits.sum(dim=1),
        ValueError,
        r"extra must return one number, 0-dim, got shape \[8\]: let it",
    ),
}


@pytest.mark.parametrize(("extra", "error", "message"), BAD_TERMS.values(), ids=BAD_TERMS)
def test_a_term_that_is_none_is_named_and_f_r_stays(extra, error, message):
    model, mining = build("conv_bn"), BulletTrain(4, 1, 0)
    before = snapshot(mining)
    with pytest.raises(error, match=message):
        TRADESLoss(ATTACK, mining=mining, extra=extra)(model, *batch(8))
    assert_unchanged(before, mining)
    assert model.training
