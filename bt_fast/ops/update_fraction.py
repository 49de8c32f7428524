"""The moving fraction of robust samples: a fused kernel on CUDA, plain torch elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from bt_fast.ops import rows
from bt_fast.ops.availability import or_plain
from bt_fast.ops.launch import check, define_op, run_kernel

# the most that one program counts by itself: 8192 rows of up to 1024 classes
MOST_ROWS, MOST_LOGITS = 2**13, 2**23
ELEMENTS, WARPS = 4096, 16  # that a program holds at a time
PROGRAMS = 256  # for larger batches: a power of two


def update_fraction_(
    robust_fraction: Tensor,
    unreported_faults: Tensor,
    logits: Tensor,
    labels: Tensor,
    gamma: float,
    momentum: float,
    weights: Tensor | None = None,
) -> None:
    """Moves `F_R ← p·F_R + (1-p)·γ·mean_i[argmax z'_i = y_i]` (Eq. 5), in place; of a tie the first maximum counts.

    A batch with a row without a softmax (NaN, +Inf, or only -Inf) or a label outside 0..K-1 does not move F_R and adds
    1 to `unreported_faults`.

    It counts in integers and averages in float64 as `p·F_R + ((1-p)·γ)·(hits/m)`: the same bit for bit everywhere. One
    kernel (two above 8192 rows or 2^23 logits) reads the logits once; it is compiled separately for every K, γ and p.
    Logits with classes that are not contiguous are copied first.

    Args:
        robust_fraction: 0-dim float64, F_R, changed in place.
        unreported_faults: 0-dim int64, changed in place.
        logits: [m, K] floating point, m ≥ 1, K ≥ 2, of the adversarial samples; rows any stride apart.
        labels: [m] int64.
        gamma: γ, momentum: p.
        weights: [m] float64 with the sum m, of the rows in the mean. With these it is computed in plain torch.

    Raises:
        TypeError or ValueError: a dtype, shape or device does not fit; the message names the argument. Nothing has
            changed.
    """
    if weights is not None:
        _check(robust_fraction, unreported_faults, logits, labels)
        check("weights", weights, labels.shape, (torch.float64,), logits.device)
        _update_plainly(robust_fraction, unreported_faults, logits, labels, gamma, momentum, weights)
        return
    _update_fraction_(robust_fraction, unreported_faults, logits, labels, gamma, momentum)


def update_fraction_reference(
    robust_fraction: Tensor, unreported_faults: Tensor, logits: Tensor, labels: Tensor, gamma: float, momentum: float
) -> None:
    """`update_fraction_` in plain torch: the kernel's reference and fallback."""
    _update_plainly(robust_fraction, unreported_faults, logits, labels, gamma, momentum, None)


def _update_plainly(
    robust_fraction: Tensor,
    unreported_faults: Tensor,
    logits: Tensor,
    labels: Tensor,
    gamma: float,
    momentum: float,
    weights: Tensor | None,
) -> None:
    hits, faulty = adversarial_hits(logits, labels, weights)
    move_fraction_(robust_fraction, hits, torch.full_like(hits, len(labels)), faulty, gamma, momentum)
    unreported_faults += faulty


def adversarial_hits(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns the number of correct adversarial samples (0-dim int64), and whether one is unfit (bool).

    With `weights` [m] float64 it is the sum of the correct ones' (0-dim float64).
    """
    faulty = (~rows.has_softmax(logits) | rows.labels_outside(labels, logits.shape[1])).any()
    correct = logits.argmax(dim=1) == labels
    return (correct.sum() if weights is None else (correct * weights).sum()), faulty


def move_fraction_(
    robust_fraction: Tensor, hits: Tensor, m: Tensor, faulty: Tensor, gamma: float, momentum: float
) -> None:
    """Moves `F_R ← p·F_R + (1-p)·γ·hits/m` (Eq. 5), in place.

    Args:
        robust_fraction: 0-dim float64, F_R.
        hits: 0-dim, the number of correct samples, or the sum of their weights, among `m` (0-dim) adversarial ones.
        faulty: 0-dim bool: F_R does not move.
        gamma: γ, momentum: p.
    """
    moved = momentum * robust_fraction + (1.0 - momentum) * gamma * (hits.double() / m)
    robust_fraction.copy_(torch.where(faulty, robust_fraction, moved))


@or_plain(update_fraction_reference)
def launch_update_fraction(
    robust_fraction: Tensor, unreported_faults: Tensor, logits: Tensor, labels: Tensor, gamma: float, momentum: float
) -> None:
    """`update_fraction_` as one launch, or two for a large batch, for logits that `rows.kernel_takes`."""
    from bt_fast.kernels.update_fraction import update_fraction_finish_kernel, update_fraction_fwd_kernel

    m, k = logits.shape
    logits, stride = rows.rows_apart(logits)
    each, block = block_of(k)
    alone = m <= MOST_ROWS and m * k <= MOST_LOGITS
    # a new workspace for each call, and no atomics: nothing to reset, and nothing that two streams share
    tallies = None if alone else torch.empty(2, PROGRAMS, dtype=torch.int32, device=logits.device)
    state, rule = (robust_fraction, unreported_faults), {"MOMENTUM": momentum, "WEIGHT": (1.0 - momentum) * gamma}
    given = (*state, logits, labels.contiguous(), tallies, m, -(-m // each), stride)
    sizes = {"K": k, "ROWS": each, "BLOCK": block, "num_warps": WARPS}
    run_kernel(update_fraction_fwd_kernel, 1 if alone else PROGRAMS, *given, **rule, **sizes)
    if not alone:
        run_kernel(update_fraction_finish_kernel, 1, *state, tallies, m, **rule, PROGRAMS=PROGRAMS, num_warps=4)


def block_of(classes: int) -> tuple[int, int]:
    """Returns the rows and classes that a program holds at a time."""
    block = min(1 << (classes - 1).bit_length(), ELEMENTS)
    return ELEMENTS // block, block


def _check(robust_fraction: Tensor, unreported_faults: Tensor, logits: Tensor, labels: Tensor, *_: float) -> None:
    rows.check_logits("logits", logits, rows=1)
    check("labels", labels, logits.shape[:1], (torch.int64,), logits.device)
    check("robust_fraction", robust_fraction, (), (torch.float64,), logits.device)
    check("unreported_faults", unreported_faults, (), (torch.int64,), logits.device)


_update_fraction_ = define_op(
    "update_fraction_(Tensor(a0!) robust_fraction, Tensor(a1!) unreported_faults, Tensor logits, Tensor labels, "
    "float gamma, float momentum) -> ()",
    check=_check,
    run=lambda *given: (launch_update_fraction if rows.kernel_takes(given[2]) else update_fraction_reference)(*given),
)
