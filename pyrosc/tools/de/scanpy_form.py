"""The table in the form of scanpy's rank_genes_groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from pyrosc.data.errors import DataError, listed
from pyrosc.tools.de.effects import q_values
from pyrosc.tools.de.table import scale_of, sure

if TYPE_CHECKING:
    from anndata import AnnData


def rank_genes_groups(adata: AnnData, de: pd.DataFrame, key_added: str = "rank_genes_groups") -> AnnData:
    """Write a table of differential expression as ``sc.tl.rank_genes_groups`` would.

    Then ``sc.pl.rank_genes_groups``, ``sc.pl.rank_genes_groups_dotplot``, ``sc.get.rank_genes_groups_df`` and
    what else reads that form work.

    Parameters
    ----------
    adata
        Where to write: ``uns[key_added]``, and nothing else.
    de
        What `differential_expression` returned, with one comparison per first group: of a table made with
        ``within=``, the rows of one stratum.
    key_added
        Key in ``uns``.

    Returns
    -------
    AnnData
        `adata`. Per group, genes by decreasing ``scores``: the end of the LFC's credible interval nearer to
        zero (0 where the interval holds it, then by the probabilities of a rise and of a fall).
        ``logfoldchanges``: posterior means; ``pvals``: 1 − proba_de, the posterior error probability;
        ``pvals_adj``: the expected FDR of the smallest set with the gene, 1 for genes that are not
        expressed; ``pts``, ``pts_rest``: shares of cells with counts.

    Raises
    ------
    DataError
        If the table has several comparisons of one group, or genes that `adata` lacks.
    """
    notes = de.attrs.get("differential_expression", {})
    scale_of(de)  # says so if the table is another
    names = _groups(de)
    absent = de.index.unique().difference(adata.var_names)
    if len(absent):
        raise DataError(f"adata has no genes {listed(absent)}; give the AnnData that the model was made with")
    columns: dict[str, dict[str, np.ndarray]] = {
        k: {} for k in ("names", "scores", "pvals", "pvals_adj", "logfoldchanges")
    }
    genes = de.index.unique()
    shares = {"pts": pd.DataFrame(index=genes), "pts_rest": pd.DataFrame(index=genes)}
    for name in names:
        table = de[de["group1"] == name]
        p = table["proba_de"].to_numpy()
        score = sure(table)
        gated = table["is_expressed"].to_numpy()
        effect = table[f"{scale_of(table).name}_mean"].to_numpy()
        signed = (table["proba_larger"] - table["proba_smaller"]).to_numpy()
        order = np.lexsort((-effect, -signed, -np.where(gated, score, 0.0)))
        values = {
            "names": table.index.to_numpy(object),
            "scores": score.astype(np.float32),
            "pvals": 1 - p,
            "pvals_adj": q_values(p, gated),
            "logfoldchanges": effect.astype(np.float32),
        }
        for k, v in values.items():
            columns[k][name] = v[order]
        shares["pts"][name] = table["non_zeros_proportion1"].reindex(genes)
        shares["pts_rest"][name] = table["non_zeros_proportion2"].reindex(genes)
    reference = de["group2"].unique()
    adata.uns[key_added] = {
        "params": {
            "groupby": notes.get("groupby") or "",
            "reference": str(reference[0]),
            "method": "pyrosc",
            "use_raw": False,
            "layer": None,
            "corr_method": "expected FDR",
        },
        **{k: _records(v) for k, v in columns.items()},
        **shares,
    }
    return adata


def _groups(de: pd.DataFrame) -> list[str]:
    pairs = de[["comparison", "group1"]].drop_duplicates()
    if pairs["group1"].duplicated().any():
        raise DataError(
            "the table has several comparisons of one group "
            f"({listed(pairs['comparison'])}); pick one per group, as de[de['within'] == '…']"
        )
    if len(found := de["group2"].unique()) > 1:
        raise DataError(f"the groups are compared with several others: {listed(found)}; pick one")
    return list(pairs["group1"])


def _records(columns: dict[str, np.ndarray]) -> np.recarray:
    """A field per group, as scanpy keeps them."""
    lengths: Sequence[int] = [len(v) for v in columns.values()]
    kinds = [(name, "O" if v.dtype == object else v.dtype) for name, v in columns.items()]
    out = np.recarray((max(lengths),), dtype=kinds)
    for name, values in columns.items():
        out[name] = values
    return out
