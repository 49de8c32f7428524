"""Models in a wrapper that makes their gradients those of all ranks.

`DistributedDataParallel` prepares its sum of gradients in its forward: so an attack, whose gradients are the images',
runs on the module inside, and of an update's forwards exactly one goes through the wrapper. (A second one would also
send the buffers again, in place, while the first one's graph still holds them.)
"""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside, or the model itself where it has no such wrapper."""
    return model.module if isinstance(model, DistributedDataParallel) else model
