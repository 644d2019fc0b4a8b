"""Solo finds doublets that were put in, says how many there are, and pairs cells by the rules."""

from __future__ import annotations

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from toy import make_adata
from toy_models import Cells, Factors, Rates, TwoSources

import pyrosc
from pyrosc import SCVI, DataError, Model, Solo
from pyrosc.data import CategoricalCovariates, ContinuousCovariates, Counts, SizeFactor
from pyrosc.infer.prevalence import class_probability, estimate_prevalence, tail_rate
from pyrosc.tools.doublet_features import exclusive_pairs, principal_axes
from pyrosc.tools.droplets import Droplets, deal, deal_for_pairs, draw_pairs, strata_of


def trained(model: Model, epochs: int | None = None, **options) -> Model:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # short runs may end while the ELBO still rises
        return model.fit(epochs, progress=False, **options)


@pytest.fixture(scope="module")
def droplets():
    """Four types far apart; a tenth of the droplets hold two cells."""
    return pyrosc.simulate.doublets(
        rate=0.1, n_cells=1100, n_genes=120, n_types=4, n_batches=1, signal=1.2, seed=5, capture=(0.6, 1.0)
    )


@pytest.fixture(scope="module")
def parent(droplets):
    return trained(SCVI.from_anndata(droplets, n_latent=4, n_hidden=32), 15)


@pytest.fixture(scope="module")
def solo(parent):
    return trained(Solo.from_model(parent, n_components=10))


def toy_parent(**options):
    adata = make_adata(n=150)
    return adata, trained(SCVI.from_anndata(adata, n_hidden=8, n_latent=2, **options), 1)


# -- the simulator ------------------------------------------------------------------------------------------


def test_simulated_droplets_hold_the_cells_they_say():
    cells = make_adata(n=120)
    found = pyrosc.simulate.doublets(cells, 0.2, layer="counts", batch_key="batch", seed=1)
    assert found.n_obs == 100  # n / (1 + rate)
    assert found.obs["doublet"].mean() == 0.2
    inside = pd.concat([found.obs["cell_1"], found.obs["cell_2"]])
    inside = inside[inside != ""]
    assert sorted(inside) == sorted(cells.obs_names)  # each cell is in one droplet
    for name in found.obs_names[:30]:
        row = found.obs.loc[name]
        x = cells[row["cell_1"]].X
        if row["doublet"]:
            x = x + cells[row["cell_2"]].X
            pair = cells.obs.loc[[row["cell_1"], row["cell_2"]], "batch"]
            assert pair.nunique() == 1
        np.testing.assert_array_equal(found[name].X.toarray(), x.toarray())
    thin = pyrosc.simulate.doublets(cells, 0.2, capture=0.5, seed=1)
    whole = pyrosc.simulate.doublets(cells, 0.2, seed=1)
    two = whole.obs["doublet"].to_numpy()
    assert thin[two].X.sum() / whole[two].X.sum() == pytest.approx(0.5, abs=0.03)
    np.testing.assert_array_equal(thin[~two].X.toarray(), whole[~two].X.toarray())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 1.0}, "rate is the share of droplets"),
        ({"capture": 0.0}, "capture is a share"),
        ({"capture": (0.9, 0.5)}, "capture is a share"),
        ({"rate": 0.999, "batch_key": "donor"}, "pairs can be made"),
    ],
)
def test_wrong_simulations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        pyrosc.simulate.doublets(make_adata(n=33), **options)
    with pytest.raises(TypeError, match=r"'n_types'.*options of simulate.scvi"):
        pyrosc.simulate.doublets(make_adata(), n_types=3)


# -- pairs and what they inherit ----------------------------------------------------------------------------


def test_pairs_are_of_one_stratum_and_one_fold():
    rng = np.random.default_rng(0)
    strata = rng.integers(0, 3, 400)
    folds = deal(strata, 4, rng)
    for s in range(3):  # each fold has its share of each stratum
        assert np.ptp(np.bincount(folds[strata == s], minlength=4)) <= 1
    pairs = draw_pairs(strata, folds, 5000, (0.5, 1.0), rng)
    assert (pairs.first != pairs.second).all()
    np.testing.assert_array_equal(strata[pairs.first], strata[pairs.second])
    np.testing.assert_array_equal(folds[pairs.first], folds[pairs.second])
    np.testing.assert_array_equal(folds[pairs.first], pairs.fold)
    np.testing.assert_allclose(np.bincount(strata[pairs.first]) / 5000, np.bincount(strata) / 400, atol=0.002)
    assert 0.5 <= pairs.capture.min() < 0.55 < 0.95 < pairs.capture.max() <= 1


