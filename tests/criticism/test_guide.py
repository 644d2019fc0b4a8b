"""k-hat of guides whose distance from the posterior is known."""

import numpy as np
import pytest
import torch
from solvable import GammaPoisson, Kinds
from toy import make_adata
from toy_models import Factors, Mixture, TwoSources

import pyrosc
from pyrosc.criticism import guide_diagnostics


@pytest.fixture(scope="module")
def adata():
    return make_adata(60, 10)


def test_an_exact_guide(adata):
    found = guide_diagnostics(GammaPoisson.from_anndata(adata))
    cells = found.cells
    assert list(cells.index) == list(adata.obs_names)
    assert (cells["khat"] == -np.inf).all()  # the ratios differ by rounding only
    np.testing.assert_allclose(cells["ess"], 500, rtol=1e-3)
    np.testing.assert_allclose(cells["gap"], 0, atol=1e-3)
    # log p(x) = log of Gamma-Poisson, in closed form
    model = GammaPoisson.from_anndata(adata)
    x = torch.as_tensor(adata.X.toarray()).double()
    r = model.rate.detach().double()
    a, b, s = torch.tensor(2.0).double(), 1.0, x.sum(1)
    exact = (x * r.log() - (x + 1).lgamma()).sum(1) - a.lgamma() + (a + s).lgamma()
    exact = exact + a * np.log(b) - (a + s) * (b + r.sum()).log()
    np.testing.assert_allclose(cells["log_evidence"], exact, atol=5e-3)
    assert found.summary["reliable"] == 1
    assert found.sites == ("u",)
    assert not found.held_out


@pytest.mark.parametrize("narrow", [2.0, 4.0])
def test_a_narrow_guide_has_the_tail_that_theory_gives(adata, narrow):
    # p/q grows as exp((c − 1) β u) where q falls as exp(−c β u), so that P(w > t) = t^(−c / (c − 1))
    found = guide_diagnostics(GammaPoisson.from_anndata(adata, narrow=narrow), n_samples=4000)
    assert found.cells["khat"].mean() == pytest.approx((narrow - 1) / narrow, abs=0.15)
    assert found.summary["gap"] > 0.05
    assert (found.cells["log_evidence"] > found.cells["elbo"]).all()


def test_a_wide_guide_covers(adata):
    found = guide_diagnostics(GammaPoisson.from_anndata(adata, narrow=0.5))
    assert (found.cells["khat"] < 0.5).all()
    assert found.summary["gap"] > 0.05


def test_a_shifted_guide_is_found(adata):
    found = guide_diagnostics(GammaPoisson.from_anndata(adata, shift=2.0))
    assert found.summary["khat_above_0.7"] > 0.9
    assert found.summary["ess"] < 50


def test_the_elbo_and_likelihood_are_those_of_the_model(adata):
    model = Factors.from_anndata(adata, batch_key="batch").fit(3, progress=False, callbacks=[])
    found = guide_diagnostics(model, n_samples=100)
    held_out = model.validation_indices
    assert found.held_out
    assert list(found.cells.index) == list(adata.obs_names[held_out])
    assert found.summary["elbo"] == pytest.approx(model.get_elbo(indices=held_out, n_samples=50), abs=0.5)
    likelihood = model.get_marginal_ll(indices=held_out, n_samples=100)
    assert found.summary["log_evidence"] == pytest.approx(likelihood, abs=0.5)


def test_sites_that_are_summed_out_are_summed_out(adata):
    model = Mixture.from_anndata(adata, batch_key="batch").fit(20, progress=False, callbacks=[])
    found = guide_diagnostics(model, indices=[3, 1], n_samples=100)
    assert found.sites == ("size",)
    assert list(found.cells.index) == ["cell_3", "cell_1"]
    likelihood = model.get_marginal_ll(indices=[3, 1], n_samples=200, per_cell=True)
    assert (found.cells["khat"] < 0.7).all()
    np.testing.assert_allclose(found.cells["log_evidence"], likelihood, atol=0.3)


def test_each_source_has_cells_of_its_own(adata):
    model = TwoSources.from_anndatas({"seq": adata, "spatial": make_adata(30, 8, seed=1)})
    found = guide_diagnostics(model, source="spatial", n_samples=50)
    assert len(found.cells) == 30
    assert found.sites == ("z_spatial",)


def test_other_cells_seeds_and_generators(adata):
    model = GammaPoisson.from_anndata(adata, narrow=2.0)
    state = torch.get_rng_state()
    one = guide_diagnostics(model, adata[:7].copy(), n_samples=50, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert one.held_out
    same = guide_diagnostics(model, adata[:7].copy(), n_samples=50, seed=3)
    np.testing.assert_array_equal(one.cells, same.cells)
    assert not np.array_equal(one.cells, guide_diagnostics(model, adata[:7].copy(), n_samples=50).cells)
    assert len(guide_diagnostics(model, n_samples=50, max_cells=9).cells) == 9


def test_what_cannot_be_judged_is_refused(adata):
    with pytest.raises(ValueError, match="Kinds draws no latent site per cell; those of its model"):
        guide_diagnostics(Kinds.from_anndata(adata))
    from pyro.infer.autoguide import AutoDelta

    point = pyrosc.auto(Factors, AutoDelta).from_anndata(adata, batch_key="batch")
    with pytest.raises(ValueError, match="is a point at 'z'"):
        guide_diagnostics(point)
    model = GammaPoisson.from_anndata(adata)
    with pytest.raises(ValueError, match="at least 25, not 24"):
        guide_diagnostics(model, n_samples=24)
    with pytest.raises(ValueError, match="no cell"):
        guide_diagnostics(model, indices=[])
    with pytest.raises(ValueError, match="max_cells is at least 1"):
        guide_diagnostics(model, max_cells=0)


def test_picture_of_khat(adata):
    from matplotlib.figure import Figure

    from pyrosc import pl

    found = guide_diagnostics(GammaPoisson.from_anndata(adata, narrow=4.0))
    ax = Figure().subplots()
    assert pl.khat(found, ax) is ax
    assert sum(p.get_height() for p in ax.patches) == 60
    shares = [t.get_text() for t in ax.get_legend().get_texts()]
    assert shares[2] == f"above 0.7: far ({found.summary['khat_above_0.7']:.0%})"
