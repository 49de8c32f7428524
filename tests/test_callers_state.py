"""Every public call leaves the caller's state unchanged, also if it raises."""

import copy
import random
import warnings

import numpy as np
import pytest
import sympy  # noqa: F401, torch imports it when first needed, and it adds a filter of warnings
import torch
from model_zoo import ScaledInPlace
from small_models import batch, build, conv_bn
from torch import nn

import bt_fast
from bt_fast import BulletTrain, trades_loss
from tests.public_calls import CALLS, STEPS, seeded

# not here: plain data, errors, options of the losses; runners and Balance, which need a device or ranks
NO_CALLS = {
    *("AdversarialLoss", "Engine", "PGD", "APGD", "PerSample"),
    "MinedPlan",
    "Placement",
    *("Assignment", "Balance", "Costs", "Fractions", "Judged", "NonFiniteError", "Skipped", "POLICIES", "RUNNERS"),
    *("AutoRunner", "GraphRunner", "StreamRunner", "theoretical_speedup", "theoretical_speedup_augmix"),
    *(
        "Frozen",
        "Gaussian",
        "HalfDrawn",
        "Normalization",
        "Oracle",
        "Plan",
        "Rows",
        "ThreatModel",
        "Update",
        "UpdateBatch",
    ),
}


def test_every_public_name_is_called():
    called = {name.split(",")[0] for name in CALLS}
    assert set(bt_fast.__all__) - NO_CALLS <= called


def callers(model, x, y):
    """Returns all settings of a caller in a comparable form."""
    return {
        "images": x.detach().numpy().tobytes(),
        "labels": y.numpy().tobytes(),
        "versions": (x._version, y._version),
        "modes": [m.training for m in model.modules()],
        "trained": [(p.requires_grad, p.grad is None) for p in model.parameters()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "parameters": [p.detach().numpy().tobytes() for p in model.parameters()],
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()),
        "random": (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()),
        "filters": list(warnings.filters),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "printed": torch._tensor_str.PRINT_OPTS.precision,
    }


def prepared(factory=conv_bn, found="mixed"):
    model = build(factory)
    model.train(found != "eval")
    if found == "mixed":
        next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).eval()
    x, y = batch()
    with torch.no_grad():
        y = copy.deepcopy(model).eval()(x.clone()).argmax(dim=1)  # so that samples are attacked
    return model, x, y


@pytest.mark.parametrize("grad", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("found", ["mixed", "eval"])
@pytest.mark.parametrize("name", CALLS)
def test_a_call_leaves_what_is_the_callers(name, found, grad):
    model, x, y = prepared(found=found)
    with grad():
        before = callers(model, x, y)
        CALLS[name](model, x, y)
        assert callers(model, x, y) == before


class Breaking(nn.Module):
    """Raises in its nth forward."""

    def __init__(self, n):
        super().__init__()
        self.body, self.left = conv_bn(), [n]

    def forward(self, x):
        self.left[0] -= 1
        if self.left[0] == 0:
            raise ArithmeticError("the model's own")
        return self.body(x)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_raises_leaves_it_too(name, n):
    model, x, y = prepared(lambda: Breaking(-1))
    model.left[0] = n
    before = callers(model, x, y)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the warning that a model is not folded
            CALLS[name](model, x, y)
    except ArithmeticError:
        assert model.left[0] == 0
    else:
        assert model.left[0] != 0  # the call has fewer forwards
    assert callers(model, x, y) == before


@pytest.mark.parametrize("name", CALLS)
def test_a_model_that_writes_into_its_images_gives_what_it_gives_out_of_place(name):
    actual = []
    for out_of_place in (False, True):
        model, x, y = prepared(lambda: nn.Sequential(ScaledInPlace(), conv_bn()))
        model[0].out_of_place = out_of_place
        before = x.clone()
        result = CALLS[name](model, x, y)
        if result.requires_grad:
            result.backward()
        assert torch.equal(x, before)
        actual.append([result.detach(), *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()])
    for a, b in zip(*actual, strict=True):
        assert torch.equal(a, b)


def spoiling(logits, labels):
    """The cross-entropy's certainty, computed by a function that overwrites its arguments."""
    certainty = torch.where(logits.argmax(1) == labels, 1.0, -1.0) * logits.softmax(1).amax(1)
    logits.fill_(torch.nan)
    labels.fill_(-7)
    return certainty


def spoiling_policy(judged):
    steps = torch.where(judged.certainty > 0, STEPS, 0)
    for value in vars(judged).values():
        if isinstance(value, torch.Tensor):
            value.zero_()
    return steps


@pytest.mark.parametrize(
    ("spoilt", "kind"),
    [
        ({"metric": spoiling}, {"metric": lambda z, y: spoiling(z.clone(), y.clone())}),
        ({"policy": spoiling_policy}, {"policy": lambda judged: torch.where(judged.certainty > 0, STEPS, 0)}),
    ],
)
def test_a_metric_or_policy_of_ones_own_works_on_copies(spoilt, kind):
    result = []
    for options in (spoilt, kind):
        model, x, y = prepared()
        labels = y.clone()
        bullet = BulletTrain(STEPS, 1, 0, **options)
        result.append(trades_loss(model, x, y, None, bullet=bullet, generator=seeded()).detach())
        assert torch.equal(y, labels)
    assert torch.equal(*result)
