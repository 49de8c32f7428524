"""The update from graphs equals the eager one bit for bit, in every order of work that CUDA permits."""

import functools
import gc
import warnings
import weakref
from contextlib import ExitStack, nullcontext
from unittest import mock

import ordinary_loops
import pytest
import small_models
import torch
import torch.nn.functional as F
from emulated_device import UNWINDS, EmulatedDevice, capturing
from planted import Bug, left_out, planted
from tolerances import assert_near_nested
from torch import nn
from torch.nn.utils import parametrize

from bt_fast import BulletTrain, Frozen, GraphRunner, StreamRunner, Update, mart_loss, pgd_loss, trades_loss
from bt_fast.attack import captures, device
from bt_fast.attack.runners import run_eager
from bt_fast.objectives import adversarial, update

EAGER = {"channels_last": False}
GRAPHS = {"channels_last": False, "graphs": True}
BULLETS = {"uniform": lambda: None, "bullet": lambda: BulletTrain(1, 1, 0)}
POLICIES = {
    "oracle": lambda: BulletTrain(1, 1, 0, policy="oracle"),
    "own rules": lambda: BulletTrain(1, 1, 0, metric="margin", policy=lambda judged: 1 - judged.group % 2),
}
SIZES = (6, 6, 4, 6, 4, 4, 6)


