"""From counts to a folder of results: what ``python -m pyrosc demo`` does."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pyrosc.data import DataWarning
from pyrosc.data.encode import column
from pyrosc.data.errors import listed
from pyrosc.tools.layout import lay_out

if TYPE_CHECKING:
    from anndata import AnnData

    from pyrosc.models import SCVI

#: Blood cell types and a gene that marks each: T, B, NK, monocytes, monocytes and dendritic, dendritic.
_BLOOD = ("CD3D", "CD79A", "NKG7", "LYZ", "CST3", "FCER1A")
_FEWEST_CELLS = 30
_UMAP = "X_umap_scVI"
_H5AD, _MODEL = "annotated.h5ad", "model"


class DemoError(ValueError):
    """The arguments do not fit; the message is one line."""


def run(
    data: str | Path | None = None,
    *,
    out: str | Path = "demo-results",
    layer: str | None = None,
    batch_key: str | None = None,
    labels_key: str | None = None,
    markers: Sequence[str] = (),
    max_epochs: int | None = None,
    seed: int = 0,
    plots: bool = True,
) -> Path:
    """Train SCVI and write the annotated cells, the model and pictures into a folder.

    Parameters
    ----------
    data
        ``.h5ad`` of raw counts, never changed; default the cells of `pyrosc.datasets.pbmc68k`.
    out
        Folder to write to; of what it holds, only results of an earlier run are replaced.
    layer
        Layer with the counts; default X.
    batch_key
        Column of obs to correct for.
    labels_key
        Column of obs to colour the UMAP by.
    markers
        Genes to show; default markers of blood cells if the data have some, else variable genes.
    max_epochs
        Length of training; default that of the model.
    seed
        Of weights, training and UMAP.
    plots
        Whether to draw.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    DemoError, DataError
        If an argument or the data do not fit; before any training.
    """
    import pyrosc
    from pyrosc.pl._report import draw

    started = time.perf_counter()
    out = Path(out)
    _check_out(out, data)
    adata, name = _read(data)
    if data is None and labels_key is None:
        labels_key = "bulk_labels"
    if labels_key is not None:
        column(adata, labels_key)  # a missing one is an error that lists those there are
    _check_markers(adata, markers)
    with _notes():
        model = pyrosc.SCVI.from_anndata(adata, layer=layer, batch_key=batch_key, seed=seed)
    _make(out)
    print(f"{name}: {adata.n_obs:,} cells × {adata.n_vars:,} genes; results go to {out}", flush=True)
    training = time.perf_counter()
    with _notes(), _ctrl_c():
        model.fit(max_epochs, seed=seed)
    training = time.perf_counter() - training
    model.save(out / _MODEL, overwrite=True)
    elbo = model.get_elbo(indices=model.split["main"][1], n_samples=10)
    model.annotate(adata)
    print("UMAP" + (" and pictures" if plots else "") + " …", flush=True)
    _embed(adata, seed, cluster=labels_key is None)
    _write(adata, out / _H5AD)
    shown = _markers(model, adata, markers)
    pictures = []
    if plots:
        clusters = "leiden_scVI" if "leiden_scVI" in adata.obs else None
        groups = [k for k in (labels_key or clusters, batch_key) if k is not None]
        pictures = draw(model, adata, out, groups=groups, markers=shown, basis=_UMAP)
    _report(model, out, name, float(elbo), training, time.perf_counter() - started, shown, pictures)
    return out


# -- before training ------------------------------------------------------------------------------------


def _check_out(out: Path, data: str | Path | None) -> None:
    """What can be known about the output without writing."""
    there = next(p for p in (out.absolute(), *out.absolute().parents) if os.path.lexists(p))
    if not there.is_dir():
        raise DemoError(f"cannot write to {out}: {there} is not a folder")
    if not os.access(there, os.W_OK):
        raise DemoError(f"cannot write to {out}: no permission to write in {there}")
    if data is not None and (out / _H5AD).resolve() == Path(data).resolve():
        raise DemoError(f"the annotated copy would replace {data} itself; choose another --out")
    old = out / _MODEL
    if old.exists() and not (old / "model.json").exists() and not (old.is_dir() and not any(old.iterdir())):
        raise DemoError(f"{old} is not a pyrosc model and will not be replaced; choose another --out")


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise DemoError(f"cannot write to {out}: {error.strerror or error}") from error


def _read(data: str | Path | None) -> tuple[AnnData, str]:
    """The cells, and what to call them."""
    if data is None:
        from pyrosc.datasets import pbmc68k

        with _quiet():
            return pbmc68k(), "pbmc68k"
    import anndata
    import h5py

    path = Path(data)
    if not path.exists():
        raise DemoError(f"there is no file {path}")
    if path.is_dir():
        raise DemoError(f"{path} is a folder, not an .h5ad file")
    if not os.access(path, os.R_OK):
        raise DemoError(f"no permission to read {path}")
    if not h5py.is_hdf5(path):
        raise DemoError(f"{path} is not an .h5ad file")
    try:
        with h5py.File(path, "r") as file:
            if not {"obs", "var"} <= set(file):
                raise DemoError(f"{path} is an HDF5 file, but not an .h5ad file: it has no obs and var")
        with _quiet():
            adata = anndata.read_h5ad(path)
    except DemoError:
        raise
    except Exception as error:  # h5py and anndata have many
        raise DemoError(f"{path} could not be read as .h5ad: {str(error) or type(error).__name__}") from error
    if adata.n_obs < _FEWEST_CELLS or adata.n_vars < 2:
        raise DemoError(
            f"{path} has {adata.n_obs:,} cells and {adata.n_vars:,} genes; {_FEWEST_CELLS} cells and 2 genes "
            "are the fewest that a model can be trained on"
        )
    return adata, path.name


def _check_markers(adata: AnnData, markers: Sequence[str]) -> None:
    known = set(map(str, adata.var_names))
    absent = [g for g in markers if g not in known]
    if not absent:
        return
    likely = {n.lower(): n for n in known}
    meant = [likely[g.lower()] for g in absent if g.lower() in likely]
    hint = f"did you mean {listed(meant)}" if meant else f"genes are named like {listed(adata.var_names[:3])}"
    raise DemoError(f"--markers: the data have no genes {listed(absent)}; {hint}")


# -- after training -------------------------------------------------------------------------------------


def _embed(adata: AnnData, seed: int, *, cluster: bool) -> None:
    """UMAP of the latent space and, if asked for and possible, clusters; of the data nothing else changes."""
    import anndata
    import scanpy as sc

    with _quiet():
        cells = anndata.AnnData(
            obs=pd.DataFrame(index=adata.obs_names), obsm={"X_scVI": adata.obsm["X_scVI"]}
        )
        lay_out(cells, "X_scVI", seed=seed)
        adata.obsm[_UMAP] = cells.obsm["X_umap"]
        if cluster and importlib.util.find_spec("igraph") is not None:
            sc.tl.leiden(cells, flavor="igraph", n_iterations=2, directed=False, random_state=seed)
            adata.obs["leiden_scVI"] = cells.obs["leiden"]


def _write(adata: AnnData, path: Path) -> None:
    """Write in one step: an earlier file stays whole until the new one is."""
    fresh = path.with_name(f".{path.name}.part")
    try:
        with _quiet():
            adata.write_h5ad(fresh)
        os.replace(fresh, path)
    except Exception as error:
        raise DemoError(f"{path} could not be written: {str(error) or type(error).__name__}") from error
    finally:
        fresh.unlink(missing_ok=True)


def _markers(model: SCVI, adata: AnnData, wanted: Sequence[str], n: int = 6) -> list[str]:
    if wanted:
        return list(wanted)
    known = set(map(str, adata.var_names))
    blood = [g for g in _BLOOD if g in known]
    return blood if len(blood) > 2 else variable_genes(model, n)


def variable_genes(model: SCVI, n: int = 6, max_cells: int = 1000) -> list[str]:
    """Genes whose normalised expression varies most among the cells, each unlike those before it.

    Parameters
    ----------
    model
        A trained model.
    n
        Number of genes.
    max_cells
        Of more cells than this, as many are drawn at random.

    Returns
    -------
    list of str
        At most `n` names.
    """
    rows = np.arange(model.registry.n_obs)
    if len(rows) > max_cells:
        rows = np.sort(np.random.default_rng(0).choice(rows, max_cells, replace=False))
    values = np.asarray(model.get_normalized_expression(indices=rows, library_size=1e4, as_numpy=True))
    logs = np.log1p(values)
    order = np.argsort(-logs.var(0))[:200]
    alike = np.abs(np.corrcoef(logs[:, order].T))
    chosen: list[int] = []
    for i in range(len(order)):
        if len(chosen) < n and (not chosen or alike[i, chosen].max() < 0.7):
            chosen.append(i)
    names = model.registry.var_names()
    return [names[order[i]] for i in chosen]


def _report(
    model: SCVI,
    out: Path,
    name: str,
    elbo: float,
    training: float,
    total: float,
    markers: list[str],
    pictures: list[str],
) -> None:
    from pyrosc.train.history import kept_epoch

    history = model.history
    assert history is not None
    best, registry = kept_epoch(history), model.registry
    held_out = len(model.split["main"][1])
    kept = "" if best is None else f", weights of epoch {best + 1} kept"
    rows = [
        ("data", name),
        ("cells", f"{registry.n_obs:,}"),
        ("genes", f"{registry.n_vars():,}"),
        ("epochs", f"{len(history):,}{kept}"),
        ("held-out ELBO", f"{elbo:,.1f} nats per cell, over {held_out:,} cells (higher is better)"),
        ("seconds", f"{total:.1f}, of them {training:.1f} training"),
        ("files", f"{out}{os.sep}"),
        ("", f"{_H5AD}, {_MODEL}{os.sep}" + ("," if pictures else "")),
        *([("", ", ".join(pictures))] if pictures else []),
    ]
    width = max(len(label) for label, _ in rows)
    print()
    for label, value in rows:
        print(f"{label:<{width}}  {value}")
    folder, genes = out.as_posix(), ", ".join(f'"{g}"' for g in markers[:2])
    print("\nWhat to try next, in Python:\n")
    print("    import anndata, pyrosc")
    print(f'    adata = anndata.read_h5ad("{folder}/{_H5AD}")')
    print(f'    model = pyrosc.load("{folder}/{_MODEL}", adata)')
    print(f"    model.get_normalized_expression(gene_list=[{genes}], library_size=1e4).describe()")
    if name == "pbmc68k":
        print("\nand on your own counts:\n")
        print("    python -m pyrosc demo --data your.h5ad --batch-key batch")


# -- warnings and Ctrl-C --------------------------------------------------------------------------------


@contextmanager
def _quiet() -> Iterator[None]:
    """Around calls of other packages: what they warn about is theirs, not the user's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _notes() -> Iterator[None]:
    """Print pyrosc's own warnings as one line each, others not at all."""
    own = str(Path(__file__).parent)

    def show(message: Any, category: type[Warning], filename: str, *_: Any, **__: Any) -> None:
        ours = issubclass(category, DataWarning) or (category is UserWarning and filename.startswith(own))
        if ours and not str(message).startswith("training was interrupted"):
            print("note:", " ".join(str(message).split()), file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning)
        warnings.showwarning = show
        yield


@contextmanager
def _ctrl_c() -> Iterator[None]:
    """`fit` ends quietly at Ctrl-C, its model usable; here that ends the program."""
    pressed = False

    def handler(*_: Any) -> None:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    try:
        replaced = before is not signal.SIG_IGN and signal.signal(signal.SIGINT, handler) is not None
    except ValueError:  # not in the main thread
        replaced = False
    try:
        yield
    finally:
        if replaced:
            signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt
