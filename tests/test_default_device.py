"""A caller's `torch.set_default_device` changes nothing: every tensor that belongs on the host names its device.

The default device here is "meta", which holds no values: a tensor made there by mistake would fail.
"""

import ast
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import small_models
import torch
from emulated_device import EmulatedDevice
from torch.utils._pytree import tree_leaves

import bt_fast
from bt_fast import (
    METRICS,
    POLICIES,
    BulletTrain,
    Frozen,
    Gaussian,
    GraphRunner,
    Guard,
    Normalization,
    Oracle,
    Plan,
    StreamRunner,
    ThreatModel,
    Update,
    augmix_loss,
    faults,
    generate,
    mart_loss,
    pgd_loss,
    trades_loss,
)
from bt_fast.attack.balance import Costs, plan
from bt_fast.baselines.fast import fast_loss
from bt_fast.baselines.grad_align import grad_align
from bt_fast.baselines.mart_reference import mart_reference_loss
from bt_fast.baselines.pgd_reference import pgd_reference_loss
from bt_fast.baselines.trades_reference import trades_reference_loss
from bt_fast.baselines.yopo import yopo_loss
from bt_fast.evaluation import evaluate
from bt_fast.lab import doctor
from bt_fast.lab.augment import crop_and_flip
from bt_fast.lab.data import load_dataset, minibatches
from bt_fast.lab.models import build_model, load_published

CPU, EPSILON, STEP_SIZE = torch.device("cpu"), 0.1, 0.03
ROOT = Path(bt_fast.__file__).parents[1]


def model_and_batch():
    with CPU:  # users make a network where they want it
        torch.manual_seed(0)
        return small_models.conv_bn(), torch.rand(8, 1, 6, 6), torch.arange(8) % small_models.CLASSES


def trained(loss_of, *arguments, bullet=None, **options):
    """Runs three updates and returns the losses, the gradients and the mining's state."""
    model, x, y = model_and_batch()
    result = []
    with CPU:
        bullet = None if bullet is None else BulletTrain(**{"boundary_steps": 3, "robust_steps": 1} | bullet)
    for _ in range(3):
        loss = loss_of(model, x, y, *arguments, **options, **({} if bullet is None else {"bullet": bullet}))
        loss.backward()
        result.append(loss)
    return result, [p.grad for p in model.parameters()], [] if bullet is None else list(bullet.buffers())


def of_loss(loss_of, steps=10, **options):
    return lambda: trained(loss_of, None, STEP_SIZE, EPSILON, steps, **options)


def of_reference(loss_of):
    def run():
        model, x, y = model_and_batch()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return loss_of(model, x, y, optimizer, STEP_SIZE, EPSILON, 3)

    return run


def generated(norm="l_inf", **options):
    def run():
        model, x, y = model_and_batch()
        target = torch.nn.functional.one_hot(y, small_models.CLASSES).to(x.dtype)
        schedule = Plan.uniform(len(x), 3, STEP_SIZE, x.device)
        return generate(model, x, x.clone(), target, schedule, ThreatModel(EPSILON, norm), **options)

    return run


def evaluated(**options):
    def run():
        model, x, y = model_and_batch()
        result = evaluate(model, [(x[:5], y[:5]), (x[5:], y[5:])], ThreatModel(EPSILON), steps=3, restarts=2, **options)
        return result.clean, result.robust, result.restart, result.step

    return run


def emulated(case):
    """Runs the case on an emulated device, with its attack in graphs."""

    def run():
        with EmulatedDevice() as device:
            result = case()
        assert device.replays
        return result

    return run


def bad_values():
    """Non-finite logits raise NonFiniteError, which lists the samples."""
    model, x, y = model_and_batch()
    model[-1].bias.data[0] = torch.nan
    with CPU:
        bullet = BulletTrain()
    for options in ({}, {"bullet": bullet}):
        with pytest.raises(faults.NonFiniteError, match="samples 0, 1, 2"):
            trades_loss(model, x, y, None, **options)
    with pytest.raises(faults.NonFiniteError, match="samples 0, 1, 2"):
        augmix_loss(model, x, y)
    return ()


