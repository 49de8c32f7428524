"""Fuzz targets for every public entry point."""

import copy
import dataclasses
import functools
import math

import torch
from hypothesis import strategies as st
from torch import nn

import bt_fast
from bt_fast import (
    PGD,
    Balance,
    BulletTrain,
    Costs,
    Engine,
    Frozen,
    Guard,
    HalfDrawn,
    Normalization,
    Normalize,
    PerSample,
    Plan,
    ThreatModel,
    Update,
    allocation,
    ops,
    speedup,
)
from bt_fast.attack import balance
from bt_fast.attack.batch import AttackBatch
from bt_fast.augment import CropAndFlip, crop
from bt_fast.augment.mix import augment_and_mix, draw_choices
from bt_fast.autoattack import autoattack
from bt_fast.baselines.fast import fast_loss
from bt_fast.baselines.grad_align import grad_align
from bt_fast.baselines.yopo import yopo_loss
from bt_fast.evaluation import STOOD, evaluate
from bt_fast.ops import frames
from bt_fast.ranges import PHASES, range_
from tests.fuzz.campaign import Case
from tests.fuzz.values import (
    ANYTHING,
    CONTENTS,
    FLOATS,
    POSITIVE,
    SEEDS,
    WILD_TENSORS,
    floats_of,
    generators,
    labels_of,
    labels_or_distributions,
    mostly,
    odd_like,
    tensors,
    told,
)

CLASSES, SHAPE = 3, (1, 4, 4)
TARGETS = {}
COUNTS = mostly(st.integers(0, 4), st.one_of(st.integers(-3, 30), ANYTHING.filter(lambda n: not absurd(n))))
STEPS = mostly(st.integers(1, 3), st.one_of(st.integers(-3, 10), ANYTHING.filter(lambda n: not absurd(n))))
SIZES = mostly(POSITIVE)
SHARES = st.floats(0, 1)


def absurd(n):
    """Returns whether a count is so large that the call would only take long."""
    return isinstance(n, int) and not isinstance(n, bool) and n > 100


def target(cases):
    """Registers a target with the campaign."""
    TARGETS[cases.__name__] = cases()
    return cases


def call(function, arguments, *, check=None, state=lambda: (), reset=lambda: None, names=(), late=None):
    """Makes a case that calls a function by keywords; an error must also leave its arguments unchanged."""
    given = [v for v in arguments.values() if isinstance(v, torch.Tensor)]
    return Case(
        run=lambda: function(**arguments),
        names=(*arguments, *names),
        told=told(arguments),
        check=lambda result: check(result) if check else None,
        state=lambda: (*given, *state()),
        reset=reset,
        late=late,
    )


def expect(holds, what):
    if not holds:
        raise AssertionError(what)


# Models


class Bad(nn.Module):
    """A model with invalid logits."""

    def __init__(self, what):
        super().__init__()
        self.layer, self.what = nn.Linear(16, CLASSES), what

    def forward(self, x):
        z = self.layer(x.flatten(1))
        match self.what:
            case "none":
                return None
            case "list":
                return [z]
            case "integers":
                return z.long()
            case "one class":
                return z[:, :1]
            case "short":
                return z[1:]
            case "flat":
                return z.flatten()
            case "nan":
                return z * math.nan
            case "some nan":
                return torch.where(z > 0, z, math.nan)
            case "inf":
                return z + math.inf
            case "constant":
                return torch.zeros_like(z)
            case "detached":
                return z.detach()
            case "nan gradient":
                return z + 0 * (x.flatten(1) - x.flatten(1).detach()).abs().sum(1, keepdim=True).sqrt()
            case "raises":
                raise KeyError("the model's own")


def convolutional():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, CLASSES))


def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES))


BADS = ["none", "list", "integers", "short", "flat", "nan", "inf", "constant", "detached", "raises"]
BADS += ["one class", "some nan", "nan gradient"]


@functools.cache
def model_of(name):
    """Returns the one model of this name, which `put_back` restores after each case, and its initial state."""
    torch.manual_seed(0)
    build = {"convolutional": convolutional, "linear": linear, "double": lambda: linear().double()}
    model = build[name]() if name in build else Bad(name)
    return model, copy.deepcopy(model.state_dict())


def put_back(name):
    model, state = model_of(name)
    model.load_state_dict(state)
    model.zero_grad(set_to_none=True)
    model.train()


MODELS = mostly(st.sampled_from(["convolutional", "convolutional", "linear", "double"]), st.sampled_from(BADS), 10)


def model_state(model):
    gradients = [p.grad for p in model.parameters()]
    return *model.state_dict().values(), *gradients, *(m.training for m in model.modules())


# Options


def images(draw, m=None, name="convolutional", shape=SHAPE):
    m = draw(st.integers(1, 5)) if m is None else m
    dtype = torch.float64 if name == "double" else torch.float32
    return draw(floats_of((m, *shape), ("uniform", "uniform", "constant", "zero"), (dtype,)))


def count_of(x):
    return len(x) if isinstance(x, torch.Tensor) and x.dim() else 3


@st.composite
def bullets(draw, steps=COUNTS):
    """Draws a `BulletTrain`; another target draws its invalid arguments."""
    counts = [n if type(n) is int and 0 <= n <= 30 else 1 for n in (draw(steps) for _ in range(3))]
    policy = draw(st.sampled_from(["three_groups", "three_groups", "uniform", "gaussian", "oracle"]))
    if counts[1] and draw(st.integers(0, 3)) == 0:
        counts[1] = HalfDrawn(counts[1], draw(st.sampled_from(["all", "half"])))
    bullet = BulletTrain(*counts, metric=draw(st.sampled_from(list(allocation.METRICS))), policy=policy)
    bullet.robust_fraction.fill_(draw(SHARES))
    return bullet


def state_of(*holders):
    """Returns the state that an error must leave unchanged."""
    held = []
    for holder in holders:
        if isinstance(holder, BulletTrain):  # the faults of an earlier batch are reported once
            held += [b for name, b in holder.named_buffers() if not name.startswith("unreported")]
        elif isinstance(holder, nn.Module):
            held += model_state(holder)
    return tuple(held)


