import copy
import functools
import math

import pytest
import reference_mart
import torch
import torch.nn.functional as F
from objective_cases import DISTANCES, EACH
from small_models import assert_unchanged, batch, build, gradients, looked_at, snapshot
from tolerances import assert_near, assert_near_nested

from bt_fast import PGD, BulletTrain, Memory, PGDLoss, mart_loss, pgd_loss, trades_loss
from bt_fast.baselines.fast import fast_loss

EPSILON = 0.1


def options_of(objective):
    return {"beta": 6.0} if objective.robust else {}


def taken_by_wong(objective, model, x, y, epsilon, alpha, steps):
    """Copies the attack of Wong et al.'s training script, with the objective's inner loss; it moves δ instead of x'."""
    model.eval()
    delta = (2 * torch.rand(x.shape, dtype=x.dtype) - 1) * epsilon
    delta = torch.max(torch.min(delta, 1 - x), 0 - x)
    for _ in range(steps):
        delta.requires_grad_()
        (grad,) = torch.autograd.grad(objective.inner(model, x + delta, x, y), delta)
        delta = torch.clamp(delta.detach() + alpha * torch.sign(grad), -epsilon, epsilon)
        delta = torch.max(torch.min(delta, 1 - x), 0 - x)
    model.train()
    return delta


def losses_of_wong(objective, model, x, y, **attack):
    x_adv = x + taken_by_wong(objective, model, x, y, **attack)
    if objective.name == "pgd":
        return F.cross_entropy(model(x_adv), y)
    logits, logits_adv = model(x), model(x_adv)
    if objective.name == "mart":
        return reference_mart.loss_of_logits(logits, logits_adv, y, 6.0)
    kl = F.kl_div(logits_adv.log_softmax(1), model(x).softmax(1), reduction="sum")
    return F.cross_entropy(logits, y) + 6.0 / len(x) * kl


@pytest.mark.parametrize(("steps", "alpha"), [(1, 1.25 * EPSILON), (2, 1.7 * EPSILON / 2), (5, 1.7 * EPSILON / 5)])
@EACH
def test_loss_gradients_and_buffers_are_those_of_wongs_steps(objective, steps, alpha):
    results = []
    for ours in (True, False):
        model, (x, y) = build("conv_bn"), batch()
        torch.manual_seed(5)
        if ours:
            loss = fast_loss(objective.loss, model, x, y, None, epsilon=EPSILON, steps=steps, **options_of(objective))
        else:
            loss = losses_of_wong(objective, model, x, y, epsilon=EPSILON, alpha=alpha, steps=steps)
        loss.backward()
        results.append((loss.detach(), gradients(model), model.state_dict()))
    (loss, grads, state), (expected, their_grads, their_state) = results
    assert_near(loss, expected)
    assert_near_nested(grads, their_grads)
    assert_near_nested(state, their_state)


def corrupted_by(objective, distance, **options):
    """Returns x, and the x' that the last forward of the update gets."""
    model, (x, y) = build("conv_bn"), batch(64)
    seen = []
    model.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()) if m.training else None)
    torch.manual_seed(2)
    fast_loss(objective.loss, model, x, y, None, epsilon=EPSILON, distance=distance, **options)
    x_adv = seen[1] if objective.robust else seen[0]
    return x, x_adv


@pytest.mark.parametrize("steps", [1, 3])
@EACH
def test_in_l2_images_stay_in_the_ball_and_take_the_objectives_own_step(objective, steps):
    x, x_adv = corrupted_by(objective, "l_2", steps=steps)
    lengths = (x_adv - x).flatten(1).norm(dim=1)
    assert (lengths <= EPSILON + 1e-9).all()
    assert lengths.min() > 0
    if not objective.robust:
        expected = EPSILON * (1.25 if steps == 1 else 1.7 / steps)
        assert torch.equal(corrupted_by(objective, "l_2", steps=steps, step_size=expected)[1], x_adv)


@EACH
def test_a_step_size_of_ones_own(objective):
    losses = []
    for loss_of in (
        functools.partial(fast_loss, objective.loss, epsilon=EPSILON, steps=2, step_size=0.02),
        functools.partial(objective.loss, epsilon=EPSILON, perturb_steps=2, step_size=0.02, start="uniform"),
    ):
        torch.manual_seed(0)
        losses.append(loss_of(build("conv_bn"), *batch(), None))
    assert torch.equal(*losses)


