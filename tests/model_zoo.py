"""Small models of common kinds, each with a twin that computes the same in the authors' code."""

import torch
import torch.nn.functional as F
from small_models import CLASSES, conv_bn
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint


def features(*head):
    """A convolution with features [n, 4, 6, 6], followed by `head`."""
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *head)


def head(width=144):
    return nn.Flatten(), nn.Linear(width, CLASSES)


def untracked():
    return features(nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), *head())


def untracked_1d():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Tanh(), head(8)[1]
    )


class Centred(nn.Module):
    """Subtracts the batch's mean from its features, in every mode."""

    def forward(self, x):
        return x - x.mean(dim=0, keepdim=True)


class BatchAttention(nn.Module):
    """Lets each sample attend to the whole batch."""

    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return x + self.attend(x[None], x[None], x[None], need_weights=False)[0][0]


class ForcedStatistics(nn.Module):
    """A norm that uses the batch's statistics in eval mode too."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return F.batch_norm(x, None, None, self.norm.weight, self.norm.bias, training=True)


class Recomputed(nn.Sequential):
    """A Sequential that recomputes its activations in the backward."""

    reentrant = False

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=self.reentrant)


def checkpointed(*body):
    return features(Recomputed(*body), *head())


class TrainNoise(nn.Module):
    """Adds noise from the default generator, in train mode only."""

    def forward(self, x):
        return x + 0.1 * torch.randn_like(x) if self.training else x


class ScaledInPlace(nn.Module):
    """Normalises its input in place; `out_of_place` gives the same result and keeps the images."""

    out_of_place = False

    def forward(self, x):
        return (x.clone() if self.out_of_place else x).sub_(0.5).div_(0.25)


class Shared(nn.Module):
    """A convolution and a norm that run twice in a forward."""

    def __init__(self):
        super().__init__()
        self.first, self.block = (
            nn.Conv2d(1, 4, 3, padding=1),
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)),
        )
        self.last = nn.Sequential(*head())

    def forward(self, x):
        x = self.first(x)
        return self.last(self.block(self.block(x).relu()).relu())


def frozen_part():
    model = conv_bn()
    model[0].weight.requires_grad_(False)
    for p in model[1].parameters():
        p.requires_grad_(False)
    return model


def spectral():
    model = conv_bn()
    parametrizations.spectral_norm(model[0])
    return model


def weight_normed():
    model = conv_bn()
    parametrizations.weight_norm(model[4])
    return model


ACROSS = {  # models with rows that depend on each other in eval mode too
    "untracked norm": untracked,
    "untracked norm, 1d": untracked_1d,
    "centred": lambda: features(Centred(), nn.ReLU(), *head()),
    "batch attention": lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 8), BatchAttention(), head(8)[1]),
    "forced statistics": lambda: features(ForcedStatistics(), nn.ReLU(), *head()),
}
APART = {
    "batch norm": conv_bn,
    "instance norm": lambda: features(nn.InstanceNorm2d(4), nn.ReLU(), *head()),
    "checkpointed": lambda: checkpointed(
        nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
    ),
    "checkpointed, noise": lambda: checkpointed(nn.GroupNorm(2, 4), TrainNoise(), nn.ReLU()),
    "in place": lambda: nn.Sequential(ScaledInPlace(), conv_bn()),
    "train noise": lambda: features(nn.BatchNorm2d(4), TrainNoise(), nn.ReLU(), *head()),
    "dropout": lambda: conv_bn(dropout=0.3),
    "spectral norm": spectral,
    "weight norm": weight_normed,
    "frozen part": frozen_part,
    "shared": Shared,
}
ZOO = ACROSS | APART


BLOCKS = {  # on features [n, 4, 6, 6]
    "batch norm": lambda: nn.BatchNorm2d(4),
    "untracked norm": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "cumulative average": lambda: nn.BatchNorm2d(4, momentum=None),
    "instance norm": lambda: nn.InstanceNorm2d(4, track_running_stats=True),
    "centred": Centred,
    "forced statistics": ForcedStatistics,
    "noise": TrainNoise,
    "dropout": lambda: nn.Dropout(0.2),
    "convolution": lambda: nn.Conv2d(4, 4, 3, padding=1),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Conv2d(4, 4, 3, padding=1)),
    "weight norm": lambda: parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1)),
    "frozen": lambda: nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False),
    "checkpoint of a norm": lambda: Recomputed(nn.BatchNorm2d(4), nn.Tanh()),
    "checkpoint of noise": lambda: Recomputed(nn.Conv2d(4, 4, 1), TrainNoise()),
    "relu": nn.ReLU,
}


def of_blocks(names):
    """A network that normalises in place, followed by these blocks; a repeated name is a shared block."""
    made = {name: BLOCKS[name]() for name in dict.fromkeys(names)}
    return nn.Sequential(ScaledInPlace(), *features(*(made[name] for name in names), *head()))
