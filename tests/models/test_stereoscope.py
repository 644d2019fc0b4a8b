"""Stereoscope against SciPy's law and an independent optimiser; simulated proportions come back."""

from __future__ import annotations

import json
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from pyro import poutine
from scipy import stats
from scipy.optimize import minimize
from scipy.special import gammaln

import pyrosc
from pyrosc import DataError, DataWarning, RNAStereoscope, SpatialStereoscope
from pyrosc.infer import PathwiseELBO

MODES = ("map", "amortized", "posterior")


def softplus(x):
    return np.logaddexp(0, np.asarray(x, dtype=np.float64))


def log_nb(x, total, logits):
    """SciPy's negative binomial: `total` failures, each with probability 1/(1 + e^logits)."""
    return stats.nbinom.logpmf(x, total, 1 / (1 + np.exp(np.asarray(logits, dtype=np.float64))))


def array(tensor):
    return tensor.detach().numpy().astype(np.float64)


def fitted(model, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return model.fit(*args, **({"progress": False} | options))


@pytest.fixture(scope="module")
def simulated():
    return pyrosc.simulate.stereoscope(400, 300, n_genes=120, n_types=4, seed=1)


@pytest.fixture(scope="module")
def rna(simulated):
    return fitted(RNAStereoscope.from_anndata(simulated.reference, labels_key="cell_type"))


@pytest.fixture(scope="module")
def spatial(simulated, rna):
    """A trained model of the spots for each mode."""
    return {
        m: fitted(SpatialStereoscope.from_rna_model(simulated.spatial, rna, proportions=m)) for m in MODES
    }


@pytest.fixture(scope="module")
def small():
    """A reference and spots of a few cells, for exact sums."""
    return pyrosc.simulate.stereoscope(
        30, 12, n_genes=15, n_types=3, mean_library=300, mean_total=500, seed=2
    )


def small_model(small, mode="map"):
    rna = fitted(RNAStereoscope.from_anndata(small.reference, labels_key="cell_type"), 2)
    model = SpatialStereoscope.from_rna_model(small.spatial, rna, proportions=mode)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator))
    return model


def whole(model):
    from pyrosc.data.inputs import load_batch

    return load_batch(model.datasets, {"main": np.arange(model.registry.n_obs)}, model.device)


# -- the law ---------------------------------------------------------------------------------------------


def test_likelihood_of_cells(small):
    adata = small.reference.copy()
    adata.obs["cell_type"] = adata.obs["cell_type"].astype(object)
    adata.obs.loc[adata.obs_names[:3], "cell_type"] = np.nan
    with pytest.warns(DataWarning, match="3 of 30 cells have no label"):
        model = RNAStereoscope.from_anndata(adata, labels_key="cell_type")
    x, codes = adata.X.toarray()[3:], model.datasets["main"].codes("labels")[3:]
    total = x.sum(1, keepdims=True) * softplus(array(model.W.rows))[codes]
    expected = log_nb(x, total, array(model.o)).sum() / adata.n_obs
    assert -model(whole(model)).item() == pytest.approx(expected, rel=1e-5)


def joint(model, x, v):
    """log p(x | v, η) + log p(η) of all spots."""
    profiles = softplus(array(model.beta)) * softplus(array(model.W))
    eta = array(model.eta)
    total = v[:, :-1] @ profiles + np.outer(v[:, -1], softplus(eta))
    return log_nb(x, total, array(model.o)).sum() + stats.norm.logpdf(eta).sum()


@pytest.mark.parametrize("mode", ["map", "amortized"])
def test_objective_of_spots(small, mode):
    model = small_model(small, mode)
    x = small.spatial.X.toarray().astype(np.float64)
    with torch.no_grad():
        raw = model.V.rows if mode == "map" else model.head(model.encoder(torch.tensor(x).float().log1p()))
    v = x.sum(1, keepdims=True) * array(model.scale) * softplus(array(raw))
    assert -model(whole(model)).item() == pytest.approx(joint(model, x, v) / 12, rel=1e-5)


