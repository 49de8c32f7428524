"""Replaces a `triton.jit` function: a launch compiles it for a GPU as Triton would, and executes the PTX on the CPU."""

import functools
import importlib.util
import re
from pathlib import Path

import ptxrun
import torch
from triton.runtime.jit import JITFunction

from benchmarks.kernel_report import compile_kernel
from bt_fast.kernels import shared

NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.int8: "i8",
}
_compile = functools.cache(
    lambda function, types, divisible, sm, warps: compile_kernel(function, dict(types), divisible, sm, warps)
)


def memory(tensor):
    """Returns the bytes from the tensor's first element to its last, as a numpy array that shares memory with it."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    flat = tensor.as_strided((last + 1 if tensor.numel() else 0,), (1,), tensor.storage_offset())
    return flat.view(torch.uint8).numpy()


def compiled_kernels(module, sm):
    """Returns a `CompiledKernel` by name for every kernel of a file in `kernels/`, for `mock.patch.multiple`."""
    kernels = {name: f for name, f in vars(module).items() if isinstance(f, JITFunction) and name.endswith("_kernel")}
    return {name: CompiledKernel(f, sm) for name, f in kernels.items()}


def planted(module, text, instead, path):
    """Returns the module of a file in `kernels/` with a planted bug: `instead` replaces `text` in its source.

    The source, written to `path`, includes what the file imports from `kernels/shared.py`.
    """
    source = Path(module.__file__).read_text()
    source = re.sub(r"from bt_fast\.kernels\.shared import .*\n", lambda _: Path(shared.__file__).read_text(), source)
    assert text in source
    path.write_text(source.replace(text, instead))
    spec = importlib.util.spec_from_file_location("planted", path)
    result = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(result)
    return result


class CompiledKernel:
    """A kernel launched like the function it replaces, with blocks in random order.

    `statistics` holds the statistics of the latest launch.

    Args:
        function: the `triton.jit` function.
        sm: the architecture, 80 for sm_80.
    """

    def __init__(self, function, sm):
        self.function, self.sm, self.statistics = function, sm, None

    def __getitem__(self, grid):
        return functools.partial(self._launch, grid)

    def _launch(self, grid, *args, num_warps, enable_fp_fusion, **constants):
        assert not enable_fp_fusion
        given = dict(zip(self.function.arg_names, args, strict=False)) | constants
        assert list(given) == list(self.function.arg_names)
        types = {p.name: self._type(p, given[p.name]) for p in self.function.params}
        divisible = frozenset(p.name for p in self.function.params if self._divisible(p, given[p.name]))
        kernel = _compile(self.function, tuple(types.items()), divisible, self.sm, num_warps)
        values = [given[name] for name, kind in types.items() if isinstance(kind, str)]
        values = [memory(v) if isinstance(v, torch.Tensor) else v for v in values]
        self.statistics = ptxrun.launch(
            kernel.asm["ptx"], grid, values, shared=kernel.metadata.shared, order="random", stats=True
        )

    @staticmethod
    def _type(parameter, value):
        """Returns the type Triton specialises for: None and 1 become constants, unless the function forbids it."""
        if isinstance(value, torch.Tensor):
            return f"*{NAMES[value.dtype]}"
        if parameter.annotation_type and value is not None:
            return parameter.annotation_type
        if parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
            return value
        return "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"

    @staticmethod
    def _divisible(parameter, value):
        """Returns whether Triton may assume divisibility by 16; the executor aligns all tensors so."""
        if isinstance(value, torch.Tensor):
            return True
        free = not parameter.is_constexpr and not parameter.do_not_specialize
        return free and isinstance(value, int) and value % 16 == 0


def moved_bytes(kernel):
    """Returns the bytes that the latest launch of a `CompiledKernel` loaded and stored, each as a dict by argument."""
    names = [p.name for p in kernel.function.params]
    for how in ("load", "store"):
        yield {names[k]: count for k, count in kernel.statistics[f"{how}.parameter"].items()}
