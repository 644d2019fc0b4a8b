"""Write the golden numbers of the TOTALVI parity test, as make_golden.py does those of SCVI.

Runs in the peer's own environment (scvi-tools 1.4.2), never in pyrosc's::

    python benchmarks/parity/make_golden_totalvi.py

The peer's ``TOTALVAE`` is built with random weights, its noise is replaced by recorded draws, and its own
``loss`` is evaluated in evaluation mode on a minibatch of two batches with different panels.  To
tests/golden/parity_totalvi.json and .npz.
"""

from __future__ import annotations

import json
import warnings
from importlib import metadata
from typing import Any

import make_golden as base
import numpy as np
import torch
from scvi.module import TOTALVAE
from scvi.train import AdversarialTrainingPlan
from torch import Tensor
from torch.distributions import Bernoulli, LogNormal, Normal, kl_divergence

N_CELLS, N_GENES, N_PROTEINS, N_HIDDEN, N_LATENT = 12, 9, 6, 8, 3
N_BATCH, N_LABELS, N_CATS, N_CONT = 2, 3, 3, 2
PANELS = {"0": [1, 1, 1, 1, 1, 0], "1": [1, 0, 1, 1, 0, 1]}  # whether a batch has a protein
GRADIENT_OF = (
    "background_pro_alpha",
    "background_pro_log_beta",
    "log_per_batch_efficiency",
    "py_r",
    "encoder.z_mean_encoder.bias",
    "decoder.py_fore_scale_decoder.fc_layers.Layer 0.0.bias",
)
LAYER_NORM = {"use_batch_norm": "none", "use_layer_norm": "both"}
PLAIN = {"covariates": False, "panels": True, "size_factor": False}
COVARIATES = PLAIN | {"covariates": True}


def cases() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Name → (options of the module, what of the inputs is in use)."""
    table: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for likelihood in ("nb", "zinb"):
        for gene in ("gene", "gene-batch"):
            for protein in ("protein", "protein-batch"):
                options = {"gene_likelihood": likelihood, "gene_dispersion": gene}
                options |= {"protein_dispersion": protein, **LAYER_NORM}
                table[f"{likelihood}_{gene}_{protein}_plain"] = (options, PLAIN)
                table[f"{likelihood}_{gene}_{protein}_covariates"] = (options, COVARIATES)
    return table | {
        "same_panel": (LAYER_NORM, PLAIN | {"panels": False}),
        "no_encode": ({"encode_covariates": False, **LAYER_NORM}, COVARIATES),
        "decoder_layers2": ({"n_layers_decoder": 2, **LAYER_NORM}, COVARIATES),
        "encoder_layers1": ({"n_layers_encoder": 1, **LAYER_NORM}, COVARIATES),
        "batch_norm": ({}, PLAIN),
        "batch_norm_covariates": ({"gene_likelihood": "zinb"}, COVARIATES),
        "no_norm": ({"use_batch_norm": "none"}, PLAIN),
        "ln": ({"latent_distribution": "ln", **LAYER_NORM}, PLAIN),
        "library": ({"use_observed_lib_size": False, **LAYER_NORM}, PLAIN),
        "size_factor": ({"use_size_factor_key": True, **LAYER_NORM}, PLAIN | {"size_factor": True}),
    }


def make_inputs() -> dict[str, np.ndarray]:
    """Counts, codes, covariates and noise that all cases share."""
    rng = np.random.default_rng(0)
    mean = rng.gamma(0.7, 4.0, N_GENES) * rng.lognormal(0.0, 0.4, (N_CELLS, 1))
    high = rng.random((N_CELLS, N_PROTEINS)) < 0.5
    protein = np.where(high, 60.0, 4.0) * rng.lognormal(0.0, 0.4, (1, N_PROTEINS))
    batch = np.arange(N_CELLS) % N_BATCH
    return {
        "x": rng.poisson(rng.gamma(2.0, mean / 2.0)).astype(np.float32),
        "y": rng.poisson(rng.gamma(3.0, protein / 3.0)).astype(np.float32),
        "mask": np.array([PANELS[str(b)] for b in batch]),
        "batch": batch,
        "labels": rng.permutation(np.arange(N_CELLS) % N_LABELS),
        "cats": rng.permutation(np.arange(N_CELLS) % N_CATS)[:, None],
        "cont": rng.normal(size=(N_CELLS, N_CONT)).astype(np.float32),
        "size_factor": rng.lognormal(2.0, 0.5, N_CELLS).astype(np.float32),
        "eps_z": rng.normal(size=(N_CELLS, N_LATENT)).astype(np.float32),
        "eps_library": rng.normal(size=(N_CELLS, 1)).astype(np.float32),
        "eps_background": rng.normal(size=(N_CELLS, N_PROTEINS)).astype(np.float32),
    }


def build(
    options: dict[str, Any], used: dict[str, Any], inputs: dict[str, np.ndarray], seed: int
) -> TOTALVAE:
    """The peer's module with every parameter and running statistic away from its starting value."""
    torch.manual_seed(seed)
    prior = {}
    if options.get("use_observed_lib_size") is False:
        means, variances = base.library_prior(inputs["x"], inputs["batch"])
        prior = {"library_log_means": means, "library_log_vars": variances}
    panels = {batch: np.array(panel, dtype=bool) for batch, panel in PANELS.items()}
    module = TOTALVAE(
        N_GENES,
        N_PROTEINS,
        n_batch=N_BATCH,
        n_panel=N_BATCH,
        n_labels=N_LABELS,
        n_hidden=N_HIDDEN,
        n_latent=N_LATENT,
        n_continuous_cov=N_CONT if used["covariates"] else 0,
        n_cats_per_cov=[N_CATS] if used["covariates"] else None,
        dropout_rate_encoder=0.0,
        dropout_rate_decoder=0.0,
        protein_batch_mask=panels if used["panels"] else None,
        **prior,
        **options,
    )
    with torch.no_grad():
        module.background_pro_alpha.normal_(1.5, 0.5)
        module.background_pro_log_beta.normal_(-0.5, 0.3)
        module.log_per_batch_efficiency.normal_(0.0, 0.3)
        module.px_r.normal_(0.5, 0.7)
        module.py_r.normal_(1.0, 0.5)
        # initial networks are nearly flat; stretched ones make every term depend on the cell
        for name, value in module.named_parameters():
            if name.endswith("weight") and value.dim() == 2:
                value.mul_(2.0)
    return base.shaken(module)


