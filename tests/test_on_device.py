"""`on_device` gives the function on the other device the same arguments, with the same memory layout."""

import divergence_cases
import pytest
import rows_cases
import torch
from on_device import memory, on_device


def seen_there(*values):
    """Returns these arguments as a function on the other device receives them."""
    seen = []
    on_device(lambda *there: seen.extend(there), "cpu")(*values)
    assert not {memory(v).data_ptr() for v in seen} & {memory(v).data_ptr() for v in values}
    return seen


@pytest.mark.parametrize("layout", rows_cases.LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_lie_there_as_they_lie_here(layout, dtype):
    here, _ = rows_cases.batch(7, 10, dtype, 0, layout=layout)
    (there,) = seen_there(here)
    assert (there.shape, there.stride(), there.dtype) == (here.shape, here.stride(), here.dtype)
    assert torch.equal(memory(there), memory(here))  # also between the rows


@pytest.mark.parametrize("strides", ["rows", "apart", "columns", "one"])
def test_a_loss_s_logits_lie_there_as_they_lie_here(strides):
    given = divergence_cases.case("trades_kl", 5, 9, torch.float32, 0, strides=strides).arguments
    for here, there in zip(given, seen_there(*given), strict=True):
        assert there.stride() == here.stride()
        assert torch.equal(there, here)


def test_channels_last_images_and_an_offset_are_kept():
    images = torch.rand(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    there = seen_there(images, images[1:, :, 2:])
    assert there[0].is_contiguous(memory_format=torch.channels_last)
    assert (there[1].storage_offset(), there[1].stride()) == (images[1:, :, 2:].storage_offset(), images.stride())
    assert memory(there[0]).data_ptr() == memory(there[1]).data_ptr()


def test_what_is_changed_there_is_changed_here_between_rows_too():
    wide = torch.zeros(3, 6)
    rows, one = wide[:, :4], torch.zeros(1).expand(5)
    on_device(lambda a, b, *, c: (a.add_(1), b[:1].add_(2), c.fill_(3)), "cpu")(rows, one, c=wide[0, 5:])
    assert wide.tolist() == [[1, 1, 1, 1, 0, 3]] + [[1, 1, 1, 1, 0, 0]] * 2
    assert one.tolist() == [2] * 5
