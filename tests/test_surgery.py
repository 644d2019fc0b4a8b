"""Surgery: what the reference was stays, what the query brings is learned."""

import json
import warnings

import anndata as ad
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import nn
from toy import make_adata
from toy_models import Cells, Factors

import pyrosc
from pyrosc import AUTOZI, SCANVI, SCVI, DataError, LinearSCVI, Model, PathwiseELBO
from pyrosc.data import Batch, CategoricalCovariates, Counts
from pyrosc.nn import CategoryTable, CovariateSpec, NormalEncoder

SMALL = {"n_hidden": 16, "n_latent": 3, "encode_covariates": True}
QUIET = {"progress": False, "device": "cpu", "batch_size": 32}


class Authored(Model):
    """A user's model built from covariate blocks: Poisson factors with a row per batch and donor."""

    elbo = PathwiseELBO()

    def __init__(self, registry, n_latent: int = 3, n_hidden: int = 12):
        super().__init__(registry)
        self.n_latent = n_latent
        self.spec = CovariateSpec.from_registry(registry, "batch", "donors")
        self.encoder = NormalEncoder(registry.n_vars(), n_latent, n_hidden, 1, self.spec, norm="layer")
        self.loadings = nn.Linear(n_latent, registry.n_vars())
        self.effect = CategoryTable("batch", registry.n_categories("batch"), (registry.n_vars(),))

    def model(self, x: Counts, batch: Batch, donors: CategoricalCovariates):
        with self.cells(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.n_latent), 1.0).to_event(1))
            rho = (self.loadings(z) + self.effect(batch)).softmax(-1)
            pyro.deterministic("rho", rho, event_dim=1)
            pyro.sample("x", dist.Poisson(x.sum(-1, keepdim=True) * rho + 1e-6).to_event(1), obs=x)

    def guide(self, x: Counts, batch: Batch, donors: CategoricalCovariates):
        covariates = self.spec.pack({"batch": batch, "donors": donors})
        with self.cells(x):
            pyro.sample("z", dist.Normal(*self.encoder(x.log1p(), covariates)).to_event(1))


KEYS = {"batch_key": "batch"}
CASES = {
    "scvi": (SCVI, SMALL, KEYS),
    "scvi-batchnorm": (SCVI, SMALL | {"norm": "batch", "n_layers": 2, "dispersion": "gene-batch"}, KEYS),
    "scvi-library": (SCVI, SMALL | {"use_observed_lib_size": False, "gene_likelihood": "nb"}, KEYS),
    "scvi-embedding": (SCVI, SMALL | {"batch_representation": "embedding"}, KEYS),
    "scvi-ln": (
        SCVI,
        SMALL | {"latent_distribution": "ln", "dispersion": "gene-cell"},
        KEYS | {"categorical_covariate_keys": ["donor"], "continuous_covariate_keys": ["age"]},
    ),
    "linear": (LinearSCVI, SMALL | {"decoder_norm": "batch"}, KEYS),
    "linear-bayesian": (LinearSCVI, SMALL | {"bayesian": True}, KEYS),
    "scanvi": (SCANVI, SMALL, KEYS | {"labels_key": "label"}),
    "autozi": (AUTOZI, SMALL | {"zero_inflation": "gene-batch"}, KEYS),
    "authored": (Authored, {}, KEYS | {"categorical_covariate_keys": ["donor"]}),
}


def reference_and_query(genes: int = 30) -> tuple[ad.AnnData, ad.AnnData]:
    """150 cells of two batches and donors, and 50 of a batch and a donor of their own."""
    adata = make_adata(200, genes)
    adata.obs["donor"] = adata.obs["donor"].astype(str)
    adata.obs["batch"] = adata.obs["batch"].astype(str)
    query = adata[150:].copy()
    query.obs["batch"], query.obs["donor"] = "batch_new", "d_new"
    return adata[:150].copy(), query


