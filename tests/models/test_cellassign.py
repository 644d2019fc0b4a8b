"""CellAssign: its loss, responsibilities and fixed point by brute force; recovery of what was drawn."""

from __future__ import annotations

import math
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pyro
import pytest
import scipy.sparse as sp
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoDelta, AutoNormal, init_to_value
from scipy import stats
from scipy.special import gammaln
from torch.func import functional_call

import pyrosc
from pyrosc import CellAssign, DataError, DataWarning
from pyrosc.data.inputs import load_batch
from pyrosc.distributions.truncation import truncate_below, untruncate_below
from pyrosc.models.marker_counts import MeanDispersion

MARKERS = {"A": ["g0", "g1", "g2"], "B": ["g2", "g3", "g4"], "C": ["g5", "g6"]}


def tiny(n: int = 30, n_genes: int = 20, seed: int = 0) -> ad.AnnData:
    rng = np.random.default_rng(seed)
    x = rng.poisson(rng.gamma(1.0, 2.0, n_genes) * rng.lognormal(0, 0.3, (n, 1))) + (np.arange(n_genes) == 19)
    x[0] += 1  # no gene is silent
    adata = ad.AnnData(sp.csr_matrix(x.astype(np.float32)))
    adata.obs_names = [f"c{i}" for i in range(n)]
    adata.var_names = [f"g{i}" for i in range(n_genes)]
    adata.obs["batch"] = pd.Categorical([f"b{i}" for i in rng.integers(0, 2, n)])
    adata.obs["age"] = rng.normal(50, 10, n)
    adata.obs["size"] = rng.lognormal(0, 0.3, n)
    return adata


def trained(model: CellAssign, **options) -> CellAssign:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # short runs may end while the ELBO still rises
        return model.fit(progress=False, **options)


def made(adata: ad.AnnData | None = None, markers=MARKERS, **options) -> CellAssign:
    """A model with parameters and point estimates away from their starting values."""
    model = CellAssign.from_anndata(tiny() if adata is None else adata, markers, **options)
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data.add_(0.5 * torch.randn_like(parameter))
    return model


def sites(model: CellAssign) -> dict[str, torch.Tensor]:
    guide = model.auto_guide.globals.inner
    with pyro.settings.context(module_local_params=True):
        return {name: value.detach().double() for name, value in guide.median().items()}


