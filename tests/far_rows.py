"""Rows of int8 beyond the 2^31st element, in memory that is reserved but hardly touched."""

import torch

LENGTH, ROWS, BLOCK = 2**30, 3, 4  # of images: the third begins at 2^31, and kernels take the first elements of each
STARTS = range(0, LENGTH * ROWS, LENGTH)
STRIDE, LOGITS = 2**30, 4  # as many rows of logits as there are classes


def images(*firsts):
    """Returns three images in a row that begin with these numbers."""
    x = torch.empty(LENGTH * ROWS, dtype=torch.int8)
    for start, first in zip(STARTS, firsts, strict=True):
        x[start : start + BLOCK] = first
    return x


def beginnings(x):
    """Returns the first elements of each image."""
    return [x[start : start + BLOCK].tolist() for start in STARTS]


def logits():
    """Returns rows of logits 2^30 elements apart, with their first maxima at 0, 1, 2 and 3."""
    z = torch.empty(STRIDE * (LOGITS - 1) + LOGITS, dtype=torch.int8)
    rows = z.as_strided((LOGITS, LOGITS), (STRIDE, 1))
    rows.copy_(torch.eye(LOGITS) * 3)
    return rows