def test_bound_of_the_posterior_mode(small):
    model = small_model(small, "posterior")
    model.elbo = PathwiseELBO()  # of one draw
    x = small.spatial.X.toarray().astype(np.float64)
    batch = whole(model)
    with torch.random.fork_rng(), model.minibatch(batch):
        torch.manual_seed(3)
        v = array(poutine.trace(model.guide).get_trace(**model.inputs(batch)).nodes["v"]["value"])
    with torch.random.fork_rng():
        torch.manual_seed(3)
        bound = -model(batch).item()
    unit = x.sum(1, keepdims=True) * array(model.scale)
    prior = stats.gamma.logpdf(v, 1.0, scale=unit).sum()
    raw = array(model.L.rows).reshape(12, 4, 4)
    guide = 0.0
    for s in range(12):
        factor = np.diag(softplus(np.diag(raw[s]) - 2)) @ (np.eye(4) + np.tril(raw[s], -1))
        loc = np.log(unit[s]) + array(model.V.rows)[s]
        guide += stats.multivariate_normal.logpdf(np.log(v[s]), loc, factor @ factor.T) - np.log(v[s]).sum()
    assert bound == pytest.approx((joint(model, x, v) + prior - guide) / 12, rel=1e-5)


def test_the_unit_is_an_equal_share_of_the_counts(rna, simulated):
    """At the start each type, and the noise, explains 1/(types + 1) of a spot's counts on average."""
    model = SpatialStereoscope.from_rna_model(simulated.spatial, rna)
    totals = np.asarray(simulated.spatial.X.sum(1))
    o, unit = np.exp(array(model.o)), totals * array(model.scale)
    per_type = (softplus(0) * softplus(array(model.W)) @ o).mean()
    np.testing.assert_allclose(unit[:, 0] * per_type, totals[:, 0] / 5, rtol=1e-4)
    np.testing.assert_allclose(unit[:, -1] * softplus(0) * o.sum(), totals[:, 0] / 5, rtol=1e-4)


def test_starting_values_are_moments(small):
    model = RNAStereoscope.from_anndata(small.reference, labels_key="cell_type")
    x = small.reference.X.toarray().astype(np.float64)
    codes, library = small.reference.obs["cell_type"].cat.codes.to_numpy(), x.sum(1)
    extra = library.mean()
    overall = x.sum(0) / library.sum()
    rate = np.stack(
        [(x[codes == c].sum(0) + extra * overall) / (library[codes == c].sum() + extra) for c in range(3)]
    )
    mean = library[:, None] * rate[codes]
    odds = np.clip(((x - mean) ** 2).sum(0) / mean.sum(0) - 1, 0.02, 50)
    np.testing.assert_allclose(model.get_profiles(), rate, rtol=1e-4)
    np.testing.assert_allclose(np.exp(array(model.o)), odds, rtol=1e-4)


# -- the reference ---------------------------------------------------------------------------------------


def test_profiles_are_recovered(simulated, rna):
    truth = simulated.reference.varm["true_profile"].T * np.exp(simulated.reference.var["true_o"].to_numpy())
    found = rna.get_profiles()
    assert list(found.index) == [f"type{i}" for i in range(4)]
    expressed = truth > 2e-3
    ratio = np.log(found.to_numpy()[expressed] / truth[expressed])
    assert expressed.sum() > 200
    assert np.abs(ratio).mean() < 0.05
    seen = np.asarray(simulated.reference.X.mean(0)).ravel() > 3
    assert np.corrcoef(array(rna.o)[seen], simulated.reference.var["true_o"][seen])[0, 1] > 0.75


def test_the_reference_is_at_the_maximum(simulated, rna):
    """What SciPy gains on a gene's four W and o is far below the 5/2 nats of the sampling error."""
    x = simulated.reference.X.toarray().astype(np.float64)
    codes, library = simulated.reference.obs["cell_type"].cat.codes.to_numpy(), x.sum(1)
    W, o = array(rna.W.rows), array(rna.o)
    gains = []
    for g in range(0, 120, 10):

        def loss(p, g=g):
            return -log_nb(x[:, g], library * softplus(p[:-1])[codes], p[-1]).sum()

        start = np.r_[W[:, g], o[g]]
        gains.append(loss(start) - minimize(loss, start).fun)
    assert np.mean(gains) < 0.25
    assert max(gains) < 0.75


# -- proportions -----------------------------------------------------------------------------------------


def correlations(found, truth):
    return [np.corrcoef(found[c], truth[c])[0, 1] for c in truth]


