"""Covariates as additive rows: ``W h + E[batch] + E[donor] + c V``.

Adding a row per category equals concatenating one-hot columns to the input of a linear map, and leaves
each category's numbers in one place, so that a new category is a new row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrosc.data.registry import Registry


class CategoryTable(nn.Module):
    """One row of numbers per category; every per-category quantity of a model is one of these.

    Parameters
    ----------
    field
        Argument of the model whose codes index the rows.
    key
        Column, where the field has several; None otherwise.
    n_categories
        Number of rows.
    shape
        Shape of a row.
    init
        Fills the (n_categories, *shape) rows in place. Default: zeros.
    open
        Whether codes may be `n_categories`, for a category that is not known: the mean of all rows.

    Attributes
    ----------
    rows
        The parameter; after `fix` its first rows only.
    added
        After `fix`: the other rows, a parameter of its own. None otherwise.
    """

    def __init__(
        self,
        field: str,
        n_categories: int,
        shape: tuple[int, ...],
        key: str | None = None,
        init: Callable[[Tensor], object] | None = None,
        open: bool = False,
    ) -> None:
        super().__init__()
        self.field, self.key, self.shape, self.open = field, key, tuple(shape), open
        self.rows = nn.Parameter(torch.zeros(n_categories, *shape))
        self.added: nn.Parameter | None = None
        if init is not None:
            with torch.no_grad():
                init(self.rows)

    @property
    def n_categories(self) -> int:
        """Number of rows."""
        return len(self.rows) + (0 if self.added is None else len(self.added))

    def all_rows(self) -> Tensor:
        """Every row, (n_categories, *shape)."""
        return self.rows if self.added is None else torch.cat([self.rows, self.added])

    def rows_by_code(self) -> Tensor:
        """The row of every code that there may be: after `all_rows`, where `open`, that of an unknown one."""
        rows = self.all_rows()
        return torch.cat([rows, rows.mean(0, keepdim=True)]) if self.open else rows

    def row(self, code: int) -> Tensor:
        """The row of a category, (*shape), to be read or (without gradient) written to."""
        if self.added is None or code < len(self.rows):
            return self.rows[code]
        return self.added[code - len(self.rows)]

    def fix(self, n: int) -> None:
        """Keep the first `n` rows as they are; the others, if any, stay trainable where they were.

        What is saved and loaded (``state_dict``) is the table as a whole, whether its rows are fixed or not.
        """
        trainable, every = self.rows.requires_grad, self.all_rows().detach()
        self.rows = nn.Parameter(every[:n].clone(), requires_grad=False)
        self.added = nn.Parameter(every[n:].clone(), requires_grad=trainable) if n < len(every) else None

    def forward(self, codes: Tensor) -> Tensor:
        """Rows of the codes: (...,) int64 to (..., *shape)."""
        rows = self.rows_by_code()
        flat = F.embedding(codes, rows.reshape(len(rows), -1))
        return flat.reshape(*codes.shape, *self.shape)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        rows = self.all_rows()
        destination[prefix + "rows"] = rows if keep_vars else rows.detach()

    def _load_from_state_dict(
        self, state: Any, prefix: str, metadata: Any, strict: bool, missing: Any, strange: Any, errors: Any
    ) -> None:
        if self.added is None:
            super()._load_from_state_dict(state, prefix, metadata, strict, missing, strange, errors)
            return
        rows = state.get(prefix + "rows")
        if rows is None:
            missing.append(prefix + "rows")
        elif rows.shape != (self.n_categories, *self.shape):
            errors.append(
                f"size mismatch for {prefix}rows: {tuple(rows.shape)} in the file, "
                f"{(self.n_categories, *self.shape)} in the model"
            )
        else:
            with torch.no_grad():
                self.rows.copy_(rows[: len(self.rows)])
                self.added.copy_(rows[len(self.rows) :])

    def extra_repr(self) -> str:
        """Shown in repr(model)."""
        return f"{self.key or self.field}, {self.n_categories} categories, row {self.shape}"


def of_cells(rows: Tensor, codes: Tensor) -> Tensor:
    """Rows (..., categories, k) of the cells' codes (n,): (..., n, k), with draws of the rows on the left."""
    return F.embedding(codes, rows) if rows.ndim == 2 else rows[..., codes, :]


