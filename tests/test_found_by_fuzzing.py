"""Failures that `python -m tests.fuzz` found, one case each: bad input is refused by name, before any change."""

import io
import json
import zipfile
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import small_models
import torch
from torch import nn

from benchmarks import compare
from bt_fast import (
    BulletTrain,
    Fractions,
    Frozen,
    Guard,
    Normalization,
    Plan,
    PowerMonitor,
    ThreatModel,
    augmix_loss,
    generate,
    mart_loss,
    ops,
    pgd_loss,
    theoretical_speedup,
    theoretical_speedup_augmix,
    trades_loss,
)
from bt_fast.autoattack import autoattack
from bt_fast.baselines.grad_align import grad_align
from bt_fast.baselines.yopo import yopo_loss
from bt_fast.evaluation import evaluate
from bt_fast.lab.checkpoint import load_checkpoint
from bt_fast.lab.config import PRESETS, RunConfig
from bt_fast.lab.data import load_dataset
from bt_fast.lab.html_report.loading import load_runs
from bt_fast.lab.training import Run

HUGE = 10**400
M = 4
X, Y = torch.rand(M, *small_models.SHAPE, generator=torch.Generator().manual_seed(0)), torch.arange(M)
THREAT = ThreatModel(0.1)
DEEP = "[" * 10_000
EIGHT_BITS = torch.float8_e5m2


class Constant(nn.Module):
    """A model with logits that do not depend on its images: from an op without gradient, or from a parameter alone."""

    def __init__(self, parameter):
        super().__init__()
        self.logits = nn.Parameter(torch.arange(5.0)) if parameter else None
        self.layer = nn.Linear(36, 5)

    def forward(self, x):
        z = self.layer(x.flatten(1))
        return z.detach() if self.logits is None else self.logits.expand(len(x), -1) + 0 * z.detach()


def refused(kind, match, function, *arguments, **keywords):
    with pytest.raises(kind, match=match):
        function(*arguments, **keywords)


# Numbers and options


@pytest.mark.parametrize("value", [HUGE, -HUGE, Fraction(HUGE, 3)])
def test_numbers_beyond_every_float(value):
    refused(ValueError, "epsilon", ThreatModel, value)
    refused(ValueError, "gamma", BulletTrain, gamma=value)
    refused(ValueError, "step_size", trades_loss, nn.Linear(4, 3), torch.rand(2, 4), Y[:2], None, step_size=value)


def test_a_threat_model_s_own_arguments():
    refused(TypeError, "lower", ThreatModel, 0.1, lower="0")
    refused(TypeError, "upper", ThreatModel, 0.1, upper=None)
    refused(ValueError, "norm", ThreatModel, 0.1, np.array(["l_inf", "l_2"]))
    assert ThreatModel(Fraction(1, 2), upper=2**63) == ThreatModel(0.5, upper=2.0**63)
    assert type(ThreatModel(1).epsilon) is float


def test_counts_that_are_tensors():
    refused(TypeError, "boundary_steps", BulletTrain, torch.tensor([1, 2]))
    refused(TypeError, "robust_steps", BulletTrain, 1, np.array([1, 2]))


@pytest.mark.parametrize("value", [HUGE, 0, float("nan")])
def test_an_interval_that_no_clock_has(value):
    refused(ValueError, "interval", PowerMonitor, "cpu", interval=value)


def test_arrays_as_options():
    array = np.array([1.0, 2.0])
    model = small_models.conv_bn()
    refused(ValueError, "unperturbed", trades_loss, model, X, Y, None, bullet=BulletTrain(), unperturbed=array)
    refused(ValueError, "start", pgd_loss, model, X, Y, None, start=array)
    refused(TypeError, "loss", evaluate, model, [(X, Y)], THREAT, loss=array)
    refused(ValueError, "version", autoattack, model, X, Y, THREAT, version=array)
    refused(ValueError, "objective", yopo_loss, model, X, Y, None, propagations=1, layer_steps=1, objective=array)


def test_a_class_is_no_runner():
    refused(TypeError, "runner", mart_loss, small_models.conv_bn(), X, Y, None, runner=int)


