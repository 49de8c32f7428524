"""The forms of the kernels of `update_fraction_`: the share of correct rows and its moving average."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.kernel_variants import DTYPES, Variant, arguments, pointers
from bt_fast.kernels import update_fraction as kernels
from bt_fast.ops import update_fraction as ops

STATE = {"robust_fraction": "*fp64", "unreported_faults": "*i64"}
NUMBERS = {"m": "i32", "MOMENTUM": 0.9, "WEIGHT": 0.08, "PROGRAMS": ops.PROGRAMS}


def update_fraction(
    dtype: str, classes: int, load_bits: int, *, launches: int = 1, stride: Any = None, by_16: bool = True, **more: Any
) -> Variant:
    """Rows of `classes` logits, contiguous or `stride` apart (divisible by 16, or not); the first of the launches."""
    each, block = ops.block_of(classes)
    given = {"logits": f"*{dtype}", "labels": "*i64", "tallies": "*i32" if launches == 2 else None, "blocks": "i32"}
    given |= {"stride": stride, "K": classes, "ROWS": each, "BLOCK": block}
    ordered = arguments(kernels.update_fraction_fwd_kernel, STATE | NUMBERS | given)
    note = [] if stride is None else [f"rows {stride} apart{'' if by_16 or stride == 1 else ', not divisible'}"]
    note += ["first of two launches"] if launches == 2 else []
    return Variant(
        name=", ".join([f"update_fraction {dtype} K={classes}", *note]),
        function=kernels.update_fraction_fwd_kernel,
        types=ordered,
        divisible=(*pointers(ordered), "stride") if isinstance(stride, str) and by_16 else pointers(ordered),
        bytes_moved=DTYPES[dtype].itemsize,
        bytes_least=DTYPES[dtype].itemsize,
        load_bits=load_bits,
        store_bits=0,
        occupancy=0.25,
        warps=ops.WARPS,
        **{"main": False} | more,
    )


def finish() -> Variant:
    """The second of two launches."""
    ordered = arguments(kernels.update_fraction_finish_kernel, STATE | NUMBERS | {"tallies": "*i32"})
    return Variant(
        name="update_fraction, second of two launches",
        function=kernels.update_fraction_finish_kernel,
        types=ordered,
        divisible=pointers(ordered),
        bytes_moved=4,
        bytes_least=4,
        load_bits=0,
        store_bits=0,
        occupancy=0.25,
        main=True,
        warps=4,
    )


def variants() -> Iterator[Variant]:
    """Yields the forms of a launch, for some numbers of classes."""
    yield update_fraction("fp32", 1000, 128, main=True)
    yield update_fraction("fp32", 10, 64)
    yield update_fraction("fp16", 100, 64)
    yield update_fraction("bf16", 1000, 128, launches=2)
    yield update_fraction("fp32", 16, 128, stride="i32")
    yield update_fraction("fp32", 1001, 32, stride="i32", by_16=False)
    yield update_fraction("fp32", 10, 0, stride=1)
    yield update_fraction("fp32", 100_000, 128, launches=2, stride="i64")
    yield finish()
