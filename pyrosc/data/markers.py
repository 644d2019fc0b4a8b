"""Lists of marker genes: read from what users have, matched with the genes of the data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pyrosc.data.errors import DataError, listed, warn

Markers = Mapping[str, Iterable[str]] | pd.DataFrame | str | Path


def read_markers(source: Markers) -> dict[str, list[str]]:
    """Marker genes by cell type.

    Parameters
    ----------
    source
        Genes by type as a dict; a DataFrame of genes (index) × types (columns) with 1 where the gene marks
        the type, else 0; or the path of such a table as CSV, or with tabs (``.tsv``, ``.txt``), genes in its
        first column.

    Returns
    -------
    dict
        Genes by type, in the order given. A type without genes has an empty list.

    Raises
    ------
    DataError
        If it is no such thing, or names a gene or a type twice.
    FileNotFoundError
        If there is no such file.
    """
    if isinstance(source, (str, Path)):
        path = Path(source)
        table = pd.read_csv(path, sep="\t" if path.suffix in (".tsv", ".txt") else ",", index_col=0)
        return _from_table(table, str(path))
    if isinstance(source, pd.DataFrame):
        return _from_table(source, "the table of markers")
    if not isinstance(source, Mapping):
        raise DataError(
            "markers are a dict of genes by cell type, a DataFrame (genes × types, 0/1) or the path of a CSV "
            f"file; not {type(source).__name__}"
        )
    found = {}
    for kind, genes in source.items():
        if isinstance(genes, str):
            raise DataError(f"the markers of '{kind}' must be a list; write ['{genes}']")
        found[str(kind)] = list(dict.fromkeys(map(str, genes)))
    if len(found) < len(source):
        raise DataError("markers name a type twice (1 and '1' are one name)")
    return found


def _from_table(table: pd.DataFrame, what: str) -> dict[str, list[str]]:
    for axis, names in (("gene", table.index), ("type", table.columns)):
        if names.has_duplicates:
            raise DataError(f"{what} names a {axis} twice: {listed(names[names.duplicated()].unique())}")
    values = table.apply(pd.to_numeric, errors="coerce").to_numpy(dtype=float, na_value=np.nan)
    if not np.isin(values, (0.0, 1.0)).all():
        row, col = np.argwhere(~np.isin(values, (0.0, 1.0)))[0]
        raise DataError(
            f"{what} must hold 1 (marks the type) or 0; it holds {table.iloc[row, col]!r} for gene "
            f"'{table.index[row]}', type '{table.columns[col]}'"
        )
    genes = np.array([str(g) for g in table.index], dtype=object)
    return {str(kind): list(genes[values[:, i] == 1]) for i, kind in enumerate(table.columns)}


def match_markers(
    markers: Mapping[str, list[str]], genes: Iterable[Any], owner: str = "the model"
) -> dict[str, list[str]]:
    """The markers that the data have, by type.

    Parameters
    ----------
    markers
        As `read_markers` gives them.
    genes
        ``var_names`` of the data.
    owner
        Name of the model, for messages.

    Raises
    ------
    DataError
        If a type with markers keeps none of them.

    Warns
    -----
    DataWarning
        Naming the markers that are not in the data.
    """
    known = {str(g) for g in genes}
    kept = {kind: [g for g in names if g in known] for kind, names in markers.items()}
    absent = list(dict.fromkeys(g for names in markers.values() for g in names if g not in known))
    if not absent:
        return kept
    by_case = {g.casefold(): g for g in known}
    close = [f"'{g}' is there as '{by_case[g.casefold()]}'" for g in absent if g.casefold() in by_case]
    hint = f" ({', '.join(close[:3])})" if close else ""
    if bare := [kind for kind, names in markers.items() if names and not kept[kind]]:
        lost = [g for kind in bare for g in markers[kind]]
        raise DataError(
            f"{owner}: none of the markers of {listed(bare)} is in var_names: {listed(lost, 8)}{hint}. Genes "
            "are matched by name; check that markers and data use names of one kind (symbols or Ensembl ids)"
        )
    warn(f"{owner}: {len(absent):,} markers are not in var_names and are left out: {listed(absent, 8)}{hint}")
    return kept
