"""Cells of types that are told by marker genes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from pyrosc.distributions.truncation import untruncate_below
from pyrosc.infer.guides import Amortized
from pyrosc.models import CellAssign
from pyrosc.models.marker_counts import MeanDispersion
from pyrosc.simulate.core import Simulated, from_model


def cellassign(
    n_cells: int = 1000,
    n_types: int = 4,
    *,
    n_markers: int = 5,
    n_shared: int = 1,
    n_background: int = 200,
    other: str | None = None,
    n_batches: int = 1,
    n_continuous: int = 0,
    covariate_effect: float = 0.5,
    level: float = -1.5,
    effect: tuple[float, float] = (2.2, 3.5),
    proportions: np.ndarray | None = None,
    mean_total: float = 2000.0,
    sd_log_size: float = 0.3,
    seed: int = 0,
    **options: Any,
) -> Simulated:
    """Cells drawn from a CellAssign with known parameters, and genes that mark nothing.

    Parameters
    ----------
    n_cells, n_types
        Numbers of cells and of types, ``"type0"``, ….
    n_markers
        Markers that a type has for itself.
    n_shared
        Markers that each pair of neighbouring types, (0, 1), (2, 3), …, has in common.
    n_background
        Genes that are no markers, which hold most of the counts.
    other
        Name of a further class without markers.
    n_batches, n_continuous
        Levels of ``obs["batch"]`` (a covariate from two on) and number of columns ``obs["cov0"]``, ….
    covariate_effect
        Standard deviation of their effects on the log mean of a gene.
    level
        Log mean count of markers, on average, in cells that they do not mark.
    effect
        Range of δ, natural logarithms of fold changes, drawn uniformly.
    proportions
        Shares of the types, `other` last; default equal.
    mean_total, sd_log_size
        Mean total count of a cell, and the standard deviation of the log of its size.
    seed
        Of everything.
    **options
        Of `CellAssign`.

    Returns
    -------
    Simulated
        ``adata`` has ``obs["cell_type"]`` and ``obs["true_size_factor"]``, ``var["marker"]``,
        ``varm["true_effect"]`` (δ, genes × types, NaN where a gene marks nothing) and the markers as a table,
        ``varm["markers"]`` (0/1, `other` left out). ``model`` has the true parameters *and* sites, so that
        ``model.predict(adata, soft=True)`` gives the true posterior probabilities.
    """
    import anndata as ad

    rng = np.random.default_rng(seed)
    markers: dict[str, list[str]] = {
        f"type{c}": [f"type{c}_m{i}" for i in range(n_markers)] for c in range(n_types)
    }
    for c in range(0, n_types - 1, 2):
        for i in range(n_shared):
            for kind in (c, c + 1):
                markers[f"type{kind}"].append(f"shared{c // 2}_m{i}")
    names = list(markers) + ([other] if other is not None else [])
    genes = list(dict.fromkeys(g for names_of in markers.values() for g in names_of))
    shares = np.full(len(names), 1 / len(names)) if proportions is None else np.asarray(proportions, float)
    if len(shares) != len(names) or not np.isclose(shares.sum(), 1):
        raise ValueError(f"proportions are {len(names)} shares that sum to one, not {shares}")
    size = np.exp(rng.normal(-0.5 * sd_log_size**2, sd_log_size, n_cells))
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(n_cells)])
    types = rng.choice(len(names), n_cells, p=shares)
    obs["cell_type"] = pd.Categorical([names[c] for c in types], categories=names)
    obs["true_size_factor"] = size
    keys: dict[str, Any] = {"size_factor_key": "true_size_factor"}
    if n_batches > 1:
        obs["batch"] = [f"batch{i}" for i in rng.integers(0, n_batches, n_cells)]
        keys["batch_key"] = "batch"
    for i in range(n_continuous):
        obs[f"cov{i}"] = rng.normal(size=n_cells)
    if n_continuous:
        keys["continuous_covariate_keys"] = [f"cov{i}" for i in range(n_continuous)]
    design = ad.AnnData(
        sp.csr_matrix(np.ones((n_cells, len(genes)), np.float32)), obs=obs, var=pd.DataFrame(index=genes)
    )
    model = CellAssign.from_anndata(design, markers, other=other, seed=seed, **keys, **options)
    delta = rng.uniform(*effect, len(model.pairs))
    sites = _set_truth(model, rng, delta, shares, level, covariate_effect)
    drawn = from_model(model, fixed={"type": types} | sites, seed=seed)
    background = rng.gamma(0.5, 1.0, n_background)
    background *= mean_total / max(background.sum(), 1e-12)
    noise = rng.poisson(background * size[:, None] * rng.gamma(5.0, 0.2, (n_cells, n_background)))
    adata = ad.AnnData(
        sp.hstack([drawn.X, sp.csr_matrix(noise.astype(np.float32))], format="csr"),
        obs=obs,
        var=pd.DataFrame(index=[*genes, *(f"gene{i}" for i in range(n_background))]),
    )
    adata.var["marker"] = np.arange(adata.n_vars) < len(genes)
    adata.varm["true_effect"] = model.get_marker_effects().reindex(adata.var_names)
    table = pd.DataFrame({kind: adata.var_names.isin(found).astype(int) for kind, found in markers.items()})
    adata.varm["markers"] = table.set_index(adata.var_names)
    return Simulated(adata, model)


def _set_truth(
    model: CellAssign,
    rng: np.random.Generator,
    delta: np.ndarray,
    shares: np.ndarray,
    level: float,
    covariate_effect: float,
) -> dict[str, Any]:
    def normal(shape: Any, scale: float) -> torch.Tensor:
        return torch.as_tensor(rng.normal(size=tuple(shape)) * scale, dtype=torch.float32)

    with torch.no_grad():
        model.level.copy_(normal(model.level.shape, 0.5) + level)
        for parameter in model.effects.parameters():
            parameter.copy_(normal(parameter.shape, covariate_effect))
        if isinstance(model.log_phi, MeanDispersion):
            model.log_phi.largest.fill_(50.0)
            model.log_phi.log_a.copy_(normal(model.log_phi.log_a.shape, 0.3))
        else:
            for parameter in model.log_phi.parameters():
                parameter.copy_(normal(parameter.shape, 0.5) + 0.5)
        loc, scale = torch.tensor(0.0), torch.tensor(1.0)
        log_delta = torch.as_tensor(np.log(delta))
        effect = untruncate_below(log_delta, loc, scale, math.log(model.min_effect)).float()
        guide = model.auto_guide
        assert isinstance(guide, Amortized)
        assert guide.globals is not None
        simplex = torch.distributions.StickBreakingTransform()
        odds = simplex.inv(torch.as_tensor(shares, dtype=torch.float32))
        sites = {"effect_loc": loc, "effect_scale": scale, "effect": effect, "log_odds": odds}
        guide.globals.set(sites)
        return sites