def objective_options(draw, x, *names):
    """Draws values for the keywords of these names."""
    drawn = {
        "optimizer": lambda: draw(mostly(st.none())),
        "step_size": lambda: draw(SIZES),
        "epsilon": lambda: draw(SIZES),
        "perturb_steps": lambda: draw(STEPS),
        "beta": lambda: draw(mostly(st.floats(0, 10))),
        "distance": lambda: draw(mostly(st.sampled_from(["l_inf", "l_2"]))),
        "bullet": lambda: draw(mostly(st.one_of(st.none(), bullets()))),
        "unperturbed": lambda: draw(mostly(st.sampled_from([None, None, None, "keep", "skip"]))),
        "start": lambda: draw(mostly(st.sampled_from([None, "normal", "uniform"]))),
        "generator": lambda: draw(generators()),
        "frozen": lambda: draw(mostly(st.sampled_from([None, None, Frozen(), Frozen(autocast=torch.bfloat16)]))),
        "runner": lambda: draw(mostly(st.sampled_from(["eager", "graphs", "streams", "auto"]), share=20)),
        "update": lambda: draw(mostly(st.sampled_from([None, None, Update(), Update(graphs=True)]))),
        "samples": lambda: draw(mostly(st.none(), labels_of(count_of(x), 2**32), 3)),
        "normalization": lambda: draw(mostly(st.sampled_from([None, None, Normalization([0.0], [1.0])]))),
        "balance": lambda: draw(mostly(st.none(), st.one_of(st.just(Balance()), ANYTHING))),
        "attack": lambda: draw(mostly(attacks())),
        "mining": lambda: draw(mostly(st.one_of(st.none(), bullets()))),
        "engine": lambda: draw(mostly(st.sampled_from(["exact", "fast", "bf16", Engine(channels_last=True)]))),
        "indices": lambda: draw(mostly(st.none(), labels_of(count_of(x), 2**32), 3)),
        "label_smoothing": lambda: draw(mostly(st.floats(0, 1, exclude_max=True))),
        "smoothing": lambda: draw(mostly(st.sampled_from(["torch", "others"]))),
        "clean_updates": lambda: draw(mostly(st.sampled_from([1, 2, "shared"]))),
        "extra": lambda: draw(
            mostly(st.sampled_from([None, lambda given: given.adversarial_logits.softmax(1)[:, 0].mean()]))
        ),
    }
    needed = ("optimizer", "attack")
    return {name: drawn[name]() for name in names if draw(st.integers(0, 3)) or name in needed}


@st.composite
def attacks(draw):
    """Draws a `PGD`; another target draws its invalid arguments."""
    return PGD(
        draw(mostly(POSITIVE, st.just(0.0))),
        draw(POSITIVE),
        draw(st.integers(1, 4)),
        draw(st.sampled_from(["linf", "l2"])),
        start=draw(st.sampled_from([None, "normal", "uniform", "clean"])),
        inner=draw(st.sampled_from([None, "kl", "cross_entropy", "margin", "lse"])),
        normalization=draw(st.sampled_from([None, None, Normalization([0.0], [1.0])])),
    )


def objective_case(draw, function, names, fixed=None, images_name="x_natural"):
    """Draws a call of an objective, which must return a finite loss with a gradient."""
    name = draw(MODELS)
    model = model_of(name)[0]
    x = images(draw, name=name)
    y = draw(labels_or_distributions(count_of(x), CLASSES))
    options = objective_options(draw, x, *names)
    bullet = options.get("bullet", options.get("mining"))
    if isinstance(bullet, BulletTrain) and draw(st.integers(0, 9)):
        options.pop("perturb_steps", None)
    if isinstance(bullet, BulletTrain) and isinstance(options.get("attack"), PGD) and draw(st.integers(0, 9)):
        options["attack"] = dataclasses.replace(options["attack"], steps=max(bullet.boundary_steps, 1))
    model.train(draw(st.booleans()))
    called = draw(mostly(st.just(model), share=100))
    arguments = {"model": called, images_name: x, "y": y, **options, **(fixed(draw) if fixed else {})}

    def check(loss):
        expect(loss.dim() == 0 and (loss.requires_grad or name in ("detached", "constant")), "the loss has no gradient")
        passed_on = function is grad_align and "nan" in name  # as documented
        passed_on |= (options.get("beta") or 0.0) > 1e30  # a term too large for float32
        passed_on |= function is grad_align and arguments["epsilon"] > 1e30  # nor do its pixels stay within bounds
        expect(math.isfinite(loss.item()) or passed_on, "the loss is not finite")
        expect(all(p.grad is None for p in model.parameters()), "a parameter's gradient was touched")
        if isinstance(bullet, BulletTrain):
            expect(int(bullet.group_counts.sum()) == len(x), "the groups do not sum to the batch")
            expect(0 <= float(bullet.robust_fraction) <= 1, "F_R is no share")

    # batch norm has its own message for a batch of one; errors about logits name the model
    words = ("model", "the model's", "perturb_steps", "distance", "channel", "labels", "adversarial_logits", "tensors")
    return call(
        function,
        arguments,
        check=check,
        state=lambda: state_of(model, bullet),
        reset=lambda: put_back(name),
        names=words,
        late="adversarial_logits must be finite",  # raised after the update's forwards, as documented
    )


OF_PGD = ("optimizer", "step_size", "epsilon", "perturb_steps", "distance", "bullet", "start", "generator", "frozen")
OF_PGD += ("runner", "update", "samples", "normalization", "balance")
OF_TRADES = (*OF_PGD, "beta", "unperturbed")


@target
@st.composite
def trades_loss(draw):
    return objective_case(draw, bt_fast.trades_loss, OF_TRADES)


@target
@st.composite
def mart_loss(draw):
    return objective_case(draw, bt_fast.mart_loss, OF_TRADES)


@target
@st.composite
def pgd_loss(draw):
    return objective_case(draw, bt_fast.pgd_loss, OF_PGD)


def as_module(model, x, y, attack, kind, indices=None, generator=None, **of_loss):
    return kind(attack, **of_loss)(model, x, y, indices, generator=generator)


@target
@st.composite
def criterion(draw):
    kind = draw(st.sampled_from([bt_fast.TRADESLoss, bt_fast.MARTLoss, bt_fast.PGDLoss]))
    names = ("attack", "mining", "engine", "indices", "generator")
    names += ("label_smoothing", "smoothing", "extra")
    names += () if kind is bt_fast.PGDLoss else ("beta",)
    names += () if kind is bt_fast.PGDLoss else ("clean_updates",)
    return objective_case(draw, as_module, names, lambda _: {"kind": kind}, "x")


@st.composite
def owns(draw, x):
    """A `PerSample`, or its fields where it does not take these."""
    m = count_of(x)
    sizes = floats_of((m,), ("uniform", "uniform", "zero", "nan"), (torch.float32, torch.float64))
    fields = {"steps": labels_of(m, 4), "epsilon": sizes, "step_size": sizes}
    fields["start"] = floats_of(tuple(x.shape) if isinstance(x, torch.Tensor) else (m,))
    given = {name: draw(values) for name, values in fields.items() if draw(st.integers(0, 2)) == 0}
    try:
        return PerSample(**given)
    except TypeError:
        return given


@target
@st.composite
def per_sample(draw):
    names = ("steps", "epsilon", "step_size", "start")
    return call(PerSample, {name: draw(WILD_TENSORS) for name in names if draw(st.booleans())})


