"""The gradient of the update's loss with respect to x', handed over by its backward."""

import copy
import pickle
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from small_models import batch, gradients
from test_objectives import confident, own_labels, seeded
from tolerances import assert_near
from torch import nn

from bt_fast import AWP, PGD, BulletTrain, HalfDrawn, MARTLoss, Normalization, PGDLoss, TRADESLoss
from bt_fast.objectives.forwards import Forwards

KINDS = {"trades": TRADESLoss, "mart": MARTLoss, "pgd": PGDLoss}
ATTACK = PGD(0.1, 0.03, 3)
PLAN = BulletTrain.start_plan
MININGS = {
    "none": lambda: None,
    "keep": lambda: BulletTrain(3, 2, 0, unperturbed="keep"),
    "skip": lambda: BulletTrain(3, 2, 0, unperturbed="skip"),
    "half": lambda: BulletTrain(3, HalfDrawn(2), 1, unperturbed="skip"),
    "before": lambda: BulletTrain(3, HalfDrawn(2, "half"), 0, unperturbed="keep"),
}


def made(kind, name, **options):
    bullet = MININGS[name]()
    if bullet is not None:
        bullet.robust_fraction.fill_(0.6)
    return kind(ATTACK, mining=bullet, engine="exact", **options)


KEPT = ("none", "keep", "before")  # which keep the samples without steps, as a loss without clean forwards must


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in KINDS.values() for name in (KEPT if kind is PGDLoss else MININGS)]
)
def test_it_is_the_loss_s_gradient_by_x_adv_in_the_caller_s_order(kind, name):
    x, _ = batch(11)
    results, plans = [], []
    planned = mock.patch.object(BulletTrain, "start_plan", lambda *a, **k: plans.append(PLAN(*a, **k)) or plans[0])
    for wanted in (True, False):
        model, seen = confident(), []
        y = own_labels(model, x)
        criterion = made(kind, name)
        criterion.on_input_gradient = seen.append if wanted else None
        untouched = copy.deepcopy(model)
        plans.clear()
        with planned:
            loss = criterion(model, x, y, generator=seeded(0))
        assert not seen
        loss.backward()
        results.append({"loss": loss.detach(), **gradients(model)})
        if wanted:
            (gradient,), record = seen, criterion.last
    for one, other in zip(*(result.values() for result in results), strict=True):
        assert torch.equal(one, other)
    taken = gradient.flatten(1).any(dim=1)
    model = untouched.train()
    x_adv = record.x_adv.clone().requires_grad_()
    clean = None if kind is PGDLoss else model(x)
    logits = model(x_adv[taken])
    assert_near(logits.detach(), record.adversarial_logits[taken])
    if kind is TRADESLoss:
        rows = F.kl_div(logits.log_softmax(1), clean[taken].softmax(1), reduction="none").sum(1) * 6.0 / 11
    elif kind is PGDLoss:
        rows = F.cross_entropy(logits, y[taken], reduction="none") / 11
    else:
        one_each = [
            criterion.objective(clean[i : i + 1], z[None], y[i : i + 1]) / 11
            for i, z in zip(taken.nonzero().flatten().tolist(), logits, strict=True)
        ]
        rows = torch.stack(one_each)
    weights = torch.ones(11, dtype=torch.float64)
    if name in ("half", "before"):
        weights = plans[0].weights
        assert taken.tolist() == ((weights > 0) & ((record.steps > 0) | (name == "before"))).tolist()
    (expected,) = torch.autograd.grad((weights[taken] * rows).sum(), x_adv)
    assert_near(gradient, expected, "updates")


def test_of_a_single_row_the_sample_that_joins_its_statistics_has_none():
    x, _ = batch(6)
    model, seen = confident(), []
    y = (own_labels(model, x, wrong=0) + 1) % 5
    y[3] = (y[3] - 1) % 5
    criterion = TRADESLoss(ATTACK, mining=BulletTrain(3, 0, 0, unperturbed="skip"), engine="exact")
    criterion.on_input_gradient = seen.append
    criterion(model, x, y).backward()
    assert seen[0].flatten(1).any(dim=1).tolist() == [False, False, False, True, False, False]