def by_hand(model: CellAssign) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-likelihood of each cell and type, log π and δ (types × genes), from the formulas, in NumPy."""
    data = model.dataset()
    point = {k: v.numpy() for k, v in sites(model).items()}
    x = data.matrices["x"].rows(np.arange(data.n_obs)).astype(float)
    if "total" in model.registry.fields:
        total = data.codes("total").astype(float)
        log_size = np.log(total / total.mean())
    else:
        log_size = np.log(data.codes("size_factor").astype(float))
    low = math.log(model.min_effect)
    alpha = (low - point["effect_loc"]) / point["effect_scale"]
    tail = stats.norm.sf(point["effect"]) * stats.norm.sf(alpha)
    pairs = np.exp(point["effect_loc"] + point["effect_scale"] * stats.norm.isf(tail))
    delta = np.zeros((len(model.types), x.shape[1]))
    for value, gene, kind in zip(pairs, model.pairs.genes, model.pairs.types, strict=True):
        delta[kind, gene] = value
    sticks = 1 / (1 + np.exp(-(point["log_odds"] - np.log(np.arange(len(point["log_odds"]), 0, -1)))))
    left = np.cumprod(np.concatenate([[1.0], 1 - sticks]))
    log_pi = np.log(np.concatenate([sticks, [1.0]]) * left)
    base = model.level.detach().double().numpy() + log_size[:, None]
    for table in model.effects.tables:
        base = base + table.rows.detach().double().numpy()[data.codes(table.field).reshape(-1)]
    if model.effects.values is not None:
        base = base + data.codes("continuous_covariates") @ model.effects.values.detach().double().numpy()
    mu = np.exp(base[:, None, :] + delta)
    if hasattr(model.log_phi, "log_a"):
        largest = float(model.log_phi.largest)
        centres = np.linspace(0, largest, 10)
        b = 1 / (2 * (centres[1] - centres[0]) ** 2)
        a = np.exp(model.log_phi.log_a.detach().double().numpy())
        phi = (a * np.exp(-b * (np.minimum(mu, largest)[..., None] - centres) ** 2)).sum(-1) + 0.01
    else:
        phi = np.exp(model.log_phi.log_phi.detach().double().numpy()) + 0.01 + 0 * mu
    y = x[:, None, :]
    log_p = gammaln(y + phi) - gammaln(phi) - gammaln(y + 1)
    log_p += phi * np.log(phi / (phi + mu)) + y * np.log(mu / (phi + mu))
    return log_p.sum(-1), log_pi, delta


def log_prior(model: CellAssign) -> float:
    point = {k: v.numpy() for k, v in sites(model).items()}
    _, log_pi, _ = by_hand(model)
    k, alpha = len(log_pi), model.concentration
    return float(
        stats.norm.logpdf(point["effect_loc"])
        + stats.halfnorm.logpdf(point["effect_scale"])
        + stats.norm.logpdf(point["effect"]).sum()
        + alpha * log_pi.sum()  # of π in softmax coordinates
        + gammaln(k * alpha)
        - k * gammaln(alpha)
    )


OPTIONS = [
    {},
    {"other": "none of these"},
    {"dispersion": "gene", "min_effect": 1.5, "concentration": 0.5},
    {"batch_key": "batch", "continuous_covariate_keys": ["age"]},
    {"size_factor_key": "size"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_loss_is_minus_the_log_marginal_likelihood_and_prior(options):
    model = made(**options)
    by_type, log_pi, _ = by_hand(model)
    expected = np.logaddexp.reduce(by_type + log_pi, axis=1).sum() + log_prior(model)
    batch = load_batch(model.datasets, {"main": np.arange(30)}, torch.device("cpu"))
    assert float(model(batch).detach()) == pytest.approx(-expected / 30, rel=1e-4)
    assert model.get_elbo() == pytest.approx(expected / 30, rel=1e-4)
    assert model.get_marginal_ll() == pytest.approx(
        np.logaddexp.reduce(by_type + log_pi, axis=1).mean(), rel=1e-4
    )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_probabilities_follow_bayes_rule(options):
    model = made(**options)
    by_type, log_pi, _ = by_hand(model)
    joint = by_type + log_pi
    expected = np.exp(joint - np.logaddexp.reduce(joint, axis=1)[:, None])
    soft = model.predict(soft=True)
    assert list(soft.columns) == list(model.types)
    np.testing.assert_allclose(soft.to_numpy(), expected, atol=1e-4)
    assert (model.predict().astype(str) == np.array(model.types)[expected.argmax(1)]).all()
    one = model.predict(soft=True, indices=[3])
    np.testing.assert_allclose(one.to_numpy(), expected[[3]], atol=1e-4)


def test_its_gradient_is_that_of_the_m_step():
    """Fisher's identity: the gradient of the marginal likelihood is that of expectation maximisation."""
    model = made()
    data = model.dataset()
    x = torch.from_numpy(data.matrices["x"].rows(np.arange(30)))
    total = torch.from_numpy(data.codes("total"))
    batch = load_batch(model.datasets, {"main": np.arange(30)}, torch.device("cpu"))
    model(batch).backward()
    found = model.level.grad.clone(), model.log_phi.log_a.grad.clone()
    model.zero_grad()
    share = torch.from_numpy(model.predict(soft=True).to_numpy())
    _, _, delta = by_hand(model)
    base = model.level + (total.log() - model.log_mean_total)[:, None]
    for c in range(3):
        log_mean = base + torch.from_numpy(delta[c]).float()
        law = pyrosc.distributions.NegativeBinomial(
            log_mean=log_mean, log_inverse_dispersion=model.log_phi(log_mean)
        )
        (-(share[:, c] * law.log_prob(x).sum(-1)).sum() / 30).backward()
    torch.testing.assert_close(found[0], model.level.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[1], model.log_phi.log_a.grad, rtol=1e-3, atol=1e-4)


