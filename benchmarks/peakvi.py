"""PEAKVI with its defaults on accessibility of blood cells: held-out likelihood, clusters, mixing, seconds.

On the 4,000 cells of hemato_atac that `peer_peakvi.py` fits the peer to, with the same split and one
estimator, several seeds; then once on all cells. Clusters and integration are scored in the peer's
environment, which has igraph and scib-metrics; with ``--steps`` it times training steps of both tools
instead, in interleaved rounds::

    python benchmarks/peakvi.py --peer-python PATH --seeds 0 1 2 [--sample 1]
    python benchmarks/peakvi.py --peer-python PATH --steps
"""

from __future__ import annotations

import os

THREADS = 1
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))

import argparse  # noqa: E402
import json  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
import warnings  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import _atac as atac  # noqa: E402
import _common as common  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

FEW, MANY = 32, 160


def adapter(model: Any, codes: np.ndarray) -> tuple[atac.Encode, atac.Decode]:
    """Encoder and decoder of a trained model in the form `heldout` asks for; cells come in order."""
    at = {"first": 0, "codes": torch.zeros(0)}
    empty = torch.zeros(0, 0)

    def encode(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = (x / 2).ceil()  # reads to fragments, as the model takes them
        at["codes"] = torch.as_tensor(codes[at["first"] : at["first"] + len(x)])
        at["first"] += len(x)
        loc, scale = model.encoder(model._features(x), None)
        return (
            loc,
            scale,
            model._log_cell_factor(x, model._features(x)).unsqueeze(-1) + model.log_region_factors(),
        )

    def decode(z: Tensor) -> Tensor:
        batch = at["codes"].repeat_interleave(len(z) // len(at["codes"]))
        none = empty.new_zeros(len(batch), 0)
        return model.head(model.decoder(z, model._covariates(batch, none.long(), none)))

    return encode, decode


def fit_one(n_cells: int | None, sample: int, seed: int, python: str) -> dict[str, Any]:
    """Fit and score; the record."""
    import pyrosc

    adata = atac.load(n_cells, sample=sample)
    train, validation = common.split(adata.n_obs)
    model = pyrosc.PEAKVI.from_anndata(adata, batch_key=atac.BATCH_KEY, counts="reads", seed=seed)
    with warnings.catch_warnings(), common.Meter() as fit:
        warnings.simplefilter("ignore")
        model.fit(
            train_indices=np.sort(train), validation_indices=np.sort(validation), seed=seed, progress=False
        )
    codes = adata.obs[atac.BATCH_KEY].cat.codes.to_numpy().astype(np.int64)
    model.eval()
    score = atac.heldout(*adapter(model, codes[validation]), adata.X[validation].tocsr())
    assert model.history is not None
    return {
        "cells": adata.n_obs,
        "peaks": adata.n_vars,
        "seed": seed,
        "sample": sample,
        **fit.as_dict(),
        "steps": int(model.history["steps"].iloc[-1]),
        **score,
        **scores(model.get_latent_representation(), python, n_cells is None, sample),
    }


def scores(latent: np.ndarray, python: str, all_cells: bool, sample: int) -> dict[str, Any]:
    """Clusters' agreement, and integration, computed in the peer's environment."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "latent.npz"
        np.savez(file, ours=latent)
        command = [python, str(Path(atac.__file__)), str(file)]
        command += ["--all-cells"] * all_cells + ["--scib", "--sample", str(sample)]
        done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])["ours"]


def step_seconds(tool: str) -> float:
    """Processor milliseconds per training step on one thread: 160 steps less 32, divided by 128."""
    adata = atac.load(None)

    def run(steps: int) -> float:
        if tool == "peer":
            import scvi

            scvi.model.PEAKVI.setup_anndata(adata, batch_key=atac.BATCH_KEY)
            model = scvi.model.PEAKVI(adata)
            start = time.process_time()
            model.train(max_epochs=10, max_steps=steps, train_size=1.0, early_stopping=False)
            return time.process_time() - start
        import pyrosc

        ours = pyrosc.PEAKVI.from_anndata(adata, batch_key=atac.BATCH_KEY, counts="reads")
        start = time.process_time()
        ours.fit(max_steps=steps, train_size=1.0, progress=False)
        return time.process_time() - start

    run(4)
    return 1000 * (run(MANY) - run(FEW)) / (MANY - FEW)


def time_steps(python: str, rounds: int) -> None:
    """Interleaved rounds, each a process of its own; medians to results/peakvi_steps.json."""
    found: dict[str, list[float]] = {"peer": [], "pyrosc": []}
    before = os.getloadavg()
    for _ in range(rounds):
        for tool, interpreter in (("peer", python), ("pyrosc", sys.executable)):
            done = subprocess.run(
                [interpreter, __file__, "--worker", tool], check=True, text=True, stdout=subprocess.PIPE
            )
            found[tool].append(json.loads(done.stdout.splitlines()[-1]))
            print(tool, found[tool][-1], flush=True)
    medians = {tool: statistics.median(ms) for tool, ms in found.items()}
    result = {
        "what": "processor time of a training step, all cells and peaks of hemato_atac, minibatches of 128",
        "machine": common.machine(),
        "load": {"before": before, "after": os.getloadavg()},
        "median_ms": medians,
        "rounds_ms": found,
        "ratio": medians["peer"] / medians["pyrosc"],
    }
    common.save_json(common.RESULTS / "peakvi_steps.json", result)
    print(medians, result["ratio"])


def main() -> None:
    """Fit, or time steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", help="interpreter of the environment that holds scvi-tools")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--sample", type=int, default=0, help="of the cells (see `_atac.load`)")
    parser.add_argument("--no-full", action="store_true", help="leave out the fit to all cells")
    parser.add_argument("--steps", action="store_true", help="time steps of both tools")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", choices=["peer", "pyrosc"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    warnings.simplefilter("ignore")
    if args.worker:
        return print(json.dumps(step_seconds(args.worker)))
    if not args.peer_python:
        parser.error("clusters are scored, and steps compared, with the peer's interpreter: --peer-python")
    if args.steps:
        return time_steps(args.peer_python, args.rounds)
    path = common.RESULTS / "peakvi.json"
    kept = json.loads(path.read_text())["fits"] if path.exists() else []
    fits = {(f["cells"], f.get("sample", 0), f["seed"]): f for f in kept}
    whole = [(None, 0)] * (not args.no_full and args.sample == 0)
    for n_cells, seed in [(atac.CELLS, s) for s in args.seeds] + whole:
        found = fit_one(n_cells, args.sample, seed, args.peer_python)
        fits[found["cells"], args.sample, seed] = found
        print({k: v for k, v in found.items() if k != "scib"}, flush=True)
        result = {
            "tool": "pyrosc",
            "machine": common.machine(),
            "versions": common.versions("pyrosc", "torch"),
            "fits": [fits[key] for key in sorted(fits)],
        }
        common.save_json(path, result)
    return None


if __name__ == "__main__":
    main()