def test_every_backward_hands_over_its_own_and_awp_s_first_pass_none():
    x, _ = batch(11)
    model, seen = confident(), []
    y = own_labels(model, x)
    criterion = made(TRADESLoss, "keep")
    criterion.on_input_gradient = seen.append
    with AWP(model)(criterion, x, y) as loss:
        assert not seen
        loss.backward()
    assert len(seen) == 1
    with criterion.again():
        criterion(model, x, y).backward(retain_graph=True)
    assert len(seen) == 2
    with torch.no_grad():
        criterion(model, x, y)
    assert len(seen) == 2


def test_it_is_for_pixels_where_the_loader_normalises():
    x, _ = batch(11)
    result = []
    for normalization in (None, Normalization((0.5,), (0.25,))):
        model, seen = confident(), []
        y = own_labels(model, x)
        given = x
        if normalization is not None:
            with torch.no_grad():  # takes normalised images, and computes the same
                model = nn.Sequential(Back(), model)
            given = (x - 0.5) / 0.25
        attack = PGD(0.1, 0.03, 3, normalization=normalization)
        criterion = TRADESLoss(attack, engine="exact")
        criterion.on_input_gradient = seen.append
        criterion(model, given, y, generator=seeded(0)).backward()
        result += seen
    assert_near(result[1], result[0], "updates")


class Back(nn.Module):
    """Pixels of normalised images."""

    def forward(self, x):
        return x * 0.25 + 0.5


@pytest.mark.parametrize("clean_updates", [1, "shared"])
def test_it_goes_with_a_shared_forward_and_the_engine_fast(clean_updates):
    x, _ = batch(11)
    result = []
    for engine in ("exact", "fast"):
        model, seen = confident(), []
        y = own_labels(model, x)
        criterion = TRADESLoss(ATTACK, mining=MININGS["half"](), engine=engine, clean_updates=clean_updates)
        criterion.mining.robust_fraction.fill_(0.6)
        criterion.on_input_gradient = seen.append
        criterion(model, x, y, generator=seeded(0)).backward()
        result += seen
    assert_near(result[1], result[0], "updates")


def test_such_an_update_and_one_of_half_is_not_captured():
    criterion = made(TRADESLoss, "half")
    common = {"key": (), "of": criterion, "rows": 4, "channels_last": False, "rerun": False}
    assert Forwards(**common).identity is not None
    for options, why in (
        ({"on_gradient": print}, "on_input_gradient"),
        ({"weights": torch.ones(4)}, "half of the robust samples stand for all"),
    ):
        forwards = Forwards(**common, **options)
        assert forwards.identity is None
        assert why in forwards.unknown


class Largest(nn.Module):
    """Keeps the largest gradient so far, in its own unit."""

    def __init__(self):
        super().__init__()
        self.unit = nn.Parameter(torch.ones(()))
        self.register_buffer("largest", torch.zeros((), dtype=torch.float64))

    def forward(self, gradient):
        self.largest.copy_((gradient * self.unit).detach().abs().max())


def test_a_module_is_a_part_of_the_loss_and_copied_with_it():
    x, y = batch(6)
    criterion = made(TRADESLoss, "none")
    criterion.on_input_gradient = Largest()
    assert [name for name, _ in criterion.named_parameters()] == ["on_input_gradient.unit"]
    taken = []
    for each in (criterion, copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        each(confident(), x, y, generator=seeded(0)).backward()
        taken.append(each.on_input_gradient.largest.item())
    assert taken == [taken[0]] * 3
    assert taken[0] > 0
    criterion.on_input_gradient = None
    assert not list(criterion.parameters())
    criterion(confident(), x, y).backward()
    criterion = copy.deepcopy(criterion)
    assert criterion.on_input_gradient is None


def test_what_is_no_function_is_refused_by_the_next_call_and_nothing_changes():
    (x, y), model, criterion = batch(6), confident(), made(TRADESLoss, "keep")
    criterion.on_input_gradient = torch.zeros(6)
    before = copy.deepcopy((model.state_dict(), criterion.mining.state_dict()))
    with pytest.raises(
        TypeError, match=r"^on_input_gradient must be a function of a tensor or None, got Tensor: write"
    ):
        criterion(model, x, y)
    for old, new in zip(before, (model.state_dict(), criterion.mining.state_dict()), strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)