@target
@st.composite
def perturbed(draw):
    name = draw(MODELS)
    model = model_of(name)[0]
    x = images(draw, name=name)
    y = draw(labels_or_distributions(count_of(x), CLASSES))
    options = objective_options(draw, x, "attack", "mining", "engine", "indices", "generator")
    mining = options.get("mining")
    options["per_sample"] = draw(st.none() | owns(x))
    model.train(draw(st.booleans()))

    def check(result):
        attack, own = options["attack"], options["per_sample"]
        if isinstance(own, PerSample) and own.epsilon is not None:
            attack = dataclasses.replace(attack, epsilon=float(own.epsilon.max()))
        expect(result.shape == x.shape and result.dtype == x.dtype, "another shape or dtype")
        expect(not result.requires_grad and bool(result.isfinite().all()), "a gradient, or no finite pixels")
        moved = (result - x).flatten(1).abs()
        reach = moved.amax() if attack.norm == "linf" else moved.norm(dim=1).amax()
        room = attack.epsilon * (1 + 1e-4) + (
            0.01 if attack.start != "uniform" else 1e-5
        )  # a normal start is unbounded
        expect(float(reach) <= attack.epsilon * (1 + 1e-4) + room, "it left the ball")

    words = ("model", "the model's", "labels", "tensors", "channel")
    return call(
        bt_fast.perturb,
        {"model": draw(mostly(st.just(model), share=100)), "x": x, "y": y, **options},
        check=check,
        state=lambda: state_of(model, mining),
        reset=lambda: put_back(name),
        names=words,
    )


@target
@st.composite
def pgd(draw):
    arguments = {"epsilon": draw(SIZES), "step_size": draw(SIZES), "steps": draw(STEPS)}
    more = {
        "norm": mostly(st.sampled_from(["linf", "l2"])),
        "start": mostly(st.sampled_from([None, "normal", "uniform", "clean"])),
        "inner": mostly(st.sampled_from([None, "kl", "cross_entropy"])),
        "bounds": mostly(st.sampled_from([(0, 1), (-1.0, 1.0), (1, 0), [0, 255]])),
        "normalization": mostly(st.sampled_from([None, Normalization([0.0], [1.0])])),
    }
    arguments |= {name: draw(values) for name, values in more.items() if draw(st.booleans())}
    return call(PGD, arguments, check=lambda a: expect(a.threat.lower < a.threat.upper, "bounds"))


@target
@st.composite
def engine(draw):
    switches = ("fold", "channels_last", "graphs", "streams", "compile")
    arguments = {name: draw(mostly(st.booleans())) for name in switches if draw(st.booleans())}
    arguments |= {"precision": draw(mostly(st.sampled_from([None, "bf16"])))} if draw(st.booleans()) else {}
    return call(Engine, arguments, check=lambda e: expect(Engine.of(e) is e, "another engine"))


@target
@st.composite
def fast(draw):
    def fixed(draw):
        losses = [bt_fast.trades_loss, bt_fast.mart_loss, bt_fast.pgd_loss]
        return {"objective": draw(mostly(st.sampled_from(losses))), "epsilon": draw(SIZES), "steps": draw(STEPS)}

    return objective_case(draw, fast_loss, ("optimizer", "step_size", "distance", "bullet", "generator"), fixed)


@target
@st.composite
def yopo(draw):
    def fixed(draw):
        return {
            "propagations": draw(STEPS),
            "layer_steps": draw(STEPS),
            "objective": draw(mostly(st.sampled_from(["pgd", "trades", "mart"]))),
        } | ({"first": draw(ANYTHING)} if draw(st.integers(0, 19)) == 0 else {})

    return objective_case(draw, yopo_loss, ("optimizer", "step_size", "epsilon", "beta", "generator"), fixed)


@target
@st.composite
def grad_align_term(draw):
    def fixed(draw):
        return {"epsilon": draw(SIZES)}

    return objective_case(draw, grad_align, ("generator",), fixed)


@target
@st.composite
def augmix_loss(draw):
    def fixed(draw):
        options = {"severity": draw(mostly(st.floats(0.2, 10)))} if draw(st.booleans()) else {}
        options |= {"jsd": draw(st.booleans())} if draw(st.integers(0, 3)) == 0 else {}
        if draw(st.booleans()):
            options["bullet"] = draw(mostly(bullets().map(lambda b: BulletTrain(1, 0, 0, metric=b.metric)), bullets()))
        return options

    return objective_case(draw, bt_fast.augmix_loss, ("generator",), fixed, "x")


@target
@st.composite
def further_pass(draw):
    """Draws a valid minibatch and a further pass over it or over another one: the mining must not move."""
    losses = {bt_fast.augmix_loss: (1, 0, 0), bt_fast.pgd_loss: (2, 1, 0)}
    losses |= {bt_fast.trades_loss: (2, 1, 0), bt_fast.mart_loss: (2, 0, 1)}
    loss = draw(st.sampled_from(list(losses)))
    bullet = BulletTrain(*losses[loss], metric=draw(st.sampled_from(list(allocation.METRICS))))
    bullet.robust_fraction.fill_(draw(SHARES))
    x, y = torch.rand(4, *SHAPE), torch.arange(4) % CLASSES
    model, others = model_of("linear")[0], images(draw)
    first = {} if loss is bt_fast.augmix_loss else {"optimizer": None}
    loss(model, x, y, bullet=bullet, **first)
    state = [value.clone() for value in state_of(bullet)]
    options = {"epsilon": draw(mostly(st.just(0.031), SIZES))} | first if first else {}
    arguments = {
        "model": model,
        "x" if loss is bt_fast.augmix_loss else "x_natural": draw(mostly(st.just(x), st.just(others))),
        "y": draw(mostly(st.just(y), labels_of(4, CLASSES))),
        "reuse": draw(mostly(st.booleans())),
        "bullet": bullet,
        **options,
    }

    def run(reuse, **given):
        with bullet.again(reuse=reuse):
            return loss(**given)

    def check(result):
        expect(math.isfinite(result.item()) and result.requires_grad, "the loss is not finite, or has no gradient")
        expect(all(map(torch.equal, state_of(bullet), state)), "the mining has moved")

    return call(
        run,
        arguments,
        check=check,
        state=lambda: state_of(model, bullet),
        reset=lambda: put_back("linear"),
        names=("again", "labels", "the model's"),
    )


# The attack


@st.composite
def threats(draw):
    return ThreatModel(draw(POSITIVE), draw(st.sampled_from(["l_inf", "l_2"])))


@target
@st.composite
def threat_model(draw):
    lower, upper = (mostly(st.floats(-2, 2)) for _ in range(2))
    arguments = {"epsilon": draw(SIZES), "norm": draw(mostly(st.sampled_from(["l_inf", "l_2"])))}
    arguments |= {"lower": draw(lower), "upper": draw(upper)} if draw(st.booleans()) else {}
    return call(
        ThreatModel,
        arguments,
        names=("distance",),
        check=lambda t: expect(t.epsilon > 0 and t.lower < t.upper, "bounds"),
    )


@target
@st.composite
def options_of_the_attack(draw):
    """Draws the options `Frozen`, `Update`, `Gaussian` and `Oracle`, and the runners."""
    kinds = {
        Frozen: {"autocast": mostly(st.sampled_from([None, torch.float16, torch.bfloat16]))},
        Update: {"channels_last": st.booleans()},
        allocation.Gaussian: {"width": SIZES},
        allocation.Oracle: {"steps": STEPS},
        bt_fast.GraphRunner: {"bucket": STEPS, "most_graphs": STEPS},
        bt_fast.StreamRunner: {"bucket": STEPS, "most_graphs": STEPS},
        bt_fast.AutoRunner: {"candidates": st.sampled_from([None, {}, {"eager": print}])},
    }
    kind = draw(st.sampled_from(list(kinds)))
    return call(kind, {name: draw(values) for name, values in kinds[kind].items()}, check=repr)


