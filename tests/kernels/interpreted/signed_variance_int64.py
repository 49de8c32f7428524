"""Runs an interpreted kernel on elements beyond the 2^31st, in memory that is reserved but hardly touched.

Runs with TRITON_INTERPRET=1 as a separate script, since a kernel that computes offsets in int32 writes elsewhere. Its
argument is the file of the kernels.
"""

import runpy
import sys

import interpreter
import torch

interpreter.complete()
kernels = runpy.run_path(sys.argv[1])
STRIDE, ROWS, K = 2**30, 4, 4


def far_apart():
    """Returns rows of logits 2^30 elements apart, with their first maxima at 0, 1, 2 and 3."""
    z = torch.empty(STRIDE * (ROWS - 1) + K, dtype=torch.int8)
    rows = z.as_strided((ROWS, K), (STRIDE, 1))
    rows.copy_(torch.eye(K) * 3)
    return rows


def mined(kernel, grid, *sizes, **constants):
    svar, correct, unfit = torch.full((ROWS,), 7.0), torch.full((ROWS,), 7).byte(), torch.full((ROWS,), 7).byte()
    p = torch.full((ROWS, K), 7.0)
    labels = torch.tensor([0, 1, 0, 3])
    kernels[kernel][grid](far_apart(), labels, svar, correct, unfit, p, *sizes, STRIDE, K=K, **constants)
    assert torch.allclose(p, (torch.eye(K) * 3).softmax(dim=1))
    assert (correct.tolist(), unfit.tolist()) == ([1, 1, 0, 1], [0] * ROWS)
    assert (svar > 0).tolist() == [True, True, False, True]


mined("signed_variance_fwd_kernel", (2,), ROWS, ROWS=2, BLOCK=4)
mined("signed_variance_long_fwd_kernel", (ROWS,), BLOCK=2)
