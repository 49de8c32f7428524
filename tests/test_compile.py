"""`torch.compile` of the model, of the loss's terms and of the whole loss gives the uncompiled result."""

import copy
import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from small_models import batch, build
from tolerances import assert_near, assert_near_nested
from torch import nn
from torch._dynamo.utils import counters
from torch.optim.swa_utils import AveragedModel

from bt_fast import (
    AWP,
    PGD,
    BulletTrain,
    Engine,
    Frozen,
    Normalization,
    TRADESLoss,
    augmix_loss,
    mart_loss,
    ops,
    pgd_loss,
    trades_loss,
)
from bt_fast.attack import folded, forward, neighbours
from bt_fast.attack.folded import attack_model
from bt_fast.attack.forward import eval_mode, modes_restored
from bt_fast.baselines.fast import fast_loss
from bt_fast.baselines.yopo import yopo_loss
from bt_fast.objectives import repeated_forward, training_outputs
from bt_fast.objectives.repeated_forward import moves_batch_norm_alone

THREE = BulletTrain(3, 1, 0)
COMPILE = functools.partial(torch.compile, backend="eager")  # only tracing matters here: the trace runs eagerly


@pytest.fixture(autouse=True)
def _anew():
    torch._dynamo.reset()
    counters.clear()


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


def attacked(loss, **options):
    return lambda model, x, y, bullet, **more: loss(
        model, x, y, None, perturb_steps=3, bullet=bullet, generator=seeded(), **options, **more
    )


def other(loss, **options):
    return lambda model, x, y, bullet, **more: loss(model, x, y, generator=seeded(), **options, **more)


def augmix(model, x, y, bullet, **more):
    return augmix_loss(model, x, y, bullet=bullet, generator=seeded(), **more)


YOPO = {"optimizer": None, "propagations": 2, "layer_steps": 2}
LOSSES = {
    "trades": (attacked(trades_loss), None),
    "trades, bullet": (attacked(trades_loss), THREE),
    "trades, bullet, folded": (attacked(trades_loss, frozen=Frozen()), THREE),
    "mart, bullet": (attacked(mart_loss), THREE),
    "pgd": (attacked(pgd_loss), None),
    "augmix, bullet": (augmix, BulletTrain(1, 0, 0)),
    "fast, folded": (
        other(functools.partial(fast_loss, pgd_loss), optimizer=None, epsilon=0.03, frozen=Frozen()),
        None,
    ),
    "yopo": (other(yopo_loss, **YOPO), None),
    "yopo, trades": (other(yopo_loss, objective="trades", **YOPO), None),
}
FEW = ["trades, bullet", "augmix, bullet"]


def outcome(loss, run, model, bullet, calls=2, **options):
    """Returns the loss, gradients and buffers after some calls, and F_R."""
    bullet = copy.deepcopy(bullet)
    for seed in range(calls):
        value = loss(run, *batch(seed=seed), bullet, **options)
        value.backward()
    result = {"loss": value.detach(), **dict(model.named_buffers())}
    result |= {f"{name}.grad": p.grad for name, p in model.named_parameters()}
    return result if bullet is None else result | {f"bullet.{k}": v for k, v in bullet.state_dict().items()}


# Models


def whole(model):
    return COMPILE(model)


def in_place(model):
    model.compile(backend="eager")
    return model


def a_part(model):
    model[4] = COMPILE(model[4])
    model[5].compile(backend="eager")
    return model


def inside(model):
    return nn.Sequential(COMPILE(model))


@pytest.mark.parametrize("name", LOSSES)
def test_a_compiled_model_gives_the_uncompiled_result(name):
    loss, bullet = LOSSES[name]
    model, plain = build(), build()
    expected = outcome(loss, plain, plain, bullet)
    assert_near_nested(outcome(loss, COMPILE(model), model, bullet), expected)
    assert counters["stats"]["unique_graphs"] or name.startswith("yopo")  # it was really compiled


@pytest.mark.parametrize("compiled", [in_place, a_part, inside])
@pytest.mark.parametrize("name", ["trades, bullet, folded", "yopo"])
def test_however_it_was_compiled(name, compiled):
    loss, bullet = LOSSES[name]
    model, plain = build(), build()
    expected, run = outcome(loss, plain, plain, bullet), compiled(model)
    result = {name.replace("_orig_mod.", ""): value for name, value in outcome(loss, run, model, bullet).items()}
    assert_near_nested(result, expected)


