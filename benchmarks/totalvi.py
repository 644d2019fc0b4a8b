"""Fit pyrosc's TOTALVI on CITE-seq data with hidden proteins, and map a query to it.

    python benchmarks/totalvi.py imputation --seeds 0 1 2
    python benchmarks/totalvi.py imputation --full
    python benchmarks/totalvi.py surgery --seeds 0 1 2

Cells, scores and the held-out bound are those of ``peer_totalvi.py`` (`_cite`).  The clock runs over `fit`
alone.  Proteins are imputed as the peer's are: means of 25 draws from the posterior as seen through the batch
that has proteins, background included.  Surgery also times training anew on all cells.  Figures go to
``benchmarks/results/totalvi_*.json``, a record per seed.
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
import anndata as ad  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import pyrosc  # noqa: E402
from pyrosc import TOTALVI  # noqa: E402

KEYS = {"batch_key": cite.BATCH, "protein_key": cite.PROTEIN}


def adapter(model: TOTALVI) -> tuple[cite.Encode, cite.Decode]:
    """Encoder and decoder of a trained model, in evaluation mode, in the form `_cite.heldout` asks for."""
    model.eval()

    def seen(batch: Tensor) -> Any:
        none = torch.zeros(len(batch), 0)
        return model._covariates(batch, none.long(), none, model._batch_rows(lambda e: e.means()))

    def encode(x: Tensor, y: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        measured = (model.panel(batch) > 0.5) & (y.sum(-1, keepdim=True) > 0)
        covariates = seen(batch) if model.encode_covariates else None
        return model.encoder(model._features(x, y, measured), covariates)

    def decode(z: Tensor, batch: Tensor, library: Tensor) -> dict[str, Tensor]:
        covariates = seen(batch)
        decoded = model._decode(z, covariates, None)
        h = model.background(z, covariates)
        rise = model.foreground_head(model.foreground(z, covariates), covariates)
        return {
            "log_mean": model._log_rho(decoded.logits) + library,
            "inverse_dispersion": model._log_theta(decoded.hidden, batch, batch).exp(),
            "back_loc": model.background_loc(h, covariates),
            "back_scale": torch.nn.functional.softplus(model.background_scale(h, covariates)) + 1e-8,
            "prior_loc": model.prior_loc(batch),
            "prior_scale": model.prior_log_scale(batch).exp(),
            "log_increase": torch.relu(rise).log1p(),
            "log_efficiency": model.log_efficiency(batch),
            "mixing": model.mixing_head(model.mixing(z, covariates), covariates),
            "protein_inverse_dispersion": model._log_phi(batch, batch).exp(),
        }

    return encode, decode


def imputation(seed: int, full: bool, options: dict[str, Any], data_dir: Path | None) -> dict[str, Any]:
    """Hide the proteins of pbmc5k, fit, impute, score."""
    case = cite.imputation_case(full, data_dir)
    train, validation = (np.sort(part) for part in common.split(case.adata.n_obs))
    with common.Meter() as prior:
        model = TOTALVI.from_anndata(case.adata, seed=seed, **KEYS, **options.pop("model", {}))
    with common.Meter() as fit:
        model.fit(train_indices=train, validation_indices=validation, seed=seed, progress=False, **options)
    codes = model.dataset().codes("batch")[validation]
    with common.Meter() as answer:
        protein = model.get_normalized_protein(
            indices=case.rows,
            n_samples=cite.DRAWS,
            transform_batch=cite.GIVEN,
            include_protein_background=True,
        )
    return {
        "cells": case.adata.n_obs,
        "cells_imputed": len(case.rows),
        **fit.as_dict(),
        "seconds_prior": prior.seconds,
        "seconds_imputation": answer.seconds,
        "epochs": len(model.history),
        "steps": int(model.history["steps"].iloc[-1]),
        **cite.score(case.truth, protein),
        "heldout": cite.heldout(*adapter(model), case.adata[validation], codes),
    }


def surgery(seed: int, options: dict[str, Any], data_dir: Path | None) -> dict[str, Any]:
    """Map each batch to a model of the other, and carry the clusters over."""
    found = {}
    for name, (reference, query) in cite.surgery_cases(data_dir).items():
        shape = {"n_layers_encoder": 2, "n_layers_decoder": 2}
        with common.Meter() as first:
            model = TOTALVI.from_anndata(reference, seed=seed, **KEYS, **shape).fit(seed=seed, progress=False)
        with common.Meter() as second:
            mapped = pyrosc.surgery(model, query, **options.get("surgery", {}))
            mapped.fit(seed=seed, progress=False, **options.get("fit", {}))
        known = list(model.registry.var_names("y"))
        both = ad.concat([reference, query], join="inner")
        both.obsm[cite.PROTEIN] = _stacked(reference, query, known)
        with common.Meter() as anew:
            TOTALVI.from_anndata(both, seed=seed, **KEYS, **shape).fit(seed=seed, progress=False)
        latent = model.get_latent_representation(), mapped.get_latent_representation()
        same = np.array_equal(latent[0], mapped.get_latent_representation(reference))
        carried = cite.transfer(latent[0], reference.obs["cluster"], latent[1], query.obs["cluster"], seed)
        found[name] = {
            "cells": [reference.n_obs, query.n_obs],
            "proteins": len(known),
            **carried,
            "seconds_reference": first.seconds,
            "seconds_query": second.seconds,
            "seconds_anew": anew.seconds,
            "reference_unmoved": same,
        }
        print(json.dumps({name: found[name]}), flush=True)
    return {"cases": found}


def _stacked(reference: ad.AnnData, query: ad.AnnData, known: list[str]) -> Any:
    import pandas as pd

    tables = [part.obsm[cite.PROTEIN].reindex(columns=known) for part in (reference, query)]
    return pd.concat(tables)


def main() -> None:
    """Run one question for some seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("question", choices=["imputation", "surgery"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--full", action="store_true", help="impute with all 10,849 cells")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON: of fit; model={…} of the model")
    parser.add_argument("--try", dest="attempt", action="store_true", help="print, keep nothing")
    parser.add_argument("--data-dir", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    warnings.simplefilter("ignore", pyrosc.DataWarning)
    name = f"totalvi_{args.question}{'_full' if args.full else ''}"
    path = common.RESULTS / f"{name}.json"
    kept = (
        json.loads(path.read_text())
        if path.exists()
        else {"tool": "pyrosc", "data": "pbmc_cite", "seeds": {}}
    )
    for seed in args.seeds:
        options = json.loads(json.dumps(args.options))
        if args.question == "imputation":
            record = imputation(seed, args.full, options, args.data_dir)
        else:
            record = surgery(seed, options, args.data_dir)
        print(json.dumps({"seed": seed, **record}), flush=True)
        kept["seeds"][str(seed)] = {"machine": common.machine(), **record}
        kept["versions"] = common.versions("pyrosc", "torch", "pyro-ppl", "anndata", "numpy")
        if not args.attempt:
            common.save_json(path, kept)


if __name__ == "__main__":
    main()
