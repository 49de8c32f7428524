"""A folded view's gradient of one image alone, where torch's batch norm on the CPU gives a wrong one: limits.md."""

import pytest
import torch
from torch import nn

from bt_fast import Frozen
from bt_fast.attack.folded import attack_model
from bt_fast.attack.runners import input_gradient


class Tokens(nn.Module):
    """Ends in a transformer's layers over tokens, to which a norm's output [n, C, H, W] is flattened and transposed."""

    def __init__(self, before):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), before, nn.BatchNorm2d(4))
        self.scores = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 5))
        self.body[2].running_mean.normal_()
        self.body[2].running_var.uniform_(0.5, 2.0)

    def forward(self, x):
        return self.scores(self.body(x).flatten(2).transpose(1, 2)).mean(dim=1)


@pytest.mark.parametrize("before", [nn.Identity(), nn.GELU()], ids=["folded", "kept"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_view_gives_an_image_alone_the_gradient_that_it_has_beside_another(before, layout):
    torch.manual_seed(0)
    model = Tokens(before).double().eval()
    x = torch.rand(2, 3, 6, 6, dtype=torch.float64).contiguous(memory_format=layout)
    target = torch.rand(2, 5, dtype=torch.float64).softmax(dim=1)
    expected = input_gradient(model, x, target)
    with attack_model(model, Frozen(), x) as view:
        for row in (slice(0, 1), slice(1, 2)):
            alone = input_gradient(view, x[row], target[row])
            torch.testing.assert_close(alone, expected[row], rtol=1e-9, atol=1e-12)