def bad_pixels():
    """Bad pixels raise a ValueError that describes them, for more than one kind of mistake."""
    model, x, y = model_and_batch()
    for spoilt, message in ((x * 255, "its values are from"), (x * torch.nan, "288 of 288 pixels are NaN")):
        with pytest.raises(ValueError, match=message):
            trades_loss(model, spoilt, y, None)
    return ()


def further_passes():
    """Runs further passes over one minibatch, with the x' of the first pass and with new ones."""
    result = []
    for loss_of, steps in ((pgd_loss, (3, 1, 0)), (augmix_loss, (1, 0, 0))):
        model, x, y = model_and_batch()
        with CPU:
            bullet = BulletTrain(*steps)
        options = {"optimizer": None} if loss_of is pgd_loss else {}
        result.append(loss_of(model, x, y, bullet=bullet, **options))
        for reuse in (True, False):
            with bullet.again(reuse=reuse):
                result.append(loss_of(model, x, y, bullet=bullet, **options))
        result += bullet.buffers()
    return result


def loaded():
    """Loads a network together with its saved normaliser."""
    with CPU, TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = build_model("wrn-10-1", in_channels=3, image_size=8, num_classes=3)
        state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
        state |= {"mean": torch.full((3,), 0.5), "std": torch.full((3,), 0.25)}
        path, x = Path(folder) / "file.pt", torch.rand(2, 3, 8, 8)
        torch.save({"model": state}, path)
        with torch.device("meta"):
            return load_published(model, path)(x)


def guarded():
    model, x, y = model_and_batch()
    guard = Guard(torch.optim.SGD(model.parameters(), lr=0.1), model, non_finite="skip")
    for factor in (1.0, torch.nan, 1.0):
        with guard.minibatch():
            loss = trades_loss(model, x, y, None) * factor
            loss.backward()
            guard.step(loss)
    guard.settle()
    return len(guard.skipped), list(model.parameters())


def planned():
    counts = torch.tensor([[8, 0, 4], [2, 2, 8], [0, 1, 11]], device="cpu")
    exchange = plan(counts)
    return exchange.quotas, Costs(1e-3, 1e-4, 1e4, 1e-4, 1e9).attack_seconds(counts)


def data():
    batches = list(minibatches(20, 6, seed=0, epoch=1))
    return batches, crop_and_flip(model_and_batch()[1], seed=0, iteration=2)[0], load_dataset("digits").x_test[:2]


def examined():
    """Runs the doctor's self-check and a training step."""
    return [(f.name, f.status) for f in doctor.examine(CPU) if f.section in doctor.SECTIONS[-2:]]


