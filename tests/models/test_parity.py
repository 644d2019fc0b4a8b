"""SCVI's loss against the reference implementation: copied weights, the same minibatch, the same noise.

The golden numbers are written by benchmarks/parity/make_golden.py, which runs scvi-tools 1.4.2.
"""

from __future__ import annotations

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from pyro.poutine.messenger import Messenger

from pyrosc import SCVI
from pyrosc.data.inputs import load_batch
from pyrosc.infer.evaluate import parts_per_cell
from pyrosc.infer.handlers import is_latent
from pyrosc.nn import CategoryTable

GOLDEN = Path(__file__).parents[1] / "golden"
FILE = json.loads((GOLDEN / "parity_scvi.json").read_text())
CASES = FILE["cases"]
SIZES = FILE["sizes"]

# the golden minibatch has a gene without counts, and no unlabelled cell
pytestmark = pytest.mark.filterwarnings("ignore::pyrosc.DataWarning")


class Noise(Messenger):
    """Put loc + scale · eps in place of the guide's draws."""

    def __init__(self, eps: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.eps = eps

    def _pyro_sample(self, msg) -> None:
        if is_latent(msg) and not msg["done"] and msg["name"] in self.eps:
            fn = msg["fn"]
            msg["value"], msg["done"] = fn.mean + fn.stddev * self.eps[msg["name"]], True


def build(name: str) -> SCVI:
    case, inputs = CASES[name], FILE["inputs"]
    used = case["covariates"]
    n = len(inputs["x"])
    cats, cont = np.array(inputs["cats"]), np.array(inputs["cont"])
    obs = pd.DataFrame(index=[f"c{i}" for i in range(n)])
    obs["batch"] = pd.Categorical(np.array(inputs["batch"]).ravel().astype(str))
    obs["labels"] = pd.Categorical(np.array(inputs["labels"]).ravel().astype(str))
    for j in range(cats.shape[1]):
        levels = [str(i) for i in range(SIZES["n_cats"][j])]
        obs[f"cat{j}"] = pd.Categorical(cats[:, j].astype(str), categories=levels)
    for j in range(cont.shape[1]):
        obs[f"cont{j}"] = cont[:, j]
    obs["size_factor"] = np.array(inputs["size_factor"]).ravel()
    adata = ad.AnnData(sp.csr_matrix(np.array(inputs["x"], np.float32)), obs=obs)
    options = dict(case["options"])
    options.pop("use_size_factor_key", None)  # ours follows from size_factor_key
    layer_norm = str(options.pop("use_layer_norm", "none"))
    batch_norm = str(options.pop("use_batch_norm", "both"))
    norm = {("both", "none"): "batch", ("none", "both"): "layer", ("none", "none"): "none"}[
        (batch_norm, layer_norm)
    ]
    keys = {"labels_key": "labels"}
    if used["batch"]:
        keys["batch_key"] = "batch"
    if used["cats"]:
        keys["categorical_covariate_keys"] = [f"cat{j}" for j in range(used["cats"])]
    if used["cont"]:
        keys["continuous_covariate_keys"] = [f"cont{j}" for j in range(cont.shape[1])]
    if used["size_factor"]:
        keys["size_factor_key"] = "size_factor"
    model = SCVI.from_anndata(
        adata,
        standardize=False,
        n_hidden=SIZES["n_hidden"],
        n_latent=SIZES["n_latent"],
        dropout_rate=0.0,
        norm=norm,
        log_variational=True,
        **keys,
        **options,
    )
    copy_weights(model, name)
    return model


def copy_weights(model: SCVI, name: str) -> None:
    arrays = np.load(GOLDEN / "parity_scvi.npz", allow_pickle=False)
    weights = {
        k.split("|", 1)[1]: torch.as_tensor(arrays[k]) for k in arrays.files if k.startswith(f"{name}|")
    }
    with torch.no_grad():
        copy_encoder(model.encoder, weights, "z_encoder")
        copy_layers(model.decoder, weights, "decoder.px_decoder")
        copy_linear(model.scale_head, weights, "decoder.px_scale_decoder.0")
        if model.zi_head is not None:
            copy_linear(model.zi_head, weights, "decoder.px_dropout_decoder")
        if model.dispersion == "gene-cell":
            copy_linear(model.log_theta, weights, "decoder.px_r_decoder")
        elif model.dispersion == "gene":
            model.log_theta.values.copy_(weights["px_r"])
        else:
            rows = weights["px_r"].T
            model.log_theta.rows[: len(rows)] = rows
        if model.embedding is not None:
            model.embedding.rows.copy_(weights["_embeddings_dict.batch.weight"])
        if not model.observed_library:
            copy_encoder(model.library_encoder, weights, "l_encoder")
            prior = torch.stack([weights["library_log_means"][0], weights["library_log_vars"][0]], -1)
            np.testing.assert_allclose(model.library_prior.rows, prior, rtol=1e-4)
            model.library_prior.rows.copy_(prior)


def copy_linear(linear, weights, prefix) -> None:
    linear.weight.copy_(weights[f"{prefix}.weight"])
    linear.bias.copy_(weights[f"{prefix}.bias"])


def copy_encoder(encoder, weights, prefix) -> None:
    copy_layers(encoder.network, weights, f"{prefix}.encoder")
    copy_linear(encoder.loc, weights, f"{prefix}.mean_encoder")
    copy_linear(encoder.log_variance, weights, f"{prefix}.var_encoder")


def copy_layers(network, weights, prefix) -> None:
    """Columns of the peer's weight: own input [with continuous columns in layer 0], then one-hots."""
    for i, layer in enumerate(network.layers):
        base = f"{prefix}.fc_layers.Layer {i}"
        weight = weights[f"{base}.0.weight"]
        layer.linear.bias.copy_(weights[f"{base}.0.bias"])
        at = layer.linear.in_features
        layer.linear.weight.copy_(weight[:, :at])
        values = layer.effects.values
        if values is not None:
            if i == 0:
                values.copy_(weight[:, at : at + len(values)].T)
                at += len(values)
            else:  # the peer does not inject continuous covariates again
                values.zero_()
        for table in layer.effects.tables:
            assert isinstance(table, CategoryTable)
            if table.n_categories > 1:  # the peer has no column for a constant
                table.rows.copy_(weight[:, at : at + table.n_categories].T)
                at += table.n_categories
            else:
                table.rows.zero_()
        assert at == weight.shape[1], "some columns of the peer's weight were not used"
        if f"{base}.1.weight" in weights:
            for key in ("weight", "bias", "running_mean", "running_var"):
                getattr(layer.norm, key).copy_(weights[f"{base}.1.{key}"])


def supported(name: str) -> bool:
    options = CASES[name]["options"]
    both = "both" in str(options.get("use_layer_norm", "none"))
    return not (both and str(options.get("use_batch_norm", "both")) == "both")


def noise() -> Noise:
    eps = torch.as_tensor(np.array(FILE["inputs"]["eps_z"], np.float32))
    library = torch.as_tensor(np.array(FILE["inputs"]["eps_library"], np.float32)).reshape(-1)
    return Noise({"z": eps, "z_raw": eps, "library": library})


def whole(model: SCVI):
    return load_batch(model.datasets, {"main": np.arange(model.registry.n_obs)}, model.device)


NAMES = [n for n in CASES if supported(n)]


def test_cases_cover_every_likelihood_and_dispersion():
    for likelihood in ("zinb", "nb", "poisson", "normal"):
        for dispersion in ("gene", "gene-batch", "gene-label", "gene-cell"):
            hits = [
                CASES[n]["covariates"]["cats"] > 0
                for n in NAMES
                if CASES[n]["options"].get("gene_likelihood") == likelihood
                and CASES[n]["options"].get("dispersion") == dispersion
            ]
            assert set(hits) == {False, True}, (likelihood, dispersion)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", NAMES)
def test_loss_equals_the_reference(name, mode):
    model = build(name).train(mode == "train")
    expected = CASES[name][mode]
    for weight, value in expected["loss"].items():
        with noise():
            loss = model(whole(model), kl_weight=float(weight))
        assert loss.item() == pytest.approx(value, rel=1e-5), (weight, "reconstruction or KL differs")


@pytest.mark.parametrize("name", [n for n in NAMES if "gradient" in CASES[n]["train"]])
def test_gradient_equals_the_reference(name):
    model = build(name).train()
    with noise():
        model(whole(model)).backward()
    ours = {
        "decoder_share_bias": model.scale_head.bias.grad,
        "encoder_mean_bias": model.encoder.loc.bias.grad,
    }
    for key, value in CASES[name]["train"]["gradient"].items():
        expected = np.array(value)
        np.testing.assert_allclose(ours[key], expected, atol=1e-4 * np.abs(expected).max(), err_msg=key)


@pytest.mark.parametrize("name", NAMES[:4])
def test_parts_per_cell_equal_the_reference(name):
    model = build(name).eval()
    with noise():
        parts = parts_per_cell(model, whole(model), 1)
    expected = CASES[name]["eval"]
    np.testing.assert_allclose(-parts["reconstruction"], expected["reconstruction"], rtol=2e-5)
    np.testing.assert_allclose(
        parts["kl"], np.add(expected["kl_z"], expected["kl_library"]), rtol=1e-4, atol=1e-5
    )
