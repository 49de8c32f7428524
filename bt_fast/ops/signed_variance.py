"""The uncertainty that sorts samples into groups: a fused kernel on CUDA, plain torch elsewhere."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bt_fast.ops import rows
from bt_fast.ops.availability import or_plain
from bt_fast.ops.launch import check, define_op


class SignedVariance(NamedTuple):
    """The result of `signed_variance`, on the logits' device.

    Attributes:
        svar: [m] float32 (float64 for float64 logits), -0.0 for a misclassified uniform row.
        correct: [m] bool.
        probabilities: [m, K] of SVar's dtype, softmax of the logits.
        unfit: [m] uint8, 0 for a valid row, plus 1 if the row has no softmax, plus 2 if its label is not a class.
    """

    svar: Tensor
    correct: Tensor
    probabilities: Tensor
    unfit: Tensor


def signed_variance(logits: Tensor, labels: Tensor) -> SignedVariance:
    """Returns signed prediction variance (paper, section 3.2 and Eq. 4), and the softmax that it is the variance of.

    `SVar_i = s_i · Var_k[softmax(z_i)]` with the biased variance over the K classes, which have the mean 1/K exactly,
    and `s_i = +1` if `argmax z_i = y_i` (the first maximum of a tie), else -1.

    Computed in float64 and rounded once: both results are within 1e-6 of the exact ones, relative to their own size,
    for logits of any magnitude. (If all logits of a row lie within 1e-9 of each other, the variance is below 1e-18/K²
    and its error below 1e-24/K²; it is exactly 0 if all are equal.) A row without softmax (NaN, +Inf, or only -Inf) has
    NaN for SVar and probabilities, and is not correct. A label outside 0..K-1 counts as misclassified.

    The kernel is compiled separately for every K. It reads the logits once, from K = 8193 on twice, and writes the
    probabilities once. Logits with classes that are not contiguous are copied first.

    Args:
        logits: [m, K] floating point, K ≥ 2, rows any stride apart. m may be 0.
        labels: [m] int64.

    Raises:
        TypeError or ValueError: a dtype, shape or device does not fit; the message names the argument.
    """
    return SignedVariance(*_signed_variance(logits, labels))


def signed_variance_reference(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`signed_variance` in plain torch: the kernel's reference and fallback."""
    dtype, fit = rows.result_dtype(logits), rows.has_softmax(logits)
    probabilities = rows.softmax(logits)
    variance = (probabilities - 1.0 / logits.shape[1]).square().mean(dim=1)
    correct = fit & (logits.argmax(dim=1) == labels)
    unfit = ~fit + 2 * rows.labels_outside(labels, logits.shape[1]).to(torch.uint8)
    return torch.where(correct, variance, -variance).to(dtype), correct, probabilities.to(dtype), unfit


@or_plain(signed_variance_reference)
def launch_signed_variance(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`signed_variance` as one launch, for logits that `rows.kernel_takes`."""
    from bt_fast.kernels.signed_variance import signed_variance_fwd_kernel, signed_variance_long_fwd_kernel

    kernels = signed_variance_fwd_kernel, signed_variance_long_fwd_kernel
    svar, correct, probabilities, unfit = _results(logits, labels)
    rows.launch(*kernels, logits, labels.contiguous(), svar, correct.view(torch.uint8), unfit, probabilities)
    return svar, correct, probabilities, unfit


def _results(logits: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the four results, not yet filled."""
    m, dtype, device = len(logits), rows.result_dtype(logits), logits.device
    svar = torch.empty(m, dtype=dtype, device=device)
    correct, unfit = (torch.empty(m, dtype=kind, device=device) for kind in (torch.bool, torch.uint8))
    return svar, correct, torch.empty(logits.shape, dtype=dtype, device=device), unfit


def _check(logits: Tensor, labels: Tensor) -> None:
    rows.check_logits("logits", logits)
    check("labels", labels, logits.shape[:1], (torch.int64,), logits.device)


_signed_variance = define_op(
    "signed_variance(Tensor logits, Tensor labels) -> (Tensor, Tensor, Tensor, Tensor)",
    check=_check,
    run=lambda z, y: (launch_signed_variance if rows.kernel_takes(z) else signed_variance_reference)(z, y),
    results=_results,
)