def test_the_optimum_is_a_fixed_point_of_em():
    adata, _ = pyrosc.simulate.cellassign(
        300, 2, n_markers=3, n_shared=0, proportions=[0.7, 0.3], seed=1, dispersion="gene"
    )
    keys = {"size_factor_key": "true_size_factor", "dispersion": "gene"}
    model = CellAssign.from_anndata(adata, adata.varm["markers"], **keys).double()
    batch = load_batch(model.datasets, {"main": np.arange(300)}, torch.device("cpu"))
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    search = torch.optim.LBFGS(model.parameters(), max_iter=150, line_search_fn="strong_wolfe")

    def closure():
        search.zero_grad()
        loss = model(batch)
        loss.backward()
        return loss

    with pyro.validation_enabled(False):
        search.step(closure)
        closure()
    assert max(p.grad.abs().max() for p in model.parameters()) < 1e-4
    share = model.predict(soft=True).to_numpy().sum(0)
    alpha = model.concentration  # the M-step of π, with a prior in softmax coordinates
    found = model.get_type_frequencies()
    np.testing.assert_allclose(found, (share + alpha) / (300 + 2 * alpha), atol=1e-3)
    assert abs(found["type0"] - 0.7) < 0.08


# -- coordinates in which the mode exists ---------------------------------------------------------------


def test_truncation_gives_the_truncated_law():
    u = torch.linspace(-4, 4, 41, dtype=torch.float64)
    for loc, scale in [(0.0, 1.0), (2.0, 0.3), (-3.0, 0.5), (0.5, 1e-3), (-30.0, 0.5)]:
        low = math.log(2)
        y = truncate_below(u, torch.tensor(loc).double(), torch.tensor(scale).double(), low)
        assert (y >= low - 1e-12).all()
        assert y.isfinite().all()
        assert (y.diff() > 0).all()
        if (low - loc) / scale < 30:
            law = stats.truncnorm((low - loc) / scale, np.inf, loc, scale)
            np.testing.assert_allclose(law.cdf(y), stats.norm.cdf(u), atol=1e-7)
            back = untruncate_below(y, torch.tensor(loc).double(), torch.tensor(scale).double(), low)
            np.testing.assert_allclose(back, u, atol=1e-6)


def test_truncation_has_the_right_derivatives():
    values = [torch.tensor([0.3, -1.0, 2.0]), torch.tensor(0.4), torch.tensor(0.7)]
    arguments = [v.double().requires_grad_() for v in values]
    assert torch.autograd.gradcheck(lambda u, m, s: truncate_below(u, m, s, 0.7), arguments)
    far = [torch.tensor([0.3]), torch.tensor(-40.0), torch.tensor(0.7)]
    arguments = [v.double().requires_grad_() for v in far]
    assert torch.autograd.gradcheck(lambda u, m, s: truncate_below(u, m, s, 0.7), arguments)


def test_the_prior_has_no_pole():
    """All δ alike with a scale of zero is where the density of the truncated law itself goes to infinity."""
    adata = tiny()
    model = CellAssign.from_anndata(adata, MARKERS)
    guide = model.auto_guide.globals
    values = []
    for scale in (1.0, 1e-2, 1e-4, 1e-6):
        guide.set({"effect_scale": torch.tensor(scale), "effect": torch.zeros(len(model.pairs))})
        terms = model.get_elbo() - model.get_marginal_ll()  # the prior's part, per cell
        values.append(terms * 30)
        delta = model.get_marker_effects().to_numpy()
        centred = stats.norm.logpdf(np.log(delta[~np.isnan(delta)]), np.log(np.nanmin(delta)), scale).sum()
    assert max(values) < 10
    assert centred > 80  # what the truncated law would have added at the last of these
    guide.set({"log_odds": torch.tensor([30.0, 0.0])})  # two empty types
    assert model.get_elbo() - model.get_marginal_ll() < min(values) / 30 + 1e-6


def test_effects_stay_above_their_bound():
    model = trained(CellAssign.from_anndata(tiny(), MARKERS, min_effect=1.2), max_epochs=60)
    delta = model.get_marker_effects()
    assert (delta.stack() >= 1.2).all()
    marked = {kind: sorted(delta.index[delta[kind].notna()]) for kind in delta}
    assert marked == MARKERS