def test_a_cell_alone_has_no_partner():
    rng = np.random.default_rng(0)
    strata = np.array([0] * 50 + [1])
    pairs = draw_pairs(strata, np.zeros(51, int), 1000, (1.0, 1.0), rng)
    assert 50 not in np.concatenate([pairs.first, pairs.second])
    with pytest.raises(DataError, match="no two cells can be paired"):
        draw_pairs(np.arange(30), np.zeros(30, int), 10, (1.0, 1.0), rng)
    # of nine cells per stratum, five folds would leave one of each without a partner
    assert deal_for_pairs(np.repeat(np.arange(30), 9), 5, rng).max() + 1 == 4


class Everything(Factors):
    """A latent model that reads every kind of covariate."""

    def __init__(self, registry):
        super().__init__(registry)

    def model(
        self,
        x: Counts,
        batch: pyrosc.data.Batch,
        categories: CategoricalCovariates,
        numbers: ContinuousCovariates,
        size: SizeFactor,
    ):
        super().model(x, batch)

    def guide(
        self,
        x: Counts,
        batch: pyrosc.data.Batch,
        categories: CategoricalCovariates,
        numbers: ContinuousCovariates,
        size: SizeFactor,
    ):
        super().guide(x, batch)


@pytest.mark.parametrize("covariates", ["share", "inherit"])
def test_covariates_of_doublets_follow_the_rules(covariates):
    adata = make_adata(n=150)
    adata.obs["size"] = np.linspace(0.5, 2, 150)
    model = Everything.from_anndata(
        adata,
        batch_key="batch",
        categorical_covariate_keys=["donor", "label"],
        continuous_covariate_keys=["age", "stress"],
        size_factor_key="size",
    )
    cells, rows = model.dataset(), np.arange(150)
    rng = np.random.default_rng(0)
    strata = strata_of(cells, rows, covariates)
    pairs = draw_pairs(strata, np.zeros(150, int), 500, (1.0, 1.0), rng)
    made = Droplets(cells, rows, pairs)[np.arange(150, 650)]
    one, two = cells[pairs.first], cells[pairs.second]
    np.testing.assert_array_equal(made["x"], one["x"] + two["x"])
    np.testing.assert_array_equal(made["batch"], one["batch"])
    np.testing.assert_array_equal(made["batch"], two["batch"])
    same = (one["categories"] == two["categories"]).numpy().all(1)
    assert same.all() == (covariates == "share")
    heir = torch.as_tensor(pairs.heir)[:, None]
    np.testing.assert_array_equal(made["categories"], torch.where(heir, two["categories"], one["categories"]))
    assert 0.4 < pairs.heir.mean() < 0.6
    a, b = one["x"].sum(1, keepdim=True), two["x"].sum(1, keepdim=True)
    mean = (a * one["numbers"] + b * two["numbers"]) / (a + b)
    np.testing.assert_allclose(made["numbers"], mean, atol=1e-5)
    np.testing.assert_allclose(made["size"], one["size"] + two["size"], rtol=1e-6)


def test_labels_and_proteins_of_doublets():
    class Both(Factors):
        def model(
            self,
            x: Counts,
            batch: pyrosc.data.Batch,
            labels: pyrosc.data.Labels,
            y: pyrosc.data.Protein,
            measured: pyrosc.data.ProteinMask,
        ):
            Factors.model(self, x, batch)

        def guide(
            self,
            x: Counts,
            batch: pyrosc.data.Batch,
            labels: pyrosc.data.Labels,
            y: pyrosc.data.Protein,
            measured: pyrosc.data.ProteinMask,
        ):
            Factors.guide(self, x, batch)

    adata = make_adata(n=60)
    proteins = np.random.default_rng(0).poisson(5.0, (60, 5)).astype(float)
    proteins[:30, 2] = np.nan
    adata.obsm["protein"] = proteins
    model = Both.from_anndata(adata, labels_key="label", protein_key="protein")
    rows, rng = np.arange(60), np.random.default_rng(1)
    pairs = draw_pairs(np.zeros(60, int), np.zeros(60, int), 100, (1.0, 1.0), rng)
    made = Droplets(model.dataset(), rows, pairs)[np.arange(160)]
    assert (made["labels"] == -1).all()  # of cells too, else the labels would tell
    both = (pairs.first >= 30) & (pairs.second >= 30)
    np.testing.assert_array_equal(made["measured"][60:, 2], both)
    expected = np.where(both, proteins[pairs.first, 2] + proteins[pairs.second, 2], 0)
    np.testing.assert_array_equal(made["y"][60:, 2], expected)


