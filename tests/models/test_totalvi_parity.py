"""TOTALVI with the reference objective against the reference implementation, on copied weights and noise.

The golden numbers are written by benchmarks/parity/make_golden_totalvi.py, which runs scvi-tools 1.4.2.
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
from reference_noise import Noise

from pyrosc import TOTALVI
from pyrosc.convert.weights import Weights, _columns, _layers, _put
from pyrosc.data.inputs import load_batch
from pyrosc.infer.handlers import Record

GOLDEN = Path(__file__).parents[1] / "golden"
FILE = json.loads((GOLDEN / "parity_totalvi.json").read_text())
CASES = FILE["cases"]
IDLE = ("encoder.l_gene", "decoder.px_dropout_decoder_gene", "library_log")

# the golden minibatch has genes without counts, and no unlabelled cell
pytestmark = pytest.mark.filterwarnings("ignore::pyrosc.DataWarning")


def tensors(name: str) -> dict[str, torch.Tensor]:
    case = FILE["adversarial"] if name == "adversarial" else CASES[name]
    values = torch.as_tensor(np.load(GOLDEN / "parity_totalvi.npz", allow_pickle=False)[name])
    found, at = {}, 0
    for key, shape in FILE["layouts"][case["layout"]]:
        n = int(np.prod(shape))
        found[key] = values[at : at + n].reshape(shape)
        at += n
    return found


def make(name: str, reference: bool = True) -> TOTALVI:
    case, inputs = CASES[name], {k: np.array(v) for k, v in FILE["inputs"].items()}
    used, given = case["used"], dict(case["options"])
    y = inputs["y"].astype(float)
    if used["panels"]:
        y[inputs["mask"] == 0] = np.nan
    index = [f"c{i}" for i in range(len(y))]
    obs = pd.DataFrame({k: inputs[k].ravel().astype(str) for k in ("batch", "labels", "cats")}, index=index)
    obs["size"] = inputs["size_factor"]
    for j in range(inputs["cont"].shape[1]):
        obs[f"cont{j}"] = inputs["cont"][:, j]
    adata = ad.AnnData(sp.csr_matrix(inputs["x"].astype(np.float32)), obs=obs)
    adata.obsm["adt"] = pd.DataFrame(y, index=index, columns=[f"p{t}" for t in range(y.shape[1])])
    options = {"norm": "layer" if given.pop("use_layer_norm", None) else "batch"}
    if given.pop("use_batch_norm", "both") == "none" and options["norm"] == "batch":
        options["norm"] = "none"
    if "gene_dispersion" in given:
        options["dispersion"] = given.pop("gene_dispersion")
    if given.pop("use_size_factor_key", False):
        options["size_factor_key"] = "size"
    if used["covariates"]:
        options["categorical_covariate_keys"] = ["cats"]
        options["continuous_covariate_keys"] = [c for c in obs if c.startswith("cont")]
    return TOTALVI.from_anndata(
        adata,
        batch_key="batch",
        labels_key="labels",
        protein_key="adt",
        standardize=False,
        dropout_rate=0.0,
        reference_objective=reference,
        **FILE["sizes"],
        **options,
        **given,
    )


@torch.no_grad()
def copy(model: TOTALVI, weights: Weights) -> None:
    def head(own, prefix):
        base = f"{prefix}.fc_layers.Layer 0.0"
        _columns(own.weight, own.effects, weights[f"{base}.weight"], base, first=True)
        _put(own.bias, weights[f"{base}.bias"], base)

    def linear(own, prefix):
        _put(own.weight, weights[f"{prefix}.weight"], prefix)
        _put(own.bias, weights[f"{prefix}.bias"], prefix)

    _layers(model.encoder.network, weights, "encoder.encoder")
    linear(model.encoder.loc, "encoder.z_mean_encoder")
    linear(model.encoder.log_variance, "encoder.z_var_encoder")
    if not model.observed_library:
        _layers(model.library_encoder.network, weights, "encoder.l_gene_encoder")
        linear(model.library_encoder.loc, "encoder.l_gene_mean_encoder")
        linear(model.library_encoder.log_variance, "encoder.l_gene_var_encoder")
    trunks = {"decoder": "px_decoder", "background": "py_back_decoder", "foreground": "py_fore_decoder"}
    for ours, theirs in (trunks | {"mixing": "sigmoid_decoder"}).items():
        _layers(getattr(model, ours).network, weights, f"decoder.{theirs}")
    heads = {
        "scale_head": "px_scale_decoder",
        "background_loc": "py_back_mean_log_alpha",
        "background_scale": "py_back_mean_log_beta",
        "foreground_head": "py_fore_scale_decoder",
        "mixing_head": "py_background_decoder",
    }
    if model.zi_head is not None:
        heads["zi_head"] = "px_dropout_decoder_gene"
    for ours, theirs in heads.items():
        head(getattr(model, ours), f"decoder.{theirs}")
    for own, theirs in (
        (model.prior_loc, "background_pro_alpha"),
        (model.prior_log_scale, "background_pro_log_beta"),
        (model.log_efficiency, "log_per_batch_efficiency"),
        (model.log_theta, "px_r"),
        (model.log_phi, "py_r"),
    ):
        value = weights[theirs]
        _put(own.rows if hasattr(own, "rows") else own.values, value.T if value.ndim == 2 else value, theirs)


def build(name: str, **options) -> TOTALVI:
    model = make(name, **options)
    weights = Weights(tensors(name))
    copy(model, weights)
    assert not [k for k in weights.left() if not k.startswith(IDLE)]
    return model.eval()


def noise() -> Noise:
    eps = {k: torch.as_tensor(np.array(FILE["inputs"][f"eps_{k}"], np.float32)) for k in ("z", "library")}
    background = torch.as_tensor(np.array(FILE["inputs"]["eps_background"], np.float32))
    return Noise(
        {
            "z": eps["z"],
            "z_raw": eps["z"],
            "library": eps["library"].reshape(-1),
            "log_background": background,
        }
    )


def whole(model: TOTALVI):
    return load_batch(model.datasets, {"main": np.arange(model.registry.n_obs)}, model.device)


@pytest.mark.parametrize("name", CASES)
def test_loss_equals_the_reference(name):
    model = build(name)
    for weight, value in CASES[name]["loss"].items():
        with noise():
            loss = model(whole(model), kl_weight=float(weight))
        assert loss.item() == pytest.approx(value, rel=1e-5), weight


@pytest.mark.parametrize("name", ["nb_gene_protein_plain", "zinb_gene-batch_protein-batch_covariates", "ln"])
def test_gradient_equals_the_reference(name):
    model = build(name)
    with noise():
        model(whole(model)).backward()
    ours = {
        "background_pro_alpha": model.prior_loc.rows.grad.T,
        "background_pro_log_beta": model.prior_log_scale.rows.grad.T,
        "log_per_batch_efficiency": model.log_efficiency.rows.grad.T,
        "py_r": next(iter(model.log_phi.parameters())).grad.mT
        if name.count("-") > 1
        else model.log_phi.values.grad,
        "encoder.z_mean_encoder.bias": model.encoder.loc.bias.grad,
        "decoder.py_fore_scale_decoder.fc_layers.Layer 0.0.bias": model.foreground_head.bias.grad,
    }
    assert set(ours) == set(CASES[name]["gradient"])
    for key, value in CASES[name]["gradient"].items():
        expected = np.array(value)
        np.testing.assert_allclose(ours[key], expected, atol=2e-4 * np.abs(expected).max(), err_msg=key)


def test_the_bound_differs_from_the_reference_by_what_the_specification_says():
    """At weight 1: without the mixing term, with the efficiency's Normal prior counted once, not per cell."""
    name = "same_panel"
    model, terms = build(name, reference=False), CASES[name]["terms"]
    n = model.registry.n_obs
    with noise():
        loss = model(whole(model))
    kept = sum(np.array(v) for k, v in terms.items() if k not in ("efficiency", "mixing"))
    rows = model.log_efficiency.rows.detach()
    prior = -torch.distributions.Normal(0.0, 1.0).log_prob(rows).sum().item()
    assert loss.item() == pytest.approx(kept.mean() + prior / n, rel=1e-5)
    with noise():  # the likelihood of the proteins is not annealed
        start = model(whole(model), kl_weight=0.0)
    likelihood = (np.array(terms["gene"]) + np.array(terms["protein"])).mean()
    assert start.item() == pytest.approx(likelihood + prior / n, rel=1e-5)


