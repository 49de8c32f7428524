"""The clean forward of the update runs beside the attack where nothing can notice it, and all queued work is joined."""

import functools
import gc
import importlib
from contextlib import ExitStack, suppress
from unittest import mock

import pytest
import small_models
import torch
from emulated_device import EmulatedDevice
from planted import Bug, left_out, planted
from pretended_device import DEVICE, pretended_device
from torch import nn

from bt_fast import PGD, AutoRunner, BulletTrain, Frozen, GraphRunner, Oracle, Plan, StreamRunner, ThreatModel
from bt_fast.attack import folded
from bt_fast.attack.runners import run_eager
from bt_fast.objectives import adversarial, drop_in, forwards, loss, mart, perturb, pgd, trades

generate = importlib.import_module("bt_fast.attack.generate")
BULLETS = {
    "uniform": lambda: None,
    "bullet": lambda: BulletTrain(2, 1, 0),
    "oracle": lambda: BulletTrain(2, 1, 0, policy=Oracle(2)),
    "own policy": lambda: BulletTrain(2, 1, 0, policy=lambda judged: torch.arange(len(judged.group)) % 3),
}
VIEW = Frozen(channels_last=False)


def same(result, expected):
    return len(result) == len(expected) and all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def training(runner, bullet=lambda: None, frozen=VIEW, build="conv_bn", steps=3):
    """Returns losses, gradients and buffers of some updates; each batch is overwritten after use."""
    torch.manual_seed(0)
    model, bullet, result = small_models.build(build), bullet(), []
    for k in range(steps):
        x, y = small_models.batch(6, seed=k)
        options = {"generator": torch.Generator().manual_seed(k), "bullet": bullet, "frozen": frozen, "runner": runner}
        loss = trades.trades_loss(model, x, y, None, perturb_steps=2, **options)
        loss.backward()
        result += [v.detach().clone() for v in (loss, *(p.grad for p in model.parameters()), *model.buffers())]
        x.fill_(-1), y.fill_(-1)
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(0.1 * p.grad)
                p.grad = None
    return result


RUNNERS = {
    "graphs": lambda: GraphRunner(bucket=2),
    "streams": lambda: StreamRunner(bucket=2),
    "chosen": lambda: AutoRunner({"graphs": GraphRunner(bucket=2)}),
}


@pytest.mark.parametrize(
    ("model", "bullet", "runner"),
    [
        *(("conv_bn", bullet, runner) for bullet in BULLETS for runner in RUNNERS),
        *((model, "bullet", "graphs") for model in ("dropout", "frozen norm", "tied norm", "normalising")),
    ],
)
def test_the_result_is_that_of_one_after_the_other_in_any_order(model, bullet, runner):
    expected = training(run_eager, BULLETS[bullet], build=model)
    with EmulatedDevice() as emulated:
        result = training(RUNNERS[runner](), BULLETS[bullet], build=model)
    assert emulated.replays
    assert same(result, expected)
    for seed in range(5):
        assert same(emulated.shuffled(seed, result), expected), seed


def order(**options):
    """Returns which comes first: the clean forward of each update, or the end of its attack."""
    events, clean, finish = [], forwards.Forwards.clean, generate.StartedAttack.finish
    with (
        mock.patch.object(
            forwards.Forwards, "clean", lambda *given: events.append("clean") or clean(*given), create=True
        ),
        mock.patch.object(generate.StartedAttack, "finish", lambda *given: events.append("attack") or finish(*given)),
        EmulatedDevice(),
    ):
        training(**options)
    return events


def test_it_runs_beside_the_attack_once_its_forward_is_known():
    assert order(runner=GraphRunner(bucket=2)) == ["attack", "clean", *["clean", "attack"] * 2]


AFTER = ["attack", "clean"] * 3


@pytest.mark.parametrize(
    "options",
    [
        {"runner": run_eager},
        {"runner": GraphRunner(), "frozen": None},
        {"runner": GraphRunner(), "build": "counter in place"},
        {"runner": GraphRunner(), "build": "own norm"},
    ],
    ids=["no streams", "no view", "a view of a buffer that moves", "a norm that is not torch's"],
)
def test_it_runs_after_the_attack_where_that_could_be_told(options):
    assert order(**options) == AFTER


