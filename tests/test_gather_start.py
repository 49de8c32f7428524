import itertools
import math

import gather_start_cases as cases
import pytest
import torch
from gather_start_cases import op
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended_device import DEVICE, pretended_device
from tolerances import DTYPES

from bt_fast import ops

quick = settings(max_examples=40, deadline=None)
flag = st.booleans()
NOISES = ["normal", "uniform"]
# the error of the polynomials for logarithm and cosine, in standard deviations
NORMAL_TOLERANCE = 1e-5


# Philox


@pytest.mark.parametrize(
    ("counter", "seed", "expected"),
    [  # from Random123, the authors' library
        ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, -1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_numbers(counter, seed, expected):
    result = op.philox(torch.tensor(seed), tuple(torch.tensor(c) for c in counter))
    assert [c.item() for c in result] == expected


def philox_literally(counter, key):
    for _ in range(10):
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        low = 2**32 - 1
        counter = (second >> 32 ^ counter[1] ^ key[0], second & low, first >> 32 ^ counter[3] ^ key[1], first & low)
        key = ((key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low)
    return counter


def halves(number):
    return number & 0xFFFFFFFF, number >> 32 & 0xFFFFFFFF


def normal_pair(u, v):
    """Returns Box and Muller's transform in double precision, with the angle as in `gather_start`."""
    radius = math.sqrt(-2 * math.log((u + 0.5) / 2**32)) * (-1 if v >> 31 else 1)
    t = ((v << 1 & 0xFFFFFFFF) ^ 2**31) - 2**31
    angle = t / 2**31 * math.pi / 2
    return radius * math.cos(angle), radius * math.sin(angle)


def unit_noise_literally(sample, length, seed, offset, noise):
    numbers = []
    for call in range(-(-length // 4)):
        drawn = philox_literally((call, sample, *halves(offset)), halves(seed))
        if noise == "normal":
            numbers += [*normal_pair(*drawn[:2]), *normal_pair(*drawn[2:])]
        else:
            numbers += [((u ^ 2**31) - 2**31) / 2**31 for u in drawn]
    return numbers[:length]


def literally(x, order, steps, state, noise, scale, lower, upper, samples):
    """Computes the op one sample at a time, in double precision."""
    seed, offset = state.tolist()
    clean, start = torch.empty_like(x), torch.empty_like(x)
    for i in range(len(x)):
        s = i if order is None else order[i].item()
        clean[i] = start[i] = x[s]
        if steps is None or steps[s] > 0:
            lies = x.movedim(1, -1) if not x.is_contiguous() else x
            number = s if samples is None else samples[s].item()
            drawn = unit_noise_literally(number, lies[s].numel(), seed, offset, noise)
            drawn = torch.tensor(drawn, dtype=torch.float64).view(lies.shape[1:])
            drawn = drawn.movedim(-1, 0) if lies is not x else drawn
            if noise == "uniform":
                scale = torch.tensor(scale, dtype=x.dtype).item()
            moved = x[s].double() + scale * drawn
            moved = moved if lower is None else moved.clamp(min=lower)
            start[i] = moved if upper is None else moved.clamp(max=upper)
    return clean, start


@quick
@given(
    st.integers(0, 4),
    st.sampled_from([(3, 2, 2), (5,), (1,), (2, 1, 3), (2, 3, 1, 2)]),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
    st.fixed_dictionaries(
        {name: flag for name in ("last", "ordered", "counted", "numbered", "bounded")}
        | {"noise": st.sampled_from(NOISES)}
    ),
)
def test_it_is_its_definition(m, shape, dtype, seed, options):
    case = cases.case(m, shape, dtype, seed, **options)
    (clean, start), (same, expected) = case.run(op.gather_start_reference), case.run(literally)
    assert torch.equal(cases.bits(clean), cases.bits(same))
    # float32 noise, rounded once or twice more with x
    close = {"rtol": max(torch.finfo(dtype).eps, 1e-7), "atol": 0.03 * NORMAL_TOLERANCE + 1e-7}
    torch.testing.assert_close(start, expected, **close, equal_nan=True)
    steps = case.arguments["steps"]
    if steps is not None:
        order = case.arguments["order"]
        idle = (steps if order is None else steps[order]) == 0
        assert torch.equal(cases.bits(start[idle]), cases.bits(clean[idle]))


EDGES = [0, 1, 2, 2**23 - 1, 2**24 + 1, 0x55555555, 0xAAAAAAAA, 0xAAAAAAAB, 2**31 - 1, 2**31, 2**32 - 129, 2**32 - 1]


def test_normal_numbers_are_the_transforms_at_every_edge():
    g = torch.Generator().manual_seed(0)
    drawn = torch.randint(2**32, (2, 200), generator=g)
    u, v = torch.cat([torch.tensor([*itertools.product(EDGES, EDGES)]).T, drawn], dim=1)
    result = torch.empty(len(u), 2)
    op._normal_pair(u, v, result)
    expected = torch.tensor([normal_pair(*pair) for pair in zip(u.tolist(), v.tolist(), strict=True)])
    # near 2^32, float32 cannot represent u exactly
    torch.testing.assert_close(result, expected, rtol=0, atol=NORMAL_TOLERANCE + 2**-11.5)
    inner = (u < 2**31) & (u > 0)
    torch.testing.assert_close(result[inner], expected[inner], rtol=0, atol=NORMAL_TOLERANCE)
    assert result.abs().max() < 6.8


def test_uniform_noise_lies_within_epsilon_and_the_bounds():
    x = torch.rand(64, 3, 8, 8)
    for dtype in DTYPES:
        images = x.to(dtype)
        epsilon = torch.tensor(8 / 255, dtype=dtype)
        _, start = ops.gather_start(images, None, None, torch.tensor([1, 2]), "uniform", 8 / 255, 0.0, 1.0)
        assert (start >= (images - epsilon).clamp(0, 1)).all()
        assert (start <= (images + epsilon).clamp(0, 1)).all()
        assert (start - images).abs().max() > 0.9 * epsilon


# Dependence of the noise


def start(x, order=None, steps=None, seed=1, offset=2, noise="normal"):
    return ops.gather_start(x, order, steps, torch.tensor([seed, offset]), noise, 1.0)[1]


@pytest.mark.parametrize("noise", NOISES)
def test_a_samples_noise_is_its_own(noise):
    x = torch.zeros(6, 3, 5, 7)
    whole = start(x, noise=noise)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    assert torch.equal(start(x, order, noise=noise), whole[order])
    assert torch.equal(start(x[:2], noise=noise), whole[:2])
    assert torch.equal(start(x.double(), noise=noise), whole.double())
    assert torch.equal(start(x.half(), noise=noise), whole.half())
    moving = torch.tensor([1, 0, 2, 0, 0, 3])
    assert torch.equal(start(x, order, moving, noise=noise), (whole * (moving > 0).view(-1, 1, 1, 1))[order])
    assert torch.equal(start(x[..., :3, :1], noise=noise).flatten(1), whole.flatten(1)[:, :9])
    last = start(x.contiguous(memory_format=torch.channels_last), noise=noise)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last.movedim(1, -1).flatten(1), whole.flatten(1))


@pytest.mark.parametrize("noise", NOISES)
def test_a_numbered_samples_noise_goes_with_it_into_any_batch(noise):
    x = torch.zeros(6, 9)
    whole = start(x, noise=noise)
    picked = torch.tensor([4, 1, 5])
    result = ops.gather_start(
        x[picked], torch.tensor([2, 0, 1]), None, torch.tensor([1, 2]), noise, 1.0, samples=picked
    )
    assert torch.equal(result[1], whole[picked][[2, 0, 1]])


@pytest.mark.parametrize("noise", NOISES)
def test_every_seed_offset_sample_and_call_has_noise_of_its_own(noise):
    large = [0, 1, 2, 2**32, 2**32 + 1, 2**62, -1, -(2**63)]
    seeds = [start(torch.zeros(1, 8), seed=seed, noise=noise) for seed in large]
    offsets = [start(torch.zeros(1, 8), offset=offset, noise=noise) for offset in large]
    samples = start(torch.zeros(500, 8), noise=noise)
    result = torch.cat([*seeds, *offsets, samples]).view(-1, 4).tolist()
    # seed 1 with offset 2 occurs three times
    assert len({tuple(four) for four in result}) == len(result) - 4


def test_the_offset_moves_on_the_device_and_the_seed_stays():
    x, state = torch.zeros(2, 9), torch.tensor([5, 7])
    first, second = (ops.gather_start(x, None, None, state, "normal", 1.0)[1] for _ in range(2))
    assert state.tolist() == [5, 9]
    assert torch.equal(first, start(x, seed=5, offset=7))
    assert torch.equal(second, start(x, seed=5, offset=8))
    last = torch.tensor([5, 2**63 - 1])
    ops.gather_start(x, None, None, last, "normal", 1.0)
    assert last.tolist() == [5, -(2**63)]


def test_images_that_are_not_dense_come_back_contiguous():
    x = torch.rand(4, 6, 10)[:, ::2, 1:]
    order = torch.tensor([3, 1, 0, 2])
    result = ops.gather_start(x, order, None, torch.tensor([1, 2]), "normal", 1.0)
    expected = ops.gather_start(x.contiguous(), order, None, torch.tensor([1, 2]), "normal", 1.0)
    for a, b in zip(result, expected, strict=True):
        assert a.is_contiguous()
        assert torch.equal(a, b)


# Quality of the noise: 2^20 numbers, each bound four standard errors or more

N = 2**20


@pytest.fixture(scope="module")
def drawn():
    """Returns noise of 1024 samples at offsets 0 and 1 and with another seed: [3, 1024, 1024], by name."""
    places = ((0, 0), (0, 1), (1, 0))
    x = torch.zeros(1024, 1024)
    return {n: torch.stack([start(x, seed=s, offset=o, noise=n).double() for s, o in places]) for n in NOISES}


def distance(numbers, distribution):
    """Returns Kolmogorov and Smirnov's distance: the greatest gap between the empirical and another distribution."""
    ordered = numbers.flatten().sort().values
    ranks = torch.arange(len(ordered) + 1) / len(ordered)
    expected = distribution(ordered)
    return max((expected - ranks[:-1]).max(), (ranks[1:] - expected).max()).item()


CUMULATIVE = {
    "normal": lambda x: (1 + torch.erf(x / math.sqrt(2))) / 2,
    "uniform": lambda x: (1 + x) / 2,
}
MOMENTS = {"normal": (0, 1, 0, 3), "uniform": (0, 1 / 3, 0, 1 / 5)}
VARIANCES = {"normal": (1, 2, 15, 96), "uniform": (1 / 3, 4 / 45, 1 / 7, 16 / 225)}


@pytest.mark.parametrize("noise", NOISES)
def test_moments_and_distribution(drawn, noise):
    for numbers in drawn[noise]:
        for power, (moment, variance) in enumerate(zip(MOMENTS[noise], VARIANCES[noise], strict=True), 1):
            assert numbers.pow(power).mean().item() == pytest.approx(moment, abs=4 * math.sqrt(variance / N))
        assert distance(numbers, CUMULATIVE[noise]) < 2.3 / math.sqrt(N)  # holds with probability 1 - 5e-5
        for lane in range(4):
            assert distance(numbers[:, lane::4], CUMULATIVE[noise]) < 2.3 / math.sqrt(N / 4)


def test_tails_of_the_normal_noise(drawn):
    numbers = drawn["normal"]
    for x in (2.0, 3.0, 4.0):
        expected = math.erfc(x / math.sqrt(2)) / 2
        for tail in (numbers > x, numbers < -x):
            assert tail.double().mean().item() == pytest.approx(expected, abs=4 * math.sqrt(expected / numbers.numel()))
    assert 4.7 < numbers.abs().max() < 6.8


@pytest.mark.parametrize("noise", NOISES)
def test_nothing_is_correlated(drawn, noise):
    numbers = drawn[noise] / math.sqrt(MOMENTS[noise][1])
    pairs = [(numbers[0], numbers[1]), (numbers[0], numbers[2])]  # offsets, seeds
    pairs += [(numbers[0, 1:], numbers[0, :-1])]  # samples
    pairs += [(numbers[0, :, k:], numbers[0, :, :-k]) for k in (1, 2, 3, 4)]  # neighbours
    pairs += [(numbers[0, :, a::4], numbers[0, :, b::4]) for a, b in itertools.combinations(range(4), 2)]  # of one call
    for a, b in pairs:
        for power in (1, 2):  # also the squares, since two numbers of a pair share a radius
            x, y = (v.pow(power) - v.pow(power).mean() for v in (a, b))
            error = 1 / math.sqrt(x.numel())
            assert abs((x * y).mean() / (x.std() * y.std())) < 4.5 * error


# Registration


def some(**options):
    return cases.case(3, (3, 4, 4), torch.float32, 0, special=False, **options)


@pytest.mark.parametrize("options", [{}, {"ordered": False, "counted": False, "noise": "uniform", "last": True}])
def test_opcheck(options):
    torch.library.opcheck(op._gather_start, (), some(**options).arguments)


def test_compiled_it_is_one_op():
    targets = []

    def backend(graph, _):
        targets.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def sort(x, order, steps, state):
        return ops.gather_start(x, order, steps, state, "normal", 0.001)

    torch._dynamo.reset()
    inputs = [some().arguments[name] for name in ("x", "order", "steps", "state")]
    twins = [*inputs[:3], inputs[3].clone()]
    for a, b in zip(sort(*inputs), torch.compile(sort, fullgraph=True, backend=backend)(*twins), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(inputs[3], twins[3])
    assert targets[0] == torch.ops.bt_fast.gather_start.default
    assert all("getitem" in str(target) for target in targets[1:])


@pytest.mark.parametrize("noise", NOISES)
def test_the_reference_waits_for_nothing(noise):
    arguments = some(noise=noise, bounded=True).arguments
    on_device = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pretended_device():
        op.gather_start_reference(**on_device)
        ops.gather_start(**on_device)


def test_what_the_kernel_takes():
    pytest.importorskip("triton")
    x = torch.empty(4, 3, 8, 8, device=DEVICE)
    assert not op._kernel_takes(x)
    with pretended_device():
        for images in (x, x.half(), x.bfloat16(), x.contiguous(memory_format=torch.channels_last), x[:0]):
            assert op._kernel_takes(images)
        for images in (x.double(), x[..., ::2], torch.empty(2, 2**31, device=DEVICE)):
            assert not op._kernel_takes(images)


WRONG = [
    ("x", torch.ones(3, 4, dtype=torch.int64), TypeError),
    ("x", torch.tensor(1.0), ValueError),
    ("order", torch.arange(3).int(), TypeError),
    ("order", torch.arange(2), ValueError),
    ("order", torch.arange(3, device="meta"), ValueError),
    ("steps", torch.rand(3), TypeError),
    ("steps", torch.ones(3, 1, dtype=torch.int64), ValueError),
    ("samples", torch.arange(3).int(), TypeError),
    ("samples", torch.arange(2), ValueError),
    ("state", torch.zeros(2), TypeError),
    ("state", torch.zeros(3, dtype=torch.int64), ValueError),
    ("state", torch.zeros(4, dtype=torch.int64)[::2], ValueError),
    ("noise", "gaussian", ValueError),
]


@pytest.mark.parametrize(("name", "value", "error"), WRONG)
def test_an_error_names_the_argument_and_leaves_the_offset(name, value, error):
    arguments = some().arguments
    state = arguments["state"].clone()
    with pytest.raises(error, match=rf"^{name} must "):
        op.gather_start(**arguments | {name: value})
    assert torch.equal(arguments["state"], state)
