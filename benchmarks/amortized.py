"""SCVI with a guide made by `Amortized` against its own guide: held-out ELBO on real data.

python benchmarks/amortized.py [--data kang_ifnb pbmc_3tech] [--seeds 0 1 2]
"""

from __future__ import annotations

import argparse
import warnings

import numpy as np
from _common import ROOT, load, save_json, split

import pyrosc


def fit(cls: type[pyrosc.Model], name: str, seed: int) -> float:
    """Held-out ELBO per cell (nats), 25 draws, after a fit with defaults."""
    data = load(name)
    train, held_out = split(data.adata.n_obs, 0)
    model = cls.from_anndata(data.adata, batch_key=data.batch_key, seed=seed)
    model.fit(train_indices=train, validation_indices=held_out, seed=seed, progress=False)
    return float(model.get_elbo(indices=held_out, n_samples=25))


def main() -> None:
    """Print and keep both ELBOs and their difference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=["kang_ifnb", "pbmc_3tech"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    args = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    guided = pyrosc.auto(pyrosc.SCVI, pyrosc.Amortized)
    results = {}
    for name in args.data:
        own = [fit(pyrosc.SCVI, name, s) for s in args.seeds]
        made = [fit(guided, name, s) for s in args.seeds]
        gap = float(np.mean(own) - np.mean(made))
        results[name] = {"own": own, "amortized": made, "own_minus_amortized": gap}
        own_mean, made_mean = np.mean(own), np.mean(made)
        print(f"{name:12s} own {own_mean:9.2f}  amortized {made_mean:9.2f}  difference {gap:6.2f}")
    save_json(ROOT / "benchmarks" / "results" / "amortized.json", results)


if __name__ == "__main__":
    main()
