import copy
import inspect
import math
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_cases import DISTANCES, EACH, OBJECTIVES, moved_one_at_a_time
from pretended_device import DEVICE, counted_waits, pretended_device
from small_models import (
    CLASSES,
    MODELS,
    SHAPE,
    Dead,
    Frozen,
    Undefined,
    assert_unchanged,
    batch,
    build,
    gradients,
    looked_at,
    snapshot,
    with_bright,
)
from tolerances import UPDATES, assert_near, assert_near_nested
from torch import nn

from bt_fast import BulletTrain
from bt_fast import Frozen as FrozenView
from bt_fast.attack.folded import FoldedModel
from bt_fast.attack.runners import run_eager
from bt_fast.ops import GROUPS


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def recorded(model):
    """Records inputs of the model's forwards, in train mode and in eval mode."""
    looked_at(model)
    forwards = {True: [], False: []}
    model.register_forward_pre_hook(lambda m, args: forwards[m.training].append(args[0].detach().clone()))
    return forwards


def distances(x, x_adv):
    """Returns the l_inf distance of each x' from the nearest image, the one it comes from."""
    return (x_adv[:, None] - x[None]).abs().flatten(2).amax(dim=2).amin(dim=1)


def confident(name="conv_bn", seed=0, dtype=torch.float64):
    """A model with logits that spread enough for all three groups to occur."""
    model = build(name, seed, dtype)
    with torch.no_grad():
        next(m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear)).weight.mul_(4.0)
    return model


def own_labels(model, x, wrong=2):
    """Returns the model's own decisions, the first `wrong` of them falsified."""
    with torch.no_grad():
        y = copy.deepcopy(model).eval()(x).argmax(dim=1)
    y[:wrong] = (y[:wrong] + 1) % CLASSES
    return y


# Without BulletTrain: the authors' computation


def run_both(objective, model, x_of, options, steps=3):
    """Returns loss, gradients and state after each of some updates, of the reference and of ours."""
    twins = [model, copy.deepcopy(model)]
    optimizers = [sgd(m) for m in twins]
    for k in range(steps):
        x, y = x_of(k)
        results = []
        for loss_of, m, optimizer in zip((objective.reference, objective.loss), twins, optimizers, strict=True):
            torch.manual_seed(k)
            loss = loss_of(m, x, y, optimizer, **options)
            loss.backward()
            results.append((loss.detach(), gradients(m), copy.deepcopy(m.state_dict()), torch.get_rng_state()))
            optimizer.step()
        yield results


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("name", MODELS)
@EACH
def test_loss_gradients_buffers_and_random_numbers_are_the_authors(objective, name, distance):
    options = objective.options(distance)
    for (loss, grads, state, rng), ours in run_both(objective, build(name), lambda k: batch(seed=k), options):
        assert_near(ours[0], loss, UPDATES)
        assert_near_nested(ours[1], grads, UPDATES)
        assert_near_nested(ours[2], state, UPDATES)
        assert torch.equal(ours[3], rng)


@pytest.mark.parametrize("distance", DISTANCES)
@EACH
def test_the_first_update_is_the_authors_to_ten_digits(objective, distance):
    ((loss, grads, state, _), ours), *_ = run_both(
        objective, build("conv_bn"), lambda k: batch(seed=k), objective.options(distance), steps=1
    )
    assert_near(ours[0], loss)
    assert_near_nested(ours[1], grads)
    assert_near_nested(ours[2], state)


@pytest.mark.parametrize("distance", DISTANCES)
@EACH
def test_in_single_precision_the_loss_is_the_authors_within_its_noise(objective, distance):
    model, options = build("conv_bn", dtype=torch.float32), objective.options(distance)
    for (loss, *_), ours in run_both(objective, model, lambda k: batch(seed=k, dtype=torch.float32), options, steps=1):
        assert ours[0].item() == pytest.approx(loss.item(), rel=1e-3)


@pytest.mark.parametrize("distance", DISTANCES)
@EACH
def test_a_single_sample(objective, distance):
    options = objective.options(distance)
    for (loss, grads, state, _), ours in run_both(objective, build("conv_bn"), lambda k: batch(1, k), options, steps=1):
        assert_near(ours[0], loss)
        assert_near_nested(ours[1], grads)
        assert_near_nested(ours[2], state)


@EACH
def test_the_defaults_are_the_authors(objective):
    for (loss, *_), ours in run_both(objective, build("conv_bn"), lambda k: batch(seed=k), {}, steps=1):
        assert_near(ours[0], loss)


