"""Elementary functions of the count laws, accurate where the textbook forms cancel."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from ._layout import wide_dtype

# Up to this count the rising factorial is a plain product; beyond it, Stirling's series is exact enough.
SMALL_COUNT = 16


class _SafeLog(torch.autograd.Function):
    """``log(max(x, floor))`` whose gradient ``1 / max(x, floor)`` is finite at zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return above_zero(x).log()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / above_zero(ctx.saved_tensors[0])


def above_zero(x: Tensor) -> Tensor:
    """``x``, at least a number so small that it acts as zero but has finite powers and reciprocals."""
    return x.clamp(min=torch.finfo(x.dtype).tiny ** 0.8)


def safe_log(x: Tensor) -> Tensor:
    """Logarithm of a non-negative tensor; zero is read as a very small positive number."""
    return _SafeLog.apply(x)


def stable_softplus(x: Tensor) -> Tensor:
    """``log(1 + exp(x))``, right to double precision (the library's default cuts off at 20)."""
    return softplus(x, 1.0, 40.0)


def lgamma_digamma(u: Tensor, large: bool, grad: bool) -> tuple[Tensor, Tensor | None]:
    """Log-gamma and digamma; ``large`` promises ``u >= SMALL_COUNT``: Stirling's series is faster."""
    if not large or u.numel() < 2000:  # of a few numbers the calls cost more than the functions
        return torch.lgamma(u), torch.digamma(u) if grad else None
    log_u, inv = u.log(), u.reciprocal()
    lgamma = (u - 0.5) * log_u - u + (0.5 * math.log(2 * math.pi)) + _stirling_rest(inv)
    return lgamma, log_u - 0.5 * inv + _stirling_slope(inv) if grad else None


def log_rising(base: Tensor, count: Tensor, grad: bool) -> tuple[Tensor, Tensor | None]:
    """``lgamma(base + count) - lgamma(base)`` and its derivative in ``base``, for double precision.

    Where ``base`` is large the difference is taken inside Stirling's series, since each of the two terms may
    be many orders of magnitude larger than it.
    """
    big = base.clamp(min=SMALL_COUNT)
    upper = big + count
    growth = torch.log1p(count / big)
    inv, inv_upper = big.reciprocal(), upper.reciprocal()
    series = _stirling_rest(inv_upper) - _stirling_rest(inv)
    value = count * big.log() + (upper - 0.5) * growth - count + series
    near = base < SMALL_COUNT
    value = torch.where(near, torch.lgamma(base + count) - torch.lgamma(base), value)
    if not grad:
        return value, None
    slope = growth - 0.5 * (inv_upper - inv) + _stirling_slope(inv_upper) - _stirling_slope(inv)
    return value, torch.where(near, torch.digamma(base + count) - torch.digamma(base), slope)


def _stirling_rest(inv: Tensor) -> Tensor:
    inv2 = inv * inv
    return (((inv2 * (-1 / 1680) + 1 / 1260) * inv2 - 1 / 360) * inv2 + 1 / 12) * inv


def _stirling_slope(inv: Tensor) -> Tensor:
    inv2 = inv * inv
    return (((inv2 * (1 / 240) - 1 / 252) * inv2 + 1 / 120) * inv2 - 1 / 12) * inv2


def is_small_integer(count: Tensor) -> bool:
    """Whether all counts are integers in 0..SMALL_COUNT (one check, most data)."""
    return count.numel() == 0 or (float(count.max()) <= SMALL_COUNT and torch.equal(count.trunc(), count))