def test_the_adversary_equals_the_reference():
    model = build("nb_gene_protein_plain")
    weights = tensors("adversarial")
    classifier = model.batch_classifier
    eps = torch.as_tensor(np.array(FILE["inputs"]["eps_z"], np.float32))
    codes = whole(model)["batch"]
    logits = reference_logits(weights, eps)
    classifier.forward = lambda z: logits + 0 * z.sum()
    model.adversarial = True
    found = model.auxiliary({"batch": codes}, {"z": eps}, 0, 0.0)
    assert found["adversary"].item() == pytest.approx(FILE["adversarial"]["classify"], rel=1e-5)
    assert found["confusion"].item() == pytest.approx(FILE["adversarial"]["fool"], rel=1e-5)
    assert model.auxiliary({"batch": codes}, {"z": eps}, 0, 1.0) == {}
    half = model.auxiliary({"batch": codes}, {"z": eps}, 0, 0.5)
    assert half["confusion"].item() == pytest.approx(FILE["adversarial"]["fool"] / 2, rel=1e-5)


def reference_logits(weights: dict[str, torch.Tensor], z: torch.Tensor) -> torch.Tensor:
    """The peer's classifier: linear, batch norm with its running statistics, ReLU, twice; then linear."""
    linear = sorted(k for k in weights if k.endswith("weight") and weights[k].ndim == 2)
    h = z
    for key in linear[:-1]:
        h = h @ weights[key].T + weights[key.replace("weight", "bias")]
        norm = key.replace(".0.weight", ".1")
        scale = weights[f"{norm}.weight"] / (weights[f"{norm}.running_var"] + 1e-3).sqrt()
        h = ((h - weights[f"{norm}.running_mean"]) * scale + weights[f"{norm}.bias"]).relu()
    last = linear[-1]
    return h @ weights[last].T + weights[last.replace("weight", "bias")]


def test_sites_of_the_same_pass():
    """What results are read from equals the peer's parameters."""
    name = "zinb_gene_protein_plain"
    model, laws = build(name), CASES[name]["laws"]
    record = Record()
    with noise(), torch.no_grad():
        model.loss(whole(model), 1.0, record)
    rise = np.array(laws["increase"])
    probability = 1 / (1 + np.exp(np.array(laws["mixing"])))
    sites = {k: v[:3] for k, v in record.sites.items() if k != "x"}
    background = sites["log_background"].exp().numpy()
    np.testing.assert_allclose(sites["rho"], laws["share"], rtol=1e-4)
    np.testing.assert_allclose(sites["foreground_probability"], probability, rtol=1e-4)
    np.testing.assert_allclose(sites["foreground_mean"], background * rise, rtol=1e-4)
    np.testing.assert_allclose(sites["protein"], background * rise * probability, rtol=1e-4)