@pytest.mark.parametrize("mode", MODES)
def test_proportions_are_recovered(simulated, spatial, mode):
    truth = simulated.spatial.obsm["true_proportions"]
    found = spatial[mode].get_proportions()
    assert list(found.index) == list(simulated.spatial.obs_names)
    assert list(found.columns) == list(truth.columns)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-4)
    assert np.mean(correlations(found, truth)) > 0.9
    assert np.abs(found - truth).to_numpy().mean() < 0.08


@pytest.mark.parametrize("mode", MODES)
def test_noise_is_told_from_types(simulated, spatial, mode):
    model = spatial[mode]
    found = model.get_proportions(keep_noise=True)
    assert list(found.columns) == [f"type{i}" for i in range(4)] + ["noise_term"]
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-4)
    if mode != "posterior":  # of averages over draws it holds but nearly
        types = found.drop(columns="noise_term")
        np.testing.assert_allclose(
            types.div(types.sum(axis=1), axis=0), model.get_proportions(), rtol=1e-4, atol=1e-6
        )
    share = model.posterior("noise_share", n_samples=0)["noise_share"]
    assert np.corrcoef(share, simulated.spatial.obs["true_noise_share"])[0, 1] > 0.5


def test_each_spot_is_at_its_maximum(simulated, spatial):
    """What SciPy gains on a spot's amounts, of which the likelihood is concave, is far below 5/2 nats."""
    model = spatial["map"]
    x = simulated.spatial.X.toarray().astype(np.float64)
    profiles = np.vstack([softplus(array(model.beta)) * softplus(array(model.W)), softplus(array(model.eta))])
    o, found = array(model.o), model.posterior("v")["v"].astype(np.float64)
    gains = []
    for s in range(0, 300, 15):

        def loss(v, s=s):
            total = np.maximum(v @ profiles, 1e-12)
            return -(gammaln(x[s] + total) - gammaln(total) - total * softplus(o)).sum()

        best = minimize(loss, found[s], bounds=[(0, None)] * 5, method="L-BFGS-B")
        gains.append(loss(found[s]) - best.fun)
    assert np.mean(gains) < 0.25
    assert max(gains) < 1.0


def test_map_beats_the_truth(simulated, spatial):
    """The maximum is at least as high as the parameters that the data were drawn from."""
    model = spatial["map"]
    truth = simulated.spatial
    x = truth.X.toarray().astype(np.float64)
    profiles = truth.var["true_beta"].to_numpy() * simulated.reference.varm["true_profile"].T
    logits = simulated.reference.var["true_o"].to_numpy()
    own = truth.obsm["true_proportions"].to_numpy() @ profiles
    own *= (x.sum(1) / (own @ np.exp(logits)))[:, None]
    at_truth = log_nb(x, own, logits).sum() / truth.n_obs
    assert model.get_elbo() > at_truth


def test_credible_intervals_cover(spatial, simulated):
    """Proportions are drawn from the prior; that the profiles are points costs some of the coverage."""
    truth = simulated.spatial.obsm["true_proportions"].to_numpy()
    model = spatial["posterior"]
    for level in (0.5, 0.9):
        tails = ((1 - level) / 2, (1 + level) / 2)
        found = model.get_proportions(quantiles=tails)
        low, high = (found.xs(q, axis=1, level="quantile").to_numpy() for q in tails)
        covered = ((truth >= low) & (truth <= high)).mean()
        assert level - 0.09 < covered < level + 0.03, f"{covered:.3f} of {level} intervals"
    mean = model.get_proportions().to_numpy()
    assert ((low <= mean) & (mean <= high)).mean() > 0.99


def test_quantiles_are_columns_by_type(spatial):
    found = spatial["posterior"].get_proportions(indices=[4, 2], quantiles=(0.1, 0.5, 0.9), n_samples=50)
    assert found.shape == (2, 12)
    assert list(found.index) == ["spot4", "spot2"]
    assert found.columns.names == ["cell_type", "quantile"]
    one = found["type2"]
    assert (one[0.1] < one[0.5]).all()
    assert (one[0.5] < one[0.9]).all()
    draws = spatial["posterior"].posterior("proportions", indices=[4, 2], n_samples=50, reduce=None)
    expected = np.quantile(draws["proportions"][:, :, 2], [0.1, 0.5, 0.9], axis=0).T
    np.testing.assert_allclose(one, expected, rtol=1e-4)


