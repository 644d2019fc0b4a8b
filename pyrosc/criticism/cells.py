"""Which cells a check looks at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pyrosc.data.inputs import as_rows
from pyrosc.data.schema import MAIN

if TYPE_CHECKING:
    from anndata import AnnData

    from pyrosc.data import Dataset
    from pyrosc.models.base import Model


class Cells(NamedTuple):
    """Cells of a data set.

    Attributes
    ----------
    dataset
        The data set.
    rows
        Row numbers, (n,).
    held_out
        Whether the model is known not to have been trained on any of them.
    """

    dataset: Dataset
    rows: np.ndarray
    held_out: bool


def cells_to_check(
    model: Model,
    adata: AnnData | None,
    indices: Any,
    max_cells: int | None,
    seed: int,
    source: str = MAIN,
    *,
    held_out: bool = True,
) -> Cells:
    """The cells asked for; by default those that were held out where there are some, else all.

    Parameters
    ----------
    model
        The model.
    adata
        Other cells; default the registered ones.
    indices
        Positions or a mask.
    max_cells
        Of more cells than this, as many are drawn at random; None for no limit.
    seed
        Of that choice.
    source
        Data source.
    held_out
        False takes all cells by default.

    Raises
    ------
    ValueError
        If there is no cell.
    """
    if max_cells is not None and max_cells < 1:
        raise ValueError(f"max_cells is at least 1; not {max_cells}")
    dataset = model.dataset(adata, source)
    registered = dataset is model.datasets.get(source)
    train, validation = model.split.get(source, (np.arange(0), np.arange(0)))
    if indices is None and registered and held_out and len(validation):
        rows = validation
    else:
        rows = as_rows(indices, dataset)
    if not len(rows):
        raise ValueError("there is no cell to check")
    if max_cells is not None and len(rows) > max_cells:
        rows = np.sort(np.random.default_rng(seed).choice(rows, max_cells, replace=False))
    unseen = not registered or (len(train) > 0 and not np.isin(rows, train).any())
    return Cells(dataset, rows, bool(unseen))
