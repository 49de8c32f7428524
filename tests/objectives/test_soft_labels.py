"""Labels that are distributions: in every loss, in `perturb`, and under every engine."""

import copy

import pytest
import reference_forks
import torch
from emulated_device import EmulatedDevice
from gloo_ranks import RankError, run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from mixed_images import MIXED, mixup
from pretended_device import DEVICE, pretended_device
from reference_mart import loss_of_logits
from small_models import CLASSES, SHAPE, assert_unchanged, batch, build, gradients, looked_at, snapshot
from tolerances import assert_near, assert_near_nested
from torch import distributed as dist
from torch import nn

from bt_fast import (
    PGD,
    AugMixLoss,
    BulletTrain,
    Engine,
    MARTLoss,
    PGDLoss,
    TRADESLoss,
    augmix_loss,
    mart_loss,
    ops,
    perturb,
    pgd_loss,
    trades_loss,
)
from bt_fast.attack.start import random_state, sorted_start
from bt_fast.baselines.grad_align import grad_align
from bt_fast.baselines.yopo import yopo_loss
from bt_fast.labels import class_of

ATTACK = PGD(0.1, 0.03, 4)
BY_LABEL = PGD(0.1, 0.03, 4, inner="cross_entropy")
LOSSES = {
    "trades": lambda mining=None, **options: TRADESLoss(ATTACK, mining=mining, **options),
    "trades by label": lambda mining=None, **options: TRADESLoss(BY_LABEL, mining=mining, **options),
    "mart": lambda mining=None, **options: MARTLoss(ATTACK, mining=mining, **options),
    "pgd": lambda mining=None, **options: PGDLoss(ATTACK, mining=mining, **options),
    "augmix": lambda mining=None, **options: AugMixLoss(mining, **options),
}
EACH = pytest.mark.parametrize("name", LOSSES)
MINED = pytest.mark.parametrize("mined", [False, True], ids=["uniform", "mined"])


def mining_of(name, mined, **options):
    if not mined:
        return None
    return BulletTrain(*((1, 0, 0) if name == "augmix" else (4, 2, 0)), **options)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def confident(dtype=torch.float64):
    """A model sure enough of some images for all groups to occur."""
    model = build("conv_bn", dtype=dtype)
    with torch.no_grad():
        model[-1].weight.mul_(4.0)
    return looked_at(model)


def own_labels(model, x, wrong=3):
    """The model's own decisions, the first ones falsified."""
    with torch.no_grad():
        y = copy.deepcopy(model).eval()(x).argmax(dim=1)
    y[:wrong] = (y[:wrong] + 1) % CLASSES
    return y


def trained(name, mined, labels_of, engine="exact", steps=3):
    """Losses, gradients, buffers and the mining's state of some updates."""
    model, mining, result = confident(), mining_of(name, mined), []
    criterion = LOSSES[name](mining, engine=engine)
    for k in range(steps):
        x, _ = batch(12, seed=k)
        torch.manual_seed(k)
        loss = criterion(model, x, labels_of(own_labels(model, x)))
        loss.backward()
        state = {} if mining is None else {f"mining {n}": v.clone() for n, v in mining.state_dict().items()}
        buffers = {f"buffer {n}": v.clone() for n, v in model.named_buffers()}
        result.append({"loss": loss.detach(), **gradients(model), **buffers, **state})
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(0.1 * p.grad)
                p.grad = None
    return result


def one_hot(y):
    return torch.eye(CLASSES, dtype=torch.float64)[y]


@EACH
@MINED
@pytest.mark.parametrize("engine", ["exact", "fast"])
def test_a_distribution_of_one_class_is_that_class(name, mined, engine):
    results = [
        trained(name, mined, labels_of, engine) for labels_of in (lambda y: y, one_hot, lambda y: one_hot(y).half())
    ]
    for soft in results[1:]:
        for expected, result in zip(results[0], soft, strict=True):
            assert_near_nested(result, expected)


# The objectives are the expectation over the label

LOGITS = st.sampled_from([0.0, 1.0, -1.0, 0.3, -2.5, 4.0, 30.0, -30.0, 300.0])


