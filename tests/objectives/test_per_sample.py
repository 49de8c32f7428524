"""`perturb` with steps, ε, step sizes and starts of the samples' own: each gets what it would get alone."""

import copy
import dataclasses
import functools
import re
import warnings
from unittest import mock

import pytest
import small_models
import torch
import torch.nn.functional as F
from emulated_device import EmulatedDevice
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended_device import counted_waits, pretended_device

from bt_fast import (
    APGD,
    PGD,
    BulletTrain,
    MARTLoss,
    Normalization,
    Oracle,
    PerSample,
    PGDLoss,
    TRADESLoss,
    ops,
    perturb,
    units,
)
from bt_fast.attack.graphs import GraphRunner
from bt_fast.attack.streams import StreamRunner
from bt_fast.objectives import execution

CLOSE = {"rtol": 0, "atol": 1e-10}
M = 6
ATTACK = PGD(0.1, 0.03, 4)
TENSORS = {"dtype": torch.float64}


@pytest.fixture(autouse=True)
def nothing_warned_yet(monkeypatch):
    monkeypatch.setattr(units, "_warned", set())


@functools.cache
def network(seed=0):
    return small_models.looked_at(small_models.build("conv_bn", seed)).eval()


def alone(model, x, y, start, epsilon, size, steps, *, norm, inner):
    """One sample's attack, written plainly: x, y and start are batches of one."""
    with torch.no_grad():
        target = model(x).softmax(dim=1)
    x_adv = start
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        if inner == "kl":
            loss = F.kl_div(model(x_adv).log_softmax(dim=1), target, reduction="sum")
        else:
            loss = F.cross_entropy(model(x_adv), y)
        (grad,) = torch.autograd.grad(loss, x_adv)
        x_adv = projected(x_adv.detach(), grad, x, epsilon, size, norm)
    return x_adv.detach()


def projected(x_adv, grad, x, epsilon, size, norm):
    if norm == "linf":
        moved = torch.minimum(torch.maximum(x_adv + size * grad.sign(), x - epsilon), x + epsilon)
        return moved.clamp(0, 1)
    moved = (x_adv + size * grad / grad.norm()).clamp(0, 1)
    return (x + (moved - x).renorm(p=2, dim=0, maxnorm=epsilon)).clamp(0, 1)


def into_the_ball(start, x, epsilon, norm):
    delta = start - x
    if norm == "linf":
        return (x + delta.clamp(-epsilon, epsilon)).clamp(0, 1)
    return (x + delta * min(1.0, epsilon / delta.norm().clamp(min=1e-300))).clamp(0, 1)


def far_start(x, seed=0):
    """Most of it outside of balls and bounds."""
    return x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), **TENSORS)


# The oracle


def tensor(values):
    """Integers, or numbers in double precision."""
    if values is None:
        return None
    return torch.tensor(values, dtype=torch.int64 if isinstance(values[0], int) else torch.float64)


some_counts = st.lists(st.integers(0, 5), min_size=M, max_size=M)
some_sizes = st.lists(st.sampled_from([0.0, 0.013, 0.05, 0.11, 0.4]), min_size=M, max_size=M)


@pytest.mark.filterwarnings("ignore:per_sample. step_size")
@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["linf", "l2"]),
    st.sampled_from(["kl", "cross_entropy"]),
    st.none() | some_counts,
    st.none() | some_sizes,
    st.none() | some_sizes,
    st.integers(0, 1000),
)
def test_each_sample_gets_what_it_would_get_alone(norm, inner, steps, radii, sizes, seed):
    model, (x, y) = network(), small_models.batch(M, seed)
    start, attack = far_start(x, seed), PGD(0.1, 0.03, 3, norm, inner=inner)
    own = PerSample(tensor(steps), tensor(radii), tensor(sizes), start)
    result = perturb(model, x, y, attack, per_sample=own, return_details=True)
    for i in range(M):
        epsilon = 0.1 if radii is None else radii[i]
        size = 0.03 if sizes is None else sizes[i]
        n = (3 if steps is None else steps[i]) * (epsilon > 0)
        one = x[i : i + 1]
        begin = into_the_ball(start[i : i + 1], one, epsilon, norm)
        expected = alone(model, one, y[i : i + 1], begin, epsilon, size, n, norm=norm, inner=inner)
        torch.testing.assert_close(result.x_adv[i : i + 1], expected, **CLOSE)
        assert result.steps[i] == n
        if epsilon == 0:
            assert torch.equal(result.x_adv[i], x[i])
    if inner == "kl":
        torch.testing.assert_close(result.logits, model(x).detach(), **CLOSE)


