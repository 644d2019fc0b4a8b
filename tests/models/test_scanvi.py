"""SCANVI: its objective by brute force, labels kept and found, calibration, starting from SCVI."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from toy import make_adata

import pyrosc
from pyrosc import SCANVI, SCVI
from pyrosc.data.inputs import load_batch
from pyrosc.infer.calibration import expected_calibration_error, fit_temperature
from pyrosc.infer.handlers import Record
from pyrosc.models.scanvi import _type_row

SMALL = {"n_hidden": 16, "n_latent": 3}


def partly_labelled(n=120, g=12, share=0.5, seed=0):
    adata = make_adata(n=n, g=g)
    rng = np.random.default_rng(seed)
    names = np.array(["B", "T", "NK"])[rng.integers(0, 3, n)]
    adata.obs["type"] = np.where(rng.random(n) < share, names, "?")
    return adata


def made(adata=None, **options):
    adata = partly_labelled() if adata is None else adata
    keys = {"labels_key": "type", "unlabeled_category": "?", "batch_key": "batch"}
    return SCANVI.from_anndata(adata, **keys, **(SMALL | options))


def batch_of(model, n=40):
    return load_batch(model.datasets, {"main": np.arange(n)}, model.device)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_bound_is_the_sum_over_types(reference, weight):
    model = made(reference_objective=reference).double().eval()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch_of(model).items()}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        record = Record()
        found = model.loss(batch, weight, record).item()
        z, z2 = record.sites["z"], record.sites["z2"]  # (n, k) and (K, n, k)
        x, labels, n_types = batch["x"], batch["labels"], 3
        q_z = dist.Normal(*model._posterior_of_z(batch))
        q_y = model.classifier(z).softmax(-1)
        law = pyrosc.infer.posterior.traces(model, batch, 1, fixed={"z": z})[1].nodes["x"]["fn"]
        total = law.log_prob(x)
        kl_weight_z = 1.0 if reference else weight
        total = total - kl_weight_z * q_z.log_prob(z).sum(-1)
        for i in range(len(x)):
            seen = int(labels[i]) if labels[i] >= 0 and not reference else None
            for k in range(n_types):
                y = torch.tensor(k if seen is None else seen)
                share = q_y[i, k] if seen is None else 1 / n_types
                q_2 = dist.Normal(*model.z2_encoder(z[i], _type_row(y, z)))
                p_z = dist.Normal(*model.z_prior(z2[k, i], _type_row(y, z)))
                kl_2 = torch.distributions.kl_divergence(q_2, dist.Normal(torch.zeros(3), 1.0)).sum()
                total[i] += share * (kl_weight_z * p_z.log_prob(z[i]).sum() - weight * kl_2)
            if seen is None:
                total[i] -= weight * (q_y[i] * (q_y[i].log() + math.log(n_types))).sum()
            else:
                total[i] -= math.log(n_types)
    assert found == pytest.approx(-total.mean().item(), rel=1e-6)


def test_the_classifier_learns_from_labelled_cells_only():
    model = made(classification_weight=7.0).eval()
    batch = batch_of(model, 100)
    model.split = {"main": (np.arange(120), np.arange(0))}
    with torch.no_grad():
        z = torch.randn(100, 3)
        term = model.auxiliary(model.inputs(batch), {"z": z}, 0, 1.0)["classification"]
        known = batch["labels"] >= 0
        assert known.sum() > 40
        logits = model.classifier(z[known])
        lacking = 64 - int(known.sum())
        if lacking <= 0:
            expected = torch.nn.functional.cross_entropy(logits, batch["labels"][known])
            assert term.item() == pytest.approx(7 * expected.item(), rel=1e-6)
        few = {k: v[~known][:10] for k, v in model.inputs(batch).items()}
        drawn = model.auxiliary(few, {"z": z[~known][:10]}, 0, 1.0)  # no labelled cell: some are drawn
        assert torch.isfinite(drawn["classification"])


@pytest.fixture(scope="module")
def types():
    """Three separable types in two batches; the labels of the second are hidden."""
    adata = pyrosc.simulate.scvi(900, 80, n_types=3, n_batches=2, mean_library=1500, seed=3).adata
    adata.obs["label"] = np.where(adata.obs["batch"] == "batch0", adata.obs["cell_type"], "unknown")
    model = SCANVI.from_anndata(
        adata, labels_key="label", unlabeled_category="unknown", batch_key="batch", n_hidden=32, n_latent=5
    )
    return adata, model.fit(40, progress=False)


def test_hidden_labels_are_found(types):
    adata, model = types
    hidden = (adata.obs["batch"] != "batch0").to_numpy()
    found = model.predict()
    assert isinstance(found, pd.Series)
    assert found.index.equals(adata.obs_names)
    assert (found[hidden] == adata.obs["cell_type"][hidden]).mean() > 0.9
    soft = model.predict(soft=True)
    assert list(soft.columns) == ["type0", "type1", "type2"]
    np.testing.assert_allclose(soft.sum(1), 1, rtol=1e-5)
    assert (soft.idxmax(axis=1) == found.astype(str)).all()
    codes = adata.obs["cell_type"].astype("category").cat.codes.to_numpy()
    assert expected_calibration_error(soft.to_numpy()[hidden], codes[hidden]) < 0.1
    some = model.predict(indices=[5, 3])
    assert list(some.index) == [adata.obs_names[5], adata.obs_names[3]]


def test_other_cells_with_unknown_labels_are_predicted(types):
    adata, model = types
    other = adata[::7].copy()
    del other.obs["label"]
    other.obs["label"] = "never seen"
    assert set(model.predict(other)) <= {"type0", "type1", "type2"}
    missing = adata[::7].copy()
    missing.obs["label"] = np.nan
    pd.testing.assert_series_equal(model.predict(missing), model.predict(other))


def test_annotate_writes_label_and_confidence(types, tmp_path):
    adata, model = types
    written = model.annotate(adata.copy())
    assert "X_scANVI" in written.obsm
    assert (written.obs["scanvi_label"] == model.predict()).all()
    written.write_h5ad(tmp_path / "a.h5ad")


def test_saved_and_loaded(types, tmp_path):
    adata, model = types
    model.save(tmp_path / "m")
    again = pyrosc.load(tmp_path / "m", adata)
    pd.testing.assert_frame_equal(again.predict(soft=True), model.predict(soft=True))
    assert again.temperature == model.temperature


def test_from_scvi(types):
    adata, _ = types
    keys = {"batch_key": "batch", "n_hidden": 32, "n_latent": 5}
    scvi = SCVI.from_anndata(adata, **keys).fit(20, progress=False)
    model = SCANVI.from_scvi_model(scvi, "label", unlabeled_category="unknown")
    np.testing.assert_array_equal(model.get_latent_representation(), scvi.get_latent_representation())
    np.testing.assert_array_equal(model.train_indices, scvi.train_indices)
    assert model.plan.warmup == 0
    model.fit(15, progress=False)
    hidden = (adata.obs["batch"] != "batch0").to_numpy()
    assert (model.predict()[hidden] == adata.obs["cell_type"][hidden]).mean() > 0.85
    with pytest.raises(TypeError, match="n_latent was chosen"):
        SCANVI.from_scvi_model(scvi, "label", n_latent=3)


def test_few_labels_are_enough(types):
    adata, _ = types
    adata = adata.copy()
    rng = np.random.default_rng(0)
    every = [np.flatnonzero(adata.obs["cell_type"] == f"type{i}") for i in range(3)]
    keep = np.concatenate([rng.choice(rows, 8) for rows in every])
    label = np.full(adata.n_obs, "unknown", dtype=object)
    label[keep] = adata.obs["cell_type"].astype(str).to_numpy()[keep]
    adata.obs["label"] = label
    keys = {"labels_key": "label", "unlabeled_category": "unknown", "batch_key": "batch"}
    model = SCANVI.from_anndata(adata, **keys, n_hidden=32, n_latent=5)
    model.fit(40, progress=False)
    assert (model.predict() == adata.obs["cell_type"]).mean() > 0.85


def test_wrong_use_is_told():
    adata = partly_labelled()
    with pytest.raises(ValueError, match="labels_key="):
        SCANVI.from_anndata(adata)
    adata.obs["one"] = np.where(adata.obs["type"] == "B", "B", "?")
    with pytest.raises(ValueError, match="two cell types or more"):
        SCANVI.from_anndata(adata, labels_key="one", unlabeled_category="?")
    with pytest.raises(TypeError, match=r"no option 'n_hiden'.*classification_weight.*n_hidden.*dispersion"):
        SCANVI.from_anndata(adata, labels_key="type", n_hiden=3)
    with pytest.raises(ValueError, match="Normal"):
        made(latent_distribution="ln")
    with pytest.raises(ValueError, match="classification_weight"):
        made(classification_weight=-1.0)


def test_temperature_recovers_the_scale_of_logits():
    rng = np.random.default_rng(0)
    true = rng.normal(size=(4000, 4)) * 2
    p = np.exp(true) / np.exp(true).sum(1, keepdims=True)
    codes = torch.as_tensor([rng.choice(4, p=row) for row in p])
    assert fit_temperature(torch.as_tensor(3 * true), codes) == pytest.approx(3.0, rel=0.07)
    assert fit_temperature(torch.as_tensor(true[:10]), codes[:10]) == 1.0
    assert expected_calibration_error(p, codes.numpy()) < 0.03
    sharp = p**3 / (p**3).sum(1, keepdims=True)
    assert expected_calibration_error(sharp, codes.numpy()) > 0.1
