"""Poisson log-mass by the log of the rate, and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._layout import Layout, compute_dtype, find_nonzero, first_derivatives, wide_dtype


def poisson_log_prob(value: Tensor, log_mean: Tensor, event_ndims: int, batch_shape: torch.Size) -> Tensor:
    """Log-mass of counts, summed over the last ``event_ndims`` dimensions. First derivatives only."""
    return _PoissonLogProb.apply(value, log_mean, event_ndims, batch_shape)


class _PoissonLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, log_mean: Tensor, event_ndims: int, batch_shape: torch.Size
    ) -> Tensor:
        layout = Layout.of(event_ndims, value.shape, batch_shape, log_mean.shape)
        inner = log_mean.to(compute_dtype(log_mean.dtype))
        view = layout.view(inner)
        nonzero = find_nonzero(value, layout, inner.dtype)
        # Where counts are large, x log(mean) - mean - log x! cancels: in double precision.
        wide = wide_dtype(inner)
        count, log_rate = nonzero.count.to(wide), nonzero.gather(view).to(wide)
        nz_value = count * log_rate - log_rate.exp() - torch.lgamma(count + 1)
        rate = view.exp().expand(layout.rows, layout.cols)
        result = -rate
        result.view(-1).index_copy_(0, nonzero.index, nz_value.to(inner.dtype))
        if ctx.needs_input_grad[1]:
            # x - mean; the zeros have it already in -mean.
            grad = -rate
            slope = (count - log_rate.exp()).to(inner.dtype)
            grad.view(-1).index_copy_(0, nonzero.index, slope)
            ctx.save_for_backward(log_mean, grad)
        ctx.layout = layout
        out = result.sum(1) if event_ndims else result
        return out.reshape(layout.out_shape).to(log_mean.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        log_mean, grad = ctx.saved_tensors
        return None, *first_derivatives(ctx.layout, upstream, [log_mean], [grad]), None, None
