"""TOTALVI: its bound by brute force, proteins that were not measured, recovery, results, surgery, MuData."""

from __future__ import annotations

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from pyro import poutine
from scipy import stats

import pyrosc
from pyrosc import SCVI, TOTALVI, DataWarning, feature_correlation
from pyrosc.criticism import predictive_checks
from pyrosc.data.inputs import load_batch
from pyrosc.distributions import NegativeBinomial
from pyrosc.infer.handlers import Record
from pyrosc.models.protein_counts import background_prior, starting_means
from pyrosc.tools import correlation

SMALL = {"n_hidden": 16, "n_latent": 3, "background_prior": "none"}
KEYS = {"batch_key": "batch", "protein_key": "protein"}
QUIET = {"progress": False, "device": "cpu"}


@pytest.fixture(scope="module")
def cells():
    """60 cells of two batches, the second without the last two of six proteins, one cell without any."""
    sim = pyrosc.simulate.totalvi(60, 12, 6, panels={"batch1": range(4)}, seed=3)
    sim.adata.obsm["protein"].iloc[5] = np.nan
    return sim.adata


def made(adata, **options):
    return TOTALVI.from_anndata(adata, **KEYS, **(SMALL | options))


def whole(model, double=False):
    batch = load_batch(model.datasets, {"main": np.arange(model.registry.n_obs)}, model.device)
    return {k: v.double() if double and v.is_floating_point() else v for k, v in batch.items()}


# -- the bound ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_the_bound_equals_a_sum_over_scipy_s_laws(cells, likelihood, weight):
    model = made(cells, gene_likelihood=likelihood).double().eval()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for name in ("prior_loc", "prior_log_scale", "log_efficiency"):
            rows = getattr(model, name).rows
            rows.copy_(torch.randn(rows.shape) * 0.5 + (1.0 if name == "prior_loc" else 0.0))
        model.log_phi.values.copy_(torch.randn(6) * 0.5 + 0.5)
        batch, record = whole(model, double=True), Record()
        found = model.loss(batch, weight, record).item()
        sites, inputs = record.sites, model.inputs(batch)
        trace = pyrosc.infer.posterior.traces(
            model, batch, 1, fixed={k: sites[k] for k in ("z", "log_background")}
        )
    guide, law = trace[0].nodes, trace[1].nodes["x"]["fn"].base_dist
    x, y, seen = (inputs[k].numpy() for k in ("x", "y", "measured"))
    mean = sites["rho"].numpy() * x.sum(1, keepdims=True)
    theta = model.log_theta().detach().exp().numpy()
    genes = stats.nbinom.logpmf(x, theta, theta / (theta + mean))
    if likelihood == "zinb":
        gate = 1 / (1 + np.exp(-law.zi_logits.detach().numpy()))
        genes = np.log(gate * (x == 0) + (1 - gate) * np.exp(genes))

    codes = inputs["batch"].numpy()
    log_e = model.log_efficiency.rows.detach().numpy()
    low = np.exp(sites["log_background"].numpy() + log_e[codes])
    high = sites["foreground_mean"].numpy() * np.exp(log_e[codes])
    phi = model.log_phi().detach().exp().numpy()
    p = sites["foreground_probability"].numpy()
    both = [stats.nbinom.pmf(y, phi, phi / (phi + m)) for m in (low, high)]
    proteins = np.log((1 - p) * both[0] + p * both[1])

    def kl(site, loc, scale):
        q = guide[site]["fn"].base_dist
        q = getattr(q, "base_dist", q)
        m, s = q.loc.numpy(), q.scale.numpy()
        return np.log(scale / s) + (s**2 + (m - loc) ** 2) / (2 * scale**2) - 0.5

    prior = [getattr(model, n).rows.detach().numpy()[codes] for n in ("prior_loc", "prior_log_scale")]
    expected = -genes.sum() - proteins[seen].sum()
    kl_b = kl("log_background", prior[0], np.exp(prior[1]))[seen].sum()
    expected += weight * (kl("z", 0.0, 1.0).sum() + kl_b)
    expected -= stats.norm.logpdf(log_e).sum()  # once for the data, whatever the weight
    assert found == pytest.approx(expected / len(x), rel=1e-6)