def test_a_low_concentration_gives_sparser_proportions(simulated, rna, spatial):
    few = SpatialStereoscope.from_rna_model(
        simulated.spatial, rna, proportions="posterior", concentration=0.2
    )
    fitted(few, 60)
    assert (
        few.get_proportions().max(axis=1).mean() > spatial["posterior"].get_proportions().max(axis=1).mean()
    )


# -- other spots, other genes ----------------------------------------------------------------------------


def test_the_amortised_mode_knows_other_spots(simulated, rna, spatial):
    other = pyrosc.simulate.stereoscope(10, 50, n_genes=120, n_types=4, seed=1).spatial
    other.obs_names = [f"new{i}" for i in range(50)]
    half = simulated.spatial[::2].copy()
    rest = simulated.spatial[1::2].copy()
    model = fitted(SpatialStereoscope.from_rna_model(half, rna, proportions="amortized"))
    found = model.get_proportions(rest)
    assert list(found.index) == list(rest.obs_names)
    assert np.mean(correlations(found, rest.obsm["true_proportions"])) > 0.9
    for mode in ("map", "posterior"):
        with pytest.raises(DataError, match="it knows nothing of 'new0'"):
            spatial[mode].get_proportions(other)
        again = spatial[mode].get_proportions(rest)  # but its own spots, by name
        pd.testing.assert_frame_equal(again, spatial[mode].get_proportions(indices=np.arange(1, 300, 2)))


def test_genes_are_matched_by_name(small):
    rna = fitted(RNAStereoscope.from_anndata(small.reference, labels_key="cell_type"), 3)
    one = fitted(SpatialStereoscope.from_rna_model(small.spatial, rna), 3)
    order = np.random.default_rng(0).permutation(15)
    extra = ad.concat([small.spatial[:, order], _strangers(small.spatial)], axis=1, merge="first")
    two = fitted(SpatialStereoscope.from_rna_model(extra, rna), 3)
    assert two.registry.var_names() == rna.registry.var_names()
    pd.testing.assert_frame_equal(one.get_proportions(), two.get_proportions())
    assert two.datasets["main"].data is extra


def _strangers(adata):
    x = sp.csr_matrix(np.ones((adata.n_obs, 2), np.float32))
    return ad.AnnData(x, obs=adata.obs[[]], var=pd.DataFrame(index=["other0", "other1"]))


def test_missing_genes_are_named(small):
    rna = fitted(RNAStereoscope.from_anndata(small.reference, labels_key="cell_type"), 3)
    with pytest.warns(DataWarning, match=r"lack 2 of the 15 genes of the reference.*'gene3', 'gene7'"):
        model = SpatialStereoscope.from_rna_model(
            small.spatial[:, [i for i in range(15) if i not in (3, 7)]].copy(), rna
        )
    kept = [i for i in range(15) if i not in (3, 7)]
    np.testing.assert_array_equal(array(model.W), array(rna.W.rows)[:, kept])
    np.testing.assert_array_equal(array(model.o), array(rna.o)[kept])
    few = small.spatial[:, :3].copy()
    with pytest.raises(DataError, match="share 3 of the 15 genes of 'reference', and at least 4 are needed"):
        SpatialStereoscope.from_rna_model(few, rna)
    capital = small.spatial.copy()
    capital.var_names = capital.var_names.str.upper()
    with pytest.raises(DataError, match=r"share 0 .* more match when case is ignored"):
        SpatialStereoscope.from_rna_model(capital, rna)
    same = SpatialStereoscope.from_rna_model(capital, rna, ignore_case=True)
    np.testing.assert_array_equal(array(same.W), array(rna.W.rows))
    assert same.registry.var_names()[3] == "GENE3"


def test_a_choice_of_types(small):
    rna = fitted(RNAStereoscope.from_anndata(small.reference, labels_key="cell_type"), 3)
    model = SpatialStereoscope.from_rna_model(small.spatial, rna, cell_types=["type2", "type0"])
    np.testing.assert_array_equal(array(model.W), array(rna.W.rows)[[2, 0]])
    assert list(model.get_proportions()) == ["type2", "type0"]


