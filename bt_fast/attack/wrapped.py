"""Models in a wrapper that makes their gradients those of all ranks.

`DistributedDataParallel` prepares its sum of gradients in its forward: so an attack, whose gradients are the images',
runs on the module inside, and of an update's forwards exactly one goes through the wrapper. (A second one would also
send the buffers again, in place, while the first one's graph still holds them.)
"""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Fronted(nn.Module):
    """A module in front of a model that may be wrapped."""

    @property
    def unwrapped(self) -> nn.Module:
        """The same in front of the module inside."""
        raise NotImplementedError


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside, or the model itself where it has no such wrapper.

    Of a wrapper that was compiled as a whole it is the module as it was written: compile the module itself, and wrap
    that, to have both compiled.
    """
    if isinstance(model, Fronted):
        return model.unwrapped
    wrapper = getattr(model, "_orig_mod", model)
    return wrapper.module if isinstance(wrapper, DistributedDataParallel) else model