@pytest.mark.parametrize("distance", DISTANCES)
@EACH
def test_a_zero_gradient_gives_the_authors_images(objective, distance):
    images = []
    for loss_of in (objective.reference, objective.loss):
        torch.manual_seed(0)
        model = build(Dead)
        forwards = recorded(model)
        torch.manual_seed(0)
        loss_of(model, *batch(), sgd(model), **objective.options(distance))
        images.append(forwards[True][1 if objective.robust else 0])
    assert_near(images[1], images[0])


@EACH
def test_forwards_of_the_batch_and_those_that_the_authors_take(objective):
    """TRADES runs 13 forwards, and its authors' code 23."""
    for loss_of, expected in (
        (objective.loss, objective.forwards),
        (objective.reference, objective.reference_forwards),
    ):
        model = build("conv_bn")
        forwards = recorded(model)
        loss_of(model, *batch(), sgd(model), **objective.options("l_inf"))
        sizes = {mode: [len(x) for x in forwards[mode]] for mode in (False, True)}
        looks = [2] if loss_of is objective.loss and objective.rows_seen_before == 2 else []
        assert (sizes[False], sizes[True]) == (looks + [8] * expected[0], [8] * expected[1])


@EACH
def test_a_generator_replaces_the_global_random_numbers(objective):
    torch.manual_seed(0)
    model, (x, y) = build("conv_bn"), batch()
    state = torch.get_rng_state()

    def once(seed, bullet=None):
        twin = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(seed)
        return objective.loss(twin, x, y, None, bullet=bullet, generator=generator, epsilon=0.3, distance="l_2").item()

    for bullet in (lambda: None, BulletTrain):
        assert once(1, bullet()) == once(1, bullet())
        assert once(1, bullet()) != once(2, bullet())
    assert torch.equal(torch.get_rng_state(), state)


@EACH
def test_a_seeded_script_repeats_its_numbers_with_bullettrain(objective):
    x, y = batch()
    result = []
    for seed in (1, 1, 2):
        model = build("conv_bn", 0)
        torch.manual_seed(seed)
        result.append([objective.loss(model, x, y, None, bullet=BulletTrain()).item() for _ in range(2)])
    assert result[0] == result[1]
    assert result[0][0] != result[0][1]
    assert result[0] != result[2]


# With BulletTrain: Algorithm 2


def algorithm_2(objective, model, x, y, optimizer, starts, f_r, policy, skip, options, gamma=0.8, momentum=0.9):
    """Paper, Algorithm 2 and section 3.2, one sample at a time, with the authors' update: loss, F_R, groups."""
    epsilon, (n_b, n_r, n_o) = options["epsilon"], policy
    model.eval()
    svar = []
    for x_i, y_i in zip(x, y, strict=True):
        p = model(x_i[None]).softmax(dim=1)[0].detach().numpy()
        svar.append((1 if p.argmax() == y_i else -1) * p.var())
    threshold = max(0.0, np.quantile(svar, 1 - f_r))
    groups, taken, x_adv = [], [], x.clone()
    for i, s in enumerate(svar):
        group = "outlier" if s < 0 else "robust" if f_r > 0 and s >= threshold else "boundary"
        groups.append(group)
        n = {"boundary": n_b, "robust": n_r, "outlier": n_o}[group]
        alpha = objective.boundary_step(options, n_b) if group == "boundary" else 1.7 * epsilon / max(n, 1)
        if n:
            one = (x[i : i + 1], y[i : i + 1], starts[i : i + 1])
            x_adv[i] = moved_one_at_a_time(objective, model, *one, n, alpha, options)[0]
        if n or not skip:
            taken.append(i)

    model.train()
    optimizer.zero_grad()
    loss, z_adv = objective.update(model, x, x_adv, y, taken, options.get("beta"))
    accuracy = (z_adv.argmax(dim=1) == y).double().mean().item()
    return loss, momentum * f_r + (1 - momentum) * gamma * accuracy, groups


def assert_same_update(models, loss, ours):
    """Asserts that the reference model and ours have the same loss, gradients, weights and buffers."""
    loss.backward()
    ours.backward()
    assert_near(ours.detach(), loss.detach(), UPDATES)
    assert_near_nested(gradients(models[1]), gradients(models[0]), UPDATES)
    assert_near_nested(models[1].state_dict(), models[0].state_dict(), UPDATES)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


