"""Data with known truth, drawn from a model's own generative process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from pyrosc.data.schema import Field
from pyrosc.infer.handlers import is_deterministic, is_latent, is_local
from pyrosc.infer.modes import evaluating
from pyrosc.infer.predictive import prior_trace
from pyrosc.models.base import Model

if TYPE_CHECKING:
    from anndata import AnnData


class Simulated(NamedTuple):
    """Simulated cells and the model that they were drawn from.

    Attributes
    ----------
    adata
        Counts in ``X``; truth in ``obsm["true_<site>"]``, ``layers["true_<site>"]``, ``obs`` and ``var``.
    model
        The model with the true parameters; its guide is not trained.
    """

    adata: AnnData
    model: Model


def from_model(
    model: Model,
    library_size: np.ndarray | float | None = None,
    *,
    fixed: Mapping[str, np.ndarray] | None = None,
    seed: int = 0,
    batch_size: int = 512,
) -> AnnData:
    """Replace the counts of a model's cells by draws from its prior.

    Parameters
    ----------
    model
        Any model of one data source; its registered cells give covariates and, where `library_size` is
        None, library sizes.
    library_size
        Total per cell that the model is told, (n,) or one for all.
    fixed
        Values of latent sites in place of draws from the prior: (n, ...) of sites per cell, whole of global
        ones.
    seed
        Of the draws; no global generator is touched.
    batch_size
        Cells at a time.

    Returns
    -------
    AnnData
        The cells with new counts in ``X``; per cell, latent sites in ``obsm["true_<site>"]`` and sites as
        wide as the genes in ``layers["true_<site>"]``. Global sites, drawn once, are in
        ``var["true_<site>"]`` or ``varm`` where they have an axis of genes, else in ``uns``.
    """
    import anndata as ad

    dataset = model.dataset()
    counts = next(n for n, s in model.registry.fields.items() if s.kind == "counts")
    sizes = dataset.summary(counts).cell_sums if library_size is None else library_size
    sizes = np.broadcast_to(np.asarray(sizes, np.float32), (dataset.n_obs,))
    found: dict[str, list[np.ndarray]] = {}
    shared: dict[str, torch.Tensor] = {}
    for name in model.latent_sites(local=False):
        if fixed is not None and name in fixed:
            shared[name] = _tensor(fixed[name], model.device)
    own = {k: v for k, v in (fixed or {}).items() if k not in shared}
    with evaluating(model, seed), torch.no_grad():
        for at, batch in model.batches(dataset, np.arange(dataset.n_obs), batch_size):
            totals = torch.as_tensor(sizes[at], device=model.device)
            width = batch[counts].shape[1]
            batch[counts] = (totals / width).unsqueeze(-1).expand(-1, width)
            given = {k: _tensor(v[at], model.device) for k, v in own.items()}
            nodes: Mapping[str, Any] = prior_trace(model, batch, given | shared).nodes
            for name, site in nodes.items():
                if site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample":
                    value = site["value"]
                    if not is_local(site):
                        if is_latent(site):
                            shared[name] = value
                    elif value.ndim and value.shape[0] == len(at):
                        found.setdefault(name, []).append(value.cpu().numpy())
                    if not is_deterministic(site) and name == counts:
                        found["_counts"] = found[name]
    values = {k: np.concatenate(v) for k, v in found.items()}
    source = dataset.data
    adata = ad.AnnData(
        sp.csr_matrix(values.pop("_counts", values[counts])),
        obs=source.obs.copy(),
        var=pd.DataFrame(index=list(model.registry.var_names())),
    )
    for name, value in values.items():
        if name == counts:
            continue
        if value.ndim == 2 and value.shape[1] == adata.n_vars:
            adata.layers[f"true_{name}"] = value
        elif value.ndim <= 2:
            adata.obsm[f"true_{name}"] = value.reshape(len(value), -1)
    for name, tensor in shared.items():
        _write_global(adata, f"true_{name}", tensor.cpu().numpy())
    return adata


def _write_global(adata: AnnData, key: str, value: np.ndarray) -> None:
    if value.shape == (adata.n_vars,):
        adata.var[key] = value
    elif value.ndim == 2 and adata.n_vars in value.shape:
        adata.varm[key] = value if value.shape[0] == adata.n_vars else value.T
    else:
        adata.uns[key] = value


def _tensor(values: Any, device: torch.device) -> torch.Tensor:
    """As single precision, but for whole numbers: codes of discrete sites."""
    value = torch.as_tensor(np.asarray(values), device=device)
    return value.float() if value.is_floating_point() else value.long()


def design_for(
    fields: Mapping[str, Field], n_cells: int = 60, n_genes: int = 24, *, n_categories: int = 3, seed: int = 0
) -> tuple[AnnData, dict[str, Any]]:
    """A made-up AnnData that has everything a model's fields ask for, and the keywords that name it.

    Parameters
    ----------
    fields
        Fields of one source, by argument name (``Model.fields()``).
    n_cells, n_genes, n_categories
        Sizes.
    seed
        Of the counts and columns.
    """
    import anndata as ad

    rng = np.random.default_rng(seed)
    profile = rng.gamma(1.0, 1.0, (n_categories, n_genes))
    kind = np.arange(n_cells) % n_categories
    counts = rng.poisson(profile[kind] * rng.lognormal(1.0, 0.3, (n_cells, 1))) + (np.arange(n_genes) == 0)
    adata = ad.AnnData(
        sp.csr_matrix(counts.astype(np.float32)),
        obs=pd.DataFrame(index=[f"cell{i}" for i in range(n_cells)]),
        var=pd.DataFrame(index=[f"gene{i}" for i in range(n_genes)]),
    )
    keys: dict[str, Any] = {}
    for name, field in fields.items():
        if field.kind in ("counts", "index", "mask") or field.keyword is None:
            continue
        if field.kind in ("categorical", "labels", "categoricals"):
            adata.obs[name] = pd.Categorical([f"{name}{i}" for i in rng.permutation(kind)])
        elif field.kind in ("continuous", "continuouses"):
            adata.obs[name] = rng.normal(size=n_cells)
        elif field.kind == "size_factor":
            continue  # optional, and it changes what a model is
        elif field.kind in ("protein", "values"):
            adata.obsm[name] = rng.poisson(5.0, (n_cells, 6)).astype(np.float32)
        keys[field.keyword] = [name] if field.several else name
    return adata, keys
