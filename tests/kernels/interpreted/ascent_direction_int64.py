"""Runs an interpreted kernel on elements beyond the 2^31st, in memory that is reserved but hardly touched.

Runs with TRITON_INTERPRET=1 as a separate script, since a kernel that computes offsets in int32 writes elsewhere. Its
argument is the file of the kernels.
"""

import runpy
import sys

import interpreter
import torch
from far_rows import LOGITS, STRIDE, logits

interpreter.complete()
kernels = runpy.run_path(sys.argv[1])
ROWS = K = LOGITS


def directed(kernel, grid, *sizes, **constants):
    direction, target = torch.full((ROWS, K), 7.0), torch.eye(K)
    kernels[kernel][grid](logits(), target, direction, *sizes, STRIDE, K=K, **constants)
    gap = (torch.eye(K) * 3).softmax(dim=1) - target
    assert torch.allclose(direction, gap * 8)  # the largest is 0.13


directed("ascent_direction_fwd_kernel", (2,), ROWS, ROWS=2, BLOCK=4)
directed("ascent_direction_long_fwd_kernel", (ROWS,), BLOCK=2)