def fitted(cls: type, options: dict, keys: dict, adata: ad.AnnData, epochs: int = 4) -> Model:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls.from_anndata(adata, **keys, **options).fit(epochs, **QUIET)


def quickly(model: Model, epochs: int = 3, **options) -> Model:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the hint that the ELBO still rises
        return model.fit(epochs, **QUIET, **options)


@pytest.fixture(scope="module", params=CASES)
def case(request) -> tuple[Model, ad.AnnData, ad.AnnData]:
    cls, options, keys = CASES[request.param]
    reference, query = reference_and_query()
    return fitted(cls, options, keys, reference), reference, query


@pytest.fixture(scope="module")
def scvi() -> tuple[Model, ad.AnnData, ad.AnnData]:
    reference, query = reference_and_query()
    return fitted(*CASES["scvi"], reference), reference, query


def results(model: Model, adata: ad.AnnData) -> dict[str, np.ndarray]:
    sites = [model.latent, model.expression]
    found = {f"{s} mean": v for s, v in model.posterior(sites, adata=adata).items()}
    if isinstance(model, AUTOZI):  # draws a row per batch before the cells': a new one shifts the noise
        return found
    return found | model.posterior(sites, adata=adata, n_samples=3, reduce=None)


def assert_identical(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert np.array_equal(a[name], b[name]), name


# -- the reference stays ----------------------------------------------------------------------------------


def test_the_reference_is_the_same_bit_for_bit(case):
    model, reference, query = case
    expected, weights = results(model, reference), {k: v.clone() for k, v in model.state_dict().items()}
    before = query.copy()
    mapped = pyrosc.surgery(model, query)
    assert_identical(expected, results(mapped, reference))
    quickly(mapped)
    assert_identical(expected, results(mapped, reference))
    assert_identical(expected, results(model, reference))
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert type(mapped) is type(model)
    assert query.obs.equals(before.obs)
    assert (query.X != before.X).nnz == 0
    assert list(query.obsm) == ["truth"]


def test_only_the_rows_of_the_query_move(case):
    model, _, query = case
    mapped = pyrosc.surgery(model, query)
    before = {k: v.detach().clone() for k, v in mapped.named_parameters()}
    before |= {k: v.clone() for k, v in mapped.named_buffers()}
    quickly(mapped, weight_decay=0.1)  # decay, too, is for what trains alone
    after = dict(mapped.named_parameters()) | dict(mapped.named_buffers())
    moved = {k for k, v in after.items() if not torch.equal(v, before[k])}
    assert moved
    assert all(name.endswith(".added") for name in moved)
    assert moved == {n for n, p in mapped.named_parameters() if p.requires_grad}


def test_the_query_fits_better_than_before(scvi):
    model, _, query = scvi
    mapped = pyrosc.surgery(model, query)
    before = mapped.get_elbo(n_samples=20)
    quickly(mapped, 30)
    assert mapped.get_elbo(n_samples=20) > before + 0.1


def test_new_rows_start_at_the_mean_of_the_old(scvi):
    model, _, query = scvi
    mapped = pyrosc.surgery(model, query)
    table, old = mapped.decoder.layers[0].effects.tables[0], model.decoder.layers[0].effects.tables[0]
    assert table.n_categories == 3
    torch.testing.assert_close(table.row(2), old.rows.mean(0))
    assert mapped.registry.categories("batch") == (*model.registry.categories("batch"), "batch_new")


def test_the_library_prior_of_the_query_comes_from_its_cells():
    reference, query = reference_and_query()
    model = fitted(*CASES["scvi-library"], reference)
    query.X = query.X * 8
    prior = pyrosc.surgery(model, query).library_prior
    totals = np.log(np.asarray(query.X.sum(1)).ravel())
    np.testing.assert_allclose(prior.row(2).detach(), [totals.mean(), totals.var()], rtol=1e-5)
    torch.testing.assert_close(prior.rows, model.library_prior.rows)


def test_a_query_of_a_query_and_saving_in_between(case, tmp_path):
    model, reference, query = case
    model.save(tmp_path / "reference")
    first = quickly(type(model).from_reference(tmp_path / "reference", query))
    expected, expected_query = results(first, reference), results(first, query)
    first.save(tmp_path / "first")
    again = type(model).load(tmp_path / "first", query)
    assert_identical(expected, results(again, reference))
    trainable = {n for n, p in first.named_parameters() if p.requires_grad}
    assert {n for n, p in again.named_parameters() if p.requires_grad} == trainable

    third = query.copy()
    third.obs["batch"] = "batch_third"
    second = quickly(pyrosc.surgery(again, third))
    assert_identical(expected, results(second, reference))
    assert_identical(expected_query, results(second, query))
    quickly(again)  # and the loaded one trains on, without moving the reference
    assert_identical(results(model, reference), results(again, reference))


def test_new_rows_are_held_to_the_spread_of_the_old(scvi):
    """The prior by hand, its gradient in the loss, and less movement the more it weighs."""
    model, _, query = scvi
    mapped = pyrosc.surgery(model, query, shrinkage=2.0)
    tables = [mapped.get_submodule(n) for n in mapped.surgery.fixed]
    with torch.no_grad():
        for table in tables:
            table.added += 0.01
    with torch.no_grad():
        expected = sum(((t.added - t.rows.mean(0)) ** 2).sum() / t.rows.var(0).mean() for t in tables)
        torch.testing.assert_close(mapped.surgery.penalty(mapped), expected)  # 2 / (2 σ²)
    assert pyrosc.surgery(model, query, shrinkage=0).surgery.penalty(mapped) == 0

    def moved(weight: float) -> float:
        found = quickly(pyrosc.surgery(model, query, shrinkage=weight), 20)
        start = pyrosc.surgery(model, query)
        return sum(
            float((a.added - b.added).detach().norm())
            for a, b in zip(
                *([m.get_submodule(n) for n in m.surgery.fixed] for m in (found, start)), strict=True
            )
        )

    free, held, fast = moved(0), moved(1), moved(1e4)
    assert free > held > fast
    with pytest.raises(ValueError, match="shrinkage is 0 or more, not -1"):
        pyrosc.surgery(model, query, shrinkage=-1)


def test_training_can_be_resumed(scvi, tmp_path):
    model, _, query = scvi
    whole = quickly(pyrosc.surgery(model, query), 4)
    part = pyrosc.surgery(model, query)
    stop = lambda m, r: r["epoch"] == 1  # noqa: E731
    quickly(part, 4, checkpoint=tmp_path, checkpoint_every=1, callbacks=[stop])
    rest = quickly(pyrosc.surgery(model, query), 4, checkpoint=tmp_path, resume=True)
    if len(rest.history) == len(whole.history):
        assert all(torch.equal(v, rest.state_dict()[k]) for k, v in whole.state_dict().items())


def test_every_covariate_may_have_new_categories():
    reference, query = reference_and_query()
    keys = {"batch_key": "batch", "categorical_covariate_keys": ["donor", "label"]}
    model = fitted(SCVI, SMALL, keys, reference)
    query.obs["label"] = query.obs["label"].cat.rename_categories({"T": "T2"})
    mapped = quickly(pyrosc.surgery(model, query))
    assert mapped.registry.categories("categorical_covariates", "donor")[-1] == "d_new"
    assert mapped.registry.categories("categorical_covariates", "label") == ("B", "NK", "T", "T2")
    assert_identical(results(model, reference), results(mapped, reference))
    what_if = mapped.get_normalized_expression(reference, do={"batch": "batch_new"}, as_numpy=True)
    assert not np.allclose(what_if, model.get_normalized_expression(reference, as_numpy=True))


def test_continuous_covariates_keep_the_scale_of_the_reference():
    reference, query = reference_and_query()
    query.obs["age"] = query.obs["age"] * 10 + 3
    model = fitted(SCVI, SMALL, KEYS | {"continuous_covariate_keys": ["age"]}, reference)
    mapped = pyrosc.surgery(model, query)
    state = model.registry.fields["continuous_covariates"]
    expected = (query.obs["age"] - state.loc[0]) / state.scale[0]
    np.testing.assert_allclose(
        mapped.datasets["main"].codes("continuous_covariates")[:, 0], expected, rtol=1e-5
    )


# -- genes ------------------------------------------------------------------------------------------------


def test_gene_order_and_extra_genes_do_not_matter(scvi):
    model, _, query = scvi
    extra = ad.AnnData(np.ones((50, 2), np.float32), obs=query.obs, var={"g": ["x1", "x2"]})
    extra.var_names = ["x1", "x2"]
    shuffled = ad.concat([query[:, ::-1], extra], axis=1, merge="first")
    shuffled.obs = query.obs.copy()
    a, b = quickly(pyrosc.surgery(model, query)), quickly(pyrosc.surgery(model, shuffled))
    assert_identical(results(a, query), results(b, shuffled))


def test_missing_genes_are_left_out_of_the_likelihood():
    """The bound of a query without some genes, against SciPy: totals and shares are of the others."""
    reference, query = reference_and_query()
    model = fitted(SCVI, SMALL | {"gene_likelihood": "nb"}, KEYS, reference)
    query = query[:, 4:].copy()
    mapped = pyrosc.surgery(model, query)
    found = mapped.posterior(["z", "rho"])
    x = query.X.toarray()
    rho = found["rho"][:, 4:].astype(np.float64)
    mean = x.sum(1, keepdims=True) * rho / rho.sum(1, keepdims=True)
    theta = mapped.log_theta().detach().exp().double().numpy()[4:]
    expected = stats.nbinom.logpmf(x, theta, theta / (theta + mean)).sum(1)

    from pyrosc.infer.handlers import Means

    batch = next(iter(mapped.batches(mapped.dataset(), np.arange(50))))[1]
    with torch.no_grad(), mapped.minibatch(batch), Means():
        guide = pyro.poutine.trace(mapped.guide).get_trace(**mapped.inputs(batch))
        trace = pyro.poutine.trace(pyro.poutine.replay(mapped.model, guide)).get_trace(**mapped.inputs(batch))
    site = trace.nodes["x"]
    log_prob = site["fn"].log_prob(site["value"]).numpy()
    np.testing.assert_allclose(log_prob, expected, rtol=1e-4)
    assert found["rho"].shape == (50, 30)  # expression is there for all genes


def test_zeros_for_missing_genes(scvi):
    """With missing_genes='zero' a query without some genes is one whose counts of them are zero."""
    model, _, query = scvi
    padded = query.copy()
    dense = padded.X.toarray()
    dense[:, :4] = 0
    padded.X = dense
    a = quickly(pyrosc.surgery(model, query[:, 4:].copy(), missing_genes="zero"))
    b = quickly(pyrosc.surgery(model, padded))
    assert_identical(results(a, query[:, 4:].copy()), results(b, padded))
    assert a.get_elbo() == b.get_elbo()
    c = pyrosc.surgery(model, query[:, 4:].copy())
    assert abs(c.get_elbo() - pyrosc.surgery(model, padded).get_elbo()) > 0.01


def test_the_mean_of_the_reference_for_missing_genes(case, tmp_path):
    """The encoder sees the reference's mean, at the depth of the cell; the likelihood sees nothing."""
    model, reference, query = case
    query = query[:, 4:].copy()
    expected = results(model, reference)
    mapped = pyrosc.surgery(model, query, missing_genes="mean")
    x, mean = query.X.toarray().astype(np.float64), np.asarray(reference.X.mean(0), np.float64).ravel()
    whole = np.concatenate([x.sum(1, keepdims=True) / mean[4:].sum() * mean[:4], x], axis=1)
    batch = next(iter(mapped.batches(mapped.dataset(), np.arange(50))))[1]
    site = "z_raw" if "z_raw" in mapped.latent_sites() else "z"
    inputs = mapped.inputs(batch)
    seen = inputs | {"x": torch.as_tensor(whole, dtype=torch.float32)}
    assert not inputs["x"][:, :4].any()  # the model's own argument
    with torch.no_grad(), mapped.minibatch(batch):
        np.testing.assert_allclose(mapped.filled("x", inputs["x"]).numpy(), whole, rtol=2e-5)
        found = pyro.poutine.trace(mapped.guided).get_trace(**inputs)
    with torch.no_grad():  # as if of cells with all genes
        direct = pyro.poutine.trace(mapped.guide).get_trace(**seen)
    means = [t.nodes[site]["fn"].mean for t in (found, direct)]
    torch.testing.assert_close(*means, rtol=1e-4, atol=1e-5)
    if "library" in mapped.latent_sites():  # counts the genes measured, as the model's does
        lost = np.log(mean[4:].sum() / mean.sum())
        torch.testing.assert_close(
            found.nodes["library"]["fn"].mean, direct.nodes["library"]["fn"].mean + lost, rtol=1e-4, atol=1e-4
        )
    quickly(mapped)
    assert_identical(expected, results(mapped, reference))
    mapped.save(tmp_path / "m")
    again = pyrosc.load(tmp_path / "m", query, cls=type(model))
    assert again.get_elbo() == mapped.get_elbo()
    model.save(tmp_path / "reference")
    apart = type(model).from_reference(tmp_path / "reference", query, missing_genes="mean")
    assert apart.registry.fields["x"].means == mapped.registry.fields["x"].means


def test_labels_are_learned_from_filled_counts():
    """scANVI's classifier sees the latent space that cells get, in training too."""
    reference, query = reference_and_query()
    model = fitted(*CASES["scanvi"], reference)
    mapped = pyrosc.surgery(model, query[:, 4:].copy(), missing_genes="mean", labels=True)
    batch = next(iter(mapped.batches(mapped.dataset(), np.arange(50))))[1]
    with torch.no_grad(), mapped.minibatch(batch):
        mean = mapped._posterior_of_z(batch)[0].numpy()
    np.testing.assert_allclose(mean, mapped.get_latent_representation(), rtol=1e-4, atol=1e-5)
    quickly(mapped)


def test_encoders_that_do_not_take_means_say_so():
    reference, query = reference_and_query()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = pyrosc.PEAKVI.from_anndata(
            reference, batch_key="batch", counts="fragments", encode_covariates=True
        ).fit(2, **QUIET)
    with pytest.raises(ValueError, match="encoder of PEAKVI does not take means"):
        pyrosc.surgery(model, query[:, 4:].copy(), missing_genes="mean")


def test_a_model_without_means_cannot_fill_them_in(scvi, tmp_path):
    model, _, query = scvi
    model.save(tmp_path / "m")
    saved = json.loads((tmp_path / "m" / "model.json").read_text())
    saved["registries"]["main"]["fields"]["x"].pop("means")  # as an earlier version wrote it
    (tmp_path / "m" / "model.json").write_text(json.dumps(saved))
    old = pyrosc.load(tmp_path / "m")
    pyrosc.surgery(old, query[:, 4:].copy())
    with pytest.raises(ValueError, match=r"does not know the mean of its genes \('x'\)"):
        pyrosc.surgery(old, query[:, 4:].copy(), missing_genes="mean")


def test_missing_genes_survive_saving_and_sampling(scvi, tmp_path):
    model, _, query = scvi
    query = query[:, 4:].copy()
    mapped = quickly(pyrosc.surgery(model, query))
    mapped.save(tmp_path / "m")
    again = pyrosc.load(tmp_path / "m", query)
    assert again.get_elbo() == mapped.get_elbo()
    assert mapped.posterior_predictive_sample().shape == (50, 30)
    assert mapped.get_likelihood_parameters()["mean"].shape == (50, 30)
    assert np.isfinite(mapped.get_marginal_ll(n_samples=8))
    with pytest.raises(DataError, match=r"lack 1 of the 30 genes"):
        mapped.get_latent_representation(query[:, 1:].copy())  # a gene more than the query lacked


@pytest.mark.parametrize("way", ["mask", "mean", "zero"])
def test_nothing_is_said_of_changes_in_genes_that_were_not_counted(way):
    """Zeros of genes that the query lacks are no counts: no raw statistics, no effect, no call."""
    reference, query = reference_and_query()
    mapped = pyrosc.surgery(fitted(*CASES["scvi"], reference), query[:, 4:].copy(), missing_genes=way)
    half = np.arange(50) < 25
    table = mapped.differential_expression(idx1=half, idx2=~half, min_cells=1)
    lacking, others = table.loc[query.var_names[:4]], table.loc[query.var_names[4:]]
    said = ["lfc_mean", "lfc_lower", "lfc_unshrunken", "proba_de", "raw_mean1", "non_zeros_proportion2"]
    assert lacking[said].isna().all(axis=None)
    assert (lacking["n_cells1"] == 0).all()
    assert not lacking[["is_de_fdr", "is_expressed"]].any(axis=None)
    assert others[said].notna().all(axis=None)


def test_few_shared_genes_are_warned_of_and_none_refused(scvi):
    model, _, query = scvi
    with pytest.warns(UserWarning, match=r"has 22 of the 30 genes of SCVI \(73%\)"):
        pyrosc.surgery(model, query[:, 8:].copy())
    query = query.copy()
    query.var_names = [n.upper() if i else n for i, n in enumerate(query.var_names)]
    with pytest.raises(
        DataError, match=r"29 of the 30 genes of SCVI in another case \('GENE_1' for 'gene_1'"
    ):
        pyrosc.surgery(model, query)
    query.var_names = [f"ENSG{i}" for i in range(30)]
    with pytest.raises(DataError, match="none of the 30 genes"):
        pyrosc.surgery(model, query)


class Multinomial(Factors):
    """Counts as one draw of all genes: no gene can be left out."""

    def model(self, x: Counts, batch: Batch):
        with self.cells(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.n_latent), 1.0).to_event(1))
            rho = (self.loadings(z) + self.effect(batch)).softmax(-1)
            pyro.deterministic("rho", rho, event_dim=1)
            pyro.sample("x", dist.Multinomial(probs=rho, validate_args=False), obs=x)


