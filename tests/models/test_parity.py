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
from reference_noise import Noise

from pyrosc import SCVI
from pyrosc.convert.scvi_tools import translate_options
from pyrosc.convert.weights import copy_weights
from pyrosc.data.inputs import load_batch
from pyrosc.infer.evaluate import parts_per_cell

GOLDEN = Path(__file__).parents[1] / "golden"
FILE = json.loads((GOLDEN / "parity_scvi.json").read_text())
CASES = FILE["cases"]
SIZES = FILE["sizes"]

# the golden minibatch has a gene without counts, and no unlabelled cell
pytestmark = pytest.mark.filterwarnings("ignore::pyrosc.DataWarning")


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
    options, _ = translate_options(SCVI, case["options"])
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
        **keys,
        **options,
    )
    weights = weights_of(name)
    if not model.observed_library:
        prior = np.concatenate([weights["library_log_means"], weights["library_log_vars"]]).T
        np.testing.assert_allclose(model.library_prior.rows, prior, rtol=1e-4)
    copy_weights(model, weights)
    return model


def weights_of(name: str) -> dict[str, torch.Tensor]:
    arrays = np.load(GOLDEN / "parity_scvi.npz", allow_pickle=False)
    prefix = f"{name}|"
    return {k.removeprefix(prefix): torch.as_tensor(arrays[k]) for k in arrays.files if k.startswith(prefix)}


def folded(name: str) -> bool:
    """Whether our network equals the peer's in evaluation alone."""
    return translate_options(SCVI, CASES[name]["options"])[1]


def noise() -> Noise:
    eps = torch.as_tensor(np.array(FILE["inputs"]["eps_z"], np.float32))
    library = torch.as_tensor(np.array(FILE["inputs"]["eps_library"], np.float32)).reshape(-1)
    return Noise({"z": eps, "z_raw": eps, "library": library})


def whole(model: SCVI):
    return load_batch(model.datasets, {"main": np.arange(model.registry.n_obs)}, model.device)


NAMES = list(CASES)


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


@pytest.mark.parametrize(
    ("name", "mode"), [(n, m) for n in NAMES for m in ("eval", "train") if m == "eval" or not folded(n)]
)
def test_loss_equals_the_reference(name, mode):
    model = build(name).train(mode == "train")
    expected = CASES[name][mode]
    for weight, value in expected["loss"].items():
        with noise():
            loss = model(whole(model), kl_weight=float(weight))
        assert loss.item() == pytest.approx(value, rel=1e-5), (weight, "reconstruction or KL differs")


@pytest.mark.parametrize("name", [n for n in NAMES if "gradient" in CASES[n]["train"] and not folded(n)])
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
