"""How a model is made from data: fields are looked up, checked and encoded, then the weights are drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch

from pyrosc.data import MAIN, Dataset, Registry, preflight
from pyrosc.data.genes import shared_genes
from pyrosc.data.reads import keywords_of
from pyrosc.models.build import reject_unknown

if TYPE_CHECKING:
    from anndata import AnnData

    from pyrosc.models.base import Model

M = TypeVar("M", bound="Model")


def make(
    cls: type[M],
    adatas: Mapping[str, AnnData],
    options: dict[str, Any],
    *,
    keys: Mapping[str, Mapping[str, Any]] | None,
    genes: Mapping[str, Sequence[str]] | Literal["shared"] | None,
    ignore_case: bool,
    unlabeled_category: str | None,
    standardize: bool,
    modalities: Mapping[str, str] | None,
    seed: int,
) -> M:
    """A model of a class for one or several data sets; arguments as of `Model.from_anndatas`.

    Parameters
    ----------
    options
        Where the fields are, and the options of the model.
    """
    fields = cls.fields(**options)
    sources = list(dict.fromkeys(f.source for f in fields.values()))
    if set(adatas) != set(sources):
        raise TypeError(f"{cls.__name__} reads the sources {sources}; got {sorted(adatas)}")
    keywords = keywords_of(fields)
    given = {k: v for k, v in options.items() if k in keywords}
    options = {k: v for k, v in options.items() if k not in keywords}
    reject_unknown(cls, options, keywords)
    if isinstance(genes, str) and genes != "shared":
        raise ValueError(f"genes is 'shared' or a list per source; got {genes!r}")
    if ignore_case and genes != "shared":
        raise ValueError("ignore_case= is of genes='shared'")
    registries = {}
    for source in sources:
        own = {n: f for n, f in fields.items() if f.source == source}
        mine = given if len(sources) == 1 else dict((keys or {}).get(source, {}))
        registries[source] = Registry.from_data(
            adatas[source],
            own,
            mine,
            unlabeled=unlabeled_category,
            standardize=standardize,
            modalities=modalities,
            owner=cls.__name__,
        )
    if genes == "shared":
        genes = shared_genes({s: r.var_names() for s, r in registries.items()}, ignore_case=ignore_case)
    for source, own_genes in (genes or {}).items():  # type: ignore[union-attr]  # no str any more
        registries[source] = registries[source].restrict(own_genes)
    datasets = {s: Dataset(adatas[s], r, cls.__name__) for s, r in registries.items()}
    registries = {
        s: r.with_fingerprints(datasets[s].fingerprints()).with_means(datasets[s].gene_sums())
        for s, r in registries.items()
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: M = cls(registries[MAIN] if sources == [MAIN] else registries, **options)
        model.datasets = datasets
        for dataset in datasets.values():
            preflight(dataset, model.support())
        model.setup()
        model.initialize(datasets[MAIN] if sources == [MAIN] else datasets)
    return model.eval()
