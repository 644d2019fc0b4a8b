"""Raw statistics of the groups, and the table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from pyrosc.tools.de.effects import SCALES, Effects, Scale
from pyrosc.tools.de.groups import FEWEST

if TYPE_CHECKING:
    from pyrosc.data import Dataset
    from pyrosc.tools.de.groups import Comparison, Groups

_CHUNK = 4096


@dataclass(frozen=True)
class RawStatistics:
    """Over all cells of the groups: sums of counts and cells with counts (groups, g), cells (groups,).

    `measured`, (groups, g), counts the cells in which a feature was measured, where not all were in all.
    """

    sums: np.ndarray
    detected: np.ndarray
    cells: np.ndarray
    measured: np.ndarray | None = None

    def of(self, side: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, Any]:
        """Mean counts per cell, share of cells with counts, and cells of a side (maybe by feature)."""
        at = list(side)
        n: Any = int(self.cells[at].sum())
        if self.measured is not None:
            n = self.measured[at].sum(0)
        return self.sums[at].sum(0) / np.maximum(n, 1), self.detected[at].sum(0) / np.maximum(n, 1), n

    def noise(self, c: Comparison, scale: Scale) -> np.ndarray:
        """(g,) variance that counts alone would give an effect.

        Of a log ratio of Poisson counts, 1/N₁ + 1/N₂, with half a count added to each; of a difference of
        shares, p₁(1 − p₁)/n₁ + p₂(1 − p₂)/n₂, with half a cell of each sort added.
        """
        if scale.name == "difference":
            total: Any = 0.0
            for side in (c.first, c.second):
                _, share, n = self.of(side)
                p = (share * n + 0.5) / (n + 1)
                total = total + p * (1 - p) / np.maximum(n, 1)
            return total
        return sum(1 / (self.sums[list(side)].sum(0) + 0.5) for side in (c.first, c.second))


def raw_statistics(dataset: Dataset, field: str, groups: Groups, mask: str | None = None) -> RawStatistics:
    """Statistics of the counts of each group, in one pass over the rows."""
    if field not in dataset.matrices:
        return _of_column(dataset.codes(field), None if mask is None else dataset.codes(mask), groups)
    matrix = dataset.matrices[field]
    n_groups = len(groups.names)
    sums = np.zeros((n_groups, matrix.shape[1]))
    detected = np.zeros_like(sums)
    rows = np.flatnonzero(groups.codes >= 0)
    for start in range(0, len(rows), _CHUNK):
        at = rows[start : start + _CHUNK]
        block = sp.csr_matrix(matrix.sparse_rows(at))
        member = sp.csr_matrix(
            (np.ones(len(at)), (groups.codes[at], np.arange(len(at)))), shape=(n_groups, len(at))
        )
        sums += (member @ block).toarray()
        seen = sp.csr_matrix(((block.data != 0).astype(np.float64), block.indices, block.indptr), block.shape)
        detected += (member @ seen).toarray()
    cells = np.bincount(groups.codes[rows], minlength=n_groups)
    # genes that a query of `pyrosc.surgery` lacks were counted in no cell: their zeros say nothing
    measured = None if matrix.present is None else np.outer(cells, matrix.present).astype(np.float64)
    return RawStatistics(sums, detected, cells, measured)


def _of_column(values: np.ndarray, measured: np.ndarray | None, groups: Groups) -> RawStatistics:
    n_groups = len(groups.names)
    rows = np.flatnonzero(groups.codes >= 0)
    codes = groups.codes[rows]
    member = sp.csr_matrix((np.ones(len(rows)), (codes, np.arange(len(rows)))), shape=(n_groups, len(rows)))
    here = values[rows].astype(np.float64)
    seen = None if measured is None else member @ measured[rows].astype(np.float64)
    return RawStatistics(member @ here, member @ (here != 0), np.bincount(codes, minlength=n_groups), seen)


def expressed(raw: RawStatistics, c: Comparison, min_fraction: float, min_cells: int) -> np.ndarray:
    """Genes with counts in `min_cells` cells and a share `min_fraction` of one of the two sides."""
    found = np.zeros(raw.sums.shape[1], bool)
    for side in (c.first, c.second):
        _, share, n = raw.of(side)
        found |= (share >= min_fraction) & (np.rint(share * n) >= max(min_cells, 1))
    return found


def comparable(raw: RawStatistics, c: Comparison) -> np.ndarray:
    """Features measured in at least `FEWEST` cells of each side; of the others nothing can be said."""
    found = np.ones(raw.sums.shape[1], bool)
    for side in (c.first, c.second):
        found &= raw.of(side)[2] >= FEWEST
    return found


def rows_of(
    genes: list[str],
    c: Comparison,
    effects: Effects,
    p: np.ndarray,
    unshrunken: np.ndarray,
    scales: tuple[np.ndarray, np.ndarray],
    raw: RawStatistics,
    is_expressed: np.ndarray,
    calls: np.ndarray | None,
    scale: Scale,
) -> pd.DataFrame:
    """Rows of one comparison, those that a reader wants first on top."""
    effect = scale.name
    (mean1, share1, n1), (mean2, share2, n2) = raw.of(c.first), raw.of(c.second)
    mean1, share1 = (np.where(n1 > 0, v, np.nan) for v in (mean1, share1))  # measured in none of the cells
    mean2, share2 = (np.where(n2 > 0, v, np.nan) for v in (mean2, share2))
    columns: dict[str, Any] = {
        "comparison": c.name,
        "group1": c.group1,
        "group2": c.group2,
        **({} if c.within is None else {"within": c.within}),
        **({} if calls is None else {"is_de_fdr": calls}),
        "proba_de": p,
        "bayes_factor": _logit(p),
        f"{effect}_mean": effects.mean,
        f"{effect}_median": effects.median,
        f"{effect}_std": effects.std,
        f"{effect}_lower": effects.lower,
        f"{effect}_upper": effects.upper,
        f"{effect}_unshrunken": unshrunken,
        "proba_larger": effects.larger,
        "proba_smaller": effects.smaller,
        "scale1": scales[0],
        "scale2": scales[1],
        "raw_mean1": mean1,
        "raw_mean2": mean2,
        "non_zeros_proportion1": share1,
        "non_zeros_proportion2": share2,
        "is_expressed": is_expressed,
        "n_cells1": n1,
        "n_cells2": n2,
    }
    table = pd.DataFrame(columns, index=pd.Index(genes, name="gene"))
    order = np.lexsort(
        (-np.abs(effects.mean), -p, -np.abs(sure(table)), ~is_expressed)
        if calls is None
        else (-np.abs(effects.mean), -p, -np.abs(sure(table)), ~is_expressed, ~calls)
    )
    return table.iloc[order]


def sure(table: pd.DataFrame) -> np.ndarray:
    """End of the credible interval nearer to zero; 0 where the interval holds it."""
    name = scale_of(table).name
    low, high = table[f"{name}_lower"].to_numpy(), table[f"{name}_upper"].to_numpy()
    return np.clip(low, 0, None) + np.clip(high, None, 0)


def scale_of(table: pd.DataFrame) -> Scale:
    """The scale of the effects in a table."""
    found = next((s for s in SCALES.values() if f"{s.name}_mean" in table), None)
    if found is None:
        raise ValueError(
            "this is no table of differential_expression: it has no column "
            f"{' or '.join(f'{s.name}_mean' for s in SCALES.values())}; in place of "
            "differential_accessibility ask the model for differential_expression with the same arguments"
        )
    return found


def _logit(p: np.ndarray) -> np.ndarray:
    """Log odds, finite."""
    tiny = 1e-12
    clipped = np.clip(p, tiny, 1 - tiny)
    return np.log(clipped) - np.log1p(-clipped)
