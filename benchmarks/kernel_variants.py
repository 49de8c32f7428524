"""Every kernel in every form that a launch can give it: one entry each, for the report and for the tests.

A new kernel is added by its variants to `VARIANTS`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bt_fast.kernels import pgd_step as kernels
from bt_fast.ops import pgd_step as ops

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Variant:
    """A kernel with its arguments' types.

    Attributes:
        name: unique, as the report shows it.
        function: the `triton.jit` function.
        types: by argument, as Triton writes them: "*fp32" a pointer, "i32" a number, and the value itself (None, a
            bool, or an int) for an argument that is a constant of the compiled code.
        divisible: the arguments that are known to be divisible by 16.
        bytes_moved: bytes read and written for an element of the images.
        bytes_least: the fewest that the equation allows.
        vector_bits: the width of the accesses to the images that the launch is to reach.
        occupancy: the least share of an SM's threads that the registers must leave room for.
        main: whether it is compiled for every architecture; the others for an old one and a new one.
    """

    name: str
    function: Any
    types: dict[str, Any]
    divisible: tuple[str, ...]
    bytes_moved: int
    bytes_least: int
    vector_bits: int
    occupancy: float
    main: bool
    warps: int = ops.WARPS


def pgd_linf(form: str, dtype: str, *, aligned: bool = True, main: bool = False, **types: Any) -> Variant:
    """`pgd_linf_step_fwd_kernel`; form: "numbers", or "rows" or "interleaved" limits of each channel."""
    limits, size = form != "numbers", DTYPES[dtype].itemsize
    block = ops.linf_block(DTYPES[dtype], limits)
    pointers = {name: f"*{dtype}" for name in ("x_adv", "grad", "clean", "step_size")}
    optional = {"steps": "*i64", "step": "*i64", "limits": "*fp32" if limits else None, "faulty": "*i32"}
    numbers = {name: "i32" for name in ("length", "blocks", "channels", "rows")}
    numbers |= {name: "fp32" for name in ("epsilon", "lower", "upper")}
    given = pointers | optional | numbers | {"BLOCK": block, "INTERLEAVED": form == "interleaved"} | types
    ordered = {name: given[name] for name in kernels.pgd_linf_step_fwd_kernel.arg_names}
    addresses = tuple(name for name, kind in ordered.items() if str(kind).startswith("*"))
    note = [f"{name} {kind}" for name, kind in types.items()] + ([] if aligned else ["length not divisible"])
    return Variant(
        name=", ".join([f"pgd_linf {form} {dtype}", *note]),
        function=kernels.pgd_linf_step_fwd_kernel,
        types=ordered,
        divisible=(*addresses, "length") if aligned else addresses,
        bytes_moved=4 * size,
        bytes_least=4 * size,
        vector_bits=8 * size * (block // (32 * ops.WARPS) if aligned else 1),
        occupancy=0.75,
        main=main,
    )


def _variants() -> Iterator[Variant]:
    for dtype in DTYPES:
        for form in ("numbers", "rows", "interleaved"):
            yield pgd_linf(form, dtype, main=form == "numbers" or dtype == "fp32")
        yield pgd_linf("numbers", dtype, aligned=False)
    yield pgd_linf("numbers", "fp32", steps=None, step=None, faulty=None)
    yield pgd_linf("numbers", "fp32", steps="*i32", step="*i32")
    yield pgd_linf("numbers", "fp16", step_size="*fp32")
    yield pgd_linf("numbers", "fp32", aligned=False, length=1)


VARIANTS = {variant.name: variant for variant in _variants()}