@st.composite
def cases(draw):
    m, k = draw(st.integers(1, 3)), draw(st.sampled_from([2, 3, 5]))
    z, z_adv = (
        torch.tensor(draw(st.lists(st.lists(LOGITS, min_size=k, max_size=k), min_size=m, max_size=m))) for _ in "ab"
    )
    parts = draw(st.lists(st.lists(st.integers(0, 4), min_size=k, max_size=k).filter(any), min_size=m, max_size=m))
    y = torch.tensor(parts).double()
    noise = torch.rand(m, k, generator=seeded(draw(st.integers(0, 99)))).double()  # no two logits are equal
    return z.double() + noise, z_adv.double() - 0.3 * noise, y / y.sum(dim=1, keepdim=True)


@settings(max_examples=80, deadline=None)
@given(case=cases(), kind=st.sampled_from([TRADESLoss, MARTLoss, PGDLoss]))
def test_a_loss_of_soft_labels_is_the_expectation_of_that_of_classes(case, kind):
    z, z_adv, y = case
    criterion = kind(ATTACK)
    results = []
    for expected in (False, True):
        logits = [v.clone().requires_grad_() for v in (z, z_adv)]
        if expected:
            rows = [
                y[i, k] / len(y) * criterion.objective(*(v[i : i + 1] for v in logits), torch.tensor([k]))
                for i in range(len(y))
                for k in range(y.shape[1])
                if y[i, k] > 0
            ]
            loss = sum(rows)
        else:
            loss = criterion.objective(*logits, y)
        loss.backward()
        results.append([loss.detach(), *(torch.zeros_like(v) if v.grad is None else v.grad for v in logits)])
    for ours, theirs in zip(*results, strict=True):
        assert_near(ours, theirs)


def test_mart_of_a_soft_label_is_its_authors_loss_of_each_class_mixed():
    z, z_adv = torch.randn(2, 8, CLASSES, generator=seeded(0), dtype=torch.float64)
    y = torch.randint(CLASSES, (8,), generator=seeded(1))
    soft = mixup(torch.zeros(8, *SHAPE), y, CLASSES, share=0.75)[1]
    expected = 0.75 * loss_of_logits(z, z_adv, y, 6.0) + 0.25 * loss_of_logits(z, z_adv, y.roll(1), 6.0)
    assert_near(MARTLoss(ATTACK, 6.0).objective(z, z_adv, soft.double()), expected)


@pytest.mark.parametrize("kind", [TRADESLoss, MARTLoss, PGDLoss])
def test_a_class_that_is_ruled_out_costs_nothing_where_its_part_is_0(kind):
    z = torch.randn(4, CLASSES, generator=seeded(0), dtype=torch.float64)
    z[:, 2] = -torch.inf
    y = torch.tensor([[0.5, 0.5, 0.0, 0.0, 0.0]] * 4).double()
    logits = [z.clone().requires_grad_(), z.flip(0).clone().requires_grad_()]
    loss = kind(ATTACK).objective(*logits, y)
    loss.backward()
    assert loss.isfinite()
    assert all(v.grad.isfinite().all() for v in logits if v.grad is not None)


# The attack


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_attack_climbs_kl_to_the_soft_label(name, norm):
    model, (x, y) = confident(), MIXED[name](*batch(12), CLASSES)
    y = with_classes(y, own_labels(model, x)).double()
    y /= y.sum(dim=1, keepdim=True)  # the sum of one in float32 misses 1 by 1e-8, which KL's gradient has as a factor
    attack = PGD(0.1 if norm == "linf" else 0.8, 0.03 if norm == "linf" else 0.25, 4, norm, inner="cross_entropy")
    mining = BulletTrain(4, 2, 0)
    mining.robust_fraction.fill_(0.5)
    found = perturb(model, x, y, attack, mining, generator=seeded(5), return_details=True)
    model.eval()
    assert torch.equal(found.group > ops.OUTLIER, found.logits.argmax(dim=1) == y.argmax(dim=1))
    assert len(found.steps.unique()) == 3
    start = sorted_start(x, None, None, random_state(x, seeded(5)), "normal", attack.threat)[1]
    for i, n in enumerate(found.steps.tolist()):
        size = attack.step_size if n == 4 else 1.7 * attack.epsilon / max(n, 1)
        expected = start[i : i + 1] if n else x[i : i + 1]
        for _ in range(n):
            expected = moved(model, expected, x[i : i + 1], y[i : i + 1].double(), size, attack)
        assert_near(found.x_adv[i : i + 1], expected, msg=f"sample {i} of {n} steps")


