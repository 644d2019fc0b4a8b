"""Differential expression: a question put to a model, answered as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from pyrosc.data.errors import one_of
from pyrosc.tools.de import effects as eff
from pyrosc.tools.de.groups import Comparison, Donors, Groups, donors_of, warn_of_replicates
from pyrosc.tools.de.means import Pass
from pyrosc.tools.de.pairs import PairDraws
from pyrosc.tools.de.question import (
    Modality,
    cells_in_groups,
    modalities,
    numbers_of_draws,
    shares_of,
    what_ifs,
)
from pyrosc.tools.de.sides import CellMeans, DonorMeans
from pyrosc.tools.de.table import comparable, expressed, raw_statistics, rows_of

if TYPE_CHECKING:
    from anndata import AnnData

    from pyrosc.data import Dataset
    from pyrosc.models.base import Model

_PAIRS = 2500
#: ε is this share of this quantile of the mean expression of the genes that have counts.
_EPSILON_SHARE, _EPSILON_QUANTILE = 0.01, 0.05


def differential_expression(
    model: Model,
    adata: AnnData | None = None,
    indices: Sequence[int] | np.ndarray | None = None,
    *,
    groupby: str | None = None,
    group1: str | Sequence[str] | None = None,
    group2: str | Sequence[str] | None = None,
    idx1: Sequence[int] | np.ndarray | None = None,
    idx2: Sequence[int] | np.ndarray | None = None,
    within: str | None = None,
    mode: Literal["change", "vanilla"] = "change",
    effect: Literal["lfc", "difference"] | None = None,
    delta: float | Literal["default"] | None = "default",
    fdr: float = 0.05,
    donor_key: str | None = None,
    batch_correction: bool = False,
    batches: Sequence[str] | None = None,
    do: Mapping[str, Any] | None = None,
    weights: Literal["uniform", "importance"] = "uniform",
    calibrate: bool | None = None,
    shrink: bool | None = None,
    pairs: bool = False,
    credible_interval: float = 0.95,
    min_fraction: float = 0.01,
    min_cells: int = 3,
    max_cells: int | None = 1000,
    n_samples: int | None = None,
    n_bootstrap: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Genes whose mean expression differs between groups of cells.

    For each draw from the posterior, of the cells and of global sites where the model has them, m₁ and m₂
    are mean expression of the two groups with Bayesian-bootstrap weights (Rubin 1981) over cells, or over
    donors, times the observed over the expected counts of the group (`calibrate`). The log-fold change (LFC)
    is log2(m₁ + ε) − log2(m₂ + ε). Its prior is estimated from all genes (`shrink`; Stephens 2017), and so
    probabilities are those of a change among these genes. It is a comparison of means of groups: cells that
    differ among themselves do not make genes differential.

    Parameters
    ----------
    model
        A trained model with a site of expression per cell and gene (its attribute ``expression``), or
        several (``features``): all are compared, each with a prior and calls of its own.
    adata, indices
        Other cells, and the cells that take part; as in `pyrosc.Model.posterior`.
    groupby
        Column of ``obs``; cells without a value take no part.
    group1
        Categories to compare, each by itself; default all.
    group2
        Category to compare them with, or several taken together; default the rest.
    idx1, idx2
        In place of `groupby`: cells of the groups, as masks or positions; without `idx2` the rest.
    within
        Another column of ``obs``: the comparison is made in each of its categories.
    mode
        ``"change"``: a rise, or a fall, by δ or more; ``"vanilla"``: LFC above, or below, 0.
    effect
        ``"lfc"``, or ``"difference"``: m₁ − m₂ in place of the LFC, for means that are probabilities. Columns
        of the table then begin with ``difference_``. Default: the attribute ``effect_scale`` of the model.
    delta
        δ of mode "change"; default .25 log2-fold, of a difference .05. None: the width of the central 68 % of
        the genes' estimates, at least .1, of a difference .02.
    fdr
        Expected false discovery rate of the calls.
    donor_key
        Column of ``obs`` with donors: they, not cells, are the replicates (see Notes). Three or more on each
        side.
    batch_correction
        Expression averaged over what it would be in each of the model's batches.
    batches
        Those batches; default all.
    do
        What-if values for all cells, as in `pyrosc.Model.posterior`.
    weights
        ``"importance"``: each cell's draws are taken again with probabilities p(x, z) / q(z | x), for a
        guide that fits badly. Needs more draws (``n_samples=50``); not for models with global latent sites.
    calibrate
        Multiply group means by observed over expected counts, with a prior of one count: takes out what
        the decoder misses and brings in the noise of the counts. Default: where the likelihood is one of
        counts and has a mean. False: the model's means, whose error is then only what the draws hold; right
        for models with a posterior over the whole decoder.
    shrink
        Prior of the LFCs by empirical Bayes. False: a flat prior, with too many calls among weakly expressed
        genes. Default True, with pairs False.
    pairs
        Random pairs of single cells in place of group means (Lopez 2018; Boyeau 2019), ``n_samples`` of
        them. Asks how often two cells differ, either way, also within one population: not calibrated for
        calls, so without ``is_de_fdr``.
    credible_interval
        Probability of the intervals.
    min_fraction, min_cells
        A gene can be called if one of the groups has counts of it in at least this share of the cells, and
        in this many; never without counts.
    max_cells
        Cells per group that are decoded, at random; the rest of a comparison keeps its proportions, and raw
        statistics are of all cells. None: all.
    n_samples
        Draws from the posterior, shared by all groups; default 10, with global latent sites 50, of pairs
        2500.
    n_bootstrap
        Bootstrap weights per draw; default so that there are 250 draws.
    seed
        Of sampling, draws and weights; no global generator is touched.

    Returns
    -------
    pandas.DataFrame
        Index: genes, or features of several modalities that the column ``field`` tells apart; a block of rows
        per comparison, called genes first, then by the end of the LFC's interval nearer to zero. Columns
        ``comparison``, ``group1``, ``group2`` (and ``within``); ``is_de_fdr``, whether called; ``proba_de``,
        the larger of ``proba_larger`` = P(LFC ≥ δ) and ``proba_smaller`` = P(LFC ≤ −δ); ``bayes_factor``, its
        log odds (natural logarithm); ``lfc_mean``, ``lfc_median``, ``lfc_std``, ``lfc_lower``, ``lfc_upper``
        of the posterior, ``lfc_unshrunken``, the median of the draws; ``scale1``, ``scale2``, mean
        expression; ``raw_mean1``, ``raw_mean2``, mean counts per cell; ``non_zeros_proportion1``,
        ``non_zeros_proportion2``; ``is_expressed``, whether it can be called; ``n_cells1``, ``n_cells2``.
        ``attrs["differential_expression"]`` holds the options, and δ and ε (``pseudocount``) of each
        comparison.

    Raises
    ------
    KeyError
        If the model has no such site.
    DataError
        If groups, donors or batches do not exist, overlap, or are too few.
    ValueError
        If options contradict each other.

    Warns
    -----
    DataWarning
        If a column looks like donors who are taken no account of, where conditions are compared or where no
        donor has cells in both groups.

    Notes
    -----
    ε is a hundredth of the 5 % quantile, over genes with counts, of the mean of ``scale1`` and ``scale2``.
    The calls are the largest set of expressed genes whose mean 1 − ``proba_de`` is at most `fdr`.

    Donors have weights Gamma((n − 2)/n), n the smaller number of donors on a side, common to their cells in
    both groups, so that the variance is the unbiased one of a mean of n donors and what donors have in
    common cancels. These variances, with n − 1 degrees of freedom or so, are moderated by a trend (Smyth
    2004, Law 2014).

    References
    ----------
    Rubin (1981). The Bayesian bootstrap. *Annals of Statistics* 9. Smyth (2004). Linear models and empirical
    Bayes methods. *Stat. Appl. Genet. Mol. Biol.* 3. Stephens (2017). False discovery rates: a new deal.
    *Biostatistics* 18. Boyeau, Lopez, Regier, … Yosef (2019). Deep generative models for detecting
    differential expression in single cells. Law, Chen, Shi, Smyth (2014). voom. *Genome Biology* 15.

    Examples
    --------
    >>> import pyrosc
    >>> adata = pyrosc.simulate.scvi(90, 30, n_types=2, seed=0).adata
    >>> model = pyrosc.SCVI.from_anndata(adata, n_hidden=16).fit(5, progress=False)
    >>> de = differential_expression(model, groupby="cell_type")
    >>> de["comparison"].nunique(), len(de)
    (2, 60)
    """
    one_of("mode", mode, ("change", "vanilla"))
    chosen = model.effect_scale if effect is None else effect
    one_of("effect", chosen, eff.SCALES)
    scale = eff.SCALES[chosen]
    if delta == "default":
        delta = scale.delta
    elif mode == "vanilla":
        raise ValueError("mode='vanilla' asks for the sign of a change, and takes no delta=")
    one_of("weights", weights, ("uniform", "importance"))
    _check_numbers(delta, fdr, credible_interval, min_fraction, min_cells, max_cells)
    if pairs and (calibrate or shrink or donor_key is not None or n_bootstrap is not None):
        raise ValueError(
            "pairs=True compares single cells: calibrate=, shrink=, donor_key= and n_bootstrap= have no say"
        )
    asked = modalities(model, False if pairs else calibrate)
    options = _Options(
        mode,
        delta,
        scale,
        fdr,
        credible_interval,
        min_fraction,
        min_cells,
        max_cells,
        pairs,
        not pairs if shrink is None else shrink,
    )
    worlds = what_ifs(model, batch_correction, batches, do)
    k, b = (n_samples or _PAIRS, 1) if pairs else numbers_of_draws(model, n_samples, n_bootstrap)
    resample = weights == "importance"
    if resample and model.latent_sites(local=False):
        raise ValueError(
            "weights='importance' draws the values of each cell again, given the global sites; "
            f"{type(model).__name__} draws those too ({', '.join(model.latent_sites(local=False))})"
        )
    dataset = model.dataset(adata)
    groups = cells_in_groups(dataset, indices, groupby, group1, group2, idx1, idx2, within)
    donors = None if donor_key is None else donors_of(dataset.data, donor_key, groups)
    if not pairs and donors is None:
        state = model.registry.fields.get("batch")
        batch_key = state.keys[0] if state is not None and state.given else None
        warn_of_replicates(dataset.data, groups, batch_key)
    tables: list[pd.DataFrame] = []
    notes: dict[str, Any] = {}
    for modality in asked:
        plan = Pass(
            modality.site,
            modality.field,
            modality.counts,
            k,
            b,
            mask=modality.mask,
            worlds=worlds,
            shares=shares_of(dataset, modality.mask, worlds, batch_correction),
            resample=resample,
            seed=seed,
        )
        found, note, n_decoded = _compare(model, dataset, groups, donors, modality, plan, options)
        if len(asked) > 1:
            for part in found:
                part.insert(0, "field", modality.field)
            note = {f"{name} ({modality.field})": value for name, value in note.items()}
        tables += found
        notes |= note
    table = pd.concat(tables)
    table.attrs["differential_expression"] = {
        "model": type(model).__name__,
        "groupby": groupby,
        "within": within,
        "mode": mode,
        "effect": scale.name,
        "fdr": None if pairs else fdr,
        "comparisons": notes,
        "donor_key": donor_key,
        "batch_correction": batch_correction,
        "do": [dict(w) for w in worlds],
        "weights": weights,
        "calibrate": any(m.counts is not None for m in asked),
        "shrink": options.shrink,
        "pairs": pairs,
        "credible_interval": credible_interval,
        "min_fraction": min_fraction,
        "min_cells": min_cells,
        "cells_decoded": n_decoded,
        "n_samples": k,
        "n_bootstrap": b,
        "seed": seed,
    }
    return table


