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
    from scipy.optimize import minimize_scalar  # slow to import

    if len(codes) < _FEWEST:
        return 1.0
    wide, codes = logits.detach().double(), codes.to(logits.device)

    def loss(log_t: float) -> float:
        return float(F.cross_entropy(wide / np.exp(log_t), codes))

    # the likelihood has one mode in log T
    found = minimize_scalar(
        loss, bounds=(np.log(0.1), np.log(10.0)), method="bounded", options={"xatol": 1e-4}
    )
    return float(np.exp(found.x))


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