def test_a_droplet_is_the_same_whatever_it_is_read_with():
    adata = make_adata(n=80)
    model = Factors.from_anndata(adata, layer="counts")
    rng = np.random.default_rng(0)
    pairs = draw_pairs(np.zeros(80, int), np.zeros(80, int), 100, (0.3, 0.9), rng)
    made = Droplets(model.dataset(), np.arange(80), pairs, seed=3)
    whole = made[np.arange(180)]["x"].numpy()
    some = rng.permutation(180)[:70]
    np.testing.assert_array_equal(made[some]["x"], whole[some])
    x = adata.X.toarray()
    sums = x[pairs.first] + x[pairs.second]
    assert (whole[80:] <= sums).all()
    kept = whole[80:].sum(1) / sums.sum(1)
    assert np.corrcoef(kept, pairs.capture)[0, 1] > 0.95
    np.testing.assert_array_equal(whole[:80], x)


# -- features -----------------------------------------------------------------------------------------------


def test_principal_axes_are_those_of_the_exact_decomposition():
    rng = np.random.default_rng(0)
    y = rng.normal(size=(200, 4)) @ rng.normal(size=(4, 60)) * 3 + rng.normal(size=(200, 60)) + 2
    mean, axes = principal_axes(sp.csr_matrix(y.astype(np.float32)), 4, np.random.default_rng(1))
    np.testing.assert_allclose(mean, y.mean(0), rtol=1e-4)
    exact = np.linalg.svd(y - y.mean(0), full_matrices=False)[2][:4].T
    np.testing.assert_allclose(np.abs((axes * exact).sum(0)), 1, atol=1e-3)


def test_exclusive_genes_weigh_more_than_independent_ones():
    rng = np.random.default_rng(0)
    kind = rng.random(400) < 0.5
    on = rng.random((400, 6)) < 0.5
    on[:, 0], on[:, 1] = kind & (rng.random(400) < 0.9), ~kind & (rng.random(400) < 0.9)
    genes, weights = exclusive_pairs(sp.csr_matrix(on))
    at = {int(g): i for i, g in enumerate(genes)}
    assert weights[at[0], at[1]] > 10 * weights[at[2], at[3]]
    np.testing.assert_array_equal(weights, weights.T)
    assert (np.diag(weights) == 0).all()


# -- the correction and the rate ----------------------------------------------------------------------------


def test_the_correction_is_bayes_theorem():
    """Singlets Normal(0, 1), doublets Normal(3, 1), known densities."""
    rate, n_real, n_made = 0.15, 1000, 2500
    x = torch.linspace(-4, 5, 200, dtype=torch.float64)
    singlet = torch.distributions.Normal(0.0, 1.0).log_prob(x).exp()
    doublet = torch.distributions.Normal(3.0, 1.0).log_prob(x).exp()
    real = (1 - rate) * singlet + rate * doublet
    q = n_made * doublet / (n_made * doublet + n_real * real)  # of a perfect classifier
    log_ratio = (q / (1 - q)).log() - np.log(n_made / n_real)
    torch.testing.assert_close(log_ratio.exp(), doublet / real)
    found = class_probability(log_ratio, rate)
    torch.testing.assert_close(found, rate * doublet / real, atol=0.005, rtol=0)
    by_hand = (rate * n_real / n_made * q / (1 - q)).clamp(max=1)
    torch.testing.assert_close(found, by_hand, atol=0.005, rtol=0)
    sure = class_probability(torch.linspace(0, 30, 50, dtype=torch.float64), 0.5)
    assert (sure.diff() >= 0).all()
    assert (sure[:20].diff() > 0).all()  # the order is kept where the ratio is more than 1 / rate
    assert sure.max() <= 1


def test_the_tail_rate_is_where_em_ends():
    n, passed, share, prior = 500, 40, 0.6, (2.0, 30.0)
    rate = 0.5
    for _ in range(2000):
        expected = passed + n * rate * (1 - share)  # doublets that passed, and those that did not
        rate = (expected + prior[0]) / (n + prior[0] + prior[1])
    assert tail_rate(np.array(passed), np.array(share), n, prior) == pytest.approx(rate, rel=1e-6)


