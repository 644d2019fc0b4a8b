"""The contract that every model keeps, as checks that run on any model: ours or a user's."""

from __future__ import annotations

import inspect
import random
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine

from pyrosc.criticism import predictive_checks
from pyrosc.data import MAIN
from pyrosc.data.inputs import load_batch
from pyrosc.infer.handlers import Means, is_latent
from pyrosc.infer.structure import prototype, sites_of_cells
from pyrosc.models.base import Model
from pyrosc.nn import CategoryTable
from pyrosc.simulate import design_for
from pyrosc.tools.de import differential_expression
from pyrosc.tools.de.table import scale_of
from pyrosc.tools.surgery import surgery


class ContractError(AssertionError):
    """A model breaks the contract; the message lists every check that failed."""


class Case:
    """A model class with data to try it on."""

    def __init__(self, cls: type[Model], options: dict[str, Any]) -> None:
        self.cls, self.options = cls, options

    def data(self, **sizes: Any) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """AnnData and keywords per source."""
        fields = self.cls.fields(**self.options)
        adatas, keys = {}, {}
        for source in dict.fromkeys(f.source for f in fields.values()):
            own = {n: f for n, f in fields.items() if f.source == source}
            adatas[source], keys[source] = design_for(own, **sizes)
        return adatas, keys

    def make(self, seed: int = 0, **sizes: Any) -> Model:
        """A new model, not trained."""
        adatas, keys = self.data(**sizes)
        return self.cls.example(adatas, keys, seed, **self.options)

    def fitted(self, epochs: int = 2, seed: int = 0) -> Model:
        """A model trained for a moment."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the runner's hint that the ELBO still rises
            return self.make(seed).fit(epochs, batch_size=20, progress=False, device="cpu", seed=seed)


def signatures_agree(case: Case) -> None:
    """Model and guide take the same arguments."""
    if case.cls.guide is Model.guide:
        return
    model = list(inspect.signature(inspect.unwrap(case.cls.model)).parameters)
    guide = list(inspect.signature(inspect.unwrap(case.cls.guide)).parameters)
    assert model == guide, f"model takes {model[1:]}, guide takes {guide[1:]}"


def every_site_is_guided(case: Case) -> None:
    """Each latent site of the model has a site in the guide, or is enumerated."""
    model = case.make()
    nodes: Mapping[str, Any] = prototype(model).nodes
    enumerated = {n for n, s in nodes.items() if s.get("infer", {}).get("enumerate")}
    batch = _whole(model)
    with torch.random.fork_rng(), torch.no_grad(), model.minibatch(batch):
        guide: Any = poutine.trace(model.guided).get_trace(**model.inputs(batch))
    guided = {n for n, s in guide.nodes.items() if is_latent(s)}
    missing = set(model.latent_sites()) - guided - enumerated
    assert not missing, f"sites without a guide: {sorted(missing)}"
    extra = {n for n in guided - set(model.latent_sites()) if not guide.nodes[n]["infer"].get("is_auxiliary")}
    assert not extra, f"the guide has sites that the model has not: {sorted(extra)}"


def runs_validated_without_warning(case: Case) -> None:
    """One loss with Pyro's validation on gives no warning and a finite number."""
    model = case.make()
    with torch.random.fork_rng(), pyro.validation_enabled(True), warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = model(_whole(model))
    assert torch.isfinite(loss), f"the loss is {loss.item()}"


def global_state_is_untouched(case: Case) -> None:
    """Parameter store, generators, settings and validation flag are as before."""
    with pyro.get_param_store().scope():  # an empty store, whatever the caller has in his
        before = _global_state()
        model = case.fitted()
        _some_posterior(model)
        after = _global_state()
    changed = [k for k in before if before[k] != after[k]]
    assert not changed, f"changed: {', '.join(changed)}"


def models_are_independent(case: Case) -> None:
    """A second model in the process leaves the first as it was."""
    first = case.fitted()
    weights = {k: v.clone() for k, v in first.state_dict().items()}
    case.fitted(seed=1)
    _assert_same(weights, first.state_dict(), "training a second model changed the first")


def same_seed_same_weights(case: Case) -> None:
    """Two runs with one seed end with the same bits; another seed with others."""
    first = case.fitted().state_dict()
    _assert_same(first, case.fitted().state_dict(), "two runs with one seed differ")
    other = case.fitted(seed=1).state_dict()
    assert any(not torch.equal(v, other[k]) for k, v in first.items()), "the seed has no effect"


