import torch

from bt_fast.augment import crop
from bt_fast.lab.augment import PADDING, crop_and_flip
from bt_fast.lab.world import World


def test_every_result_is_a_crop_of_the_padded_image_or_of_its_mirror():
    x = torch.rand(12, 3, 8, 8)
    out, _ = crop_and_flip(x, seed=3, iteration=7)
    padded = torch.nn.functional.pad(x, [PADDING] * 4)
    for image, source in zip(out, padded, strict=True):
        windows = source.unfold(1, 8, 1).unfold(2, 8, 1).permute(1, 2, 0, 3, 4).reshape(-1, 3, 8, 8)
        candidates = torch.cat([windows, windows.flip(3)])
        assert (candidates == image).flatten(1).all(dim=1).any()


def test_its_pixels_are_those_of_the_placement_and_of_the_first_version():
    x = torch.rand(64, 3, 8, 6)
    out, placement = crop_and_flip(x, seed=3, iteration=7)
    assert torch.equal(crop(x, placement), out)
    assert torch.equal(first_version(x, seed=3, iteration=7), out)
    assert placement.mirrored.any()
    assert not placement.mirrored.all()


def first_version(x, seed, iteration):
    """Crops and mirrors with the random numbers of before there were placements, image by image."""
    m, _, height, width = x.shape
    generator = torch.Generator().manual_seed(seed * 1_000_003 + iteration)
    tops, lefts = torch.randint(2 * PADDING + 1, (2, m, 1), generator=generator)
    flips = torch.rand(m, 1, generator=generator) < 0.5
    padded = torch.nn.functional.pad(x, [PADDING] * 4)
    crops = [padded[k, :, tops[k] :, lefts[k] :][:, :height, :width] for k in range(m)]
    return torch.stack([crops[k].flip(2) if flips[k] else crops[k] for k in range(m)])


def test_it_depends_on_seed_and_iteration_alone():
    x = torch.rand(6, 1, 5, 5)
    torch.manual_seed(0)
    first, _ = crop_and_flip(x, seed=1, iteration=2)
    torch.rand(9)
    assert torch.equal(first, crop_and_flip(x, seed=1, iteration=2)[0])
    assert not torch.equal(first, crop_and_flip(x, seed=1, iteration=3)[0])
    assert not torch.equal(first, crop_and_flip(x, seed=2, iteration=2)[0])


def test_a_share_of_a_minibatch_is_augmented_as_in_the_whole_of_it():
    x = torch.rand(7, 3, 8, 8)
    whole, placement = crop_and_flip(x, seed=3, iteration=7)
    shares = [World(rank, 3).share(7) for rank in range(3)]
    parts = [crop_and_flip(share.own(x), seed=3, iteration=7, share=share) for share in shares]
    assert torch.equal(torch.cat([part for part, _ in parts]), whole)
    for name in ("top", "left", "mirrored"):
        assert torch.equal(torch.cat([getattr(own, name) for _, own in parts]), getattr(placement, name))