def test_proteins_that_were_not_measured_have_no_gradient(cells):
    model = made(cells, protein_dispersion="protein-batch").eval()
    with torch.no_grad():
        model.log_efficiency.rows.fill_(0.3)
    batch = whole(model)
    absent = ~batch["measured"]
    assert absent.any(1).sum() > 20
    with torch.random.fork_rng():
        torch.manual_seed(1)
        loss = model(batch)
        loss.backward()
    second = [4, 5]  # of the second batch
    for table in (model.prior_loc, model.prior_log_scale, model.log_phi):
        assert (table.rows.grad[1, second] == 0).all()
        assert (table.rows.grad[1, :4] != 0).any()
    prior_alone = 0.3 / model.n_train["main"]
    np.testing.assert_allclose(model.log_efficiency.rows.grad[1, second], prior_alone, rtol=1e-6)
    assert (model.log_efficiency.rows.grad[0] - prior_alone).abs().min() > 1e-9
    batch["y"] = torch.where(absent, 1e4, batch["y"])  # whatever stands there
    with torch.random.fork_rng():
        torch.manual_seed(1)
        assert model(batch).item() == loss.item()


def test_a_panel_of_zeros_is_announced_and_taken_as_missing(cells):
    zeros = cells.copy()
    rows = (zeros.obs["batch"] == "batch1").to_numpy()
    zeros.obsm["protein"].iloc[np.flatnonzero(rows), 4:] = 0.0
    words = r"zero in all cells of 'batch1'.*2 of 6 proteins.*'protein4', 'protein5'"
    with pytest.warns(DataWarning, match=words):
        model = made(zeros)
    reference = made(cells)
    a, b = whole(model), whole(reference)
    assert all(torch.equal(a[k], b[k]) for k in a)
    again = pyrosc.data.Registry.from_json(model.registry.to_json())
    assert again == model.registry
    part = model.dataset(zeros[rows].copy())  # other cells of that batch are treated the same way
    assert not part.codes("measured")[:, 4:].any()