def save_and_load(case: Case) -> None:
    """A loaded model gives the results of the saved one."""
    model = case.fitted()
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "model")
        files = {f.suffix for f in (Path(folder) / "model").iterdir()}
        assert files == {".safetensors", ".json"}, f"files of kind {sorted(files)}"
        data = {s: d.data for s, d in model.datasets.items()}
        again = case.cls.load(Path(folder) / "model", data[MAIN] if list(data) == [MAIN] else data)
    _assert_same(model.state_dict(), again.state_dict(), "weights differ")
    assert again.config == model.config
    assert again.registries == model.registries
    for site, value in _some_posterior(model).items():
        assert np.array_equal(value, _some_posterior(again)[site]), f"posterior of '{site}' differs"


def order_and_batch_size_do_not_matter(case: Case) -> None:
    """Results follow the rows asked for, whatever the minibatches."""
    model = case.fitted()
    for source, dataset in model.datasets.items():
        sites = sites_of_cells(model, source)
        rows = np.random.default_rng(0).permutation(dataset.n_obs)
        whole = model.posterior(sites, source=source)
        parts = model.posterior(sites, source=source, indices=rows, batch_size=7)
        for site in sites:
            np.testing.assert_allclose(parts[site], whole[site][rows], rtol=1e-4, atol=1e-5, err_msg=site)


def minibatch_loss_is_unbiased(case: Case) -> None:
    """The mean loss of minibatches that make up the data is the loss of the data (draws at their means)."""
    model = case.fitted()
    model.n_train = {s: d.n_obs for s, d in model.datasets.items()}
    with torch.no_grad(), Means(skip_enumerated=True):
        whole = _loss(model, {s: np.arange(d.n_obs) for s, d in model.datasets.items()})
        pieces = [
            _loss(model, {s: np.arange(d.n_obs)[i::3] for s, d in model.datasets.items()}) for i in range(3)
        ]
    np.testing.assert_allclose(np.mean(pieces), whole, rtol=1e-4)


