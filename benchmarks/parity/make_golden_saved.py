"""Write the golden files of the test that reads saved models: folders of scvi-tools 1.x and what they give.

Runs in the peer's own environment, never in pyrosc's; in one of an older version with names of some cases::

    python benchmarks/parity/make_golden_saved.py
    python benchmarks/parity/make_golden_saved.py scvi_covariates scanvi_linear linear

Small models are trained for a moment on 48 made-up cells and saved by the peer's own ``save``, to
tests/golden/scvi_tools_VERSION/CASE.  Beside them, cells.json holds the counts and obs of the cells,
expected.npz per case the latent means, what the decoder makes of them (``scale``, ``rate``), and where there
are any the probabilities of the labels and the loadings, under the keys ``CASE|NAME``.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import warnings
from importlib import metadata
from typing import Any

import anndata
import make_golden as base
import numpy as np
import pandas as pd
import scipy.sparse as sp
import scvi
import torch

VERSION = metadata.version("scvi-tools")
OUT = base.GOLDEN / f"scvi_tools_{VERSION}"
N_CELLS, N_GENES = 48, 24
SIZES = {"n_hidden": 8, "n_latent": 3}

COVARIATES = {
    "categorical_covariate_keys": ["donor", "chemistry"],
    "continuous_covariate_keys": ["age", "stress"],
}
#: Name → (class, what setup_anndata gets, options of the model).
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "scvi": ("SCVI", {"batch_key": "batch"}, {}),
    "scvi_covariates": (
        "SCVI",
        {"batch_key": "lane", "layer": "counts", **COVARIATES},
        {"n_layers": 2, "encode_covariates": True, "gene_likelihood": "nb", "dispersion": "gene-batch"},
    ),
    "scvi_embedding": (
        "SCVI",
        {"batch_key": "donor", "labels_key": "cell_type", "continuous_covariate_keys": ["age"]},
        {
            "batch_representation": "embedding",
            "batch_embedding_kwargs": {"embedding_dim": 2},
            "encode_covariates": True,
            "dispersion": "gene-label",
        },
    ),
    "scvi_library": (
        "SCVI",
        {"batch_key": "batch"},
        {
            "use_observed_lib_size": False,
            "n_layers": 2,
            "deeply_inject_covariates": False,
            "use_batch_norm": "none",
            "use_layer_norm": "both",
        },
    ),
    "scvi_size_factor": (
        "SCVI",
        {"batch_key": "batch", "size_factor_key": "size_factor"},
        {"dispersion": "gene-cell", "use_batch_norm": "encoder"},
    ),
    "scvi_both_norms": (
        "SCVI",
        {"batch_key": "batch"},
        {"latent_distribution": "ln", "use_layer_norm": "both", "gene_likelihood": "poisson"},
    ),
    "scvi_minified": ("SCVI", {"layer": "counts"}, {"gene_likelihood": "normal"}),
    "scanvi": (
        "SCANVI",
        {"batch_key": "batch", "labels_key": "cell_type", "unlabeled_category": "Unknown"},
        {},
    ),
    "scanvi_linear": (
        "SCANVI",
        {"batch_key": "batch", "labels_key": "cell_type", "unlabeled_category": "Unknown"},
        {"linear_classifier": True, "n_layers": 2},
    ),
    "linear": ("LinearSCVI", {"batch_key": "donor"}, {}),
    "linear_bias": (
        "LinearSCVI",
        {"batch_key": "batch"},
        {
            "use_batch_norm": False,
            "bias": True,
            "gene_likelihood": "zinb",
            "use_observed_lib_size": True,
        },
    ),
}
#: Saved under a prefix, and as the second step of scvi → scanvi.
PREFIXED, IN_TWO_STEPS = "scanvi_linear", "scanvi_linear"


def make_cells() -> anndata.AnnData:
    """Counts with batches and types; an unlabelled category that is not the last by name; lanes by number."""
    rng = np.random.default_rng(0)
    batch, kind = rng.integers(0, 2, N_CELLS), rng.integers(0, 4, N_CELLS)
    log_rate = 1 + rng.normal(0, 0.5, N_GENES) + rng.normal(0, 1, (4, N_GENES))[kind]
    x = rng.poisson(np.exp(log_rate + 0.5 * rng.normal(size=(2, N_GENES))[batch])).astype(np.float32)
    obs = {
        "batch": np.array(["plate_b", "plate_a"])[batch],
        "lane": rng.integers(1, 4, N_CELLS),
        "donor": np.array(["d3", "d1", "d2"])[rng.integers(0, 3, N_CELLS)],
        "chemistry": np.array(["v2", "v3"])[rng.integers(0, 2, N_CELLS)],
        "cell_type": np.array(["B", "T", "Unknown", "Xeno"])[kind],
        "age": rng.normal(50, 2, N_CELLS).round(3),
        "stress": rng.uniform(0, 1, N_CELLS).round(3),
        "size_factor": rng.lognormal(0, 0.3, N_CELLS).round(3),
    }
    adata = anndata.AnnData(sp.csr_matrix(x), obs=pd.DataFrame(obs, index=[f"c{i}" for i in range(N_CELLS)]))
    adata.var_names = [f"g{i}" for i in range(N_GENES)]
    adata.layers["counts"] = adata.X.copy()
    return adata


def train(name: str, adata: anndata.AnnData) -> Any:
    """The peer's model of a case after a few epochs."""
    kind, setup, options = CASES[name]
    cls = getattr(scvi.model, kind)
    arguments = {"max_epochs": 20, "accelerator": "cpu", "enable_progress_bar": False}
    if name == IN_TWO_STEPS:
        unlabeled = setup["unlabeled_category"]
        scvi.model.SCVI.setup_anndata(adata, **{k: v for k, v in setup.items() if k != "unlabeled_category"})
        first = scvi.model.SCVI(adata, **SIZES, n_layers=options["n_layers"])
        first.train(**arguments)
        rest = {k: v for k, v in options.items() if k != "n_layers"}
        model = cls.from_scvi_model(first, unlabeled_category=unlabeled, **rest)
    else:
        cls.setup_anndata(adata, **setup)
        model = cls(adata, **SIZES, **options)
    model.train(**arguments)
    return model


