"""From draws of log-fold changes to probabilities, intervals and calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_COMPONENTS = 25
#: Weight of the narrowest component in the prior of the weights, in genes: errs towards no change (Stephens
#: 2017).
_NULL_GENES = 10.0
#: Weight below which a component is left out.
_NEGLIGIBLE = 1e-5
_LARGEST_Z = 37.0  # beyond, a normal tail is 0 in double precision
_TREND_DEGREE = 3
_NORMAL = 1e6  # degrees of freedom of a normal law


@dataclass(frozen=True)
class Scale:
    """The scale on which two means are compared.

    Attributes
    ----------
    name
        What columns of the table begin with.
    words
        For axes.
    delta
        δ by default.
    null_sd
        Greatest standard deviation of the prior's narrowest component.
    smallest_delta
        Least δ that is taken from the genes.
    """

    name: str
    words: str
    delta: float
    null_sd: float
    smallest_delta: float

    def change(self, one: np.ndarray, two: np.ndarray, epsilon: float) -> np.ndarray:
        """Effects from means of both sides; ε is added to means whose logarithms are taken."""
        if self.name == "difference":
            return one - two
        e = np.float32(epsilon)
        return np.log2((one + e) / (two + e))


LFC = Scale("lfc", "log2-fold change", 0.25, 0.05, 0.1)
DIFFERENCE = Scale("difference", "difference", 0.05, 0.01, 0.02)
SCALES = {s.name: s for s in (LFC, DIFFERENCE)}


@dataclass(frozen=True)
class Effects:
    """What is known of each gene's effect: a log2-fold change, or a difference.

    Attributes
    ----------
    mean, median, std, lower, upper
        (g,) of the posterior.
    larger, smaller
        (g,) P(effect ≥ δ) and P(effect ≤ −δ); for δ = 0 of being strictly positive, negative.
    """

    mean: np.ndarray
    median: np.ndarray
    std: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    larger: np.ndarray
    smaller: np.ndarray


def estimates(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Medians of the draws (g, s), and their standard deviations on the side of zero.

    Where one group has few counts draws reach far on the other side, from a large change to a larger one,
    which is not what decides whether there is a change.

    Returns
    -------
    tuple
        (g,) and (g,) float64, the latter positive: equal draws would be a certainty that no sample gives.
    """
    middle = np.median(draws, 1, keepdims=True)
    inward = np.minimum((draws - middle) * np.sign(middle), 0)
    return middle[:, 0].astype(np.float64), np.sqrt(2 * (inward**2).mean(1, dtype=np.float64)) + 1e-6


def from_draws(draws: np.ndarray, delta: float, level: float) -> Effects:
    """Effects as the draws (s, g) have them."""
    tail = (1 - level) / 2
    low, middle, high = np.quantile(draws, [tail, 0.5, 1 - tail], axis=0)
    more, less = (draws >= delta, draws <= -delta) if delta > 0 else (draws > 0, draws < 0)
    return Effects(draws.mean(0), middle, draws.std(0), low, high, more.mean(0), less.mean(0))


def fit_prior(
    estimate: np.ndarray, error: np.ndarray, delta: float, iterations: int = 500, scale: Scale = LFC
) -> tuple[np.ndarray, np.ndarray]:
    """Law of the genes' effects: a mixture of normals around zero, by empirical Bayes.

    Maximises the penalised likelihood of the weights, with estimates normal around the truth (Stephens 2017,
    eqs. 2.2 to 2.6), by EM.

    Parameters
    ----------
    estimate, error
        (g,) estimates and their standard errors.
    delta
        Threshold: genes without a change have a standard deviation of `Scale.null_sd`, or δ/5 where that is
        less. Not 0, since a change of the others' shares moves all genes a little.
    iterations
        Of EM.
    scale
        Of the estimates.

    Returns
    -------
    tuple
        (c,) standard deviations of the components, and their weights; components of hardly any
        weight are left out.
    """
    null = min(scale.null_sd, delta / 5) if delta > 0 else scale.null_sd
    largest = max(2 * float(np.abs(estimate).max(initial=0)), 4 * null)
    scales = np.concatenate([[null], np.geomspace(1.5 * null, largest, _COMPONENTS - 1)])
    weights = np.full(_COMPONENTS, 1 / _COMPONENTS)
    prior = np.zeros(_COMPONENTS)
    prior[0] = _NULL_GENES - 1
    likelihood = np.exp(_log_likelihood(estimate, error, scales))
    total = len(estimate) + prior.sum()
    for _ in range(iterations):
        shares = likelihood.T @ (1 / (likelihood @ weights))
        new = (weights * shares + prior) / total
        moved = float(np.abs(new - weights).max())
        weights = new
        if moved < 1e-6:
            break
    kept = weights > _NEGLIGIBLE
    kept[0] = True
    return scales[kept], weights[kept] / weights[kept].sum()


