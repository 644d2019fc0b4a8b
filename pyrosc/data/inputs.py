"""Minibatches as a model takes them: rows of data sets, made-up cells, and what-if values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from torch import Tensor

from pyrosc.data.dataset import Dataset
from pyrosc.data.encode import category_names, encode
from pyrosc.data.errors import DataError, listed
from pyrosc.data.registry import Registry
from pyrosc.data.schema import MAIN


def rows_key(source: str) -> str:
    """Name under which a minibatch carries the rows of a source."""
    return "_rows" if source == MAIN else f"_rows_{source}"


def present_key(field: str) -> str:
    """Name under which a minibatch carries which genes of a counts field the data have."""
    return f"_present_{field}"


def load_batch(
    datasets: Mapping[str, Dataset], rows: Mapping[str, np.ndarray], device: torch.device
) -> dict[str, Tensor]:
    """Tensors of the cells `rows` of each source, and the rows themselves, on a device.

    To an accelerator counts travel sparse, since the copy is what costs.
    """
    batch: dict[str, Tensor] = {}
    for source, index in rows.items():
        dataset = datasets[source]
        if device.type == "cpu":
            batch |= dataset[index]
        else:
            batch |= {k: v.to(device, non_blocking=True) for k, v in dataset.columns(index).items()}
            for name, matrix in dataset.matrices.items():
                batch[name] = _dense_on(sp.csr_matrix(matrix.sparse_rows(index)), device)
        batch |= {present_key(name): which.to(device) for name, which in dataset.present.items()}
        batch[rows_key(source)] = torch.from_numpy(index).to(device)
    return batch


def _dense_on(rows: sp.csr_matrix, device: torch.device) -> Tensor:
    data = rows.data.astype(np.float32, copy=False)
    indptr, indices, values = (
        torch.from_numpy(a).to(device, non_blocking=True) for a in (rows.indptr, rows.indices, data)
    )
    # as coordinates: torch warns of its CSR tensors
    row = torch.repeat_interleave(
        torch.arange(rows.shape[0], device=device), indptr.diff(), output_size=rows.nnz
    )
    where = torch.stack([row, indices.long()])
    return torch.sparse_coo_tensor(where, values, rows.shape, check_invariants=False).to_dense()


def dummy_batch(registries: Mapping[str, Registry], device: torch.device, n: int = 2) -> dict[str, Tensor]:
    """A minibatch of made-up cells with the shapes and dtypes that the registries imply."""
    batch: dict[str, Tensor] = {}
    for source, registry in registries.items():
        for name, state in registry.fields.items():
            batch[name] = _dummy(registry, name, state.kind, n).to(device)
        batch[rows_key(source)] = (torch.arange(n) % max(registry.n_obs, 1)).to(device)
    return batch


def _dummy(registry: Registry, name: str, kind: str, n: int) -> Tensor:
    if kind in ("counts", "protein", "values"):
        return torch.ones(n, registry.n_vars(name))
    if kind == "mask":
        return torch.ones(n, registry.n_vars(name), dtype=torch.bool)
    if kind == "labels":
        return torch.full((n,), 0 if registry.given(name) else -1)
    if kind == "categoricals":
        return torch.zeros(n, len(registry.keys(name)), dtype=torch.int64)
    if kind == "continuouses":
        return torch.zeros(n, len(registry.keys(name)))
    if kind == "total":
        return torch.full((n,), float(registry.fields[name].n_summed))  # as if each count were one
    if kind in ("continuous", "size_factor"):
        return torch.full((n,), float(kind == "size_factor"))
    if kind == "index":
        return torch.arange(n) % max(registry.n_obs, 1)
    return torch.zeros(n, dtype=torch.int64)


def encode_do(registry: Registry, do: Mapping[str, Any] | None, n: int) -> dict[str, dict[int, Tensor]]:
    """What-if values of fields as {field: {column: (n,) tensor}}.

    Parameters
    ----------
    registry
        Registered fields.
    do
        Value by argument name, column name, or keyword's column: a category name or number for all cells,
        or one per cell. None is a category that is not known, of fields that are open to those.
    n
        Number of cells.

    Raises
    ------
    KeyError
        If a name is neither a field nor a registered column.
    DataError
        If a category is unknown.
    """
    out: dict[str, dict[int, Tensor]] = {}
    for name, value in (do or {}).items():
        field, position = _find(registry, name)
        state = registry.fields[field]
        if not state.given:
            raise DataError(f"'{field}' was not given when the model was made; there is nothing to set")
        values = np.broadcast_to(np.asarray(value, dtype=object), (n,))
        if state.kind in ("categorical", "categoricals", "labels"):
            categories = state.categories[position]
            codes = encode(category_names(pd.Series(values, dtype=object)), categories)
            if state.open:
                codes = np.where([v is None for v in values], len(categories), codes)
            if (codes < 0).any():
                bad = sorted({str(v) for v, c in zip(values, codes, strict=True) if c < 0})
                raise DataError(f"'{name}' has no category {listed(bad)}; it has {listed(categories, 20)}")
            column = torch.from_numpy(codes)
        elif state.kind in ("continuous", "continuouses", "size_factor"):
            raw = values.astype(np.float64)
            scaled = (raw - state.loc[position]) / state.scale[position]
            column = torch.from_numpy(scaled.astype(np.float32))
        else:
            raise KeyError(
                f"'{name}' is a {state.kind} field; only covariates, labels and size factors can be set"
            )
        out.setdefault(field, {})[position] = column
    return out


def as_if(transform_batch: str | Sequence[str] | None, do: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """What-if values of cells decoded as of a batch, or of several in turn; of their own for None."""
    if transform_batch is None:
        return [dict(do or {})]
    batches = [transform_batch] if isinstance(transform_batch, str) else list(transform_batch)
    if not batches:
        raise ValueError("transform_batch is empty; name a batch, or leave it out")
    if None in batches:
        raise ValueError("transform_batch names batches; leave it out for each cell's own")
    return [{**(do or {}), "batch": b} for b in batches]


def _find(registry: Registry, name: str) -> tuple[str, int]:
    for field, state in registry.fields.items():
        if name in state.keys and state.kind not in ("counts", "total"):
            return field, state.keys.index(name)
    if name in registry.fields:
        state = registry.fields[name]
        if len(state.keys) > 1:
            raise KeyError(f"'{name}' has several columns; name one of {listed(state.keys)}")
        return name, 0
    known = [n for n, s in registry.fields.items() if s.kind != "counts"]
    columns = [k for s in registry.fields.values() if s.kind != "counts" for k in s.keys]
    raise KeyError(
        f"there is no field or column '{name}'; fields are {listed(known, 20)}, columns {listed(columns, 20)}"
    )


def apply_do(
    batch: Mapping[str, Tensor], do: Mapping[str, Mapping[int, Tensor]], positions: np.ndarray
) -> dict[str, Tensor]:
    """The arguments of a minibatch with what-if values in place: `positions` index the values' rows."""
    out: dict[str, Tensor] = {}
    for field, columns in do.items():
        changed = batch[field].clone()
        for position, column in columns.items():
            here = column[torch.from_numpy(positions)].to(changed)
            if changed.ndim == 1:
                changed = here
            else:
                changed[:, position] = here
        out[field] = changed
    return out


def as_rows(indices: Sequence[int] | np.ndarray | None, dataset: Dataset) -> np.ndarray:
    """Row numbers from positions, a boolean mask or None (all)."""
    if indices is None:
        return np.arange(dataset.n_obs)
    index = np.asarray(indices)
    if index.dtype == bool:
        if index.shape != (dataset.n_obs,):
            raise ValueError(f"a mask needs one value per cell ({dataset.n_obs}), not {index.shape}")
        return np.flatnonzero(index)
    if index.size == 0:
        return np.zeros(0, np.int64)
    if index.dtype.kind not in "iu":
        raise TypeError("indices are positions or a boolean mask; for names use adata.obs_names.get_indexer")
    if index.min() < -dataset.n_obs or index.max() >= dataset.n_obs:
        raise IndexError(f"indices reach {index.max()}, but there are {dataset.n_obs} cells")
    return np.where(index < 0, index + dataset.n_obs, index).astype(np.int64)