@dataclass(frozen=True)
class _Options:
    """Arguments of `differential_expression` that say how tables are made."""

    mode: str
    delta: float | None
    scale: eff.Scale
    fdr: float
    level: float
    min_fraction: float
    min_cells: int
    max_cells: int | None
    pairs: bool
    shrink: bool


def _compare(
    model: Model,
    dataset: Dataset,
    groups: Groups,
    donors: Donors | None,
    modality: Modality,
    plan: Pass,
    o: _Options,
) -> tuple[list[pd.DataFrame], dict[str, Any], int]:
    """A table per comparison of one site of expression, δ and ε of each, and the number of cells decoded."""
    raw = raw_statistics(dataset, modality.field, groups, modality.mask)
    means: CellMeans | DonorMeans | PairDraws
    if o.pairs:
        means = PairDraws(model, dataset, groups, plan)
    elif donors is not None:
        means = DonorMeans(model, dataset, groups, donors, plan, o.max_cells)
    else:
        means = CellMeans(model, dataset, groups, plan, o.max_cells)
    try:
        tables, notes = [], {}
        known = {c.name: comparable(raw, c) for c in groups.comparisons}
        gates = {
            c.name: expressed(raw, c, o.min_fraction, o.min_cells) & known[c.name] for c in groups.comparisons
        }
        estimates = _Estimates(means, groups.comparisons, raw.sums.sum(0) > 0, o.scale)
        for c in groups.comparisons:
            gate = gates[c.name]
            threshold = 0.0 if o.mode == "vanilla" else o.delta
            estimate, error = estimates.value[c.name], estimates.error[c.name]
            if threshold is None:
                threshold = eff.spread_delta(estimate[gate], o.scale) if gate.any() else o.scale.delta
            if o.shrink:
                if isinstance(means, DonorMeans):
                    error = eff.moderated(estimate, error, means.freedom(c), raw.noise(c, o.scale), gate)
                prior = eff.fit_prior(estimate[gate], error[gate], threshold, scale=o.scale)
                found = eff.shrunken(estimate, error, prior, threshold, o.level)
            else:
                found = estimates.from_draws(c, threshold, o.level)
            two_sided = o.pairs and o.mode == "change"  # two cells may differ either way
            p = found.larger + found.smaller if two_sided else np.maximum(found.larger, found.smaller)
            calls = None if o.pairs else eff.called(p, gate, o.fdr)
            names = list(model.registry.var_names(modality.field))
            scales = means.scales(c)
            found, p, estimate, one, two = _where(known[c.name], found, p, estimate, *scales)
            tables.append(rows_of(names, c, found, p, estimate, (one, two), raw, gate, calls, o.scale))
            notes[c.name] = {"delta": threshold, "pseudocount": estimates.epsilon[c.name]}
    finally:
        means.close()
    return tables, notes, means.n_sampled


