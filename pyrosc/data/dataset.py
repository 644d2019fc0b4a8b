"""AnnData columns encoded once by a registry; minibatches come out as tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrosc.data import encode as enc
from pyrosc.data import proteins
from pyrosc.data.errors import DataError, listed, warn
from pyrosc.data.matrix import CountSummary, Matrix, summarize
from pyrosc.data.registry import FieldState, Registry


class Dataset:
    """Cells of an AnnData (or MuData) as a registry describes them.

    Columns are encoded once, at construction; counts stay CSR or on disk and are read a minibatch at a
    time. Genes are matched by name: in another order they are re-ordered, extra ones are left out.

    Parameters
    ----------
    data
        AnnData or MuData.
    registry
        What the model was registered with.
    owner
        Name of the model, for messages.

    Attributes
    ----------
    present
        By counts field, which of the model's genes the data have, (g,) bool; of fields that lack some.

    Raises
    ------
    DataError
        If a column, gene or category does not fit the registry; the message names it.
    """

    def __init__(self, data: Any, registry: Registry, owner: str = "the model") -> None:
        self.registry = registry
        self.data = data
        self.n_obs = int(data.n_obs)
        self.obs_names = data.obs_names
        self.owner = owner
        self._columns: dict[str, np.ndarray] = {}
        self._read: dict[str, np.ndarray] = {}
        self.matrices: dict[str, Matrix] = {}
        self._summaries: dict[str, CountSummary] = {}
        for name, state in registry.fields.items():
            if state.kind == "counts":
                self.matrices[name] = _matrix(data, name, state)
                self.matrices[name].narrow()
            else:
                self._columns[name] = self._encode(data, name, state)
        self._read.clear()
        self._fingerprints = {n: m.fingerprint() for n, m in self.matrices.items()}
        self.present = {
            n: torch.from_numpy(m.present) for n, m in self.matrices.items() if m.present is not None
        }

    def __len__(self) -> int:
        return self.n_obs

    def __getitem__(self, index: np.ndarray) -> dict[str, Tensor]:
        """Tensors of the cells `index` (m,), in that order, by argument name of the model."""
        out = self.columns(index)
        for name, matrix in self.matrices.items():
            out[name] = matrix.tensor(index)
        return {n: out[n] for n in self.registry.fields}

    def columns(self, index: np.ndarray) -> dict[str, Tensor]:
        """Tensors of all fields but the counts."""
        return {n: torch.from_numpy(v[index]) for n, v in self._columns.items()}

    @property
    def on_disk(self) -> bool:
        """Whether some counts are read from a file at each minibatch."""
        return any(m.on_disk for m in self.matrices.values())

    def codes(self, name: str) -> np.ndarray:
        """Encoded column of a field: (n,) or (n, k)."""
        return self._columns[name]

    def summary(self, name: str | None = None) -> CountSummary:
        """Totals of a count matrix (the first by default), computed once."""
        name = name or next(iter(self.matrices))
        if name not in self._summaries:
            self._summaries[name] = summarize(self.matrices[name])
        return self._summaries[name]

    def gene_sums(self) -> dict[str, np.ndarray]:
        """Sums over the cells of each count matrix, (g,) float64 by field."""
        return {name: self.summary(name).gene_sums for name in self.matrices}

    def fingerprints(self) -> dict[str, dict[str, Any]]:
        """Fingerprint of each count matrix as it was when this data set was made."""
        return self._fingerprints

    def verify(self) -> None:
        """Raise if a matrix was changed since this data set was made.

        Raises
        ------
        DataError
            Naming the matrix, what it was and what it is now.
        """
        for name, was in self._fingerprints.items():
            state = self.registry.fields[name]
            now = _matrix(self.data, name, state).fingerprint()
            if now != was:
                raise DataError(
                    f"{state.where} has changed since {self.owner} was made from it (sum over the sampled "
                    f"cells {was['sum']:,.6g} then, {now['sum']:,.6g} now). Functions such as "
                    "sc.pp.normalize_total and sc.pp.log1p change it in place: keep the counts in a layer "
                    "first, adata.layers['counts'] = adata.X.copy(), and make the model with "
                    "layer='counts'"
                )

    def _encode(self, data: Any, name: str, state: FieldState) -> np.ndarray:
        n, kind = self.n_obs, state.kind
        if kind == "index":
            return self._rows_of_registered(data)
        if kind == "total":
            return _source(data, state).row_sums().astype(np.float32)
        if not state.given:
            return _absent(kind, n)
        if kind in ("protein", "mask"):
            values = self._proteins(data, name if kind == "protein" else state.of or "")
            if kind == "mask":
                return ~np.isnan(values)
            return np.where(np.isnan(values), np.float32(0), values) if self._masked(name) else values
        adata = enc.part(data, state.modality)
        if kind in ("categorical", "categoricals"):
            codes = [
                _known_codes(adata, key, categories, self.owner, state.open)
                for key, categories in zip(state.keys, state.categories, strict=True)
            ]
            return codes[0] if kind == "categorical" else np.stack(codes, axis=1)
        if kind == "labels":
            if state.withheld or state.keys[0] not in adata.obs:  # query data need no labels
                return np.full(n, -1, np.int64)
            return enc.encode(enc.category_names(adata.obs[state.keys[0]]), state.categories[0])
        if kind == "values":
            return _table(adata, state)
        raw = np.stack([enc.numbers(adata, key) for key in state.keys], axis=1)
        values = ((raw - np.array(state.loc)) / np.array(state.scale)).astype(np.float32)
        return values if kind == "continuouses" else values[:, 0]

    def _proteins(self, data: Any, name: str) -> np.ndarray:
        """(n, p) float32 with NaN where not measured, read once for a field and its mask."""
        if name not in self._read:
            fields = self.registry.fields
            state = fields[name]
            values = proteins.matched(data, state, self.owner, self._masked(name))
            if state.silent:
                values = proteins.without_silent(values, state, proteins.batches_of(data, state, fields))
            self._read[name] = values.astype(np.float32)
        return self._read[name]

    def _masked(self, name: str) -> bool:
        """Whether the model is told which proteins of a field were measured."""
        return any(s.kind == "mask" and s.of == name for s in self.registry.fields.values())

    def _rows_of_registered(self, data: Any) -> np.ndarray:
        known = {name: i for i, name in enumerate(self.registry.obs_names or ())}
        rows = np.array([known.get(str(name), -1) for name in data.obs_names], dtype=np.int64)
        if (rows < 0).any():
            raise DataError(
                f"{self.owner} has parameters of its own for each cell it was made with; it knows nothing of "
                f"{listed(data.obs_names[rows < 0])}. Make a new model for these cells"
            )
        return rows


def _absent(kind: str, n: int) -> np.ndarray:
    if kind == "categoricals":
        return np.zeros((n, 0), np.int64)
    if kind in ("continuouses", "protein", "values"):
        return np.zeros((n, 0), np.float32)
    if kind == "mask":
        return np.zeros((n, 0), bool)
    if kind == "size_factor":
        return np.ones(n, np.float32)
    if kind == "continuous":
        return np.zeros(n, np.float32)
    return np.full(n, -1 if kind == "labels" else 0, np.int64)


def _known_codes(
    adata: Any, key: str, categories: tuple[str, ...], owner: str, unseen_too: bool
) -> np.ndarray:
    names = enc.category_names(enc.column(adata, key))
    codes = enc.encode(names, categories)
    if (codes >= 0).all():
        return codes
    bad = codes < 0
    missing = np.array([n is None for n in names])
    if missing.any():
        raise DataError(
            f"obs['{key}'] is missing for {int(missing.sum()):,} cells (first: "
            f"{listed(adata.obs_names[missing], 3)}); fill it in or leave these cells out"
        )
    unseen = sorted(set(names[bad]))
    if unseen_too:
        warn(
            f"obs['{key}'] has categories that {owner} was not made with: {listed(unseen)}, in "
            f"{int(bad.sum()):,} cells; they are predicted from the prior over categories"
        )
        return np.where(bad, len(categories), codes)
    raise DataError(
        f"obs['{key}'] has categories that {owner} was not made with: {listed(unseen)}, in "
        f"{int(bad.sum()):,} cells (first: {listed(adata.obs_names[bad], 3)}). It knows "
        f"{listed(categories)}. Leave these cells out or train a model that includes them"
    )


def _table(adata: Any, state: FieldState) -> np.ndarray:
    values, names = enc.table(adata, state.keys[0])
    if names != state.names:
        position = {n: i for i, n in enumerate(names)}
        absent = [n for n in state.names if n not in position]
        if absent:
            raise DataError(f"obsm['{state.keys[0]}'] lacks the columns {listed(absent)}")
        values = values[:, [position[n] for n in state.names]]
    return values.astype(np.float32)


def _matrix(data: Any, name: str, state: FieldState) -> Matrix:
    return _source(data, state, _take(enc.part(data, state.modality), state))


def _source(data: Any, state: FieldState, take: np.ndarray | None = None) -> Matrix:
    """The matrix that counts, or totals, are read from."""
    adata = enc.part(data, state.modality)
    if state.keys and state.keys[0] not in adata.layers:
        raise DataError(f"there is no layer '{state.keys[0]}'; layers are {listed(adata.layers) or 'none'}")
    source = adata.layers[state.keys[0]] if state.keys else adata.X
    if source is None:
        raise DataError(f"{state.where} is empty")
    return Matrix(source, take, halve=bool(state.reads))


def _take(adata: Any, state: FieldState) -> np.ndarray | None:
    names = tuple(map(str, adata.var_names))
    if names == state.names:
        return None
    if len(set(names)) < len(names):
        twice = adata.var_names[adata.var_names.duplicated()]
        raise DataError(f"var_names are not unique ({listed(twice)}); call adata.var_names_make_unique()")
    position = {n: i for i, n in enumerate(names)}
    may_lack = set(state.missing)
    absent = [n for n in state.names if n not in position and n not in may_lack]
    if absent:
        raise DataError(
            f"the data lack {len(absent):,} of the {len(state.names):,} genes of the model: "
            f"{listed(absent)}. Genes are matched by var_names; check that they are of the same kind "
            "(symbols or Ensembl ids)"
        )
    return np.array([position.get(n, -1) for n in state.names], dtype=np.int64)