POLICIES = [(5, 2, 0), (5, 0, 0), (5, 2, 1), (2, 4, 3), (0, 0, 0)]
TABLE_3 = [(10, 1, 0), (10, 2, 0)]
CASES = [
    pytest.param(objective, policy, unperturbed, id=f"{objective}-{policy}-{unperturbed}")
    for objective in OBJECTIVES
    for policy in POLICIES + (TABLE_3 if objective.name == "mart" else [])
    for unperturbed in (("keep", "skip") if objective.robust else (None,))
]


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(("objective", "policy", "unperturbed"), CASES)
@pytest.mark.parametrize("start", [0.0, 0.4, 1.0])
def test_updates_are_algorithm_2(objective, distance, policy, unperturbed, start):
    models = [confident(), confident()]
    optimizers = [sgd(m) for m in models]
    bullet = BulletTrain(*policy)
    bullet.robust_fraction.fill_(start)
    options = objective.options(distance) | {"perturb_steps": policy[0] or 10}
    f_r, seen = start, set()
    for k in range(3):
        x, _ = batch(9, seed=k)
        y = own_labels(models[0], x)
        starts = objective.starts(x, seeded(k), options)
        assert not torch.equal(starts, x)
        skip = unperturbed == "skip"
        loss, f_r, groups = algorithm_2(objective, models[0], x, y, optimizers[0], starts, f_r, policy, skip, options)
        drawn = {"bullet": bullet, "generator": seeded(k)} | ({"unperturbed": unperturbed} if unperturbed else {})
        ours = objective.loss(models[1], x, y, optimizers[1], **options, **drawn)
        assert_same_update(models, loss, ours)
        assert_near(bullet.robust_fraction, f_r)
        for optimizer in optimizers:
            optimizer.step()
        seen |= set(groups)
    assert seen >= {0.0: {"outlier", "boundary"}, 0.4: set(GROUPS), 1.0: {"outlier", "robust"}}[start]


@EACH
@settings(max_examples=15, deadline=None)
@given(st.integers(1, 10), st.floats(0, 1), st.tuples(*[st.integers(0, 3)] * 3), st.booleans(), st.integers(0, 99))
def test_any_batch_and_policy(objective, m, f_r, policy, skip, seed):
    models = [confident(seed=seed), confident(seed=seed)]
    x, y = batch(m, seed)
    bullet = BulletTrain(*policy)
    bullet.robust_fraction.fill_(f_r)
    options = objective.options("l_inf") | {"perturb_steps": policy[0]}
    starts = objective.starts(x, seeded(seed), options)
    skip = skip and objective.robust
    loss, moved, _ = algorithm_2(objective, models[0], x, y, sgd(models[0]), starts, f_r, policy, skip, options)
    drawn = {"bullet": bullet, "generator": seeded(seed)}
    if objective.robust:
        drawn["unperturbed"] = "skip" if skip else "keep"
    ours = objective.loss(models[1], x, y, None, **options, **drawn)
    assert_same_update(models, loss, ours)
    assert_near(bullet.robust_fraction, moved)


@pytest.mark.parametrize(
    ("policy", "skips"), [((5, 2, 0), False), ((5, 0, 0), True), ((5, 0, 1), False), ((0, 0, 0), True)]
)
@EACH
def test_samples_without_steps_are_skipped_by_default_only_where_only_boundary_samples_move(objective, policy, skips):
    model = confident()
    x, _ = batch(9)
    y = own_labels(model, x)
    bullet = BulletTrain(*policy)
    bullet.robust_fraction.fill_(0.4)
    forwards = recorded(model)
    objective.loss(model, x, y, None, bullet=bullet)
    outlier, boundary, robust = bullet.group_counts.tolist()
    sizes = (boundary, robust, outlier)
    moving = sum(size for size, n in zip(sizes, policy, strict=True) if n)
    expected = [9, moving if skips else 9] if objective.robust else [9]
    assert [len(f) for f in forwards[True]] == [n for n in expected if n]
    steps = sum(size * n for size, n in zip(sizes, policy, strict=True))
    assert sum(len(f) for f in forwards[False]) == 9 + steps
    assert len(forwards[False]) == 1 + max(n for n, size in [*zip(policy, sizes, strict=True), (0, 1)] if size)


@EACH
def test_a_sample_without_steps_enters_the_update_exactly_clean(objective):
    model = confident()
    x, _ = batch(9)
    y = own_labels(model, x, wrong=4)
    forwards = recorded(model)
    objective.loss(model, x, y, None, bullet=BulletTrain())
    moved = distances(x, forwards[True][-1])
    assert moved.eq(0).tolist() == [False] * 5 + [True] * 4
    assert moved.max() <= 0.031 + 1e-12


