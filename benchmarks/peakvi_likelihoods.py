"""PEAKVI's three laws on accessibility of blood cells: held-out likelihoods of the counts and of 1[x > 0].

On the 4,000 cells of hemato_atac that `peakvi.py` takes, with its split. By importance sampling from the
guide, 100 draws per cell: the likelihood of whether a region was seen, which all three laws give, and that of
the fragments min(x, 4), which the laws of counts give (the Poisson law's with its mass above 3 at 4)::

    python benchmarks/peakvi_likelihoods.py --seeds 0

Figures go to ``benchmarks/results/peakvi_likelihoods.json``.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import math
import warnings
from typing import Any

import _atac as atac
import _common as common
import numpy as np
import torch
from torch import Tensor

import pyrosc

LAWS = ("bernoulli", "beta_binomial", "poisson")
DRAWS, MOST = 100, 4


def log_masses(model: Any, x: Tensor, z: Tensor, code: int) -> tuple[Tensor, Tensor | None]:
    """Log-mass of 1[x > 0], and of min(x, 4), of one cell, (g,), at draws of its latent space: (draws,)."""
    none = z.new_zeros(len(z), 0)
    logits = model.head(model.decoder(z, model._covariates(torch.full((len(z),), code), none.long(), none)))
    rows = x.expand(len(z), -1)
    log_d = model._log_cell_factor(rows, model._features(rows)).unsqueeze(-1)
    _, law = model.law(rows, logits, log_d, model.log_region_factors())
    log_zero = law.log_prob(torch.zeros_like(rows)).double()
    seen = torch.where(rows > 0, torch.log(-torch.expm1(log_zero.clamp(max=-1e-12))), log_zero).sum(-1)
    if model.likelihood == "bernoulli":
        return seen, None
    counts = law.log_prob(rows.clamp(max=MOST)).double()
    if model.likelihood == "poisson":  # what is cut at 4
        below = torch.stack([law.log_prob(torch.full_like(rows, k)) for k in range(MOST)]).double()
        above = torch.log1p(-below.exp().sum(0).clamp(max=1 - 1e-12))
        counts = torch.where(rows >= MOST, above, counts)
    return seen, counts.sum(-1)


@torch.no_grad()
def heldout(model: Any, rows: np.ndarray) -> dict[str, float]:
    """Nats per held-out cell, with standard errors over cells."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[float]] = {"seen": [], "fragments": []}
    batch = next(iter(model.batches(model.dataset(), rows, len(rows))))[1]
    for x, code in zip(batch["x"], batch["batch"], strict=True):
        loc, scale = model.encoder(model._features(x[None]), None)
        noise = torch.randn(DRAWS, loc.shape[1], generator=generator)
        z = loc + scale * noise
        weight = (scale.log() + 0.5 * noise**2 - 0.5 * z**2).sum(-1).double()
        for name, log_mass in zip(found, log_masses(model, x, z, int(code)), strict=True):
            if log_mass is not None:
                found[name].append(float((log_mass + weight).logsumexp(0)) - math.log(DRAWS))
    out = {}
    for name, values in found.items():
        if values:
            out |= {name: float(np.mean(values)), f"{name}_se": float(np.std(values) / len(values) ** 0.5)}
    return out


def main() -> None:
    """Fit each law, score, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    adata = atac.load()
    train, validation = common.split(adata.n_obs)
    fits = []
    for seed in args.seeds:
        for law in LAWS:
            model = pyrosc.PEAKVI.from_anndata(
                adata, batch_key=atac.BATCH_KEY, counts="reads", likelihood=law, seed=seed
            )
            with common.Meter() as fit:
                model.fit(
                    train_indices=np.sort(train),
                    validation_indices=np.sort(validation),
                    seed=seed,
                    progress=False,
                )
            fits.append(
                {"likelihood": law, "seed": seed, **fit.as_dict(), **heldout(model, np.sort(validation))}
            )
            print({k: v for k, v in fits[-1].items() if k != "load"}, flush=True)
    common.save_json(
        common.RESULTS / "peakvi_likelihoods.json",
        {
            "data": "hemato_atac",
            "cells": adata.n_obs,
            "regions": adata.n_vars,
            "fits": fits,
            "versions": common.versions("pyrosc", "torch"),
        },
    )


if __name__ == "__main__":
    main()
