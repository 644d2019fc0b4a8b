"""Simulation-based calibration: are posterior draws as spread as the truth that made the data?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyrosc.criticism.cells import cells_to_check
from pyrosc.criticism.predictive import LEVELS
from pyrosc.data.errors import listed
from pyrosc.data.schema import MAIN
from pyrosc.infer.elbo import plate_nesting
from pyrosc.infer.handlers import is_deterministic, is_latent, source_of
from pyrosc.infer.modes import evaluating
from pyrosc.infer.posterior import draws_at_once, globals_of, guide_trace, site_value, traces
from pyrosc.infer.predictive import arguments_observed, prior_trace
from pyrosc.infer.structure import sites_of_cells

if TYPE_CHECKING:
    from anndata import AnnData

    from pyrosc.models.base import Model
    from pyrosc.models.results import Indices


@dataclass(frozen=True)
class Calibration:
    """What `simulation_based_calibration` or `calibration_of_draws` found.

    Attributes
    ----------
    ranks
        By quantity (``"z[0]"``, ``"z[1]"``, …), the number of posterior draws below the true value in each
        simulation, (n,) int64 in 0 … L: uniform for the exact posterior.
    table
        A row per quantity: ``p_value`` of a chi-squared test that ranks are uniform; ``deviation``, the
        largest distance of their distribution from the uniform one (Kolmogorov); ``coverage_50`` … the
        share of true values inside central posterior intervals; ``z_mean`` and ``z_sd``, mean and standard
        deviation of (truth − posterior mean) / posterior standard deviation: 0 and 1 for a calibrated
        Normal posterior, a standard deviation above 1 for one that is too narrow.
    n_simulations, n_draws
        Number of simulations n and of posterior draws L in each.
    """

    ranks: Mapping[str, np.ndarray]
    table: pd.DataFrame
    n_simulations: int
    n_draws: int

    @property
    def p_value(self) -> float:
        """Least p-value of the quantities times their number (Bonferroni), at most 1."""
        p = self.table["p_value"].to_numpy()
        return float(min(1.0, np.nanmin(p) * len(p))) if np.isfinite(p).any() else float("nan")

    def passes(self, level: float = 0.01) -> bool:
        """Whether uniform ranks of all quantities are not rejected, with `level` for all tests together."""
        return self.p_value >= level

    def curve(self, quantity: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Levels of central posterior intervals and the share of true values inside, 101 each.

        Parameters
        ----------
        quantity
            Which; default the mean over all.
        """
        wanted = list(self.ranks) if quantity is None else [quantity]
        level = np.linspace(0, 1, 101)
        # a rank stands for an interval of length 1 / (L + 1); of it, the part inside counts
        below = [np.searchsorted(np.sort(self.ranks[w]), np.arange(self.n_draws + 2)) for w in wanted]
        share = np.mean(below, axis=0) / self.n_simulations
        places = np.linspace(0, 1, self.n_draws + 2)
        upper, lower = ((1 + s * level) / 2 for s in (1, -1))
        return level, np.interp(upper, places, share) - np.interp(lower, places, share)

    @property
    def coverage(self) -> pd.Series:
        """Mean coverage over quantities, by nominal level."""
        values = {level: float(self.table[_column(level)].mean()) for level in LEVELS}
        return pd.Series(values, name="coverage").rename_axis("level")


