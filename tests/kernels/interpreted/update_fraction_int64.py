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


f_r, faults = torch.tensor(0.5, dtype=torch.float64), torch.tensor(0)
kernels["update_fraction_fwd_kernel"][(1,)](
    f_r, faults, logits(), torch.tensor([0, 1, 0, 3]), None,
    ROWS, 2, STRIDE, MOMENTUM=0.5, WEIGHT=0.5, K=K, ROWS=2, BLOCK=2,
)  # fmt: skip
assert (f_r.item(), faults.item()) == (0.5 * 0.5 + 0.5 * 0.75, 0)
