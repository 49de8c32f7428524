"""Robust embeddings without labels (FARE, Schlarmann et al., 2024): the image tower of a small CLIP learns to embed x',
which goes as far as it can from the embedding of x, where it used to embed x. Judged by captions, under PGD-20.

python examples/clip_embeddings.py  # CIFAR-10 by torchvision, into data/
python examples/clip_embeddings.py --data bt_fast/lab/mnist_subset.npz --images 1000 --width 16 --epochs 2
"""

import argparse
import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bt_fast import PGD, evaluate, perturb


def image_tower(channels: int, width: int) -> nn.Module:
    """Images [n, C, H, W] to embeddings [n, 4 width]."""
    layers: list[nn.Module] = []
    for inputs, outputs in (channels, width), (width, 2 * width), (2 * width, 4 * width):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.GroupNorm(4, outputs), nn.GELU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 4 * width))


class TextTower(nn.Module):
    """Captions to embeddings [n, 4 width]: a transformer over their first 32 bytes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, 4 * width), nn.Embedding(32, 4 * width)
        self.layer = nn.TransformerEncoderLayer(4 * width, nhead=4, dim_feedforward=8 * width, batch_first=True)

    def forward(self, captions: list[str]) -> Tensor:
        """[n, 4 width]."""
        codes = torch.tensor([list(caption.encode().ljust(32)[:32]) for caption in captions])
        outputs: Tensor = self.layer(self.bytes(codes.to(self.places.weight.device)) + self.places.weight)
        return outputs.mean(dim=1)


class ByCaptions(nn.Module):
    """An image tower as a classifier, by embeddings [K, d] of the classes' captions."""

    def __init__(self, tower: nn.Module, captions: Tensor) -> None:
        super().__init__()
        self.tower, self.captions = tower, captions

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, K], the cosines of the angles times 20."""
        return 20.0 * F.normalize(self.tower(x), dim=1) @ F.normalize(self.captions, dim=1).T


def away_from(original: Tensor) -> Callable[[Tensor, Any], Tensor]:
    """The attack's inner loss: the squared distance of each embedding from its sample's original one."""
    return lambda embeddings, rows: (embeddings - original[rows.labels]).square().sum(dim=1)


def load(path: str | None, first: int | None) -> list[Tensor]:
    """Training images uint8 [n, C, H, W] and labels int64 [n], then those of the test."""
    if path is None:
        from torchvision.datasets import CIFAR10

        halves = [CIFAR10("data", train=train, download=True) for train in (True, False)]
        arrays = [np.asarray(array) for half in halves for array in (half.data, half.targets)]
    else:
        with np.load(path) as file:
            arrays = [file[name] for name in ("x_train", "y_train", "x_test", "y_test")]
    x, y, x_test, y_test = (torch.as_tensor(array[:first]) for array in arrays)
    x, x_test = (images.reshape(*images.shape[:3], -1).permute(0, 3, 1, 2) for images in (x, x_test))
    return [x, y.long(), x_test, y_test.long()]


def main(argv: list[str] | None = None) -> tuple[float, float]:
    """Train, and return the accuracy by captions under PGD, of the original tower and of the robust one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="an npz file in place of CIFAR-10")
    parser.add_argument("--images", type=int, help="take the first so many")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for option, default in ("epochs", 10), ("batch-size", 128), ("width", 64):
        parser.add_argument(f"--{option}", type=int, default=default)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    x, y, x_test, y_test = load(args.data, args.images)
    captions = [f"an image of class number {k}" for k in range(int(y.max()) + 1)]
    tower, texts = image_tower(x.shape[1], args.width).to(args.device), TextTower(args.width).to(args.device)
    optimizer = torch.optim.AdamW([*tower.parameters(), *texts.parameters()], lr=1e-3)
    for _ in range(args.epochs):  # first both towers, clean
        for rows in torch.randperm(len(x)).split(args.batch_size):
            optimizer.zero_grad()
            logits = ByCaptions(tower, texts(captions))(x[rows].to(args.device) / 255)
            F.cross_entropy(logits, y[rows].to(args.device)).backward()
            optimizer.step()
    robust = copy.deepcopy(tower)
    optimizer = torch.optim.AdamW(robust.parameters(), lr=1e-3, weight_decay=1e-4)
    for epoch in range(args.epochs):  # then the image tower alone, without labels
        for rows in torch.randperm(len(x)).split(args.batch_size):
            images = x[rows].to(args.device) / 255
            original = tower(images).detach()
            attack = PGD(epsilon=4 / 255, step_size=1 / 255, steps=10, start="uniform", inner=away_from(original))
            x_adv = perturb(robust, images, torch.arange(len(images), device=args.device), attack, engine="fast")
            optimizer.zero_grad()
            loss = (robust(x_adv) - original).square().sum(dim=1).mean()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: mean squared distance {loss:.3f}")
    test = list(zip((x_test / 255).to(args.device).split(500), y_test.to(args.device).split(500), strict=True))
    embedded = texts.eval()(captions).detach()
    attack = PGD(epsilon=4 / 255, step_size=1 / 255, steps=20)
    before, after = (evaluate(ByCaptions(images, embedded), test, attack, engine="fast") for images in (tower, robust))
    print(f"clean {before.clean:.2%} before, {after.clean:.2%} after; PGD-20 {before.robust:.2%}, {after.robust:.2%}")
    return before.robust, after.robust


if __name__ == "__main__":
    main()
