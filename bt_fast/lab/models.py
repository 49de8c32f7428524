"""The networks of the experiments, with the tensor names of their published checkpoints."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bt_fast.attack.pixels import Normalize
from bt_fast.lab.checkpoint import read_tensors
from bt_fast.lab.layouts import Candidate, described, listed, network_in

SMALLEST = 16  # pixels: the least height and width that small-cnn's convolutions can handle
_WIDE = r"wrn-([1-9][0-9]*)-([1-9][0-9]*)"
_LAST_BIAS = {"small-cnn": "classifier.fc3.bias", "preactresnet-18": "linear.bias"}  # else "fc.bias"
_Projection = Literal["shortcut", "convShortcut"]


class SmallCNN(nn.Module):
    """Four convolutions and three linear layers: the MNIST network of TRADES, and of the paper's Figures 2 and 3.

    The last layer starts at zero, so a new network gives zero logits and a zero input gradient.

    Args:
        image_size: height and width of an image, or one number if they are equal; ValueError below 16.
        width: channels of the first two convolutions, 32 as published; the last two have twice as many.
        dropout: probability of dropping a hidden unit after the first linear layer.
    """

    def __init__(
        self,
        in_channels: int = 1,
        image_size: int | tuple[int, int] = 28,
        num_classes: int = 10,
        width: int = 32,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        height, breadth = (image_size, image_size) if isinstance(image_size, int) else image_size
        if min(height, breadth) < SMALLEST:
            raise ValueError(f"image_size must be at least {SMALLEST}, got {min(height, breadth)}: resize the images")
        rows, columns = (((side - 4) // 2 - 4) // 2 for side in (height, breadth))
        self.feature_extractor = nn.Sequential(
            OrderedDict[str, nn.Module](
                conv1=nn.Conv2d(in_channels, width, 3),
                relu1=nn.ReLU(inplace=True),
                conv2=nn.Conv2d(width, width, 3),
                relu2=nn.ReLU(inplace=True),
                maxpool1=nn.MaxPool2d(2),
                conv3=nn.Conv2d(width, 2 * width, 3),
                relu3=nn.ReLU(inplace=True),
                conv4=nn.Conv2d(2 * width, 2 * width, 3),
                relu4=nn.ReLU(inplace=True),
                maxpool2=nn.MaxPool2d(2),
            )
        )
        self.classifier = nn.Sequential(
            OrderedDict[str, nn.Module](
                fc1=nn.Linear(2 * width * rows * columns, 200),
                relu1=nn.ReLU(inplace=True),
                drop=nn.Dropout(dropout),
                fc2=nn.Linear(200, 200),
                relu2=nn.ReLU(inplace=True),
                fc3=nn.Linear(200, num_classes),
            )
        )
        for module in self.feature_extractor.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for parameter in self.classifier[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits [m, num_classes] of images [m, in_channels, height, width], same dtype."""
        logits: Tensor = self.classifier(self.feature_extractor(x).flatten(1))
        return logits


class _PreActBlock(nn.Module):
    """Norm, relu, convolution, twice, plus the input, which a 1x1 convolution reshapes if necessary."""

    def __init__(self, in_planes: int, planes: int, stride: int, projection: _Projection, dropout: float = 0.0) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.dropout = dropout
        self.projection = projection if stride != 1 or in_planes != planes else None
        if self.projection:
            conv = nn.Conv2d(in_planes, planes, 1, stride, bias=False)
            # pytorch-cifar keeps this convolution in a Sequential, TRADES keeps it bare.
            self.add_module(projection, nn.Sequential(conv) if projection == "shortcut" else conv)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x), inplace=True)
        skip: Tensor = getattr(self, self.projection)(active) if self.projection else x
        hidden = F.relu(self.bn2(self.conv1(active)), inplace=True)
        out: Tensor = self.conv2(F.dropout(hidden, self.dropout, self.training))
        return skip + out


def _stage(
    depth: int, in_planes: int, planes: int, stride: int, projection: _Projection, dropout: float = 0.0
) -> nn.Sequential:
    """Returns `depth` blocks, of which the first changes the shape."""
    first = _PreActBlock(in_planes, planes, stride, projection, dropout)
    return nn.Sequential(first, *(_PreActBlock(planes, planes, 1, projection, dropout) for _ in range(depth - 1)))


def _pool(x: Tensor) -> Tensor:
    """Returns the mean over all positions, [m, channels]."""
    # Not adaptive_avg_pool2d: it sums in another order, and published logits would differ in the last bits.
    return F.avg_pool2d(x, x.shape[-2:]).flatten(1)


class PreActResNet18(nn.Module):
    """Pre-activation ResNet-18 as in pytorch-cifar, without a norm before the pooling.

    FAST and its successors, which the paper's Tables 2 and 4 compare with, use it; no table of the paper does.
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        self.layer1 = _stage(2, 64, 64, 1, "shortcut")
        self.layer2 = _stage(2, 64, 128, 2, "shortcut")
        self.layer3 = _stage(2, 128, 256, 2, "shortcut")
        self.layer4 = _stage(2, 256, 512, 2, "shortcut")
        self.linear = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits [m, num_classes] of images [m, in_channels, height, width], same dtype."""
        out = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        logits: Tensor = self.linear(_pool(out))
        return logits


