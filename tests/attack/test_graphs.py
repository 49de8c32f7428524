"""From graphs and on streams the attack finds what it finds eagerly, in every order of work that CUDA permits."""

import gc
import importlib.util
import sys
import weakref
from pathlib import Path
from unittest import mock

import pytest
import small_models
import torch
from emulated_device import EmulatedDevice, NotPermittedError
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from bt_fast import BulletTrain, Frozen, Schedule, ThreatModel, trades_loss
from bt_fast.attack import graphs, streams
from bt_fast.attack.folded import attack_model
from bt_fast.attack.graphs import GraphRunner
from bt_fast.attack.runners import run_eager
from bt_fast.attack.streams import StreamRunner

THREAT = ThreatModel(0.1)
COUNTS = [[3, 3, 1, 0], [2, 3, 2, 1, 3], [0, 3, 2], [1, 2, 1, 0, 1]]


class Training:
    """An attack on each of several batches, and after each an update of the weights and of the batch's memory."""

    def __init__(self, build, counts=COUNTS, threat=THREAT):
        torch.manual_seed(0)
        self.model = build().double().eval()
        self.batches, self.threat = [], threat
        for steps in counts:
            steps = torch.tensor(steps)
            schedule = Schedule.from_steps(steps, torch.linspace(0.01, 0.03, len(steps)))
            clean = torch.rand(len(steps), *small_models.SHAPE, dtype=torch.float64)
            target = torch.rand(len(steps), small_models.CLASSES, dtype=torch.float64).softmax(dim=1)
            self.batches.append((clean, target, schedule))

    def run(self, runner, frozen=None):
        found, generator = [], torch.Generator().manual_seed(0)
        for clean, target, schedule in self.batches:
            x_adv, clean, target = clean + 0.001, clean.clone(), target.clone()
            with attack_model(self.model, frozen, clean) as view:
                faulty = torch.zeros(len(x_adv), dtype=torch.int32)
                runner(view, x_adv, clean, target, schedule, self.threat, generator, faulty)
            found += [x_adv.clone(), faulty.clone()]
            for memory in (x_adv, clean, target):
                memory.fill_(float("nan"))  # the caller is done with it
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.mul_(1.1)
        return found


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 6), nn.ReLU(), nn.Linear(6, small_models.CLASSES))


class Troubled(nn.Module):
    """Its input gradient is 0 for the darker samples, and NaN for the brighter."""

    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x):
        level = x.flatten(1).mean(dim=1, keepdim=True)
        logits = self.body(x)
        logits = torch.where(level < 0.4, logits.detach(), logits)
        return logits + 0.0 * torch.where(level > 0.51, level - level.detach(), 1.0).sqrt()


@pytest.mark.parametrize(
    ("model", "frozen", "norm", "orders"),
    [
        (mlp, None, "l_inf", 1000),
        (small_models.conv_bn, None, "l_inf", 20),
        (small_models.conv_bn, Frozen(), "l_inf", 20),
        (small_models.conv_bn, None, "l_2", 20),
        (Troubled, None, "l_inf", 20),
        (Troubled, None, "l_2", 20),
    ],
)
@pytest.mark.parametrize("runner", [GraphRunner, StreamRunner])
def test_the_eager_result_in_any_order(runner, model, frozen, norm, orders):
    threat = ThreatModel(0.1, norm)
    expected = Training(model, threat=threat).run(run_eager, frozen)
    training = Training(model, threat=threat)
    with EmulatedDevice() as emulated:
        found = training.run(runner(bucket=2), frozen)
    if norm == "l_inf":
        assert same(found, expected)
    else:  # where no sign hides it, the last bit of a library's result depends on the batch's size
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-14)
    assert emulated.captures > 1
    assert emulated.replays > emulated.captures
    for seed in range(orders):
        assert same(emulated.shuffled(seed, found), found), seed


@pytest.mark.parametrize("runner", [GraphRunner, StreamRunner])
@pytest.mark.parametrize("bullet", [False, True])
def test_the_training_loss_of_either_runner_is_the_eager_one(bullet, runner):
    found = []
    for run in (run_eager, runner(bucket=2)):
        torch.manual_seed(0)
        model = small_models.conv_bn().double()
        x, y = torch.rand(6, *small_models.SHAPE, dtype=torch.float64), torch.arange(6) % small_models.CLASSES
        mining = BulletTrain(3, 1, 0) if bullet else None
        with EmulatedDevice() as emulated:
            for _ in range(3):
                options = {"generator": torch.Generator().manual_seed(1), "bullet": mining, "runner": run}
                loss = trades_loss(model, x, y, None, perturb_steps=10 if bullet else 2, **options)
        found.append([loss.detach(), *model.buffers()])
    assert emulated.replays
    assert same(*found)