def test_things_of_other_kinds():
    model, zero = small_models.conv_bn(), Plan.uniform(M, 1, 0.1, "cpu")
    for other in (3, "name", None):
        refused(TypeError, "model", trades_loss, other, X, Y, None)
        refused(TypeError, "model", augmix_loss, other, X, Y)
        refused(TypeError, "model", yopo_loss, other, X, Y, None, propagations=1, layer_steps=1)
        refused(TypeError, "attack", evaluate, model, [(X, Y)], other)
        refused(TypeError, "threat", autoattack, model, X, Y, other)
        refused(TypeError, "threat", generate, model, X, X, torch.rand(M, 5), zero, other)
        refused(TypeError, "plan", generate, model, X, X, torch.rand(M, 5), other, THREAT)
        refused(TypeError, "target", generate, model, X, X, other, zero, THREAT)
        refused(TypeError, "clean", generate, model, other, X, torch.rand(M, 5), zero, THREAT)
    refused(TypeError, "frozen", generate, model, X, X, torch.rand(M, 5), zero, THREAT, frozen=True)
    refused(TypeError, "frozen", evaluate, model, [(X, Y)], THREAT, frozen=True)
    refused(TypeError, "batches", evaluate, model, 3, THREAT)
    refused(TypeError, "batches", evaluate, model, [X], THREAT)
    refused(TypeError, "batches", evaluate, model, [(X,)], THREAT)
    refused(ValueError, "images must", evaluate, model, [(torch.tensor(0.5), Y)], THREAT)
    refused(ValueError, "clean", generate, model, torch.tensor(0.5), X, torch.rand(M, 5), zero, THREAT)


def test_the_theory_s_arguments():
    refused(TypeError, "boundary", Fractions, "0.5", 0.5, 0.0)
    refused(TypeError, "fractions", theoretical_speedup, 0.5)
    refused(TypeError, "baseline_steps", theoretical_speedup, Fractions(0.5, 0.5, 0), baseline_steps="10")
    refused(TypeError, "boundary_fraction", theoretical_speedup_augmix, None)


# Tensors


@pytest.mark.parametrize("odd", [lambda t: t.to(EIGHT_BITS), lambda t: t.to_sparse()], ids=["8 bits", "sparse"])
def test_tensors_that_torch_only_stores(odd):
    model = small_models.conv_bn()
    for loss_of in (trades_loss, mart_loss, pgd_loss):
        refused(TypeError, "x_natural must be floating-point images", loss_of, model, odd(X), Y, None)
    refused(TypeError, "x must be floating-point images", augmix_loss, model, odd(X), Y)
    refused(TypeError, "images must be floating point", evaluate, model, [(odd(X), Y)], THREAT)
    refused(TypeError, "step_size must be floating point", Plan.from_steps, Y, odd(torch.rand(M)))
    refused(TypeError, "logits must be floating point", BulletTrain().plan, odd(torch.rand(M, 5)), Y)


def test_tensors_without_values():
    refused(ValueError, "on the meta device", Plan.from_steps, Y.to("meta"), torch.rand(M).to("meta"))


@pytest.mark.parametrize("parameter", [False, True])
def test_a_model_without_a_gradient_to_its_images(parameter):
    model, bullet = Constant(parameter), BulletTrain(2, 1, 1)
    with pytest.raises(ValueError, match="model must return logits with a gradient"):
        mart_loss(model, X, Y + 1, None, bullet=bullet)
    assert not bullet.group_counts.any()  # nothing has been assigned
    for loss_of in (trades_loss, pgd_loss):
        refused(ValueError, "model must return logits with a gradient", loss_of, model, X, Y, None)
    refused(ValueError, "model must return logits with a gradient", grad_align, model, X, Y, epsilon=0.1)
    right = model(X).argmax(dim=1)  # those that are misclassified are not attacked
    refused(ValueError, "model must return logits with a gradient", evaluate, model, [(X, right)], THREAT)


@pytest.mark.parametrize("policy", ["three_groups", "uniform"])
def test_an_attack_that_fails_does_not_count(policy):
    bullet = BulletTrain(2, 1, 1, policy=policy)  # all samples are attacked, whatever the model predicts

    def fails(*_):
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        trades_loss(small_models.conv_bn(), X, Y, None, bullet=bullet, runner=fails)
    assert not bullet.group_counts.any()
    assert not bullet.steps_assigned


def test_a_model_that_returns_no_logits_to_its_view():
    class Listed(nn.Module):
        def forward(self, x):
            return [x.flatten(1)]

    refused(TypeError, "model must return a floating-point tensor", trades_loss, Listed(), X, Y, None, frozen=Frozen())


