"""The forms of the kernels of the projected-gradient step, in ℓ∞ and ℓ2."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.kernel_variants import DTYPES, Variant, arguments, pointers
from bt_fast.kernels import pgd_step as kernels
from bt_fast.ops import pgd_step as ops
from bt_fast.ops.pgd_l2_step import STAND_IN_BLOCK

NORMS = {"linf": kernels.pgd_linf_sample_fwd_kernel, "l2": kernels.pgd_l2_sample_fwd_kernel}
# elements of the images' size that the launches of a long sample's step read and write
LONG_PASSES = {"linf": 5, "l2": 8}
LEAST_PASSES = {"linf": 4, "l2": 4}
STEPS = {
    "held": kernels.pgd_held_fwd_kernel,
    "linf": kernels.pgd_linf_step_fwd_kernel,
    "measure": kernels.pgd_l2_measure_fwd_kernel,
    "l2": kernels.pgd_l2_step_fwd_kernel,
    "stand-in": kernels.pgd_l2_stand_in_fwd_kernel,
}


def _variant(
    name: str, function: Any, dtype: str, changed: dict[str, Any], aligned: bool, warps: int, **options: Any
) -> Variant:
    images = {name: f"*{dtype}" for name in ("x_adv", "grad", "clean", "step_size")}
    optional = {"steps": "*i64", "step": "*i64", "faulty": "*i32", "stand_in": "*i64", "epsilons": None}
    scratch = {"held": "*i32", "flat": "*i32", "measured": "*fp32"}
    numbers = {name: "i32" for name in ("n", "length", "blocks")}
    numbers |= {name: "fp32" for name in ("epsilon", "lower", "upper")}
    ordered = arguments(function, images | optional | scratch | numbers | changed)
    note = [f"{name} {kind}" for name, kind in changed.items() if name.islower()]
    addresses = pointers(ordered)
    return Variant(
        name=", ".join([f"{name} {dtype}", *note] + ([] if aligned else ["length not divisible"])),
        function=function,
        types=ordered,
        divisible=(*addresses, "length") if aligned else addresses,
        occupancy=0.75,
        warps=warps,
        **options,
    )


def sample(norm: str, dtype: str, elements: int, *, aligned: bool = True, main: bool = False, **types: Any) -> Variant:
    """Returns a kernel that handles a whole sample in one block."""
    warps, size = ops.sample_warps(elements), DTYPES[dtype].itemsize
    bits = 8 * size * (min(16 // size, elements // (32 * warps)) if aligned else 1)
    return _variant(
        f"pgd_{norm} sample of {elements}",
        NORMS[norm],
        dtype,
        {"BLOCK": elements} | types,
        aligned,
        warps,
        bytes_moved=4 * size,
        bytes_least=LEAST_PASSES[norm] * size,
        load_bits=bits,
        store_bits=bits,
        main=main,
    )


def long(kernel: str, dtype: str, *, aligned: bool = True, main: bool = False, **types: Any) -> Variant:
    """Returns a launch of a long sample's step."""
    size, norm = DTYPES[dtype].itemsize, "linf" if kernel in ("held", "linf") else "l2"
    parts = kernel in ("linf", "l2")
    block = ops.part_block(DTYPES[dtype]) if parts else ops.LONG_BLOCK
    block = STAND_IN_BLOCK if kernel == "stand-in" else block
    warps = ops.PART_WARPS if parts else ops.sample_warps(ops.LONG_BLOCK)
    bits = 8 * size * (min(16 // size, block // (32 * warps)) if aligned and kernel != "stand-in" else 1)
    return _variant(
        f"pgd_{norm} long, {kernel}",
        STEPS[kernel],
        dtype,
        {"BLOCK": block} | types,
        aligned,
        warps,
        bytes_moved=LONG_PASSES[norm] * size,
        bytes_least=LEAST_PASSES[norm] * size,
        load_bits=bits,
        store_bits=bits if parts else 0,
        main=main,
    )


def variants() -> Iterator[Variant]:
    """Yields the forms of a step's launches."""
    for dtype in DTYPES:
        for norm in NORMS:
            yield sample(norm, dtype, 4096, main=dtype == "fp32")
        yield long("linf", dtype, main=dtype == "fp32")
    yield long("l2", "fp32", main=True)
    # the rest differs little in code: few dtypes, and two architectures
    for norm in NORMS:
        yield sample(norm, "fp32", 2048, aligned=False)
        yield sample(norm, "fp32", 1024, aligned=False, length=1, steps=None, step=None, faulty=None)
        yield long(norm, "fp32", aligned=False)
        yield long(norm, "fp16")
    for norm in NORMS:  # each sample's own ε
        yield sample(norm, "fp32", 4096, main=True, epsilons="*fp32")
    yield sample("linf", "bf16", 4096, epsilons="*bf16")
    yield long("linf", "fp32", main=True, epsilons="*fp32")
    yield long("measure", "fp32", main=True, epsilons="*fp32")
    yield long("stand-in", "fp32", main=True, epsilons="*fp32")
    yield sample("linf", "fp16", 1024, steps="*i32", step="*i32", step_size="*fp32")
    yield long("held", "fp32")
    yield long("held", "bf16", aligned=False, steps=None, step=None, faulty=None)
    yield long("measure", "fp32")
    yield long("measure", "bf16", aligned=False, steps=None, step=None, faulty=None)
    yield long("measure", "fp16")
    yield long("stand-in", "fp32")
    yield long("stand-in", "bf16", aligned=False, stand_in="*bf16")
