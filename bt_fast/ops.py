"""The operations that a fused kernel can take over, in plain torch: every one stays on its tensors' device.

No function here reads a value back to the host, so none of them waits for the device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

OUTLIER, BOUNDARY, ROBUST = 0, 1, 2
GROUPS = ("outlier", "boundary", "robust")


def wide(values: Tensor) -> Tensor:
    """`values` in float32 at least: 16-bit numbers are only ever stored, never computed with."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def signed_variance(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Signed prediction variance (paper, section 3.2 and Eq. 4).

    `SVar_i = s_i · Var_k[softmax(z_i)]` with the biased variance over the K classes, whose mean is exactly 1/K, and
    `s_i = +1` where `argmax z_i = y_i` (the first maximum wins a tie), else -1.

    Args:
        logits: [m, K] floating point.
        labels: [m] int64. A label outside 0..K-1 counts as misclassified.

    Returns:
        SVar [m] and probabilities [m, K], float32 (float64 for float64 logits), and correct [m] bool, in the order
        (SVar, correct, probabilities). A row with NaN or +Inf has SVar NaN.
    """
    probabilities = wide(logits).softmax(dim=1)
    correct = logits.argmax(dim=1) == labels
    variance = (probabilities - 1.0 / logits.shape[1]).square().mean(dim=1)
    return torch.where(correct, variance, -variance), correct, probabilities


def robust_threshold(svar: Tensor, robust_fraction: Tensor) -> Tensor:
    """`T = max(0, Percentile(SVar, 1 - F_R))` (Eq. 6), interpolated between order statistics as `numpy.quantile`.

    Args:
        svar: [m] floating point, m ≥ 0.
        robust_fraction: 0-dim, F_R in [0, 1].

    Returns:
        0-dim float64; 0 for an empty batch.
    """
    m = len(svar)
    if m == 0:
        return torch.zeros((), dtype=torch.float64, device=svar.device)
    ordered = svar.sort().values.double()
    rank = (1.0 - robust_fraction.double()) * (m - 1)
    below = rank.floor().clamp(0, m - 1)
    t = rank - below
    pair = torch.stack([below, (below + 1).clamp(max=m - 1)]).long()
    low, high = ordered[pair].unbind()
    # numpy's form: from the nearer end, so that the result is monotone and exact at both
    percentile = torch.where(t < 0.5, low + (high - low) * t, high - (high - low) * (1.0 - t))
    return percentile.clamp(min=0.0)


def three_groups(svar: Tensor, correct: Tensor, robust_fraction: Tensor) -> tuple[Tensor, Tensor]:
    """The classification rule of Eq. 6: outlier, boundary or robust.

    At `F_R = 0` every correctly classified sample is boundary, the largest too (the limit of Eq. 6).

    Args:
        svar: [m] floating point.
        correct: [m] bool; the sign of SVar is not used, since it is lost where the variance is 0.
        robust_fraction: 0-dim, F_R.

    Returns:
        group [m] int64, one of OUTLIER, BOUNDARY, ROBUST, and the threshold (0-dim float64).
    """
    threshold = robust_threshold(svar, robust_fraction)
    robust = (svar.double() >= threshold) & (robust_fraction > 0)
    return correct.long() + (correct & robust).long(), threshold


def order_by_steps(steps: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The stable order by descending step count, and how many samples are active at each step.

    Args:
        steps: [m] integers in 0..most.
        most: an upper bound on `steps`, known to the host.

    Returns:
        order [m] int64, so that `steps[order]` never increases and equal counts keep their places, and active [most]
        int64, where `active[t]` counts the samples with more than t steps: the length of step t's prefix.
    """
    order = steps.sort(descending=True, stable=True).indices
    active = (steps > torch.arange(most, device=steps.device)[:, None]).sum(dim=1)
    return order, active


def update_fraction(robust_fraction: Tensor, logits: Tensor, labels: Tensor, gamma: float, momentum: float) -> Tensor:
    """`F_R ← p·F_R + (1-p)·γ·mean_i[argmax z'_i = y_i]` (Eq. 5).

    Args:
        robust_fraction: 0-dim floating point, F_R.
        logits: [m, K], m ≥ 1, of the corrupted samples.
        labels: [m] int64.
        gamma: γ, momentum: p.

    Returns:
        The new F_R, 0-dim, of F_R's dtype.
    """
    hits = (logits.argmax(dim=1) == labels).sum().to(robust_fraction.dtype)
    return momentum * robust_fraction + (1.0 - momentum) * gamma * (hits / len(labels))


