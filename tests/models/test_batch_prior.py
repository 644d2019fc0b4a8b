"""A hierarchy of batches: rows drawn from a learned Normal, and batches that were never seen."""

import warnings

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

import pyrosc
from pyrosc import SCVI, DataError, DataWarning
from pyrosc.infer.evaluate import parts_per_cell

OPTIONS = {"batch_key": "batch", "batch_prior": "hierarchical", "n_hidden": 32, "n_latent": 3}
QUIET = {"progress": False, "device": "cpu"}
UNSEEN = ["batch6", "batch7"]


def fitted(adata, epochs: int = 40, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SCVI.from_anndata(adata, **(OPTIONS | options)).fit(epochs, **QUIET)


@pytest.fixture(scope="module")
def cells():
    """Cells of six batches, and of two that are kept back."""
    adata = pyrosc.simulate.scvi(900, 60, n_batches=8, effect=1.0, n_latent=3, seed=1).adata
    new = adata.obs["batch"].isin(UNSEEN)
    return adata[~new].copy(), adata[new].copy()


@pytest.fixture(scope="module")
def model(cells):
    return fitted(cells[0])


def test_the_bound_counts_each_row_once_and_the_unseen_one_not(model):
    batch = next(iter(model.batches(model.dataset(), np.arange(64))))[1]
    found = parts_per_cell(model, batch, 1)["kl_global"]
    effects = model.embedding
    q = Normal(effects.loc.rows, effects.log_scale.rows.exp())
    p = Normal(effects.prior_loc, effects.prior_log_scale.exp())
    torch.testing.assert_close(found, kl_divergence(q, p).sum().detach())
    effects.zero_grad()
    kl = kl_divergence(Normal(effects.prior_loc, p.scale), p).sum()
    assert kl == 0


def test_a_batch_never_seen_is_drawn_from_the_prior(model, cells):
    with pytest.warns(DataWarning, match=r"obs\['batch'\] has categories .*'batch6', 'batch7', in .* cells"):
        draws = model.posterior(["rho", "batch_effect"], adata=cells[1], n_samples=400, reduce=None)
    rows = draws["batch_effect"]
    assert rows.shape == (400, 7, 5)
    loc, scale = (
        v.detach().numpy() for v in (model.embedding.prior_loc, model.embedding.prior_log_scale.exp())
    )
    np.testing.assert_allclose(rows[:, -1].mean(0), loc, atol=4 * scale.max() / 20)
    np.testing.assert_allclose(rows[:, -1].std(0), scale, rtol=0.15)
    known = model.posterior("rho", adata=cells[0], n_samples=50, reduce=None, indices=np.arange(40))["rho"]
    spread = np.log(draws["rho"][:50, :40]).std(0).mean()
    assert spread > 1.5 * np.log(known).std(0).mean()  # what such a batch will be like is not known


def test_an_unseen_batch_is_more_likely_than_any_known_one(model, cells):
    """In held-out likelihood, the prior's mixture of batches beats each of them."""
    with pytest.warns(DataWarning):
        unseen = model.get_marginal_ll(cells[1], n_samples=96)
    for name in model.registry.categories("batch"):
        mistaken = cells[1].copy()
        mistaken.obs["batch"] = name
        assert unseen > model.get_marginal_ll(mistaken, n_samples=96)


def test_what_if_of_a_batch_not_seen(model, cells):
    found = model.get_normalized_expression(indices=np.arange(9), do={"batch": None}, as_numpy=True)
    query = cells[0][:9].copy()
    query.obs["batch"] = "other"
    with pytest.warns(DataWarning):
        expected = model.get_normalized_expression(query, as_numpy=True)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    with pytest.raises(DataError, match="'batch' has no category 'batch6'"):
        model.get_normalized_expression(do={"batch": "batch6"})


def test_without_a_prior_an_unseen_batch_is_refused(cells):
    plain = fitted(cells[0], 2, batch_prior="none")
    with pytest.raises(DataError, match="categories that SCVI was not made with"):
        plain.get_latent_representation(cells[1])
    with pytest.raises(DataError, match="no category"):
        plain.get_normalized_expression(do={"batch": None})


@pytest.mark.parametrize("options", [{"dispersion": "gene-batch"}, {"use_observed_lib_size": False}])
def test_other_numbers_of_an_unseen_batch_are_means_over_batches(cells, options):
    model = fitted(cells[0], 2, **options)
    table = model.log_theta if "dispersion" in options else model.library_prior
    torch.testing.assert_close(table(torch.tensor([6]))[0], table.rows.mean(0))
    with pytest.warns(DataWarning):
        assert np.isfinite(model.get_elbo(cells[1]))


def test_surgery_gives_a_new_batch_a_row_of_its_own(model, cells):
    query = cells[1][cells[1].obs["batch"] == "batch6"].copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mapped = pyrosc.surgery(model, query, decoder_only=True).fit(200, **QUIET)
        before = model.get_elbo(query, n_samples=50)
    expected, found = model.posterior(["z", "rho"]), mapped.posterior(["z", "rho"], adata=cells[0])
    for site in expected:
        assert np.array_equal(expected[site], found[site])
    assert mapped.embedding.loc.n_categories == 7
    assert mapped.get_elbo(n_samples=50) > before + 1
    assert torch.equal(mapped.embedding.prior_loc, model.embedding.prior_loc)


def test_the_prior_survives_saving(model, cells, tmp_path):
    model.save(tmp_path / "m")
    again = pyrosc.load(tmp_path / "m")
    with pytest.warns(DataWarning):
        a, b = (m.posterior("rho", adata=cells[1])["rho"] for m in (model, again))
    assert np.array_equal(a, b)


def test_one_batch_teaches_no_prior(cells):
    with pytest.raises(ValueError, match="learns from several batches"):
        SCVI.from_anndata(cells[0], batch_prior="hierarchical")
