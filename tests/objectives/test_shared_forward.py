"""One clean forward in train mode for mining, target and update: against the same written out plainly, in float64."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gloo_ranks import run_ranks
from objective_cases import OBJECTIVES
from small_models import assert_unchanged, batch, build, gradients, snapshot
from test_objectives import assert_same_update, confident, own_labels, recorded, seeded, sgd
from test_robust_half import mart_of_one, permutation, weights_of
from tolerances import assert_near, assert_near_nested
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from bt_fast import AWP, PGD, AdversarialLoss, BulletTrain, HalfDrawn, MARTLoss, PGDLoss, TRADESLoss

EPSILON, STEP = 0.1, 0.03
KINDS = {"trades": TRADESLoss, "mart": MARTLoss}
EACH = pytest.mark.parametrize("name", KINDS)


def labels_of(model, x):
    """The model's own decisions in train mode, the first two of them falsified."""
    y = copy.deepcopy(model).train()(x).argmax(dim=1)
    y[:2] = (y[:2] + 1) % 5
    return y


def groups_of(z, y, f_r):
    """The groups by Eq. 4 to 6 of these logits."""
    p = z.softmax(dim=1).numpy()
    svar = [(1 if row.argmax() == label else -1) * row.var() for row, label in zip(p, y.tolist(), strict=True)]
    threshold = max(0.0, np.quantile(svar, 1 - f_r))
    return ["outlier" if s < 0 else "robust" if f_r > 0 and s >= threshold else "boundary" for s in svar]


def moved(name, model, x, y, target, start, n, alpha):
    """x' of one sample after n steps away from the fixed target, or from the label."""
    for _ in range(n):
        probe = start.detach().requires_grad_()
        logits = model(probe)
        loss = (
            F.kl_div(logits.log_softmax(1), target, reduction="sum") if name == "trades" else F.cross_entropy(logits, y)
        )
        (g,) = torch.autograd.grad(loss, probe)
        start = torch.minimum(torch.maximum(start + alpha * g.sign(), x - EPSILON), x + EPSILON).clamp(0, 1)
    return start


