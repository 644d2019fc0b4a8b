"""How surgery takes genes that the query lacks: nothing, the reference's mean, or a count of zero.

Each technology of ``pbmc_3tech`` is the query in turn and loses a random share of its genes; the reference
keeps all.  Accuracy of labels by the 15 nearest neighbours of the reference, as in ``surgery.py``::

    python benchmarks/surgery_missing.py --seeds 0 1 2

Figures go to ``benchmarks/results/surgery_missing.json``.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import warnings
from typing import Any

import _common as common
import numpy as np
import pandas as pd
from surgery import KEPT, TASKS, accuracy, prepare

import pyrosc

LOST = (0.1, 0.3, 0.5)
WAYS = ("mask", "mean", "zero")


def run(seeds: list[int]) -> list[dict[str, Any]]:
    """A record per query, seed, share of genes lost and way to take them."""
    found = []
    for task in TASKS:
        reference, query = prepare(task)
        for seed in seeds:
            model = pyrosc.SCVI.from_anndata(
                reference, batch_key="donor", encode_covariates=True, n_layers=2, seed=seed
            )
            model.fit(seed=seed, progress=False)
            latent = model.get_latent_representation()
            for lost in LOST:
                keep = np.random.default_rng(seed).random(query.n_vars) >= lost
                part = query[:, keep].copy()
                for way in WAYS:
                    mapped = pyrosc.surgery(model, part, missing_genes=way)
                    mapped.fit(seed=seed, progress=False)
                    rate = accuracy(
                        latent,
                        reference.obs["cell_type"],
                        mapped.get_latent_representation(),
                        query.obs["cell_type"],
                    )[f"accuracy_{KEPT}"]
                    found.append({"query": task, "seed": seed, "lost": lost, "way": way, "accuracy": rate})
                    print(found[-1], flush=True)
    return found


def main() -> None:
    """Run, keep and show."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    found = run(args.seeds)
    table = pd.DataFrame(found).groupby(["lost", "query", "way"])["accuracy"].mean().unstack()[list(WAYS)]
    print(table.round(3).to_string())
    common.save_json(
        common.RESULTS / "surgery_missing.json",
        {"data": "pbmc_3tech", "fits": found, "versions": common.versions("pyrosc", "torch")},
    )


if __name__ == "__main__":
    main()
