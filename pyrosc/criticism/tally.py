"""Sums over cells and genes of data and replicates, kept while minibatches pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyrosc.infer.predictive import elementwise

#: Nominal levels of predictive intervals that are checked.
LEVELS = (0.5, 0.8, 0.9, 0.95)
#: Bins of the probability integral transform: interval ends at multiples of 1/40.
N_BINS = 40
#: Bounds of the strata of genes, by their mean.
_STRATA = (0.1, 1.0)


class Tally:
    """Sums over cells and over genes of data and replicates, and the transform's histogram.

    The first of the ``1 + n_samples`` rows of each sum is the data's.
    """

    def __init__(self, n_cells: int, n_genes: int, n_samples: int, intervals: bool) -> None:
        self.n_cells, self.n_genes, self.intervals = n_cells, n_genes, intervals
        self.first, self.second, self.nonzero = (np.zeros((1 + n_samples, n_genes)) for _ in range(3))
        self.own_first, self.own_second, self.own_zeros = (
            np.zeros((1 + n_samples, n_cells)) for _ in range(3)
        )
        self.known = np.zeros(n_genes)  # cells in which a gene was measured
        self.pit = np.zeros((n_genes, N_BINS if intervals else 0), np.int64)
        self.covered = np.zeros((n_cells, len(LEVELS)))
        self.measured = np.zeros(n_cells)
        self.leave_one_out = False

    def add(self, at: np.ndarray, observed: Tensor, laws: Any) -> None:
        observed = observed.reshape(len(at), -1)
        known: Tensor | None = None
        values, densities = [], []
        for s, law in enumerate(laws):
            single = elementwise(law)
            if s == 0:
                known = _known(single, observed)
                self._moments(0, at, observed, known)
                self.known += known.sum(0).cpu().numpy()
                self.measured[at] = known.sum(1).cpu().numpy()
            assert known is not None
            value = law.sample().reshape(len(at), -1).to(observed.dtype)
            self._moments(1 + s, at, value, known)
            if self.intervals:
                values.append(value)
                if single is not None:
                    densities.append(single.log_prob(observed).reshape(len(at), -1).float())
        if self.intervals:
            assert known is not None
            self.leave_one_out = bool(densities)
            self._transform(at, observed, torch.stack(values), densities, known)

    def _moments(self, row: int, at: np.ndarray, x: Tensor, known: Tensor) -> None:
        x = torch.where(known, x, 0).double()
        zero = (x == 0) & known
        square = x * x
        self.first[row] += x.sum(0).cpu().numpy()
        self.second[row] += square.sum(0).cpu().numpy()
        self.nonzero[row] += (known & ~zero).sum(0).cpu().numpy()
        self.own_first[row, at] = x.sum(1).cpu().numpy()
        self.own_second[row, at] = square.sum(1).cpu().numpy()
        self.own_zeros[row, at] = zero.sum(1).cpu().numpy()

    def _transform(
        self, at: np.ndarray, x: Tensor, values: Tensor, densities: list[Tensor], known: Tensor
    ) -> None:
        """Randomised place of the observed among the replicated values, in [0, 1]."""
        if densities:
            weight = leave_one_out_weights(torch.stack(densities))
        else:
            weight = torch.full_like(values, 1 / len(values))
        below = (weight * (values < x)).sum(0)
        equal = (weight * (values == x)).sum(0)
        # the observed value is one of its own ties: with equal weights the place is exactly uniform
        one = 1 / len(values)
        u = (below + torch.rand_like(below) * (equal + one)) / (1 + one)
        bins = (u * N_BINS).long().clamp_(0, N_BINS - 1)
        flat = (torch.arange(self.n_genes, device=x.device) * N_BINS + bins)[known]
        counts = torch.bincount(flat, minlength=self.n_genes * N_BINS)
        self.pit += counts.reshape(self.n_genes, N_BINS).cpu().numpy()
        for i, level in enumerate(LEVELS):
            inside = ((u - 0.5).abs() <= level / 2) & known
            self.covered[at, i] = inside.sum(1).cpu().numpy()

    def gene_statistics(self) -> dict[str, np.ndarray]:
        """(1 + samples, genes) each."""
        n = np.maximum(self.known, 1)
        mean = self.first / n
        variance = np.maximum(self.second / n - mean**2, 0) * n / np.maximum(n - 1, 1)
        zeros = np.where(self.known > 0, 1 - self.nonzero / n, np.nan)
        return {"mean": mean, "variance": variance, "cv": ratio(np.sqrt(variance), mean), "zeros": zeros}

    def cell_statistics(self) -> dict[str, np.ndarray]:
        """(1 + samples, cells) each."""
        g = np.maximum(self.measured, 1)
        mean = self.own_first / g
        variance = np.maximum(self.own_second / g - mean**2, 0) * g / np.maximum(g - 1, 1)
        return {
            "library": self.own_first,
            "zeros": self.own_zeros / g,
            "cv": ratio(np.sqrt(variance), mean),
        }

    def calibration(self) -> pd.DataFrame:
        """Coverage of intervals by group of genes."""
        columns = ["genes", "level", "coverage", "se", "values"]
        if not self.intervals:
            return pd.DataFrame(columns=columns)
        groups = strata(self.first[0] / np.maximum(self.known, 1))
        own = self.covered / np.maximum(self.measured, 1)[:, None]
        se = own.std(0, ddof=1) / np.sqrt(self.n_cells)
        rows = []
        for name, chosen in groups.items():
            histogram = self.pit[chosen].sum(0)
            total = int(histogram.sum())
            for i, level in enumerate(LEVELS):
                cut = round((1 - level) / 2 * N_BINS)
                inside = histogram[cut : N_BINS - cut].sum() / total if total else np.nan
                rows.append((name, level, inside, se[i] if name == "all" else np.nan, total))
        return pd.DataFrame(rows, columns=columns)


def strata(mean: np.ndarray) -> dict[str, np.ndarray]:
    """Groups of genes by their mean, as masks."""
    low, high = _STRATA
    return {
        "all": np.ones(len(mean), bool),
        f"mean below {low:g}": mean < low,
        f"mean {low:g} to {high:g}": (mean >= low) & (mean < high),
        f"mean {high:g} and more": mean >= high,
    }


def leave_one_out_weights(log_density: Tensor) -> Tensor:
    """Weights that turn posterior draws into draws from the posterior without one datum.

    Parameters
    ----------
    log_density
        (S, ...) log-density of the datum at each draw.

    Returns
    -------
    Tensor
        (S, ...), summing to 1 over draws, proportional to one over the density. They are not cut off: that
        would draw them back to the posterior with the datum, and intervals would hold too much.
    """
    return (-log_density).softmax(0)


def _known(single: Any, observed: Tensor) -> Tensor:
    """Which values were measured: those that the law does not mask."""
    mask = getattr(single, "_mask", None)
    known = torch.ones_like(observed, dtype=torch.bool)
    return known if mask is None else known & torch.as_tensor(mask, device=observed.device)


def ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b; NaN where b is not positive."""
    return np.divide(a, b, out=np.full_like(a, np.nan), where=b > 0)