def nb_nonzero(
    count: Tensor, log_mean: Tensor, log_disp: Tensor, grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Negative binomial log-mass at counts > 0 and its gradient in log mean and log inverse dispersion.

    All arguments are vectors of equal length. With r = mean/disp the log-mass of a small integer x is

        x (log mean - log(1 + r)) - disp log(1 + r) + sum_{j=1}^{x-1} log((1 + j/disp) / (1 + j)),

    in which nothing large cancels and a single count needs no sum. Other counts go through log-gamma in
    double precision.
    """
    diff = log_mean - log_disp
    log1p_r = stable_softplus(diff)
    disp = log_disp.exp()
    value = (log_mean - log1p_r).mul_(count).sub_(disp * log1p_r)
    grad_mean = grad_disp = share = pull = None
    if grad:
        prob, share = torch.sigmoid(diff), torch.sigmoid(-diff)  # mean / (mean + disp), and the complement
        pull = disp * prob
        grad_mean = torch.addcmul(-pull, count, share)
        grad_disp = prob.add_(minus_tail(disp, log1p_r, pull, log_disp))
    whole = count.trunc()
    integers = torch.equal(whole, count)
    exact = count if integers else count.where(count == whole, 0)
    for low, high in ((1, 4), (4, SMALL_COUNT)):
        _add_small(exact, low, high, disp, share, pull, value, grad_disp)
    rare = above(count if integers else count.where(count == whole, torch.inf), SMALL_COUNT)
    if rare.numel():
        found = _nb_wide(count[rare], log_mean[rare], log_disp[rare], grad)
        for target, new in zip((value, grad_mean, grad_disp), found, strict=True):
            if target is not None and new is not None:
                target.index_copy_(0, rare, new.to(target.dtype))
    return value, grad_mean, grad_disp


def _add_small(
    count: Tensor,
    low: int,
    high: int,
    disp: Tensor,
    share: Tensor | None,
    pull: Tensor | None,
    value: Tensor,
    grad_disp: Tensor | None,
) -> None:
    """Add the terms low <= j < min(count, high) of the sums over j, in place, where count > low."""
    at = above(count, low)
    if at.numel() == 0:
        return
    count = count.index_select(0, at)
    disp = disp.index_select(0, at)
    j = torch.arange(low, high, device=count.device, dtype=count.dtype)[:, None]
    use = (count - j).clamp_(0, 1)  # exactly 0 or 1 for integers
    total = disp + j
    term = (total / disp).mul_((j + 1).reciprocal_()).log_().mul_(use).sum(0)
    value.index_copy_(0, at, term.add_(value.index_select(0, at)))
    if grad_disp is not None and share is not None and pull is not None:
        slope = torch.addcmul(pull.index_select(0, at), share.index_select(0, at), j, value=-1)
        slope = slope.div_(total).mul_(use).sum(0)
        grad_disp.index_copy_(0, at, slope.add_(grad_disp.index_select(0, at)))


def above(values: Tensor, threshold: float) -> Tensor:
    """Positions of a vector's entries above a threshold."""
    if values.device.type == "cpu":  # NumPy compares and searches several times faster
        return torch.from_numpy(np.flatnonzero(values.numpy() > threshold))
    return (values > threshold).nonzero().squeeze(-1)


def minus_tail(disp: Tensor, log1p_r: Tensor, pull: Tensor, log_disp: Tensor) -> Tensor:
    """``disp (p - log(1 + r))`` with p = r/(1 + r): by its series where disp is large and r small."""
    out = pull - disp * log1p_r
    if disp.dtype == torch.float64 or not disp.numel() or float(log_disp.max()) <= TAIL_LOG_DISP:
        return out
    return tail_series_(out, pull, disp)


# Above this log inverse dispersion the two halves of the gradient may cancel in single precision.
TAIL_LOG_DISP = 3.0


def tail_series_(out: Tensor, pull: Tensor, disp: Tensor) -> Tensor:
    """Replace ``out`` by -disp (p^2/2 + p^3/3 + ...) where p = pull/disp is small."""
    p = pull / disp
    series = (((p * (1 / 6) + 1 / 5) * p + 1 / 4) * p + 1 / 3) * p + 1 / 2
    return torch.where(p < 0.05, series.mul_(p).mul_(-pull), out)


def _nb_wide(
    count: Tensor, log_mean: Tensor, log_disp: Tensor, grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The general formula, for large or fractional counts, in double precision."""
    wide = wide_dtype(count)
    count, log_mean, log_disp = count.to(wide), log_mean.to(wide), log_disp.to(wide)
    disp, diff = log_disp.exp(), log_mean - log_disp
    log1p_r = stable_softplus(diff)
    large = bool(count.min() >= SMALL_COUNT)
    if float(disp.max()) > 1e4:
        rising, slope = log_rising(disp, count, grad)
    else:
        upper, upper_slope = lgamma_digamma(disp + count, large, grad)
        lower, lower_slope = lgamma_digamma(disp, False, grad)
        rising = upper - lower
        slope = upper_slope - lower_slope if upper_slope is not None and lower_slope is not None else None
    factorial = lgamma_digamma(count + 1, large, False)[0]
    value = rising - factorial + count * (diff - log1p_r) - disp * log1p_r
    if slope is None:
        return value, None, None
    taken = count * torch.sigmoid(-diff)
    pull = disp * torch.sigmoid(diff)
    grad_disp = disp * (slope - log1p_r) + pull - taken
    return value, taken - pull, grad_disp
