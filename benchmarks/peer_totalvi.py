"""Fit scvi-tools' TOTALVI with its defaults on CITE-seq data with hidden proteins and with a query to map.

Runs in the peer's own environment (scvi-tools 1.4.2)::

    python benchmarks/peer_totalvi.py imputation --out SCRATCH_FOLDER
    python benchmarks/peer_totalvi.py surgery --out SCRATCH_FOLDER

The clock runs over ``train()`` alone.  Trained models go to ``--out`` (not for git) and are used again where
they are found there (``--again`` fits anew); figures go to ``benchmarks/results/peer_totalvi_*.json``.

Imputation follows the peer's own evaluation and tutorial: means of 25 posterior draws as seen through the
batch that has proteins, background included, mixing not sampled.  Surgery follows its tutorials: LayerNorm in
place of BatchNorm, two layers in both networks, and 200 epochs without weight decay for the query.
"""

from __future__ import annotations

import os

THREADS = int(os.environ.setdefault("OMP_NUM_THREADS", "2"))

import argparse  # noqa: E402
import json  # noqa: E402
import warnings  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import _cite as cite  # noqa: E402
import _common as common  # noqa: E402
import anndata  # noqa: E402
import numpy as np  # noqa: E402
import scvi  # noqa: E402
import torch  # noqa: E402
from peer_fit import EpochClock  # noqa: E402
from torch import Tensor  # noqa: E402

TOTALVI = scvi.model.TOTALVI
ARCHES = {"use_layer_norm": "both", "use_batch_norm": "none", "n_layers_encoder": 2, "n_layers_decoder": 2}
QUERY = {"max_epochs": 200, "plan_kwargs": {"weight_decay": 0.0}}


def set_up(adata: anndata.AnnData) -> anndata.AnnData:
    """The cells with 0 for proteins that were not measured, registered."""
    adata = cite.filled(adata)
    TOTALVI.setup_anndata(adata, batch_key=cite.BATCH, protein_expression_obsm_key=cite.PROTEIN)
    return adata


def trained(model: Any, folder: Path, **options: Any) -> dict[str, Any]:
    """Train, save, and give the figures of the fit, which are kept beside the model."""
    clock = EpochClock()
    with common.Meter() as fit:
        model.train(callbacks=[clock], enable_progress_bar=False, **options)
    history = {k: v.iloc[:, 0] for k, v in model.history.items() if k.startswith("elbo")}
    figures = {
        "machine": common.machine(),
        **fit.as_dict(),
        "epochs": int(model.trainer.current_epoch),
        "steps": int(model.trainer.current_epoch * model.trainer.num_training_batches),
        "epoch_seconds": common.spread(clock.times),
        "history": {k: {"best": float(v.min()), "last": float(v.iloc[-1])} for k, v in history.items()},
    }
    model.save(str(folder), overwrite=True)
    common.save_json(folder / "figures.json", figures)
    return figures