def _log_likelihood(estimate: np.ndarray, error: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """(g, c) log-density of each estimate under each component, up to a constant per gene."""
    variance = error[:, None] ** 2 + scales**2
    found = -0.5 * (estimate[:, None] ** 2 / variance + np.log(variance))
    return found - found.max(1, keepdims=True)


def shrunken(
    estimate: np.ndarray,
    error: np.ndarray,
    prior: tuple[np.ndarray, np.ndarray],
    delta: float,
    level: float,
) -> Effects:
    """Effects under a prior of `fit_prior`: each gene's posterior is a mixture of normals."""
    from scipy.special import ndtr

    scales, weights = prior
    share = weights * np.exp(_log_likelihood(estimate, error, scales))
    share /= share.sum(1, keepdims=True)
    error2 = error[:, None] ** 2
    shrink = scales**2 / (scales**2 + error2)
    centre = shrink * estimate[:, None]
    scale = np.sqrt(shrink * error2)

    def below(x: np.ndarray) -> np.ndarray:
        """P(LFC ≤ x)."""
        return (share * ndtr((x[:, None] - centre) / scale)).sum(1)

    larger = (share * ndtr((centre - delta) / scale)).sum(1)
    smaller = (share * ndtr((-delta - centre) / scale)).sum(1)
    mean = (share * centre).sum(1)
    second = (share * (centre**2 + scale**2)).sum(1)
    std = np.sqrt(np.maximum(second - mean**2, 0))
    tail = (1 - level) / 2
    low, middle, high = (_quantile(below, q, mean, std) for q in (tail, 0.5, 1 - tail))
    return Effects(mean, middle, std, low, high, larger, smaller)


def _quantile(
    below: Callable[[np.ndarray], np.ndarray], q: float, mean: np.ndarray, std: np.ndarray
) -> np.ndarray:
    """x with P(LFC ≤ x) = q, by bisection between bounds of Cantelli's inequality."""
    reach = std * np.sqrt(max(q, 1 - q) / min(q, 1 - q))
    low, high = mean - reach, mean + reach
    for _ in range(20):
        middle = (low + high) / 2
        enough = below(middle) >= q
        high = np.where(enough, middle, high)
        low = np.where(enough, low, middle)
    return (low + high) / 2


def moderated(
    estimate: np.ndarray, error: np.ndarray, freedom: float, noise: np.ndarray, typical: np.ndarray
) -> np.ndarray:
    """Standard errors of few replicates, made fit for a normal law.

    A variance from few replicates is a poor one: variances are shrunken towards a trend in the noise of
    counts, as in Smyth 2004 (eqs. 3 to 6, moment estimators of section 6.2) with the trend of Law 2014. The
    tails of the t law that is left are taken into account by the standard error with which a normal law
    gives the estimate the same p-value (Lu and Stephens 2019).

    Parameters
    ----------
    estimate, error
        (g,) estimates and standard errors.
    freedom
        Degrees of freedom of the variances.
    noise
        (g,) positive: variance that the number of counts alone would give.
    typical
        (g,) boolean: genes by which the trend is fitted.

    Returns
    -------
    numpy.ndarray
        (g,).
    """
    from scipy import special, stats

    half = freedom / 2
    logs = np.log(error**2) - special.digamma(half) + np.log(half)
    at = np.log(noise)
    if not typical.any():
        typical = np.ones(len(error), bool)
    degree = int(min(_TREND_DEGREE, typical.sum() // 20))
    trend = np.polynomial.Polynomial.fit(at[typical], logs[typical], degree) if np.ptp(at[typical]) else None
    inside = np.clip(at, at[typical].min(), at[typical].max())
    level = np.full(len(at), logs[typical].mean()) if trend is None else trend(inside)
    rest = (logs - level)[typical]
    excess = rest @ rest / max(len(rest) - degree - 1, 1) - special.polygamma(1, half)
    if excess > 0:  # variances differ between genes by more than their own error
        prior = 2 * _inverse_trigamma(excess)
        common = np.exp(level + special.digamma(prior / 2) - np.log(prior / 2))
        variance = (prior * common + freedom * error**2) / (prior + freedom)
        total = prior + freedom
    else:
        variance, total = np.exp(level), _NORMAL
    # a gene that varies more than its like may do so for a reason, such as one odd donor
    variance = np.maximum(variance, error**2)
    t = np.abs(estimate) / np.sqrt(variance)
    z = np.clip(-special.ndtri(stats.t.sf(t, total)), 0, _LARGEST_Z)
    at_zero = stats.norm.pdf(0) / stats.t.pdf(0, total)  # the limit of t/z
    return np.sqrt(variance) * np.where(t > 1e-3, t / np.maximum(z, 1e-9), at_zero)


def _inverse_trigamma(value: float) -> float:
    """x with trigamma(x) = value."""
    from scipy import special

    x = 0.5 + 1 / value
    for _ in range(50):  # Newton's method on 1/trigamma, which is convex
        y = special.polygamma(1, x)
        x += y * (1 - y / value) / special.polygamma(2, x)
    return float(x)


def spread_delta(estimate: np.ndarray, scale: Scale = LFC) -> float:
    """δ from the genes: the width of their central 68 %, or `Scale.smallest_delta` where that is less.

    For normal changes it is two standard deviations, so that what passes is out of the ordinary.
    """
    low, high = np.quantile(estimate, [0.16, 0.84])
    return max(float(high - low), scale.smallest_delta)


def called(probability: np.ndarray, expressed: np.ndarray, fdr: float) -> np.ndarray:
    """The largest set of expressed genes whose mean (1 − p), the expected FDR, is at most `fdr`."""
    order = np.flatnonzero(expressed)
    order = order[np.argsort(-probability[order], kind="stable")]
    inside = np.flatnonzero(_running(probability[order]) <= fdr)
    found = np.zeros(len(probability), bool)
    if len(inside):
        found[order[: inside[-1] + 1]] = True
    return found


def q_values(probability: np.ndarray, expressed: np.ndarray) -> np.ndarray:
    """Expected share of false genes in the smallest set with the gene; 1 for genes not expressed."""
    order = np.flatnonzero(expressed)
    order = order[np.argsort(-probability[order], kind="stable")]
    found = np.ones(len(probability))
    found[order] = _running(probability[order])
    return found


def _running(ordered: np.ndarray) -> np.ndarray:
    return np.cumsum(1 - ordered) / np.arange(1, len(ordered) + 1)