def test_through_autograd_of_the_compiler_too():
    """Uses the backend that also traces the backward, which all code-generating backends build on."""
    loss, bullet = LOSSES["trades, bullet"]
    model, plain = build(), build()
    expected = outcome(loss, plain, plain, bullet, calls=1)
    result = outcome(loss, torch.compile(model, backend="aot_eager"), model, bullet, calls=1)
    assert_near_nested(result, expected)


def test_ragged_sizes_compile_a_few_times_and_no_more():
    graphs, history = [], []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    model, bullet = torch.compile(build(), backend=backend), BulletTrain(3, 2, 1)
    for seed in range(6):
        trades_loss(model, *batch(m=16, seed=seed), None, bullet=bullet)
        history.append(len(graphs))
    assert history[-1] <= 6
    assert len(set(history[2:])) == 1


@pytest.mark.parametrize("compiled", [whole, in_place, a_part, inside])
@pytest.mark.parametrize("training", [True, False])
def test_its_modes_are_restored_module_by_module(compiled, training):
    model = build().train(training)
    run = compiled(model)
    model[1].eval()
    result = [m.training for m in run.modules()]
    with eval_mode(run):
        assert not any(m.training for m in run.modules())
        with modes_restored(run):
            run.train()
            assert model.training
            assert model[1].training
    assert [m.training for m in run.modules()] == result
    trades_loss(run, *batch(), None, perturb_steps=1)
    assert [m.training for m in run.modules()] == result


@pytest.mark.parametrize("compiled", [whole, in_place, a_part, inside, lambda m: AveragedModel(COMPILE(m))])
def test_its_view_is_folded_without_a_warning_and_follows_its_weights(compiled):
    model, (x, _) = compiled(build()), batch()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the attack")
        for _ in range(2):
            with attack_model(model, Frozen(), x) as view:
                assert view.reason is None
                assert view.independent
                assert not any("norm" in type(m).__name__.lower() for m in view._folded.modules())
                assert_near(view(x), model(x))
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1.1)


def test_its_buffers_are_known_behind_the_compiled_module_and_the_second_forward_is_replayed():
    model = build()
    run = COMPILE(model)
    trades_loss(run, *batch(), None, perturb_steps=1)
    assert model[1].num_batches_tracked == 3
    assert moves_batch_norm_alone(run)


def test_its_state_keeps_its_names():
    model, run = build(), COMPILE(build())
    names = list(run.state_dict())
    normalization = Normalization((0.5,), (0.5,))
    for frozen in (None, Frozen()):
        images, y = batch()
        trades_loss(run, 2 * images - 1, y, None, perturb_steps=1, frozen=frozen, normalization=normalization)
    assert list(run.state_dict()) == names == [f"_orig_mod.{name}" for name in model.state_dict()]
    model.load_state_dict({name.removeprefix("_orig_mod."): value for name, value in run.state_dict().items()})


# The terms of a loss, without a graph break


def trades_terms(z, z_adv, y):
    return F.cross_entropy(z, y) + 6.0 / len(z) * ops.trades_kl(z_adv, z)


def mart_terms(z, z_adv, y):
    return ops.mart_loss(z, z_adv, y, 5.0)


def augmix_terms(z, z_adv, y):
    return F.cross_entropy(z, y) + 12.0 / len(z) * ops.js_divergence(z, z_adv, z_adv.flip(0))


def weighted_terms(z, z_adv, y):
    return ops.trades_kl(z_adv, z, weights=z.softmax(dim=1)[:, 0])


TERMS = [trades_terms, mart_terms, augmix_terms, weighted_terms]


def differentiated(terms, dtype, seed=0):
    """Returns the loss and its gradients by the values that the logits are computed from."""
    g = seeded(seed)
    x, w = (torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for shape in ((8, 6), (6, 5)))
    y = torch.randint(5, (8,), generator=g)
    x.requires_grad_()
    w.requires_grad_()
    loss = terms(x @ w, (x + 0.1) @ w, y)
    return loss.detach(), *torch.autograd.grad(loss, (x, w))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("terms", TERMS)
def test_the_terms_compile_as_one_graph_with_their_gradients(terms, dtype):
    compiled = torch.compile(terms, backend="aot_eager", fullgraph=True)
    for seed in range(2):
        for result, expected in zip(
            differentiated(compiled, dtype, seed), differentiated(terms, dtype, seed), strict=True
        ):
            assert_near(result, expected)
    assert not counters["graph_break"]


@pytest.mark.parametrize("terms", TERMS)
def test_the_terms_explained(terms):
    z, y = torch.randn(8, 5, generator=seeded()), torch.arange(8) % 5
    explained = torch._dynamo.explain(terms)(z, z + 0.1, y)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