@EACH
def test_the_fraction_and_the_counts_move_once_a_call(objective):
    model, bullet = confident(), BulletTrain()
    x, _ = batch(9)
    y = own_labels(model, x)
    objective.loss(model, x, y, None, bullet=bullet)
    assert bullet.group_counts.tolist() == [2, 7, 0]
    assert 0.0 < bullet.robust_fraction.item() <= 0.1 * 0.8


VECTOR_NORMS = {
    "BatchNorm1d": lambda: [nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.ReLU()],
    "BatchNorm2d of 1×1 maps": lambda: [nn.Conv2d(1, 8, 6), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()],
}


@pytest.mark.parametrize("name", VECTOR_NORMS)
@pytest.mark.parametrize("moving", [0, 1, 2])
@EACH
def test_few_samples_left_to_corrupt_where_batch_norm_sees_one_value_a_channel(objective, name, moving):
    """Batch norm cannot train on one row of one value; the caller's batch has more rows, so this is not their error."""
    torch.manual_seed(0)
    model = nn.Sequential(*VECTOR_NORMS[name](), nn.Linear(8, CLASSES)).double()
    x, _ = batch(8)
    y = own_labels(model, x, wrong=8 - moving)
    bullet = BulletTrain(3, 0, 0)
    loss = objective.loss(model, x, y, None, bullet=bullet, perturb_steps=3)
    loss.backward()
    assert bullet.group_counts.tolist() == [8 - moving, moving, 0]
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@EACH
def test_with_dropout_the_loss_is_finite_and_trains(objective):
    model, bullet = confident("dropout"), BulletTrain()
    x, y = batch(9)
    loss = objective.loss(model, x, y, None, bullet=bullet)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@EACH
@pytest.mark.parametrize("name", ["conv_bn", "dropout"])
def test_with_bullettrain_a_second_clean_forward_is_replayed_or_left_out_but_never_run(objective, name):
    model = confident(name)
    forwards = recorded(model)
    objective.loss(model, *batch(), None, bullet=BulletTrain())
    assert len(forwards[True]) == objective.forwards[1]
    assert model[1].num_batches_tracked == (objective.norm_updates if name == "conv_bn" else objective.forwards[1])


# The clean forward beside the attack


class Logging(nn.Sequential):
    """Notes its training forwards of whole batches."""

    def forward(self, x):
        if self.training and len(x) == 8:
            self.log.append("forward")
        return super().forward(x)


class OnStreams:
    """A runner whose attack counts as running until it is joined."""

    def __init__(self, log):
        self.log = log

    def __call__(self, *arguments):
        self.start(*arguments)()

    def start(self, *arguments):
        run_eager(*arguments)
        return lambda: self.log.append("joined")


@pytest.mark.parametrize("frozen", [None, FrozenView()])
@EACH
def test_a_clean_forward_known_to_move_batch_norm_alone_runs_beside_an_attack_on_a_frozen_view(objective, frozen):
    model, calls = build(lambda: Logging(*MODELS["conv_bn"]())), []
    for _ in range(2):
        model.log = []
        objective.loss(model, *batch(), None, frozen=frozen, runner=OnStreams(model.log))
        calls.append(model.log[: model.log.index("joined")])
    assert calls == [[], ["forward"] if frozen and objective.robust else []]


@pytest.mark.parametrize("objective", [o for o in OBJECTIVES if o.rows_seen_before == 2], ids=str)
def test_the_number_of_classes_is_not_asked_of_a_view_which_may_have_to_be_compiled_for_two_rows(objective):
    sizes, call = [], FoldedModel.__call__
    with mock.patch.object(FoldedModel, "__call__", lambda view, x: sizes.append(len(x)) or call(view, x)):
        objective.loss(build("conv_bn"), *batch(), None, frozen=FrozenView())
    assert sizes == [8] * 10


# The caller's gradients and modes


BULLETS = pytest.mark.parametrize("bullet", [None, BulletTrain(3, 1, 0)], ids=["uniform", "bullet"])


@BULLETS
@EACH
def test_an_optimizer_is_zeroed_and_none_accumulates(objective, bullet):
    result = {}
    for start, with_optimizer in ((0.0, False), (0.5, False), (0.5, True)):
        model, own = build("conv_bn"), copy.deepcopy(bullet)
        for p in model.parameters():
            p.grad = torch.full_like(p, start)
        torch.manual_seed(0)
        objective.loss(model, *batch(), sgd(model) if with_optimizer else None, perturb_steps=3, bullet=own).backward()
        result[start, with_optimizer] = gradients(model)
    fresh = result[0.0, False]
    assert_near_nested(result[0.5, False], {name: g + 0.5 for name, g in fresh.items()})
    assert_near_nested(result[0.5, True], fresh)


