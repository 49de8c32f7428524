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


# How published networks are written


class NormAct(nn.BatchNorm2d):
    """Batch norm, dropout and an activation in one module, as in timm."""

    def __init__(self, channels, act=nn.ReLU):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act(inplace=True)

    def forward(self, x):
        torch._assert(x.ndim == 4, f"expected 4 dimensions, got {x.ndim}")
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        training = self.training or (self.running_mean is None and self.running_var is None)
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training, self.momentum, self.eps
        )
        return self.act(self.drop(x))


class FrozenNormAct(nn.Module):
    """The same of numbers that do not train, as a product and a sum."""

    def __init__(self, channels):
        super().__init__()
        for name, value in (("weight", 1.5), ("bias", 0.1), ("running_mean", 0.2), ("running_var", 0.7)):
            self.register_buffer(name, torch.full((channels,), value))
        self.act = nn.SiLU(inplace=True)

    def forward(self, x):
        scale = self.weight.reshape(1, -1, 1, 1) * (self.running_var.reshape(1, -1, 1, 1) + 1e-5).rsqrt()
        shift = self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale
        return self.act(x * scale + shift)


class OnDevice(nn.Module):
    """Takes out a mean that it keeps for each device, as the generated-data recipe's networks do."""

    def __init__(self):
        super().__init__()
        self.mean, self.std, self.mean_cuda, self.std_cuda = torch.tensor(0.4), torch.tensor(0.25), None, None

    def forward(self, x):
        if x.is_cuda:
            if self.mean_cuda is None:
                self.mean_cuda, self.std_cuda = self.mean.cuda(), self.std.cuda()
            return (x - self.mean_cuda) / self.std_cuda
        return (x - self.mean.to(x.device, x.dtype)) / self.std


class Windows(nn.Module):
    """Checks and pads its images by their size, and mixes within windows."""

    def __init__(self, channels=4, side=4):
        super().__init__()
        self.side, self.mix = side, nn.Linear(side * side, side * side)

    def forward(self, x):
        assert x.dim() == 4, "not images"
        b, c, h, w = x.shape
        if h < 2 or min(h, w) < 2:
            raise ValueError("too small")
        bottom, right = -h % self.side, -w % self.side
        if bottom > 0 or right > 0:
            x = F.pad(x, (0, right, 0, bottom))
        rows, columns = x.shape[-2] // self.side, int(x.size(-1) / self.side)
        x = x.view(b, c, rows, self.side, columns, self.side).transpose(3, 4).flatten(-2)
        for k in range(len(x.shape) - 4):
            x = x + k * torch.ones((x.shape[2], 1, 1), dtype=x.dtype, device=x.device)
        x = self.mix(x).view(b, c, rows, columns, self.side, self.side).transpose(3, 4)
        return x.reshape(b, c, rows * self.side, columns * self.side)[..., :h, :w]


class ByLength(nn.Module):
    """Flattens by the number of its images."""

    def forward(self, x):
        return x.view(len(x), -1)


class LayerScale(nn.Module):
    """A learnt factor of each channel behind a layer, and the skip connection."""

    def __init__(self, channels=4):
        super().__init__()
        self.conv, self.drop = nn.Conv2d(channels, channels, 3, padding=1), nn.Dropout(0.5)
        self.gamma = nn.Parameter(torch.linspace(0.5, 1.5, channels))

    def forward(self, x):
        return x + self.drop(self.conv(x)).mul_(self.gamma.view(1, -1, 1, 1))


class Standardised(nn.Conv2d):
    """A convolution on weights that are standardised in each forward."""

    def forward(self, x):
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0, eps=1e-5
        ).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class PlainConv(nn.Conv2d):
    """A subclass that adds nothing to the computation."""


class PlainNorm(nn.BatchNorm2d):
    """A subclass that adds nothing to the computation."""


class Doubling(nn.Conv2d):
    """A subclass that computes something else than its base."""

    def forward(self, x):
        return 2 * super().forward(x)


class HandMadeNorm(nn.Module):
    """Batch norm written out on buffers of its own, which a training forward moves."""

    def __init__(self, channels=4):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.running_mean += 0.1 * (x.mean((0, 2, 3)) - self.running_mean)
                self.running_var += 0.1 * (x.var((0, 2, 3)) - self.running_var)
        return (x - self.running_mean[None, :, None, None]) / (self.running_var + 1e-5).sqrt()[None, :, None, None]


class RelativeBias(nn.Module):
    """Attention over the pixels with a bias from a table of relative positions."""

    def __init__(self, channels=4, side=6):
        super().__init__()
        self.qkv, self.table = nn.Linear(channels, 3 * channels), nn.Parameter(torch.randn(2 * side * side, 1))
        self.register_buffer("index", torch.arange(side**4).view(side**2, side**2) % len(self.table))

    def forward(self, x):
        b, c, h, w = x.shape
        q, k, v = self.qkv(x.flatten(2).transpose(1, 2)).reshape(b, h * w, 3, c).permute(2, 0, 1, 3)
        bias = self.table[self.index.view(-1)].view(h * w, h * w, -1).permute(2, 0, 1).contiguous()
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(b, -1, -1))
        return x.transpose(1, 2).reshape(b, c, h, w)


