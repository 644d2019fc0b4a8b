"""AUTOZI: the spike is summed out exactly, draws of δ have right gradients, and inflated genes are found."""

from __future__ import annotations

import warnings

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate, stats
from scipy.special import expit
from sklearn.metrics import roc_auc_score
from toy import make_adata

import pyrosc
from pyrosc import AUTOZI
from pyrosc.data.inputs import load_batch
from pyrosc.infer.handlers import Record


def trained(model: AUTOZI, epochs: int, **options) -> AUTOZI:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # short runs may end while the ELBO still rises
        return model.fit(epochs, progress=False, **options)


@pytest.fixture(scope="module")
def simulated():
    return pyrosc.simulate.autozi(1000, 100, mean_library=3000, n_latent=4, n_types=3, seed=1)


@pytest.fixture(scope="module")
def fitted(simulated):
    model = AUTOZI.from_anndata(simulated.adata, batch_key="batch", n_latent=4)
    return trained(model, 150)


# -- the math ------------------------------------------------------------------------------------------


def by_hand(model: AUTOZI, batch, sites, share: float) -> float:
    """Negative ELBO with the spike of each entry summed over its two values."""
    x = batch["x"].numpy()
    with torch.no_grad():
        loc, scale = (t.double().numpy() for t in model.encoder(batch["x"].log1p(), None))
        covariates = model.spec.pack({"batch": batch["batch"]})
        hidden = model.decoder(sites["z"].detach(), covariates)
        rho = model.scale_head(hidden).double().softmax(-1).numpy()
        pi = expit(model.zi_head(hidden).double().numpy())
        theta = model._log_theta(hidden, batch["batch"], batch["labels"]).double().exp().numpy()
        alpha, beta = (t.double().numpy() for t in model.concentrations())
    delta = sites["delta"].detach().double().numpy()
    if model.zero_inflation == "gene-batch":
        delta = delta[batch["batch"].numpy()]
    elif model.zero_inflation == "gene-label":
        delta = delta[batch["labels"].numpy()]
    mean = rho * x.sum(1, keepdims=True)
    nb = stats.nbinom.pmf(x, theta, theta / (theta + mean))
    extra = model.minimal_dropout + (1 - model.minimal_dropout) * pi
    total = 0.0
    for inflated in (0, 1):
        weight = 1 - delta if inflated else delta
        total = total + weight * ((extra * (x == 0) + (1 - extra) * nb) if inflated else nb)
    kl_z = 0.5 * (scale**2 + loc**2 - 1 - 2 * np.log(scale)).sum()
    kl_delta = sum(
        integrate.quad(_divergence, 0, 1, args=(a, b, 0.4, 0.8))[0]
        for a, b in zip(alpha.ravel(), beta.ravel(), strict=True)
    )
    return share * (-np.log(total).sum() + kl_z) + kl_delta


def _divergence(d, a, b, a0, b0):
    return stats.beta.pdf(d, a, b) * (stats.beta.logpdf(d, a, b) - stats.beta.logpdf(d, a0, b0))


@pytest.mark.parametrize("per", ["gene", "gene-batch", "gene-label"])
@pytest.mark.parametrize("share", [1, 3])
@pytest.mark.parametrize("dispersion", ["gene", "gene-cell"])
def test_the_loss_equals_a_sum_over_the_spike(per, share, dispersion):
    adata = make_adata(30, 4)
    options = {"zero_inflation": per, "alpha_prior": 0.4, "beta_prior": 0.8, "dispersion": dispersion}
    keys = {"batch_key": "batch", "labels_key": "label"}
    model = AUTOZI.from_anndata(adata, **keys, n_latent=2, n_hidden=8, dropout_rate=0.0, **options)
    with torch.no_grad():  # guides of different shapes, none with a pole that quadrature cannot take
        for p in (model.alpha, model.beta):
            values = next(p.parameters())
            values.copy_(torch.linspace(0.1, 0.2, values.numel()).reshape(values.shape))
    batch = load_batch(model.datasets, {"main": np.arange(0, 30, share)}, model.device)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        drawn = Record()
        loss = model.loss(batch, record=drawn).item() * 30
    assert loss == pytest.approx(by_hand(model, batch, drawn.sites, share), rel=2e-5)


