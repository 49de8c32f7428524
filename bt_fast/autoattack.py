"""AutoAttack (Croce and Hein, 2020), where its package is installed, and a model in the form for that package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bt_fast import faults
from bt_fast.attack.forward import eval_mode, logits_of
from bt_fast.attack.threat import ThreatModel, check_threat
from bt_fast.evaluation import Accuracy, classified_correctly
from bt_fast.units import warn_of_units
from bt_fast.validation import check_choice, check_floating, check_labels, step_count

INSTALL = "pip install git+https://github.com/fra31/auto-attack"
VERSIONS = ("standard", "plus", "rand")
_NORMS = {"l_inf": "Linf", "l_2": "L2"}


@dataclass(frozen=True, eq=False)
class AutoAttacked(Accuracy):
    """An accuracy, and AutoAttack's result for each sample.

    Attributes:
        x_adv: [total, ...] the images: clean where the sample stood, else attacked.
        stood: [total] bool, classified correctly under all attacks.
    """

    x_adv: Tensor = field(repr=False)
    stood: Tensor = field(repr=False)


@contextmanager
def for_autoattack(model: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """The model as AutoAttack (or any other attack) takes it: a callable from images [n, C, H, W] to logits [n, K].

    Inside the block the model is in eval mode and its parameters need no gradient, so that an attack's `backward`
    computes none. Modes and `requires_grad` are restored at the end. The callable raises TypeError or ValueError for a
    model that returns no logits.
    """
    with_gradient = [p for p in model.parameters() if p.requires_grad]
    with eval_mode(model):
        for p in with_gradient:
            p.requires_grad_(False)
        try:
            yield lambda x: logits_of(model, x)
        finally:
            for p in with_gradient:
                p.requires_grad_(True)


def autoattack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    version: str = "standard",
    batch_size: int = 250,
    seed: int = 0,
    verbose: bool = False,
) -> AutoAttacked:
    """Accuracy under AutoAttack, run by its authors' package. torch's default random generators are left as they were.

    Args:
        model: maps [n, C, H, W] to logits [n, K]. It runs in eval mode and keeps its modes and gradients.
        x: [total, C, H, W] floating point in [0, 1]. y: [total] integers.
        threat: with the bounds 0 and 1, as AutoAttack has them.
        version: "standard", "plus", or "rand" for randomised defences.
        batch_size: ≥ 1. seed: of AutoAttack's random numbers. verbose: let it print its progress.

    Raises:
        ImportError: the package is not installed.
        TypeError or ValueError: an argument does not fit; nothing has been run.
    """
    _check(x, y, threat, version)
    step_count("batch_size", batch_size, least=1)
    step_count("seed", seed)
    try:
        from autoattack import AutoAttack
    except ImportError as error:
        raise ImportError(f"AutoAttack is not installed: {INSTALL}") from error
    warn_of_units(threat.epsilon, threat.norm, pixels=x[0].numel())
    x, y = faults.onto_bounds(x.detach(), 0.0, 1.0), y.long()
    devices = [x.device] if x.is_cuda else []
    with torch.inference_mode(False), torch.random.fork_rng(devices), for_autoattack(model) as classifier:
        clean = _correct(classifier, x, y, batch_size)
        options = {"seed": seed, "version": version, "verbose": verbose, "device": str(x.device)}
        adversary = AutoAttack(classifier, norm=_NORMS[threat.norm], eps=threat.epsilon, **options)
        attacked = threat.epsilon > 0  # or every x' is x
        x_adv: Tensor = adversary.run_standard_evaluation(x, y, bs=batch_size) if attacked else x
        stood = clean & _correct(classifier, x_adv, y, batch_size)
    return AutoAttacked(int(clean.sum()), int(stood.sum()), len(y), x_adv, stood)


def _check(x: Tensor, y: Tensor, threat: ThreatModel, version: str) -> None:
    check_floating("x", x, "of bytes write x.float() / 255", "must be floating-point images")
    if x.dim() != 4 or x.numel() == 0:
        raise ValueError(
            f"x must have shape [total, C, H, W] with at least 1 image, got {list(x.shape)}: of one image write x[None]"
        )
    check_labels(y, len(x), x.device, "y")
    check_threat(threat)
    if (threat.lower, threat.upper) != (0.0, 1.0):
        raise ValueError(
            f"threat must have AutoAttack's bounds 0 and 1, got {threat.lower:g} and {threat.upper:g}: "
            f"write ThreatModel({threat.epsilon:g}, {threat.norm!r}), and let the model take pixels in [0, 1]"
        )
    check_choice("version", version, VERSIONS)
    faults.read([faults.pixels_outside(x, 0.0, 1.0, "x")]).wait()


def _correct(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, batch_size: int) -> Tensor:
    """Which images are classified as `y`: [total] bool."""
    batches = zip(x.split(batch_size), y.split(batch_size), strict=True)
    return torch.cat([classified_correctly(model, images, labels, "y") for images, labels in batches])
