"""What is asked of models of chromatin accessibility, under the names that the field uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from pyrosc.data.errors import listed
from pyrosc.data.inputs import as_if, as_rows, encode_do
from pyrosc.infer.posterior import stream
from pyrosc.infer.structure import need_site
from pyrosc.tools.de import differential_expression

if TYPE_CHECKING:
    from anndata import AnnData

Indices = Sequence[int] | np.ndarray | None

#: Values of a minibatch of accessibilities, which a decoder holds several times over: 16 MB each.
_AT_ONCE = 2**22


class Accessibility:
    """Methods of models whose `expression` site is the accessibility of regions.

    Cell factors are those of a site ``cell_factor`` per cell, region factors those of
    ``log_region_factors()``. Arguments common to all are those of `pyrosc.models.results.Results`.
    """

    def get_normalized_accessibility(
        self: Any,
        adata: AnnData | None = None,
        indices: Indices = None,
        *,
        transform_batch: str | Sequence[str] | None = None,
        region_list: Sequence[str] | None = None,
        normalize_cells: bool = False,
        normalize_regions: bool = False,
        threshold: float | None = None,
        n_samples: int = 0,
        as_numpy: bool = False,
        do: Mapping[str, Any] | None = None,
        batch_size: int = 512,
        seed: int = 0,
    ) -> pd.DataFrame | np.ndarray | sp.csr_matrix:
        """Accessibility of regions in cells, without the depth of the cell and the bias of the region.

        Parameters
        ----------
        adata, indices, batch_size, seed
            Other cells, rows, cells at a time at most, and seed of the draws.
        transform_batch
            Decode the cells as if of this batch; several are averaged.
        region_list
            Regions wanted, in this order; default all.
        normalize_cells
            Multiply by the cell factors: closer to the data, with the cells' depths in it.
        normalize_regions
            Multiply by the region factors: closer to the data, with the regions' biases in it.
        threshold
            Values below it are left out, and the others come as a sparse matrix; for many regions, since
            a matrix of all values is never held. Default: all values.
        n_samples
            Draws from the posterior to average over; 0 decodes its mean.
        as_numpy
            An array in place of a DataFrame; without `threshold`.
        do
            Further what-if values, as in `posterior`.

        Returns
        -------
        pandas.DataFrame, numpy.ndarray or scipy.sparse.csr_matrix
            (n, g) cells by regions, float32; with `threshold` CSR.

        Raises
        ------
        KeyError
            For a region, or a site, that the model does not have.
        """
        need_site(self, self.expression, "accessibility", "expression")
        if normalize_cells:
            need_site(self, "cell_factor", "the factors of cells", None)
        if threshold is not None and not threshold > 0:
            raise ValueError(f"threshold is the least value kept, above 0; not {threshold}")
        names, positions = _regions(self, region_list)
        worlds = as_if(transform_batch, do)
        dataset = self.dataset(adata)
        rows = as_rows(indices, dataset)
        size = max(1, min(batch_size, _AT_ONCE // self.registry.n_vars()))
        factors = self.get_region_factors().to_numpy()[positions] if normalize_regions else None
        sites = [self.expression, *(["cell_factor"] if normalize_cells else [])]
        least = 0.0 if threshold is None else threshold
        out = np.zeros((len(rows), len(names)), np.float32) if threshold is None else None
        blocks: list[sp.csr_matrix] = []
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            total = np.zeros((len(part), len(names)), np.float32)
            for what_if in worlds:
                values = stream(
                    self,
                    sites,
                    self.batches(dataset, part, size),
                    n_samples=n_samples,
                    do=encode_do(self.registry, what_if, len(part)),
                    seed=seed + first,
                )
                for at, found in values:
                    value = found[self.expression][0][..., positions]
                    if normalize_cells:
                        value = value * found["cell_factor"][0].reshape(-1, 1)
                    total[at] += value.cpu().numpy() / len(worlds)
            if factors is not None:
                total *= factors
            if out is not None:
                out[first : first + len(part)] = total
            else:
                total[total < least] = 0
                blocks.append(sp.csr_matrix(total))
        if out is None:
            empty = sp.csr_matrix((0, len(names)), dtype=np.float32)
            return sp.vstack([empty, *blocks], format="csr")
        if as_numpy:
            return out
        return pd.DataFrame(out, index=dataset.obs_names[rows], columns=names)

    def get_library_size_factors(
        self: Any, adata: AnnData | None = None, indices: Indices = None, *, batch_size: int = 512
    ) -> np.ndarray:
        """Factor of each cell, (n,): how much of what is open in it was seen."""
        need_site(self, "cell_factor", "the factors of cells", None)
        found = self.posterior("cell_factor", adata=adata, indices=indices, batch_size=batch_size)
        return found["cell_factor"].reshape(-1)

    def get_region_factors(self: Any) -> pd.Series:
        """Factor of each region, (g,): how much of it is seen where it is open."""
        values = self.log_region_factors().detach().exp().cpu().numpy()
        index = pd.Index(list(self.registry.var_names()), name="region")
        return pd.Series(values, index=index, name="region_factor")

    def differential_accessibility(
        self: Any, adata: AnnData | None = None, indices: Indices = None, **options: Any
    ) -> pd.DataFrame:
        """Regions whose mean accessibility differs between groups of cells.

        `pyrosc.differential_expression` of the accessibility site, on the model's scale: the difference of
        accessibility probabilities, δ = .05, or for the Poisson law the log2-fold change of accessibilities.

        Parameters
        ----------
        adata, indices
            Other cells, and the cells that take part.
        **options
            Of `pyrosc.differential_expression`.

        Returns
        -------
        pandas.DataFrame
            As of `pyrosc.differential_expression`, by region: ``is_da_fdr`` and ``proba_da`` for calls and
            probabilities; ``effect_mean``, ``effect_median``, ``effect_std``, ``effect_lower``,
            ``effect_upper``, ``effect_unshrunken`` of group 1 less group 2; ``est_prob1``, ``est_prob2``,
            mean accessibilities; ``emp_prob1``, ``emp_prob2``, shares of cells in which the region was seen,
            and ``emp_effect``, their difference.
        """
        table = differential_expression(self, adata, indices, **options)
        scale = table.attrs["differential_expression"]["effect"]
        columns = {
            "is_de_fdr": "is_da_fdr",
            "proba_de": "proba_da",
            "scale1": "est_prob1",
            "scale2": "est_prob2",
            "non_zeros_proportion1": "emp_prob1",
            "non_zeros_proportion2": "emp_prob2",
        } | {c: str(c).replace(f"{scale}_", "effect_") for c in table if str(c).startswith(f"{scale}_")}
        table = table.rename(columns=columns).rename_axis("region")
        at = list(table).index("emp_prob2") + 1
        table.insert(at, "emp_effect", table["emp_prob1"] - table["emp_prob2"])
        if scale == "difference":  # observed over expected counts may lift a probability above 1 a little
            table[["est_prob1", "est_prob2"]] = table[["est_prob1", "est_prob2"]].clip(upper=1)
        return table


def _regions(model: Any, wanted: Sequence[str] | None) -> tuple[list[str], Any]:
    names = list(model.registry.var_names())
    if wanted is None:
        return names, slice(None)
    if isinstance(wanted, str):
        raise TypeError(f"region_list takes a list of regions; write ['{wanted}']")
    order = {n: i for i, n in enumerate(names)}
    if absent := [r for r in wanted if r not in order]:
        raise KeyError(f"{type(model).__name__} has no regions {listed(absent)}")
    return list(wanted), np.array([order[r] for r in wanted], np.int64)
