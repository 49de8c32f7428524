"""What the ops share around a launch: what a kernel takes, how dense images lie, and the check of an argument."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# a launch counts programs, rows and the offsets within a row in int32; the spare covers the last block's tail
MOST_INT32 = 2**31 - 2**16


def dense_format(x: Tensor) -> torch.memory_format | None:
    """The dense format of `x` with the sample outermost; None where it is not dense, or permuted in another way."""
    formats = [torch.contiguous_format]
    formats += {4: [torch.channels_last], 5: [torch.channels_last_3d]}.get(x.dim(), [])
    return next((f for f in formats if x.is_contiguous(memory_format=f)), None)


def contiguous(values: Tensor | None) -> Tensor | None:
    """`values`, copied if they are not contiguous."""
    return None if values is None else values.contiguous()


def rounded(value: float, dtype: torch.dtype) -> float:
    """A number as it is in `dtype`, infinite if it is too large for it.

    torch subtracts it so from 16-bit tensors on the CPU, but not on CUDA; and it does not clamp at one too large.
    """
    return torch.tensor(value, dtype=dtype, device="cpu").item() if dtype.itemsize < 8 else float(value)


def check(
    name: str, values: Tensor | None, shape: Sequence[int], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """Raise TypeError or ValueError that names `name` unless `values`, if given, have shape, dtype and device."""
    if values is None:
        return
    if values.dtype not in dtypes:
        raise TypeError(
            f"{name} must be {' or '.join(str(d) for d in dict.fromkeys(dtypes))}, got {values.dtype}: "
            f"write {name}.to({dtypes[0]})"
        )
    if values.shape != torch.Size(shape):
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(values.shape)}: give it like the others")
    if values.device != device:
        raise ValueError(
            f"{name} must be on {device} like the others, got {values.device}: write {name}.to({str(device)!r})"
        )