@pytest.mark.parametrize("start", ["normal", "uniform", "clean"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_each_sample_gets_what_perturb_gives_it_alone_from_its_random_start(norm, start):
    model, (x, y), numbers = network(), small_models.batch(M), torch.arange(M) + 40
    attack = PGD(0.1, 0.03, 3, norm, start, inner="cross_entropy")
    own = PerSample(torch.tensor([2, 5, 0, 1, 3, 2]), torch.tensor([0.2, 0.03, 0.1, 0.0, 0.1, 0.3], **TENSORS))
    result = perturb(model, x, y, attack, per_sample=own, indices=numbers, generator=seeded())
    for i in range(M):
        if own.steps[i] == 0:
            assert torch.equal(result[i], x[i])
            continue
        one = slice(i, i + 1)
        single = dataclasses.replace(attack, epsilon=own.epsilon[i].item(), steps=int(own.steps[i]))
        expected = perturb(model, x[one], y[one], single, indices=numbers[one], generator=seeded())
        torch.testing.assert_close(result[one], expected, **CLOSE)


def seeded():
    return torch.Generator().manual_seed(7)


@pytest.mark.parametrize("start", ["normal", "uniform"])
def test_what_all_have_in_common_gives_the_result_without_a_word_about_it(start):
    model, (x, y) = network(), small_models.batch(M)
    attack, result = dataclasses.replace(ATTACK, start=start), []
    own = PerSample(torch.full((M,), 4), torch.full((M,), 0.1, **TENSORS), torch.full((M,), 0.03, **TENSORS))
    for per_sample in (None, PerSample(), own):
        torch.manual_seed(3)
        result.append(perturb(model, x, y, attack, per_sample=per_sample))
    assert torch.equal(result[1], result[0])
    torch.testing.assert_close(result[2], result[0], **CLOSE)


def test_all_is_in_the_callers_order():
    model, (x, y) = network(), small_models.batch(M)
    own = PerSample(torch.tensor([1, 4, 0, 5, 2, 1]), torch.linspace(0.05, 0.3, M), start=far_start(x))
    turn = torch.tensor([3, 0, 5, 1, 4, 2])
    turned = PerSample(own.steps[turn], own.epsilon[turn], start=own.start[turn])
    first = perturb(model, x, y, ATTACK, per_sample=own, return_details=True)
    second = perturb(model, x[turn], y[turn], ATTACK, per_sample=turned, return_details=True)
    torch.testing.assert_close(second.x_adv, first.x_adv[turn], **CLOSE)
    torch.testing.assert_close(second.logits, first.logits[turn], **CLOSE)
    assert torch.equal(second.steps, own.steps[turn])
    assert torch.equal(first.steps, own.steps)


@pytest.mark.parametrize("runner", [GraphRunner, StreamRunner])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_from_graphs_and_on_streams_it_is_the_eager_result(runner, norm):
    model, (x, y) = network(), small_models.batch(M)
    own = PerSample(torch.tensor([1, 4, 0, 4, 2, 1]), torch.linspace(0.0, 0.3, M, **TENSORS), start=far_start(x))
    attack = PGD(0.1, 0.03, 4, norm)
    expected = perturb(model, x, y, attack, per_sample=own, generator=seeded())
    run = runner(bucket=2)
    of = execution.Execution.of
    with (
        mock.patch.object(execution.Execution, "of", lambda *a: dataclasses.replace(of(*a), runner=run)),
        EmulatedDevice() as emulated,
    ):
        for _ in range(3):
            result = perturb(model, x, y, attack, per_sample=own, generator=seeded())
    assert emulated.replays
    if norm == "linf":
        assert torch.equal(result, expected)
    torch.testing.assert_close(result, expected, **CLOSE)


@pytest.mark.parametrize("engine", ["fast", "bf16"])
def test_the_other_engines_are_near(engine):
    model, (x, y) = small_models.build(dtype=torch.float32), small_models.batch(M, dtype=torch.float32)
    own = PerSample(torch.tensor([1, 4, 0, 5, 2, 1]), torch.tensor([0.1, 0.2, 0.1, 0.0, 0.05, 0.1]))
    result = perturb(model, x, y, ATTACK, per_sample=own, engine=engine, return_details=True)
    moved = (result.x_adv - x).flatten(1).abs().amax(dim=1)
    assert (moved <= own.epsilon + 1e-6).all()
    assert torch.equal(moved > 0, result.steps > 0)
    assert result.steps.tolist() == [1, 4, 0, 0, 2, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_images_in_16_bits_stay_in_their_own_balls(norm, dtype):
    model, (x, y) = small_models.build(dtype=dtype), small_models.batch(M, dtype=dtype)
    radii = torch.tensor([0.1, 0.2, 0.0, 0.05, 0.4, 0.1])
    result = perturb(model, x, y, PGD(0.1, 0.03, 3, norm), per_sample=PerSample(epsilon=radii))
    delta = (result.float() - x.float()).flatten(1)
    size = delta.abs().amax(dim=1) if norm == "linf" else delta.norm(dim=1)
    assert (size <= radii * 1.01 + 0.02).all()
    assert torch.equal(result[2], x[2])


# Starts


@pytest.mark.filterwarnings("ignore:per_sample. (epsilon|step_size)")
def test_a_start_of_ones_own_is_moved_into_the_ball_and_the_bounds():
    model, (x, y) = network(), small_models.batch(M)
    for norm in ("linf", "l2"):
        radii = torch.tensor([0.1, 0.0, 0.3, 0.2, 5.0, 0.01], **TENSORS)
        own = PerSample(steps=torch.zeros(M, dtype=torch.int64), epsilon=radii, start=far_start(x))
        result = perturb(model, x, y, PGD(0.1, 0.03, 3, norm), per_sample=own)
        for i in range(M):
            expected = into_the_ball(own.start[i], x[i], radii[i], norm)
            torch.testing.assert_close(result[i], expected, rtol=0, atol=1e-14)
        assert torch.equal(result[4], own.start[4].clamp(0, 1)), "what is inside stays to the bit"


def test_an_attack_goes_on_where_it_stood():
    model, (x, y) = network(), small_models.batch(M)
    attack = dataclasses.replace(ATTACK, inner="cross_entropy", start="clean")
    whole = perturb(model, x, y, attack)
    first = perturb(model, x, y, dataclasses.replace(attack, steps=1))
    rest = perturb(model, x, y, dataclasses.replace(attack, steps=3), per_sample=PerSample(start=first))
    assert torch.equal(rest, whole)
    stopped = PerSample(steps=torch.tensor([3, 0, 3, 0, 3, 3]), start=first)
    result = perturb(model, x, y, attack, per_sample=stopped)
    assert torch.equal(result[[1, 3]], first[[1, 3]])
    torch.testing.assert_close(result[[0, 2, 4, 5]], whole[[0, 2, 4, 5]], **CLOSE)


def test_nothing_is_drawn_where_starts_are_given_or_clean():
    model, (x, y) = network(), small_models.batch(M)
    attack = dataclasses.replace(ATTACK, inner="cross_entropy")
    torch.manual_seed(0)
    before = torch.get_rng_state()
    perturb(model, x, y, attack, per_sample=PerSample(start=far_start(x)))
    perturb(model, x, y, dataclasses.replace(attack, start="clean"))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("kind", [None, MARTLoss, PGDLoss])
def test_a_clean_start_is_x_itself(kind, norm):
    model, (x, y) = small_models.build(), small_models.batch(M)
    attack = PGD(0.1, 0.03, 2, norm, "clean", "cross_entropy")
    if kind is None:
        result = perturb(model, x, y, attack)
    else:
        criterion = kind(attack, engine="exact")
        criterion(model, x, y)
        result = criterion.last.x_adv
    frozen = network()
    for i in range(M):
        one = slice(i, i + 1)
        expected = alone(frozen, x[one], y[one], x[one], 0.1, 0.03, 2, norm=norm, inner="cross_entropy")
        torch.testing.assert_close(result[one], expected, **CLOSE)


def test_a_clean_start_has_no_gradient_of_the_divergence_from_itself():
    model, (x, y) = network(), small_models.batch(M)
    clean, why = dataclasses.replace(ATTACK, start="clean"), r"no gradient there: write start='uniform', or inner='"
    with pytest.raises(ValueError, match=why):
        perturb(model, x, y, clean)
    with pytest.raises(ValueError, match=why):
        TRADESLoss(clean)
    with pytest.raises(ValueError, match=why):
        PGDLoss(dataclasses.replace(clean, inner="kl"))
    TRADESLoss(dataclasses.replace(clean, inner="cross_entropy"))
    perturb(model, x, y, clean, per_sample=PerSample(start=far_start(x)))


# ε = 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mining", [None, BulletTrain(4, 1, 0), BulletTrain(4, 2, 1, policy="gaussian")])
@pytest.mark.parametrize("engine", ["exact", "fast"])
@pytest.mark.parametrize("inner", ["kl", "cross_entropy"])
@pytest.mark.parametrize("start", ["normal", "uniform"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_epsilon_of_0_is_x_to_the_bit_in_no_step(norm, start, inner, engine, mining):
    model, (x, y) = network(), small_models.batch(M)
    for size in (0.03, 0.0):
        bullet = copy.deepcopy(mining)
        attack = PGD(0.0, size, 4, norm, start, inner)
        with mock.patch("bt_fast.attack.runners.take_step", side_effect=AssertionError("a step")):
            result = perturb(model, x, y, attack, bullet, engine=engine, return_details=True)
        assert torch.equal(result.x_adv, x)
        assert not result.steps.any()


def test_an_epsilon_of_0_leaves_normalised_images_as_they_are_to_the_bit():
    model, (x, y) = network(), small_models.batch(M)
    loader = ((x - 0.4) / 0.23).float().double()  # not what normalising their pixels gives, to the bit
    with torch.no_grad():
        y = model(loader).argmax(dim=1)  # so that mining gives all of them steps
    scale = Normalization([0.4], [0.23])
    for mining in (None, BulletTrain(4, 1, 0)):
        result = perturb(model, loader, y, PGD(0.0, 0.0, 4, normalization=scale), mining)
        assert torch.equal(result, loader)
        attack, radii = PGD(0.1, 0.03, 4, normalization=scale), torch.tensor([0.1, 0, 0.1, 0, 0, 0.2])
        mining = copy.deepcopy(mining)
        result = perturb(model, loader, y, attack, mining, per_sample=PerSample(epsilon=radii), return_details=True)
        same = (result.x_adv == loader).flatten(1).all(dim=1)
        assert torch.equal(~same, (radii > 0) & (result.steps > 0))


def test_at_an_epsilon_of_0_random_numbers_are_drawn_as_at_any_other():
    model, (x, y) = network(), small_models.batch(M)
    states = []
    for epsilon in (0.0, 0.1):
        torch.manual_seed(5)
        perturb(model, x, y, PGD(epsilon, 0.03, 4))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("policy", ["three_groups", "oracle", lambda judged: torch.where(judged.correct, 3, 1)])
def test_mining_goes_on_at_an_epsilon_of_0(policy):
    model, (x, y) = small_models.build(), small_models.batch(40)
    with torch.no_grad():
        y[:25] = network()(x)[:25].argmax(dim=1)
    mining = BulletTrain(4, 1, 0, policy=policy)
    criterion = TRADESLoss(PGD(0.0, 0.0, 4), mining=mining, engine="exact")
    criterion(model, x, y).backward()
    assert torch.equal(criterion.last.x_adv, x)
    assert not criterion.last.steps.any()
    assert mining.group_counts.sum() == 40
    expected = 0.1 * 0.8 * (criterion.last.adversarial_logits.argmax(dim=1) == y).double().mean()
    assert mining.robust_fraction.item() == pytest.approx(expected.item())
    criterion(model, x, y)
    assert mining.robust_fraction > expected


# Mining


@pytest.mark.filterwarnings("ignore:per_sample. step_size")
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("policy", ["three_groups", "gaussian", Oracle(3)])
def test_mined_samples_take_steps_by_their_own_sizes(policy, norm):
    model, (x, y) = network(), small_models.batch(24)
    with torch.no_grad():
        y[:16] = model(x)[:16].argmax(dim=1)
    mining = BulletTrain(5, 2, 1, policy=policy)
    mining.robust_fraction.fill_(0.5)
    radii, sizes = torch.linspace(0.0, 0.3, 24, **TENSORS), torch.linspace(0.06, 0.01, 24, **TENSORS)
    own = PerSample(epsilon=radii, step_size=sizes, start=far_start(x))
    attack = PGD(0.1, 0.03, 5, norm, inner="cross_entropy")
    result = perturb(model, x, y, attack, mining, per_sample=own, return_details=True)
    for i in range(24):
        n, one = int(result.steps[i]), slice(i, i + 1)
        boundary = result.group[i] == ops.BOUNDARY if policy != "gaussian" else n == 5
        size = sizes[i] if boundary else 1.7 * radii[i] / max(n, 1)
        begin = into_the_ball(own.start[one], x[one], radii[i], norm) if n else x[one]
        expected = alone(model, x[one], y[one], begin, radii[i].item(), size, n, norm=norm, inner="cross_entropy")
        torch.testing.assert_close(result.x_adv[one], expected, **CLOSE)
    assert len(set(result.steps.tolist())) > 1, "the case has more than one group"
    assert torch.equal(result.x_adv[0], x[0])


def test_mining_gives_the_same_where_the_own_sizes_are_those_of_all():
    model, (x, y) = network(), small_models.batch(24)
    result = []
    for own in (None, PerSample(epsilon=torch.full((24,), 0.1, **TENSORS))):
        mining = BulletTrain(4, 2, 1)
        mining.robust_fraction.fill_(0.5)
        result.append(perturb(model, x, y, ATTACK, mining, per_sample=own, generator=seeded()))
    assert torch.equal(*result)


def test_an_x_that_is_kept_is_not_made_by_what_samples_have_of_their_own():
    model, (x, y) = small_models.build(), small_models.batch(M)
    with torch.no_grad():
        y = network()(x).argmax(dim=1)
    mining = BulletTrain(4, 1, 0)
    TRADESLoss(ATTACK, mining=mining, engine="exact")(model, x, y)
    own = PerSample(epsilon=torch.full((M,), 0.2))
    with mining.again(), pytest.raises(ValueError, match=r"per_sample.*again\(reuse=True\).*reuse=False"):
        perturb(model, x, y, ATTACK, mining, per_sample=own)
    with mining.again(reuse=False):
        assert (perturb(model, x, y, ATTACK, mining, per_sample=own) - x).abs().max() > 0.1


# Reads


def own_of_all(x):
    m = len(x)
    return PerSample(torch.arange(m), torch.full((m,), 0.1), torch.full((m,), 0.03), x + 0.01)


@pytest.mark.parametrize(
    "fields", [("steps",), ("epsilon",), ("step_size",), ("start",), ("steps", "epsilon", "start")]
)
def test_the_host_waits_for_one_read(fields):
    x, y = small_models.batch(M)
    own = PerSample(**{name: getattr(own_of_all(x), name) for name in fields})
    with counted_waits() as waits:
        perturb(network(), x, y, dataclasses.replace(ATTACK, inner="kl"), per_sample=own)
    assert len(waits) == 2  # the other one, of NaN in the attack's gradients, comes at its end


def test_on_a_device_nothing_else_is_read():
    model = copy.deepcopy(network()).to("meta")
    small_models.looked_at(model)
    x, y = (t.to("meta") for t in small_models.batch(M))
    own = PerSample(*(t.to("meta") for t in vars(own_of_all(x.double())).values()))
    with pretended_device(plan=[0, 0, 0, 0, 2, 1, 0, 4, 2, 2]) as reads:
        result = perturb(model, x, y, ATTACK, per_sample=own, return_details=True)
    assert result.x_adv.shape == x.shape
    assert reads.waited == reads.started == 2  # the other one, of NaN in the attack's gradients, comes at its end


# Bad input


BAD = {
    "steps, negative": ({"steps": torch.tensor([1, -1, 2, 0, -3, 1])}, ValueError, r"steps.* 2 of 6 .*clamp\(min=0\)"),
    "steps, too few": ({"steps": torch.ones(5).long()}, ValueError, r"per_sample\.steps.*\[6\].*\[5\].*give one"),
    "steps, elsewhere": ({"steps": torch.ones(6, device="meta").long()}, ValueError, r"per_sample\.steps.*cpu.*meta"),
    "epsilon, negative": ({"epsilon": torch.tensor([1, -1, 0, 0, 0, 1.0])}, ValueError, r"\.epsilon.* 1 of 6 "),
    "epsilon, NaN": ({"epsilon": torch.tensor([1, torch.nan, 0, 0, 0, 1.0])}, ValueError, r"\.epsilon.* 1 of 6 "),
    "epsilon, infinite": ({"epsilon": torch.full((6,), torch.inf)}, ValueError, r"\.epsilon.* 6 of 6 "),
    "epsilon, of pixels": ({"epsilon": torch.ones(6, 1, 6, 6)}, ValueError, r"\.epsilon.*\[6\].*\[6, 1, 6, 6\]"),
    "step_size, NaN": ({"step_size": torch.full((6,), torch.nan)}, ValueError, r"\.step_size.* 6 of 6 "),
    "step_size, 0-dim": ({"step_size": torch.tensor(0.1)}, ValueError, r"\.step_size.*\[6\].*\[\]"),
    "start, NaN": ({"start": torch.full((6, 1, 6, 6), torch.nan)}, ValueError, r"\.start.*finite.* 6 of 6 "),
    "start, of one": ({"start": torch.zeros(1, 1, 6, 6)}, ValueError, r"\.start.*\[6, 1, 6, 6\].*\[1, 1, 6, 6\]"),
}
WITH_AND_WITHOUT = [(name, mining) for name in BAD for mining in (False, True) if not mining or "steps," not in name]


@pytest.mark.parametrize(("name", "mining"), WITH_AND_WITHOUT)
def test_a_bad_value_is_named_before_anything_has_changed(name, mining):
    fields, error, message = BAD[name]
    model, (x, y) = small_models.build(), small_models.batch(M)
    bullet = BulletTrain(4, 1, 0) if mining else None
    modules = [model] if bullet is None else [model, bullet]
    before, random = small_models.snapshot(*modules), torch.get_rng_state()
    for generator in (None, torch.Generator().manual_seed(0)):
        state = None if generator is None else generator.get_state()
        with pytest.raises(error, match=message):
            perturb(model, x, y, ATTACK, bullet, per_sample=PerSample(**fields), generator=generator)
        assert generator is None or torch.equal(generator.get_state(), state)
    small_models.assert_unchanged(before, *modules)
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": torch.ones(6)}, r"steps must be a tensor of integers, got torch\.float32: give one"),
        ({"steps": torch.ones(6).bool()}, r"steps must be a tensor of integers, got torch\.bool"),
        ({"steps": [1, 2, 3]}, r"steps must be a tensor of integers, got list"),
        ({"epsilon": torch.ones(6).long()}, r"epsilon must be a tensor of floating-point numbers, got torch\.int64"),
        ({"epsilon": 0.1}, r"epsilon must be a tensor of floating-point numbers, got float"),
        ({"step_size": 0.1}, r"step_size must be a tensor of floating-point numbers, got float"),
        ({"start": "clean"}, r"start must be a tensor of floating-point numbers, got str"),
    ],
)
def test_a_field_of_another_kind_is_named(fields, message):
    with pytest.raises(TypeError, match=message):
        PerSample(**fields)


@pytest.mark.parametrize("kind", [PGD, APGD])
def test_a_tensor_as_start_of_an_attack_is_shown_its_place(kind):
    size = () if kind is APGD else (0.03,)
    message = r"start must be one of .*, got a tensor: write perturb\(\.\.\., per_sample=PerSample\(start="
    with pytest.raises(TypeError, match=message):
        kind(0.1, *size, 3, start=torch.zeros(M, 1, 6, 6))


def test_what_does_not_go_together_is_refused():
    model, (x, y) = network(), small_models.batch(M)
    mining, some = BulletTrain(4, 1, 0), PerSample(steps=torch.ones(M).long())
    with pytest.raises(ValueError, match=r"no steps with mining.*leave mining out"):
        perturb(model, x, y, ATTACK, mining, per_sample=some)
    with pytest.raises(TypeError, match="per_sample must be a PerSample or None, got dict"):
        perturb(model, x, y, ATTACK, per_sample={"steps": some.steps})
    radii = PerSample(epsilon=torch.full((M,), 0.1))
    with pytest.raises(ValueError, match=r"step_size is 0: write PerSample\(epsilon=epsilon, step_size="):
        perturb(model, x, y, PGD(0.0, 0.0, 3), per_sample=radii)
    moved = perturb(model, x, y, PGD(0.0, 0.03, 3), per_sample=radii)
    assert (moved != x).any()


# Units


@pytest.mark.parametrize("mining", [False, True])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epsilon": [0.1, 8.0, 0.0]}, "per_sample: epsilon=8 covers the whole range.*write epsilon=8/255"),
        ({"step_size": [0.03, 0.0, 2.0]}, "per_sample: step_size=2 is more than twice epsilon=0.1.*step_size=2/255"),
        ({"epsilon": [0.1, 0.1, 0.03], "step_size": [0.01, 0.01, 2.0]}, "per_sample: step_size=2 .*epsilon=0.03"),
    ],
)
def test_sizes_of_bytes_are_reported_once_for_all_minibatches(fields, message, mining):
    model, (x, y) = network(), small_models.batch(3)
    for scale in (1.0, 1.01):
        own = PerSample(**{name: scale * torch.tensor(values) for name, values in fields.items()})
        bullet = BulletTrain(4, 1, 0) if mining else None
        with warnings.catch_warnings(record=True) as reported:
            warnings.simplefilter("always")
            perturb(model, x, y, ATTACK, bullet, per_sample=own)
        if scale == 1.0:
            (warning,) = reported
            assert re.search(message, str(warning.message))
            assert warning.filename == __file__
        else:
            assert not reported


@pytest.mark.filterwarnings("error")
def test_sizes_of_pixels_are_not_reported_nor_is_the_attacks_own_that_is_not_used():
    model, (x, y) = network(), small_models.batch(3)
    own = PerSample(epsilon=torch.tensor([0.0, 8 / 255, 0.3]), step_size=torch.tensor([0.5, 2 / 255, 0.1]))
    perturb(model, x, y, PGD(8.0, 2.0, 3), per_sample=own)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mining", [False, True])
def test_a_step_that_crosses_the_smaller_balls_alone_is_no_mistake_of_units(mining):
    model, (x, y) = network(), small_models.batch(3)
    own = PerSample(epsilon=torch.tensor([0.1, 0.002, 0.0]))
    perturb(model, x, y, ATTACK, BulletTrain(4, 1, 0) if mining else None, per_sample=own)