@pytest.mark.filterwarnings("ignore:(epsilon|step_size)=")
def test_numbers_of_other_kinds():
    model = small_models.conv_bn()
    assert grad_align(model, X, Y, epsilon=2**63).isfinite()
    result = [evaluate(model, [(X, Y)], THREAT, steps=1, step_size=s).clean_correct for s in (Fraction(1, 2), 0.5)]
    assert result[0] == result[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_pixel_bounds_beyond_the_images_dtype(dtype):
    x, alpha = torch.full((2, 3), 0.5, dtype=dtype), torch.full((2,), 0.25, dtype=dtype)
    for step, more in ((ops.linf_step_, ()), (ops.l2_step_, (torch.ones_like(x),))):
        x_adv = x.clone()
        step(x_adv, torch.tensor([[1, 0, 0]], dtype=dtype).expand(2, 3), x, alpha, 1.0, -1e300, 1e300, *more)
        assert torch.equal(x_adv, torch.tensor([[0.75, 0.5, 0.5]], dtype=dtype).expand(2, 3))


# Files


def test_json_that_is_nested_too_deeply(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(DEEP + "\n")
    refused(ValueError, "configuration", RunConfig.from_json, DEEP)
    refused(ValueError, "metrics.jsonl", Run.records, SimpleNamespace(_metrics_path=path))
    refused(ValueError, "metrics.jsonl", compare.read, path)
    (tmp_path / "summary.json").write_text(DEEP)
    refused(ValueError, "summary.json", load_runs, [tmp_path])


def test_records_that_are_no_objects(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for line in ("[1]", "3", "1" * 5000):
        path.write_text(line + "\n")
        refused(ValueError, "metrics.jsonl: a line is not a record", Run.records, SimpleNamespace(_metrics_path=path))


@pytest.mark.parametrize(
    ("name", "value"), [("methods", [1]), ("methods", [["bullet"]]), ("decay_epochs", ["2"]), ("decay_epochs", [True])]
)
def test_lists_of_other_things_in_a_configuration(name, value):
    fields = json.loads(PRESETS["digits"].to_json()) | {name: value}
    refused(ValueError, f"{name} in the run configuration", RunConfig.from_json, json.dumps(fields))


def test_a_checkpoint_whose_format_is_a_tensor(tmp_path):
    torch.save({"bt_fast": torch.rand(2)}, tmp_path / "checkpoint.pt")
    refused(
        ValueError, "checkpoint.pt: not a checkpoint.*found format Tensor", load_checkpoint, tmp_path / "checkpoint.pt"
    )


@pytest.mark.parametrize("member", ["x_train", "y_test"])
def test_an_npz_with_a_member_that_is_no_array(tmp_path, member):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for name in ("x_train", "y_train", "x_test", "y_test"):
            with io.BytesIO() as file:
                np.save(file, np.zeros((2, 2, 2) if name.startswith("x") else 2, np.uint8))
                archive.writestr(f"{name}.npy", b"some text" if name == member else file.getvalue())
    refused(ValueError, f"a.npz: {member}: found 9 bytes", load_dataset, str(tmp_path / "a.npz"))


@pytest.mark.parametrize("bullet", [False, True])
def test_numbers_of_samples_may_be_of_any_integer_type(bullet):
    x, y = small_models.batch(4)
    for dtype in (torch.uint8, torch.int32):
        numbers = torch.arange(4, dtype=dtype)
        pgd_loss(small_models.build(), x, y, None, bullet=BulletTrain() if bullet else None, samples=numbers)


def test_a_sparse_loss_is_refused_before_the_step():
    layer = torch.nn.Linear(2, 2)
    guard = Guard(torch.optim.SGD(layer.parameters()))
    with guard.minibatch(), pytest.raises(TypeError, match="loss must be a floating-point tensor"):
        guard.step(torch.zeros(1).to_sparse())


def test_a_model_that_is_none_is_named_with_normalised_images_too():
    x, y = small_models.batch(4)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got float"):
        pgd_loss(3.0, x, y, None, normalization=Normalization([0.0], [1.0]))


@pytest.mark.parametrize("policy", [None, "three_groups", "gaussian"])
@pytest.mark.parametrize("loss_of", [trades_loss, mart_loss, pgd_loss])
def test_sizes_may_be_fractions(loss_of, policy):
    x, y = small_models.batch(4)
    fractional, floating = (
        loss_of(
            small_models.build(),
            x,
            y,
            None,
            size,
            2 * size,
            bullet=BulletTrain(policy=policy) if policy else None,
            generator=torch.Generator(),
        )
        for size in (Fraction(1, 64), 1 / 64)
    )
    assert torch.equal(fractional, floating)


@pytest.mark.parametrize("device", [torch.tensor(1), torch.tensor([0.5])])
def test_a_tensor_is_no_device(device):
    refused(TypeError, "devices must be", PowerMonitor, device)