def simulation_based_calibration(
    model: Model,
    adata: AnnData | None = None,
    indices: Indices = None,
    *,
    n_simulations: int = 1000,
    n_draws: int = 199,
    sites: str | tuple[str, ...] | list[str] | None = None,
    source: str = MAIN,
    batch_size: int = 256,
    seed: int = 0,
) -> Calibration:
    """Rank the true latent values of simulated cells among draws from their posterior.

    For each simulated cell the latent sites are drawn from their priors and counts from their law given
    those, with the model's weights as they are (the decoder is the truth) and the covariates and library
    size of a registered cell. The guide is then shown the counts. Were it the exact posterior, the rank of
    the true value among its draws would be uniform (Talts et al. 2018). Sites that the model sums out are
    drawn from their exact posterior; ties are broken at random, so that discrete sites have uniform ranks
    too.

    What fails for a network that reads cells is the guide, not the decoder: ranks piled up at both ends show
    a posterior that is too narrow, in the middle one that is too wide, on one side one that is shifted. Cells
    drawn from the prior need not look like those that trained the network, so that part of the deviation may
    be of cells that do not occur; `guide_diagnostics` judges the guide at real cells.

    Global sites are put at the guide's means in simulation and posterior alike. To calibrate global sites, or
    a model that is trained anew on each simulation, collect truth and draws in a loop and pass them to
    `calibration_of_draws`.

    Parameters
    ----------
    model
        Any model with latent sites per cell and a guide that reads the cell.
    adata
        Cells to take covariates and library sizes from; default those the model was made with.
    indices
        Which of them; default all.
    n_simulations
        Number of simulated cells.
    n_draws
        Posterior draws L per cell. Ranks fall into L + 1 places.
    sites
        Latent sites per cell to rank; default all.
    source
        Data source, for models that read several.
    batch_size
        Cells at a time.
    seed
        Of everything random; no global generator is touched.

    Returns
    -------
    Calibration
        Ranks and a table per site and dimension.

    Raises
    ------
    KeyError
        If there is no such latent site per cell.
    ValueError
        If the guide has parameters of its own for each cell, or an observed value cannot be handed to it.

    References
    ----------
    Talts, Betancourt, Simpson, Vehtari, Gelman (2018). Validating Bayesian inference algorithms with
    simulation-based calibration. `arXiv:1804.06788 <https://arxiv.org/abs/1804.06788>`_.

    Examples
    --------
    >>> import pyrosc
    >>> adata = pyrosc.simulate.scvi(60, 20, seed=0).adata
    >>> model = pyrosc.SCVI.from_anndata(adata, n_hidden=8, n_latent=2).fit(1, progress=False)
    >>> found = pyrosc.criticism.simulation_based_calibration(model, n_simulations=50, n_draws=19)
    >>> list(found.ranks)
    ['z[0]', 'z[1]']
    """
    if n_simulations < 2 or n_draws < 1:
        raise ValueError(
            f"there are at least 2 simulations and 1 draw in each; not {n_simulations} and {n_draws}"
        )
    wanted = _sites(model, sites, source)
    name = type(model).__name__
    if model.per_cell_guide or model.registries[source].obs_names is not None:
        raise ValueError(
            f"{name} has parameters of its own for each cell, and none for a simulated one; train it on each "
            "simulation and pass truth and draws to calibration_of_draws"
        )
    cells = cells_to_check(model, adata, indices, None, seed, source, held_out=False)
    rng = np.random.default_rng(seed)
    rows = rng.choice(cells.rows, n_simulations, replace=n_simulations > len(cells.rows))
    truth: dict[str, list[np.ndarray]] = {w: [] for w in wanted}
    draws: dict[str, list[np.ndarray]] = {w: [] for w in wanted}
    fixed: dict[str, Tensor] | None = None
    with evaluating(model, seed), torch.no_grad():
        for _, real in model.batches(cells.dataset, np.sort(rows), batch_size, source):
            batch = _unlabelled(model, real, source)
            if fixed is None:
                fixed = globals_of(traces(model, batch)[0])
            true, simulated = simulate(model, batch, fixed, source)
            posterior = _posterior(model, simulated, n_draws, wanted, fixed)
            for w in wanted:
                truth[w].append(true[w].cpu().numpy())
                draws[w].append(posterior[w].cpu().numpy())
    return calibration_of_draws(
        {w: np.concatenate(v) for w, v in truth.items()},
        {w: np.concatenate(v, axis=1) for w, v in draws.items()},
        seed=seed,
    )


