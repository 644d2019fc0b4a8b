"""LinearSCVI: loadings are what they say, recover simulated truth, and have honest intervals."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from pyro import poutine
from scipy import stats
from scipy.linalg import orthogonal_procrustes
from toy import make_adata

import pyrosc
from pyrosc import SCVI, LinearSCVI
from pyrosc.data.inputs import load_batch
from pyrosc.infer.handlers import Record


def trained(model: LinearSCVI, epochs: int, **options) -> LinearSCVI:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # short runs may end while the ELBO still rises
        return model.fit(epochs, progress=False, **options)


def centred(x: np.ndarray) -> np.ndarray:
    """Without what a softmax over genes does not see; genes are the last axis."""
    return x - x.mean(-1, keepdims=True)


def canonical_correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Between the spaces that the columns span, smallest last."""
    q, r = (np.linalg.qr(m - m.mean(0))[0] for m in (a, b))
    return np.linalg.svd(q.T @ r, compute_uv=False)


@pytest.fixture(scope="module")
def simulated():
    return pyrosc.simulate.linear_scvi(700, 80, n_latent=3, signal=0.8, mean_library=2000, seed=1)


@pytest.fixture(scope="module")
def bayesian(simulated):
    model = LinearSCVI.from_anndata(simulated.adata, batch_key="batch", n_latent=3, bayesian=True)
    return trained(model, 150, lr=1e-2, train_size=1.0, early_stopping=False)


# -- loadings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"decoder_norm": "batch"}, {"bayesian": True}])
def test_decoding_by_hand_from_the_loadings_gives_expression(options):
    model = LinearSCVI.from_anndata(make_adata(), batch_key="batch", n_latent=4, n_hidden=16, **options)
    trained(model, 4, lr=1e-2)
    loadings = model.get_loadings()
    assert loadings.shape == (40, 4)
    assert list(loadings.index) == list(model.registry.var_names())
    assert list(loadings.columns) == ["Z_0", "Z_1", "Z_2", "Z_3"]
    found = model.posterior(["z", "rho"])
    codes = model.datasets["main"].codes("batch")
    for batch in (0, 1):
        z, rho = (found[k][codes == batch].astype(float) for k in ("z", "rho"))
        by_hand = centred((z - z[0]) @ loadings.to_numpy().T.astype(float))
        np.testing.assert_allclose(by_hand, centred(np.log(rho) - np.log(rho[0])), atol=2e-5)
        assert np.abs(by_hand).max() > 0.05


def test_batch_norm_is_folded_in():
    model = LinearSCVI.from_anndata(make_adata(), batch_key="batch", decoder_norm="batch", n_hidden=16)
    trained(model, 4, lr=1e-2)
    assert not np.allclose(model.get_loadings(), model.scale_head.weight.detach(), rtol=0.05)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_simulated_loadings_are_recovered(simulated, norm):
    adata = simulated.adata
    model = LinearSCVI.from_anndata(adata, batch_key="batch", n_latent=3, decoder_norm=norm)
    trained(model, 200)
    truth, found = adata.varm["true_loadings"], model.get_loadings().to_numpy()
    assert canonical_correlations(truth, found).min() > {"none": 0.95, "batch": 0.9}[norm]
    assert canonical_correlations(adata.obsm["true_z"], model.get_latent_representation()).min() > 0.9


def test_intercepts_start_at_the_shares_of_genes():
    adata = make_adata()
    shares = np.asarray(adata.X.sum(0)).ravel()
    for norm in ("none", "batch"):
        bias = LinearSCVI.from_anndata(adata, decoder_norm=norm).scale_head.bias
        np.testing.assert_allclose(bias.softmax(0).detach(), shares / shares.sum(), rtol=1e-3)


# -- Bayesian loadings ---------------------------------------------------------------------------------


def test_bayesian_loadings_are_recovered_and_intervals_cover(simulated, bayesian):
    truth = centred(simulated.adata.varm["true_loadings"].T)
    found = centred(bayesian.get_loadings().to_numpy().T)
    assert canonical_correlations(truth.T, found.T).min() > 0.95
    rotation, _ = orthogonal_procrustes(truth.T, found.T)  # the prior of z fixes all but a rotation
    np.testing.assert_allclose(rotation.T @ truth, found, atol=0.5)
    # and, with finitely many cells, but for their sample covariance: a linear map takes that up
    mapped = np.linalg.lstsq(truth.T, found.T, rcond=None)[0].T @ truth
    tidy = bayesian.get_loadings(0.9)
    error = np.abs(mapped - found).ravel()  # in the order of the tidy table: genes of each factor
    half = ((tidy["upper"] - tidy["lower"]) / 2).to_numpy()
    assert 0.7 < (error < half).mean() < 0.97  # mean field: somewhat too sure of itself
    wide = half > np.median(half)
    assert error[wide].mean() > 1.1 * error[~wide].mean()


