"""Laws of single-cell measurements, as Pyro distributions.

Counts are scored by kernels that are accurate in single precision and compute value and gradient together.
"""

from pyro.distributions import Normal

from .beta_binomial import BetaBinomial
from .negative_binomial import NegativeBinomial
from .negative_binomial_mixture import NegativeBinomialMixture
from .poisson import Poisson
from .scaled_bernoulli import ScaledBernoulli
from .zero_inflated_negative_binomial import ZeroInflatedNegativeBinomial

__all__ = [
    "BetaBinomial",
    "NegativeBinomial",
    "NegativeBinomialMixture",
    "Normal",
    "Poisson",
    "ScaledBernoulli",
    "ZeroInflatedNegativeBinomial",
]
