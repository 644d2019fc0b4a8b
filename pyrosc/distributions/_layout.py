"""Shapes, non-zero entries and gradient reduction shared by the count kernels.

A kernel sees every argument as a matrix of ``rows`` x ``cols``: the columns are the dimensions that
``to_event`` sums over (at least the last one), the rows are everything to the left. An argument that does
not vary over the rows (a gene-wise dispersion) stays a vector of length ``cols``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Elements worked on at a time on CPU: the scratch buffers of one chunk stay in the second-level cache.
CHUNK = 64_000


@dataclass(frozen=True)
class Layout:
    """The common shape of one evaluation and its view as a matrix."""

    shape: torch.Size
    rows: int
    cols: int
    event_ndims: int  # dimensions summed over; 0 keeps every entry

    @classmethod
    def of(cls, event_ndims: int, *shapes: torch.Size) -> Layout:
        """Broadcast ``shapes`` and split the result into rows and columns."""
        shape = torch.broadcast_shapes(*shapes)
        split = max(len(shape) - max(event_ndims, 1), 0)
        return cls(shape, math.prod(shape[:split]), math.prod(shape[split:]), event_ndims)

    @property
    def out_shape(self) -> torch.Size:
        """Shape of the log-probability."""
        return self.shape[: len(self.shape) - self.event_ndims] if self.event_ndims else self.shape

    def is_row(self, shape: torch.Size) -> bool:
        """Whether an argument of this shape is the same for all rows."""
        trailing = self.shape[max(len(self.shape) - max(self.event_ndims, 1), 0) :]
        return math.prod(shape) == self.cols and shape[len(shape) - len(trailing) :] == trailing

    def view(self, arg: Tensor) -> Tensor:
        """View (copy only if needed) ``arg`` as ``(cols,)`` or ``(rows, cols)``."""
        if self.rows > 1 and self.is_row(arg.shape):
            return arg.reshape(self.cols)
        return arg.expand(self.shape).reshape(self.rows, self.cols)

    def column(self, arg: Tensor) -> Tensor | None:
        """View ``arg`` as ``(rows, 1)`` if it is the same all over each row that is summed; else None."""
        n = self.event_ndims
        varies = arg.dim() == len(self.shape) and arg.shape[:-n] == self.shape[:-n] if n else False
        return arg.reshape(self.rows, 1) if varies and math.prod(arg.shape[-n:]) == 1 else None

    def chunk_rows(self, device: torch.device) -> int:
        """Rows to work on at a time; all of them where cache blocking is not ours to do."""
        return max(1, CHUNK // max(self.cols, 1) if device.type == "cpu" else self.rows)

    def reduce(
        self, grad: Tensor, upstream: Tensor, shape: torch.Size, dtype: torch.dtype, reuse: bool
    ) -> Tensor:
        """Chain rule: weight the entry-wise ``grad`` by ``upstream`` and sum it to an argument's shape.

        One of a `column` comes summed over its row, (rows, 1). With ``reuse`` the result may overwrite
        ``grad``.
        """
        weights = upstream.to(grad.dtype)
        if self.event_ndims:
            weights = weights.reshape(self.rows, 1)
            if grad.shape[1] == 1 < self.cols:
                return (grad * weights).reshape(shape).to(dtype)
            if self.rows > 1 and self.is_row(shape):
                return (weights.T @ grad).reshape(shape).to(dtype)
        else:
            weights = weights.reshape(self.rows, self.cols)
        full = grad.mul_(weights) if reuse else grad * weights
        return full.reshape(self.shape).sum_to_size(shape).to(dtype)


@dataclass(frozen=True)
class NonZero:
    """The non-zero counts of a value, in row-major order."""

    index: Tensor  # flat positions in the (rows, cols) matrix
    count: Tensor
    cols: int

    @cached_property
    def column(self) -> Tensor:
        """Column of each."""
        if self.index.device.type != "cpu":
            return self.index % self.cols
        # Row by row, which saves a division for each entry.
        index = self.index.numpy()
        if not index.size:
            return self.index
        rows = int(index[-1]) // self.cols + 1
        starts = np.arange(0, (rows + 1) * self.cols, self.cols)
        per_row = np.diff(np.searchsorted(index, starts))
        return torch.from_numpy(index - np.repeat(starts[:-1], per_row))

    def gather(self, arg: Tensor) -> Tensor:
        """Entries of a ``(cols,)`` or ``(rows, cols)`` argument at the non-zeros."""
        if arg.dim() == 1:
            return arg.index_select(0, self.column)
        return arg.reshape(-1).index_select(0, self.index)


def find_nonzero(value: Tensor, layout: Layout, dtype: torch.dtype) -> NonZero:
    """Locate and gather the non-zero entries of ``value``, broadcast to the layout."""
    value = value.detach().to(dtype)
    lead = len(layout.shape) - value.dim()
    repeats = 1
    if lead > 0 and value.shape == layout.shape[lead:]:
        # The same counts for several particles: search them once.
        repeats = math.prod(layout.shape[:lead])
        flat = value.reshape(-1)
    else:
        flat = value.expand(layout.shape).reshape(-1)
    index = _positions(flat)
    count = flat.index_select(0, index)
    if repeats > 1:
        offset = torch.arange(repeats, device=index.device)[:, None] * flat.numel()
        index = (index + offset).reshape(-1)
        count = count.repeat(repeats)
    return NonZero(index, count, layout.cols)


def _positions(flat: Tensor) -> Tensor:
    """Where a vector is not zero."""
    if flat.device.type != "cpu":
        return flat.nonzero().squeeze(-1)
    # NumPy searches a boolean array several times faster than torch. It has two ways: one for more than a
    # tenth of trues, in constant time, and one that skips zeros but is slower than that for more than a
    # thirtieth. Counts of single cells fall between; some trues at the end make NumPy take the first way.
    size = flat.numel()
    padded = torch.ones(size + size // 8, dtype=torch.bool)
    mask = padded[:size].copy_(flat).numpy()
    found = int(np.count_nonzero(mask))
    if size / 30 < found <= size / 10:
        return torch.from_numpy(np.flatnonzero(padded.numpy())[:found])
    return torch.from_numpy(np.flatnonzero(mask))


def split_points(index: Tensor, layout: Layout, step: int) -> list[int]:
    """Where each chunk of ``step`` rows begins in a sorted flat index, and where the last one ends."""
    if step >= layout.rows:
        return [0, index.numel()] if layout.rows else [0]
    edges = [*range(0, layout.rows * layout.cols, step * layout.cols), layout.rows * layout.cols]
    return [int(i) for i in np.searchsorted(index.numpy(), edges)]


class _FirstOnly(torch.autograd.Function):
    """Passes a gradient on, tied to the inputs it depends on, and refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *inputs: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError("the log-probability of this law has first derivatives only")


def first_derivatives(
    layout: Layout, upstream: Tensor, inputs: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The ``backward`` of a kernel: chain rule from entry-wise gradients, reduced to the inputs' shapes.

    Without the tie to the inputs a second derivative would silently lack this law's part.
    """
    # The saved gradients are ours alone: when the graph is not kept, the result may take their place, which
    # saves touching new memory.
    kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()
    result: list[Tensor | None] = []
    for arg, grad in zip(inputs, grads, strict=True):
        if grad is None:
            result.append(None)
            continue
        with torch.no_grad():
            reduced = layout.reduce(grad, upstream, arg.shape, arg.dtype, reuse=not kept)
        result.append(_FirstOnly.apply(reduced, upstream, *inputs) if torch.is_grad_enabled() else reduced)
    return result


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision is computed in single precision."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def wide_dtype(like: Tensor) -> torch.dtype:
    """Double precision for the few entries whose terms cancel, where the device has it."""
    return like.dtype if like.device.type == "mps" else torch.float64
