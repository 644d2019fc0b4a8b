"""Real data sets with raw counts.

`pbmc68k` comes with the installation. The others are downloaded once with pooch (extra ``datasets``), checked
against their SHA256, and read from a cache folder afterwards. Two environment variables change where from and
where to:

``PYROSC_DATASETS_URL``
    base URL of a mirror: a file is looked up as ``<base>/<file name>`` instead of at its publisher;
``PYROSC_DATASETS_DIR``
    cache folder, where the argument ``cache_dir`` is not given (default: the user's cache folder).
"""

from __future__ import annotations

import os
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

__all__ = ["kang_ifnb", "pbmc68k", "pbmc_cite"]


class _File(NamedTuple):
    url: str
    sha256: str


_TOTALVI = (
    "https://raw.githubusercontent.com/YosefLab/totalVI_reproducibility/"
    "27d65a9c49182f39df0c4325249bc7dc8e663dd0/data/raw_data/"
)
_SCGEN = "https://raw.githubusercontent.com/theislab/scgen/dd7e178f9b42b9dfef9eb18d0da4b8e3caea4cf7/data/"

_FILES = {
    "pbmc10k_harmo_rna.csv.gz": _File(
        _TOTALVI + "pbmc10k_harmo_rna.csv.gz",
        "77cacfec0e17dce2a9b00c479a07a162e29dc9263ff5dc4cb5235df4679baba9",
    ),
    "pbmc10k_harmo_pro.csv.gz": _File(
        _TOTALVI + "pbmc10k_harmo_pro.csv.gz",
        "184afe670d264b598e24cca73ccfd4f07c7bde696b8fb4cb53ba62d89b13f048",
    ),
    "pbmc5k_harmo_rna.csv.gz": _File(
        _TOTALVI + "pbmc5k_harmo_rna.csv.gz",
        "7c2467fb1974355fdf4907228be1d4f47be4286300e65b5efe6379a12b6208fa",
    ),
    "kang_valid.h5ad": _File(
        _SCGEN + "valid.h5ad",
        "83f89f5356a4c01f65bbcee225eb45d8d8b13b6c962724431a26c1bf568ff09e",
    ),
}


def pbmc68k() -> ad.AnnData:
    """700 peripheral blood mononuclear cells of a healthy donor, 765 genes; needs no download.

    scanpy ships these cells log-normalised. Their counts are rebuilt here: each cell's ``expm1`` values
    divided by the smallest of them that is not zero (one molecule) are integers up to the rounding of the
    file. That the counts are right is checked at each call: log-normalising them again, with the published
    number of molecules per cell, must give back the file.

    Returns
    -------
    AnnData
        ``X``: counts, 700 × 765, CSR float32.
        ``obs``: ``bulk_labels`` (10 cell types, by correlation with sorted populations), ``louvain``,
        ``phase``, ``S_score``, ``G2M_score``, ``n_genes``, ``percent_mito`` and ``n_counts`` as published.
        The last three are over all genes of the cell, so that ``n_counts`` is larger than the sum over the
        765 genes here.
        ``var``: published per-gene statistics of the normalised data.
        ``obsm["X_umap_published"]``: the published UMAP, 700 × 2.
        ``uns``: colours of ``bulk_labels`` and ``louvain``.

    Notes
    -----
    Source: Fresh 68k PBMCs, 10x Genomics (CC BY 4.0), reduced and labelled by the authors of scanpy
    (BSD-3-Clause). Cite Zheng et al., Massively parallel digital transcriptional profiling of single cells,
    Nature Communications 8, 14049 (2017), and Wolf et al., SCANPY, Genome Biology 19, 15 (2018).

    Examples
    --------
    >>> adata = pbmc68k()
    >>> adata.shape
    (700, 765)
    >>> int(adata.X.max())
    259
    """
    import scanpy as sc

    published = sc.datasets.pbmc68k_reduced()
    log_normalised = sp.csr_matrix(published.raw.X, copy=True)
    log_normalised.sort_indices()
    row = np.repeat(np.arange(published.n_obs), np.diff(log_normalised.indptr))

    value = np.expm1(log_normalised.data.astype(np.float64))
    one_molecule = np.minimum.reduceat(value, log_normalised.indptr[:-1])
    count = np.round(value / one_molecule[row])

    molecules = published.obs["n_counts"].to_numpy(np.float64)
    again = np.log1p(count * 1e4 / molecules[row])
    error = np.abs(again - log_normalised.data).max()
    if not error <= 1e-3:  # the file has three decimals
        raise RuntimeError(
            "the counts of scanpy's pbmc68k_reduced could not be rebuilt: log-normalising them again differs "
            f"from the file by up to {error:.3g}; did scanpy {version('scanpy')} change the data set?"
        )

    obs = published.obs.copy()
    var = published.var.loc[published.raw.var_names].copy()
    obs.index.name = var.index.name = None
    adata = ad.AnnData(_csr_float32(log_normalised, count), obs=obs, var=var)
    adata.obsm["X_umap_published"] = np.array(published.obsm["X_umap"], dtype=np.float32)
    for key in ("bulk_labels_colors", "louvain_colors"):
        adata.uns[key] = np.array(published.uns[key], dtype=object)
    return adata


