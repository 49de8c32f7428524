"""Runs an interpreted kernel on elements beyond the 2^31st, in memory that is reserved but hardly touched.

Runs with TRITON_INTERPRET=1 as a separate script, since a kernel that computes offsets in int32 writes elsewhere. Its
argument is the file of the kernels.
"""

import runpy
import sys

import interpreter
import torch
from far_rows import LENGTH, ROWS, beginnings, images

interpreter.complete()
gather_start_fwd_kernel = runpy.run_path(sys.argv[1])["gather_start_fwd_kernel"]


def sorted_by(order, expected):
    x, clean, start = images(10, 20, 30), images(0, 0, 0), images(0, 0, 0)
    gather_start_fwd_kernel[(ROWS,)](
        x, clean, start, order, None, None, torch.zeros(2, dtype=torch.int64),
        LENGTH, 1, 0.0, 1.0, 25.0, BLOCK=4, NORMAL=True,
    )  # fmt: skip
    assert beginnings(clean) == [[v] * 4 for v in expected]
    assert beginnings(start) == [[min(v, 25)] * 4 for v in expected]


sorted_by(torch.tensor([2, 0, 1]), [30, 10, 20])
sorted_by(None, [10, 20, 30])