def fit_lowers_the_loss(case: Case) -> None:
    """A short run raises the ELBO of the training cells."""
    model = case.make()
    before = _mean_loss(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(30, batch_size=20, progress=False, device="cpu", early_stopping=False)
    after = _mean_loss(model)
    assert after < before, f"loss {before:.4g} before, {after:.4g} after 30 epochs"


def categories_live_in_tables(case: Case) -> None:
    """Parameters whose shape follows the number of categories are rows of a CategoryTable."""
    kinds = {f.kind for f in case.cls.fields(**case.options).values()}
    if not kinds & {"categorical", "categoricals"}:
        return
    small, large = (dict(case.make(n_categories=k).state_dict()) for k in (3, 4))
    model = case.make()
    tables = {f"{n}.rows" for n, m in model.named_modules() if isinstance(m, CategoryTable)}
    bare = [k for k in small if k in large and small[k].shape != large[k].shape and k not in tables]
    labels = {n for n, f in case.cls.fields(**case.options).items() if f.kind == "labels"}
    assert not bare or labels, f"not in a CategoryTable: {bare}"


def several_draws_at_once(case: Case) -> None:
    """Posterior draws, taken together, have the right shapes."""
    model = case.fitted()
    for source, dataset in model.datasets.items():
        sites = sites_of_cells(model, source)
        draws = model.posterior(sites, source=source, n_samples=4, reduce=None, indices=np.arange(5))
        means = model.posterior(sites, source=source, indices=np.arange(5))
        for site in sites:
            if means[site].dtype.kind == "f" and draws[site].ndim == means[site].ndim + 1:
                assert draws[site].shape == (4, *means[site].shape), f"{site}: {draws[site].shape}"
        assert dataset.n_obs >= 5


def surgery_keeps_the_reference(case: Case) -> None:
    """A query with new categories trains rows of its own, and moves nothing of the reference."""
    fields = case.cls.fields(**case.options).values()
    if {f.source for f in fields} != {MAIN} or any(f.modality for f in fields):
        return
    if not any(f.kind in ("categorical", "categoricals") for f in fields):
        return
    model = case.fitted()
    if model.knows_cells:
        return
    reference, query = model.home(), model.home().copy()
    for state in model.registry.fields.values():
        if state.kind in ("categorical", "categoricals"):
            for key in state.keys:
                query.obs[key] = "of the query"
    mapped = surgery(model, query, decoder_only=True, labels=True)
    before = {k: v.clone() for k, v in mapped.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mapped.fit(2, batch_size=20, progress=False, device="cpu")
    assert any(not torch.equal(v, before[k]) for k, v in mapped.state_dict().items()), "nothing was learned"
    sites = sites_of_cells(model)
    expected, found = model.posterior(sites, adata=reference), mapped.posterior(sites, adata=reference)
    for site in sites:
        assert np.array_equal(expected[site], found[site]), f"'{site}' of the reference moved"


def tools_take_it(case: Case) -> None:
    """Differential expression and predictive checks run where the sites are there, and change no data."""
    model = case.fitted()
    if list(model.datasets) != [MAIN]:
        return
    adata, sites = model.home(), prototype(model).nodes
    before = adata.copy()
    first = np.arange(adata.n_obs) < adata.n_obs // 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if model.expression in sites:
            table = differential_expression(model, idx1=first, n_samples=2, n_bootstrap=5)
            assert np.isfinite(table[f"{scale_of(table).name}_mean"]).all(), "effects are not finite"
            assert not table["is_de_fdr"].all(), "two halves of the cells differ in every gene"
        if "counts" in model.support().values() or not model.support():
            predictive_checks(model, n_samples=2)
    if hasattr(adata, "obs"):
        assert adata.obs.equals(before.obs), "obs was changed"
        assert set(adata.obsm) == set(before.obsm), "obsm was changed"
        assert set(adata.uns) == set(before.uns), "uns was changed"


#: Every check, in the order in which they run.
CHECKS: tuple[Callable[[Case], None], ...] = (
    signatures_agree,
    every_site_is_guided,
    runs_validated_without_warning,
    global_state_is_untouched,
    models_are_independent,
    same_seed_same_weights,
    save_and_load,
    order_and_batch_size_do_not_matter,
    minibatch_loss_is_unbiased,
    fit_lowers_the_loss,
    categories_live_in_tables,
    several_draws_at_once,
    surgery_keeps_the_reference,
    tools_take_it,
)


def check_model(cls: type[Model], **options: Any) -> list[str]:
    """Run the contract on a model class, with made-up data that its fields ask for.

    Parameters
    ----------
    cls
        Subclass of `Model`.
    **options
        Of the model.

    Returns
    -------
    list of str
        Names of the checks, all of which passed.

    Raises
    ------
    ContractError
        Listing every check that failed and why.
    """
    case, failed = Case(cls, options), []
    for check in CHECKS:
        try:
            check(case)
        except Exception as error:
            first = (inspect.getdoc(check) or check.__name__).splitlines()[0]
            failed.append(f"{check.__name__} ({first}) {type(error).__name__}: {_short(error)}")
    if failed:
        raise ContractError(f"{cls.__name__} breaks the contract:\n- " + "\n- ".join(failed))
    return [check.__name__ for check in CHECKS]


def _short(error: Exception) -> str:
    """The first line of a message that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


def _whole(model: Model) -> dict[str, torch.Tensor]:
    return load_batch(
        model.datasets, {s: np.arange(d.n_obs) for s, d in model.datasets.items()}, model.device
    )


def _loss(model: Model, rows: dict[str, np.ndarray]) -> float:
    return float(model(load_batch(model.datasets, rows, model.device)))


def _mean_loss(model: Model) -> float:
    model.n_train = {s: d.n_obs for s, d in model.datasets.items()}
    model.eval()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        return float(np.mean([float(model(_whole(model))) for _ in range(5)]))


def _some_posterior(model: Model) -> dict[str, np.ndarray]:
    out: dict[str, np.ndarray] = {}
    for source in model.datasets:
        out |= model.posterior(sites_of_cells(model, source), source=source)
    return out


def _assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], message: str) -> None:
    different = [k for k in a if not torch.equal(a[k], b[k])]
    assert not different, f"{message}: {different[:3]}"


def _global_state() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 (the global state is what is looked at)
    return {
        "the parameter store": tuple(pyro.get_param_store().keys()),
        "torch's generator": torch.get_rng_state().numpy().tobytes(),
        "NumPy's generator": (name, np.asarray(keys).tobytes(), *rest),
        "Python's generator": hash(random.getstate()),
        "pyro.settings": tuple(sorted((k, repr(v)) for k, v in pyro.settings.get().items())),
        "torch's default dtype": torch.get_default_dtype(),
        "gradient mode": torch.is_grad_enabled(),
        "deterministic mode": torch.are_deterministic_algorithms_enabled(),
    }


__all__ = ["CHECKS", "Case", "ContractError", "check_model"]
