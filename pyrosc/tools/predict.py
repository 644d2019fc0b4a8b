"""Discrete labels of cells: the classes of a model's label site and their probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pyrosc.data.inputs import as_rows

if TYPE_CHECKING:
    from anndata import AnnData

    from pyrosc.models.base import Model


def predict(
    model: Model,
    adata: AnnData | None = None,
    indices: Sequence[int] | np.ndarray | None = None,
    *,
    soft: bool = False,
    batch_size: int = 512,
) -> pd.Series | pd.DataFrame:
    """Class of each cell by a model that has a discrete site per cell.

    Parameters
    ----------
    model
        A model whose attribute ``label`` names the site.
    adata, indices, batch_size
        As in `pyrosc.Model.posterior`.
    soft
        Probabilities in place of the likeliest class.

    Returns
    -------
    pandas.Series or pandas.DataFrame
        Index: names of the cells asked for. The likeliest class, as a Categorical; or (n, k) float
        probabilities, a column per class in the model's order.

    Raises
    ------
    ValueError
        If the model has no such site.
    """
    if model.label is None:
        raise ValueError(
            f"{type(model).__name__} has no site of labels to predict; a model that has one names it: "
            "label = '<site>' in the class"
        )
    dataset = model.dataset(adata)
    rows = as_rows(indices, dataset)
    found = model.posterior(model.label, adata=adata, indices=rows, batch_size=batch_size)[model.label]
    names = list(model.label_names())
    cells = dataset.obs_names[rows]
    probabilities = pd.DataFrame(model.calibrate(found), index=cells, columns=names)
    if soft:
        return probabilities
    return pd.Series(likeliest(probabilities), index=cells, name=model.label)


def likeliest(probabilities: pd.DataFrame) -> Any:
    """Class of highest probability of each row; missing where the probabilities are NaN."""
    values = probabilities.to_numpy()
    codes = np.where(np.isnan(values).any(1), -1, values.argmax(1))
    return pd.Categorical.from_codes(codes, categories=pd.Index(list(probabilities.columns)))
