"""Crops and flips that say where each crop lies: held against slices of the padded image, one image at a time."""

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bt_fast import Placement
from bt_fast.augment import CropAndFlip, crop

MANY = 2048
quick = settings(max_examples=60, deadline=None)


def plain_crop(image, top, left, mirrored, border=16):
    """The crop of one image [C, H, W] as a slice of it with a wide black border."""
    _, height, width = image.shape
    padded = F.pad(image, [border] * 4)
    shown = padded[:, border + top : border + top + height, border + left : border + left + width]
    return shown.flip(2) if mirrored else shown


def plain_crops(x, placement):
    places = zip(placement.top.tolist(), placement.left.tolist(), placement.mirrored.tolist(), strict=True)
    return torch.stack([plain_crop(image, *place) for image, place in zip(x, places, strict=True)])


def placement(*places):
    top, left, mirrored = zip(*places, strict=True)
    return Placement(torch.tensor(top), torch.tensor(left), torch.tensor(mirrored))


@quick
@given(
    st.lists(st.tuples(st.integers(-4, 4), st.integers(-2, 2), st.booleans()), min_size=1, max_size=5),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.uint8]),
    st.sampled_from([1, 3]),
)
def test_a_crop_is_a_slice_of_the_padded_image(places, dtype, channels):
    x = torch.arange(1, 1 + len(places) * channels * 15).view(-1, channels, 5, 3).to(dtype)
    at = placement(*places)
    out = crop(x, at)
    assert out.dtype == dtype
    assert torch.equal(out, plain_crops(x, at))


def test_a_crop_is_made_first_and_then_mirrored():
    x = torch.tensor([[[[1.0, 2.0, 3.0]]]])
    assert crop(x, placement((0, 1, True))).tolist() == [[[[0.0, 3.0, 2.0]]]]


@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("flip", [False, True])
def test_the_placement_is_the_one_that_made_the_crops(padding, flip):
    x = torch.rand(32, 3, 6, 5)
    out, at = CropAndFlip(padding, flip)(x)
    assert torch.equal(out, plain_crops(x, at))
    assert out.is_contiguous()


def test_corners_are_uniform_and_half_of_the_crops_are_mirrored():
    at = CropAndFlip(padding=2).draw(MANY, torch.device("cpu"), torch.Generator().manual_seed(0))
    assert at.top.dtype == at.left.dtype == torch.int64
    for corner in (at.top, at.left):
        shares = torch.bincount(corner + 2, minlength=5) / MANY
        assert len(shares) == 5
        assert (shares - 1 / 5).abs().max() < 5 * (0.16 / MANY) ** 0.5
    assert abs(at.mirrored.double().mean() - 0.5) < 5 * (0.25 / MANY) ** 0.5
    assert abs(torch.corrcoef(torch.stack([at.top, at.left, at.mirrored]).double()).triu(1)).max() < 5 / MANY**0.5


def test_digits_are_not_mirrored_and_without_padding_nothing_is_cropped():
    x = torch.rand(16, 1, 6, 5)
    assert not CropAndFlip(flip=False).draw(16, x.device).mirrored.any()
    assert torch.equal(CropAndFlip(padding=0, flip=False)(x)[0], x)


def test_a_generator_repeats_its_crops_and_leaves_the_default_one():
    x, before = torch.rand(16, 1, 6, 5), torch.get_rng_state()
    first, second = (CropAndFlip()(x, torch.Generator().manual_seed(3))[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


def test_gradients_reach_the_pixels_that_are_shown():
    x = torch.rand(1, 1, 3, 3, requires_grad=True)
    crop(x, placement((1, -1, False))).sum().backward()
    assert x.grad[0, 0].tolist() == [[0, 0, 0], [1, 1, 0], [1, 1, 0]]


def test_channels_last_and_empty_minibatches():
    x = torch.rand(4, 3, 6, 6)
    at = CropAndFlip().draw(4, x.device)
    assert torch.equal(crop(x.to(memory_format=torch.channels_last), at), crop(x, at))
    assert CropAndFlip()(x[:0])[0].shape == (0, 3, 6, 6)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"padding": -1}, ValueError, "padding must be at least 0, got -1"),
        ({"padding": 1.5}, TypeError, "padding must be an integer, got 1.5"),
        ({"flip": 0.5}, TypeError, "flip must be a bool, got float"),
    ],
)
def test_what_is_no_augmentation_is_an_error(given, error, message):
    with pytest.raises(error, match=message):
        CropAndFlip(**given)