# -- recovery -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulated():
    return pyrosc.simulate.cellassign(1500, 4, n_markers=4, n_shared=1, other="other", seed=3)


@pytest.fixture(scope="module")
def fitted(simulated):
    adata = simulated.adata
    return trained(CellAssign.from_anndata(adata, adata.varm["markers"], other="other"))


def test_labels_are_recovered_as_well_as_can_be(simulated, fitted):
    adata, true = simulated
    truth = adata.obs["cell_type"].astype(str)
    best = (true.predict(adata).astype(str) == truth).mean()
    assert 0.85 < best < 0.999  # a task that is neither hopeless nor trivial
    assert (fitted.predict().astype(str) == truth).mean() > best - 0.02
    gap = np.abs(fitted.predict(soft=True) - true.predict(adata, soft=True)).to_numpy()
    assert gap.mean() < 0.02


def test_effects_and_frequencies_are_recovered(simulated, fitted):
    adata, true = simulated
    truth = true.get_marker_effects().stack()
    found = fitted.get_marker_effects().stack().reindex(truth.index)
    assert np.abs(found - truth).mean() < 0.25
    assert np.corrcoef(found, truth)[0, 1] > 0.8
    shares = adata.obs["cell_type"].value_counts(normalize=True)
    np.testing.assert_allclose(fitted.get_type_frequencies(), shares[list(fitted.types)], atol=0.03)


def test_covariates_are_taken_out():
    adata, true = pyrosc.simulate.cellassign(
        800, 3, n_markers=3, level=-2.5, n_batches=2, n_continuous=1, covariate_effect=1.0, seed=4
    )
    truth = adata.obs["cell_type"].astype(str)
    keys = {"batch_key": "batch", "continuous_covariate_keys": ["cov0"]}
    options = {"size_factor_key": "true_size_factor", "standardize": False}
    with_them = trained(
        CellAssign.from_anndata(adata, adata.varm["markers"], **keys, **options), max_steps=300
    )
    without = trained(CellAssign.from_anndata(adata, adata.varm["markers"], **options), max_steps=300)
    accuracy = [(m.predict().astype(str) == truth).mean() for m in (with_them, without)]
    assert accuracy[0] > accuracy[1] + 0.01
    assert accuracy[0] > (true.predict(adata).astype(str) == truth).mean() - 0.02
    rows = with_them.effects.tables[0].rows.detach(), true.effects.tables[0].rows.detach()
    found, real = (r[1] - r[0] for r in rows)
    assert np.corrcoef(found, real)[0, 1] > 0.9
    slopes = with_them.effects.values.detach()[0], true.effects.values.detach()[0]
    assert np.corrcoef(*slopes)[0, 1] > 0.9


def test_sorted_blood_cells_are_recognised(data_dir):
    adata = ad.read_h5ad(data_dir / "pbmc_facs.h5ad")
    markers = {
        "B": ["CD19", "MS4A1", "CD79A", "CD79B"],
        "CD4 T": ["CD3D", "CD3E", "CD4", "IL7R"],
        "CD8 T": ["CD3D", "CD3E", "CD8A", "CD8B"],
    }
    truth = adata.obs["FACS_type"].astype(str).str.removesuffix(" cells")
    calls = trained(CellAssign.from_anndata(adata, markers)).predict().astype(str)
    assert (calls == truth).mean() >= 0.94
    assert ((calls == "B") == (truth == "B")).mean() >= 0.995


# -- size factors ---------------------------------------------------------------------------------------


def test_size_factors_are_totals_over_all_genes():
    adata = tiny()
    model = CellAssign.from_anndata(adata, MARKERS)
    totals = np.asarray(adata.X.sum(1)).ravel()
    np.testing.assert_allclose(model.dataset().codes("total"), totals)
    assert float(model.log_mean_total.exp()) == pytest.approx(totals.mean(), rel=1e-5)
    assert model.registry.var_names() == tuple(f"g{i}" for i in range(7))
    given = adata.copy()
    given.obs["size"] = totals / totals.mean()
    same = CellAssign.from_anndata(given[:, :7].copy(), MARKERS, size_factor_key="size")
    np.testing.assert_allclose(same.predict(soft=True), model.predict(soft=True), atol=1e-4)


