"""Negative binomial law of counts with extra zeros."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints

from ._base import SCALAR, CountDistribution, Shape, as_tensors, real
from ._nb_kernel import nb_log_prob
from .negative_binomial import NegativeBinomial, draw_counts


class ZeroInflatedNegativeBinomial(CountDistribution):
    r"""Zero with probability :math:`\pi`, otherwise a negative binomial count.

    .. math::
        p(x) = \pi\,[x = 0] + (1 - \pi)\,\mathrm{NB}(x; \mu, \theta),
        \qquad \pi = \frac{1}{1 + e^{-\text{zi\_logits}}}.

    Give one of ``mean`` and ``log_mean``, and one of ``inverse_dispersion`` and ``log_inverse_dispersion``.
    All broadcast to the batch shape.

    Parameters
    ----------
    mean, inverse_dispersion, log_mean, log_inverse_dispersion
        Those of the negative binomial part; see :class:`NegativeBinomial`. (The attributes ``mean`` and
        ``variance`` are those of the whole law; the part is the attribute ``nb``.)
    zi_logits
        Logits of the extra zeros' probability, any real.
    validate_args
        Check parameters and counts; ``None`` follows the library's setting.

    Raises
    ------
    ValueError
        When not exactly one of a pair is given, ``zi_logits`` is missing, or validation is on and fails.

    References
    ----------
    Lopez, Regier, Cole, Jordan, Yosef (2018), Deep generative modeling for single-cell transcriptomics,
    Nature Methods 15:1053.

    Examples
    --------
    >>> law = ZeroInflatedNegativeBinomial(mean=4.0, inverse_dispersion=2.0, zi_logits=0.0)
    >>> law.mean
    tensor(2.)
    >>> law.log_prob(torch.tensor(0.0)).exp()
    tensor(0.5556)
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {"zi_logits": real}

    def __init__(
        self,
        mean: Tensor | float | None = None,
        inverse_dispersion: Tensor | float | None = None,
        zi_logits: Tensor | float | None = None,
        *,
        log_mean: Tensor | float | None = None,
        log_inverse_dispersion: Tensor | float | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if zi_logits is None:
            raise ValueError("give `zi_logits`, the logits of zero inflation")
        args = as_tensors(
            mean=mean,
            inverse_dispersion=inverse_dispersion,
            log_mean=log_mean,
            log_inverse_dispersion=log_inverse_dispersion,
            zi_logits=zi_logits,
        )
        gate = {"zi_logits": args.pop("zi_logits")}
        self.nb = NegativeBinomial(**args, validate_args=validate_args)
        shape = torch.broadcast_shapes(self.nb.batch_shape, gate["zi_logits"].shape)
        if self.nb.batch_shape != shape:
            self.nb = self.nb.expand(shape)
        self._setup(gate, shape, validate_args)

    zi_logits: Tensor
    nb: NegativeBinomial

    def _expand_parts(self, new: Any, batch_shape: torch.Size) -> None:
        new.nb = self.nb.expand(batch_shape)

    def parameters(self) -> dict[str, Tensor]:
        """``mean`` and ``inverse_dispersion`` of the negative binomial component, and ``zi_logits``."""
        return self.nb.parameters() | super().parameters()

    @property
    def mean(self) -> Tensor:
        """Mean of the whole law: (1 - zero inflation) times the negative binomial mean."""
        return torch.sigmoid(-self.zi_logits) * self.nb.mean

    @property
    def variance(self) -> Tensor:
        """Variance of the whole law."""
        keep = torch.sigmoid(-self.zi_logits)
        return keep * (self.nb.variance + torch.sigmoid(self.zi_logits) * self.nb.mean.square())

    def _log_prob(self, value: Tensor, event_ndims: int) -> Tensor:
        log_mean, log_disp = self.nb._log("mean"), self.nb._log("inverse_dispersion")
        return nb_log_prob(value, log_mean, log_disp, self._args["zi_logits"], event_ndims, self.batch_shape)

    def sample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """Draw counts of shape sample + batch."""
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            counts = draw_counts(self.nb._log("mean"), self.nb._log("inverse_dispersion"), shape)
            logits = self._args["zi_logits"]
            keep = torch.sigmoid(-logits.to(torch.promote_types(logits.dtype, torch.float32)))
            return counts * torch.bernoulli(keep.expand(shape)).to(counts.dtype)