def test_laws_of_all_genes_at_once_cannot_leave_one_out():
    reference, query = reference_and_query()
    model = fitted(Multinomial, {}, KEYS, reference)
    with pytest.raises(DataError, match="no site of Multinomial observes 'x' gene by gene"):
        pyrosc.surgery(model, query[:, 4:].copy(), decoder_only=True)
    quickly(pyrosc.surgery(model, query[:, 4:].copy(), decoder_only=True, missing_genes="zero"))


# -- labels -----------------------------------------------------------------------------------------------


def test_labels_of_the_query_are_not_used_unless_asked():
    reference, query = reference_and_query()
    model = fitted(*CASES["scanvi"], reference)
    query.obs["label"] = query.obs["label"].astype(str).replace("T", "new type")
    hidden = pyrosc.surgery(model, query)
    assert (hidden.datasets["main"].codes("labels") == -1).all()
    shown = pyrosc.surgery(model, query, labels=True)
    codes = shown.datasets["main"].codes("labels")
    assert ((codes == -1) == (query.obs["label"] == "new type")).all()
    assert set(quickly(hidden).predict(query)) <= {"B", "NK", "T"}
    assert hidden.temperature == model.temperature
    del query.obs["label"]
    pyrosc.surgery(model, query)


# -- more freedom -----------------------------------------------------------------------------------------