@target
@st.composite
def plan_uniform(draw):
    device = draw(mostly(st.sampled_from([torch.device("cpu"), "cpu", torch.device("meta")]), st.just("cpu")))
    arguments = {"m": draw(COUNTS), "steps": draw(COUNTS), "step_size": draw(SIZES), "device": device}
    return call(
        Plan.uniform,
        arguments,
        check=lambda s: expect(s.active_counts == (len(s.step_size),) * len(s.active_counts), "active"),
    )


@target
@st.composite
def plan_from_steps(draw):
    m = draw(st.integers(0, 6))
    steps = draw(mostly(tensors(st.just((m,)), st.sampled_from([torch.int64, torch.int32, torch.uint8])), WILD_TENSORS))
    sizes = draw(floats_of((m,), ("uniform",), FLOATS))

    def check(s):
        expect(sorted(s.order.tolist()) == list(range(m)), "the order is no permutation")
        expect(bool((s.sort(s.steps).diff() <= 0).all()), "steps increase")
        expect(sum(s.active_counts) == int(s.steps.sum()), "active does not sum to the steps")
        x, begin = torch.zeros(m, 1), draw_rows
        part = AttackBatch.of(s, x, x, x, torch.zeros(m, dtype=torch.int32))[begin : begin + 2]
        expect(sum(part.active) == int(part.steps.sum()), "a part's active does not sum to its steps")
        expect(torch.equal(s.sort(torch.arange(m)), s.order), "sorted rows are not those of the order")

    draw_rows = draw(st.integers(0, 6))
    return call(Plan.from_steps, {"steps": steps, "step_size": sizes}, check=check, names=("tensors",))


@target
@st.composite
def generate(draw):
    name = draw(MODELS)
    model, m = model_of(name)[0], draw(st.integers(1, 5))
    clean = images(draw, m, name)
    start = clean if draw(st.integers(0, 3)) else images(draw, m, name)
    # as documented, values are not checked here, since reading them would wait for the device
    target = draw(floats_of((m, CLASSES), ("uniform",), (torch.float64 if name == "double" else torch.float32,)))
    steps = torch.tensor(draw(st.lists(st.integers(0, 3), min_size=m, max_size=m)))
    attacked = Plan.from_steps(steps, torch.full((m,), draw(POSITIVE), dtype=torch.float64))
    threat = draw(threats())
    arguments = {
        "model": draw(mostly(st.just(model))),
        "clean": clean,
        "start": start,
        "target": target,
        "plan": draw(mostly(st.just(attacked))),
        "threat": draw(mostly(st.just(threat))),
        "generator": draw(generators()),
        "frozen": draw(mostly(st.sampled_from([None, None, Frozen()]))),
        "runner": draw(mostly(st.sampled_from(["eager", "graphs", "auto"]))),
    }

    def check(x_adv):
        expect(x_adv.shape == clean.shape and not x_adv.requires_grad, "another shape, or a gradient")
        active = attacked.active_counts[0] if attacked.active_counts else 0
        if not (clean.isfinite().all() and start.isfinite().all() and clean.dtype in (torch.float32, torch.float64)):
            return
        expect(torch.equal(x_adv[active:], start[active:].detach()), "a sample without steps has moved")
        moved = (x_adv[:active] - clean[:active]).detach().flatten(1)
        inside = bool((clean >= 0).all() and (clean <= 1).all())
        if inside and name in ("convolutional", "linear", "double") and active:
            size = moved.abs().amax(1) if threat.norm == "l_inf" else moved.norm(dim=1)
            expect(bool((size <= threat.epsilon * (1 + 1e-5) + 1e-6).all()), "x' is outside the ball")
            expect(bool((x_adv[:active] >= 0).all() and (x_adv[:active] <= 1).all()), "pixels are out of bounds")

    return call(
        bt_fast.generate,
        arguments,
        check=check,
        state=lambda: state_of(model),
        reset=lambda: put_back(name),
        names=("images", "logits", "tensors"),
    )


@target
@st.composite
def evaluation(draw):
    name = draw(MODELS)
    model, batches = model_of(name)[0], []
    for _ in range(draw(st.integers(0, 3))):
        x = images(draw, name=name)
        batches.append((x, draw(labels_of(count_of(x), CLASSES))))
    batches = draw(mostly(st.just(batches), st.one_of(st.just([1]), st.just([(1, 2)]), st.just([(1,)]), ANYTHING)))
    arguments = {
        "model": draw(mostly(st.just(model))),
        "batches": batches,
        "attack": draw(mostly(st.one_of(threats(), st.builds(PGD, POSITIVE, POSITIVE, st.integers(1, 3))))),
        "restarts": draw(mostly(st.integers(1, 2))),
        "loss": draw(mostly(st.sampled_from([None, "ce", "margin", "lse"]))),
        "generator": draw(generators()),
        "frozen": draw(mostly(st.sampled_from([None, None, Frozen(), Frozen(autocast=torch.float16)]))),
    }
    if isinstance(arguments["attack"], ThreatModel):
        arguments |= {"steps": draw(STEPS)} | ({"step_size": draw(SIZES)} if draw(st.booleans()) else {})
    if absurd(arguments["restarts"]):
        arguments["restarts"] = 1

    def check(result):
        total = sum(len(x) for x, _ in batches)
        expect(result.total == total == len(result.restart), "the samples do not sum to the total")
        expect(result.robust_correct <= result.clean_correct <= total, "more robust than clean")
        expect(len(result.robust_samples) == result.robust_correct, "the robust samples are others")
        expect(bool(((result.step == STOOD) == (result.restart == STOOD)).all()), "step and restart differ")

    words = ("images", "labels", "samples", "logits", "gradient", "tensors")
    return call(
        evaluate, arguments, check=check, state=lambda: state_of(model), reset=lambda: put_back(name), names=words
    )


@target
@st.composite
def auto_attack(draw):
    """Draws a call of `autoattack`, which checks its arguments before it imports the missing package."""
    x = images(draw)
    arguments = {
        "model": model_of("linear")[0],
        "x": x,
        "y": draw(labels_of(count_of(x), CLASSES)),
        "threat": draw(mostly(threats())),
        "version": draw(mostly(st.sampled_from(["standard", "plus", "rand"]))),
        "batch_size": draw(STEPS),
        "seed": draw(COUNTS),
    }

    def attack(**given):
        try:
            return autoattack(**given)
        except ImportError as error:
            expect("pip install" in str(error), "does not say how to install it")

    return call(attack, arguments)


@target
@st.composite
def normalisation(draw):
    """Draws `Normalization`, and `Normalize` on images."""
    numbers = mostly(st.lists(st.floats(0.1, 2.0), min_size=1, max_size=3))
    arguments = {"mean": draw(numbers), "std": draw(numbers)}
    if draw(st.booleans()):
        return call(Normalization, arguments, check=repr)

    def run(**given):
        front = Normalize(**given)
        x = torch.rand(2, len(given["mean"]), 3, 3)
        return x, front.pixels(front(x), 0.0, 1.0)

    return call(run, arguments, check=lambda result: expect(torch.allclose(*result, atol=1e-5), "other pixels"))


# Several ranks


