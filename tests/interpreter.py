"""Adds to Triton's interpreter what some versions lack for these kernels."""

import functools

import numpy as np
import triton
import triton.language as tl
from triton.language import semantic
from triton.runtime import interpreter


def complete():
    """Lets the interpreter run kernels as the compiler understands them. Call it once in a process.

    The interpreter truncates float32 to bfloat16 instead of rounding, and converts subnormal numbers wrongly. Loop
    bounds are arrays of one element, and triton up to 3.6 calls `int()` on them, which numpy 2.5 refuses. Triton 3.2
    has no boolean constants, and treats a single mask that is False as no mask.
    """
    patch = interpreter._patch_lang

    @functools.wraps(patch)
    def patched(kernel):
        scope = patch(kernel)
        tl.tensor.__index__ = lambda number: number.handle.data.item()
        return scope

    interpreter._patch_lang = patched
    interpreter._convert_float = _with_bfloat16(interpreter._convert_float)
    if triton.__version__.startswith("3.2."):
        interpreter.InterpreterBuilder.get_int1_ty = lambda builder: tl.int1
        semantic._store_legacy = _unless_masked(semantic._store_legacy)
        semantic.atom_red_typechecking_impl = _with_its_mask(semantic.atom_red_typechecking_impl)


def _with_bfloat16(convert):
    """Wraps the interpreter's conversion of floating point to convert between float32 and bfloat16 as hardware does."""

    @functools.wraps(convert)
    def converted(values, given, wanted, rounding):
        if (given, wanted) == (tl.bfloat16, tl.float32):
            return values.view(np.uint16).astype(np.uint32) << 16
        if (given, wanted) == (tl.float32, tl.bfloat16):
            bits = values.view(np.uint32)
            nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # ties round to even
            return np.where(np.isnan(values.view(np.float32)), (bits >> 16) | 0x40, nearest).astype(np.uint16)
        return convert(values, given, wanted, rounding)

    return converted


def _unless_masked(store):
    @functools.wraps(store)
    def stored(pointer, value, mask, *options):
        if mask is None or mask.handle.data.any():
            store(pointer, value, mask, *options)

    return stored


def _with_its_mask(check):
    @functools.wraps(check)
    def checked(pointer, value, mask, op, builder):
        pointer, value, always = check(pointer, value, None, op, builder)
        if mask is None:
            return pointer, value, always
        if pointer.type.is_block():
            mask = semantic.broadcast_impl_shape(mask, pointer.type.get_block_shapes(), builder)
        return pointer, value, mask

    return checked