# what is planted into the runner: a name, the text, its replacement
BUGS = [
    ("it does not wait for the caller", "self._stream.wait_stream(caller)", "pass"),
    ("the caller does not wait", "return lambda: caller.wait_stream(self._stream)", "return joined"),
    ("NaN is not reported", "torch.maximum(faulty, self._faulty[:m], out=faulty)", "pass"),
    ("one pool for all chains", "self._pool = device.new_pool()", "self._pool = 'the only one'"),
    ("x' is not copied in", "self._x_adv[:m].copy_(x_adv)", "pass"),
    ("x is not copied in", "self._clean[:m].copy_(clean)", "pass"),
    ("the target is not copied in", "self._target[:m].copy_(target)", "pass"),
    ("step sizes are not copied in", "self._step_size[:m].copy_(schedule.step_size)", "pass"),
    ("steps are not copied in", "self._steps[:m].copy_(schedule.steps)", "pass"),
    ("x' is not copied out", "x_adv.copy_(self._x_adv[:m])", "pass"),
    ("flags of an earlier attack", "self._faulty.zero_()", "pass"),
    ("the counter does not start again", "self._step.zero_()", "pass"),
    ("the counter stands still", "self._step.add_(1)", "pass"),
    ("padding moves", "steps=self._steps[:n],", "steps=self._steps[:n] + 9,"),
    ("a bucket is too small", "-(-n // self._bucket) * self._bucket)", "n // self._bucket * self._bucket)"),
    ("a graph of another size is replayed", "self.graphs.get(n)", "next(iter(self.graphs.values()), None)"),
    ("graphs of weights that are gone", "t.data_ptr() for t in _tensors(model)", "0 for t in _tensors(model)"),
]


def planted(text, instead, path):
    source = Path(graphs.__file__).read_text()
    assert text in source
    path.write_text(source.replace(text, instead))
    spec = importlib.util.spec_from_file_location("planted_graphs", path)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {"planted_graphs": module}):  # dataclasses look their module up
        spec.loader.exec_module(module)
    return module


def caught(module):
    """Whether an order of the work shows another result than the eager one, or a graph reads freed memory."""
    return any(_caught(module, runner) for runner in (GraphRunner, StreamRunner))


def _caught(module, runner):
    expected, training = replaced_weights(Training(Troubled), run_eager), Training(Troubled)
    with EmulatedDevice() as emulated, mock.patch.object(streams, "GraphRunner", module.GraphRunner):
        try:
            found = replaced_weights(training, (module.GraphRunner if runner is GraphRunner else runner)(bucket=2))
        except (NotPermittedError, KeyError):
            return True
    return not all(same(emulated.shuffled(seed, found), expected) for seed in range(20))


def replaced_weights(training, runner):
    """Two trainings, between which every weight is replaced by another tensor."""
    found = training.run(runner)
    for layer in training.model.body:
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(layer.weight.detach() * 2)
    return found + training.run(runner)


def test_the_runner_as_it_is_passes():
    assert not caught(graphs)


@pytest.mark.parametrize(("text", "instead"), [pytest.param(*bug[1:], id=bug[0]) for bug in BUGS])
def test_a_planted_bug_is_caught(text, instead, tmp_path):
    assert caught(planted(text, instead, tmp_path / "planted.py"))


def test_a_seed_that_is_not_copied_in_is_caught(tmp_path):
    threat, found = ThreatModel(0.1, "l_2"), []
    for module in (graphs, planted("self._seed.copy_(seeds[t])", "pass", tmp_path / "planted.py")):
        training = Training(Troubled, threat=threat)
        with EmulatedDevice():
            found.append(training.run(module.GraphRunner(bucket=2)))
    apart = [(a - b).abs().max() for a, b in zip(*found, strict=True)]
    assert max(apart) > 1e-3


# Models that cannot be captured, and faults


class Reading(nn.Module):
    """Waits for the device."""

    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x):
        return self.body(x) * (2.0 if x.sum().item() > 0 else 1.0)


def hooked():
    model = mlp()
    model[2].register_forward_hook(lambda module, given, out: out * 2)
    return model


