"""What protein counts say, before any training, of their background and foreground."""

from __future__ import annotations

import math
import warnings

import numpy as np

_CELLS = 100  # per batch, whose mixtures are fitted
_FEWEST = 5  # proteins of a cell, below which two components cannot be told apart


def background_prior(
    y: np.ndarray, measured: np.ndarray, n_cells: int = _CELLS, seed: int = 0
) -> tuple[float, float] | None:
    """Starting values of the background's prior in a batch, from its cells.

    Within each of some cells a mixture of two Normals is fitted to log1p of the protein counts, across
    proteins: most proteins are background in most cells. The mean is that of the cells' lower means, the
    scale that of their mean: sqrt(Σ s²) / cells, with s the lower component's standard deviation (Gayoso et
    al. 2021).

    Parameters
    ----------
    y, measured
        (n, p) counts, and whether they were measured.
    n_cells
        Number of cells taken, at random.
    seed
        Of their choice and of the fits.

    Returns
    -------
    tuple or None
        Mean, and logarithm of the scale, of the log background; None where fewer than 5 proteins were
        measured in every cell.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    rows = np.flatnonzero(measured.sum(1) >= _FEWEST)
    if not len(rows):
        return None
    rng = np.random.default_rng(seed)
    chosen = rng.choice(rows, min(n_cells, len(rows)), replace=False)
    means, variances = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of cells whose proteins are all alike
        for row in chosen:
            values = np.log1p(y[row, measured[row]].astype(np.float64))[:, None]
            found = GaussianMixture(2, random_state=seed).fit(values)
            lower = int(found.means_[:, 0].argmin())
            means.append(float(found.means_[lower, 0]))
            variances.append(float(found.covariances_[lower, 0, 0]))
    scale = math.sqrt(sum(variances)) / len(chosen)
    return float(np.mean(means)), math.log(max(scale, 1e-3))


def starting_means(y: np.ndarray, measured: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per protein, log of a mean of background counts, and by how much foreground exceeds it, r − 1.

    Background is taken at the median of the lower half of the cells' counts, foreground at the mean of the
    upper tenth.

    Parameters
    ----------
    y, measured
        (n, p) counts, and whether they were measured.

    Returns
    -------
    tuple
        (p,) float32 each; 0 and 1 for proteins that were not measured.
    """
    n_proteins = y.shape[1]
    low, rise = np.zeros(n_proteins, np.float32), np.ones(n_proteins, np.float32)
    for t in range(n_proteins):
        counts = np.sort(y[measured[:, t], t].astype(np.float64))
        if len(counts):
            quarter = max(float(np.quantile(counts, 0.25)), 0.5)
            top = float(counts[-max(len(counts) // 10, 1) :].mean())
            low[t] = math.log(quarter)
            rise[t] = min(max(top / quarter - 1, 0.5), 50.0)
    return low, rise
