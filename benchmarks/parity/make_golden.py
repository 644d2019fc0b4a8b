"""Write the golden numbers of the SCVI parity test: losses of scvi-tools 1.4.2 on known weights and noise.

Runs in the peer's own environment, never in pyrosc's::

    python benchmarks/parity/make_golden.py

For every case (likelihood × dispersion × covariates, and the options one by one) the peer's module is built
with random weights, its normal noise is replaced by recorded draws, and its own ``loss`` is evaluated with
normalisation on minibatch statistics (``train``) and on running statistics (``eval``).  Inputs, options and
expected terms go to tests/golden/parity_scvi.json, weights to tests/golden/parity_scvi.npz under the keys
``CASE|PARAMETER``.  How the weights map to another parametrisation: README.md beside this file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scvi.module import VAE
from torch import Tensor

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
PEER = "1.4.2"

N_CELLS, N_GENES, N_HIDDEN, N_LATENT = 16, 30, 8, 3
N_BATCH, N_LABELS, N_CATS, N_CONT = 2, 3, (3, 4), 2
KL_WEIGHTS = (0.0, 0.3, 1.0)
HEADS = {
    "decoder_share_bias": "decoder.px_scale_decoder.0.bias",
    "encoder_mean_bias": "z_encoder.mean_encoder.bias",
}

ALL = {"batch": True, "cats": 1, "cont": True, "size_factor": False}
NONE = {"batch": False, "cats": 0, "cont": False, "size_factor": False}
BATCH = NONE | {"batch": True}


def cases() -> dict[str, tuple[dict[str, Any], dict[str, Any], bool]]:
    """Name → (options of the module, covariates in use, whether gradients are recorded)."""
    table: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {}
    for likelihood in ("zinb", "nb", "poisson", "normal"):
        for dispersion in ("gene", "gene-batch", "gene-label", "gene-cell"):
            base = {"gene_likelihood": likelihood, "dispersion": dispersion}
            # one dispersion per gene and batch needs batches
            table[f"{likelihood}_{dispersion}_plain"] = (
                base,
                BATCH if dispersion == "gene-batch" else NONE,
                False,
            )
            table[f"{likelihood}_{dispersion}_covariates"] = (base, ALL, dispersion == "gene")
    two_layers = {"n_layers": 2, "encode_covariates": True}
    latent_library = {"use_observed_lib_size": False}
    sized = ALL | {"size_factor": True}
    single: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "encode": ({"encode_covariates": True}, ALL),
        "encode_nb_gene-batch": (
            {"encode_covariates": True, "gene_likelihood": "nb", "dispersion": "gene-batch"},
            ALL,
        ),
        "two_categories": ({"encode_covariates": True}, ALL | {"cats": 2}),
        "ln": ({"latent_distribution": "ln"}, NONE),
        "ln_encode": ({"latent_distribution": "ln", "encode_covariates": True}, ALL),
        "ln_library": ({"latent_distribution": "ln", **latent_library}, ALL),
        "library": (latent_library, NONE),
        "library_batch": (latent_library, BATCH),
        "library_encode": ({**latent_library, "encode_covariates": True}, ALL),
        "library_nb_gene-cell": ({**latent_library, "gene_likelihood": "nb", "dispersion": "gene-cell"}, ALL),
        "layers2": ({"n_layers": 2}, ALL),
        "layers2_deep": ({**two_layers, "deeply_inject_covariates": True}, ALL),
        "layers2_shallow": ({**two_layers, "deeply_inject_covariates": False}, ALL),
        "layers2_library": ({**two_layers, **latent_library}, ALL),
        "size_factor": ({"use_size_factor_key": True}, NONE | {"size_factor": True}),
        "size_factor_nb": ({"use_size_factor_key": True, "gene_likelihood": "nb"}, sized),
        "size_factor_layers2": ({**two_layers, "use_size_factor_key": True}, sized),
        "embedding": ({"batch_representation": "embedding"}, ALL),
        "embedding_encode": ({"batch_representation": "embedding", "encode_covariates": True}, ALL),
        "layer_norm": ({"use_batch_norm": "none", "use_layer_norm": "both"}, ALL),
        "both_norms": ({"use_batch_norm": "both", "use_layer_norm": "both", **two_layers}, ALL),
        "no_norm": ({"use_batch_norm": "none"}, ALL),
    }
    gradients = {"encode", "layers2_deep", "library_encode", "ln_encode", "size_factor_nb"}
    return table | {name: (options, used, name in gradients) for name, (options, used) in single.items()}


def make_inputs() -> dict[str, np.ndarray]:
    """Counts, codes, covariates and noise that all cases share."""
    rng = np.random.default_rng(0)
    mean = rng.gamma(0.7, 4.0, N_GENES) * rng.lognormal(0.0, 0.4, (N_CELLS, 1))
    x = rng.poisson(rng.gamma(2.0, mean / 2.0))
    return {
        "x": x.astype(np.float32),
        "batch": np.arange(N_CELLS) % N_BATCH,
        "labels": rng.permutation(np.arange(N_CELLS) % N_LABELS),
        "cats": np.stack([rng.permutation(np.arange(N_CELLS) % k) for k in N_CATS], axis=1),
        "cont": rng.normal(size=(N_CELLS, N_CONT)).astype(np.float32),
        "size_factor": rng.lognormal(0.0, 0.5, N_CELLS).astype(np.float32),
        "eps_z": rng.normal(size=(N_CELLS, N_LATENT)).astype(np.float32),
        "eps_library": rng.normal(size=(N_CELLS, 1)).astype(np.float32),
    }


def library_prior(x: np.ndarray, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and (population) variance of the log totals in each batch, shape (1, batches)."""
    total = np.log(x.sum(1))
    groups = [total[batch == b] for b in range(batch.max() + 1)]
    return np.array([[g.mean() for g in groups]]), np.array([[g.var() for g in groups]])