def test_more_can_be_freed(scvi, tmp_path):
    model, reference, query = scvi
    mapped = pyrosc.surgery(model, query, free=["encoder", "log_theta"])
    assert mapped.train().encoder.network.layers[0].dropout.training
    assert not mapped.decoder.training
    before = {k: v.detach().clone() for k, v in mapped.state_dict().items()}
    quickly(mapped)
    moved = {k.split(".")[0] for k, v in mapped.state_dict().items() if not torch.equal(v, before[k])}
    assert {"encoder", "log_theta", "decoder"} >= moved >= {"encoder", "log_theta"}
    torch.testing.assert_close(mapped.scale_head.weight, model.scale_head.weight, rtol=0, atol=0)
    assert not np.array_equal(mapped.get_latent_representation(reference), model.get_latent_representation())
    mapped.save(tmp_path / "m")
    again = pyrosc.load(tmp_path / "m")
    assert again.surgery == mapped.surgery
    with pytest.raises(ValueError, match="no part 'encodr' to free; it has"):
        pyrosc.surgery(model, query, free="encodr")


def test_decoder_alone():
    reference, query = reference_and_query()
    model = fitted(SCVI, {"n_hidden": 16, "n_latent": 3}, KEYS, reference)
    with pytest.raises(ValueError, match=r"does not see the batch.*'batch_new'.*encode_covariates=True"):
        pyrosc.surgery(model, query)
    mapped = quickly(pyrosc.surgery(model, query, decoder_only=True))
    assert_identical(results(model, reference), results(mapped, reference))
    assert np.array_equal(
        mapped.get_latent_representation(query),
        model.get_latent_representation(query_as(query, "batch_0")),
    )


