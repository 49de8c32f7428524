"""A loss called again for one minibatch, as the caller declares, moves the mining only once."""

import copy
import functools
import itertools
import weakref
from unittest import mock

import pytest
import small_models
import torch
import torch.distributed as dist
from emulated_device import EmulatedDevice
from gloo_ranks import run_ranks
from objective_cases import OBJECTIVES
from pretended_device import DEVICE, pretended_device
from small_models import SHAPE, assert_unchanged, build, gradients, snapshot
from test_objectives import confident, own_labels, recorded, seeded, sgd
from tolerances import assert_near_nested

from bt_fast import (
    PGD,
    BulletTrain,
    Frozen,
    GraphRunner,
    Guard,
    NonFiniteError,
    Normalization,
    StreamRunner,
    TRADESLoss,
    Update,
    augmix_loss,
    mart_loss,
    perturb,
    pgd_loss,
    trades_loss,
)

ATTACK = {"epsilon": 0.03, "step_size": 0.01}
LOSSES = {
    "trades": functools.partial(trades_loss, optimizer=None, beta=6.0, **ATTACK),
    "mart": functools.partial(mart_loss, optimizer=None, beta=6.0, **ATTACK),
    "pgd": functools.partial(pgd_loss, optimizer=None, **ATTACK),
    "augmix": augmix_loss,
}
EACH = pytest.mark.parametrize("name", LOSSES)
WAYS = pytest.mark.parametrize("reuse", [True, False], ids=["reused", "anew"])
RULES = {"three groups": {}, "gaussian": {"policy": "gaussian", "metric": "margin"}}


def mining_of(name, **rules):
    return BulletTrain(*((1, 0, 0) if name == "augmix" else (3, 2, 1)), **rules)


def minibatch(k, model, m=9):
    """Returns images of which the model classifies some with certainty, two wrongly, and others narrowly."""
    x, _ = small_models.batch(m, seed=k)
    return x, own_labels(model, x)


def moved(model, by=0.05):
    """Moves the model's weights in place."""
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            p.add_(by * torch.randn(p.shape, generator=seeded(k), dtype=p.dtype))


def state_of(bullet):
    return {name: value.clone() for name, value in bullet.state_dict().items()}