@target
@st.composite
def plan_of_ranks(draw):
    """Draws a plan of which rank attacks which samples, and whether that pays."""
    ranks, most = draw(st.integers(1, 9)), draw(st.integers(0, 4))
    numbers = st.lists(st.integers(0, 9), min_size=ranks * (most + 1), max_size=ranks * (most + 1))
    counts = numbers.map(lambda n: torch.tensor(n, dtype=torch.int64).view(ranks, most + 1))
    arguments = {"counts": draw(mostly(counts, WILD_TENSORS)), "ranks_per_node": draw(STEPS)}
    costs = Costs(draw(SHARES), draw(SHARES), draw(SHARES), draw(SHARES), draw(POSITIVE))

    def check(exchange):
        have, get = exchange.counts, exchange.quotas
        expect(torch.equal(have.sum(0), get.sum(0)) and bool((get >= 0).all()), "samples were lost or made up")
        active = get[:, 1:].flip(1).cumsum(1)
        expect(not active.numel() or int((active.amax(0) - active.amin(0)).max()) <= 1, "ranks differ by more than 1")
        expect(isinstance(balance.pays(exchange, costs), bool), "pays is no answer")

    return call(balance.plan, arguments, check=check, names=("tensors",))


@target
@st.composite
def costs_of_ranks(draw):
    names = ("row_seconds", "step_seconds", "sample_bytes", "latency_seconds", "bytes_per_second")
    arguments = {name: draw(SIZES) for name in names}
    if draw(st.booleans()):
        return call(Costs, arguments, check=repr)
    return call(Balance, {"costs": draw(mostly(st.none())), "ranks_per_node": draw(STEPS)}, check=repr)


# The guard


@target
@st.composite
def guarded_step(draw):
    """Draws a step that is taken, skipped or refused; the last two must leave the weights unchanged."""
    torch.manual_seed(0)
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, fused=draw(st.booleans()))
    for p in layer.parameters():
        p.grad = torch.full_like(p, draw(st.sampled_from([1.0, 0.0, math.nan, math.inf, 1e38])))
    before = [p.detach().clone() for p in layer.parameters()]
    finite = all(bool(p.grad.isfinite().all()) for p in layer.parameters())
    loss = draw(mostly(st.floats(width=32).map(torch.tensor), st.one_of(WILD_TENSORS, ANYTHING), 4))
    arguments = {
        "optimizer": draw(mostly(st.just(optimizer))),
        "module": draw(mostly(st.just(layer))),
        "non_finite": draw(mostly(st.sampled_from(["raise", "skip"]))),
        "loss": loss,
    }

    def run(optimizer, module, non_finite, loss):
        guard = Guard(optimizer, module, non_finite=non_finite)
        with guard.minibatch([4, 7]):
            guard.step(loss)
        return guard

    def check(guard):
        moved = not all(torch.equal(p, b) for p, b in zip(layer.parameters(), before, strict=True))
        sound = finite and bool(torch.as_tensor(loss).isfinite().all())
        expect(sound or (not moved and len(guard.skipped) == 1), "a faulty step was taken, or not told")
        expect(not sound or not guard.skipped, "a sound step was left out")

    # the error describes the minibatch
    words = ("modules", "minibatch", "tensors")
    return call(run, arguments, check=check, state=lambda: list(layer.parameters()), names=words)


# Mining


@target
@st.composite
def bullet_arguments(draw):
    names = ("boundary_steps", "robust_steps", "outlier_steps")
    arguments = {name: draw(mostly(st.integers(0, 20))) for name in names if draw(st.booleans())}
    more = {"gamma": mostly(SHARES), "momentum": mostly(SHARES)}
    more |= {"metric": mostly(st.sampled_from(list(allocation.METRICS)))}
    more |= {"policy": mostly(st.sampled_from(list(allocation.POLICIES)))}
    arguments |= {name: draw(values) for name, values in more.items() if draw(st.booleans())}

    def check(bullet):
        repr(bullet)
        expect(bullet.fractions == speedup.Fractions(0, 0, 0) and math.isnan(bullet.mean_steps), "it has seen samples")

    return call(BulletTrain, arguments, check=check)


def logits_of(draw, m=None, classes=None, share=25):
    m = draw(st.integers(0, 5)) if m is None else m
    shape = (m, draw(st.integers(2, 5)) if classes is None else classes)
    return draw(floats_of(shape, CONTENTS, FLOATS, share))


def classes_of(z):
    return z.shape[1] if isinstance(z, torch.Tensor) and z.dim() == 2 else CLASSES


@target
@st.composite
def plan(draw):
    bullet, logits = draw(bullets()), logits_of(draw)
    arguments = {"logits": logits, "labels": draw(labels_or_distributions(count_of(logits), classes_of(logits)))}
    arguments |= {"epsilon": draw(SIZES)} if draw(st.booleans()) else {}
    arguments |= {"step_size": draw(SIZES)} if draw(st.booleans()) else {}
    if isinstance(bullet.policy, allocation.Oracle) or draw(st.integers(0, 19)) == 0:
        arguments["attacked_logits"] = logits_of(draw, count_of(logits), classes_of(logits))

    def check(result):
        m, most = len(logits), max(bullet.boundary_steps, bullet.robust_steps, bullet.outlier_steps)
        expect(sum(result.group_sizes) == m == int(result.counted_groups.sum()), "the groups do not sum to m")
        expect(sorted(result.order.tolist()) == list(range(m)), "the order is no permutation")
        expect(bool((result.steps[result.order].diff() <= 0).all()), "steps increase")
        expect(bool(((result.steps >= 0) & (result.steps <= most)).all()), "steps out of range")
        expect(sum(result.active_counts) == int(result.steps.sum()), "the counts do not sum to the steps")
        expect(bool(((result.step_size > 0) == (result.steps > 0)).all()), "a size of 0, or of no step")
        expect(bool(((result.probabilities.sum(1) - 1).abs() < 1e-3).all()), "probabilities do not sum to 1")

    return call(
        bullet.plan,
        arguments,
        check=check,
        state=lambda: state_of(bullet),
        names=("policy", "BulletTrain", "tensors"),
    )


@target
@st.composite
def observe(draw):
    bullet, logits = draw(bullets()), logits_of(draw)
    arguments = {
        "adversarial_logits": logits,
        "labels": draw(labels_or_distributions(count_of(logits), classes_of(logits))),
    }

    def check(_):
        expect(0 <= float(bullet.robust_fraction) <= 1, "F_R is no share")

    return call(bullet.observe, arguments, check=check, state=lambda: state_of(bullet), names=("logits", "BulletTrain"))


@target
@st.composite
def rules_of_ones_own(draw):
    """Draws custom metrics and policies that return anything."""
    m = draw(st.integers(1, 4))
    integers = tensors(st.just((m,)), st.sampled_from([torch.int64, torch.int8, torch.uint8]))
    metric = draw(st.booleans())
    finite = floats_of((m,), ("uniform", "normal", "huge", "inf"), FLOATS)
    right = finite if metric else st.lists(st.integers(0, 2), min_size=m, max_size=m).map(torch.tensor)
    returned = draw(mostly(right, st.one_of(tensors(st.just((m,))), integers, WILD_TENSORS), 3))
    rule = {"metric" if metric else "policy": lambda *_: returned}
    bullet = BulletTrain(2, 1, 0, **rule)
    arguments = {"logits": torch.randn(m, CLASSES), "labels": torch.zeros(m, dtype=torch.int64)}

    def check(result):
        expect(sum(result.active_counts) == int(result.steps.sum()), "the counts do not sum to the steps")

    return call(bullet.plan, arguments, check=check, state=lambda: state_of(bullet), names=("metric", "policy"))


