"""Pareto smoothed importance sampling: how far importance weights, and what they average, can be trusted."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

#: Range of log-weights below which they are the same for any purpose.
_FLAT = 0.01


class Smoothed(NamedTuple):
    """Importance weights with a smoothed tail.

    Attributes
    ----------
    log_weights
        (S, ...), normalised: their exponentials sum to 1 over draws.
    khat
        (...), shape of the tail; −inf where all weights are the same within one per cent.
    log_mean
        (...), logarithm of the mean of the smoothed weights before they were normalised.
    """

    log_weights: Tensor
    khat: Tensor
    log_mean: Tensor


def tail_size(n_draws: int) -> int:
    """Draws in the tail of the weights: the least of S/5 and 3√S (Vehtari et al. 2024), rounded up."""
    return math.ceil(min(0.2 * n_draws, 3 * math.sqrt(n_draws)))


def khat_threshold(n_draws: int) -> float:
    """Tail shape above which S draws are too few to trust: the least of 1 − 1/log10(S) and 0.7.

    Vehtari, Simpson, Gelman, Yao and Gabry (2024), section 3.2.2.
    """
    return min(1 - 1 / math.log10(n_draws), 0.7)


def smooth(log_weights: Tensor) -> Smoothed:
    """Replace the largest importance weights by the quantiles of a generalised Pareto law fitted to them.

    Parameters
    ----------
    log_weights
        (S, ...) log p − log q of S draws from q; S is at least 25. Computed in double precision.

    Returns
    -------
    Smoothed
        Weights, tail shapes, and the smoothed estimate of the log of the mean weight.

    Raises
    ------
    ValueError
        If there are fewer than 25 draws.

    References
    ----------
    Vehtari, Simpson, Gelman, Yao, Gabry (2024). Pareto smoothed importance sampling. *Journal of Machine
    Learning Research* 25(72).
    """
    n = len(log_weights)
    m = tail_size(n)
    if m < 5:
        raise ValueError(f"a tail is fitted to a fifth of the draws, at least 5 of 25; there are {n} draws")
    shape = log_weights.shape
    log_w = log_weights.double().reshape(n, -1)
    peak = log_w.amax(0)
    ordered, order = (log_w - peak).sort(0)
    cut = ordered[n - m - 1].exp()
    excess = ordered[n - m :].exp() - cut
    khat, sigma = fit_generalized_pareto(excess)
    # weights that differ by rounding have ties, whose tail is no tail
    flat = ordered[0] > -_FLAT
    khat = torch.where(flat, -torch.inf, khat)
    fitted = torch.isfinite(khat)
    p = ((torch.arange(m, dtype=torch.float64, device=log_w.device) + 0.5) / m).unsqueeze(-1)
    k = torch.where(fitted, khat, torch.ones_like(khat))
    quantiles = torch.where(
        k.abs() > 1e-8, sigma * torch.expm1(-k * torch.log1p(-p)) / k, -sigma * torch.log1p(-p)
    )
    tail = (cut + quantiles).log().clamp(max=0)  # no weight above the largest raw one
    ordered[n - m :] = torch.where(fitted, tail, ordered[n - m :])
    smoothed = torch.empty_like(ordered).scatter_(0, order, ordered)
    total = smoothed.logsumexp(0)
    return Smoothed(
        (smoothed - total).reshape(shape),
        khat.reshape(shape[1:]),
        (total + peak - math.log(n)).reshape(shape[1:]),
    )


def fit_generalized_pareto(excess: Tensor) -> tuple[Tensor, Tensor]:
    """Shape and scale of generalised Pareto laws, many at a time.

    The quasi-Bayesian estimator of Zhang and Stephens (2009): the posterior mean of a reparameterised shape
    over a grid of m = 30 + √M points, under a prior made from the first quartile. The shape is drawn towards
    0.5 with the weight of ten observations (Vehtari et al. 2024, appendix G).

    Parameters
    ----------
    excess
        (M, ...) exceedances over the threshold, at least 0, sorted along the first axis; float64.

    Returns
    -------
    tuple
        Shape k (...), positive for heavy tails, and scale (...). Where all exceedances are the same, −inf
        and 0.

    References
    ----------
    Zhang, Stephens (2009). A new and efficient estimation method for the generalized Pareto distribution.
    *Technometrics* 51, 316–325.
    """
    n = len(excess)
    top, quartile = excess[-1], excess[max(int(n / 4 + 0.5) - 1, 0)]
    constant = (top - excess[0]) <= 1e-12 * top.abs().clamp(min=1e-300)
    # ties at the threshold would make the scale of the prior zero
    quartile = quartile.clamp(min=1e-300)
    quartile, top = (torch.where(constant, torch.ones_like(v), v) for v in (quartile, top))
    x = torch.where(constant, torch.ones_like(excess), excess)
    m = 30 + int(math.sqrt(n))
    j = torch.arange(1, m + 1, dtype=x.dtype, device=x.device).reshape(-1, *[1] * quartile.ndim)
    theta = 1 / top + (1 - (m / (j - 0.5)).sqrt()) / (3 * quartile)  # (m, ...)
    k = torch.stack([torch.log1p(-t * x).mean(0) for t in theta])
    log_likelihood = n * ((-theta / k).log() - k - 1)
    weight = log_likelihood.softmax(0)
    best = (weight * theta).sum(0)
    shape = torch.log1p(-best * x).mean(0)
    scale = -shape / best
    shape = (n * shape + 5) / (n + 10)
    return torch.where(constant, -torch.inf, shape), torch.where(constant, torch.zeros_like(scale), scale)