def test_logits_of_zero_inflation_are_right_and_finite_everywhere():
    model = AUTOZI.from_anndata(make_adata(20, 6), n_hidden=8)
    u, delta = torch.meshgrid(
        torch.tensor([-1e4, -200.0, -30.0, -3.0, 0.0, 3.0, 30.0, 200.0, 1e4]),
        torch.tensor([0.0, 1e-30, 1e-8, 1e-3, 0.5, 0.999, 1 - 1e-7, 1.0]),
        indexing="ij",
    )
    u, delta = u.clone().requires_grad_(), delta.clone().requires_grad_()
    none = torch.zeros(())
    logits = model._zi_logits(u, delta, none, none)
    logits.sum().backward()
    for tensor in (logits, u.grad, delta.grad):
        assert torch.isfinite(tensor).all()
    d = delta.detach().clamp(1e-6, 1 - 1e-6).double().numpy()
    extra = (1 - d) * (0.01 + 0.99 * expit(u.detach().double().numpy()))
    expected = np.log(extra) - np.log(d + (1 - d) * 0.99 * expit(-u.detach().double().numpy()))
    np.testing.assert_allclose(logits.detach(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.5, 3.0, 50.0, 1e4])
@pytest.mark.parametrize("beta", [0.01, 0.5, 3.0, 1e4])
def test_draws_of_delta_have_right_gradients(alpha, beta):
    """d E[log(.01 + .99 (1 − δ))] / d log α by draws in float32, against quadrature in δ."""
    n = 40_000
    log_alpha = torch.full((n,), float(np.log(alpha)), requires_grad=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        delta = dist.Beta(log_alpha.exp(), torch.full((n,), beta)).rsample()
    (0.01 + 0.99 * (1 - delta)).log().sum().backward()
    each = log_alpha.grad.double().numpy()
    assert np.isfinite(each).all()

    quantiles = (np.arange(200_000) + 0.5) / 200_000  # even in probability: no pole is in the way

    def expectation(a):
        return np.log(0.01 + 0.99 * (1 - stats.beta.ppf(quantiles, a, beta))).mean()

    step = 1e-3
    expected = (expectation(alpha * np.exp(step)) - expectation(alpha * np.exp(-step))) / (2 * step)
    error = 5 * each.std() / np.sqrt(n) + 0.02 * abs(expected) + 1e-4
    assert each.mean() == pytest.approx(expected, abs=error)


def test_closed_form_divergence_is_right_in_single_precision():
    a, b = (
        t.ravel() for t in torch.meshgrid(*[torch.tensor([1e-2, 0.1, 0.5, 5.0, 300.0])] * 2, indexing="ij")
    )
    prior = torch.full_like(a, 0.5)
    single = torch.distributions.kl_divergence(dist.Beta(a, b), dist.Beta(prior, prior))
    a, b, prior = a.double(), b.double(), prior.double()
    double = torch.distributions.kl_divergence(dist.Beta(a, b), dist.Beta(prior, prior))
    np.testing.assert_allclose(single, double, rtol=1e-4, atol=2e-3)


# -- recovery ------------------------------------------------------------------------------------------


def test_inflated_genes_are_found(simulated, fitted):
    table = fitted.get_zero_inflation()
    inflated = simulated.adata.var["true_delta"].to_numpy() == 0
    assert 0.3 < inflated.mean() < 0.7
    assert roc_auc_score(inflated, table["probability"]) > 0.9


def test_genes_inflated_in_one_batch_are_found_there():
    adata = pyrosc.simulate.autozi(1200, 80, per="gene-batch", mean_library=3000, n_latent=4, seed=2).adata
    model = AUTOZI.from_anndata(adata, batch_key="batch", n_latent=4, zero_inflation="gene-batch")
    table = trained(model, 150).get_zero_inflation()
    assert list(table.columns) == ["gene", "batch", "alpha", "beta", "probability", "delta"]
    assert len(table) == 160
    for i, batch in enumerate(("batch0", "batch1")):
        here = table[table["batch"] == batch]
        assert list(here["gene"]) == list(adata.var_names)
        assert roc_auc_score(adata.varm["true_delta"][:, i] == 0, here["probability"]) > 0.85
    other = table[table["batch"] == "batch1"]
    across = roc_auc_score(adata.varm["true_delta"][:, 0] == 0, other["probability"])
    assert 0.3 < across < 0.7  # nothing leaks between batches


def test_a_learned_prior_follows_the_share_of_inflated_genes():
    def mean_delta(share):
        adata = pyrosc.simulate.autozi(600, 60, share=share, mean_library=3000, seed=3).adata
        options = {"alpha_prior": None, "beta_prior": None}
        model = trained(AUTOZI.from_anndata(adata, batch_key="batch", n_latent=4, **options), 100, lr=5e-3)
        row = model.get_alphas_betas().iloc[0]
        return row["alpha_prior"] / (row["alpha_prior"] + row["beta_prior"])

    assert mean_delta(0.9) < mean_delta(0.1) - 0.1


# -- results -------------------------------------------------------------------------------------------


def test_tables(fitted):
    table = fitted.get_alphas_betas()
    assert list(table.columns) == ["gene", "alpha", "beta", "alpha_prior", "beta_prior"]
    assert list(table["gene"]) == list(fitted.registry.var_names())
    np.testing.assert_allclose(table[["alpha_prior", "beta_prior"]], 0.5)
    found = fitted.get_zero_inflation()
    draws = fitted.posterior("delta", n_samples=4000, reduce=None, indices=[0])["delta"]
    np.testing.assert_allclose(found["probability"], (draws < 0.5).mean(0), atol=0.04)
    np.testing.assert_allclose(found["delta"], draws.mean(0), atol=0.04)


def test_the_guide_starts_at_the_prior():
    model = AUTOZI.from_anndata(make_adata(), alpha_prior=0.3, beta_prior=2.0)
    table = model.get_alphas_betas()
    np.testing.assert_allclose(table["alpha"], 0.3, rtol=1e-5)
    np.testing.assert_allclose(table["beta"], 2.0, rtol=1e-5)
    assert not any(p.requires_grad for p in model.log_prior.values())
    assert AUTOZI.from_anndata(make_adata(), alpha_prior=None).log_prior["alpha"].requires_grad


def test_unlabelled_cells_have_a_row_of_their_own_that_is_not_reported():
    adata = make_adata()
    adata.obs["label"] = adata.obs["label"].astype(object)
    adata.obs.loc[adata.obs_names[:50], "label"] = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the announcement of unlabelled cells
        model = AUTOZI.from_anndata(adata, labels_key="label", zero_inflation="gene-label", n_hidden=8)
        trained(model, 1)
    assert model.alpha.n_categories == 4
    table = model.get_zero_inflation()
    assert list(table["label"].unique()) == ["B", "NK", "T"]
    assert len(table) == 3 * 40


def test_annotate_writes_a_column_per_gene(fitted, simulated):
    adata = simulated.adata.copy()
    fitted.annotate(adata)
    expected = fitted.get_zero_inflation()["probability"]
    np.testing.assert_allclose(adata.var["autozi_zero_inflation"], expected)
    assert "var/autozi_zero_inflation" in adata.uns["pyrosc"]["AUTOZI"]["written"]
    assert adata.obsm["X_AutoZI"].shape == (1000, 4)


def test_annotate_writes_a_column_per_gene_and_category(tmp_path):
    adata = make_adata()
    model = AUTOZI.from_anndata(adata, batch_key="batch", zero_inflation="gene-batch", n_hidden=8)
    trained(model, 1).annotate(key_added="zeros")
    columns = ["zeros_zero_inflation_batch_0", "zeros_zero_inflation_batch_1"]
    assert columns == [c for c in adata.var if c.startswith("zeros")]
    table = model.get_zero_inflation().query("batch == 'batch_1'")
    np.testing.assert_allclose(adata.var[columns[1]], table["probability"])
    adata.write_h5ad(tmp_path / "data.h5ad")


def test_without_batches_there_is_one_category():
    model = trained(AUTOZI.from_anndata(make_adata(), zero_inflation="gene-batch", n_hidden=8), 1)
    table = model.get_zero_inflation()
    assert list(table["batch"].unique()) == ["all"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zero_inflation": "cell"}, "zero_inflation is one of 'gene', 'gene-batch', 'gene-label'"),
        ({"zero_inflation": "gene-label"}, "needs labels: labels_key="),
        ({"gene_likelihood": "nb"}, "gene_likelihood is 'zinb'"),
        ({"alpha_prior": 0.0}, "alpha_prior is a positive number"),
        ({"beta_prior": float("inf")}, "beta_prior is a positive number"),
        ({"minimal_dropout": 0.0}, "minimal_dropout is between 0 and 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AUTOZI.from_anndata(make_adata(), **options)


def test_truth_of_the_simulator():
    adata, model = pyrosc.simulate.autozi(
        900, 40, share=0.25, zero_inflation=0.5, mean_library=20_000, seed=0
    )
    delta = adata.var["true_delta"].to_numpy()
    assert set(delta) == {0.0, 1.0}
    assert 0.05 < (delta == 0).mean() < 0.5
    parameters = model.get_likelihood_parameters(adata)
    mean = adata.layers["true_rho"] * adata.obs["true_library"].to_numpy()[:, None]
    theta = parameters["inverse_dispersion"]
    expected = ((theta / (theta + mean)) ** theta).mean(0)  # share of zeros of the negative binomial
    zeros = 1 - (adata.X > 0).toarray().mean(0)
    np.testing.assert_allclose(zeros[delta == 1], expected[delta == 1], atol=0.06)
    assert (zeros - expected)[delta == 0].mean() > 0.15
