"""The losses of the update: a fused kernel on CUDA, plain torch elsewhere.

A loss of the update is one op: it computes the loss of every row and, in the same pass, its gradient with respect to
all logits. Its backward scales these. A second derivative goes through the plain torch of the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bt_fast.ops.availability import or_plain
from bt_fast.ops.launch import MOST_INT32, check, define_op, run_kernel
from bt_fast.ops.numeric import wide
from bt_fast.ops.rows import check_logits, kernel_takes, result_dtype

# By a loss's number of logits, such that no compiler spills registers: the most classes for which a block holds whole
# rows, its rows and its warps; and for more classes, the number of classes at a time.
TILES = {2: ((32, 4, 4), (1024, 1, 8)), 3: ((32, 4, 4), (1024, 1, 16))}
LOOPED = {2: (2048, 1, 16), 3: (1024, 1, 16)}

Rows = tuple[Tensor, ...]  # the losses of the rows, and a gradient for each of the logits


def trades_kl(adversarial_logits: Tensor, clean_logits: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns `Σ_i w_i KL(softmax(z_i) ‖ softmax(z'_i))`, the robust term of TRADES, differentiable in both logits.

    Loss and gradients are finite for rows of any saturation, except for a class that only z' rules out (by -Inf): there
    the divergence is infinite. NaN or +Inf makes its row NaN.

    Args:
        adversarial_logits: [n, K] floating point, z'.
        clean_logits: [n, K] of the same dtype, z; the gradient flows through this target too.
        weights: [n], w, in the logits' dtype or the result's; differentiable. Without it, all are 1.

    Returns:
        0-dim, float32 (float64 for float64 logits); 0 for n = 0.

    Raises:
        TypeError or ValueError: a dtype, shape or device does not fit; the message names the argument.
    """
    return _total(trades_kl_rows(adversarial_logits, clean_logits)[0], adversarial_logits, weights)


def mart_loss(
    clean_logits: Tensor, adversarial_logits: Tensor, labels: Tensor, beta: float, weights: Tensor | None = None
) -> Tensor:
    """Returns `1/n Σ_i w_i l_i`, the loss of MART (Wang et al., 2020) as its authors' code computes it.

    `l = -log q_y - log(1.0001 - q_r + 1e-12) + β·KL(p ‖ q + 1e-12)·(1.0000001 - p_y)` with `p = softmax(z)`,
    `q = softmax(z')` and r the largest wrong class of q (the first of equals), differentiable in both logits, also
    through the target and the weight. Loss and gradients are finite for rows of any saturation, except for a label that
    z' rules out (by -Inf): there the loss is infinite. NaN, +Inf, or a label outside 0..K-1 makes its row NaN.

    Args:
        clean_logits: [n, K ≥ 2] floating point, z.
        adversarial_logits: [n, K] of the same dtype, z'.
        labels: [n] int64, y.
        beta: β.
        weights: w, as in `trades_kl`, with its result and errors.
    """
    rows = mart_loss_rows(clean_logits, adversarial_logits, labels, beta)[0]
    n: int = rows.shape[0]
    return _total(rows, clean_logits, weights) / max(n, 1)


