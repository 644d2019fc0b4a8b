"""Small synthetic data for tests."""

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp


def make_adata(n: int = 200, g: int = 40, seed: int = 0) -> ad.AnnData:
    """Negative binomial counts of `n` cells and `g` genes with labels, batches, a donor and two covariates.

    Labels and batches change the expected proportions of the genes, so there is something to find and
    something to correct. No cell and no gene is empty, and every category occurs in at least two cells.

    Returns
    -------
    AnnData
        ``X``: counts, CSR float32; ``layers["counts"]``: a copy of it.
        ``obs``: ``batch`` (2), ``label`` (3), ``donor`` (3), ``age`` and ``stress`` (continuous).
        ``obsm["truth"]``: the expected proportions, n × g.
    """
    if n < 12:
        raise ValueError("make_adata needs n >= 12, for two cells of each category")
    rng = np.random.default_rng(seed)

    def codes(k: int) -> np.ndarray:
        return rng.permutation(np.arange(n) % k)

    batch, label, donor = codes(2), codes(3), codes(3)
    log_rate_ng = (
        rng.normal(0.0, 0.7, g)
        + rng.normal(0.0, 1.0, (3, g))[label]
        + rng.normal(0.0, 0.5, (2, g))[batch]
        + rng.normal(0.0, 0.2, (3, g))[donor]
    )
    rho_ng = np.exp(log_rate_ng)
    rho_ng /= rho_ng.sum(1, keepdims=True)
    library_n = rng.lognormal(np.log(5.0 * g), 0.3, n)
    theta = 2.0  # inverse dispersion
    x_ng = rng.poisson(rng.gamma(theta, library_n[:, None] * rho_ng / theta)).astype(np.float32)
    x_ng[x_ng.sum(1) == 0, 0] = 1.0
    x_ng[0, x_ng.sum(0) == 0] = 1.0

    obs = pd.DataFrame(
        {
            "batch": pd.Categorical.from_codes(batch, categories=["batch_0", "batch_1"]),
            "label": pd.Categorical.from_codes(label, categories=["B", "NK", "T"]),
            "donor": pd.Categorical.from_codes(donor, categories=["d0", "d1", "d2"]),
            "age": rng.normal(0.0, 1.0, n).astype(np.float32),
            "stress": rng.uniform(0.0, 1.0, n).astype(np.float32),
        },
        index=[f"cell_{i}" for i in range(n)],
    )
    x = sp.csr_matrix(x_ng)
    adata = ad.AnnData(x, obs=obs, var=pd.DataFrame(index=[f"gene_{j}" for j in range(g)]))
    adata.layers["counts"] = x.copy()
    adata.obsm["truth"] = rho_ng.astype(np.float32)
    return adata
