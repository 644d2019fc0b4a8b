"""Beta-binomial law of counts out of a known total."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints

from ._base import SCALAR, CountDistribution, Shape, as_tensors, positive
from ._beta_binomial_kernel import beta_binomial_log_prob
from ._special import above_zero


class BetaBinomial(CountDistribution):
    r"""Successes in ``total_count`` trials whose success probability is Beta distributed.

    With mean :math:`m` and concentration :math:`c`, :math:`\alpha = m c` and :math:`\beta = (1 - m) c`,

    .. math::
        p(x) = \binom{T}{x} \frac{B(x + \alpha, T - x + \beta)}{B(\alpha, \beta)},
        \qquad \operatorname{var} x = T m (1 - m) \frac{c + T}{c + 1}.

    A large concentration is the binomial law. All arguments broadcast to the batch shape.

    Parameters
    ----------
    mean
        Mean of the success probability, in (0, 1). (The attribute ``mean`` is the mean *count*; this
        argument is the attribute ``probability``.) Exact 0 or 1 are moved inside by a rounding error.
    concentration
        :math:`\alpha + \beta` > 0.
    total_count
        Number of trials, an integer >= 0.
    validate_args
        Check parameters and counts; ``None`` follows the library's setting.

    Raises
    ------
    ValueError
        When validation is on and a parameter or count is out of range.

    Notes
    -----
    First derivatives only. Quickest for totals up to 16, as with copies of a locus; larger ones are computed
    in double precision. A count above the total has log-mass -inf.

    References
    ----------
    Skellam (1948), A probability distribution derived from the binomial distribution by regarding the
    probability of success as variable between the sets of trials, JRSS B 10:257.

    Examples
    --------
    >>> law = BetaBinomial(mean=0.25, concentration=3.0, total_count=4)
    >>> law.mean, law.log_prob(torch.arange(5.0)).exp().sum()
    (tensor(1.), tensor(1.))
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "probability": constraints.unit_interval,
        "concentration": positive,
        "total_count": constraints.nonnegative_integer,
    }

    probability: Tensor
    concentration: Tensor
    total_count: Tensor

    def __init__(
        self,
        mean: Tensor | float,
        concentration: Tensor | float,
        total_count: Tensor | int,
        validate_args: bool | None = None,
    ) -> None:
        given: dict[str, Any] = {"probability": mean, "concentration": concentration}
        tensors = as_tensors(**given, total_count=total_count)
        shape = torch.broadcast_shapes(*(arg.shape for arg in tensors.values()))
        self._setup(tensors, shape, validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        """Integers from 0 to the total."""
        return constraints.integer_interval(0, self.total_count)

    def _plainly_valid(self, value: Tensor) -> bool:
        return super()._plainly_valid(value) and bool((value <= self._args["total_count"]).all())

    @property
    def mean(self) -> Tensor:
        """Mean count."""
        return self.total_count * self.probability

    @property
    def variance(self) -> Tensor:
        """Variance of the count."""
        spread = (self.concentration + self.total_count) / (self.concentration + 1)
        return self.total_count * self.probability * (1 - self.probability) * spread

    def _log_prob(self, value: Tensor, event_ndims: int) -> Tensor:
        args = self._args
        return beta_binomial_log_prob(
            value,
            args["probability"],
            args["concentration"],
            args["total_count"],
            event_ndims,
            self.batch_shape,
        )

    def sample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """Draw counts: a Beta probability, then a binomial count, of shape sample + batch."""
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            dtype = self.probability.dtype
            inner = torch.promote_types(dtype, torch.float32)
            mean, conc = self.probability.to(inner), self.concentration.to(inner)
            # A Beta variable is the logistic function of a difference of log-Gamma variables.
            logits = _log_gamma_draw(mean * conc, shape) - _log_gamma_draw((1 - mean) * conc, shape)
            total = self.total_count.to(inner).expand(shape)
            return torch.binomial(total, torch.sigmoid(logits)).to(dtype)


def _log_gamma_draw(shape_parameter: Tensor, shape: torch.Size) -> Tensor:
    """Logarithm of a standard Gamma draw, as Gamma(k + 1) * U^(1/k)."""
    k = above_zero(shape_parameter).expand(shape).contiguous()
    draw = torch._standard_gamma(k + 1).log_()
    return draw.sub_(torch.empty_like(draw).exponential_().div_(k))
