"""What tells a droplet with two cells from one with one cell: numbers per droplet, for a classifier."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from pyrosc.infer.posterior import collect, stream

if TYPE_CHECKING:
    from pyrosc.data import Dataset
    from pyrosc.data.matrix import Matrix
    from pyrosc.models.base import Model

_SIZES = (10, 30, 100)  # numbers of neighbours
_MOST_FITTED = 10_000  # droplets from which axes and pairs of genes are learned
_MOST_COMPARED = 20_000  # droplets among which neighbours are sought
_PAIRED_GENES = 500


class DropletFeatures:
    """Numbers per droplet, learned from droplets of which some are simulated doublets.

    The parent's latent space; log total counts and log number of genes with counts; principal components of
    log-normalised counts; co-expression of genes that exclude each other in most cells (Bais and Kostka,
    2020); the share of simulated doublets among its nearest neighbours in the components (McGinnis et al.,
    2019), and how near those are.

    Parameters
    ----------
    parent
        A trained model with a latent site per cell.
    n_components
        Number of principal components, as far as genes and droplets allow.
    seed
        Of the choice of droplets where there are too many to use all.

    Attributes
    ----------
    names
        Names of the features; after `fit`.
    """

    def __init__(self, parent: Model, n_components: int = 30, seed: int = 0) -> None:
        self.parent, self.n_components, self.seed = parent, n_components, seed
        self.names: list[str] = []

    def fit(self, droplets: Dataset, n_real: int, folds: np.ndarray) -> np.ndarray:
        """Learn from droplets, and give their own features.

        Neighbours are sought in other folds only, so that no droplet is near to a doublet made from it.

        Parameters
        ----------
        droplets
            Real droplets, then simulated ones.
        n_real
            Number of the real ones.
        folds
            (n,) int; -1 for droplets of no fold.

        Returns
        -------
        numpy.ndarray
            (n, p) float32, columns as in `names`.
        """
        rng = np.random.default_rng(self.seed)
        matrix = next(iter(droplets.matrices.values()))
        some = np.sort(rng.permutation(droplets.n_obs)[:_MOST_FITTED])
        real = np.sort(rng.permutation(n_real)[:_MOST_FITTED])
        counts = matrix.sparse_rows(some)
        self.target = float(np.median(np.asarray(counts.sum(1))))
        self.mean, self.axes = principal_axes(self._normalised(counts), self.n_components, rng)
        self.genes, self.weights = exclusive_pairs(matrix.sparse_rows(real) > 0)
        profile = self._profiles(matrix)
        n_components = self.axes.shape[1]
        self.reference = np.sort(rng.permutation(droplets.n_obs)[:_MOST_COMPARED])
        self.points = profile[self.reference, :n_components]
        self.simulated = (self.reference >= n_real).astype(np.float32)
        self.folds = folds[self.reference]
        latent = self._latent(droplets)
        near = self._neighbours(profile[:, :n_components], folds)
        self.names = [
            *(f"{self.parent.latent}_{i}" for i in range(latent.shape[1])),
            *(f"component_{i}" for i in range(n_components)),
            *("log_counts", "log_genes", "coexpression"),
            *(f"doublets_of_{k}" for k in _SIZES),
            *("distance", "doublets_weighted"),
        ]
        return np.concatenate([latent, profile, near], axis=1)

    def transform(self, cells: Dataset) -> np.ndarray:
        """Features of other droplets, (n, p) float32."""
        profile = self._profiles(next(iter(cells.matrices.values())))
        near = self._neighbours(profile[:, : self.axes.shape[1]], np.full(cells.n_obs, -1))
        return np.concatenate([self._latent(cells), profile, near], axis=1)

    def frame(self, values: np.ndarray, index: pd.Index) -> pd.DataFrame:
        """Features with their names."""
        return pd.DataFrame(values, index=index, columns=self.names)

    def _latent(self, cells: Dataset) -> np.ndarray:
        site = self.parent.latent
        values = stream(self.parent, [site], self.parent.batches(cells, np.arange(cells.n_obs)))
        return collect(values, cells.n_obs, True)[site].reshape(cells.n_obs, -1).astype(np.float32)

    def _normalised(self, counts: sp.csr_matrix) -> sp.csr_matrix:
        """log(1 + counts), each droplet's scaled to the median total."""
        totals = np.maximum(np.asarray(counts.sum(1)).ravel(), 1.0)
        out = sp.csr_matrix(counts, dtype=np.float32, copy=True)
        out.data = np.log1p(
            out.data * np.repeat(self.target / totals, np.diff(out.indptr)).astype(np.float32)
        )
        return out

    def _profiles(self, matrix: Matrix) -> np.ndarray:
        """Components, log totals, log numbers of genes and co-expression, (n, k + 3)."""
        parts = []
        for start in range(0, matrix.shape[0], 4096):
            counts = matrix.sparse_rows(np.arange(start, min(start + 4096, matrix.shape[0])))
            counts.eliminate_zeros()
            totals, detected = np.asarray(counts.sum(1)).ravel(), np.diff(counts.indptr)
            components = self._normalised(counts) @ self.axes - self.mean @ self.axes
            on = np.asarray((counts[:, self.genes] > 0).todense(), dtype=np.float32)
            together = np.log1p(((on @ self.weights) * on).sum(1))
            columns = [np.log(np.maximum(totals, 1.0)), np.log(np.maximum(detected, 1)), together]
            parts.append(np.concatenate([components, np.stack(columns, 1)], axis=1))
        return np.concatenate(parts).astype(np.float32)

    def _neighbours(self, points: np.ndarray, folds: np.ndarray) -> np.ndarray:
        """Shares of simulated doublets among the nearest droplets of other folds, and the mean distance."""
        found = np.zeros((len(points), len(_SIZES) + 2), np.float32)
        for fold in np.unique(folds):
            here = np.flatnonzero(folds == fold)
            others = (self.folds != fold) | (fold < 0)
            reference = torch.as_tensor(self.points[others])
            simulated = torch.as_tensor(self.simulated[others])
            most = min(_SIZES[-1], len(reference))
            for part in np.array_split(here, -(-len(here) // 512)):
                distance, index = torch.cdist(torch.as_tensor(points[part]), reference).topk(
                    most, largest=False
                )
                label, weight = simulated[index], 1 / (distance + 1e-3)
                shares = [label[:, :k].mean(1) for k in _SIZES]
                weighted = (label * weight).sum(1) / weight.sum(1)
                found[part] = torch.stack([*shares, distance.mean(1).log1p(), weighted], 1).numpy()
        return found


def principal_axes(y: sp.csr_matrix, k: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Mean (g,) and leading principal axes (g, k) of the rows of a sparse matrix, without making it dense.

    Randomised subspace iteration (Halko, Martinsson and Tropp, 2011, algorithm 4.4).
    """
    k = min(k, y.shape[1], y.shape[0] - 1)
    mean = np.asarray(y.mean(0), dtype=np.float32).ravel()
    wide = min(k + 10, y.shape[1])
    basis = rng.normal(size=(y.shape[1], wide)).astype(np.float32)
    for _ in range(5):
        left = np.linalg.qr(y @ basis - mean @ basis)[0]
        basis = np.linalg.qr(y.T @ left - np.outer(mean, left.sum(0)))[0]
    small = y @ basis - mean @ basis
    _, vectors = np.linalg.eigh(small.T @ small)  # ascending
    axes = basis @ vectors[:, ::-1][:, :k]
    axes *= np.sign(axes[np.abs(axes).argmax(0), np.arange(k)])  # of the two signs, always the same
    return mean, axes.astype(np.float32)


def exclusive_pairs(on: sp.csr_matrix, n_genes: int = _PAIRED_GENES) -> tuple[np.ndarray, np.ndarray]:
    """Genes that vary most in being on or off, and how surely each two of them exclude each other.

    Bais and Kostka (Bioinformatics 2020): were two genes independent, the number of cells with exactly one of
    them on would be binomial; the weight is −log of the probability of as many or more.

    Parameters
    ----------
    on
        (n, g) bool.
    n_genes
        Genes to take.

    Returns
    -------
    tuple
        (m,) columns and (m, m) float32 weights, 0 on the diagonal.
    """
    from scipy.stats import binom  # slow to import

    n = on.shape[0]
    share = np.asarray(on.mean(0)).ravel()
    genes = np.sort(np.argsort(-share * (1 - share), kind="stable")[:n_genes])
    dense = np.asarray(on[:, genes].todense(), dtype=np.float32)
    share = share[genes]
    both, each = dense.T @ dense, dense.sum(0)
    exactly_one = each[:, None] + each[None] - 2 * both
    expected = share[:, None] * (1 - share[None]) + share[None] * (1 - share[:, None])
    weights = -binom.logsf(exactly_one - 1, n, expected)
    weights = np.minimum(weights, 10.0 * n)  # −log of a probability that underflows
    np.fill_diagonal(weights, 0.0)
    return genes, weights.astype(np.float32)