def calibration_of_draws(
    truth: Mapping[str, np.ndarray], draws: Mapping[str, np.ndarray], *, n_bins: int = 20, seed: int = 0
) -> Calibration:
    """Calibration of posterior draws made elsewhere: by MCMC, or by training anew on each simulation.

    Parameters
    ----------
    truth
        By quantity, the values that the simulated data were made with, (n, ...).
    draws
        By quantity, draws from the posterior given each simulation, (L, n, ...).
    n_bins
        Most bins of the chi-squared test; at least 5 simulations are expected in each.
    seed
        Of how ties are broken.

    Returns
    -------
    Calibration
        Ranks and a table, a row per element of the quantities.

    Raises
    ------
    ValueError
        If names or shapes of truth and draws do not match.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> truth, noise = rng.normal(size=(2, 500))
    >>> data = truth + noise  # the posterior of the truth is Normal(data / 2, 1/√2)
    >>> draws = data / 2 + rng.normal(size=(99, 500)) / np.sqrt(2)
    >>> calibration_of_draws({"mean": truth}, {"mean": draws}).passes()
    True
    """
    if set(truth) != set(draws):
        raise ValueError(f"truth is of {listed(truth)}, draws of {listed(draws)}")
    rng = np.random.default_rng(seed)
    ranks: dict[str, np.ndarray] = {}
    rows = {}
    n = n_draws = 0
    for name, values in truth.items():
        true, found = np.asarray(values, float), np.asarray(draws[name], float)
        if found.ndim < 2 or found.shape[1:] != true.shape:
            raise ValueError(
                f"'{name}': draws are (L, n, ...) for truth (n, ...); got {found.shape} and {true.shape}"
            )
        n_draws, n = found.shape[:2]
        for at in np.ndindex(true.shape[1:]):
            label = name + (f"[{', '.join(map(str, at))}]" if at else "")
            one, many = true[(slice(None), *at)], found[(slice(None), slice(None), *at)]
            ties = (many == one).sum(0)
            ranks[label] = (many < one).sum(0) + rng.integers(0, ties + 1)
            rows[label] = _row(ranks[label], one, many, n_bins, rng)
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("quantity")
    return Calibration(ranks, table, n, n_draws)


def _row(
    rank: np.ndarray, truth: np.ndarray, draws: np.ndarray, n_bins: int, rng: np.random.Generator
) -> dict[str, float]:
    n_draws, n = draws.shape
    u = (rank + rng.random(n)) / (n_draws + 1)
    places = np.arange(1, n + 1)
    ordered = np.sort(u)
    spread = draws.std(0, ddof=1) if n_draws > 1 else np.zeros(n)
    moves = spread > 0
    z = (truth[moves] - draws.mean(0)[moves]) / spread[moves]
    return {
        "p_value": uniform_p_value(rank, n_draws, n_bins),
        "deviation": float(np.maximum(places / n - ordered, ordered - (places - 1) / n).max()),
        **{_column(level): float((np.abs(u - 0.5) <= level / 2).mean()) for level in LEVELS},
        "z_mean": float(z.mean()) if len(z) else np.nan,
        "z_sd": float(z.std(ddof=1)) if len(z) > 1 else np.nan,
    }


