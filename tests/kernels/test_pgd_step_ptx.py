"""The compiled kernels, executed on the CPU, have layouts, predicates, vector accesses and rounding as on a GPU."""

from unittest import mock

import pgd_cases
import pytest
import torch

pytest.importorskip("triton")

from compiled_kernel import compiled_kernels

from bt_fast.kernels import pgd_step as kernels
from bt_fast.ops import pgd_l2_step, pgd_step

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BARE, FULL = {}, {"counts": True, "flags": True}
OWN = FULL | {"own": True}
LAST = FULL | {"last": True}
SMALL = ("step_size", "steps", "step", "faulty", "held", "flat", "measured", "stand_in", "epsilons")


@pytest.fixture(params=[80, 90])
def compiled(request):
    """Replaces the step's kernels by their compiled versions, returned as a dict by name."""
    stand_ins = compiled_kernels(kernels, request.param)
    with mock.patch.multiple(kernels, **stand_ins):
        yield stand_ins


def moved(kernel):
    """Returns the bytes of images that a kernel's latest launch loaded and stored, by argument."""
    names = dict(enumerate(kernel.function.arg_names))
    return [
        {names[k]: v for k, v in kernel.statistics.get(f"{how}.parameter", {}).items() if names[k] not in SMALL}
        for how in ("load", "store")
    ]


@pytest.mark.parametrize(
    ("n", "shape", "dtype", "options"),
    [
        (3, (3, 32, 32), torch.float32, FULL),
        (2, (3, 20, 20), torch.bfloat16, FULL),
        (3, (1, 28, 28), torch.float16, FULL),
        (2, (2, 15, 37), torch.float32, FULL),
        (3, (1,), torch.float32, FULL),
        (2, (7,), torch.bfloat16, BARE),
        (3, (2, 47, 47), torch.float32, FULL),
        (3, (1, 64, 68), torch.float16, FULL),
        (3, (3, 16, 16), torch.float32, LAST),
        (2, (5, 15, 37), torch.bfloat16, FULL),
        (3, (3, 32, 32), torch.float32, OWN),
        (3, (3, 20, 20), torch.bfloat16, OWN),
        (3, (2, 47, 47), torch.float16, OWN),
        (3, (1, 64, 68), torch.float32, OWN),
    ],
)
def test_linf(compiled, n, shape, dtype, options):
    case = pgd_cases.case(n, shape, dtype, 0, **options)
    pgd_cases.assert_same(case.run(pgd_step.launch_linf), case.run(pgd_step.linf_reference))


@pytest.mark.parametrize(
    ("n", "shape", "dtype", "options"),
    [
        (5, (3, 32, 32), torch.float32, FULL),
        (7, (1, 28, 28), torch.float16, FULL | {"seeded": True}),
        (7, (7,), torch.bfloat16, {"seeded": True}),
        (7, (1,), torch.float32, FULL),
        (7, (1, 64, 68), torch.float32, FULL | {"seeded": True}),
        (7, (2, 47, 47), torch.bfloat16, {"flags": True}),
        (7, (3, 15, 37), torch.float16, FULL | {"seeded": True}),
        (7, (3, 16, 16), torch.float32, LAST),
        (7, (3, 32, 32), torch.float32, OWN),
        (7, (3, 15, 37), torch.bfloat16, OWN | {"seeded": True}),
        (7, (1, 64, 68), torch.float32, OWN),
        (7, (2, 47, 47), torch.float16, OWN | {"seeded": True}),
    ],
)
def test_l2(compiled, n, shape, dtype, options):
    case = pgd_cases.l2_case(n, shape, dtype, 0, **options)
    pgd_cases.assert_near(case.run(pgd_l2_step.launch_l2), case.run(pgd_l2_step.l2_reference))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("launch", "arrange", "kernel"),
    [
        (pgd_step.launch_linf, pgd_cases.case, "pgd_linf_sample_fwd_kernel"),
        (pgd_l2_step.launch_l2, pgd_cases.l2_case, "pgd_l2_sample_fwd_kernel"),
    ],
)
def test_a_step_reads_three_tensors_and_writes_one(compiled, launch, arrange, kernel, dtype):
    case = arrange(3, (3, 32, 32), dtype, 2, flags=True)  # ℓ2 without zero gradients
    case = case.but(grad=case.arguments["grad"].nan_to_num(0, 1, -1) + 1)
    case = case.but(steps=torch.tensor([1, 0, 3]), step=torch.tensor(0))
    case.run(launch)
    each = 2 * 3072 * dtype.itemsize
    assert moved(compiled[kernel]) == [{"x_adv": each, "grad": each, "clean": each}, {"x_adv": each}]
    if "l2" in kernel:
        assert moved(compiled["pgd_l2_stand_in_fwd_kernel"]) == [{}, {}]


def test_a_long_sample_is_read_once_more_in_linf_and_four_times_more_in_l2(compiled):
    each = 2 * 4352 * 4
    case = pgd_cases.case(2, (1, 64, 68), torch.float32, 0, special=False)
    case.run(pgd_step.launch_linf)
    assert moved(compiled["pgd_held_fwd_kernel"]) == [{"grad": each}, {}]
    step = [{"x_adv": each, "grad": each, "clean": each}, {"x_adv": each}]
    assert moved(compiled["pgd_linf_step_fwd_kernel"]) == step
    case = pgd_cases.l2_case(2, (1, 64, 68), torch.float32, 2)
    case.run(pgd_l2_step.launch_l2)
    assert moved(compiled["pgd_l2_measure_fwd_kernel"]) == [{"x_adv": each, "grad": 2 * each, "clean": each}, {}]
    assert moved(compiled["pgd_l2_step_fwd_kernel"]) == step


@pytest.mark.parametrize(
    ("launch", "arrange", "kernels"),
    [
        (pgd_step.launch_linf, pgd_cases.case, ["pgd_linf_sample_fwd_kernel"]),
        (pgd_l2_step.launch_l2, pgd_cases.l2_case, ["pgd_l2_sample_fwd_kernel", "pgd_l2_stand_in_fwd_kernel"]),
    ],
)
def test_one_epsilon_for_all_is_the_same_code_as_before_samples_had_their_own(compiled, launch, arrange, kernels):
    arrange(3, (3, 32, 32), torch.float32, 2).run(launch)
    for kernel in kernels:
        names = compiled[kernel].statistics["load.parameter"]
        assert compiled[kernel].function.arg_names.index("epsilons") not in names
