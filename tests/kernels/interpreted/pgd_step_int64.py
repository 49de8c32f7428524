"""Runs interpreted kernels on elements beyond the 2^31st, in memory that is reserved but hardly touched.

Runs with TRITON_INTERPRET=1 as a separate script, since a kernel that computes offsets in int32 writes elsewhere. Its
arguments are the file of the kernels and, to run only some, their names.
"""

import runpy
import sys

import interpreter
import torch
from far_rows import BLOCK, LENGTH, ROWS, beginnings, images

interpreter.complete()
kernels = runpy.run_path(sys.argv[1])

# far rows are long: for kernels that go over whole rows, so many short ones that the last begins at 2^31
MANY, SHORT, LONG_BLOCK = 2**11 + 1, 2**20, 2**17
NONE_LEFT = torch.zeros(MANY, dtype=torch.int64)
NONE_LEFT[-1] = 1
COUNTS = (NONE_LEFT, torch.tensor(0))


def last(value, dtype=torch.int8):
    """Returns images with a last row, [2^31, 2^31 + 2^20), that holds the value at its last place and 0 elsewhere."""
    x = torch.empty(MANY * SHORT, dtype=dtype)
    x[-SHORT:] = 0
    x[-1] = value
    return x


def linf(name, result):
    x, grad, clean = images(10, 20, 30), images(1, -1, 1), images(10, 20, 30)
    kernels[name][(ROWS,)](
        x, grad, clean, torch.full((ROWS,), 7.0), None, None, *result, 5.0, None, 0.0, 100.0, BLOCK=BLOCK
    )
    assert beginnings(x) == [[15] * 4, [15] * 4, [35] * 4]


def pgd_linf_sample_fwd_kernel(name):
    linf(name, (None, LENGTH))


def pgd_linf_step_fwd_kernel(name):
    linf(name, (torch.zeros(ROWS, dtype=torch.int32), LENGTH, 1))


def pgd_held_fwd_kernel(name):
    grad, held = last(float("nan"), torch.float16), torch.zeros(MANY, dtype=torch.int32)
    kernels[name][(MANY,)](grad, *COUNTS, held, None, SHORT, BLOCK=LONG_BLOCK)
    assert held[-1] == 1


def pgd_l2_sample_fwd_kernel(name):
    x, grad, clean = images(10, 20, 30), images(1, -1, 1), images(10, 20, 30)
    flat = torch.full((ROWS,), -1, dtype=torch.int32)
    kernels[name][(ROWS,)](
        x, grad, clean, torch.full((ROWS,), 16.0), None, None, flat, None, LENGTH, 100.0, None, 0.0, 100.0,
        BLOCK=BLOCK,
    )  # fmt: skip
    assert beginnings(x) == [[18] * 4, [12] * 4, [38] * 4]
    assert flat.tolist() == [0, 0, 0]


def pgd_l2_measure_fwd_kernel(name):
    measured, flat = torch.zeros(3, MANY), torch.full((MANY,), -1, dtype=torch.int32)
    kernels[name][(MANY,)](
        last(2), last(-4), last(1), torch.full((MANY,), 3.0), *COUNTS, measured, flat, None,
        MANY, SHORT, 0.5, None, -100.0, 100.0, BLOCK=LONG_BLOCK,
    )  # fmt: skip
    assert flat[-1] == 0
    torch.testing.assert_close(measured[:, -1], torch.tensor([0.25, 3.0, 0.25]))  # 2 - 3 - 1 = -2 shrinks to 0.5


def pgd_l2_step_fwd_kernel(name):
    x, grad, clean = images(10, 20, 30), images(1, -1, 1), images(8, 16, 24)
    measured = torch.tensor([[1.0], [4.0], [0.5]]).repeat(1, ROWS)
    kernels[name][(ROWS,)](
        x, grad, clean, None, None, measured, ROWS, LENGTH, 1, 0.0, 100.0, BLOCK=BLOCK
    )  # fmt: skip
    assert beginnings(x) == [[11] * 4, [16] * 4, [29] * 4]


def pgd_l2_stand_in_fwd_kernel(name):
    x, flat = last(2), torch.ones(MANY, dtype=torch.int32)
    kernels[name][(MANY,)](
        x, last(1), torch.full((MANY,), 3.0), *COUNTS, last(5), flat, SHORT, 4.0, None, -100.0, 100.0,
        BLOCK=LONG_BLOCK,
    )  # fmt: skip
    assert x[-1] == 5  # 2 + 15 - 1 = 16 shrinks to 4


for kernel in sys.argv[2:] or [name for name in globals() if name.startswith("pgd_") and name in kernels]:
    globals()[kernel](kernel)