def query_as(query: ad.AnnData, batch: str) -> ad.AnnData:
    query = query.copy()
    query.obs["batch"] = batch
    return query


# -- what cannot be done ----------------------------------------------------------------------------------


def test_a_query_that_brings_nothing_new(scvi):
    model, _, query = scvi
    with pytest.raises(
        ValueError, match=r"no category that SCVI does not know already \(obs\['batch'\]: 'batch_0'"
    ):
        pyrosc.surgery(model, query_as(query, "batch_1"))


def test_what_cannot_be_operated_on(scvi):
    model, reference, query = scvi
    with pytest.raises(ValueError, match="is not trained"):
        pyrosc.surgery(SCVI.from_anndata(reference, batch_key="batch", **SMALL), query)
    with pytest.raises(ValueError, match="without a batch or categorical covariate"):
        pyrosc.surgery(fitted(SCVI, SMALL, {}, reference, 2), query)
    with pytest.raises(ValueError, match="parameters of its own for each cell"):
        pyrosc.surgery(fitted(Cells, {}, {}, reference, 2), query)
    with pytest.raises(TypeError, match=r"from_reference\(folder, query\)"):
        pyrosc.surgery("atlas", query)
    with pytest.raises(TypeError, match="not 'cell_type'; name arguments"):
        model.get_latent_representation("cell_type")
    with pytest.raises(ValueError, match="missing_genes is one of 'mask', 'mean', 'zero'"):
        pyrosc.surgery(model, query, missing_genes="median")
    with pytest.raises(TypeError, match="and then the query's AnnData; the first is AnnData"):
        SCVI.from_reference(query, model)
    with pytest.raises(TypeError, match="the reference is a SCVI, not a SCANVI"):
        SCANVI.from_reference(model, query)
    with pytest.raises(ValueError, match="leave out n_restarts"):
        pyrosc.surgery(model, query).fit(2, n_restarts=2, **QUIET)


