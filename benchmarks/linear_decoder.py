"""LinearSCVI: its decoders compared on real data, and how often credible intervals hold true loadings.

python benchmarks/linear_decoder.py [--data kang_ifnb pbmc_3tech] [--seeds 0 1] [--cells 1000 2000]
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import numpy as np
from _common import RESULTS, load, save_json, split

import pyrosc

MODELS: dict[str, tuple[type[pyrosc.SCVI], dict[str, Any]]] = {
    "intercept": (pyrosc.LinearSCVI, {}),
    "batch norm": (pyrosc.LinearSCVI, {"decoder_norm": "batch"}),
    "Bayesian": (pyrosc.LinearSCVI, {"bayesian": True}),
    "scVI": (pyrosc.SCVI, {"gene_likelihood": "nb", "use_observed_lib_size": False}),
}
LEVELS = (0.5, 0.9, 0.95)


def fit(name: str, kind: str, seed: int) -> float:
    """Held-out ELBO per cell (nats), 25 draws, after a fit with defaults."""
    data = load(name)
    train, held_out = split(data.adata.n_obs, 0)
    cls, options = MODELS[kind]
    model = cls.from_anndata(data.adata, batch_key=data.batch_key, seed=seed, **options)
    model.fit(train_indices=train, validation_indices=held_out, seed=seed, progress=False)
    return float(model.get_elbo(indices=held_out, n_samples=25))


def coverage(n_cells: int, seed: int) -> list[float]:
    """Share of the true loadings that intervals of each level hold.

    The true loadings are mapped linearly onto the found ones first, since factors are determined up to a
    rotation, and up to the sample covariance of finitely many cells.
    """
    adata = pyrosc.simulate.linear_scvi(n_cells, 100, n_latent=3, signal=0.8, seed=seed).adata
    model = pyrosc.LinearSCVI.from_anndata(adata, batch_key="batch", n_latent=3, bayesian=True)
    model.fit(max_steps=4000, train_size=1.0, early_stopping=False, progress=False)
    truth, found = (x - x.mean(0) for x in (adata.varm["true_loadings"], model.get_loadings().to_numpy()))
    error = np.abs(truth @ np.linalg.lstsq(truth, found, rcond=None)[0] - found).T.ravel()
    half = [(t["upper"] - t["lower"]) / 2 for t in map(model.get_loadings, LEVELS)]
    return [float((error < h).mean()) for h in half]


def main() -> None:
    """Print and keep both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="*", default=["kang_ifnb", "pbmc_3tech"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--cells", nargs="*", type=int, default=[1000, 2000])
    args = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    elbos: dict[str, dict[str, list[float]]] = {}
    for name in args.data:
        for kind in MODELS:
            values = [fit(name, kind, seed) for seed in args.seeds]
            elbos.setdefault(name, {})[kind] = values
            print(f"{name:12s} {kind:12s} {np.mean(values):9.2f}  {np.round(values, 2)}", flush=True)
    covered: dict[str, list[float]] = {}
    for n in args.cells:
        covered[str(n)] = np.mean([coverage(n, s) for s in args.seeds], axis=0).tolist()
        parts = [f"{lev:.0%} {c:.1%}" for lev, c in zip(LEVELS, covered[str(n)], strict=True)]
        print(f"{n:5d} cells: {', '.join(parts)}", flush=True)
    save_json(RESULTS / "linear_decoder.json", {"heldout_elbo": elbos, "levels": LEVELS, "covered": covered})


if __name__ == "__main__":
    main()
