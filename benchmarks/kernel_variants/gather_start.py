"""The forms of the kernel of `gather_start`: the sorted batch and its random start."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.kernel_variants import DTYPES, Variant, arguments, pointers
from bt_fast.kernels.gather_start import gather_start_fwd_kernel
from bt_fast.ops.gather_start import BLOCK, WARPS


def gather_start(noise: str, dtype: str, *, aligned: bool = True, main: bool = False, **types: Any) -> Variant:
    """Returns `gather_start_fwd_kernel`; noise: "normal" or "uniform"."""
    size = DTYPES[dtype].itemsize
    given = {name: f"*{dtype}" for name in ("x", "clean", "start")}
    given |= {name: "*i64" for name in ("order", "steps", "state")} | {"samples": None}
    given |= {name: "i32" for name in ("length", "blocks")}
    given |= {name: "fp32" for name in ("scale", "lower", "upper")}
    ordered = arguments(gather_start_fwd_kernel, given | {"BLOCK": BLOCK, "NORMAL": noise == "normal"} | types)
    addresses = pointers(ordered)
    bits = 8 * size * (BLOCK // (32 * WARPS) if aligned else 1)
    note = [f"{name} {kind}" for name, kind in types.items()] + ([] if aligned else ["length not divisible"])
    return Variant(
        name=", ".join([f"gather_start {noise} {dtype}", *note]),
        function=gather_start_fwd_kernel,
        types=ordered,
        divisible=(*addresses, "length") if aligned else addresses,
        bytes_moved=3 * size,
        bytes_least=3 * size,
        load_bits=bits,
        store_bits=bits,
        occupancy=0.75,
        main=main,
        warps=WARPS,
    )


def variants() -> Iterator[Variant]:
    """Yields the forms of a launch."""
    for dtype in DTYPES:
        for noise in ("normal", "uniform"):
            yield gather_start(noise, dtype, main=noise == "normal" and dtype != "fp16")
        yield gather_start("normal", dtype, aligned=False)
    yield gather_start("normal", "fp32", order=None)
    yield gather_start("normal", "fp32", steps=None)
    yield gather_start("normal", "fp32", order=None, steps=None)
    yield gather_start("normal", "fp32", steps="*i32")
    for noise in ("normal", "uniform"):
        yield gather_start(noise, "fp32", samples="*i64")
    yield gather_start("normal", "fp32", aligned=False, length=1)
