"""Runs interpreted kernels on logits beyond the 2^31st, in memory that is reserved but hardly touched.

Runs with TRITON_INTERPRET=1 as a separate script, since a kernel that computes offsets in int32 reads elsewhere. Its
argument is the file of the kernels.
"""

import runpy
import sys

import interpreter
import torch

from bt_fast.ops import divergence

interpreter.complete()
kernels = runpy.run_path(sys.argv[1])
STRIDE, ROWS, CLASSES = 2**30, 3, 4


def check(name, kernel, tile_rows):
    logits = []
    for i in range(3 if name == "js_divergence" else 2):
        memory = torch.empty(STRIDE * (ROWS - 1) + CLASSES, dtype=torch.int8)
        z = memory.as_strided((ROWS, CLASSES), (STRIDE, 1))
        z.copy_(torch.arange(ROWS * CLASSES).view(ROWS, CLASSES) * (i + 1) % 5)
        logits.append(z)
    others = (torch.tensor([1, 3, 0]),) if name == "mart_loss" else ()
    beta = (6.0,) if name == "mart_loss" else ()
    results = [torch.full((ROWS,), torch.nan), *(torch.full((ROWS, CLASSES), torch.nan) for _ in logits)]
    kernels[kernel][(-(-ROWS // tile_rows),)](
        *logits, *others, *results, *beta, *[STRIDE] * len(logits), ROWS, CLASSES, ROWS=tile_rows, BLOCK=CLASSES
    )
    expected = getattr(divergence, f"{name}_reference")(*[z.float() for z in logits], *others, *beta)
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


for loss in ("trades_kl", "mart_loss", "js_divergence"):
    check(loss, f"{loss}_fwd_kernel", 4)
    check(loss, f"{loss}_looped_fwd_kernel", 1)
