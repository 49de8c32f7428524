"""The projected-gradient step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.kernel_variants import DTYPES, Variant, arguments, pointers
from bt_fast.kernels import pgd_step as kernels
from bt_fast.ops import pgd_step as ops


def pgd_linf(form: str, dtype: str, *, aligned: bool = True, main: bool = False, **types: Any) -> Variant:
    """`pgd_linf_step_fwd_kernel`; form: "numbers", or "rows" or "interleaved" limits of each channel."""
    limits, size = form != "numbers", DTYPES[dtype].itemsize
    block = ops.linf_block(DTYPES[dtype], limits)
    images = {name: f"*{dtype}" for name in ("x_adv", "grad", "clean", "step_size")}
    optional = {"steps": "*i64", "step": "*i64", "limits": "*fp32" if limits else None, "faulty": "*i32"}
    numbers = {name: "i32" for name in ("length", "blocks", "channels", "rows")}
    numbers |= {name: "fp32" for name in ("epsilon", "lower", "upper")}
    given = images | optional | numbers | {"BLOCK": block, "INTERLEAVED": form == "interleaved"} | types
    ordered = arguments(kernels.pgd_linf_step_fwd_kernel, given)
    addresses = pointers(ordered)
    bits = 8 * size * (block // (32 * ops.WARPS) if aligned else 1)
    note = [f"{name} {kind}" for name, kind in types.items()] + ([] if aligned else ["length not divisible"])
    return Variant(
        name=", ".join([f"pgd_linf {form} {dtype}", *note]),
        function=kernels.pgd_linf_step_fwd_kernel,
        types=ordered,
        divisible=(*addresses, "length") if aligned else addresses,
        bytes_moved=4 * size,
        bytes_least=4 * size,
        load_bits=bits,
        store_bits=bits,
        occupancy=0.75,
        main=main,
        warps=ops.WARPS,
    )


def variants() -> Iterator[Variant]:
    """What a step's launch can be."""
    for dtype in DTYPES:
        for form in ("numbers", "rows", "interleaved"):
            yield pgd_linf(form, dtype, main=form == "numbers" or dtype == "fp32")
        yield pgd_linf("numbers", dtype, aligned=False)
    yield pgd_linf("numbers", "fp32", steps=None, step=None, faulty=None)
    yield pgd_linf("numbers", "fp32", steps="*i32", step="*i32")
    yield pgd_linf("numbers", "fp16", step_size="*fp32")
    yield pgd_linf("numbers", "fp32", aligned=False, length=1)