def tensors(inputs: dict[str, np.ndarray], used: dict[str, Any]) -> dict[str, Tensor]:
    """A minibatch as the peer's loader would give it: proteins that were not measured are 0."""
    column = {k: torch.as_tensor(inputs[k])[:, None] for k in ("batch", "labels", "size_factor")}
    y = inputs["y"] * inputs["mask"] if used["panels"] else inputs["y"]
    batch = {
        "X": torch.as_tensor(inputs["x"]),
        "proteins": torch.as_tensor(y.astype(np.float32)),
        "batch": column["batch"],
        "labels": column["labels"],
    }
    if used["covariates"]:
        batch["extra_categorical_covs"] = torch.as_tensor(inputs["cats"])
        batch["extra_continuous_covs"] = torch.as_tensor(inputs["cont"])
    if used["size_factor"]:
        batch["size_factor"] = column["size_factor"]
    return batch


def background_terms(module: TOTALVAE, inference: Any, generative: Any, mask: Tensor) -> dict[str, Tensor]:
    """The three parts, per cell, of what the peer calls the background's divergence."""
    py = generative["py_"]
    kl = kl_divergence(Normal(py["back_alpha"], py["back_beta"]), inference["back_mean_prior"])
    efficiency = -LogNormal(torch.zeros(1), torch.ones(1)).log_prob(generative["per_batch_efficiency"])
    mixing = -1e-3 * Bernoulli(logits=py["mixing"]).log_prob(torch.ones_like(py["mixing"]))
    return {
        "kl_background": (mask * kl).sum(1),
        "efficiency": efficiency.sum(1),
        "mixing": mixing.sum(1),
    }


