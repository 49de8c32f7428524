"""The forms of the kernels of `assign_steps`: one program for a batch that fits it, else blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.kernel_variants import Variant, arguments, pointers
from bt_fast.kernels import assign_steps as kernels
from bt_fast.ops.assign_steps import BLOCK, BLOCK_WARPS, BLOCKS, CHUNK, WARPS

FLOATS = {"svar": "*fp32", "robust_fraction": "*fp64", "threshold": "*fp64", "step_size": "*fp64"}
INTEGERS = {
    name: "*i64"
    for name in ("group", "steps", "order", "counts", "above", "block_sizes", "block_unfit", "faults", "group_counts")
}
BYTES = {"correct": "*u8", "unfit": "*u8", "histograms": "*i32"}
NUMBERS = {name: "i32" for name in ("m", "most", "n_faults", "blocks", "digit")}
POLICY = {f"steps_{group}": "i32" for group in ("outlier", "boundary", "robust")}
POLICY |= {f"size_{group}": "i64" for group in ("outlier", "boundary", "robust")}
COMMON = FLOATS | INTEGERS | BYTES | NUMBERS | POLICY


def variant(name: str, function: Any, warps: int, moved: float, least: float, main: bool, **given: Any) -> Variant:
    """Returns a kernel of the file with its usual types, except those given; moved, least: bytes for a sample."""
    types = {key: kind for key, kind in (COMMON | given).items() if key in function.arg_names}
    ordered = arguments(function, types)
    return Variant(
        name=name,
        function=function,
        types=ordered,
        divisible=pointers(ordered),
        bytes_moved=moved,
        bytes_least=least,
        load_bits=0,
        store_bits=0,
        occupancy=0.0,
        main=main,
        warps=warps,
    )


def variants() -> Iterator[Variant]:
    """Yields the forms of an assignment's launches."""
    written = 8 + 8 + 8  # group, steps, step size
    least = 4 + 1 + 1 + written + 8
    moved = least + 2 * 4 + 1  # SVar again for the sizes and for the order, correct twice
    one = kernels.assign_steps_fwd_kernel
    for block, warps in WARPS.items():
        sizes = {"BLOCK": block, "CHUNK": CHUNK}
        yield variant(f"assign_steps {block}", one, warps, moved, least, block == max(WARPS), **sizes)
    bare: dict[str, Any] = {"BLOCK": 1024, "CHUNK": CHUNK, "unfit": None, "faults": None, "group_counts": None}
    yield variant("assign_steps 1024 bare", one, WARPS[1024], moved - 1, least - 1, False, **bare)
    blocks = {"BLOCK": BLOCK, "BLOCKS": BLOCKS}
    yield variant("select_digit", kernels.select_digit_fwd_kernel, BLOCK_WARPS, 4, 4, True, BLOCK=BLOCK)
    group, order = kernels.group_blocks_fwd_kernel, kernels.order_blocks_fwd_kernel
    yield variant("group_blocks", group, BLOCK_WARPS, 6 + written, 6 + written, True, **blocks)
    yield variant("group_blocks bare", group, BLOCK_WARPS, 5 + written, 5 + written, False, unfit=None, **blocks)
    yield variant("order_blocks", order, BLOCK_WARPS, 24, 24, False, **blocks)
    yield variant("order_blocks bare", order, BLOCK_WARPS, 24, 24, False, faults=None, group_counts=None, **blocks)
