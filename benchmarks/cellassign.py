"""CellAssign on blood cells whose types are known by sorting, and its memory on a large made-up matrix.

python benchmarks/cellassign.py [--seeds 0 1 2 3 4] [--data-dir FOLDER] [--skip-large]
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
from _common import RESULTS, Meter, data_folder, machine, save_json, versions

from pyrosc import CellAssign
from pyrosc.infer.calibration import expected_calibration_error

T_CELLS = ["CD3D", "CD3E"]
MARKERS = {
    "B": ["CD19", "MS4A1", "CD79A", "CD79B"],
    "CD4 T": [*T_CELLS, "CD4", "IL7R"],
    "CD8 T": [*T_CELLS, "CD8A", "CD8B"],
}
NK = ["NKG7", "GNLY", "KLRD1"]


def three_types(folder: Path) -> tuple[anndata.AnnData, np.ndarray]:
    """800 cells sorted as B, CD4 T and CD8 T."""
    adata = anndata.read_h5ad(folder / "pbmc_facs.h5ad")
    return adata, adata.obs["FACS_type"].astype(str).str.removesuffix(" cells").to_numpy()


def joined(folder: Path) -> tuple[anndata.AnnData, np.ndarray]:
    """The same with 500 further cells: regulatory T (CD4), B and NK."""
    first, truth = three_types(folder)
    second = anndata.read_h5ad(folder / "pbmc_facs_zheng.h5ad")
    more = second.obs["cell_type"].astype(str).map(_as_type).to_numpy()
    genes = first.var_names.intersection(second.var_names)
    both = anndata.concat([first[:, genes], second[:, genes]], index_unique="-")
    return both, np.concatenate([truth, more])


def _as_type(name: str) -> str:
    low = name.lower()
    if "reg" in low:
        return "CD4 T"
    return "NK" if "nk" in low or "natural" in low else "B"


def score(soft: pd.DataFrame, truth: np.ndarray) -> dict[str, Any]:
    """Accuracy, accuracy of B against all else, confidence and calibration."""
    calls = soft.columns.to_numpy()[soft.to_numpy().argmax(1)]
    codes = soft.columns.get_indexer(truth)
    table = pd.crosstab(pd.Series(truth, name="truth"), pd.Series(calls, name="call"))
    return {
        "accuracy": float((calls == truth).mean()),
        "accuracy_b": float(((calls == "B") == (truth == "B")).mean()),
        "confidence": float(soft.to_numpy().max(1).mean()),
        "calibration_error": expected_calibration_error(soft.to_numpy(), codes),
        "confusion": {str(t): {str(c): int(v) for c, v in row.items()} for t, row in table.T.items()},
    }


def run(
    adata: anndata.AnnData, truth: np.ndarray, markers: dict[str, list[str]], seed: int, **options: Any
) -> dict:
    """One fit with defaults on all cells."""
    with Meter() as meter:
        model = CellAssign.from_anndata(adata, markers, seed=seed, **options)
        model.fit(seed=seed, progress=False)
    soft = model.predict(soft=True)
    assert isinstance(soft, pd.DataFrame)
    held_out = float(model.get_marginal_ll(indices=model.validation_indices))
    found = {
        "seed": seed,
        **score(soft, truth),
        "held_out_log_likelihood": held_out,
        "steps": int(model.history["steps"].max()),
    }
    return found | meter.as_dict()


def large(n_cells: int = 100_000, n_markers: int = 100, n_types: int = 30) -> dict[str, Any]:
    """Seconds and peak memory beyond the loaded data, on made-up counts."""
    rng = np.random.default_rng(0)
    genes = [f"m{i}" for i in range(n_markers)]
    # each marker belongs to one type, and each type shares two markers with others
    own = [np.arange(c, n_markers, n_types) for c in range(n_types)]
    own = [np.union1d(mine, rng.choice(n_markers, 2, replace=False)) for mine in own]
    markers = {f"t{c}": [genes[g] for g in chosen] for c, chosen in enumerate(own)}
    mean = np.full((n_types, n_markers), 0.05, np.float32)
    for c, chosen in enumerate(own):
        mean[c, chosen] *= np.exp(rng.uniform(2.2, 3.5, len(chosen)))
    types = rng.integers(0, n_types, n_cells)
    blocks = [
        sp.csr_matrix(rng.poisson(mean[types[i : i + 5000]]).astype(np.float32))
        for i in range(0, n_cells, 5000)
    ]
    rest = sp.random(n_cells, 400, 0.1, "csr", np.float32, rng, lambda n: rng.integers(1, 5, n))
    x = sp.hstack([sp.vstack(blocks), rest], format="csr")
    var = pd.DataFrame(index=[*genes, *(f"g{i}" for i in range(rest.shape[1]))])
    adata = anndata.AnnData(x, pd.DataFrame(index=[f"c{i}" for i in range(n_cells)]), var)
    del blocks, rest, x
    used = {g for names in markers.values() for g in names}
    with Meter() as meter:
        model = CellAssign.from_anndata(adata, markers)
        model.fit(progress=False)
        calls = model.predict()
    truth = np.array([f"t{c}" for c in types])
    size = {"cells": n_cells, "markers": len(used), "pairs": len(model.pairs), "types": n_types}
    steps = int(model.history["steps"].max())
    return {**size, "steps": steps, "accuracy": float((calls.to_numpy() == truth).mean()), **meter.as_dict()}


def main() -> None:
    """Print and keep all figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--skip-large", action="store_true", help="leave out the 100,000 cells")
    args = parser.parse_args()
    folder = args.data_dir or data_folder()
    warnings.simplefilter("ignore", UserWarning)
    cases = {
        "pbmc_facs": (three_types(folder), MARKERS, {}),
        "pbmc_facs_gene_dispersion": (three_types(folder), MARKERS, {"dispersion": "gene"}),
        "pbmc_facs_and_zheng": (joined(folder), MARKERS | {"NK": NK}, {"other": "other"}),
    }
    results: dict[str, Any] = {"machine": machine(), "versions": versions("pyrosc", "torch", "pyro-ppl")}
    for name, ((adata, truth), markers, options) in cases.items():
        fits = [run(adata, truth, markers, seed, **options) for seed in args.seeds]
        keys = ("accuracy", "accuracy_b", "confidence", "calibration_error", "seconds", "peak_memory_mib")
        mean = {k: float(np.mean([f[k] for f in fits])) for k in keys}
        results[name] = {
            "cells": adata.n_obs,
            "markers": markers,
            "options": options,
            "fits": fits,
            "mean": mean,
        }
        print(name, {k: round(v, 4) for k, v in mean.items()}, "worst", min(f["accuracy"] for f in fits))
    if not args.skip_large:
        results["large"] = large()
        print("large", {k: results["large"][k] for k in ("seconds", "peak_memory_mib", "accuracy", "steps")})
    save_json(RESULTS / "cellassign.json", results)


if __name__ == "__main__":
    main()
