"""Student t against printed tables, intervals against hand sums, the acceptance rule case by case."""

import math

import pytest

from glocal.measure import accept, drift, exceedance, exceedance_statement, log_ratio, paired, t_cdf, t_quantile
from glocal.measure.student import incomplete_beta

TABLE = [  # degrees, probability, quantile: values of the usual printed t table
    (1, 0.95, 6.313752),
    (1, 0.975, 12.706205),
    (2, 0.95, 2.919986),
    (3, 0.90, 1.637744),
    (3, 0.95, 2.353363),
    (4, 0.995, 4.604095),
    (7, 0.95, 1.894579),
    (9, 0.975, 2.262157),
    (18, 0.95, 1.734064),
    (30, 0.90, 1.310415),
    (120, 0.975, 1.979930),
    (10_000, 0.975, 1.960201),
]


@pytest.mark.parametrize(("degrees", "probability", "expected"), TABLE)
def test_quantile_matches_the_table(degrees, probability, expected):
    assert t_quantile(probability, degrees) == pytest.approx(expected, abs=2e-6)
    assert t_quantile(1 - probability, degrees) == pytest.approx(-expected, abs=2e-6)


def test_one_and_two_degrees_have_closed_forms():
    for t in (-40.0, -1.3, 0.0, 0.4, 7.0):
        assert t_cdf(t, 1) == pytest.approx(0.5 + math.atan(t) / math.pi, abs=1e-12)
        assert t_cdf(t, 2) == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)), abs=1e-12)


@pytest.mark.parametrize("degrees", [1, 2, 5, 7.5, 40, 1000])
@pytest.mark.parametrize("probability", [1e-6, 0.03, 0.5, 0.72, 0.999])
def test_quantile_inverts_the_cdf(degrees, probability):
    assert t_cdf(t_quantile(probability, degrees), degrees) == pytest.approx(probability, rel=1e-9)


def test_incomplete_beta_has_its_polynomial_values():
    for x in (0.0, 0.1, 0.5, 0.93, 1.0):
        assert incomplete_beta(x, 1, 1) == pytest.approx(x, abs=1e-14)
        assert incomplete_beta(x, 2, 3) == pytest.approx(6 * x**2 - 8 * x**3 + 3 * x**4, abs=1e-13)


def test_bad_probability_and_degrees_are_refused():
    with pytest.raises(ValueError, match=r"probability must lie strictly between 0 and 1, got 1\.0"):
        t_quantile(1.0, 3)
    with pytest.raises(ValueError, match="degrees must be positive, got 0"):
        t_cdf(1.0, 0)


def test_paired_interval_by_hand():
    interval = paired([1.0, 2.0, 3.0, 4.0])
    half = 2.353363 * math.sqrt(5 / 3) / 2
    assert interval.mean == 2.5
    assert interval.low == pytest.approx(2.5 - half, abs=1e-5)
    assert interval.high == pytest.approx(2.5 + half, abs=1e-5)
    assert (interval.level, interval.n) == (0.90, 4)


def test_paired_covers_the_mean_as_often_as_it_says():
    import torch

    generator = torch.Generator().manual_seed(5)
    draws = torch.randn(2000, 5, generator=generator, dtype=torch.float64) + 3.0
    hits = sum(interval.low <= 3.0 <= interval.high for interval in (paired(row) for row in draws.tolist()))
    assert 0.88 < hits / 2000 < 0.92


def test_log_ratio_is_scale_free_and_exact_for_equal_ratios():
    interval = log_ratio([3.0, 6.0, 30.0], [2.0, 4.0, 20.0])
    assert interval.mean == pytest.approx(1.5)
    assert interval.low == pytest.approx(1.5) and interval.high == pytest.approx(1.5)
    forward, backward = log_ratio([1.0, 3.0, 2.0], [2.0, 2.5, 1.0]), log_ratio([2.0, 2.5, 1.0], [1.0, 3.0, 2.0])
    assert forward.low == pytest.approx(1 / backward.high)


def test_broken_pairs_are_named():
    with pytest.raises(ValueError, match=r"differences holds 1 value\(s\); an interval needs at least 2 pairs"):
        paired([0.1])
    with pytest.raises(ValueError, match=r"differences\[1\] is nan; every value must be finite"):
        paired([0.1, math.nan])
    with pytest.raises(ValueError, match=r"denominators\[1\] is 0\.0; a ratio needs positive values"):
        log_ratio([1.0, 1.0], [1.0, 0.0])
    with pytest.raises(ValueError, match="numerators has 2 values and denominators 3"):
        log_ratio([1.0, 1.0], [1.0, 1.0, 1.0])


def test_drift_and_exceedance():
    assert drift(0.2, 0.2, 1.2) == 0.0
    assert drift(1.2, 0.2, 1.2) == 1.0
    assert drift(0.1, 0.2, 1.2) == pytest.approx(-0.1)
    with pytest.raises(ValueError, match=r"ceiling \(0\.1\) must exceed floor \(0\.2\)"):
        drift(0.1, 0.2, 0.1)
    assert exceedance(8) == pytest.approx(1 / 9)
    assert "worst of 8 with probability at most 1/9 (11%)" in exceedance_statement(8)


def test_acceptance_holds_and_breaks_on_each_condition():
    drifts, dense, sparse = [0.05, 0.06, 0.07, 0.06], [15.0, 15.2, 15.1, 15.0], [10.0, 10.0, 10.1, 10.0]
    good = accept(drifts, dense, sparse, target=1.4)
    assert good.accepted and good.failures == () and good.worst == 0.07 and good.worst_index == 2
    mean = accept(drifts, dense, sparse, limit=0.06, target=1.4)
    assert not mean.accepted and mean.failures[0].startswith("upper 90% bound of mean drift")
    worst = accept([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.21], [1.5] * 8, [1.0] * 8)
    assert worst.failures == ("worst drift 0.210 exceeds twice the limit 0.200",)
    slow = accept(drifts, dense, sparse, target=1.6)
    assert slow.failures[0].startswith("lower 90% bound of the speed-up 1.49x is below")
    with pytest.raises(ValueError, match="must be of one length, got 4, 4, 3"):
        accept(drifts, dense, sparse[:3])