class Training:
    """Updates on batches with memory that is overwritten afterwards; `found` holds all results."""

    def __init__(self, options, build="conv_bn", bullet=None, seed=0, loss_of=trades_loss):
        self.loss_of = loss_of
        self.model, self.bullet = small_models.build(build, seed), bullet
        self.update = update.Update(**options)
        self.found, self.given, self.steps = [], [], 0

    def loss(self, m=6, batch=None, **options):
        x, y = small_models.batch(m, seed=self.steps) if batch is None else batch
        options = {"perturb_steps": 1, "generator": torch.Generator().manual_seed(self.steps), **options}
        self.steps += 1
        loss = self.loss_of(self.model, x, y, None, bullet=self.bullet, update=self.update, **options)
        self.given += [x, y]
        return loss

    def step(self, m=6, **options):
        loss = self.loss(m, **options)
        loss.backward()
        self.finish(loss)

    def finish(self, *values):
        """Records these values and all state, and descends along the gradients."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        state = [] if self.bullet is None else [self.bullet.robust_fraction]
        self.found += [v.detach().clone() for v in (*values, *gradients, *self.model.buffers(), *state)]
        for memory in self.given:
            memory.fill_(-1)  # the caller no longer needs this memory
        self.given = []
        with torch.no_grad():
            for p in self.model.parameters():
                if p.grad is not None:
                    p.sub_(0.1 * p.grad)
                    p.grad = None

    def run(self, sizes=(6,) * 3, **options):
        for m in sizes:
            self.step(m, **options)
        return self.found


def same(result, expected):
    return len(result) == len(expected) and all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


NOT_CAPTURED = {
    "cumulative average": "_local_scalar_dense",  # such a norm reads its count on the host
    "tied norm, cumulative average": "_local_scalar_dense",
    "counter replaced": "replaces its parameters or buffers",
}


@pytest.mark.parametrize(
    ("model", "bullet"),
    [
        *((model, "uniform") for model in sorted(small_models.MODELS.keys() - NOT_CAPTURED.keys())),
        *((model, "bullet") for model in ("conv_bn", "dropout", "tied norm")),
        *(("conv_bn", name) for name in POLICIES),
    ],
)
def test_the_eager_result_in_any_order(model, bullet):
    make = (BULLETS | POLICIES)[bullet]
    expected, training = (Training(options, model, make()) for options in (EAGER, GRAPHS))
    torch.manual_seed(0)
    expected.run(SIZES)
    torch.manual_seed(0)
    with EmulatedDevice() as emulated:
        training.run(SIZES)
    assert same(training.found, expected.found)
    assert emulated.replays == 2 * (len(SIZES) - 2)
    for seed in range(3):
        assert same(emulated.shuffled(seed, training.found), expected.found), seed


@pytest.mark.parametrize("bullet", BULLETS)
@pytest.mark.parametrize("loss_of", [mart_loss, pgd_loss])
def test_of_the_other_objectives_too(loss_of, bullet):
    expected, training = (Training(how, "dropout", BULLETS[bullet](), loss_of=loss_of) for how in (EAGER, GRAPHS))
    torch.manual_seed(0)
    expected.run(SIZES)
    torch.manual_seed(0)
    with EmulatedDevice() as emulated:
        training.run(SIZES)
    assert same(training.found, expected.found)
    assert emulated.replays == 2 * (len(SIZES) - 2)
    for seed in range(3):
        assert same(emulated.shuffled(seed, training.found), expected.found), seed


@pytest.mark.parametrize(("model", "bullet"), [(model, "uniform") for model in NOT_CAPTURED])
def test_what_cannot_be_captured_runs_eagerly_says_why_once_and_gives_the_same(model, bullet):
    expected, training = (Training(options, model, BULLETS[bullet]()) for options in (EAGER, GRAPHS))
    expected.run()
    with EmulatedDevice() as emulated, pytest.warns(UserWarning, match=NOT_CAPTURED[model]) as warned:
        training.run()
    assert [str(w.message).startswith("the update runs without graphs: ") for w in warned] == [True]
    assert emulated.replays == 0
    assert same(training.found, expected.found)
    for seed in range(20):
        assert same(emulated.shuffled(seed, training.found), expected.found), seed


# What a caller may do between updates: a scenario takes the update's options and returns its results


def epochs(options):
    return Training(options, bullet=BulletTrain(1, 1, 0)).run((6, 6, 4, 6, 6, 4, 6, 4))


def same_batches(options):
    """Batches that keep their memory and come again."""
    training = Training(options)
    batches = [small_models.batch(6, seed) for seed in range(2)]
    for _ in range(3):
        for x, y in batches:
            loss = trades_loss(training.model, x, y, None, perturb_steps=1, update=training.update)
            loss.backward()
            training.finish(loss, x)
    return training.found


def skipped_rows(options):
    """Runs a corrupted forward of three rows, in batches of two sizes."""
    training = Training(options, bullet=BulletTrain(1, 0, 0))
    for m in [6] * 9 + [5]:
        x, y = small_models.batch(m, training.steps)
        with torch.no_grad():
            y = training.model.eval()(x).argmax(dim=1)
        training.model.train()
        y[3:] = (y[3:] + 1) % small_models.CLASSES
        training.step(batch=(x, y))
    return training.found


def dropout(options):
    torch.manual_seed(0)
    return [*Training(options, "dropout").run(), torch.rand(3)]


def accumulation(options):
    """Accumulates gradients of two losses in `.grad`, while the caller keeps those of an earlier one."""
    training = Training(options)
    for _ in range(3):
        training.loss().backward()
        kept = [p.grad for p in training.model.parameters()]
        for p in training.model.parameters():
            p.grad = None
        for _ in range(2):
            training.loss().backward()
        training.finish(*kept)
    return training.found


def two_losses(options):
    """Computes two losses of different sizes before their backwards."""
    training = Training(options)
    training.run((6, 6, 4, 4))
    losses = [training.loss(6), training.loss(4)]
    for loss in losses:
        loss.backward()
    training.finish(*losses)
    return training.run((6,))


def two_models(options):
    first, second = Training(options), Training(options, seed=1)
    first.run(), second.run()
    losses = [first.loss(), second.loss()]
    for training, loss in zip((first, second), losses, strict=True):
        loss.backward()
        training.finish(loss)
    return first.found + second.found


def weighted(options):
    """Makes the loss a part of the caller's own."""
    training = Training(options)
    for k in range(4):
        loss = training.loss() * (k + 1)
        loss.backward()
        training.finish(loss)
    return training.found


def kept_losses(options):
    """Reads the losses only after all updates."""
    training, losses = Training(options, loss_of=pgd_loss), []
    for _ in range(4):
        loss = training.loss()
        loss.backward()
        losses.append(loss.detach())
        training.finish()
    return [*training.found, *losses]


