"""A Normal law cut off below, as a smooth image of the standard Normal."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# Below this, exp(log p) is too near to the smallest double for the library's quantile function.
_FAR = -600.0


def truncate_below(standard: Tensor, loc: Tensor, scale: Tensor, low: float) -> Tensor:
    r"""Map a standard Normal variable to Normal(loc, scale) truncated below at `low`.

    The map keeps quantiles: :math:`\bar\Phi((y - m)/s) = \bar\Phi(u)\,\bar\Phi((l - m)/s)`, with
    :math:`\bar\Phi` the upper tail of the standard Normal. A site written with it has a density that is
    bounded whatever `loc` and `scale` are, which the truncated law itself has not.

    Parameters
    ----------
    standard
        u, any shape.
    loc, scale
        m and s > 0, broadcastable to it.
    low
        l.

    Returns
    -------
    Tensor
        y >= low, of the broadcast shape. First derivatives only.
    """
    alpha = (low - loc) / scale
    return loc + scale * _Quantile.apply(standard, alpha)


def untruncate_below(value: Tensor, loc: Tensor, scale: Tensor, low: float) -> Tensor:
    """Inverse of `truncate_below` in its first argument; minus infinity at `low`. Without gradient."""
    with torch.no_grad():
        z, alpha = (
            (v.double() - loc.double()) / scale.double() for v in (value, torch.full_like(value, low))
        )
        return _inverse_log_tail(_log_tail(z) - _log_tail(alpha)).to(value.dtype)


class _Quantile(torch.autograd.Function):
    """z with log-tail(z) = log-tail(u) + log-tail(alpha)."""

    @staticmethod
    def forward(ctx: Any, standard: Tensor, alpha: Tensor) -> Tensor:
        u, a = torch.broadcast_tensors(standard.double(), alpha.double())
        z = _inverse_log_tail(_log_tail(u) + _log_tail(a))
        ctx.save_for_backward(u, a, z)
        ctx.shapes = standard.shape, alpha.shape
        return z.to(torch.promote_types(standard.dtype, alpha.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        u, a, z = ctx.saved_tensors
        share = [(_log_hazard(v) - _log_hazard(z)).exp() * grad for v in (u, a)]
        first, second = (s.sum_to_size(shape).to(grad) for s, shape in zip(share, ctx.shapes, strict=True))
        return first, second


def _log_tail(z: Tensor) -> Tensor:
    return torch.special.log_ndtr(-z)


def _log_hazard(z: Tensor) -> Tensor:
    return -0.5 * z * z - 0.5 * math.log(2 * math.pi) - _log_tail(z)


def _inverse_log_tail(log_p: Tensor) -> Tensor:
    """z whose upper tail has this log-probability, in double precision."""
    near = -torch.special.ndtri(log_p.clamp(min=_FAR).exp())
    far = log_p.clamp(max=_FAR)
    z = (-2 * far - (-2 * far).log() - math.log(2 * math.pi)).sqrt()  # leading terms of Mills' ratio
    for _ in range(3):  # Newton's steps on the log-tail, which is nearly quadratic there
        z = z + (_log_tail(z) - far) / _log_hazard(z).exp()
    return torch.where(log_p < _FAR, z, near)
