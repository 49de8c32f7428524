"""TRADES-AWP (Wu et al., 2020) on CIFAR-10 with BulletTrain: the weights are perturbed, too, after a warm-up.

python examples/trades_awp.py  # CIFAR-10 by torchvision, into data/
python examples/trades_awp.py --data bt_fast/lab/mnist_subset.npz --width 4 --images 1000 --epochs 3 --warmup 1
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bt_fast import AWP, PGD, BulletTrain, TRADESLoss, evaluate


class Block(nn.Module):
    """Batch norm, ReLU and convolution, twice, beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[n, inputs, H, W] to [n, outputs, H / stride, W / stride]."""
        before = F.relu(self.norm1(x))
        out: Tensor = self.conv2(F.relu(self.norm2(self.conv1(before))))
        return out + (x if self.shortcut is None else self.shortcut(before))


def preact_resnet18(channels: int, classes: int, width: int) -> nn.Module:
    """PreActResNet-18, of `width` 64, 128, 256 and 512 channels."""
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1, bias=False), Block(width, width, 1)]
    layers.append(Block(width, width, 1))
    for inputs in width, 2 * width, 4 * width:
        layers += [Block(inputs, 2 * inputs, stride=2), Block(2 * inputs, 2 * inputs, stride=1)]
    head = nn.BatchNorm2d(8 * width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, classes)
    return nn.Sequential(*layers, *head)


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


def main(argv: list[str] | None = None) -> tuple[float, float]:
    """Train, and return the accuracy, clean and under PGD-20."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="an npz file in place of CIFAR-10")
    parser.add_argument("--images", type=int, help="take the first so many")
    parser.add_argument("--gamma", type=float, default=5e-3, help="the length of a weight's move, by its norm")
    parser.add_argument("--warmup", type=int, default=10, help="epochs without perturbed weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for option, default in ("epochs", 200), ("batch-size", 128), ("width", 64):
        parser.add_argument(f"--{option}", type=int, default=default)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    x, y, x_test, y_test = load(args.data, args.images)
    model = preact_resnet18(x.shape[1], int(y.max()) + 1, args.width).to(args.device)
    attack, mining = PGD(epsilon=8 / 255, step_size=2 / 255, steps=10), BulletTrain()
    criterion = TRADESLoss(attack, beta=6.0, mining=mining, engine="fast").to(args.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[100, 150])
    awp = AWP(model)
    for epoch in range(args.epochs):
        awp.gamma = args.gamma if epoch >= args.warmup else 0.0
        for rows in torch.randperm(len(x)).split(args.batch_size):
            optimizer.zero_grad()
            images, labels = augment(x[rows].to(args.device) / 255), y[rows].to(args.device)
            with awp(criterion, images, labels) as loss:  # the weights are back after the block
                loss.backward()
                optimizer.step()
        schedule.step()
        print(f"epoch {epoch + 1}: loss {loss:.3f}, {mining.fractions}")
    test = zip((x_test / 255).to(args.device).split(500), y_test.to(args.device).split(500), strict=True)
    found = evaluate(model, test, PGD(epsilon=8 / 255, step_size=2 / 255, steps=20), engine="fast")
    print(f"clean {found.clean:.2%}, PGD-20 {found.robust:.2%}")
    return found.clean, found.robust


if __name__ == "__main__":
    main()