def second_backward(options):
    """Runs a second backward of a loss: from graphs it is an error, and changes nothing."""
    training = Training(options)
    training.run()
    loss = training.loss()
    loss.backward(retain_graph=True)
    if "graphs" in options:
        before = [p.grad.clone() for p in training.model.parameters()]
        with pytest.raises(RuntimeError, match="one backward"):
            loss.backward()
        assert same([p.grad for p in training.model.parameters()], before)
    training.finish(loss)
    return training.run()


def changed_before_the_backward(options):
    """Raises an error, like autograd."""
    training = Training(options)
    training.run()
    loss = training.loss()
    with torch.no_grad():
        training.model[4].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    return training.run()


def replaced_parameter(options):
    training = Training(options)
    training.run()
    training.model[0].weight = nn.Parameter(training.model[0].weight.detach() * 2)
    training.run()
    training.model[4].weight.data = training.model[4].weight.data.clone()
    return training.run()


def replaced_before_the_backward(options):
    """Replaces an untrained weight between a loss and its backward."""
    training = Training(options)
    training.model[4].weight.requires_grad_(False)
    training.run()
    loss = training.loss()
    training.model[4].weight = nn.Parameter(torch.zeros(4, 4, 3, 3, dtype=torch.float64), requires_grad=False)
    others = [torch.full((4, 4, 3, 3), 9.0, dtype=torch.float64) for _ in range(3)]
    loss.backward()
    training.finish(loss, *others)
    return training.found


def other_numbers(options):
    """Changes a norm's momentum, and then its mode."""
    training = Training(options)
    training.run()
    training.model[1].momentum = 0.5
    training.run()
    training.model[1].eval()
    return training.run()


def fewer_trained(options):
    training = Training(options)
    training.run()
    training.model[0].weight.requires_grad_(False)
    training.run()
    training.model[0].weight.requires_grad_(True)
    return training.run()


def idle_parameter(options):
    """A parameter that no forward uses has no gradient, rather than zeros."""
    training = Training(options)
    training.model.register_parameter("idle", nn.Parameter(torch.ones(2)))
    training.run()
    assert training.model.idle.grad is None
    return training.found


def casts(options):
    """Updates under the caller's autocast and without it."""
    training = Training(options)
    training.model.float()
    with mock.patch.object(small_models.batch, "__defaults__", (8, 0, torch.float32)):
        for enabled in (False, True, True, True, False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled, cache_enabled=False):
                training.step()
    return training.found


def both_ways(options):
    """Keeps and skips unperturbed samples, with equal numbers of rows."""
    training = Training(options, bullet=BulletTrain(1, 1, 1))
    training.run()
    training.bullet = None
    training.run()
    training.bullet = BulletTrain(1, 1, 1)
    return training.run()


def on_streams(options):
    """Runs two updates on streams that do not wait for each other."""
    training, streams = Training(options, mlp), [None, None]
    training.run()
    if torch.cuda.CUDAGraph is not torch.cuda.graphs.CUDAGraph:  # on the emulated device
        streams = [torch.cuda.Stream() for _ in range(2)]
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
    losses = []
    for stream in streams:
        with torch.cuda.stream(stream) if stream else nullcontext():
            for p in training.model.parameters():
                p.grad = None
            loss = training.loss()
            loss.backward()
            losses.append(loss.detach())
            losses += [p.grad for p in training.model.parameters()]
    for stream in streams:
        if stream:
            torch.cuda.current_stream().wait_stream(stream)
    training.finish(*losses)
    return training.found


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, small_models.CLASSES))


def ordinary_loop(options, build="conv_bn"):
    """Trains as in any script: a loss is alive until the next one has been computed."""
    result = ordinary_loops.iterations("cpu", build, update=update.Update(**options))
    return [value for iteration in result for value in iteration]


beside_a_loader = functools.partial(ordinary_loop, build=ordinary_loops.BesideALoader)


