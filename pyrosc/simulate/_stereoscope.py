"""A single-cell reference and spatial spots drawn from Stereoscope, with known proportions."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp

if TYPE_CHECKING:
    from anndata import AnnData


class SimulatedSpots(NamedTuple):
    """Simulated reference and spots.

    Attributes
    ----------
    reference
        Single cells: counts in ``X``, type in ``obs["cell_type"]``; truth in ``varm["true_profile"]``
        (genes × types, softplus(W)) and ``var["true_o"]``.
    spatial
        Spots: counts in ``X``, coordinates in ``obsm["spatial"]``; truth in ``obsm["true_proportions"]``
        (DataFrame, spots × types), ``obs["true_noise_share"]``, ``var["true_beta"]`` (the factor
        softplus(β)) and ``var["true_eta"]``.
    """

    reference: AnnData
    spatial: AnnData


def stereoscope(
    n_cells: int = 600,
    n_spots: int = 400,
    n_genes: int = 200,
    n_types: int = 5,
    *,
    concentration: float = 1.0,
    signal: float = 1.0,
    platform: float = 0.3,
    noise: float = 0.05,
    mean_library: float = 2000.0,
    mean_total: float = 5000.0,
    sd_log_total: float = 0.3,
    seed: int = 0,
) -> SimulatedSpots:
    """Cells and spots drawn from the generative process of Stereoscope.

    Parameters
    ----------
    n_cells, n_spots, n_genes, n_types
        Sizes.
    concentration
        Amounts of the types in a spot are Gamma distributed with this shape: proportions are
        Dirichlet(concentration, …).
    signal
        Standard deviation between types of the log share of a gene.
    platform
        Standard deviation of the log factor by which a gene is captured differently in spots.
    noise
        Mean share of the noise in a spot's counts, exponentially distributed; 0 for none.
    mean_library, mean_total, sd_log_total
        Mean total count of cells and of spots; both are log-normal with this standard deviation.
    seed
        Of everything.

    Returns
    -------
    SimulatedSpots
        Reference and spots, with their truth.

    Examples
    --------
    >>> reference, spatial = stereoscope(50, 20, n_genes=30, n_types=3)
    >>> spatial.obsm["true_proportions"].shape
    (20, 3)
    """
    import anndata as ad

    rng = np.random.default_rng(seed)
    genes, types = [f"gene{i}" for i in range(n_genes)], [f"type{i}" for i in range(n_types)]
    logits = rng.normal(-0.5, 0.5, n_genes)
    share_cg = np.exp(rng.normal(0, 1.0, n_genes) + rng.normal(0, signal, (n_types, n_genes)))
    share_cg /= share_cg.sum(1, keepdims=True)
    total_cg = share_cg / np.exp(logits)  # softplus(W)

    def depths(n: int, mean: float) -> np.ndarray:
        return rng.lognormal(np.log(mean) - sd_log_total**2 / 2, sd_log_total, n)

    codes = np.arange(n_cells) % n_types
    reference = ad.AnnData(
        _counts(rng, depths(n_cells, mean_library)[:, None] * total_cg[codes], logits),
        obs=pd.DataFrame(
            {"cell_type": pd.Categorical(np.array(types)[codes], categories=types)},
            index=[f"cell{i}" for i in range(n_cells)],
        ),
        var=pd.DataFrame({"true_o": logits}, index=genes),
    )
    reference.varm["true_profile"] = total_cg.T

    beta = np.exp(rng.normal(-(platform**2) / 2, platform, n_genes))
    amount_sc = rng.gamma(concentration, size=(n_spots, n_types)) + 1e-12
    true_sc = amount_sc / amount_sc.sum(1, keepdims=True)
    neighbours = np.lexsort((true_sc.max(1), true_sc.argmax(1)))  # spots of one kind lie together
    amount_sc, true_sc = amount_sc[neighbours], true_sc[neighbours]
    eta = rng.normal(size=n_genes)
    background = np.log1p(np.exp(eta))
    noise_share = np.minimum(rng.exponential(noise, n_spots), 0.9) if noise else np.zeros(n_spots)
    depth = depths(n_spots, mean_total)
    own_sg = true_sc @ (total_cg * beta)
    own_sg *= ((1 - noise_share) * depth / (own_sg @ np.exp(logits)))[:, None]
    rest_sg = np.outer(noise_share * depth, background / (background @ np.exp(logits)))
    spatial = ad.AnnData(
        _counts(rng, own_sg + rest_sg, logits),
        obs=pd.DataFrame({"true_noise_share": noise_share}, index=[f"spot{i}" for i in range(n_spots)]),
        var=pd.DataFrame({"true_beta": beta, "true_eta": eta}, index=genes),
    )
    spatial.obsm["true_proportions"] = pd.DataFrame(true_sc, index=spatial.obs_names, columns=types)
    side = int(np.ceil(np.sqrt(n_spots)))
    spatial.obsm["spatial"] = np.stack(np.divmod(np.arange(n_spots), side), 1).astype(float)
    return SimulatedSpots(reference, spatial)


def _counts(rng: np.random.Generator, total: np.ndarray, logits: np.ndarray) -> sp.csr_matrix:
    """NB(total, logits); a cell without any count gets one, in its likeliest gene."""
    rate = rng.gamma(total, np.exp(logits))
    counts = rng.poisson(rate)
    empty = np.flatnonzero(counts.sum(1) == 0)
    counts[empty, total[empty].argmax(1)] = 1
    return sp.csr_matrix(counts.astype(np.float32))
