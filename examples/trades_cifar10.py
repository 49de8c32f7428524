"""TRADES with BulletTrain on CIFAR-10: the authors' network and settings, judged by PGD-20 at the end.

python examples/trades_cifar10.py  # CIFAR-10 by torchvision, into data/
python examples/trades_cifar10.py --data bt_fast/lab/mnist_subset.npz --depth 10 --width 1 --epochs 2 --images 1000
"""

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bt_fast import PGD, BulletTrain, TRADESLoss, evaluate


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


def wide_resnet(depth: int, width: int, channels: int, classes: int) -> nn.Module:
    """WRN-depth-width."""
    sizes = [16, 16 * width, 32 * width, 64 * width]
    blocks: list[nn.Module] = [nn.Conv2d(channels, 16, 3, padding=1, bias=False)]
    for stage in range(3):
        blocks.append(Block(sizes[stage], sizes[stage + 1], stride=1 if stage == 0 else 2))
        blocks += [Block(sizes[stage + 1], sizes[stage + 1], stride=1) for _ in range((depth - 4) // 6 - 1)]
    head = nn.BatchNorm2d(sizes[3]), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(sizes[3], classes)
    return nn.Sequential(*blocks, *head)


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


def save(content: dict[str, Any], path: Path) -> None:
    """Replace the file as a whole: a run that is killed leaves the old one or the new one."""
    with (part := path.with_name(f"{path.name}.part")).open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def main(argv: list[str] | None = None) -> tuple[float, float]:
    """Train, from the checkpoint on where there is one; return the accuracy, clean and under PGD-20."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="an npz file in place of CIFAR-10")
    parser.add_argument("--images", type=int, help="take the first so many")
    parser.add_argument("--checkpoint", type=Path, default=Path("trades.pt"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for option, default in ("epochs", 76), ("batch-size", 128), ("depth", 34), ("width", 10):
        parser.add_argument(f"--{option}", type=int, default=default)
    args = parser.parse_args(argv)
    x, y, x_test, y_test = load(args.data, args.images)
    torch.manual_seed(0)
    model = wide_resnet(args.depth, args.width, x.shape[1], int(y.max()) + 1).to(args.device)
    attack, mining = PGD(epsilon=8 / 255, step_size=2 / 255, steps=10), BulletTrain()
    criterion = TRADESLoss(attack, beta=6.0, mining=mining, engine="fast").to(args.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[75, 90])
    parts: dict[str, Any] = {"model": model, "mining": mining, "optimizer": optimizer, "schedule": schedule}
    if args.checkpoint.exists():
        for name, state in torch.load(args.checkpoint, map_location=args.device).items():
            parts[name].load_state_dict(state)
    for epoch in range(schedule.last_epoch, args.epochs):
        torch.manual_seed(epoch + 1)
        for rows in torch.randperm(len(x)).split(args.batch_size):
            optimizer.zero_grad()
            criterion(model, augment(x[rows].to(args.device) / 255), y[rows].to(args.device)).backward()
            optimizer.step()
        schedule.step()
        save({name: part.state_dict() for name, part in parts.items()}, args.checkpoint)
        print(f"epoch {epoch + 1}: {mining.fractions}")
    test = zip((x_test / 255).to(args.device).split(500), y_test.to(args.device).split(500), strict=True)
    found = evaluate(model, test, PGD(epsilon=8 / 255, step_size=2 / 255, steps=20), engine="fast")
    print(f"clean {found.clean:.2%}, PGD-20 {found.robust:.2%}")
    return found.clean, found.robust


if __name__ == "__main__":
    main()