def test_genes_of_any_model_can_be_chosen(toy_adata):
    genes = list(toy_adata.var_names[[7, 3, *range(20, 40)]])
    model = pyrosc.SCVI.from_anndata(toy_adata, genes=genes, n_hidden=4)
    assert model.registry.var_names() == tuple(genes)
    np.testing.assert_array_equal(
        model.datasets["main"][np.arange(5)]["x"], toy_adata.X[:5].toarray()[:, [7, 3, *range(20, 40)]]
    )
    for bad, message in (
        (["gene_1", "gene_1"], "names some twice: 'gene_1'"),
        ([], "genes is empty"),
        (["gene_1", "nothing"], "no genes 'nothing'"),
    ):
        with pytest.raises(DataError, match=message):
            pyrosc.SCVI.from_anndata(toy_adata, genes=bad)


# -- results ---------------------------------------------------------------------------------------------


def test_expression_of_a_type(spatial, simulated):
    model = spatial["map"]
    expected = np.exp(array(model.o)) * softplus(array(model.beta)) * softplus(array(model.W))
    several = model.get_scale_for_ct(["type3", "type1"])
    np.testing.assert_allclose(several, expected[[3, 1]], rtol=1e-4)
    assert list(several.index) == ["type3", "type1"]
    one = model.get_scale_for_ct("type3", indices=[5, 0])
    assert list(one.index) == ["spot5", "spot0"]
    assert list(one.columns) == list(simulated.spatial.var_names)
    np.testing.assert_allclose(one, expected[[3, 3]], rtol=1e-4)
    assert model.get_scale_for_ct("type0").shape == (300, 120)
    with pytest.raises(KeyError, match="no cell type 'type9'; there are 'type0'"):
        model.get_scale_for_ct("type9")


@pytest.mark.parametrize("mode", MODES)
def test_a_saved_model_needs_no_reference(small, mode, tmp_path):
    model = fitted(small_model(small, mode), 2)
    model.save(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "model.json").read_text())["config"]
    assert config["cell_types"] == ["type0", "type1", "type2"]
    again = pyrosc.load(tmp_path / "model", small.spatial)
    pd.testing.assert_frame_equal(again.get_proportions(), model.get_proportions())
    pd.testing.assert_frame_equal(again.get_scale_for_ct(["type1"]), model.get_scale_for_ct(["type1"]))
    without = SpatialStereoscope.load(tmp_path / "model")
    pd.testing.assert_frame_equal(without.get_proportions(small.spatial), model.get_proportions())
    fitted(again, 1)


def test_results_in_anndata(spatial, simulated, tmp_path):
    adata = simulated.spatial.copy()
    model = spatial["map"]
    model.annotate(adata)
    frame = adata.obsm["stereoscope_proportions"]
    pd.testing.assert_frame_equal(frame, model.get_proportions())
    assert adata.obs["stereoscope_noise_share"].between(0, 1).all()
    adata.write_h5ad(tmp_path / "spots.h5ad")
    read = ad.read_h5ad(tmp_path / "spots.h5ad")
    pd.testing.assert_frame_equal(read.obsm["stereoscope_proportions"], frame)
    model.annotate(adata, key_added="again")
    assert list(adata.obsm["again_proportions"]) == list(frame)


def test_replicated_counts(spatial, simulated):
    drawn = spatial["map"].posterior_predictive_sample(n_samples=1)
    np.testing.assert_allclose(drawn.sum(1), simulated.spatial.X.sum(1), rtol=0.5)


# -- wrong usage -----------------------------------------------------------------------------------------


