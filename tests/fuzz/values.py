"""Draws arguments that are mostly valid, and sometimes anything."""

import decimal
import fractions
import math

import numpy as np
import torch
from hypothesis import strategies as st

HUGE = 10**400  # too large for a float
NUMBERS = (0, -0.0, 1, -1, math.nan, math.inf, -math.inf, 1e-320, 1e300, 2**31, 2**63, HUGE, -HUGE)
OTHERS = (
    None,
    True,
    "",
    "l_inf",
    "0.1",
    b"bytes",
    1j,
    [],
    [0.1],
    {},
    (1, 2),
    object(),
    int,
    lambda *_, **__: None,
    np.float64(0.5),
    np.int64(3),
    np.float32("nan"),
    np.array([1.0, 2.0]),
    fractions.Fraction(1, 3),
    fractions.Fraction(HUGE, 3),
    decimal.Decimal("0.1"),
    torch.tensor(1),
    torch.tensor([1.0, 2.0]),
    torch.float32,
    torch.device("cpu"),
    torch.nn.Linear(2, 2),
)
ANYTHING = st.one_of(st.sampled_from(NUMBERS), st.sampled_from(OTHERS), st.integers(), st.floats(), st.text(max_size=5))
POSITIVE = st.floats(1e-6, 1.0)
SEEDS = st.integers(0, 2**31 - 1)

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
ODD_DTYPES = (
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
CONTENTS = ("uniform", "normal", "huge", "tiny", "constant", "nan", "inf", "-inf", "zero")
LAYOUTS = ("plain", "strided", "expanded", "transposed", "gradient", "meta", "sparse", "inference", "read only")


@st.composite
def mostly(draw, valid, wild=ANYTHING, share=25):
    """Draws from `valid`, and once in `share` from `wild`."""
    return draw(wild if draw(st.integers(1, share)) == share else valid)


def filled(shape, content, seed, dtype):
    """Returns a tensor of float64 numbers of one of CONTENTS, cast to the dtype."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=generator, dtype=torch.float64)
    match content:
        case "normal":
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
        case "huge":
            x = (x - 0.5) * 1e38
        case "tiny":
            x = x * 1e-44
        case "constant":
            x = torch.full(shape, 0.5, dtype=torch.float64)
        case "zero":
            x = torch.zeros(shape, dtype=torch.float64)
        case "nan" | "inf" | "-inf":
            x = torch.where(torch.rand(shape, generator=generator) < 0.2, float(content), x)
    if not dtype.is_floating_point and not dtype.is_complex:
        x = (x.nan_to_num(0.0, 9.0, -9.0) * 9).clamp(-100, 100)
    return x.to(dtype)


def laid_out(x, layout):
    """Returns the same numbers in another layout."""
    match layout:
        case "strided" if x.dim():
            return torch.stack([x, x], dim=-1)[..., 0]
        case "expanded" if x.dim() and len(x):
            return x[:1].expand(x.shape)
        case "transposed" if x.dim() > 1:
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        case "gradient" if x.is_floating_point() or x.is_complex():
            return x.requires_grad_()
        case "meta":
            return x.to("meta")
        case "sparse" if x.dim() and x.dtype in FLOATS:
            return x.to_sparse()
        case "inference":
            with torch.inference_mode():
                return x.clone()
        case "read only" if x.dtype == torch.float32:
            return torch.from_numpy(x.numpy())
    return x


SHAPES = st.lists(st.integers(0, 4), max_size=5).map(tuple)
DTYPES = st.sampled_from([*FLOATS, *ODD_DTYPES])
ANY_CONTENT, ANY_LAYOUT = st.sampled_from(CONTENTS), st.sampled_from(LAYOUTS)


@st.composite
def tensors(draw, shapes=SHAPES, dtypes=DTYPES, contents=ANY_CONTENT, layouts=ANY_LAYOUT):
    """Draws any tensor within the given choices."""
    return laid_out(filled(draw(shapes), draw(contents), draw(SEEDS), draw(dtypes)), draw(layouts))


WILD_TENSORS = st.one_of(tensors(), ANYTHING)
FLOAT_TENSORS = tensors(dtypes=st.sampled_from(FLOATS))  # of any shape
STRIDED = st.sampled_from(LAYOUTS[:5])


@st.composite
def floats_of(draw, shape, contents=("uniform", "normal", "zero", "constant"), dtypes=(torch.float32,), share=25):
    """Draws mostly a dense tensor of this shape and one of these dtypes."""
    choices = {"dtypes": st.sampled_from(dtypes), "contents": st.sampled_from(contents), "layouts": STRIDED}
    return draw(mostly(tensors(st.just(shape), **choices), odd_like(shape), share))


def odd_like(shape):
    """Returns a strategy of tensors of this shape and any kind, of another shape, and other objects."""
    return st.one_of(tensors(st.just(shape)), WILD_TENSORS)


@st.composite
def labels_of(draw, m, classes, share=25):
    """Draws mostly labels in 0..classes-1."""
    generator = torch.Generator().manual_seed(draw(SEEDS))
    kind = draw(mostly(st.just("labels"), st.sampled_from(["outside", "odd", "narrow"]), share))
    if kind == "odd":
        return draw(odd_like((m,)))
    low, high = (-3, classes + 3) if kind == "outside" else (0, classes)
    dtype = draw(st.sampled_from([torch.int8, torch.int32, torch.uint8])) if kind == "narrow" else torch.int64
    return torch.randint(low, max(high, low + 1), (m,), generator=generator).to(dtype)


@st.composite
def labels_or_distributions(draw, m, classes, share=25):
    """Labels, or mostly distributions over as many classes."""
    if draw(st.integers(0, 2)):
        return draw(labels_of(m, classes, share))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    over = draw(mostly(st.just(classes), st.integers(0, classes + 2), share))
    rows = torch.randn(m, over, generator=generator).softmax(dim=1).to(draw(st.sampled_from(FLOATS)))
    return rows * draw(mostly(st.just(1.0), st.sampled_from([0.0, 2.0, -1.0, float("nan")]), share))


def generators():
    """Draws None or a generator on the CPU, and sometimes something else."""
    return mostly(st.one_of(st.none(), SEEDS.map(lambda seed: torch.Generator().manual_seed(seed))))


def told(arguments):
    """Formats arguments, one a line."""
    return "\n     ".join(f"{name} = {_told(value)}" for name, value in arguments.items())


def _told(value):
    if isinstance(value, torch.Tensor):
        head = f"{value.dtype} {list(value.shape)} {value.layout} {value.device}"
        small = not value.is_meta and value.layout == torch.strided and value.numel() <= 12
        return f"{head} {value.flatten().tolist()}" if small else head
    return repr(value)[:200]
