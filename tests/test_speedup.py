import pytest

from bt_fast import Fractions, theoretical_speedup, theoretical_speedup_augmix
from bt_fast.speedup import augmix_cost, mart_cost, pgd_cost, trades_cost, trades_reference_cost

PAPER = Fractions(boundary=0.28, robust=0.54, outlier=0.18)


@pytest.mark.parametrize(
    ("fractions", "steps", "printed"),
    [
        (PAPER, (10, 2, 0), 2.3),
        (Fractions(0.26, 0.55, 0.18), (10, 0, 0), 3.0),
        (Fractions(0.29, 0.44, 0.27), (10, 1, 0), 2.5),
        (Fractions(0.30, 0.43, 0.26), (10, 2, 0), 2.2),
        (Fractions(1.0, 0.0, 0.0), (10, 2, 0), 1.0),
        (Fractions(1.0, 0.0, 0.0), (1, 0, 0), 5.5),
    ],
)
def test_the_papers_speedups(fractions, steps, printed):
    b, r, o = steps
    speedup = theoretical_speedup(fractions, boundary_steps=b, robust_steps=r, outlier_steps=o, baseline_steps=10)
    assert speedup == pytest.approx(printed, abs=0.11)
    assert speedup == pytest.approx(11 / (fractions.boundary * b + fractions.robust * r + fractions.outlier * o + 1))


@pytest.mark.parametrize(("boundary", "expected"), [(0.35, 1.8), (0.36, 1.7), (0.0, 3.0), (1.0, 1.0)])
def test_augmix(boundary, expected):
    assert theoretical_speedup_augmix(boundary) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan")])
def test_augmix_fraction_out_of_range(bad):
    with pytest.raises(ValueError, match=f"boundary_fraction.*{bad}"):
        theoretical_speedup_augmix(bad)


@pytest.mark.parametrize("name", ["boundary_steps", "robust_steps", "outlier_steps", "baseline_steps"])
def test_negative_steps(name):
    with pytest.raises(ValueError, match=f"{name}.*-1"):
        theoretical_speedup(PAPER, **{name: -1})


def test_forward_pass_model():
    mean_steps = PAPER.mean_steps(10, 2, 0)
    assert trades_reference_cost(10) == 39
    assert trades_cost(10) == 27
    assert trades_cost(10, clean_forwards=2) == 30
    assert trades_cost(mean_steps) == pytest.approx(14.8, abs=0.05)
    assert trades_cost(mean_steps, corrupted_fraction=1 - PAPER.outlier) == pytest.approx(14.2, abs=0.05)


def test_forward_passes_of_mart_and_pgd():
    papers = Fractions(boundary=0.29, robust=0.44, outlier=0.27)  # MART, N_R = 1
    mean_steps = papers.mean_steps(10, 1, 0)
    assert mart_cost(10, mining=False) == 26  # 10 · 2 + 2 · 3
    assert mart_cost(mean_steps) == pytest.approx(13.7, abs=0.05)
    assert mart_cost(papers.mean_steps(10, 0, 0), papers.boundary) == pytest.approx(1 + 5.8 + 3 + 3 * 0.29)
    assert pgd_cost(10, mining=False) == 23  # 10 · 2 + 3
    assert pgd_cost(mean_steps) == pytest.approx(1 + 2 * 3.34 + 3)


@pytest.mark.parametrize("shares", [(-0.1, 0.0, 0.0), (2.0, 2.0, 2.0), (0.6, 0.6, 0.0), (float("nan"), 0.0, 0.0)])
def test_fractions_that_are_none_are_refused(shares):
    with pytest.raises(ValueError, match="fractions must lie in"):
        Fractions(*shares)


@pytest.mark.parametrize(("boundary", "cost"), [(1.0, 9.0), (0.35, 5.1), (0.0, 3.0)])
def test_the_finer_model_of_augmix(boundary, cost):
    assert augmix_cost(boundary) == pytest.approx(cost)