@BULLETS
@pytest.mark.parametrize("error", [False, True])
@EACH
def test_modes_are_kept_module_by_module(objective, bullet, error):
    model = build("conv_bn")
    model[1].eval()
    model[3].eval()
    modes = [m.training for m in model.modules()]
    frozen = copy.deepcopy(model[1].state_dict())
    if error:
        trainings = []
        model.register_forward_hook(lambda m, *_: trainings.append(m.training) or (1 / 0 if m.training else None))
        with pytest.raises(ZeroDivisionError):
            objective.loss(model, *batch(), None, perturb_steps=3, bullet=copy.deepcopy(bullet))
    else:
        objective.loss(model, *batch(), None, perturb_steps=3, bullet=copy.deepcopy(bullet)).backward()
        assert model[5].num_batches_tracked == objective.norm_updates
    assert [m.training for m in model.modules()] == modes
    assert_near_nested(model[1].state_dict(), frozen)


@BULLETS
@EACH
def test_a_model_found_in_eval_mode_updates_in_train_mode_and_goes_back(objective, bullet):
    model = build("conv_bn").eval()
    forwards = recorded(model)
    objective.loss(model, *batch(), None, perturb_steps=3, bullet=copy.deepcopy(bullet)).backward()
    assert len(forwards[True]) == objective.forwards[1]
    assert not any(m.training for m in model.modules())
    assert model[1].num_batches_tracked == objective.norm_updates


@BULLETS
@EACH
def test_a_model_with_its_own_train_method_keeps_its_frozen_part(objective, bullet):
    model = build(Frozen)
    frozen = copy.deepcopy(model.body[1].state_dict())
    objective.loss(model, *batch(), None, perturb_steps=3, bullet=copy.deepcopy(bullet)).backward()
    assert_near_nested(model.body[1].state_dict(), frozen)


@BULLETS
@EACH
def test_only_the_backward_of_the_caller_touches_gradients(objective, bullet):
    model = build("conv_bn")
    x, y = batch()
    x.requires_grad_()
    loss = objective.loss(model, x, y, None, perturb_steps=3, bullet=copy.deepcopy(bullet))
    assert loss.shape == ()
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert x.grad is None


@BULLETS
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
@EACH
def test_labels_of_any_integer_type(objective, bullet, dtype):
    losses = []
    for labels in (batch()[1], batch()[1].to(dtype)):
        torch.manual_seed(0)
        model = build("conv_bn")
        torch.manual_seed(0)
        losses.append(objective.loss(model, batch()[0], labels, None, perturb_steps=3, bullet=copy.deepcopy(bullet)))
    assert losses[0] == losses[1]


@BULLETS
@EACH
def test_saturated_logits_give_finite_gradients(objective, bullet):
    model = build("conv_bn", dtype=torch.float32)
    with torch.no_grad():
        model[-1].weight.mul_(1e4)
    loss = objective.loss(model, *batch(dtype=torch.float32), None, perturb_steps=3, bullet=copy.deepcopy(bullet))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# Reduced precision


