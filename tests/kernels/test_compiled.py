"""Checks the code that the compiler generates for the kernels, for every architecture, without a GPU."""

import importlib
import pkgutil

import pytest

pytest.importorskip("triton")

import triton
from triton.runtime.jit import JITFunction

from benchmarks import kernel_report
from benchmarks.kernel_variants import VARIANTS
from bt_fast import kernels


@pytest.mark.parametrize("name", VARIANTS)
def test_a_kernel_uses_registers_alone_and_wide_accesses(name):
    for sm in kernel_report.targets(VARIANTS[name]):
        assert kernel_report.broken_rules(name, sm) == [], sm


def test_a_step_in_single_precision_divisible_by_16_takes_128_bits():
    steps = [v for v in VARIANTS.values() if v.types.get("grad") == "*fp32" and "length" in v.divisible]
    assert steps
    assert all(v.load_bits == 128 for v in steps)
    writing = [v for v in steps if v.store_bits]  # the others only check the gradient
    assert writing
    assert all(v.store_bits == 128 for v in writing)


def test_no_kernel_is_left_out():
    files = [importlib.import_module(f"bt_fast.kernels.{file.name}") for file in pkgutil.iter_modules(kernels.__path__)]
    result = {f for file in files for name, f in vars(file).items() if isinstance(f, JITFunction) and "_kernel" in name}
    assert result
    assert result == {variant.function for variant in VARIANTS.values()}


def test_the_report_is_up_to_date():
    kept = kernel_report.RESULT.read_text()
    if f"triton {triton.__version__}." not in kept:
        pytest.skip("the kept report is of another compiler")
    assert kernel_report.table() == kept


@pytest.mark.parametrize(("sm", "registers", "warps", "share"), [(80, 32, 4, 1), (80, 40, 4, 0.75), (75, 64, 4, 1)])
def test_occupancy(sm, registers, warps, share):
    assert kernel_report.occupancy(sm, registers, warps) == share