class ReadingOthers(nn.Module):
    """Layers that share a weight, one that reads another's, and one with a weight computed from a parameter."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(36, 36) for _ in range(3))
        self.second.weight = self.first.weight
        self.third.others = [self.first]
        self.head = parametrize.register_parametrization(nn.Linear(36, small_models.CLASSES), "weight", Symmetric())

    def forward(self, x):
        x = self.second(self.first(x.flatten(1)).relu()).relu()
        return self.head(F.linear(x, self.third.others[0].weight * 2, self.third.bias).relu())


class Symmetric(nn.Module):
    """A model that ignores the sign of its weight."""

    def forward(self, weight):
        return weight.abs()


reading_others = functools.partial(ordinary_loop, build=ReadingOthers)


class OutsideItsModules(nn.Module):
    """Trains a tensor that is not a parameter of its modules."""

    def __init__(self):
        super().__init__()
        self.body, self.kept = small_models.conv_bn(), [nn.Parameter(torch.ones(small_models.CLASSES).double())]

    def forward(self, x):
        return self.body(x) * self.kept[0]


def outside_its_modules(options):
    training = Training(options, OutsideItsModules)
    training.run()
    return [*training.found, training.model.kept[0].grad]


def broken_then_good(options):
    """Breaks off one model's capture; then captures another's, which draws random numbers."""
    torch.manual_seed(0)
    first, second = Training(options, ordinary_loops.Waiting), Training(options, "dropout")
    return [*first.run(), *second.run(), torch.rand(3)]


class Breaking(nn.Module):
    """Raises in its nth training forward or in a capture; without an error, waits for the device there."""

    def __init__(self, n=-1, error=ArithmeticError):
        super().__init__()
        self.body, self.error = small_models.conv_bn(dropout=0.3), error
        self.left = [n]

    def forward(self, x):
        if self.training:
            self.left[0] -= 1
            total = x.sum()
            if self.left[0] < -100 and capturing() and self.error is None:
                total.item()
            if self.left[0] == 0 or (self.left[0] < -100 and capturing()):
                self.left[0] = -1
                raise self.error("the model's own")
        return self.body(x)


def broken(options, n, error=ArithmeticError):
    """Breaks off a capture in its nth warm-up forward, or while it records."""
    torch.manual_seed(0)
    training = Training(options, lambda: Breaking(error=error))
    training.step()
    training.model.left[0] = n if "graphs" in options else -1
    training.step()
    return training.run()


broken_warmup = functools.partial(broken, n=2)
broken_recording = functools.partial(broken, n=-100)
waiting = functools.partial(broken, n=-100, error=None)
out_of_memory = functools.partial(broken, n=-100, error=torch.OutOfMemoryError)
SCENARIOS = {  # and the number of their replays
    epochs: 12,
    same_batches: 10,
    skipped_rows: 2,
    dropout: 4,
    accumulation: 16,
    two_losses: 8,
    two_models: 12,
    weighted: 6,
    kept_losses: 6,
    second_backward: 12,
    changed_before_the_backward: 11,  # without the refused backward
    replaced_parameter: 12,
    replaced_before_the_backward: 6,
    other_numbers: 12,
    fewer_trained: 14,
    idle_parameter: 4,
    casts: 8,
    both_ways: 14,
    on_streams: 8,
    ordinary_loop: 6,
    beside_a_loader: 6,
    reading_others: 6,
    outside_its_modules: 0,
    broken_then_good: 4,
    broken_warmup: 0,
    broken_recording: 0,
    waiting: 0,
    out_of_memory: 0,
}
WARNED = {
    two_losses: "awaits its backward",
    outside_its_modules: "no parameters of the model's modules",
    broken_then_good: "capture failed (NotPermittedError: _local_scalar_dense",
    broken_warmup: "capture failed (ArithmeticError: the model's own)",
    broken_recording: "capture failed (ArithmeticError: the model's own)",
    waiting: "capture failed (NotPermittedError: _local_scalar_dense",
    out_of_memory: "capture failed (OutOfMemoryError: the model's own)",
}


def name(scenario):
    known = {v: k for k, v in globals().items() if callable(v) and not isinstance(v, type)}
    return known[scenario]


@functools.cache
def eager(scenario):
    return scenario(EAGER)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=name)
def test_whatever_a_caller_does_the_result_is_the_eager_one(scenario):
    with EmulatedDevice() as emulated, warnings.catch_warnings(record=True) as warned:
        result = scenario(GRAPHS)
    assert same(result, eager(scenario))
    assert [WARNED.get(scenario, "unexpected") in str(w.message) for w in warned] == [True] * (scenario in WARNED)
    assert emulated.replays == SCENARIOS[scenario]
    assert emulated.stream is emulated.default
    for seed in range(5):
        assert same(emulated.shuffled(seed, result), eager(scenario)), seed


# Planted bugs


IN_UPDATE = [
    Bug("buffers are not restored", "buffer.data.copy_(value)"),
    Bug("buffers are restored to what they are", "b.detach().clone()", "b.detach()"),
    Bug("generators are not restored", "random.restore()", scenario=dropout),
    Bug("the caller's memory becomes static", "t.clone(memory_format=torch.preserve_format)", "t", same_batches),
    Bug("terms alias static memory", "t.clone() for t in self._terms", "t.detach() for t in self._terms", kept_losses),
    Bug("gradients are not copied", "torch._foreach_copy_(", "zip("),
    Bug("gradients alias static memory", "None, *copies)", "None, *[g.detach() for g in gradients])", accumulation),
    Bug(
        "a parameter that was changed goes unnoticed",
        "ctx.saved_tensors, ",
        "ctx.captured._gradients, ",
        changed_before_the_backward,
    ),
    Bug(
        "gradients of what was not used", "None if g is None else torch.empty_like", "torch.zeros_like", idle_parameter
    ),
    Bug("it does not wait for another stream", "stream.wait_stream(self._stream)", scenario=on_streams),
    Bug("the forward is not replayed", "self._forward.replay()"),
    Bug("the backward is not replayed", "self._backward.replay()"),
    Bug(
        "nothing is copied in",
        "self._given, given, strict=True):\n            static.copy_(value)",
        "[]):\n            pass",
    ),
    Bug(
        "no gradient comes in",
        "arriving, strict=True):\n            static.copy_(value)",
        "[]):\n            pass",
        weighted,
    ),
    Bug("arguments change places", "replay, *given, *", "replay, given[1], given[0], given[2], *"),
    Bug("it captures the parameters themselves", "nn.Parameter(p.detach())", "p", ordinary_loop),
    Bug("a trained tensor elsewhere goes unnoticed", "if _leaves_of(terms) -", "if set() -", outside_its_modules),
    Bug("runs on the side do not wait for the caller", "side.wait_stream(caller)"),
    Bug("the caller does not wait for runs on the side", "caller.wait_stream(side)"),
    Bug("it is captured on the caller's stream", "device.on(side)", "device.on(caller)"),
    Bug("no stream on the side", "device.new_stream(given[0])", "device.current_stream(given[0])"),
    Bug(
        "the backward is outside its capture",
        "capture(pool) as self._backward:",
        "capture(pool) as self._backward, device.on(caller):",
    ),
    Bug("forwards go into a pool of all models", "capture(pool) as self._f", "capture('only') as self._f", two_models),
    Bug("an earlier loss is overwritten", "if replay is None or replay.done:", "if True:", two_losses),
    Bug("a second backward", "if self.done:", "if False:", second_backward),
    Bug("weights are not kept", "[t.detach() for t in _tensors(model)]", "[]", replaced_before_the_backward),
    Bug("one graph for all computations", "computation=computation.identity", "computation=0", both_ways),
    Bug(
        "one graph for all sizes",
        "(t.shape, t.stride(), t.dtype, t.device) for t in given",
        "0 for t in given",
        skipped_rows,
    ),
    Bug("one graph with and without autocast", "autocast=caller_autocast(given[0])", "autocast=None", casts),
    Bug("one graph for all modes", "values=plain_values(model)", "values=()", other_numbers),
    Bug("graphs of weights that are gone", "(t.data_ptr(), t.shape", "(t.shape", replaced_parameter),
    Bug("one graph whatever is trained", "t.dtype, t.requires_grad)", "t.dtype)", fewer_trained),
    Bug("replayed where it must run again", "history.replayable, given", "True, given", dropout),
    Bug(
        "the cast weights are cached",
        "from bt_fast.attack.forward import caller_autocast, plain_values, uncached",
        "from bt_fast.attack.forward import caller_autocast, plain_values\n"
        'def uncached(x): return torch.autocast("cpu", torch.bfloat16, torch.is_autocast_enabled("cpu"), True)',
        casts,
    ),
]
IN_CAPTURES = [
    Bug("one pool for all models", "device.new_pool()", "'the only one'", two_models),
    Bug("a pool that is gone", "if not self:", "if self._pool is None:", replaced_parameter),
]


def caught(changed, scenario):
    """Returns whether the changed module gives a non-eager result in some order of the work, or raises."""
    with ExitStack() as patches:
        for module, attribute in ((adversarial, "run_update"), (update, "GraphPool")):
            if attribute in vars(changed):
                patches.enter_context(mock.patch.object(module, attribute, vars(changed)[attribute]))
        emulated = patches.enter_context(EmulatedDevice())
        patches.enter_context(warnings.catch_warnings(record=True))
        try:
            result = scenario(GRAPHS)
        except (Exception, pytest.fail.Exception):
            return True
    if emulated.replays != SCENARIOS[scenario] or emulated.stream is not emulated.default:
        return True
    try:
        return any(not same(emulated.shuffled(seed, result), eager(scenario)) for seed in range(20))
    except IndexError:  # garbage in place of a label
        return True


def test_a_copy_of_the_update_without_a_bug_passes(tmp_path):
    assert not caught(planted(update, Bug("none", "run_update", "run_update"), tmp_path), epochs)


@pytest.mark.parametrize("bug", IN_UPDATE, ids=str)
def test_a_bug_planted_into_the_update_is_caught(bug, tmp_path):
    assert caught(planted(update, bug, tmp_path), bug.scenario or epochs)


@pytest.mark.parametrize("bug", IN_CAPTURES, ids=str)
def test_a_bug_planted_into_the_cache_of_graphs_is_caught(bug, tmp_path):
    assert caught(planted(captures, bug, tmp_path), bug.scenario)


def test_no_call_that_orders_work_is_without_a_planted_bug():
    assert left_out(update, IN_UPDATE) == []


@pytest.mark.parametrize("as_torch", UNWINDS)
def test_after_a_broken_capture_another_model_is_captured_and_memory_comes_back(as_torch):
    with EmulatedDevice(as_torch) as emulated, pytest.warns(UserWarning, match="capture failed") as warned:
        result = broken_then_good(GRAPHS)
    gc.collect()
    assert same(result, eager(broken_then_good))
    assert emulated.replays == SCENARIOS[broken_then_good]
    assert len(warned) == 1
    assert not emulated.under_way
    assert not any(emulated.uses.values())


class TorchsHelper(update._Captured):
    """Captures the update as before: by `torch.cuda.make_graphed_callables`, on the model's own parameters."""

    def __init__(self, model, computation, replayable, given, side, pool):
        static, self.constant = tuple(t.clone() for t in given), ()
        self.trained = update._trained(model)
        of = weakref.ref(model)

        def terms(x, x_adv, y, *parameters):
            return computation(of(), x, x_adv, y, replayable)[0]

        try:
            with device.on(device.current_stream(given[0])):
                arguments = (*static, *self.trained)
                self.graphed = torch.cuda.make_graphed_callables(terms, arguments, allow_unused_input=True, pool=pool)
        except Exception as error:
            raise device.CaptureError.of(error) from error

    def forward(self, *given):
        with torch.enable_grad():
            self.terms = self.graphed(*given, *self.trained)
        return tuple(t.detach() for t in self.terms)

    def backward(self, arriving):
        return torch.autograd.grad(self.terms, self.trained, arriving, allow_unused=True)


