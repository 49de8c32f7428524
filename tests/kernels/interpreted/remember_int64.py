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
remember_fwd_kernel = runpy.run_path(sys.argv[1])["remember_fwd_kernel"]

memory, x_adv, clean = images(5, 5, 5), images(11, 20, 28), images(10, 20, 30)
slots = torch.tensor([2, 0, 1])
remember_fwd_kernel[(ROWS,)](
    memory, x_adv, clean, slots, None, None, None, None, None, None, 1, 2.0, None,
    CHANNELS=1, HEIGHT=1, WIDTH=LENGTH, OWN_HEIGHT=1, OWN_WIDTH=LENGTH, LAST=False, BLOCK=4,
)  # fmt: skip
assert beginnings(memory) == [[0] * 4, [-127] * 4, [64] * 4]
