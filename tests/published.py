"""Networks as torchvision and timm publish them, with random weights; without these packages a test is skipped."""

import importlib
import warnings

import pytest
import torch
from torch import nn

TORCHVISION_OPERATORS = "nms", "qnms"


def package(name):
    """torchvision or timm.

    The wheel of torchvision is built for CUDA. Beside a torch that is not, its compiled operators do not load, and it
    stops at those of which it expects a definition: networks need none of them.
    """
    if importlib.util.find_spec("torchvision") is None or importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for operator in TORCHVISION_OPERATORS:
            torch.library.define(f"torchvision::{operator}", "(Tensor a, Tensor b, float c) -> Tensor")
    return importlib.import_module(name)


def published(name, **options):
    """The network `library/name` in eval mode, with weights and statistics away from their initial values."""
    library, _, network = name.partition("/")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of initial weights that the next version will have
        if library == "timm":
            model = package("timm").create_model(network, pretrained=False, **options)
        else:
            package("torchvision")
            models = importlib.import_module("torchvision.models")
            model = models.get_model(network, weights=None, **options)
    moved(model)
    return model.eval()


@torch.no_grad()
def moved(model):
    """Move scales that begin at 0 or 1e-6, biases and statistics, so that all that is computed has an effect."""
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if p.dim() == 1 or name in ("gamma", "layer_scale"):
                p.add_(0.1 + 0.1 * torch.rand_like(p))
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0.0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
