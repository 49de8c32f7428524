"""`Logits` in front of a model that returns something else: the results of the model that returns its logits."""

import copy
import gc
import pickle
import weakref
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from small_models import assert_unchanged, batch, build, conv_bn, snapshot
from torch import nn

from bt_fast import (
    PGD,
    AugMixLoss,
    BulletTrain,
    Engine,
    Frozen,
    Logits,
    MARTLoss,
    Normalization,
    PGDLoss,
    TRADESLoss,
    evaluate,
    perturb,
)
from bt_fast.attack import folded
from bt_fast.attack.folded import attack_model, known_view
from bt_fast.attack.wrapped import unwrapped

ATTACK = PGD(0.06, 0.02, 3)
Output = namedtuple("Output", ["features", "logits"])
SHAPES = {
    "a tuple": (lambda z: (z * 2, z), lambda output: output[1]),
    "a dict": (lambda z: {"logits": z, "aux": z.sum()}, lambda output: output["logits"]),
    "a named tuple": (lambda z: Output(z, z), lambda output: output.logits),
    "an object": (lambda z: SimpleNamespace(logits=z), lambda output: output.logits),
    "of a list": (lambda z: [[z]], lambda output: output[0][0]),
}
EACH = pytest.mark.parametrize(("returns", "select"), SHAPES.values(), ids=SHAPES)


class Returning(nn.Module):
    def __init__(self, returns):
        super().__init__()
        self.body, self.returns = conv_bn(), returns

    def forward(self, x):
        return self.returns(self.body(x))


def pair(returns):
    """A model that returns something else, and one with the same weights that returns its logits."""
    model = build(lambda: Returning(returns))
    return model, copy.deepcopy(model.body)


def state(model):
    return [*model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]


def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


@pytest.mark.parametrize("engine", ["exact", Engine(fold=True, channels_last=True)])
@pytest.mark.parametrize("mining", [False, True])
@pytest.mark.parametrize("kind", [TRADESLoss, MARTLoss, PGDLoss])
@EACH
def test_a_loss_with_logits_is_that_of_the_net_alone(returns, select, kind, mining, engine):
    result = []
    for net, how in zip(pair(returns), ({"logits": select}, {}), strict=True):
        x, y = batch(12)
        torch.manual_seed(0)
        criterion = kind(ATTACK, mining=BulletTrain(3, 1, 0) if mining else None, engine=engine, **how)
        losses = [criterion(net, x, y) for _ in range(2)]
        losses[-1].backward()
        result.append([*losses, *state(net)])
        assert "folded view: " + ("yes" if engine != "exact" else "no") in criterion.explain()
    assert same(*[[t.detach() for t in r] for r in result])


@EACH
def test_the_module_in_front_works_in_perturb_evaluation_and_augmix(returns, select):
    model, alone = pair(returns)
    front, (x, y) = Logits(model, select), batch(12)
    for engine in ("exact", "fast"):
        results = []
        for net in (front, alone):
            torch.manual_seed(0)
            results.append(perturb(net, x, y, ATTACK, BulletTrain(3, 1, 0), engine=engine))
        assert torch.equal(*results)
    fates = []
    for net in (front, alone):
        generator = torch.Generator().manual_seed(1)
        fates.append(evaluate(net, [(x, y)], ATTACK, generator=generator, engine="fast").step.tolist())
        torch.manual_seed(0)
        AugMixLoss()(net, x, y).backward()
    assert fates[0] == fates[1]
    assert same(state(front), state(alone))


@EACH
def test_the_folded_view_is_traced_once_and_kept(returns, select, monkeypatch):
    model, _ = pair(returns)
    traces = []
    monkeypatch.setattr(folded, "_traced", lambda *args, trace=folded._traced: traces.append(0) or trace(*args))
    criterion, (x, y) = TRADESLoss(ATTACK, logits=select, engine=Engine(fold=True)), batch()
    for _ in range(3):
        criterion(model, x, y).backward()
    front = Logits(model, select)
    for _ in range(3):
        perturb(front, x, y, ATTACK, engine=Engine(fold=True))
    assert len(traces) == 2
    view = known_view(front, Frozen(channels_last=False))
    assert view is not None
    assert view.reason is None


