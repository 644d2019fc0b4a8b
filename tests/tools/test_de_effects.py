"""Probabilities, calls and variances of differential expression, against arithmetic and classical tests."""

import numpy as np
import pytest
from scipy import stats

from pyrosc.tools.de import effects as eff
from pyrosc.tools.de.sides import donor_weights


def test_the_set_of_calls_by_hand():
    p = np.array([0.99, 0.98, 0.90, 0.96, 0.5, 1.0])
    # sorted errors 0, .01, .02, .04, .10, .5; means 0, .005, .01, .0175, .034, .112
    np.testing.assert_array_equal(eff.called(p, np.ones(6, bool), 0.05), [1, 1, 1, 1, 0, 1])
    np.testing.assert_array_equal(eff.called(p, np.ones(6, bool), 0.012), [1, 1, 0, 0, 0, 1])
    # a gene that is not expressed is neither called nor does it help others
    without = np.array([1, 1, 1, 1, 1, 0], bool)
    np.testing.assert_array_equal(eff.called(p, without, 0.05), [1, 1, 1, 1, 0, 0])
    np.testing.assert_array_equal(eff.called(p, without, 0.011), [1, 0, 0, 0, 0, 0])
    assert not eff.called(p, np.zeros(6, bool), 0.5).any()
    assert not eff.called(p * 0.5, np.ones(6, bool), 0.05).any()


def test_q_values_are_the_expected_fdr_of_the_sets():
    p = np.array([0.99, 0.98, 0.90, 0.96, 0.5, 1.0])
    gate = np.array([1, 1, 1, 1, 1, 0], bool)
    q = eff.q_values(p, gate)
    np.testing.assert_allclose(q, [0.01, 0.015, 0.0425, 0.07 / 3, 0.134, 1.0])
    for fdr in (0.012, 0.02, 0.05, 0.2):
        np.testing.assert_array_equal(q <= fdr, eff.called(p, gate, fdr))


@pytest.mark.parametrize("delta", [0.25, 0.0])
def test_the_posterior_of_a_gene_is_that_of_a_numerical_integral(delta):
    scales, weights = np.array([0.05, 0.4, 2.0]), np.array([0.6, 0.3, 0.1])
    estimate, error = np.array([0.7, -1.5, 0.0, 0.1]), np.array([0.3, 0.5, 0.2, 1.0])
    found = eff.shrunken(estimate, error, (scales, weights), delta, 0.9)
    x = np.linspace(-12, 12, 480_001)
    for i in range(4):
        prior = (weights * stats.norm.pdf(x[:, None], 0, scales)).sum(1)
        density = prior * stats.norm.pdf(estimate[i], x, error[i])
        density /= density.sum()
        cdf = density.cumsum()
        assert found.larger[i] == pytest.approx(density[x >= delta].sum(), abs=4e-4)
        assert found.smaller[i] == pytest.approx(density[x <= -delta].sum(), abs=4e-4)
        assert found.mean[i] == pytest.approx((density * x).sum(), abs=1e-4)
        second = (density * x**2).sum()
        assert found.std[i] == pytest.approx(np.sqrt(second - (density * x).sum() ** 2), abs=1e-4)
        ends = x[np.searchsorted(cdf, [0.05, 0.5, 0.95])]
        np.testing.assert_allclose([found.lower[i], found.median[i], found.upper[i]], ends, atol=2e-3)


def test_the_prior_is_found_and_calls_hold_their_rate():
    rng = np.random.default_rng(0)
    truth = np.where(rng.random(20_000) < 0.15, rng.normal(0, 1, 20_000), 0.0)
    error = rng.uniform(0.1, 0.6, 20_000)
    estimate = rng.normal(truth, error)
    scales, weights = eff.fit_prior(estimate, error, 0.25)
    assert weights.sum() == pytest.approx(1)
    assert weights[scales < 0.2].sum() == pytest.approx(0.85, abs=0.03)
    assert np.sqrt(weights @ scales**2) == pytest.approx(np.sqrt(0.15), rel=0.05)
    found = eff.shrunken(estimate, error, (scales, weights), 0.25, 0.95)
    calls = eff.called(np.maximum(found.larger, found.smaller), np.ones(20_000, bool), 0.05)
    right = (np.abs(truth) >= 0.25) & (np.sign(truth) == np.sign(found.mean))
    assert 0.03 < 1 - right[calls].mean() < 0.06
    # a flat prior does not: among many unchanged genes, noise looks like a change
    flat = stats.norm.sf((0.25 - np.abs(estimate)) / error)
    assert 1 - right[eff.called(flat, np.ones(20_000, bool), 0.05)].mean() > 0.08