def test_wrong_usage(simulated, rna, spatial):
    spots = simulated.spatial
    with pytest.raises(ValueError, match="needs the type of each cell: labels_key="):
        RNAStereoscope.from_anndata(simulated.reference)
    with pytest.raises(TypeError, match="needs a single-cell reference"):
        SpatialStereoscope.from_anndata(spots)
    with pytest.raises(TypeError, match="a trained RNAStereoscope, not AnnData"):
        SpatialStereoscope.from_rna_model(spots, simulated.reference)
    untrained = RNAStereoscope.from_anndata(simulated.reference, labels_key="cell_type")
    with pytest.raises(ValueError, match=r"not trained yet: call rna_model\.fit"):
        SpatialStereoscope.from_rna_model(spots, untrained)
    with pytest.raises(ValueError, match="no type 'T cell'; it has 'type0'"):
        SpatialStereoscope.from_rna_model(spots, rna, cell_types=["T cell"])
    for options, message in (
        ({"proportions": "bayes"}, "proportions is one of 'map', 'amortized', 'posterior'; not 'bayes'"),
        ({"concentration": 0.5}, "concentration= belongs to proportions='posterior', not to 'map'"),
        ({"proportions": "posterior", "n_hidden": 8}, "n_hidden= belongs to proportions='amortized'"),
        ({"proportions": "posterior", "concentration": 0}, "a positive number, not 0"),
    ):
        with pytest.raises(ValueError, match=message):
            SpatialStereoscope.from_rna_model(spots, rna, **options)
    with pytest.raises(TypeError, match="has no option 'prior'"):
        SpatialStereoscope.from_rna_model(spots, rna, prior=1)
    for options in ({"quantiles": (0.1, 0.9)}, {"n_samples": 10}):
        with pytest.raises(ValueError, match="gives point estimates"):
            spatial["map"].get_proportions(**options)
    normalised = spots.copy()
    normalised.X = normalised.X / 3
    with pytest.raises(DataError, match="does not hold counts"):
        SpatialStereoscope.from_rna_model(normalised, rna)
    with pytest.raises(ValueError, match="all cells train"):
        spatial["map"].fit(1, train_size=0.9)


# -- simulation, pictures --------------------------------------------------------------------------------


def test_simulated_counts_have_the_moments_of_the_law():
    found = pyrosc.simulate.stereoscope(4000, 10, n_genes=20, n_types=2, sd_log_total=1e-6, seed=3).reference
    x = found.X.toarray()
    logits = found.var["true_o"].to_numpy()
    for c in range(2):
        here = x[found.obs["cell_type"].cat.codes.to_numpy() == c]
        mean = 2000 * found.varm["true_profile"][:, c] * np.exp(logits)
        np.testing.assert_allclose(here.mean(0), mean, rtol=0.15, atol=0.05)
        often = mean > 5
        np.testing.assert_allclose(here.var(0)[often], (mean * (1 + np.exp(logits)))[often], rtol=0.2)


def test_simulated_proportions_are_dirichlet():
    truth = pyrosc.simulate.stereoscope(10, 5000, n_genes=5, n_types=3, concentration=2.0, seed=4).spatial
    values = truth.obsm["true_proportions"].to_numpy()
    np.testing.assert_allclose(values.sum(1), 1)
    np.testing.assert_allclose(values.mean(0), 1 / 3, atol=0.01)
    np.testing.assert_allclose(values.var(0), (1 / 3) * (2 / 3) / 7, rtol=0.06)
    one, two = (pyrosc.simulate.stereoscope(10, 10, n_genes=5, n_types=2, seed=s) for s in (5, 5))
    np.testing.assert_array_equal(one.spatial.X.toarray(), two.spatial.X.toarray())


def test_pictures_of_proportions(spatial, simulated):
    import matplotlib.pyplot as plt

    from pyrosc import pl

    model = spatial["map"]
    adata = model.annotate(simulated.spatial.copy())
    frame = adata.obsm["stereoscope_proportions"]
    for data in (adata, model):
        axes = pl.proportions(data)
        assert [a.get_title().split(" (")[0] for a in axes] == list(
            frame.mean().sort_values(ascending=False).index
        )
        plt.close("all")
    (ax,) = pl.proportions(adata, ["type2"], vmax=0.5)
    (spots,) = [c for c in ax.collections if c.get_array() is not None]
    np.testing.assert_allclose(spots.get_array(), frame["type2"])
    np.testing.assert_array_equal(spots.get_offsets(), adata.obsm["spatial"])
    assert spots.get_clim() == (0, 0.5)
    assert ax.yaxis_inverted()
    plt.close("all")
    with pytest.raises(KeyError, match="no cell type 'type9'"):
        pl.proportions(adata, ["type9"])
    with pytest.raises(KeyError, match=r"no obsm\['stereoscope_proportions'\].*model\.annotate"):
        pl.proportions(simulated.spatial)
    with pytest.raises(KeyError, match=r"no obsm\['X_pixels'\] with coordinates"):
        pl.proportions(adata, basis="X_pixels")
    with pytest.raises(TypeError, match=r"write \['type1'\]"):
        pl.proportions(adata, "type1")
    with pytest.raises(TypeError, match="not ndarray"):
        pl.proportions(frame.to_numpy())
