"""Every form of every kernel that a launch can need, for the report and the tests: one file for each op.

A file here has a function `variants()`, which yields the forms of the kernels in the file of the same name in
`kernels/`.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Variant:
    """A kernel with the types of its arguments.

    Attributes:
        name: the unique name in the report.
        function: the `triton.jit` function.
        types: by argument, as Triton writes them: "*fp32" a pointer, "i32" a number, and the value itself (None, a
            bool, or an int) for an argument that is a constant of the compiled code.
        divisible: the arguments that are known to be divisible by 16.
        bytes_moved: bytes read and written for an element of the op's largest tensor.
        bytes_least: the minimum that the equation needs.
        load_bits: the required width of loads; store_bits: of stores; 0 if it does not matter.
        occupancy: the least share of an SM's threads that the number of registers must permit.
        main: whether it is compiled for every architecture; other variants are compiled for an old one and a new one.
        warps: the warps of a program.
    """

    name: str
    function: Any
    types: dict[str, Any]
    divisible: tuple[str, ...]
    bytes_moved: float
    bytes_least: float
    load_bits: int
    store_bits: int
    occupancy: float
    main: bool
    warps: int


def arguments(function: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Returns `given` in the order of the function's arguments; raises KeyError if one is missing."""
    return {name: given[name] for name in function.arg_names}


def pointers(types: dict[str, Any]) -> tuple[str, ...]:
    """Returns the pointer arguments: torch's allocator aligns every tensor to 16 bytes."""
    return tuple(name for name, kind in types.items() if str(kind).startswith("*"))


_FILES = [importlib.import_module(f"{__name__}.{file.name}") for file in pkgutil.iter_modules(__path__)]
VARIANTS = {variant.name: variant for file in _FILES for variant in file.variants()}