def by_torchs_helper(scenario):
    """Returns its results, the number of replays, and all warnings."""
    with (
        EmulatedDevice() as emulated,
        mock.patch.object(update, "_Captured", TorchsHelper),
        warnings.catch_warnings(record=True) as warned,
    ):
        return scenario(GRAPHS), emulated.replays, [str(w.message) for w in warned]


def test_torchs_own_helper_captures_where_nothing_is_beside_it():
    result, replays, warned = by_torchs_helper(epochs)
    assert replays == SCENARIOS[epochs]
    assert same(result, eager(epochs))
    assert warned == []


@pytest.mark.parametrize("scenario", [ordinary_loop, beside_a_loader], ids=["an earlier loss", "a loader"])
def test_what_breaks_torchs_own_helper_is_seen(scenario):
    result, replays, warned = by_torchs_helper(scenario)
    assert replays == 0
    assert ["capture failed" in message for message in warned] == [True]
    assert same(result, eager(scenario))


def test_that_torchs_own_helper_leaves_a_broken_capture_under_way_is_seen():
    with pytest.raises(RuntimeError, match="Offset increment outside graph capture"):
        by_torchs_helper(broken_then_good)


# What cannot be captured


def with_hook(training):
    training.model[2].register_forward_hook(lambda module, given, out: out * 2)


