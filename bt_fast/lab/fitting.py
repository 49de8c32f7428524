"""Checks that data, network and machine fit together, before a weight is made or anything is written."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from torch import Tensor

from bt_fast.lab.config import RunConfig
from bt_fast.lab.data import ImageDataset
from bt_fast.lab.models import SMALLEST, size_of
from bt_fast.lab.world import ALONE, World

_FLOAT = 4  # bytes
_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB", "EB")


def check_training(config: RunConfig, dataset: ImageDataset, device: torch.device, world: World = ALONE) -> None:
    """Raises ValueError, which names the data, for an impossible training.

    Impossible are data with a single class, images that do not fit the network, and a minibatch too small for its batch
    norm or too large for the device's memory. The memory is a lower bound: weights, their gradients and momenta, one
    update's activations, and the perturbations that are remembered on the device.
    """
    if dataset.classes < 2:
        raise ValueError(f"{dataset.name}: all labels are 0, one class: training needs at least two; give other --data")
    channels, *image_size = dataset.x_train.shape[1:]
    about = f"{dataset.name}, images of {channels}x{'x'.join(map(str, image_size))} in {dataset.classes} classes"
    if config.model == "small-cnn" and min(image_size) < SMALLEST:
        hint = "take --model preactresnet-18 or wrn-D-K, or larger images"
        raise ValueError(f"{about}: small-cnn takes images of at least {SMALLEST}x{SMALLEST}; {hint}")
    size = size_of(
        config.model,
        in_channels=channels,
        image_size=(image_size[0], image_size[1]),
        num_classes=dataset.classes,
        width=config.width,
    )
    n, b = len(dataset.x_train), config.batch_size
    copies = 1 + len(config.methods) * (2 if config.sgd_momentum else 1)
    needed = _FLOAT * (copies * size.weights + world.most_in_a_share(min(n, b)) * size.activations)
    needed += (remembered := _remembered(config, dataset, world))
    if needed > (available := memory(device)):
        raise ValueError(
            f"{about}: {config.model} and minibatches of {min(n, b)} need at least {_bytes(needed)}, {device} has "
            f"{_bytes(available)}: take a smaller --model, --width or --batch-size{_of_labels(dataset)}"
            f"{', or --memory-storage host or file' if remembered else ''}"
        )
    ranks = 1 if device.type == "cuda" else world.count  # on CUDA, norms see all ranks' samples
    least = (n % b or min(n, b)) // ranks
    if least * size.positions < 2:
        raise ValueError(
            f"{about}: the last minibatch of an epoch has {least} image where the batch norm of {config.model} has one "
            f"position, and it needs two values; take another --batch-size than {b}, or another --train-size than {n}"
        )


def _remembered(config: RunConfig, dataset: ImageDataset, world: World) -> int:
    """Returns the bytes of the perturbations that the methods remember on one rank's device."""
    if config.memory_storage != "device":
        return 0
    count = sum(config.of_method(method)[1].memory for method in config.methods)
    size: int = getattr(torch, config.memory_dtype).itemsize
    return count * size * world.most_in_a_share(len(dataset.x_train)) * dataset.x_train[0].numel()


def check_labels(classes: int, labels: Tensor, where: str, network: str) -> None:
    """Raises ValueError if labels int64 [n] of the data `where` exceed the classes of a network, named by `network`."""
    greatest = int(labels.max())
    if greatest >= classes:
        raise ValueError(
            f"{where}: labels up to {greatest}, but {network} tells {classes} classes apart; evaluate it on data with "
            f"labels in 0..{classes - 1}"
        )


def memory(device: torch.device) -> float:
    """The bytes of a device's memory, free or not: with swap, within a container's limit; infinite if unknown."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    try:
        size = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return float("inf")
    swap = re.search(r"SwapTotal: *(\d+) kB", _text("/proc/meminfo"))
    size += 1024 * int(swap[1]) if swap else 0
    limit = _text("/sys/fs/cgroup/memory.max").strip()
    return min(size, float(limit)) if limit.isdecimal() else size


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _of_labels(dataset: ImageDataset) -> str:
    """Returns advice for labels that are not numbered from 0 on."""
    different = len(torch.cat([dataset.y_train, dataset.y_test]).unique())
    if 2 * different > dataset.classes:
        return ""
    greatest = dataset.classes - 1
    return f", or number the labels 0..{different - 1}: there are {different} different ones up to {greatest}"


def _bytes(size: float) -> str:
    """Formats a number of bytes; beyond the units in powers of ten."""
    power = 0
    while size >= 1000 and power < len(_UNITS) - 1:
        size, power = size / 1000, power + 1
    return f"{size:.3g} {_UNITS[power]}"
