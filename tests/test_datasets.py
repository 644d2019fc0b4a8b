"""Data sets: counts are right, downloads are checked, and nothing is fetched twice."""

import functools
import shutil
import socket
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from pyrosc import datasets

FILES = {
    "kang_ifnb": ["kang_valid.h5ad"],
    "pbmc_cite": ["pbmc10k_harmo_pro.csv.gz", "pbmc10k_harmo_rna.csv.gz", "pbmc5k_harmo_rna.csv.gz"],
}


def assert_counts(adata):
    x = adata.X
    assert isinstance(x, sp.csr_matrix)
    assert x.dtype == np.float32
    assert x.has_canonical_format
    assert (x.data > 0).all()
    np.testing.assert_array_equal(x.data, np.round(x.data))
    assert adata.obs_names.is_unique
    assert adata.var_names.is_unique


class Server:
    """Serves a folder on 127.0.0.1 and keeps the paths that were asked for."""

    def __init__(self, folder):
        self.requests = requests = []

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self):
                requests.append(self.path.lstrip("/"))
                super().do_GET()

            def log_message(self, *args):
                pass

        handler = functools.partial(Handler, directory=str(folder))
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def serve(monkeypatch):
    """Serve a folder as the mirror of all data sets."""
    servers = []

    def start(folder):
        server = Server(folder).__enter__()
        servers.append(server)
        monkeypatch.setenv("PYROSC_DATASETS_URL", server.url + "/")
        return server

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield start
    for server in servers:
        server.__exit__()


# -- pbmc68k


def test_pbmc68k_has_counts_and_published_annotation(monkeypatch):
    def no_network(*args):
        raise AssertionError("pbmc68k used the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    adata = datasets.pbmc68k()
    assert adata.shape == (700, 765)
    assert_counts(adata)
    assert adata.obs["bulk_labels"].nunique() == 10
    assert set(adata.obs["phase"]) == {"G1", "S", "G2M"}
    assert {"louvain", "n_counts", "n_genes", "percent_mito"} <= set(adata.obs)
    assert adata.obsm["X_umap_published"].shape == (700, 2)
    assert len(adata.uns["bulk_labels_colors"]) == 10


def test_pbmc68k_normalises_to_the_published_values():
    import scanpy as sc

    adata = datasets.pbmc68k()
    raw = sc.datasets.pbmc68k_reduced().raw
    assert list(raw.var_names) == list(adata.var_names)
    # scanpy's file: log1p of counts per 10,000 molecules of the whole cell, to three decimals.
    molecules = adata.obs["n_counts"].to_numpy(np.float64)[:, None]
    expected = np.log1p(adata.X.toarray().astype(np.float64) * 1e4 / molecules)
    np.testing.assert_allclose(expected, raw.X.toarray(), atol=6e-4)
    # The genes kept here are some of the cell's genes.
    assert (adata.obs["n_counts"] > adata.X.sum(1).A1).all()


def test_pbmc68k_is_deterministic_and_returns_new_objects():
    first, second = datasets.pbmc68k(), datasets.pbmc68k()
    assert (first.X != second.X).nnz == 0
    assert first.obs.equals(second.obs)
    assert first.var.equals(second.var)
    first.X.data[:] = 0
    first.obs["bulk_labels"] = "x"
    assert second.X.sum() > 0
    assert datasets.pbmc68k().X.sum() == second.X.sum()


def test_pbmc68k_notices_another_file(monkeypatch):
    import scanpy as sc

    changed = sc.datasets.pbmc68k_reduced()
    x = changed.raw.X.copy()
    x.data[5] *= 1.1
    changed.raw = ad.AnnData(x, obs=changed.obs, var=changed.raw.var)
    monkeypatch.setattr(sc.datasets, "pbmc68k_reduced", lambda: changed)
    with pytest.raises(RuntimeError, match="could not be rebuilt"):
        datasets.pbmc68k()


def test_pbmc68k_survives_writing(tmp_path):
    adata = datasets.pbmc68k()
    adata.write_h5ad(tmp_path / "a.h5ad")
    back = ad.read_h5ad(tmp_path / "a.h5ad")
    assert (back.X != adata.X).nnz == 0
    assert back.obs.equals(adata.obs)


# -- downloads


def test_kang_ifnb_downloads_once_and_has_the_published_counts(serve, cache_dir, tmp_path):
    server = serve(cache_dir)
    adata = datasets.kang_ifnb(cache_dir=tmp_path)
    assert server.requests == FILES["kang_ifnb"]
    assert [path.name for path in tmp_path.iterdir()] == FILES["kang_ifnb"]

    again = datasets.kang_ifnb(cache_dir=tmp_path)
    assert len(server.requests) == 1, "the second call used the server although the file is in the cache"
    assert (adata.X != again.X).nnz == 0

    assert adata.shape == (1975, 6998)
    assert_counts(adata)
    assert adata.obs["condition"].cat.categories.tolist() == ["control", "stimulated"]
    assert adata.obs["cell_type"].nunique() == 7
    # Interferon-stimulated genes go up in every cell type: the annotation belongs to these rows.
    isg15 = adata[:, "ISG15"].X.toarray().ravel()
    mean = adata.obs.assign(isg15=isg15).groupby(["cell_type", "condition"], observed=True)["isg15"].mean()
    mean = mean.unstack()
    assert (mean["stimulated"] > 5 * mean["control"]).all()


def test_kang_ifnb_equals_the_reference(cache_dir, data_dir):
    adata = datasets.kang_ifnb(cache_dir=cache_dir)
    reference = ad.read_h5ad(data_dir / "kang_ifnb.h5ad")
    assert adata.obs_names.equals(reference.obs_names)
    assert adata.var_names.equals(reference.var_names)
    assert (adata.X != reference.X).nnz == 0
    # Donors and doublets of the reference come from another file.
    assert set(reference.obs) - set(adata.obs) == {"demuxlet", "doublet", "donor"}
    assert adata.obs.equals(reference.obs[list(adata.obs)])


@pytest.mark.slow
def test_pbmc_cite_downloads_once_and_equals_the_reference(serve, cache_dir, tmp_path, request):
    server = serve(cache_dir)
    adata = datasets.pbmc_cite(cache_dir=tmp_path)
    assert sorted(server.requests) == FILES["pbmc_cite"]
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES["pbmc_cite"]

    assert adata.shape == (10849, 4000)
    assert_counts(adata)
    assert adata.obs["batch"].value_counts().to_dict() == {"pbmc10k": 6855, "pbmc5k": 3994}
    protein = adata.obsm["protein"]
    assert protein.shape == (10849, 14)
    measured = (adata.obs["batch"] == "pbmc10k").to_numpy()
    assert protein[measured].notna().all(axis=None)
    assert protein[~measured].isna().all(axis=None)
    # Rows of proteins and of RNA are the same cells: CD14 protein marks cells with the RNA of monocytes.
    lyz = np.log1p(adata[measured, "LYZ"].X.toarray().ravel())
    assert np.corrcoef(lyz, np.log1p(protein.loc[measured, "CD14_TotalSeqB"]))[0, 1] > 0.7

    reference = ad.read_h5ad(request.getfixturevalue("data_dir") / "pbmc_cite.h5ad")
    assert adata.obs_names.equals(reference.obs_names)
    assert adata.var_names.equals(reference.var_names)
    assert (adata.X != reference.X).nnz == 0
    assert adata.obs.equals(reference.obs)
    np.testing.assert_array_equal(
        protein[measured], reference.obsm["protein"].loc[measured, protein.columns], strict=True
    )


def test_cache_folder_from_the_environment(serve, cache_dir, tmp_path, monkeypatch):
    serve(cache_dir)
    monkeypatch.setenv("PYROSC_DATASETS_DIR", str(tmp_path / "mine"))
    datasets.kang_ifnb()
    assert (tmp_path / "mine" / "kang_valid.h5ad").is_file()


def test_wrong_hash_is_an_error_and_leaves_no_file(serve, tmp_path):
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "kang_valid.h5ad").write_bytes(b"not what was published")
    server = serve(tmp_path / "served")
    with pytest.raises(ValueError, match=r"(?i)sha256 hash of downloaded file \(kang_valid.h5ad\)"):
        datasets.kang_ifnb(cache_dir=tmp_path / "cache")
    assert server.requests == ["kang_valid.h5ad"]
    assert list((tmp_path / "cache").iterdir()) == []


