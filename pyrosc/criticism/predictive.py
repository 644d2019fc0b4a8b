"""Do data drawn from the model look like the data?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from pyrosc.criticism.agreement import agreement, compared
from pyrosc.criticism.cells import cells_to_check
from pyrosc.criticism.tally import LEVELS, N_BINS, Tally, strata
from pyrosc.data.schema import MAIN
from pyrosc.infer.predictive import counts_site, replicates

if TYPE_CHECKING:
    from anndata import AnnData

    from pyrosc.models.base import Model
    from pyrosc.models.results import Indices

#: Replicated values of one minibatch held at once: 8 Mi floats are 32 MB.
_BUDGET = 2**23


@dataclass(frozen=True)
class PredictiveChecks:
    """What `predictive_checks` found.

    Attributes
    ----------
    genes
        A row per gene and statistic (``mean``, ``variance``, ``cv``, ``zeros``): ``observed``,
        ``replicated`` (mean over replicates), ``low`` and ``high`` (90 % of the replicates), ``p_value``
        (share of the replicates above the observed value, ties counted half).
    cells
        The same per cell: ``library`` (total), ``zeros``, ``cv`` (over genes).
    summary
        A row per statistic: how far replicated is from observed. ``error`` is the mean absolute and
        ``bias`` the mean difference, of shares for ``zeros``, of natural logarithms for the others (0.1 is
        10 %); ``expected``, the error that a replicate has in place of the data, which a right model would
        come to; ``pearson`` (on the same scale) and ``spearman`` correlations; ``inside``, the share of genes
        or cells whose observed value is within 90 % of the replicates.
    calibration
        A row per group of genes and nominal level: ``coverage``, the share of observed counts inside
        predictive intervals of that level; ``values``, their number. ``se`` is the standard error over
        cells.
    pit
        Histogram of the randomised probability integral transform of each gene's counts, (g, 40) int64:
        flat where the model is right.
    n_cells, n_samples
        Numbers of cells and replicates.
    held_out
        Whether none of the cells trained the model.
    leave_one_out
        Whether intervals for a count were made without that count (see `predictive_checks`).
    site
        Name of the observed site.
    """

    genes: pd.DataFrame
    cells: pd.DataFrame
    summary: pd.DataFrame
    calibration: pd.DataFrame
    pit: np.ndarray
    n_cells: int
    n_samples: int
    held_out: bool
    leave_one_out: bool
    site: str

    def scores(self, name: str, of: str = "genes") -> dict[str, float]:
        """Row of the summary of one statistic."""
        self.statistic(name, of)  # an error where there is none
        row = self.summary.to_numpy(float)[self.summary.index.get_loc((of, name))]
        return dict(zip(map(str, self.summary.columns), row.tolist(), strict=True))

    def histogram(self, genes: str = "all") -> np.ndarray:
        """The transform's histogram of a group of genes, as ``calibration["genes"]`` names it: (40,)."""
        if genes not in self._groups:
            raise KeyError(f"there is no group of genes '{genes}'; there are {list(self._groups)}")
        return self.pit[self._groups[genes]].sum(0)

    @property
    def _groups(self) -> dict[str, np.ndarray]:
        return strata(self.statistic("mean")["observed"].to_numpy())

    def curve(self, genes: str = "all") -> tuple[np.ndarray, np.ndarray]:
        """Levels of central predictive intervals and the share of observed counts inside: 21 each."""
        half = self.histogram(genes).reshape(2, N_BINS // 2)
        inside = np.cumsum(half[0][::-1] + half[1])
        return np.linspace(0, 1, N_BINS // 2 + 1), np.r_[0, inside / max(inside[-1], 1)]

    @property
    def pit_deviation(self) -> float:
        """Largest distance between the distribution of the transform and the uniform one, in [0, 1]."""
        total = self.pit.sum(0)
        share = np.cumsum(total) / max(total.sum(), 1)
        return float(np.abs(share - np.arange(1, N_BINS + 1) / N_BINS).max())

    def statistic(self, name: str, of: str = "genes") -> pd.DataFrame:
        """Rows of one statistic of ``"genes"`` or ``"cells"``, indexed by their names."""
        table = self.genes if of == "genes" else self.cells
        found = table[table["statistic"] == name].drop(columns="statistic")
        if not len(found):
            raise KeyError(f"there is no '{name}' of {of}; there are {sorted(set(table['statistic']))}")
        return found.set_index(table.columns[0])


def predictive_checks(
    model: Model,
    adata: AnnData | None = None,
    indices: Indices = None,
    *,
    n_samples: int = 50,
    max_cells: int | None = 2000,
    calibration: bool = True,
    source: str = MAIN,
    site: str | None = None,
    batch_size: int = 512,
    seed: int = 0,
) -> PredictiveChecks:
    """Compare observed counts with replicates drawn from the posterior of the same cells.

    For each cell the latent sites are drawn from the guide given the cell, and counts from their law given
    those. Per gene and per cell, statistics of the replicates are set beside those of the data (Gelman, Meng
    and Stern 1996).

    Whether predictive intervals hold as many counts as they promise is judged by the probability integral
    transform, the place of an observed count among the replicated ones, with ties broken at random so that it
    is uniform for a right model of discrete data (Czado, Gneiting and Held 2009). A cell's latent sites have
    seen the very count that is then judged, which makes any model look better than it is; where the law of a
    cell's counts is a product over genes, the draws are therefore weighted by one over the likelihood of the
    count in question (leave-one-out weights; Gelfand, Dey and Chang 1992). Numbers that the model is *told*,
    such as the observed library size, stay told.

    Memory does not grow with cells × genes × replicates: a minibatch at a time is held.

    Parameters
    ----------
    model
        Any trained model of one observed value per cell and gene.
    adata
        Cells; default those the model was made with.
    indices
        Which cells (positions or a mask); default the held-out ones where the model has some, else all.
    n_samples
        Replicates S of the data.
    max_cells
        Of more cells than this, as many are drawn at random; None for no limit.
    calibration
        False leaves the intervals out, which saves about half of the time: ``calibration`` and ``pit`` are
        then empty.
    source
        Data source, for models that read several.
    site
        Observed site; default that of the counts.
    batch_size
        Most cells decoded at a time.
    seed
        Of cells and replicates; no global generator is touched.

    Returns
    -------
    PredictiveChecks
        Tidy tables.

    Raises
    ------
    ValueError
        If there are fewer than two cells or no replicate.
    KeyError
        If the model has no observed site, or none of that name.

    References
    ----------
    Gelman, Meng, Stern (1996). Posterior predictive assessment of model fitness via realized discrepancies.
    *Statistica Sinica* 6, 733–760. Czado, Gneiting, Held (2009). Predictive model assessment for count data.
    *Biometrics* 65, 1254–1261. Gelfand, Dey, Chang (1992). Model determination using predictive
    distributions. *Bayesian Statistics* 4, 147–167.

    Examples
    --------
    >>> import pyrosc
    >>> adata = pyrosc.simulate.scvi(60, 20, seed=0).adata
    >>> model = pyrosc.SCVI.from_anndata(adata, n_hidden=8).fit(1, progress=False)
    >>> checks = pyrosc.criticism.predictive_checks(model, n_samples=5)
    >>> list(checks.summary.index.get_level_values("statistic"))
    ['mean', 'variance', 'cv', 'zeros', 'library', 'zeros', 'cv']
    """
    if n_samples < 1:
        raise ValueError(f"n_samples is the number of replicates, at least 1; not {n_samples}")
    cells = cells_to_check(model, adata, indices, max_cells, seed, source)
    n = len(cells.rows)
    if n < 2:
        raise ValueError(f"a variance needs at least two cells; there are {n}")
    site = counts_site(model, source) if site is None else site
    most = max(1, _BUDGET // (n_samples * max(model.registries[source].n_vars(), 1)))
    passes = model.batches(
        cells.dataset, cells.rows, min(batch_size, most) if calibration else batch_size, source
    )
    tally: Tally | None = None
    for at, observed, laws in replicates(model, passes, site, n_samples, seed=seed):
        if tally is None:
            tally = Tally(n, observed.shape[-1], n_samples, calibration)
        tally.add(at, observed, laws)
    assert tally is not None
    names = _names(model, source, site, tally.n_genes)
    of_genes, of_cells = tally.gene_statistics(), tally.cell_statistics()
    genes = compared(of_genes, names, "gene")
    per_cell = compared(of_cells, cells.dataset.obs_names[cells.rows], "cell")
    return PredictiveChecks(
        genes=genes,
        cells=per_cell,
        summary=pd.concat([agreement(of_genes, genes, "genes"), agreement(of_cells, per_cell, "cells")]),
        calibration=tally.calibration(),
        pit=tally.pit,
        n_cells=n,
        n_samples=n_samples,
        held_out=cells.held_out,
        leave_one_out=tally.leave_one_out,
        site=site,
    )


def _names(model: Model, source: str, site: str, width: int) -> list[str]:
    """Names of the columns of an observed site."""
    fields = model.registries[source].fields
    named = [fields[site].names] if site in fields else []
    named += [s.names for s in fields.values() if s.kind == "counts"]
    return next((list(n) for n in named if len(n) == width), [str(i) for i in range(width)])


__all__ = ["LEVELS", "PredictiveChecks", "predictive_checks"]
