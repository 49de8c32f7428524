"""Tiny networks for [m, 1, 6, 6] images and 5 classes, each with a trait that a training loss may handle wrongly."""

import torch
import torch.nn.functional as F
from torch import nn

from bt_fast.attack.neighbours import _looked_at

SHAPE, CLASSES = (1, 6, 6), 5


def conv_bn(momentum=0.1, dropout=0.0):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4, momentum=momentum),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Conv2d(4, 4, 3, stride=2),
        nn.BatchNorm2d(4, momentum=momentum),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )


class TiedNorm(nn.Module):
    """One batch norm used twice in a forward, and registered under two names."""

    def __init__(self, momentum=0.1):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm = self.norm_again = nn.BatchNorm2d(4, momentum=momentum)
        self.head = nn.Linear(144, CLASSES)

    def forward(self, x):
        x = self.norm(self.conv1(x)).relu()
        return self.head(self.norm_again(self.conv2(x)).relu().flatten(1))


class Normalising(nn.Module):
    """Scales its images by buffers that never change, as most published models do."""

    def __init__(self):
        super().__init__()
        self.body = conv_bn()
        self.register_buffer("offset", torch.full((1, 1, 1), 0.1))
        self.register_buffer("scale", torch.full((1, 1, 1), 0.3))

    def forward(self, x):
        return self.body((x - self.offset) / self.scale)


class Counting(nn.Module):
    """Counts its training forwards in a buffer, in place or by a new tensor, and lets the count change its output."""

    def __init__(self, in_place):
        super().__init__()
        self.body, self.in_place = conv_bn(), in_place
        self.register_buffer("forwards", torch.zeros(()))

    def forward(self, x):
        if self.training and self.in_place:
            self.forwards.add_(1)
        elif self.training:
            self.forwards = self.forwards + 1
        return self.body(x) * (1 + 0.1 * self.forwards)


class OwnNorm(nn.Module):
    """A batch norm that is not torch's class, as in many research codes: `F.batch_norm` on its own buffers."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(144, CLASSES)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x):
        x = F.batch_norm(self.conv(x), self.mean, self.var, training=self.training)
        return self.head(x.relu().flatten(1))


class UncountedNorm(nn.BatchNorm2d):
    """A batch norm subclass that does not count its batches."""

    def forward(self, x):
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )


def uncounted_norm():
    return nn.Sequential(nn.Conv2d(1, 4, 3), UncountedNorm(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, CLASSES))


def no_count():
    """A batch norm without num_batches_tracked, as left by pruning and conversion tools."""
    model = conv_bn()
    model[1].num_batches_tracked = None
    return model


def instance_norm():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.InstanceNorm2d(4, track_running_stats=True),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, CLASSES),
    )


class Frozen(nn.Module):
    """A body with a first batch norm that stays in eval mode while the rest trains."""

    def __init__(self):
        super().__init__()
        self.body = conv_bn()

    def train(self, mode=True):
        super().train(mode)
        self.body[1].eval()
        return self

    def forward(self, x):
        return self.body(x)


class Dead(nn.Sequential):
    """A model with logits that do not depend on the image: its input gradient is exactly 0."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Hardtanh(2.0, 3.0), nn.Linear(36, CLASSES))


class Undefined(nn.Module):
    """A model with an input gradient of NaN at one pixel, for images that are bright at another."""

    def __init__(self):
        super().__init__()
        self.body = conv_bn()

    def forward(self, x):
        bright = x[:, :1, 2:3, 2:3].detach() > 0.5
        # the root has an infinite derivative at 0, which times 0 is NaN
        return self.body(x) + 0 * torch.where(bright, x[:, :1, :1, :1] * 0, 1.0).sqrt().flatten(1)


def with_bright(rows):
    """Returns a batch in which only these images are bright at the pixel that `Undefined` looks at."""
    x, y = batch()
    x[:, 0, 2, 2] = 0.2
    x[rows, 0, 2, 2] = 0.8
    return x, y


MODELS = {
    "conv_bn": conv_bn,
    "cumulative average": lambda: conv_bn(momentum=None),
    "dropout": lambda: conv_bn(dropout=0.3),
    "tied norm": TiedNorm,
    "tied norm, cumulative average": lambda: TiedNorm(momentum=None),
    "normalising": Normalising,
    "instance norm": instance_norm,
    "frozen norm": Frozen,
    "counter in place": lambda: Counting(in_place=True),
    "counter replaced": lambda: Counting(in_place=False),
    "own norm": OwnNorm,
    "uncounted norm": uncounted_norm,
    "norm without a count": no_count,
}


def build(name_or_factory="conv_bn", seed=0, dtype=torch.float64):
    """Returns the model in train mode with seeded weights and batch-norm buffers away from their initial values."""
    torch.manual_seed(seed)
    factory = MODELS.get(name_or_factory, name_or_factory)
    model = factory().to(dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("mean"):
            buffer.normal_(std=0.1)
        if name.endswith("var"):
            buffer.uniform_(0.5, 1.5)
    return model.train()


def batch(m=8, seed=0, dtype=torch.float64):
    """Returns images in [0, 1], some pixels exactly 0 and 1, and labels."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, *SHAPE, generator=g, dtype=torch.float64).mul(0.5).add(0.5).clamp(0, 1)
    return x.to(dtype), torch.randint(CLASSES, (m,), generator=g)


def looked_at(model):
    """Returns the model after skipping its first attack's check of neighbours: two forwards of two images."""
    _looked_at.add(model)
    return model


def snapshot(*modules):
    """Returns all that a call must not change: parameters, buffers, gradients, modes, requires_grad."""
    result = {}
    for k, module in enumerate(modules):
        for name, value in module.state_dict().items():
            result[k, "state", name] = value.clone()
        for name, p in module.named_parameters():
            result[k, "grad", name] = None if p.grad is None else p.grad.clone()
            result[k, "requires_grad", name] = p.requires_grad
        for name, child in module.named_modules():
            result[k, "training", name] = child.training
    return result


def assert_unchanged(before, *modules):
    after = snapshot(*modules)
    assert before.keys() == after.keys()
    for key, value in before.items():
        same = torch.equal(value, after[key]) if isinstance(value, torch.Tensor) else value is after[key]
        assert same, f"{key} changed"


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}
