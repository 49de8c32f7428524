"""Networks of torchvision and timm: the folded view computes what they compute, and says what it leaves."""

import warnings

import pytest
import torch
from published import published

from bt_fast import Frozen
from bt_fast.attack.folded import attack_model
from bt_fast.attack.runners import input_gradient

NETWORKS = {  # the side of the images, options, and how many batch norms are folded and kept
    "torchvision/resnet18": (32, {}, 20, 0),
    "torchvision/swin_t": (64, {}, 0, 0),
    "torchvision/mobilenet_v3_small": (32, {}, 34, 0),
    "torchvision/googlenet": (64, {"init_weights": False}, 57, 0),
    "timm/vit_tiny_patch16_224": (64, {"img_size": 64}, 0, 0),
    "timm/convnext_atto": (32, {}, 0, 0),
    "timm/resnetv2_50": (32, {}, 32, 17),
    "timm/efficientnet_b0": (32, {}, 49, 0),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_folded_and_computes_the_same(name):
    side, options, folded, kept = NETWORKS[name]
    model = published(name, num_classes=10, **options).double()
    x, target = torch.rand(2, 3, side, side, dtype=torch.float64), torch.rand(2, 10, dtype=torch.float64).softmax(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with attack_model(model, Frozen(), x) as view:
            assert view.reason is None
            assert not view.kept
            assert view.norms == (folded, kept)
            torch.testing.assert_close(view(x), model(x), rtol=1e-9, atol=1e-9)
            result, expected = (input_gradient(m, x, target) for m in (view, model))
    torch.testing.assert_close(result, expected, rtol=1e-7, atol=1e-9 * float(expected.abs().max()))
