"""Fit scvi-tools' SCVI with its defaults on one benchmark data set, and keep its figures as JSON.

Runs in the peer's own environment (scvi-tools 1.4.2, scib-metrics, scikit-misc), never in pyrosc's::

    python benchmarks/peer_fit.py kang_ifnb --out SCRATCH_FOLDER

The clock runs over ``train()`` alone.  The latent space goes to ``--out`` (not for git), the figures to
``benchmarks/results/peer_NAME.json`` (``peer_NAME_seedK.json`` for another seed than 0).
"""

from __future__ import annotations

import os

THREADS = 2
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))

import argparse  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

import _common as common  # noqa: E402
import numpy as np  # noqa: E402
import scvi  # noqa: E402
import torch  # noqa: E402
from lightning.pytorch.callbacks import Callback  # noqa: E402
from torch import Tensor  # noqa: E402


class EpochClock(Callback):
    """Notes the time at the end of each training epoch, and nothing else."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_epoch_end(self, *args: object) -> None:
        """Called by the trainer."""
        self.times.append(time.perf_counter())


def adapter(module: torch.nn.Module) -> tuple[common.Encode, common.Decode]:
    """Encoder and decoder of a trained module, in evaluation mode, in the form ``heldout`` asks for."""
    module.eval()

    def encode(x: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        q, _ = module.z_encoder(x.log1p(), batch[:, None])
        return q.loc, q.scale

    def decode(z: Tensor, batch: Tensor, library: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = module.decoder.px_decoder(z, batch[:, None])
        log_share = module.decoder.px_scale_decoder[0](hidden).log_softmax(-1)
        return library + log_share, module.px_r.exp(), module.decoder.px_dropout_decoder(hidden)

    return encode, decode


def main() -> None:
    """Fit, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(common.KEYS))
    parser.add_argument("--out", type=Path, required=True, help="folder for the latent space (npz)")
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--seed", type=int, default=0, help="of the fit; the split is always that of seed 0")
    parser.add_argument("--max-epochs", type=int, default=None, help="for a trial; writes no JSON result")
    args = parser.parse_args()

    torch.set_num_threads(THREADS)
    data = common.load(args.name, args.data_dir)
    train, validation = common.split(data.adata.n_obs)

    with common.Meter() as total:
        scvi.settings.seed = args.seed
        scvi.model.SCVI.setup_anndata(data.adata, batch_key=data.batch_key)
        model = scvi.model.SCVI(data.adata)
        external = [np.sort(train), np.sort(validation), np.array([], dtype=int)]
        clock = EpochClock()
        with common.Meter() as fit:
            model.train(
                max_epochs=args.max_epochs,
                datasplitter_kwargs={"external_indexing": external},
                callbacks=[clock],
            )
    epochs = int(model.trainer.current_epoch)

    encode, decode = adapter(model.module)
    codes = data.adata.obs["_scvi_batch"].to_numpy()
    with common.Meter() as evaluation:
        score = common.heldout(encode, decode, data.adata.X[validation], codes[validation])
    latent = model.get_latent_representation()

    args.out.mkdir(parents=True, exist_ok=True)
    cells = {key: score.pop(key) for key in ("elbo_cells", "iwll_cells")}
    np.savez(
        args.out / f"peer_{args.name}_seed{args.seed}.npz", latent=latent, validation=validation, **cells
    )
    result = {
        "tool": "scvi-tools",
        "data": args.name,
        "cells": data.adata.n_obs,
        "genes": data.adata.n_vars,
        "seed": args.seed,
        "machine": common.machine(),
        **fit.as_dict(),
        "peak_memory_mib": total.peak_mib,
        "peak_process_mib": total.process_mib,
        "epochs": epochs,
        "epoch_seconds": common.spread(clock.times),
        "steps": int(model.trainer.global_step),
        **score,
        "seconds_evaluation": evaluation.seconds,
        "versions": common.versions("scvi-tools", "torch", "lightning", "anndata", "numpy"),
    }
    if data.labels_key:
        result["scib"] = common.scib(data.adata, {"peer": latent}, data.batch_key, data.labels_key)["peer"]
        result["versions"] |= common.versions("scib-metrics", "jax")
    for key, value in result.items():
        print(f"{key}: {value}")
    if args.max_epochs is None:
        suffix = f"_seed{args.seed}" if args.seed else ""
        common.save_json(common.RESULTS / f"peer_{args.name}{suffix}.json", result)


if __name__ == "__main__":
    main()