class ByPixels(nn.Module):
    """Decides by what it is given, and gives two things back."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x):
        return (self.body(x), 2.0) if x.sum() > 1e6 else (self.body(-x), 3.0)


class Reading(nn.Module):
    """Uses both results of a part that decides by pixels."""

    def __init__(self):
        super().__init__()
        self.part = ByPixels()

    def forward(self, x):
        out, factor = self.part(x)
        return out * factor


class ByCount(nn.Module):
    """Decides by the number of images."""

    def __init__(self):
        super().__init__()
        self.few, self.many = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.few(x) if x.shape[0] // 2 == 1 else self.many(x)


class Initialised(nn.Module):
    """Decides by a buffer, which another call may change."""

    def __init__(self):
        super().__init__()
        self.register_buffer("ready", torch.tensor(False))

    def forward(self, x):
        return x if self.ready else 0.5 * x


class Auxiliary(nn.Module):
    """Gives a second output in train mode."""

    def __init__(self):
        super().__init__()
        self.body, self.more = conv_bn(), nn.Linear(36, CLASSES)

    def forward(self, x):
        return (self.body(x), self.more(x.flatten(1))) if self.training else self.body(x)


class Options(nn.Module):
    """Takes more than images, with defaults."""

    def __init__(self):
        super().__init__()
        self.body = conv_bn()

    def forward(self, x, return_features=False, *, scale=2.0, **more):
        out = self.body(x) * scale
        return (out, x) if return_features else out


def shared_layer():
    conv, norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
    return features(conv, norm, nn.ReLU(inplace=True), conv, nn.ReLU(), conv, norm, *head())


def arithmetic():
    class Arithmetic(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.shift = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.Parameter(torch.randn(4, 1, 1))
            self.head, self.factor = nn.Linear(144, CLASSES), nn.Parameter(torch.randn(CLASSES))

        def forward(self, x):
            x = 1 - (self.conv(x) * 3 - self.shift) / 2.5
            return (self.head(x.relu().flatten(1)) + 1).sub(self.factor)

    return Arithmetic()


PUBLISHED = {  # by what they do: the network, how many of its batch norms are folded and kept, and what runs as it is
    "norm with an activation": (
        lambda: features(NormAct(4), nn.Conv2d(4, 4, 1), NormAct(4, nn.SiLU), *head()),
        2,
        0,
        "",
    ),
    "pre-activation": (
        lambda: features(nn.ReLU(), NormAct(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), *head()),
        1,
        1,
        "",
    ),
    "frozen norm": (lambda: features(FrozenNormAct(4), *head()), 0, 0, ""),
    "asks for its device": (lambda: nn.Sequential(OnDevice(), conv_bn()), 2, 0, ""),
    "asks for its shape": (lambda: features(nn.BatchNorm2d(4), Windows(), nn.ReLU(), *head()), 1, 0, ""),
    "by its length": (lambda: nn.Sequential(conv_bn()[:6], ByLength(), nn.Linear(16, CLASSES)), 2, 0, ""),
    "layer scale": (lambda: features(LayerScale(), nn.BatchNorm2d(4), *head()), 0, 1, ""),
    "standardised weights": (lambda: features(Standardised(4, 4, 3, padding=1), nn.BatchNorm2d(4), *head()), 1, 0, ""),
    "subclasses": (lambda: features(PlainConv(4, 4, 3, padding=1), PlainNorm(4), nn.ReLU(), *head()), 1, 0, ""),
    "another convolution": (lambda: features(Doubling(4, 4, 3, padding=1), nn.BatchNorm2d(4), *head()), 1, 0, ""),
    "own norm": (lambda: features(HandMadeNorm(), nn.ReLU(), *head()), 0, 0, ""),
    "relative positions": (lambda: features(nn.BatchNorm2d(4), RelativeBias(), *head()), 1, 0, ""),
    "group norm": (lambda: features(nn.GroupNorm(2, 4), nn.Flatten(2), nn.LayerNorm(36), *head()), 0, 0, ""),
    "decides by pixels": (lambda: features(nn.BatchNorm2d(4), Reading(), nn.ReLU(), *head()), 1, 1, "2.part"),
    "decides by their number": (lambda: features(nn.BatchNorm2d(4), ByCount(), *head()), 1, 0, "2"),
    "decides by a buffer": (lambda: features(nn.BatchNorm2d(4), Initialised(), *head()), 1, 0, "2"),
    "auxiliary output": (Auxiliary, 2, 0, ""),
    "options": (Options, 2, 0, ""),
    "shared": (shared_layer, 2, 0, ""),
    "arithmetic": (arithmetic, 0, 0, ""),
    "padded": (
        lambda: features(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(4), *head()),
        1,
        0,
        "",
    ),
    "spectral norm": (spectral, 2, 0, ""),
    "weight norm": (weight_normed, 2, 0, ""),
}
