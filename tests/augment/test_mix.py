import pytest
import reference_augmix
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended_device import DEVICE, pretended_device
from tolerances import assert_near

from bt_fast.augment.mix import CHAINS, DEPTH, Choices, augment_and_mix, draw_choices
from bt_fast.augment.operations import NONE, OPERATIONS

CPU = torch.device("cpu")
MANY = 20_000


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def draw(n, seed=0, **options):
    return draw_choices(n, CPU, generator=seeded(seed), **options)


def pictures(n, shape=(3, 32, 32), seed=0):
    return torch.randint(256, (n, *shape), generator=seeded(seed), dtype=torch.uint8)


def as_lists(choices, i):
    """Returns what the reference takes for sample i: its chains, its weights and its mixing."""
    triples = zip(choices.operation[i], choices.level[i], choices.negative[i], strict=True)
    chains = [
        [
            (OPERATIONS[k], level, negative)
            for k, level, negative in zip(*(t.tolist() for t in t3), strict=True)
            if k >= 0
        ]
        for t3 in triples
    ]
    return chains, choices.weights[i].numpy(), choices.mixing[i].item()


# The authors' algorithm, with given choices


@pytest.mark.parametrize("severity", [1, 3, 10])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 9, 14)])
def test_the_images_are_the_authors_to_the_bit(shape, severity):
    images, choices = pictures(40, shape), draw(40, severity=severity)
    expected = [
        reference_augmix.augment_and_mix(reference_augmix.to_pil(image), *as_lists(choices, i))
        for i, image in enumerate(images)
    ]
    assert torch.equal(augment_and_mix(images.float() / 255, choices), torch.stack(expected))


