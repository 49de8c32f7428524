"""Mixup and CutMix, as torchvision's v2 transforms make them: each image and label mixed with the one before it."""

import importlib

import torch
import torch.nn.functional as F
from published import package


def mixup(x, y, classes, share=0.7):
    """Images that are `share` their own, and float32 labels [m, K]."""
    return share * x + (1 - share) * x.roll(1, 0), mixed_labels(y, classes, share)


def cutmix(x, y, classes, seed=0):
    """Images with a box of the image before, and float32 labels [m, K] by the box's share of the area."""
    g = torch.Generator().manual_seed(seed)
    height, width = x.shape[-2:]
    side = 0.5 * (1.0 - torch.rand((), generator=g).item()) ** 0.5
    across, down = (int(torch.randint(n, (), generator=g)) for n in (width, height))
    left, right = max(across - int(side * width), 0), min(across + int(side * width), width)
    top, bottom = max(down - int(side * height), 0), min(down + int(side * height), height)
    x = x.clone()
    x[..., top:bottom, left:right] = x.roll(1, 0)[..., top:bottom, left:right]
    return x, mixed_labels(y, classes, 1.0 - (right - left) * (bottom - top) / (width * height))


def mixed_labels(y, classes, share):
    one_hot = F.one_hot(y, classes).float()
    return one_hot.roll(1, 0).mul_(1.0 - share).add_(one_hot.mul(share))


def of_torchvision(name):
    """The transform of torchvision, called as the functions here; None where it is not installed."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    package("torchvision")
    v2 = importlib.import_module("torchvision.transforms.v2")

    def mixed(x, y, classes, seed=0):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return getattr(v2, name)(num_classes=classes)(x, y)

    return mixed


MIXED = {"mixup": mixup, "cutmix": cutmix}
MIXED |= {f"torchvision's {name}": made for name in ("MixUp", "CutMix") if (made := of_torchvision(name))}