class Covariates(NamedTuple):
    """Covariates of a minibatch, as layers take them.

    Attributes
    ----------
    codes
        One (n,) int64 tensor per categorical covariate, in the order of `CovariateSpec.categorical`.
    values
        (..., n, p) float32 continuous covariates; draws of those that the model infers are on the left.
    """

    codes: tuple[Tensor, ...]
    values: Tensor


class CovariateSpec(NamedTuple):
    """Which covariates a layer takes.

    Attributes
    ----------
    categorical
        (field, key or None, number of categories) of each.
    n_continuous
        Number of continuous columns.
    """

    categorical: tuple[tuple[str, str | None, int], ...]
    n_continuous: int

    @classmethod
    def from_registry(cls, registry: Registry, *fields: str, extra_continuous: int = 0) -> CovariateSpec:
        """Those of the named fields that the user gave.

        `extra_continuous` counts columns that the model computes itself (an embedding, say).
        """
        categorical: list[tuple[str, str | None, int]] = []
        n_continuous = extra_continuous
        for name in fields:
            kind = registry.fields[name].kind
            if kind in ("continuous", "continuouses"):
                n_continuous += len(registry.keys(name))
            elif kind == "categoricals":
                categorical += [(name, k, registry.n_categories(name, k)) for k in registry.keys(name)]
            elif registry.given(name):
                categorical.append((name, None, registry.n_categories(name)))
        return cls(tuple(categorical), n_continuous)

    def pack(self, tensors: dict[str, Tensor], *extra: Tensor) -> Covariates:
        """Covariates of a minibatch from the model's arguments; `extra` are further (..., n, p) columns."""
        codes = tuple(_codes(tensors, field, key) for field, key, _ in self._positions())
        values = [t if t.ndim > 1 else t[:, None] for t in tensors.values() if t.is_floating_point()]
        values += list(extra)
        if not values:
            first = next(iter(tensors.values()))
            return Covariates(codes, torch.zeros(len(first), 0, device=first.device))
        lead = torch.broadcast_shapes(*(v.shape[:-1] for v in values))
        return Covariates(codes, torch.cat([v.expand(*lead, v.shape[-1]) for v in values], -1))

    def _positions(self) -> list[tuple[str, int | None, int]]:
        seen: dict[str, int] = {}
        out: list[tuple[str, int | None, int]] = []
        for field, key, n in self.categorical:
            position = None
            if key is not None:
                position = seen.get(field, 0)
                seen[field] = position + 1
            out.append((field, position, n))
        return out


def _codes(tensors: dict[str, Tensor], field: str, position: int | None) -> Tensor:
    return tensors[field] if position is None else tensors[field][..., position]


class CovariateEffects(nn.Module):
    """Sum of the covariates' additive rows for one layer.

    Parameters
    ----------
    spec
        Covariates taken.
    n_out
        Width of the layer.
    fan_in
        Number of inputs of the layer they are added to; rows start uniform in ±1/sqrt(fan_in), as the
        columns of a linear map do.
    """

    def __init__(self, spec: CovariateSpec, n_out: int, fan_in: int) -> None:
        super().__init__()
        bound = max(fan_in, 1) ** -0.5
        self.tables = nn.ModuleList(
            CategoryTable(field, n, (n_out,), key, lambda t: t.uniform_(-bound, bound))
            for field, key, n in spec.categorical
        )
        self.values = (
            nn.Parameter(torch.empty(spec.n_continuous, n_out).uniform_(-bound, bound))
            if spec.n_continuous
            else None
        )

    def forward(self, covariates: Covariates) -> Tensor | float:
        """(n, n_out), or 0.0 where there is none."""
        total: Tensor | float = 0.0
        for table, codes in zip(self.tables, covariates.codes, strict=True):
            total = total + table(codes)
        if self.values is not None:
            total = total + covariates.values @ self.values
        return total
