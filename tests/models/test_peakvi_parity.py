"""PEAKVI's terms of the bound against the reference implementation, on copied weights and noise.

The golden numbers are written by benchmarks/parity/make_golden_peakvi.py, which runs scvi-tools 1.4.2. Its
loss divides the KL by the minibatch's size, so that the terms are compared, not the loss.
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

from pyrosc import PEAKVI
from pyrosc.convert.weights import Weights, _encoder, _layers, _linear, _put
from pyrosc.data.inputs import load_batch
from pyrosc.infer.evaluate import parts_per_cell

GOLDEN = Path(__file__).parents[1] / "golden"
FILE = json.loads((GOLDEN / "parity_peakvi.json").read_text())
NORMS = {"batch_norm": "batch"}


@torch.no_grad()
def copy_weights(model: PEAKVI, tensors: dict[str, torch.Tensor]) -> None:
    """Give a `PEAKVI` with the Bernoulli law the parameters of the peer's module with the same options.

    The peer's cell factor has no slope in the total, and its encoder no least variance: both are set to 0.
    """
    weights = Weights(tensors)
    _encoder(model.encoder, weights, "z_encoder")
    model.encoder.floor = 0.0
    _layers(model.decoder, weights, "z_decoder.px_decoder")
    _linear(model.head, weights, "z_decoder.output.0")
    if model.factor is not None:
        _layers(model.factor.network, weights, "d_encoder.px_decoder")
        _linear(model.factor.head, weights, "d_encoder.output.0")
        model.factor.slope.zero_()
    if model.region is not None:
        _put(model.region.values, weights["region_factors"], "region_factors")
    assert not weights.left()


@pytest.mark.filterwarnings("ignore::pyrosc.DataWarning")
@pytest.mark.parametrize("name", FILE["cases"])
def test_terms_equal_the_reference(name):
    inputs, case = FILE["inputs"], FILE["cases"][name]
    obs = pd.DataFrame({"batch": np.array(inputs["batch"]).astype(str)})
    obs.index = [f"c{i}" for i in range(len(obs))]
    adata = ad.AnnData(sp.csr_matrix(np.array(inputs["x"], np.float32)), obs=obs)
    options = {k: v for k, v in case["options"].items() if not k.startswith("use_")}
    options = {"deeply_inject_covariates": False, "norm": NORMS.get(name, "layer")} | options
    model = PEAKVI.from_anndata(adata, batch_key="batch", dropout_rate=0.0, **FILE["sizes"], **options)
    arrays = np.load(GOLDEN / "parity_peakvi.npz", allow_pickle=False)
    prefix = f"{name}|"
    copy_weights(
        model,
        {k.removeprefix(prefix): torch.as_tensor(arrays[k]) for k in arrays.files if k.startswith(prefix)},
    )
    batch = load_batch(model.datasets, {"main": np.arange(model.registry.n_obs)}, model.device)
    eps = torch.as_tensor(np.array(inputs["eps_z"], np.float32))
    with Noise({"z": eps}):
        terms = parts_per_cell(model.eval(), batch, 1)
    np.testing.assert_allclose(-terms["reconstruction"].numpy(), case["reconstruction"], rtol=1e-5)
    np.testing.assert_allclose(terms["kl"].numpy(), case["kl_z"], rtol=1e-5)