@target
@st.composite
def theory(draw):
    """Draws the speedups of a `BulletTrain`, and the functions of `speedup`."""
    share, count = mostly(st.floats(0, 0.4)), mostly(st.integers(0, 20))
    functions = {
        speedup.Fractions: {name: share for name in ("boundary", "robust", "outlier")},
        speedup.theoretical_speedup: {"fractions": mostly(st.just(speedup.Fractions(0.3, 0.5, 0.2)))}
        | {f"{name}_steps": count for name in ("boundary", "robust", "outlier", "baseline")},
        speedup.theoretical_speedup_augmix: {"boundary_fraction": share},
        draw(bullets()).theoretical_speedup: {"baseline_steps": count},
        speedup.yopo_cost: {"propagations": st.integers(1, 5), "objective": mostly(st.just("trades"))},
    }
    function = draw(st.sampled_from(list(functions)))
    arguments = {name: draw(values) for name, values in functions[function].items()}
    return call(function, arguments, names=("fractions",), check=repr)


@target
@st.composite
def loaded_state(draw):
    """Draws a custom state, which `load_state_dict` loads; its errors are torch's RuntimeError."""
    bullet = BulletTrain(2, 1, 0, policy=draw(st.sampled_from(["three_groups", "uniform"])))
    own = bullet.state_dict()
    state = dict(own)
    for name in draw(st.lists(st.sampled_from([*state, "more"]), max_size=2)):
        like = tensors(st.just(tuple(own[name].shape)), st.just(torch.float64)) if name in own else ANYTHING
        state[name] = draw(mostly(like, WILD_TENSORS, 4))
    if draw(st.integers(0, 9)) == 0:
        state.pop(draw(st.sampled_from(list(state))))

    def load():
        try:
            bullet.load_state_dict(state)
        except RuntimeError as error:
            if "loading state_dict" not in str(error):
                raise
            raise ValueError("state_dict: give a state that fits") from error
        return bullet.plan(torch.randn(3, CLASSES), torch.tensor([0, 1, 2]))

    def check(result):
        expect(sum(result.group_sizes) == 3, "the groups do not sum to m")

    return Case(load, ("state_dict", "earlier", "BulletTrain", *state), told(state), check)


# Operations, called with tensors only: torch itself refuses other types, by the names in the schemas


def any_tensor(strategy):
    """Keeps only the tensors of a strategy."""
    return strategy.filter(lambda x: isinstance(x, torch.Tensor))


@target
@st.composite
def rows_ops(draw):
    """Draws the ops on rows of logits."""
    z = draw(any_tensor(floats_of((draw(st.integers(0, 4)), draw(st.integers(0, 4))), CONTENTS, FLOATS)))
    like = lambda: draw(any_tensor(floats_of(tuple(z.shape), CONTENTS, (z.dtype,))))  # noqa: E731
    y = draw(any_tensor(labels_of(count_of(z), classes_of(z))))
    weights = (
        {"weights": draw(any_tensor(floats_of((count_of(z),), ("uniform",), (z.dtype,))))}
        if draw(st.booleans())
        else {}
    )
    calls = {
        ops.signed_variance: {"logits": z, "labels": y},
        ops.ascent_direction: {"logits": z, "target": like()},
        ops.trades_kl: {"adversarial_logits": z, "clean_logits": like(), **weights},
        ops.mart_loss: {"clean_logits": z, "adversarial_logits": like(), "labels": y, "beta": 6.0, **weights},
        ops.js_divergence: {"clean_logits": z, "first_logits": like(), "second_logits": like(), **weights},
        ops.wide: {"values": z},
    }
    function = draw(st.sampled_from(list(calls)))

    def check(result):
        if function is ops.signed_variance:
            expect(result.svar.shape == (len(z),) and result.probabilities.shape == z.shape, "shapes")

    return call(function, calls[function], check=check)


@target
@st.composite
def update_fraction_op(draw):
    z = draw(any_tensor(floats_of((draw(st.integers(0, 4)), draw(st.integers(1, 4))), CONTENTS, FLOATS)))
    arguments = {
        "robust_fraction": draw(any_tensor(floats_of((), ("uniform",), (torch.float64,)))),
        "unreported_faults": draw(any_tensor(mostly(st.just(torch.tensor(0)), WILD_TENSORS))).clone(),
        "logits": z,
        "labels": draw(any_tensor(labels_of(count_of(z), classes_of(z)))),
        "gamma": 0.8,
        "momentum": 0.9,
    }
    return call(ops.update_fraction_, arguments)


@target
@st.composite
def assign_op(draw):
    m = draw(st.integers(0, 6))
    arguments = {
        "svar": draw(any_tensor(floats_of((m,), CONTENTS, (torch.float32, torch.float64)))),
        "correct": draw(any_tensor(mostly(tensors(st.just((m,)), st.just(torch.bool)), WILD_TENSORS))),
        "robust_fraction": draw(any_tensor(floats_of((), ("uniform",), (torch.float64,)))),
        "group_steps": draw(mostly(st.lists(st.integers(0, 5), min_size=3, max_size=3), st.lists(st.integers(-2, 5)))),
        "group_step_sizes": draw(mostly(st.just([0.0, 0.1, 0.2]), st.lists(st.floats(), max_size=4))),
    }
    if draw(st.booleans()):
        arguments["group_counts"] = draw(any_tensor(mostly(st.just(torch.zeros(3, dtype=torch.int64)), WILD_TENSORS)))
        arguments["group_counts"] = arguments["group_counts"].clone()
    if draw(st.booleans()):
        arguments["unfit"] = draw(any_tensor(mostly(tensors(st.just((m,)), st.just(torch.uint8)), WILD_TENSORS)))

    def check(result):
        _, _, steps, _, order, counts = result
        if not steps.is_meta:
            expect(sorted(order.tolist()) == list(range(m)), "the order is no permutation")
            expect(int(counts[max(arguments["group_steps"]) :][:3].sum()) == m, "the groups do not sum to m")

    return call(ops.assign_steps, arguments, check=check)


@target
@st.composite
def order_op(draw):
    m, most = draw(st.integers(0, 6)), draw(st.integers(-1, 5))
    inside = st.lists(st.integers(0, max(most, 0)), min_size=m, max_size=m).map(torch.tensor).map(torch.Tensor.long)
    arguments = {"steps": draw(any_tensor(mostly(inside, tensors(dtypes=st.sampled_from(FLOATS))))), "most": most}
    return call(ops.order_by_steps, arguments)