def test_numbers_decide_about_the_starts():
    (x, y), attack = batch(), PGD(EPSILON, 1.25 * EPSILON, 1, start="uniform")
    given = {"indices": torch.arange(len(x)).flip(0), "generator": torch.Generator().manual_seed(3)}
    result = fast_loss(pgd_loss, build("conv_bn"), x, y, None, epsilon=EPSILON, **given)
    assert torch.equal(result, PGDLoss(attack, engine="exact")(build("conv_bn"), x, y, **given))


# Bad input

X, Y = batch()
BAD = {
    "objective": ({"objective": F.cross_entropy}, ValueError, "objective must be trades_loss, mart_loss or pgd_loss"),
    "objective by name": ({"objective": "trades"}, ValueError, "objective must be .*'trades'"),
    "wrapped objective": ({"objective": functools.partial(pgd_loss)}, ValueError, "objective must be .*partial"),
    "bullet": ({"bullet": BulletTrain()}, ValueError, "bullet cannot be combined.*start='uniform'"),
    "start": ({"start": "normal"}, TypeError, "start is no option of fast_loss"),
    "memory": ({"memory": Memory(8)}, TypeError, "memory is no option of fast_loss.*give it to the objective"),
    "perturb_steps": ({"perturb_steps": 3}, TypeError, "perturb_steps is no option of fast_loss.*steps"),
    "no step": ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
    "half a step": ({"steps": 1.5}, TypeError, "steps must be an integer, got 1.5"),
    "epsilon": ({"epsilon": -0.1}, ValueError, "epsilon.*at least 0.*-0.1"),
    "epsilon NaN": ({"epsilon": math.nan}, ValueError, "epsilon.*nan"),
    "step size": ({"step_size": -0.1}, ValueError, "step_size.*greater than 0.*-0.1"),
    "step size that l_2 ignores": (
        {"objective": trades_loss, "distance": "l_2", "step_size": 0.1}, ValueError, "step_size is not used",
    ),
    "the same of MART": (
        {"objective": mart_loss, "distance": "l_2", "step_size": 0.1}, ValueError, "step_size is not used",
    ),
    "distance": ({"distance": "l_1"}, ValueError, "distance must be one of"),
    "unknown option": ({"betta": 1.0}, TypeError, "betta"),
    "pixels": ({"x_natural": X + 1}, ValueError, "x_natural must lie in"),
    "labels": ({"y": Y.double()}, TypeError, "y must be integers"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    changed, error, message = BAD[name]
    model = build("conv_bn")
    given = {"objective": pgd_loss, "x_natural": X, "y": Y, "epsilon": EPSILON, **changed}
    before = snapshot(model)
    with pytest.raises(error, match=message):
        fast_loss(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), **given)
    assert_unchanged(before, model)


# The start of the objectives


@pytest.mark.parametrize("bullet", [None, BulletTrain(3, 1, 0)], ids=["uniform", "bullet"])
@pytest.mark.parametrize("distance", DISTANCES)
@EACH
def test_the_attack_begins_where_start_says(objective, distance, bullet):
    results = {}
    for start in (None, "normal", "uniform"):
        model, (x, y) = looked_at(build("conv_bn")), batch()
        seen = []
        model.register_forward_pre_hook(lambda m, args, seen=seen: None if m.training else seen.append(args[0].clone()))
        with torch.no_grad():
            y[:6] = copy.deepcopy(model).eval()(x)[:6].argmax(1)
        seen.clear()
        options = {"epsilon": EPSILON, "perturb_steps": 3, "distance": distance, "bullet": copy.deepcopy(bullet)}
        torch.manual_seed(1)
        loss = objective.loss(model, x, y, None, **options, start=start)
        first = seen[1 if bullet or objective.name == "trades" else 0 if len(seen[0]) == 8 else 1]
        results[start] = (loss, (first[:, None] - x[None]).abs().flatten(2).amax(2).amin(1))
    other = {"normal": "uniform", "uniform": "normal"}[objective.noise]
    assert torch.equal(results[None][0], results[objective.noise][0])
    assert not torch.equal(results[None][0], results[other][0])
    assert results["normal"][1].max() < 0.006
    reach = EPSILON / 6 if distance == "l_2" else EPSILON / 2
    assert results["uniform"][1].max() > reach


@pytest.mark.parametrize("bullet", [None, BulletTrain(3, 1, 0)], ids=["uniform", "bullet"])
@EACH
def test_a_start_that_is_not_known_is_named(objective, bullet):
    model = build("conv_bn")
    state = [model] if bullet is None else [model, bullet]
    before = snapshot(*state)
    with pytest.raises(ValueError, match="start must be one of 'normal', 'uniform', None, got 'random'"):
        objective.loss(model, X, Y, None, start="random", bullet=bullet)
    assert_unchanged(before, *state)