def rank_counts(rank: np.ndarray, n_draws: int, n_bins: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Ranks in bins: numbers, and those expected of uniform ranks (bins may differ by one place).

    Parameters
    ----------
    rank
        (n,) int in 0 … `n_draws`.
    n_draws
        Number of draws L.
    n_bins
        Most bins; fewer where less than 5 ranks would be expected in each.
    """
    bins = max(2, min(n_bins, n_draws + 1, len(rank) // 5))
    place = rank * bins // (n_draws + 1)
    expected = np.bincount(np.arange(n_draws + 1) * bins // (n_draws + 1), minlength=bins)
    return np.bincount(place, minlength=bins), expected * len(rank) / (n_draws + 1)


def uniform_p_value(rank: np.ndarray, n_draws: int, n_bins: int = 20) -> float:
    """P-value of Pearson's chi-squared test that ranks are uniform."""
    from scipy.stats import chi2  # slow to import

    found, expected = rank_counts(rank, n_draws, n_bins)
    return float(chi2.sf(((found - expected) ** 2 / expected).sum(), len(found) - 1))


def simulate(
    model: Model, batch: Mapping[str, Tensor], fixed: Mapping[str, Tensor], source: str = MAIN
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Draw latent sites of cells from their priors, and what is observed of the cells given those.

    Parameters
    ----------
    model
        The model.
    batch
        Minibatch: its covariates and library sizes are kept.
    fixed
        Values of global sites.
    source
        Data source.

    Returns
    -------
    tuple
        Values of the latent sites per cell, and the minibatch with simulated observations.
    """
    known = arguments_observed(model, batch)
    trace = prior_trace(model, batch, fixed)
    nodes: Mapping[str, Any] = trace.nodes
    simulated, true = dict(batch), {}
    for name, site in nodes.items():
        if source_of(site) != source or is_deterministic(site):
            continue
        if name not in known:
            if is_latent(site):
                true[name] = site["value"]
        elif (argument := known[name]) is not None:
            simulated[argument] = site["value"].to(batch[argument].dtype)
        elif site["mask"] is None or bool(torch.as_tensor(site["mask"]).any()):
            raise ValueError(
                f"{type(model).__name__} observes '{name}' through values that are no argument of it, so "
                "that simulated ones cannot be handed to the guide; write obs=<an argument> at that site"
            )
    return true, simulated


def _sites(model: Model, sites: Any, source: str) -> list[str]:
    found = [n for n in sites_of_cells(model, source) if n in model.latent_sites(local=True)]
    if not found:
        raise KeyError(f"{type(model).__name__} has no latent site per cell to calibrate")
    wanted = found if sites is None else [sites] if isinstance(sites, str) else list(sites)
    if absent := [w for w in wanted if w not in found]:
        raise KeyError(
            f"{type(model).__name__} has no latent site per cell {listed(absent)}; it has {listed(found)}"
        )
    return wanted


def _unlabelled(model: Model, batch: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The minibatch with the labels hidden that a latent site of the model stands for."""
    if model.label is None or model.label not in model.latent_sites(local=True):
        return dict(batch)
    labels = [n for n, s in model.registries[source].fields.items() if s.kind == "labels"]
    return dict(batch) | {n: torch.full_like(batch[n], -1) for n in labels}


def _posterior(
    model: Model, batch: Mapping[str, Tensor], n_draws: int, wanted: list[str], fixed: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Draws of sites per cell, (L, n, ...)."""
    n = len(next(iter(model.inputs(batch).values())))
    nesting = plate_nesting(model.elbo)
    chunk = draws_at_once(model, n_draws, sum(v.numel() for v in model.inputs(batch).values()))
    parts: dict[str, list[Tensor]] = {w: [] for w in wanted}
    for start in range(0, n_draws, chunk):
        here = min(chunk, n_draws - start)
        nodes: Mapping[str, Any]
        if model.summed_out:
            nodes = traces(model, batch, here, fixed=fixed)[1].nodes
        else:
            nodes = guide_trace(model, batch, here, fixed).nodes
        for w in wanted:
            node = {k: v for k, v in nodes[w].items() if k != "probabilities"}
            parts[w].append(site_value(node, here, True, n, nesting))
    return {w: torch.cat(v) for w, v in parts.items()}


def _column(level: float) -> str:
    return f"coverage_{round(100 * level)}"


__all__ = ["Calibration", "calibration_of_draws", "simulation_based_calibration"]
