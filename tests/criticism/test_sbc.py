"""Simulation-based calibration: uniform for exact posteriors, and only for those."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import chi2, norm
from solvable import GammaPoisson, Kinds
from toy import make_adata
from toy_models import Cells, Factors, Mixture, TwoSources

from pyrosc import SCANVI, SCVI, Model
from pyrosc.criticism import calibration_of_draws, simulation_based_calibration
from pyrosc.criticism.sbc import rank_counts, uniform_p_value
from pyrosc.data import Counts


@pytest.fixture(scope="module")
def adata():
    return make_adata(60, 10)


# -- models whose answer is known ------------------------------------------------------------------------


def test_an_exact_posterior_passes(adata):
    found = simulation_based_calibration(GammaPoisson.from_anndata(adata), n_simulations=2000)
    assert found.passes()
    assert list(found.ranks) == ["u"]
    for level in (50, 80, 90, 95):
        error = np.sqrt(level * (100 - level) / 2000) / 100
        assert found.table.loc["u", f"coverage_{level}"] == pytest.approx(level / 100, abs=3 * error)
    assert found.table.loc["u", "z_mean"] == pytest.approx(0, abs=0.08)
    assert found.table.loc["u", "z_sd"] == pytest.approx(1, abs=0.06)
    level, inside = found.curve()
    np.testing.assert_allclose(inside, level, atol=0.04)


def test_a_site_that_is_summed_out_passes(adata):
    found = simulation_based_calibration(Kinds.from_anndata(adata), n_simulations=1000, n_draws=39)
    assert found.passes()
    assert list(found.ranks) == ["kind"]


@pytest.mark.parametrize("narrow", [1.5, 3.0, 0.5])
def test_a_posterior_of_the_wrong_width_fails(adata, narrow):
    found = simulation_based_calibration(GammaPoisson.from_anndata(adata, narrow=narrow))
    assert not found.passes()
    # nearly Normal: an interval at ±1.645 s / √c of a posterior of width s
    wanted = 2 * norm.cdf(norm.ppf(0.95) / np.sqrt(narrow)) - 1
    assert found.table.loc["u", "coverage_90"] == pytest.approx(wanted, abs=0.05)
    assert found.table.loc["u", "z_sd"] == pytest.approx(np.sqrt(narrow), rel=0.15)


def test_a_shifted_posterior_fails(adata):
    found = simulation_based_calibration(GammaPoisson.from_anndata(adata, shift=1.2))
    assert not found.passes()
    assert found.table.loc["u", "z_mean"] < -0.3
    counts, _ = rank_counts(found.ranks["u"], found.n_draws, 10)
    assert counts[0] > 2 * counts[-1]


# -- any model -------------------------------------------------------------------------------------------


def test_a_network_reads_cells(adata):
    model = SCVI.from_anndata(adata, batch_key="batch", n_latent=3, n_hidden=8, use_observed_lib_size=False)
    found = simulation_based_calibration(model, n_simulations=100, n_draws=19)
    assert set(found.ranks) == {"z[0]", "z[1]", "z[2]", "library"}
    assert all(len(r) == 100 and r.min() >= 0 and r.max() <= 19 for r in found.ranks.values())
    assert not found.passes()  # it was not trained
    assert set(simulation_based_calibration(model, n_simulations=50, n_draws=9, sites="library").ranks) == {
        "library"
    }


def test_draws_one_by_one_are_as_good_as_all_at_once(adata):
    """Models that do not broadcast take their draws in turn."""

    class InTurn(GammaPoisson):
        vectorized = False

    found = simulation_based_calibration(InTurn.from_anndata(adata), n_simulations=1000, n_draws=39)
    assert found.passes()


def test_labels_are_hidden_from_the_guide(adata):
    adata = adata.copy()
    model = SCANVI.from_anndata(adata, labels_key="label", n_latent=2, n_hidden=8)
    found = simulation_based_calibration(model, n_simulations=50, n_draws=9)
    assert {"y_unobserved", "z[0]", "z2[1]"} <= set(found.ranks)


@pytest.mark.parametrize("make", [Factors, Mixture])
def test_toys(adata, make):
    model = make.from_anndata(adata, batch_key="batch")
    found = simulation_based_calibration(model, n_simulations=40, n_draws=9)
    assert found.n_simulations == 40
    assert found.table["p_value"].between(0, 1).all()


def test_one_of_two_sources(adata):
    model = TwoSources.from_anndatas({"seq": adata, "spatial": make_adata(30, 8, seed=1)})
    found = simulation_based_calibration(model, source="spatial", n_simulations=40, n_draws=9)
    assert list(found.ranks) == ["z_spatial[0]", "z_spatial[1]", "z_spatial[2]"]


def test_seeds_and_generators(adata):
    model = GammaPoisson.from_anndata(adata)
    state = torch.get_rng_state()
    runs = [simulation_based_calibration(model, n_simulations=50, n_draws=9, seed=s) for s in (1, 1, 2)]
    assert torch.equal(state, torch.get_rng_state())
    one, same, other = (r.ranks["u"] for r in runs)
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


class Computed(Model):
    """Observes a function of its argument, which cannot be turned round."""

    def model(self, x: Counts):
        with self.cells(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=x.sum(-1).log())

    def guide(self, x: Counts):
        with self.cells(x):
            pyro.sample("z", dist.Normal(x.sum(-1).log() / 2, 0.5**0.5))


def test_what_cannot_be_calibrated_is_refused(adata):
    with pytest.raises(KeyError, match="Cells has no latent site per cell"):
        simulation_based_calibration(Cells.from_anndata(adata))
    model = GammaPoisson.from_anndata(adata)
    with pytest.raises(KeyError, match="no latent site per cell 'w'; it has 'u'"):
        simulation_based_calibration(model, sites=["u", "w"])
    with pytest.raises(ValueError, match="at least 2 simulations and 1 draw"):
        simulation_based_calibration(model, n_simulations=1)
    with pytest.raises(ValueError, match=r"observes 'y' through values that .*obs=<an arg"):
        simulation_based_calibration(Computed.from_anndata(adata))


# -- ranks -----------------------------------------------------------------------------------------------


def test_ranks_count_the_draws_below_and_split_ties_evenly():
    truth = np.zeros(3000)
    draws = np.stack([np.full(3000, v) for v in (-1.0, 0.0, 0.0, 2.0)])
    ranks = calibration_of_draws({"a": truth}, {"a": draws}).ranks["a"]
    assert set(ranks) == {1, 2, 3}
    assert np.bincount(ranks)[1:] == pytest.approx([1000, 1000, 1000], abs=110)


def test_elements_are_quantities_of_their_own():
    rng = np.random.default_rng(0)
    found = calibration_of_draws({"a": rng.normal(size=(50, 2, 2))}, {"a": rng.normal(size=(9, 50, 2, 2))})
    assert list(found.ranks) == ["a[0, 0]", "a[0, 1]", "a[1, 0]", "a[1, 1]"]
    assert found.p_value <= 1


def test_p_values_of_uniform_ranks_are_uniform():
    rng = np.random.default_rng(1)
    p = [uniform_p_value(rng.integers(0, 100, 400), 99) for _ in range(400)]
    assert np.mean(p) == pytest.approx(0.5, abs=0.05)
    assert np.mean(np.array(p) < 0.05) == pytest.approx(0.05, abs=0.03)
    counts, expected = rank_counts(np.arange(10), 9, 2)
    assert list(counts) == list(expected) == [5, 5]
    assert uniform_p_value(np.zeros(40, int), 1, 2) == pytest.approx(chi2.sf(40, 1))


def test_bins_of_unequal_size_are_expected_to_hold_unequally_many():
    counts, expected = rank_counts(np.repeat(np.arange(8), 30), 7, 3)
    np.testing.assert_allclose(expected, counts)
    assert expected.sum() == 240


def test_draws_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="truth is of 'a', draws of 'b'"):
        calibration_of_draws({"a": np.zeros(3)}, {"b": np.zeros((2, 3))})
    with pytest.raises(ValueError, match=r"draws are \(L, n, ...\)"):
        calibration_of_draws({"a": np.zeros(3)}, {"a": np.zeros((3, 2))})


# -- pictures --------------------------------------------------------------------------------------------


def test_pictures_of_ranks_and_intervals(adata):
    from matplotlib.figure import Figure

    from pyrosc import pl

    found = simulation_based_calibration(GammaPoisson.from_anndata(adata, narrow=3.0), n_simulations=400)
    left, right = Figure().subplots(1, 2)
    assert list(pl.ranks(found, axes=[left])) == [left]
    band, bars = left.patches
    counts, expected = rank_counts(found.ranks["u"], found.n_draws)
    np.testing.assert_array_equal(bars.get_data().values, counts)
    low, high = band.get_data().baseline, band.get_data().values
    assert ((low < expected) & (expected < high)).all()
    assert (counts > high).sum() >= 2  # at both ends
    pl.intervals(found, right)
    lines = {line.get_label(): line for line in right.get_lines()}
    level, inside = lines["mean"].get_data()
    assert inside[level == 0.9] == pytest.approx(found.coverage[0.9], abs=0.02)
    with pytest.raises(KeyError, match=r"no ranks of \['v'\]; there are of \['u'\]"):
        pl.ranks(found, ["v"])
    with pytest.raises(ValueError, match="quantities is empty"):
        pl.ranks(found, [])
