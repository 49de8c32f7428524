"""Runs an interpreted kernel on elements beyond the 2^31st, in memory that is reserved but hardly touched.

Runs with TRITON_INTERPRET=1 as a separate script, since a kernel that computes offsets in int32 writes elsewhere. Its
argument is the file of the kernels. The other kernel there takes its offsets from the same functions.
"""

import runpy
import sys

import interpreter
import torch
from far_rows import LENGTH, ROWS, beginnings, images

interpreter.complete()
recall_linf_fwd_kernel = runpy.run_path(sys.argv[1])["recall_linf_fwd_kernel"]


def recalled(order, slots, expected):
    x, clean, start, memory = images(10, 20, 30), images(0, 0, 0), images(0, 0, 0), images(0, 127, -127)
    recall_linf_fwd_kernel[(ROWS,)](
        x, clean, start, memory, slots, torch.zeros(2, dtype=torch.int64), order, None, None, None, None, None,
        1, 2.0, None, 0.0, 0.0, 31.0,
        CHANNELS=1, HEIGHT=1, WIDTH=LENGTH, OWN_HEIGHT=1, OWN_WIDTH=LENGTH, LAST=False, NOISY=False, BLOCK=4,
    )  # fmt: skip
    assert beginnings(start) == [[v] * 4 for v in expected]


recalled(torch.tensor([2, 0, 1]), torch.tensor([1, 2, -1]), [30, 12, 18])
recalled(None, torch.tensor([2, 1, 1]), [8, 22, 31])
