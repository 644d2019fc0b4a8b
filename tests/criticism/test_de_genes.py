"""Genes that set groups apart, in data and replicates."""

import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from solvable import GammaPoisson
from toy import make_adata

from pyrosc import SCVI, DataError
from pyrosc.criticism import de_genes_kept
from pyrosc.criticism.de_genes import average_precision, welch


@pytest.fixture(scope="module")
def adata():
    return make_adata(600, 60)


@pytest.fixture(scope="module")
def model(adata):
    return SCVI.from_anndata(adata, batch_key="batch", n_hidden=32).fit(60, progress=False, callbacks=[])


def test_the_statistic_is_that_of_scanpy(adata):
    work = adata.copy()
    sc.pp.normalize_total(work, target_sum=1e4)
    sc.pp.log1p(work)
    sc.tl.rank_genes_groups(work, "label", method="t-test")
    x = work.X.toarray().astype(float)
    inside = (work.obs["label"] == "NK").to_numpy()
    one, rest = x[inside], x[~inside]
    mine = welch(one.sum(0), (one**2).sum(0), len(one), rest.sum(0), (rest**2).sum(0), len(rest))
    theirs = pd.Series(
        work.uns["rank_genes_groups"]["scores"]["NK"], index=work.uns["rank_genes_groups"]["names"]["NK"]
    )
    np.testing.assert_allclose(mine, theirs[adata.var_names], rtol=2e-3, atol=1e-4)


def test_a_trained_model_keeps_them_and_a_model_without_groups_does_not(adata, model):
    found = de_genes_kept(model, "label", n_top=10)
    assert list(found.index) == ["B", "NK", "T"]
    assert found["cells"].sum() == 600
    assert (found["kept"] > 0.6).all()
    assert (found["correlation"] > 0.6).all()
    assert found["average_precision"].between(found["kept"] - 0.35, 1).all()
    flat = de_genes_kept(GammaPoisson.from_anndata(adata), "label", n_top=10)
    assert flat["kept"].mean() < 0.4
    assert flat["kept"].mean() < found["kept"].mean() - 0.3
    assert flat["between_replicates"].mean() < 0.4  # nothing to agree on
    pd.testing.assert_series_equal(flat["between_resamples"], found["between_resamples"])  # of the data
    assert (found["between_resamples"] > 0.6).all()


def test_groups_may_be_values_and_have_gaps(adata, model):
    values = adata.obs["label"].astype(object).to_numpy().copy()
    values[:20] = None
    one = de_genes_kept(model, values, n_samples=2)
    assert one["cells"].sum() == 580
    named = pd.Series(values, index=adata.obs_names)[::-1]
    pd.testing.assert_frame_equal(one, de_genes_kept(model, named, n_samples=2))
    assert de_genes_kept(model, "label", n_samples=2, max_cells=90)["cells"].sum() == 90


def test_average_precision_agrees_with_scikit_learn():
    from sklearn.metrics import average_precision_score

    rng = np.random.default_rng(0)
    hits, scores = rng.random(50) < 0.3, rng.normal(size=50)
    assert average_precision(hits[np.argsort(-scores)]) == pytest.approx(
        average_precision_score(hits, scores)
    )
    assert np.isnan(average_precision(np.zeros(3, bool)))


def test_what_cannot_be_compared_is_refused(adata, model):
    with pytest.raises(DataError, match="no column 'cluster'"):
        de_genes_kept(model, "cluster")
    with pytest.raises(DataError, match=r"no two groups of 250 cells .*; the sizes are B: 200"):
        de_genes_kept(model, "label", min_cells=250)
    with pytest.raises(DataError, match="no two groups"):
        de_genes_kept(model, ["one"] * 600)
    with pytest.raises(ValueError, match="3 groups for 600 cells"):
        de_genes_kept(model, ["a", "b", "c"])
    with pytest.raises(ValueError, match="at least 2, not 1"):
        de_genes_kept(model, "label", n_samples=1)
    normal = SCVI.from_anndata(adata, gene_likelihood="normal", n_hidden=4)
    with pytest.raises(ValueError, match="models real numbers"):
        de_genes_kept(normal, "label")