def test_a_graph_break_is_recognised():
    def broken(z, z_adv, y):
        loss = F.cross_entropy(z, y)
        torch._dynamo.graph_break()
        return loss + ops.trades_kl(z_adv, z)

    z, y = torch.randn(8, 5, generator=seeded()), torch.arange(8) % 5
    explained = torch._dynamo.explain(broken)(z, z + 0.1, y)
    assert (explained.graph_count, explained.graph_break_count) == (2, 1)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(broken, backend="aot_eager", fullgraph=True)(z, z + 0.1, y)


def test_the_code_that_the_compiler_generates():
    options = {"cpp.vec_isa_ok": False}  # plain loops: finding out which vectors this machine has takes half a minute
    compiled = torch.compile(trades_terms, fullgraph=True, options=options)
    for result, expected in zip(
        differentiated(compiled, torch.float32), differentiated(trades_terms, torch.float32), strict=True
    ):
        assert_near(result, expected)


def test_a_training_step_of_ones_own_is_one_graph():
    """Two forwards and the fused loss; also under autocast, the usual setting."""
    model = build(dtype=torch.float32).eval()

    def step(x, x_adv, y):
        with torch.autocast("cpu", torch.bfloat16):
            return trades_terms(model(x), model(x_adv), y)

    x, y = batch(dtype=torch.float32)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert_near(compiled(x, x + 0.01, y), step(x, x + 0.01, y).detach())
    assert not counters["graph_break"]


# The whole loss


class Reading(nn.Module):
    """Reads its mode, so that the loss looks what it returns in train mode."""

    def forward(self, x):
        return x if self.training else x + 0.0


BOOKKEEPING = {
    "as it is": (
        {"engine": Engine()},
        [(repeated_forward._Watch, "_other_versions"), (training_outputs, "_look"), (forward, "_dtypes_behind")],
    ),
    "folded, mined": (
        {"engine": Engine(fold=True, channels_last=True), "mining": BulletTrain(2, 1, 0)},
        [
            *((folded, name) for name in ("_traced", "_compare")),
            (folded.FoldedModel, "refresh"),
            (neighbours, "_alone"),
        ],
    ),
}


def watching(original, traced, name):
    def watched(*args, **options):
        traced[name] = traced.get(name, False) or torch.compiler.is_compiling()
        return original(*args, **options)

    return watched


@pytest.mark.parametrize("name", BOOKKEEPING)
def test_what_a_loss_finds_out_about_a_model_is_not_traced_where_the_loss_is_compiled(name, monkeypatch):
    traced, (options, functions) = {}, BOOKKEEPING[name]
    for owner, function in functions:
        monkeypatch.setattr(owner, function, watching(getattr(owner, function), traced, function))
    model, (x, y) = nn.Sequential(build(dtype=torch.float32), Reading()), batch(dtype=torch.float32)
    COMPILE(TRADESLoss(PGD(0.03, 0.01, 2), **options))(model, x, y).backward()
    assert traced == {function: False for _, function in functions}


def test_a_compiled_loss_goes_on_where_models_come_and_go():
    """AWP calls a loss twice, and each model leaves what the loss knew of it behind."""
    loss = TRADESLoss(PGD(0.03, 0.01, 1), engine=Engine(fold=True))
    compiled = COMPILE(loss)
    for seed in range(2):
        dtype = (torch.float32, torch.float64)[seed]
        result = []
        for run in (compiled, loss):
            torch.manual_seed(seed)
            model, (x, y) = build(dtype=dtype), batch(6 + seed, seed=seed, dtype=dtype)
            with AWP(model)(run, x, y) as value:
                value.backward()
            result.append({"loss": value.detach(), **dict(model.named_buffers())})
            result[-1] |= {f"{name}.grad": p.grad for name, p in model.named_parameters()}
        assert_near_nested(*result)


@pytest.mark.parametrize(("loss", "bullet"), [(trades_loss, THREE), (pgd_loss, None)])
def test_a_whole_loss_compiles_in_parts(loss, bullet):
    """Host reads and inner derivatives break the graph; the number of steps does not add breaks."""
    breaks = []
    for steps in (2, 3):
        torch._dynamo.reset()
        counters.clear()
        result = []
        for run in (COMPILE(loss), loss):
            model, policy = build(), bullet and BulletTrain(steps, 1, 0)

            def attacked(model, x, y, bullet, run=run, steps=steps):
                return run(model, x, y, None, perturb_steps=steps, bullet=bullet)

            torch.manual_seed(0)
            result.append(outcome(attacked, model, model, policy, calls=1))
        assert_near_nested(*result)
        breaks.append(sum(counters["graph_break"].values()))
    assert breaks[0] == breaks[1] > 0
