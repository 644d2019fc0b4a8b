"""Reading columns of AnnData: where a field lives, and how its values become codes or numbers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from pyrosc.data.errors import DataError, listed

if TYPE_CHECKING:
    from anndata import AnnData


def part(data: Any, modality: str | None, *, aligned: bool = True) -> AnnData:
    """The AnnData that holds a field: `data` itself, or a modality of a MuData.

    With `aligned`, a modality must have the cells of the MuData in their order.

    A MuData is known by its ``mod`` mapping, so that mudata need not be installed to read an AnnData.
    """
    modalities = getattr(data, "mod", None)
    if modality is None:
        return data
    if modalities is None:
        raise DataError(f"modality '{modality}' was asked for, but the data are an AnnData, not a MuData")
    if modality not in modalities:
        raise DataError(f"the MuData has no modality '{modality}'; it has {listed(modalities)}")
    found = modalities[modality]
    if aligned and not found.obs_names.equals(data.obs_names):  # rows are read by position
        raise DataError(
            f"modality '{modality}' has other cells, or the cells in another order, than the MuData; make "
            f"one of the shared cells in one order: names = mdata['{modality}'].obs_names.intersection(…), "
            "MuData({k: m[names].copy() for k, m in mdata.mod.items()})"
        )
    return found


def column(adata: Any, key: str) -> pd.Series:
    """Column of ``obs``; a missing one is an error that lists those there are."""
    if key not in adata.obs:
        raise DataError(f"obs has no column '{key}'; it has {listed(adata.obs.columns, 12) or 'no columns'}")
    return adata.obs[key]


def category_names(values: pd.Series) -> np.ndarray:
    """Names of the categories of each cell, as strings; None where missing.

    "1", 1 and 1.0 are one category: files turn the one into the other.

    Returns
    -------
    numpy.ndarray
        (n,) objects.
    """
    codes, uniques = pd.factorize(values, use_na_sentinel=True)
    names = np.array([_name(u) for u in uniques] + [None], dtype=object)
    return names[codes]  # code -1 picks the last, None


def _name(value: Any) -> str:
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        return str(int(value))
    return str(value)


def category_order(values: pd.Series) -> tuple[str, ...]:
    """Categories in use, in an order that does not depend on the order of the rows.

    That of a pandas Categorical where it has been given one, else sorted (numbers by value).
    """
    used = {n for n in pd.unique(category_names(values)) if n is not None}
    if isinstance(values.dtype, pd.CategoricalDtype):
        ordered = dict.fromkeys(_name(c) for c in values.dtype.categories)
        return tuple(n for n in ordered if n in used)
    return tuple(sorted(used, key=_natural))


def _natural(name: str) -> tuple[int, float, str]:
    try:
        value = float(name)
    except ValueError:
        return (1, 0.0, name)
    return (1, 0.0, name) if math.isnan(value) else (0, value, name)  # NaN has no place among numbers


def encode(names: np.ndarray, categories: tuple[str, ...]) -> np.ndarray:
    """Codes of category names; -1 where missing or unknown.

    Returns
    -------
    numpy.ndarray
        (n,) int64.
    """
    return pd.Categorical(names, categories=list(categories)).codes.astype(np.int64)


def numbers(adata: Any, key: str) -> np.ndarray:
    """Numeric column of ``obs`` as (n,) float64; text is an error that names it and its first cells."""
    values = column(adata, key)
    try:
        return values.to_numpy(dtype=np.float64, na_value=np.nan)  # pandas' own NA becomes NaN
    except (TypeError, ValueError):
        bad = pd.to_numeric(values.astype(object), errors="coerce").isna() & values.notna()
        example = values[bad].iloc[0] if bad.any() else values.iloc[0]
        raise DataError(
            f"obs['{key}'] must be numbers but holds {example!r}; pass it as a categorical covariate, or "
            "convert it"
        ) from None


def table(adata: Any, key: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Entry of ``obsm`` as (n, p) float64 with its column names.

    Raises
    ------
    DataError
        If there is none, or it is not two-dimensional numbers.
    """
    if key not in adata.obsm:
        raise DataError(f"obsm has no entry '{key}'; it has {listed(adata.obsm) or 'none'}")
    entry = adata.obsm[key]
    if isinstance(entry, pd.DataFrame):
        try:
            return entry.to_numpy(dtype=np.float64, na_value=np.nan), tuple(map(str, entry.columns))
        except (TypeError, ValueError):
            text = entry.columns[[not pd.api.types.is_numeric_dtype(d) for d in entry.dtypes]]
            raise DataError(f"obsm['{key}'] must be numbers; the columns {listed(text)} are not") from None
    dense = entry.toarray() if sp.issparse(entry) else np.asarray(entry)
    if dense.ndim != 2:
        raise DataError(f"obsm['{key}'] must have two dimensions, not {dense.ndim}")
    names = adata.uns.get(f"{key}_names")
    if names is None:
        names = [str(i) for i in range(dense.shape[1])]
    return dense.astype(np.float64), tuple(map(str, names))