def with_classes(y, classes):
    """Distributions y [m, K] whose largest part has changed places with that of the given class, [m]."""
    places = torch.arange(y.shape[1]).repeat(len(y), 1)
    largest, at = y.argmax(dim=1, keepdim=True), classes[:, None]
    return y.gather(1, places.scatter(1, at, largest).scatter(1, largest, at))


def moved(model, at, x, y, size, attack):
    at = at.detach().requires_grad_()
    (g,) = torch.autograd.grad(nn.functional.kl_div(model(at).log_softmax(dim=1), y, reduction="sum"), at)
    if attack.norm == "linf":
        at = at.detach() + size * g.sign()
        return torch.minimum(torch.maximum(at, x - attack.epsilon), x + attack.epsilon).clamp(0, 1)
    return x + ((at.detach() + size * g / g.norm()).clamp(0, 1) - x).renorm(2, 0, attack.epsilon)


def test_without_mining_too():
    model, (x, y) = confident(), mixup(*batch(12), CLASSES)
    attack = PGD(0.1, 0.03, 4, start="uniform", inner="cross_entropy")
    torch.manual_seed(0)
    result = perturb(model, x, y, attack)
    torch.manual_seed(0)
    start = reference_forks.uniform_start(x, 0.1, "l_inf")
    model.eval()
    expected = reference_forks.ascended(
        model, x, start, lambda z: nn.functional.kl_div(z.log_softmax(dim=1), y.double(), reduction="sum"), 0.03, 0.1, 4
    )
    assert_near(result, expected)


def test_the_attack_does_not_see_the_smoothing():
    model, (x, y) = confident(), batch(8)
    x_adv = []
    for s in (0.0, 0.3):
        torch.manual_seed(0)
        criterion = PGDLoss(ATTACK, label_smoothing=s, engine="exact")
        criterion(copy.deepcopy(model), x, y)
        x_adv.append(criterion.last.x_adv)
    assert torch.equal(*x_adv)


@MINED
def test_the_oracle_attacks_the_soft_label(mined):
    model, (x, y) = confident(), mixup(*batch(12), CLASSES)
    mining = BulletTrain(4, 2, 0, policy="oracle") if mined else None
    criterion = PGDLoss(ATTACK, mining=mining, engine="exact")
    criterion(model, x, y).backward()
    assert criterion.last.steps.unique().numel() > 1 if mined else True


# In the functions, in 16 bits, under graphs, on ranks


DROP_INS = {"trades": trades_loss, "mart": mart_loss, "pgd": pgd_loss}


@pytest.mark.parametrize("name", DROP_INS)
@MINED
def test_the_drop_ins_take_them(name, mined):
    model, (x, y) = confident(), mixup(*batch(12), CLASSES)
    values = []
    for as_function in (True, False):
        torch.manual_seed(0)
        twin, mining = copy.deepcopy(model), mining_of(name, mined)
        if as_function:
            loss = DROP_INS[name](twin, x, y, None, 0.03, 0.1, 10 if mined else 4, bullet=mining)
        else:
            options = {"trades": {"beta": 1.0}}.get(name, {})
            loss = (
                LOSSES[name](mining, engine="exact", **options)
                if not options
                else TRADESLoss(ATTACK, 1.0, mining=mining, engine="exact")
            )
            loss = loss(twin, x, y)
        loss.backward()
        values.append({"loss": loss.detach(), **gradients(twin)})
    assert all(torch.equal(values[0][n], values[1][n]) for n in values[0])


def test_augmix_loss_takes_them():
    model, (x, y) = confident(), mixup(*batch(8), CLASSES)
    expected = AugMixLoss(engine="exact")(copy.deepcopy(model), x, y, generator=seeded(0))
    assert torch.equal(augmix_loss(copy.deepcopy(model), x, y, generator=seeded(0)), expected)


@EACH
@MINED
def test_in_16_bits_they_are_near_single_precision(name, mined):
    model = confident(torch.float32)
    x, y = mixup(*batch(12, dtype=torch.float32), CLASSES)
    losses = []
    for engine, labels in (("exact", y), ("bf16", y.bfloat16())):
        torch.manual_seed(0)
        loss = LOSSES[name](mining_of(name, mined), engine=engine)(copy.deepcopy(model), x, labels)
        loss.backward()
        assert loss.dtype == torch.float32
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


