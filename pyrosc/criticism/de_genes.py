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
    ``rank_genes_groups(method="t-test")`` does. The data themselves are sure of some genes only: what two
    resamples of the cells (bootstrap) share with each other is about what a right model would share with the
    data.

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
        replicate (mean over replicates); ``between_resamples`` and ``between_replicates``, the same between
        two resamples of the data and between two replicates;
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
    rng = np.random.default_rng(seed)
    weight = np.ones((1 + 2 * n_samples, len(rows)))  # of each cell in data, resamples and replicates
    weight[1 : 1 + n_samples] = rng.poisson(1.0, (n_samples, len(rows)))
    first = second = np.zeros(0)
    for at, observed, laws in replicates(
        model, model.batches(cells.dataset, rows, batch_size), site, n_samples, seed=seed
    ):
        onehot = np.arange(len(names))[:, None] == codes[rows[at]]
        logs = _log_normalized(observed)
        sums = [_sums(logs, onehot * w) for w in weight[: 1 + n_samples, at]]
        sums += [_sums(_log_normalized(law.sample()), onehot) for law in laws]
        one, two = (np.stack([s[i] for s in sums]) for i in (0, 1))
        first, second = (one, two) if not len(first) else (first + one, second + two)
    counts = np.stack([weight[:, codes[rows] == i].sum(1) for i in range(len(names))], axis=1)
    table = [
        (names[i], int(sizes[i]), *_agreement(counts, i, first, second, min(n_top, first.shape[-1])))
        for i in large
    ]
    columns = ["group", "cells", "kept", "between_resamples", "between_replicates"]
    return pd.DataFrame(table, columns=[*columns, "average_precision", "correlation"]).set_index("group")


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


def _log_normalized(x: Tensor) -> np.ndarray:
    x = x.reshape(len(x), -1).double()
    return torch.log1p(x * (_TARGET / x.sum(1, keepdim=True).clamp(min=1))).cpu().numpy()


def _sums(logs: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per group and gene, sums of values and of their squares."""
    return weight @ logs, weight @ logs**2


def _agreement(
    counts: np.ndarray, group: int, first: np.ndarray, second: np.ndarray, n_top: int
) -> tuple[float, ...]:
    """How the rankings agree of data (the first), resamples (half of the others) and replicates."""
    inside = counts[:, group, None]
    outside = counts.sum(1)[:, None] - inside
    rest_first, rest_second = first.sum(1) - first[:, group], second.sum(1) - second[:, group]
    scores = welch(first[:, group], second[:, group], inside, rest_first, rest_second, outside)
    order = np.argsort(-scores, axis=1, kind="stable")
    top = [set(o[:n_top].tolist()) for o in order]
    n = len(top) // 2
    resamples, drawn = top[1 : 1 + n], top[1 + n :]
    kept = np.mean([len(top[0] & t) / n_top for t in drawn])
    wanted = np.isin(np.arange(scores.shape[1]), order[0][:n_top])
    precision = np.mean([average_precision(wanted[o]) for o in order[1 + n :]])
    ranks = [pd.Series(s).rank().to_numpy(float) for s in scores]
    correlation = np.mean([np.corrcoef(ranks[0], r)[0, 1] for r in ranks[1 + n :]])
    return float(kept), _shared(resamples, n_top), _shared(drawn, n_top), float(precision), float(correlation)


def _shared(top: list[set[int]], n_top: int) -> float:
    """Mean share of genes that two of the sets have in common."""
    pairs = [len(a & b) / n_top for i, a in enumerate(top) for b in top[i + 1 :]]
    return float(np.mean(pairs))


def welch(
    first: np.ndarray, second: np.ndarray, n: Any, first2: np.ndarray, second2: np.ndarray, n2: Any
) -> np.ndarray:
    """Welch's t statistic from sums and sums of squares of two samples; 0 where nothing varies."""
    n, n2 = np.maximum(n, 2), np.maximum(n2, 2)
    mean, mean2 = first / n, first2 / n2
    variance = np.maximum(second / n - mean**2, 0) / (n - 1)
    variance2 = np.maximum(second2 / n2 - mean2**2, 0) / (n2 - 1)
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