def test_intervals_are_the_quantiles_of_posterior_draws(bayesian):
    tidy = bayesian.get_loadings(credible_interval=0.8)
    assert list(tidy.columns) == ["gene", "factor", "loading", "sd", "lower", "upper", "excludes_zero"]
    assert len(tidy) == 80 * 3
    draws = bayesian.posterior("loadings", n_samples=2000, reduce=None, indices=[0])["loadings"]
    assert draws.shape == (2000, 80, 3)
    lower, upper = np.quantile(draws, [0.1, 0.9], axis=0)
    np.testing.assert_allclose((lower.T.ravel() - tidy["lower"]) / tidy["sd"], 0, atol=0.25)
    np.testing.assert_allclose((upper.T.ravel() - tidy["upper"]) / tidy["sd"], 0, atol=0.25)
    row = tidy.query("gene == 'gene7' and factor == 'Z_1'").iloc[0]
    assert row["loading"] == pytest.approx(bayesian.get_loadings().loc["gene7", "Z_1"])
    np.testing.assert_array_equal(tidy["excludes_zero"], (tidy["lower"] > 0) | (tidy["upper"] < 0))


@pytest.mark.parametrize("share", [1, 3])
def test_the_divergence_of_the_loadings_counts_once(share):
    """The loss of a minibatch against densities written out by hand."""
    adata = make_adata(60, 12)
    model = LinearSCVI.from_anndata(
        adata, batch_key="batch", n_latent=2, n_hidden=8, bayesian=True, prior_scale=0.7, dropout_rate=0.0
    )
    rows = np.arange(0, 60, share)
    batch = load_batch(model.datasets, {"main": rows}, model.device)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        drawn = Record()
        loss = model.loss(batch, record=drawn).item() * 60
    z, library, w = (drawn.sites[k].detach().double().numpy() for k in ("z", "library", "loadings"))
    with torch.no_grad():
        z_loc, z_scale = (t.double().numpy() for t in model.encoder(batch["x"].log1p(), None))
        l_loc, l_scale = (t.double().numpy().ravel() for t in model.library_encoder(batch["x"].log1p(), None))
        rows_of_batch = model.scale_head.effects.tables[0].rows.double().numpy()
        intercept = model.scale_head.bias.double().numpy()
        theta = model.log_theta().exp().double().numpy()
        w_loc, w_scale = model.scale_head.weight.numpy(), model.log_loading_scale.exp().numpy()
        m, v = model.library_prior.rows.double().numpy()[batch["batch"].numpy()].T
    logits = z @ w.T + rows_of_batch[batch["batch"].numpy()] + intercept
    mean = np.exp(library)[:, None] * np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    likelihood = stats.nbinom.logpmf(batch["x"].numpy(), theta, theta / (theta + mean)).sum()

    def kl(loc, scale, prior_loc, prior_scale):
        ratio = (scale / prior_scale) ** 2
        return 0.5 * (ratio + ((loc - prior_loc) / prior_scale) ** 2 - 1 - np.log(ratio)).sum()

    local = -likelihood + kl(z_loc, z_scale, 0, 1) + kl(l_loc, l_scale, m, np.sqrt(v))
    assert loss == pytest.approx(share * local + kl(w_loc, w_scale, 0, 0.7), rel=1e-5)
    elbo = model.get_elbo(per_cell=True)
    terms = model.get_elbo() * 60
    assert elbo.shape == (60,)
    assert terms < -kl(w_loc, w_scale, 0, 0.7)


