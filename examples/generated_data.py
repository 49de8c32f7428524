"""Adversarial training on original and generated images (Wang et al., 2023, DM-Improves-AT), with BulletTrain.
Their attack runs on each batch's own statistics; for that leave mining out and write PGD(..., statistics="batch").

python examples/generated_data.py --generated 1m.npz  # as they publish it, beside CIFAR-10 by torchvision
"""

import argparse
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from bt_fast import PGD, BulletTrain, TRADESLoss, evaluate


class Residual(nn.Sequential):
    """Layers beside their input."""

    def forward(self, x: Tensor) -> Tensor:
        """[n, C, H, W] to the same."""
        out = x
        for layer in self:
            out = layer(out)
        return x + out


def convolution(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    """Batch norm of slow statistics, SiLU, and a convolution."""
    norm, convolve = nn.BatchNorm2d(inputs, momentum=0.01), nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return [norm, nn.SiLU(), convolve]


def residual_network(channels: int, classes: int, width: int, blocks: int) -> nn.Module:
    """Three stages of residual blocks, of `width`, twice, and four times as many channels."""
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1, bias=False)]
    for size in width, 2 * width, 4 * width:
        layers += [Residual(*convolution(size, size), *convolution(size, size)) for _ in range(blocks)]
        layers += convolution(size, 2 * size, stride=2)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, classes))


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


def cutmix(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The images [n, C, H, W] with a box of another's in each, and the labels [n, K] by the boxes' share."""
    height, width = x.shape[2:]
    side, other = float(torch.rand(()).sqrt()), torch.randperm(len(x), device=x.device)
    top, left = (int(torch.randint(size, ())) - round(size * side / 2) for size in (height, width))
    box = torch.zeros(height, width, dtype=torch.bool, device=x.device)
    box[max(top, 0) : top + round(height * side), max(left, 0) : left + round(width * side)] = True
    share = box.float().mean()
    return torch.where(box, x[other], x), (1 - share) * y + share * y[other]


def averaged(mean: Tensor, new: Tensor, updates: Tensor | int) -> Tensor:
    """The mean of a weight, over the last two hundred updates or so, over fewer in the beginning."""
    return torch.lerp(new, mean, min(0.995, float((1 + updates) / (10 + updates))))


def main(argv: list[str] | None = None) -> tuple[float, float]:
    """Train, and return the accuracy of the averaged weights, clean and under PGD-40 on the margin."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generated", required=True, help="an npz file with `image` and `label`")
    parser.add_argument("--share", type=float, default=0.7, help="of generated images in a minibatch")
    parser.add_argument("--data", help="an npz file in place of CIFAR-10")
    parser.add_argument("--images", type=int, help="take the first so many")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for option, default in ("epochs", 400), ("batch-size", 512), ("width", 160), ("blocks", 4):
        parser.add_argument(f"--{option}", type=int, default=default)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    x, y, x_test, y_test = load(args.data, args.images)
    classes, own, steps = int(y.max()) + 1, len(x), -(-len(x) // args.batch_size)
    with np.load(args.generated) as file:
        x = torch.cat([x, torch.as_tensor(file["image"]).permute(0, 3, 1, 2)])
        y = torch.cat([y, torch.as_tensor(file["label"]).long()])
    new = round(args.share * args.batch_size)  # generated images in a minibatch
    model = residual_network(x.shape[1], classes, args.width, args.blocks).to(args.device)
    average = AveragedModel(model, avg_fn=averaged)  # batch norm's buffers are the model's, as in the recipe
    attack = PGD(epsilon=8 / 255, step_size=2 / 255, steps=10, start="uniform", inner="cross_entropy")
    mining = BulletTrain()
    options: dict[str, Any] = {"label_smoothing": 0.1, "smoothing": "others", "clean_updates": 1}
    criterion = TRADESLoss(attack, beta=5.0, mining=mining, engine="fast", **options).to(args.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=args.epochs * steps)
    for epoch in range(args.epochs):
        for _ in range(steps):
            rows = torch.cat([torch.randint(own, (args.batch_size - new,)), torch.randint(own, len(x), (new,))])
            mixed = cutmix(x[rows].to(args.device) / 255, F.one_hot(y[rows], classes).float().to(args.device))
            optimizer.zero_grad()
            criterion(model, *mixed).backward()
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
        print(f"epoch {epoch + 1}: {mining.fractions}")
    test = zip((x_test / 255).to(args.device).split(500), y_test.to(args.device).split(500), strict=True)
    found = evaluate(average, test, PGD(epsilon=8 / 255, step_size=2 / 255, steps=40, inner="margin"), engine="fast")
    print(f"averaged weights: clean {found.clean:.2%}, PGD-40 {found.robust:.2%}")
    return found.clean, found.robust


if __name__ == "__main__":
    main()
