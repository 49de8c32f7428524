"""Common code of the ops: registration, the launch of a kernel, the layout of dense images, and checks of arguments."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from bt_fast.ops.availability import kernels_run

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# a launch counts programs, rows and offsets within a row in int32; the reserve covers the last block's tail
MOST_INT32 = 2**31 - 2**16

Fields = ParamSpec("Fields")
Packed = TypeVar("Packed")
Result = TypeVar("Result")


def define_op(
    schema: str, check: Callable[..., None], run: Callable[..., Any], results: Callable[..., Any] = lambda *_: None
) -> Any:
    """Registers an op of `bt_fast`; each function takes its arguments in the order of the schema.

    Args:
        schema: name, arguments and results, in `torch.library`'s form.
        check: raises TypeError or ValueError unless the arguments fit; called first in both others.
        run: computes the results.
        results: empty tensors like those that `run` returns, for a trace.
    """

    def checked(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            check(*arguments)
            return function(*arguments)

        return call

    name, changed = schema.partition("(")[0], re.findall(r"!\)\?? (\w+)", schema)
    types = schema.removeprefix(name)
    op = torch.library.custom_op(f"bt_fast::{name}", checked(run), mutates_args=changed, schema=types)
    op.register_fake(checked(results))
    return op


def packed(kind: Callable[Fields, Packed]) -> Callable[[Callable[[Packed], Result]], Callable[Fields, Result]]:
    """Decorates a function of a named tuple of this kind: it is then called with the fields."""

    def decorated(function: Callable[[Packed], Result]) -> Callable[Fields, Result]:
        @functools.wraps(function)
        def run(*given: Fields.args, **named: Fields.kwargs) -> Result:
            return function(kind(*given, **named))

        return run

    return decorated


def run_kernel(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Launches this many programs of a kernel. Multiplications and additions are not fused."""
    kernel[(programs,)](*arguments, **constants, enable_fp_fusion=False)


def dense_format(x: Tensor) -> torch.memory_format | None:
    """Returns the dense format of `x` with the sample outermost; None if it is not dense, or permuted otherwise."""
    formats = [torch.contiguous_format]
    formats += {4: [torch.channels_last], 5: [torch.channels_last_3d]}.get(x.dim(), [])
    return next((f for f in formats if x.is_contiguous(memory_format=f)), None)


def takes_images(x: Tensor, programs: int) -> bool:
    """Whether this many programs can compute images like `x` [n, ...]: on CUDA, dense, and not in float64."""
    if not x.is_cuda or x.dtype not in KERNEL_DTYPES or dense_format(x) is None:
        return False
    return max(x[:1].numel(), programs) < MOST_INT32 and kernels_run(x)


def contiguous(values: Tensor | None) -> Tensor | None:
    """Returns `values`, copied if they are not contiguous."""
    return None if values is None else values.contiguous()


def rounded(value: float, dtype: torch.dtype) -> float:
    """Returns a number rounded to `dtype`, infinite if it is too large.

    torch rounds it before subtracting it from 16-bit tensors on the CPU, but not on CUDA; and it does not clamp at one
    that is too large.
    """
    return torch.tensor(value, dtype=dtype, device="cpu").item() if dtype.itemsize < 8 else float(value)


def check(
    name: str,
    values: Tensor | None,
    shape: Sequence[int],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    changed: bool = False,
) -> None:
    """Raises TypeError or ValueError that names `name` unless `values`, if given, have shape, dtype and device.

    Values `changed` in place must also be contiguous.
    """
    if values is None:
        return
    if values.dtype not in dtypes:
        expected = " or ".join(str(d) for d in dict.fromkeys(dtypes))
        raise TypeError(f"{name} must be {expected}, got {values.dtype}: write {name}.to({dtypes[0]})")
    if values.shape != torch.Size(shape):
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(values.shape)}: give it like the others")
    if values.device != device:
        instead = f"write {name}.to({str(device)!r})"
        raise ValueError(f"{name} must be on {device} like the others, got {values.device}: {instead}")
    if changed and not values.is_contiguous():
        raise ValueError(f"{name} must be contiguous: write {name}.contiguous()")


def check_images(name: str, x: Tensor) -> None:
    """Raises TypeError or ValueError that names `name` unless `x` is floating point [n, ...]."""
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {x.dtype}: write {name}.float()")
    if x.dim() < 1:
        raise ValueError(f"{name} must have shape [n, ...], got a 0-dim tensor: of one sample write {name}[None]")
