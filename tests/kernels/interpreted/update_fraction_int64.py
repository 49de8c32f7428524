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


f_r, faults = torch.tensor(0.5, dtype=torch.float64), torch.tensor(0)
kernels["update_fraction_fwd_kernel"][(1,)](
    f_r, faults, far_apart(), torch.tensor([0, 1, 0, 3]), None,
    ROWS, 2, STRIDE, MOMENTUM=0.5, WEIGHT=0.5, K=K, ROWS=2, BLOCK=2,
)  # fmt: skip
assert (f_r.item(), faults.item()) == (0.5 * 0.5 + 0.5 * 0.75, 0)
