"""Cells drawn from an AUTOZI, in which known genes are zero-inflated."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from pyrosc.models import AUTOZI
from pyrosc.simulate._scvi import draw, set_decoder
from pyrosc.simulate.core import Simulated


def autozi(
    n_cells: int = 1000,
    n_genes: int = 200,
    *,
    share: float = 0.5,
    zero_inflation: float = 0.3,
    per: Literal["gene", "gene-batch", "gene-label"] = "gene",
    effect: float = 0.5,
    signal: float = 1.0,
    seed: int = 0,
    **options: Any,
) -> Simulated:
    """Cells drawn from an AUTOZI in which a share of the genes is zero-inflated.

    Parameters
    ----------
    n_cells, n_genes
        Sizes.
    share
        Probability that a gene (in a batch, or of a label) is zero-inflated.
    zero_inflation
        Mean probability of an extra zero where there are some.
    per
        What is zero-inflated or not, the option `zero_inflation` of the model. Labels need ``n_types=``.
    effect, signal
        As in `pyrosc.simulate.scvi`.
    seed
        Of everything.
    **options
        Of `pyrosc.simulate.scvi` (``n_types=``, ``n_batches=``, ``mean_library=``, …) and of `AUTOZI`.

    Returns
    -------
    Simulated
        ``adata.var["true_delta"]`` is 0 for genes with extra zeros and 1 for others; per category it is
        ``adata.varm["true_delta"]``, (g, categories).
    """

    def truth(model: AUTOZI, rng: np.random.Generator) -> dict[str, np.ndarray]:
        set_decoder(model, rng, effect, signal, zero_inflation)
        shape = tuple(model.concentrations()[0].shape)
        return {"delta": (rng.random(shape) >= share).astype(np.float32)}

    return draw(AUTOZI, truth, n_cells, n_genes, zero_inflation=per, seed=seed, **options)