@pytest.mark.parametrize("rate", [0.02, 0.08, 0.25])
def test_the_rate_of_known_densities_is_found(rate):
    rng = np.random.default_rng(0)
    n = 20_000
    two = rng.random(n) < rate
    unlabelled = rng.normal(size=n) + 5 * two
    found = estimate_prevalence(unlabelled, rng.normal(size=2 * n) + 5)
    assert found.estimate == pytest.approx(two.mean(), rel=0.12)
    assert found.lower < two.mean() < found.upper


@pytest.mark.parametrize(("hidden", "factor"), [(0.2, 1.15), (0.35, 2.0)])
def test_the_rate_counts_doublets_that_cannot_be_seen(hidden, factor):
    """A share of the doublets look like singlets, of the examples too.

    Above a quarter of them the threshold that three quarters of the examples pass is among the singlets.
    """
    rng = np.random.default_rng(1)
    n, rate = 12_000, 0.12
    two = rng.random(n) < rate
    seen = rng.random(n) > hidden
    unlabelled = rng.normal(size=n) + 6 * (two & seen)
    examples = rng.normal(size=n) + 6 * (rng.random(n) > hidden)
    found = estimate_prevalence(unlabelled, examples)
    assert found.lower < two.mean() < found.upper
    assert rate / factor < found.estimate < rate * factor


def test_without_doublets_the_rate_is_small():
    rng = np.random.default_rng(2)
    found = estimate_prevalence(rng.normal(size=3000), rng.normal(size=6000) + 6)
    assert found.estimate < 0.003


# -- on simulated droplets ----------------------------------------------------------------------------------


def test_doublets_are_found(droplets, solo):
    truth = droplets.obs["doublet"].to_numpy()
    soft = solo.predict(soft=True)
    assert list(soft.columns) == ["singlet", "doublet"]
    assert list(soft.index) == list(droplets.obs_names)
    np.testing.assert_allclose(soft.sum(1), 1, rtol=1e-5)
    found = soft["doublet"].to_numpy()
    assert roc_auc_score(truth, found) > 0.93
    assert average_precision_score(truth, found) > 0.75
    called = solo.predict()
    assert set(called.cat.categories) == {"singlet", "doublet"}
    np.testing.assert_array_equal(called == "doublet", found > 0.5)


def test_the_rate_is_recovered(droplets, solo):
    truth = droplets.obs["doublet"].mean()
    rate = solo.get_doublet_rate()
    assert truth / 1.4 < rate.estimate < truth * 1.4
    assert rate.lower < truth < rate.upper


def test_probabilities_are_calibrated(droplets, solo):
    """Of droplets called with some probability, that share are doublets."""
    truth = droplets.obs["doublet"].to_numpy()
    found = solo.predict(soft=True)["doublet"].to_numpy()
    assert found.mean() == pytest.approx(truth.mean(), abs=0.04)
    order = np.argsort(found)
    for part in np.array_split(order, 10)[:-1]:
        assert abs(found[part].mean() - truth[part].mean()) < 0.06
    sure = found > 0.8
    assert sure.sum() > 30
    assert truth[sure].mean() > 0.8


def test_a_given_rate_is_kept(droplets, parent):
    low, high = (
        trained(Solo.from_model(parent, expected_doublet_rate=r, n_components=10), 5) for r in (0.02, 0.2)
    )
    assert tuple(high.get_doublet_rate()) == pytest.approx((0.2, 0.2, 0.2))
    a, b = (s.predict(soft=True)["doublet"].to_numpy() for s in (low, high))
    unsure = b < 0.9
    np.testing.assert_allclose(a[unsure] * 10, b[unsure], rtol=1e-3)  # probabilities are in proportion
    assert (a <= b + 1e-6).all()


def test_the_networks_are_not_used_on_what_they_were_taught(solo):
    from pyro import poutine

    batch = next(solo.batches(solo.dataset(), np.arange(100)))[1]
    with solo.minibatch(batch):
        trace = poutine.trace(solo.model).get_trace(**solo.inputs(batch))
    mask = trace.nodes["origin"]["fn"].base_dist._mask
    fold = batch["fold"].long().squeeze(-1)
    assert (mask.sum(1) == 4).all()
    assert not mask[torch.arange(100), fold].any()
    with torch.no_grad():
        own = solo._logits(batch["features"])[torch.arange(100), fold]
    found = solo.posterior("log_ratio", indices=np.arange(100))["log_ratio"]
    shift = np.log(solo.n_train["simulated"] / solo.n_train["main"])
    np.testing.assert_allclose(found, own - shift, atol=1e-5)


