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


def mined(kernel, grid, *sizes, **constants):
    svar, correct, unfit = torch.full((ROWS,), 7.0), torch.full((ROWS,), 7).byte(), torch.full((ROWS,), 7).byte()
    p = torch.full((ROWS, K), 7.0)
    labels = torch.tensor([0, 1, 0, 3])
    kernels[kernel][grid](logits(), labels, svar, correct, unfit, p, *sizes, STRIDE, K=K, **constants)
    assert torch.allclose(p, (torch.eye(K) * 3).softmax(dim=1))
    assert (correct.tolist(), unfit.tolist()) == ([1, 1, 0, 1], [0] * ROWS)
    assert (svar > 0).tolist() == [True, True, False, True]


mined("signed_variance_fwd_kernel", (2,), ROWS, ROWS=2, BLOCK=4)
mined("signed_variance_long_fwd_kernel", (ROWS,), BLOCK=2)