def test_normalised_images_work_with_it():
    normalization = Normalization((0.4,), (0.25,))
    model, alone = pair(SHAPES["a dict"][0])
    x, y = batch()
    attack = PGD(0.06, 0.02, 3, normalization=normalization)
    losses = []
    for net, how in ((model, {"logits": SHAPES["a dict"][1]}), (alone, {})):
        for _ in range(2):
            torch.manual_seed(0)
            losses.append(TRADESLoss(attack, **how)(net, (x - 0.4) / 0.25, y).item())
    assert losses[:2] == losses[2:]


# Modes and state are the model's own


def test_it_is_in_the_mode_of_its_model():
    model = build(lambda: Returning(lambda z: (z,)))
    front = Logits(model, lambda output: output[0])
    for mode in (False, True):
        model.train(mode)
        assert front.training is mode
    front.eval()
    assert not any(module.training for module in model.modules())
    assert not front.training


def test_a_model_in_eval_mode_as_a_whole_is_updated_in_train_mode_and_frozen_norms_stay_frozen():
    returns, select = SHAPES["a tuple"]
    for freeze in (lambda net: net.eval(), lambda net: net[1].eval()):
        model, alone = pair(returns)
        freeze(model.body)
        freeze(alone)
        model.training = alone.training
        before, (x, y) = snapshot(model), batch()
        results = []
        for net in (Logits(model, select), alone):
            torch.manual_seed(0)
            loss = TRADESLoss(ATTACK, engine="exact")(net, x, y)
            loss.backward()
            results.append([loss.detach(), *state(net)])
        assert same(*results)
        after = snapshot(model)
        assert all(after[k] == v for k, v in before.items() if k[1] == "training")


def test_its_parameters_and_state_are_the_models():
    model, select = build(lambda: Returning(lambda z: (z,))), lambda output: output[0]
    front = Logits(model, select)
    assert all(a is b for a, b in zip(front.parameters(), model.parameters(), strict=True))
    assert list(front.state_dict()) == [f"model.{name}" for name in model.state_dict()]


def test_a_copy_is_in_front_of_the_copied_model_and_pickles():
    front = Logits(build("conv_bn"), torch.Tensor.clone)
    twin, (x, _) = copy.deepcopy(front), batch()
    assert twin.model is not front.model
    assert torch.equal(twin(x), front(x))
    again = pickle.loads(pickle.dumps(front))
    assert torch.equal(again.eval()(x), front.eval()(x))


def test_a_loss_keeps_no_model_and_may_be_copied_and_pickled():
    returns, select = SHAPES["a tuple"]
    model, (x, y) = build(lambda: Returning(returns)), batch()
    criterion = TRADESLoss(ATTACK, logits=select)
    criterion(model, x, y)
    copy.deepcopy(criterion)(model, x, y)
    pickled = TRADESLoss(ATTACK, logits=torch.Tensor.clone)
    pickle.loads(pickle.dumps(pickled))(build("conv_bn"), x, y)
    gone = weakref.ref(model)
    del model
    criterion._last = criterion._seen = None
    gc.collect()
    assert gone() is None


# Wrappers


class Wrapper(nn.parallel.DistributedDataParallel):
    """It needs no ranks to be a wrapper."""

    def __init__(self, module):
        nn.Module.__init__(self)
        self.module = module

    def forward(self, x):
        self.seen = True
        return self.module(x)


def test_the_attack_runs_on_the_module_inside_a_wrapper_by_one_module_in_front():
    returns, select = SHAPES["a tuple"]
    model, _ = pair(returns)
    front = Logits(Wrapper(model), select)
    inside = unwrapped(front)
    assert isinstance(inside, Logits)
    assert inside.model is model
    assert unwrapped(front) is inside
    assert unwrapped(inside) is inside
    assert unwrapped(Wrapper(inside)) is inside
    assert not hasattr(front.model, "seen")
    x, y = batch()
    result = perturb(front, x, y, ATTACK, generator=torch.Generator().manual_seed(0))
    assert torch.equal(result, perturb(inside, x, y, ATTACK, generator=torch.Generator().manual_seed(0)))
    assert not hasattr(front.model, "seen")
    assert not [name for name, _ in front.named_modules() if "_inside" in name]


