"""Poisson law of counts, by its mean or the logarithm of it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import lazy_property

from ._base import MAX_RATE, SCALAR, CountDistribution, Shape, as_tensors, exactly_one, nonnegative, real
from ._poisson_kernel import poisson_log_prob
from ._special import safe_log


class Poisson(CountDistribution):
    r"""Poisson counts, :math:`p(x) = e^{-\mu} \mu^x / x!`.

    Unlike the library's own law it takes the logarithm of the mean (for which the gradient is simply
    :math:`x - \mu`) and keeps its accuracy in single precision for means from 1e-8 to 1e6.

    Parameters
    ----------
    mean
        Mean count, >= 0. At exactly 0 the law is a point mass at 0.
    log_mean
        Its natural logarithm; give one of the two.
    validate_args
        Check parameters and counts; ``None`` follows the library's setting.

    Raises
    ------
    ValueError
        When not exactly one of ``mean`` and ``log_mean`` is given, or validation is on and fails.

    Examples
    --------
    >>> Poisson(log_mean=torch.tensor([0.0, 0.0])).to_event(1).log_prob(torch.tensor([0.0, 1.0]))
    tensor(-2.)
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {"mean": nonnegative, "log_mean": real}

    def __init__(
        self,
        mean: Tensor | float | None = None,
        *,
        log_mean: Tensor | float | None = None,
        validate_args: bool | None = None,
    ) -> None:
        args: dict[str, Any] = {"mean": mean, "log_mean": log_mean}
        exactly_one(args, "mean", "log_mean")
        tensors = as_tensors(**args)
        (only,) = tensors.values()
        self._setup(tensors, only.shape, validate_args)

    @lazy_property
    def mean(self) -> Tensor:
        """Mean count, of the batch shape."""
        return self._args["log_mean"].exp().expand(self.batch_shape)

    @lazy_property
    def log_mean(self) -> Tensor:
        """Logarithm of the mean (of a tiny positive number where the mean is 0)."""
        return safe_log(self._args["mean"]).expand(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        """Equal to the mean."""
        return self.mean

    def _log_prob(self, value: Tensor, event_ndims: int) -> Tensor:
        log_mean = self._args.get("log_mean")
        log_mean = safe_log(self._args["mean"]) if log_mean is None else log_mean
        return poisson_log_prob(value, log_mean, event_ndims, self.batch_shape)

    def sample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """Draw counts of shape sample + batch; rates are cut at 1e8."""
        with torch.no_grad():
            rate = self.mean.expand(self._extended_shape(torch.Size(sample_shape)))
            inner = rate.to(torch.promote_types(rate.dtype, torch.float32)).clamp(max=MAX_RATE)
            return torch.poisson(inner).to(rate.dtype)