def js_divergence(
    clean_logits: Tensor, first_logits: Tensor, second_logits: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Returns `Σ_i w_i JS_i` of AugMix (Hendrycks et al., 2020), Jensen-Shannon divergences of three distributions.

    `JS = Σ_j KL(p_j ‖ M)/3` with `M = clamp((p_1 + p_2 + p_3)/3, 1e-7, 1)`, differentiable in all logits (the clamp
    passes no gradient where it cuts off). It is the sum over the rows, whereas AugMix' authors take the mean: divide by
    the size of the batch. Finite for rows of any saturation; NaN or +Inf makes its row NaN.

    Args:
        clean_logits: [n, K] floating point.
        first_logits: [n, K] of the same dtype, second_logits: likewise; of the augmented views.
        weights: w, as in `trades_kl`, with its result and errors.
    """
    return _total(js_divergence_rows(clean_logits, first_logits, second_logits)[0], clean_logits, weights)


def _total(rows: Tensor, logits: Tensor, weights: Tensor | None) -> Tensor:
    check("weights", weights, rows.shape, (rows.dtype, logits.dtype), rows.device)
    return rows.sum() if weights is None else (rows * weights).sum()


def trades_kl_reference(adversarial_logits: Tensor, clean_logits: Tensor) -> Rows:
    """`trades_kl_rows` in plain torch: the kernel's reference and fallback."""
    log_q, log_p = (F.log_softmax(wide(z), dim=1) for z in (adversarial_logits, clean_logits))
    q, p = log_q.exp(), log_p.exp()
    terms = _times_gap(p, log_p, log_q)
    kl = terms.sum(dim=1)
    dtype = clean_logits.dtype
    return kl, (q - p).to(dtype), (terms - p * kl[:, None]).to(dtype)


@or_plain(trades_kl_reference)
def launch_trades_kl(adversarial_logits: Tensor, clean_logits: Tensor) -> Rows:
    """`trades_kl_rows` as one launch."""
    from bt_fast.kernels.divergence import trades_kl_fwd_kernel, trades_kl_looped_fwd_kernel

    return _launch(trades_kl_fwd_kernel, trades_kl_looped_fwd_kernel, (adversarial_logits, clean_logits))


def mart_loss_reference(clean_logits: Tensor, adversarial_logits: Tensor, labels: Tensor, beta: float) -> Rows:
    """`mart_loss_rows` in plain torch: the kernel's reference and fallback.

    `1.0001 - q_r` and `1.0000001 - p_y` are computed as the sum of the other probabilities: in float32 the difference
    has a rounding error as large as itself.
    """
    classes = torch.arange(clean_logits.shape[1], device=labels.device)
    of_label = classes == labels[:, None]
    runner_up = adversarial_logits.detach().masked_fill(of_label, -torch.inf).argmax(dim=1)
    of_runner = (classes == runner_up[:, None]) & ~of_label  # none where all the wrong classes are ruled out
    log_p, log_q = (F.log_softmax(wide(z), dim=1) for z in (clean_logits, adversarial_logits))
    p, q = log_p.exp(), log_q.exp()

    def only(where: Tensor, values: Tensor) -> Tensor:
        return torch.where(where, values, 0.0).sum(dim=1, keepdim=True)

    label_p, label_rest = only(of_label, p), only(~of_label, p)
    weight = torch.where(of_label.any(dim=1, keepdim=True), 1e-7 + label_rest, torch.nan)
    runner_q, runner_rest = only(of_runner, q), only(~of_runner, q)
    margin = (1e-4 + 1e-12) + runner_rest
    terms = _times_gap(p, log_p, (q + 1e-12).log())
    kl = terms.sum(dim=1, keepdim=True)
    loss = beta * kl * weight - only(of_label, log_q) - margin.log()

    of_weight = label_p * torch.where(of_label, label_rest, -p)
    clean = beta * (weight * (terms - p * kl) - kl * of_weight)
    away = runner_q / margin * torch.where(of_runner, runner_rest, -q)
    pull = p * (q / (q + 1e-12))
    closer = beta * weight * (q * pull.sum(dim=1, keepdim=True) - pull)
    adversarial = q - of_label.to(q.dtype) + away + closer
    return loss[:, 0], clean.to(clean_logits.dtype), adversarial.to(clean_logits.dtype)


@or_plain(mart_loss_reference)
def launch_mart_loss(clean_logits: Tensor, adversarial_logits: Tensor, labels: Tensor, beta: float) -> Rows:
    """`mart_loss_rows` as one launch."""
    from bt_fast.kernels.divergence import mart_loss_fwd_kernel, mart_loss_looped_fwd_kernel

    logits = (clean_logits, adversarial_logits)
    return _launch(mart_loss_fwd_kernel, mart_loss_looped_fwd_kernel, logits, (labels.contiguous(),), (float(beta),))


def js_divergence_reference(clean_logits: Tensor, first_logits: Tensor, second_logits: Tensor) -> Rows:
    """`js_divergence_rows` in plain torch: the kernel's reference and fallback."""
    log_ps = [F.log_softmax(wide(z), dim=1) for z in (clean_logits, first_logits, second_logits)]
    ps = [log_p.exp() for log_p in log_ps]
    mean = (ps[0] + ps[1] + ps[2]) / 3.0
    log_mixture = mean.clamp(1e-7, 1.0).log()
    cut = (mean < 1e-7).to(mean.dtype)  # above, the clamp cuts off no more than rounding
    terms = [_times_gap(p, log_p, log_mixture) for p, log_p in zip(ps, log_ps, strict=True)]
    loss = (terms[0] + terms[1] + terms[2]).sum(dim=1) / 3.0
    clean, first, second = (_js_gradient(p, t + p * cut).to(clean_logits.dtype) for p, t in zip(ps, terms, strict=True))
    return loss, clean, first, second


def _js_gradient(p: Tensor, p_times_g: Tensor) -> Tensor:
    """Converts derivatives g/3 by the probabilities to those by the logits."""
    return (p_times_g - p * p_times_g.sum(dim=1, keepdim=True)) / 3.0


@or_plain(js_divergence_reference)
def launch_js_divergence(clean_logits: Tensor, first_logits: Tensor, second_logits: Tensor) -> Rows:
    """`js_divergence_rows` as one launch."""
    from bt_fast.kernels.divergence import js_divergence_fwd_kernel, js_divergence_looped_fwd_kernel

    logits = (clean_logits, first_logits, second_logits)
    return _launch(js_divergence_fwd_kernel, js_divergence_looped_fwd_kernel, logits)


def _times_gap(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Returns `p·(log p - log q)`; it is 0 if p is 0, even with log 0 on both sides."""
    return p * torch.where(p > 0, log_p - log_q, 0.0)


def tile(classes: int, logits: int) -> tuple[int, int, int]:
    """Returns the classes and rows of a block and its warps; those of `LOOPED` if no block holds whole rows."""
    return next((t for t in TILES[logits] if classes <= t[0]), LOOPED[logits])


def whole(classes: int, logits: int) -> bool:
    """Whether a block holds whole rows of this many classes."""
    return classes <= TILES[logits][-1][0]


def _launch(one_block: Any, looped: Any, logits: Rows, labels: Rows = (), numbers: tuple[float, ...] = ()) -> Rows:
    """Launches the kernel for whole rows if they fit into a block, else the looped one."""
    results = _empty_results(*logits)
    n, classes = logits[0].shape
    if n == 0:
        return results
    logits = tuple(z if z.stride(1) == 1 and z.stride(0) < MOST_INT32 else z.contiguous() for z in logits)
    block, rows, warps = tile(classes, len(logits))
    given = (*logits, *labels, *results, *numbers, *(z.stride(0) for z in logits), n, classes)
    kernel = one_block if whole(classes, len(logits)) else looped
    run_kernel(kernel, -(-n // rows), *given, ROWS=rows, BLOCK=block, num_warps=warps)
    return results


def _empty_results(*logits: Tensor) -> Rows:
    """Returns the losses of the rows, and a gradient for each of the logits, not yet filled."""
    z = logits[0]
    loss = torch.empty(z.shape[0], dtype=result_dtype(z), device=z.device)
    return loss, *(torch.empty(z.shape, dtype=z.dtype, device=z.device) for z in logits)


def _check(classes: int = 1, **logits: Tensor) -> None:
    (first, like), *others = logits.items()
    check_logits(first, like, classes=classes)
    for name, z in others:
        check(name, z, like.shape, (like.dtype,), like.device)


def _check_mart(clean_logits: Tensor, adversarial_logits: Tensor, labels: Tensor, _: float) -> None:
    _check(2, clean_logits=clean_logits, adversarial_logits=adversarial_logits)
    check("labels", labels, clean_logits.shape[:1], (torch.int64,), clean_logits.device)


def _register_gradient(op: Any, reference: Callable[..., tuple[Tensor, ...]], logits: int) -> None:
    """Makes the losses of `op` differentiable in its first arguments, the `logits`; it also returns their gradients."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[:logits], *output[1:])
        ctx.constants = inputs[logits:]

    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * (logits + len(ctx.constants))
        gradients = ctx.saved_tensors[logits:]
        if torch.is_grad_enabled():  # for a second derivative: the gradients as functions of the logits
            gradients = reference(*ctx.saved_tensors[:logits], *ctx.constants)[1:]
        scaled = (
            (g * upstream[:, None]).to(g.dtype) if needed else None
            for g, needed in zip(gradients, ctx.needs_input_grad, strict=False)
        )
        return (*scaled, *(None for _ in ctx.constants))

    op.register_autograd(backward, setup_context=setup_context)


trades_kl_rows = define_op(
    "trades_kl(Tensor adversarial_logits, Tensor clean_logits) -> (Tensor, Tensor, Tensor)",
    check=lambda adversarial, clean: _check(adversarial_logits=adversarial, clean_logits=clean),
    run=lambda *given: (launch_trades_kl if kernel_takes(given[0]) else trades_kl_reference)(*given),
    results=_empty_results,
)
mart_loss_rows = define_op(
    "mart_loss(Tensor clean_logits, Tensor adversarial_logits, Tensor labels, float beta) -> (Tensor, Tensor, Tensor)",
    check=_check_mart,
    run=lambda *given: (launch_mart_loss if kernel_takes(given[0]) else mart_loss_reference)(*given),
    results=lambda clean, adversarial, *_: _empty_results(clean, adversarial),
)
js_divergence_rows = define_op(
    "js_divergence(Tensor clean_logits, Tensor first_logits, Tensor second_logits) -> (Tensor, Tensor, Tensor, Tensor)",
    check=lambda clean, first, second: _check(clean_logits=clean, first_logits=first, second_logits=second),
    run=lambda *given: (launch_js_divergence if kernel_takes(given[0]) else js_divergence_reference)(*given),
    results=_empty_results,
)
_register_gradient(trades_kl_rows, trades_kl_reference, logits=2)
_register_gradient(mart_loss_rows, mart_loss_reference, logits=2)
_register_gradient(js_divergence_rows, js_divergence_reference, logits=3)
