"""Elements beyond the 2^31st, by an interpreted kernel, in memory that is reserved and hardly touched.

Runs with TRITON_INTERPRET=1 as a script of its own, since a kernel that computes offsets in int32 writes elsewhere. Its
argument is the file of the kernels.
"""

import runpy
import sys

import torch

pgd_linf_step_fwd_kernel = runpy.run_path(sys.argv[1])["pgd_linf_step_fwd_kernel"]

LENGTH, ROWS = 2**30, 3
STARTS = range(0, LENGTH * ROWS, LENGTH)


def images(*firsts):
    x = torch.empty(LENGTH * ROWS, dtype=torch.int8)
    for start, first in zip(STARTS, firsts, strict=True):
        x[start : start + 4] = first
    return x


def linf():
    x, grad, clean = images(10, 20, 30), images(1, -1, 1), images(10, 20, 30)
    pgd_linf_step_fwd_kernel[(ROWS,)](
        x, grad, clean, torch.full((ROWS,), 7.0), None, None, None, None,
        LENGTH, 1, 5.0, 0.0, 100.0, 1, 1, BLOCK=4, INTERLEAVED=False,
    )  # fmt: skip
    assert [x[s : s + 4].tolist() for s in STARTS] == [[15] * 4, [15] * 4, [35] * 4]


linf()
