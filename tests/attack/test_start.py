"""Tests of the attack's start: its noise, clipping and random numbers."""

import math

import pytest
import torch
from tolerances import DTYPES

from bt_fast import ThreatModel, ops
from bt_fast.attack.start import ball_start, normal_noise, random_state, sorted_start, state_of_seed

STEPS = torch.tensor([3, 0, 1, 2, 0, 3, 3, 1])
ORDER = STEPS.argsort(descending=True, stable=True)
THREATS = [ThreatModel(0.1), ThreatModel(0.5, "l_2")]
KINDS = [("normal", THREATS[0]), *(("uniform", threat) for threat in THREATS)]
EACH_KIND = pytest.mark.parametrize(("noise", "threat"), KINDS, ids=["normal", "uniform", "uniform l_2"])


def images(m=8, dtype=torch.float64, shape=(3, 4, 4), seed=0):
    return torch.rand(m, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def state(seed=0):
    return torch.tensor([seed, 7])


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


@EACH_KIND
@pytest.mark.parametrize("dtype", DTYPES)
def test_sorted_starts_are_the_batchs_own_and_those_without_steps_are_clean_to_the_bit(noise, threat, dtype):
    x = images(dtype=dtype)
    clean, begin = sorted_start(x, ORDER, STEPS, state(), noise, threat)
    _, unsorted = sorted_start(x, None, None, state(), noise, threat)
    still = STEPS[ORDER] == 0
    assert torch.equal(clean, x[ORDER])
    assert torch.equal(begin[still], clean[still])
    assert torch.equal(begin[~still], unsorted[ORDER][~still])
    assert (begin[~still] != clean[~still]).flatten(1).any(dim=1).all()
    assert begin.dtype == dtype


@EACH_KIND
def test_the_noise_of_a_sample_does_not_depend_on_its_neighbours(noise, threat):
    x = images()
    few, all_of_them = (sorted_start(x[:m], None, None, state(), noise, threat)[1] for m in (3, 8))
    assert torch.equal(few, all_of_them[:3])


@EACH_KIND
def test_the_next_call_draws_other_noise_and_nothing_else_moves(noise, threat):
    moving, x = state(), images()
    before, random = x.clone(), torch.get_rng_state()
    first, second = (sorted_start(x, ORDER, STEPS, moving, noise, threat)[1] for _ in range(2))
    assert not torch.equal(first, second)
    each = 2 if (noise, threat.norm) == ("uniform", "l_2") else 1  # an ℓ2 radius is drawn at a separate offset
    assert torch.equal(moving, state() + torch.tensor([0, 2 * each]))
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), random)


def test_the_normal_start_is_the_noise_of_trades():
    x = images(64)
    clean, begin = sorted_start(x, None, None, state(), "normal", THREATS[0])
    assert (begin - clean).std().item() == pytest.approx(0.001, rel=0.05)


def of_a_counter(x, threat):
    return sorted_start(x, None, None, state(), "uniform", threat)[1]


def of_a_generator(x, threat):
    return ball_start(x, threat, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("start_of", [of_a_counter, of_a_generator])
def test_uniform_starts_fill_the_box(start_of):
    delta = (start_of(torch.full((500, 40), 0.5, dtype=torch.float64), THREATS[0]) - 0.5).flatten() / 0.1
    assert delta.abs().max() <= 1 + 1e-12
    shares = torch.histc(delta, 8, -1, 1) / len(delta)
    assert shares.sub(1 / 8).abs().max() < 0.01


@pytest.mark.parametrize("start_of", [of_a_counter, of_a_generator])
@pytest.mark.parametrize("pixels", [2, 5])
def test_uniform_starts_fill_the_ball(start_of, pixels):
    """In d dimensions the share of starts within radius r is (r/ε)^d, and all directions are equally likely."""
    delta = (start_of(torch.full((20_000, pixels), 0.5, dtype=torch.float64), ThreatModel(0.4, "l_2")) - 0.5) / 0.4
    assert delta.norm(dim=1).max() <= 1 + 1e-6
    inside = torch.histc(delta.norm(dim=1) ** pixels, 8, 0, 1) / len(delta)
    assert inside.sub(1 / 8).abs().max() < 0.01
    assert delta.mean(dim=0).abs().max() < 0.02
    covariance = delta.T @ delta / len(delta)
    assert (covariance - torch.eye(pixels, dtype=torch.float64) / (pixels + 2)).abs().max() < 0.01


@pytest.mark.parametrize("start_of", [of_a_counter, of_a_generator])
@pytest.mark.parametrize("threat", THREATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_uniform_starts_stay_in_the_ball_and_the_pixel_bounds(start_of, threat, dtype):
    x = images(dtype=dtype).round(decimals=1)
    begin = start_of(x, threat)
    assert begin.dtype == dtype
    assert 0 <= begin.min() < begin.max() <= 1
    delta = (begin.double() - x.double()).flatten(1)
    norms = delta.abs().amax(dim=1) if threat.norm == "l_inf" else delta.norm(dim=1)
    assert norms.max() <= threat.epsilon * (1 + (0 if dtype == torch.float64 else 8 * torch.finfo(dtype).eps)) + 1e-12


def test_a_random_state_is_a_seed_and_an_offset_of_the_generator():
    drawn = [random_state(images(), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert (drawn[0].dtype, drawn[0].shape) == (torch.int64, (2,))


def test_a_channels_last_batch_keeps_its_format():
    x = images().contiguous(memory_format=torch.channels_last)
    for noise, threat in KINDS:
        for images_of in sorted_start(x, ORDER, STEPS, state(), noise, threat):
            assert images_of.is_contiguous(memory_format=torch.channels_last)


def test_no_direction_is_no_move():
    x = torch.full((2, 3), 0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "gather_start", lambda zeros, *_, **__: (zeros, zeros))
        begin = of_a_counter(x, THREATS[1])
    assert torch.equal(begin, x)
    assert math.isfinite(begin.sum())


@EACH_KIND
def test_a_numbered_start_is_the_same_in_whatever_batch(noise, threat):
    x, numbers, picked = images(), torch.arange(100, 108), torch.tensor([6, 1, 3])
    _, whole = sorted_start(x, None, None, state(), noise, threat, numbers)
    order, steps = torch.tensor([1, 2, 0]), torch.ones(3, dtype=torch.int64)
    _, part = sorted_start(x[picked], order, steps, state(), noise, threat, numbers[picked])
    assert torch.equal(part, whole[picked][order])
    assert not torch.equal(whole, sorted_start(x, None, None, state(), noise, threat)[1])


@pytest.mark.parametrize("seed", [0, 5, 2**64 - 1])
def test_a_state_of_the_seed_draws_nothing(seed):
    generator = torch.Generator().manual_seed(seed)
    torch.rand(3, generator=generator)
    before = generator.get_state()
    result = state_of_seed(images(), generator)
    assert [result[0].item() % 2**64, result[1].item()] == [seed, 0]
    assert torch.equal(generator.get_state(), before)
    torch.manual_seed(7)
    assert state_of_seed(images(), None).tolist() == [7, 0]
