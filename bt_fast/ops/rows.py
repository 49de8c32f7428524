"""Common code of the ops over rows of logits: rows with a softmax, inputs of kernels, and rows of programs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bt_fast.ops.availability import kernels_run
from bt_fast.ops.launch import KERNEL_DTYPES, MOST_INT32, run_kernel
from bt_fast.ops.numeric import FLOATS

LONGEST_BLOCK = 8192  # classes that a program holds at once
LONG_BLOCK, LONG_WARPS = 2048, 8  # for longer rows


def softmax(logits: Tensor) -> Tensor:
    """Returns the softmax of the rows of `logits` [m, K] in float64, as in the kernels before rounding."""
    return logits.double().softmax(dim=1)


def has_softmax(logits: Tensor) -> Tensor:
    """Returns bool [m]: whether a row of `logits` [m, K] has a softmax: its largest logit is finite.

    It then holds neither NaN nor +Inf, and not only -Inf (classes that are ruled out).
    """
    return logits.amax(dim=1).isfinite()


def labels_outside(labels: Tensor, classes: int) -> Tensor:
    """Returns bool [m]: whether a label (int64) lies outside 0..classes-1."""
    return (labels < 0) | (labels >= classes)


def result_dtype(values: Tensor) -> torch.dtype:
    """Returns the dtype of a result that is not rounded to the values' own dtype."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def check_logits(name: str, logits: Tensor, rows: int = 0, classes: int = 2) -> None:
    """Raises TypeError or ValueError that names `name` unless `logits` are floating point [m ≥ rows, K ≥ classes]."""
    if logits.dtype not in FLOATS:
        raise TypeError(f"{name} must be floating point, got {logits.dtype}: write {name}.float()")
    if logits.dim() != 2 or logits.shape[0] < rows or logits.shape[1] < classes:
        raise ValueError(
            f"{name} must have shape [m, K] with m >= {rows} and K >= {classes} classes, got "
            f"{list(logits.shape)}: give a row for each sample and a column for each class"
        )


def kernel_takes(logits: Tensor) -> bool:
    """Whether the kernels compute rows like these [m, K]: on CUDA, with triton, not in float64."""
    if not logits.is_cuda or logits.dtype not in KERNEL_DTYPES:
        return False
    return max(logits.shape) < MOST_INT32 and kernels_run(logits)


def rows_apart(logits: Tensor) -> tuple[Tensor, int | None]:
    """Returns `logits` [m, K] with stride 1 along K (copied if necessary), and the rows' stride: None if contiguous."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    return logits, None if logits.is_contiguous() else logits.stride(0)


def block_of(classes: int) -> tuple[int, int, int]:
    """Returns the rows of a program, its block of classes, and its warps, for rows that fit a block.

    A thread has four elements of short rows, a 128-bit access in float32, and up to sixteen of long ones.
    """
    block = 1 << (classes - 1).bit_length()
    return max(512 // block, 1), block, min(max(block // 512, 4), 16)


def launch(short: Any, long: Any, logits: Tensor, *others: Tensor, **constants: Any) -> None:
    """Launches the kernel for rows of logits [m, K] that fit a block, or the one for longer rows."""
    m, k = logits.shape
    logits, stride = rows_apart(logits)
    if m == 0:
        return
    if k > LONGEST_BLOCK:
        options = {"BLOCK": LONG_BLOCK, "num_warps": LONG_WARPS}
        run_kernel(long, m, logits, *others, stride, K=k, **options, **constants)
    else:
        each, block, warps = block_of(k)
        options = {"ROWS": each, "BLOCK": block, "num_warps": warps}
        run_kernel(short, -(-m // each), logits, *others, m, stride, K=k, **options, **constants)