def build(options: dict[str, Any], used: dict[str, Any], inputs: dict[str, np.ndarray], seed: int) -> VAE:
    """The peer's module with every parameter and running statistic away from its starting value."""
    torch.manual_seed(seed)
    n_batch = N_BATCH if used["batch"] else 1
    batch = inputs["batch"] if used["batch"] else np.zeros(N_CELLS, dtype=int)
    prior = {}
    if options.get("use_observed_lib_size") is False:
        means, variances = library_prior(inputs["x"], batch)
        prior = {"library_log_means": means, "library_log_vars": variances}
    module = VAE(
        N_GENES,
        n_batch=n_batch,
        n_labels=N_LABELS,
        n_hidden=N_HIDDEN,
        n_latent=N_LATENT,
        n_continuous_cov=N_CONT if used["cont"] else 0,
        n_cats_per_cov=list(N_CATS[: used["cats"]]) or None,
        dropout_rate=0.0,
        **prior,
        **options,
    )
    return shaken(module)


def shaken(module: Any) -> Any:
    """A module of the peer with what batch normalisation learns away from its starting values."""
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, torch.nn.BatchNorm1d):
                layer.weight.uniform_(0.5, 1.5)
                layer.bias.normal_(0.0, 0.3)
                layer.running_mean.normal_(0.0, 0.5)
                layer.running_var.uniform_(0.5, 2.0)
    return module


def tensors(inputs: dict[str, np.ndarray], used: dict[str, Any]) -> dict[str, Tensor]:
    """A minibatch as the peer's loader would give it."""
    column = {k: torch.as_tensor(inputs[k])[:, None] for k in ("batch", "labels", "size_factor")}
    batch = {
        "X": torch.as_tensor(inputs["x"]),
        "batch": column["batch"] if used["batch"] else torch.zeros_like(column["batch"]),
        "labels": column["labels"],
    }
    if used["cats"]:
        batch["extra_categorical_covs"] = torch.as_tensor(inputs["cats"][:, : used["cats"]])
    if used["cont"]:
        batch["extra_continuous_covs"] = torch.as_tensor(inputs["cont"])
    if used["size_factor"]:
        batch["size_factor"] = column["size_factor"]
    return batch


