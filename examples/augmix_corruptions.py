"""AugMix with BulletTrain: training that withstands common corruptions, judged by them; the authors' settings.

python examples/augmix_corruptions.py --corruptions CIFAR-10-C  # CIFAR-10 by torchvision, into data/
python examples/augmix_corruptions.py --data bt_fast/lab/mnist_subset.npz --epochs 2 --images 1000 --width 16
"""

import argparse
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bt_fast import AugMixLoss, BulletTrain, Normalize


def corruptions(x: Tensor, severity: int) -> dict[str, Tensor]:
    """Four of the corruptions of images [n, C, H, W] in [0, 1], at a severity of 1 to 5 as in CIFAR-10-C."""
    noise = (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1] * torch.randn(x.shape)
    mean, contrast = x.mean(dim=(2, 3), keepdim=True), (0.75, 0.50, 0.40, 0.30, 0.15)[severity - 1]
    box = (3, 3, 5, 5, 7)[severity - 1]
    return {
        "gaussian_noise": (x + noise).clamp(0, 1),
        "brightness": (x + (0.05, 0.10, 0.15, 0.20, 0.30)[severity - 1]).clamp(0, 1),
        "contrast": mean + contrast * (x - mean),
        "box_blur": F.avg_pool2d(F.pad(x, [box // 2] * 4, mode="reflect"), box, stride=1),
    }


def corrupted(x: Tensor, y: Tensor, folder: Path | None) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, images in [0, 1] and labels: of test images corrupted here, or of a folder in the layout of CIFAR-10-C."""
    for severity in range(1, 6):
        if folder is None:
            yield from ((name, images, y) for name, images in corruptions(x, severity).items())
            continue
        labels = torch.as_tensor(np.load(folder / "labels.npy")).long().chunk(5)[severity - 1]
        for path in sorted(set(folder.glob("*.npy")) - {folder / "labels.npy"}):
            images = torch.tensor(np.split(np.load(path, mmap_mode="r"), 5)[severity - 1])
            yield path.stem, images.permute(0, 3, 1, 2) / 255, labels


def all_conv(channels: int, classes: int, width: int) -> nn.Module:
    """The AugMix authors' all-convolutional network of `width` (theirs: 96) channels, which takes images in [0, 1]."""
    layers: list[nn.Module] = [Normalize([0.5] * channels, [0.5] * channels)]
    sizes = [channels, *[width] * 3, *[2 * width] * 6]
    for place, (inputs, outputs) in enumerate(pairwise(sizes)):
        stride, size = 2 if place in (2, 5) else 1, 3 if place < 7 else 1
        layers += [nn.Conv2d(inputs, outputs, size, stride, size // 2), nn.BatchNorm2d(outputs), nn.GELU()]
        layers.append(nn.Dropout(0.5 if stride == 2 else 0.0))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, classes))


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


def augment(x: Tensor) -> Tensor:
    """Random crops of the images [n, C, H, W], padded by 4 pixels, and flips."""
    (n, _, height, width), device = x.shape, x.device
    x = F.pad(torch.where(torch.rand(n, 1, 1, 1, device=device) < 0.5, x.flip(3), x), [4] * 4)
    rows = torch.randint(9, (n, 1, 1), device=device) + torch.arange(height, device=device)[:, None]
    columns = torch.randint(9, (n, 1, 1), device=device) + torch.arange(width, device=device)
    return x[torch.arange(n, device=device)[:, None, None], :, rows, columns].permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def error(model: nn.Module, x: Tensor, y: Tensor, device: str) -> float:
    """The share of the images that are misclassified."""
    classes = torch.cat([model.eval()(part.to(device)).argmax(dim=1) for part in x.split(500)])
    return float((classes.cpu() != y).float().mean())


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, and return the error under each corruption, the mean over five severities; "clean" is without any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="an npz file in place of CIFAR-10")
    parser.add_argument("--corruptions", type=Path, help="a folder in the layout of CIFAR-10-C")
    parser.add_argument("--images", type=int, help="take the first so many")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for option, default in ("epochs", 100), ("batch-size", 128), ("width", 96):
        parser.add_argument(f"--{option}", type=int, default=default)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    x, y, x_test, y_test = load(args.data, args.images)
    model = all_conv(x.shape[1], int(y.max()) + 1, args.width).to(args.device)
    criterion = AugMixLoss(mining := BulletTrain(1, 0, 0)).to(args.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs)
    for epoch in range(args.epochs):
        model.train()
        for rows in torch.randperm(len(x)).split(args.batch_size):
            optimizer.zero_grad()
            criterion(model, augment(x[rows].to(args.device) / 255), y[rows].to(args.device)).backward()
            optimizer.step()
        schedule.step()
        print(f"epoch {epoch + 1}: {mining.fractions}")
    errors = {"clean": error(model, x_test / 255, y_test, args.device)}
    for name, images, labels in corrupted(x_test / 255, y_test, args.corruptions):
        errors[name] = errors.get(name, 0.0) + error(model, images, labels, args.device) / 5
    print(", ".join(f"{name} {value:.1%}" for name, value in errors.items()))
    return errors


if __name__ == "__main__":
    main()