@pytest.mark.parametrize(("build", "reason"), [(Reading, "item|_local_scalar_dense"), (hooked, "2 has a hook")])
def test_a_model_that_cannot_be_captured_runs_eagerly_and_says_why_once(build, reason):
    expected = Training(build).run(run_eager)
    training = Training(build)
    with EmulatedDevice() as emulated, pytest.warns(UserWarning, match=reason) as warned:
        found = training.run(GraphRunner(bucket=2))
    assert len(warned) == 1
    assert emulated.replays == 0
    assert same(found, expected)
    assert same(emulated.shuffled(0, found), expected)


def test_on_the_cpu_there_are_no_graphs_and_it_says_so():
    with pytest.warns(UserWarning, match="on cpu"):
        found = Training(mlp).run(GraphRunner())
    assert same(found, Training(mlp).run(run_eager))


class Failing(nn.Module):
    """Raises at its nth forward."""

    def __init__(self, n):
        super().__init__()
        self.body, self.left = mlp(), n

    def forward(self, x):
        self.left -= 1
        if self.left == 0:
            raise ArithmeticError("the model's own")
        return self.body(x)


@pytest.mark.parametrize(("forward", "captured"), [(1, False), (2, True), (3, False)])
def test_an_exception_in_the_model_leaves_streams_joined_and_training_able_to_go_on(forward, captured):
    counts = [[4, 4, 2], [4, 4, 1]]
    training, runner = Training(lambda: Failing(forward), counts), GraphRunner(bucket=2)
    with EmulatedDevice() as emulated:
        caller = emulated.stream
        # one that only the capture saw is the capture's
        expecting = pytest.warns(UserWarning, match="own") if captured else pytest.raises(ArithmeticError, match="own")
        with expecting:
            training.run(runner)
        assert emulated.stream is caller
        assert emulated.graph is None
        if captured:
            return
        found = training.run(runner)
        assert emulated.stream is caller
    expected = Training(lambda: Failing(-1), counts).run(run_eager)
    assert same(found, expected)
    for seed in range(20):
        assert same(emulated.shuffled(seed, found), expected)


def test_graphs_are_bounded_and_the_least_recently_used_go():
    counts = [[9] * 3 + [6] * 3 + [3] * 3] * 3
    training, runner = Training(mlp, counts), GraphRunner(bucket=3, most_graphs=2)
    with EmulatedDevice() as emulated:
        found = training.run(runner)
        (session,) = runner._sessions[training.model].values()
        assert list(session.graphs) == [6, 3]
    assert emulated.captures > 3
    assert same(found, Training(mlp, counts).run(run_eager))


def test_a_smaller_last_batch_needs_no_new_buffers_and_a_larger_one_does():
    training, runner = Training(mlp, [[3] * 8, [3] * 5, [3] * 12]), GraphRunner(bucket=2)
    sessions = []
    with EmulatedDevice():
        for batch in list(training.batches):
            training.batches = [batch]
            training.run(runner)
            sessions.append(next(iter(runner._sessions[training.model].values())))
    assert sessions[0] is sessions[1] is not sessions[2]


@pytest.mark.parametrize("change", ["mode", "threat", "dtype", "memory format", "autocast"])
def test_what_a_graph_has_fixed_is_captured_anew(change):
    x, target = torch.rand(2, 3, 4, 4), torch.rand(2, 5)
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2))
    before = graphs._Key.of(model, x, x, target, THREAT)
    assert before == graphs._Key.of(model, x.clone(), x.clone(), target.clone(), THREAT)
    with torch.autocast("cpu", enabled=change == "autocast"):
        after = graphs._Key.of(
            model.eval() if change == "mode" else model,
            x.double()
            if change == "dtype"
            else x.contiguous(memory_format=torch.channels_last)
            if change == "memory format"
            else x,
            x,
            target,
            ThreatModel(0.2) if change == "threat" else THREAT,
        )
    assert before != after


def test_no_other_tensor_gets_the_address_of_a_captured_weight():
    training, runner = Training(mlp, [[3] * 4]), GraphRunner(bucket=2)
    weight = training.model[1].weight
    storage = StorageWeakRef(weight.untyped_storage())
    with EmulatedDevice():
        training.run(runner)
    weight.data = weight.data.clone()
    assert not storage.expired()


def test_a_runner_does_not_keep_the_model_alive():
    training, runner = Training(mlp, [[3] * 4]), GraphRunner(bucket=2)
    gone = weakref.ref(training.model)
    with EmulatedDevice():
        training.run(runner)
    del training
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(("options", "error"), [({"bucket": 0}, ValueError), ({"most_graphs": 1.5}, TypeError)])
def test_wrong_options_are_refused(options, error):
    with pytest.raises(error, match=next(iter(options))):
        GraphRunner(**options)