SIXTEEN = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def rounded_labels(dtype, m=12):
    """Distributions in 16 bits whose sums are 1 to their rounding alone."""
    x, y = batch(m, dtype=torch.float32)
    share = torch.linspace(0.51, 0.93, m)[:, None]
    labels = (share * torch.eye(CLASSES)[y] + (1 - share) * torch.eye(CLASSES)[y.roll(1)]).to(dtype)
    assert ((labels.double().sum(dim=1) - 1).abs() > 1e-5).any()
    return x, labels


@EACH
@SIXTEEN
def test_mining_takes_labels_that_are_rounded_to_16_bits(name, dtype):
    model, (x, y) = confident(torch.float32), rounded_labels(dtype)
    states = []
    for labels in (y, y.argmax(dim=1)):
        torch.manual_seed(0)
        mining = mining_of(name, True)
        LOSSES[name](mining, engine="exact")(copy.deepcopy(model), x, labels)
        states.append(mining.group_counts.tolist())
    assert states[0] == states[1]


@SIXTEEN
@pytest.mark.parametrize("mined", [False, True])
@pytest.mark.parametrize("inner", ["margin", "dlr"])
def test_the_margins_of_labels_that_are_rounded_to_16_bits_are_those_of_their_classes(inner, mined, dtype):
    model, (x, y) = confident(torch.float32), rounded_labels(dtype)
    attack, moved = PGD(0.1, 0.03, 4, start="clean", inner=inner), []
    for labels in (y, y.argmax(dim=1)):
        mining = BulletTrain(4, 2, 0, policy="oracle") if mined else None
        torch.manual_seed(0)
        moved.append(perturb(model, x, labels, attack, mining))
    assert torch.equal(*moved)


def test_under_the_callers_autocast_they_are_near_single_precision():
    model, (x, y) = confident(torch.float32), mixup(*batch(12, dtype=torch.float32), CLASSES)
    losses = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(MARTLoss(ATTACK, engine="exact")(copy.deepcopy(model), x, y).item())
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.parametrize("name", ["trades by label", "mart"])
def test_updates_of_both_kinds_of_labels_are_captured_apart(name):
    def run(engine):
        model, result = build("conv_bn"), []
        criterion = LOSSES[name](engine=engine, label_smoothing=0.1, smoothing="others")
        for k in range(5):
            torch.manual_seed(k)
            x, y = batch(6, seed=k)
            labels = mixup(x, y, CLASSES)[1] if k % 2 else y
            loss = criterion(model, x, labels)
            loss.backward()
            result += [v.detach().clone() for v in (loss, *(p.grad for p in model.parameters()), *model.buffers())]
            model.zero_grad()
        return result, criterion.explain()

    expected, _ = run("exact")
    with EmulatedDevice() as emulated:
        result, explained = run(Engine(graphs=True))
    assert emulated.replays
    assert "update: from CUDA graphs, 2 captured" in explained
    for seed in range(2):
        assert all(torch.equal(a, b) for a, b in zip(emulated.shuffled(seed, result), expected, strict=True))


@EACH
@MINED
def test_on_a_device_they_cost_no_further_read(name, mined):
    started = []
    for soft in (False, True):
        model = build("conv_bn", dtype=torch.float32).to(DEVICE)
        x = torch.empty(8, *SHAPE, device=DEVICE)
        y = torch.zeros(8, dtype=torch.int64, device=DEVICE)
        y = torch.empty(8, CLASSES, device=DEVICE) if soft else y
        mining = mined and mining_of(name, mined).to(DEVICE)
        plan = [8, *([4, 2, 2] if name == "augmix" else [7, 3, 3, 1, 3, 4])] if mined else []
        criterion = LOSSES[name](mining or None, engine="exact")
        with pretended_device(plan=plan) as reads:
            criterion(model, x, y).backward()
            if mined:
                mining.observe(torch.empty(8, CLASSES, device=DEVICE), y)
        started.append((reads.started, reads.waited))
    assert started[0] == started[1]


def of_ranks():
    """Two steps of a rank, with labels of one kind on all ranks, and with another on the first."""
    rank, results = dist.get_rank(), []
    for soft in (False, rank == 0):
        model, bullet = confident(), BulletTrain(4, 2, 0, process_group=dist.group.WORLD)
        x, y = batch(6, seed=rank)
        y = own_labels(model, x)
        for _ in range(2):
            criterion = TRADESLoss(BY_LABEL, mining=bullet, engine="exact")
            criterion(model, x, one_hot(y) if soft else y, generator=seeded(0)).backward()
        bullet.finish()
        results.append([*bullet.buffers(), *(p.grad for p in model.parameters())])
    return results


