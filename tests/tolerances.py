"""The tolerances of all tests, by dtype."""

import torch

TOLERANCES = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2e-2, "atol": 1e-2},
    torch.float16: {"rtol": 2e-3, "atol": 1e-3},
}
DTYPES = tuple(TOLERANCES)
# float64 after some updates, which pass rounding on through normalised directions and SGD
UPDATES = "updates"
TOLERANCES[UPDATES] = {"rtol": 1e-8, "atol": 1e-9}
# float32 images that a loader has normalised, turned back to pixels: one rounding a pixel, through some attack steps
NORMALISED = "normalised"
TOLERANCES[NORMALISED] = {"rtol": 1e-3, "atol": 1e-5}


def assert_near(actual, expected, kind=None, **options):
    """Asserts that `actual` is `expected` (anything tensor-like) to the tolerance of `kind`, else of actual's dtype."""
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, **TOLERANCES[kind or actual.dtype], **options)


def assert_near_nested(actual, expected, kind=None):
    """Compares two dicts of tensors: equal keys, None where None, integers exactly, floating point to the tolerance."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        other = expected[name]
        if value is None or other is None or not value.is_floating_point():
            assert (value is other is None) or torch.equal(value, other), name
        else:
            assert_near(value, other, kind, msg=lambda text, name=name: f"{name}: {text}")


# 16-bit autocast compared with float32: the error of a loss, gradient or step, relative to its length. For smooth
# models: where a ReLU opens in 16 bits only, a gradient may be off by 0.2
AUTOCAST = {torch.bfloat16: 5e-2, torch.float16: 1e-2}
