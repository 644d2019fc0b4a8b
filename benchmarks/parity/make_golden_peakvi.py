"""Write the golden numbers of the PEAKVI parity test, as make_golden.py does those of SCVI.

Runs in the peer's own environment (scvi-tools 1.4.2), never in pyrosc's::

    python benchmarks/parity/make_golden_peakvi.py

The peer's ``PEAKVAE`` is built with random weights and its noise replaced by recorded draws. Kept are the
terms of each cell, reconstruction and KL, which are right: its loss divides the KL by the minibatch's size.
To tests/golden/parity_peakvi.json and .npz.
"""

from __future__ import annotations

import json
from importlib import metadata
from typing import Any

import make_golden as base
import numpy as np
import torch
from scvi.module import PEAKVAE

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_factors": {"model_depth": False, "region_factors": False},
    "one_layer": {"n_layers_encoder": 1, "n_layers_decoder": 1},
    "batch_norm": {"use_batch_norm": "both", "use_layer_norm": "none", "model_depth": False},
    "deep": {"deeply_inject_covariates": True},
}


def main() -> None:
    """Evaluate every case and write both files."""
    installed = metadata.version("scvi-tools")
    assert installed == base.PEER, f"golden numbers are those of scvi-tools {base.PEER}, not {installed}"
    inputs = base.make_inputs()
    inputs["x"] = (inputs["x"] > np.median(inputs["x"], 0)).astype(np.float32)
    batch = {"X": torch.as_tensor(inputs["x"]), "batch": torch.as_tensor(inputs["batch"])[:, None]}
    weights: dict[str, np.ndarray] = {}
    record: dict[str, Any] = {}
    for seed, (name, options) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        module = PEAKVAE(
            base.N_GENES,
            n_batch=base.N_BATCH,
            n_hidden=base.N_HIDDEN,
            n_latent=base.N_LATENT,
            n_cats_per_cov=[],
            dropout_rate=0.0,
            **options,
        )
        module = base.shaken(module).eval()
        with torch.no_grad():
            if module.region_factors is not None:
                module.region_factors.normal_(0.0, 1.0)
            with base.fixed_noise(inputs["eps_z"]):
                _, _, out = module(batch)
        state = {k: v.numpy().copy() for k, v in module.state_dict().items() if v.is_floating_point()}
        weights |= {f"{name}|{k}": v for k, v in state.items()}
        record[name] = {
            "options": options,
            "reconstruction": base.numbers(out.reconstruction_loss["reconstruction_loss"]),
            "kl_z": base.numbers(out.kl_local["kl_local"]),
        }
    content = {
        "peer": {"scvi-tools": installed, "torch": metadata.version("torch"), "dtype": "float32"},
        "sizes": {"n_hidden": base.N_HIDDEN, "n_latent": base.N_LATENT},
        "inputs": {k: base.numbers(inputs[k]) for k in ("x", "batch", "eps_z")},
        "cases": record,
    }
    (base.GOLDEN / "parity_peakvi.json").write_text(json.dumps(content, separators=(",", ":")) + "\n")
    np.savez_compressed(base.GOLDEN / "parity_peakvi.npz", **weights)
    print(f"{len(record)} cases")


if __name__ == "__main__":
    main()
