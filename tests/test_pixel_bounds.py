"""Every public call moves pixels a few ulps out of bounds onto the bounds, and reports others."""

import math
import re

import numpy as np
import pytest
import torch
from small_models import assert_unchanged, batch, build, snapshot
from tolerances import NORMALISED, assert_near

from bt_fast import (
    Normalization,
    Plan,
    ThreatModel,
    faults,
    generate,
    mart_loss,
    pgd_loss,
    trades_loss,
)
from bt_fast.evaluation import evaluate
from bt_fast.lab.data import load_dataset
from tests.public_calls import CALLS

THREAT = ThreatModel(0.03)
LOOKING = [
    name for name in CALLS if re.match(r"(trades|mart|pgd|augmix|fast|yopo)_loss|grad_align|evaluate|autoattack", name)
]
EACH = pytest.mark.parametrize("call", [CALLS[name] for name in LOOKING], ids=LOOKING)


def reported(dtype):
    """Returns images below 0 and above 1 by rounding, as after undoing a normalisation, and the intended images."""
    x, y = batch(dtype=dtype)
    eps = torch.finfo(dtype).eps if dtype != torch.float64 else torch.finfo(torch.float32).eps
    rounded = torch.where(x == 0, -0.25 * eps, torch.where(x == 1, 1 + 2 * eps, x))
    assert rounded.min() < 0
    assert rounded.max() > 1
    return rounded, x, y


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_rounding_left_outside_is_moved_onto_the_bounds(call, dtype):
    rounded, meant, y = reported(dtype)
    given = rounded.clone()
    result = call(build("conv_bn", dtype=dtype), rounded, y)
    expected = call(build("conv_bn", dtype=dtype), meant, y)
    assert torch.equal(result, expected)
    assert torch.equal(rounded, given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_so_it_is_in_16_bits(dtype):
    rounded, meant, y = reported(dtype)
    for loss in (trades_loss, pgd_loss, mart_loss):
        torch.manual_seed(0)
        result = loss(build("instance norm", dtype=dtype), rounded, y, None)
        torch.manual_seed(0)
        assert torch.equal(result, loss(build("instance norm", dtype=dtype), meant, y, None))


def test_the_arithmetic_of_the_report():
    """Subtracts and divides by mean and deviation in float32, then undoes it."""
    img, y = batch(64, dtype=torch.float32)
    mean, std = 0.4914, 0.2435
    x = (img - mean) / std * std + mean
    assert not ((x >= 0) & (x <= 1)).all()
    assert_near(
        trades_loss(build("conv_bn", dtype=torch.float32), x, y, None, generator=torch.Generator().manual_seed(0)),
        trades_loss(build("conv_bn", dtype=torch.float32), img, y, None, generator=torch.Generator().manual_seed(0)),
        NORMALISED,
    )


def test_generate_gives_images_within_the_bounds():
    rounded, _, y = reported(torch.float32)
    schedule = Plan.from_steps(torch.full((8,), 2), torch.full((8,), 0.02))
    target = torch.nn.functional.one_hot(y, 5).float()
    x_adv = generate(build("conv_bn", dtype=torch.float32), rounded, rounded, target, schedule, THREAT)
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


WRONG = {
    "a little too bright": (lambda x: x * 1.001, r"its values are from 0 to 1\.001: .*\.clamp\(0, 1\)"),
    "bytes": (lambda x: x * 255, r"its values are from 0 to 255: .*Divide them by 255"),
    "normalised": (lambda x: (x - 0.5) / 0.25, r"its values are from -2 to 2: .*normalization=Normalization"),
    "one NaN": (lambda x: x.clone().index_fill_(0, torch.tensor(0), math.nan), r"36 of 288 pixels are NaN: .*0"),
    "infinite": (
        lambda x: x / x.clone().index_fill_(0, torch.tensor(0), 0),
        r"\d+ of 288 pixels are (NaN|infinite): .*0",
    ),
}


@EACH
@pytest.mark.parametrize(("spoilt", "message"), WRONG.values(), ids=WRONG)
def test_other_values_are_reported_with_their_range_and_what_to_do(call, spoilt, message):
    x, y = batch(dtype=torch.float32)
    model = build("conv_bn", dtype=torch.float32)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"(x_natural|the images|x) must lie in \[0, 1\], but " + message):
        call(model, spoilt(x), y)
    assert_unchanged(before, model)


def test_infinity_is_not_reported_as_nan():
    x = torch.zeros(2, 3)
    x[1] = math.inf
    with pytest.raises(ValueError, match="but 3 of 6 pixels are infinite"):
        faults.read([faults.pixels_outside(x, 0.0, 1.0, "x")]).wait()


def test_the_bounds_are_those_of_the_threat():
    model, (x, y) = build("conv_bn", dtype=torch.float32), batch(dtype=torch.float32)
    threat = ThreatModel(8.0, lower=0.0, upper=255.0)
    beyond = torch.where(x == 1, 255.0 + 4e-5, 255 * x)
    result = [
        evaluate(model, [(images, y)], threat, steps=2, generator=torch.Generator().manual_seed(0)).step
        for images in (beyond, 255 * x)
    ]
    assert torch.equal(*result)
    with pytest.raises(ValueError, match=r"must lie in \[0, 255\], but its values are from 0 to 255\.255: "):
        evaluate(model, [(255.255 * x, y)], threat)


def test_normalised_images_are_moved_as_pixels():
    x, y = batch()
    normalization = Normalization([0.4], [0.2])
    shifted = (torch.where(x == 1, 1 + 2e-7, x) - 0.4) / 0.2
    result, expected = (
        pgd_loss(build(), images, y, None, normalization=normalization, generator=torch.Generator().manual_seed(0))
        for images in (shifted, (x - 0.4) / 0.2)
    )
    assert_near(result, expected)


def test_floats_of_a_file_too(tmp_path):
    x = np.linspace(0, 255, 4 * 16 * 16).round().reshape(4, 16, 16).astype(np.float32) / 255
    arrays = {"x_train": x, "x_test": x, "y_train": np.arange(4), "y_test": np.arange(4)}
    np.savez(tmp_path / "meant.npz", **arrays)
    np.savez(tmp_path / "rounded.npz", **arrays | {"x_train": np.where(x == 0, -3e-8, np.where(x == 1, 1 + 2e-7, x))})
    meant, rounded = (load_dataset(str(tmp_path / f"{name}.npz")) for name in ("meant", "rounded"))
    assert torch.equal(meant.x_train, rounded.x_train)
    np.savez(tmp_path / "spoilt.npz", **arrays | {"x_train": x * 1.01})
    with pytest.raises(ValueError, match=r"x_train: found floats from 0 to 1\.01, expected \[0, 1\]; divide"):
        load_dataset(str(tmp_path / "spoilt.npz"))
