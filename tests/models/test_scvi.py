"""SCVI recovers simulated truth; its options are checked and do what they say."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from toy import make_adata

import pyrosc
from pyrosc import SCVI


def trained(model: SCVI, epochs: int, **options) -> SCVI:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # short runs may end while the ELBO still rises
        return model.fit(epochs, progress=False, **options)


@pytest.fixture(scope="module")
def simulated():
    return pyrosc.simulate.scvi(
        1200,
        80,
        n_types=4,
        n_latent=4,
        mean_library=3000,
        signal=1.0,
        effect=0.7,
        zero_inflation=0.02,
        seed=3,
    )


@pytest.fixture(scope="module")
def fitted(simulated):
    return trained(SCVI.from_anndata(simulated.adata, batch_key="batch", n_latent=4), 80)


def test_held_out_elbo_is_close_to_that_of_the_true_parameters(simulated, fitted):
    adata, true = simulated
    options = {k: v for k, v in true.config.items() if k in ("n_hidden", "n_latent", "norm", "dropout_rate")}
    oracle = SCVI.from_anndata(adata, batch_key="batch", **options)
    oracle.load_state_dict(
        {k: v if k.startswith("encoder") else true.state_dict()[k] for k, v in oracle.state_dict().items()}
    )
    for name, parameter in oracle.named_parameters():
        parameter.requires_grad_(name.startswith("encoder"))
    trained(oracle, 80)
    held_out = fitted.split["main"][1]
    assert np.array_equal(held_out, oracle.split["main"][1])
    best = oracle.get_marginal_ll(indices=held_out, n_samples=200)
    found = fitted.get_marginal_ll(indices=held_out, n_samples=200)
    assert found > best - 0.01 * abs(best)
    assert found < best + 0.01 * abs(best)
    for name, value in oracle.state_dict().items():
        if name.startswith(("decoder", "scale_head", "log_theta")):
            assert torch.equal(value, true.state_dict()[name]), name


def test_inverse_dispersions_are_recovered(simulated, fitted):
    adata, _ = simulated
    expressed = np.asarray(adata.X.mean(0)).ravel() > 2  # others say little about their dispersion
    truth = np.log(adata.var["inverse_dispersion"].to_numpy())[expressed]
    found = fitted.log_theta().detach().numpy()[expressed]
    assert expressed.sum() > 30
    assert np.corrcoef(truth, found)[0, 1] > 0.9


def test_expression_is_recovered(simulated, fitted):
    truth = simulated.adata.layers["true_rho"]
    found = fitted.get_normalized_expression(as_numpy=True)
    correlation = np.corrcoef(np.log(truth + 1e-4).ravel(), np.log(found + 1e-4).ravel())[0, 1]
    assert correlation > 0.95


def test_batch_is_removed_and_labels_are_kept(simulated, fitted):
    from sklearn.model_selection import cross_val_score
    from sklearn.neighbors import KNeighborsClassifier

    z, obs = fitted.get_latent_representation(), simulated.adata.obs
    classify = KNeighborsClassifier(20)
    assert cross_val_score(classify, z, obs["cell_type"], cv=3).mean() > 0.9
    assert cross_val_score(classify, z, obs["batch"], cv=3).mean() < 0.65  # chance is 0.5


def test_transform_batch_gives_the_true_counterfactual(simulated, fitted):
    adata, true = simulated
    with torch.no_grad():
        z = torch.as_tensor(adata.obsm["true_z"])
        spec = true.spec
        codes = torch.ones(len(z), dtype=torch.int64)
        packed = spec.pack({"batch": codes})
        truth = true.scale_head(true.decoder(z, packed)).softmax(-1).numpy()
    found = fitted.get_normalized_expression(transform_batch="batch1", as_numpy=True)
    here = (adata.obs["batch"] == "batch0").to_numpy()  # cells of the other batch
    correlation = np.corrcoef(np.log(truth[here] + 1e-4).ravel(), np.log(found[here] + 1e-4).ravel())[0, 1]
    assert correlation > 0.95


def test_a_latent_library_follows_the_true_one():
    adata = pyrosc.simulate.scvi(1000, 50, mean_library=1000, sd_log_library=0.8, seed=4).adata
    model = trained(SCVI.from_anndata(adata, batch_key="batch", use_observed_lib_size=False), 200, lr=5e-3)
    found, observed = np.log(model.get_latent_library_size()), np.log(np.asarray(adata.X.sum(1)).ravel())
    truth = np.log(adata.obs["true_library"])
    assert np.corrcoef(found, truth)[0, 1] > np.corrcoef(observed, truth)[0, 1] - 0.05
    codes = model.datasets["main"].codes("batch")
    totals = observed
    prior = model.library_prior.rows.numpy()
    for batch in (0, 1):
        np.testing.assert_allclose(
            prior[batch], [totals[codes == batch].mean(), totals[codes == batch].var()], rtol=1e-4
        )
    assert not model.library_prior.rows.requires_grad


def test_a_size_factor_replaces_the_library():
    adata = make_adata()
    adata.obs["size"] = np.asarray(adata.X.sum(1)).ravel() / 100
    model = trained(SCVI.from_anndata(adata, batch_key="batch", size_factor_key="size", n_hidden=16), 2)
    np.testing.assert_allclose(model.get_latent_library_size(), adata.obs["size"], rtol=1e-5)
    assert not np.allclose(model.get_normalized_expression().sum(axis=1), 1)


def test_a_logistic_normal_latent_lies_on_the_simplex():
    model = trained(SCVI.from_anndata(make_adata(), latent_distribution="ln", n_latent=4, n_hidden=16), 2)
    z = model.get_latent_representation()
    np.testing.assert_allclose(z.sum(1), 1, rtol=1e-5)
    assert (z > 0).all()
    loc, scale = model.get_latent_representation(return_dist=True)
    assert (loc.sum(1) != 1).any()
    assert (scale > 0).all()


def test_the_encoder_sees_covariates_only_when_asked():
    adata = make_adata()
    moved = adata.copy()
    codes = list(adata.obs["batch"].astype(str).unique())
    moved.obs["batch"] = moved.obs["batch"].astype(str).map({codes[0]: codes[1], codes[1]: codes[0]})
    for encode in (False, True):
        model = trained(SCVI.from_anndata(adata, batch_key="batch", encode_covariates=encode, n_hidden=16), 2)
        same = np.allclose(model.get_latent_representation(), model.get_latent_representation(moved))
        assert same is not encode


def test_decoder_biases_start_at_the_shares_of_genes():
    adata = make_adata()
    model = SCVI.from_anndata(adata, n_hidden=16)
    shares = np.asarray(adata.X.sum(0)).ravel()
    np.testing.assert_allclose(model.scale_head.bias.softmax(0).detach(), shares / shares.sum(), rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gene_likelihood": "gaussian"}, "gene_likelihood is one of 'zinb', 'nb', 'poisson', 'normal'"),
        ({"dispersion": "cell"}, "dispersion is one of"),
        ({"latent_distribution": "beta"}, "latent_distribution is one of"),
        ({"batch_representation": "rows"}, "batch_representation is one of"),
        ({"dispersion": "gene-label"}, "needs labels: labels_key="),
        ({"norm": "group"}, "norm is 'batch'"),
        ({"n_layers": 0}, "n_layers must be at least 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SCVI.from_anndata(make_adata(), **options)


def test_unknown_options_are_named():
    with pytest.raises(TypeError, match=r"SCVI has no option 'n_latents'.*n_latent"):
        SCVI.from_anndata(make_adata(), n_latents=3)


def test_covariates_in_the_model_explain_nuisance():
    """A continuous covariate in the model is removed from the latent space."""
    adata = pyrosc.simulate.scvi(
        800, 60, n_types=3, n_continuous=1, effect=1.0, mean_library=2000, seed=6
    ).adata

    def explained(keys):
        model = trained(SCVI.from_anndata(adata, batch_key="batch", n_latent=4, **keys), 60)
        z = model.get_latent_representation()
        design = np.column_stack([z, np.ones(len(z))])
        y = adata.obs["cov0"].to_numpy()
        residual = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
        return 1 - residual.var() / y.var()

    assert explained({}) > explained({"continuous_covariate_keys": ["cov0"]}) + 0.3
