"""Computes the update's losses, each with its gradient by all logits: TRADES' KL, MART and Jensen-Shannon.

Logits are [n, classes] with the class as the contiguous index; gradients are contiguous, in the logits' dtype;
everything in between is float32. Each loss has two kernels. The first holds ROWS whole rows, and so reads every logit
once. In the other, for more classes than a block holds, a program goes over one row three times: for its normaliser
(online softmax), for the sums over the classes, and for the gradient. Sums are kept by lane and added up once.

Row values have the shape [ROWS, 1], in the second kind of kernel [1, 1]; blocks [ROWS, BLOCK] or [1, BLOCK].
"""

import triton
import triton.language as tl

NO_CLASS = tl.constexpr(2**31 - 1)


@triton.jit
def _row_ids(n, ROWS: tl.constexpr):
    """Returns this program's rows and their mask, in 64 bits: a batch may hold more than 2^31 logits."""
    o_n = tl.cast(tl.program_id(0), tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    return o_n, o_n < n


@triton.jit
def _load(x, m_x):
    """Loads logits in float32; classes after the last are -Inf, with probability 0."""
    return tl.load(x, mask=m_x, other=-float("inf")).to(tl.float32)


@triton.jit
def _store(x, b_x, m_x):
    tl.store(x, b_x.to(x.dtype.element_ty), mask=m_x)


@triton.jit
def _sum(b_x):
    return tl.sum(b_x, axis=1, keep_dims=True)


@triton.jit
def _log_softmax(b_x):
    b_x = b_x - tl.max(b_x, axis=1, keep_dims=True)  # subtracted first: the sum of both normalisers would round at 1e4
    return b_x - tl.log(_sum(tl.exp(b_x)))


@triton.jit
def _add_to_normaliser(b_max, b_sum, b_x):
    """Updates an online softmax in every lane: the largest logit so far, and the sum of `exp(x - largest)`."""
    b_new = tl.maximum(b_max, b_x)
    b_shift = _finite(b_new)
    return b_new, b_sum * tl.exp(b_max - b_shift) + tl.exp(b_x - b_shift)


@triton.jit
def _normaliser(b_max, b_sum):
    """Combines the lanes of a row: the largest logit, and the logarithm of the sum of `exp(x - largest)`."""
    b_largest = tl.max(b_max, axis=1, keep_dims=True)
    return b_largest, tl.log(_sum(b_sum * tl.exp(b_max - _finite(b_largest))))


@triton.jit
def _finite(b_max):
    """Replaces -Inf by 0: as long as every class is ruled out, the sum must be 0, not NaN."""
    return tl.where(b_max == -float("inf"), 0.0, b_max)


@triton.jit
def _times_gap(b_p, b_log_p, b_log_q):
    """Returns `p·(log p - log q)`; it is 0 if p is 0, even with log 0 on both sides."""
    return b_p * tl.where(b_p > 0, b_log_p - b_log_q, 0.0)


# TRADES: KL(p ‖ q) with p = softmax(clean), q = softmax(adversarial)


@triton.jit(do_not_specialize=["adversarial_stride", "clean_stride", "n", "classes"])
def trades_kl_fwd_kernel(
    adversarial,  # [n, classes], z'
    clean,  # [n, classes], z
    loss,  # [n] float32
    adversarial_grad,  # [n, classes]
    clean_grad,  # [n, classes]
    adversarial_stride,  # from row to row
    clean_stride,
    n,
    classes,  # at most BLOCK
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`KL = Σ p (log p - log q)`, `∂/∂z' = q - p`, `∂/∂z = p (log p - log q - KL)`. Grid: cdiv(n, ROWS)."""
    o_n, m_n = _row_ids(n, ROWS)
    o_k = tl.arange(0, BLOCK)[None, :]
    m_x = m_n & (o_k < classes)
    o_x = o_n * classes + o_k
    b_log_q = _log_softmax(_load(adversarial + o_n * adversarial_stride + o_k, m_x))
    b_log_p = _log_softmax(_load(clean + o_n * clean_stride + o_k, m_x))
    b_p = tl.exp(b_log_p)
    b_terms = _times_gap(b_p, b_log_p, b_log_q)
    b_kl = _sum(b_terms)
    _store(loss + o_n, b_kl, m_n)
    _store(adversarial_grad + o_x, tl.exp(b_log_q) - b_p, m_x)
    _store(clean_grad + o_x, b_terms - b_p * b_kl, m_x)


@triton.jit(do_not_specialize=["adversarial_stride", "clean_stride", "n", "classes"])
def trades_kl_looped_fwd_kernel(
    adversarial, clean, loss, adversarial_grad, clean_grad, adversarial_stride, clean_stride, n, classes,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Like `trades_kl_fwd_kernel`, for any number of classes; ROWS is 1. Grid: n."""
    o_n, _ = _row_ids(n, ROWS)
    adversarial += o_n * adversarial_stride
    clean += o_n * clean_stride
    b_0 = tl.zeros([1, BLOCK], tl.float32)
    b_q_max, b_q_sum = b_0 - float("inf"), b_0
    b_p_max, b_p_sum = b_0 - float("inf"), b_0
    for i_k in range(0, classes, BLOCK):
        o_k = i_k + tl.arange(0, BLOCK)[None, :]
        b_q_max, b_q_sum = _add_to_normaliser(b_q_max, b_q_sum, _load(adversarial + o_k, o_k < classes))
        b_p_max, b_p_sum = _add_to_normaliser(b_p_max, b_p_sum, _load(clean + o_k, o_k < classes))
    b_q_max, b_q_norm = _normaliser(b_q_max, b_q_sum)
    b_p_max, b_p_norm = _normaliser(b_p_max, b_p_sum)

    b_terms = b_0
    for i_k in range(0, classes, BLOCK):
        o_k = i_k + tl.arange(0, BLOCK)[None, :]
        b_log_q = _load(adversarial + o_k, o_k < classes) - b_q_max - b_q_norm
        b_log_p = _load(clean + o_k, o_k < classes) - b_p_max - b_p_norm
        b_terms += _times_gap(tl.exp(b_log_p), b_log_p, b_log_q)
    b_kl = _sum(b_terms)
    tl.store(loss + o_n, b_kl)

    for i_k in range(0, classes, BLOCK):
        o_k = i_k + tl.arange(0, BLOCK)[None, :]
        m_x = o_k < classes
        o_x = o_n * classes + o_k
        b_log_q = _load(adversarial + o_k, m_x) - b_q_max - b_q_norm
        b_log_p = _load(clean + o_k, m_x) - b_p_max - b_p_norm
        b_p = tl.exp(b_log_p)
        _store(adversarial_grad + o_x, tl.exp(b_log_q) - b_p, m_x)
        _store(clean_grad + o_x, _times_gap(b_p, b_log_p, b_log_q) - b_p * b_kl, m_x)


# MART, with p = softmax(clean) and q = softmax(adversarial). The constants are its authors'.


@triton.jit
def _safe_log(b_q):
    """Returns `log(q + 1e-12)`. Float32 can represent so small a number, and the sum is as exact as q."""
    return tl.log(b_q + 1e-12)


@triton.jit
def _runner_up(b_wrong, b_ids):
    """Returns the first class in `ids` with the largest logit of `wrong`; NO_CLASS if all are ruled out."""
    m_largest = b_wrong == tl.max(b_wrong, axis=1, keep_dims=True)
    m_largest &= b_wrong > -float("inf")
    return tl.min(tl.where(m_largest, b_ids, NO_CLASS), axis=1, keep_dims=True)


@triton.jit
def _boosted_cross_entropy(b_label_log_q, b_runner_rest):
    """Returns cross-entropy and margin, `-log q_y - log(1.0001 - q_r + 1e-12)`, and the margin's argument.

    `1 - q_r` is the sum of the other probabilities, which is exact where the difference would be only rounding error.
    """
    b_margin = 1.00000001e-4 + b_runner_rest
    return -b_label_log_q - tl.log(b_margin), b_margin


@triton.jit
def _mart_weight(b_label_rest, b_label, classes):
    """`1.0000001 - p_y`, again by the sum of the others. NaN for a label that is no class: it reaches every result."""
    m_label = (b_label >= 0) & (b_label < classes)
    return tl.where(m_label, 1e-7 + b_label_rest, float("nan"))


@triton.jit
def _mart_adversarial_grad(b_p, b_q, m_label, m_runner, b_runner_q, b_runner_rest, b_margin, b_u_sum, b_weight, beta):
    """`q - [k=y] + q_r/(1.0001 - q_r + 1e-12)·([k=r] - q) + β(1.0000001 - p_y)(q Σu - u)`, with u from `_pull`."""
    b_cross_entropy = b_q - tl.where(m_label, 1.0, 0.0)
    b_away = b_runner_q / b_margin * tl.where(m_runner, b_runner_rest, -b_q)
    return b_cross_entropy + b_away + beta * b_weight * (b_q * b_u_sum - _pull(b_p, b_q))


@triton.jit
def _pull(b_p, b_q):
    """Returns `u = p·q/(q + 1e-12)`, from the derivative of the KL with the constant inside its logarithm."""
    return b_p * (b_q / (b_q + 1e-12))


@triton.jit
def _mart_clean_grad(b_p, b_terms, b_kl, m_label, b_label_p, b_label_rest, b_weight, beta):
    """Returns `β((1.0000001 - p_y) p (log p - log(q + 1e-12) - KL) - KL·p_y([k=y] - p))`."""
    b_of_weight = b_label_p * tl.where(m_label, b_label_rest, -b_p)
    return beta * (b_weight * (b_terms - b_p * b_kl) - b_kl * b_of_weight)


@triton.jit(do_not_specialize=["clean_stride", "adversarial_stride", "n", "classes"])
def mart_loss_fwd_kernel(
    clean,  # [n, classes], z
    adversarial,  # [n, classes], z'
    labels,  # [n] int64, y
    loss,  # [n] float32
    clean_grad,  # [n, classes]
    adversarial_grad,  # [n, classes]
    beta,
    clean_stride,  # from row to row
    adversarial_stride,
    n,
    classes,  # at most BLOCK
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`-log q_y - log(1.0001 - q_r + 1e-12) + β KL(p ‖ q + 1e-12)(1.0000001 - p_y)`, with r the largest wrong class.

    Grid: cdiv(n, ROWS).
    """
    o_n, m_n = _row_ids(n, ROWS)
    o_k = tl.arange(0, BLOCK)[None, :]
    m_x = m_n & (o_k < classes)
    o_x = o_n * classes + o_k
    b_label = tl.load(labels + o_n, mask=m_n, other=0)
    m_label = o_k == b_label

    b_z = _load(adversarial + o_n * adversarial_stride + o_k, m_x)
    m_runner = o_k == _runner_up(tl.where(m_label, -float("inf"), b_z), o_k)
    b_log_q = _log_softmax(b_z)
    b_q = tl.exp(b_log_q)
    b_log_p = _log_softmax(_load(clean + o_n * clean_stride + o_k, m_x))
    b_p = tl.exp(b_log_p)

    b_label_rest = _sum(tl.where(m_label, 0.0, b_p))
    b_weight = _mart_weight(b_label_rest, b_label, classes)
    b_runner_rest = _sum(tl.where(m_runner, 0.0, b_q))
    b_boosted, b_margin = _boosted_cross_entropy(_sum(tl.where(m_label, b_log_q, 0.0)), b_runner_rest)
    b_terms = _times_gap(b_p, b_log_p, _safe_log(b_q))
    b_kl = _sum(b_terms)
    _store(loss + o_n, b_boosted + beta * b_kl * b_weight, m_n)

    b_label_p = _sum(tl.where(m_label, b_p, 0.0))
    b_clean = _mart_clean_grad(b_p, b_terms, b_kl, m_label, b_label_p, b_label_rest, b_weight, beta)
    _store(clean_grad + o_x, b_clean, m_x)
    b_runner_q = _sum(tl.where(m_runner, b_q, 0.0))
    b_u_sum = _sum(_pull(b_p, b_q))
    b_adversarial = _mart_adversarial_grad(
        b_p, b_q, m_label, m_runner, b_runner_q, b_runner_rest, b_margin, b_u_sum, b_weight, beta
    )
    _store(adversarial_grad + o_x, b_adversarial, m_x)


@triton.jit(do_not_specialize=["clean_stride", "adversarial_stride", "n", "classes"])
def mart_loss_looped_fwd_kernel(
    clean, adversarial, labels, loss, clean_grad, adversarial_grad, beta, clean_stride, adversarial_stride, n, classes,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Like `mart_loss_fwd_kernel`, for any number of classes; ROWS is 1. Grid: n."""
    o_n, _ = _row_ids(n, ROWS)
    clean += o_n * clean_stride
    adversarial += o_n * adversarial_stride
    b_label = tl.load(labels + o_n)
    b_0 = tl.zeros([1, BLOCK], tl.float32)
    b_q_max, b_q_sum = b_0 - float("inf"), b_0
    b_p_max, b_p_sum = b_0 - float("inf"), b_0
    b_wrong, b_ids = b_0 - float("inf"), tl.full([1, BLOCK], NO_CLASS, tl.int32)
    for i_k in range(0, classes, BLOCK):
        o_k = i_k + tl.arange(0, BLOCK)[None, :]
        m_x = o_k < classes
        b_z = _load(adversarial + o_k, m_x)
        b_q_max, b_q_sum = _add_to_normaliser(b_q_max, b_q_sum, b_z)
        b_p_max, b_p_sum = _add_to_normaliser(b_p_max, b_p_sum, _load(clean + o_k, m_x))
        m_larger = (o_k != b_label) & (b_z > b_wrong)
        b_wrong = tl.where(m_larger, b_z, b_wrong)
        b_ids = tl.where(m_larger, o_k, b_ids)
    b_runner = _runner_up(b_wrong, b_ids)
    b_q_max, b_q_norm = _normaliser(b_q_max, b_q_sum)
    b_p_max, b_p_norm = _normaliser(b_p_max, b_p_sum)

    b_terms, b_u, b_label_log_q, b_label_p, b_label_rest, b_runner_q, b_runner_rest = b_0, b_0, b_0, b_0, b_0, b_0, b_0
    for i_k in range(0, classes, BLOCK):
        o_k = i_k + tl.arange(0, BLOCK)[None, :]
        m_label, m_runner = o_k == b_label, o_k == b_runner
        b_log_q = _load(adversarial + o_k, o_k < classes) - b_q_max - b_q_norm
        b_log_p = _load(clean + o_k, o_k < classes) - b_p_max - b_p_norm
        b_q, b_p = tl.exp(b_log_q), tl.exp(b_log_p)
        b_terms += _times_gap(b_p, b_log_p, _safe_log(b_q))
        b_u += _pull(b_p, b_q)
        b_label_log_q += tl.where(m_label, b_log_q, 0.0)
        b_label_p += tl.where(m_label, b_p, 0.0)
        b_label_rest += tl.where(m_label, 0.0, b_p)
        b_runner_q += tl.where(m_runner, b_q, 0.0)
        b_runner_rest += tl.where(m_runner, 0.0, b_q)
    b_kl, b_u_sum, b_label_log_q = _sum(b_terms), _sum(b_u), _sum(b_label_log_q)
    b_label_p, b_label_rest = _sum(b_label_p), _sum(b_label_rest)
    b_runner_q, b_runner_rest = _sum(b_runner_q), _sum(b_runner_rest)
    b_weight = _mart_weight(b_label_rest, b_label, classes)
    b_boosted, b_margin = _boosted_cross_entropy(b_label_log_q, b_runner_rest)
    tl.store(loss + o_n, b_boosted + beta * b_kl * b_weight)

    for i_k in range(0, classes, BLOCK):
        o_k = i_k + tl.arange(0, BLOCK)[None, :]
        m_x = o_k < classes
        o_x = o_n * classes + o_k
        m_label, m_runner = o_k == b_label, o_k == b_runner
        b_log_p = _load(clean + o_k, m_x) - b_p_max - b_p_norm
        b_p = tl.exp(b_log_p)
        b_q = tl.exp(_load(adversarial + o_k, m_x) - b_q_max - b_q_norm)
        b_terms = _times_gap(b_p, b_log_p, _safe_log(b_q))
        b_clean = _mart_clean_grad(b_p, b_terms, b_kl, m_label, b_label_p, b_label_rest, b_weight, beta)
        _store(clean_grad + o_x, b_clean, m_x)
        b_adversarial = _mart_adversarial_grad(
            b_p, b_q, m_label, m_runner, b_runner_q, b_runner_rest, b_margin, b_u_sum, b_weight, beta
        )
        _store(adversarial_grad + o_x, b_adversarial, m_x)


# AugMix: the Jensen-Shannon divergence of three distributions p_j, with M = clamp((p_1 + p_2 + p_3)/3, 1e-7, 1)


@triton.jit
def _mixture(b_p1, b_p2, b_p3):
    """Returns `log M`, and 1 where the clamp raises the mean, else 0 (from above it cuts off only rounding)."""
    b_mean = (b_p1 + b_p2 + b_p3) / 3.0
    b_mixture = tl.maximum(b_mean, 1e-7, propagate_nan=tl.PropagateNan.ALL)
    b_mixture = tl.minimum(b_mixture, 1.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.log(b_mixture), tl.where(b_mean < 1e-7, 1.0, 0.0)


@triton.jit
def _js_grad(b_p, b_terms, b_cut, b_kl, b_cut_sum):
    """Returns `p_j (g_j - Σ p_j g_j)/3` with `g_j = log p_j - log M + [M is cut off]`."""
    return (b_terms + b_p * b_cut - b_p * (b_kl + b_cut_sum)) / 3.0


@triton.jit(do_not_specialize=["stride1", "stride2", "stride3", "n", "classes"])
def js_divergence_fwd_kernel(
    logits1,  # [n, classes]
    logits2,  # [n, classes]
    logits3,  # [n, classes]
    loss,  # [n] float32
    grad1,  # [n, classes]
    grad2,  # [n, classes]
    grad3,  # [n, classes]
    stride1,  # from row to row
    stride2,
    stride3,
    n,
    classes,  # at most BLOCK
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`Σ_j KL(p_j ‖ M)/3`. Grid: cdiv(n, ROWS)."""
    o_n, m_n = _row_ids(n, ROWS)
    o_k = tl.arange(0, BLOCK)[None, :]
    m_x = m_n & (o_k < classes)
    o_x = o_n * classes + o_k
    b_log_p1 = _log_softmax(_load(logits1 + o_n * stride1 + o_k, m_x))
    b_log_p2 = _log_softmax(_load(logits2 + o_n * stride2 + o_k, m_x))
    b_log_p3 = _log_softmax(_load(logits3 + o_n * stride3 + o_k, m_x))
    b_p1, b_p2, b_p3 = tl.exp(b_log_p1), tl.exp(b_log_p2), tl.exp(b_log_p3)
    b_log_m, b_cut = _mixture(b_p1, b_p2, b_p3)
    b_terms1 = _times_gap(b_p1, b_log_p1, b_log_m)
    b_terms2 = _times_gap(b_p2, b_log_p2, b_log_m)
    b_terms3 = _times_gap(b_p3, b_log_p3, b_log_m)
    b_kl1, b_kl2, b_kl3 = _sum(b_terms1), _sum(b_terms2), _sum(b_terms3)
    _store(loss + o_n, (b_kl1 + b_kl2 + b_kl3) / 3.0, m_n)
    _store(grad1 + o_x, _js_grad(b_p1, b_terms1, b_cut, b_kl1, _sum(b_p1 * b_cut)), m_x)
    _store(grad2 + o_x, _js_grad(b_p2, b_terms2, b_cut, b_kl2, _sum(b_p2 * b_cut)), m_x)
    _store(grad3 + o_x, _js_grad(b_p3, b_terms3, b_cut, b_kl3, _sum(b_p3 * b_cut)), m_x)


@triton.jit(do_not_specialize=["stride1", "stride2", "stride3", "n", "classes"])
def js_divergence_looped_fwd_kernel(
    logits1, logits2, logits3, loss, grad1, grad2, grad3, stride1, stride2, stride3, n, classes,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Like `js_divergence_fwd_kernel`, for any number of classes; ROWS is 1. Grid: n."""
    o_n, _ = _row_ids(n, ROWS)
    logits1 += o_n * stride1
    logits2 += o_n * stride2
    logits3 += o_n * stride3
    b_0 = tl.zeros([1, BLOCK], tl.float32)
    b_max1, b_max2, b_max3 = b_0 - float("inf"), b_0 - float("inf"), b_0 - float("inf")
    b_sum1, b_sum2, b_sum3 = b_0, b_0, b_0
    for i_k in range(0, classes, BLOCK):
        o_k = i_k + tl.arange(0, BLOCK)[None, :]
        b_max1, b_sum1 = _add_to_normaliser(b_max1, b_sum1, _load(logits1 + o_k, o_k < classes))
        b_max2, b_sum2 = _add_to_normaliser(b_max2, b_sum2, _load(logits2 + o_k, o_k < classes))
        b_max3, b_sum3 = _add_to_normaliser(b_max3, b_sum3, _load(logits3 + o_k, o_k < classes))
    b_max1, b_norm1 = _normaliser(b_max1, b_sum1)
    b_max2, b_norm2 = _normaliser(b_max2, b_sum2)
    b_max3, b_norm3 = _normaliser(b_max3, b_sum3)

    b_terms1, b_terms2, b_terms3, b_cut1, b_cut2, b_cut3 = b_0, b_0, b_0, b_0, b_0, b_0
    for i_k in range(0, classes, BLOCK):
        o_k = i_k + tl.arange(0, BLOCK)[None, :]
        b_log_p1 = _load(logits1 + o_k, o_k < classes) - b_max1 - b_norm1
        b_log_p2 = _load(logits2 + o_k, o_k < classes) - b_max2 - b_norm2
        b_log_p3 = _load(logits3 + o_k, o_k < classes) - b_max3 - b_norm3
        b_p1, b_p2, b_p3 = tl.exp(b_log_p1), tl.exp(b_log_p2), tl.exp(b_log_p3)
        b_log_m, b_cut = _mixture(b_p1, b_p2, b_p3)
        b_terms1 += _times_gap(b_p1, b_log_p1, b_log_m)
        b_terms2 += _times_gap(b_p2, b_log_p2, b_log_m)
        b_terms3 += _times_gap(b_p3, b_log_p3, b_log_m)
        b_cut1 += b_p1 * b_cut
        b_cut2 += b_p2 * b_cut
        b_cut3 += b_p3 * b_cut
    b_kl1, b_kl2, b_kl3 = _sum(b_terms1), _sum(b_terms2), _sum(b_terms3)
    b_cut_sum1, b_cut_sum2, b_cut_sum3 = _sum(b_cut1), _sum(b_cut2), _sum(b_cut3)
    tl.store(loss + o_n, (b_kl1 + b_kl2 + b_kl3) / 3.0)

    for i_k in range(0, classes, BLOCK):
        o_k = i_k + tl.arange(0, BLOCK)[None, :]
        m_x = o_k < classes
        o_x = o_n * classes + o_k
        b_log_p1 = _load(logits1 + o_k, m_x) - b_max1 - b_norm1
        b_log_p2 = _load(logits2 + o_k, m_x) - b_max2 - b_norm2
        b_log_p3 = _load(logits3 + o_k, m_x) - b_max3 - b_norm3
        b_p1, b_p2, b_p3 = tl.exp(b_log_p1), tl.exp(b_log_p2), tl.exp(b_log_p3)
        b_log_m, b_cut = _mixture(b_p1, b_p2, b_p3)
        b_terms1 = _times_gap(b_p1, b_log_p1, b_log_m)
        b_terms2 = _times_gap(b_p2, b_log_p2, b_log_m)
        b_terms3 = _times_gap(b_p3, b_log_p3, b_log_m)
        _store(grad1 + o_x, _js_grad(b_p1, b_terms1, b_cut, b_kl1, b_cut_sum1), m_x)
        _store(grad2 + o_x, _js_grad(b_p2, b_terms2, b_cut, b_kl2, b_cut_sum2), m_x)
        _store(grad3 + o_x, _js_grad(b_p3, b_terms3, b_cut, b_kl3, b_cut_sum3), m_x)
