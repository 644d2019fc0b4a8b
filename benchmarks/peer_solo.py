"""Fit scvi-tools' SCVI and SOLO with their defaults on data with known doublets, and keep the figures.

Runs in the peer's own environment (scvi-tools 1.4.2)::

    python benchmarks/peer_solo.py hashing_doublets kang_ifnb

SCVI is set up without batches: with several, SOLO gives every simulated doublet the first one. The clock
runs over both ``train()``, the simulation and ``predict()``. Figures go to
``benchmarks/results/peer_solo_NAME.json``.
"""

from __future__ import annotations

import os

THREADS = 2
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))

import argparse  # noqa: E402
import warnings  # noqa: E402
from pathlib import Path  # noqa: E402

import _common as common  # noqa: E402
import _doublets as doublets  # noqa: E402
import scvi  # noqa: E402
import torch  # noqa: E402


def main() -> None:
    """Fit, score, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=doublets.SETS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-dir", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    warnings.simplefilter("ignore")
    for name in args.names:
        data = doublets.load(name, args.data_dir)
        scvi.settings.seed = args.seed
        scvi.model.SCVI.setup_anndata(data.adata)
        with common.Meter() as total:
            with common.Meter() as first:
                vae = scvi.model.SCVI(data.adata)
                vae.train()
            with common.Meter() as second:
                solo = scvi.external.SOLO.from_scvi_model(vae)
                solo.train()
                found = solo.predict(soft=True)["doublet"].to_numpy()
        result = {
            "tool": "scvi-tools",
            "data": name,
            "cells": data.adata.n_obs,
            "genes": data.adata.n_vars,
            "seed": args.seed,
            "machine": common.machine(),
            **doublets.score(data, found),
            "rate": float((found > 0.5).mean()),
            **total.as_dict(),
            "seconds_scvi": first.seconds,
            "seconds_solo": second.seconds,
            "epochs_solo": int(solo.trainer.current_epoch),
            "versions": common.versions("scvi-tools", "torch", "lightning", "anndata", "numpy"),
        }
        for key, value in result.items():
            print(f"{key}: {value}", flush=True)
        suffix = f"_seed{args.seed}" if args.seed else ""
        common.save_json(common.RESULTS / f"peer_solo_{name}{suffix}.json", result)


if __name__ == "__main__":
    main()
