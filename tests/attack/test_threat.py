import math

import pytest

from bt_fast import ThreatModel


def test_defaults_are_linf_over_unit_pixels():
    assert ThreatModel(0.031) == ThreatModel(epsilon=0.031, norm="l_inf", lower=0.0, upper=1.0)


@pytest.mark.parametrize("epsilon", [-0.1, math.nan, math.inf])
def test_epsilon_must_be_finite_and_not_negative(epsilon):
    with pytest.raises(ValueError, match=rf"epsilon.*at least 0.*{epsilon}"):
        ThreatModel(epsilon)


def test_an_unknown_norm_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'l_inf'.*'l_2'.*'l_1'"):
        ThreatModel(0.031, "l_1")


@pytest.mark.parametrize("bounds", [(1.0, 0.0), (0.5, 0.5), (math.nan, 1.0)])
def test_bounds_must_be_in_order(bounds):
    with pytest.raises(ValueError, match=f"lower.*less than upper.*{bounds[0]} and {bounds[1]}"):
        ThreatModel(0.031, "l_inf", *bounds)
