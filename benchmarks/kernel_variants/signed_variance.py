"""The forms of the kernels of `signed_variance`: softmax and signed variance."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.kernel_variants import DTYPES, Variant, arguments, pointers
from bt_fast.kernels import signed_variance as kernels
from bt_fast.ops import rows


def signed_variance(
    dtype: str, classes: int, load_bits: int, store_bits: int, *, stride: Any = None, by_16: bool = True, **more: Any
) -> Variant:
    """Rows of `classes` logits, contiguous or `stride` apart (divisible by 16, or not)."""
    size, long = DTYPES[dtype].itemsize, classes > rows.LONGEST_BLOCK
    each, block, warps = (1, rows.LONG_BLOCK, rows.LONG_WARPS) if long else rows.block_of(classes)
    function = kernels.signed_variance_long_fwd_kernel if long else kernels.signed_variance_fwd_kernel
    tensors = {"logits": f"*{dtype}", "labels": "*i64", "svar": "*fp32", "correct": "*u8", "unfit": "*u8"}
    tensors |= {"probabilities": "*fp32"}
    ordered = arguments(function, tensors | {"m": "i32", "stride": stride, "K": classes, "ROWS": each, "BLOCK": block})
    note = [] if stride is None else [f"rows {stride} apart{'' if by_16 or stride == 1 else ', not divisible'}"]
    return Variant(
        name=", ".join([f"signed_variance {dtype} K={classes}", *note]),
        function=function,
        types=ordered,
        divisible=(*pointers(ordered), "stride") if isinstance(stride, str) and by_16 else pointers(ordered),
        bytes_moved=(2 if long else 1) * size + 4,
        bytes_least=size + 4,
        load_bits=load_bits,
        store_bits=store_bits,
        warps=warps,
        **{"occupancy": 0.25, "main": False} | more,
    )


def variants() -> Iterator[Variant]:
    """Yields the forms of a launch, for some numbers of classes."""
    yield signed_variance("fp32", 1000, 128, 128, main=True, occupancy=0.5)
    yield signed_variance("fp32", 100_000, 128, 128, main=True)
    yield signed_variance("fp32", 10, 64, 64, occupancy=0.5)
    yield signed_variance("fp16", 100, 64, 128, occupancy=0.5)
    yield signed_variance("bf16", 8192, 128, 128)
    yield signed_variance("fp32", 16, 128, 128, stride="i32")
    yield signed_variance("fp32", 1001, 32, 32, stride="i32", by_16=False)
    yield signed_variance("fp32", 10, 0, 64, stride=1)
    yield signed_variance("fp16", 100_000, 64, 128, stride="i64")
