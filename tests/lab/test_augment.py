import torch

from bt_fast.lab.augment import PADDING, crop_and_flip
from bt_fast.lab.world import World


def test_every_result_is_a_crop_of_the_padded_image_or_of_its_mirror():
    x = torch.rand(12, 3, 8, 8)
    out = crop_and_flip(x, seed=3, iteration=7)
    padded = torch.nn.functional.pad(x, [PADDING] * 4)
    for image, source in zip(out, padded, strict=True):
        windows = source.unfold(1, 8, 1).unfold(2, 8, 1).permute(1, 2, 0, 3, 4).reshape(-1, 3, 8, 8)
        candidates = torch.cat([windows, windows.flip(3)])
        assert (candidates == image).flatten(1).all(dim=1).any()


def test_it_depends_on_seed_and_iteration_alone():
    x = torch.rand(6, 1, 5, 5)
    torch.manual_seed(0)
    first = crop_and_flip(x, seed=1, iteration=2)
    torch.rand(9)
    assert torch.equal(first, crop_and_flip(x, seed=1, iteration=2))
    assert not torch.equal(first, crop_and_flip(x, seed=1, iteration=3))
    assert not torch.equal(first, crop_and_flip(x, seed=2, iteration=2))


def test_a_share_of_a_minibatch_is_augmented_as_in_the_whole_of_it():
    x = torch.rand(7, 3, 8, 8)
    whole = crop_and_flip(x, seed=3, iteration=7)
    shares = [World(rank, 3).share(7) for rank in range(3)]
    parts = [crop_and_flip(share.own(x), seed=3, iteration=7, share=share) for share in shares]
    assert torch.equal(torch.cat(parts), whole)