def test_the_encoder_learns_to_do_with_the_other_panels(cells):
    model = made(cells)
    measured = whole(model)["measured"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shown = model.train()._shown(measured)
    assert not (shown & ~measured).any()
    assert (shown != measured).any()
    assert torch.equal(model.eval()._shown(measured), measured)
    one = cells[cells.obsm["protein"].notna().all(axis=1).to_numpy()].copy()
    same = TOTALVI.from_anndata(one, protein_key="protein", **SMALL).train()
    measured = whole(same)["measured"]
    assert torch.equal(same._shown(measured), measured)


# -- starting values ------------------------------------------------------------------------------------


def test_the_background_s_prior_is_that_of_the_lower_component():
    rng = np.random.default_rng(0)
    n, p = 300, 40
    high = rng.random((n, p)) < 0.3
    y = rng.poisson(np.where(high, 400.0, 12.0)).astype(np.float32)
    loc, log_scale = background_prior(y, np.ones((n, p), bool))
    lower = np.log1p(y[~high])
    assert loc == pytest.approx(lower.mean(), abs=0.05)
    assert log_scale == pytest.approx(np.log(lower.std() / 10), abs=0.2)  # of a mean of 100 cells
    assert background_prior(y, np.zeros((n, p), bool)) is None
    half = np.arange(p) < p // 2
    shown = np.broadcast_to(half, y.shape)
    y[:, ~half] = 1e5  # not looked at
    assert background_prior(y, shown)[0] == pytest.approx(loc, abs=0.1)


def test_starting_means_are_of_measured_counts():
    y = np.array([[1.0, 7.0], [2.0, 0.0], [3.0, 0.0], [100.0, 0.0]], np.float32)
    measured = np.array([[True, False]] * 4)
    low, rise = starting_means(y, measured)
    assert np.exp(low[0]) == pytest.approx(1.75)
    assert rise[0] == 50.0
    assert (low[1], rise[1]) == (0.0, 1.0)


def test_empirical_priors_of_batches(cells):
    model = made(cells, background_prior="empirical")
    of_batch = [background_prior(*_of(model, s)) for s in (0, 1)]
    for s, (loc, log_scale) in enumerate(x if x else (3.0, 0.0) for x in of_batch):
        assert (model.prior_loc.rows[s] == np.float32(loc)).all()
        assert (model.prior_log_scale.rows[s] == np.float32(log_scale)).all()
    assert of_batch[0] is not None
    assert of_batch[1] is None  # four proteins are too few


def _of(model, s):
    data = model.dataset()
    here = data.codes("batch") == s
    return data.codes("y")[here], data.codes("measured")[here]


# -- recovery and results -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    sim = pyrosc.simulate.totalvi(1500, 60, 12, panels={"batch1": range(8)}, seed=1)
    model = TOTALVI.from_anndata(sim.adata, **KEYS, n_hidden=64, n_latent=8)
    return model.fit(max_steps=700, lr=5e-3, **QUIET), sim


def rank(a, b):
    return stats.spearmanr(a, b).statistic


def test_background_and_foreground_are_recovered(trained):
    model, sim = trained
    adata = sim.adata
    seen = adata.obsm["protein"].notna().to_numpy()
    p, truth = model.get_protein_foreground_probability(), adata.obsm["true_foreground_probability"]
    assert list(p.columns) == list(adata.obsm["protein"].columns)
    assert list(p.index) == list(adata.obs_names)
    assert np.corrcoef(p.to_numpy()[seen], truth[seen])[0, 1] > 0.75
    b = model.posterior("log_background")["log_background"]
    efficiency = np.log(np.exp(model.log_efficiency.rows.detach().numpy()))[model.dataset().codes("batch")]
    true_e = sim.model.log_efficiency.rows.detach().numpy()[model.dataset().codes("batch")]
    shift = (b + efficiency)[seen] - (adata.obsm["true_log_background"] + true_e)[seen]
    assert abs(np.median(shift)) < 0.25
    denoised, true_mean = model.get_normalized_protein(as_numpy=True), adata.obsm["true_protein"]
    assert np.mean([rank(denoised[seen[:, t], t], true_mean[seen[:, t], t]) for t in range(12)]) > 0.55


def test_proteins_that_a_batch_lacks_are_imputed(trained):
    model, sim = trained
    lacking = (sim.adata.obs["batch"] == "batch1").to_numpy()
    found = model.get_normalized_protein(as_numpy=True)
    as_other = model.get_normalized_protein(transform_batch="batch0", as_numpy=True)
    own = model.posterior("protein")["protein"]
    np.testing.assert_allclose(found[lacking, 8:], as_other[lacking, 8:], rtol=1e-5)
    np.testing.assert_allclose(found[:, :8], own[:, :8], rtol=1e-5)
    np.testing.assert_allclose(found[~lacking], own[~lacking], rtol=1e-5)
    truth = sim.adata.obsm["true_protein"]
    assert np.mean([rank(found[lacking, t], truth[lacking, t]) for t in range(8, 12)]) > 0.4
    counts = sim.adata.obsm["true_y"]
    with_background = model.get_normalized_protein(include_protein_background=True, as_numpy=True)
    assert np.mean([rank(with_background[lacking, t], counts[lacking, t]) for t in range(8, 12)]) > 0.3
    p = model.get_protein_foreground_probability()
    p_other = model.get_protein_foreground_probability(transform_batch="batch0")
    np.testing.assert_allclose(p.to_numpy()[lacking, 8:], p_other.to_numpy()[lacking, 8:], rtol=1e-5)
    p_own = model.posterior("foreground_probability")["foreground_probability"]
    np.testing.assert_array_equal(p.to_numpy()[:, :8], p_own[:, :8])
    assert not np.allclose(p.to_numpy()[lacking, 8:], p_own[lacking, 8:], rtol=1e-3)
    p_truth = sim.adata.obsm["true_foreground_probability"]
    assert np.mean([rank(p.to_numpy()[lacking, t], p_truth[lacking, t]) for t in range(8, 12)]) > 0.4
    shares = model.get_normalized_protein(scale_protein=True, as_numpy=True)
    np.testing.assert_allclose(shares, found / found.sum(1, keepdims=True), rtol=1e-5)
    drawn = model.get_normalized_protein(indices=[0, 1500 - 1], n_samples=3, scale_protein=True)
    np.testing.assert_allclose(drawn.sum(axis=1), 1.0, rtol=1e-5)


def test_what_if_the_cell_were_of_the_other_batch_decodes_its_background_anew(trained):
    model, _ = trained
    one = model.posterior(["log_background", "z"], indices=range(5))
    other = model.posterior(["log_background", "z"], indices=range(5), do={"batch": "batch0"})
    np.testing.assert_array_equal(one["z"], other["z"])
    same = model.home().obs["batch"].to_numpy()[:5] == "batch0"
    close = np.isclose(one["log_background"], other["log_background"], rtol=1e-6).all(1)
    np.testing.assert_array_equal(close, same)


def test_denoised_proteins_and_their_options(trained):
    model, _ = trained
    rows = [3, 70, 71]
    names = list(model.registry.var_names("y"))
    which = ["foreground_mean", "foreground_probability", "log_background"]
    draws = {"n_samples": 200, "reduce": None, "do": {"batch": "batch0"}, "seed": 4}
    sites = model.posterior(which, indices=rows, **draws)
    f, p, b = (sites[k] for k in ("foreground_mean", "foreground_probability", "log_background"))
    ask = {"indices": rows, "transform_batch": "batch0", "n_samples": 200, "seed": 4, "as_numpy": True}
    np.testing.assert_allclose(model.get_normalized_protein(**ask), (f * p).mean(0), rtol=1e-4)
    background = model.get_normalized_protein(**ask, include_protein_background=True)
    np.testing.assert_allclose(background, (f * p + (1 - p) * np.exp(b)).mean(0), rtol=1e-4)
    scaled = model.get_normalized_protein(**ask, scale_protein=True, return_mean=False)
    assert scaled.shape == (200, 3, 12)
    np.testing.assert_allclose(scaled.sum(-1), 1.0, rtol=1e-5)
    drawn = model.get_normalized_protein(**ask, sample_protein_mixing=True, return_mean=False)
    assert ((drawn == 0) | np.isclose(drawn, f, rtol=1e-3)).mean() > 0.99
    np.testing.assert_allclose((drawn > 0).mean(0), p.mean(0), atol=0.15)
    table = model.get_normalized_protein(indices=rows, protein_list=[names[4], names[1]])
    assert list(table.columns) == [names[4], names[1]]
    with pytest.raises(ValueError, match="n_samples=25"):
        model.get_normalized_protein(sample_protein_mixing=True)
    with pytest.raises(KeyError, match="no proteins 'CD999'"):
        model.get_normalized_protein(protein_list=["CD999"])
    with pytest.raises(TypeError, match="takes a list"):
        model.get_protein_foreground_probability(protein_list=names[0])
    with pytest.raises(KeyError, match="foreground_mean"):
        pyrosc.normalized_protein(SCVI.from_anndata(model.home(), batch_key="batch", n_hidden=8))


def test_expression_and_replicates(trained):
    model, _ = trained
    rna = model.get_normalized_expression(indices=range(4), transform_batch="batch1")
    np.testing.assert_allclose(rna.sum(1), 1.0, rtol=1e-5)
    y = model.posterior_predictive_sample(field="y", indices=range(600), seed=2).toarray()
    counts = model.home().obsm["protein"].to_numpy()[:600]
    seen = ~np.isnan(counts)
    assert y.shape == (600, 12)
    ratio = [y[seen[:, t], t].mean() / counts[seen[:, t], t].mean() for t in range(12)]
    assert np.abs(np.log(ratio)).max() < 0.35
    one = model.posterior_predictive_sample(field="y", gene_list=["protein3"], indices=range(5))
    assert one.shape == (5, 1)
    assert model.posterior_predictive_sample(indices=range(5)).shape == (5, 60)
    with pytest.raises(KeyError, match="no site 'q'"):
        model.posterior_predictive_sample(field="q")


def test_predictive_intervals_of_proteins_hold_what_they_promise(trained):
    model, _ = trained
    checks = predictive_checks(model, site="y", n_samples=40)
    assert list(checks.statistic("mean").index) == list(model.registry.var_names("y"))
    found = checks.calibration.query("genes == 'all'").set_index("level")
    held_out = model.validation_indices
    assert found.loc[0.9, "values"] == model.dataset().codes("measured")[held_out].sum()
    assert found.loc[0.9, "coverage"] == pytest.approx(0.9, abs=0.05)
    assert found.loc[0.5, "coverage"] == pytest.approx(0.5, abs=0.08)


def test_groups_are_compared_over_both_modalities(trained):
    model, sim = trained
    table = pyrosc.differential_expression(model, groupby="cell_type", group1="type0")
    rna, protein = table[table["field"] == "x"], table[table["field"] == "y"]
    assert set(rna.index) == set(model.registry.var_names("x"))
    assert set(protein.index) == set(model.registry.var_names("y"))
    adata = sim.adata
    here = (adata.obs["cell_type"] == "type0").to_numpy()
    y = adata.obsm["protein"]
    np.testing.assert_allclose(protein["raw_mean1"].reindex(y.columns), y[here].mean(), rtol=1e-6)
    share = (y[~here] > 0).sum() / y[~here].notna().sum()
    np.testing.assert_allclose(protein["non_zeros_proportion2"].reindex(y.columns), share, rtol=1e-6)
    assert list(protein["n_cells1"].reindex(y.columns)) == list(y[here].notna().sum())
    truth = adata.obsm["true_protein"]
    lfc = pd.Series(np.log2(truth[here].mean(0)) - np.log2(truth[~here].mean(0)), index=y.columns)
    called = protein[protein["is_de_fdr"]]
    assert len(called) >= 4
    assert (np.sign(called["lfc_mean"]) == np.sign(lfc[called.index])).all()
    assert rank(protein["lfc_mean"], lfc[protein.index]) > 0.8
    notes = table.attrs["differential_expression"]["comparisons"]
    assert set(notes) == {"type0 vs rest (x)", "type0 vs rest (y)"}
    corrected = pyrosc.differential_expression(
        model, groupby="cell_type", group1="type0", batch_correction=True, n_samples=5
    )
    again = corrected[corrected["field"] == "y"]
    assert rank(again["lfc_mean"], lfc[again.index]) > 0.8
    adata = sim.adata.copy()
    adata.obs["person"] = (np.arange(adata.n_obs) % 6).astype(str)
    by_donor = pyrosc.differential_expression(
        model, adata, groupby="cell_type", group1="type0", donor_key="person", n_samples=5
    )
    again = by_donor[by_donor["field"] == "y"]
    assert rank(again["lfc_mean"], lfc[again.index]) > 0.8
    pairs = pyrosc.differential_expression(
        model, groupby="cell_type", group1="type0", pairs=True, n_samples=300
    )
    assert set(pairs["field"]) == {"x", "y"}


def test_proteins_that_a_group_was_not_measured_for_are_not_compared(trained):
    model, _ = trained
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        table = pyrosc.differential_expression(model, groupby="batch", n_samples=3)
    lacking = [f"protein{t}" for t in range(8, 12)]
    blank = table[table.index.isin(lacking)]
    assert blank[["lfc_mean", "proba_de", "scale1"]].isna().all(axis=None)
    assert not blank["is_de_fdr"].any()
    assert not blank["is_expressed"].any()
    assert (blank[["n_cells1", "n_cells2"]].min(axis=1) == 0).all()
    assert table[~table.index.isin(lacking)]["lfc_mean"].notna().all()
    with pytest.raises(ValueError, match="several modalities"):
        pyrosc.pl.heatmap(table)
    pyrosc.pl.volcano(table[table["field"] == "y"])


def test_correlations_of_genes_and_proteins(trained):
    model, sim = trained
    kept = (model.home().obs["batch"] == "batch0").to_numpy()
    with pytest.warns(DataWarning, match="transform_batch="):
        found = model.get_feature_correlation_matrix(indices=kept, n_samples=4)
    assert found.shape == (72, 72)
    np.testing.assert_allclose(np.diag(found), 1.0)
    np.testing.assert_allclose(found, found.T)
    # truth: foreground or nothing, and the Gamma law behind the counts of a gene
    rng = np.random.default_rng(0)
    theta = sim.adata.var["inverse_dispersion"].to_numpy()
    rho = rng.gamma(theta, sim.adata.layers["true_rho"] / theta)
    obsm = sim.adata.obsm
    on = rng.random(obsm["true_protein"].shape) < obsm["true_foreground_probability"]
    phi = np.exp(2.0)
    y = rng.gamma(phi, obsm["true_foreground_mean"] / phi) * on
    truth = stats.spearmanr(np.hstack([rho, y])[kept]).statistic
    cross = found.to_numpy()[:60, 60:], truth[:60, 60:]
    assert np.corrcoef(cross[0].ravel(), cross[1].ravel())[0, 1] > 0.8
    assert np.abs(cross[0] - cross[1]).mean() < 0.08
    asked = {"features": ["protein2", "gene7"], "transform_batch": ["batch0", "batch1"]}
    few = feature_correlation(model, method="pearson", n_samples=1, **asked)
    assert list(few.columns) == ["protein2", "gene7"]
    alone = feature_correlation(
        SCVI.from_anndata(model.home(), batch_key="batch", n_hidden=8), n_samples=1, indices=range(20)
    )
    assert alone.shape == (60, 60)
    wrong = {TypeError: {"features": "gene1"}, KeyError: {"features": ["g"]}}
    values = ({"n_samples": 0}, {"method": "x"}, {"indices": [0, 1]})
    refused = [*wrong.items(), *((ValueError, o) for o in values)]
    for error, options in refused:
        with pytest.raises(error):
            feature_correlation(model, **options)


def test_a_gene_and_a_protein_of_one_name_are_told_apart(cells):
    alike = cells.copy()
    alike.var_names = ["protein2", *alike.var_names[1:]]
    model = made(alike)
    both = {"n_samples": 1, "transform_batch": "batch0"}
    found = feature_correlation(model, **both)
    assert found.index.is_unique
    assert next(iter(found.index)) == "protein2 (x)"
    asked = feature_correlation(model, features=["protein2 (y)", "gene3", "protein2 (x)"], **both)
    assert np.abs(asked.to_numpy() - found.loc[asked.index, asked.index].to_numpy()).max() < 1e-6
    with pytest.raises(KeyError, match=r"write 'protein2 \(x\)', 'protein2 \(y\)'"):
        feature_correlation(model, features=["protein2"])


def test_spread_of_alike_cells_is_that_of_the_gamma_law():
    mean = torch.full((20_000, 1), 6.0)
    law = NegativeBinomial(mean=mean, inverse_dispersion=torch.tensor(3.0)).to_event(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = correlation._with_spread(torch.full((20_000, 1), 2.0), law)
    assert drawn.mean().item() == pytest.approx(2.0, rel=0.02)
    assert drawn.var().item() == pytest.approx(4.0 / 3.0, rel=0.05)
    values = np.random.default_rng(0).random((50, 3))
    ranks = stats.spearmanr(values).statistic
    np.testing.assert_allclose(correlation._correlation(values, "spearman"), ranks)
    linear = np.corrcoef(np.log1p(values.T))
    np.testing.assert_allclose(correlation._correlation(values, "pearson"), linear)


def test_annotate_and_save(trained, tmp_path):
    model, _ = trained
    adata = model.home().copy()
    model.annotate(adata)
    names = list(model.registry.var_names("y"))
    assert list(adata.obsm["totalvi_protein"].columns) == names
    assert list(adata.obsm["totalvi_foreground_probability"].columns) == names
    pd.testing.assert_frame_equal(adata.obsm["totalvi_protein"], model.get_normalized_protein())
    adata.write_h5ad(tmp_path / "a.h5ad")
    again = ad.read_h5ad(tmp_path / "a.h5ad")
    pd.testing.assert_frame_equal(again.obsm["totalvi_protein"], adata.obsm["totalvi_protein"])
    model.save(tmp_path / "m")
    loaded = pyrosc.load(tmp_path / "m", adata)
    np.testing.assert_array_equal(loaded.get_normalized_protein(), model.get_normalized_protein())
    assert torch.equal(loaded.panel.rows, model.panel.rows)


# -- other cells ----------------------------------------------------------------------------------------


def test_cells_without_some_proteins_or_all(trained):
    model, sim = trained
    few = sim.adata[:40].copy()
    few.obsm["protein"] = few.obsm["protein"][["protein5", "protein0"]]
    with pytest.warns(DataWarning, match=r"lacks 10 of the 12 proteins.*not measured"):
        dataset = model.dataset(few)
    assert dataset.codes("measured").sum(1).tolist() == [2] * 40
    del few.obsm["protein"]
    with pytest.warns(DataWarning, match=r"no obsm\['protein'\]; their cells are taken as without proteins"):
        z = model.get_latent_representation(few)
    assert np.isfinite(z).all()
    few.obsm["protein"] = pd.DataFrame(1.0, index=few.obs_names, columns=["other"])
    with pytest.raises(pyrosc.DataError, match=r"lacks the columns 'protein0'"):
        model.dataset(few)


def test_a_query_is_mapped_and_the_reference_stays(trained, tmp_path):
    model, _ = trained
    query = pyrosc.simulate.totalvi(200, 60, 12, seed=9).adata
    query.obs["batch"] = "new"
    query.obsm["protein"] = query.obsm["protein"].iloc[:, [7, 2, 9, 0, 1]]
    reference = model.get_latent_representation()
    proteins = model.get_normalized_protein(as_numpy=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        mapped = pyrosc.surgery(model, query)
        assert mapped.panel.rows.shape[0] + len(mapped.panel.added) == 3
        new = mapped.panel.row(2)
        assert sorted(np.flatnonzero(new.numpy()).tolist()) == [0, 1, 2, 7, 9]
        before = {k: v.clone() for k, v in mapped.state_dict().items()}
        mapped.fit(max_steps=30, **QUIET)
        np.testing.assert_array_equal(mapped.get_latent_representation(model.home()), reference)
        np.testing.assert_array_equal(mapped.get_normalized_protein(model.home(), as_numpy=True), proteins)
        moved = {k for k, v in mapped.state_dict().items() if not torch.equal(v, before[k])}
        assert moved
        assert all(k.endswith(".rows") for k in moved)
        imputed = mapped.get_normalized_protein()
        as_reference = mapped.get_normalized_protein(transform_batch=["batch0", "batch1"])
        both = ["protein3", "protein4"]  # of both batches of the reference, and not of the query
        np.testing.assert_allclose(imputed[both], as_reference[both], rtol=1e-4)
        mapped.save(tmp_path / "query")
        loaded = pyrosc.load(tmp_path / "query", query)
        np.testing.assert_array_equal(loaded.get_normalized_protein(), imputed)
    del query.obsm["protein"]
    with pytest.warns(DataWarning, match="without proteins"):
        rna_alone = pyrosc.surgery(model, query)
    assert not rna_alone.panel.row(2).any()
    rna_alone.fit(max_steps=10, **QUIET)


def test_the_adversary_is_on_while_the_kl_is_annealed_and_panels_differ(cells):
    model = made(cells).fit(max_steps=20, batch_size=32, **QUIET)
    assert model.history["adversary"].iloc[0] > 0
    assert model.history["kl_weight"].iloc[-1] == 1
    one = cells[(cells.obs["batch"] == "batch1").to_numpy()].copy()
    one.obsm["protein"] = one.obsm["protein"].iloc[:, :4]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        assert "adversary" not in made(one).fit(max_steps=3, **QUIET).history
        assert "adversary" not in made(cells, adversarial=False).fit(max_steps=3, **QUIET).history
        same = cells.copy()
        same.obsm["protein"] = same.obsm["protein"].fillna(1.0)
        assert "adversary" not in made(same).fit(max_steps=3, **QUIET).history
        assert "adversary" in made(same, adversarial=True).fit(max_steps=3, **QUIET).history


def test_a_model_without_batches(cells):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        model = TOTALVI.from_anndata(cells, protein_key="protein", **SMALL).fit(max_steps=5, **QUIET)
    assert model.get_normalized_protein().shape == (60, 6)
    with pytest.raises(pyrosc.DataError):
        model.get_normalized_protein(transform_batch="batch0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gene_likelihood": "poisson"}, "gene_likelihood"),
        ({"protein_dispersion": "gene"}, "protein_dispersion"),
        ({"background_prior": "x"}, "background_prior"),
        ({"protein_dispersion": "protein-label"}, "labels_key="),
        ({"n_layers": 2}, "n_layers_encoder="),
    ],
)
def test_options_that_are_refused(cells, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        made(cells, **options)


# -- MuData ---------------------------------------------------------------------------------------------


def test_a_mudata_gives_the_same_and_gets_its_results(cells):
    md = pytest.importorskip("mudata")
    y = cells.obsm["protein"]
    measured = y.notna().any(axis=1)
    values = y[measured].fillna(0.0)  # zeros for the panel that batch1 lacks
    prot = ad.AnnData(
        values.to_numpy(np.float32), obs=pd.DataFrame(index=values.index), var=pd.DataFrame(index=y.columns)
    )
    rna = ad.AnnData(cells.X, obs=cells.obs[["batch"]], var=cells.var[[]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        data = md.MuData({"rna": rna, "prot": prot})
    with pytest.raises(TypeError, match=r"modalities=.*'y': 'prot'"):
        TOTALVI.from_anndata(data, modalities={"x": "rna"})
    with pytest.warns(DataWarning, match=r"mod\['prot'\].X is zero in all cells of 'batch1'"):
        model = TOTALVI.from_anndata(
            data, batch_key="batch", modalities={"x": "rna", "y": "prot", "batch": "rna"}, **SMALL
        )
    alone = made(cells)
    a, b = whole(model), whole(alone)
    assert all(torch.equal(a[k], b[k]) for k in a)
    model.fit(max_steps=8, **QUIET)
    alone.fit(max_steps=8, **QUIET)
    np.testing.assert_array_equal(model.get_latent_representation(), alone.get_latent_representation())
    model.annotate(layers=True)
    assert data.obsm["X_totalVI"].shape == (60, 3)
    assert data["rna"].layers["totalvi_normalized"].shape == (60, 12)
    layer = data["prot"].layers["totalvi_protein"]
    expected = alone.get_normalized_protein(as_numpy=True)[measured.to_numpy()]
    np.testing.assert_allclose(layer, expected, rtol=1e-5)
    assert "mod/prot/layers/totalvi_protein" in data.uns["pyrosc"]["TOTALVI"]["written"]
    prot.layers["adt"], prot.X = prot.X.copy(), np.zeros_like(prot.X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = md.MuData({"rna": rna, "prot": prot})
        keys = {"batch_key": "batch", "protein_key": "adt"}
        layered = TOTALVI.from_anndata(
            data, modalities={"x": "rna", "y": "prot", "batch": "rna"}, **keys, **SMALL
        )
    assert torch.equal(whole(layered)["y"], b["y"])


def test_the_mean_of_the_reference_is_seen_at_the_depth_of_all_genes(trained):
    """With missing_genes='mean' the encoder's features are those of a cell with all genes."""
    model, _ = trained
    query = pyrosc.simulate.totalvi(50, 60, 12, seed=9).adata[:, 20:].copy()
    query.obs["batch"] = "new"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        mapped = pyrosc.surgery(model, query, missing_genes="mean")
    batch = whole(mapped)
    inputs = mapped.inputs(batch)
    with torch.no_grad(), mapped.minibatch(batch):
        found = poutine.trace(mapped.guided).get_trace(**inputs).nodes["z"]["fn"].mean
        filled = mapped.filled("x", inputs["x"])
    mean = torch.tensor(model.registry.fields["x"].means)
    depth = inputs["x"].sum(-1, keepdim=True) / mean[20:].sum()
    torch.testing.assert_close(filled[:, :20], depth * mean[:20])
    with torch.no_grad():
        trace = poutine.trace(mapped.guide).get_trace(**(inputs | {"x": filled}))
    torch.testing.assert_close(found, trace.nodes["z"]["fn"].mean)