def test_a_loss_refreshes_the_view_once():
    with mock.patch.object(
        folded.FoldedModel, "refresh", autospec=True, side_effect=folded.FoldedModel.refresh
    ) as refresh:
        training(run_eager)
        assert refresh.call_count == 1 + 3  # the first when the view is made
        training(run_eager, BULLETS["bullet"])
        assert refresh.call_count == 2 * (1 + 3)


# Faults


class FailingInTraining(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.fails = small_models.conv_bn(), False

    def forward(self, x):
        if self.training and self.fails:
            raise ArithmeticError("the model's own")
        return self.body(x)


def failing_forward(runner):
    """The clean forward raises beside the attack, and the caller reuses the memory."""
    torch.manual_seed(0)
    model = small_models.build(FailingInTraining)
    x, y = small_models.batch(6)
    options = {"perturb_steps": 2, "generator": torch.Generator().manual_seed(0), "frozen": VIEW, "runner": runner}
    for model.fails in (False, False, True):
        with suppress(ArithmeticError):
            trades.trades_loss(model, x, y, None, **options)
    gc.collect()  # frees the error and its frames
    others = [torch.full_like(x, 3.0) for _ in range(24)]
    assert model.training
    model.fails = False
    loss = trades.trades_loss(model, x, y, None, **options)
    return [*others, loss.detach(), *model.buffers()]


def without_view(runner):
    """The attack uses the model itself, and the update changes its statistics."""
    return training(runner, frozen=None)


def beside(runner):
    return training(runner)


def oracle(runner):
    """The Oracle's own attack assigns the groups, so work out of order changes them."""
    model, bullet, result = small_models.build("conv_bn"), BULLETS["oracle"](), []
    for k in range(3):
        x, _ = small_models.batch(6, seed=k)
        y = model.eval()(x).argmax(dim=1)
        model.train()
        options = {"generator": torch.Generator().manual_seed(k), "bullet": bullet, "frozen": VIEW, "runner": runner}
        loss = trades.trades_loss(model, x, y, None, epsilon=0.3, **options)
        result += [v.detach().clone() for v in (loss, bullet.group_counts)]
    return result


def own_attack(runner):
    """An attack by `generate`, which must not change its start."""
    model = small_models.build("conv_bn").eval()
    x, _ = small_models.batch(6)
    start, target = x + 0.001, torch.eye(5, dtype=torch.float64)[torch.arange(6) % 5]
    schedule = Plan.uniform(6, 2, 0.01, x.device)
    for frozen in (None, Frozen()):
        result = generate.generate(model, x, start, target, schedule, ThreatModel(0.1), frozen=frozen, runner=runner)
    idle = generate.generate(model, x, start, target, Plan.uniform(6, 0, 0.01, x.device), ThreatModel(0.1))
    idle.fill_(0.0)
    return [result.clone(), start.clone()]


def bad_pixels(runner):
    x, y = small_models.batch(6)
    with pytest.raises(ValueError, match="must lie in"):
        trades.trades_loss(small_models.build(), x + 1, y, None, runner=runner)
    return []


def bad_gradients(runner):
    x, y = small_models.with_bright([1, 4])
    with pytest.raises(ValueError, match="for 2 of 8 samples"):
        trades.trades_loss(small_models.build(small_models.Undefined), x, y, None, runner=runner, perturb_steps=3)
    return []


def bad_gradients_on_a_device(runner):
    model = small_models.build(dtype=torch.float32).to(DEVICE)
    x, y = torch.empty(6, *small_models.SHAPE, device=DEVICE), torch.zeros(6, dtype=torch.int64, device=DEVICE)
    with pretended_device(plan=[0, 0, 0]) as reads:
        trades.trades_loss(model, x, y, None)
    return [torch.tensor(reads.waited)]


ATTACK = PGD(0.1, 0.05, 3)


def perturbed_bad_pixels(runner):
    x, y = small_models.batch(6)
    with pytest.raises(ValueError, match="must lie in"):
        perturb.perturb(small_models.build(), x + 1, y, ATTACK)
    return []


def perturbed_bad_gradients_on_a_device(runner):
    model = small_models.build(dtype=torch.float32).to(DEVICE)
    x, y = torch.empty(6, *small_models.SHAPE, device=DEVICE), torch.zeros(6, dtype=torch.int64, device=DEVICE)
    with pretended_device(plan=[0, 0, 0]) as reads:
        perturb.perturb(model, x, y, ATTACK)
    return [torch.tensor(reads.waited)]


ON_A_DEVICE = (bad_gradients_on_a_device, perturbed_bad_gradients_on_a_device)
SCENARIOS = [
    *(beside, without_view, failing_forward, oracle, own_attack),
    *(bad_pixels, bad_gradients, bad_gradients_on_a_device),
    *(perturbed_bad_pixels, perturbed_bad_gradients_on_a_device),
]
LEFT = "object) -> None:\n        "
CLONE = "start.detach().clone(memory_format=torch.channels_last if last else torch.preserve_format)"
IN_FORWARDS = [
    Bug("batch norm moves once too little", "repeat.replay()", "pass", beside),
]
IN_ADVERSARIAL = [
    Bug("x' is used before the attack has ended", "self.started.finish()", "self.started.result()", beside),
    Bug("no join after an exception", "with attack.started:", "if True:", failing_forward),
    Bug("beside an attack on the model itself", "attack.independent and", "", without_view),
    Bug("the oracle looks before its attack has ended", "view, attack.finish()", "view, attack.result()", oracle),
    Bug("bad input goes unnoticed", "attack.inputs.wait()", "pass", bad_pixels),
    Bug("perturb: bad input goes unnoticed", "attack.inputs.wait()", "pass", perturbed_bad_pixels),
    Bug("bad gradients go unnoticed", "        read.wait()", "        pass", bad_gradients),
    Bug("bad gradients go unnoticed on a device", "late.wait()", "pass", bad_gradients_on_a_device),
]
IN_PERTURB = [
    Bug("perturb: bad gradients go unnoticed", "late.wait()", "pass", perturbed_bad_gradients_on_a_device),
]
IN_GENERATE = [
    Bug("it does not wait for the steps", "self.join()\n        self.join", "self.join", beside),
    Bug("it does not join after an exception", f"{LEFT}self.join()", f"{LEFT}pass", failing_forward),
    Bug("nothing is waited for", "runner).finish()", "runner).result()", own_attack),
    Bug("it changes the start", CLONE, f"({CLONE} if last else start.detach())", own_attack),
    Bug("it changes a start with channels last", CLONE, f"(start.detach() if last else {CLONE})", own_attack),
]


@functools.cache
def eager(scenario):
    return scenario(run_eager)


PLACES = [
    (trades, ("trades_loss",)),
    (adversarial, ("attacking", "run", "start_attack")),
    (generate, ("generate", "StartedAttack")),
    (perturb, ("perturb",)),
    (loss, ("Forwards",)),
]


def caught(changed, scenario):
    """Returns whether the changed module gives a non-eager result in some order of the work, or raises."""
    with ExitStack() as patches:
        for module, attributes in PLACES:
            for attribute in attributes:
                if attribute in vars(changed):
                    patches.enter_context(mock.patch.object(module, attribute, vars(changed)[attribute]))
        if scenario in ON_A_DEVICE:
            return not same(scenario(None), eager(scenario))
        emulated = patches.enter_context(EmulatedDevice())
        try:
            result = scenario(GraphRunner(bucket=2))
        except (Exception, pytest.fail.Exception):
            return True
    return any(not same(emulated.shuffled(seed, result), eager(scenario)) for seed in range(20))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_loss_as_it_is_passes(scenario):
    assert not any(caught(module, scenario) for module in (trades, adversarial, perturb))


BUGS = {
    trades: [],
    forwards: IN_FORWARDS,
    loss: [],
    drop_in: [],
    perturb: IN_PERTURB,
    adversarial: IN_ADVERSARIAL,
    generate: IN_GENERATE,
    mart: [],
    pgd: [],
}


@pytest.mark.parametrize(
    ("module", "bug"), [pytest.param(module, bug, id=bug.name) for module, bugs in BUGS.items() for bug in bugs]
)
def test_a_planted_bug_is_caught(module, bug, tmp_path):
    eager(bug.scenario)
    assert caught(planted(module, bug, tmp_path), bug.scenario)


@pytest.mark.parametrize("module", BUGS)
def test_no_call_that_orders_work_is_without_a_planted_bug(module):
    assert left_out(module, BUGS[module]) == []