@pytest.mark.filterwarnings("ignore::pyrosc.DataWarning")
def test_a_cell_may_lack_all_markers_but_not_all_counts():
    adata = tiny()
    x = adata.X.toarray()
    x[4, :7] = 0
    adata.X = sp.csr_matrix(x)
    soft = CellAssign.from_anndata(adata, MARKERS, other="other").predict(soft=True)
    assert soft.iloc[4].idxmax() == "other"
    x[4] = 0
    adata.X = sp.csr_matrix(x)
    with pytest.raises(DataError, match=r"1 cells have no counts in X \(first: 'c4'\)"):
        CellAssign.from_anndata(adata, MARKERS)


def test_markers_without_the_other_genes_are_pointed_out():
    adata = tiny()
    with pytest.warns(DataWarning, match="size factors follow from"):
        CellAssign.from_anndata(adata[:, :7].copy(), MARKERS)
    model = CellAssign.from_anndata(adata, MARKERS)
    with pytest.warns(DataWarning, match="7 genes, CellAssign was made with 20"):
        model.predict(adata[:, :7].copy())


def test_training_starts_at_the_mean_of_each_gene():
    adata = tiny()
    model = CellAssign.from_anndata(adata, MARKERS)
    _, log_pi, delta = by_hand(model)
    np.testing.assert_allclose(np.exp(log_pi), 1 / 3, rtol=1e-5)
    totals = np.asarray(adata.X.sum(1)).ravel()
    mean = np.exp(model.level.detach().numpy() + delta).mean(0) * (totals / totals.mean()).sum()
    np.testing.assert_allclose(mean, np.asarray(adata.X.sum(0)).ravel()[:7], rtol=1e-4)
    assert float(model.log_phi.largest) == adata.X[:, :7].max()


# -- lists of markers -----------------------------------------------------------------------------------


def test_markers_come_as_dict_table_or_file(tmp_path):
    adata = tiny()
    table = pd.DataFrame({k: [int(f"g{i}" in v) for i in range(7)] for k, v in MARKERS.items()})
    table.index = [f"g{i}" for i in range(7)]
    table.to_csv(tmp_path / "markers.csv")
    table.to_csv(tmp_path / "markers.tsv", sep="\t")
    sources = [MARKERS, table, table.astype(bool), tmp_path / "markers.csv", str(tmp_path / "markers.tsv")]
    configs = [CellAssign.from_anndata(adata, source).config["markers"] for source in sources]
    assert all(c == MARKERS for c in configs)
    table["rest"] = 0
    assert CellAssign.from_anndata(adata, table).types == ("A", "B", "C", "rest")


def test_absent_markers_are_named():
    adata = tiny()
    with pytest.warns(
        DataWarning, match=r"2 markers are not in var_names.*'CD3', 'G1' \('G1' is there as 'g1'\)"
    ):
        model = CellAssign.from_anndata(adata, {"A": ["g0", "CD3"], "B": ["g3", "G1"]})
    assert model.config["markers"] == {"A": ["g0"], "B": ["g3"]}
    with pytest.raises(DataError, match=r"none of the markers of 'A' is in var_names: 'CD3'"):
        CellAssign.from_anndata(adata, {"A": ["CD3"], "B": ["g3"]})


@pytest.mark.parametrize(
    ("markers", "options", "error", "message"),
    [
        ({"A": ["g0"]}, {}, DataError, "name one type, 'A', and nothing to tell it from"),
        ({"A": ["g0"], "B": ["g0"]}, {}, DataError, "'A' and 'B' have the same markers"),
        ({"A": ["g0"], "B": [], "C": []}, {}, DataError, "'B', 'C' have no markers"),
        ({"A": ["g0"], "B": []}, {"other": "C"}, DataError, "'B', 'C' have no markers"),
        ({"A": "g0", "B": ["g1"]}, {}, DataError, r"write \['g0'\]"),
        ({"A": ["g0"], "B": ["g1"]}, {"other": "B"}, ValueError, "other='B' is the name of a type"),
        ([["g0"], ["g1"]], {}, DataError, "markers are a dict"),
        (MARKERS, {"dispersion": "cell"}, ValueError, "dispersion is one of"),
        (MARKERS, {"min_effect": 0.0}, ValueError, "min_effect is positive"),
        (MARKERS, {"concentration": -1}, ValueError, "concentration is positive"),
        (MARKERS, {"genes": ["g0"]}, TypeError, "leave out genes="),
        (MARKERS, {"batches": "batch"}, TypeError, "CellAssign has no option 'batches'"),
        ("nowhere.csv", {}, FileNotFoundError, "nowhere.csv"),
    ],
)
def test_wrong_input_is_refused(markers, options, error, message):
    with pytest.raises(error, match=message):
        CellAssign.from_anndata(tiny(), markers, **options)


