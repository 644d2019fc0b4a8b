"""Write the golden numbers of the SCANVI parity test, as make_golden.py does those of SCVI.

Runs in the peer's own environment (scvi-tools 1.4.2), never in pyrosc's::

    python benchmarks/parity/make_golden_scanvi.py

The peer's ``SCANVAE`` is built with random weights, its noise is replaced by recorded draws, and its own
``loss`` is evaluated, with the cross-entropy on a labelled minibatch at weight 50.  To
tests/golden/parity_scanvi.json and .npz.
"""

from __future__ import annotations

import json
from importlib import metadata
from typing import Any

import make_golden as base
import numpy as np
import torch
from scvi.module import SCANVAE

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "linear_nb": {"linear_classifier": True, "gene_likelihood": "nb"},
    "layer_norm": {"use_batch_norm": "none", "use_layer_norm": "both"},
    "layers2_encode": {"n_layers": 2, "encode_covariates": True},
    "no_norm": {"use_batch_norm": "none"},
}
USED = base.BATCH


def build(options: dict[str, Any], seed: int) -> SCANVAE:
    """The peer's module with every parameter and running statistic away from its starting value."""
    torch.manual_seed(seed)
    module = SCANVAE(
        base.N_GENES,
        n_batch=base.N_BATCH,
        n_labels=base.N_LABELS,
        n_hidden=base.N_HIDDEN,
        n_latent=base.N_LATENT,
        dropout_rate=0.0,
        **options,
    )
    return base.shaken(module)


def evaluate(module: SCANVAE, inputs: dict[str, np.ndarray], eps_z2: np.ndarray) -> dict[str, Any]:
    """Loss without and with the classification term, in evaluation mode."""
    batch = base.tensors(inputs, USED)
    labelled = {k: v[::2] for k, v in batch.items()}
    expected: dict[str, Any] = {"bound": {}}
    with torch.no_grad():
        for weight in base.KL_WEIGHTS:
            with base.fixed_noise(inputs["eps_z"], eps_z2):
                _, _, out = module(batch, loss_kwargs={"kl_weight": weight})
            expected["bound"][str(weight)] = out.loss.item()
        kwargs = {"kl_weight": 1.0, "labelled_tensors": labelled, "classification_ratio": 50.0}
        # the labelled minibatch is encoded once more; its mean is classified, its draw not used
        with base.fixed_noise(inputs["eps_z"], eps_z2, inputs["eps_z"][::2]):
            _, _, out = module(batch, loss_kwargs=kwargs)
        expected["with_classification"] = out.loss.item()
    return expected


def main() -> None:
    """Evaluate every case and write both files."""
    installed = metadata.version("scvi-tools")
    assert installed == base.PEER, f"golden numbers are those of scvi-tools {base.PEER}, not {installed}"
    inputs = base.make_inputs()
    rows = base.N_LABELS * base.N_CELLS
    eps_z2 = np.random.default_rng(1).normal(size=(rows, base.N_LATENT)).astype(np.float32)
    weights: dict[str, np.ndarray] = {}
    record: dict[str, Any] = {}
    for seed, (name, options) in enumerate(CASES.items()):
        module = build(options, seed).eval()
        state = {k: v.numpy().copy() for k, v in module.state_dict().items() if v.is_floating_point()}
        weights |= {f"{name}|{k}": v for k, v in state.items()}
        record[name] = {"options": options, **evaluate(module, inputs, eps_z2)}
    content = {
        "peer": {"scvi-tools": installed, "torch": metadata.version("torch"), "dtype": "float32"},
        "sizes": {"n_hidden": base.N_HIDDEN, "n_latent": base.N_LATENT},
        "inputs": {k: base.numbers(inputs[k]) for k in ("x", "batch", "labels", "eps_z")},
        "eps_z2": base.numbers(eps_z2),
        "cases": record,
    }
    (base.GOLDEN / "parity_scanvi.json").write_text(json.dumps(content, separators=(",", ":")) + "\n")
    np.savez_compressed(base.GOLDEN / "parity_scanvi.npz", **weights)
    print(f"{len(record)} cases")


if __name__ == "__main__":
    main()