PIXELS = Normalization((0.0,), (1.0,))
CASES = {
    "trades": of_loss(trades_loss),
    "trades, l_2": of_loss(trades_loss, distance="l_2"),
    "trades, bullet": of_loss(trades_loss, bullet={}),
    "trades, bullet, l_2": of_loss(trades_loss, bullet={}, distance="l_2"),
    "trades, bullet, view": of_loss(trades_loss, bullet={}, frozen=Frozen(), update=Update()),
    "trades, uniform, normalised": of_loss(trades_loss, start="uniform", normalization=PIXELS),
    "trades, numbered": of_loss(trades_loss, bullet={}, samples=torch.arange(8)),
    "trades, auto": of_loss(trades_loss, bullet={}, runner="auto"),
    "trades, graphs": emulated(lambda: of_loss(trades_loss, bullet={}, runner=GraphRunner())()),
    "trades, streams": emulated(lambda: of_loss(trades_loss, bullet={}, runner=StreamRunner())()),
    "trades, captured update": emulated(of_loss(trades_loss, bullet={}, update=Update(graphs=True))),
    "trades, oracle": of_loss(trades_loss, bullet={"policy": Oracle(2)}),
    "trades, gaussian": of_loss(trades_loss, bullet={"policy": Gaussian()}),
    **{f"trades, {metric}": of_loss(trades_loss, bullet={"metric": metric}) for metric in METRICS},
    **{f"trades, {policy}": of_loss(trades_loss, bullet={"policy": policy}) for policy in POLICIES},
    "mart": of_loss(mart_loss),
    "mart, bullet": of_loss(mart_loss, bullet={}),
    "pgd": of_loss(pgd_loss),
    "pgd, bullet": of_loss(pgd_loss, bullet={}),
    "augmix": lambda: trained(augmix_loss),
    "augmix, bullet": lambda: trained(augmix_loss, bullet={"boundary_steps": 1, "robust_steps": 0}),
    "fast": lambda: trained(partial(fast_loss, pgd_loss), None, epsilon=EPSILON),
    "grad_align": lambda: trained(grad_align, epsilon=EPSILON),
    "yopo": lambda: trained(yopo_loss, None, epsilon=EPSILON, propagations=2, layer_steps=2),
    "yopo, trades": lambda: trained(yopo_loss, None, propagations=2, layer_steps=2, objective="trades", beta=6.0),
    "trades reference": of_reference(trades_reference_loss),
    "mart reference": of_reference(mart_reference_loss),
    "pgd reference": of_reference(pgd_reference_loss),
    "generate": generated(),
    "generate, l_2, view": generated("l_2", frozen=Frozen()),
    "evaluate": evaluated(),
    "evaluate, view": evaluated(frozen=Frozen()),
    "bad values": bad_values,
    "bad pixels": bad_pixels,
    "further passes": further_passes,
    "a published network": loaded,
    "guard": guarded,
    "balance": planned,
    "data": data,
    "doctor": examined,
}


@pytest.mark.parametrize("name", CASES)
def test_a_default_device_changes_nothing(name):
    expected = CASES[name]()
    with torch.device("meta"):
        result = CASES[name]()
    pairs = list(zip(tree_leaves(result), tree_leaves(expected), strict=True))
    for mine, as_usual in pairs:
        if isinstance(mine, torch.Tensor):
            torch.testing.assert_close(mine, as_usual, rtol=0, atol=0, equal_nan=True)
        else:
            assert mine == as_usual


# functions that make tensors from none and take a device
FACTORIES = (
    *("arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "normal"),
    *(
        "ones",
        "rand",
        "randint",
        "randn",
        "randperm",
        "scalar_tensor",
        "tensor",
        "tril_indices",
        "triu_indices",
        "zeros",
    ),
)
ELSEWHERE = {
    "bt_fast/lab/doctor_checks.py": "doctor.examine makes the CPU its default device",
    "bt_fast/lab/doctor_memory.py": "likewise",
}


def without_a_device(source):
    """Returns calls that make tensors without a device; a module's buffers are made where its parameters are."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    buffers = {
        id(inner)
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr == "register_buffer"
        for inner in ast.walk(call)
    }
    return [
        ast.unparse(call)
        for call in calls
        if ast.unparse(call.func).removeprefix("torch.") in FACTORIES
        and ast.unparse(call.func).startswith("torch.")
        and id(call) not in buffers
        and not any(keyword.arg in ("device", None) for keyword in call.keywords)
    ]


@pytest.mark.parametrize("path", [str(p.relative_to(ROOT)) for p in sorted((ROOT / "bt_fast").rglob("*.py"))])
def test_every_tensor_that_is_made_says_where(path):
    result = without_a_device((ROOT / path).read_text())
    assert (not result) == (path not in ELSEWHERE), result


def test_a_tensor_that_is_made_anywhere_is_recognised():
    lines = ["a = torch.zeros(3)", "b = torch.zeros(3, device=d)", "c = torch.full((), 1.0, **given)"]
    lines += ["self.register_buffer('d', torch.ones(2).view(2))", "e = [torch.arange(torch.tensor(2))]"]
    assert without_a_device("\n".join(lines)) == ["torch.zeros(3)", "torch.arange(torch.tensor(2))", "torch.tensor(2)"]
