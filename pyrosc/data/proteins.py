"""Protein counts: where they are read from, which were measured, and panels that differ between batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from pyrosc.data import encode as enc
from pyrosc.data.errors import DataError, listed, warn

if TYPE_CHECKING:
    from pyrosc.data.state import FieldState

#: Category of all cells, of models without a batch.
_ALL = "all"


def read(data: Any, state: FieldState) -> tuple[np.ndarray, tuple[str, ...]]:
    """The proteins of all cells as they are stored.

    Parameters
    ----------
    data
        AnnData or MuData; cells that a modality lacks have no proteins.
    state
        Of the protein field or its mask; its ``names`` do not matter.

    Returns
    -------
    tuple
        (n, p) float64 with NaN where not measured, and the p names.

    Raises
    ------
    DataError
        If there is no such entry, or it is not a table of numbers.
    """
    adata = enc.part(data, state.modality, aligned=False)
    if not state.matrix:
        values, names = enc.table(adata, state.keys[0])
    else:
        if state.keys and state.keys[0] not in adata.layers:
            raise DataError(
                f"modality '{state.modality}' has neither an obsm entry nor a layer '{state.keys[0]}'; "
                f"layers are {listed(adata.layers) or 'none'}, obsm entries {listed(adata.obsm) or 'none'}"
            )
        source = adata.layers[state.keys[0]] if state.keys else adata.X
        if source is None:
            raise DataError(f"{state.where} is empty")
        dense = source.toarray() if sp.issparse(source) else np.asarray(source)
        values, names = dense.astype(np.float64), tuple(map(str, adata.var_names))
    if len(set(names)) < len(names):
        twice = sorted({n for n in names if names.count(n) > 1})
        raise DataError(f"{state.where} names some proteins twice: {listed(twice)}")
    if adata is data or adata.obs_names.equals(data.obs_names):
        return values, names
    position = adata.obs_names.get_indexer(data.obs_names)
    if (position < 0).all():
        raise DataError(f"modality '{state.modality}' has none of the cells of the other modalities")
    return np.where(position[:, None] >= 0, values[position], np.nan), names


def matched(data: Any, state: FieldState, owner: str, masked: bool) -> np.ndarray:
    """The proteins of a registered field, for any cells: matched by name, NaN where not measured.

    Parameters
    ----------
    data
        AnnData or MuData. Proteins that it lacks, or all of them, were not measured in its cells.
    state
        Of the field.
    owner
        Name of the model, for messages.
    masked
        Whether the model knows which were measured; if not, it needs all of them.

    Returns
    -------
    numpy.ndarray
        (n, p) float64.
    """
    adata = enc.part(data, state.modality, aligned=False)
    if masked and not state.matrix and state.keys[0] not in adata.obsm:
        warn(f"the data have no {state.where}; their cells are taken as without proteins")
        return np.full((int(data.n_obs), len(state.names)), np.nan)
    values, names = read(data, state)
    if names != state.names:
        position = {n: i for i, n in enumerate(names)}
        absent = [n for n in state.names if n not in position]
        if absent and (not masked or len(absent) == len(state.names)):
            raise DataError(
                f"{state.where} lacks the columns {listed(absent)} that {owner} was made with; it has "
                f"{listed(names)}"
            )
        if absent:
            warn(
                f"{state.where} lacks {len(absent)} of the {len(state.names)} proteins of {owner} "
                f"({listed(absent)}); they are taken as not measured"
            )
        found = np.full((len(values), len(state.names)), np.nan)
        here = [i for i, n in enumerate(state.names) if n in position]
        found[:, here] = values[:, [position[state.names[i]] for i in here]]
        values = found
    return values


def without_silent(values: np.ndarray, state: FieldState, batches: np.ndarray) -> np.ndarray:
    """The same with NaN for proteins that were silent in all cells of a batch when registered.

    Parameters
    ----------
    values
        (n, p).
    state
        Of the field.
    batches
        (n,) name of each cell's batch.
    """
    position = {n: i for i, n in enumerate(state.names)}
    for category, *proteins in state.silent:
        columns = np.isin(np.arange(values.shape[1]), [position[p] for p in proteins])
        values[np.ix_(batches == category, columns)] = np.nan
    return values


def batches_of(data: Any, state: FieldState, states: Mapping[str, FieldState]) -> np.ndarray:
    """(n,) names of the batches that panels are told apart by; one for all cells without batches."""
    if state.by is None:
        return np.full(int(data.n_obs), _ALL, dtype=object)
    by = states[state.by]
    return enc.category_names(enc.column(enc.part(data, by.modality), by.keys[0]))


def panels(
    data: Any, states: Mapping[str, FieldState], before: Mapping[str, FieldState] | None = None
) -> dict[str, FieldState]:
    """States of the protein fields with the proteins that are zero in all cells of a batch.

    A protein that was stained for has background counts; zeros throughout stand for one that was not, and
    are announced as taken for that.

    Parameters
    ----------
    data
        AnnData or MuData.
    states
        States of all fields.
    before
        Those of the reference, whose batches are known already, for a query.
    """
    found = {}
    for name, state in states.items():
        if state.kind != "protein" or not state.given:
            continue
        batch = states.get("batch")
        by = "batch" if batch is not None and batch.given and batch.kind == "categorical" else None
        state = replace(state, by=by)
        known = set(before[by].categories[0]) if before and by else set[str]()
        adata = enc.part(data, state.modality, aligned=False)
        if before and (by is None or (not state.matrix and state.keys[0] not in adata.obsm)):
            found[name] = state
            continue
        values, names = read(data, state)
        batches = batches_of(data, state, states)
        silent = list(state.silent)
        for category in dict.fromkeys(b for b in batches if b is not None):
            if category in known:
                continue
            here = values[batches == category]
            measured = ~np.isnan(here)
            zero = measured.any(0) & ~((here != 0) & measured).any(0)
            proteins = [n for n, z in zip(names, zero, strict=True) if z and n in state.names]
            if proteins:
                silent.append((str(category), *proteins))
                where = "all cells" if by is None else f"all cells of '{category}' (obs['{batch.keys[0]}'])"  # type: ignore[union-attr]
                warn(
                    f"{state.where} is zero in {where} for {len(proteins)} of {len(names)} proteins "
                    f"({listed(proteins)}); they are taken as not measured there"
                )
        found[name] = replace(state, silent=tuple(silent))
    return found
