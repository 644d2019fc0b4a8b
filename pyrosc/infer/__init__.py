"""Inference: objectives, guides, posterior passes."""

from pyrosc.infer.elbo import PathwiseELBO
from pyrosc.infer.guides import Amortized, auto

__all__ = ["Amortized", "PathwiseELBO", "auto"]
