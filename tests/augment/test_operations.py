"""The nine operations equal Pillow's bit for bit: at all strengths, and on images that hypothesis draws."""

import platform

import pytest
import reference_augmix
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from pretended_device import DEVICE, pretended_device

from bt_fast.augment import affine, tables
from bt_fast.augment.operations import NONE, OPERATIONS, apply_operations

SHAPES = [(3, 32, 32), (1, 28, 28), (3, 7, 12), (1, 1, 1), (3, 40, 40)]
# a compiler that fuses multiplication and addition may round a value to another integer
FUSES = platform.machine() not in ("x86_64", "AMD64")


def pictures(n, shape, seed=0):
    """Returns images that are hard for histograms and edges: noise, few grey values, flat ones, ramps, extremes."""
    g = torch.Generator().manual_seed(seed)
    noise = torch.randint(256, (n, *shape), generator=g)
    offset, levels = torch.randint(256, (2, n, shape[0], 1, 1), generator=g)
    ramp = torch.arange(shape[1])[:, None] * 5 + torch.arange(shape[2]) * 3
    kinds = [
        noise,
        noise % (1 + levels % 9) * 20,
        offset.expand(noise.shape),
        (ramp + offset) % 256,
        noise // 8 + offset // 2,
        (noise > 250) * 255,
    ]
    kind = torch.arange(n) % len(kinds)
    images = torch.stack(kinds).gather(0, kind[None, :, None, None, None].expand(1, *noise.shape))[0]
    return images.clamp(0, 255).to(torch.uint8)


def by_pillow(images, change, *parameters):
    changed = [
        reference_augmix.from_pil(change(reference_augmix.to_pil(image), *(p[i].item() for p in parameters)))
        for i, image in enumerate(images)
    ]
    return torch.stack(changed) if changed else images


def assert_same_bits(ours, pillows, geometric=False):
    assert ours.dtype == torch.uint8
    if geometric and FUSES:
        assert (ours.int() - pillows.int()).abs().max() <= 1
    else:
        assert torch.equal(ours, pillows)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["autocontrast", "equalize"])
def test_operations_without_a_strength_are_pillows(name, shape):
    images = pictures(60, shape)
    ours = tables.apply_tables(images, getattr(tables, name)(images))
    assert_same_bits(ours, by_pillow(images, getattr(ImageOps, name)))


@pytest.mark.parametrize(("name", "strengths"), [("posterize", range(1, 9)), ("solarize", range(257))])
def test_every_strength_of_posterize_and_solarize_is_pillows(name, strengths):
    strengths = torch.tensor(strengths)
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(len(strengths), 3, 1, 1)
    ours = tables.apply_tables(images, getattr(tables, name)(images, strengths))
    assert_same_bits(ours, by_pillow(images, getattr(ImageOps, name), strengths))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_whole_degree_of_rotation_is_pillows(shape):
    degrees = torch.arange(-180, 181)
    images = pictures(len(degrees), shape)
    ours = affine.transform(images, affine.rotation(degrees.double(), *shape[1:]))
    pillows = by_pillow(images, lambda image, by: image.rotate(by, resample=Image.Resampling.BILINEAR), degrees)
    # for a right angle Pillow copies if the sides fit, which gives the same pixels
    assert_same_bits(ours, pillows, geometric=True)


def test_no_rotation_is_exactly_the_identity():
    assert affine.rotation(torch.zeros(1, dtype=torch.float64), 28, 31).tolist() == [[1, 0, 0, 0, 1, 0]]


quarters = st.integers(-8, 8).map(lambda k: k / 4)  # coordinates on edges and centres of pixels


def number(most):
    return st.floats(-most, most) | quarters


matrices = st.tuples(*[number(1.5), number(1.5), number(40)] * 2)


@example([(1.0, 0.0, 0.5, 0.0, 1.0, -0.5)], (3, 7, 12), 0)
@example([(1.0, 0.0, -0.5, 0.0, 1.0, 0.5)], (3, 7, 12), 0)
@settings(max_examples=60, deadline=None)
@given(st.lists(matrices, min_size=1, max_size=4), st.sampled_from(SHAPES), st.integers(0, 99))
def test_any_affine_map_is_pillows(rows, shape, seed):
    images = pictures(len(rows), shape, seed)
    ours = affine.transform(images, torch.tensor(rows, dtype=torch.float64))
    pillows = [reference_augmix.affine(reference_augmix.to_pil(i), row) for i, row in zip(images, rows, strict=True)]
    assert_same_bits(ours, torch.stack([reference_augmix.from_pil(i) for i in pillows]), geometric=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_the_authors_at_every_level_and_sign(name, shape):
    level = torch.linspace(0, 9.99, 101, dtype=torch.float64).repeat(2)
    negative = torch.arange(len(level)) >= 101
    images = pictures(len(level), shape)
    which = torch.full((len(level),), OPERATIONS.index(name))
    ours = apply_operations(images, which, level, negative)
    pillows = by_pillow(images, lambda i, *how: reference_augmix.operation(i, name, *how), level, negative)
    assert_same_bits(ours, pillows, geometric=True)


each = st.tuples(st.integers(NONE, len(OPERATIONS) - 1), st.floats(0, 9.99), st.booleans())


@settings(max_examples=60, deadline=None)
@given(st.lists(each, max_size=8), st.sampled_from(SHAPES), st.integers(0, 99))
def test_a_batch_of_mixed_operations_gives_each_image_its_own(chosen, shape, seed):
    images = pictures(len(chosen), shape, seed)
    which, level, negative = (
        torch.tensor([c[k] for c in chosen], dtype=dtype)
        for k, dtype in enumerate((torch.int64, torch.float64, torch.bool))
    )
    pillows = by_pillow(
        images,
        lambda image, k, *how: image if k == NONE else reference_augmix.operation(image, OPERATIONS[k], *how),
        which,
        level,
        negative,
    )
    assert_same_bits(apply_operations(images, which, level, negative), pillows, geometric=True)


def test_the_images_stay_as_they_are():
    images = pictures(9, (3, 8, 8))
    before = images.clone()
    apply_operations(images, torch.arange(9), torch.full((9,), 3.0, dtype=torch.float64), torch.arange(9) > 4)
    assert torch.equal(images, before)


def test_nothing_waits_for_the_device():
    with pretended_device() as reads:
        on_device = {"device": DEVICE}
        images = torch.empty(6, 3, 8, 8, dtype=torch.uint8, **on_device)
        which = torch.empty(6, dtype=torch.int64, **on_device)
        level = torch.empty(6, dtype=torch.float64, **on_device)
        out = apply_operations(images, which, level, torch.empty(6, dtype=torch.bool, **on_device))
    assert (out.shape, out.dtype, reads.started) == (images.shape, torch.uint8, 0)
