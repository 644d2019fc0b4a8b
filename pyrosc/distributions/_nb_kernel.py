"""Negative binomial log-mass, with or without zero inflation, and its gradient in one pass.

Most counts are zero, and the log-mass of a zero needs one exponential and one log1p:
``log p(0) = -disp * log(1 + mean/disp)``. So the kernel treats every entry as a zero, working through the
matrix in chunks that fit the cache, and puts in the non-zero entries (gathered once) as it goes. The gradient
is computed along with the value, sharing its transcendental functions, and only rescaled in ``backward``.

Large matrices in single precision on CPU take the compiled way instead (``_compiled``), the same mathematics
in one pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from . import _compiled
from ._layout import Layout, compute_dtype, find_nonzero, first_derivatives, split_points
from ._special import TAIL_LOG_DISP, above, nb_nonzero, stable_softplus, tail_series_

# Stands for exp(log p(0) - zi_logits) at a non-zero count: a power of two, so that x / (1 + x) is exactly 1.
_CERTAIN = 2.0**120


def nb_log_prob(
    value: Tensor,
    log_mean: Tensor,
    log_disp: Tensor,
    zi_logits: Tensor | None,
    event_ndims: int,
    batch_shape: torch.Size,
) -> Tensor:
    """Log-mass of counts, summed over the last ``event_ndims`` dimensions.

    Arguments broadcast against each other and ``batch_shape``. First derivatives only.
    """
    return _NBLogProb.apply(value, log_mean, log_disp, zi_logits, event_ndims, batch_shape)


class _NBLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        log_mean: Tensor,
        log_disp: Tensor,
        zi_logits: Tensor | None,
        event_ndims: int,
        batch_shape: torch.Size,
    ) -> Tensor:
        args = [log_mean, log_disp] + ([] if zi_logits is None else [zi_logits])
        layout = Layout.of(event_ndims, value.shape, batch_shape, *(arg.shape for arg in args))
        dtype = args[0].dtype
        for arg in args[1:]:
            dtype = torch.promote_types(dtype, arg.dtype)
        inner = compute_dtype(dtype)
        views = [layout.view(arg.to(inner)) for arg in args]
        needs = ctx.needs_input_grad[1:4]
        out, grads = _evaluate(value, views, layout, needs[: len(args)])
        ctx.save_for_backward(*args, *grads)
        ctx.layout = layout
        return out.reshape(layout.out_shape).to(dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        half = len(ctx.saved_tensors) // 2
        inputs, grads = ctx.saved_tensors[:half], ctx.saved_tensors[half:]
        found = first_derivatives(ctx.layout, upstream, inputs, grads)
        return None, *found, *[None] * (5 - len(found))


def _evaluate(
    value: Tensor, views: list[Tensor], layout: Layout, needs: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """Value and the entry-wise gradients asked for."""
    if _compiled.suits(value, views, layout):
        return _compiled.evaluate(value, views, layout, needs)
    log_mean, log_disp = views[0], views[1]
    zi = views[2] if len(views) > 2 else None
    need_nb, need_zi = needs[0] or needs[1], zi is not None and needs[2]
    nonzero = find_nonzero(value, layout, log_mean.dtype)
    nz_value, nz_mean, nz_disp = nb_nonzero(
        nonzero.count, nonzero.gather(log_mean), nonzero.gather(log_disp), need_nb
    )
    if zi is not None:
        nz_value.sub_(stable_softplus(nonzero.gather(zi)))

    full = (layout.rows, layout.cols)
    out = log_mean.new_empty(layout.rows if layout.event_ndims else full)
    # The gradients in log mean and log dispersion share their parts, so they come and go together.
    grad_mean = log_mean.new_empty(full) if need_nb else None
    grad_disp = log_mean.new_empty(full) if need_nb else None
    grad_zi = log_mean.new_empty(full) if need_zi else None

    step = layout.chunk_rows(log_mean.device)
    minus_disp = log_disp.exp().neg_() if log_disp.dim() == 1 else None
    tail = _tail_columns(log_disp) if need_nb else None
    scratch = [log_mean.new_empty((min(step, layout.rows), layout.cols)) for _ in range(4)]
    points = split_points(nonzero.index, layout, step)

    def run(score: Callable[[_Part], Tensor], chunks: Iterable[int]) -> None:
        for k in chunks:
            start, stop = k * step, min((k + 1) * step, layout.rows)
            first, last = points[k], points[k + 1]
            part = _Part(
                log_mean=_rows(log_mean, start, stop).expand(stop - start, layout.cols),
                log_disp=_rows(log_disp, start, stop),
                zi=None if zi is None else _rows(zi, start, stop).expand(stop - start, layout.cols),
                grad_mean=None if grad_mean is None else grad_mean[start:stop],
                grad_disp=None if grad_disp is None else grad_disp[start:stop],
                grad_zi=None if grad_zi is None else grad_zi[start:stop],
                minus_disp=minus_disp,
                tail=tail,
                index=nonzero.index[first:last] - start * layout.cols,
                nz_value=nz_value[first:last],
                scratch=scratch if stop - start == step else [s[: stop - start] for s in scratch],
            )
            if layout.event_ndims:
                torch.sum(score(part), 1, out=out[start:stop])
            else:
                out[start:stop] = score(part)

    quick = log_mean.device.type == "cpu"
    run(_quick if quick else _careful, range(len(points) - 1))
    if quick and not math.isfinite(out.sum()):
        # The quick formulas overflow where arguments reach 88 in size.
        finite = out.isfinite() if layout.event_ndims else out.isfinite().all(1)
        run(_careful, sorted({int(row) // step for row in (~finite).nonzero()}))
    for grad, entries in ((grad_mean, nz_mean), (grad_disp, nz_disp)):
        if grad is not None and entries is not None:
            grad.view(-1).index_copy_(0, nonzero.index, entries)
    grads = [grad_mean if needs[0] else None, grad_disp if needs[1] else None, grad_zi]
    return out, grads[: len(views)]


def _rows(arg: Tensor, start: int, stop: int) -> Tensor:
    return arg if arg.dim() == 1 else arg[start:stop]


@dataclass(frozen=True)
class _Part:
    """A range of rows: inputs, gradient buffers to fill, and the non-zero entries in it."""

    log_mean: Tensor
    log_disp: Tensor
    zi: Tensor | None
    grad_mean: Tensor | None
    grad_disp: Tensor | None
    grad_zi: Tensor | None
    minus_disp: Tensor | None  # where it is the same for all rows
    tail: Tensor | None  # columns whose dispersion gradient cancels
    index: Tensor
    nz_value: Tensor
    scratch: list[Tensor]


def _quick(part: _Part) -> Tensor:
    """Fewest passes over memory; everything lands in the scratch and gradient buffers."""
    s0, s1, s2, s3 = part.scratch
    minus_disp = part.minus_disp
    if minus_disp is None:
        minus_disp = torch.exp(part.log_disp, out=s3).neg_()
    ratio = torch.sub(part.log_mean, part.log_disp, out=s0).exp_()
    value = torch.log1p(ratio, out=s1).mul_(minus_disp)
    if part.grad_mean is not None and part.grad_disp is not None:
        total = torch.add(ratio, 1, out=s2)
        torch.div(ratio, total, out=part.grad_mean).mul_(minus_disp)
        torch.sub(value, part.grad_mean, out=part.grad_disp)
        _mend_tail(part, minus_disp)
    if part.zi is not None:
        # With v = exp(log p0 - logits): p(0) = gate (1 + v), and v/(1 + v) is the chance that a zero is
        # the negative binomial's own.
        gate = torch.sigmoid(part.zi, out=s2)
        v = torch.sub(value, part.zi, out=s0).exp_()
        v.view(-1).index_fill_(0, part.index, _CERTAIN)
        total = torch.add(v, 1, out=s1)
        if part.grad_mean is not None or part.grad_zi is not None:
            inverse = torch.reciprocal(total, out=s3 if part.grad_zi is None else part.grad_zi)
            own = v.mul_(inverse)
            if part.grad_mean is not None and part.grad_disp is not None:
                part.grad_mean.mul_(own)
                part.grad_disp.mul_(own)
            if part.grad_zi is not None:
                inverse.sub_(gate)
        value = total.mul_(gate).log_()
    value.view(-1).index_copy_(0, part.index, part.nz_value)
    return value


def _careful(part: _Part) -> Tensor:
    """The same in forms that cannot overflow."""
    minus_disp = part.log_disp.exp().neg() if part.minus_disp is None else part.minus_disp
    value = logsigmoid(part.log_disp - part.log_mean) * -minus_disp
    if part.grad_mean is not None and part.grad_disp is not None:
        torch.mul(torch.sigmoid(part.log_mean - part.log_disp), minus_disp, out=part.grad_mean)
        torch.sub(value, part.grad_mean, out=part.grad_disp)
        _mend_tail(part, minus_disp)
    if part.zi is not None:
        margin = part.zi - value
        own = torch.sigmoid(-margin)
        if part.grad_mean is not None and part.grad_disp is not None:
            part.grad_mean.mul_(own)
            part.grad_disp.mul_(own)
        if part.grad_zi is not None:
            gate = torch.sigmoid(part.zi)
            torch.sub(torch.sigmoid(margin), gate, out=part.grad_zi)
            picked = gate.reshape(-1).index_select(0, part.index)
            part.grad_zi.view(-1).index_copy_(0, part.index, picked.neg_())
        value = logsigmoid(part.zi) - logsigmoid(margin)
    value = value.contiguous()
    value.view(-1).index_copy_(0, part.index, part.nz_value)
    return value


def _tail_columns(log_disp: Tensor) -> Tensor | None:
    """Columns where ``disp (p - log(1 + r))`` may cancel in single precision: those of large dispersion."""
    if log_disp.dtype == torch.float64 or not log_disp.numel() or float(log_disp.max()) <= TAIL_LOG_DISP:
        return None
    return above(log_disp if log_disp.dim() == 1 else log_disp.amax(0), TAIL_LOG_DISP)


def _mend_tail(part: _Part, minus_disp: Tensor) -> None:
    """Recompute the dispersion gradient by its series in those columns."""
    if part.tail is None or part.grad_mean is None or part.grad_disp is None:
        return
    pull = part.grad_mean.index_select(1, part.tail).neg_()
    disp = minus_disp.index_select(minus_disp.dim() - 1, part.tail).neg_()
    mended = tail_series_(part.grad_disp.index_select(1, part.tail), pull, disp)
    part.grad_disp.index_copy_(1, part.tail, mended)
