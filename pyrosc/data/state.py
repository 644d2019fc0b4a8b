"""One field as registered: what the user named, read from the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pyrosc.data import encode as enc
from pyrosc.data.errors import DataError, listed
from pyrosc.data.proteins import read as read_proteins
from pyrosc.data.reads import are_reads
from pyrosc.data.schema import Field


@dataclass(frozen=True)
class FieldState:
    """One field as registered.

    Attributes
    ----------
    kind
        Kind of the field (see `Field`).
    keys
        What the user named: the layer (none for ``X``), columns of ``obs``, or the entry of ``obsm``.
    given
        False for an optional field that was left out.
    modality
        MuData modality, or None.
    categories
        One tuple of category names per key, in code order.
    names
        Names of the features: genes of counts, columns of a protein table or of values.
    loc, scale
        Mean and standard deviation of each continuous key; kept and re-used for other data.
    unlabeled
        Name that means unlabelled, for labels.
    of
        For a mask: the field that it masks; for a total: the counts that it sums.
    n_summed
        For a total: number of genes that were summed.
    open
        For a categorical: whether other data may have categories that are not known (see `Field`).
    missing
        Names of features that some data may lack (of a query): they are zero there, and not observed.
    withheld
        For labels: whether all cells are taken as unlabelled, whatever the column holds.
    matrix
        For proteins: whether they are in ``X`` or the layer `keys` of a modality, not in ``obsm``.
    by
        For proteins and their mask: the categorical field of the batches, whose panels may differ.
    silent
        For proteins and their mask: (category of `by`, then proteins) that were zero in all of its cells, and
        are taken as not measured there.
    means
        For counts: mean of each feature over the cells, to six digits; empty where not worked out.
    reads
        For counts of fragments: whether the values are reads, of which x are ceil(x/2) fragments. None for
        other fields.
    """

    kind: str
    keys: tuple[str, ...] = ()
    given: bool = True
    modality: str | None = None
    categories: tuple[tuple[str, ...], ...] = ()
    names: tuple[str, ...] = ()
    loc: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    unlabeled: str | None = None
    of: str | None = None
    n_summed: int = 0
    open: bool = False
    missing: tuple[str, ...] = ()
    withheld: bool = False
    matrix: bool = False
    by: str | None = None
    silent: tuple[tuple[str, ...], ...] = ()
    reads: bool | None = None
    means: tuple[float, ...] = ()

    @property
    def where(self) -> str:
        """How to write it in Python, for messages: ``obs['batch']``, ``layers['counts']``."""
        prefix = f"mod['{self.modality}']." if self.modality else ""
        if self.kind in ("counts", "total") or self.matrix:
            return prefix + (f"layers['{self.keys[0]}']" if self.keys else "X")
        slot = "obsm" if self.kind in ("protein", "values", "mask") else "obs"
        return prefix + f"{slot}[{listed(self.keys)}]"


def field_state(
    data: Any,
    name: str,
    spec: Field,
    keys: Mapping[str, Any],
    unlabeled: str | None,
    standardize: bool,
    owner: str,
) -> FieldState:
    """What a model remembers of a field, from the data and what was named; arguments as of `from_data`."""
    base = FieldState(spec.kind, modality=spec.modality, of=spec.of, open=spec.open)
    given = keys.get(spec.keyword) if spec.keyword else None
    if spec.kind in ("index", "mask", "total"):
        return base
    adata = enc.part(data, spec.modality, aligned=spec.kind != "protein")
    if spec.kind == "counts":
        if hasattr(adata, "mod"):
            first = next(iter(adata.mod))
            raise DataError(
                f"the counts of '{name}' are in a modality of the MuData (it has {listed(adata.mod)}): name "
                f"it, modalities={{'{name}': '{first}'}}"
            )
        names = tuple(map(str, adata.var_names))
        if given in (None, "X"):
            if adata.X is None:
                raise DataError(f"{owner} reads counts from X, which is empty; name a layer: layer='counts'")
            state, matrix = replace(base, names=names), adata.X
        elif given not in adata.layers:
            raise DataError(f"there is no layer '{given}'; layers are {listed(adata.layers, 12) or 'none'}")
        else:
            state, matrix = replace(base, keys=(str(given),), names=names), adata.layers[given]
        return state if spec.unit is None else replace(state, reads=are_reads(matrix, keys, state.where))
    columns = _columns(given, spec, name, owner)
    if spec.kind == "protein" and spec.modality is not None and not _in_obsm(adata, columns):
        state = replace(base, keys=() if columns in ((), ("X",)) else columns, matrix=True)
        return replace(state, names=read_proteins(data, state)[1])
    if not columns:
        if not spec.optional:
            hint = ""
            if spec.kind == "protein" and hasattr(data, "mod"):
                hint = f"; of a MuData name their modality, modalities={{'{name}': '{list(data.mod)[-1]}'}}"
            raise TypeError(
                f"{owner} needs {spec.keyword}= (its argument '{name}', a {spec.kind} field){hint}"
            )
        return replace(base, given=False)
    if spec.slot == "obsm":
        _, names = enc.table(adata, columns[0])
        return replace(base, keys=columns, names=names)
    if spec.kind in ("categorical", "categoricals"):
        orders = tuple(enc.category_order(enc.column(adata, c)) for c in columns)
        return replace(base, keys=columns, categories=orders)
    if spec.kind == "labels":
        order = enc.category_order(enc.column(adata, columns[0]))
        order = tuple(c for c in order if c != unlabeled)
        return replace(base, keys=columns, categories=(order,), unlabeled=unlabeled)
    values = np.stack([enc.numbers(adata, c) for c in columns], axis=1)
    if spec.kind == "size_factor" or not standardize:
        return replace(base, keys=columns, loc=(0.0,) * len(columns), scale=(1.0,) * len(columns))
    loc = np.nanmean(values, axis=0)
    scale = np.nanstd(values, axis=0)
    scale[~(scale > 0)] = 1.0  # a constant column stays zero; preflight warns about it
    return replace(base, keys=columns, loc=tuple(loc.tolist()), scale=tuple(scale.tolist()))


def _in_obsm(adata: Any, columns: tuple[str, ...]) -> bool:
    """Whether a name means an entry of ``obsm``: unless there is only a layer of that name."""
    return (
        bool(columns) and columns != ("X",) and (columns[0] in adata.obsm or columns[0] not in adata.layers)
    )


def _columns(given: Any, spec: Field, name: str, owner: str) -> tuple[str, ...]:
    if given is None:
        return ()
    if spec.several:
        if isinstance(given, str):
            raise TypeError(f"{owner}: {spec.keyword} takes a list of column names; write ['{given}']")
        columns = tuple(str(c) for c in given)
        if len(set(columns)) < len(columns):
            raise DataError(f"{owner}: {spec.keyword} names a column twice: {listed(columns)}")
        return columns
    if not isinstance(given, str):
        raise TypeError(f"{owner}: {spec.keyword} takes one name, not {given!r}")
    return (given,)
