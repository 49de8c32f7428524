"""The compiled kernels, executed on the CPU with blocks in random order, equal the reference bit for bit."""

import importlib
from unittest import mock

import assign_cases
import pytest
from assign_cases import assert_same, case, poisoned_memory, run

pytest.importorskip("triton")

from compiled_kernel import compiled_kernels

from bt_fast.kernels import assign_steps as kernels

op = importlib.import_module("bt_fast.ops.assign_steps")  # as an attribute this name is the function


@pytest.fixture(params=[80, 90])
def compiled(request):
    """Replaces the kernels by their compiled versions, returned as a dict by name."""
    stand_ins = compiled_kernels(kernels, request.param)
    with mock.patch.multiple(kernels, **stand_ins):
        yield stand_ins


def check(launch, arguments):
    expected = run(op.assign_reference, arguments)
    with poisoned_memory():
        assert_same(run(launch, arguments), expected)


@pytest.mark.parametrize(("m", "full"), [(0, True), (1, False), (128, True), (131, False), (1024, True), (2600, True)])
def test_one_launch(compiled, m, full):
    for seed, kind in enumerate(assign_cases.VALUES):
        policy, f_r = assign_cases.POLICIES[seed], assign_cases.FRACTIONS[-1 - seed]
        check(op.launch_assign, case(m, seed, kind=kind, f_r=f_r, policy=policy, full=full, sound=seed % 2 > 0))


@pytest.mark.parametrize(("m", "kinds"), [(1, "normal"), (700, "special close"), (5001, "ties extreme")])
def test_in_blocks(compiled, m, kinds):
    for seed, kind in enumerate(kinds.split()):
        arguments = case(m, seed, kind=kind, f_r=0.3, policy=(3, 0, 3), full=seed == 0, sound=m > 1)
        check(op.launch_assign_in_blocks, arguments)


def test_bytes_moved(compiled):
    given_ = case(128, 0, policy=(0, 10, 2))
    run(op.launch_assign, given_)
    kernel = compiled["assign_steps_fwd_kernel"]
    names = dict(enumerate(kernel.function.arg_names))
    moved = {how: {names[k]: v for k, v in kernel.statistics[f"{how}.parameter"].items()} for how in ("load", "store")}
    assert moved["store"] == {
        "threshold": 8,
        "group": 128 * 8,
        "steps": 128 * 8,
        "step_size": 128 * 8,
        "order": 128 * 8,
        "counts": (10 + 3 + 2 + 2) * 8,
    }
    assert {name: moved["load"][name] for name in ("svar", "correct", "unfit")} == {
        "svar": 3 * 128 * 4,
        "correct": 2 * 128,
        "unfit": 128,
    }


def test_launches(compiled):
    launched = []
    for name, kernel in compiled.items():
        launch = kernel._launch
        kernel._launch = lambda *a, name=name, launch=launch, **k: launched.append(name) or launch(*a, **k)
    run(op.launch_assign, case(128, 0))
    assert launched == ["assign_steps_fwd_kernel"]
    launched.clear()
    run(op.launch_assign_in_blocks, case(3000, 0))
    assert launched == [*["select_digit_fwd_kernel"] * 4, "group_blocks_fwd_kernel", "order_blocks_fwd_kernel"]


def test_another_policy_compiles_nothing_anew(compiled):
    """Numbers of steps (0, 1 and multiples of 16 included) and step sizes are run-time arguments."""
    kernel = compiled["assign_steps_fwd_kernel"]
    for kind, values in (("steps_", (0, 1, 16, 10)), ("size_", (0.0, 1.0, 0.3))):
        parameters = [p for p in kernel.function.params if p.name.startswith(kind)]
        assert len(parameters) == 3
        for parameter in parameters:
            assert len({(kernel._type(parameter, v), kernel._divisible(parameter, v)) for v in values}) == 1