def test_loadings_of_factors_that_are_not_needed_shrink():
    adata = pyrosc.simulate.linear_scvi(400, 50, n_latent=2, n_batches=1, mean_library=2000, seed=4).adata
    plain, bayesian = (
        trained(LinearSCVI.from_anndata(adata, n_latent=4, bayesian=b), 300, lr=1e-2, early_stopping=False)
        for b in (False, True)
    )
    spread, shrunk = (np.sort(m.get_loadings().std().to_numpy()) for m in (plain, bayesian))
    assert shrunk[0] < 0.3 * spread[0]
    assert shrunk[-1] > 0.9 * spread[-1]
    scale = np.sort(bayesian.log_prior_scale.exp().detach().numpy())
    np.testing.assert_allclose(scale, shrunk, rtol=0.3, atol=0.06)


def test_the_scale_of_the_prior_can_be_fixed():
    model = LinearSCVI.from_anndata(make_adata(), bayesian=True, prior_scale=0.25, n_hidden=8)
    trained(model, 2)
    np.testing.assert_allclose(model.log_prior_scale.exp().detach(), 0.25, rtol=1e-5)


# -- other options -------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_method():
    model = LinearSCVI.from_anndata(make_adata(), batch_key="batch")
    assert model.gene_likelihood == "nb"
    assert not model.observed_library
    assert not any("decoder" in k for k in model.state_dict())
    assert "library" in model.latent_sites()


def test_zero_inflation_has_a_linear_map_of_its_own():
    model = LinearSCVI.from_anndata(make_adata(), batch_key="batch", gene_likelihood="zinb", n_latent=3)
    assert model.zi_head.weight.shape == (40, 3)
    trained(model, 2)
    z = torch.as_tensor(model.get_latent_representation())
    packed = model.spec.pack({"batch": torch.as_tensor(model.datasets["main"].codes("batch"))})
    expected = (z @ model.zi_head.weight.T + model.zi_head.effects(packed) + model.zi_head.bias).detach()
    np.testing.assert_allclose(model.get_likelihood_parameters()["zi_logits"], expected, atol=1e-4)


def test_dispersion_per_cell_is_a_linear_map_of_the_factors():
    model = LinearSCVI.from_anndata(make_adata(), dispersion="gene-cell", n_latent=3)
    assert model.log_theta.in_features == 3
    trained(model, 2)


def test_several_particles_and_draws_agree_with_single_ones(bayesian):
    """Loadings broadcast over draws as the cells' sites do."""
    rows = np.arange(20)
    many = bayesian.posterior("rho", indices=rows, n_samples=400)["rho"]
    single = np.mean(
        [bayesian.posterior("rho", indices=rows, n_samples=1, seed=s)["rho"] for s in range(60)], axis=0
    )
    np.testing.assert_allclose(many, single, rtol=0.25)
    elbos = [bayesian.get_elbo(indices=rows, n_samples=1, seed=s) for s in range(40)]
    together = bayesian.get_elbo(indices=rows, n_samples=40)
    assert together == pytest.approx(np.mean(elbos), abs=5 * np.std(elbos) / np.sqrt(40))


