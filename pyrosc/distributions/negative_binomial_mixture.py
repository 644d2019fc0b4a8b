"""Mixture of two negative binomial laws: background and foreground."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

from ._base import SCALAR, CountDistribution, Shape, as_tensors, exactly_one, real
from .negative_binomial import NegativeBinomial, draw_counts


class NegativeBinomialMixture(CountDistribution):
    r"""Counts that are background with probability :math:`\pi` and foreground otherwise.

    .. math::
        p(x) = \pi\,\mathrm{NB}(x; \mu_b, \theta) + (1 - \pi)\,\mathrm{NB}(x; \mu_f, \theta),
        \qquad \pi = \frac{1}{1 + e^{-\text{mixing\_logits}}},

    with one inverse dispersion :math:`\theta` for both. Means and inverse dispersion may each be given by
    their logarithm instead. All broadcast to the batch shape.

    Parameters
    ----------
    mean_background, mean_foreground
        Mean counts of the two components, >= 0.
    inverse_dispersion
        Shared inverse dispersion, > 0.
    mixing_logits
        Logits of the probability of the *background*.
    log_mean_background, log_mean_foreground, log_inverse_dispersion
        Natural logarithms, any real.
    validate_args
        Check parameters and counts; ``None`` follows the library's setting.

    Raises
    ------
    ValueError
        When not exactly one of a pair is given, ``mixing_logits`` is missing, or validation is on and fails.

    Notes
    -----
    The components are the attributes ``background`` and ``foreground``.

    References
    ----------
    Gayoso, Steier, Lopez, Regier, Nazor, Streets, Yosef (2021), Joint probabilistic modeling of single-cell
    multi-omic data with totalVI, Nature Methods 18:272, use it for protein counts.

    Examples
    --------
    >>> law = NegativeBinomialMixture(2.0, 20.0, inverse_dispersion=5.0, mixing_logits=0.0)
    >>> law.mean
    tensor(11.)
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {"mixing_logits": real}

    def __init__(
        self,
        mean_background: Tensor | float | None = None,
        mean_foreground: Tensor | float | None = None,
        inverse_dispersion: Tensor | float | None = None,
        mixing_logits: Tensor | float | None = None,
        *,
        log_mean_background: Tensor | float | None = None,
        log_mean_foreground: Tensor | float | None = None,
        log_inverse_dispersion: Tensor | float | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if mixing_logits is None:
            raise ValueError("give `mixing_logits`, the logits of the background's probability")
        given: dict[str, Any] = {
            "mean_background": mean_background,
            "mean_foreground": mean_foreground,
            "log_mean_background": log_mean_background,
            "log_mean_foreground": log_mean_foreground,
            "inverse_dispersion": inverse_dispersion,
            "log_inverse_dispersion": log_inverse_dispersion,
            "mixing_logits": mixing_logits,
        }
        for name in ("mean_background", "mean_foreground", "inverse_dispersion"):
            exactly_one(given, name, f"log_{name}")
        args = as_tensors(**given)
        mixing = {"mixing_logits": args.pop("mixing_logits")}
        disp = {name: arg for name, arg in args.items() if name.endswith("dispersion")}
        shape = torch.broadcast_shapes(mixing["mixing_logits"].shape, *(arg.shape for arg in args.values()))
        parts = {}
        for part in ("background", "foreground"):
            mean = {name[: -len(part) - 1]: arg for name, arg in args.items() if name.endswith(part)}
            parts[part] = NegativeBinomial(**mean, **disp, validate_args=validate_args).expand(shape)
        self.background, self.foreground = parts["background"], parts["foreground"]
        self._setup(mixing, shape, validate_args)

    mixing_logits: Tensor
    background: NegativeBinomial
    foreground: NegativeBinomial

    def _expand_parts(self, new: Any, batch_shape: torch.Size) -> None:
        new.background = self.background.expand(batch_shape)
        new.foreground = self.foreground.expand(batch_shape)

    @property
    def inverse_dispersion(self) -> Tensor:
        """Inverse dispersion of both components."""
        return self.background.inverse_dispersion

    def parameters(self) -> dict[str, Tensor]:
        """Means of both components, their ``inverse_dispersion``, and ``mixing_logits``."""
        means = {"mean_background": self.background.mean, "mean_foreground": self.foreground.mean}
        return means | {"inverse_dispersion": self.inverse_dispersion} | super().parameters()

    @property
    def mean(self) -> Tensor:
        """Mean of the mixture."""
        pi = torch.sigmoid(self.mixing_logits)
        return pi * self.background.mean + torch.sigmoid(-self.mixing_logits) * self.foreground.mean

    @property
    def variance(self) -> Tensor:
        """Within-component variance plus the spread of the component means."""
        pi, rest = torch.sigmoid(self.mixing_logits), torch.sigmoid(-self.mixing_logits)
        within = pi * self.background.variance + rest * self.foreground.variance
        return within + pi * rest * (self.foreground.mean - self.background.mean).square()

    def log_prob_components(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Joint log-mass of the count with being background, and with being foreground.

        Their difference is the posterior log-odds of background.
        """
        logits = self.mixing_logits
        background = logsigmoid(logits) + self.background._log_prob(value, 0)
        return background, logsigmoid(-logits) + self.foreground._log_prob(value, 0)

    def _log_prob(self, value: Tensor, event_ndims: int) -> Tensor:
        result = torch.logaddexp(*self.log_prob_components(value))
        return result.flatten(-event_ndims).sum(-1) if event_ndims else result

    def sample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """Draw counts of shape sample + batch."""
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            pi = torch.sigmoid(self.mixing_logits).to(torch.float32).expand(shape)
            log_mean = torch.where(
                torch.bernoulli(pi).bool(),
                self.background.log_mean.expand(shape),
                self.foreground.log_mean.expand(shape),
            )
            return draw_counts(log_mean, self.background._log("inverse_dispersion"), shape)