def evaluate(module: TOTALVAE, inputs: dict[str, np.ndarray], used: dict[str, Any]) -> dict[str, Any]:
    """Loss by KL weight, its terms per cell, parameters of the laws, gradients at KL weight 1."""
    batch = tensors(inputs, used)
    noise = [inputs[k] for k in ("eps_z", "eps_library", "eps_background")]
    expected: dict[str, Any] = {"loss": {}}
    for weight in base.KL_WEIGHTS:
        module.zero_grad()
        with base.fixed_noise(*noise):
            inference, generative, out = module(batch, loss_kwargs={"kl_weight": weight})
        expected["loss"][str(weight)] = out.loss.item()
    out.loss.backward()
    mask = torch.as_tensor(inputs["mask"] if used["panels"] else np.ones_like(inputs["mask"]))
    parts = background_terms(module, inference, generative, mask)
    torch.testing.assert_close(sum(parts.values()), out.kl_local["kl_div_back_pro"])
    terms = {
        "gene": out.reconstruction_loss["reconst_loss_gene"],
        "protein": out.reconstruction_loss["reconst_loss_protein"],
        "kl_z": out.kl_local["kl_div_z"],
        "kl_library": out.kl_local["kl_div_l_gene"],
        **parts,
    }
    if module.use_observed_lib_size:
        del terms["kl_library"]
    px, py = generative["px_"], generative["py_"]
    laws = {
        "z_loc": inference["qz"].loc,
        "z_scale": inference["qz"].scale,
        "share": px["scale"],
        "back_loc": py["back_alpha"],
        "back_scale": py["back_beta"],
        "increase": py["fore_scale"],
        "mixing": py["mixing"],
    }
    parameters = dict(module.named_parameters())
    expected["terms"] = {name: base.numbers(value) for name, value in terms.items()}
    expected["laws"] = {name: base.numbers(value[:3]) for name, value in laws.items()}
    expected["gradient"] = {name: base.numbers(parameters[name].grad) for name in GRADIENT_OF}
    return expected


def adversarial(
    module: TOTALVAE, inputs: dict[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The classifier's two losses on known latent values: to classify, and to fool."""
    torch.manual_seed(100)
    plan = AdversarialTrainingPlan(module, adversarial_classifier=True)
    classifier = base.shaken(plan.adversarial_classifier).eval()
    z, batch = torch.as_tensor(inputs["eps_z"]), torch.as_tensor(inputs["batch"])[:, None]
    losses = {
        "classify": plan.loss_adversarial_classifier(z, batch, True).item(),
        "fool": plan.loss_adversarial_classifier(z, batch, False).item(),
    }
    return losses, floating(classifier)


def floating(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """All weights and running statistics by name."""
    return {k: v.numpy().copy() for k, v in module.state_dict().items() if v.is_floating_point()}


def flat(state: dict[str, np.ndarray]) -> tuple[list[Any], np.ndarray]:
    """Names with shapes, and all values in a row: many small arrays would be mostly headers."""
    layout = [[name, list(value.shape)] for name, value in state.items()]
    return layout, np.concatenate([value.ravel() for value in state.values()])


def main() -> None:
    """Evaluate every case and write both files."""
    installed = metadata.version("scvi-tools")
    assert installed == base.PEER, f"golden numbers are those of scvi-tools {base.PEER}, not {installed}"
    warnings.simplefilter("ignore")
    inputs = make_inputs()
    layouts: list[list[Any]] = []
    weights: dict[str, np.ndarray] = {}
    record: dict[str, Any] = {}

    def add(name: str, state: dict[str, np.ndarray]) -> int:
        layout, weights[name] = flat(state)
        if layout not in layouts:
            layouts.append(layout)
        return layouts.index(layout)

    for seed, (name, (options, used)) in enumerate(cases().items()):
        module = build(options, used, inputs, seed).eval()
        layout = add(name, floating(module))
        record[name] = {"options": options, "used": used, "layout": layout}
        record[name] |= evaluate(module, inputs, used)
    losses, state = adversarial(module, inputs)
    content = {
        "peer": {"scvi-tools": installed, "torch": metadata.version("torch"), "dtype": "float32"},
        "sizes": {"n_hidden": N_HIDDEN, "n_latent": N_LATENT},
        "inputs": {key: base.numbers(value) for key, value in inputs.items()},
        "cases": record,
        "adversarial": {"layout": add("adversarial", state), **losses},
        "layouts": layouts,
    }
    (base.GOLDEN / "parity_totalvi.json").write_text(json.dumps(content, separators=(",", ":")) + "\n")
    np.savez_compressed(base.GOLDEN / "parity_totalvi.npz", **weights)
    print(f"{len(record)} cases")


if __name__ == "__main__":
    main()
