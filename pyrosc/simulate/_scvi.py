"""Cells drawn from an SCVI, or a variant of it, with known parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from pyrosc.models import SCVI
from pyrosc.models.scvi import GeneParameter
from pyrosc.nn import CovariateEffects
from pyrosc.simulate.core import Simulated, from_model


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

    def truth(model: SCVI, rng: np.random.Generator) -> dict[str, np.ndarray]:
        set_decoder(model, rng, effect, signal, zero_inflation)
        return {}

    return draw(
        SCVI,
        truth,
        n_cells,
        n_genes,
        n_latent=n_latent,
        n_types=n_types,
        n_batches=n_batches,
        n_donors=n_donors,
        n_continuous=n_continuous,
        mean_library=mean_library,
        sd_log_library=sd_log_library,
        seed=seed,
        **options,
    )


def draw(
    cls: type[SCVI],
    truth: Callable[[Any, np.random.Generator], Mapping[str, np.ndarray]],
    n_cells: int,
    n_genes: int,
    *,
    n_latent: int = 5,
    n_types: int = 0,
    n_batches: int = 2,
    n_donors: int = 0,
    n_continuous: int = 0,
    mean_library: float = 2000.0,
    sd_log_library: float = 0.3,
    seed: int = 0,
    design: Callable[[Any], Mapping[str, Any]] | None = None,
    **options: Any,
) -> Simulated:
    """Cells drawn from a variant of SCVI; `scvi` says what the arguments mean.

    Parameters
    ----------
    cls
        The model's class.
    truth
        Sets the model's parameters, and returns the values of its global sites.
    design
        Adds to the AnnData that the model is made with, and returns the keywords that name what it added.
    """
    import anndata as ad

    rng = np.random.default_rng(seed)
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(n_cells)])
    obs["batch"] = [f"batch{i}" for i in rng.integers(0, n_batches, n_cells)]
    keys: dict[str, Any] = {"batch_key": "batch"} if n_batches > 1 else {}
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
        keys["labels_key"] = "cell_type"
        centres = rng.normal(size=(n_types, n_latent)) * np.sqrt(0.84)
        fixed["z"] = (centres[types] + 0.4 * rng.normal(size=(n_cells, n_latent))).astype(np.float32)
    blank = ad.AnnData(
        sp.csr_matrix(np.ones((n_cells, n_genes), np.float32)),
        obs=obs,
        var=pd.DataFrame(index=[f"gene{i}" for i in range(n_genes)]),
    )
    if design is not None:
        keys |= design(blank)
    defaults: dict[str, Any] = {"n_hidden": 32, "norm": "none", "dropout_rate": 0.0}
    model = cls.from_anndata(blank, n_latent=n_latent, seed=seed, **keys, **(defaults | options))
    fixed |= truth(model, rng)
    if not model.observed_library:
        fixed["library"] = np.log(library).astype(np.float32)
        prior = torch.tensor([float(np.log(mean_library)), sd_log_library**2])
        model.library_prior.rows.copy_(prior.expand_as(model.library_prior.rows))
    adata = from_model(model, library, fixed=fixed, seed=seed)
    if model.dispersion == "gene":
        adata.var["inverse_dispersion"] = model.log_theta().detach().exp().numpy()
    return Simulated(adata, model)


def set_decoder(model: SCVI, rng: np.random.Generator, effect: float, signal: float, zero: float) -> None:
    """Random weights of SCVI's decoder."""
    with torch.no_grad():
        network: Any = getattr(model.decoder, "network", model.decoder)
        layers: list[Any] = list(network.layers)
        first = layers[0]
        first.linear.weight.copy_(normal(rng, first.linear.weight, first.linear.in_features**-0.5 * 1.5))
        first.linear.bias.copy_(normal(rng, first.linear.bias, 0.5))
        for layer in layers:
            set_effects(layer.effects, rng, effect)
        head = model.scale_head
        head.weight.copy_(normal(rng, head.weight, signal * (2 / head.in_features) ** 0.5))
        set_genes(model, rng)
        if model.zi_head is not None:
            model.zi_head.weight.zero_()
            set_zeros(model, rng, zero)


def set_effects(effects: CovariateEffects, rng: np.random.Generator, effect: float) -> None:
    """Random rows of covariates."""
    for table in effects.tables:
        rows: Any = table.rows
        rows.copy_(normal(rng, rows, effect))
    if effects.values is not None:
        effects.values.copy_(normal(rng, effects.values, effect))


def set_genes(model: SCVI, rng: np.random.Generator) -> None:
    """Random intercepts and inverse dispersions."""
    bias = model.scale_head.bias
    bias.copy_(normal(rng, bias, 1.0))
    if isinstance(model.log_theta, GeneParameter):
        model.log_theta.values.copy_(normal(rng, bias, 1.0) + 0.5)


def set_zeros(model: SCVI, rng: np.random.Generator, zero: float) -> None:
    """Random logits of zero inflation, the same in all cells."""
    bias = model.zi_head.bias  # type: ignore[union-attr]
    bias.copy_(normal(rng, bias, 0.5) + float(np.log(zero / (1 - zero))))


def normal(rng: np.random.Generator, like: torch.Tensor, scale: float) -> torch.Tensor:
    """Normal numbers in the shape of a tensor."""
    return torch.as_tensor(rng.normal(size=tuple(like.shape)) * scale, dtype=torch.float32)
