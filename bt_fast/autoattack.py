"""AutoAttack (Croce and Hein, 2020), if its package is installed, and a model in the form that it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bt_fast import faults
from bt_fast.accuracy import Accuracy, classified_correctly
from bt_fast.attack.forward import eval_mode, logits_of
from bt_fast.attack.threat import ThreatModel, check_threat
from bt_fast.units import warn_of_units
from bt_fast.validation import check_choice, check_floating, check_labels, step_count

INSTALL = "pip install git+https://github.com/fra31/auto-attack"
VERSIONS = ("standard", "plus", "rand")
_NORMS = {"l_inf": "Linf", "l_2": "L2"}
TARGETS = 9  # the classes that a targeted attack of the standard version goes to
OTHERS = ("fab-t", "square")  # what the standard version runs after its two APGDs


@dataclass(frozen=True, eq=False)
class AutoAttacked(Accuracy):
    """An accuracy, and AutoAttack's result for each sample.

    Attributes:
        x_adv: [total, ...] the images: clean if the sample stood, else attacked.
        stood: [total] bool, classified correctly under all attacks.
    """

    x_adv: Tensor = field(repr=False)
    stood: Tensor = field(repr=False)


@contextmanager
def for_autoattack(model: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yields the model in AutoAttack's (or any attack's) form: a callable from images [n, C, H, W] to logits [n, K].

    Inside the block the model is in eval mode and its parameters need no gradient, so that an attack's `backward`
    computes none. Modes and `requires_grad` are restored at the end. The callable raises TypeError or ValueError if the
    model does not return logits.
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
    """Returns the accuracy under AutoAttack, run by its authors' package. torch's default generators do not change.

    Args:
        model: maps [n, C, H, W] to logits [n, K]. It runs in eval mode and keeps its modes and gradients.
        x: [total, C, H, W] floating point in [0, 1]. y: [total] integers.
        threat: with the bounds 0 and 1, which AutoAttack assumes.
        version: "standard", "plus", or "rand" for randomised defences.
        batch_size: ≥ 1. seed: of AutoAttack's random numbers. verbose: let it print its progress.

    Raises:
        ImportError: the package is not installed.
        TypeError or ValueError: an argument does not fit; nothing has been run.
    """
    _check(x, y, threat, version)
    step_count("batch_size", batch_size, least=1)
    step_count("seed", seed)
    package = installed()
    if package is None:
        raise ImportError(f"AutoAttack is not installed: {INSTALL}")
    warn_of_units(threat.epsilon, threat.norm, pixels=x[0].numel())
    x, y = faults.onto_bounds(x.detach(), 0.0, 1.0), y.long()
    devices = [x.device] if x.is_cuda else []
    with torch.inference_mode(False), torch.random.fork_rng(devices), for_autoattack(model) as classifier:
        clean = _correct(classifier, x, y, batch_size)
        options = {"seed": seed, "version": version, "verbose": verbose, "device": str(x.device)}
        adversary = package(classifier, norm=_NORMS[threat.norm], eps=threat.epsilon, **options)
        attacked = threat.epsilon > 0  # or every x' is x
        x_adv: Tensor = adversary.run_standard_evaluation(x, y, bs=batch_size) if attacked else x
        stood = clean & _correct(classifier, x_adv, y, batch_size)
    return AutoAttacked(int(clean.sum()), int(stood.sum()), len(y), x_adv, stood)


def installed() -> Any:
    """The package's class; None where it is not installed."""
    try:
        from autoattack import AutoAttack
    except ImportError:
        return None
    return AutoAttack


def why_not(threat: ThreatModel, x: Tensor) -> str | None:
    """Why the package cannot attack images like x [n, ...]; None where it can."""
    if (threat.lower, threat.upper) != (0.0, 1.0):
        return f"it has the bounds 0 and 1, and the threat {threat.lower:g} and {threat.upper:g}"
    if x.dim() != 4:
        return f"it takes images [n, C, H, W], and these have shape {list(x.shape)}"
    return None if installed() is not None else f"it is not installed: {INSTALL}"


def stands_others(
    model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, classes: int, batch_size: int, seed: int
) -> Tensor:
    """Which images stand FAB-T and Square of AutoAttack's standard version: [n] bool, on the device of x.

    Args:
        model: maps images, of the dtype of x and on its device, to logits of `classes` classes.
        x: [n, C, H, W] in [0, 1], all classified as y [n] int64.
    """
    devices = [x.device] if x.is_cuda else []
    with torch.inference_mode(False), torch.random.fork_rng(devices), for_autoattack(model) as classifier:

        def in_own_precision(images: Tensor) -> Tensor:
            return classifier(images.to(x.dtype))  # the package computes in float32

        options = {"seed": seed, "version": "standard", "verbose": False, "device": str(x.device)}
        adversary = installed()(in_own_precision, norm=_NORMS[threat.norm], eps=threat.epsilon, **options)
        adversary.attacks_to_run = list(OTHERS)
        if classes <= TARGETS:
            adversary.fab.n_target_classes = classes - 1
        x_adv: Tensor = adversary.run_standard_evaluation(x, y, bs=batch_size)
        return _correct(in_own_precision, x_adv, y, batch_size)


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
    """Returns which images are classified as `y`: [total] bool."""
    batches = zip(x.split(batch_size), y.split(batch_size), strict=True)
    return torch.cat([classified_correctly(model, images, labels, "y") for images, labels in batches])
