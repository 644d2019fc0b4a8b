"""Fit scvi-tools' PEAKVI with its defaults to accessibility of blood cells, and keep its figures as JSON.

Runs in the peer's own environment (scvi-tools 1.4.2, scib-metrics), never in pyrosc's::

    python benchmarks/peer_peakvi.py --out SCRATCH_FOLDER

4,000 cells of hemato_atac with the peaks open in 20 of them or more; the sample is the batch. The clock runs
over ``train()`` alone. The latent space goes to ``--out``, the figures to
``benchmarks/results/peer_peakvi.json`` (``--sample 1``, other cells: ``peer_peakvi_sample1.json``).
"""

from __future__ import annotations

import os

THREADS = 1
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))

import argparse  # noqa: E402
from pathlib import Path  # noqa: E402

import _atac as atac  # noqa: E402
import _common as common  # noqa: E402
import numpy as np  # noqa: E402
import scvi  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.functional import logsigmoid  # noqa: E402


def adapter(module: torch.nn.Module, batch: np.ndarray) -> tuple[atac.Encode, atac.Decode]:
    """Encoder and decoder of a trained module in the form `heldout` asks for; cells come in order."""
    module.eval()
    at = {"first": 0, "codes": torch.zeros(0, 1)}

    def encode(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes = torch.as_tensor(batch[at["first"] : at["first"] + len(x)]).long()[:, None]
        at["first"], at["codes"] = at["first"] + len(x), codes
        q, _ = module.z_encoder(x, codes)
        logits = module.d_encoder.output[0](module.d_encoder.px_decoder(x, codes))
        return q.loc, q.scale, logsigmoid(logits) + logsigmoid(module.region_factors)

    def decode(z: Tensor) -> Tensor:
        codes = at["codes"].repeat_interleave(len(z) // len(at["codes"]), 0)
        return module.z_decoder.output[0](module.z_decoder.px_decoder(z, codes))

    return encode, decode


def main() -> None:
    """Fit, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the latent space (npz)")
    parser.add_argument("--seed", type=int, default=0, help="of the fit; the split is always that of seed 0")
    parser.add_argument("--max-epochs", type=int, default=500, help="other than 500: a trial, not kept")
    parser.add_argument("--sample", type=int, default=0, help="of the cells (see `_atac.load`)")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    adata = atac.load(sample=args.sample)
    train, validation = common.split(adata.n_obs)
    scvi.settings.seed = args.seed
    scvi.model.PEAKVI.setup_anndata(adata, batch_key=atac.BATCH_KEY)
    model = scvi.model.PEAKVI(adata)
    external = [np.sort(train), np.sort(validation), np.array([], dtype=int)]
    with common.Meter() as fit:
        model.train(max_epochs=args.max_epochs, datasplitter_kwargs={"external_indexing": external})
    codes = adata.obs["_scvi_batch"].to_numpy()
    score = atac.heldout(*adapter(model.module, codes[validation]), adata.X[validation].tocsr())
    latent = model.get_latent_representation()
    args.out.mkdir(parents=True, exist_ok=True)
    name = f"peer_peakvi_sample{args.sample}" if args.sample else "peer_peakvi"
    np.savez(args.out / f"{name}.npz", latent=latent)
    result = {
        "tool": "scvi-tools",
        "data": "hemato_atac",
        "cells": adata.n_obs,
        "peaks": adata.n_vars,
        "seed": args.seed,
        "sample": args.sample,
        "machine": common.machine(),
        **fit.as_dict(),
        "epochs": int(model.trainer.current_epoch),
        "steps": int(model.trainer.global_step),
        **score,
        "clusters": atac.agreement(latent, adata.obs[atac.LABELS_KEY]),
        "versions": common.versions("scvi-tools", "torch", "lightning", "scanpy"),
    }
    print({k: v for k, v in result.items() if k != "versions"}, flush=True)
    if args.max_epochs == 500:
        path = common.RESULTS / f"{name}.json"
        common.save_json(path, result)
        scib = common.scib(adata, {"peer": latent}, atac.BATCH_KEY, atac.LABELS_KEY)["peer"]
        common.save_json(path, result | {"scib": scib})


if __name__ == "__main__":
    main()
