"""Held-out comparison of models."""

import warnings

import numpy as np
import pytest
from toy import make_adata
from toy_models import Cells, Factors, TwoSources

import pyrosc
from pyrosc import SCVI, compare


def fitted(model, epochs=3, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return model.fit(epochs, progress=False, **options)


@pytest.fixture(scope="module")
def three():
    adata = make_adata(200, 30)
    makers = {"nb": {}, "poisson": {"gene_likelihood": "poisson"}, "small": {"n_latent": 1, "n_hidden": 4}}
    return {
        k: fitted(SCVI.from_anndata(adata, batch_key="batch", **{"n_hidden": 16, **o}))
        for k, o in makers.items()
    }


def test_a_table_of_paired_differences(three):
    table = compare(three)
    assert set(table.index) == set(three)
    assert table["elbo"].is_monotonic_decreasing
    best = table.index[0]
    rows = three["nb"].validation_indices
    values = {k: m.get_elbo(indices=rows, n_samples=25, per_cell=True) for k, m in three.items()}
    for name, row in table.iterrows():
        difference = values[name] - values[best]
        assert row["elbo"] == pytest.approx(values[name].mean(), rel=1e-6)
        assert row["se"] == pytest.approx(values[name].std(ddof=1) / np.sqrt(len(rows)), rel=1e-5)
        assert row["difference"] == pytest.approx(difference.mean(), abs=1e-4)
        assert row["difference_se"] == pytest.approx(difference.std(ddof=1) / np.sqrt(len(rows)), abs=1e-4)
        assert row["better"] == (difference > 0).mean()
        assert row["cells"] == len(rows)
        assert row["seconds"] > 0
    assert table.loc[best, "difference"] == 0
    assert table.loc["small", "parameters"] < table.loc["nb", "parameters"]


def test_the_log_likelihood_is_above_the_elbo(three):
    pair = {k: three[k] for k in ("nb", "poisson")}
    table = compare(pair, measure="marginal_ll", n_samples=60)
    assert (table["marginal_ll"] > compare(pair)["elbo"][table.index]).all()


def test_models_in_a_list_are_named_by_class(three):
    assert set(compare(list(three.values()), n_samples=1).index) == {"SCVI 1", "SCVI 2", "SCVI 3"}


def test_other_cells_that_trained_none(three):
    rows = three["nb"].validation_indices[:5]
    mask = np.zeros(200, bool)
    mask[rows] = True
    one, two = compare(three, indices=rows), compare(three, indices=mask)
    assert (one["cells"] == 5).all()
    np.testing.assert_array_equal(one["elbo"], two["elbo"])
    with pytest.raises(ValueError, match=r"1 of the 6 cells trained nb"):
        compare(three, indices=[*rows, three["nb"].train_indices[0]])


def test_what_cannot_be_compared_is_refused(three):
    adata = make_adata(200, 30)
    nb = three["nb"]

    def refused(message, *models, **options):
        with pytest.raises(ValueError, match=message):
            compare({"nb": nb} | {f"m{i}": m for i, m in enumerate(models)}, **options)

    refused("two models or more")
    refused("m0 is not trained", SCVI.from_anndata(adata))
    refused("nb and m0 held out different cells", fitted(SCVI.from_anndata(adata), 1, seed=5))
    refused("nb and m0 differ in their genes", fitted(SCVI.from_anndata(adata[:, 3:].copy()), 1))
    refused("nb and m0 differ in their cells", fitted(SCVI.from_anndata(make_adata(150, 30)), 1))
    normal = fitted(SCVI.from_anndata(adata, gene_likelihood="normal"), 1)
    refused("differ in what they observe.*as real numbers", normal)
    labels = fitted(pyrosc.SCANVI.from_anndata(adata, labels_key="label", n_hidden=8), 1)
    refused("differ in what they observe", labels)
    refused("m0 was trained on all cells", fitted(Cells.from_anndata(adata), 1))
    two = TwoSources.from_anndatas({"seq": adata, "spatial": make_adata(40, 30)})
    refused("m0 reads several data sets", fitted(two, 1))
    refused("measure is one of 'elbo', 'marginal_ll'", nb, measure="loss")
    loaded = Factors.from_anndata(adata, batch_key="batch")
    assert set(compare({"nb": nb, "factors": fitted(loaded)}).index) == {"nb", "factors"}
