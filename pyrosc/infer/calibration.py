"""Whether probabilities mean what they say, and how to make those of a classifier do so."""

from __future__ import annotations

import numpy as np
from torch import Tensor
from torch.nn import functional as F

_FEWEST = 30  # held-out cells below which a temperature is noise


def fit_temperature(logits: Tensor, codes: Tensor) -> float:
    """Temperature by which to divide logits so that their likelihood of the labels is highest.

    Guo, Pleiss, Sun, Weinberger. On calibration of modern neural networks. ICML 2017, section 4.2.

    Parameters
    ----------
    logits
        (n, k), of cells that the classifier was not trained on.
    codes
        (n,) int64, their labels.

    Returns
    -------
    float
        In [0.1, 10]; 1 where there are fewer than 30 cells.
    """
    if len(codes) < _FEWEST:
        return 1.0
    wide, codes = logits.detach().double(), codes.to(logits.device)
    # the likelihood has one mode in log T: a golden-section search finds it
    low, high = np.log(0.1), np.log(10.0)
    golden = (np.sqrt(5) - 1) / 2

    def loss(log_t: float) -> float:
        return float(F.cross_entropy(wide / np.exp(log_t), codes))

    a, b = high - golden * (high - low), low + golden * (high - low)
    at_a, at_b = loss(a), loss(b)
    while high - low > 1e-4:
        if at_a <= at_b:
            high, b, at_b = b, a, at_a
            a = high - golden * (high - low)
            at_a = loss(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + golden * (high - low)
            at_b = loss(b)
    return float(np.exp((low + high) / 2))


def expected_calibration_error(probabilities: np.ndarray, codes: np.ndarray, n_bins: int = 15) -> float:
    """Mean distance between confidence and accuracy, over bins of confidence that hold equally many cells.

    Parameters
    ----------
    probabilities
        (n, k), rows summing to 1.
    codes
        (n,) int, the true classes; -1 (or any class without a column) is never right.
    n_bins
        Number of bins.

    Returns
    -------
    float
        In [0, 1]; 0 is perfect.
    """
    confidence = probabilities.max(1)
    right = probabilities.argmax(1) == codes
    order = np.argsort(confidence, kind="stable")
    bins = [b for b in np.array_split(order, n_bins) if len(b)]
    gaps = [len(b) * abs(confidence[b].mean() - right[b].mean()) for b in bins]
    return float(np.sum(gaps) / len(order))
