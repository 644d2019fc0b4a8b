"""Labels from a reference to a query through the latent space of any model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from pyrosc.data.encode import category_names, category_order, column
from pyrosc.data.errors import DataError, one_of
from pyrosc.tools.predict import likeliest

if TYPE_CHECKING:
    from anndata import AnnData

    from pyrosc.models.base import Model


def transfer_labels(
    model: Model,
    reference: AnnData,
    labels_key: str,
    query: AnnData | None = None,
    *,
    method: Literal["forest", "neighbors"] = "forest",
    n_neighbors: int = 15,
    n_samples: int = 10,
    unlabeled_category: str | None = None,
    soft: bool = False,
    batch_size: int = 512,
    seed: int = 0,
) -> pd.DataFrame:
    """Labels of query cells from those of reference cells, by a classifier of the latent space.

    The classifier learns from the posterior means of the reference's cells. Each query cell is classified at
    several draws from q(z | x), and the probabilities averaged, so that a cell whose place in the latent
    space is not certain has no certain label.

    Parameters
    ----------
    model
        Any model with a latent space, such as one that `pyrosc.surgery` made for the query.
    reference
        Cells with labels.
    labels_key
        Column of ``reference.obs`` with the labels; cells where it is missing are left out.
    query
        Cells to label; default those that the model was made with.
    method
        ``"forest"``: a random forest with balanced classes, as Gayoso et al. (2022) transfer labels;
        ``"neighbors"``: the share of each label among the nearest cells of the reference.
    n_neighbors
        Of ``"neighbors"``.
    n_samples
        Draws per query cell; 0 classifies the posterior mean.
    unlabeled_category
        Value of the labels that means unlabelled.
    soft
        Probabilities in place of labels.
    batch_size
        Cells at a time.
    seed
        Of the draws and the forest.

    Returns
    -------
    pandas.DataFrame
        Index: names of the query's cells. ``label``, a Categorical, and ``uncertainty``, one minus its
        probability; or with ``soft=True`` (n, k) probabilities, a column per label.

    Raises
    ------
    DataError
        If the column is missing, or has fewer than two labels.

    References
    ----------
    Gayoso et al. A Python library for probabilistic analysis of single-cell omics data. Nature Biotechnology
    40 (2022).
    """
    one_of("method", method, ("forest", "neighbors"))
    if n_samples < 0:
        raise ValueError(f"n_samples is 0 or more, not {n_samples}")
    names = category_names(column(reference, labels_key))
    order = [c for c in category_order(reference.obs[labels_key]) if c != unlabeled_category]
    known = np.flatnonzero(np.isin(names.astype(object), np.array(order, dtype=object)))
    if len(order) < 2:
        raise DataError(f"obs['{labels_key}'] of the reference has {len(order)} labels; two are needed")
    space: dict[str, Any] = {"batch_size": batch_size, "seed": seed}
    at = model.posterior(model.latent, adata=reference, indices=known, **space)[model.latent]
    codes = pd.Categorical(names[known], categories=order).codes
    classifier = _classifier(method, min(n_neighbors, len(known)), seed).fit(_flat(at), codes)
    space |= {"n_samples": n_samples, "reduce": None if n_samples else "mean"}
    found = model.posterior(model.latent, adata=query, **space)[model.latent]
    draws = found if n_samples else found[None]
    probabilities = np.mean([classifier.predict_proba(_flat(draw)) for draw in draws], 0)
    cells = model.dataset(query).obs_names
    table = pd.DataFrame(probabilities, index=cells, columns=order)
    if soft:
        return table
    return pd.DataFrame({"label": likeliest(table), "uncertainty": 1 - probabilities.max(1)}, index=cells)


def _classifier(method: str, n_neighbors: int, seed: int) -> Any:
    if method == "neighbors":
        from sklearn.neighbors import KNeighborsClassifier

        return KNeighborsClassifier(n_neighbors)
    from sklearn.ensemble import RandomForestClassifier

    return RandomForestClassifier(class_weight="balanced_subsample", random_state=seed)


def _flat(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), -1)
