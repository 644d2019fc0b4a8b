"""SCANVI with the reference objective against the reference implementation, on copied weights and noise.

The golden numbers are written by benchmarks/parity/make_golden_scanvi.py, which runs scvi-tools 1.4.2.
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

from pyrosc import SCANVI
from pyrosc.convert.scvi_tools import translate_options
from pyrosc.convert.weights import copy_weights
from pyrosc.data.inputs import load_batch
from pyrosc.infer.handlers import Record

GOLDEN = Path(__file__).parents[1] / "golden"
FILE = json.loads((GOLDEN / "parity_scanvi.json").read_text())
CASES = FILE["cases"]

# the golden minibatch has a gene without counts, and no unlabelled cell
pytestmark = pytest.mark.filterwarnings("ignore::pyrosc.DataWarning")


def build(name: str) -> SCANVI:
    inputs = FILE["inputs"]
    obs = pd.DataFrame({k: np.array(inputs[k]).astype(str) for k in ("batch", "labels")})
    obs.index = [f"c{i}" for i in range(len(obs))]
    adata = ad.AnnData(sp.csr_matrix(np.array(inputs["x"], np.float32)), obs=obs)
    options, _ = translate_options(SCANVI, CASES[name]["options"])
    keys = {"batch_key": "batch", "labels_key": "labels", "reference_objective": True}
    model = SCANVI.from_anndata(adata, dropout_rate=0.0, **keys, **FILE["sizes"], **options)
    arrays = np.load(GOLDEN / "parity_scanvi.npz", allow_pickle=False)
    prefix = f"{name}|"
    weights = {
        k.removeprefix(prefix): torch.as_tensor(arrays[k]) for k in arrays.files if k.startswith(prefix)
    }
    copy_weights(model, weights)
    return model.eval()


def noise() -> Noise:
    eps = np.array(FILE["inputs"]["eps_z"], np.float32)
    eps2 = np.array(FILE["eps_z2"], np.float32).reshape(-1, *eps.shape)
    return Noise({"z": torch.as_tensor(eps), "z2": torch.as_tensor(eps2)})


@pytest.mark.parametrize("name", CASES)
def test_loss_equals_the_reference(name):
    model = build(name)
    batch = load_batch(model.datasets, {"main": np.arange(model.registry.n_obs)}, model.device)
    with torch.no_grad():
        for weight, value in CASES[name]["bound"].items():
            with noise():
                loss = model(batch, kl_weight=float(weight))
            assert loss.item() == pytest.approx(value, rel=1e-5), weight
        record = Record()
        with noise():
            loss = model.loss(batch, 1.0, record)
        labels = batch["labels"].clone()
        batch["labels"][1::2] = -1  # the reference classifies every other cell
        model.split = {"main": (np.arange(0), np.arange(0))}  # and draws no further ones
        term = model.auxiliary(model.inputs(batch), record.sites, 0, 1.0)["classification"]
        assert (loss + term).item() == pytest.approx(CASES[name]["with_classification"], rel=1e-5)
        assert (labels >= 0).all()