def gradient_of(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@EACH
@WAYS
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_a_further_pass_moves_neither_f_r_nor_a_count(name, reuse, rules):
    twice, once = mining_of(name, **rules), mining_of(name, **rules)
    for k in range(3):
        model = confident()
        x, y = minibatch(k, model)
        LOSSES[name](copy.deepcopy(model), x, y, bullet=once, generator=seeded(k))
        LOSSES[name](model, x, y, bullet=twice, generator=seeded(k))
        first = state_of(twice)
        for _ in range(2):
            moved(model)
            with twice.again(reuse=reuse):
                LOSSES[name](model, x, y, bullet=twice, generator=seeded(7)).backward()
        assert_near_nested(state_of(twice), first)
        assert twice.mean_steps == once.mean_steps
    assert_near_nested(state_of(twice), state_of(once))
    assert int(twice.group_counts.sum()) == 27
    assert 0 < float(twice.robust_fraction) < 1


@EACH
@WAYS
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_at_the_same_weights_a_further_pass_is_the_first(name, reuse, rules):
    """Losses and gradients are equal, also if F_R has moved, from 0 or 0.9, so that it would give other groups."""
    for start in (0.0, 0.9):
        model, bullet = confident(), mining_of(name, **rules)
        bullet.robust_fraction.fill_(start)
        x, y = minibatch(0, model)
        buffers = [(b, b.clone()) for b in model.buffers()]
        first = LOSSES[name](model, x, y, bullet=bullet, generator=seeded(0))
        expected = gradient_of(model, first)
        for buffer, value in buffers:  # the attack reads batch norm's buffers, which have moved
            buffer.copy_(value)
        with bullet.again(reuse=reuse):
            second = LOSSES[name](model, x, y, bullet=bullet, generator=seeded(0))
        assert torch.equal(first, second)
        result = gradient_of(model, second)
        assert all(torch.equal(result[name], expected[name]) for name in expected)


@EACH
def test_reused_images_cost_no_attack_and_no_random_number(name):
    model, bullet, generator = confident(), mining_of(name), seeded(0)
    bullet.robust_fraction.fill_(0.4)
    x, y = minibatch(0, model)
    forwards = recorded(model)
    LOSSES[name](model, x, y, bullet=bullet, generator=generator)
    state, trained = generator.get_state(), list(forwards[True])
    forwards[True].clear(), forwards[False].clear()
    moved(model)
    with bullet.again():
        LOSSES[name](model, x, y, bullet=bullet, generator=generator)
    assert forwards[False] == []
    assert torch.equal(generator.get_state(), state)
    assert len(forwards[True]) == len(trained) > 0
    assert all(torch.equal(a, b) for a, b in zip(forwards[True], trained, strict=True))


@EACH
def test_made_anew_they_are_those_of_the_weights_as_they_are_now(name):
    """x' made again equal those of a first pass at these weights and the same F_R."""
    model, bullet = confident(), mining_of(name)
    bullet.robust_fraction.fill_(0.4)
    other = copy.deepcopy(bullet)
    x, y = minibatch(0, model)
    LOSSES[name](model, x, y, bullet=bullet, generator=seeded(0))
    moved(model)
    twin = copy.deepcopy(model)
    with bullet.again(reuse=False):
        result = LOSSES[name](model, x, y, bullet=bullet, generator=seeded(1))
    expected = LOSSES[name](twin, x, y, bullet=other, generator=seeded(1))
    assert torch.equal(result, expected)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_sharpness_aware_minimisation_is_the_two_passes_written_out(objective):
    """Compares weights, gradients' directions and F_R of three steps; the literal version reuses the first x'."""
    models = [confident(), confident()]
    optimizers = [sgd(m) for m in models]
    bullet, plain = BulletTrain(3, 2, 1), BulletTrain(3, 2, 1)
    options = {**objective.options("l_inf"), "perturb_steps": 3}
    for k in range(3):
        x, y = minibatch(k, models[0])
        # written out: both updates use the images of the first pass
        forwards = recorded(models[0])
        objective.loss(models[0], x, y, optimizers[0], **options, bullet=plain, generator=seeded(k)).backward()
        images = forwards[True]
        models[0]._forward_pre_hooks.clear()
        back = climbed(models[0])
        optimizers[0].zero_grad()
        literal(objective, models[0], images, x, y, options).backward()
        back()
        optimizers[0].step()
        # as a script writes it
        objective.loss(models[1], x, y, optimizers[1], **options, bullet=bullet, generator=seeded(k)).backward()
        back = climbed(models[1])
        with bullet.again():
            objective.loss(models[1], x, y, optimizers[1], **options, bullet=bullet).backward()
        back()
        optimizers[1].step()
        assert_near_nested(gradients(models[1]), gradients(models[0]))
        assert_near_nested(models[1].state_dict(), models[0].state_dict())
        assert_near_nested(bullet.state_dict(), plain.state_dict())


def climbed(model, radius=0.05):
    """Moves the weights up their gradient, in place, and returns a function that moves them back."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(p.grad, alpha=radius / float(norm))

    def back():
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(before[name])

    return back


def literal(objective, model, images, x, y, options):
    """Runs the update on recorded images: all samples run both forwards, since N_R and N_O are not 0."""
    x_adv = images[1] if objective.robust else images[0]
    order = (x_adv[:, None] - x[None]).abs().flatten(2).amax(2).argmin(1)  # for each x' the nearest image
    taken = list(range(len(x)))
    return objective.update(model, x[order], x_adv, y[order], taken, options.get("beta"))[0]


@EACH
@WAYS
def test_weights_that_are_perturbed_against_the_loss(name, reuse):
    """Adversarial weight perturbation: a pass for the direction, a pass at the perturbed weights, one step."""
    model, bullet, plain = confident(), mining_of(name), mining_of(name)
    optimizer = sgd(model)
    for k in range(3):
        x, y = minibatch(k, model)
        LOSSES[name](copy.deepcopy(model), x, y, bullet=plain, generator=seeded(k))
        gradient_of(model, LOSSES[name](model, x, y, bullet=bullet, generator=seeded(k)))
        back = climbed(model)
        with bullet.again(reuse=reuse):
            gradient_of(model, LOSSES[name](model, x, y, bullet=bullet, generator=seeded(k)))
        back()
        optimizer.step()
        assert_near_nested(bullet.state_dict(), plain.state_dict())


# Errors in between


class Raising(torch.nn.Module):
    """Raises in its n-th forward from now."""

    def __init__(self):
        super().__init__()
        self.body, self.left = confident(), None

    def forward(self, x):
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                raise MemoryError("no more")
        return self.body(x)


def several_passes(name, model, x, y, bullet, reuse):
    with bullet.again(reuse=reuse):
        for _ in range(3):
            LOSSES[name](model, x, y, bullet=bullet, generator=seeded(0))


@EACH
@WAYS
def test_an_error_in_the_block_leaves_the_mining_as_it_was(name, reuse):
    model, bullet = Raising(), mining_of(name)
    x, y = minibatch(0, model.body)
    LOSSES[name](model, x, y, bullet=bullet, generator=seeded(0))
    before = state_of(bullet)
    for forward in (1, 2, 3):
        model.left = forward
        with pytest.raises(MemoryError):
            several_passes(name, model, x, y, bullet, reuse)
        assert_near_nested(state_of(bullet), before)
    model.left = None
    with bullet.again(reuse=reuse):  # it may be retried
        LOSSES[name](model, x, y, bullet=bullet, generator=seeded(0))
    assert_near_nested(state_of(bullet), before)
    LOSSES[name](model, x, y, bullet=bullet, generator=seeded(0))  # the next minibatch counts
    assert int(bullet.group_counts.sum()) == 18


@EACH
@WAYS
def test_nan_at_the_moved_weights_is_an_error_that_moves_nothing(name, reuse):
    model, bullet = confident(), mining_of(name)
    x, y = minibatch(0, model)
    LOSSES[name](model, x, y, bullet=bullet, generator=seeded(0))
    with torch.no_grad():
        list(model.parameters())[-1].fill_(torch.nan)
    before = state_of(bullet)
    with pytest.raises(NonFiniteError), bullet.again(reuse=reuse):
        LOSSES[name](model, x, y, bullet=bullet, generator=seeded(0))
    assert_near_nested(state_of(bullet), before)


@EACH
def test_a_guard_takes_back_the_whole_minibatch(name):
    """With NaN in the second pass, neither pass remains in F_R, the counts and batch norm."""
    model, bullet = confident(), mining_of(name)
    optimizer = sgd(model)
    guard = Guard(optimizer, model, bullet, non_finite="skip")
    x, y = minibatch(0, model)
    before = snapshot(bullet), {k: v.clone() for k, v in model.named_buffers()}
    with guard.minibatch():
        LOSSES[name](model, x, y, bullet=bullet, generator=seeded(0)).backward()
        back = climbed(model)
        try:
            with torch.no_grad():
                list(model.parameters())[-1].fill_(torch.nan)
            with bullet.again():
                LOSSES[name](model, x, y, bullet=bullet)
        finally:
            back()
    assert_unchanged(before[0], bullet)
    assert_near_nested(dict(model.named_buffers()), before[1])
    assert len(guard.skipped) == 1
    with guard.minibatch():  # and the next one works as usual
        LOSSES[name](model, x, y, bullet=bullet, generator=seeded(0)).backward()
        back = climbed(model)
        with bullet.again():
            loss = LOSSES[name](model, x, y, bullet=bullet)
        loss.backward()
        back()
        guard.step(loss)
    assert int(bullet.group_counts.sum()) == 9


def another(x, y):
    """Returns minibatches other than x and y, with the error for each."""
    brighter, others = x.clone(), y.clone()
    brighter[3, 0, 2, 2] = 0.123
    others[[1, 4]] = (others[[1, 4]] + 1) % 5
    return {
        "an image": (brighter, y, "1 of 9 samples are others"),
        "labels": (x, others, "2 of 9 samples are others"),
        "fewer": (x[:6], y[:6], r"got \[6, 1, 6, 6\]"),
        "dtype": (x.float(), y, "torch.float32"),
    }


@EACH
@pytest.mark.parametrize("what", ["an image", "labels", "fewer", "dtype"])
def test_images_are_reused_for_their_own_minibatch_alone(name, what):
    model, bullet = confident(), mining_of(name, policy="uniform")
    x, y = minibatch(0, model)
    LOSSES[name](model, x, y, bullet=bullet, generator=seeded(0))
    before, (x, y, message) = state_of(bullet), another(x, y)[what]
    model.to(x.dtype)
    with pytest.raises(ValueError, match=f"again.*{message}.*reuse=False"), bullet.again():
        LOSSES[name](model, x, y, bullet=bullet)
    assert_near_nested(state_of(bullet), before)


def test_images_are_reused_by_the_loss_that_made_them_alone():
    model, bullet, attack = confident(), BulletTrain(1, 0, 0), PGD(0.03, 0.01, 1)
    x, y = minibatch(0, model)
    functions = {
        "trades": functools.partial(trades_loss, optimizer=None, epsilon=0.03, step_size=0.01, perturb_steps=1),
        "other ε": functools.partial(trades_loss, optimizer=None, epsilon=0.1, step_size=0.01, perturb_steps=1),
        "mart": functools.partial(mart_loss, optimizer=None, epsilon=0.03, step_size=0.01, perturb_steps=1),
        "augmix": augmix_loss,
        "script": lambda model, x, y, bullet: perturb(model, x, y, attack, bullet),
    }
    for first, second in itertools.permutations(functions, 2):
        if first == "script":
            continue
        functions[first](model, x, y, bullet=bullet)
        before = state_of(bullet)
        with (
            pytest.raises(RuntimeError, match=r"x' that the same loss has made, .*again\(reuse=False\)"),
            bullet.again(),
        ):
            functions[second](model, x, y, bullet=bullet)
        assert_near_nested(state_of(bullet), before)
        with bullet.again():
            functions[first](model, x, y, bullet=bullet)
    one, another = (TRADESLoss(attack, mining=bullet) for _ in range(2))
    one(model, x, y)
    with pytest.raises(RuntimeError, match="x' that the same loss has made"), bullet.again():
        another(model, x, y)
    bullet.keep("something else")
    with pytest.raises(ValueError, match="x' made by a script, but this loss attacks with"), bullet.again():
        functions["script"](model, x, y, bullet)


def failed_in_a_forward(model, bullet, x, y):
    """After this failure, the previous minibatch is no longer the latest one."""
    trades_loss(model, x, y, None, bullet=bullet)
    raising = Raising()
    raising.left = 1
    with pytest.raises(MemoryError):
        trades_loss(raising, x, y, None, bullet=bullet)


def failed(model, bullet, x, y):
    with pytest.raises(ValueError, match="must lie in"):
        trades_loss(model, x + 2, y, None, bullet=bullet)


NOTHING_TO_GO_OVER = {
    "nothing yet": lambda model, bullet, x, y: None,
    "the last one failed": failed,
    "the last one failed in its first forward": failed_in_a_forward,
    "assigned only": lambda model, bullet, x, y: bullet.plan(model(x), y),
    "moved": lambda model, bullet, x, y: (trades_loss(model, x, y, None, bullet=bullet), bullet.to(torch.float64)),
    "loaded": lambda model, bullet, x, y: (
        trades_loss(model, x, y, None, bullet=bullet),
        bullet.load_state_dict(bullet.state_dict()),
    ),
}


@pytest.mark.parametrize("before", NOTHING_TO_GO_OVER.values(), ids=NOTHING_TO_GO_OVER)
@WAYS
def test_where_there_is_no_minibatch_to_go_over_it_is_reported(before, reuse):
    model, bullet = confident(), BulletTrain(3, 2, 1)
    before(model, bullet, *minibatch(0, model))
    with pytest.raises(RuntimeError, match="none that ended without an error: call the loss"):  # noqa: SIM117
        with bullet.again(reuse=reuse):
            pytest.fail("it was entered")


def test_a_mining_of_ones_own_has_no_images_to_reuse():
    model, bullet = confident(), BulletTrain(3, 2, 1)
    x, y = minibatch(0, model)
    z = model(x).detach()
    bullet.plan(z, y)
    bullet.observe(z, y)
    before = state_of(bullet)
    with bullet.again(reuse=False):
        bullet.plan(z, y)
        bullet.observe(z, y)
    with pytest.raises(RuntimeError, match="again\\(reuse=False\\)"), bullet.again():
        trades_loss(model, x, y, None, bullet=bullet)
    assert_near_nested(state_of(bullet), before)


def test_whether_to_reuse_is_a_bool():
    with pytest.raises(TypeError, match=r"reuse must be True .* or False .*got 'x'"), BulletTrain().again(reuse="x"):
        pytest.fail("it was entered")


# Kept memory


def test_a_copy_has_the_state_and_not_the_minibatch():
    model, bullet = confident(), BulletTrain(3, 2, 1)
    x, y = minibatch(0, model)
    trades_loss(model, x, y, None, bullet=bullet)
    twin = copy.deepcopy(bullet)
    assert_near_nested(twin.state_dict(), bullet.state_dict())
    with pytest.raises(RuntimeError, match="none that ended"), twin.again():
        pytest.fail("it was entered")
    with bullet.again():
        trades_loss(model, x, y, None, bullet=bullet)


@EACH
def test_the_images_are_let_go_when_the_next_minibatch_begins(name):
    model, bullet = confident(), mining_of(name, policy="uniform")
    x, y = minibatch(0, model)
    LOSSES[name](model, x, y, bullet=bullet)
    kept, seen = weakref.ref(bullet._last.kept), []
    model.register_forward_pre_hook(lambda *_: seen.append(kept() is None))
    LOSSES[name](model, x, y, bullet=bullet)
    assert seen
    assert all(seen)


@EACH
def test_normalised_images_are_reused_too(name):
    model, bullet = confident(), mining_of(name)
    x, y = minibatch(0, model)
    options = {"bullet": bullet, "normalization": Normalization([0.4], [0.2])}
    first = LOSSES[name](model, (x - 0.4) / 0.2, y, **options)
    with bullet.again():
        assert torch.equal(LOSSES[name](model, (x - 0.4) / 0.2, y, **options), first)


# All executions of the attack and the update


def two_passes(loss, frozen, runner, update):
    """Returns losses, gradients and F_R of some minibatches with a further pass each; their memory is overwritten."""
    model, bullet, result = build("conv_bn"), BulletTrain(2, 1, 0), []
    for k in range(4):
        x, y = small_models.batch(6, seed=k)
        for reuse in (None, True, False):
            options = {"bullet": bullet, "frozen": frozen, "runner": runner, "update": update}
            if reuse is None:
                value = loss(model, x, y, **options, generator=seeded(k))
            else:
                with bullet.again(reuse=reuse):
                    value = loss(model, x, y, **options, generator=seeded(k))
            gradient = gradient_of(model, value)
            result += [value.detach().clone(), *gradient.values(), bullet.robust_fraction.clone()]
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(0.1 * gradient[next(n for n, q in model.named_parameters() if q is p)])
        x.fill_(-1), y.fill_(-1)
    return result


@pytest.mark.parametrize("name", ["trades", "mart", "pgd"])
@pytest.mark.parametrize("runner", [GraphRunner, StreamRunner])
def test_from_graphs_and_on_streams_it_is_the_same_in_every_order(name, runner):
    frozen, eager, graphs = Frozen(channels_last=False), Update(channels_last=False), Update(False, graphs=True)
    with torch.autograd.set_multithreading_enabled(False):
        expected = two_passes(LOSSES[name], frozen, "eager", eager)
        with EmulatedDevice() as emulated:
            result = two_passes(LOSSES[name], frozen, runner(), graphs)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    for seed in range(5):
        shuffled = emulated.shuffled(seed, result)
        assert all(torch.equal(a, b) for a, b in zip(shuffled, expected, strict=True)), seed


@EACH
def test_on_a_device_a_further_pass_waits_once(name):
    model, bullet = small_models.conv_bn().to(DEVICE), mining_of(name).to(DEVICE)
    x, y = torch.rand(6, *SHAPE, device=DEVICE), torch.zeros(6, dtype=torch.int64, device=DEVICE)
    counts = [2, 4, 2, 0] if name == "augmix" else [6, 4, 2, 1, 3, 2]
    with pretended_device(counts) as reads:
        LOSSES[name](model, x, y, bullet=bullet, generator=None).backward()
        assert reads.waited == 1
        with mock.patch.object(reads, "plan", []), bullet.again():
            LOSSES[name](model, x, y, bullet=bullet, generator=None).backward()
        assert reads.waited == 2
        with bullet.again(reuse=False):
            LOSSES[name](model, x, y, bullet=bullet, generator=None).backward()
        assert reads.waited == 3


# In a process group


def on_ranks(name, reuse):
    """Returns a rank's mining after three minibatches of two passes each, and the error of another minibatch."""
    rank = dist.get_rank()
    model = confident()
    bullet = mining_of(name)
    bullet.process_group = dist.group.WORLD
    states = []
    for k in range(3):
        x, y = minibatch(2 * k + rank, model)
        LOSSES[name](model, x, y, bullet=bullet, generator=seeded(k))
        first = state_of(bullet)
        weights = copy.deepcopy(model.state_dict())
        moved(model)
        with bullet.again(reuse=reuse):
            LOSSES[name](model, x, y, bullet=bullet, generator=seeded(k))
        model.load_state_dict(weights)
        assert_near_nested(state_of(bullet), first)
        states.append(first)
    message = ""
    try:
        with bullet.again():
            LOSSES[name](model, x.flip(0) if rank else x, y, bullet=bullet)
    except ValueError as error:
        message = str(error)
    return states, message


@pytest.mark.parametrize("name", ["trades", "augmix"])
@WAYS
def test_ranks_that_mine_together_move_once_together(name, reuse):
    (one, first), (other, second) = run_ranks(2, on_ranks, name, reuse)
    for mine, theirs in zip(one, other, strict=True):
        assert_near_nested(mine, theirs)
    assert int(one[-1]["group_counts"].sum()) == 54
    assert float(one[-1]["robust_fraction"]) > 0
    assert "samples are others" in first
    assert "samples are others" in second


def test_judged_by_f_r_as_it_is_after_the_first_pass_the_second_is_another_one(monkeypatch):
    """With the F_R after the first pass the second pass differs, so the test above can fail."""
    monkeypatch.setattr(BulletTrain, "_deciding_fraction", lambda bullet: bullet.robust_fraction)
    with pytest.raises(AssertionError):
        test_at_the_same_weights_a_further_pass_is_the_first("trades", False, {})