def test_wrong_tables_are_refused():
    table = pd.DataFrame({"A": [1, 0], "B": [0, 2]}, index=["g0", "g1"])
    with pytest.raises(DataError, match=r"must hold 1 .* or 0; it holds .*2.* for gene 'g1', type 'B'"):
        CellAssign.from_anndata(tiny(), table)
    twice = pd.DataFrame({"A": [1, 0], "B": [0, 1]}, index=["g0", "g0"])
    with pytest.raises(DataError, match="names a gene twice: 'g0'"):
        CellAssign.from_anndata(tiny(), twice)


def test_counts_must_be_counts():
    adata = tiny()
    adata.X = adata.X.log1p()
    with pytest.raises(DataError, match="does not hold counts"):
        CellAssign.from_anndata(adata, MARKERS)


# -- results --------------------------------------------------------------------------------------------


def test_annotate_writes_types_and_probabilities():
    adata = tiny()
    model = trained(CellAssign.from_anndata(adata, MARKERS), max_epochs=5)
    model.annotate(adata)
    assert list(adata.obs["cellassign_type"].cat.categories) == ["A", "B", "C"]
    soft = adata.obsm["cellassign_type_probabilities"]
    pd.testing.assert_frame_equal(soft, model.predict(soft=True))
    np.testing.assert_allclose(adata.obs["cellassign_type_probability"], soft.max(axis=1))


def test_saved_models_go_on(tmp_path):
    adata = tiny()
    model = trained(CellAssign.from_anndata(adata, MARKERS, other="rest", batch_key="batch"), max_epochs=5)
    model.save(tmp_path / "model")
    again = pyrosc.load(tmp_path / "model")
    pd.testing.assert_frame_equal(again.predict(adata, soft=True), model.predict(soft=True))
    pd.testing.assert_frame_equal(again.get_marker_effects(), model.get_marker_effects())


def test_replicates_follow_the_type_of_each_cell(simulated, fitted):
    """Drawn types are those of the cell, not of the prior: its markers are high again."""
    adata, _ = simulated
    here = adata.obs["cell_type"].isin(["type0", "type1"]).to_numpy()
    draws = fitted.posterior_predictive_sample(gene_list=["type0_m0", "type1_m0"], indices=here).toarray()
    kind = adata.obs["cell_type"][here].to_numpy()
    assert draws[kind == "type0", 0].mean() > 4 * draws[kind == "type1", 0].mean()
    assert draws[kind == "type1", 1].mean() > 4 * draws[kind == "type0", 1].mean()


def test_restarts_are_compared_by_held_out_likelihood():
    adata = tiny(60)
    model = trained(CellAssign.from_anndata(adata, MARKERS), max_epochs=30, n_restarts=3)
    assert len(model.restarts) == 3
    held_out = model.get_marginal_ll(indices=model.validation_indices)
    assert held_out == pytest.approx(max(model.restarts), rel=1e-5)
    assert len(set(model.restarts)) == 3


# -- other guides ---------------------------------------------------------------------------------------


KEYS = {"size_factor_key": "true_size_factor", "dispersion": "gene"}
SHORT = {"max_steps": 240, "batch_size": 50, "train_size": 1.0}


@pytest.fixture(scope="module")
def two_types():
    return pyrosc.simulate.cellassign(200, 2, n_markers=2, n_shared=0, seed=5, dispersion="gene").adata


@pytest.fixture(scope="module")
def bayesian(two_types):
    Bayesian = pyrosc.auto(CellAssign, AutoNormal)
    return trained(Bayesian.from_anndata(two_types, two_types.varm["markers"], **KEYS), **SHORT)


