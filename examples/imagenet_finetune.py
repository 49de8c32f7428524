"""Adversarial fine-tuning of a ConvNeXt on ImageNet by APGD of two steps from x (Singh et al., 2023), on GPUs or one.

torchrun --nproc-per-node 8 examples/imagenet_finetune.py --data imagenet  # a folder with train/ and val/
python examples/imagenet_finetune.py --data FILE.npz --model convnext_atto --batch-size 8 --epochs 1 --no-pretrained

FILE.npz holds x_train, y_train, x_test, y_test: uint8 [n, H, W, 3], integers. Needs torchvision; --model needs timm.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset
from torchvision import datasets, models
from torchvision.transforms import v2

from bt_fast import APGD, BulletTrain, Normalize, PGDLoss, evaluate

MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def load(path: Path, size: int) -> tuple[Any, Any, int]:
    """The images of the training and of the test, in [0, 1], and the number of classes."""
    if path.suffix == ".npz":
        with np.load(path) as file:
            x, y, x_test, y_test = (torch.as_tensor(file[name]) for name in ("x_train", "y_train", "x_test", "y_test"))
        train, test = ((x.permute(0, 3, 1, 2) / 255, y.long()) for x, y in ((x, y), (x_test, y_test)))
        return TensorDataset(*train), TensorDataset(*test), int(y.max()) + 1
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    crops = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()], [v2.Resize(size * 8 // 7), v2.CenterCrop(size)]
    halves = [
        datasets.ImageFolder(str(path / half), v2.Compose([*crop, *to_tensor]))
        for half, crop in zip(("train", "val"), crops, strict=True)
    ]
    return halves[0], halves[1], len(halves[0].classes)


def convnext(name: str, classes: int, pretrained: bool) -> nn.Module:
    """timm's network of that name, torchvision's ConvNeXt-T without timm; it takes images in [0, 1]."""
    try:
        import timm

        network = timm.create_model(name, pretrained=pretrained, num_classes=classes)
    except ImportError:
        network = models.convnext_tiny(weights="DEFAULT" if pretrained else None)
        network.classifier[2] = nn.Linear(768, classes)
    return nn.Sequential(Normalize(MEAN, DEVIATION), network)


def main(argv: list[str] | None = None) -> tuple[float, float]:
    """Train, and return the accuracy of the averaged weights, clean and under APGD-20."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="convnext_tiny.fb_in1k")
    parser.add_argument("--pretrained", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--mining", action="store_true", help="BulletTrain: one step for robust samples, outliers none")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for option, default in ("epochs", 50), ("batch-size", 64), ("size", 224), ("workers", 8):
        parser.add_argument(f"--{option}", type=int, default=default)
    args = parser.parse_args(argv)
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # as torchrun sets them
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if args.device == "cuda" else args.device)
    if ranks > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(rank)
    train, test, classes = load(args.data, args.size)
    layout: dict[str, Any] = {"memory_format": torch.channels_last}  # which torch's own types leave out
    network = convnext(args.model, classes, args.pretrained).to(device, **layout)
    model = DistributedDataParallel(network) if ranks > 1 else network
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=True)
    mining = BulletTrain(2, 1, 0, process_group=dist.group.WORLD if ranks > 1 else None) if args.mining else None
    attack = APGD(epsilon=4 / 255, steps=2, start="clean")
    criterion = PGDLoss(attack, mining=mining, engine="bf16", label_smoothing=0.1).to(device)
    mix = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=classes), v2.CutMix(alpha=1.0, num_classes=classes)])
    sampler: DistributedSampler[int] = DistributedSampler(train, ranks, rank)
    batches = DataLoader(train, args.batch_size, sampler=sampler, num_workers=args.workers, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.05)
    steps = args.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=steps, pct_start=0.1)
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        for x, y in batches:
            optimizer.zero_grad()
            loss = criterion(model, *mix(x.to(device), y.to(device)))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(network)
        if rank == 0:
            print(f"epoch {epoch + 1}: loss {loss:.3f}")
    own = DataLoader(Subset(test, range(rank, len(test), ranks)), args.batch_size, num_workers=args.workers)
    on_device = ((x.to(device), y.to(device)) for x, y in own)
    found = evaluate(average, on_device, APGD(epsilon=4 / 255, steps=20), engine="fast")
    counts = torch.tensor([found.clean_correct, found.robust_correct, found.total], device=device)
    if ranks > 1:
        dist.all_reduce(counts)
        dist.destroy_process_group()
    clean, robust = (counts[:2] / counts[2]).tolist()
    if rank == 0:
        print(f"averaged weights: clean {clean:.2%}, APGD-20 {robust:.2%}")
    return clean, robust


if __name__ == "__main__":
    main()
