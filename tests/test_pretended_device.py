import pytest
import torch
from pretended_device import DEVICE, pretended_device

ON_DEVICE = torch.empty(4, device=DEVICE)


@pytest.mark.parametrize(
    "wait",
    [
        lambda v: v.sum().item(),
        lambda v: bool(v.sum() > 0),
        lambda v: v.tolist(),
        lambda v: v[v > 0],
        lambda v: v.nonzero(),
        lambda v: v.masked_select(v > 0),
        lambda v: torch.equal(v, v),
        lambda v: v.cpu(),
        lambda v: torch.ones(4).to(v.device),
        lambda v: torch.tensor([1.0, 2.0], device=v.device),
        lambda v: torch.tensor(1.0, device=v.device),
        lambda v: v.copy_(torch.ones(4)),
        lambda v: torch.as_tensor([1.0], device=v.device),
        lambda v: torch.zeros(3).copy_(v[:3]),
    ],
)
def test_every_kind_of_wait_is_seen(wait):
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError)), pretended_device():
        wait(ON_DEVICE)


def test_work_that_stays_on_the_device_is_not():
    with pretended_device() as reads:
        assert ON_DEVICE.is_cuda
        assert not torch.ones(2).is_cuda
        (ON_DEVICE * 2 + torch.arange(4, device=DEVICE))[torch.zeros(2, dtype=torch.int64, device=DEVICE)].sum()
    assert reads.waited == 0