def pbmc_cite(cache_dir: str | os.PathLike[str] | None = None) -> ad.AnnData:
    """10,849 peripheral blood mononuclear cells in two batches, 4,000 genes; 14 surface proteins in one.

    Downloads 6 MB at the first call; reading takes about ten seconds.

    Parameters
    ----------
    cache_dir
        Folder where the downloaded files are kept. Default: environment variable ``PYROSC_DATASETS_DIR``, or
        else the user's cache folder.

    Returns
    -------
    AnnData
        ``X``: UMI counts, 10849 × 4000, CSR float32.
        ``obs["batch"]``: ``pbmc10k`` (6,855 cells) or ``pbmc5k`` (3,994 cells).
        ``obsm["protein"]``: DataFrame of counts, 10849 × 14, NaN for all ``pbmc5k`` cells: the protein counts
        of that batch are not downloaded, so NaN means *not measured*.
        The names of cells are barcodes followed by ``-0`` (``pbmc10k``) or ``-1`` (``pbmc5k``).

    Notes
    -----
    Source: 10k and 5k PBMCs with cell surface proteins, 10x Genomics (CC BY 4.0), cells and genes as filtered
    for totalVI, from that paper's repository. Cite Gayoso et al., Joint probabilistic modeling of single-cell
    multi-omic data with totalVI, Nature Methods 18, 272–282 (2021).
    """
    batches = ("pbmc10k", "pbmc5k")
    rna_files = [_fetch(f"{batch}_harmo_rna.csv.gz", cache_dir, "pbmc_cite") for batch in batches]
    protein_file = _fetch("pbmc10k_harmo_pro.csv.gz", cache_dir, "pbmc_cite")

    (x_first, cells_first, genes), (x_second, cells_second, genes_second) = map(_read_counts_csv, rna_files)
    if not genes.equals(genes_second):
        raise RuntimeError(f"{rna_files[0].name} and {rna_files[1].name} do not have the same genes")

    names = [*(f"{cell}-0" for cell in cells_first), *(f"{cell}-1" for cell in cells_second)]
    batch = np.repeat(batches, [len(cells_first), len(cells_second)])
    obs = pd.DataFrame({"batch": pd.Categorical(batch)}, index=names)
    adata = ad.AnnData(sp.vstack([x_first, x_second], format="csr"), obs=obs, var=pd.DataFrame(index=genes))

    protein = pd.read_csv(protein_file, index_col=0).T
    protein = protein.loc[cells_first].set_axis([f"{cell}-0" for cell in cells_first]).astype(np.float64)
    protein.columns.name = None
    adata.obsm["protein"] = protein.reindex(adata.obs_names)
    return adata


