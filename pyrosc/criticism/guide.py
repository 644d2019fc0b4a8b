"""How close the guide comes to the posterior of each cell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrosc.criticism.cells import cells_to_check
from pyrosc.data.errors import listed
from pyrosc.data.inputs import rows_key
from pyrosc.data.schema import MAIN
from pyrosc.infer.evaluate import log_weights
from pyrosc.infer.handlers import is_latent, source_of
from pyrosc.infer.modes import evaluating
from pyrosc.infer.posterior import draws_at_once, globals_of, traces
from pyrosc.infer.psis import khat_threshold, smooth

if TYPE_CHECKING:
    from anndata import AnnData

    from pyrosc.models.base import Model
    from pyrosc.models.results import Indices

_FEWEST = 25


@dataclass(frozen=True)
class GuideDiagnostics:
    """What `guide_diagnostics` found.

    Attributes
    ----------
    cells
        A row per cell: ``khat``, the tail shape of its importance weights; ``ess``, the effective number of
        draws; ``elbo`` and ``log_evidence``, nats; ``gap``, their difference, an estimate of
        KL(guide ‖ posterior).
    summary
        ``reliable`` (share of cells with k-hat below `threshold`), ``khat_above_0.7`` (share), medians of
        ``khat`` and ``ess``, means of ``elbo``, ``log_evidence`` and ``gap``.
    threshold
        Tail shape above which so many draws are too few.
    n_samples
        Draws per cell.
    held_out
        Whether none of the cells trained the model.
    sites
        Latent sites per cell that the guide draws.
    """

    cells: pd.DataFrame
    summary: pd.Series
    threshold: float
    n_samples: int
    held_out: bool
    sites: tuple[str, ...]


def guide_diagnostics(
    model: Model,
    adata: AnnData | None = None,
    indices: Indices = None,
    *,
    n_samples: int = 500,
    max_cells: int | None = 1000,
    source: str = MAIN,
    batch_size: int = 64,
    seed: int = 0,
) -> GuideDiagnostics:
    """Importance ratios p(x, z) / q(z | x) of each cell's latent sites, and how heavy their tail is.

    Were the guide the exact posterior, all ratios of a cell would be the same. A generalised Pareto law
    fitted to the largest of them gives k-hat (Vehtari et al. 2024; Yao et al. 2018): below 0.5 the guide
    covers the posterior; up to 0.7 it can still be corrected by weighting its draws; above, it misses so much
    of the posterior that no number of draws in reach will show it, and the ELBO says little of the model.

    Discrete sites that the model sums out are summed out here. Global sites are put at the guide's means, so
    that what is judged is the guide of the cells' own sites given them.

    Parameters
    ----------
    model
        Any trained model with latent sites per cell.
    adata
        Cells; default those the model was made with.
    indices
        Which cells (positions or a mask); default the held-out ones where the model has some, else all.
    n_samples
        Draws per cell, at least 25. A tail is a fifth of them, at most 3√S.
    max_cells
        Of more cells than this, as many are drawn at random; None for no limit.
    source
        Data source, for models that read several.
    batch_size
        Cells at a time.
    seed
        Of cells and draws; no global generator is touched.

    Returns
    -------
    GuideDiagnostics
        A table per cell and a summary.

    Raises
    ------
    ValueError
        If the guide draws no latent site per cell, or only points; or for too few draws.

    References
    ----------
    Vehtari, Simpson, Gelman, Yao, Gabry (2024). Pareto smoothed importance sampling. *Journal of Machine
    Learning Research* 25(72). Yao, Vehtari, Simpson, Gelman (2018). Yes, but did it work? Evaluating
    variational inference. *ICML*.

    Examples
    --------
    >>> import pyrosc
    >>> adata = pyrosc.simulate.scvi(60, 20, seed=0).adata
    >>> model = pyrosc.SCVI.from_anndata(adata, n_hidden=8).fit(1, progress=False)
    >>> list(pyrosc.criticism.guide_diagnostics(model, n_samples=50).cells.columns)
    ['khat', 'ess', 'elbo', 'log_evidence', 'gap']
    """
    if n_samples < _FEWEST:
        raise ValueError(
            f"a tail is fitted to a fifth of the draws: n_samples is at least 25, not {n_samples}"
        )
    chosen = cells_to_check(model, adata, indices, max_cells, seed, source)
    parts: dict[str, list[np.ndarray]] = {}
    sites: tuple[str, ...] = ()
    fixed: dict[str, Tensor] | None = None
    with evaluating(model, seed), torch.no_grad():
        for _, batch in model.batches(chosen.dataset, chosen.rows, batch_size, source):
            if fixed is None:
                guide_trace = traces(model, batch)[0]
                fixed = globals_of(guide_trace)
                sites = _drawn(model, guide_trace, source)
            weights = _draw(model, batch, n_samples, fixed, source)
            for name, value in _diagnose(weights).items():
                parts.setdefault(name, []).append(value.cpu().numpy())
    columns = {name: np.concatenate(v) for name, v in parts.items()}
    cells = pd.DataFrame(columns, index=pd.Index(chosen.dataset.obs_names[chosen.rows], name="cell"))
    threshold = khat_threshold(n_samples)
    summary = pd.Series(
        {
            "reliable": float((cells["khat"] < threshold).mean()),
            "khat_above_0.7": float((cells["khat"] > 0.7).mean()),
            "khat": float(cells["khat"].median()),
            "ess": float(cells["ess"].median()),
            "elbo": float(cells["elbo"].mean()),
            "log_evidence": float(cells["log_evidence"].mean()),
            "gap": float(cells["gap"].mean()),
        },
        name=type(model).__name__,
    )
    return GuideDiagnostics(cells, summary, threshold, n_samples, chosen.held_out, sites)


def _drawn(model: Model, guide_trace: Any, source: str) -> tuple[str, ...]:
    """Latent sites of the source's cells that the guide draws, or an error."""
    nodes: Mapping[str, Any] = guide_trace.nodes
    found = {n: s for n, s in nodes.items() if is_latent(s) and source_of(s) == source}
    name = type(model).__name__
    if not found:
        left = "; those of its model are summed out exactly" if model.summed_out else ""
        raise ValueError(
            f"the guide of {name} draws no latent site per cell{left}: there is nothing to judge"
        )
    spread = tuple(
        n for n, s in found.items() if not isinstance(getattr(s["fn"], "base_dist", s["fn"]), dist.Delta)
    )
    if not spread:
        raise ValueError(
            f"the guide of {name} is a point at {listed(found)}, which has no importance weights; use a "
            "guide with a spread, such as AutoNormal or Amortized"
        )
    return spread


def _draw(
    model: Model, batch: Mapping[str, Tensor], n_samples: int, fixed: Mapping[str, Tensor], source: str
) -> Tensor:
    """log p − log q, (draws, n), float64."""
    n = len(batch[rows_key(source)])
    width = sum(v.numel() for v in model.inputs(batch).values() if v.is_floating_point())
    chunk = draws_at_once(model, n_samples, width)
    parts: list[Tensor] = []
    for start in range(0, n_samples, chunk):
        here = min(chunk, n_samples - start)
        pair = traces(model, batch, here, fixed=fixed, enumerate_model=True)
        parts.append(log_weights(*pair, n, source).double())
    return torch.cat(parts)


def _diagnose(weights: Tensor) -> dict[str, Tensor]:
    smoothed = smooth(weights)
    elbo = weights.mean(0)
    return {
        "khat": smoothed.khat,
        "ess": 1 / (2 * smoothed.log_weights).exp().sum(0),
        "elbo": elbo,
        "log_evidence": smoothed.log_mean,
        "gap": smoothed.log_mean - elbo,
    }


__all__ = ["GuideDiagnostics", "guide_diagnostics"]
