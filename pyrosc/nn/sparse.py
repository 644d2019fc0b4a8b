"""Inputs that are mostly zero, and a wide first layer that looks at the rest only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pyrosc.data.matrix import rows_of

#: Share of values that are not zero up to which a layer is faster without the others.
_FEW = 0.05


class SparseRows:
    """Values of (n, g) inputs that are not zero, on the CPU; a network made with ``sparse=True`` takes them.

    Parameters
    ----------
    matrix
        CSR matrix, (n, g) float32, without repeated entries.
    """

    def __init__(self, matrix: sp.csr_matrix) -> None:
        self.matrix = matrix

    @classmethod
    def of(cls, x: Tensor) -> SparseRows | None:
        """Counts of a minibatch, where it came from a sparse matrix and few are not zero; else None."""
        rows = rows_of(x) if x.dim() == 2 and not x.requires_grad else None
        few = rows is not None and rows.nnz <= _FEW * x.numel()
        return cls(rows) if few else None

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> SparseRows:
        """Each value by a function that gives 0 for 0."""
        own = self.matrix
        return SparseRows(sp.csr_matrix((function(own.data), own.indices, own.indptr), own.shape, copy=False))

    def sum(self, dim: int = -1) -> Tensor:
        """Sum of each row, (n,)."""
        if dim != -1:
            raise ValueError(f"rows are summed over the last dim, -1, not {dim}")
        return torch.from_numpy(np.asarray(self.matrix.sum(1, dtype=np.float32)).ravel())

    def times(self, rows: Tensor) -> Tensor:
        """The product with a matrix (g, h): (n, h). Differentiable in the matrix."""
        return _Product.apply(rows, self.matrix)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrix: sp.csr_matrix) -> Tensor:
        ctx.matrix = matrix
        return torch.from_numpy(matrix @ rows.detach().numpy())

    @staticmethod
    @once_differentiable  # NumPy leaves no graph behind: a second derivative is refused
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return torch.from_numpy(ctx.matrix.T @ upstream[0].numpy()), None


class SparseLinear(nn.Module):
    """Linear map of inputs that are mostly zero, as a tensor or as `SparseRows`.

    It is ``nn.Linear`` with the transpose of the weight as parameter, so that what belongs to an input lies
    in one piece.

    Parameters
    ----------
    n_in, n_out
        Widths.
    """

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        like = nn.Linear(n_in, n_out)
        self.rows = nn.Parameter(like.weight.detach().t().contiguous())
        self.bias = nn.Parameter(like.bias.detach())

    @property
    def weight(self) -> Tensor:
        """The weight as ``nn.Linear`` has it, (n_out, n_in): a view."""
        return self.rows.t()

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        weight = state.pop(prefix + "weight", None)  # as ``nn.Linear`` and earlier versions save it
        if weight is not None:
            state[prefix + "rows"] = weight.t()
        super()._load_from_state_dict(state, prefix, *args)

    def forward(self, h: Tensor | SparseRows) -> Tensor:
        """(..., n_in) to (..., n_out)."""
        if isinstance(h, SparseRows):
            return h.times(self.rows) + self.bias
        return nn.functional.linear(h, self.weight, self.bias)
