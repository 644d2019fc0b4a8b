"""How common a class is among unlabelled cells, from examples of the class: positive–unlabelled learning."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

#: Shares of the positives that pass the thresholds looked at.
_FEW, _MOST = 0.3, 0.75
_SUREST = 0.005  # how far from certain a probability stays at a posterior odds of one to one or more


class Prevalence(NamedTuple):
    """Share of a class among unlabelled cells.

    Attributes
    ----------
    estimate
        The geometric middle of the two bounds.
    lower, upper
        Ends of a 90 % interval: it holds the doubt about how like the true members the examples are, and that
        from the number of cells.
    """

    estimate: float
    lower: float
    upper: float


def class_probability(log_ratio: Tensor, rate: Tensor | float) -> Tensor:
    """Probability that an unlabelled cell is of the class: min(1, rate · ratio).

    Bayes' theorem for cells of which a share `rate` is of the class (Elkan and Noto, 2008): the density of
    the class times its share, over the density of the unlabelled. Estimated ratios can exceed 1 / rate; from
    there the probability goes to 1 so slowly that the order of the cells is kept, within 0.005 of the
    minimum.

    Parameters
    ----------
    log_ratio
        Log of the ratio of the two densities, class to unlabelled, at each cell: a classifier's log-odds less
        the log-odds of its training data.
    rate
        Share of the class among the unlabelled.
    """
    odds = rate * log_ratio.clamp(max=60).exp()
    return odds.minimum(1 - _SUREST / (1 + odds))


def tail_rate(passed: np.ndarray, share: np.ndarray, n: int, prior: tuple[float, float]) -> np.ndarray:
    """Rate of a class, were the cells that pass a threshold all of it.

    What EM converges to (a posterior mode) when the unlabelled cells below the threshold are of the class or
    not, unobserved, and a known share of the class passes: the E-step expects n · rate · (1 − share) of them
    beside those that passed, the M-step divides by n, under the prior.

    Parameters
    ----------
    passed
        Number of unlabelled cells that pass.
    share
        Share of the class that passes.
    n
        Number of unlabelled cells.
    prior
        Of the rate, a Beta law: pseudo-counts of cells in the class and not, beyond 1.
    """
    return (passed + prior[0]) / (n * share + prior[0] + prior[1])


def estimate_prevalence(
    unlabelled: np.ndarray, positive: np.ndarray, prior: tuple[float, float] = (0.0, 0.0)
) -> Prevalence:
    """Share of a class among unlabelled cells, from scores of these and of examples of the class.

    The ratio of the shares that pass a threshold bounds the rate from above, for every threshold (Blanchard,
    Lee and Scott, 2010), and equals it where no other cell passes. At high thresholds it is too small if
    true members are less typical than the examples, at low ones too large since others pass; scores alone
    cannot tell the two apart. So the rate is put between the least such bound (by its upper confidence
    limit, as Garg et al., 2021) and the one at the threshold that three quarters of the examples pass, in
    the geometric middle: of all numbers between the two, the one that is wrong by the least factor at worst.

    Parameters
    ----------
    unlabelled, positive
        (n,) and (m,) scores, higher for cells more like the class; of cells that the scores were not learned
        from.
    prior
        See `tail_rate`.
    """
    from scipy.stats import beta  # slow to import

    n = len(unlabelled)
    share = np.linspace(_FEW, _MOST, 25)
    thresholds = np.quantile(positive, 1 - share)
    share = 1 - np.searchsorted(np.sort(positive), thresholds, side="left") / len(positive)
    passed = n - np.searchsorted(np.sort(unlabelled), thresholds, side="left")
    rates = tail_rate(passed, share, n, prior)
    inside, outside = passed + prior[0], np.maximum(n * share - passed, 0) + prior[1]

    def limit(level: float) -> np.ndarray:
        return np.asarray(beta.ppf(level, inside + (level > 0.5), outside + (level < 0.5)))

    best = int(np.argmin(limit(0.95)))
    low, high = rates[best], max(rates[-1], rates[best])
    lower = np.nan_to_num(limit(0.05)[best])  # no cell passes: the quantile is 0
    upper = max(limit(0.95)[-1], high)
    return Prevalence(*(float(np.clip(v, 1e-6, 1 - 1e-6)) for v in (np.sqrt(low * high), lower, upper)))
