"""Every kernel in every form that a launch can give it, for the report and for the tests: one file for each op.

A file here has a function `variants()`, which yields the forms of the kernels of the file of that name in `kernels/`.
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
    """A kernel with its arguments' types.

    Attributes:
        name: unique, as the report shows it.
        function: the `triton.jit` function.
        types: by argument, as Triton writes them: "*fp32" a pointer, "i32" a number, and the value itself (None, a
            bool, or an int) for an argument that is a constant of the compiled code.
        divisible: the arguments that are known to be divisible by 16.
        bytes_moved: bytes read and written for an element of the op's largest tensor.
        bytes_least: the fewest that the equation allows.
        load_bits: the width of loads that must be reached, store_bits: of stores; 0 where it does not matter.
        occupancy: the least share of an SM's threads that the registers must leave room for.
        main: whether it is compiled for every architecture; the others for an old one and a new one.
        warps: of a program.
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
    """`given` in the order of the function's arguments; KeyError where one is missing."""
    return {name: given[name] for name in function.arg_names}


def pointers(types: dict[str, Any]) -> tuple[str, ...]:
    """The arguments that are addresses: torch's allocator places every tensor at a multiple of 16."""
    return tuple(name for name, kind in types.items() if str(kind).startswith("*"))


_FILES = [importlib.import_module(f"{__name__}.{file.name}") for file in pkgutil.iter_modules(__path__)]
VARIANTS = {variant.name: variant for file in _FILES for variant in file.variants()}