def test_annotate_writes_into_the_parents_data(droplets, solo):
    adata = droplets.copy()
    solo.annotate(adata)
    assert "solo_doublet_probability" in adata.obs
    np.testing.assert_allclose(
        adata.obs["solo_doublet_probability"], solo.predict(soft=True)["doublet"], rtol=1e-6
    )
    assert list(adata.obs["solo_prediction"].cat.categories) == ["singlet", "doublet"]
    assert adata.uns["pyrosc"]["Solo"]["model"] == "Solo"
    pyrosc.annotate(solo, adata, key_added="run2")
    assert {"run2_prediction", "run2_doublet_probability"} <= set(adata.obs)
    assert solo.home() is droplets


def test_other_droplets_are_scored(droplets, solo):
    again = droplets[::-1].copy()
    again.obs_names = [f"new{i}" for i in range(again.n_obs)]
    found = solo.predict(again, soft=True)["doublet"]
    assert list(found.index) == list(again.obs_names)
    before = solo.predict(soft=True)["doublet"].to_numpy()[::-1]
    assert np.corrcoef(found, before)[0, 1] > 0.85  # the mean of the networks, not the one of a fold
    truth = again.obs["doublet"].to_numpy()
    assert roc_auc_score(truth, found) > 0.93


def test_save_load_attach(tmp_path, droplets, parent, solo):
    solo.save(tmp_path / "solo")
    parent.save(tmp_path / "scvi")
    again = pyrosc.load(tmp_path / "solo")
    with pytest.raises(ValueError, match=r"solo.attach\(model\)"):
        again.predict()
    assert again.get_doublet_rate() == solo.get_doublet_rate()
    again.attach(pyrosc.load(tmp_path / "scvi", droplets))
    pd.testing.assert_frame_equal(again.predict(soft=True), solo.predict(soft=True), rtol=1e-4)
    other = trained(SCVI.from_anndata(droplets, n_latent=4, n_hidden=32), 1)
    with pytest.raises(ValueError, match="with other weights"):
        pyrosc.load(tmp_path / "solo").attach(other)
    with pytest.raises(ValueError, match="loaded without data"):
        pyrosc.load(tmp_path / "solo").attach(pyrosc.load(tmp_path / "scvi"))


def test_same_seed_same_scores(parent):
    a, b, c = (
        trained(Solo.from_model(parent, n_components=5, seed=s), 2, seed=s).predict(soft=True)
        for s in (1, 1, 2)
    )
    pd.testing.assert_frame_equal(a, b)
    assert not np.allclose(a, c)


# -- parents ------------------------------------------------------------------------------------------------


def test_a_parent_with_covariates():
    adata, parent = toy_parent(
        batch_key="batch",
        categorical_covariate_keys=["donor"],
        continuous_covariate_keys=["age"],
        encode_covariates=True,
        layer="counts",
    )
    solo = trained(Solo.from_model(parent), 2)
    made = solo.datasets["simulated"].data.obs
    a, b = (adata.obs.loc[made[c], ["batch", "donor"]].astype(str).to_numpy() for c in ("cell_1", "cell_2"))
    np.testing.assert_array_equal(a, b)
    assert len(solo.predict()) == 150
    mixed = Solo.from_model(parent, covariates="inherit").datasets["simulated"].data.obs
    donors = [adata.obs.loc[mixed[c], "donor"].astype(str).to_numpy() for c in ("cell_1", "cell_2")]
    batches = [adata.obs.loc[mixed[c], "batch"].astype(str).to_numpy() for c in ("cell_1", "cell_2")]
    assert (donors[0] != donors[1]).any()
    np.testing.assert_array_equal(*batches)


def test_one_batch_of_several():
    adata, parent = toy_parent(batch_key="batch")
    solo = trained(Solo.from_model(parent, restrict_to_batch="batch_1"), 2)
    here = (adata.obs["batch"] == "batch_1").to_numpy()
    assert list(solo.predict().index) == list(adata.obs_names[here])
    solo.annotate()
    found = adata.obs["solo_doublet_probability"].to_numpy()
    assert np.isnan(found[~here]).all()
    assert adata.obs["solo_prediction"].isna().to_numpy()[~here].all()
    np.testing.assert_allclose(found[here], solo.predict(soft=True)["doublet"], rtol=1e-6)
    with pytest.raises(KeyError, match=r"no batch 'batch_7'.*'batch_0', 'batch_1'"):
        Solo.from_model(parent, restrict_to_batch="batch_7")
    with pytest.raises(KeyError, match="without batches"):
        Solo.from_model(toy_parent()[1], restrict_to_batch="batch_1")


