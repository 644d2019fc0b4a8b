"""PEAKVI: its likelihoods, what it recovers of simulated accessibility, and its results."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from reference_noise import Noise
from scipy import special, stats

import pyrosc
from pyrosc import PEAKVI, DataError, DataWarning
from pyrosc.data import Batch, CategoricalCovariates, ContinuousCovariates, Fragments
from pyrosc.data.inputs import load_batch
from pyrosc.data.reads import even_share
from pyrosc.nn.sparse import SparseRows

#: Simulated cells of which each shows something, of regions that each are seen.
SEEN = {"open_share": 0.5, "depth": 0.8, "seed": 0}


def made(adata: ad.AnnData, **options) -> PEAKVI:
    keys = {"batch_key": "batch"} if "batch" in adata.obs and adata.obs["batch"].nunique() > 1 else {}
    return PEAKVI.from_anndata(adata, **(keys | {"counts": "fragments"} | options))


def batch_of(model: PEAKVI, rows=None) -> dict[str, torch.Tensor]:
    rows = np.arange(model.registry.n_obs) if rows is None else np.asarray(rows)
    return load_batch(model.datasets, {"main": rows}, model.device)


@pytest.fixture(scope="module")
def simulated():
    return pyrosc.simulate.peakvi(1200, 250, n_types=3, n_batches=2, **SEEN)


@pytest.fixture(scope="module")
def trained(simulated) -> PEAKVI:
    model = made(simulated.adata, n_hidden=32, n_latent=4)
    return model.fit(100, progress=False)


# --- the likelihood
# ------------------------------------------------------------------------------------------


def log_likelihood(model: PEAKVI, z: np.ndarray, batch) -> np.ndarray:
    """log p(x | z) of each cell, written out with SciPy."""
    fixed = {"z": torch.as_tensor(z, dtype=torch.float32)}
    from pyrosc.infer.posterior import traces

    nodes = traces(model, batch, 1, None, fixed)[1].nodes
    p, d = nodes["p"]["value"].double().numpy(), nodes["cell_factor"]["value"].double().numpy()
    r = model.get_region_factors().to_numpy().astype(np.float64)
    x = batch["x"].numpy()
    mean = p * d[:, None] * r
    if model.likelihood == "bernoulli":
        found = stats.bernoulli.logpmf(x > 0, mean)
    elif model.likelihood == "poisson":
        found = stats.poisson.logpmf(x, mean)
    else:
        c = model.log_concentration().detach().exp().double().numpy()
        found = stats.betabinom.logpmf(np.minimum(x, model.total), model.total, mean * c, (1 - mean) * c)
    return found.sum(1)


@pytest.mark.parametrize("likelihood", ["bernoulli", "poisson", "beta_binomial"])
def test_the_elbo_of_a_small_case_written_out(likelihood):
    rng = np.random.default_rng(0)
    adata = ad.AnnData(sp.csr_matrix(rng.poisson(1.0, (7, 5)).astype(np.float32)))
    adata = adata[np.asarray(adata.X.sum(1)).ravel() > 0].copy()
    model = made(adata, likelihood=likelihood, n_hidden=6, n_latent=2, copies=20)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.as_tensor(rng.normal(size=tuple(p.shape)), dtype=torch.float32)
    batch = batch_of(model)
    loc, scale = model.get_latent_representation(return_dist=True)
    z = loc + scale * rng.normal(size=loc.shape).astype(np.float32)
    eps = (z - loc) / scale
    with torch.no_grad(), Noise({"z": torch.as_tensor(eps)}):
        loss = model(batch)
    kl = (0.5 * (loc**2 + scale**2 - 1) - np.log(scale)).sum(1)
    want = log_likelihood(model, z, batch) - kl  # the KL of each cell once, not divided by the minibatch
    assert loss.item() == pytest.approx(-want.mean(), rel=1e-5)


def test_the_marginal_likelihood_of_a_cell_by_quadrature():
    """One region and a one-dimensional z: log p(x) on a grid, against the importance-weighted estimate."""
    adata = ad.AnnData(sp.csr_matrix(np.array([[1.0, 0], [0, 3.0], [1.0, 1.0]], np.float32)))
    model = made(adata, n_hidden=4, n_latent=1, norm="none")
    with torch.no_grad():
        model.head.weight.normal_(0, 1, generator=torch.Generator().manual_seed(1))
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    batch = batch_of(model)
    log_p = np.stack([log_likelihood(model, np.full((3, 1), z), batch) for z in nodes])
    want = special.logsumexp(log_p, axis=0, b=(weights / weights.sum())[:, None])
    found = model.get_marginal_ll(n_samples=4000, per_cell=True)
    np.testing.assert_allclose(found, want, atol=0.02)


def test_two_of_three_likelihoods_meet_in_the_limit():
    """With a large concentration the beta-binomial law is the binomial."""
    adata = pyrosc.simulate.peakvi(40, 20, n_batches=1, likelihood="beta_binomial", seed=0).adata
    model = made(adata, likelihood="beta_binomial", n_hidden=8, n_latent=2)
    with torch.no_grad():
        model.log_concentration.values.fill_(float(np.log(1e6)))
    batch = batch_of(model)
    z = np.zeros((40, 2), np.float32)
    from pyrosc.infer.posterior import traces

    node = traces(model, batch, 1, None, {"z": torch.as_tensor(z)})[1].nodes["x"]
    mean = node["fn"].base_dist.probability.double().numpy()
    want = stats.binom.logpmf(batch["x"].clamp(max=4).numpy(), 4, mean).sum(1)
    np.testing.assert_allclose(node["fn"].log_prob(node["value"]).numpy(), want, rtol=1e-4)


def heldout_counts(model: PEAKVI) -> float:
    """Held-out log-likelihood of the fragments (cut at 4), nats per cell."""
    return model.get_marginal_ll(indices=model.validation_indices, n_samples=50)


def heldout_open(model: PEAKVI) -> float:
    """Held-out log-likelihood of 1[x > 0] that a model of counts implies, by 200 draws from q(z | x)."""
    from pyrosc.infer.posterior import traces

    batch = batch_of(model, model.validation_indices)
    seen = (batch["x"] > 0).numpy()
    total = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        guide, nodes = traces(model, batch, 200)
        law = nodes.nodes["x"]["fn"].base_dist
        zeros = law.log_prob(torch.zeros_like(batch["x"])).double().numpy()
        with np.errstate(divide="ignore"):
            ones = np.log(-np.expm1(zeros))
        total = np.where(seen, ones, zeros).sum(-1)
        q, p = guide.nodes["z"], nodes.nodes["z"]
        ratio = (p["fn"].log_prob(p["value"]) - q["fn"].log_prob(q["value"])).double().numpy()
    return float((special.logsumexp(total + ratio, axis=0) - np.log(200)).mean())


def test_beta_binomial_wins_where_counts_are_over_dispersed():
    options = {"n_hidden": 16, "n_latent": 3, "likelihood": "beta_binomial"}
    adata = pyrosc.simulate.peakvi(
        1500, 120, n_latent=3, n_batches=1, likelihood="beta_binomial", concentration=0.7, depth=0.6, seed=1
    ).adata
    fits = {
        k: made(adata, **(options | {"likelihood": k})) for k in ("beta_binomial", "poisson", "bernoulli")
    }
    binomial = made(adata, **options)
    with torch.no_grad():
        binomial.log_concentration.values.fill_(float(np.log(1e5)))
    binomial.log_concentration.requires_grad_(False)
    for model in (*fits.values(), binomial):
        model.fit(30, progress=False)
    best = heldout_counts(fits["beta_binomial"])
    assert best > heldout_counts(binomial) + 1
    assert best > heldout_counts(fits["poisson"]) + 1
    assert heldout_open(fits["beta_binomial"]) > heldout_open(fits["bernoulli"]) - 0.3
    learned = np.median(fits["beta_binomial"].log_concentration().detach().exp().numpy())
    assert 0.4 < learned < 1.3


def test_beta_binomial_becomes_binomial_without_over_dispersion():
    options = {"n_hidden": 16, "n_latent": 3, "likelihood": "beta_binomial"}
    adata = pyrosc.simulate.peakvi(
        1500, 120, n_latent=3, n_batches=1, likelihood="beta_binomial", concentration=1e5, depth=0.6, seed=2
    ).adata
    free, binomial = made(adata, **options), made(adata, **options)
    with torch.no_grad():
        binomial.log_concentration.values.fill_(float(np.log(1e5)))
    binomial.log_concentration.requires_grad_(False)
    free.fit(30, progress=False)
    binomial.fit(30, progress=False)
    assert heldout_counts(free) > heldout_counts(binomial) - 0.5
    assert np.median(free.log_concentration().detach().exp().numpy()) > 10


# --- what it recovers
# ----------------------------------------------------------------------------------------


def test_simulated_accessibility_is_recovered(simulated, trained):
    truth = simulated.adata.layers["true_p"] * simulated.adata.var["true_region_factor"].to_numpy()
    found = trained.get_normalized_accessibility(normalize_regions=True, as_numpy=True)
    assert np.corrcoef(truth.ravel(), found.ravel())[0, 1] > 0.9
    # within regions too, over cells
    centred = [a - a.mean(0) for a in (truth, found)]
    assert np.corrcoef(centred[0].ravel(), centred[1].ravel())[0, 1] > 0.65
    factors = trained.get_library_size_factors()
    assert np.corrcoef(factors, simulated.adata.obs["true_cell_factor"])[0, 1] > 0.7
    assert np.isfinite(factors).all()
    assert ((factors > 0) & (factors < 1)).all()


def test_cell_types_are_found(simulated, trained):
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score

    clusters = KMeans(3, n_init=5, random_state=0).fit_predict(trained.get_latent_representation())
    assert adjusted_rand_score(simulated.adata.obs["cell_type"], clusters) > 0.5


def test_expected_rates_are_those_observed(trained):
    """p d r averaged over cells is the share of cells in which the region was seen."""
    both = trained.get_normalized_accessibility(normalize_cells=True, normalize_regions=True, as_numpy=True)
    seen = (trained.home().X > 0).mean(0)
    np.testing.assert_allclose(both.mean(0), np.asarray(seen).ravel(), atol=0.03)


# --- reads and fragments
# -------------------------------------------------------------------------------------


def test_reads_are_recognised_and_become_fragments():
    plain = pyrosc.simulate.peakvi(60, 30, likelihood="poisson", depth=0.9, seed=1).adata
    doubled = plain.copy()
    doubled.X = doubled.X * 2
    doubled.X.data[::7] -= 1  # a read that fell outside of its region
    assert even_share(doubled.X) > 0.5 > even_share(plain.X)
    with pytest.warns(DataWarning, match="even, as of reads"):
        model = PEAKVI.from_anndata(doubled)
    assert model.registry.fields["x"].reads
    batch = batch_of(model)
    assert np.array_equal(batch["x"].numpy(), plain.X.toarray())
    assert np.array_equal(model.datasets["main"].summary("x").gene_sums, np.asarray(plain.X.sum(0)).ravel())
    assert not PEAKVI.from_anndata(plain).registry.fields["x"].reads  # no warning
    said = PEAKVI.from_anndata(doubled, counts="fragments")
    assert np.array_equal(batch_of(said)["x"].numpy(), doubled.X.toarray())
    assert PEAKVI.from_anndata(doubled, counts="reads").registry.fields["x"].reads
    with pytest.raises(ValueError, match="counts is one of"):
        PEAKVI.from_anndata(doubled, counts="umi")
    with pytest.raises(TypeError, match="no option 'counts'"):
        pyrosc.SCVI.from_anndata(doubled, counts="reads")


def test_the_unit_survives_saving_and_new_cells(tmp_path):
    plain = pyrosc.simulate.peakvi(60, 30, n_batches=1, **SEEN).adata
    plain.X = plain.X * 2
    model = PEAKVI.from_anndata(plain, counts="reads").fit(1, progress=False, early_stopping=False)
    model.save(tmp_path / "model")
    again = PEAKVI.load(tmp_path / "model", plain)
    assert again.registry == model.registry
    other = plain[::-1].copy()
    np.testing.assert_allclose(
        again.get_latent_representation(other)[::-1], model.get_latent_representation(), atol=1e-5
    )
    assert model.registry.keywords(PEAKVI.fields())["counts"] == "reads"


def test_values_that_are_no_counts_are_still_refused():
    adata = pyrosc.simulate.peakvi(60, 30, **SEEN).adata
    adata.X = adata.X * 1.5
    with pytest.raises(DataError, match="does not hold counts"):
        PEAKVI.from_anndata(adata, counts="reads")


def test_clipped_values_are_reported():
    adata = ad.AnnData(sp.csr_matrix(np.array([[9, 1, 0], [0, 1, 1], [1, 0, 2]], np.float32)))
    with pytest.warns(DataWarning, match="16.67% of the values are above 4"):
        model = made(adata, likelihood="beta_binomial")
    assert model.clipped_share == pytest.approx(1 / 6)
    assert made(adata).clipped_share == 0


# --- results
# -------------------------------------------------------------------------------------------------


def test_normalised_accessibility_in_all_its_forms(trained):
    adata = trained.home()
    p = trained.get_normalized_accessibility()
    assert isinstance(p, pd.DataFrame)
    assert list(p.columns) == list(adata.var_names)
    assert list(p.index) == list(adata.obs_names)
    assert ((p > 0) & (p < 1)).all().all()
    rows, regions = [5, 2, 900], ["region7", "region3"]
    part = trained.get_normalized_accessibility(indices=rows, region_list=regions)
    np.testing.assert_allclose(part.to_numpy(), p.iloc[rows][regions].to_numpy(), rtol=1e-5)
    sparse = trained.get_normalized_accessibility(threshold=0.5)
    assert sp.issparse(sparse)
    assert sparse.format == "csr"
    np.testing.assert_allclose(sparse.toarray(), np.where(p >= 0.5, p, 0), rtol=1e-5)
    cells = trained.get_normalized_accessibility(normalize_cells=True, indices=rows).to_numpy()
    d = trained.get_library_size_factors(indices=rows)
    np.testing.assert_allclose(cells, p.iloc[rows].to_numpy() * d[:, None], rtol=1e-5)
    swapped = trained.get_normalized_accessibility(transform_batch=["batch0", "batch1"], indices=rows)
    one, two = (
        trained.get_normalized_accessibility(transform_batch=b, indices=rows) for b in ("batch0", "batch1")
    )
    np.testing.assert_allclose(swapped.to_numpy(), (one + two).to_numpy() / 2, rtol=1e-5)
    empty = trained.get_normalized_accessibility(indices=[], threshold=0.5)
    assert empty.shape == (0, 250)
    with pytest.raises(KeyError, match="no regions 'nowhere'"):
        trained.get_normalized_accessibility(region_list=["nowhere"])
    with pytest.raises(ValueError, match="threshold"):
        trained.get_normalized_accessibility(threshold=0.0)


def test_many_regions_are_never_held_at_once(monkeypatch):
    from pyrosc.models import accessibility

    adata = pyrosc.simulate.peakvi(90, 60, **SEEN).adata
    model = made(adata, n_hidden=8, n_latent=2)
    whole = model.get_normalized_accessibility(threshold=0.4)
    sizes = []
    batches = model.batches
    monkeypatch.setattr(accessibility, "_AT_ONCE", 600)
    monkeypatch.setattr(
        type(model), "batches", lambda self, d, rows, size: sizes.append(len(rows)) or batches(d, rows, size)
    )
    parts = model.get_normalized_accessibility(threshold=0.4)
    assert max(sizes) == 10
    np.testing.assert_allclose(parts.toarray(), whole.toarray(), rtol=1e-5)


def test_differential_accessibility_finds_what_differs():
    simulated = pyrosc.simulate.peakvi(
        1500, 200, n_types=2, n_batches=1, signal=2.0, open_share=0.5, depth=0.8, seed=4
    )
    adata = simulated.adata
    model = made(adata, n_hidden=32, n_latent=4).fit(40, progress=False)
    table = model.differential_accessibility(groupby="cell_type", group1="type0", group2="type1")
    assert {"is_da_fdr", "proba_da", "effect_mean", "est_prob1", "emp_prob2", "emp_effect"} <= set(table)
    first = (adata.obs["cell_type"] == "type0").to_numpy()
    truth = adata.layers["true_p"] * adata.var["true_region_factor"].to_numpy()
    gap = pd.Series(truth[first].mean(0) - truth[~first].mean(0), adata.var_names).reindex(table.index)
    assert (
        np.corrcoef(gap, table["effect_mean"] * model.get_region_factors().reindex(table.index))[0, 1] > 0.9
    )
    sure = gap.abs() > 0.15
    assert table.loc[sure, "is_da_fdr"].mean() > 0.8
    assert (np.sign(table["effect_mean"])[sure] == np.sign(gap)[sure]).mean() > 0.95
    rng = np.random.default_rng(0)
    for drawn in (pyrosc.pl.volcano, pyrosc.pl.heatmap, lambda t: pyrosc.rank_genes_groups(adata, t)):
        with pytest.raises(ValueError, match="in place of differential_accessibility ask"):
            drawn(table)
    null = model.differential_accessibility(idx1=rng.random(adata.n_obs) < 0.5)
    assert null["is_da_fdr"].mean() < 0.02
    seen = (adata.X > 0).toarray()
    emp = pd.Series(seen[first].mean(0) - seen[~first].mean(0), adata.var_names).reindex(table.index)
    np.testing.assert_allclose(table["emp_effect"], emp, atol=1e-6)
    lfc = pyrosc.differential_expression(model, idx1=first, effect="lfc")
    assert "lfc_mean" in lfc
    assert (
        pyrosc.pl.volcano(pyrosc.differential_expression(model, idx1=first))[0].get_xlabel() == "difference"
    )


def test_annotate_and_new_batches(simulated):
    adata = simulated.adata
    reference = adata[(adata.obs["batch"] == "batch0").to_numpy()].copy()
    reference.obs["batch"] = np.where(np.arange(reference.n_obs) % 2, "a", "b")
    query = adata[(adata.obs["batch"] == "batch1").to_numpy()].copy()
    model = made(reference, n_hidden=16, n_latent=3, encode_covariates=True).fit(5, progress=False)
    model.annotate()
    assert reference.obsm["X_PeakVI"].shape == (reference.n_obs, 3)
    assert "peakvi_cell_factor" in reference.obs
    mapped = pyrosc.surgery(model, query)
    mapped.fit(3, progress=False)
    z = mapped.get_latent_representation(reference)
    assert np.array_equal(z, model.get_latent_representation())
    assert mapped.registry.categories("batch") == ("a", "b", "batch1")


def test_poisson_with_missing_regions_renormalises(simulated):
    adata = simulated.adata
    model = made(adata, likelihood="poisson", n_hidden=16, n_latent=3).fit(2, progress=False)
    shares = model.get_normalized_accessibility(normalize_regions=True, indices=np.arange(20), as_numpy=True)
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-4)
    np.testing.assert_allclose(model.get_region_factors().sum(), 1, rtol=1e-5)
    fragments = model.get_library_size_factors(indices=np.arange(20))
    np.testing.assert_allclose(fragments, np.asarray(adata.X[:20].sum(1)).ravel(), rtol=1e-5)


def test_options_that_make_no_sense():
    adata = pyrosc.simulate.peakvi(30, 20, **SEEN).adata
    with pytest.raises(ValueError, match="likelihood is one of"):
        made(adata, likelihood="zinb")
    with pytest.raises(ValueError, match="copies"):
        made(adata, likelihood="beta_binomial", copies=0)
    with pytest.raises(ValueError, match="model_depth"):
        made(adata, likelihood="poisson", model_depth=False)


def test_the_encoder_sees_a_part_of_a_cell_while_training():
    from pyrosc.models.peakvi import Thin

    x = (torch.rand(200, 300, generator=torch.Generator().manual_seed(0)) < 0.1).float()
    thin = Thin(0.3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        out = thin.train()(x)
        torch.manual_seed(0)
        sparse = thin(SparseRows(sp.csr_matrix(x.numpy())))
    np.testing.assert_array_equal(sparse.matrix.toarray(), out.numpy())  # the same draws
    assert not out[x == 0].any()
    assert float((out > 0).sum() / x.sum()) == pytest.approx(0.7, abs=0.02)
    assert out.max() == pytest.approx(1 / 0.7)
    assert thin.eval()(x) is x
    with pytest.raises(ValueError, match="input_dropout_rate"):
        Thin(1.0)


def test_fields_are_those_of_the_signature():
    fields = PEAKVI.fields()
    assert fields["x"].unit == "fragments"
    assert list(fields) == ["x", "batch", "categorical_covariates", "continuous_covariates"]
    assert (Fragments.kind, Batch.kind, CategoricalCovariates.kind, ContinuousCovariates.kind)[0] == "counts"
