"""Rows of a count matrix, wherever it is: CSR, CSC, dense, or on disk."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor


class Matrix:
    """Row access to an AnnData matrix; rows come out in the order asked for, dense float32.

    Parameters
    ----------
    source
        CSR or CSC (matrix or array), dense, an h5py or zarr array, or anndata's sparse data set on disk.
        In memory, other sparse formats are converted to CSR once, since minibatches are rows.
    take
        (g,) positions of the wanted columns, -1 for one that the source lacks, which is zero; None keeps all
        in their order.
    halve
        Whether the values are reads, two per fragment, that come out as fragments: x as ceil(x/2).

    Attributes
    ----------
    present
        (g,) bool, which columns the source has; None where it has all.
    sparse
        Whether rows are at hand as sparse ones.
    """

    def __init__(self, source: Any, take: np.ndarray | None = None, halve: bool = False) -> None:
        self.halve = halve
        n_columns = source.shape[1] if take is None else len(take)
        self.shape: tuple[int, int] = (int(source.shape[0]), int(n_columns))
        self.present: np.ndarray | None = None
        if take is not None and (take < 0).any():
            self.present = take >= 0
            take = take[self.present]
        self._nonzeros = int(source.nnz) if sp.issparse(source) else None
        if sp.issparse(source) and source.format != "csr":
            if take is not None:  # columns first: fewer values to convert
                source, take = source.tocsc()[:, take], None
            source = source.tocsr()
        if isinstance(source, np.matrix):
            source = np.asarray(source)
        self._source = source
        self._take = take
        self.sparse = sp.issparse(source)
        self.on_disk = not (sp.issparse(source) or isinstance(source, np.ndarray))

    def narrow(self) -> None:
        """Where few columns of a sparse matrix in memory are wanted, copy them once, for many readings."""
        take, source = self._take, self._source
        if take is not None and sp.issparse(source) and 4 * len(take) < source.shape[1]:
            self._source, self._take = source[:, take], None

    def rows(self, index: np.ndarray) -> np.ndarray:
        """Rows `index` as (len(index), g) float32, in the order of `index`."""
        if self._take is not None and isinstance(self._source, np.ndarray):
            part = self._source[np.ix_(index, self._take)].astype(np.float32)
            return self._padded(self._in_units(part))
        part = self._in_units(self._read(index))
        if sp.issparse(part):
            if self._take is not None:
                part = part[:, self._take]
            if part.dtype != np.float32:
                part = part.astype(np.float32)
            return self._padded(part).toarray() if self.present is not None else part.toarray()
        out = np.asarray(part, dtype=np.float32)
        return self._padded(out if self._take is None else np.ascontiguousarray(out[:, self._take]))

    def sparse_rows(self, index: np.ndarray) -> sp.csr_matrix:
        """Rows `index` as CSR, in the order of `index`."""
        part = sp.csr_matrix(self._in_units(self._read(index)))
        return self._padded(part if self._take is None else part[:, self._take])

    def tensor(self, index: np.ndarray) -> Tensor:
        """Rows `index` as `rows` gives them; where they are at hand as `sparse` ones, `rows_of` has those."""
        if not self.sparse:
            return torch.from_numpy(self.rows(index))
        sparse = self.sparse_rows(index).astype(np.float32, copy=False)
        out = torch.from_numpy(sparse.toarray())
        # not of what is made from the tensor, nor after it was written to
        out._csr_rows = sparse, out._version  # type: ignore[attr-defined]
        return out

    def _padded(self, block: Any) -> Any:
        """Rows with columns of zeros where the source lacks some."""
        if self.present is None:
            return block
        at, shape = np.flatnonzero(self.present), (block.shape[0], len(self.present))
        if sp.issparse(block):
            block = block.tocsr()
            return sp.csr_matrix((block.data, at[block.indices], block.indptr), shape)
        out = np.zeros(shape, block.dtype)
        out[:, at] = block
        return out

    def _read(self, index: np.ndarray) -> Any:
        if not self.on_disk:
            return self._source[index]
        # files are read in increasing order without repeats, and put back in the order asked for
        order, back = np.unique(index, return_inverse=True)
        if len(order) and order[-1] - order[0] + 1 == len(order):
            part = self._source[int(order[0]) : int(order[-1]) + 1]
        else:
            part = self._source[order]
        return part if np.array_equal(order, index) else part[back]

    def _in_units(self, block: Any) -> Any:
        """Values as they are, or fragments of reads; what is no count stays, for `preflight` to find."""
        if not self.halve:
            return block
        values = block.data if sp.issparse(block) else np.asarray(block)
        halved = np.ceil(values / 2).astype(values.dtype)
        with np.errstate(invalid="ignore"):
            whole = (values >= 0) & (values == np.floor(values))
        found = halved if whole.all() else np.where(whole, halved, values)
        if not sp.issparse(block):
            return found
        block = block.copy()
        block.data = found
        return block

    def nonzeros(self) -> int | None:
        """Number of stored values in memory; None where counting would read the whole file."""
        if self.on_disk:
            return None
        return int(np.count_nonzero(self._source)) if self._nonzeros is None else self._nonzeros

    def row_sums(self) -> np.ndarray:
        """Sum of each row's wanted columns, (n,) float64."""
        sums = np.zeros(self.shape[0])
        for start, block in self.chunks():
            sums[start : start + block.shape[0]] = np.asarray(block.sum(axis=1, dtype=np.float64)).ravel()
        return sums

    def fingerprint(self, n_rows: int = 64) -> dict[str, Any]:
        """Shape, non-zeros and checksum of evenly spaced rows: tells whether the matrix was changed."""
        n = self.shape[0]
        index = np.unique(np.linspace(0, max(n - 1, 0), min(n, n_rows)).astype(np.int64))
        rows = self.rows(index) if n else np.zeros((0, self.shape[1]), np.float32)
        return {
            "shape": list(self.shape),
            "nonzeros": self.nonzeros(),
            "checksum": zlib.crc32(np.ascontiguousarray(rows).tobytes()),
            "sum": float(rows.sum(dtype=np.float64)),
        }

    def chunks(self, size: int = 4096) -> Iterator[tuple[int, Any]]:
        """Consecutive blocks of rows as (first row, CSR or dense block)."""
        for start in range(0, self.shape[0], size):
            block = self._in_units(self._source[start : start + size])
            if self._take is not None:
                block = block[:, self._take]
            yield start, self._padded(block if sp.issparse(block) else np.asarray(block))


