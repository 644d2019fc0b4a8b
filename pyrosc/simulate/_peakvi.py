"""Cells drawn from a PEAKVI with known accessibility."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from pyrosc.models import PEAKVI
from pyrosc.simulate._scvi import normal, set_effects
from pyrosc.simulate.core import Simulated


def peakvi(
    n_cells: int = 1000,
    n_regions: int = 400,
    *,
    n_latent: int = 4,
    n_types: int = 0,
    n_batches: int = 2,
    effect: float = 0.3,
    signal: float = 1.5,
    open_share: float = 0.4,
    depth: float = 0.5,
    concentration: float = 5.0,
    reads: bool = False,
    seed: int = 0,
    **options: Any,
) -> Simulated:
    """Cells drawn from a PEAKVI with random decoder weights, and cell factors drawn apart from its network.

    Parameters
    ----------
    n_cells, n_regions, n_latent
        Sizes.
    n_types
        Cell types, as clusters of z whose mixture has about the prior's variance; 0 draws z from the prior.
    n_batches
        Levels of ``obs["batch"]``.
    effect
        Standard deviation of batch effects in the decoder's hidden layers.
    signal
        Standard deviation of the logits of a region's accessibility over cells, about.
    open_share
        Accessibility of a typical region, in (0, 1).
    depth
        Mean of the cell factors, in (0, 1); of the Poisson law the mean number of fragments is this times the
        number of regions.
    concentration
        Of the beta-binomial law, in every region; large for the binomial law.
    reads
        Give reads: two per fragment.
    seed
        Of everything.
    **options
        Of `PEAKVI` (``likelihood=``, ``copies=``, …).

    Returns
    -------
    Simulated
        ``layers["true_p"]`` holds accessibility, ``obs["true_cell_factor"]`` and
        ``var["true_region_factor"]`` the factors, ``obsm["true_z"]`` the latent space.
    """
    import anndata as ad

    if not 0 < open_share < 1 or not 0 < depth < 1:
        raise ValueError(f"open_share and depth are in (0, 1); not {open_share} and {depth}")
    rng = np.random.default_rng(seed)
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(n_cells)])
    obs["batch"] = [f"batch{i}" for i in rng.integers(0, n_batches, n_cells)]
    z = rng.normal(size=(n_cells, n_latent))
    if n_types:
        types = rng.integers(0, n_types, n_cells)
        obs["cell_type"] = [f"type{i}" for i in types]
        centres = rng.normal(size=(n_types, n_latent)) * np.sqrt(0.84)
        z = centres[types] + 0.4 * z
    design = ad.AnnData(
        sp.csr_matrix(np.ones((n_cells, n_regions), np.float32)),
        obs=obs,
        var=pd.DataFrame(index=[f"region{i}" for i in range(n_regions)]),
    )
    defaults: dict[str, Any] = {"n_hidden": 32, "n_latent": n_latent, "norm": "none", "dropout_rate": 0.0}
    keys: dict[str, Any] = {"batch_key": "batch"} if n_batches > 1 else {}
    made = PEAKVI.from_anndata(design, counts="fragments", seed=seed, **keys, **(defaults | options))
    d: Any = rng.beta(20 * depth, 20 * (1 - depth), n_cells) if made.factor is not None else np.ones(n_cells)
    with torch.no_grad():
        _set_decoder(made, rng, effect, signal, open_share)
        if made.log_concentration is not None:
            made.log_concentration.values.fill_(float(np.log(concentration)))
        if made.likelihood == "poisson":
            d = rng.poisson(depth * n_regions * rng.lognormal(0, 0.3, n_cells)) + 1.0
        codes = torch.as_tensor(design.obs["batch"].str.removeprefix("batch").astype(int).to_numpy())
        counts, p = _draw(made, torch.as_tensor(z, dtype=torch.float32), codes, d, seed)
    adata = ad.AnnData(sp.csr_matrix((2 if reads else 1) * counts), obs=obs, var=design.var.copy())
    adata.layers["true_p"] = p
    adata.obsm["true_z"] = z.astype(np.float32)
    adata.obs["true_cell_factor"] = d
    adata.var["true_region_factor"] = made.get_region_factors().to_numpy()
    return Simulated(adata, made)


def _set_decoder(model: PEAKVI, rng: np.random.Generator, effect: float, signal: float, share: float) -> None:
    """Random weights of the decoder, and region factors."""
    layers: list[Any] = list(model.decoder.layers)
    for layer in layers:
        layer.linear.weight.copy_(normal(rng, layer.linear.weight, 1.5 * layer.linear.in_features**-0.5))
        layer.linear.bias.copy_(normal(rng, layer.linear.bias, 0.3))
        set_effects(layer.effects, rng, effect)
    head = model.head
    head.weight.copy_(normal(rng, head.weight, signal * (2 / head.in_features) ** 0.5))
    head.bias.copy_(normal(rng, head.bias, 0.5) + float(np.log(share / (1 - share))))
    if model.region is not None:
        model.region.values.copy_(normal(rng, model.region.values, 0.7) + 1.0)


def _draw(
    model: PEAKVI, z: torch.Tensor, codes: torch.Tensor, d: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Counts and accessibilities, 512 cells at a time."""
    counts, accessibilities = [], []
    given = model.registry.given("batch")
    log_r = model.log_region_factors()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(z), 512):
            at = slice(start, start + 512)
            batch = codes[at] if given else torch.zeros_like(codes[at])
            empty = torch.zeros(len(batch), 0)
            covariates = model.spec.pack(
                {"batch": batch, "categorical_covariates": empty.long(), "continuous_covariates": empty}
            )
            logits = model.head(model.decoder(z[at], covariates))
            log_d = torch.as_tensor(np.log(d[at]), dtype=torch.float32).unsqueeze(-1)
            _, law = model.law(torch.zeros_like(logits), logits, log_d, log_r)
            counts.append(law.sample().numpy())
            accessibilities.append(model.accessibility(logits, log_r).numpy())
    return np.concatenate(counts).astype(np.float32), np.concatenate(accessibilities)