def test_the_prior_of_nothing_is_narrow():
    rng = np.random.default_rng(1)
    error = rng.uniform(0.1, 0.6, 3000)
    prior = eff.fit_prior(rng.normal(0, error), error, 0.25)
    found = eff.shrunken(rng.normal(0, error), error, prior, 0.25, 0.95)
    assert not eff.called(np.maximum(found.larger, found.smaller), np.ones(3000, bool), 0.05).any()


def test_summaries_of_draws():
    draws = np.random.default_rng(0).normal([1.0, -0.3], [0.5, 0.1], (4000, 2))
    found = eff.from_draws(draws, 0.25, 0.9)
    np.testing.assert_allclose(found.larger, [(draws[:, 0] >= 0.25).mean(), 0])
    np.testing.assert_allclose(found.smaller, (draws <= -0.25).mean(0))
    np.testing.assert_allclose(found.lower, np.quantile(draws, 0.05, axis=0))
    np.testing.assert_allclose(eff.from_draws(draws, 0.0, 0.9).smaller, (draws < 0).mean(0))


def test_errors_are_those_on_the_side_of_zero():
    rng = np.random.default_rng(0)
    draws = rng.normal([[2.0], [-1.0], [0.0]], [[0.5], [0.2], [0.3]], (3, 20_000))
    median, error = eff.estimates(draws)
    np.testing.assert_allclose(median, [2, -1, 0], atol=0.01)
    np.testing.assert_allclose(error[:2], [0.5, 0.2], rtol=0.03)
    skewed = np.where(draws[0] > 2, 2 + 10 * (draws[0] - 2), draws[0])  # out to larger changes
    np.testing.assert_allclose(eff.estimates(np.stack([skewed, -skewed]))[1], 0.5, rtol=0.03)


def test_delta_from_the_spread_of_the_genes():
    estimate = np.random.default_rng(0).normal(0, 0.3, 100_000)
    assert eff.spread_delta(estimate) == pytest.approx(2 * 0.3 * stats.norm.ppf(0.84), rel=0.02)
    assert eff.spread_delta(np.zeros(10)) == 0.1


@pytest.mark.parametrize("n", [3, 4, 8, 20])
def test_donor_weights_give_the_classical_variance_of_a_mean(n):
    rng = np.random.default_rng(n)
    y = rng.normal(0, 1, n)
    weights = donor_weights(n, n, (200_000,), rng)
    means = weights @ y / weights.sum(1)
    assert means.mean() == pytest.approx(y.mean(), abs=0.01)
    assert means.var() == pytest.approx(y.var(ddof=1) / n, rel=0.02)


def test_moderated_errors_hold_their_level():
    rng = np.random.default_rng(0)
    g, n = 20_000, 5
    noise = rng.lognormal(0, 1, g)
    sigma = np.sqrt(noise * 8 / rng.chisquare(8, g))  # around a trend, of 8 degrees of freedom
    error = sigma * np.sqrt(rng.chisquare(n - 1, g) / (n - 1))
    estimate = rng.normal(0, sigma)
    z = estimate / eff.moderated(estimate, error, n - 1, noise, np.ones(g, bool))
    for level in (0.05, 0.01, 0.001):
        share = (2 * stats.norm.sf(np.abs(z)) < level).mean()
        assert share < 1.1 * level + 2e-4, level  # a variance is never taken for smaller than it was seen
        assert share > 0.2 * level, level
        assert (2 * stats.norm.sf(np.abs(estimate / error)) < level).mean() > 1.9 * level  # what it is for


def test_moderated_errors_of_equal_variances_are_equal_but_for_the_larger_ones():
    rng = np.random.default_rng(0)
    error = np.sqrt(rng.chisquare(6, 4000) / 6)
    found = eff.moderated(rng.normal(0, 1, 4000), error, 6, np.ones(4000), np.ones(4000, bool))
    small = error < 0.9
    np.testing.assert_allclose(found[small], found[small][0], rtol=0.05)
    assert found[small].mean() == pytest.approx(1, abs=0.08)
