"""Do data drawn from the model look like the data?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyrosc.criticism.cells import cells_to_check
from pyrosc.data.schema import MAIN
from pyrosc.infer.predictive import counts_site, elementwise, replicates

if TYPE_CHECKING:
    from anndata import AnnData

    from pyrosc.models.base import Model
    from pyrosc.models.results import Indices

#: Nominal levels of predictive intervals that are checked.
LEVELS = (0.5, 0.8, 0.9, 0.95)
#: Bins of the probability integral transform: interval ends at multiples of 1/40.
N_BINS = 40
#: Bounds of the strata of genes, by their mean.
_STRATA = (0.1, 1.0)
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
        return _strata(self.statistic("mean")["observed"].to_numpy())

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
    tally: _Tally | None = None
    for at, observed, laws in replicates(model, passes, site, n_samples, seed=seed):
        if tally is None:
            tally = _Tally(n, observed.shape[-1], n_samples, calibration)
        tally.add(at, observed, laws)
    assert tally is not None
    names = _names(model, source, site, tally.n_genes)
    of_genes, of_cells = tally.gene_statistics(), tally.cell_statistics()
    genes = _table(of_genes, names, "gene")
    per_cell = _table(of_cells, cells.dataset.obs_names[cells.rows], "cell")
    return PredictiveChecks(
        genes=genes,
        cells=per_cell,
        summary=pd.concat([_summary(of_genes, genes, "genes"), _summary(of_cells, per_cell, "cells")]),
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


class _Tally:
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
        return {"mean": mean, "variance": variance, "cv": _ratio(np.sqrt(variance), mean), "zeros": zeros}

    def cell_statistics(self) -> dict[str, np.ndarray]:
        """(1 + samples, cells) each."""
        g = np.maximum(self.measured, 1)
        mean = self.own_first / g
        variance = np.maximum(self.own_second / g - mean**2, 0) * g / np.maximum(g - 1, 1)
        return {
            "library": self.own_first,
            "zeros": self.own_zeros / g,
            "cv": _ratio(np.sqrt(variance), mean),
        }

    def calibration(self) -> pd.DataFrame:
        """Coverage of intervals by group of genes."""
        columns = ["genes", "level", "coverage", "se", "values"]
        if not self.intervals:
            return pd.DataFrame(columns=columns)
        groups = _strata(self.first[0] / np.maximum(self.known, 1))
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


def _strata(mean: np.ndarray) -> dict[str, np.ndarray]:
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


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.full_like(a, np.nan), where=b > 0)


def _table(statistics: dict[str, np.ndarray], names: Any, unit: str) -> pd.DataFrame:
    parts = []
    for name, values in statistics.items():
        observed, drawn = values[0], values[1:]
        with np.errstate(invalid="ignore"):
            above = (drawn > observed).sum(0) + 0.5 * (drawn == observed).sum(0)
        p = np.where(np.isnan(observed), np.nan, (above + 0.5) / (len(drawn) + 1))
        low, high = _quantiles(drawn)
        parts.append(
            pd.DataFrame(
                {
                    unit: np.asarray(names, dtype=object),
                    "statistic": name,
                    "observed": observed,
                    "replicated": _mean(drawn),
                    "low": low,
                    "high": high,
                    "p_value": p,
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def _mean(drawn: np.ndarray) -> np.ndarray:
    """Mean over the draws that have a value; NaN where none has."""
    known = ~np.isnan(drawn)
    return _ratio(np.where(known, drawn, 0).sum(0), known.sum(0).astype(float))


def _quantiles(drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    out = np.full((2, drawn.shape[1]), np.nan)
    some = ~np.isnan(drawn).all(0)
    if some.any():
        out[:, some] = np.nanquantile(drawn[:, some], [0.05, 0.95], axis=0)
    return out[0], out[1]


def _summary(statistics: dict[str, np.ndarray], table: pd.DataFrame, of: str) -> pd.DataFrame:
    rows = {}
    for name, values in statistics.items():
        part = table[table["statistic"] == name]
        scaled = values
        if name != "zeros":
            with np.errstate(divide="ignore", invalid="ignore"):
                scaled = np.log(values)
        scaled = np.where(np.isfinite(scaled), scaled, np.nan)
        with np.errstate(divide="ignore", invalid="ignore"):
            y = part["replicated"].to_numpy() if name == "zeros" else np.log(part["replicated"].to_numpy())
        y = np.where(np.isfinite(y), y, np.nan)
        # the data, then each replicate as if it were the data
        errors = _mean((np.abs(scaled - y)).T)
        inside = (part["observed"] >= part["low"]) & (part["observed"] <= part["high"])
        both = np.isfinite(scaled[0]) & np.isfinite(y)
        a, b, n = scaled[0][both], y[both], int(both.sum())
        varied = n > 2 and np.ptp(a) > 0 and np.ptp(b) > 0
        rank_a, rank_b = (pd.Series(v).rank().to_numpy(float) for v in (a, b))
        rows[(of, name)] = {
            "error": errors[0],
            "expected": float(_mean(errors[1:, None])[0]),
            "bias": (b - a).mean() if n else np.nan,
            "pearson": np.corrcoef(a, b)[0, 1] if varied else np.nan,
            "spearman": np.corrcoef(rank_a, rank_b)[0, 1] if varied else np.nan,
            "inside": float(inside[both].mean()) if n else np.nan,
            "n": n,
        }
    found = pd.DataFrame.from_dict(rows, orient="index")
    found.index = pd.MultiIndex.from_tuples(found.index, names=["of", "statistic"])
    return found


__all__ = ["LEVELS", "PredictiveChecks", "predictive_checks"]