def with_parameter_hook(training):
    training.model[4].weight.register_hook(lambda gradient: gradient * 0.5)


def with_a_trained_buffer(training):
    training.model.register_buffer("offset", torch.zeros(2, requires_grad=True))


def spread(training):
    training.model = nn.DataParallel(training.model)


def drawing_on_the_host(training):
    training.model.append(HostDrawing())


class HostDrawing(nn.Module):
    """A model that branches on the host's random numbers."""

    generator = torch.Generator()

    def forward(self, x):
        return x * (1.5 if self.training and torch.rand(1, generator=self.generator) < 0.5 else 1.0)


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (with_hook, "2 has a hook"),
        (with_parameter_hook, "parameter 4.weight has a hook"),
        (with_a_trained_buffer, "a buffer requires a gradient"),
        (spread, "spread over devices"),
        (drawing_on_the_host, "draws from the host's generator"),
    ],
)
def test_what_a_graph_would_leave_out_is_named_once_and_runs_eagerly(prepare, reason):
    result = []
    for options in (EAGER, GRAPHS):
        HostDrawing.generator.manual_seed(0)
        training = Training(options)
        prepare(training)
        with (
            EmulatedDevice() as emulated,
            mock.patch.object(device, "host_generator", return_value=HostDrawing.generator),
            warnings.catch_warnings(record=True) as warned,
        ):
            result.append(training.run())
    assert [reason in str(w.message) for w in warned] == [True]
    assert emulated.replays == 0
    assert same(*result)