def written_out(name, model, x, y, starts, plan_of, beta=6.0):
    """Loss, z', weights; `plan_of(z)` gives steps, step sizes, weights and the samples of the adversarial forward."""
    model.train()
    z = model(x)
    steps, sizes, weights, taken = plan_of(z.detach())
    model.eval()
    target, x_adv = z.detach().softmax(dim=1), x.clone()
    for i, n in enumerate(steps):
        one = (x[i : i + 1], y[i : i + 1], target[i : i + 1], starts[i : i + 1])
        x_adv[i] = moved(name, model, *one, n, sizes[i])[0] if n else x[i]
    model.train()
    joined = taken if len(taken) != 1 else taken + [i for i in range(len(x)) if i not in taken][:1]
    z_adv = dict(enumerate(z)) | (dict(zip(taken, model(x_adv[joined]), strict=False)) if taken else {})
    if name == "mart":
        rows = [w * mart_of_one(z[i], z_adv[i], y[i], beta) for i, w in enumerate(weights)]
        return sum(rows) / len(x), z_adv, weights
    kl = [F.kl_div(z_adv[i].log_softmax(0), z[i].softmax(0), reduction="sum") for i in range(len(x))]
    return F.cross_entropy(z, y) + beta / len(x) * sum(w * k for w, k in zip(weights, kl, strict=True)), z_adv, weights


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("engine", ["exact", "fast"])
@EACH
def test_it_is_the_loop_with_one_clean_forward(name, engine, skip, half):
    policy, f_r = (3, 2, 0), 0.5
    models = [confident(), confident()]
    optimizers = [sgd(m) for m in models]
    bullet = BulletTrain(3, HalfDrawn(2) if half else 2, 0, unperturbed="skip" if skip else "keep")
    bullet.robust_fraction.fill_(f_r)
    criterion = KINDS[name](PGD(EPSILON, STEP, 3), 6.0, mining=bullet, clean_updates="shared", engine=engine)
    objective = next(o for o in OBJECTIVES if o.name == name)
    forwards = recorded(models[1]) if engine == "exact" else None
    seen = set()
    for k in range(3):
        x, _ = batch(11, seed=k)
        y = labels_of(models[0], x)
        generator, share = seeded(k), f_r
        starts = objective.starts(x, generator, {"epsilon": EPSILON, "distance": "l_inf"})

        def plan_of(z, y=y, generator=generator, share=share):
            groups = groups_of(z, y, share)
            seen.update(groups)
            weights = weights_of(groups, permutation(11, generator)) if half else [1.0] * 11
            steps = [dict(zip(("boundary", "robust", "outlier"), policy, strict=True))[g] for g in groups]
            sizes = [STEP if g == "boundary" else 1.7 * EPSILON / 2 for g in groups]
            return steps, sizes, weights, [i for i, n in enumerate(steps) if weights[i] and (n or not skip)]

        optimizers[0].zero_grad()
        loss, z_adv, weights = written_out(name, models[0], x, y, starts, plan_of)
        for group in () if forwards is None else forwards.values():
            group.clear()
        optimizers[1].zero_grad()
        ours = criterion(models[1], x, y, generator=seeded(k))
        assert_same_update(models, loss, ours)
        f_r = 0.9 * f_r + 0.08 * sum(w for i, w in enumerate(weights) if w and z_adv[i].argmax() == y[i]) / 11
        assert_near(bullet.robust_fraction, f_r)
        if forwards is not None:
            assert len(forwards[True]) == 2
            assert torch.equal(forwards[True][0], x)
            assert len(forwards[False]) == 3  # the attack's steps alone
        for optimizer in optimizers:
            optimizer.step()
    assert seen == {"outlier", "boundary", "robust"}
    assert models[1][1].num_batches_tracked == 6


@pytest.mark.parametrize(("name", "inner"), [("trades", None), ("mart", "kl")])
def test_without_mining_the_attack_s_target_and_the_update_share_it(name, inner):
    models = [confident(), confident()]
    x, _ = batch()
    y = own_labels(models[0], x)
    torch.manual_seed(3)
    starts = x + 0.001 * torch.randn(x.shape)

    def plan_of(_):
        return [3] * 8, [STEP] * 8, [1.0] * 8, list(range(8))

    models[0].train()
    z = models[0](x)
    models[0].eval()
    x_adv = torch.cat(
        [
            moved(
                "trades",
                models[0],
                x[i : i + 1],
                y[i : i + 1],
                z.detach()[i : i + 1].softmax(1),
                starts[i : i + 1],
                3,
                STEP,
            )
            for i in range(8)
        ]
    )
    models[0].train()
    z_adv = models[0](x_adv)
    if name == "mart":
        loss = sum(mart_of_one(z[i], z_adv[i], y[i], 6.0) for i in range(8)) / 8
    else:
        loss = F.cross_entropy(z, y) + 6.0 / 8 * F.kl_div(z_adv.log_softmax(1), z.softmax(1), reduction="sum")
    torch.manual_seed(3)
    criterion = KINDS[name](PGD(EPSILON, STEP, 3, inner=inner), 6.0, clean_updates="shared", engine="exact")
    assert_same_update(models, loss, criterion(models[1], x, y))
    assert criterion.last.logits.shape == (8, 5)


def mined(**options):
    bullet = BulletTrain(3, 2, 0, **options)
    bullet.robust_fraction.fill_(0.5)
    return bullet


def shared(name, bullet=None, **options):
    given = {"mining": bullet or mined(), "clean_updates": "shared", "engine": "exact"}
    return KINDS[name](PGD(EPSILON, STEP, 3), 6.0, **given | options)


WRONG = {
    "label": (lambda x, y: y.fill_(7), ValueError, "must lie in 0..4"),
    "pixel": (lambda x, y: x[3].fill_(1.5), ValueError, r"x must lie in \[0, 1\]"),
    "NaN": (lambda x, y: x[3].fill_(torch.nan), ValueError, "NaN"),
}