def test_an_autonormal_gives_the_posterior_of_the_effects(two_types, bayesian):
    low, high = (bayesian.get_marker_effects(n_samples=200, quantile=q).stack() for q in (0.05, 0.95))
    assert (high > low + 0.02).all()
    point = trained(CellAssign.from_anndata(two_types, two_types.varm["markers"], **KEYS), **SHORT)
    middle = bayesian.get_marker_effects(n_samples=200).stack()
    assert np.abs(middle - point.get_marker_effects().stack()).max() < 0.6
    assert (bayesian.predict().astype(str) == point.predict().astype(str)).mean() > 0.95
    draws = bayesian.posterior("type", n_samples=20)["type"]
    np.testing.assert_allclose(draws.sum(1), 1, rtol=1e-4)
    assert np.abs(draws - bayesian.predict(soft=True)).to_numpy().mean() < 0.05


def test_a_plain_autodelta_is_the_same_guide():
    adata = tiny()
    plain = pyrosc.auto(CellAssign, AutoDelta).from_anndata(adata, MARKERS)
    own = CellAssign.from_anndata(adata, MARKERS)
    batch = load_batch(own.datasets, {"main": np.arange(30)}, torch.device("cpu"))
    assert float(plain(batch).detach()) == pytest.approx(float(own(batch).detach()), rel=1e-6)


def test_nuts_agrees_with_the_variational_posterior(bayesian):
    """All priors are proper: Normal, half-Normal and Dirichlet; levels and dispersions are parameters."""
    batch = load_batch(bayesian.datasets, {"main": np.arange(200)}, torch.device("cpu"))
    with pyro.settings.context(module_local_params=True):
        start = bayesian.auto_guide.inner.median()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kernel = NUTS(
            bayesian.model,
            max_plate_nesting=1,
            max_tree_depth=3,
            init_strategy=init_to_value(values={k: v.detach() for k, v in start.items()}),
        )
        chain = MCMC(kernel, num_samples=60, warmup_steps=40, disable_progbar=True)
        chain.run(**bayesian.inputs(batch))
        found = chain.get_samples()
    assert set(found) == {"effect_loc", "effect_scale", "effect", "log_odds"}
    log_delta = truncate_below(
        found["effect"], found["effect_loc"][:, None], found["effect_scale"][:, None], math.log(2)
    )
    exact = log_delta.exp().numpy()
    pairs = list(zip(bayesian.pairs.genes, bayesian.pairs.types, strict=True))
    tables = [bayesian.get_marker_effects(n_samples=400, quantile=q) for q in (0.16, 0.5, 0.84)]
    low, middle, high = (np.array([t.iloc[int(g), int(c)] for g, c in pairs]) for t in tables)
    assert (np.abs(np.median(exact, 0) - middle) < exact.std(0) + 0.05).all()
    ratio = (high - low) / 2 / exact.std(0)
    assert ((ratio > 0.3) & (ratio < 2.5)).all()


# -- cost -----------------------------------------------------------------------------------------------


def test_a_step_evaluates_genes_and_pairs_not_types_times_genes(monkeypatch):
    model = made()
    sizes = []
    law = pyrosc.models.marker_counts.NegativeBinomial

    def watched(log_mean, **options):
        sizes.append(log_mean.shape)
        return law(log_mean=log_mean, **options)

    monkeypatch.setattr(pyrosc.models.marker_counts, "NegativeBinomial", watched)
    batch = load_batch(model.datasets, {"main": np.arange(30)}, torch.device("cpu"))
    model(batch)
    assert set(sizes) == {(30, 7 + len(model.pairs))}


def test_the_dispersion_function_has_the_right_derivatives():
    log_phi = MeanDispersion(0.01).double()
    log_phi.largest.fill_(20.0)
    log_a = torch.randn(
        10, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True
    )
    log_mean = torch.tensor(
        [-8.0, -1.0, 0.0, 1.0, 2.0, 2.9, 3.1, 5.0], dtype=torch.float64, requires_grad=True
    )
    assert torch.autograd.gradcheck(lambda m, a: functional_call(log_phi, {"log_a": a}, m), (log_mean, log_a))