@BULLETS
@pytest.mark.parametrize("distance", DISTANCES)
@EACH
def test_autocast(objective, bullet, distance):
    model, (x, y) = confident(dtype=torch.float32), batch(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective.loss(
            model, x, y, sgd(model), perturb_steps=3, epsilon=0.1, distance=distance, bullet=copy.deepcopy(bullet)
        )
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@BULLETS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("distance", DISTANCES)
@EACH
def test_a_model_in_half_precision(objective, bullet, dtype, distance):
    model, (x, _) = confident(dtype=dtype), batch(dtype=dtype)
    y = own_labels(model, x, wrong=0)
    forwards = recorded(model)
    torch.manual_seed(0)
    loss = objective.loss(model, x, y, None, 0.02, 0.1, 3, distance=distance, bullet=copy.deepcopy(bullet))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    moved = distances(x, forwards[True][-1])
    # bfloat16 rounds away most of the start's noise, so a few samples stay at x, where there is no gradient
    assert (moved > 0.01).double().mean() >= (0.5 if dtype == torch.bfloat16 else 1)


# The host waits once


@BULLETS
@pytest.mark.parametrize("distance", DISTANCES)
@EACH
def test_one_read_a_call_on_a_device_and_one_more_without_bullettrain(objective, bullet, distance):
    """Without state, no later call could raise an error for the attack's gradients."""
    model = build("conv_bn", dtype=torch.float32).to(DEVICE)
    x = torch.empty(8, *SHAPE, device=DEVICE)
    y = torch.zeros(8, dtype=torch.int64, device=DEVICE)
    bullet = bullet and copy.deepcopy(bullet).to(DEVICE)
    with pretended_device(plan=[5, 2, 2, 3, 2, 3] if bullet else []) as reads:
        loss = objective.loss(model, x, y, sgd(model), perturb_steps=3, bullet=bullet, distance=distance)
        assert reads.started == reads.waited == (1 if bullet else 2)
        loss.backward()
    assert loss.device == DEVICE


@EACH
def test_buffers_that_never_change_are_compared_on_the_first_call_only(objective):
    model = build("normalising", dtype=torch.float32)
    x, y = batch(dtype=torch.float32)
    objective.loss(model, x, y, None, perturb_steps=3)
    model.to(DEVICE)
    x, y = x.to(DEVICE), y.to(DEVICE)
    with pretended_device() as reads:
        objective.loss(model, x, y, None, perturb_steps=3)
    assert (reads.started, reads.waited) == (2, 2)


@pytest.mark.parametrize(("bullet", "reads"), [(None, 2), (BulletTrain(3, 1, 0), 3)])
@EACH
def test_reads_on_the_cpu(objective, bullet, reads):
    """On the CPU a read costs nothing: gradients are checked before the update, and its logits at once."""
    with counted_waits() as waits:
        objective.loss(build("conv_bn"), *batch(), None, perturb_steps=3, bullet=copy.deepcopy(bullet))
    assert len(waits) == reads


# Bad input: the error names it, and nothing changes


class Wrapped(nn.Module):
    """A good model with a corrupted output."""

    def __init__(self, spoil):
        super().__init__()
        self.body, self.spoil = build("conv_bn"), spoil

    def forward(self, x):
        return self.spoil(self.body(x))


def with_pixel(value):
    x, _ = batch()
    x[3, 0, 2, 2] = value
    return x


X, Y = batch()
BAD = {
    "label too large": ({"y": Y.clone().index_fill(0, torch.tensor(2), CLASSES)}, ValueError, r"0\.\.4.*1 of 8"),
    "label negative": ({"y": Y.clone().index_fill(0, torch.tensor(2), -1)}, ValueError, r"0\.\.4.*1 of 8"),
    "too few labels": ({"y": Y[:7]}, ValueError, r"y.*\[8\].*\[7\]"),
    "one-hot labels": ({"y": F.one_hot(Y, CLASSES)}, ValueError, r"y.*\[8\].*\[8, 5\]"),
    "float labels": ({"y": Y.double()}, TypeError, "y.*integers.*float64"),
    "labels in a list": ({"y": Y.tolist()}, TypeError, "y.*tensor.*list"),
    "labels elsewhere": ({"y": Y.to(DEVICE)}, ValueError, "y.*cpu.*meta"),
    "byte images": ({"x": (X * 255).byte()}, TypeError, "x_natural.*floating-point.*uint8"),
    "images in numpy": ({"x": X.numpy()}, TypeError, "x_natural.*ndarray"),
    "pixel above 1": ({"x": with_pixel(1.001)}, ValueError, r"x_natural.*\[0, 1\]"),
    "pixel below 0": ({"x": with_pixel(-0.001)}, ValueError, r"x_natural.*\[0, 1\]"),
    "pixel NaN": ({"x": with_pixel(math.nan)}, ValueError, r"x_natural.*\[0, 1\].*NaN"),
    "pixel infinite": ({"x": with_pixel(math.inf)}, ValueError, r"x_natural.*\[0, 1\]"),
    "empty batch": ({"x": X[:0], "y": Y[:0]}, ValueError, r"x_natural.*m >= 1.*\[0, 1, 6, 6\]"),
    "one-dimensional images": ({"x": X[:, 0, 0, 0]}, ValueError, r"x_natural.*\[m, ...\].*\[8\]"),
    "epsilon negative": ({"epsilon": -0.031}, ValueError, "epsilon.*at least 0.*-0.031"),
    "epsilon NaN": ({"epsilon": math.nan}, ValueError, "epsilon.*nan"),
    "step size 0": ({"step_size": 0.0}, ValueError, "step_size.*greater than 0.*0.0"),
    "step size negative": ({"step_size": -0.1}, ValueError, "step_size.*greater than 0.*-0.1"),
    "step size NaN": ({"step_size": math.nan}, ValueError, "step_size.*nan"),
    "negative steps": ({"perturb_steps": -1}, ValueError, "perturb_steps.*-1"),
    "fractional steps": ({"perturb_steps": 2.5}, (TypeError, ValueError), "perturb_steps.*2.5"),
    "epsilon in words": ({"epsilon": "x"}, TypeError, "epsilon must be a number, got 'x'"),
    "beta negative": ({"beta": -1.0}, ValueError, "beta.*at least 0, got -1.0"),
    "beta NaN": ({"beta": math.nan}, ValueError, "beta.*nan"),
    "no generator": ({"generator": 5}, TypeError, "generator must be a torch.Generator.*int"),
    "unknown distance": ({"distance": "l_1"}, ValueError, "distance.*'l_inf', 'l_2'.*'l_1'"),
    "unknown option": ({"unperturbed": "drop"}, ValueError, "unperturbed.*'keep'.*'skip'.*'drop'"),
    "NaN logits": ({"spoil": lambda z: z / 0 * 0}, ValueError, "logits.*finite.*<m> of <m>"),
    "infinite logits": ({"spoil": lambda z: z.abs() / 0}, ValueError, "logits.*finite.*<m> of <m>"),
    "a tuple of logits": ({"spoil": lambda z: (z, z)}, TypeError, "model.*tensor.*tuple"),
    "one logit": ({"spoil": lambda z: z[:, :1]}, ValueError, r"model.*K >= 2.*\[<m>, 1\]"),
    "no class dimension": ({"spoil": lambda z: z[:, 0]}, ValueError, r"model.*\[<m>, K\].*\[<m>\]"),
    "a map of logits": ({"spoil": lambda z: z[..., None]}, ValueError, r"model.*\[<m>, K\].*\[<m>, 5, 1\]"),
    "rows missing": ({"spoil": lambda z: z[1:]}, ValueError, r"model.*\[<m>, K\].*\[<m-1>, 5\]"),
    "decisions": ({"spoil": lambda z: z.argmax(dim=1)}, TypeError, "model.*int64"),
}


def identity(z):
    return z


BAD_FOR_EACH = [
    pytest.param(objective, name, id=f"{objective}-{name}")
    for objective in OBJECTIVES
    for name, (changed, *_) in BAD.items()
    if objective.robust or not changed.keys() & {"beta", "unperturbed"}
]


@BULLETS
@pytest.mark.parametrize(("objective", "name"), BAD_FOR_EACH)
def test_bad_input(objective, name, bullet):
    changed, error, message = BAD[name]
    options = {"x": X, "y": Y, "perturb_steps": 3, **changed}
    m = 8 if bullet else objective.rows_seen_before
    message = message.replace("<m>", str(m)).replace("<m-1>", str(m - 1))
    model = Wrapped(options.pop("spoil", identity))
    bullet = copy.deepcopy(bullet)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.body[1].eval()
    state = [model] if bullet is None else [model, bullet]
    before, random = snapshot(*state), torch.get_rng_state()
    with pytest.raises(error, match=message):
        objective.loss(model, options.pop("x"), options.pop("y"), sgd(model), **options, bullet=bullet)
    assert_unchanged(before, *state)
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("objective", [o for o in OBJECTIVES if o.rows_seen_before == 2], ids=str)
def test_logits_that_are_not_looked_at_before_the_attack_are_reported_by_their_gradient(objective):
    model = Wrapped(lambda z: torch.cat([z[:3], z[3:4] * math.nan, z[4:]]))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = snapshot(model)
    with pytest.raises(ValueError, match="input gradient must be finite, but held NaN for 1 of 8 samples"):
        objective.loss(model, X, Y, sgd(model))
    assert_unchanged(before, model)


@EACH
def test_bad_combinations_of_options(objective):
    model, bullet = build("conv_bn"), BulletTrain(7, 2, 0)
    before = snapshot(model, bullet)
    if objective.robust:
        with pytest.raises(ValueError, match=r"unperturbed.*bullet="):
            objective.loss(model, X, Y, None, unperturbed="keep")
    with pytest.raises(ValueError, match=r"perturb_steps is 5.*7 boundary steps"):
        objective.loss(model, X, Y, None, perturb_steps=5, bullet=bullet)
    with pytest.raises(ValueError, match=r"perturb_steps.*at least 1.*0"):
        objective.loss(model, X, Y, None, perturb_steps=0)
    with pytest.raises(ValueError, match=r"BulletTrain is on meta.*cpu"):
        objective.loss(model, X, Y, None, bullet=BulletTrain().to(DEVICE))
    assert_unchanged(before, model, bullet)


@BULLETS
@pytest.mark.parametrize("distance", DISTANCES)
@EACH
def test_a_gradient_with_nan_is_an_error_that_counts_the_samples(objective, bullet, distance):
    model, bullet = build(Undefined), copy.deepcopy(bullet)
    bright = [1, 4, 5]
    x, y = with_bright(bright)
    count = 3
    if bullet:
        y = own_labels(model, x)
        steps = copy.deepcopy(bullet).plan(model.eval()(x), y).steps
        count = int((steps[bright] > 0).sum())
        assert count
        model.train()
    state = [model] if bullet is None else [model, bullet]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = snapshot(*state)
    with pytest.raises(ValueError, match=f"input gradient must be finite, but held NaN for {count} of 8 samples"):
        objective.loss(model, x, y, sgd(model), perturb_steps=3, distance=distance, bullet=bullet)
    assert_unchanged(before, *state)


@EACH
def test_nan_logits_of_the_corrupted_batch_leave_the_fraction_alone(objective):
    calls, last = [], 4 + objective.forwards[1]
    model = looked_at(Wrapped(lambda z: z * math.nan if calls.append(1) or len(calls) == last else z))
    bullet = BulletTrain(3, 1, 0)
    bullet.robust_fraction.fill_(0.3)
    with pytest.raises(ValueError, match=r"adversarial_logits.*finite"):
        objective.loss(model, X, own_labels(model.body, X), None, perturb_steps=3, bullet=bullet)
    assert len(calls) == last
    assert bullet.robust_fraction.item() == 0.3
    assert all(m.training for m in model.modules())


@EACH
def test_the_optional_arguments_stay_where_the_authors_have_them(objective):
    parameters = list(inspect.signature(objective.loss).parameters.values())
    theirs = list(inspect.signature(objective.reference).parameters.values())
    assert [(p.name, p.default) for p in parameters[: len(theirs)]][4:] == [(p.name, p.default) for p in theirs][4:]
    assert [p.name for p in parameters[:4]] == ["model", "x_natural", "y", "optimizer"]
    of_memory = ["memory", "indices", "placement"]
    assert [p.name for p in parameters[len(theirs) :]] == ["bullet", "engine", "generator", *of_memory, "deprecated"]
    assert {p.kind for p in parameters[len(theirs) : -1]} == {inspect.Parameter.KEYWORD_ONLY}


@EACH
def test_what_is_no_optimizer_or_bullet_is_named(objective):
    model = build("conv_bn")
    with pytest.raises(TypeError, match="optimizer must be an optimizer or None, got str"):
        objective.loss(model, X, Y, "sgd")
    with pytest.raises(TypeError, match="bullet must be a BulletTrain or None, got int"):
        objective.loss(model, X, Y, None, bullet=3)


@pytest.mark.parametrize("bullet", [None, BulletTrain()], ids=["uniform", "bullet"])
@EACH
def test_a_model_that_returns_something_else_in_train_mode_is_named_and_keeps_its_gradients(objective, bullet):
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = build("conv_bn")

        def forward(self, x):
            return (self.body(x), x) if self.training else self.body(x)

    model = Auxiliary()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(TypeError, match="model must return a floating-point tensor of logits, got tuple"):
        objective.loss(model, X, Y, sgd(model), bullet=bullet)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("start", ["normal", "uniform"])
@pytest.mark.parametrize("bullet", [False, True])
@EACH
def test_a_numbered_sample_is_attacked_alike_in_any_batch(objective, bullet, start, distance):
    """Without batch norm, the whole batch's gradient is the mean of the gradients of two shuffled halves."""
    x, y = batch(8)
    numbers = torch.tensor([5, 2**32 - 1, 0, 7, 1, 2**31, 3, 4])
    given = objective.options(distance) | {"start": start, "perturb_steps": 3}
    parts = [torch.tensor([3, 0, 6, 5]), torch.tensor([1, 7, 4, 2])]

    def gradient(rows):
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, 5))
        torch.manual_seed(0)
        for p in model.double().parameters():
            nn.init.normal_(p, std=0.5)
        torch.manual_seed(4)  # the global generator's state does not matter
        generator = torch.Generator().manual_seed(9)
        torch.rand(len(rows), generator=generator)
        options = given | {"bullet": BulletTrain(3, 1, 0, policy="uniform") if bullet else None}
        loss = objective.loss(model, x[rows], y[rows], None, **options, generator=generator, samples=numbers[rows])
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    whole, *halves = (gradient(rows) for rows in (torch.arange(8), *parts))
    torch.testing.assert_close(sum(halves) / 2, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("samples", [torch.arange(7), torch.rand(8), [1] * 8])
@EACH
def test_numbers_that_fit_no_batch_are_named(objective, samples):
    x, y = batch(8)
    with pytest.raises((TypeError, ValueError), match="samples must"):
        objective.loss(build(), x, y, None, samples=samples)