@pytest.mark.parametrize("engine", ["exact", "fast"])
@pytest.mark.parametrize("wrong", WRONG)
@EACH
def test_an_error_in_the_input_leaves_everything_as_it_was(name, wrong, engine):
    model, criterion = confident(), shared(name, engine=engine)
    x, y = batch()
    change, error, message = WRONG[wrong]
    change(x, y)
    before = snapshot(model, criterion)
    with pytest.raises(error, match=message):
        criterion(model, x, y)
    assert_unchanged(before, model, criterion)


class Holder:
    pass


class Recomputed(nn.Module):
    """Runs its first layers under a checkpoint."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body[4:](checkpoint(self.body[:4], x, use_reentrant=False))


@EACH
def test_activations_may_be_recomputed(name):
    x, _ = batch(11)
    models = [confident(), Recomputed(confident())]
    y = own_labels(models[0], x)
    results = []
    for model in models:
        model.eval()
        loss = shared(name)(model, x, y, generator=seeded(0))
        loss.backward()
        assert not any(module.training for module in model.modules())
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for ours, plain in zip(*results, strict=True):
        assert_near(ours, plain)


@EACH
def test_a_further_pass_runs_its_own_clean_forward_and_nothing_of_the_first_is_kept(name):
    x, _ = batch(11)
    model, criterion = confident(), shared(name)
    y = own_labels(model, x)
    holder = Holder()
    loss = criterion(model, x, y)
    loss.grad_fn.metadata["holder"] = holder  # freed with the graph
    first, f_r = weakref.ref(holder), criterion.mining.robust_fraction.clone()
    del holder
    loss.backward()
    seen, record = [], criterion.last
    hook = model.register_forward_pre_hook(lambda m, args: seen.append((m.training, len(args[0]))))
    with criterion.again():
        again = criterion(model, x, y)
    assert seen == [(True, 11), (True, 11)]
    assert_near(again.detach(), loss.detach())
    again.backward()
    seen.clear()
    with criterion.again(reuse=False):
        criterion(model, x, y).backward()
    assert seen[0] == (True, 11)
    assert sum(training for training, _ in seen) == 2
    hook.remove()
    del loss, again
    gc.collect()
    assert first() is None
    assert torch.equal(criterion.mining.robust_fraction, f_r)
    assert record.logits.grad_fn is None


@pytest.mark.parametrize("samples", ["all", "moved"])
@EACH
def test_awp_s_first_pass_shares_it_and_leaves_no_trace_in_the_buffers(name, samples):
    x, _ = batch(11)
    model, criterion, given = confident(), shared(name), []
    y = own_labels(model, x)
    expected = copy.deepcopy(model).train()(x).detach()

    def watched(clean, adversarial, labels):
        given.append((clean.detach(), labels))
        return type(criterion).objective(criterion, clean, adversarial, labels)

    criterion.objective = watched
    with AWP(model, samples=samples)(criterion, x, y) as loss:
        loss.backward()
    (clean, labels), (second, _) = given
    rows = [(expected - row).abs().sum(dim=1).argmin().item() for row in clean]
    assert_near(clean, expected[rows])
    assert torch.equal(labels, y[rows])
    steps = criterion.last.steps
    assert len(rows) == 11 if samples == "all" else sorted(rows) == steps.nonzero().flatten().tolist()
    assert len(second) == 11
    assert model[1].num_batches_tracked == 2


def test_a_further_term_gets_its_logits():
    x, _ = batch(11)
    model, seen = confident(), []
    y = own_labels(model, x)
    expected = copy.deepcopy(model).train()(x).detach()

    def extra(given):
        seen.append(given.logits)
        return given.logits.square().mean()

    criterion = shared("trades", extra=extra)
    criterion(model, x, y).backward()
    assert_near(seen[0].detach(), expected)
    assert_near(criterion.last.logits, expected)


@EACH
def test_in_16_bits_it_is_under_autocast_too(name):
    x, y = batch(dtype=torch.float32)
    model = build(dtype=torch.float32)
    criterion = shared(name, engine="bf16")
    criterion(model, x, y).backward()
    assert criterion.last.logits.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def of_two_ranks():
    """Gradients and buffers of a rank's own images, averaged over the ranks by hand and by the wrapper."""
    x = batch(22)[0].chunk(2)[dist.get_rank()]
    results = []
    for wrap in (False, True):
        model = confident()
        y = own_labels(model, x)
        outer = DistributedDataParallel(model) if wrap else model
        for _ in range(2):
            for buffer in [] if wrap else model.buffers():
                dist.broadcast(buffer, 0)  # as the wrapper does before a forward in train mode
            model.zero_grad()
            shared("trades")(outer, x, y, generator=seeded(0)).backward()
        for p in [] if wrap else model.parameters():
            dist.all_reduce(p.grad)
            p.grad /= 2
        results.append({**gradients(model), **dict(model.named_buffers())})
    return results