def adapter(module: torch.nn.Module) -> tuple[cite.Encode, cite.Decode]:
    """Encoder and decoder of a trained module, in evaluation mode, in the form `_cite.heldout` asks for."""
    module.eval()

    def encode(x: Tensor, y: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        qz = module.inference(x, y, batch[:, None], batch[:, None])["qz"]
        return qz.loc, qz.scale

    def decode(z: Tensor, batch: Tensor, library: Tensor) -> dict[str, Tensor]:
        column = batch[:, None]
        px, py, _ = module.decoder(z, library.exp(), column)
        return {
            "log_mean": px["rate"].log(),
            "inverse_dispersion": module.px_r.exp(),
            "back_loc": py["back_alpha"],
            "back_scale": py["back_beta"],
            "prior_loc": module.background_pro_alpha.T[batch],
            "prior_scale": module.background_pro_log_beta.exp().T[batch],
            "log_increase": py["fore_scale"].log(),
            "log_efficiency": module.log_per_batch_efficiency.T[batch],
            "mixing": py["mixing"],
            "protein_inverse_dispersion": module.py_r.exp(),
        }

    return encode, decode


def imputation(out: Path, seed: int, full: bool, again: bool, data_dir: Path | None) -> None:
    """Hide the proteins of pbmc5k, fit, impute, score."""
    case = cite.imputation_case(full, data_dir)
    adata = set_up(case.adata)
    train, validation = (np.sort(part) for part in common.split(adata.n_obs))
    name = "imputation_full" if full else "imputation"
    folder = out / f"peer_totalvi_{name}_seed{seed}"
    scvi.settings.seed = seed
    if again or not (folder / "figures.json").exists():
        with common.Meter() as prior:
            model = TOTALVI(adata)  # fits the mixtures that start the background's prior
        external = [train, validation, np.array([], dtype=int)]
        figures = trained(model, folder, external_indexing=external)
        figures["seconds_prior"] = prior.seconds
        common.save_json(folder / "figures.json", figures)
    model = TOTALVI.load(str(folder), adata)
    figures = json.loads((folder / "figures.json").read_text())
    encode, decode = adapter(model.module)
    codes = adata.obs["_scvi_batch"].to_numpy()[validation]
    parts = cite.heldout(encode, decode, case.adata[validation], codes)

    scvi.settings.seed = seed
    with common.Meter() as answer:
        _, protein = model.get_normalized_expression(
            indices=case.rows,
            n_samples=cite.DRAWS,
            transform_batch=cite.GIVEN,
            include_protein_background=True,
            sample_protein_mixing=False,
            return_mean=True,
        )
    result = {
        "tool": "scvi-tools",
        "data": "pbmc_cite",
        "cells": adata.n_obs,
        "cells_imputed": len(case.rows),
        "genes": adata.n_vars,
        "proteins": case.truth.shape[1],
        "seed": seed,
        **figures,
        "seconds_imputation": answer.seconds,
        **cite.score(case.truth, protein),
        "heldout": parts,
        "versions": common.versions("scvi-tools", "torch", "lightning", "anndata", "numpy"),
    }
    keep(f"peer_totalvi_{name}", seed, result)


def surgery(out: Path, seed: int, again: bool, data_dir: Path | None) -> None:
    """Map each batch to a model of the other, and carry the clusters over."""
    result: dict[str, Any] = {"tool": "scvi-tools", "data": "pbmc_cite", "seed": seed, "cases": {}}
    for name, (reference, query) in cite.surgery_cases(data_dir).items():
        folder = out / f"peer_totalvi_{name}_seed{seed}"
        adata = set_up(reference)
        columns = adata.obsm[cite.PROTEIN].columns
        mapped = query.copy()
        mapped.obsm[cite.PROTEIN] = query.obsm[cite.PROTEIN].reindex(columns=columns)
        known = int(mapped.obsm[cite.PROTEIN].notna().any().sum())
        mapped = cite.filled(mapped)
        scvi.settings.seed = seed
        if again or not (folder / "reference" / "figures.json").exists():
            trained(TOTALVI(adata, **ARCHES), folder / "reference")
        model = TOTALVI.load(str(folder / "reference"), adata)
        scvi.settings.seed = seed
        query_model = TOTALVI.load_query_data(mapped, model)
        if again or not (folder / "query" / "figures.json").exists():
            trained(query_model, folder / "query", **QUERY)
        query_model = TOTALVI.load(str(folder / "query"), mapped)
        latent = model.get_latent_representation(), query_model.get_latent_representation()
        figures = {
            part: json.loads((folder / part / "figures.json").read_text()) for part in ("reference", "query")
        }
        carried = cite.transfer(latent[0], reference.obs["cluster"], latent[1], query.obs["cluster"], seed)
        result["cases"][name] = {
            "cells": [reference.n_obs, query.n_obs],
            "proteins": len(columns),
            "proteins_shared": known,
            **carried,
            **figures,
        }
    result["versions"] = common.versions("scvi-tools", "torch", "scikit-learn", "anndata", "numpy")
    keep("peer_totalvi_surgery", seed, result)


def keep(name: str, seed: int, result: dict[str, Any]) -> None:
    """Print a result and write it."""
    for key, value in result.items():
        print(f"{key}: {value}", flush=True)
    suffix = f"_seed{seed}" if seed else ""
    common.save_json(common.RESULTS / f"{name}{suffix}.json", result)


def main() -> None:
    """Run one question."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("question", choices=["imputation", "surgery"])
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained models")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--full", action="store_true", help="impute with all 10,849 cells")
    parser.add_argument("--again", action="store_true", help="fit even where a trained model is found")
    parser.add_argument("--data-dir", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    warnings.simplefilter("ignore")
    if args.question == "imputation":
        imputation(args.out, args.seed, args.full, args.again, args.data_dir)
    else:
        surgery(args.out, args.seed, args.again, args.data_dir)


if __name__ == "__main__":
    main()