def test_damaged_file_in_the_cache_is_fetched_again(serve, cache_dir, tmp_path):
    server = serve(cache_dir)
    whole = (cache_dir / "kang_valid.h5ad").read_bytes()
    (tmp_path / "kang_valid.h5ad").write_bytes(whole[: len(whole) // 2])
    assert datasets.kang_ifnb(cache_dir=tmp_path).shape == (1975, 6998)
    assert server.requests == ["kang_valid.h5ad"]
    assert (tmp_path / "kang_valid.h5ad").read_bytes() == whole


def test_missing_on_the_server_is_a_clear_error(serve, tmp_path):
    (tmp_path / "served").mkdir()
    server = serve(tmp_path / "served")
    with pytest.raises(OSError, match=r"kang_valid.h5ad could not be downloaded from .*404.*cache_dir"):
        datasets.kang_ifnb(cache_dir=tmp_path / "cache")
    assert server.requests == ["kang_valid.h5ad"]
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_file_put_into_the_folder_needs_no_network(cache_dir, tmp_path, monkeypatch):
    shutil.copy(cache_dir / "kang_valid.h5ad", tmp_path)
    monkeypatch.setenv("PYROSC_DATASETS_URL", "http://127.0.0.1:9/nothing-listens-here")
    assert datasets.kang_ifnb(cache_dir=tmp_path).n_obs == 1975


def test_without_pooch_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(ImportError, match=r'pip install "pyrosc\[datasets\]"'):
        datasets.pbmc_cite()


@pytest.mark.slow
def test_import_is_light():
    code = (
        "import sys, pyrosc.datasets; print([m for m in ('scanpy', 'pooch', 'requests') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
