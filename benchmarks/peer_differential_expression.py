"""Differential expression by scvi-tools' SCVI, with its defaults in "change" mode: the same tasks as ours.

    PEER/bin/python benchmarks/peer_differential_expression.py simulations time

Writes ``results/peer_de_simulations.json`` and ``results/peer_de_time.json``.
"""

import os

THREADS = 1
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, str(THREADS))  # before torch is imported

import argparse  # noqa: E402
import logging  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from pathlib import Path  # noqa: E402

import _common as common  # noqa: E402
import _differential as cases  # noqa: E402
import numpy as np  # noqa: E402
import scvi  # noqa: E402
import torch  # noqa: E402

PACKAGES = ("scvi-tools", "torch", "anndata", "numpy")


def fitted(adata: object, max_epochs: int | None = None, **keys: str) -> object:
    """SCVI with its defaults."""
    scvi.settings.seed = 0
    scvi.model.SCVI.setup_anndata(adata, **keys)
    model = scvi.model.SCVI(adata)
    model.train(max_epochs=max_epochs, enable_progress_bar=False)
    return model


def simulations(seeds: Sequence[int]) -> None:
    """Calls and ranking on each simulation; finished ones are kept, so that a run can go on."""
    path = common.RESULTS / "peer_de_simulations.json"
    done = cases.kept(path)
    for seed in seeds:
        if str(seed) in done:
            continue
        adata, truth = cases.simulate(seed)
        model = fitted(adata)
        with common.Meter() as meter:
            found = model.differential_expression(
                groupby="type", group1="a", group2="b", mode="change", silent=True
            ).loc[adata.var_names]
        lfc, p = found["lfc_mean"].to_numpy(), found["proba_de"].to_numpy()
        done[str(seed)] = {
            **cases.judge(truth, lfc, found["is_de_fdr_0.05"].to_numpy(), p + 1e-6 * np.abs(lfc)),
            "lfc_rmse": float(np.sqrt(np.mean((lfc - truth) ** 2))),
            "seconds": meter.seconds,
        }
        print(seed, done[str(seed)], flush=True)
        common.save_json(path, {"simulations": done, "versions": common.versions(*PACKAGES)})


def clock(data_dir: Path | None) -> None:
    """One-vs-rest over the cell types of kang_ifnb, 4000 variable genes, five times."""
    adata = cases.kang(data_dir, n_genes=4000)
    model = fitted(adata, 2, batch_key="condition")  # time does not depend on the weights
    seconds, cpu_seconds = [], []
    for _ in range(5):
        with common.Meter() as meter:
            model.differential_expression(groupby="cell_type", mode="change", silent=True)
        seconds.append(meter.seconds)
        cpu_seconds.append(meter.cpu_seconds)
    print(seconds, cpu_seconds)
    common.save_json(
        common.RESULTS / "peer_de_time.json",
        {
            "cells": adata.n_obs,
            "genes": adata.n_vars,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "median": float(np.median(seconds)),
            "median_cpu": float(np.median(cpu_seconds)),
            "load": os.getloadavg(),
            "machine": common.machine(),
            "versions": common.versions(*PACKAGES),
        },
    )


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="+", choices=["simulations", "time"])
    parser.add_argument("--seeds", nargs="+", type=int, default=cases.SEEDS)
    parser.add_argument("--data-dir", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if "time" in args.tasks:
        clock(args.data_dir)
    if "simulations" in args.tasks:
        simulations(args.seeds)


if __name__ == "__main__":
    main()