def _where(known: np.ndarray, found: eff.Effects, *values: np.ndarray) -> tuple[Any, ...]:
    """The same with NaN for features that one of the groups says nothing of."""
    if known.all():
        return found, *values
    of_effects = (np.where(known, getattr(found, f.name), np.nan) for f in fields(eff.Effects))
    return eff.Effects(*of_effects), *(np.where(known, v, np.nan) for v in values)


class _Estimates:
    """Estimates of each comparison's effects with their standard errors, and ε."""

    def __init__(
        self, means: Any, comparisons: Sequence[Comparison], counted: np.ndarray, scale: eff.Scale
    ) -> None:
        self._means, self._scale, n_genes = means, scale, len(counted)
        self.epsilon = {}
        for c in comparisons:
            pooled = sum(means.scales(c)) / 2
            low = float(np.quantile(pooled[counted], _EPSILON_QUANTILE)) if counted.any() else 0.0
            self.epsilon[c.name] = max(_EPSILON_SHARE * low, 1e-12)
        self.value = {c.name: np.zeros(n_genes) for c in comparisons}
        self.error = {c.name: np.zeros(n_genes) for c in comparisons}
        for genes, pair in means.blocks():
            for c in comparisons:
                draws = self._changes(pair, c)
                median, error = eff.estimates(draws)
                self.value[c.name][genes], self.error[c.name][genes] = median, error

    def _changes(self, pair: Any, c: Comparison) -> np.ndarray:
        """(genes, draws) of effects."""
        one, two = pair(c)
        return np.ascontiguousarray(self._scale.change(one, two, self.epsilon[c.name]).T)

    def from_draws(self, c: Comparison, delta: float, level: float) -> eff.Effects:
        """Effects as the draws have them."""
        parts = [eff.from_draws(self._changes(pair, c).T, delta, level) for _, pair in self._means.blocks()]
        names = ("mean", "median", "std", "lower", "upper", "larger", "smaller")
        return eff.Effects(*(np.concatenate([getattr(p, n) for p in parts]) for n in names))


def _check_numbers(
    delta: float | None,
    fdr: float,
    level: float,
    min_fraction: float,
    min_cells: int,
    max_cells: int | None,
) -> None:
    if delta is not None and not delta > 0:
        raise ValueError(
            f"delta is a log2-fold change, or a difference, above 0; not {delta} (mode='vanilla' has none)"
        )
    for name, value in {"fdr": fdr, "credible_interval": level}.items():
        if not 0 < value < 1:
            raise ValueError(f"{name} is in (0, 1); not {value}")
    if not 0 <= min_fraction <= 1:
        raise ValueError(f"min_fraction is a share in [0, 1]; not {min_fraction}")
    if min_cells < 0 or (max_cells is not None and max_cells < 3):
        raise ValueError("min_cells is at least 0, max_cells at least 3 or None")