def test_a_users_latent_model_is_a_parent():
    adata = make_adata(n=150)
    parent = trained(Factors.from_anndata(adata, batch_key="batch"), 2)
    solo = trained(Solo.from_model(parent), 2)
    assert solo.datasets["main"].data.obsm["features"].columns[:3].tolist() == ["z_0", "z_1", "z_2"]
    assert solo.predict(soft=True).shape == (150, 2)


def test_scanvi_and_counts_on_disk(tmp_path):
    adata = make_adata(n=150)
    parent = trained(pyrosc.SCANVI.from_anndata(adata, labels_key="label", n_hidden=8, n_latent=2), 1)
    assert trained(Solo.from_model(parent), 1).predict(soft=True).notna().all().all()
    del adata.obsm["truth"]
    adata.write_h5ad(tmp_path / "counts.h5ad")
    results = []
    for data in (ad.read_h5ad(tmp_path / "counts.h5ad"), ad.read_h5ad(tmp_path / "counts.h5ad", backed="r")):
        model = trained(SCVI.from_anndata(data, n_hidden=8, n_latent=2), 1)
        results.append(trained(Solo.from_model(model), 1).predict(soft=True))
    pd.testing.assert_frame_equal(*results, rtol=1e-4)


# -- wrong input --------------------------------------------------------------------------------------------


def test_parents_that_cannot_be_one():
    adata = make_adata(n=150)
    with pytest.raises(KeyError, match="Rates has no latent space 'z' per cell"):
        Solo.from_model(trained(Rates.from_anndata(adata), 1))
    with pytest.raises(ValueError, match="Cells has parameters of its own for each cell"):
        Solo.from_model(trained(Cells.from_anndata(adata), 1))
    two = TwoSources.from_anndatas({"seq": adata, "spatial": make_adata(n=60, seed=1)})
    with pytest.raises(ValueError, match="one data source; TwoSources has 'seq', 'spatial'"):
        Solo.from_model(two)
    normalised = adata.copy()
    normalised.X = normalised.X.log1p()
    real = trained(SCVI.from_anndata(normalised, gene_likelihood="normal", n_hidden=8, n_latent=2), 1)
    with pytest.raises(ValueError, match="values that need not be counts"):
        Solo.from_model(real)
    with pytest.warns(UserWarning, match="SCVI was not trained"):
        Solo.from_model(SCVI.from_anndata(adata, n_hidden=8, n_latent=2))


def test_data_changed_in_place_are_noticed():
    adata, parent = toy_parent()
    adata.X = adata.X.log1p()
    with pytest.raises(DataError, match="X has changed since SCVI was made"):
        Solo.from_model(parent)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expected_doublet_rate": 0.0}, "between 0 and 1"),
        ({"expected_doublet_rate": 8}, "between 0 and 1"),
        ({"doublet_ratio": 0}, "doublet_ratio is the number of doublets per droplet"),
        ({"capture": 1.5}, "capture is a share"),
        ({"covariates": "mix"}, "covariates is 'share' or 'inherit'"),
        ({"n_folds": 1}, "n_folds is at least 2"),
        ({"n_components": 0}, "n_components is at least 1"),
        ({"n_layers": 0}, "at least 1"),
    ],
)
def test_wrong_options_are_refused(options, message):
    _, parent = toy_parent()
    with pytest.raises(ValueError, match=message):
        Solo.from_model(parent, **options)


def test_too_few_cells_and_no_rate_yet():
    parent = trained(SCVI.from_anndata(make_adata(n=15), n_hidden=8, n_latent=2), 1)
    with pytest.raises(DataError, match="15 cells are too few"):
        Solo.from_model(parent)
    with pytest.raises(ValueError, match=r"call fit\(\)"):
        Solo.from_model(toy_parent()[1]).get_doublet_rate()
    with pytest.raises(TypeError, match=r"Solo is made from a trained model: Solo.from_model\(model\)"):
        Solo.from_anndata(make_adata())


def test_the_picture(solo):
    from matplotlib import pyplot as plt

    ax = pyrosc.pl.doublets(solo)
    assert "rate" in ax.get_title()
    assert len(ax.get_legend().get_texts()) == 2
    plt.close("all")
