"""The forms of the kernels of the update's losses: TRADES' KL, MART and Jensen-Shannon."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.kernel_variants import DTYPES, Variant, arguments, pointers
from bt_fast.kernels import divergence as kernels
from bt_fast.ops import divergence as ops

WHOLE = {"trades_kl": 2, "mart_loss": 2, "js_divergence": 3}  # the number of logits that each loss takes


def loss(name: str, dtype: str, tile: tuple[int, int, int], *, looped: bool, main: bool = False) -> Variant:
    """Returns a loss's kernel for whole rows, or for some classes at a time."""
    block, rows, warps = tile
    function = getattr(kernels, f"{name}_looped_fwd_kernel" if looped else f"{name}_fwd_kernel")
    given: dict[str, Any] = {argument: f"*{dtype}" for argument in function.arg_names}
    given |= {argument: "i32" for argument in function.arg_names if "stride" in argument}
    given |= {"labels": "*i64", "loss": "*fp32", "beta": "fp32", "n": "i32", "classes": "i32"}
    ordered = arguments(function, given | {"ROWS": rows, "BLOCK": block})
    size, logits = DTYPES[dtype].itemsize, WHOLE[name]
    return Variant(
        name=f"{name} {dtype}, {'blocks of' if looped else 'up to'} {block} classes",
        function=function,
        types=ordered,
        divisible=pointers(ordered),
        bytes_moved=(4 if looped else 2) * logits * size,
        bytes_least=2 * logits * size,
        load_bits=0,
        store_bits=0,
        occupancy=0.25,
        main=main,
        warps=warps,
    )


def variants() -> Iterator[Variant]:
    """Yields the forms of the losses' launches."""
    for name in WHOLE:
        for dtype in DTYPES:
            tiles = ops.TILES[WHOLE[name]]
            for tile in tiles:
                yield loss(name, dtype, tile, looped=False, main=dtype == "fp32" and tile == tiles[0])
            yield loss(name, dtype, ops.LOOPED[WHOLE[name]], looped=True)