class WideResNet(nn.Module):
    """Wide residual network as in TRADES: WRN-34-10 of the paper's Tables 2 to 4, WRN-40-2 of Table 1.

    `load_state_dict` takes published checkpoints as they are: it strips the `module.` of DataParallel and drops
    `sub_block1`, which TRADES creates and never runs.

    Args:
        depth: the D of WRN-D-K, 6 n + 4 for n >= 1 blocks a stage; ValueError for another number.
        widen_factor: the K of WRN-D-K, a factor on the 16, 32 and 64 channels of the three stages.
        dropout: probability of dropping an activation between the two convolutions of a block.
    """

    def __init__(
        self,
        depth: int = 34,
        widen_factor: int = 10,
        in_channels: int = 3,
        num_classes: int = 10,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(
                f"depth must be 6 n + 4 with n >= 1 (10, 16, ..., 34, 40), got {depth}: take the nearest of these"
            )

        def stage(in_planes: int, planes: int, stride: int) -> nn.Sequential:
            layer = _stage(blocks, in_planes, planes, stride, "convShortcut", dropout)
            return nn.Sequential(OrderedDict(layer=layer))

        planes = 16 * widen_factor
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.block1 = stage(16, planes, 1)
        self.block2 = stage(planes, 2 * planes, 2)
        self.block3 = stage(2 * planes, 4 * planes, 2)
        self.bn1 = nn.BatchNorm2d(4 * planes)
        self.fc = nn.Linear(4 * planes, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.out_channels * math.prod(module.kernel_size)
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        nn.init.zeros_(self.fc.bias)
        self.register_load_state_dict_pre_hook(_rename_published)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits [m, num_classes] of images [m, in_channels, height, width], same dtype."""
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        logits: Tensor = self.fc(_pool(F.relu(self.bn1(out), inplace=True)))
        return logits


def _rename_published(_module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Strips `module.` and drops `sub_block1.*` below `prefix`, in place: a pre-hook of load_state_dict."""
    for name in [name for name in state_dict if name.startswith(prefix)]:
        tensor = state_dict.pop(name)
        bare = name.removeprefix(prefix).removeprefix("module.")
        if not bare.startswith("sub_block1."):
            state_dict[prefix + bare] = tensor


def build_model(
    name: str, *, in_channels: int, image_size: int | tuple[int, int], num_classes: int, width: int | None = None
) -> nn.Module:
    """Builds a new network by its name: "small-cnn", "preactresnet-18", or "wrn-D-K" such as "wrn-34-10".

    Only "small-cnn" depends on `image_size` and takes a `width` (None for 32). ValueError for an unknown name, a width
    for another network, and a size or depth that the network refuses.
    """
    if name == "small-cnn":
        return SmallCNN(in_channels, image_size, num_classes, width=32 if width is None else width)
    wide = re.fullmatch(_WIDE, name)
    if not wide and name != "preactresnet-18":
        raise ValueError(
            f"no network {name!r}; there are 'small-cnn', 'preactresnet-18' and 'wrn-D-K', as 'wrn-34-10'; "
            "name one of these"
        )
    if width is not None:
        raise ValueError(f"width only applies to 'small-cnn', not to {name!r}; leave it away")
    if wide:
        return WideResNet(int(wide[1]), int(wide[2]), in_channels, num_classes)
    return PreActResNet18(in_channels, num_classes)


@dataclass(frozen=True)
class Size:
    """The size of a network, computed without building it.

    Attributes:
        weights: the number of parameters.
        activations: the number of outputs of its convolutions and linear layers, for one image.
        positions: of a channel at the smallest batch norm, which needs two values of a channel; 2 without batch norm.
    """

    weights: int
    activations: int
    positions: int


def size_of(
    name: str, *, in_channels: int, image_size: tuple[int, int], num_classes: int, width: int | None = None
) -> Size:
    """Returns the size of the network that `build_model` would build, without allocating anything."""
    height, breadth = image_size
    if name == "small-cnn":
        w = 32 if width is None else width
        weights, activations, planes = 0, 0, in_channels
        for out, pool in ((w, 1), (w, 2), (2 * w, 1), (2 * w, 2)):
            height, breadth = height - 2, breadth - 2
            weights, activations, planes = weights + (9 * planes + 1) * out, activations + out * height * breadth, out
            height, breadth = height // pool, breadth // pool
        weights += (planes * height * breadth + 1) * 200 + 201 * 200 + 201 * num_classes
        return Size(weights, activations + 400 + num_classes, 2)
    wide = re.fullmatch(_WIDE, name)
    if wide:
        planes, blocks, stages = 16, (int(wide[1]) - 4) // 6, [16 * 2**i * int(wide[2]) for i in range(3)]
    else:
        planes, blocks, stages = 64, 2, [64 * 2**i for i in range(4)]
    weights, activations = 9 * in_channels * planes, planes * height * breadth
    for number, out in enumerate(stages):
        if number > 0:
            height, breadth = -(-height // 2), -(-breadth // 2)
        projection = planes * out if number > 0 or planes != out else 0
        weights += 9 * (planes + (2 * blocks - 1) * out) * out + projection + 2 * planes + (2 * blocks - 1) * 2 * out
        activations += (2 * blocks + (projection > 0)) * out * height * breadth
        planes = out
    weights += (planes + 1) * num_classes + (2 * planes if wide else 0)
    return Size(weights, activations + num_classes, height * breadth)


def classes_in(name: str, content: object) -> int | None:
    """The number of classes of the named network in a checkpoint, from its last layer's bias; None without it."""
    last = _LAST_BIAS.get(name, "fc.bias")
    for key, value in content.items() if isinstance(content, Mapping) else ():
        if isinstance(value, Tensor):
            if value.dim() == 1 and f".{key}".endswith(f".{last}"):
                return len(value)
        elif (classes := classes_in(name, value)) is not None:
            return classes
    return None


def load_published(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Loads a checkpoint file into `model`, which stays on its device and in its dtype.

    The file holds a state_dict, bare or under any key, as `torch.save({"model": model.state_dict()}, path)` writes it;
    no code in it is run. Its names may be those of a wrapper (DataParallel, torch.compile, AveragedModel, ...) or of a
    model that contains the network; `model` itself has no wrapper. Batch norm's step counts, which torch 0.4.0 did not
    save, may be missing. Warns if the file has the network twice with different values, or tensors of something else.

    Returns:
        `model`, or if the file has the mean and the deviation of a layer in front of the network,
        `nn.Sequential(Normalize(mean, std), model)`: both take images in [0, 1].

    Raises:
        ValueError: the file cannot be read, holds no state_dict, or none with the names and shapes of `model`, which
            then does not change; the message describes the contents of the file.
    """
    content, own = read_tensors(Path(path)), model.state_dict()
    candidate, kind = network_in(content, own), type(model).__name__
    if candidate is None:
        raise ValueError(
            f"{path} holds no state_dict of {kind}: found {described(content)}, and looked in "
            f"all of it for names such as {next(iter(own), 'none')}; write torch.save(model.state_dict(), path)"
        )
    try:
        normalization = candidate.normalization
    except ValueError as error:
        raise ValueError(
            f"{path}: a layer in front of the network is no normalization: {error}; give a file of the network alone"
        ) from error
    tensors = {name: own[name] for name in own if name.endswith(".num_batches_tracked")} | candidate.tensors
    _check_fit(own, tensors, f"{path} does not fit {kind}", candidate.place)
    for remark in _remarks(candidate, path, kind):
        warnings.warn(remark, stacklevel=2)
    model.load_state_dict(tensors)
    if normalization is None:
        return model
    weight = next(model.parameters())
    with torch.device("cpu"):  # not the caller's default device
        front = Normalize(normalization.mean, normalization.std)
    return nn.Sequential(front.to(weight.device, weight.dtype), model).train(model.training)


def _remarks(candidate: Candidate, path: str | os.PathLike[str], kind: str) -> Iterator[str]:
    """Yields remarks for the user on the rest of the file, and on a layer in front that it does not hold."""
    if candidate.again:
        yield (
            f"{path} has the network in several places with other values: read is {candidate.place}, not "
            f"{' or '.join(candidate.again)}; to read another, torch.save it alone"
        )
    if candidate.behind_unknown:
        yield (
            f"{path}: the network stood behind another layer ({candidate.place}) of which the file holds nothing: if "
            "it takes a mean and a deviation out, put Normalize(mean, std) in front of the network and evaluate both "
            "together with bt_fast.evaluation.evaluate"
        )
    if candidate.others:
        yield (
            f"{path}: {listed(candidate.others)} are of something beside {kind}, and are not read; if it works on the "
            "images or the logits, evaluate the whole model with bt_fast.evaluation.evaluate"
        )


def _check_fit(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], message: str, place: str) -> None:
    """Raises ValueError with the first names of each kind that prevent loading the tensors at `place`."""
    offending = {
        "missing": [name for name in own if name not in tensors],
        "unexpected": [name for name in tensors if name not in own],
        "mis-shaped": [
            f"{name} {tuple(tensors[name].shape)} for {tuple(own[name].shape)}"
            for name in own
            if name in tensors and tensors[name].shape != own[name].shape
        ],
    }
    parts = [f"{kind} {listed(names)}" for kind, names in offending.items() if names]
    if parts:
        raise ValueError(
            f"{message}: {'; '.join(parts)} (of what was found the nearest is {place}); name the network that it is, "
            "small-cnn, preactresnet-18 or wrn-D-K, or data with its channels and classes"
        )
