"""Negative binomial law of counts, by mean and inverse dispersion."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import lazy_property

from ._base import (
    MAX_RATE,
    SCALAR,
    CountDistribution,
    Shape,
    as_tensors,
    exactly_one,
    nonnegative,
    positive,
    real,
)
from ._nb_kernel import nb_log_prob
from ._special import safe_log


class NegativeBinomial(CountDistribution):
    r"""Negative binomial counts with mean :math:`\mu` and inverse dispersion :math:`\theta`.

    .. math::
        p(x) = \frac{\Gamma(x + \theta)}{x!\,\Gamma(\theta)}
               \left(\frac{\theta}{\theta + \mu}\right)^{\theta}
               \left(\frac{\mu}{\theta + \mu}\right)^{x},
        \qquad \operatorname{var} x = \mu + \mu^2 / \theta,

    a Poisson law whose rate is Gamma distributed with mean :math:`\mu` and shape :math:`\theta`.
    Give one of ``mean`` and ``log_mean``, and one of ``inverse_dispersion`` and ``log_inverse_dispersion``;
    the logarithms are the faster and more accurate way. All broadcast to the batch shape.

    Parameters
    ----------
    mean
        Mean count, >= 0. At exactly 0 the law is a point mass at 0 (other counts get a very negative,
        finite log-mass).
    inverse_dispersion
        :math:`\theta` > 0; large is Poisson-like.
    log_mean, log_inverse_dispersion
        Their natural logarithms, any real.
    validate_args
        Check parameters and counts; ``None`` follows the library's setting.

    Raises
    ------
    ValueError
        When not exactly one of a pair is given, or validation is on and fails.

    Notes
    -----
    Values and first derivatives are right in single precision for means from 1e-8 to 1e6 and inverse
    dispersions from 1e-4 to 1e6. There are no second derivatives. ``.to_event(n)`` gives a law that sums
    over its event inside the kernel, which is the quickest.

    References
    ----------
    Lopez, Regier, Cole, Jordan, Yosef (2018), Deep generative modeling for single-cell transcriptomics,
    Nature Methods 15:1053, use this parametrisation for UMI counts.

    Examples
    --------
    >>> law = NegativeBinomial(mean=torch.tensor([1.0, 10.0]), inverse_dispersion=2.0)
    >>> law.variance
    tensor([ 1.5000, 60.0000])
    >>> law.log_prob(torch.tensor([0.0, 0.0])).exp()
    tensor([0.4444, 0.0278])
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "mean": nonnegative,
        "inverse_dispersion": positive,
        "log_mean": real,
        "log_inverse_dispersion": real,
    }

    def __init__(
        self,
        mean: Tensor | float | None = None,
        inverse_dispersion: Tensor | float | None = None,
        *,
        log_mean: Tensor | float | None = None,
        log_inverse_dispersion: Tensor | float | None = None,
        validate_args: bool | None = None,
    ) -> None:
        args: dict[str, Any] = {
            "mean": mean,
            "inverse_dispersion": inverse_dispersion,
            "log_mean": log_mean,
            "log_inverse_dispersion": log_inverse_dispersion,
        }
        exactly_one(args, "mean", "log_mean")
        exactly_one(args, "inverse_dispersion", "log_inverse_dispersion")
        tensors = as_tensors(**args)
        shape = torch.broadcast_shapes(*(arg.shape for arg in tensors.values()))
        self._setup(tensors, shape, validate_args)

    @lazy_property
    def mean(self) -> Tensor:
        """Mean count, of the batch shape."""
        return self._args["log_mean"].exp().expand(self.batch_shape)

    @lazy_property
    def inverse_dispersion(self) -> Tensor:
        """Inverse dispersion, of the batch shape."""
        return self._args["log_inverse_dispersion"].exp().expand(self.batch_shape)

    @lazy_property
    def log_mean(self) -> Tensor:
        """Logarithm of the mean (of a tiny positive number where the mean is 0)."""
        return self._log("mean").expand(self.batch_shape)

    @lazy_property
    def log_inverse_dispersion(self) -> Tensor:
        """Logarithm of the inverse dispersion."""
        return self._log("inverse_dispersion").expand(self.batch_shape)

    def _log(self, name: str) -> Tensor:
        """Logarithm of a parameter, in the shape it was given in."""
        log = self._args.get(f"log_{name}")
        return safe_log(self._args[name]) if log is None else log

    @property
    def variance(self) -> Tensor:
        """mean + mean^2 / inverse_dispersion."""
        return self.mean + self.mean * (self.mean / self.inverse_dispersion)

    def _log_prob(self, value: Tensor, event_ndims: int) -> Tensor:
        return nb_log_prob(
            value, self._log("mean"), self._log("inverse_dispersion"), None, event_ndims, self.batch_shape
        )

    def sample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """Draw counts: a Gamma rate (cut at 1e8), then a Poisson count, of shape sample + batch."""
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            return draw_counts(self._log("mean"), self._log("inverse_dispersion"), shape)


def draw_counts(log_mean: Tensor, log_disp: Tensor, shape: torch.Size) -> Tensor:
    """Negative binomial draws.

    A Gamma(shape k) variable is Gamma(k + 1) * U^(1/k); in logarithms nothing underflows, however small k.
    """
    dtype = torch.promote_types(log_mean.dtype, log_disp.dtype)
    inner = torch.promote_types(dtype, torch.float32)
    log_mean, log_disp = log_mean.to(inner), log_disp.to(inner)
    disp = log_disp.exp().expand(shape).contiguous()
    log_rate = torch._standard_gamma(disp + 1).log_()
    log_rate.sub_(torch.empty_like(log_rate).exponential_().div_(disp))
    log_rate.add_(log_mean - log_disp)
    return torch.poisson(log_rate.exp_().clamp_(max=MAX_RATE)).to(dtype)
