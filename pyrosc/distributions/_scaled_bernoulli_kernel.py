"""Log-probability of successes with probability ``exp(log_scale) sigmoid(logits)``, and its gradient.

With q = sigmoid(logits), s the scale and p = s q, zeros have log(1 - p), with slopes -p (1 - q)/(1 - p) in
the logits and -p/(1 - p) in log s; successes have log s + log q, with slopes 1 - q and 1. Successes are rare,
so only zeros are worked out everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from . import _compiled
from ._layout import Layout, compute_dtype, find_nonzero, first_derivatives
from ._special import above

#: Probability above which 1 - p is worked out from its parts, so that it keeps its digits.
_LIKELY = 0.5


def scaled_bernoulli_log_prob(
    value: Tensor,
    logits: Tensor,
    log_scale: Tensor,
    log_depth: Tensor | None,
    event_ndims: int,
    batch_shape: torch.Size,
) -> Tensor:
    """Log-probability of zeros and ones, summed over the last ``event_ndims`` dimensions; the scale is that
    of both logs. First derivatives only."""
    layout = Layout.of(event_ndims, value.shape, batch_shape)
    args = [logits, log_scale]
    if log_depth is not None:
        column = layout.column(log_depth) if log_depth.dtype == log_scale.dtype else None
        args = [logits, log_scale + log_depth] if column is None else [*args, column]
    return _ScaledBernoulliLogProb.apply(value, layout, *args)


class _ScaledBernoulliLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, layout: Layout, *args: Tensor) -> Tensor:
        """Arguments are logits, log scale and, of each row, a further part of it, (rows, 1)."""
        dtype = torch.promote_types(args[0].dtype, args[1].dtype)
        given = [arg.to(compute_dtype(dtype)) for arg in args]
        views = [*map(layout.view, given[:2]), *given[2:]]
        needs = ctx.needs_input_grad[2:]
        if _compiled.suits(value, views, layout, "scaled_bernoulli"):
            out, grads = _compiled.evaluate(value, views, layout, needs, "scaled_bernoulli")
        else:
            result, found = _evaluate(value, views, layout, any(needs))
            grads = [g if need else None for g, need in zip(found, needs, strict=True)]
            out = result.sum(1) if layout.event_ndims else result
        if any(needs):
            ctx.save_for_backward(*args, *grads)
        ctx.layout = layout
        return out.reshape(layout.out_shape).to(dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        n = len(ctx.saved_tensors) // 2
        inputs, grads = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        return None, None, *first_derivatives(ctx.layout, upstream, inputs, grads)


def _evaluate(
    value: Tensor, views: list[Tensor], layout: Layout, grad: bool
) -> tuple[Tensor, list[Tensor | None]]:
    """Log-probability and, if asked, gradients in logits and log scale, as (rows, cols) matrices."""
    logits, log_scale = views[0], sum(views[2:], views[1]).clamp(max=0)
    full = (layout.rows, layout.cols)
    if logits.dim() == log_scale.dim() == 1:
        logits = logits.expand(full)
    result = logits.new_empty(full)
    grads = [logits.new_empty(full) for _ in range(2 if grad else 0)]
    step = layout.chunk_rows(logits.device)
    for start in range(0, layout.rows, step):
        rows = slice(start, min(start + step, layout.rows))
        _zeros(
            logits if logits.dim() == 1 else logits[rows],
            log_scale if log_scale.dim() == 1 else log_scale[rows],
            [result[rows], *(g[rows] for g in grads)],
        )
    nonzero = find_nonzero(value, layout, logits.dtype)
    if nonzero.index.numel():
        at, scale = nonzero.gather(logits), nonzero.gather(log_scale)
        result.view(-1).index_copy_(0, nonzero.index, logsigmoid(at).add_(scale))
        if grad:
            grads[0].view(-1).index_copy_(0, nonzero.index, torch.sigmoid(-at))
            grads[1].view(-1).index_fill_(0, nonzero.index, 1.0)
    if not grad:
        return result, [None] * len(views)
    return result, [*grads, *(grads[1].sum(1, keepdim=True) for _ in views[2:])]


def _zeros(logits: Tensor, log_scale: Tensor, out: list[Tensor]) -> None:
    """No success: fills value and, where asked, slopes in logits and log scale."""
    share = torch.sigmoid(logits)
    p = share * log_scale.exp()
    torch.log1p(-p, out=out[0])
    rest = 1 - p
    any_likely = p.numel() > 0 and float(p.max()) > _LIKELY
    if any_likely:
        likely = above(p.reshape(-1), _LIKELY)
        # 1 - p = (1 - s + e)/(1 + e), e = exp(-logits)
        shape = p.shape
        e = (-logits.expand(shape).reshape(-1)[likely]).clamp(max=80).exp()
        gap = (e - torch.expm1(log_scale.expand(shape).reshape(-1)[likely])).clamp(min=1e-30)
        out[0].view(-1).index_copy_(0, likely, gap.log() - torch.log1p(e))
        rest.view(-1).index_copy_(0, likely, gap / (1 + e))
    if len(out) > 1:
        torch.div(p, rest, out=out[2]).neg_()
        torch.mul(out[2], torch.sigmoid(-logits) if any_likely else share.neg_().add_(1), out=out[1])