def expected(model: Any) -> dict[str, np.ndarray]:
    """Latent means, and the decoder's scale and rate at them."""
    found: dict[str, list[np.ndarray]] = {"latent": [], "scale": [], "rate": []}
    module = model.module.eval()
    with torch.no_grad():
        for tensors in model._make_data_loader(adata=model.adata, batch_size=16):
            inferred = module.inference(**module._get_inference_input(tensors))
            loc = inferred["qz"].loc
            inferred["z"] = module.z_encoder.z_transformation(loc)
            if inferred.get("ql") is not None:
                inferred["library"] = inferred["ql"].loc
            decoded = module.generative(**module._get_generative_input(tensors, inferred))
            law = decoded["px"]
            found["latent"].append(loc.numpy())
            found["rate"].append(getattr(law, "mu", law.mean).numpy())
            if not isinstance(law, torch.distributions.Normal):  # whose scale is something else
                found["scale"].append(law.scale.numpy())
    return {k: np.concatenate(v) for k, v in found.items() if v}


def main(names: list[str]) -> None:
    """Train, save and evaluate the cases named, or every one."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    cells = make_cells()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    arrays: dict[str, np.ndarray] = {}
    for name in names or CASES:
        scvi.settings.seed = list(CASES).index(name)
        adata = cells.copy()
        model = train(name, adata)
        values = expected(model)
        if CASES[name][0] == "SCANVI":
            soft = model.predict(soft=True)
            values |= {"soft": soft.to_numpy(), "types": np.array(soft.columns, dtype=str)}
        if CASES[name][0] == "LinearSCVI":
            values["loadings"] = model.get_loadings().to_numpy()
        if name == "scvi_minified":
            adata.obsm["qzm"], adata.obsm["qzv"] = model.get_latent_representation(return_dist=True)
            model.minify_adata(use_latent_qzm_key="qzm", use_latent_qzv_key="qzv")
        prefix = "mine_" if name == PREFIXED else None
        model.save(OUT / name, prefix=prefix, save_anndata=False)
        arrays |= {f"{name}|{k}": v for k, v in values.items()}
    np.savez_compressed(OUT / "expected.npz", **arrays)
    content = {
        "peer": {"scvi-tools": VERSION, "torch": metadata.version("torch")},
        "x": base.numbers(cells.X.toarray()),
        "obs": cells.obs.to_dict("list"),
    }
    (OUT / "cells.json").write_text(json.dumps(content, separators=(",", ":")) + "\n")
    size = sum(p.stat().st_size for p in OUT.rglob("*") if p.is_file())
    print(f"{len(names or CASES)} models, {size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