def test_a_loss_selects_in_front_of_a_wrapper_and_of_the_module_inside():
    returns, select = SHAPES["a tuple"]
    losses = []
    for wrap in (Wrapper, lambda net: net):
        model, _ = pair(returns)
        torch.manual_seed(0)
        wrapped, (x, y) = wrap(model), batch()
        losses.append(TRADESLoss(ATTACK, logits=select, engine=Engine(fold=True))(wrapped, x, y).item())
    assert losses[0] == losses[1]


@pytest.mark.parametrize("where", ["the net", "the module in front"])
def test_a_compiled_net_is_attacked_alike(where):
    returns, select = SHAPES["a dict"]
    model, alone = pair(returns)
    net = torch.compile(model, backend="eager") if where == "the net" else model
    front = Logits(net, select)
    if where != "the net":
        front = torch.compile(front, backend="eager")
    x, y = batch()
    for engine in ("exact", Engine(fold=True)):
        results = [
            perturb(n, x, y, ATTACK, engine=engine, generator=torch.Generator().manual_seed(0)) for n in (front, alone)
        ]
        torch.testing.assert_close(*results, rtol=0, atol=1e-12)


# Bad input


WRONG = {
    "another key": (
        lambda z: {"out": z, "aux": 1},
        lambda output: output["logits"],
        r"but raised KeyError: 'logits': of a dict with the keys 'out', 'aux' write lambda output: output\['out'\]$",
    ),
    "another place": (lambda z: (z,), lambda output: output[3], r"IndexError.*: of a tuple of 1 write .*output\[0\]"),
    "no tensor": (lambda z: (z, 3), lambda output: output, r"select must return the logits.*, got tuple for 8 images"),
    "integers": (lambda z: (z, z.long()), lambda output: output[1], r"got torch\.int64"),
    "features": (lambda z: (z[:, :, None], z), lambda output: output[0], r"got shape \[8, 5, 1\] .*output\[1\]$"),
    "one image's": (lambda z: (z,), lambda output: output[0][:1], r"got shape \[1, 5\]"),
    "logits already": (lambda z: z, lambda output: output["logits"], "the model returns a tensor: leave select out"),
}


@pytest.mark.filterwarnings("ignore:the attack runs on the model as it is")
@pytest.mark.parametrize("kind", [TRADESLoss, MARTLoss, PGDLoss])
@pytest.mark.parametrize("engine", ["exact", "fast"])
@pytest.mark.parametrize(("returns", "select", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_select_is_refused_before_the_attack(returns, select, message, engine, kind):
    model, (x, y) = build(lambda: Returning(returns)), batch()
    before = snapshot(model)
    message = message if kind is TRADESLoss or engine == "fast" else message.replace("8", "[28]")
    for error in (TypeError, ValueError):
        with pytest.raises(error, match=message):
            kind(ATTACK, logits=select, engine=engine)(model, x, y)
    assert_unchanged(before, model)


def test_the_key_that_says_logits_is_named_before_others_that_fit():
    model = build(lambda: Returning(lambda z: {"features": z * 2, "logits": z}))
    with pytest.raises(TypeError, match=r"write Logits\(model, lambda output: output\['logits'\]\)"):
        TRADESLoss(ATTACK)(model, *batch())


@pytest.mark.parametrize("select", [None, "logits", 3, tuple])
def test_what_is_no_function_is_refused(select):
    with pytest.raises(
        TypeError, match=r"select must be a function of the model's output, got .*: write select=lambda"
    ):
        Logits(conv_bn(), select)
    if select is not None:
        with pytest.raises(
            TypeError, match=r"logits must be a function of the model's output, got .*: write logits=lambda"
        ):
            TRADESLoss(ATTACK, logits=select)


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        Logits(lambda x: x, lambda output: output[0])


def test_attack_model_of_it_is_the_view():
    returns, select = SHAPES["a tuple"]
    model, alone = pair(returns)
    x, _ = batch()
    with attack_model(Logits(model, select), Frozen(), x) as view:
        torch.testing.assert_close(view(x), alone.eval()(x))
