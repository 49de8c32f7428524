"""Generates inputs, including hard cases, for all tests of the losses of the update."""

from dataclasses import dataclass

import torch

from bt_fast.ops import divergence

LOSSES = ("trades_kl", "mart_loss", "js_divergence")
BETA = 6.0


@dataclass
class Case:
    """The arguments of the loss called `name`."""

    name: str
    arguments: tuple

    @property
    def logits(self):
        return [a for a in self.arguments if isinstance(a, torch.Tensor) and a.is_floating_point()]

    def run(self, how):
        """Runs the "launch" or the "reference" (`how`) and returns the losses of the rows, and the gradients."""
        function = {"launch": f"launch_{self.name}", "reference": f"{self.name}_reference"}[how]
        return getattr(divergence, function)(*self.arguments)

    def double(self):
        return Case(self.name, tuple(a.double() if any(a is z for z in self.logits) else a for a in self.arguments))


def case(name, n, classes, dtype, seed, *, spread=3.0, special=False, strides="rows") -> Case:
    """Builds logits of size `spread`, with a different kind of logits in each row.

    One row in three is saturated, and one nearly certain: of the right class, and in the adversarial logits of a wrong
    one. One row in four is nearly the same in all logits, and its label is the largest.

    Args:
        special: some classes are ruled out (in the target, or in all logits), and the last row holds NaN or +Inf.
        strides: "rows", "apart" (rows with other rows between), "columns" (the class is not the contiguous index) or
            "one" (one repeated row).
    """
    g = torch.Generator().manual_seed(seed)
    z = spread * torch.randn(3, n, classes, generator=g)
    if spread == 0:
        z = torch.randint(-1, 2, z.shape, generator=g).float()  # ties
    z[1:, ::4] = z[0, ::4] + 1e-3 * z[1:, ::4]
    labels = torch.randint(classes, (n,), generator=g)
    labels[::4] = z[0, ::4].argmax(dim=1)
    z[:, 1::3] = (3e3 * z[:, 1::3]).clamp(-1e4, 1e4)
    z[:, 2::3] *= 0.1
    certain = torch.arange(n)[2::3]
    labels[certain] = torch.randint(classes, (len(certain),), generator=g)
    wrong = (labels + 1 + torch.randint(classes - 1, (n,), generator=g)) % classes
    for logits, classes_of in zip(z, (labels, wrong, labels), strict=True):
        logits[certain, classes_of[certain]] += 9 + 9 * torch.rand(len(certain), generator=g)
    if special and classes > 2:
        out = (labels + 1 + torch.randint(classes - 1, (n,), generator=g)) % classes
        rows = torch.arange(n)
        z[0, rows[::2], out[::2]] = -torch.inf  # in the target, and in half of these rows in all logits
        z[1:, rows[::4], out[::4]] = -torch.inf
        z[seed % 3, n - 1, classes - 1] = (torch.nan, torch.inf)[seed % 2]
    logits = [_strided(v.to(dtype), strides, g) for v in z]
    clean, adversarial, third = logits
    arguments = {
        "trades_kl": (adversarial, clean),
        "mart_loss": (clean, adversarial, labels, BETA),
        "js_divergence": (clean, adversarial, third),
    }[name]
    return Case(name, arguments)


def _strided(z, strides, g):
    n, classes = z.shape
    if strides == "one":
        return z[:1].expand(n, classes)
    if strides == "columns":
        return z.t().contiguous().t()
    width = classes if strides == "rows" else classes + int(torch.randint(1, 9, (1,), generator=g))
    wide = torch.full((n, width), torch.nan, dtype=z.dtype)
    wide[:, :classes] = z
    return wide[:, :classes]


def assert_right(case, result):
    """Asserts that `result` is the double-precision reference, up to the rounding of float32 and then of the dtype.

    A row's rounding scales with its loss, since a gradient is a difference of terms of that size. A class's rounding
    scales with its probability p and with log p.
    """
    loss, *gradients = case.double().run("reference")
    assert result[0].dtype == torch.float32
    scale = 1.0 + loss.abs()
    _assert_close(result[0], loss, 2e-6 * scale)
    log_ps = [z.log_softmax(dim=1).clamp(min=-1e4) for z in case.double().logits]
    terms = scale[:, None] * (1e-36 + sum(log_p.exp() * (1.0 - log_p) for log_p in log_ps))
    if case.name == "js_divergence":  # at the clamp's bound the gradient jumps
        mean = sum(log_p.exp() for log_p in log_ps) / 3
        terms[(mean - 1e-7).abs() < 1e-12] = torch.inf
    assert len(result) == 1 + len(gradients)
    for a, b, z in zip(result[1:], gradients, case.logits, strict=True):
        assert a.dtype == z.dtype
        assert a.is_contiguous()
        kind = torch.finfo(z.dtype)
        last_place = (kind.eps * b.abs()).clamp(min=kind.smallest_normal * kind.eps)
        stored = 0.0 if z.dtype == torch.float32 else 0.505 * last_place
        _assert_close(a, b, 2e-6 * (terms + b.abs()) + stored)


def _assert_close(result, expected, bound):
    assert torch.equal(result.isnan(), expected.isnan())
    error = (result.double() - expected).abs() / bound
    assert not (error > 1.0).any(), error.nan_to_num().max()