def test_without_a_gradient_to_take_it_runs_eagerly():
    training = Training(GRAPHS)
    training.model.requires_grad_(False)
    with EmulatedDevice() as emulated, pytest.warns(UserWarning, match="no gradient") as warned:
        losses = [training.loss() for _ in range(3)]
    assert not any(loss.requires_grad for loss in losses)
    assert len(warned) == 1
    assert emulated.replays == 0


def test_on_the_cpu_it_runs_eagerly_and_says_so_once():
    expected, training = Training(EAGER), Training(GRAPHS)
    with pytest.warns(UserWarning, match="on cpu") as warned:
        training.run()
    assert len(warned) == 1
    assert same(training.found, expected.run())


def test_a_model_that_counts_its_forwards_in_python_is_named():
    class Counting(nn.Sequential):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    training = Training(GRAPHS, lambda: Counting(*small_models.conv_bn()))
    with (
        EmulatedDevice() as emulated,
        mock.patch.object(update, "MOST_REMEMBERED", 3),
        pytest.warns(UserWarning, match="does the model count its forwards"),
    ):
        training.run((6,) * 5)
    assert emulated.replays == 0


def test_a_failed_capture_frees_all_graphs_before_the_update_goes_on_eagerly():
    training, alive = Training(GRAPHS, lambda: Breaking(error=torch.OutOfMemoryError)), []
    with EmulatedDevice():
        training.run()
        (captured,) = map(weakref.ref, update._graphs[training.model].captured.values())
        assert captured() is not None
        training.model.left[0] = -1000
        training.step(4)
        with (
            pytest.warns(UserWarning, match="OutOfMemoryError"),
            mock.patch.object(update, "_eagerly", lambda *given: alive.append(captured()) or update_eagerly(*given)),
        ):
            training.step(4)
    assert alive == [None]