def test_ranks_mine_together_whatever_kind_of_labels_each_has():
    for expected, result in run_ranks(2, of_ranks):
        for value, other in zip(result, expected, strict=True):
            torch.testing.assert_close(value, other, rtol=0, atol=1e-10)


def bad_on_one_rank():
    model, rank = confident(), dist.get_rank()
    x, y = batch(6, seed=rank)
    labels = one_hot(y)
    labels[2] *= 1.0 + rank
    TRADESLoss(ATTACK, mining=BulletTrain(4, process_group=dist.group.WORLD))(model, x, labels)


def test_what_is_no_distribution_on_one_rank_is_raised_on_all():
    with pytest.raises(RankError) as reported:
        run_ranks(2, bad_on_one_rank)
    assert str(reported.value).count("ValueError: rank 1: y must hold distributions") == 2


# A second pass


@pytest.mark.parametrize("name", LOSSES)
def test_a_further_pass_takes_them_and_knows_other_ones(name):
    model, mining = confident(), mining_of(name, True)
    criterion = LOSSES[name](mining, engine="exact")
    x, y = mixup(*batch(12), CLASSES)
    criterion(model, x, y)
    before = snapshot(mining)
    with mining.again():
        criterion(model, x, y).backward()
        with pytest.raises(ValueError, match=r"but 12 of 12 samples are others"):
            criterion(model, x, y.roll(1, 1))
        with pytest.raises(ValueError, match=r"y of shape \[12, 5\], got \[12\]"):
            criterion(model, x, class_of(y))
    assert_unchanged(before, mining)


# Bad input: the error names it, and nothing has changed


X, SOFT = mixup(*batch(8), CLASSES)


def spoilt(row):
    labels = SOFT.clone()
    labels[2] = torch.tensor(row)
    return labels


BAD = {
    "a sum above 1": (spoilt([0.5, 0.6, 0.0, 0.0, 0.0]), r"y must hold distributions, .* but 1 of 8 are not"),
    "a part below 0": (spoilt([1.5, -0.5, 0.0, 0.0, 0.0]), r"y must hold distributions, .* but 1 of 8 are not"),
    "NaN": (spoilt([torch.nan, 1.0, 0.0, 0.0, 0.0]), r"y must hold distributions, .* but 1 of 8 are not"),
    "more classes": (
        torch.full((8, 8), 0.125),
        r"y must have a column for each of the model's 5 classes, got .*\[8, 8\]",
    ),
    "fewer classes": (
        torch.full((8, 2), 0.5),
        r"y must have a column for each .*: write num_classes=5 where y are made",
    ),
    "other rows": (SOFT[:7], r"y must have shape \[8, K\].*got \[7, 5\]"),
    "with a gradient": (SOFT.clone().requires_grad_(), r"y must not require a gradient, .*: write y\.detach\(\)$"),
}


@EACH
@MINED
@pytest.mark.parametrize("bad", BAD)
def test_bad_labels_of_a_loss(name, mined, bad):
    model, mining, (labels, message) = confident(), mining_of(name, mined), BAD[bad]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    state = [model] if mining is None else [model, mining]
    before = snapshot(*state)
    with pytest.raises(ValueError, match=message):
        LOSSES[name](mining, engine="exact")(model, X, labels)
    assert_unchanged(before, *state)


@MINED
@pytest.mark.parametrize("bad", BAD)
def test_bad_labels_of_perturb(mined, bad):
    model, mining, (labels, message) = confident(), mining_of("trades", mined), BAD[bad]
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        perturb(model, X, labels, ATTACK, mining)
    assert_unchanged(before, model)


def test_baselines_without_a_meaning_for_them_refuse_them():
    for call in (
        lambda model: yopo_loss(model, X, SOFT, None, propagations=1, layer_steps=1),
        lambda model: grad_align(model, X, SOFT, epsilon=0.1),
    ):
        with pytest.raises(TypeError, match=r"y must be integers, got torch\.float32: write y\.argmax\(dim=1\)"):
            call(confident())
