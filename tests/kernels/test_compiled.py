"""Checks the code that the compiler generates for the kernels, for every architecture, without a GPU."""

import importlib
import pkgutil

import pytest

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from benchmarks import kernel_report
from benchmarks.kernel_variants import VARIANTS
from bt_fast import kernels

KEPT = kernel_report.RESULT.read_text().splitlines()
COMPILER_OF_THE_REPORT = KEPT[0] == kernel_report.heading()[0]
of_the_report = pytest.mark.skipif(not COMPILER_OF_THE_REPORT, reason="the kept report is of another compiler")


def one_in_turn(name):
    """One of the architectures that the report has of a form, another for the next form."""
    listed = kernel_report.targets(VARIANTS[name])
    return listed[list(VARIANTS).index(name) % len(listed)]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_kernel_uses_registers_alone_and_wide_accesses(name):
    for sm in kernel_report.targets(VARIANTS[name]) if COMPILER_OF_THE_REPORT else [one_in_turn(name)]:
        assert kernel_report.broken_rules(name, sm) == [], sm
    if COMPILER_OF_THE_REPORT:
        assert kernel_report.rows(name) == [row for row in KEPT if row.startswith(f"| {name} | ")]


@of_the_report
def test_the_report_has_every_form_on_every_architecture():
    forms = [(name, str(sm)) for name, variant in VARIANTS.items() for sm in kernel_report.targets(variant)]
    above = kernel_report.heading()
    assert KEPT[: len(above)] == above
    assert [tuple(row.split(" | ")[:2]) for row in KEPT[len(above) :]] == [(f"| {name}", sm) for name, sm in forms]


def test_another_compiler_than_the_report_s_compiles_for_every_architecture_too():
    listed = {sm for variant in VARIANTS.values() for sm in kernel_report.targets(variant)}
    assert {one_in_turn(name) for name in VARIANTS} == listed


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


@pytest.mark.parametrize(("sm", "registers", "warps", "share"), [(80, 32, 4, 1), (80, 40, 4, 0.75), (75, 64, 4, 1)])
def test_occupancy(sm, registers, warps, share):
    assert kernel_report.occupancy(sm, registers, warps) == share