def test_columns_of_the_query_are_checked(scvi):
    model, _, query = scvi
    bare = query.copy()
    del bare.obs["batch"]
    with pytest.raises(DataError, match="obs has no column 'batch'"):
        pyrosc.surgery(model, bare)
    gaps = query.copy()
    gaps.obs["batch"] = gaps.obs["batch"].where(np.arange(50) > 2)
    with pytest.raises(DataError, match=r"obs\['batch'\] is missing for 3 cells"):
        pyrosc.surgery(model, gaps)
    logged = query.copy()
    logged.X = logged.X.log1p()
    with pytest.raises(DataError, match="are fractional"):
        pyrosc.surgery(model, logged)


class Bare(Factors):
    """A parameter per batch that is no row of a table."""

    def __init__(self, registry, n_latent: int = 3):
        super().__init__(registry, n_latent)
        self.bare = nn.Parameter(torch.zeros(registry.n_categories("batch")))


def test_numbers_per_category_outside_of_tables_are_named():
    reference, query = reference_and_query()
    with pytest.raises(ValueError, match="the shape of 'bare' of Bare follows the number of categories"):
        pyrosc.surgery(fitted(Bare, {}, KEYS, reference, 2), query, decoder_only=True)


# -- labels through the latent space -----------------------------------------------------------------------