def rows_of(x: Tensor) -> sp.csr_matrix | None:
    """The sparse rows that a tensor of counts was made from, with each value that is not zero once, in order.

    None if they are not known.
    """
    rows, version = getattr(x, "_csr_rows", (None, 0))
    if rows is None or version != x._version:
        return None
    rows.sum_duplicates()
    rows.eliminate_zeros()
    found: sp.csr_matrix = rows
    return found


@dataclass
class CountSummary:
    """One pass over a matrix: totals, and how many values are not counts.

    Attributes
    ----------
    cell_sums, gene_sums
        (n,) and (g,) float64.
    n_values
        Non-zero values (the stored ones, for a sparse matrix).
    n_negative, n_nonfinite, n_fractional
        How many are negative, NaN or infinite, not whole.
    examples
        First offender of each sort as (row, column, value).
    all_even
        Whether every non-zero value is even, as of insertion counts of ATAC.
    """

    cell_sums: np.ndarray
    gene_sums: np.ndarray
    n_values: int
    n_negative: int
    n_nonfinite: int
    n_fractional: int
    examples: dict[str, tuple[int, int, float]]
    all_even: bool

    @property
    def are_counts(self) -> bool:
        """Whether all values are finite, whole and not negative."""
        return not (self.n_negative or self.n_nonfinite or self.n_fractional)


def summarize(matrix: Matrix) -> CountSummary:
    """Summary of a matrix in one pass, a block of rows at a time."""
    cell_sums = np.zeros(matrix.shape[0])
    gene_sums = np.zeros(matrix.shape[1])
    counts = dict.fromkeys(("negative", "nonfinite", "fractional"), 0)
    examples: dict[str, tuple[int, int, float]] = {}
    n_values, all_even = 0, True
    for start, block in matrix.chunks():
        values = block.data if sp.issparse(block) else block.ravel()
        n_values += values.size if sp.issparse(block) else int(np.count_nonzero(values))
        stop = start + block.shape[0]
        with np.errstate(invalid="ignore"):  # infinite values are counted below
            cell_sums[start:stop] = np.asarray(block.sum(axis=1, dtype=np.float64)).ravel()
            gene_sums += np.asarray(block.sum(axis=0, dtype=np.float64)).ravel()
            all_even = all_even and bool(np.all(np.mod(values, 2) == 0))
        if values.dtype.kind in "ub":
            bad = {}
        elif values.dtype.kind == "i":
            bad = {"negative": values < 0}
        else:
            finite = np.isfinite(values)
            bad = {
                "nonfinite": ~finite,
                "negative": values < 0,
                "fractional": finite & (values != np.floor(values)),
            }
        for kind, flags in bad.items():
            if n := int(np.count_nonzero(flags)):
                counts[kind] += n
                if kind not in examples:
                    examples[kind] = _locate(block, int(np.argmax(flags)), start)
    return CountSummary(
        cell_sums,
        gene_sums,
        n_values,
        counts["negative"],
        counts["nonfinite"],
        counts["fractional"],
        examples,
        all_even,
    )


def _locate(block: Any, position: int, start: int) -> tuple[int, int, float]:
    if sp.issparse(block):
        row = int(np.searchsorted(block.indptr, position, side="right")) - 1
        return start + row, int(block.indices[position]), float(block.data[position])
    row, col = divmod(position, block.shape[1])
    return start + row, col, float(block[row, col])
