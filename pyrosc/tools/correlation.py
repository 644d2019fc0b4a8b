"""Correlations between features, of the same or of several modalities, without the noise of counting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyrosc.data.errors import listed, one_of, warn
from pyrosc.data.inputs import apply_do, as_if, as_rows, encode_do
from pyrosc.infer.elbo import plate_nesting
from pyrosc.infer.modes import evaluating
from pyrosc.infer.posterior import globals_of, site_value, traces
from pyrosc.infer.predictive import elementwise
from pyrosc.infer.structure import need_site
from pyrosc.tools.proteins import panels

if TYPE_CHECKING:
    from anndata import AnnData

    from pyrosc.models.base import Model


def feature_correlation(
    model: Model,
    adata: AnnData | None = None,
    indices: Sequence[int] | np.ndarray | None = None,
    *,
    features: Sequence[str] | None = None,
    method: Literal["spearman", "pearson"] = "spearman",
    transform_batch: str | Sequence[str] | None = None,
    library_size: float = 10_000.0,
    n_samples: int = 10,
    batch_size: int = 512,
    seed: int = 0,
) -> pd.DataFrame:
    """Correlations across cells of the features' expression, as the posterior has it.

    For each draw from the posterior, each cell's expression is drawn from the Gamma law behind its negative
    binomial counts: the variation between alike cells stays in, that of counting is out. Denoised means alone
    are functions of a few latent dimensions, and would all seem correlated (Gayoso et al. 2021). Of proteins
    the foreground counts, or 0 where the draw says background. The matrices of the draws are averaged.

    Parameters
    ----------
    model
        A model with sites of expression (its attributes ``expression`` or ``features``).
    adata, indices
        Other cells, and which of them; as in `pyrosc.Model.posterior`. Correlations within a type of cells,
        and over all, are different things.
    features
        Genes and proteins wanted, in this order; default all. Memory is cells × features. A name that several
        fields have is followed by that of the field: ``"CD14 (x)"`` the gene, ``"CD14 (y)"`` the protein.
    method
        ``"spearman"``, or ``"pearson"`` of log1p.
    transform_batch
        Decode the cells as if of this batch; several are averaged.
    library_size
        Counts per cell that the genes' shares are scaled to.
    n_samples
        Draws.
    batch_size, seed
        Cells at a time; seed of the draws.

    Returns
    -------
    pandas.DataFrame
        Features by features, float64; NaN for features that do not vary.

    References
    ----------
    Gayoso et al. Joint probabilistic modeling of single-cell multi-omic data with totalVI. Nature Methods 18
    (2021).
    """
    one_of("method", method, ("spearman", "pearson"))
    if n_samples < 1:
        raise ValueError(f"n_samples is at least 1; not {n_samples}")
    sites = dict(model.features) or {model.expression: _counts_field(model)}
    for site in sites:
        need_site(model, site, "correlations of features", "expression")
    names = _names(model, list(sites.values()))
    if features is None:
        chosen = np.arange(len(names))
    elif isinstance(features, str):
        raise TypeError(f"features takes a list; write ['{features}']")
    else:
        position = {n: i for i, n in enumerate(names)}
        if absent := [f for f in features if f not in position]:
            shared = [n for f in absent for n in names if n.startswith(f"{f} (")]
            hint = f"; several fields have some of these names: write {listed(shared)}" if shared else ""
            raise KeyError(f"the model has no features {listed(absent)}{hint}")
        chosen = np.array([position[f] for f in features], dtype=np.int64)
    dataset = model.dataset(adata)
    rows = as_rows(indices, dataset)
    if len(rows) < 3:
        raise ValueError(f"a correlation is over cells, and there are {len(rows)}")
    worlds = as_if(transform_batch, None)
    if transform_batch is None and not panels(model).all():
        warn(
            "the batches have different proteins, and those that a batch lacks are decoded here as if it "
            "had them: name batches that have the proteins asked for, transform_batch="
        )
    total = np.zeros((len(chosen), len(chosen)))
    for draw in range(n_samples):
        values = np.zeros((len(rows), len(chosen)), np.float32)
        for world in worlds:
            do = encode_do(model.registry, world, len(rows))
            for at, found in _draws(model, dataset, rows, sites, do, library_size, batch_size, seed + draw):
                values[at] += found[:, chosen] / len(worlds)
        total += _correlation(values, method)
    names = [names[i] for i in chosen]
    return pd.DataFrame(total / n_samples, index=names, columns=names)


def _names(model: Model, fields: Sequence[str]) -> list[str]:
    """Features of the fields, one after the other; where some share a name, followed by their field."""
    each = [list(model.registry.var_names(field)) for field in fields]
    times = Counter(name for names in each for name in set(names))
    return [
        f"{name} ({field})" if times[name] > 1 else name
        for field, names in zip(fields, each, strict=True)
        for name in names
    ]


def _counts_field(model: Model) -> str:
    return next(n for n, s in model.registry.fields.items() if s.kind == "counts")


def _draws(
    model: Model,
    dataset: Any,
    rows: np.ndarray,
    sites: Mapping[str, str],
    do: Mapping[str, Mapping[int, Tensor]],
    library_size: float,
    batch_size: int,
    seed: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """One draw of each cell's expression, (n, features), a minibatch at a time."""
    shared: dict[str, Tensor] | None = None
    with evaluating(model, seed):
        for at, batch in model.batches(dataset, rows, batch_size):
            guide, trace = traces(model, batch, 1, apply_do(batch, do, at), shared)
            shared = globals_of(guide) if shared is None else shared
            nodes: Any = trace.nodes
            parts = []
            for site, field in sites.items():
                counts = model.registry.fields[field].kind == "counts"
                if counts:
                    mean = (
                        site_value(nodes[site], 1, True, len(at), plate_nesting(model.elbo))[0] * library_size
                    )
                else:
                    mean = nodes["foreground_mean"]["value"] * torch.bernoulli(
                        nodes["foreground_probability"]["value"]
                    )
                parts.append(_with_spread(mean, nodes[field]["fn"] if field in nodes else None))
            yield at, torch.cat([p.reshape(len(at), -1) for p in parts], -1).cpu().numpy()


def _with_spread(mean: Tensor, law: Any) -> Tensor:
    """The Gamma law behind negative binomial counts of a mean; the mean itself for laws without."""
    base = elementwise(law)
    base = getattr(base, "base_dist", base)  # of a masked law
    theta = getattr(base, "inverse_dispersion", None)
    if theta is None:
        return mean
    theta = theta.expand_as(mean).clamp(min=1e-4, max=1e6)
    return torch.distributions.Gamma(theta, theta / mean.clamp(min=1e-12)).sample()


def _correlation(values: np.ndarray, method: str) -> np.ndarray:
    if method == "spearman":
        from scipy.stats import rankdata

        values = rankdata(values, axis=0)
    else:
        values = np.log1p(values.astype(np.float64))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.corrcoef(values, rowvar=False).reshape(values.shape[1], -1)
