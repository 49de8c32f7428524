"""Convolutions and matrix products of float32 on the CPU as a GPU computes them where TF32 is allowed.

Their factors keep 10 of 23 bits, rounded to the nearest, and their products are summed in float32, as tensor cores do.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from bt_fast.full_precision import tf32_convolutions

CONVOLUTIONS = ("convolution", "convolution_backward")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


class EmulatedTf32(TorchDispatchMode):
    """Counts what it has computed in TF32."""

    def __init__(self):
        super().__init__()
        self.computed = 0

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        name = call.overloadpacket.__name__
        if (name in CONVOLUTIONS and tf32_convolutions()) or (
            name in PRODUCTS and torch.backends.cuda.matmul.allow_tf32
        ):
            args = tree_map(lambda value: rounded(value) if is_float32(value) else value, args)
            self.computed += 1
        return call(*args, **(kwargs or {}))


def is_float32(value):
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def rounded(values):
    """With 10 bits behind the leading one: half of the last one is added, and what is below cut off."""
    bits = values.view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
