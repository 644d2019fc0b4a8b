"""Models of the same cells, compared by what they say of cells that did not train them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from pyrosc.data import MAIN
from pyrosc.data.errors import listed, one_of
from pyrosc.data.inputs import as_rows
from pyrosc.infer.handlers import is_observed
from pyrosc.infer.structure import prototype

if TYPE_CHECKING:
    from pyrosc.models.base import Model

#: Draws per cell by measure.
_DRAWS = {"elbo": 25, "marginal_ll": 500}


def compare(
    models: Mapping[str, Model] | Sequence[Model],
    *,
    indices: Sequence[int] | np.ndarray | None = None,
    measure: Literal["elbo", "marginal_ll"] = "elbo",
    n_samples: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Held-out ELBO or log-likelihood of several models on the same cells, with standard errors.

    Cells differ much more than models do, so that the difference between two models is known better than
    either value: its standard error is that of the cells' differences.

    Parameters
    ----------
    models
        Trained models of the same data by name, or a list of them (named by class).
    indices
        Rows of the registered data that trained none of them; default the cells that all held out.
    measure
        ``"elbo"``; or ``"marginal_ll"``, which is free of the guide's gap and slower.
    n_samples
        Draws per cell; default 25 for the ELBO, 500 for the log-likelihood.
    seed
        Of the draws, the same for all models.

    Returns
    -------
    pandas.DataFrame
        A row per model, best first: the measure and ``se`` (nats per cell, higher is better), ``difference``
        from the best and ``difference_se`` (of paired cells), ``better`` (share of the cells for which it
        beats the best), ``cells``, ``parameters``, ``seconds`` of the fit (NaN
        for a converted model).

    Raises
    ------
    ValueError
        If the models are not comparable: untrained, without data, of other cells or genes, of other
        observed sites, or with other held-out cells.

    Examples
    --------
    >>> import pyrosc
    >>> adata = pyrosc.simulate.scvi(60, 20, seed=0).adata
    >>> makers = {k: pyrosc.SCVI.from_anndata(adata, gene_likelihood=k) for k in ("nb", "poisson")}
    >>> fitted = {k: m.fit(1, progress=False) for k, m in makers.items()}
    >>> sorted(compare(fitted).index)
    ['nb', 'poisson']
    """
    one_of("measure", measure, _DRAWS)
    named = dict(models) if isinstance(models, Mapping) else _by_class(models)
    if len(named) < 2:
        raise ValueError("compare takes two models or more")
    _check(named)
    rows = _held_out(named, indices)
    draws = _DRAWS[measure] if n_samples is None else n_samples
    values = {}
    for name, model in named.items():
        method = model.get_elbo if measure == "elbo" else model.get_marginal_ll
        values[name] = np.asarray(method(indices=rows, n_samples=draws, per_cell=True, seed=seed), np.float64)
    order = sorted(values, key=lambda name: -values[name].mean())
    best, root = values[order[0]], np.sqrt(len(rows))
    table = {}
    for name in order:
        own, model = values[name], named[name]
        table[name] = {
            measure: own.mean(),
            "se": own.std(ddof=1) / root,
            "difference": (own - best).mean(),
            "difference_se": (own - best).std(ddof=1) / root,
            "better": (own > best).mean(),
            "cells": len(rows),
            "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "seconds": np.nan if model.history is None else float(model.history["seconds"].iloc[-1]),
        }
    found = pd.DataFrame.from_dict(table, orient="index")
    return found.astype({"cells": int, "parameters": int})


def _by_class(models: Sequence[Model]) -> dict[str, Model]:
    """Names of classes, numbered where one occurs more than once."""
    names = [type(m).__name__ for m in models]
    seen: dict[str, int] = {}
    out = {}
    for name, model in zip(names, models, strict=True):
        seen[name] = seen.get(name, 0) + 1
        out[name if names.count(name) == 1 else f"{name} {seen[name]}"] = model
    return out


def _check(models: Mapping[str, Model]) -> None:
    """That the models are trained, and speak of the same numbers."""
    for name, model in models.items():
        if list(model.registries) != [MAIN]:
            raise ValueError(f"{name} reads several data sets; compare takes models of one")
        if not model.trained:
            raise ValueError(f"{name} is not trained; call fit() first")
        model.dataset()  # has data, and they are those it was made with
        if model.per_cell_guide or not model.split or not len(model.validation_indices):
            raise ValueError(f"{name} was trained on all cells; there is no held-out one to compare by")
    first, *others = models
    for name in others:
        for what, get in _SAME.items():
            one, two = get(models[first]), get(models[name])
            if one != two:
                raise ValueError(
                    f"{first} and {name} differ in {what}, so that their log-likelihoods are of different "
                    "things" + (f": {listed(one)} and {listed(two)}" if len(one) + len(two) < 20 else "")
                )


def _observed(model: Model) -> list[str]:
    """What the likelihood is of: where the observed numbers are, and whether they are counts."""
    trace: Any = prototype(model)
    fields = model.registry.fields
    found = []
    for name, site in trace.nodes.items():
        if is_observed(site):
            kind = model.support().get(name, "counts") if name in fields else ""
            where = str(fields[name].where) if name in fields else f"site '{name}'"
            found.append(f"{where}{' as real numbers' if kind == 'real' else ''}")
    return sorted(found)


_SAME: dict[str, Any] = {
    "their cells": lambda model: list(model.dataset().obs_names),
    "their genes": lambda model: list(model.registry.var_names()),
    "what they observe": _observed,
}


def _held_out(models: Mapping[str, Model], indices: Any) -> np.ndarray:
    """Rows that trained none of the models."""
    first, *others = models
    if indices is None:
        rows = models[first].validation_indices
        for name in others:
            if not np.array_equal(rows, models[name].validation_indices):
                raise ValueError(
                    f"{first} and {name} held out different cells; fit both with the same seed= and "
                    "train_size=, or with validation_indices="
                )
        return rows
    rows = as_rows(indices, models[first].dataset())
    for name, model in models.items():
        if taught := len(np.intersect1d(rows, model.train_indices)):
            raise ValueError(f"{taught:,} of the {len(rows):,} cells trained {name}; name cells that did not")
    return rows


__all__ = ["compare"]
