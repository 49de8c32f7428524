"""The forms of the kernels of `ascent_direction`: the gradient of the attack's loss with respect to the logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.kernel_variants import DTYPES, Variant, arguments, pointers
from bt_fast.kernels import ascent_direction as kernels
from bt_fast.ops import rows


def ascent_direction(
    dtype: str,
    classes: int,
    load_bits: int,
    store_bits: int,
    *,
    stride: Any = None,
    by_16: bool = True,
    scaled: bool = False,
    **more: Any,
) -> Variant:
    """Yields rows of `classes` logits, contiguous or `stride` apart (divisible by 16 or not), with a scale or not."""
    size, long = DTYPES[dtype].itemsize, classes > rows.LONGEST_BLOCK
    each, block, warps = (1, rows.LONG_BLOCK, rows.LONG_WARPS) if long else rows.block_of(classes)
    function = kernels.ascent_direction_long_fwd_kernel if long else kernels.ascent_direction_fwd_kernel
    tensors = {"logits": f"*{dtype}", "target": "*fp32", "direction": f"*{dtype}"}
    constants = {"K": classes, "ROWS": each, "BLOCK": block, "SCALED": scaled}
    ordered = arguments(function, tensors | {"n": "i32", "stride": stride} | constants)
    note = ["scaled"] if scaled else []
    if stride is not None:
        note.append(f"rows {stride} apart{'' if by_16 or stride == 1 else ', not divisible'}")
    return Variant(
        name=", ".join([f"ascent_direction {dtype} K={classes}", *note]),
        function=function,
        types=ordered,
        divisible=(*pointers(ordered), "stride") if isinstance(stride, str) and by_16 else pointers(ordered),
        bytes_moved=(3 + scaled) * size + 4 + 4 * scaled if long else 2 * size + 4,
        bytes_least=2 * size + 4,
        load_bits=load_bits,
        store_bits=store_bits,
        warps=warps,
        **{"occupancy": 0.25, "main": False} | more,
    )


def variants() -> Iterator[Variant]:
    """Yields the forms of a launch, for some numbers of classes."""
    yield ascent_direction("fp32", 1000, 128, 128, main=True, occupancy=0.5)
    yield ascent_direction("fp32", 10, 64, 64, occupancy=0.5)
    yield ascent_direction("fp32", 1000, 128, 128, scaled=True, occupancy=0.5)
    yield ascent_direction("fp16", 100, 128, 64, scaled=True, occupancy=0.5)
    yield ascent_direction("bf16", 8192, 128, 64)
    yield ascent_direction("fp32", 16, 128, 128, stride="i32")
    yield ascent_direction("fp32", 1001, 32, 32, stride="i32", by_16=False)
    yield ascent_direction("fp32", 10, 0, 64, stride=1)
    yield ascent_direction("fp32", 100_000, 128, 128, main=True)
    yield ascent_direction("fp16", 100_000, 128, 64, stride="i64", scaled=True)
