"""Beta-binomial log-mass by mean and concentration, and its gradient.

With c the concentration, a = mean c and b = (1 - mean) c, the log-mass of zero successes in T trials is
``sum_{k<T} log((b + k) / (c + k))``, and that of x successes a similar sum. For small T (two or four copies
of a locus) these sums are exact and quick, and successes are rare, so only zeros are worked out everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._layout import Layout, compute_dtype, find_nonzero, first_derivatives, wide_dtype
from ._special import is_small_integer, log_rising


def beta_binomial_log_prob(
    value: Tensor,
    mean: Tensor,
    concentration: Tensor,
    total: Tensor,
    event_ndims: int,
    batch_shape: torch.Size,
) -> Tensor:
    """Log-mass of counts, summed over the last ``event_ndims`` dimensions. First derivatives only."""
    return _BetaBinomialLogProb.apply(value, mean, concentration, total, event_ndims, batch_shape)


class _BetaBinomialLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        mean: Tensor,
        concentration: Tensor,
        total: Tensor,
        event_ndims: int,
        batch_shape: torch.Size,
    ) -> Tensor:
        shapes = (value.shape, batch_shape, mean.shape, concentration.shape, total.shape)
        layout = Layout.of(event_ndims, *shapes)
        dtype = torch.promote_types(mean.dtype, concentration.dtype)
        inner = compute_dtype(dtype)
        limits = torch.finfo(inner)
        views = [
            layout.view(mean.to(inner)).clamp(limits.tiny**0.8, 1 - limits.eps / 2),
            layout.view(concentration.to(inner)),
            layout.view(total.to(inner)),
        ]
        grad = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        results = _evaluate(value, views, layout, grad)
        if grad:
            kept = [
                g if need else None for g, need in zip(results[1:], ctx.needs_input_grad[1:3], strict=True)
            ]
            ctx.save_for_backward(mean, concentration, *kept)
        ctx.layout = layout
        out = results[0].sum(1) if event_ndims else results[0]
        return out.reshape(layout.out_shape).to(dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        inputs, grads = ctx.saved_tensors[:2], ctx.saved_tensors[2:]
        return None, *first_derivatives(ctx.layout, upstream, inputs, grads), None, None, None


def _evaluate(value: Tensor, views: list[Tensor], layout: Layout, grad: bool) -> list[Tensor]:
    """Log-mass and, if asked, gradients in mean and concentration, as (rows, cols) matrices."""
    mean, total = views[0], views[2]
    full = (layout.rows, layout.cols)
    results = [mean.new_empty(full) for _ in range(3 if grad else 1)]
    nonzero = find_nonzero(value, layout, mean.dtype)
    count = nonzero.count
    small = is_small_integer(total) and is_small_integer(count)
    dense = None if small else value.to(mean.dtype).expand(layout.shape).reshape(full)
    steps = int(total.max()) if small and total.numel() else 0
    step = layout.chunk_rows(mean.device)
    for start in range(0, layout.rows, step):
        stop = min(start + step, layout.rows)
        part = [arg if arg.dim() == 1 else arg[start:stop] for arg in views]
        if dense is None:
            new = _zeros(part, steps, grad)
        else:
            wide = wide_dtype(mean)
            new = _general(dense[start:stop].to(wide), [arg.to(wide) for arg in part], grad)
        for result, entries in zip(results, new, strict=True):
            result[start:stop] = entries
    if small and count.numel():
        found = _successes(count, [nonzero.gather(arg) for arg in views], grad)
        for result, entries in zip(results, found, strict=True):
            result.view(-1).index_copy_(0, nonzero.index, entries)
    too_many = nonzero.gather(total) < count
    if bool(too_many.any()):  # more successes than trials: impossible
        at = nonzero.index[too_many]
        for result, entry in zip(results, (-torch.inf, 0.0, 0.0), strict=False):
            result.view(-1)[at] = entry
    return results


def _zeros(args: list[Tensor], steps: int, grad: bool) -> list[Tensor]:
    """No success in any of the trials, of which there are at most ``steps``."""
    mean, conc, total = args
    alpha, beta = mean * conc, (1 - mean) * conc
    even = bool((total == steps).all()) if total.numel() else True
    near_one = bool((mean > 0.5).any())
    value = grad_mean = grad_conc = torch.zeros((), dtype=mean.dtype, device=mean.device)
    for k in range(steps):
        all_k, fail = conc + k, beta + k
        # log(fail / all): by log1p where successes are rare, so that small masses keep their digits.
        share = alpha / all_k if k else mean
        term = torch.log1p(-share)
        if near_one and k:
            term = torch.where(share < 0.5, term, (fail / all_k).log())
        slope = conc / fail
        bend = mean * k / (fail * all_k)
        if not even:
            use = (total - k).clamp(0, 1)
            term, slope, bend = term * use, slope * use, bend * use
        value = value + term
        if grad:
            grad_mean, grad_conc = grad_mean - slope, grad_conc - bend
    return [value, grad_mean, grad_conc] if grad else [value]


def _successes(count: Tensor, args: list[Tensor], grad: bool) -> list[Tensor]:
    """``count`` successes, as x factors (a + k)/(c + k) and T - x factors (b + k)/(c + x + k)."""
    mean, conc, total = args
    count = torch.minimum(count, total)
    rest = total - count
    k = torch.arange(int(total.max()), device=count.device, dtype=count.dtype)[:, None]
    hit, miss = mean * conc + k, (1 - mean) * conc + k
    first, second = conc + k, conc + count + k
    # exactly 0 or 1, for integers
    use_hit, use_miss = (count - k).clamp_(0, 1), (rest - k).clamp_(0, 1)
    value = ((hit / first) * ((rest + 1 + k) / (k + 1))).log_().mul_(use_hit)
    value = value.add_((miss / second).log_().mul_(use_miss)).sum(0)
    if not grad:
        return [value]
    grad_mean = conc * (use_hit / hit - use_miss / miss).sum(0)
    grad_conc = ((mean - 1) * k / hit / first).mul_(use_hit)
    grad_conc = grad_conc.add_((((1 - mean) * count - mean * k) / miss / second).mul_(use_miss)).sum(0)
    return [value, grad_mean, grad_conc]


def _general(count: Tensor, args: list[Tensor], grad: bool) -> list[Tensor]:
    """Any counts, by log-gamma in double precision."""
    count, mean, conc, total = torch.broadcast_tensors(count, *args)
    rest = (total - count).clamp(min=0)
    hits, hits_slope = log_rising(mean * conc, count, grad)
    miss, miss_slope = log_rising((1 - mean) * conc, rest, grad)
    both, both_slope = log_rising(conc, total, grad)
    choose = torch.lgamma(total + 1) - torch.lgamma(count + 1) - torch.lgamma(rest + 1)
    value = choose + hits + miss - both
    if hits_slope is None or miss_slope is None or both_slope is None:
        return [value]
    return [
        value,
        conc * (hits_slope - miss_slope),
        mean * hits_slope + (1 - mean) * miss_slope - both_slope,
    ]
