"""Is biology kept while batches are mixed?"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pyrosc.data import encode as enc
from pyrosc.data.errors import DataError, listed

if TYPE_CHECKING:
    from anndata import AnnData

_PARTS = {"Total": "total", "Bio conservation": "bio", "Batch correction": "batch"}
_REFERENCE = "_not_integrated"


def has_scib() -> bool:
    """Whether scib-metrics is installed."""
    return importlib.util.find_spec("scib_metrics") is not None


def integration_metrics(
    adata: AnnData,
    batch_key: str,
    labels_key: str,
    embeddings: Sequence[str] | Mapping[str, np.ndarray],
    *,
    reference: str | None = None,
    layer: str | None = None,
    max_cells: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Scores of embeddings by scib-metrics: how well batches are mixed and cell types kept apart.

    Parameters
    ----------
    adata
        Cells; never changed. Those without a label or batch are left out.
    batch_key, labels_key
        Columns of obs.
    embeddings
        Keys of obsm, or arrays (n, k) by name; compared side by side.
    reference
        Key of obsm with an embedding that is not integrated, which one metric compares with. Default: the
        principal components of the log-normalised counts.
    layer
        Layer with the counts that `reference` is made from; default X.
    max_cells
        Of more cells than this, as many are drawn at random; None for all.
    seed
        Of that choice and of the principal components.

    Returns
    -------
    pandas.DataFrame
        A row per embedding and metric: ``embedding``, ``metric``, ``part`` (``"bio"``, ``"batch"`` or
        ``"total"``) and ``score`` in [0, 1], higher is better. The metrics ``"total"`` (0.6 bio + 0.4
        batch), ``"bio"`` and ``"batch"`` are the means.

    Raises
    ------
    ImportError
        If scib-metrics is not installed: ``pip install pyrosc[bench]``.
    DataError
        If a column or embedding is missing, or there are fewer than two batches or labels.

    References
    ----------
    Luecken, Büttner, Chaichoompu, … Theis (2022). Benchmarking atlas-level data integration in single-cell
    genomics. *Nature Methods* 19, 41–50.
    """
    if not has_scib():
        raise ImportError("integration metrics need scib-metrics: pip install pyrosc[bench]")
    import anndata
    import scanpy as sc
    from scib_metrics.benchmark import BatchCorrection, Benchmarker, BioConservation

    found = _embeddings(adata, embeddings)
    names = {key: enc.category_names(enc.column(adata, key)) for key in (batch_key, labels_key)}
    known = np.all([[v is not None for v in column] for column in names.values()], axis=0)
    rows = np.flatnonzero(known)
    if max_cells is not None and len(rows) > max_cells:
        rows = np.sort(np.random.default_rng(seed).choice(rows, max_cells, replace=False))
    for key, column in names.items():
        if len(kinds := set(column[rows])) < 2:
            raise DataError(f"obs['{key}'] has {len(kinds)} category in the cells compared; two are needed")
    obs = pd.DataFrame(
        {k: pd.Categorical(v[rows].astype(str)) for k, v in names.items()}, index=adata.obs_names[rows]
    )
    if reference is None:
        counts = adata.layers[layer] if layer is not None else adata.X
        work = anndata.AnnData(counts[rows].copy(), obs=obs)
        sc.pp.normalize_total(work)
        sc.pp.log1p(work)
        sc.pp.pca(work, random_state=seed)
        work.obsm[_REFERENCE] = work.obsm["X_pca"]
    else:
        work = anndata.AnnData(obs=obs)
        work.obsm[_REFERENCE] = _embeddings(adata, [reference])[reference][rows]
    for name, values in found.items():
        work.obsm[name] = np.ascontiguousarray(values[rows], dtype=np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what other packages warn about among themselves
        bench = Benchmarker(
            work,
            batch_key=batch_key,
            label_key=labels_key,
            embedding_obsm_keys=list(found),
            bio_conservation_metrics=BioConservation(),
            batch_correction_metrics=BatchCorrection(),
            pre_integrated_embedding_obsm_key=_REFERENCE,
            progress_bar=False,
        )
        bench.benchmark()
        table = bench.get_results(min_max_scale=False)
    return _tidy(table, list(found))


def _embeddings(adata: Any, wanted: Sequence[str] | Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    if isinstance(wanted, str):
        raise TypeError(f"embeddings is a list of keys; write ['{wanted}']")
    if not isinstance(wanted, Mapping):
        if absent := [k for k in wanted if k not in adata.obsm]:
            raise DataError(f"there is no obsm {listed(absent)}; there are {listed(adata.obsm) or 'none'}")
        wanted = {k: np.asarray(adata.obsm[k]) for k in wanted}
    for name, values in wanted.items():
        if len(values) != adata.n_obs:
            raise DataError(f"embedding '{name}' has {len(values):,} rows for {adata.n_obs:,} cells")
    if not wanted:
        raise ValueError("embeddings is empty; name at least one")
    return dict(wanted)


def _tidy(table: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    kinds = dict(zip(map(str, table.columns), map(str, table.loc["Metric Type"]), strict=True))
    scores = table.loc[names].to_numpy(float)
    rows = []
    for name, row in zip(names, scores, strict=True):
        for (column, kind), score in zip(kinds.items(), row, strict=True):
            part = _PARTS.get(column) or _PARTS.get(kind, "")
            rows.append((name, _PARTS.get(column, column), part, float(score)))
    return pd.DataFrame(rows, columns=["embedding", "metric", "part", "score"])


__all__ = ["integration_metrics"]
