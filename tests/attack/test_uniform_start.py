import pytest
import torch
from small_models import batch

from bt_fast import ThreatModel
from bt_fast.attack.start import uniform_start
from bt_fast.ops.gather_start import unit_noise

LINF, L2 = ThreatModel(0.1), ThreatModel(0.5, "l_2")
THREATS = pytest.mark.parametrize("threat", [LINF, L2])
SEED = torch.tensor(7)


@THREATS
def test_starts_fill_the_ball(threat):
    x = torch.full((4000, 1, 1, 2), 0.5, dtype=torch.float64)
    delta = uniform_start(x, torch.arange(4000), 0, threat, SEED) - x
    size = delta.abs().amax(dim=(1, 2, 3)) if threat.norm == "l_inf" else delta.flatten(1).norm(dim=1)
    inside = (size <= threat.epsilon / 2).double().mean()
    assert size.max() <= threat.epsilon * (1 + 1e-6)
    assert inside.item() == pytest.approx(0.25, abs=0.03)  # in two dimensions half the radius holds a quarter
    assert delta.mean(dim=0).abs().max() < 0.05 * threat.epsilon


def test_the_noise_in_l_inf_is_that_of_the_counter_of_gather_start():
    x, samples = torch.full((3, 1, 6, 6), 0.5, dtype=torch.float64), torch.tensor([5, 0, 2**32 - 1])
    noise = unit_noise(samples, 36, torch.tensor([7, 2 * 4]), "uniform").view(x.shape)
    assert torch.equal(uniform_start(x, samples, 4, LINF, SEED), 0.5 + noise.double() * 0.1)


@THREATS
def test_a_start_is_the_samples_own(threat):
    x, _ = batch(8)
    whole = uniform_start(x, torch.arange(8), 1, threat, SEED)
    some = torch.tensor([6, 1, 3])
    assert torch.equal(uniform_start(x[some], some, 1, threat, SEED), whole[some])


@THREATS
def test_samples_restarts_and_seeds_start_apart(threat):
    x = torch.full((4, 1, 6, 6), 0.5)
    starts = [uniform_start(x, torch.arange(4), r, threat, torch.tensor(s)) for r in range(3) for s in range(2)]
    points = torch.cat(starts).flatten(1)
    assert len(points.unique(dim=0)) == len(points) == 24


@THREATS
def test_the_memory_format_makes_no_difference(threat):
    x = torch.rand(3, 3, 4, 5, dtype=torch.float64)
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(*(uniform_start(t, torch.arange(3), 0, threat, SEED) for t in (x, last)))


@THREATS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_starts_keep_dtype_and_pixel_bounds(threat, dtype):
    x, _ = batch(8, dtype=dtype)
    start = uniform_start(x, torch.arange(8), 0, threat, SEED)
    assert start.dtype == dtype
    assert start.min() >= 0
    assert start.max() <= 1
