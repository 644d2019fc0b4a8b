"""Fully connected networks with covariates; every block acts on the last dim, with any leading dims."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyrosc.nn.covariates import CovariateEffects, Covariates, CovariateSpec
from pyrosc.nn.sparse import SparseLinear, SparseRows

Norm = Literal["batch", "layer", "none"]
NO_COVARIATES = CovariateSpec((), 0)


class FlatBatchNorm(nn.BatchNorm1d):
    """Batch normalisation of the last dim over all leading ones.

    torch's own takes dim 1 of a (K, n, h) input for the channels, which would normalise over cells.
    """

    def forward(self, h: Tensor) -> Tensor:
        """(..., h) to (..., h)."""
        return super().forward(h.reshape(-1, h.shape[-1])).reshape(h.shape)


class Layer(nn.Module):
    """Linear map plus covariate rows, normalisation, activation, dropout.

    Parameters
    ----------
    n_in, n_out
        Widths.
    covariates
        Covariates added before the normalisation.
    norm
        ``"batch"``, ``"layer"`` or ``"none"``.
    dropout
        Share of hidden units left out while training, in [0, 1).
    activation
        Default ReLU.
    sparse
        Whether inputs may be `SparseRows`.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        covariates: CovariateSpec = NO_COVARIATES,
        norm: Norm = "batch",
        dropout: float = 0.0,
        activation: nn.Module | None = None,
        momentum: float = 0.1,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        self.linear: nn.Linear | SparseLinear = (
            SparseLinear(n_in, n_out) if sparse else nn.Linear(n_in, n_out)
        )
        self.effects = CovariateEffects(covariates, n_out, n_in)
        if norm == "batch":
            self.norm: nn.Module = FlatBatchNorm(n_out, eps=1e-3, momentum=momentum)
        elif norm == "layer":
            self.norm = nn.LayerNorm(n_out, elementwise_affine=False)
        elif norm == "none":
            self.norm = nn.Identity()
        else:
            raise ValueError(f"norm is 'batch', 'layer' or 'none', not {norm!r}")
        self.activation = nn.ReLU() if activation is None else activation
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, h: Tensor | SparseRows, covariates: Covariates | None = None) -> Tensor:
        """(..., n_in) to (..., n_out)."""
        if isinstance(h, SparseRows) and not isinstance(self.linear, SparseLinear):
            raise TypeError("this layer takes tensors: make the network with sparse=True for SparseRows")
        h = self.linear(h)
        if covariates is not None:
            h = h + self.effects(covariates)
        return self.dropout(self.activation(self.norm(h)))


class MLP(nn.Module):
    """Stack of `Layer`; covariates enter the first layer, or each one.

    Parameters
    ----------
    n_in, n_hidden, n_layers
        Widths and depth; the output is (..., n_hidden).
    covariates
        Covariates taken.
    inject
        Whether they enter each layer (True) or the first only.
    norm, dropout, activation
        As in `Layer`.
    sparse
        Whether inputs may be `SparseRows`.
    """

    def __init__(
        self,
        n_in: int,
        n_hidden: int,
        n_layers: int = 1,
        covariates: CovariateSpec = NO_COVARIATES,
        inject: bool = True,
        norm: Norm = "batch",
        dropout: float = 0.0,
        activation: nn.Module | None = None,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        if n_layers < 1:
            raise ValueError(f"n_layers must be at least 1, not {n_layers}")
        self.layers = nn.ModuleList(
            Layer(
                n_in if i == 0 else n_hidden,
                n_hidden,
                covariates if inject or i == 0 else NO_COVARIATES,
                norm,
                dropout,
                activation,
                sparse=sparse and i == 0,
            )
            for i in range(n_layers)
        )
        self.inject = inject

    def forward(self, h: Tensor | SparseRows, covariates: Covariates | None = None) -> Tensor:
        """(..., n_in) to (..., n_hidden)."""
        out: Any = h
        for i, layer in enumerate(self.layers):
            out = layer(out, covariates if self.inject or i == 0 else None)
        return out


class NormalEncoder(nn.Module):
    """Network with a Normal's mean and standard deviation on top: q(z | x, covariates).

    The variance is exp(W h) + `floor`.

    Parameters
    ----------
    n_in, n_out
        Number of inputs and of latent dimensions.
    n_hidden, n_layers, covariates, inject, norm, dropout, activation, sparse
        As in `MLP`.
    floor
        Least variance.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        n_hidden: int = 128,
        n_layers: int = 1,
        covariates: CovariateSpec = NO_COVARIATES,
        inject: bool = True,
        norm: Norm = "batch",
        dropout: float = 0.1,
        floor: float = 1e-4,
        activation: nn.Module | None = None,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        self.network = MLP(n_in, n_hidden, n_layers, covariates, inject, norm, dropout, activation, sparse)
        self.loc = nn.Linear(n_hidden, n_out)
        self.log_variance = nn.Linear(n_hidden, n_out)
        self.floor = floor

    def forward(self, x: Tensor | SparseRows, covariates: Covariates | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, each (..., n_out)."""
        h = self.network(x, covariates)
        return self.loc(h), (self.log_variance(h).exp() + self.floor).sqrt()


class CellTable(nn.Module):
    """One row of free parameters per cell, moved only by minibatches that contain the cell.

    Gradients are sparse and the runner gives them a sparse optimiser, so a step costs what its minibatch
    costs, whatever the number of cells.

    Parameters
    ----------
    n_cells
        Number of registered cells.
    shape
        Shape of a cell's parameters.
    scale
        Standard deviation of the Normal starting values.
    """

    def __init__(self, n_cells: int, shape: tuple[int, ...], scale: float = 0.01) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.rows = nn.Parameter(scale * torch.randn(n_cells, math.prod(self.shape)))

    def forward(self, index: Tensor) -> Tensor:
        """Rows of cells: (n,) int64 to (n, *shape)."""
        flat = nn.functional.embedding(index, self.rows, sparse=True)
        return flat.reshape(*index.shape, *self.shape)
