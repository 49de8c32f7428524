"""Where an attack begins."""

import pytest
import torch
from tolerances import DTYPES

from bt_fast.attack.start import normal_noise


@pytest.mark.parametrize("dtype", DTYPES)
def test_normal_noise(dtype):
    x = torch.zeros(100, 100, dtype=dtype)
    noise = normal_noise(x, torch.Generator().manual_seed(0))
    assert noise.dtype == dtype
    assert noise.double().std().item() == pytest.approx(0.001, rel=0.05)
    assert torch.equal(noise, normal_noise(x, torch.Generator().manual_seed(0)))
    torch.manual_seed(3)
    as_authors = normal_noise(x, None, on_cpu=True)
    torch.manual_seed(3)
    assert torch.equal(as_authors, 0.001 * torch.randn(x.shape))