@target
@st.composite
def step_ops(draw):
    n, dtype = draw(st.integers(0, 3)), draw(st.sampled_from(FLOATS))
    shape = (n, *draw(st.lists(st.integers(0, 3), max_size=3)))
    kinds = ("uniform", "normal", "zero", "nan", "inf", "huge", "tiny")
    x, g, c = (draw(any_tensor(floats_of(shape, kinds if k else ("uniform",), (dtype,), 40))) for k in range(3))
    x_adv = x.detach().clone()
    limit = mostly(st.floats(0, 1), st.floats())
    arguments = {
        "x_adv": x_adv,
        "grad": g.detach(),
        "clean": c.detach(),
        "step_size": draw(any_tensor(floats_of((n,), ("uniform",), (dtype, torch.float32), 40))),
        "epsilon": draw(st.one_of(limit, any_tensor(floats_of((n,), ("uniform",), (dtype, torch.float32), 40)))),
        "lower": draw(limit),
        "upper": draw(limit),
    }
    function = ops.linf_step_
    if draw(st.booleans()):
        function = ops.l2_step_
        arguments["stand_in"] = draw(any_tensor(floats_of(shape, ("normal",), (dtype,), 40)))
    if draw(st.booleans()):
        arguments |= {"steps": torch.ones(n, dtype=torch.int64), "step": torch.tensor(draw(st.integers(0, 2)))}
    if draw(st.booleans()):
        faulty = mostly(st.just(torch.zeros(n, dtype=torch.int32)), WILD_TENSORS)
        arguments["faulty"] = draw(any_tensor(faulty)).clone()

    def check(_):
        e, low, high = (arguments[k] for k in ("epsilon", "lower", "upper"))
        plain = not isinstance(e, torch.Tensor) and all(v == v for v in (e, low, high)) and low <= high and e >= 0
        if plain and function is ops.linf_step_ and not x_adv.is_meta and bool(c.isfinite().all()):
            moved = x_adv[torch.isfinite(g).flatten(1).all(1)] if g.dim() > 1 else x_adv[:0]
            if "steps" not in arguments and math.isfinite(low) and math.isfinite(high):
                slack = 1e-2 * max(abs(low), abs(high), 1e-6) if dtype != torch.float64 else 1e-9
                expect(bool((moved >= low - slack).all() and (moved <= high + slack).all()), "out of bounds")

    return call(function, arguments, check=check)


@target
@st.composite
def gather_start_op(draw):
    m = draw(st.integers(0, 4))
    shape = (m, *draw(st.lists(st.integers(0, 3), max_size=3)))
    x = draw(any_tensor(floats_of(shape, ("uniform", "normal"), FLOATS)))
    order = torch.randperm(m, generator=torch.Generator().manual_seed(draw(SEEDS)))
    arguments = {
        "x": x,
        "order": draw(st.sampled_from([None, order])),
        "steps": draw(st.one_of(st.none(), any_tensor(mostly(st.just(order), tensors())))),
        "state": draw(any_tensor(mostly(st.just(torch.tensor([1, 2])), WILD_TENSORS))).clone(),
        "noise": draw(mostly(st.sampled_from(["normal", "uniform"]), st.text(max_size=3))),
        "scale": draw(st.floats(0, 1)),
    }

    def check(result):
        clean, start = result
        expect(clean.shape == x.shape == start.shape and clean.dtype == x.dtype, "shapes")

    return call(ops.gather_start, arguments, check=check)


@st.composite
def placements(draw, m, shape, own):
    """Draws top, left and mirrored of crops that show something of their frames."""
    corners = [st.lists(st.integers(1 - n, k - 1), min_size=m, max_size=m) for n, k in zip(shape, own, strict=True)]
    mirrored = st.lists(st.booleans(), min_size=m, max_size=m)
    kinds = torch.int64, torch.int64, torch.bool
    return tuple(torch.tensor(draw(v), dtype=kind) for v, kind in zip((*corners, mirrored), kinds, strict=True))


def shown_pixels(placed, shape, own):
    """Which pixels of their frames crops show, [m, height, width], pixel by pixel by the words of `Placement`."""
    shown = torch.zeros(len(placed[0]), *own, dtype=torch.bool)
    for s, (top, left, mirrored) in enumerate(zip(*(values.tolist() for values in placed), strict=True)):
        for i in range(shape[0]):
            for j in range(shape[1]):
                at = top + i, left + (shape[1] - 1 - j if mirrored else j)
                if 0 <= at[0] < own[0] and 0 <= at[1] < own[1]:
                    shown[(s, *at)] = True
    return shown


def remembered_twice(memory, x_adv, before, clean, slots, epsilon, l2, order, steps, keep, placed):
    """Remembers one attack after another in the same rows, and returns the images and where the next one starts."""
    how = {"order": order, "steps": steps, "placed": placed}
    for ended in (before, x_adv):
        ops.remember_(memory, ended, clean, slots, epsilon, l2=l2, keep=keep, **how)
    x = clean if order is None else torch.empty_like(clean).index_copy_(0, order, clean)
    limits = ops.Limits(epsilon, -9.0, 9.0, l2)
    return ops.recall(x, memory, slots, torch.tensor([1, 2]), limits, noise=0.0, **how)


@target
@st.composite
def memory_ops(draw):
    m, channels = draw(st.integers(0, 4)), draw(st.integers(1, 3))
    size = st.integers(1, 5)
    shape, own = (draw(size), draw(size)), (draw(size), draw(size))
    placed = draw(st.one_of(st.none(), placements(m, shape, own)))
    own = shape if placed is None else own
    dtype, stored = draw(st.sampled_from(FLOATS)), draw(st.sampled_from([*frames.STORED]))
    g = torch.Generator().manual_seed(draw(SEEDS))
    epsilon, l2 = draw(st.floats(1e-3, 1)), draw(st.booleans()) and stored != torch.int8
    clean, *moves = (torch.rand(m, channels, *shape, generator=g, dtype=torch.float64) for _ in range(3))
    bound = epsilon / (1 if not l2 else math.sqrt(clean[0].numel() if m else 1))
    clean, *ended = (v.to(dtype) for v in (clean, *(clean + 0.98 * bound * (2 * move - 1) for move in moves)))
    memory = torch.randint(-100, 101, (m + 2, channels, *own), generator=g).to(stored)
    memory = memory if stored == torch.int8 else memory / 100
    flags = st.lists(st.booleans(), min_size=m, max_size=m).map(lambda values: torch.tensor(values, dtype=torch.bool))
    radii = torch.full((m,), epsilon, dtype=torch.float32 if dtype.itemsize < 8 else dtype)
    arguments = {
        "memory": memory,
        "x_adv": ended[0],
        "before": ended[1],
        "clean": clean,
        "slots": torch.randperm(m + 2, generator=g)[:m],
        "epsilon": draw(st.sampled_from([epsilon, radii])),
        "l2": l2,
        "order": draw(st.sampled_from([None, torch.randperm(m, generator=g)])),
        "steps": draw(st.one_of(st.none(), flags.map(lambda moves: moves.long()))),
        "keep": draw(st.one_of(st.none(), flags)),
        "placed": placed,
    }
    old, valid = memory.clone(), draw(st.integers(0, 4)) > 0
    if not valid:
        name = draw(st.sampled_from(["memory", "x_adv", "clean", "slots", "epsilon", "steps", "keep", "placed"]))
        odd = any_tensor(tensors()).filter(lambda v: v.dtype != torch.int64)
        arguments[name] = draw(st.tuples(odd, odd, odd) if name == "placed" else odd)
        arguments["before"] = arguments["x_adv"]  # an error of the second call would come after the first one's change

    def check(result):
        if valid:
            check_remembered(arguments, result, old, shape, own, epsilon)

    return call(remembered_twice, arguments, check=check, names=("top", "left", "mirrored"))


