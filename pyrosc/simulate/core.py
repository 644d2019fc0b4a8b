"""Data with known truth, drawn from a model's own generative process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger

from pyrosc.data.schema import Field
from pyrosc.infer.handlers import Fix, is_deterministic, is_observed
from pyrosc.models import SCVI, Model
from pyrosc.models.scvi import GeneParameter

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


class _Uncondition(Messenger):
    """Draw observed sites anew, but for deterministic ones."""

    def _pyro_sample(self, msg: Any) -> None:
        if is_observed(msg):
            msg["is_observed"], msg["value"] = False, None


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
        Values of latent sites in place of draws from the prior, (n, ...) each.
    seed
        Of the draws; no global generator is touched.
    batch_size
        Cells at a time.

    Returns
    -------
    AnnData
        The cells with new counts in ``X``; per cell, latent sites in ``obsm["true_<site>"]`` and sites as
        wide as the genes in ``layers["true_<site>"]``.
    """
    import anndata as ad

    dataset = model.dataset()
    counts = next(n for n, s in model.registry.fields.items() if s.kind == "counts")
    sizes = dataset.summary(counts).cell_sums if library_size is None else library_size
    sizes = np.broadcast_to(np.asarray(sizes, np.float32), (dataset.n_obs,))
    found: dict[str, list[np.ndarray]] = {}
    was = model.training
    model.eval()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for at, batch in model.batches(dataset, np.arange(dataset.n_obs), batch_size):
            totals = torch.as_tensor(sizes[at], device=model.device)
            width = batch[counts].shape[1]
            batch[counts] = (totals / width).unsqueeze(-1).expand(-1, width)
            given = {k: torch.as_tensor(v[at], dtype=torch.float32) for k, v in (fixed or {}).items()}
            with model.minibatch(batch), Fix(given), _Uncondition():
                trace = poutine.trace(model.model).get_trace(**model.inputs(batch))
            nodes: Mapping[str, Any] = trace.nodes
            for name, site in nodes.items():
                if site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample":
                    value = site["value"]
                    if value.ndim and value.shape[0] == len(at):
                        found.setdefault(name, []).append(value.cpu().numpy())
                    if not is_deterministic(site) and name == counts:
                        found["_counts"] = found[name]
    model.train(was)
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
    return adata


def scvi(
    n_cells: int = 1000,
    n_genes: int = 200,
    *,
    n_latent: int = 5,
    n_types: int = 0,
    n_batches: int = 2,
    n_donors: int = 0,
    n_continuous: int = 0,
    effect: float = 0.5,
    signal: float = 1.0,
    mean_library: float = 2000.0,
    sd_log_library: float = 0.3,
    zero_inflation: float = 0.05,
    seed: int = 0,
    **options: Any,
) -> Simulated:
    """Cells drawn from an SCVI with random decoder weights.

    Parameters
    ----------
    n_cells, n_genes, n_latent
        Sizes.
    n_types
        Cell types, as clusters of z whose mixture has about the prior's variance; 0 draws z from the prior.
    n_batches, n_donors, n_continuous
        Levels of ``obs["batch"]`` and ``obs["donor"]``, and number of continuous columns ``obs["cov0"]``, ….
    effect
        Standard deviation of covariate effects in the decoder's hidden layer.
    signal
        Standard deviation of a gene's log expression over cells, about.
    mean_library, sd_log_library
        Of the log-normal library sizes.
    zero_inflation
        Mean probability of a technical zero; used by the ZINB likelihood.
    seed
        Of everything.
    **options
        Of `SCVI`.

    Returns
    -------
    Simulated
        ``adata.var["inverse_dispersion"]`` and ``adata.obs["true_library"]`` hold the truth too.
    """
    import anndata as ad

    rng = np.random.default_rng(seed)
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(n_cells)])
    obs["batch"] = [f"batch{i}" for i in rng.integers(0, n_batches, n_cells)]
    keys: dict[str, Any] = {"batch_key": "batch"}
    if n_donors:
        obs["donor"] = [f"donor{i}" for i in rng.integers(0, n_donors, n_cells)]
        keys["categorical_covariate_keys"] = ["donor"]
    for i in range(n_continuous):
        obs[f"cov{i}"] = rng.normal(size=n_cells)
    if n_continuous:
        keys["continuous_covariate_keys"] = [f"cov{i}" for i in range(n_continuous)]
    library = np.exp(rng.normal(np.log(mean_library), sd_log_library, n_cells))
    obs["true_library"] = library
    fixed = {}
    if n_types:
        types = rng.integers(0, n_types, n_cells)
        obs["cell_type"] = [f"type{i}" for i in types]
        centres = rng.normal(size=(n_types, n_latent)) * np.sqrt(0.84)
        fixed["z"] = (centres[types] + 0.4 * rng.normal(size=(n_cells, n_latent))).astype(np.float32)
    design = ad.AnnData(
        sp.csr_matrix(np.ones((n_cells, n_genes), np.float32)),
        obs=obs,
        var=pd.DataFrame(index=[f"gene{i}" for i in range(n_genes)]),
    )
    defaults: dict[str, Any] = {"n_hidden": 32, "norm": "none", "dropout_rate": 0.0}
    model = SCVI.from_anndata(design, n_latent=n_latent, seed=seed, **keys, **(defaults | options))
    _set_truth(model, rng, effect, signal, zero_inflation)
    adata = from_model(model, library, fixed=fixed, seed=seed)
    if model.dispersion == "gene":
        adata.var["inverse_dispersion"] = model.log_theta().detach().exp().numpy()
    return Simulated(adata, model)


def _set_truth(model: SCVI, rng: np.random.Generator, effect: float, signal: float, zero: float) -> None:
    def normal(shape: Any, scale: float) -> torch.Tensor:
        return torch.as_tensor(rng.normal(size=tuple(shape)) * scale, dtype=torch.float32)

    with torch.no_grad():
        layers: list[Any] = list(model.decoder.layers)
        first = layers[0]
        first.linear.weight.copy_(normal(first.linear.weight.shape, first.linear.in_features**-0.5 * 1.5))
        first.linear.bias.copy_(normal(first.linear.bias.shape, 0.5))
        for layer in layers:
            for table in layer.effects.tables:
                table.rows.copy_(normal(table.rows.shape, effect))
            if layer.effects.values is not None:
                layer.effects.values.copy_(normal(layer.effects.values.shape, effect))
        head = model.scale_head
        head.weight.copy_(normal(head.weight.shape, signal * (2 / head.in_features) ** 0.5))
        head.bias.copy_(normal(head.bias.shape, 1.0))
        if isinstance(model.log_theta, GeneParameter):
            model.log_theta.values.copy_(normal((len(head.bias),), 1.0) + 0.5)
        if model.zi_head is not None:
            logit = float(np.log(zero / (1 - zero)))
            model.zi_head.weight.zero_()
            model.zi_head.bias.copy_(normal(model.zi_head.bias.shape, 0.5) + logit)


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
