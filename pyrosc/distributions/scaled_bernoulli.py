"""Bernoulli law whose probability is a logistic function times a scale."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import lazy_property

from ._base import SCALAR, CountDistribution, Shape, as_tensors, real
from ._scaled_bernoulli_kernel import scaled_bernoulli_log_prob


class ScaledBernoulli(CountDistribution):
    r"""Zeros and ones with :math:`P(1) = s\,\sigma(a)`.

    A site is seen where it is open, with probability :math:`\sigma(a)`, and not missed, with probability
    :math:`s \le 1` (the depth of a cell, times how well a region is captured). With ``log_scale=0`` it is the
    plain Bernoulli law by its logits. Zeros keep their accuracy in single precision for probabilities from
    1e-30 to 1 - 1e-30.

    Parameters
    ----------
    logits
        :math:`a`, real.
    log_scale
        :math:`\log s \le 0`; larger values are taken as 0.
    log_depth
        A further part of :math:`\log s`, such as that of a cell, (..., 1); None for none.
    validate_args
        Check parameters and values; ``None`` follows the library's setting.

    Raises
    ------
    ValueError
        When validation is on and a parameter or value is out of range.

    Notes
    -----
    First derivatives only. All arguments broadcast to the batch shape.

    References
    ----------
    Ashuach, Reidenbach, Gayoso, Yosef. PeakVI: a deep generative model for single-cell chromatin
    accessibility analysis. Cell Reports Methods 2 (2022).

    Examples
    --------
    >>> law = ScaledBernoulli(logits=torch.zeros(2), log_scale=torch.tensor(0.5).log())
    >>> law.log_prob(torch.tensor([0.0, 1.0])).exp()
    tensor([0.7500, 0.2500])
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "logits": real,
        "log_scale": real,
        "log_depth": real,
    }
    support = constraints.boolean  # type: ignore[assignment]  # whole numbers too

    logits: Tensor
    log_scale: Tensor

    def __init__(
        self,
        logits: Tensor | float,
        log_scale: Tensor | float = 0.0,
        log_depth: Tensor | float | None = None,
        validate_args: bool | None = None,
    ) -> None:
        tensors = as_tensors(logits=logits, log_scale=log_scale, log_depth=log_depth)
        shape = torch.broadcast_shapes(*(arg.shape for arg in tensors.values()))
        self._setup(tensors, shape, validate_args)

    def _plainly_valid(self, value: Tensor) -> bool:
        return super()._plainly_valid(value) and float(value.detach().max()) <= 1

    @lazy_property
    def log_depth(self) -> Tensor:
        """0, where none was given."""
        return self.logits.new_zeros(()).expand(self.batch_shape)

    @lazy_property
    def probability(self) -> Tensor:
        """P(1), of the batch shape."""
        return (
            (self.log_scale + self.log_depth).clamp(max=0) + torch.nn.functional.logsigmoid(self.logits)
        ).exp()

    @property
    def mean(self) -> Tensor:
        """P(1)."""
        return self.probability

    @property
    def variance(self) -> Tensor:
        """P(1) (1 - P(1))."""
        return self.probability * (1 - self.probability)

    def parameters(self) -> dict[str, Tensor]:
        """The probability."""
        return {"probability": self.probability}

    def _log_prob(self, value: Tensor, event_ndims: int) -> Tensor:
        args: dict[str, Any] = self._args
        return scaled_bernoulli_log_prob(
            value, args["logits"], args["log_scale"], args.get("log_depth"), event_ndims, self.batch_shape
        )

    def sample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """Draw zeros and ones of shape sample + batch."""
        with torch.no_grad():
            p = self.probability.expand(self._extended_shape(torch.Size(sample_shape)))
            inner = p.to(torch.promote_types(p.dtype, torch.float32))
            return torch.bernoulli(inner).to(p.dtype)