def test_a_sample_does_not_see_its_neighbours():
    x, choices = pictures(6).double() / 255, draw(6)
    whole = augment_and_mix(x, choices)
    for i in range(6):
        alone = Choices(*(value[i : i + 1] for value in vars(choices).values()))
        assert torch.equal(augment_and_mix(x[i : i + 1], alone)[0], whole[i])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 5), st.sampled_from([1, 3]), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_any_images_in_the_unit_range_stay_in_it(n, channels, height, width, seed):
    x = torch.rand(n, channels, height, width, dtype=torch.float64, generator=seeded(seed))
    out = augment_and_mix(x, draw(n, seed))
    assert out.shape == x.shape
    assert ((out >= -1e-12) & (out <= 1 + 1e-12)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_precisions_give_the_same_images_as_closely_as_they_can(dtype):
    images, choices = pictures(8), draw(8)
    out = augment_and_mix((images.double() / 255).to(dtype), choices)
    assert out.dtype == dtype
    if dtype == torch.bfloat16:  # eight bits of precision lose some grey values
        assert (out.double() - augment_and_mix(images.double() / 255, choices)).abs().mean() < 0.01
    else:
        assert_near(out, augment_and_mix(images.float() / 255, choices), torch.float16)


def test_without_mixing_the_image_is_the_clean_one_to_the_bit():
    x, choices = torch.rand(5, 3, 8, 8, generator=seeded(0)), draw(5)
    assert torch.equal(augment_and_mix(x, Choices(**vars(choices) | {"mixing": torch.zeros(5)})), x)


# What is drawn


def test_every_operation_is_as_likely():
    drawn = draw(MANY).operation.flatten()
    counts = drawn[drawn != NONE].bincount(minlength=len(OPERATIONS)).double()
    assert_near(counts / counts.sum(), torch.full((9,), 1 / 9), torch.bfloat16)
    expected = counts.sum() / 9
    assert ((counts - expected).square() / expected).sum() < 26.1  # χ² with 8 degrees of freedom: p = 0.001


def test_the_chains_have_one_to_three_operations_each_as_likely_and_nothing_after_their_end():
    present = draw(MANY).operation != NONE
    depth = present.sum(dim=2)
    assert torch.equal(present, torch.arange(DEPTH) < depth[:, :, None])
    assert_near(depth.flatten().bincount().double() / depth.numel(), [0, 1 / 3, 1 / 3, 1 / 3], torch.bfloat16)


@pytest.mark.parametrize("severity", [0.5, 3, 10])
def test_levels_are_uniform_from_a_tenth_to_the_severity(severity):
    level = draw(MANY, severity=severity).level
    assert level.min() >= 0.1
    assert level.max() < severity
    quarters = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    assert_near((level.flatten().quantile(quarters) - 0.1) / (severity - 0.1), quarters, torch.bfloat16)


def test_a_map_goes_either_way_as_often():
    assert draw(MANY).negative.double().mean().item() == pytest.approx(0.5, abs=0.01)


def test_weights_are_dirichlet_and_sum_to_one():
    weights = draw(MANY).weights
    assert_near(weights.sum(dim=1), torch.ones(MANY))
    assert (weights >= 0).all()
    assert_near(weights.mean(dim=0), [1 / 3] * CHAINS, torch.bfloat16)
    covariance = torch.full((3, 3), -1 / 36) + torch.eye(3) / 12  # of Dirichlet(1, 1, 1)
    assert (weights.T.cov() - covariance).abs().max() < 0.002
    assert (weights < 0.1).double().mean().item() == pytest.approx(1 - 0.9**2, abs=0.01)  # the marginal is Beta(1, 2)


def test_mixing_is_uniform():
    mixing = draw(MANY).mixing
    assert mixing.min() >= 0
    assert mixing.max() < 1
    assert mixing.mean().item() == pytest.approx(0.5, abs=0.01)
    assert mixing.var().item() == pytest.approx(1 / 12, abs=0.002)


def test_a_generator_repeats_its_choices_and_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    one, same, other = draw(4), draw(4), draw(4, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in vars(one).items():
        assert torch.equal(value, vars(same)[name])
    assert not torch.equal(one.level, other.level)


# Elsewhere than on the CPU


def test_nothing_waits_for_the_device_and_nothing_is_drawn_on_the_host():
    before = torch.get_rng_state()
    with pretended_device() as reads:
        x = torch.empty(4, 3, 8, 8, device=DEVICE)
        out = augment_and_mix(x, draw_choices(4, DEVICE))
    assert (out.shape, out.device, reads.started) == (x.shape, DEVICE, 0)
    assert torch.equal(torch.get_rng_state(), before)


# Bad input


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([[1.0]], TypeError, "x must be a tensor of images, got list"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), TypeError, "x must be floating-point images, got torch.uint8"),
        (torch.zeros(2, 4, 4), ValueError, r"x must have shape \[n, C, H, W\] with C, H, W >= 1, got \[2, 4, 4\]"),
        (torch.zeros(2, 3, 0, 4), ValueError, r"x must have shape .* got \[2, 3, 0, 4\]"),
        (torch.zeros(3, 3, 4, 4), ValueError, "choices must be for 3 samples, one for each image, got 2"),
    ],
)
def test_images_that_do_not_fit_are_refused(x, error, message):
    with pytest.raises(error, match=message):
        augment_and_mix(x, draw(2))


@pytest.mark.parametrize(
    ("n", "severity", "error", "message"),
    [
        (-1, 3, ValueError, "n must be at least 0, got -1"),
        (1.0, 3, TypeError, "n must be an integer, got 1.0"),
        (1, 0.1, ValueError, r"severity must lie in \(0.1, 10\], got 0.1"),
        (1, 10.5, ValueError, "severity must lie in"),
        (1, float("nan"), ValueError, "severity must lie in"),
        (1, "3", TypeError, "severity must be a number, got '3'"),
    ],
)
def test_draws_that_make_no_sense_are_refused(n, severity, error, message):
    with pytest.raises(error, match=message):
        draw_choices(n, CPU, severity=severity)