def kang_ifnb(cache_dir: str | os.PathLike[str] | None = None) -> ad.AnnData:
    """1,975 peripheral blood mononuclear cells, at rest and stimulated with interferon β; 6,998 genes.

    Downloads 2 MB at the first call. The file is log-normalised; counts are rebuilt from it and from its
    number of molecules per cell, which is exact, and checked to be integers.

    Parameters
    ----------
    cache_dir
        Folder where the downloaded file is kept. Default: environment variable ``PYROSC_DATASETS_DIR``, or
        else the user's cache folder.

    Returns
    -------
    AnnData
        ``X``: UMI counts, 1975 × 6998, CSR float32.
        ``obs``: ``condition`` (``control``, ``stimulated``), ``cell_type`` (7 types), and ``n_counts``, the
        number of molecules over all genes of the experiment, so that it is larger than the sum over the genes
        here. The file has neither donors nor genetic doublets.

    Notes
    -----
    Source: GEO series GSE96583, cells and genes as distributed with scGen. Cite Kang et al., Multiplexed
    droplet single-cell RNA-sequencing using natural genetic variation, Nature Biotechnology 36, 89–94 (2018),
    and Lotfollahi et al., scGen predicts single-cell perturbation responses, Nature Methods 16, 715–721
    (2019).
    """
    path = _fetch("kang_valid.h5ad", cache_dir, "kang_ifnb")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the file's format is an early one: anndata says so, and reads it
        published = ad.read_h5ad(path)
    log_normalised = sp.csr_matrix(published.X)
    log_normalised.sort_indices()
    row = np.repeat(np.arange(published.n_obs), np.diff(log_normalised.indptr))

    # Cells were scaled to the median library, 1832.5 molecules, before log1p.
    molecules = published.obs["n_counts"].to_numpy(np.float64)
    value = np.expm1(log_normalised.data.astype(np.float64)) * molecules[row] / 1832.5
    count = np.round(value)
    error = np.abs(value - count).max()
    if not error <= 0.01:  # single precision of the file: 6e-4
        raise RuntimeError(
            f"the counts of {path.name} could not be rebuilt: they differ from integers by up to {error:.3g}"
        )

    obs = pd.DataFrame(
        {
            "condition": pd.Categorical(published.obs["condition"].astype(str)),
            "cell_type": pd.Categorical(published.obs["cell_type"].astype(str)),
            "n_counts": published.obs["n_counts"].to_numpy(np.float32),
        },
        index=published.obs_names.astype(str).rename(None),
    )
    var = pd.DataFrame(index=published.var_names.astype(str).rename(None))
    return ad.AnnData(_csr_float32(log_normalised, count), obs=obs, var=var)


def _fetch(name: str, cache_dir: str | os.PathLike[str] | None, dataset: str) -> Path:
    """Path of a file of `_FILES` in the cache; downloaded if it is not there or has another hash."""
    try:
        import pooch
        import requests
    except ImportError as err:
        raise ImportError(
            f'pyrosc.datasets.{dataset} downloads with pooch: pip install "pyrosc[datasets]"'
        ) from err

    file = _FILES[name]
    base_url = os.environ.get("PYROSC_DATASETS_URL")
    url = f"{base_url.rstrip('/')}/{name}" if base_url else file.url
    folder = cache_dir or os.environ.get("PYROSC_DATASETS_DIR") or pooch.os_cache("pyrosc")
    try:
        # Checks the hash before the file gets its name, so a bad download leaves nothing behind.
        path = pooch.retrieve(url, known_hash=f"sha256:{file.sha256}", fname=name, path=folder)
    except requests.RequestException as err:
        raise OSError(
            f"{name} could not be downloaded from {url} ({err}); without access to it, put the file into a "
            f"folder and call pyrosc.datasets.{dataset}(cache_dir=that folder)"
        ) from err
    return Path(path)


def _read_counts_csv(path: Path) -> tuple[sp.csr_matrix, pd.Index, pd.Index]:
    """Read genes × cells from CSV: cells × genes as CSR float32, names of cells, names of genes."""
    parts: list[sp.csc_matrix] = []
    genes: list[str] = []
    with pd.read_csv(path, index_col=0, chunksize=500) as chunks:  # dense, so a part at a time
        for chunk in chunks:
            parts.append(sp.csc_matrix(chunk.to_numpy(np.float32).T))
            genes.extend(chunk.index.astype(str))
    x = sp.csr_matrix(sp.hstack(parts))
    if (x.data < 0).any() or (x.data != np.round(x.data)).any():
        raise RuntimeError(f"{path.name} does not hold counts")
    return x, chunk.columns.astype(str), pd.Index(genes)


def _csr_float32(pattern: sp.csr_matrix, data: np.ndarray) -> sp.csr_matrix:
    """Build a matrix with the sparsity of `pattern` and other values."""
    return sp.csr_matrix(
        (data.astype(np.float32), pattern.indices.copy(), pattern.indptr.copy()), shape=pattern.shape
    )
