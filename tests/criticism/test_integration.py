"""Integration metrics: what can be asked, with and without scib-metrics."""

import numpy as np
import pandas as pd
import pytest
from toy import make_adata

from pyrosc import DataError
from pyrosc.criticism import integration, integration_metrics


@pytest.fixture(scope="module")
def adata():
    made = make_adata(200, 40)
    made.obsm["X_truth"] = np.log(made.obsm["truth"])
    made.obsm["X_noise"] = np.random.default_rng(0).normal(size=(200, 5))
    return made


def test_without_scib_metrics_the_error_says_what_to_install(adata, monkeypatch):
    monkeypatch.setattr(integration, "has_scib", lambda: False)
    with pytest.raises(ImportError, match=r"pip install pyrosc\[bench\]"):
        integration_metrics(adata, "batch", "label", ["X_truth"])


def test_scores_as_a_tidy_table():
    """The table of scib-metrics, by hand: last row kinds, columns scores and three means."""
    wide = pd.DataFrame(
        {
            "iLISI": [0.1, 0.2, "Batch correction"],
            "KMeans NMI": [0.3, 0.4, "Bio conservation"],
            "Batch correction": [0.1, 0.2, "Aggregate score"],
            "Bio conservation": [0.3, 0.4, "Aggregate score"],
            "Total": [0.22, 0.32, "Aggregate score"],
        },
        index=["X_a", "X_b", "Metric Type"],
    )
    found = integration._tidy(wide, ["X_a", "X_b"])
    assert list(found.columns) == ["embedding", "metric", "part", "score"]
    assert len(found) == 10
    picked = found.set_index(["embedding", "metric"])
    assert tuple(picked.loc[("X_b", "iLISI")]) == ("batch", 0.2)
    assert tuple(picked.loc[("X_a", "KMeans NMI")]) == ("bio", 0.3)
    assert tuple(picked.loc[("X_a", "total")]) == ("total", 0.22)
    assert tuple(picked.loc[("X_b", "bio")]) == ("bio", 0.4)


def test_the_real_thing(adata):
    pytest.importorskip("scib_metrics", reason="scib-metrics is not installed")
    found = integration_metrics(adata, "batch", "label", ["X_truth", "X_noise"]).set_index(
        ["embedding", "metric"]
    )
    score = found["score"]
    assert score.between(-0.05, 1).all()
    assert score["X_truth", "bio"] > score["X_noise", "bio"]
    for name in ("X_truth", "X_noise"):
        assert score[name, "total"] == pytest.approx(0.6 * score[name, "bio"] + 0.4 * score[name, "batch"])


def test_what_cannot_be_scored_is_refused(adata, monkeypatch):
    import sys
    import types

    if not integration.has_scib():  # the arguments are checked before it is used
        package = types.ModuleType("scib_metrics.benchmark")
        package.BatchCorrection = package.Benchmarker = package.BioConservation = None
        monkeypatch.setitem(sys.modules, "scib_metrics", types.ModuleType("scib_metrics"))
        monkeypatch.setitem(sys.modules, "scib_metrics.benchmark", package)
        monkeypatch.setattr(integration, "has_scib", lambda: True)
    with pytest.raises(DataError, match=r"no obsm 'X_pca'; there are .*'X_noise'"):
        integration_metrics(adata, "batch", "label", ["X_pca"])
    with pytest.raises(DataError, match="no column 'kind'"):
        integration_metrics(adata, "batch", "kind", ["X_noise"])
    with pytest.raises(DataError, match="has 3 rows for 200 cells"):
        integration_metrics(adata, "batch", "label", {"z": np.zeros((3, 2))})
    with pytest.raises(TypeError, match=r"write \['X_noise'\]"):
        integration_metrics(adata, "batch", "label", "X_noise")
    with pytest.raises(ValueError, match="embeddings is empty"):
        integration_metrics(adata, "batch", "label", [])
    one = adata[adata.obs["batch"] == "batch_0"].copy()
    with pytest.raises(DataError, match=r"obs\['batch'\] has 1 category"):
        integration_metrics(one, "batch", "label", ["X_noise"])