@contextmanager
def fixed_noise(*draws: np.ndarray) -> Iterator[None]:
    """Let successive ``Normal.rsample`` calls use the given standard normal draws, in this order."""
    queue = [torch.as_tensor(d) for d in draws]
    original = torch.distributions.Normal.rsample

    def rsample(self: torch.distributions.Normal, sample_shape: torch.Size = torch.Size()) -> Tensor:
        eps = queue.pop(0)
        assert not sample_shape
        assert eps.shape == self.loc.shape
        return self.loc + self.scale * eps

    torch.distributions.Normal.rsample = rsample
    try:
        yield
    finally:
        torch.distributions.Normal.rsample = original


def evaluate(
    module: VAE, batch: dict[str, Tensor], inputs: dict[str, np.ndarray], gradients: bool
) -> dict[str, Any]:
    """Terms of the loss in one mode of the module; gradients at KL weight 1."""
    expected: dict[str, Any] = {"loss": {}}
    for weight in KL_WEIGHTS:
        module.zero_grad()
        with fixed_noise(inputs["eps_z"], inputs["eps_library"]):
            _, _, out = module(batch, loss_kwargs={"kl_weight": weight})
        expected["loss"][str(weight)] = out.loss.item()
    expected["reconstruction"] = numbers(out.reconstruction_loss["reconstruction_loss"])
    expected["kl_z"] = numbers(out.kl_local["kl_divergence_z"])
    expected["kl_library"] = numbers(out.kl_local["kl_divergence_l"])
    if gradients:
        out.loss.backward()
        parameters = dict(module.named_parameters())
        expected["gradient"] = {short: numbers(parameters[name].grad) for short, name in HEADS.items()}
    return expected


def numbers(values: Tensor | np.ndarray) -> list[Any]:
    """Nested lists of plain numbers; nine digits hold a float32 exactly."""
    array = values.detach().numpy() if isinstance(values, Tensor) else values
    if array.dtype.kind == "f":
        array = np.vectorize(lambda v: float(f"{v:.9g}"))(array)
    return array.tolist()


def main() -> None:
    """Evaluate every case and write both files."""
    installed = metadata.version("scvi-tools")
    assert installed == PEER, f"golden numbers are those of scvi-tools {PEER}, not {installed}"
    inputs = make_inputs()
    weights: dict[str, np.ndarray] = {}
    record: dict[str, Any] = {}
    for seed, (name, (options, used, gradients)) in enumerate(cases().items()):
        module = build(options, used, inputs, seed)
        weights |= {
            f"{name}|{k}": v.numpy().copy() for k, v in module.state_dict().items() if v.is_floating_point()
        }
        batch = tensors(inputs, used)
        record[name] = {
            "options": options,
            "covariates": used,
            # running statistics first: a pass in training mode moves them
            "eval": evaluate(module.eval(), batch, inputs, gradients),
            "train": evaluate(module.train(), batch, inputs, gradients),
        }
    content = {
        "peer": {"scvi-tools": installed, "torch": metadata.version("torch"), "dtype": "float32"},
        "sizes": {"n_hidden": N_HIDDEN, "n_latent": N_LATENT, "n_labels": N_LABELS, "n_cats": N_CATS},
        "gradient_of": HEADS,
        "inputs": {key: numbers(value) for key, value in inputs.items()},
        "cases": record,
    }
    GOLDEN.mkdir(parents=True, exist_ok=True)
    (GOLDEN / "parity_scvi.json").write_text(json.dumps(content, separators=(",", ":")) + "\n")
    np.savez_compressed(GOLDEN / "parity_scvi.npz", **weights)
    print(f"{len(record)} cases")


if __name__ == "__main__":
    main()