def check_remembered(given, result, old, shape, own, epsilon):
    """Compares what is stored, and where an attack starts, with the attack that ended."""
    x_adv, memory, m = given["x_adv"].double(), given["memory"].double(), len(given["clean"])
    order = torch.arange(m) if given["order"] is None else given["order"]
    slots = given["slots"][order]
    moves = torch.ones(m, dtype=torch.bool) if given["steps"] is None else given["steps"][order] > 0
    clean, start = (values.double() for values in result)
    expect(torch.equal(clean, given["clean"].double()), "the images are others")
    expect(torch.equal(start[~moves], clean[~moves]), "a sample without steps was moved")
    expect(not memory[slots[~moves]].any(), "a sample without steps is remembered")
    others = torch.ones(len(memory), dtype=torch.bool).index_fill_(0, slots, False)
    expect(torch.equal(memory[others], old.double()[others]), "another row was changed")
    unit = {torch.int8: 0.51 / 127, torch.float16: 1e-3}.get(given["memory"].dtype, 1e-6)
    slack = epsilon * unit * 1.01 + 4 * torch.finfo(given["clean"].dtype).eps
    shown = torch.ones(m, *own, dtype=torch.bool)
    if given["placed"] is not None:
        placed = tuple(values[order] for values in given["placed"])
        shown = shown_pixels(placed, shape, own)
        kept = torch.ones(m, dtype=torch.bool) if given["keep"] is None else given["keep"][order]
        hidden = (~shown & moves[:, None, None])[:, None].expand(-1, memory.shape[1], -1, -1)
        expected = old.double()[slots] * kept[:, None, None, None]
        expect(torch.equal(memory[slots][hidden], expected[hidden]), "what was not shown did not stay")
    if not bool(moves.any()):
        return
    moved = (start - clean).abs()[moves]
    size = moved.flatten(1).norm(dim=1).max() if given["l2"] else moved.max()
    expect(size <= epsilon + slack * 10, "a start outside of the ball")
    seen = shown.flatten(1).sum(1) == shape[0] * shape[1]  # of the crops that lie inside whole, nothing is lost
    gap = (start - x_adv).abs()[moves & seen]
    expect(not gap.numel() or gap.max() <= slack, "the next attack does not start where the last one ended")


# Augmentation, power, ranges


@target
@st.composite
def augmix_choices(draw):
    arguments = {
        "n": draw(COUNTS),
        "device": torch.device("cpu"),
        "severity": draw(mostly(st.floats(0.2, 10))),
        "generator": draw(st.one_of(st.none(), SEEDS.map(lambda s: torch.Generator().manual_seed(s)))),
    }

    def check(result):
        expect(bool(((result.weights.sum(1) - 1).abs() < 1e-9).all()), "weights do not sum to 1")

    return call(draw_choices, arguments, check=check)


@target
@st.composite
def augmix_images(draw):
    n, shape = draw(st.integers(0, 3)), draw(st.tuples(*[st.integers(1, 5)] * 3))
    x = draw(floats_of((n, *shape), ("uniform", "constant", "zero"), FLOATS, 10))
    choices = draw_choices(draw(mostly(st.just(n), st.integers(0, 4))), torch.device("cpu"))

    def check(result):
        expect(result.shape == x.shape and result.dtype == x.dtype, "shapes")
        if bool(((x >= 0) & (x <= 1)).all()):
            expect(bool((result >= -1e-2).all() and (result <= 1 + 1e-2).all()), "out of bounds")

    return call(augment_and_mix, {"x": x, "choices": choices}, check=check)


@target
@st.composite
def crops(draw):
    n, shape = draw(st.integers(0, 3)), draw(st.tuples(*[st.integers(1, 5)] * 3))
    x = draw(floats_of((n, *shape), ("uniform", "constant", "zero"), FLOATS, 10))
    m = draw(mostly(st.just(n), st.integers(0, 4)))
    reach = draw(mostly(st.just(0), st.integers(-1, 1)))  # whether a crop may lie just outside

    def corners(size):
        most = size - 1 + reach
        numbers = st.lists(st.integers(-max(most, 0), max(most, 0)), min_size=m, max_size=m)
        return mostly(numbers.map(lambda drawn: torch.tensor(drawn, dtype=torch.int64)), odd_like((m,)))

    mirrored = mostly(st.just(torch.arange(m) % 2 == 0), odd_like((m,)))
    at = bt_fast.Placement(draw(corners(shape[1])), draw(corners(shape[2])), draw(mirrored))

    def check(result):
        expect(result.shape == x.shape and result.dtype == x.dtype and result.is_contiguous(), "shapes")

    names = ("placement.top", "placement.left", "placement.mirrored")
    return call(crop, {"x": x, "placement": draw(mostly(st.just(at)))}, check=check, names=names)


@target
@st.composite
def crop_and_flip(draw):
    shape = draw(st.tuples(st.integers(0, 3), *[st.integers(1, 9)] * 3))
    arguments = {
        "padding": draw(COUNTS),
        "flip": draw(mostly(st.booleans())),
        "x": draw(floats_of(shape, ("uniform", "constant", "zero"), FLOATS, 10)),
        "generator": draw(mostly(st.one_of(st.none(), SEEDS.map(lambda s: torch.Generator().manual_seed(s))))),
    }

    def augmented(padding, flip, x, generator):
        result, at = CropAndFlip(padding, flip)(x, generator)
        expect(result.shape == x.shape and result.dtype == x.dtype, "shapes")
        expect(torch.equal(crop(x, at), result), "the placement does not give the crops")
        expect(flip or not at.mirrored.any(), "mirrored")

    return call(augmented, arguments)


@target
@st.composite
def power_monitor(draw):
    uuid = "GPU-00000000-0000"
    devices = [None, "cpu", torch.device("cpu"), 0, [0, 1], "cuda", "cuda:9", uuid, [uuid, uuid], ["cpu", 0]]
    arguments = {
        "devices": draw(mostly(st.sampled_from(devices), share=3)),
        "interval": draw(mostly(POSITIVE, share=4)),
    }
    label = draw(mostly(st.sampled_from([None, "first"]), st.one_of(st.text(max_size=3), st.integers()), 5))

    def block(**given):
        with bt_fast.PowerMonitor(**given) as monitor:
            monitor.mark("first")
        expect(monitor.available or isinstance(monitor.reason, str), "no reason")
        monitor.summary(), monitor.joules_per_sample(1), monitor.seconds
        monitor.summary(label)

    return call(block, arguments, names=("label",))


@target
@st.composite
def ranges(draw):
    def block(name):
        with range_(name):
            return None

    return call(block, {"name": draw(st.sampled_from(PHASES))})
