"""Emulates on the CPU how a GPU computes float32 convolutions and matrix products where TF32 is allowed.

The factors keep 10 of 23 bits, rounded to nearest, and the products are summed in float32, as in tensor cores.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from bt_fast.full_precision import tf32_convolutions

CONVOLUTIONS = ("convolution", "convolution_backward")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


class EmulatedTf32(TorchDispatchMode):
    """Applies TF32 only while torch allows it, separately for convolutions and matrix products."""

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        name = call.overloadpacket.__name__
        allowed = {CONVOLUTIONS: tf32_convolutions, PRODUCTS: lambda: torch.backends.cuda.matmul.allow_tf32}
        if any(name in names and requested() for names, requested in allowed.items()):
            args = tree_map(lambda value: rounded(value) if is_float32(value) else value, args)
        return call(*args, **(kwargs or {}))


def is_float32(value):
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def rounded(values):
    """Rounds to 10 bits after the leading one: adds half of the last bit and truncates."""
    bits = values.view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
