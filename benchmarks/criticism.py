"""How well SCVI fits, and how far its guide can be trusted, by the package's own checks.

Each data set is fitted with defaults, a tenth of the cells held out, for both count likelihoods; predictive
checks and k-hat are of the held-out cells, simulation-based calibration has the decoder fixed at the fitted
one.  Results go to ``results/criticism.json``::

    python benchmarks/criticism.py --data kang_ifnb pbmc_3tech
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import time
from pathlib import Path
from typing import Any

import _common as common
import numpy as np
import torch

NAMES = ["kang_ifnb", "pbmc_3tech"]
LIKELIHOODS = ("zinb", "nb")


def criticise(name: str, likelihood: str, seed: int, data_dir: Path | None) -> dict[str, Any]:
    """Fit one model and run every check."""
    import pyrosc
    from pyrosc import criticism

    data = common.load(name, data_dir)
    train, validation = (np.sort(part) for part in common.split(data.adata.n_obs))
    model = pyrosc.SCVI.from_anndata(
        data.adata, batch_key=data.batch_key, gene_likelihood=likelihood, seed=seed
    )
    model.fit(train_indices=train, validation_indices=validation, seed=seed, progress=False)
    seconds: dict[str, float] = {}

    def timed(what: str, function: Any, *args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        found = function(*args, seed=seed, **options)
        seconds[what] = time.perf_counter() - start
        return found

    checks = timed("predictive_checks", criticism.predictive_checks, model)
    guide = timed("guide_diagnostics", criticism.guide_diagnostics, model)
    ranks = timed("simulation_based_calibration", criticism.simulation_based_calibration, model)
    genes = timed("de_genes_kept", criticism.de_genes_kept, model, data.labels_key)
    coverage = checks.calibration.pivot(index="genes", columns="level", values="coverage")
    return {
        "data": name,
        "gene_likelihood": likelihood,
        "seed": seed,
        "held_out_cells": checks.n_cells,
        "epochs": len(model.history),
        "elbo": model.get_elbo(indices=validation, n_samples=25),
        "pit_deviation": checks.pit_deviation,
        "predictive_coverage": {g: {str(k): v for k, v in row.items()} for g, row in coverage.iterrows()},
        "summary": {f"{of} {s}": row.to_dict() for (of, s), row in checks.summary.iterrows()},
        "khat": {
            **{key: float(value) for key, value in guide.summary.items()},
            "quantiles_5_50_95": np.quantile(guide.cells["khat"], [0.05, 0.5, 0.95]).tolist(),
            "draws": guide.n_samples,
        },
        "sbc": {
            "coverage": {str(level): value for level, value in ranks.coverage.items()},
            "p_value": ranks.p_value,
            "deviation": float(ranks.table["deviation"].mean()),
            "z_sd": float(ranks.table["z_sd"].mean()),
            "simulations": ranks.n_simulations,
            "draws": ranks.n_draws,
        },
        "de_genes": {
            "kept": float(genes["kept"].mean()),
            "between_resamples": float(genes["between_resamples"].mean()),
            "average_precision": float(genes["average_precision"].mean()),
        },
        "seconds": seconds,
    }


def main() -> None:
    """Run on each data set and likelihood, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-dir", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in args.data:
        for likelihood in LIKELIHOODS:
            row = criticise(name, likelihood, args.seed, args.data_dir)
            rows.append(row)
            all_genes = row["predictive_coverage"]["all"]
            print(
                f"{name} {likelihood}: PIT deviation {row['pit_deviation']:.3f}, predictive coverage "
                f"{all_genes['0.5']:.3f} and {all_genes['0.9']:.3f} at 50 and 90 %, k-hat above 0.7 in "
                f"{row['khat']['khat_above_0.7']:.0%}, posterior coverage in simulated cells "
                f"{row['sbc']['coverage']['0.5']:.2f} and {row['sbc']['coverage']['0.9']:.2f}",
                flush=True,
            )
            common.save_json(
                common.RESULTS / "criticism.json",
                {
                    "tool": "pyrosc",
                    "machine": common.machine(),
                    "versions": common.versions("pyro-ppl", "torch", "anndata", "numpy"),
                    "rows": rows,
                },
            )


if __name__ == "__main__":
    main()
