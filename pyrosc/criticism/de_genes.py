"""Are the genes that set groups of cells apart the same in data drawn from the model?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyrosc.criticism.cells import cells_to_check
from pyrosc.data import encode as enc
from pyrosc.data.errors import DataError
from pyrosc.infer.predictive import counts_site, replicates

if TYPE_CHECKING:
    from anndata import AnnData

    from pyrosc.models.base import Model
    from pyrosc.models.results import Indices

_TARGET = 1e4  # counts per cell before log1p


def de_genes_kept(
    model: Model,
    groups: str | pd.Series | np.ndarray,
    adata: AnnData | None = None,
    indices: Indices = None,
    *,
    n_top: int = 50,
    n_samples: int = 10,
    min_cells: int = 10,
    max_cells: int | None = 5000,
    batch_size: int = 512,
    seed: int = 0,
) -> pd.DataFrame:
    """Genes raised in each group against the other cells, in the data and in data replicated by the model.

    Genes are ranked by Welch's t statistic on log-normalised counts (10,000 per cell, log1p), as scanpy's
    ``rank_genes_groups(method="t-test")`` does. Two replicates of the same model do not agree in all genes
    either; what they share with each other is what a right model would share with the data.

    Parameters
    ----------
    model
        A trained model of counts.
    groups
        Column of obs, or a group per cell of the data set; cells without one are left out.
    adata
        Cells; default those the model was made with.
    indices
        Which cells (positions or a mask); default all, those that trained included.
    n_top
        Number of genes at the top of each ranking that are compared.
    n_samples
        Replicates, at least 2.
    min_cells
        Groups with fewer cells are left out.
    max_cells
        Of more cells than this, as many are drawn at random; None for no limit.
    batch_size
        Cells at a time.
    seed
        Of cells and replicates; no global generator is touched.

    Returns
    -------
    pandas.DataFrame
        A row per group: ``cells``; ``kept``, the share of the data's top genes among the top genes of a
        replicate (mean over replicates); ``between_replicates``, the same between two replicates;
        ``average_precision``, the area under the precision–recall curve of finding the data's top genes by
        the replicates' statistics; ``correlation``, Spearman's, of the statistics of all genes.

    Raises
    ------
    DataError
        If there are fewer than two groups of `min_cells`.
    ValueError
        If the model is not one of counts, or `n_samples` is below 2.
    """
    if n_samples < 2:
        raise ValueError(
            f"replicates are compared with each other too: n_samples is at least 2, not {n_samples}"
        )
    site = counts_site(model)
    if model.support().get(site, "counts") == "real":
        raise ValueError(f"{type(model).__name__} models real numbers; counts are log-normalised here")
    cells = cells_to_check(model, adata, indices, None, seed, held_out=False)
    codes, names = _codes(cells.dataset.data, groups)
    rows = cells.rows[codes[cells.rows] >= 0]
    if max_cells is not None and len(rows) > max_cells:
        rows = np.sort(np.random.default_rng(seed).choice(rows, max_cells, replace=False))
    sizes = np.bincount(codes[rows], minlength=len(names))
    large = [i for i in range(len(names)) if sizes[i] >= min_cells and len(rows) - sizes[i] >= min_cells]
    if not large or len(names) < 2:
        raise DataError(
            f"there are no two groups of {min_cells} cells or more to compare; the sizes are "
            + (", ".join(f"{n}: {s}" for n, s in zip(names, sizes, strict=True)) or "0")
        )
    first = second = np.zeros(0)
    for at, observed, laws in replicates(
        model, model.batches(cells.dataset, rows, batch_size), site, n_samples, seed=seed
    ):
        onehot = torch.zeros(len(names), len(at), dtype=torch.float64, device=observed.device)
        onehot[torch.as_tensor(codes[rows[at]]), torch.arange(len(at))] = 1
        drawn = [observed, *(law.sample() for law in laws)]
        sums = [_sums(x.reshape(len(at), -1), onehot) for x in drawn]
        one, two = (np.stack([s[i] for s in sums]) for i in (0, 1))
        first, second = (one, two) if not len(first) else (first + one, second + two)
    return pd.DataFrame(
        [_row(names[i], sizes, i, first, second, min(n_top, first.shape[-1])) for i in large],
        columns=["group", "cells", "kept", "between_replicates", "average_precision", "correlation"],
    ).set_index("group")


def _codes(data: Any, groups: Any) -> tuple[np.ndarray, list[str]]:
    if isinstance(groups, str):
        values = enc.column(data, groups)
    elif isinstance(groups, pd.Series):
        values = groups.reindex(data.obs_names)
    else:
        values = pd.Series(groups)
    if len(values) != data.n_obs:
        raise ValueError(f"there are {len(values):,} groups for {data.n_obs:,} cells")
    names = enc.category_order(values)
    return enc.encode(enc.category_names(values), names), list(names)


def _sums(x: Tensor, onehot: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Per group and gene, sums of log-normalised counts and of their squares."""
    x = x.double()
    logs = torch.log1p(x * (_TARGET / x.sum(1, keepdim=True).clamp(min=1)))
    return (onehot @ logs).cpu().numpy(), (onehot @ logs.square()).cpu().numpy()


def _row(
    name: str, sizes: np.ndarray, group: int, first: np.ndarray, second: np.ndarray, n_top: int
) -> tuple[Any, ...]:
    inside, outside = sizes[group], sizes.sum() - sizes[group]
    rest_first, rest_second = first.sum(1) - first[:, group], second.sum(1) - second[:, group]
    scores = welch(first[:, group], second[:, group], inside, rest_first, rest_second, outside)
    order = np.argsort(-scores, axis=1, kind="stable")
    top = [set(o[:n_top]) for o in order]
    kept = np.mean([len(top[0] & t) / n_top for t in top[1:]])
    drawn = top[1:]
    pairs = [len(a & b) / n_top for i, a in enumerate(drawn) for b in drawn[i + 1 :]]
    wanted = np.isin(np.arange(scores.shape[1]), order[0][:n_top])
    precision = np.mean([average_precision(wanted[o]) for o in order[1:]])
    ranks = [pd.Series(s).rank().to_numpy(float) for s in scores]
    correlation = np.mean([np.corrcoef(ranks[0], r)[0, 1] for r in ranks[1:]])
    return name, int(inside), float(kept), float(np.mean(pairs)), float(precision), float(correlation)


def welch(
    first: np.ndarray, second: np.ndarray, n: int, first2: np.ndarray, second2: np.ndarray, n2: int
) -> np.ndarray:
    """Welch's t statistic from sums and sums of squares of two samples; 0 where nothing varies."""
    mean, mean2 = first / n, first2 / n2
    variance = np.maximum(second / n - mean**2, 0) / max(n - 1, 1)
    variance2 = np.maximum(second2 / n2 - mean2**2, 0) / max(n2 - 1, 1)
    error = np.sqrt(variance + variance2)
    return np.divide(mean - mean2, error, out=np.zeros_like(error), where=error > 0)


def average_precision(hits: np.ndarray) -> float:
    """Mean precision at each hit of a ranked list: the area under the precision–recall curve.

    Parameters
    ----------
    hits
        (n,) bool, in the order of the ranking.

    Examples
    --------
    >>> average_precision(np.array([True, False, True]))
    0.833
    """
    at = np.flatnonzero(hits)
    return float(np.mean(np.arange(1, len(at) + 1) / (at + 1))) if len(at) else float("nan")


__all__ = ["de_genes_kept"]