@pytest.mark.parametrize("method", ["forest", "neighbors"])
def test_labels_are_carried_through_the_latent_space(scvi, method):
    model, reference, query = scvi
    mapped = pyrosc.surgery(model, query)
    found = pyrosc.transfer_labels(mapped, reference, "label", method=method)
    assert list(found.index) == list(query.obs_names)
    assert list(found["label"].cat.categories) == ["B", "NK", "T"]
    soft = pyrosc.transfer_labels(mapped, reference, "label", query, method=method, soft=True)
    np.testing.assert_allclose(soft.sum(1), 1)
    np.testing.assert_allclose(found["uncertainty"], 1 - soft.max(1))
    assert (soft.idxmax(axis=1) == found["label"]).all()
    assert pyrosc.transfer_labels(mapped, reference, "label", method=method).equals(found)


def test_neighbours_by_hand_and_cells_without_labels(scvi):
    model, reference, query = scvi
    reference = reference.copy()
    reference.obs["label"] = reference.obs["label"].astype(object)
    reference.obs.loc[reference.obs_names[:30], "label"] = np.nan
    reference.obs.loc[reference.obs_names[30:40], "label"] = "unknown"
    mapped = pyrosc.surgery(model, query)
    options = {"method": "neighbors", "n_neighbors": 7, "soft": True, "unlabeled_category": "unknown"}
    means = pyrosc.transfer_labels(mapped, reference, "label", n_samples=0, **options)
    a, b = mapped.get_latent_representation(reference)[40:], mapped.get_latent_representation()
    nearest = np.argsort(((b[:, None] - a[None]) ** 2).sum(-1), axis=1)[:, :7]
    names = reference.obs["label"].to_numpy()[40:][nearest]
    expected = np.stack([(names == c).mean(1) for c in ("B", "NK", "T")], 1)
    np.testing.assert_allclose(means, expected)
    drawn = pyrosc.transfer_labels(mapped, reference, "label", n_samples=40, **options)
    assert drawn.max(1).mean() < means.max(1).mean()  # an uncertain place, an uncertain label
    reference.obs["label"] = "all"
    with pytest.raises(DataError, match=r"obs\['label'\] of the reference has 1 labels"):
        pyrosc.transfer_labels(mapped, reference, "label")


# -- tables -----------------------------------------------------------------------------------------------


def test_a_fixed_table_is_saved_whole():
    table = CategoryTable("batch", 4, (2,), init=nn.init.normal_)
    whole = table.rows.detach().clone()
    codes = torch.tensor([3, 0, 2])
    expected = table(codes)
    table.fix(3)
    assert torch.equal(table(codes), expected)
    assert torch.equal(table.state_dict()["rows"], whole)
    assert not table.rows.requires_grad
    assert table.added.requires_grad
    table.fix(4)
    assert table.added is None
    other = CategoryTable("batch", 4, (2,))
    other.fix(1)
    other.load_state_dict(table.state_dict())
    assert torch.equal(other.all_rows(), whole)
    with pytest.raises(RuntimeError, match=r"size mismatch for rows: \(5, 2\) in the file, \(4, 2\)"):
        other.load_state_dict({"rows": torch.zeros(5, 2)})
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({})
