from dataclasses import replace

import pytest
import torch

from bt_fast import Placement
from bt_fast.placement import check_placement

CPU = torch.device("cpu")


def placement(top=(0, -1), left=(1, 2), mirrored=(False, True)):
    return Placement(torch.tensor(top), torch.tensor(left), torch.tensor(mirrored))


def check(given, m=2, crop=(3, 4, 5), own=(3, 6, 7)):
    return check_placement(given, m, crop, own, CPU)


def test_a_placement_that_fits_passes():
    assert check(placement()).count == 0
    assert check(replace(placement(), top=torch.tensor([0, 1], dtype=torch.int32))).count == 0


@pytest.mark.parametrize(("top", "left"), [((-4, 0), (0, 0)), ((6, 0), (0, 0)), ((0, 0), (0, -5)), ((0, 0), (7, 0))])
def test_a_crop_that_shows_nothing_of_its_image_is_an_error(top, left):
    with pytest.raises(ValueError, match=r"^placement must show a part of each image, but 1 of 2 crops of 4x5 lie"):
        check(placement(top, left))
    nearer = [[min(max(v, 1 - size), own - 1) for v in t] for t, size, own in ((top, 4, 6), (left, 5, 7))]
    check(placement(*nearer))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"top": [0, 1]}, TypeError, r"^placement.top must be a tensor of integers, got list"),
        ({"left": torch.rand(2)}, TypeError, r"^placement.left must be a tensor of integers, got torch.float32"),
        (
            {"mirrored": torch.tensor([0, 1])},
            TypeError,
            r"^placement.mirrored must be a tensor of bools, got torch.int",
        ),
        ({"top": torch.tensor([0])}, ValueError, r"^placement.top must have shape \[2\], got \[1\]"),
        ({"left": torch.zeros(2, device="meta").long()}, ValueError, r"^placement.left must be on cpu like the images"),
    ],
)
def test_a_field_that_does_not_fit_is_an_error(changed, error, message):
    with pytest.raises(error, match=message):
        check(replace(placement(), **changed))


def test_something_else_is_an_error():
    with pytest.raises(TypeError, match=r"^placement must be a Placement, got tuple"):
        check((0, 0, False))


@pytest.mark.parametrize(("crop", "own"), [((4,), (4,)), ((3, 4, 5), (6, 7)), ((3, 4, 5), (1, 6, 7))])
def test_images_that_have_no_such_frames_are_an_error(crop, own):
    with pytest.raises(ValueError, match=r"^placement must be of images \[..., height, width\]"):
        check(placement(), crop=crop, own=own)