X = torch.rand(2, 3, 6, 4)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([1.0], TypeError, "x must be a tensor of images, got list"),
        (X[0], ValueError, r"x must have shape \[m, C, H, W\] .* got \[3, 6, 4\]: of one image write x\[None\]"),
        (X[:, :0], ValueError, r"x must have shape .* got \[2, 0, 6, 4\]"),
        (X.to_sparse(), TypeError, "x must be a dense tensor of images, got torch.float32, torch.sparse_coo"),
        (X, ValueError, "padding must be less than the height and width of the images, got 4 for images of 6x4"),
    ],
)
def test_images_that_cannot_be_cropped_are_an_error_before_anything_is_drawn(x, error, message):
    before = torch.get_rng_state()
    with pytest.raises(error, match=message):
        CropAndFlip(padding=4)(x)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_placement_or_a_generator_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match=r"placement.top must have shape \[2\], got \[1\]"):
        crop(X, placement((0, 0, False)))
    with pytest.raises(ValueError, match="1 of 2 crops of 6x4 lie outside"):
        crop(X, placement((0, 0, False), (6, 0, False)))
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator or None, got int"):
        CropAndFlip(padding=1)(X, 3)


# The guide's loops, as printed

GUIDE = (Path(__file__).parents[2] / "docs" / "guide.md").read_text(encoding="utf-8")
BATCHED, BY_IMAGE = re.findall(r"```python\n(.*?)```", GUIDE.split("## Crops that say where they lie")[1], re.DOTALL)[
    :2
]
IMAGES = torch.rand(24, 3, 32, 32)


def torchvision_stand_in():
    """The functions of torchvision that the guide uses, for tensors."""

    def get_params(image, output_size):
        """Draws like torchvision's: a corner, uniformly among those with the crop inside."""
        corner = [
            int(torch.randint(0, have - want + 1, ())) for have, want in zip(image.shape[1:], output_size, strict=True)
        ]
        return *corner, *output_size

    transforms = ModuleType("torchvision.transforms")
    transforms.RandomCrop = SimpleNamespace(get_params=get_params)
    transforms.functional = SimpleNamespace(
        pad=lambda image, border: F.pad(image, [border] * 4),
        crop=lambda image, top, left, height, width: image[:, top : top + height, left : left + width],
        hflip=lambda image: image.flip(2),
        to_tensor=lambda image: image,
    )
    return {"torchvision": ModuleType("torchvision"), "torchvision.transforms": transforms}


def test_the_guides_loader_gives_the_placement_of_each_image():
    """`images` are a data set of (image, label), as torchvision's are."""
    seen = []
    names = {"images": [(image, k % 10) for k, image in enumerate(IMAGES)], "device": "cpu"}
    script = BY_IMAGE + "    seen(x, placement, y, indices)\n"
    with mock.patch.dict(sys.modules, torchvision_stand_in()):
        exec(script, names | {"seen": lambda *batch: seen.append(batch)})
    for x, at, y, indices in seen:
        assert torch.equal(crop(IMAGES[indices], at), x)
        assert torch.equal(y, indices % 10)
    assert torch.cat([indices for *_, indices in seen]).sort().values.tolist() == list(range(len(IMAGES)))


def test_the_guides_batched_loop_gives_the_placement_of_each_image():
    seen, names = [], {"loader": [(IMAGES, torch.zeros(24))], "device": "cpu"}
    exec(BATCHED + "    seen(x, placement)\n", names | {"seen": lambda *batch: seen.append(batch)})
    ((x, at),) = seen
    assert torch.equal(crop(IMAGES, at), x)