def ascent_direction(logits: Tensor, target: Tensor) -> Tensor:
    """The inner loss's gradient with respect to the logits: `softmax(z') - target`, up to a power of two for each row.

    It is the gradient of `KL(target ‖ softmax(z'))` (TRADES: the target is the clean distribution) and of the
    cross-entropy (MART, PGD: the target is one-hot), finite however saturated either is. Each row is scaled so that its
    largest entry is in [1, 2): near the clean point the difference is smaller than the smallest number of 16 bits, in
    which the model may compute, and neither the sign nor the normalised direction of the image gradient cares.

    Args:
        logits: [n, K] floating point.
        target: [n, K] probabilities.

    Returns:
        [n, K] in the logits' dtype.
    """
    gap = wide(logits).softmax(dim=1) - target
    exponent = torch.frexp(gap.abs().amax(dim=1, keepdim=True)).exponent
    return torch.ldexp(gap, (1 - exponent).clamp(max=126)).to(logits.dtype)  # 2^127 is float32's largest power


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def linf_step_(
    x_adv: Tensor, grad: Tensor, clean: Tensor, step_size: Tensor, epsilon: float, lower: float, upper: float
) -> None:
    """One projected step of steepest ascent in ℓ∞, in place: `x' ← clip(clip(x' + α_i·sign(g), x ± ε), lower, upper)`.

    Args:
        x_adv: [n, ...] floating point, changed in place.
        grad: [n, ...], overwritten with its sign times α.
        clean: [n, ...], x.
        step_size: [n], α of each sample, in the images' dtype.
        epsilon: ε.
        lower: the least pixel value, upper: the greatest.
    """
    x_adv.add_(grad.sign_().mul_(_per_sample(step_size, grad)))
    torch.maximum(x_adv, clean - epsilon, out=x_adv)
    torch.minimum(x_adv, clean + epsilon, out=x_adv)
    x_adv.clamp_(lower, upper)


def l2_step_(
    x_adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    step_size: Tensor,
    epsilon: float,
    lower: float,
    upper: float,
    stand_in: Tensor,
) -> None:
    """One projected step of steepest ascent in ℓ2, in place: `x' ← x + renorm(clip(x' + α_i·g/‖g‖, lower, upper) - x)`.

    Args:
        x_adv: [n, ...] floating point, changed in place.
        grad: [n, ...].
        clean: [n, ...], x.
        step_size: [n], α of each sample, in the images' dtype.
        epsilon: ε, the largest ℓ2 norm of a perturbation.
        lower: the least pixel value, upper: the greatest.
        stand_in: [n, ...], the direction to take where a sample's gradient is exactly 0 (not normalised).
    """
    wide_grad, wide_clean = wide(grad), wide(clean)
    norm = _per_sample(wide_grad.flatten(1).norm(dim=1), grad)
    direction = torch.where(norm == 0, wide(stand_in), wide_grad / norm)
    moved = (wide(x_adv) + direction * _per_sample(step_size, grad)).clamp_(lower, upper)
    delta = (moved - wide_clean).renorm_(p=2, dim=0, maxnorm=epsilon)
    x_adv.copy_((wide_clean + delta).clamp_(lower, upper))


def trades_kl(adversarial_logits: Tensor, clean_logits: Tensor) -> Tensor:
    """`Σ_i KL(softmax(z_i) ‖ softmax(z'_i))`, differentiable in both, with finite gradients for saturated rows.

    Args:
        adversarial_logits: [n, K] floating point, z'.
        clean_logits: [n, K] floating point, z; the gradient flows through this target too.

    Returns:
        0-dim, float32 (float64 for float64 logits); 0 for n = 0.
    """
    log_p = F.log_softmax(wide(clean_logits), dim=1)
    log_q = F.log_softmax(wide(adversarial_logits), dim=1)
    p = log_p.exp()
    # where p is 0 its term is 0, even against log(0) on both sides
    return (p * torch.where(p > 0, log_p - log_q, 0.0)).sum()