update_eagerly = update._eagerly


def test_the_graphs_of_a_model_are_bounded():
    training = Training(GRAPHS)
    with EmulatedDevice(), mock.patch.object(update, "MOST_CAPTURED", 2):
        training.run((6, 6, 4, 4, 5, 5, 6))
        sizes = [key.inputs[0][0][0] for key in update._graphs[training.model].captured]
    assert sizes == [5, 6]


def test_graphs_do_not_keep_the_model_alive():
    training = Training(GRAPHS)
    with EmulatedDevice() as emulated:
        training.run()
    assert emulated.replays
    gone = weakref.ref(training.model)
    training.model = None
    gc.collect()
    assert gone() is None


# Options


def colourful():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))


@pytest.mark.parametrize("bullet", BULLETS)
def test_channels_last_is_the_format_of_the_update_and_moves_gradients_by_rounding(bullet):
    x, y = torch.rand(6, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.arange(6) % 5
    result, formats = [], []
    for option in (None, Update()):
        model = small_models.build(colourful)
        model.register_forward_pre_hook(
            lambda m, given: formats.append((m.training, given[0].is_contiguous(memory_format=torch.channels_last)))
        )
        generator = torch.Generator().manual_seed(0)
        trades_loss(model, x, y, None, bullet=BULLETS[bullet](), generator=generator, update=option).backward()
        result.append(small_models.gradients(model))
    assert_near_nested(*result)
    halves = formats[: len(formats) // 2], formats[len(formats) // 2 :]
    assert [{last for training, last in half if training} for half in halves] == [{False}, {True}]


def test_of_mart_each_weight_of_the_robust_term_has_its_own_graph():
    expected, training = (Training(how, loss_of=mart_loss) for how in (EAGER, GRAPHS))
    with EmulatedDevice() as emulated:
        for beta in (1.0, 1.0, 2.0, 2.0, 1.0):
            training.step(beta=beta)
    for beta in (1.0, 1.0, 2.0, 2.0, 1.0):
        expected.step(beta=beta)
    assert same(training.found, expected.found)
    assert emulated.replays == 6


@pytest.mark.parametrize("loss_of", [trades_loss, mart_loss, pgd_loss])
@pytest.mark.parametrize(
    "fast", [(GraphRunner, Update(graphs=True)), (StreamRunner, Update())], ids=["graphs", "streams"]
)
def test_everything_together(loss_of, fast):
    """The clean forward of the update runs beside the attack unless the update is from graphs."""
    result = []
    for runner, how in ((run_eager, Update()), (fast[0](bucket=2), fast[1])):
        model, bullet = small_models.build("conv_bn"), BulletTrain(2, 1, 0)
        x, y = small_models.batch(6)
        with EmulatedDevice() as emulated:
            for k in range(4):
                options = {"bullet": bullet, "frozen": Frozen(), "generator": torch.Generator().manual_seed(k)}
                loss = loss_of(model, x, y, None, **options, runner=runner, update=how)
                loss.backward()
        result.append([loss.detach(), *(p.grad for p in model.parameters()), *model.buffers(), bullet.robust_fraction])
    assert emulated.captures >= (3 if how.graphs else 2)
    assert same(*result)
    for seed in range(10):
        assert same(emulated.shuffled(seed, result[1]), result[0]), seed


@pytest.mark.parametrize("option", ["channels_last", "graphs"])
def test_wrong_options_are_refused(option):
    with pytest.raises(TypeError, match=f"{option} must be True or False, got 1"):
        Update(**{option: 1})
    with pytest.raises(TypeError, match="update must be an Update or None, got str"):
        trades_loss(small_models.build(), *small_models.batch(), None, update="graphs")
