"""Find known doublets by Solo with defaults: scores, estimated rates, and the time with the parent's.

    python benchmarks/solo.py --seeds 0 1 2

writes ``results/solo.json`` and prints it beside the peer's kept figures (``peer_solo_NAME.json``, written by
peer_solo.py). The truth is used for the scores only. ``--injected`` adds two sets of singlets into which
doublets were put (pbmc3k and 3,000 cells of brain10k, a twelfth of the droplets, capture .6 to 1): their own
doublets, which nobody knows, count as singlets there.
"""

from __future__ import annotations

import os

THREADS = 2
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import argparse  # noqa: E402
import json  # noqa: E402
import warnings  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import _common as common  # noqa: E402
import _doublets as doublets  # noqa: E402
import anndata  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

INJECTED = ("pbmc3k", "brain10k")
MEANS = ("auroc", "average_precision", "rate", "called", "precision_of_calls", "seconds", "seconds_scvi")
COLUMNS = ("", "AUROC", "AP", "rate", "true", "seconds", "of it SCVI")


def injected(name: str, data_dir: Path | None, rate: float = 1 / 12) -> doublets.Droplets:
    """Singlets, as far as known, with doublets put in; at most 2000 variable genes."""
    import scanpy as sc

    import pyrosc

    adata = anndata.read_h5ad(Path(data_dir or common.data_folder()) / f"{name}.h5ad")
    adata.obs_names_make_unique()
    adata.var_names_make_unique()
    adata = adata[np.random.default_rng(0).permutation(adata.n_obs)[:3000]].copy()
    adata = pyrosc.simulate.doublets(adata, rate, capture=(0.6, 1.0))
    sc.pp.filter_genes(adata, min_cells=3)
    if adata.n_vars > 2000:
        work = adata.copy()
        sc.pp.normalize_total(work)
        sc.pp.log1p(work)
        sc.pp.highly_variable_genes(work, n_top_genes=2000)
        adata = adata[:, work.var["highly_variable"].to_numpy()].copy()
    sc.pp.filter_cells(adata, min_counts=1)
    truth = adata.obs.pop("doublet").to_numpy(dtype=bool)
    return doublets.Droplets(adata, truth, np.ones(len(truth), bool), None)


def fit(data: doublets.Droplets, seed: int) -> dict[str, Any]:
    """SCVI, then Solo, with defaults."""
    import pyrosc

    with common.Meter() as total:
        with common.Meter() as first:
            parent = pyrosc.SCVI.from_anndata(data.adata, batch_key=data.batch_key, seed=seed)
            parent.fit(seed=seed, progress=False)
        solo = pyrosc.Solo.from_model(parent, seed=seed)
        solo.fit(seed=seed, progress=False)
        found = solo.predict(soft=True)["doublet"].to_numpy()
    rate = solo.get_doublet_rate()
    return {
        "seed": seed,
        **doublets.score(data, found),
        "rate": rate.estimate,
        "rate_interval": [rate.lower, rate.upper],
        **total.as_dict(),
        "seconds_scvi": first.seconds,
        "epochs": [len(parent.history), len(solo.history)],
    }


def row(title: str, found: dict[str, Any]) -> str:
    """One line of the table."""
    values = (
        *(f"{found[k]:.3f}" for k in ("auroc", "average_precision", "rate", "true_rate")),
        *(f"{found[k]:.1f}" for k in ("seconds", "seconds_scvi")),
    )
    return title.ljust(30) + "".join(v.rjust(12) for v in values)


def main() -> None:
    """Every set and seed; prints a table, keeps the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", choices=doublets.SETS, default=list(doublets.SETS))
    parser.add_argument("--injected", action="store_true", help="also sets that doublets were put into")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data-dir", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    path = common.RESULTS / "solo.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    print(COLUMNS[0].ljust(30) + "".join(c.rjust(12) for c in COLUMNS[1:]))
    for name in [*args.data, *(INJECTED if args.injected else ())]:
        warnings.simplefilter("ignore")
        data = injected(name, args.data_dir) if name in INJECTED else doublets.load(name, args.data_dir)
        fits = []
        for seed in args.seeds:
            fits.append(fit(data, seed))
            print(row(f"{name}, seed {seed}", fits[-1]), flush=True)
        mean = {k: float(np.mean([f[k] for f in fits if f[k] is not None])) for k in MEANS}
        mean["true_rate"] = fits[0]["true_rate"]
        print(row(f"{name}, mean", mean))
        peer = common.RESULTS / f"peer_solo_{name}.json"
        if peer.exists():
            print(row(f"{name}, scvi-tools", json.loads(peer.read_text())), flush=True)
        kept[name] = {
            "cells": data.adata.n_obs,
            "genes": data.adata.n_vars,
            "machine": common.machine(),
            "versions": common.versions("pyrosc", "pyro-ppl", "torch", "anndata", "numpy"),
            "mean": mean,
            "fits": fits,
        }
        common.save_json(path, kept)


if __name__ == "__main__":
    main()
