"""The forms of the kernels of `order_by_steps`: one launch for all pairs, or count, sum and placing in blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.kernel_variants import Variant, arguments, pointers
from bt_fast.kernels import order_by_steps as kernels
from bt_fast.ops.order_by_steps import COUNT, PAIRS, PLACE

TYPES = {
    "steps": "*i64",
    "order": "*i64",
    "active": "*i64",
    "cells": "*i32",
    "starts": "*i64",
    "m": "i32",
    "most": "i32",
}
TYPES |= {"blocks": "i32"}


def variant(function: Any, options: dict[str, int], moved: float, main: bool) -> Variant:
    """Returns a kernel of the file; moved: bytes for a sample."""
    ordered = arguments(
        function, {name: kind for name, kind in (TYPES | options).items() if name in function.arg_names}
    )
    return Variant(
        name=function.__name__.removesuffix("_fwd_kernel"),
        function=function,
        types=ordered,
        divisible=pointers(ordered),
        bytes_moved=moved,
        bytes_least=moved,
        load_bits=0,
        store_bits=0,
        occupancy=0.0,
        main=main,
        warps=options["num_warps"],
    )


def variants() -> Iterator[Variant]:
    """Yields the forms of the launches of an order."""
    yield variant(kernels.order_by_steps_fwd_kernel, PAIRS, 16, True)
    yield variant(kernels.count_steps_fwd_kernel, COUNT, 8, False)
    yield variant(kernels.place_by_steps_fwd_kernel, PLACE, 16, False)