def test_loadings_outside_of_cells_are_not_in_the_guide_of_plain_models():
    model = LinearSCVI.from_anndata(make_adata())
    assert model.latent_sites(local=False) == []
    assert LinearSCVI.from_anndata(make_adata(), bayesian=True).latent_sites(local=False) == ["loadings"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder_norm": "layer"}, "decoder_norm is one of 'none', 'batch'"),
        ({"bayesian": True, "decoder_norm": "batch"}, "batch normalisation would scale away"),
        ({"prior_scale": 1.0}, "it needs bayesian=True"),
        ({"bayesian": True, "prior_scale": 0.0}, "above 0; got 0.0"),
        ({"gene_likelihood": "gaussian"}, "gene_likelihood is one of"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LinearSCVI.from_anndata(make_adata(), **options)


def test_unknown_options_are_named():
    with pytest.raises(TypeError, match=r"LinearSCVI has no option 'n_latents'.*bayesian.*n_latent"):
        LinearSCVI.from_anndata(make_adata(), n_latents=3)


def test_intervals_need_bayesian_loadings(bayesian):
    with pytest.raises(ValueError, match="make the model with bayesian=True"):
        LinearSCVI.from_anndata(make_adata()).get_loadings(0.9)
    with pytest.raises(ValueError, match="between 0 and 1; got 90"):
        bayesian.get_loadings(90)


# -- where results go ----------------------------------------------------------------------------------


def test_annotate_writes_loadings_for_the_genes_of_the_data():
    adata = make_adata()
    model = trained(LinearSCVI.from_anndata(adata, n_latent=2, n_hidden=8), 1)
    assert model.annotate() is adata
    pd.testing.assert_frame_equal(adata.varm["LDVAE_loadings"], model.get_loadings(), check_names=False)
    assert "varm/LDVAE_loadings" in adata.uns["pyrosc"]["LinearSCVI"]["written"]
    assert adata.obsm["X_LDVAE"].shape == (200, 2)
    other = adata[:10, ::-1].copy()
    other.varm.clear()
    model.annotate(other, key_added="mine")
    np.testing.assert_array_equal(other.varm["mine_loadings"], adata.varm["LDVAE_loadings"][::-1])
    plain = make_adata()
    model.annotate(plain, sites="z")
    assert not plain.varm


def test_truth_of_the_simulator():
    adata, model = pyrosc.simulate.linear_scvi(50, 30, n_latent=4, sparsity=0.5, seed=0)
    loadings = adata.varm["true_loadings"]
    np.testing.assert_array_equal(loadings, model.get_loadings())
    assert 0.35 < (loadings == 0).mean() < 0.65
    spread = np.abs(adata.obsm["true_z"] @ loadings.T).std()
    assert 0.7 < spread < 1.3
    rho = adata.layers["true_rho"]
    np.testing.assert_allclose(rho.sum(1), 1, rtol=1e-5)
    totals = np.asarray(adata.X.sum(1)).ravel()
    assert np.corrcoef(np.log(totals), np.log(adata.obs["true_library"]))[0, 1] > 0.5
    with pytest.raises(ValueError, match="sparsity is a share"):
        pyrosc.simulate.linear_scvi(50, 30, sparsity=1.0)


def test_a_simulation_keeps_its_loadings_where_they_are_latent():
    adata, model = pyrosc.simulate.linear_scvi(700, 30, n_latent=2, bayesian=True, seed=0)
    np.testing.assert_allclose(adata.varm["true_loadings"], model.get_loadings(), rtol=1e-6)
    z = adata.obsm["true_z"]
    codes = model.datasets["main"].codes("batch")
    with torch.no_grad():
        effects = model.scale_head.effects(model.spec.pack({"batch": torch.as_tensor(codes)}))
        logits = torch.as_tensor(z) @ model.scale_head.weight.T + effects + model.scale_head.bias
    np.testing.assert_allclose(adata.layers["true_rho"], logits.softmax(-1), rtol=1e-4)


def test_plots(bayesian):
    axes = pyrosc.pl.loadings(bayesian, n_genes=5)
    assert len(axes) == 3
    assert [ax.get_title() for ax in axes] == ["Z_0", "Z_1", "Z_2"]
    labels = [t.get_text() for t in axes[1].get_yticklabels()]
    tidy = bayesian.get_loadings(0.9).query("factor == 'Z_1'").set_index("gene")
    sure = np.where(tidy["loading"] > 0, tidy["lower"].clip(0), -tidy["upper"].clip(upper=0))
    assert set(labels) == set(tidy.index[np.argsort(sure)[::-1][:5]])
    plain = LinearSCVI.from_anndata(make_adata(), n_latent=2)
    (ax,) = pyrosc.pl.loadings(plain, 1, n_genes=4)
    table = plain.get_loadings()["Z_1"]
    shown = [t.get_text() for t in ax.get_yticklabels()]
    assert set(shown) == set(table.abs().nlargest(4).index)
    assert list(table[shown]) == sorted(table[shown])
    with pytest.raises(KeyError, match=r"no factors \['Z_9'\]"):
        pyrosc.pl.loadings(plain, "Z_9")
    with pytest.raises(TypeError, match="SCVI has no loadings"):
        pyrosc.pl.loadings(SCVI.from_anndata(make_adata()))
    import matplotlib.pyplot as plt

    plt.close("all")


def test_the_guide_and_the_model_share_a_plate_of_genes():
    model = LinearSCVI.from_anndata(make_adata(), bayesian=True, n_latent=2)
    batch = load_batch(model.datasets, {"main": np.arange(8)}, model.device)
    with torch.random.fork_rng(), torch.no_grad(), model.minibatch(batch):
        site = poutine.trace(model.guide).get_trace(**model.inputs(batch)).nodes["loadings"]
    assert [f.name for f in site["cond_indep_stack"]] == ["genes"]
    assert site["scale"] == 1.0