def test_ranks_average_its_gradients_through_distributed_data_parallel():
    (by_hand, ours), (_, others) = run_ranks(2, of_two_ranks)
    assert_near_nested(ours, by_hand)
    assert all(torch.equal(ours[name], others[name]) for name in ours if name.endswith(("weight", "bias")))


def test_explain_and_repr_say_it():
    criterion, model = shared("mart"), confident()
    criterion(model, *batch())
    assert "update: eagerly, since its clean forward comes before the attack" in criterion.explain()
    assert "clean_updates='shared'" in repr(criterion)
    assert "clean_updates" not in repr(MARTLoss(PGD(EPSILON, STEP, 3)))
    assert "clean_updates='shared'" in repr(shared("trades"))


class Own(AdversarialLoss):
    clean_shared = True

    def objective(self, clean_logits, adversarial_logits, y):
        return F.cross_entropy(clean_logits + adversarial_logits, y)


def test_bad_input():
    attack = PGD(EPSILON, STEP, 3)
    with pytest.raises(ValueError, match="clean_updates must be 1 or 2, got 3"):
        TRADESLoss(attack, clean_updates=3)
    with pytest.raises(ValueError, match="clean_updates must be 1, got 2: write clean_updates=1, or 'shared'"):
        MARTLoss(attack, clean_updates=2)
    with pytest.raises(ValueError, match="clean_updates must be a number or 'shared', got 'own'"):
        MARTLoss(attack, clean_updates="own")
    with pytest.raises(TypeError, match="clean_updates must be an integer, got None"):
        TRADESLoss(attack, clean_updates=None)
    for kind in (MARTLoss, TRADESLoss):
        with pytest.raises(ValueError, match="clean_updates must be 1 without mining and with the inner loss 'margin'"):
            kind(PGD(EPSILON, STEP, 3, inner="margin"), clean_updates="shared")
        with pytest.raises(ValueError, match="statistics must be 'running' with clean_updates='shared', got 'batch'"):
            kind(PGD(EPSILON, STEP, 3, statistics="batch", inner="kl"), clean_updates="shared")
    with pytest.raises(TypeError, match="clean_updates"):
        PGDLoss(attack, clean_updates="shared")
    criterion = TRADESLoss(attack, clean_updates="shared")
    criterion.attack = PGD(EPSILON, STEP, 3, inner="margin")
    with pytest.raises(ValueError, match="clean_updates must be 1 without mining"):
        criterion(confident(), *batch())
    criterion = TRADESLoss(attack, mining=mined(), clean_updates="shared")
    criterion.clean_forwards = 2
    with pytest.raises(
        ValueError, match=r"^clean_forwards must be 1 with clean_shared, got 2: write clean_forwards = 1"
    ):
        criterion(confident(), *batch())
    Own(attack, mining=mined(), engine="exact")(confident(), *batch()).backward()
